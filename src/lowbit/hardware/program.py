"""A network as a list of steps on whole numbers, each of a fixed-point type: what every back end reads.

Nothing here is floating point but what goes in and what comes out. A step computes exactly, a softmax by its
tables and a mean to more bits than those who read it tell apart; where it `rounds` its result is then cast to
its type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.core.fixed import FixedPoint, cast, from_real, to_real
from lowbit.errors import LowbitError
from lowbit.hardware.arithmetic import OPERATIONS

__all__ = ["Constant", "Program", "Step"]

# told of a step, its exact result and the bits behind the point of that, before it is cast
Watch = Callable[["Step", Tensor, int], None]
# samples that are run at once
CHUNK = 256


@dataclass(frozen=True, eq=False)
class Constant:
    """A weight or a bias: int64 codes of a type."""

    codes: Tensor
    type: FixedPoint

    def real(self) -> Tensor:
        """float32; exact up to 24 bits."""
        return to_real(self.codes, self.type.fraction).float()


@dataclass(frozen=True, eq=False)
class Step:
    """One operation.

    Invariant: codes of the exact result lie in [low, high], `fraction` bits of them behind the point; where
    nothing is rounded `type` holds them all.
    """

    # as rules and reports call it
    name: str
    # "input", or one of `OPERATIONS`
    op: str
    # positions of the steps that it reads
    inputs: tuple[int, ...]
    # of one sample, channels first
    shape: tuple[int, ...]
    type: FixedPoint
    # whether the result is cast to the type, or has it already
    rounds: bool = False
    fraction: int = 0
    low: int = 0
    high: int = 0
    weight: Constant | None = None
    bias: Constant | None = None
    # kernel, stride, padding, dilation, groups, axis, axes: what the operation has
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """How often each weight multiplies in one sample."""
        return math.prod(self.shape[1:] if self.op == "conv" else self.shape[:-1])

    @property
    def macs(self) -> int:
        """Multiplications for one sample."""
        return 0 if self.weight is None else self.weight.codes.numel() * self.positions

    def rounded_to(self, to: FixedPoint) -> Step:
        """The step with a cast at its end."""
        return replace(self, type=to, rounds=True)


@dataclass(frozen=True, eq=False)
class Program:
    """Steps in the order in which they run; some are what the network returns."""

    steps: tuple[Step, ...]
    # positions of the results
    outputs: tuple[int, ...]

    @property
    def inputs(self) -> list[Step]:
        return [step for step in self.steps if step.op == "input"]

    def run(self, *inputs: Tensor, seen: Watch | None = None) -> list[Tensor]:
        """The results as int64 codes, each of the type of its step.

        Args:
            inputs: floating point batches [n, ...], one for each input; they are rounded first.
            seen: told of every step.

        Raises:
            LowbitError: another number of inputs, or other shapes.
        """
        steps = self.inputs
        shapes = [tuple(x.shape[1:]) for x in inputs]
        if shapes != [step.shape for step in steps]:
            want = ", ".join(str([*step.shape]) for step in steps)
            raise LowbitError(f"inputs of shapes {shapes} for a network whose samples are {want}")
        for x, step in zip(inputs, steps, strict=True):
            if seen is not None:
                seen(step, from_real(x, step.type, clip=False), step.type.fraction)
        return self.run_codes([from_real(x, s.type) for x, s in zip(inputs, steps, strict=True)], seen)

    def run_codes(self, inputs: Sequence[Tensor], seen: Watch | None = None) -> list[Tensor]:
        """The same from int64 codes: whole numbers alone."""
        starts = range(0, max(1, len(inputs[0])), CHUNK)
        parts = [self._run_chunk([x[i : i + CHUNK] for x in inputs], seen) for i in starts]
        return [torch.cat(results) for results in zip(*parts, strict=True)]

    def _run_chunk(self, inputs: list[Tensor], seen: Watch | None) -> list[Tensor]:
        values: list[Tensor] = []
        given = iter(inputs)
        for step in self.steps:
            if step.op == "input":
                values.append(next(given))
                continue
            read = [(values[i], self.steps[i].type.fraction) for i in step.inputs]
            exact = OPERATIONS[step.op].run(step, read)
            if seen is not None:
                seen(step, exact, step.fraction)
            values.append(cast(exact, step.fraction, step.type) if step.rounds else exact)
        return [values[i] for i in self.outputs]

    def real(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Codes of the results as float64."""
        pairs = zip(self.outputs, results, strict=True)
        return [to_real(codes, self.steps[i].type.fraction) for i, codes in pairs]

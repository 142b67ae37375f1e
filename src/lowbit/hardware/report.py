"""What hardware will hold: the type of every tensor, what it costs, and how often values do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.fixed import outside
from lowbit.hardware.cost import ebops
from lowbit.hardware.program import Program, Step
from lowbit.tables import text_table

__all__ = ["HardwareReport", "Row", "describe"]


@dataclass(frozen=True)
class Row:
    """One step."""

    name: str
    op: str
    shape: tuple[int, ...]
    # types as `ap_fixed` writes them
    result: str
    weight: str
    bias: str
    macs: int
    # effective bit operations
    ebops: int
    # share of the values on the data that the type of the result cannot hold; None without data, or where
    # nothing is rounded
    overflow: float | None


@dataclass(frozen=True)
class HardwareReport:
    """All steps of a network."""

    rows: tuple[Row, ...]

    @property
    def ebops(self) -> int:
        return sum(row.ebops for row in self.rows)

    def __str__(self) -> str:
        header = ("step", "operation", "shape", "weight", "bias", "result", "MACs", "EBOPs", "overflow")
        rows = [
            (
                r.name,
                r.op,
                " ".join(map(str, r.shape)),
                r.weight,
                r.bias,
                r.result,
                f"{r.macs:,}" if r.macs else "",
                f"{r.ebops:,}" if r.ebops else "",
                "" if r.overflow is None else f"{r.overflow:.2%}",
            )
            for r in self.rows
        ]
        macs = sum(r.macs for r in self.rows)
        return (
            f"{text_table(header, rows)}\n{macs:,} multiplications, {self.ebops:,} effective bit operations"
        )


def describe(program: Program, inputs: Sequence[Tensor] | None = None) -> HardwareReport:
    """A row for each step.

    Args:
        inputs: float samples, one tensor for each input; with them overflows are counted.
    """
    # of values that a step cannot hold, and of all
    counts: dict[int, list[int]] = {}

    def watch(step: Step, exact: Tensor, fraction: int) -> None:
        if step.rounds:
            seen = counts.setdefault(id(step), [0, 0])
            seen[0] += int(outside(exact, fraction, step.type).sum())
            seen[1] += exact.numel()

    if inputs is not None:
        with torch.no_grad():
            program.run(*inputs, seen=watch)
    costs = ebops(program)
    rows = []
    for step in program.steps:
        lost, count = counts.get(id(step), (0, 0))
        rows.append(
            Row(
                name=step.name,
                op=step.op,
                shape=step.shape,
                result=str(step.type),
                weight="" if step.weight is None else str(step.weight.type),
                bias="" if step.bias is None else str(step.bias.type),
                macs=step.macs,
                ebops=costs.pop(step.name, 0) if step.weight is not None else 0,
                overflow=lost / count if count else None,
            )
        )
    return HardwareReport(tuple(rows))

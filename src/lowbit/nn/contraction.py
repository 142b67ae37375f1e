"""Orders in which the cores of a tensor train meet their input, what each costs, and the cheapest.

A train is contracted core by core, from its first or from its last. Neighbours may be merged before: of four
cores (1, 1, 1, 1) is the plain sweep, (2, 2) two merged halves and (4,) the dense matrix. Which is fastest
depends on batch, ranks and modes, and on whether merged cores can be kept. Where nothing is trained, all
steps may be one call of the compiled library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kernels import tensor_train

__all__ = ["Order", "Run", "Shape", "best_order", "matrices", "merged", "orders"]

Run = Callable[[Tensor], Tensor]
# Seconds of one core with AVX2. Only their ratios matter, and they differ little elsewhere.
CALL, MAC, MOVE = 4e-6, 1 / 38e9, 1 / 2e9
# rows, depth and columns at which a matrix product runs at half speed
HALF = (4, 12, 12)
# The same of the compiled library, a multiply-accumulate by the floats in a vector. Beside the depth of a
# product stands what it takes to begin and end its tiles, and fewer vectors of sums than these take as long.
NATIVE_CALL, NATIVE_MAC = 3e-6, {4: 1 / 10e9, 8: 1 / 45e9, 16: 1 / 45e9}
ENDS, SUMS = 16, 8


@dataclass(frozen=True)
class Shape:
    """Of a train: core k is [ranks[k], out_modes[k], in_modes[k], ranks[k + 1]]; the outer ranks are 1."""

    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    ranks: tuple[int, ...]

    def grouped(self, groups: Sequence[int]) -> Shape:
        """The shape once so many neighbours each are merged."""
        ends = [sum(groups[: k + 1]) for k in range(len(groups))]
        spans = [slice(end - size, end) for size, end in zip(groups, ends, strict=True)]
        out, into = ([math.prod(modes[s]) for s in spans] for modes in (self.out_modes, self.in_modes))
        return Shape(tuple(out), tuple(into), (1, *(self.ranks[end] for end in ends)))

    @property
    def parameters(self) -> int:
        pairs = zip(self.ranks, self.out_modes, self.in_modes, self.ranks[1:], strict=False)
        return sum(math.prod(sizes) for sizes in pairs)


@dataclass(frozen=True)
class _Step:
    """One merged core: `batch` products [outputs, depth] x [depth, rest], done the faster of two ways."""

    batch: int
    outputs: int
    depth: int
    rest: int

    @property
    def macs(self) -> int:
        return self.batch * self.outputs * self.depth * self.rest

    @cached_property
    def seconds(self) -> float:
        return min(self._folded, self._batched)

    @cached_property
    def folds(self) -> bool:
        """Whether one product of many rows is faster than many of few columns, although that transposes."""
        return self._folded < self._batched

    @property
    def _batched(self) -> float:
        return CALL + _product_seconds(self.macs, self.rest, self.depth, self.outputs)

    @property
    def _folded(self) -> float:
        rows = self.batch * self.rest
        moved = rows * (self.depth + self.outputs) if self.rest > 1 else 0
        calls = 3 * CALL if self.rest > 1 else CALL
        return calls + MOVE * moved + _product_seconds(self.macs, rows, self.depth, self.outputs)

    def native_seconds(self, lanes: int) -> float:
        """Of the step of one sample in the compiled library: its tiles are as wide as a panel at most."""
        once = self.rest == 1
        count, rows, columns = (
            (1, self.batch, self.outputs) if once else (self.batch, self.outputs, self.rest)
        )
        wide = -(-columns // lanes) * lanes
        high = max(rows, SUMS * lanes // min(wide, tensor_train.PANEL))
        return NATIVE_MAC[lanes] * count * high * (self.depth + ENDS) * wide

    def bound(self, matrix: Tensor, bias: Tensor | None) -> Run:
        """The step with its matrix: [batch, depth, rest] -> [batch, outputs, rest], however x is shaped.

        Args:
            bias: [outputs * rest], the same for every product; where rest = 1 also [batch * outputs].
        """
        if self.rest == 1:
            shape = (self.batch, self.depth)
            if bias is None or bias.numel() == self.outputs:
                return lambda x: F.linear(x.reshape(shape), matrix, bias)
            weight, rows = matrix.t(), bias.reshape(self.batch, self.outputs)
            return lambda x: torch.addmm(rows, x.reshape(shape), weight)
        added = None if bias is None else bias.reshape(self.outputs, self.rest)
        if self.batch == 1:
            flat = (self.depth, self.rest)
            if added is None:
                return lambda x: matrix @ x.reshape(flat)
            return lambda x: torch.addmm(added, matrix, x.reshape(flat))
        deep = (self.batch, self.depth, self.rest)
        if self.folds:
            return self._bound_folded(matrix, added)
        wide = matrix.expand(self.batch, -1, -1)
        if added is None:
            return lambda x: torch.bmm(wide, x.reshape(deep))
        return lambda x: torch.baddbmm(added, wide, x.reshape(deep))

    def _bound_folded(self, matrix: Tensor, added: Tensor | None) -> Run:
        def run(x: Tensor) -> Tensor:
            x = x.reshape(self.batch, self.depth, self.rest).transpose(1, 2).reshape(-1, self.depth)
            y = F.linear(x, matrix).reshape(self.batch, self.rest, self.outputs).transpose(1, 2)
            return y if added is None else y + added

        return run


def _product_seconds(macs: int, rows: int, depth: int, columns: int) -> float:
    return MAC * macs * math.prod(1 + half / n for half, n in zip(HALF, (rows, depth, columns), strict=True))


@dataclass(frozen=True)
class Order:
    """How a train is contracted: neighbours merged in groups, then core after core, for so many rows."""

    shape: Shape
    # how many cores each group has, first to last
    groups: tuple[int, ...]
    # from the first core, or from the last
    forward: bool
    rows: int
    # floats in a vector of the compiled library that does it; 0: PyTorch does
    lanes: int = 0

    @cached_property
    def steps(self) -> tuple[_Step, ...]:
        """In the order in which they are done."""
        shape = self.shape.grouped(self.groups)
        before, after = (
            (shape.out_modes, shape.in_modes) if self.forward else (shape.in_modes, shape.out_modes)
        )
        steps = []
        for k, (m, n) in enumerate(zip(shape.out_modes, shape.in_modes, strict=True)):
            ranks = shape.ranks[k], shape.ranks[k + 1]
            read, written = ranks if self.forward else ranks[::-1]
            steps.append(
                _Step(self.rows * math.prod(before[:k]), m * written, n * read, math.prod(after[k + 1 :]))
            )
        return tuple(steps if self.forward else steps[::-1])

    @cached_property
    def of_sample(self) -> tuple[_Step, ...]:
        """The steps of one row."""
        return replace(self, rows=1).steps

    @property
    def macs(self) -> int:
        """Multiply-accumulates, merged cores at hand."""
        return sum(step.macs for step in self.steps)

    @property
    def floats(self) -> int:
        """Of the merged cores."""
        return self.shape.grouped(self.groups).parameters

    @cached_property
    def seconds(self) -> float:
        """Predicted, merged cores at hand."""
        if self.lanes:
            return NATIVE_CALL + self.rows * sum(step.native_seconds(self.lanes) for step in self.of_sample)
        return sum(step.seconds for step in self.steps)

    @cached_property
    def merging_seconds(self) -> float:
        """Predicted, of merging the cores."""
        shape, total, at = self.shape, 0.0, 0
        for size in self.groups:
            m, n = shape.out_modes[at], shape.in_modes[at]
            for k in range(at + 1, at + size):
                rows, shared = shape.ranks[at] * m * n, shape.ranks[k]
                columns = shape.out_modes[k] * shape.in_modes[k] * shape.ranks[k + 1]
                m, n = m * shape.out_modes[k], n * shape.in_modes[k]
                product = _product_seconds(rows * shared * columns, rows, shared, columns)
                total += 3 * CALL + MOVE * rows * columns + product
            at += size
        return total

    def prepared(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Matrices as `bound` takes them, from those of `matrices`; for PyTorch they are the same."""
        if not self.lanes:
            return list(matrices)
        steps = self.of_sample if self.forward else self.of_sample[::-1]
        parts = zip(steps, matrices, strict=True)
        return [tensor_train.packed(matrix) if step.rest == 1 else matrix for step, matrix in parts]

    def bound(
        self, matrices: Sequence[Tensor], bias: Tensor | None, shape: tuple[int, ...] | None = None
    ) -> Run:
        """The train with its matrices: [rows, in] -> [rows, out]; what is fixed is done once, here.

        Args:
            matrices: from `prepared`.
            shape: of the result, if it is to be another.
        """
        out = (self.rows, math.prod(self.shape.out_modes)) if shape is None else shape
        ordered = matrices if self.forward else matrices[::-1]
        if self.lanes:
            steps = [tensor_train.Step(s.batch, s.outputs, s.depth, s.rest) for s in self.of_sample]
            return tensor_train.product(steps, ordered, bias, self.rows, out)
        if len(matrices) == 1:
            weight, flat = matrices[0], (self.rows, matrices[0].shape[1])
            return lambda x: F.linear(x.reshape(flat), weight, bias).reshape(out)
        # backward, or of one row, the last step ends in whole samples, and the bias goes with it
        fused = bias if not self.forward or self.rows == 1 else None
        biases = [None] * (len(ordered) - 1) + [fused]
        parts = zip(self.steps, ordered, biases, strict=True)
        runs = [step.bound(matrix, added) for step, matrix, added in parts]
        later = None if fused is not None else bias

        def run(x: Tensor) -> Tensor:
            for step in runs:
                x = step(x)
            return x.reshape(out) if later is None else (x.reshape(self.rows, -1) + later).reshape(out)

        return run


def orders(shape: Shape, rows: int) -> Iterator[Order]:
    """All of them: every way to merge neighbours, from either end."""
    cores = len(shape.out_modes)
    for cuts in range(2 ** (cores - 1)):
        ends = [k + 1 for k in range(cores) if k == cores - 1 or cuts >> k & 1]
        groups = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
        for forward in (True,) if len(groups) == 1 else (True, False):
            yield Order(shape, groups, forward, rows)


@lru_cache(maxsize=4096)
def best_order(shape: Shape, rows: int, kept: int, lanes: int = 0) -> Order:
    """The cheapest for so many rows.

    Args:
        kept: floats of merged cores that may be kept between calls; what is larger is merged in each.
        lanes: floats in a vector of the compiled library, where it may be used.
    """

    def seconds(order: Order) -> float:
        return order.seconds + (order.merging_seconds if order.floats > kept else 0.0)

    found = list(orders(shape, rows))
    native = [replace(order, lanes=lanes) for order in found if lanes and order.floats <= kept]
    return min(found + native, key=seconds)


def merged(cores: Sequence[Tensor], groups: Sequence[int]) -> list[Tensor]:
    """Neighbouring cores [r, m, n, s] multiplied: [r, m1 m2 ..., n1 n2 ..., s]."""
    found, at = [], 0
    for size in groups:
        whole = cores[at]
        for core in cores[at + 1 : at + size]:
            pair = torch.tensordot(whole, core, 1).permute(0, 1, 3, 2, 4, 5)
            whole = pair.flatten(3, 4).flatten(1, 2)
        found.append(whole)
        at += size
    return found


def matrices(cores: Sequence[Tensor], forward: bool) -> list[Tensor]:
    """What multiplies from the left: [m s, r n] if the train is read from its first core, else [r m, n s]."""
    order = (1, 3, 0, 2) if forward else (0, 1, 2, 3)
    return [core.permute(order).flatten(2).flatten(0, 1).contiguous() for core in cores]

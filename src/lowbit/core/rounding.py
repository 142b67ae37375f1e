"""Rounding that knows what it is for: codes of a weight chosen for the least error of the layer's output.

A layer y = W x with W [rows, columns] rounded to Q loses, beside a constant, trace((Q - T) H (Q - T)^T), with
H = E[u u^T] over the inputs u that it really reads and T the best float weight for these. Rows do not mix:
each is a problem of its own. A grouped convolution is several such layers; all tensors here begin with an
axis of groups, of length 1 for every other layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.affine import fake_quantize
from lowbit.core.spec import QuantSpec

__all__ = ["Gain", "Grid", "Moments", "Objective", "descend", "feedback", "refit_scale"]

# columns that are rounded before what they lost is passed on to the rest of the row
BLOCK = 128
# beyond so many columns moments are float32: each is a matrix of columns x columns
MANY_COLUMNS = 2048
# shares of the mean of the diagonal, of which the one that serves unseen inputs best is added to it
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Gain:
    """What became of one layer: SQNR of its output in dB, beside that of the float network."""

    name: str
    # None where nothing was measured
    before_db: float | None = None
    after_db: float | None = None
    # why it stayed as it was, or ""
    why: str = ""

    def __str__(self) -> str:
        if self.before_db is None or self.after_db is None:
            return f"  {self.name}: as it was, {self.why}"
        why = f"; as it was, {self.why}" if self.why else ""
        return f"  {self.name}: {self.before_db:.1f} -> {self.after_db:.1f} dB{why}"


@dataclass(frozen=True)
class Grid:
    """Where values may go: scale and zero point [groups, rows, columns or 1]."""

    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec

    def nearest(self, x: Tensor) -> Tensor:
        """Every value at its nearest place."""
        scale = self.scale.to(x.dtype).expand_as(x)
        zero = None if self.zero_point is None else self.zero_point.expand_as(x)
        return fake_quantize(x, scale, zero, self.spec)

    def columns(self, like: Tensor, order: Tensor | None = None) -> list[Grid]:
        """One grid for each column of a tensor of that shape, perhaps in another order [groups, columns]."""

        def split(t: Tensor) -> tuple[Tensor, ...]:
            t = (t.to(like.dtype) if t.is_floating_point() else t).expand(like.shape)
            return (t if order is None else _columns_in(t, order)).unbind(-1)

        zeros = [None] * like.shape[-1] if self.zero_point is None else split(self.zero_point)
        return [Grid(s, z, self.spec) for s, z in zip(split(self.scale), zeros, strict=True)]

    def scaled(self, factor: Tensor) -> Grid:
        """The same with every scale times a factor."""
        return Grid(self.scale * factor.to(self.scale.dtype), self.zero_point, self.spec)


@dataclass(frozen=True)
class Moments:
    """Of centred inputs, x as the float network has them and u as the layer really reads them."""

    # sums of u u^T and x u^T, [groups, columns, columns]
    square: Tensor
    cross: Tensor

    @classmethod
    def of(cls, x: Tensor, u: Tensor) -> Moments:
        """From samples [groups, N, columns] of either; sums, for no scale of them changes an answer."""
        dtype = torch.float64 if x.shape[2] <= MANY_COLUMNS else torch.float32
        return cls((u.mT @ u).to(dtype), (x.mT @ u).to(dtype))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.square + other.square, self.cross + other.cross)

    def target(self, weight: Tensor, damping: float) -> Tensor:
        """T with W x ~ T u by least squares, drawn to W [groups, rows, columns] by the damping.

        NaN where the moments are singular however much was added.
        """
        ridge = self.ridge(damping)
        wanted = weight.to(self.square.dtype) @ (self.cross + ridge)
        factor, failed = torch.linalg.cholesky_ex(self.square + ridge)
        found = torch.cholesky_solve(wanted.mT, factor).mT
        return torch.where((failed != 0)[:, None, None], torch.nan, found)

    def ridge(self, damping: float) -> Tensor:
        """What is added to both moments: so much of the mean of the diagonal, on the diagonal."""
        mean = self.square.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        eye = torch.eye(self.square.shape[-1], dtype=self.square.dtype, device=self.square.device)
        return damping * mean[:, None, None] * eye


@dataclass(frozen=True)
class Objective:
    """What rounding costs: trace((Q - target) hessian (Q - target)^T)."""

    # [groups, rows, columns]
    target: Tensor
    # [groups, columns, columns], positive definite
    hessian: Tensor

    @classmethod
    def of(cls, weight: Tensor, x: Tensor, u: Tensor) -> Objective:
        """For inputs x that the layer should read and u that it reads, centred, [groups, N, columns].

        The damping is the one whose target does best on the last quarter of the samples, fitted to the rest.
        """
        held = x.shape[1] - x.shape[1] // 4
        first, rest = (Moments.of(x[:, part], u[:, part]) for part in (slice(held), slice(held, None)))
        wanted, unseen = x[:, held:] @ weight.mT, u[:, held:]

        def off(damping: float) -> float:
            lost = float((unseen @ first.target(weight, damping).float().mT - wanted).square().sum())
            return math.inf if math.isnan(lost) else lost

        damping = min(DAMPINGS, key=off) if unseen.shape[1] else DAMPINGS[-1]
        moments = first + rest
        return cls(moments.target(weight, damping), moments.square + moments.ridge(damping))

    def loss(self, rounded: Tensor) -> Tensor:
        """The cost of each row, [groups, rows]."""
        off = rounded.to(self.target.dtype) - self.target
        return ((off @ self.hessian) * off).sum(-1)

    def cheaper(self, one: Tensor, other: Tensor) -> Tensor:
        """Of each row the one that costs less."""
        return torch.where((self.loss(one) <= self.loss(other))[..., None], one, other)


def feedback(goal: Objective, grid: Grid) -> Tensor:
    """GPTQ: columns rounded in turn, what each lost made good by those that follow (Frantar et al. 2023).

    Columns of the largest inputs go first.

    Returns:
        Q [groups, rows, columns], values on the grid.
    """
    order = goal.hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    hessian = _columns_in(_columns_in(goal.hessian, order).mT, order)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = _columns_in(goal.target, order)
    grids, rounded = grid.columns(left, order), torch.empty_like(left)
    count = left.shape[-1]
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        lost = torch.empty_like(left[..., start:end])
        for j in range(start, end):
            rounded[..., j] = grids[j].nearest(left[..., j])
            lost[..., j - start] = (left[..., j] - rounded[..., j]) / upper[:, j, j, None]
            left[..., j:end] -= lost[..., j - start, None] * upper[:, j, None, j:end]
        left[..., end:] -= lost @ upper[:, start:end, end:]
    return _columns_in(rounded, order.argsort(dim=1))


def descend(goal: Objective, rounded: Tensor, grid: Grid, sweeps: int) -> Tensor:
    """Coordinate descent from there: each code in turn takes its best value, all others fixed.

    The cost never rises. Ends early when a sweep moves nothing.
    """
    rounded, grids = rounded.clone(), grid.columns(rounded)
    slope = (rounded - goal.target) @ goal.hessian
    diagonal = goal.hessian.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        before = rounded.clone()
        for j, place in enumerate(grids):
            best = place.nearest(rounded[..., j] - slope[..., j] / diagonal[:, j, None])
            slope += (best - rounded[..., j])[..., None] * goal.hessian[:, j, None]
            rounded[..., j] = best
        if torch.equal(rounded, before):
            break
    return rounded


def refit_scale(goal: Objective, rounded: Tensor) -> Tensor:
    """The factor of each row of Q that costs least, [groups, rows, 1]; 1 where that is not positive."""
    through = rounded @ goal.hessian
    power, along = (through * rounded).sum(-1), (through * goal.target).sum(-1)
    return torch.where((power > 0) & (along > 0), along / power.clamp(min=1e-30), 1.0)[..., None]


def _columns_in(x: Tensor, order: Tensor) -> Tensor:
    """The last axis of [groups, rows, columns] in an order [groups, columns] of its own for each group."""
    return x.gather(-1, order[:, None].expand(-1, x.shape[1], -1))

"""Running statistics of one tensor, in constant memory, and the range each makes of them.

An observer never keeps a tensor it has seen. Merging two observers gives what one would have given over the
first's data and then the second's: exactly, bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.core import ranges
from lowbit.core.affine import check_finite, grouped
from lowbit.core.histogram import FloatHistogram
from lowbit.core.spec import PerGroup, QuantSpec
from lowbit.errors import LowbitError
from lowbit.registry import Registry

__all__ = [
    "KL",
    "MSE",
    "AdaptivePercentile",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "observers",
]

observers: Registry[type[Observer]] = Registry("observer")


class Observer:
    """Smallest and largest value seen, per tensor or per channel as the spec asks; the base of the others."""

    def __init__(self, spec: QuantSpec) -> None:
        """Start with nothing seen.

        Raises:
            LowbitError: the granularity is PerGroup.
        """
        if isinstance(spec.granularity, PerGroup):
            raise LowbitError(
                "a streamed tensor has no fixed groups; use PerTensor or PerChannel for activations"
            )
        self.spec = spec
        self.batches = 0
        # ends of what was seen, [channels]
        self.lo = torch.empty(0)
        self.hi = torch.empty(0)
        # shape of the scale of the last tensor seen
        self.shape: tuple[int, ...] = ()

    def update(self, x: Tensor) -> None:
        """Take in one batch, a float tensor; an empty one changes nothing.

        Raises:
            LowbitError: NaN, infinity, a missing axis, or another number of channels than before.
        """
        if x.numel() == 0:
            return
        shape = self.spec.scale_shape(x.shape)
        if math.prod(shape) == 1 and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)  # the order in memory: a row of it needs no copy
        rows = grouped(x.detach().float(), shape)
        # the reduction over everything is vectorized, the one over a dimension of one row is not
        lo, hi = (v.reshape(1) for v in torch.aminmax(rows)) if len(rows) == 1 else torch.aminmax(rows, dim=1)
        if not bool(torch.isfinite(lo).all() & torch.isfinite(hi).all()):
            check_finite(rows, "a calibration tensor")
        if self.batches and lo.shape != self.lo.shape:
            raise LowbitError(
                f"a tensor with {len(lo)} channels follows one with {len(self.lo)}; they must agree"
            )
        self._take(rows, lo, hi)
        self._widen(lo, hi)
        self.shape = shape
        self.batches += 1

    def merge(self, other: Observer) -> None:
        """Become what this observer would be had it also seen, afterwards, what `other` saw.

        Raises:
            LowbitError: the observers differ in kind, spec or number of channels.
        """
        if type(other) is not type(self) or other.spec != self.spec:
            raise LowbitError("only observers of one kind and one spec merge")
        if not other.batches:
            return
        if self.batches and other.lo.shape != self.lo.shape:
            raise LowbitError(f"{len(other.lo)} channels cannot merge into {len(self.lo)}")
        self._join(other)
        self._widen(other.lo, other.hi)
        self.shape = other.shape
        self.batches += other.batches

    def range(self) -> tuple[Tensor, Tensor]:
        """Ends of the range to represent, float32 in the shape of the scale.

        Raises:
            LowbitError: nothing was observed.
        """
        if not self.batches:
            raise LowbitError(
                "nothing was observed, so there is no range; run calibration data through the model"
            )
        lo, hi = self._ends()
        return lo.float().reshape(self.shape), hi.float().reshape(self.shape)

    def _widen(self, lo: Tensor, hi: Tensor) -> None:
        self.lo = torch.minimum(self.lo, lo) if self.batches else lo.clone()
        self.hi = torch.maximum(self.hi, hi) if self.batches else hi.clone()

    def _take(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        """Statistics beyond lo and hi; rows is [channels, n]."""

    def _join(self, other: Observer) -> None:
        """Merge the statistics beyond lo and hi."""

    def _ends(self) -> tuple[Tensor, Tensor]:
        return self.lo, self.hi


@observers.register("minmax")
class MinMax(Observer):
    """The smallest and the largest value ever seen: nothing is clipped, one outlier decides the step."""


@observers.register("moving_average")
class MovingAverage(Observer):
    """Exponential moving average of each batch's ends, momentum 0.1, corrected for its start as Adam's are.

    range_t = S_t / (1 - (1 - m)^t) with S_t = (1 - m) S_{t-1} + m x_t and S_0 = 0: the mean of the x_i with
    weights (1 - m)^(t - i). The ends of the last `horizon` batches are kept instead of S, for a sum would not
    merge exactly; what came before weighs less than 1e-9 of the mean.
    """

    momentum = 0.1
    horizon = 200

    def __init__(self, spec: QuantSpec) -> None:
        """Start with nothing seen; the ends come to [horizon, 2, channels]."""
        super().__init__(spec)
        self.recent = torch.empty(0)

    def _take(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        self._append(torch.stack([lo, hi])[None])

    def _join(self, other: Observer) -> None:
        assert isinstance(other, MovingAverage)
        self._append(other.recent[-other.batches :])

    def _append(self, ends: Tensor) -> None:
        if not self.batches:
            self.recent = ends.new_zeros(self.horizon, *ends.shape[1:])
        self.recent = torch.cat([self.recent[len(ends) :], ends])

    def _ends(self) -> tuple[Tensor, Tensor]:
        recent = self.recent[-self.batches :].double()
        weight = (1 - self.momentum) ** torch.arange(len(recent) - 1, -1, -1, device=recent.device).double()
        lo, hi = torch.tensordot(weight / weight.sum(), recent, dims=1)
        return lo, hi


class HistogramObserver(Observer):
    """Counts over floating-point bins; `_choose` turns the histogram of one channel into a range."""

    histogram: FloatHistogram

    def _take(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        if not self.batches:
            self.histogram = FloatHistogram(len(rows), rows.device)
        self.histogram.add(rows, max(-lo.min().item(), hi.max().item()))

    def _join(self, other: Observer) -> None:
        assert isinstance(other, HistogramObserver)
        if not self.batches:
            self.histogram = FloatHistogram(len(other.lo), other.lo.device)
        self.histogram.merge(other.histogram)

    def _ends(self) -> tuple[Tensor, Tensor]:
        edges = self.histogram.edges()
        lo, hi = self.lo.cpu().double(), self.hi.cpu().double()
        channels = zip(self.histogram.counts.cpu(), lo, hi, strict=True)
        chosen = [self._choose(counts, edges, *ends) for counts, *ends in channels]
        # no further than the data, and zero is always inside
        lo = torch.maximum(torch.stack([ends[0] for ends in chosen]), lo).clamp(max=0.0)
        hi = torch.minimum(torch.stack([ends[1] for ends in chosen]), hi).clamp(min=0.0)
        return lo.to(self.lo.device), hi.to(self.hi.device)

    def _choose(self, counts: Tensor, edges: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the range, float64, for counts [bins] between edges [bins + 1] of values from lo to hi."""
        raise NotImplementedError


@observers.register("percentile")
class Percentile(HistogramObserver):
    """Leaves 0.001 % of the values outside at each end."""

    percentile = 99.999

    def _choose(self, counts: Tensor, edges: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        return ranges.percentile_range(counts, edges, self.percentile)


@observers.register("adaptive_percentile")
class AdaptivePercentile(HistogramObserver):
    """The percentile, of eight from 99 to 100, whose range has the least squared error under the spec."""

    def _choose(self, counts: Tensor, edges: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        error = ranges.histogram_error(counts, edges, self.spec)
        percentile = ranges.best_percentile(error, counts, edges, (lo, hi))
        return ranges.percentile_range(counts, edges, percentile)


@observers.register("kl")
class KL(HistogramObserver):
    """The threshold of least Kullback-Leibler divergence of values before and after (Migacz, GTC 2017)."""

    def _choose(self, counts: Tensor, edges: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        return ranges.kl_range(counts, edges, self.spec)


@observers.register("mse")
class MSE(HistogramObserver):
    """The range of least squared error under the spec, clipping weighed against rounding.

    Where codes wrap it is the whole range: what is not clipped but wraps is worth no finer step.
    """

    def _choose(self, counts: Tensor, edges: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.overflow == "wrap":
            return lo, hi
        error = ranges.histogram_error(counts, edges, self.spec)
        return ranges.least_error_range(error, lo, hi, self.spec)

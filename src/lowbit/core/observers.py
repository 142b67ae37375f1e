"""Running statistics of one tensor, in constant memory, and the range each makes of them.

An observer never keeps a tensor it has seen. Merging two observers gives what one would have given over the first's
data and then the second's: exactly, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.core import ranges
from lowbit.core.affine import check_finite
from lowbit.core.histogram import FloatHistogram
from lowbit.core.spec import PerChannel, PerGroup, QuantSpec
from lowbit.errors import LowbitError
from lowbit.registry import Registry

__all__ = ["KL", "MSE", "AdaptivePercentile", "MinMax", "MovingAverage", "Observer", "Percentile", "observers"]

observers: Registry[type[Observer]] = Registry("observer")


class Observer:
    """Smallest and largest value seen, per tensor or per channel as the spec asks; the base of all observers."""

    def __init__(self, spec: QuantSpec) -> None:
        if isinstance(spec.granularity, PerGroup):
            raise LowbitError("a streamed tensor has no fixed groups; use PerTensor or PerChannel for activations")
        self.spec = spec
        self.batches = 0
        self.lo = torch.empty(0)
        self.hi = torch.empty(0)
        self.rank = 0

    def update(self, x: Tensor) -> None:
        """Take in one batch, a float tensor; an empty one changes nothing.

        Raises:
            LowbitError: NaN, infinity, or another number of channels than before.
        """
        if x.numel() == 0:
            return
        rows = self._rows(x.detach())
        # the reduction over everything is vectorized, the one over a dimension of one row is not
        lo, hi = (v.reshape(1) for v in torch.aminmax(rows)) if len(rows) == 1 else torch.aminmax(rows, dim=1)
        if not bool(torch.isfinite(lo).all() & torch.isfinite(hi).all()):
            check_finite(x, "a calibration tensor")
        if self.batches and lo.shape != self.lo.shape:
            raise LowbitError(f"a tensor with {len(lo)} channels follows one with {len(self.lo)}; they must agree")
        self.rank = x.ndim
        self._take(rows, lo, hi)
        self.lo = torch.minimum(self.lo, lo) if self.batches else lo
        self.hi = torch.maximum(self.hi, hi) if self.batches else hi
        self.batches += 1

    def merge(self, other: Observer) -> None:
        """Become what this observer would be had it also seen, afterwards, what `other` saw."""
        if type(other) is not type(self) or other.spec != self.spec:
            raise LowbitError("only observers of one kind and one spec merge")
        if not other.batches:
            return
        if self.batches and other.lo.shape != self.lo.shape:
            raise LowbitError(f"{len(other.lo)} channels cannot merge into {len(self.lo)}")
        self._join(other)
        self.lo = torch.minimum(self.lo, other.lo) if self.batches else other.lo.clone()
        self.hi = torch.maximum(self.hi, other.hi) if self.batches else other.hi.clone()
        self.rank = other.rank
        self.batches += other.batches

    def range(self) -> tuple[Tensor, Tensor]:
        """Ends of the range to represent, in the shape of the scale.

        Raises:
            LowbitError: nothing was observed.
        """
        if not self.batches:
            raise LowbitError("nothing was observed, so there is no range; run calibration data through the model")
        lo, hi = self._ends()
        shape = [1] * self.rank
        if isinstance(self.spec.granularity, PerChannel):
            shape[self.spec.granularity.axis] = -1
        return lo.float().reshape(shape), hi.float().reshape(shape)

    def _rows(self, x: Tensor) -> Tensor:
        x = x.float()
        if isinstance(self.spec.granularity, PerChannel):
            return x.movedim(self.spec.granularity.axis, 0).flatten(1) if x.ndim > 1 else x.reshape(-1, 1)
        return x.reshape(1, -1)

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
    """Exponential moving average of each batch's ends, momentum 0.1, corrected for its start (Adam's correction).

    range_t = S_t / (1 - (1 - m)^t) with S_t = (1 - m) S_{t-1} + m x_t and S_0 = 0. Kept in float64.
    """

    momentum = 0.1

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.sums = torch.zeros(2, 1, dtype=torch.float64)

    def _take(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        self.sums = (1 - self.momentum) * self.sums + self.momentum * torch.stack([lo, hi]).double()

    def _join(self, other: Observer) -> None:
        assert isinstance(other, MovingAverage)
        self.sums = (1 - self.momentum) ** other.batches * self.sums + other.sums

    def _ends(self) -> tuple[Tensor, Tensor]:
        lo, hi = self.sums / (1 - (1 - self.momentum) ** self.batches)
        return lo, hi


class HistogramObserver(Observer):
    """Counts over floating-point bins; `_choose` turns the histogram of one channel into a range."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.histogram: FloatHistogram | None = None

    def _take(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        if self.histogram is None:
            self.histogram = FloatHistogram(len(rows))
        self.histogram.add(rows, max(-lo.min().item(), hi.max().item(), 0.0))

    def _join(self, other: Observer) -> None:
        assert isinstance(other, HistogramObserver) and other.histogram is not None
        if self.histogram is None:
            self.histogram = FloatHistogram(len(other.histogram.counts))
        self.histogram.merge(other.histogram)

    def _ends(self) -> tuple[Tensor, Tensor]:
        assert self.histogram is not None
        edges = self.histogram.edges()
        chosen = []
        for counts, lo, hi in zip(self.histogram.counts, self.lo.double(), self.hi.double(), strict=True):
            ends = self._choose(counts, edges, lo, hi)
            chosen.append(torch.stack([torch.maximum(ends[0], lo).clamp(max=0.0), torch.minimum(ends[1], hi).clamp(min=0.0)]))
        return torch.stack([c[0] for c in chosen]), torch.stack([c[1] for c in chosen])

    def _choose(self, counts: Tensor, edges: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        raise LowbitError(f"{type(self).__name__} does not choose a range; define _choose")


@observers.register("percentile")
class Percentile(HistogramObserver):
    """Leaves 0.01 % of the values outside at each end."""

    percentile = 99.99

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
    """The threshold of least Kullback-Leibler divergence between values before and after (Migacz, GTC 2017)."""

    def _choose(self, counts: Tensor, edges: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        return ranges.kl_range(counts, edges, self.spec)


@observers.register("mse")
class MSE(HistogramObserver):
    """The range of least squared error under the spec, clipping weighed against rounding."""

    def _choose(self, counts: Tensor, edges: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        return ranges.least_error_range(ranges.histogram_error(counts, edges, self.spec), lo, hi, self.spec)

"""Choosing the range to represent: what lies outside is clipped, what lies inside is rounded.

Each function takes what is known of a tensor (its histogram, or the values themselves) and returns the ends lo and hi.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.core.affine import choose_qparams, fake_quantize, grouped
from lowbit.core.spec import QuantSpec

__all__ = ["best_percentile", "kl_range", "least_error_range", "least_error_range_of", "percentile_range"]

# error(lo, hi) -> squared error of each scale, for ends in the shape of the scale
ErrorOfRange = Callable[[Tensor, Tensor], Tensor]
PERCENTILES = (99.0, 99.5, 99.9, 99.95, 99.99, 99.995, 99.999, 100.0)


def least_error_range(error: ErrorOfRange, lo: Tensor, hi: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The sub-range of [lo, hi] of least error, for each scale by itself.

    The ends shrink together over a geometric grid and then a finer one; where both ends count (an asymmetric spec
    over a signed tensor) each end then shrinks alone.
    """
    lo, hi = lo.double().clamp(max=0.0), hi.double().clamp(min=0.0)
    lo, hi = _shrink(error, lo, hi, (True, True))
    if not spec.symmetric and bool((lo < 0).any()) and bool((hi > 0).any()):
        for ends in ((True, False), (False, True), (True, False)):
            lo, hi = _shrink(error, lo, hi, ends)
    return lo, hi


def _shrink(error: ErrorOfRange, lo: Tensor, hi: Tensor, ends: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    best = torch.zeros_like(hi)  # log2 of the factor; 0 keeps the range
    least = error(lo, hi)

    def attempt(step: Tensor) -> None:
        nonlocal best, least
        factor = torch.exp2(step)
        new = error(lo * factor if ends[0] else lo, hi * factor if ends[1] else hi)
        better = new < least
        best, least = torch.where(better, step, best), torch.where(better, new, least)

    for k in range(1, 41):
        attempt(torch.full_like(hi, -k / 8))
    for width in (1 / 16, 1 / 32, 1 / 64):
        centre = best.clone()
        for sign in (-1.0, 1.0):
            attempt((centre + sign * width).clamp(max=0.0))
    factor = torch.exp2(best)
    return (lo * factor if ends[0] else lo), (hi * factor if ends[1] else hi)


def least_error_range_of(x: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The range of least squared error of a tensor at rest, such as a weight; exact, from the values themselves.

    Args:
        x: float tensor.
        importance: weight of each squared error, broadcastable to `x`; for a weight, the mean square of the inputs
            that it multiplies makes this the error of the layer's output (inputs taken as uncorrelated).
    """
    shape = spec.scale_shape(x.shape)
    rows = grouped(x, shape)
    importance_rows = None if importance is None else grouped(importance.expand_as(x), shape)
    row_spec = spec  # grouped rows keep the codes of the spec; only where the scales lie has changed

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        scale, zero_point = choose_qparams(lo, hi, row_spec)
        damage = (fake_quantize(rows, scale, zero_point, row_spec) - rows).square_()
        if importance_rows is not None:
            damage *= importance_rows
        return damage.sum(dim=1, keepdim=True)

    if x.numel() == 0:
        return torch.zeros(shape), torch.zeros(shape)
    lo, hi = torch.aminmax(rows, dim=1, keepdim=True)
    lo, hi = least_error_range(error, lo, hi, spec)
    return lo.reshape(shape), hi.reshape(shape)


def histogram_error(counts: Tensor, edges: Tensor, spec: QuantSpec) -> ErrorOfRange:
    """Squared error of quantizing what a histogram holds, values spread evenly within each bin.

    The integral of (x - Q(x))^2 has a closed form: with n = round(x / s) and f = x / s - n it is
    s^3 (n / 12 + f^3 / 3) inside the range, and a cubic in the distance from the range outside.

    Args:
        counts: [bins]; edges: [bins + 1], ascending, float64.
    """
    used = counts > 0
    left, right = edges[:-1][used], edges[1:][used]
    density = counts[used].double() / (right - left)

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        scale, zero_point = choose_qparams(lo, hi, spec)
        step = scale.double()
        offset = 0 if zero_point is None else zero_point
        bottom, top = (spec.qmin - offset) * step, (spec.qmax - offset) * step

        def integral(x: Tensor) -> Tensor:
            inside = torch.minimum(torch.maximum(x, bottom), top)
            codes = torch.round(inside / step)
            rest = inside / step - codes
            return step**3 * (codes / 12 + rest**3 / 3) + (x - inside) ** 3 / 3

        return ((integral(right) - integral(left)) * density).sum().reshape(lo.shape)

    return error


def percentile_range(counts: Tensor, edges: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Ends that leave out the share 1 - percentile / 100 of the values at each end; 0-dim float64 tensors."""
    cumulative = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).double()
    total = cumulative[-1]

    def value(share: float) -> Tensor:
        target = total * share
        at = int(torch.searchsorted(cumulative, target)) if share > 0.5 else int(torch.searchsorted(cumulative, target, right=True))
        at = min(max(at, 1), len(cumulative) - 1)
        inside = (target - cumulative[at - 1]) / (cumulative[at] - cumulative[at - 1]).clamp(min=1)
        return edges[at - 1] + inside * (edges[at] - edges[at - 1])

    share = percentile / 100
    return value(1 - share), value(share)


def best_percentile(error: ErrorOfRange, counts: Tensor, edges: Tensor, ends: tuple[Tensor, Tensor]) -> float:
    """The percentile of `PERCENTILES` whose range has the least squared error; of equals, the largest."""
    def damage(percentile: float) -> float:
        lo, hi = percentile_range(counts, edges, percentile)
        return error(torch.maximum(lo, ends[0]).clamp(max=0.0), torch.minimum(hi, ends[1]).clamp(min=0.0)).item()

    return min(reversed(PERCENTILES), key=damage)


def kl_range(counts: Tensor, edges: Tensor, spec: QuantSpec, bins: int = 2048) -> tuple[Tensor, Tensor]:
    """The threshold whose quantized distribution diverges least from the clipped one (Migacz, GTC 2017).

    Magnitudes are resampled into `bins` even bins. For each threshold the distribution P, its outliers gathered in the
    last bin, is compared with Q, the same bins merged into as many levels as the spec has codes for magnitudes and
    spread back over the bins that were not empty; the threshold with the least KL(P || Q) wins.
    """
    magnitudes = _even_bins(counts, edges, bins)
    width = torch.maximum(edges[-1].abs(), edges[0].abs())
    top = int(torch.nonzero(magnitudes).max()) + 1 if magnitudes.any() else 0
    levels = spec.qmax + 1 if spec.signed or not bool((edges[:-1][counts > 0] < 0).any()) else (spec.qmax + 1) // 2
    if top <= levels or top == 0:
        threshold = width * max(top, 1) / bins
        return -threshold, threshold
    candidates = torch.linspace(levels, top, min(256, top - levels + 1)).round().long().unique().tolist()
    best = min(candidates, key=lambda n: _divergence(magnitudes, int(n), levels))
    threshold = width * best / bins
    return -threshold, threshold


def _even_bins(counts: Tensor, edges: Tensor, bins: int) -> Tensor:
    """Counts of |x| over `bins` even bins from 0 to the largest edge, float64; the bin of zero is left out."""
    width = torch.maximum(edges[-1].abs(), edges[0].abs()) / bins
    grid = torch.arange(bins + 1, dtype=torch.float64) * width
    half = len(counts) // 2
    result = torch.zeros(bins, dtype=torch.float64)
    for mass, ends in ((counts[half + 1 :], edges[half + 1 :]), (counts[:half].flip(0), -edges[: half + 1].flip(0))):
        cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(0)]).double()
        at = torch.searchsorted(ends, grid, right=True).clamp(1, len(ends) - 1)
        share = ((grid - ends[at - 1]) / (ends[at] - ends[at - 1])).clamp(0, 1)
        result += (cumulative[at - 1] + share * (cumulative[at] - cumulative[at - 1])).diff()
    return result


def _divergence(magnitudes: Tensor, n: int, levels: int) -> float:
    reference = magnitudes[:n].clone()
    reference[-1] += magnitudes[n:].sum()
    level = (torch.arange(n) * levels) // n
    merged = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, magnitudes[:n])
    filled = (magnitudes[:n] > 0).double()
    spread = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    quantized = filled * (merged / spread.clamp(min=1))[level]
    smooth = 1e-4 * (1 / n)
    p = reference / reference.sum() + smooth
    q = quantized / quantized.sum().clamp(min=1e-30) + smooth
    return float((p * (p / q).log()).sum() / p.sum())

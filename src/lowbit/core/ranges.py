"""Choosing the range to represent: what lies outside is clipped, what lies inside is rounded.

Each function takes what is known of a tensor (its histogram, or the values themselves) and returns the ends
lo and hi.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.core.affine import choose_qparams, fake_quantize, grouped
from lowbit.core.spec import QuantSpec

__all__ = [
    "best_percentile",
    "histogram_error",
    "kl_range",
    "least_error_range",
    "least_error_range_of",
    "percentile_range",
]

# error(lo, hi) -> squared error of each scale, for ends in the shape of the scale
ErrorOfRange = Callable[[Tensor, Tensor], Tensor]
PERCENTILES = (99.0, 99.5, 99.9, 99.95, 99.99, 99.995, 99.999, 100.0)
KL_BINS = 2048
KL_CANDIDATES = 128


def least_error_range(error: ErrorOfRange, lo: Tensor, hi: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The sub-range of [lo, hi] of least error, for each scale by itself.

    The ends shrink together over a geometric grid and then a finer one; where both ends count (an asymmetric
    spec over a signed tensor) each end is then searched alone, the other held.
    """
    lo, hi = lo.double().clamp(max=0.0), hi.double().clamp(min=0.0)
    low = high = _least(lambda s: error(lo * torch.exp2(s), hi * torch.exp2(s)), torch.zeros_like(hi))
    if not spec.symmetric and bool((lo < 0).any()) and bool((hi > 0).any()):
        low = _least(lambda s: error(lo * torch.exp2(s), hi * torch.exp2(high)), low)
        high = _least(lambda s: error(lo * torch.exp2(low), hi * torch.exp2(s)), high)
        low = _least(lambda s: error(lo * torch.exp2(s), hi * torch.exp2(high)), low)
    return lo * torch.exp2(low), hi * torch.exp2(high)


def _least(error: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The log2 of the shrinking factor, from -12 to 0, of least error; `start` is the first one tried."""
    best, least = start, error(start)

    def attempt(step: Tensor) -> Tensor:
        nonlocal best, least
        new = error(step)
        better = new < least
        best, least = torch.where(better, step, best), torch.where(better, new, least)
        return new

    for k in range(97):
        new = attempt(torch.full_like(start, -k / 8))
        # on, while the best of some scale lies within an octave, or the error has hardly grown: it does not
        # where only outliers have codes other than zero, and falls behind that plateau
        if not bool(((best < 1 - k / 8) | (new < 2 * least)).any()):
            break
    for width in (1 / 16, 1 / 32, 1 / 64):
        centre = best
        for sign in (-1.0, 1.0):
            attempt((centre + sign * width).clamp(max=0.0))
    return best


def least_error_range_of(
    x: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The range of least squared error of a tensor at rest, such as a weight; from the values themselves.

    Args:
        x: float tensor.
        spec: how it is to be quantized.
        importance: weight of each squared error, broadcastable to `x`; for a weight, the mean square of the
            inputs that it multiplies makes this the error of the layer's output, inputs being uncorrelated.

    Returns:
        lo and hi, float64 in the shape of the scale.
    """
    shape = spec.scale_shape(x.shape)
    if x.numel() == 0:
        return torch.zeros(shape), torch.zeros(shape)
    rows = grouped(x, shape)
    weights = None if importance is None else grouped(importance.expand_as(x), shape)

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        damage = (fake_quantize(rows, *choose_qparams(lo, hi, spec), spec) - rows).square_()
        if weights is not None:
            damage *= weights
        return damage.sum(dim=1, keepdim=True)

    lo, hi = torch.aminmax(rows, dim=1, keepdim=True)
    lo, hi = least_error_range(error, lo, hi, spec)
    return lo.reshape(shape), hi.reshape(shape)


def histogram_error(counts: Tensor, edges: Tensor, spec: QuantSpec) -> ErrorOfRange:
    """Squared error of quantizing what a histogram holds, values spread evenly within each bin.

    The integral of (x - Q(x))^2 has a closed form: with n the code of x, f = x / s - n and t from one code to
    the next it is s^3 (t^2 n / 12 + f^3 / 3) inside the range, and a cubic in the distance from it outside.
    Where codes are those below, 1/3 stands for t^2 / 12.

    Args:
        counts: [bins].
        edges: [bins + 1], ascending, float64.
        spec: how the values are to be quantized.
    """
    used = torch.nonzero(counts)[:, 0]
    first, end = int(used[0]), int(used[-1]) + 1
    ends = edges[first : end + 1]
    density = counts[first:end].double() / ends.diff()

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        scale, zero_point = choose_qparams(lo, hi, spec)
        step = scale.double()
        offset = 0 if zero_point is None else zero_point
        bottom, top = (spec.qmin - offset) * step, (spec.qmax - offset) * step

        inside = torch.minimum(torch.maximum(ends, bottom), top)
        steps = inside / step
        if spec.mid_rise:
            codes = (2 * torch.floor(steps / 2) + 1).clamp(max=spec.qmax)
        else:
            codes = torch.floor(steps) if spec.rounding == "floor" else torch.round(steps)
        rest, outside = steps - codes, ends - inside  # cubes as products: pow is ten times slower
        of_step = 1 / 3 if spec.rounding == "floor" else spec.step**2 / 12
        integral = step**3 * (of_step * codes + rest * rest * rest / 3)
        integral = integral + outside * outside * outside / 3
        return (integral.diff() * density).sum().reshape(lo.shape)

    return error


def percentile_range(counts: Tensor, edges: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Ends that leave out the share 1 - percentile / 100 of the values at each end; 0-dim float64 tensors."""
    share = percentile / 100
    return -_quantile(counts.flip(0), -edges.flip(0), share), _quantile(counts, edges, share)


def _quantile(counts: Tensor, edges: Tensor, share: float) -> Tensor:
    """The value that a share above 0 of the counts lies below, values spread evenly within each bin."""
    below = _cumulative(counts)
    target = share * below[-1]
    at = torch.searchsorted(below, target)  # the first edge with enough below it
    inside = (target - below[at - 1]) / (below[at] - below[at - 1])
    return edges[at - 1] + inside * (edges[at] - edges[at - 1])


def _cumulative(counts: Tensor) -> Tensor:
    """Count below each edge, float64 [bins + 1]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).double()


def best_percentile(error: ErrorOfRange, counts: Tensor, edges: Tensor, ends: tuple[Tensor, Tensor]) -> float:
    """The percentile of `PERCENTILES` whose range has the least squared error; of equals, the largest."""

    def damage(percentile: float) -> float:
        lo, hi = percentile_range(counts, edges, percentile)
        lo, hi = torch.maximum(lo, ends[0]).clamp(max=0.0), torch.minimum(hi, ends[1]).clamp(min=0.0)
        return error(lo, hi).item()

    return min(reversed(PERCENTILES), key=damage)


def kl_range(counts: Tensor, edges: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The threshold whose quantized distribution diverges least from the clipped one (Migacz, GTC 2017).

    Magnitudes are resampled into `KL_BINS` even bins up to the largest. For each threshold the distribution
    P, its outliers gathered in the last bin, is compared with Q, the same bins merged into as many levels as
    the spec has codes for magnitudes and spread back over the bins that were not empty; the threshold with
    the least KL(P || Q) wins.
    """
    half = len(counts) // 2
    folded, ends = counts[half + 1 :] + counts[:half].flip(0), edges[half + 1 :]  # without the bin of zero
    used = int(torch.nonzero(folded).max()) + 1 if folded.any() else 0
    magnitudes = _even_bins(folded[:used], ends[: used + 1])
    levels = _magnitude_levels(counts, spec)
    threshold = KL_BINS
    if used and levels < KL_BINS:
        candidates = torch.linspace(levels, KL_BINS, min(KL_CANDIDATES, KL_BINS - levels + 1)).round().int()
        threshold = min(candidates.tolist(), key=lambda n: _divergence(magnitudes, n, levels))
    end = ends[used] * threshold / KL_BINS
    return -end, end


def _magnitude_levels(counts: Tensor, spec: QuantSpec) -> int:
    """How many codes there are for magnitudes: half of all where codes and data have two signs."""
    if spec.symmetric:
        return spec.qmax + 1
    half = len(counts) // 2
    two_signs = bool(counts[:half].any()) and bool(counts[half + 1 :].any())
    return (spec.qmax - spec.qmin + 1) // (2 if two_signs else 1)


def _even_bins(counts: Tensor, edges: Tensor) -> Tensor:
    """The same counts over even bins from 0 to the last edge, float64 [KL_BINS]."""
    below = _cumulative(counts)
    grid = torch.linspace(0.0, 1.0, KL_BINS + 1, dtype=torch.float64) * edges[-1]
    at = torch.searchsorted(edges, grid, right=True).clamp(1, len(edges) - 1)
    share = ((grid - edges[at - 1]) / (edges[at] - edges[at - 1])).clamp(0, 1)
    return (below[at - 1] + share * (below[at] - below[at - 1])).diff()


def _divergence(magnitudes: Tensor, n: int, levels: int) -> float:
    """KL(P || Q) for a threshold at the end of bin n."""
    kept = magnitudes[:n]
    level = torch.arange(n) * levels // n
    filled = (kept > 0).double()
    total, width = (torch.zeros(levels, dtype=torch.float64).index_add_(0, level, v) for v in (kept, filled))
    quantized = filled * (total / width.clamp(min=1))[level]
    clipped = kept.clone()
    clipped[-1] += magnitudes[n:].sum()
    smooth = 1e-4 / n  # keeps the logarithm finite where Q is empty
    p = clipped / clipped.sum() + smooth
    q = quantized / quantized.sum().clamp(min=1e-30) + smooth
    return float((p * (p / q).log()).sum() / p.sum())

"""A histogram that needs no range: its bins are those of the floating point format itself.

A bin holds the numbers that share sign, exponent and the leading `MANTISSA` bits, so it is at most 1/128 of
its values wide. `OCTAVES` powers of two below the largest magnitude seen are kept apart; what is smaller
shares the bin of zero. When a larger value arrives the window of octaves moves up and the lowest bins fold
into the bin of zero: nothing is ever clipped, and the result depends neither on the order nor on the batching
of what was counted.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

__all__ = ["FloatHistogram"]

MANTISSA = 7  # with sign and exponent, the upper 16 bits of a float32
OCTAVES = 24
HALF = OCTAVES << MANTISSA  # bins of one sign


class FloatHistogram:
    """Counts per row over bins in ascending order of value: negative bins, the bin of zero, positive bins.

    Invariant: `counts` has shape [rows, 2 * HALF + 1]; the positive bin k (from 0) holds the magnitudes whose
    upper 16 bits are `base + k`, the bin of zero those below; `base + HALF` is one past the octave of the
    largest magnitude seen, or more where that is too small to matter.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        """Start empty, with `rows` rows."""
        self.counts = torch.zeros(rows, 2 * HALF + 1, dtype=torch.int64, device=device)
        self.base = 1  # zero itself lies below every base

    def add(self, x: Tensor, amax: float) -> None:
        """Count the rows of a finite float32 tensor [rows, n > 0]; `amax` is its largest magnitude."""
        octave = int(torch.tensor(amax, dtype=torch.float32).view(torch.int32)) >> 23
        self._move(((octave + 1) << MANTISSA) - HALF)
        flat = x.contiguous().as_strided((x.numel(),), (1,))  # a single element may have any stride
        upper = flat.view(torch.int16)[1::2]  # the upper halves, on a little-endian machine
        if len(self.counts) == 1:
            self._add_row(upper)
        else:
            self._add_rows(upper.view(x.shape).to(torch.int32))

    def _add_row(self, upper: Tensor) -> None:
        """The common case, twice as fast: count every 16-bit pattern, then place those in the window."""
        counts, base = self.counts[0], self.base
        if upper.min() < 0:
            patterns = torch.bincount(upper.to(torch.int32).bitwise_and_(0xFFFF), minlength=1 << 16)
            negative = patterns[1 << 15 :]
            counts[:HALF] += negative[base : base + HALF].flip(0)
            counts[HALF] += negative[:base].sum()
        else:
            patterns = torch.bincount(upper, minlength=1 << 15)
        counts[HALF + 1 :] += patterns[base : base + HALF]
        counts[HALF] += patterns[:base].sum()

    def _add_rows(self, upper: Tensor) -> None:
        rows, width = self.counts.shape
        magnitude = (upper & 0x7FFF).sub_(self.base - 1).clamp_(min=0)  # 0 is the bin of zero
        index = torch.where(upper < 0, -magnitude, magnitude).add_(HALF)
        index += torch.arange(0, rows * width, width, dtype=torch.int32, device=index.device)[:, None]
        self.counts += torch.bincount(index.reshape(-1), minlength=rows * width).view(rows, width)

    def merge(self, other: FloatHistogram) -> None:
        """Add the counts of a histogram with as many rows; it is left as it was."""
        other = copy.copy(other)  # moving replaces the counts, so those of the original stay
        other._move(self.base)
        self._move(other.base)
        self.counts = self.counts + other.counts  # not in place: it may come from inference mode

    def edges(self) -> Tensor:
        """Ends of the bins, ascending, float64 [2 * HALF + 2]; the bin of zero is their middle interval."""
        bits = torch.arange(self.base, self.base + HALF + 1, dtype=torch.int32) << 16
        positive = bits.view(torch.float32).double().clamp(max=2.0**128)  # infinity ends the topmost bin
        return torch.cat([-positive.flip(0), positive])

    def _move(self, base: int) -> None:
        """Raise the window to start at `base`, when it starts below."""
        step = min(base - self.base, HALF)
        if step <= 0:
            return
        self.base = base
        kept = HALF - step
        counts = torch.zeros_like(self.counts)
        counts[:, HALF - kept : HALF] = self.counts[:, :kept]
        counts[:, HALF] = self.counts[:, kept : 2 * HALF + 1 - kept].sum(dim=1)
        counts[:, HALF + 1 : HALF + 1 + kept] = self.counts[:, 2 * HALF + 1 - kept :]
        self.counts = counts

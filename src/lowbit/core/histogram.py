"""A histogram that needs no range: its bins are those of the floating point format itself.

A bin holds the numbers that share sign, exponent and the leading `MANTISSA` bits, so it is at most 1/128 of its values
wide. `OCTAVES` powers of two below the largest magnitude seen are kept apart; what is smaller shares the bin of zero.
When a larger value arrives the window of octaves moves up and the lowest bins fold into the bin of zero: nothing is ever
clipped, and the result depends neither on the order nor on the batching of what was counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FloatHistogram"]

MANTISSA = 7
OCTAVES = 24
HALF = OCTAVES << MANTISSA  # bins of one sign


class FloatHistogram:
    """Counts per row over bins in ascending order of value: negative bins, the bin of zero, positive bins.

    Invariant: `counts` has shape [rows, 2 * HALF + 1]; the positive bin k (from 0) spans the magnitudes whose upper 16
    bits are `base + k`, where `base + HALF` is one past the octave of the largest magnitude seen.
    """

    def __init__(self, rows: int) -> None:
        self.counts = torch.zeros(rows, 2 * HALF + 1, dtype=torch.int64)
        self.base = 1  # zero itself lies below every base

    def add(self, x: Tensor, amax: float) -> None:
        """Count the rows of a finite float32 tensor of shape [rows, n]; `amax` is its largest magnitude."""
        self._reach(amax)
        upper = x.contiguous().view(torch.int16)[:, 1::2]  # little endian: sign, exponent and 7 bits of mantissa
        if len(self.counts) == 1:
            self._add_row(upper[0])
            return
        code = upper.to(torch.int32)
        magnitude = (code & 0x7FFF).sub_(self.base - 1).clamp_(min=0)
        index = torch.where(code < 0, -magnitude, magnitude).add_(HALF)
        width = self.counts.shape[1]
        index += torch.arange(len(self.counts), dtype=torch.int32)[:, None] * width
        self.counts += torch.bincount(index.reshape(-1), minlength=self.counts.numel()).view_as(self.counts)

    def _add_row(self, upper: Tensor) -> None:
        """The common case, twice as fast: count every 16-bit pattern, then place the few that are in the window."""
        if upper.numel() and upper.min() < 0:
            raw = torch.bincount(upper.to(torch.int32).bitwise_and_(0xFFFF), minlength=1 << 16)
            negative = raw[1 << 15 :]
            self.counts[0, :HALF] += negative[self.base : self.base + HALF].flip(0)
            self.counts[0, HALF] += negative[: self.base].sum()
        else:
            raw = torch.bincount(upper, minlength=1 << 15)
        self.counts[0, HALF + 1 :] += raw[self.base : self.base + HALF]
        self.counts[0, HALF] += raw[: self.base].sum()

    def merge(self, other: FloatHistogram) -> None:
        """Add the counts of a histogram with as many rows; it is left as it was."""
        base = max(self.base, other.base)
        self._move(base)
        moved = FloatHistogram(len(other.counts))
        moved.counts, moved.base = other.counts.clone(), other.base
        moved._move(base)
        self.counts += moved.counts

    def edges(self) -> Tensor:
        """Ends of the bins in ascending order, float64 [2 * HALF + 2]; the bin of zero is their middle interval."""
        bits = torch.arange(self.base, self.base + HALF + 1, dtype=torch.int32) << 16
        positive = bits.view(torch.float32).double()
        if torch.isinf(positive[-1]):
            positive[-1] = 2.0**128
        return torch.cat([-positive.flip(0), positive])

    def _reach(self, amax: float) -> None:
        octave = int(torch.tensor(amax, dtype=torch.float32).view(torch.int32)) >> 23
        self._move(max(self.base, ((octave + 1) << MANTISSA) - HALF))

    def _move(self, base: int) -> None:
        step = base - self.base
        if step <= 0:
            return
        self.base = base
        if not self.counts.any():
            return
        kept = HALF - min(step, HALF)
        counts = torch.zeros_like(self.counts)
        counts[:, HALF] = self.counts[:, kept : 2 * HALF + 1 - kept].sum(dim=1)
        counts[:, HALF - kept : HALF] = self.counts[:, :kept]
        counts[:, HALF + 1 : HALF + 1 + kept] = self.counts[:, 2 * HALF + 1 - kept :]
        self.counts = counts

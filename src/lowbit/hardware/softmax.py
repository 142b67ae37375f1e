"""Softmax by two look-up tables on whole numbers, as hls4ml's "stable" one computes it.

d = max(x) - x, y = exp(-d) / sum exp(-d). d and the sum are rounded to the types whose codes are addresses of
the tables; exponentials, reciprocals and shares have 16 bits behind the point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.core.fixed import FixedPoint, cast, from_real, to_real

if TYPE_CHECKING:
    from lowbit.hardware.program import Step

__all__ = ["SHARE", "shares", "shares_bounds", "tables"]

# of whatever lies between 0 and 1
SHARE = FixedPoint(17, 1, signed=False, rounding="half_up", overflow="saturate")
# bits of the address of an exponential
ADDRESS = 10
# exp(-16) is below half a step of a share
REACH = 4
# bits behind the point of a sum, which is at least 1
SUM = 7


def tables(count: int, low: int, high: int, fraction: int) -> dict[str, Any]:
    """Settings of a softmax over so many codes from `low` to `high`: its tables, and the types of addresses.

    The tables are float32 first, for so they are filled in C++.
    """
    distance = FixedPoint.holding(0, high - low, fraction)
    if distance.width > ADDRESS:
        distance = FixedPoint(ADDRESS, min(distance.integer, REACH), False, "half_up", "saturate")
    whole = count.bit_length()
    total = FixedPoint(whole + SUM, whole, False, "half_up", "saturate")
    distances, totals = (to_real(torch.arange(1 << t.width), t.fraction) for t in (distance, total))
    return {
        "distance": distance,
        "total": total,
        "exponentials": from_real((-distances).exp().float(), SHARE),
        "reciprocals": from_real(1 / totals.float(), SHARE),
    }


def shares(step: Step, read: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The exact products of exponentials and the reciprocal of their sum."""
    (x, fraction), how = read[0], step.settings
    distances = cast(x.amax(-1, keepdim=True) - x, fraction, how["distance"])
    found = how["exponentials"][distances]
    totals = cast(found.sum(-1, keepdim=True), SHARE.fraction, how["total"])
    return found * how["reciprocals"][totals]


def shares_bounds(_: Step, __: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    one = 1 << SHARE.fraction
    return 0, one * one, 2 * SHARE.fraction

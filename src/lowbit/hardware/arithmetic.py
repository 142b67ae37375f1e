"""What each operation of a program computes on whole numbers, and in which bounds its results lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.core.fixed import align
from lowbit.hardware.softmax import shares, shares_bounds

if TYPE_CHECKING:
    from lowbit.hardware.program import Step

__all__ = ["OPERATIONS", "Bounds", "Operation", "weighted_bounds", "windows"]

# codes, and how many of their bits stand behind the point
Operand = tuple[Tensor, int]
# lowest code, highest code, bits behind the point
Bounds = tuple[int, int, int]


@dataclass(frozen=True)
class Operation:
    """One row of the table of operations."""

    # int64 codes of the exact result
    run: Callable[[Step, Sequence[Operand]], Tensor]
    # of the result, from those of what is read; weights have `weighted_bounds`
    bounds: Callable[[Step, Sequence[Bounds]], Bounds] | None = None


def _layer(sums: Callable[[Step, Tensor, Tensor], Tensor]) -> Operation:
    def run(step: Step, read: Sequence[Operand]) -> Tensor:
        assert step.weight is not None
        total = sums(step, read[0][0], step.weight.codes)
        if step.bias is None:
            return total
        bias = step.bias.codes
        return total + (bias.reshape(-1, *[1] * (total.ndim - 2)) if step.op == "conv" else bias)

    return Operation(run)


def _dense_sums(_: Step, x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def _conv_sums(step: Step, x: Tensor, weight: Tensor) -> Tensor:
    """By patches, for PyTorch has no convolution of whole numbers."""
    found = windows(x, step.settings)
    groups, n, positions = step.settings["groups"], len(x), found.shape[2 : 2 + len(step.shape) - 1]
    # [n, groups, positions, inputs of a group * kernel]
    dims = len(positions)
    count = math.prod(positions)
    patches = found.movedim(1, 1 + dims).reshape(n, count, groups, weight[0].numel())
    of_groups = weight.reshape(groups, -1, weight[0].numel())
    sums = torch.einsum("npgk,gok->ngop", patches, of_groups)
    return sums.reshape(n, len(weight), *positions)


def windows(x: Tensor, settings: dict[str, Any]) -> Tensor:
    """[n, channels, ...positions, ...kernel] of [n, channels, ...size]; padded by code 0."""
    kernel, dims = settings["kernel"], len(settings["kernel"])
    padding, dilation = settings.get("padding", (0,) * dims), settings.get("dilation", (1,) * dims)
    if any(padding):
        x = F.pad(x, [p for n in reversed(padding) for p in (n, n)])
    for d in range(dims):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, settings["stride"][d])
    taken: Any = (..., *(slice(None, None, step) for step in dilation))
    return x[taken]


def weighted_bounds(weight: Tensor, bias: Tensor | None, low: int, high: int) -> tuple[int, int]:
    """Of the sums of a layer over all inputs in [low, high], where padding adds zeros.

    Args:
        weight: int64 [out, ...].
        bias: int64 [out], as fine as the sums.
    """
    low, high = min(low, 0), max(high, 0)
    rows = weight.flatten(1)
    positive, negative = rows.clamp(min=0).sum(1), rows.clamp(max=0).sum(1)
    rest = torch.zeros_like(positive) if bias is None else bias
    lowest, highest = positive * low + negative * high + rest, positive * high + negative * low + rest
    return int(lowest.min()), int(highest.max())


def _relu_bounds(_: Step, read: Sequence[Bounds]) -> Bounds:
    low, high, fraction = read[0]
    return max(low, 0), max(high, 0), fraction


def _clamp(step: Step, read: Sequence[Operand]) -> Tensor:
    return align(read[0][0], step.fraction - read[0][1]).clamp(*step.settings["codes"])


def _clamp_bounds(step: Step, read: Sequence[Bounds]) -> Bounds:
    (low, high, fraction), (least, most) = read[0], step.settings["codes"]
    shift = step.settings["fraction"] - fraction
    low, high = low << shift, high << shift
    return min(max(low, least), most), min(max(high, least), most), step.settings["fraction"]


def _mean(step: Step, read: Sequence[Operand]) -> Tensor:
    """What lies beyond the `finer` bits is dropped, towards zero: of 2^k values, with k of them, nothing."""
    how = step.settings
    sums = windows(read[0][0], how).sum(list(range(-len(how["kernel"]), 0)))
    return torch.div(align(sums, how["finer"]), how["count"], rounding_mode="trunc")


def _mean_bounds(step: Step, read: Sequence[Bounds]) -> Bounds:
    (low, high, fraction), finer = read[0], step.settings["finer"]
    return min(low, 0) << finer, max(high, 0) << finer, fraction + finer


def _add(step: Step, read: Sequence[Operand]) -> Tensor:
    a, b = (align(x, step.fraction - fraction) for x, fraction in read)
    return a + b


def _add_bounds(_: Step, read: Sequence[Bounds]) -> Bounds:
    fraction = max(f for _, _, f in read)
    lows, highs = ([n[k] << fraction - n[2] for n in read] for k in (0, 1))
    return sum(lows), sum(highs), fraction


def _shifted(step: Step, read: Sequence[Operand]) -> Tensor:
    """A constant of the shape of a sample is added."""
    assert step.bias is not None
    (x, fraction), bias = read[0], step.bias
    return align(x, step.fraction - fraction) + align(bias.codes, step.fraction - bias.type.fraction)


def _shifted_bounds(step: Step, read: Sequence[Bounds]) -> Bounds:
    assert step.bias is not None
    (low, high, fraction), codes = read[0], step.bias.codes
    fine = max(fraction, step.bias.type.fraction)
    least, most = (int(end) << fine - step.bias.type.fraction for end in (codes.min(), codes.max()))
    return (low << fine - fraction) + least, (high << fine - fraction) + most, fine


def _concat(step: Step, read: Sequence[Operand]) -> Tensor:
    aligned = [align(x, step.fraction - fraction) for x, fraction in read]
    return torch.cat(aligned, step.settings["axis"])


def _concat_bounds(_: Step, read: Sequence[Bounds]) -> Bounds:
    fraction = max(f for _, _, f in read)
    lows, highs = ([n[k] << fraction - n[2] for n in read] for k in (0, 1))
    return min(lows), max(highs), fraction


def _as_read(_: Step, read: Sequence[Bounds]) -> Bounds:
    return read[0]


def _maximum(step: Step, read: Sequence[Operand]) -> Tensor:
    return windows(read[0][0], step.settings).amax(list(range(-len(step.settings["kernel"]), 0)))


OPERATIONS: dict[str, Operation] = {
    "dense": _layer(_dense_sums),
    "conv": _layer(_conv_sums),
    "relu": Operation(lambda _, read: read[0][0].clamp(min=0), _relu_bounds),
    "clamp": Operation(_clamp, _clamp_bounds),
    "max_pool": Operation(_maximum, _as_read),
    "average_pool": Operation(_mean, _mean_bounds),
    "add": Operation(_add, _add_bounds),
    "bias": Operation(_shifted, _shifted_bounds),
    "concat": Operation(_concat, _concat_bounds),
    "reshape": Operation(lambda step, read: read[0][0].reshape(len(read[0][0]), *step.shape), _as_read),
    "transpose": Operation(lambda step, read: read[0][0].permute(0, *step.settings["axes"]), _as_read),
    "cast": Operation(lambda _, read: read[0][0], _as_read),
    "softmax": Operation(shares, shares_bounds),
}

"""The one affine formula: real = (code - zero_point) * scale.

Every granularity uses it as it stands, because a scale keeps the rank of its tensor.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.core.spec import QuantSpec, expand_to
from lowbit.errors import LowbitError

__all__ = [
    "check_finite",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "group_amin_amax",
    "grouped",
    "own_qparams",
    "power_of_two",
    "quantize",
    "round_codes",
    "wrapped",
]

# The smallest scale: products of two scales and their quotient by a third stay normal in float32.
MIN_SCALE = 2.0**-60
# The largest magnitude of a range: every scale, and every code times it, is then finite in float32.
MAX_REACH = 2.0**126
FP16_MAX = 65504.0


def check_finite(x: Tensor, what: str = "the tensor") -> None:
    """Raise LowbitError when `x` holds NaN or infinity."""
    if x.numel() and not torch.isfinite(x).all():
        nan, inf = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
        raise LowbitError(
            f"{what} holds {nan} NaN and {inf} infinite values; quantization needs finite numbers"
        )


def choose_qparams(lo: Tensor, hi: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover the range [lo, hi].

    The range is widened to hold zero, which is then representable exactly, unless codes are odd. A range of
    zero width (an all-zero or empty tensor) gets scale 1, or where no code is zero the smallest one. The end
    of an asymmetric range may move by half a step, for its zero point is rounded.

    Args:
        lo, hi: ends of the range, in the shape of the scale.
        spec: a spec of kind "int".

    Returns:
        scale: float32, as shaped as `lo`; when `spec.scale` is "pow2", the next power of two from there up.
        zero_point: int32 of the same shape, or None when the spec is symmetric.

    Raises:
        LowbitError: the range is NaN, infinite, beyond 2^126 or upside down.
    """
    _check_range(lo, hi)
    lo, hi = lo.double().clamp(max=0.0), hi.double().clamp(min=0.0)
    if spec.kind == "float":
        return torch.ones_like(lo, dtype=torch.float32), None
    if spec.symmetric:
        scale = hi / spec.qmax
        if spec.signed:
            scale = torch.maximum(scale, lo / spec.qmin)
    else:
        scale = (hi - lo) / (spec.qmax - spec.qmin)
    scale = torch.where(scale > 0, scale.clamp(min=MIN_SCALE), MIN_SCALE if spec.mid_rise else 1.0)
    if spec.scale == "pow2":
        scale = power_of_two(scale)
    scale = scale.float()
    if spec.symmetric:
        return scale, None
    zero_point = (spec.qmin - lo / scale.double()).round().clamp(spec.qmin, spec.qmax)
    return scale, zero_point.to(torch.int32)


def own_qparams(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover a tensor's own range, in float32 as kernels find them at run time.

    scale = (hi - lo) / (qmax - qmin) and zero point = rint(qmin - lo / scale), with zero in [lo, hi]: those
    of DynamicQuantizeLinear (ONNX). Symmetric codes have the least scale that holds both ends. NaN gives NaN.

    Returns:
        As `choose_qparams`, in the shape of the scale.
    """
    lo, hi = group_amin_amax(x.detach().float(), spec)
    lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
    if not spec.symmetric:
        scale = ((hi - lo) / (spec.qmax - spec.qmin)).clamp(min=MIN_SCALE)
        return scale, (spec.qmin - lo / scale).clamp(spec.qmin, spec.qmax).round().int()
    scale = hi / spec.qmax
    return (torch.maximum(scale, lo / spec.qmin) if spec.signed else scale).clamp(min=MIN_SCALE), None


def power_of_two(scale: Tensor, to: Literal["above", "nearest"] = "above") -> Tensor:
    """The next power of two from each scale up, so that nothing is clipped; a power of two stays.

    Of zero it is 1, as a scale of nothing is.

    Args:
        to: "nearest": the one of the nearest logarithm, half way up from sqrt(1/2) of it.
    """
    mantissa, exponent = torch.frexp(scale)
    below = mantissa < math.sqrt(0.5) if to == "nearest" else mantissa == 0.5
    return torch.ldexp(torch.ones_like(scale), exponent - below.int())


def _check_range(lo: Tensor, hi: Tensor) -> None:
    fits = (lo <= hi) & (lo >= -MAX_REACH) & (hi <= MAX_REACH)  # False for NaN
    if not fits.all():
        low, high = (end[~fits][0].item() for end in (lo, hi))
        raise LowbitError(
            f"[{low:g}, {high:g}] is no range to quantize: its ends must be finite, in order, within 2^126; "
            "look for the layer that diverges, or rescale its input"
        )


def _round_(x: Tensor, spec: QuantSpec) -> Tensor:
    """The nearest code, in place, as if codes had no ends; of two odd ones that are as near the upper."""
    if spec.mid_rise:
        return x.mul_(0.5).floor_().mul_(2.0).add_(1.0)
    return round_codes(x, spec.rounding)


def round_codes(x: Tensor, rounding: str) -> Tensor:
    """Whole numbers, perhaps in place: "half_even", "half_up" or "floor"."""
    if rounding == "half_even":
        return x.round_()
    if rounding == "floor":
        return x.floor_()
    below = torch.floor(x)
    return below + (x - below >= 0.5)  # floor(x + 0.5) would round the sum, and so 0.49999997 up


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """clamp(round(x / scale) + zero_point), still as floating point numbers; `round` to the nearest code.

    In place but for the quotient, and with a zero point of the type of `x`: on activations memory is what
    takes the time.
    """
    codes = _round_(x / scale, spec)
    if zero_point is not None:
        codes += zero_point
    if spec.overflow == "wrap":
        return wrapped(codes, spec.qmin, spec.bits)
    return codes.clamp_(spec.qmin, spec.qmax)


def wrapped(codes: Tensor, qmin: int, bits: int) -> Tensor:
    """What is left of whole numbers in the lowest bits, read from `qmin` up."""
    return torch.remainder(codes - qmin, 2**bits) + qmin


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Codes of `x`, in `spec.dtype`: clamp(round(x / scale) + zero_point, qmin, qmax).

    Rounding is to the nearest integer, and where codes are odd to the nearest odd one. Infinite values
    saturate; NaN is an error, for no code stands for it.
    """
    if torch.isnan(x).any():
        check_finite(x)
    if spec.kind == "float":
        return x.float().clamp(-FP16_MAX, FP16_MAX).half()
    zero_point = None if zero_point is None else expand_to(zero_point, x.shape).float()
    return _codes(x.float(), expand_to(scale, x.shape), zero_point, spec).to(spec.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(codes - zero_point) * scale, in float32."""
    real = codes.float()
    if zero_point is not None:
        real = real - expand_to(zero_point, codes.shape)
    return real * expand_to(scale, codes.shape)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """dequantize(quantize(x)) without leaving floating point; NaN stays NaN."""
    if spec.kind == "float":
        return x.clamp(-FP16_MAX, FP16_MAX).half().to(x.dtype)
    if spec.is_standard and kernels.supports(x, scale):
        return kernels.fake_quantize(x, scale, zero_point, spec.qmin, spec.qmax, spec.mid_rise)
    scale = expand_to(scale, x.shape)
    if zero_point is None:
        return _codes(x, scale, None, spec).mul_(scale)
    zero_point = expand_to(zero_point, x.shape).to(x.dtype)
    return _codes(x, scale, zero_point, spec).sub_(zero_point).mul_(scale)


def group_amin_amax(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each set of elements that shares a scale, in the shape of the scale."""
    shape = spec.scale_shape(x.shape)
    if x.numel() == 0:
        return x.new_zeros(shape), x.new_zeros(shape)
    # over everything it is vectorized, and no layout of memory needs a copy
    lo, hi = torch.aminmax(x) if math.prod(shape) == 1 else torch.aminmax(grouped(x, shape), dim=1)
    return lo.reshape(shape), hi.reshape(shape)


def grouped(x: Tensor, scale_shape: tuple[int, ...]) -> Tensor:
    """View or copy `x` as [number of scales, elements of each], in the order of the flattened scale."""
    split: list[int] = []
    for n, groups in zip(x.shape, scale_shape, strict=True):
        split += [groups, n // groups]
    order = [*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2)]
    return x.reshape(split).permute(order).reshape(math.prod(scale_shape), -1)

"""Fake quantization and its gradients as operators of PyTorch, each one pass over memory.

With v = x / s, c = clamp(round(v) + z, qmin, qmax) - z and y = c s, an element is *inside* when
qmin - z <= v <= qmax - z. Under `mid_rise`, which has no zero point, codes are odd: the rounding is
2 floor(v / 2) + 1, and inside is qmin - 1 <= v <= qmax + 1. A tensor is taken in the order of its memory:
row-major, or channels_last where the scales allow it; another is copied to row-major first, and the result is
row-major then. The operators have no derivative of their own: an autograd.Function puts forward and backward
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.native import Library, load

__all__ = [
    "available",
    "description",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_masked",
    "fake_quantize_masked_backward",
    "supports",
]

_loaded = load()

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# zero points the library reads, and its numbers for them; 0 is none at all
ZERO_KINDS = {torch.float32: 1, torch.int32: 2}
# what stands there when codes are odd
ODD = 3


def available() -> bool:
    """Is the compiled library in use?"""
    return isinstance(_loaded, Library)


def description() -> str:
    """What does the work: "native, AVX512", or "pure torch: " and the reason."""
    return _loaded.description if isinstance(_loaded, Library) else f"pure torch: {_loaded}"


def supports(x: Tensor, scale: Tensor) -> bool:
    """Can the operators take this tensor and its scale?

    Both must be float32 on the CPU, and no gradient wanted that only PyTorch itself can give: inside an
    autograd.Function none is. The scale has one element, or the rank of `x` and in its dimensions divisors of
    those of `x`, such that each scale covers neighbours in memory: per channel of any axis but the last, per
    group of neighbours in the last.
    """
    if not available() or x.dtype is not torch.float32 or scale.dtype is not torch.float32:
        return False
    if x.device.type != "cpu" or scale.device.type != "cpu" or x.layout is not torch.strided:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return False
    return scale.numel() == 1 or _factors(x.shape, scale.shape) is not None


def _factors(shape: Sequence[int], scale_shape: Sequence[int]) -> tuple[int, int, int] | None:
    """The shape as (outer, scales, inner), the scales neighbours in the middle; None when it is not such."""
    if len(shape) != len(scale_shape) or 0 in scale_shape:
        return None
    parts = [1, 1, 1]
    at = 0
    for n, groups in zip(shape, scale_shape, strict=True):
        if n % groups or (groups > 1 and at == 2):
            return None
        if groups > 1:
            at = 1
            parts[1] *= groups
        if n != groups:
            at = 2 if at else 0
            parts[at] *= n // groups
    return None if parts[2] == 1 else (parts[0], parts[1], parts[2])


def _plan(x: Tensor, scale: Tensor) -> tuple[tuple[int, int, int], bool]:
    """(outer, scales, inner) of `x` in memory, and whether that is channels_last.

    Raises:
        LowbitError: the scale has no shape that fits.
    """
    per_tensor = scale.numel() == 1
    last = not x.is_contiguous() and _is_channels_last(x)
    if per_tensor:
        return (1, 1, x.numel()), last
    if last:
        order = [0, *range(2, x.ndim), 1]
        factors = _factors([x.shape[d] for d in order], [scale.shape[d] for d in order])
        if factors is not None:
            return factors, True
    factors = _factors(x.shape, scale.shape)
    if factors is None:
        raise LowbitError(
            f"no kernel for a scale of shape {tuple(scale.shape)} on a tensor of shape {tuple(x.shape)}; "
            "ask kernels.supports first"
        )
    return factors, False


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim in CHANNELS_LAST and x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim])


def _ordered(t: Tensor, channels_last: bool) -> Tensor:
    """`t` itself where its memory is in that order, else a copy."""
    return t.contiguous(memory_format=CHANNELS_LAST[t.ndim]) if channels_last else t.contiguous()


def _library(*tensors: Tensor) -> Library:
    """The library, for tensors that it can read."""
    if not isinstance(_loaded, Library):
        raise LowbitError(f"the operators of lowbit.kernels are not there: {_loaded}")
    for t in tensors:
        if t.dtype is not torch.float32:
            raise LowbitError(f"a tensor of {t.dtype} meets a kernel for torch.float32; convert it first")
    return _loaded


def _zero(zero_point: Tensor | None, scale: Tensor, mid_rise: bool) -> tuple[Tensor | None, int | None, int]:
    """The zero point, to be held as long as its address is used, that address and its kind."""
    if mid_rise:
        if zero_point is not None:
            raise LowbitError("odd codes have no zero point; pass None, or mid_rise=False")
        return None, None, ODD
    if zero_point is None:
        return None, None, 0
    if zero_point.numel() != scale.numel():
        raise LowbitError(f"{zero_point.numel()} zero points for {scale.numel()} scales; give one to each")
    if zero_point.dtype not in ZERO_KINDS:
        zero_point = zero_point.float()
    zero_point = zero_point.contiguous()
    return zero_point, zero_point.data_ptr(), ZERO_KINDS[zero_point.dtype]


def _same_shape(grad: Tensor, x: Tensor) -> None:
    if grad.shape != x.shape:
        raise LowbitError(
            f"a gradient of shape {tuple(grad.shape)} for a tensor of shape {tuple(x.shape)}; "
            "give the gradient of the very output"
        )


def _forward(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, mid_rise: bool, masked: bool
) -> tuple[Tensor, Tensor | None]:
    lib = _library(x, scale)
    factors, last = _plan(x, scale)
    x, scale = _ordered(x, last), scale.contiguous()
    _held, zero_at, kind = _zero(zero_point, scale, mid_rise)
    y = torch.empty_like(x)
    mask = _empty_mask(x, last) if masked else None
    bits = None if mask is None else mask.data_ptr()
    lib.fake_quantize(
        *(x.data_ptr(), y.data_ptr(), bits, scale.data_ptr(), zero_at, kind),
        *(*factors, qmin, qmax, torch.get_num_threads(), lib.path),
    )
    return y, mask


def _empty_mask(x: Tensor, channels_last: bool) -> Tensor:
    """Room for one bit for each element; a second dimension, of size 1, says: channels_last order."""
    size = (x.numel() + 7) // 8
    return x.new_empty((size, 1) if channels_last else (size,), dtype=torch.uint8)


def _fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, mid_rise: bool = False
) -> Tensor:
    return _forward(x, scale, zero_point, qmin, qmax, mid_rise, masked=False)[0]


def _fake_quantize_masked(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, mid_rise: bool = False
) -> Any:
    return _forward(x, scale, zero_point, qmin, qmax, mid_rise, masked=True)


def _masked_backward(grad: Tensor, mask: Tensor) -> Tensor:
    lib = _library(grad)
    n = grad.numel()
    if mask.dtype is not torch.uint8 or mask.numel() != (n + 7) // 8 or not mask.is_contiguous():
        raise LowbitError(
            f"a mask of {mask.numel()} {mask.dtype} for {n} elements; pass the one of fake_quantize_masked"
        )
    grad = _ordered(grad, mask.ndim == 2)
    gx = torch.empty_like(grad)
    lib.masked_backward(grad.data_ptr(), mask.data_ptr(), gx.data_ptr(), n, torch.get_num_threads(), lib.path)
    return gx


def _backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    inside_scale: bool,
    zero_point_grad: bool,
    mid_rise: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    lib = _library(grad, x, scale)
    _same_shape(grad, x)
    factors, last = _plan(x, scale)
    x, grad, scale = _ordered(x, last), _ordered(grad, last), scale.contiguous()
    _held, zero_at, kind = _zero(zero_point, scale, mid_rise)
    gx, gscale = torch.empty_like(x), torch.empty_like(scale)
    gzero = torch.empty_like(scale) if zero_point_grad else torch.zeros_like(scale)
    lib.fake_quantize_backward(
        *(grad.data_ptr(), x.data_ptr(), gx.data_ptr(), gscale.data_ptr()),
        *(gzero.data_ptr() if zero_point_grad else None, scale.data_ptr(), zero_at, kind),
        *(*factors, qmin, qmax, inside_scale, torch.get_num_threads(), lib.path),
    )
    return gx, gscale, gzero


def _fake_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, mid_rise: bool = False
) -> Tensor:
    return torch.empty_like(_ordered(x, _plan(x, scale)[1]))


def _fake_forward_masked(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, mid_rise: bool = False
) -> Any:
    last = _plan(x, scale)[1]
    return torch.empty_like(_ordered(x, last)), _empty_mask(x, last)


def _fake_masked_backward(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(_ordered(grad, mask.ndim == 2))


def _fake_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gx = torch.empty_like(_ordered(x, _plan(x, scale)[1]))
    gscale = torch.empty_like(scale.contiguous())
    return gx, gscale, torch.empty_like(gscale)


_QUANTIZER = "Tensor scale, Tensor? zero_point, int qmin, int qmax"
_OPERATORS = (
    (f"fake_quantize(Tensor x, {_QUANTIZER}, bool mid_rise=False) -> Tensor", _fake_quantize, _fake_forward),
    (
        f"fake_quantize_masked(Tensor x, {_QUANTIZER}, bool mid_rise=False) -> (Tensor, Tensor)",
        _fake_quantize_masked,
        _fake_forward_masked,
    ),
    (
        "fake_quantize_masked_backward(Tensor grad, Tensor mask) -> Tensor",
        _masked_backward,
        _fake_masked_backward,
    ),
    (
        f"fake_quantize_backward(Tensor grad, Tensor x, {_QUANTIZER}, bool inside_scale, "
        "bool zero_point_grad, bool mid_rise=False) -> (Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
    ),
)

_operators = torch.library.Library("lowbit", "DEF")  # type: ignore[no-untyped-call]
for _schema, _real, _fake in _OPERATORS:
    _operators.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _name = _schema.partition("(")[0]
    _operators.impl(_name, _real, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lowbit::{_name}", _fake, lib=_operators)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, mid_rise: bool = False
) -> Tensor:
    """(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale; NaN stays NaN.

    Args:
        x: float32 tensor that `supports` says yes to.
        scale: float32, positive; one element, or in the rank of `x`.
        zero_point: one whole number for each scale, float32 or int32; None when symmetric.
        qmin, qmax: ends of the codes.
        mid_rise: codes are odd.

    Raises:
        LowbitError: no library, or shapes and types it does not take.
    """
    return torch.ops.lowbit.fake_quantize.default(x, scale, zero_point, qmin, qmax, mid_rise)


def fake_quantize_masked(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, mid_rise: bool = False
) -> tuple[Tensor, Tensor]:
    """`fake_quantize`, and a bit for each element: is it inside?

    The mask is uint8 [ceil(n / 8)], lowest bit first, in the order of memory of the result; [ceil(n / 8), 1]
    when that is channels_last. Raises what `fake_quantize` raises.
    """
    return torch.ops.lowbit.fake_quantize_masked.default(x, scale, zero_point, qmin, qmax, mid_rise)


def fake_quantize_masked_backward(grad: Tensor, mask: Tensor) -> Tensor:
    """`grad` inside, 0 elsewhere, from the mask of `fake_quantize_masked`.

    Raises:
        LowbitError: no library, or a mask of another size.
    """
    return torch.ops.lowbit.fake_quantize_masked_backward.default(grad, mask)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    inside_scale: bool,
    zero_point_grad: bool,
    mid_rise: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the scale and of the zero point, the last two summed for each scale, in its shape.

    gx = grad inside, else 0; gs = sum of grad (c - v) inside and of grad c elsewhere, where without
    `inside_scale` what is inside counts nothing; gz = sum of -grad s over what is not inside, or zeros
    without `zero_point_grad`. Sums run in float over short blocks and in
    double over these; for a number of threads and an instruction set they are the same every time.

    Raises:
        LowbitError: as `fake_quantize`, or a gradient of another shape.
    """
    return torch.ops.lowbit.fake_quantize_backward.default(
        grad, x, scale, zero_point, qmin, qmax, inside_scale, zero_point_grad, mid_rise
    )

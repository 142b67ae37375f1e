"""Products of binary and ternary weights with packed activations and with floats.

Weights are -1 and 1, or -1, 0 and 1. Activations are signs (-1 where x < 0 or x is NaN, else 1), codes of one
to eight bits, or floats. With b the bits of an activation and n and p those where a weight is -1 and 1, one
count serves every pair: for codes of one bit, sum w b = popcount(b ? p : n) - popcount(n); a sign is 2 b - 1;
a code of more bits is a sum of such products (Rastegari et al., "XNOR-Net", 2016; Zhou et al., "DoReFa-Net",
2016).

    w = bits.pack_weight(codes)                            # once
    x = bits.pack_signs(activations)                       # every time
    y = bits.linear(x, w, bits.Affine(scale=s, bias=b))    # float32; without an end int32, the sums

Integer sums are exact. Sums of floats have one order, whatever the processor: blocks of 32 products, tap by
tap and then channel by channel, each block added up from its first to its last, and then the blocks. A weight
of 0 leaves its activation out, even where that is not finite. Inference only: there is no derivative. Without
a compiled library PyTorch computes the same numbers, slowly.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import bits_layouts as layouts
from lowbit.kernels import bits_torch
from lowbit.kernels.bits_ends import Affine, End, Epilogue, Threshold
from lowbit.kernels.bits_inputs import (
    channels_last,
    channels_of,
    pack_bits,
    pack_codes,
    pack_signs,
    readable,
)
from lowbit.kernels.bits_layouts import (
    FLOAT_UNIT,
    LIMIT,
    PackedInput,
    PackedWeight,
    unpack_input,
    unpack_weight,
    words_of,
)
from lowbit.kernels.bits_native import available, description, library, unit
from lowbit.kernels.bits_window import Geometry, Pair, Window
from lowbit.kernels.native import Library

__all__ = [
    "Affine",
    "PackedInput",
    "PackedWeight",
    "Threshold",
    "available",
    "conv2d",
    "description",
    "linear",
    "max_pool2d",
    "pack_bits",
    "pack_codes",
    "pack_signs",
    "pack_weight",
    "unpack_input",
    "unpack_weight",
]

POINT = Window((1, 1))


def pack_weight(codes: Tensor, *, groups: int = 1, floats: bool = False) -> PackedWeight:
    """Weights for this processor, once.

    Args:
        codes: -1, 0 and 1 in any type, [out, in] or [out, in / groups, kernel height, kernel width].
            Without a 0 they are binary and take 1 bit, else 2.
        groups: as in a convolution.
        floats: for activations in float32 rather than packed ones.

    Raises:
        LowbitError: other values, a shape that is neither, or groups that do not divide the outputs.
    """
    return layouts.pack_weight(codes, groups=groups, unit=FLOAT_UNIT if floats else unit())


def _fits(x: PackedInput | Tensor, w: PackedWeight) -> None:
    """Raise LowbitError unless the activations and the weights belong together."""
    floats = isinstance(x, Tensor)
    if floats != (w.unit == FLOAT_UNIT) or (not floats and w.unit != unit()):
        held = "floats" if w.unit == FLOAT_UNIT else f"bits in units of {w.unit} bytes"
        wanted = "floats" if floats else f"bits in units of {unit()} bytes"
        raise LowbitError(
            f"weights packed for {held} meet {wanted}; use pack_weight(unpack_weight(w), groups={w.groups}, "
            f"floats={floats})"
        )
    channels, groups = (
        (channels_of(x, w.groups), w.groups) if isinstance(x, Tensor) else (x.channels, x.groups)
    )
    if channels != w.shape[1] * w.groups or groups != w.groups:
        raise LowbitError(
            f"{channels} channels in {groups} groups meet weights of shape {w.shape} in {w.groups} groups; "
            f"give {w.shape[1] * w.groups} channels packed with groups={w.groups}"
        )
    if isinstance(x, PackedInput) and w.depth * x.largest >= LIMIT:
        raise LowbitError(
            f"sums of {w.depth} codes of up to {x.largest} pass 2^31 - 1; split the layer or use fewer bits"
        )


def _geometry(
    per_pixel: int, w: PackedWeight, window: Window, size: tuple[int, int, int], planes: int
) -> Geometry:
    """`size` is (images, height, width) of an input with so many bytes for each pixel."""
    return Geometry(
        *(
            *size,
            *window.outputs(size[1:]),
            *window.kernel,
            *window.stride,
            *window.padding,
            *window.dilation,
        ),
        *(planes, w.groups, per_pixel // (planes * w.groups), w.shape[0] // w.groups),
    )


def _fill(x: PackedInput, pad_code: int) -> Tensor:
    """What one group reads in the padding, [planes, words]."""
    per_group = x.channels // x.groups
    if x.kind == "sign" or pad_code == 0:
        return torch.zeros(x.bits, words_of(per_group), dtype=torch.int64)
    return bits_torch.pack_codes(torch.full((per_group,), pad_code, dtype=torch.int32), x.bits, 1)


def _epilogue(end: End | None, outputs: int, pixels: int) -> tuple[Epilogue, Tensor]:
    """How the library ends, and where to: int32, float32 or words, one row for each pixel."""
    if isinstance(end, Threshold):
        assert end.flip is not None
        to = torch.zeros(pixels, words_of(outputs), dtype=torch.int64)
        kind, values = 2, {"threshold": end.threshold.data_ptr(), "flip": end.flip.data_ptr()}
    elif isinstance(end, Affine):
        assert end.bias is not None
        to = torch.empty(pixels, outputs)
        kind, values = 1, {"scale": end.scale.data_ptr(), "bias": end.bias.data_ptr()}
    else:
        to = torch.empty(pixels, outputs, dtype=torch.int32)
        kind, values = 0, {}
    return Epilogue(kind=kind, outputs=outputs, to=to.data_ptr(), **values), to


def _product(
    lib: Library,
    x: PackedInput,
    w: PackedWeight,
    end: End | None,
    window: Window,
    size: tuple[int, int, int],
    pad_code: int,
) -> Tensor:
    """[pixels, outputs], or [pixels, words] at a threshold."""
    words, factors = x.words.contiguous(), (ctypes.c_int32 * x.bits)(*x.factors)
    geometry = _geometry(8 * words.shape[-1], w, window, size, x.bits)
    epilogue, to = _epilogue(end, w.shape[0], size[0] * geometry.out_height * geometry.out_width)
    base = -w.nonzero if x.kind == "sign" else w.negative * -sum(x.factors)
    fill = _fill(x, pad_code) if any(window.padding) else None
    epilogue.base, epilogue.factors = base.data_ptr(), ctypes.addressof(factors)
    epilogue.taps = w.tap_sums.data_ptr() if x.kind == "sign" and fill is not None else None
    lib.product(
        *(
            ctypes.byref(geometry),
            words.data_ptr(),
            None if fill is None else fill.data_ptr(),
            w.panels.data_ptr(),
            w.ternary,
        ),
        *(ctypes.byref(epilogue), torch.get_num_threads(), lib.path),
    )
    return to


def _float_product(
    lib: Library, x: Tensor, w: PackedWeight, end: End | None, window: Window, size: tuple[int, int, int]
) -> Tensor:
    """`x` is contiguous, channels last; [pixels, outputs]."""
    geometry = _geometry(4 * x.shape[-1], w, window, size, 1)
    epilogue, _ = _epilogue(end, w.shape[0], 0)
    to = torch.empty(size[0] * geometry.out_height * geometry.out_width, w.shape[0])
    fill = torch.zeros(w.shape[1])
    lib.float_product(
        *(ctypes.byref(geometry), x.data_ptr(), fill.data_ptr(), w.panels.data_ptr(), w.ternary),
        *(epilogue.scale, epilogue.bias, to.data_ptr(), torch.get_num_threads(), lib.path),
    )
    return to


def _run(
    x: PackedInput | Tensor,
    w: PackedWeight,
    end: End | None,
    window: Window,
    size: tuple[int, int, int],
    pad_code: int,
) -> Tensor:
    """[pixels, outputs], or [pixels, words] at a threshold, from whatever computes it."""
    end = None if end is None else end.checked(w.shape[0])
    lib = library()
    if isinstance(x, Tensor):
        if isinstance(end, Threshold):
            raise LowbitError(
                "a threshold is an integer and meets sums of floats; use Affine, then pack_signs"
            )
        if lib is not None:
            return _float_product(lib, channels_last(x).contiguous(), w, end, window, size)
        sums = bits_torch.float_sums(x, w, window)
    elif lib is not None:
        return _product(lib, x, w, end, window, size, pad_code)
    else:
        sums = bits_torch.sums(x, w, window, pad_code)
    sums = sums.flatten(0, -2)
    return sums if end is None else end.apply(sums)


def _result(
    y: Tensor, lead: torch.Size | tuple[int, ...], end: End | None, outputs: int
) -> Tensor | PackedInput:
    y = y.reshape(*lead, y.shape[-1])
    if isinstance(end, Threshold):
        return PackedInput(words=y, channels=outputs, kind=end.kind)
    return y.permute(0, 3, 1, 2) if y.ndim == 4 else y


@overload
def linear(x: PackedInput | Tensor, w: PackedWeight, end: Affine | None = None) -> Tensor: ...
@overload
def linear(x: PackedInput, w: PackedWeight, end: Threshold) -> PackedInput: ...
def linear(x: PackedInput | Tensor, w: PackedWeight, end: End | None = None) -> Tensor | PackedInput:
    """x w^T.

    Args:
        x: packed activations, or float32 [..., in] for weights packed with floats=True.
        w: packed [out, in].
        end: none gives the sums, int32 or, from floats, float32; `Affine` gives float32, `Threshold` the
            packed activations of the next layer, in one group.

    Returns:
        [..., out].

    Raises:
        LowbitError: activations and weights do not belong together, or an end of another size.
    """
    if isinstance(x, Tensor):
        readable(x, (torch.float32,), "use .float()")
    _fits(x, w)
    lead = x.shape[:-1] if isinstance(x, Tensor) else x.words.shape[:-1]
    if len(w.shape) != 2 or len(lead) == 3:
        raise LowbitError(
            f"weights of shape {w.shape} and activations of {len(lead) + 1} axes meet in a linear layer; use "
            "conv2d, or activations with other than 4 axes"
        )
    if isinstance(x, Tensor):
        x = x.flatten(0, -2)
    return _result(_run(x, w, end, POINT, (lead.numel(), 1, 1), 0), lead, end, w.shape[0])


@overload
def conv2d(
    x: PackedInput | Tensor,
    w: PackedWeight,
    end: Affine | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    pad_code: int = 0,
) -> Tensor: ...
@overload
def conv2d(
    x: PackedInput,
    w: PackedWeight,
    end: Threshold,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    pad_code: int = 0,
) -> PackedInput: ...
def conv2d(
    x: PackedInput | Tensor,
    w: PackedWeight,
    end: End | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    pad_code: int = 0,
) -> Tensor | PackedInput:
    """The convolution of images with packed weights [out, in / groups, height, width].

    Args:
        x: packed images, or float32 [N, C, H, W] for weights packed with floats=True.
        w: the weights, packed with the groups of the convolution.
        end: as in `linear`.
        stride, padding, dilation: one number, or (height, width).
        pad_code: what codes are padded with, their zero point. Signs and floats are padded with 0, exactly.

    Returns:
        [N, out, height, width], channels_last in memory.

    Raises:
        LowbitError: as `linear`; a window larger than the image; a pad_code that is no code.
    """
    if isinstance(x, Tensor):
        readable(x, (torch.float32,), "use .float()")
    _fits(x, w)
    shape = channels_last(x).shape if isinstance(x, Tensor) else x.words.shape
    if len(w.shape) != 4 or len(shape) != 4:
        raise LowbitError(
            f"weights of shape {w.shape} and activations of {len(shape)} axes meet in a convolution; use "
            "linear, or images [N, C, H, W]"
        )
    _check_pad_code(x, pad_code)
    window = Window.of(w.kernel, stride, padding, dilation)
    lead = (shape[0], *window.outputs((shape[1], shape[2])))
    return _result(_run(x, w, end, window, (shape[0], shape[1], shape[2]), pad_code), lead, end, w.shape[0])


def _check_pad_code(x: PackedInput | Tensor, pad_code: int) -> None:
    """Raise LowbitError unless the activations can hold it."""
    if isinstance(x, Tensor) or x.kind == "sign":
        if pad_code:
            raise LowbitError(
                f"pad_code {pad_code} of signs or floats, which are padded with 0; leave it out"
            )
        return
    least = -x.largest if x.kind == "signed" else 0
    most = least + 2**x.bits - 1
    if not least <= pad_code <= most:
        raise LowbitError(f"pad_code {pad_code} is no {x.kind} code of {x.bits} bits; use {least} to {most}")


def max_pool2d(x: PackedInput, kernel: Pair, *, stride: Pair | None = None, padding: Pair = 0) -> PackedInput:
    """The largest of each window, on signs or on codes of one bit: any bit that is set. Padding never wins.

    Args:
        x: packed images.
        kernel, stride, padding: one number, or (height, width); no stride is the kernel, and the padding is
            at most half of it.

    Raises:
        LowbitError: codes of more bits, a matrix, or a padding that could fill a window.
    """
    if x.bits != 1 or x.kind == "signed" or x.words.ndim != 4:
        raise LowbitError(
            f"{x.kind} codes of {x.bits} bits in {x.words.ndim} axes meet a pooling of one-bit images; use "
            "torch.nn.functional.max_pool2d before packing"
        )
    window = Window.of(kernel, kernel if stride is None else stride, padding, 1)
    if any(2 * p > k for p, k in zip(window.padding, window.kernel, strict=True)):
        raise LowbitError(f"padding {window.padding} passes half of the kernel {window.kernel}; pad less")
    lib, (n, height, width, row) = library(), x.words.shape
    if lib is None:
        return replace(x, words=bits_torch.max_pool(x, window))
    words = x.words.contiguous()
    high, wide = window.outputs((height, width))
    geometry = Geometry(
        *(n, height, width, high, wide, *window.kernel, *window.stride, *window.padding, *window.dilation),
        *(1, 1, 8 * row, 0),
    )
    to = torch.zeros(n, high, wide, row, dtype=torch.int64)
    lib.max_pool(ctypes.byref(geometry), words.data_ptr(), to.data_ptr(), torch.get_num_threads())
    return replace(x, words=to)

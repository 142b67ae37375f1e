"""What the library of bits does, in PyTorch: slow, and equal in every bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kernels.bits_layouts import (
    PackedInput,
    PackedWeight,
    to_words,
    unpack_input,
    unpack_weight,
)
from lowbit.kernels.bits_window import Window

__all__ = ["float_sums", "max_pool", "pack_codes", "pack_floats", "sums"]

BLOCK = 32


def pack_floats(x: Tensor, threshold: float, groups: int) -> Tensor:
    """x >= threshold, from float32 [..., channels] to int64 [..., groups * words]."""
    return to_words(torch.unflatten(x >= threshold, -1, (groups, -1))).flatten(-2)


def pack_codes(x: Tensor, bits: int, groups: int) -> Tensor:
    """The lowest bits of integer codes, from [..., channels] to int64 [..., bits * groups * words]."""
    planes = (x.unsqueeze(-2) >> torch.arange(bits)[:, None]) & 1
    return to_words(torch.unflatten(planes.bool(), -1, (groups, -1))).flatten(-3)


def sums(x: PackedInput, w: PackedWeight, window: Window, pad_code: int) -> Tensor:
    """Exact sums, int32 [..., outputs] of a matrix and [N, height, width, outputs] of images."""
    codes, weights = unpack_input(x).double(), unpack_weight(w).double()
    if codes.ndim != 4 or len(w.shape) == 2:
        return (codes @ weights.T).int()
    high, wide = window.padding
    framed = F.pad(codes, (wide, wide, high, high), value=float(pad_code))
    y = F.conv2d(framed, weights, None, window.stride, 0, window.dilation, w.groups)
    return y.permute(0, 2, 3, 1).int()


def float_sums(x: Tensor, w: PackedWeight, window: Window) -> Tensor:
    """Sums of float32 [rows, in] or [N, C, H, W], in the order of the library; as [..., outputs]."""
    weights = unpack_weight(w)
    if x.ndim == 2:
        return _ordered_sums(x, weights)
    n, (high, wide) = x.shape[0], window.outputs((x.shape[2], x.shape[3]))
    parts = []
    for part, own in zip(x.chunk(w.groups, 1), weights.chunk(w.groups, 0), strict=True):
        patches = F.unfold(part, window.kernel, window.dilation, window.padding, window.stride)
        # [N, pixels, taps, channels]
        taps = torch.unflatten(patches, 1, (part.shape[1], -1)).permute(0, 3, 2, 1)
        parts.append(_ordered_sums(taps.flatten(0, 1).flatten(1), own.movedim(1, -1).flatten(1)))
    return torch.cat(parts, -1).reshape(n, high, wide, w.shape[0])


def _ordered_sums(x: Tensor, codes: Tensor) -> Tensor:
    """x [rows, k] by codes [outputs, k]: blocks of 32, each from its first to its last, then the blocks."""
    total = x.new_zeros(x.shape[0], codes.shape[0])
    for begin in range(0, x.shape[1], BLOCK):
        part = torch.zeros_like(total)
        for k in range(begin, min(begin + BLOCK, x.shape[1])):
            column = x[:, k, None]
            part += torch.where(codes[:, k] == 0, 0.0, torch.where(codes[:, k] < 0, -column, column))
        total += part
    return total


def max_pool(x: PackedInput, window: Window) -> Tensor:
    """The bits that are set anywhere in a window, int64 [N, height, width, groups * words]."""
    high, wide = window.outputs((x.words.shape[1], x.words.shape[2]))
    framed = F.pad(
        x.words, (0, 0, window.padding[1], window.padding[1], window.padding[0], window.padding[0])
    )
    found = x.words.new_zeros(x.words.shape[0], high, wide, x.words.shape[3])
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            rows = framed[:, i : i + (high - 1) * window.stride[0] + 1 : window.stride[0]]
            found |= rows[:, :, j : j + (wide - 1) * window.stride[1] + 1 : window.stride[1]]
    return found

"""Activations from floats and integers to bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import bits_torch
from lowbit.kernels.bits_layouts import Kind, PackedInput, words_of
from lowbit.kernels.bits_native import library

__all__ = ["channels_last", "channels_of", "pack_bits", "pack_codes", "pack_signs", "readable"]


def readable(x: Tensor, dtypes: tuple[torch.dtype, ...], cure: str) -> None:
    """Raise LowbitError unless the kernels can read `x`, and no gradient is wanted."""
    if x.dtype not in dtypes:
        raise LowbitError(f"activations of {x.dtype} meet kernels for {', '.join(map(str, dtypes))}; {cure}")
    if x.device.type != "cpu" or x.layout is not torch.strided:
        raise LowbitError(
            f"activations on '{x.device}' ({x.layout}) meet kernels for the CPU; use .cpu() and .to_dense()"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise LowbitError(
            "activations that require a gradient meet kernels without one; use torch.no_grad() or "
            "torch.inference_mode()"
        )
    if x.ndim < 2:
        raise LowbitError(f"activations of shape {tuple(x.shape)}; give [..., channels] or [N, C, H, W]")


def channels_of(x: Tensor, groups: int) -> int:
    """Channels of `x`: its axis 1 when it is an image, else its last.

    Raises:
        LowbitError: none, or the groups do not divide them.
    """
    channels = x.shape[1] if x.ndim == 4 else x.shape[-1]
    if channels < 1 or groups < 1 or channels % groups:
        raise LowbitError(f"{groups} groups of {channels} channels; give at least 1 of each, and a divisor")
    return channels


def channels_last(x: Tensor) -> Tensor:
    """`x` with its channels as the last axis; a view where the memory allows it."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def _pack_floats(x: Tensor, threshold: float, groups: int) -> Tensor:
    """The words of x >= threshold."""
    readable(x, (torch.float32,), "use .float()")
    channels = channels_of(x, groups)
    lib = library()
    if lib is None:
        return bits_torch.pack_floats(channels_last(x), threshold, groups)
    per_group, threads, path = channels // groups, torch.get_num_threads(), lib.path
    last = channels_last(x)
    words = torch.empty((*last.shape[:-1], groups * words_of(per_group)), dtype=torch.int64)
    if x.ndim == 4 and not last.is_contiguous():
        x = x.contiguous()
        shape = (x.shape[0], groups, per_group, x.shape[2] * x.shape[3])
        lib.pack_planes(x.data_ptr(), words.data_ptr(), *shape, threshold, threads, path)
    else:
        last = last.contiguous()
        runs = last.numel() // per_group
        lib.pack_rows(last.data_ptr(), words.data_ptr(), runs, per_group, threshold, threads, path)
    return words


def pack_signs(x: Tensor, *, groups: int = 1) -> PackedInput:
    """The signs of float32 activations: 1 where x >= 0, so for 0 and -0 too; else, and for NaN, -1.

    Args:
        x: [..., channels], or an image [N, C, H, W]; channels_last and row-major are read as they are.
        groups: of the layer that comes next.

    Raises:
        LowbitError: another type or device, a gradient is wanted, or groups that do not divide the channels.
    """
    words = _pack_floats(x, 0.0, groups)
    return PackedInput(words=words, channels=channels_of(x, groups), kind="sign", groups=groups)


def pack_bits(x: Tensor, *, groups: int = 1) -> PackedInput:
    """Codes 0 and 1 that are held as float32. The rest is as in `pack_signs`."""
    words = _pack_floats(x, 1.0, groups)
    return PackedInput(words=words, channels=channels_of(x, groups), kind="unsigned", groups=groups)


def pack_codes(x: Tensor, *, bits: int = 8, groups: int = 1) -> PackedInput:
    """Codes of `bits` bits that are held as int8 (signed) or uint8 (unsigned); the bits above are not read.

    Args:
        x: [..., channels], or an image [N, C, H, W].
        bits: 1 to 8; 2 to 8 for int8.
        groups: of the layer that comes next.

    Raises:
        LowbitError: another type or device, bits out of range, or groups that do not divide the channels.
    """
    readable(x, (torch.int8, torch.uint8), "use .to(torch.int8) or .to(torch.uint8)")
    signed = x.dtype is torch.int8
    if not 1 + signed <= bits <= 8:
        raise LowbitError(f"{x.dtype} codes of {bits} bits; use {1 + signed} to 8")
    channels, last = channels_of(x, groups), channels_last(x).contiguous()
    lib = library()
    if lib is not None:
        per_group = channels // groups
        words = torch.zeros((*last.shape[:-1], bits * groups * words_of(per_group)), dtype=torch.int64)
        shape = (last.numel() // channels, groups, per_group, bits)
        lib.pack_codes(last.data_ptr(), words.data_ptr(), *shape, torch.get_num_threads())
    else:
        words = bits_torch.pack_codes(last, bits, groups)
    kind: Kind = "signed" if signed else "unsigned"
    return PackedInput(words=words, channels=channels, kind=kind, bits=bits, groups=groups)

"""Codes of 1 to 8 bits as a stream of bits: 3-bit codes take 3 bits on disk.

Code i occupies the bits [i * bits, (i + 1) * bits) of the stream, least significant bit first; the last byte
is padded with zeros. Signed codes are stored in two's complement; of an odd code c it is (c - 1) / 2 that
is stored. Ternary codes may also be packed in base 3, five to a byte: 1.6 bits each instead of 2.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError

__all__ = ["pack", "pack_codes", "pack_trits", "unpack", "unpack_codes", "unpack_trits"]

_CHUNK = 1 << 20  # codes handled at a time, a multiple of 8; bounds the memory of their single bits


def pack_codes(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of a spec of 1 to 8 bits as `pack` stores them."""
    return pack(codes.sub(1).div(2, rounding_mode="floor") if spec.mid_rise else codes, spec.bits)


def unpack_codes(packed: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_codes`, in the given shape."""
    codes = unpack(packed, spec.bits, shape, signed=spec.signed)
    return codes * 2 + 1 if spec.mid_rise else codes


_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


def pack_trits(codes: Tensor) -> Tensor:
    """Flatten int8 codes -1, 0 and 1 into a uint8 tensor of ceil(n / 5) bytes: sum of (code + 1) 3^i.

    Raises:
        LowbitError: another code.
    """
    flat = codes.detach().cpu().reshape(-1).to(torch.int16).numpy()
    if flat.size and not -1 <= flat.min() <= flat.max() <= 1:
        raise LowbitError(f"codes from {flat.min()} to {flat.max()} are not ternary; pack them in bits")
    digits = np.zeros((math.ceil(flat.size / 5), 5), np.uint8)
    digits.reshape(-1)[: flat.size] = flat + 1
    return torch.from_numpy((digits * _POWERS).sum(axis=1, dtype=np.uint8))


def unpack_trits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_trits`, int8 in the given shape.

    Raises:
        LowbitError: the stream is not exactly as long as the shape asks, or a byte stands for no five codes.
    """
    count = math.prod(shape)
    need = math.ceil(count / 5)
    if packed.dtype != torch.uint8 or packed.numel() != need:
        raise LowbitError(
            f"{packed.numel()} bytes of {packed.dtype} cannot hold {count} ternary codes; {need} bytes of "
            "torch.uint8 are needed"
        )
    stream = packed.detach().cpu().reshape(-1, 1).numpy()
    if stream.size and stream.max() >= 243:
        raise LowbitError(f"byte {stream.max()} stands for no five ternary codes; the stream is damaged")
    digits = (stream // _POWERS % 3).astype(np.int8) - 1
    return torch.from_numpy(digits.reshape(-1)[:count].copy()).reshape(shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Flatten int8 or uint8 codes into a uint8 tensor of ceil(n * bits / 8) bytes.

    Raises:
        LowbitError: the width is not 1..8, or a code does not fit it.
    """
    _check_width(bits)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise LowbitError(f"codes are {codes.dtype}; packing takes int8 or uint8")
    flat = codes.detach().cpu().reshape(-1).numpy()
    lowest = -(1 << bits >> 1) if codes.dtype == torch.int8 else 0
    highest = lowest + (1 << bits) - 1
    if flat.size and not lowest <= flat.min() <= flat.max() <= highest:
        raise LowbitError(
            f"codes from {flat.min()} to {flat.max()} do not fit {bits} bits, which hold {lowest}..{highest}"
        )
    stream = np.empty(math.ceil(flat.size * bits / 8), np.uint8)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK, None].view(np.uint8)
        single = np.unpackbits(part, axis=1, count=bits, bitorder="little")
        packed = np.packbits(single.reshape(-1), bitorder="little")
        stream[start * bits // 8 :][: packed.size] = packed
    return torch.from_numpy(stream)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> Tensor:
    """Inverse of `pack`: int8 codes when `signed`, else uint8, in the given shape.

    Raises:
        LowbitError: the stream is not exactly as long as the shape asks.
    """
    _check_width(bits)
    count = math.prod(shape)
    need = math.ceil(count * bits / 8)
    if packed.dtype != torch.uint8 or packed.numel() != need:
        raise LowbitError(
            f"{packed.numel()} bytes of {packed.dtype} cannot hold {count} codes of {bits} bits; "
            f"{need} bytes of torch.uint8 are needed"
        )
    stream = packed.detach().cpu().reshape(-1).numpy()
    codes = np.empty(count, np.uint8)
    for start in range(0, count, _CHUNK):
        n = min(_CHUNK, count - start)
        part = stream[start * bits // 8 :][: math.ceil(n * bits / 8)]
        single = np.zeros((n, 8), np.uint8)
        single[:, :bits] = np.unpackbits(part, count=n * bits, bitorder="little").reshape(n, bits)
        codes[start : start + n] = np.packbits(single.reshape(-1), bitorder="little")
    if signed:
        sign = np.uint8(1 << (bits - 1))
        return torch.from_numpy(((codes ^ sign) - sign).view(np.int8)).reshape(shape)
    return torch.from_numpy(codes).reshape(shape)


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise LowbitError(f"packing takes 1 to 8 bits, not {bits}; wider codes are stored as whole bytes")

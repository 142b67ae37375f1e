"""Codes of 1 to 8 bits as a stream of bits: 3-bit codes take 3 bits on disk.

Code i occupies the bits [i * bits, (i + 1) * bits) of the stream, least significant bit first; the last byte is
padded with zeros. Signed codes are stored in two's complement.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import LowbitError

__all__ = ["pack", "unpack"]

_CHUNK = 1 << 20  # codes handled at a time, a multiple of 8; bounds the memory of the 64-bit words


def pack(codes: Tensor, bits: int) -> Tensor:
    """Flatten int8 or uint8 codes into a uint8 tensor of ceil(n * bits / 8) bytes.

    Raises:
        LowbitError: the width is not 1..8, or a code does not fit it.
    """
    _check(bits)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise LowbitError(f"codes are {codes.dtype}; packing takes int8 or uint8")
    flat = codes.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        lo, hi = (int(v) for v in torch.aminmax(flat))
        limit = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if codes.dtype == torch.int8 else (0, (1 << bits) - 1)
        if lo < limit[0] or hi > limit[1]:
            raise LowbitError(f"codes from {lo} to {hi} do not fit {bits} bits, which hold {limit[0]} to {limit[1]}")
    values = flat.numpy().view(np.uint8) & np.uint8((1 << bits) - 1)
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    out = np.empty(-(-values.size // 8) * bits, dtype=np.uint8)
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK].astype(np.uint64)
        part = np.concatenate([part, np.zeros(-part.size % 8, np.uint64)]).reshape(-1, 8)
        words = np.bitwise_or.reduce(part << shifts, axis=1).astype("<u8")
        at = start // 8 * bits
        out[at : at + words.size * bits] = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return torch.from_numpy(out[: -(-values.size * bits // 8)].copy())


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> Tensor:
    """Inverse of `pack`: int8 codes when `signed`, else uint8, in the given shape.

    Raises:
        LowbitError: the stream is not exactly as long as the shape asks.
    """
    _check(bits)
    count = int(np.prod(shape, dtype=np.int64))
    need = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or packed.numel() != need:
        raise LowbitError(
            f"{packed.numel()} bytes of {packed.dtype} cannot hold {count} codes of {bits} bits; "
            f"{need} bytes of torch.uint8 are needed"
        )
    stream = packed.cpu().contiguous().reshape(-1).numpy()
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    out = np.empty(count, dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        n = min(_CHUNK, count - start)
        rows = -(-n // 8)
        words = np.zeros((rows, 8), np.uint8)
        part = stream[start // 8 * bits : start // 8 * bits + rows * bits]
        padded = np.zeros(rows * bits, np.uint8)
        padded[: part.size] = part
        words[:, :bits] = padded.reshape(rows, bits)
        values = (words.view("<u8") >> shifts) & np.uint64((1 << bits) - 1)
        out[start : start + n] = values.reshape(-1)[:n]
    if signed:
        sign = np.uint8(1 << (bits - 1))
        return torch.from_numpy(((out ^ sign) - sign).view(np.int8)).reshape(shape)
    return torch.from_numpy(out).reshape(shape)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise LowbitError(f"packing takes 1 to 8 bits, not {bits}; wider codes are stored as whole bytes")

"""The arithmetic of integer kernels, bit for bit as ONNX Runtime's x86 kernels do it.

Codes come in centred, that is with their zero point taken off, as floating point tensors that hold whole
numbers; codes go out the same way. Every operation is rounded to float32 unless the formula says otherwise,
and `fma` is rounded once. Found by experiment on ONNX Runtime 1.31; `tests/test_verify.py` holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.spec import QuantSpec

__all__ = ["Grid", "add", "average_pool", "bias_codes", "multiply", "rescale", "round_to", "to_real"]


@dataclass(frozen=True)
class Grid:
    """Where codes stand: real = (code - zero_point) * scale, code in [qmin, qmax]; one scale for all."""

    scale: Tensor
    zero_point: int
    spec: QuantSpec

    def nearest(self, x: Tensor) -> Tensor:
        """rint; where codes are signs, the side of zero."""
        return torch.where(x >= 0, 1.0, -1.0) if self.spec.is_binary else torch.round(x)

    def centre(self, codes: Tensor) -> Tensor:
        """Clamp codes and take the zero point off."""
        return codes.clamp(self.spec.qmin, self.spec.qmax) - self.zero_point


def bias_codes(bias: Tensor, scale: Tensor) -> Tensor:
    """int32 codes rint(f32(bias / scale)); the scale is that of the accumulator, input times weight."""
    limit = 2.0**31 - 1
    return torch.round(bias / scale).double().clamp(-limit, limit).to(torch.int32)


def to_real(centred: Tensor, grid: Grid) -> Tensor:
    """DequantizeLinear: f32(code - zero_point) * scale."""
    return centred.float() * grid.scale


def round_to(x: Tensor, grid: Grid) -> Tensor:
    """QuantizeLinear: clamp(rint(x / scale) + zero_point)."""
    return grid.centre(grid.nearest(x.float() / grid.scale) + grid.zero_point)


def rescale(accumulator: Tensor, multiplier: Tensor, grid: Grid) -> Tensor:
    """QLinearConv, QGemm, QLinearMatMul, global pooling: clamp(rint(f32(acc) * multiplier) + zero_point).

    Args:
        accumulator: exact integer sums, bias included, float64.
        multiplier: float32, f32(f32(input scale * weight scale) / output scale), broadcastable.
    """
    return grid.centre(grid.nearest(accumulator.float() * multiplier) + grid.zero_point)


def add(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
    """QLinearAdd: with ra = sa / sc, rb = sb / sc and fixed = zc - fma(ra, za, f32(rb * zb)),
    clamp(rint(fma(code_a, ra, fma(code_b, rb, fixed))))."""
    ra, rb = a_grid.scale / grid.scale, b_grid.scale / grid.scale
    za, zb = torch.tensor(float(a_grid.zero_point)), torch.tensor(float(b_grid.zero_point))
    fixed = grid.zero_point - fma(ra, za, rb * zb)
    return grid.centre(grid.nearest(fma(a + za, ra, fma(b + zb, rb, fixed))))


def multiply(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
    """QLinearMul: clamp(rint(f32(f32(a * b) * f32(f32(sa * sb) / sc)) + zc)), the zero point inside."""
    ratio = a_grid.scale * b_grid.scale / grid.scale
    return grid.centre(grid.nearest((a.double() * b.double()).float() * ratio + grid.zero_point))


def average_pool(window_means: Tensor, grid: Grid) -> Tensor:
    """QLinearAveragePool of float32 means: clamp(rint(f32(mean / scale) + zero_point)), zero point inside."""
    return grid.centre(grid.nearest(window_means / grid.scale + grid.zero_point))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded once to float32: the product of two float32 numbers is exact in float64."""
    return (a.double() * b.double() + c.double()).float()

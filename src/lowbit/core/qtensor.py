"""A quantized tensor at rest, and the error that quantizing made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.core.affine import check_finite, choose_qparams, dequantize, group_amin_amax, quantize
from lowbit.core.levels import least_error
from lowbit.core.spec import QuantSpec, expand_to
from lowbit.errors import LowbitError, expect

__all__ = ["QTensor", "QuantizationError", "quantization_error"]


@dataclass(frozen=True, eq=False)
class QTensor:
    """Codes and what they mean. A record, not a torch.Tensor subclass.

    Invariant: `dequantize() == (codes - zero_point) * scale`, with `scale.ndim == codes.ndim`; where the spec
    is split, negative codes have `negative_scale` for the scale.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    negative_scale: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that shapes, dtype and zero point are those of the spec."""
        shape = self.spec.scale_shape(self.codes.shape)
        parts = {"scale": self.scale, "zero point": self.zero_point, "negative scale": self.negative_scale}
        for what, tensor in parts.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise LowbitError(
                    f"{what} of shape {list(tensor.shape)} does not fit codes of shape "
                    f"{list(self.codes.shape)}; {self.spec} asks for {list(shape)}"
                )
        if self.codes.dtype != self.spec.dtype:
            raise LowbitError(f"codes are {self.codes.dtype}; {self.spec} asks for {self.spec.dtype}")
        if (self.negative_scale is not None) != self.spec.split:
            raise LowbitError(
                f"a negative scale goes with a split spec and only there; the spec is {self.spec}"
            )
        if (self.zero_point is None) != (self.spec.symmetric or self.spec.kind == "float"):
            raise LowbitError(
                f"a zero point goes with an asymmetric spec and only there; the spec is {self.spec}"
            )

    @classmethod
    def quantize(cls, x: Tensor, spec: QuantSpec, range: tuple[Tensor, Tensor] | None = None) -> QTensor:
        """Quantize `x` with the scale that covers `range`, by default its smallest to largest value.

        A constant tensor is represented up to float rounding; an all-zero or empty one gets scale 1. Binary
        and ternary codes get, by default, the scale of least squared error.

        Args:
            x: float tensor of any shape.
            spec: how its numbers are to look.
            range: lo and hi in the shape `spec.scale_shape(x.shape)`.

        Raises:
            LowbitError: `x` holds NaN or infinity, or its shape does not fit the granularity.
        """
        _check_kinds(x, spec)
        check_finite(x)
        if range is None and (spec.is_binary or spec.is_ternary):
            return cls._on_levels(x, spec)
        lo, hi = group_amin_amax(x, spec) if range is None else range
        scale, zero_point = choose_qparams(lo, hi, spec)
        return cls(quantize(x, scale, zero_point, spec), scale, zero_point, spec)

    @classmethod
    def _on_levels(cls, x: Tensor, spec: QuantSpec) -> QTensor:
        found = least_error(x, spec)
        scale, negative = found.scale, found.negative_scale
        unit = scale
        if negative is not None:
            unit = torch.where(x < 0, expand_to(negative, x.shape), expand_to(scale, x.shape))
        return cls(quantize(x, unit, None, spec), scale, None, spec, negative)

    def dequantize(self) -> Tensor:
        """float32 tensor of the shape of the codes."""
        real = dequantize(self.codes, self.scale, self.zero_point)
        if self.negative_scale is None:
            return real
        return torch.where(self.codes < 0, dequantize(self.codes, self.negative_scale, None), real)

    def widened(self, bits: int) -> QTensor:
        """The same numbers in plain integer codes of `bits` bits: codes times 2^k, scale over 2^k.

        Raises:
            LowbitError: each sign has a scale of its own.
        """
        if self.spec.split:
            raise LowbitError("codes with a scale for each sign are no integers; leave split out of the spec")
        factor = 1 << max(0, bits - self.spec.code_bits)
        zero = None if self.zero_point is None else self.zero_point * factor
        spec = replace(self.spec, bits=max(bits, self.spec.code_bits), mid_rise=False)
        return QTensor((self.codes.to(spec.dtype) * factor), self.scale / factor, zero, spec)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, packed up to 8 bits and in whole bytes above, the scales and zero points."""
        width = self.spec.bits if self.spec.bits <= 8 else 8 * self.codes.element_size()
        codes = math.ceil(self.codes.numel() * width / 8)
        scale = 0 if self.spec.kind == "float" else 4 * self.scale.numel()
        scale *= 2 if self.spec.split else 1
        return codes + scale + (0 if self.zero_point is None else 4 * self.zero_point.numel())


@dataclass(frozen=True)
class QuantizationError:
    """What quantizing a tensor cost. All in the units of the tensor but `relative` and `sqnr_db`."""

    # mean |x - q|
    mae: float
    # |x - q|_2 / |x|_2
    relative: float
    # largest |x - q|
    max: float
    # mean (x - q)^2
    mse: float
    # 10 log10(mean x^2 / mean (x - q)^2)
    sqnr_db: float
    # mean of step^2 / 12: the error of rounding when x is spread evenly over each step (Widrow 1956); for
    # fp16 the step is the spacing of the half-precision numbers at x
    theoretical_mse: float


def quantization_error(
    x: Tensor, spec: QuantSpec, range: tuple[Tensor, Tensor] | None = None
) -> QuantizationError:
    """Quantize `x` under `spec` and measure the damage.

    Args:
        x: float tensor of any shape with at least one element.
        spec: how its numbers are to look.
        range: lo and hi to cover, in the shape of the scale; by default the range of `x`.

    Raises:
        LowbitError: `x` is empty, or holds NaN or infinity.
    """
    _check_kinds(x, spec)
    if x.numel() == 0:
        raise LowbitError("the error of an empty tensor is undefined; pass at least one element")
    q = QTensor.quantize(x, spec, range)
    x = x.double()
    error = x - q.dequantize().double()
    mse, power = error.square().mean().item(), x.square().mean().item()
    if spec.kind == "float":
        step = torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=2.0**-14))) - 10)
        theory = step.square().mean().item() / 12
    else:
        theory = (spec.step * q.scale.double()).square().mean().item() / 12
    return QuantizationError(
        mae=error.abs().mean().item(),
        relative=math.sqrt(mse / power) if power else 0.0,
        max=error.abs().max().item(),
        mse=mse,
        sqnr_db=sqnr_db(power, mse),
        theoretical_mse=theory,
    )


def _check_kinds(x: object, spec: object) -> None:
    expect(x, Tensor, "x", "convert it with torch.as_tensor(x, dtype=torch.float32)")
    expect(spec, QuantSpec, "spec", "pass INT8, INT4, UINT8, FP16 or QuantSpec(bits=...)")


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two powers; infinite when there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf

"""How a product of bits ends: as int32 sums, as floats or as the bits of the next layer."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.bits_layouts import Kind, to_words

__all__ = ["Affine", "End", "Epilogue", "Threshold"]


class Epilogue(ctypes.Structure):
    """The struct of this name in bits_types.h."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "outputs")),
        *(
            (name, c_void_p)
            for name in ("to", "base", "factors", "taps", "scale", "bias", "threshold", "flip")
        ),
    )


def _vector(t: Tensor, dtype: torch.dtype, outputs: int, what: str) -> Tensor:
    """`t` as it is read: contiguous on the CPU, one value for each output.

    Raises:
        LowbitError: another type, number or place.
    """
    if t.dtype is not dtype or t.shape != (outputs,) or t.device.type != "cpu":
        raise LowbitError(
            f"{what} is {t.dtype} of shape {tuple(t.shape)} on '{t.device}'; give {dtype} of shape "
            f"({outputs},) on the CPU"
        )
    return t.detach().contiguous()


@dataclass(frozen=True, kw_only=True)
class Affine:
    """y = sum * scale + bias in float32, rounded after each step. Both are [outputs]; no bias is 0."""

    scale: Tensor
    bias: Tensor | None = None

    def checked(self, outputs: int) -> Affine:
        """Itself, in the types and the order that the library reads.

        Raises:
            LowbitError: another type or shape.
        """
        bias = torch.zeros(outputs) if self.bias is None else self.bias
        return Affine(
            scale=_vector(self.scale, torch.float32, outputs, "scale"),
            bias=_vector(bias, torch.float32, outputs, "bias"),
        )

    def apply(self, sums: Tensor) -> Tensor:
        """The end in PyTorch; outputs are the last axis."""
        y = sums.float() * self.scale
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """bit = (sum >= threshold) != flip: what a normalization and a sign, or a step, come down to.

    threshold: int32 [outputs]; flip: bool [outputs], True where a larger sum gives a smaller result; none is
    False. `kind` says what the bits mean to the next layer: "sign" or, for codes 0 and 1, "unsigned".
    """

    threshold: Tensor
    flip: Tensor | None = None
    kind: Kind = "sign"

    def checked(self, outputs: int) -> Threshold:
        """Itself, in the types and the order that the library reads.

        Raises:
            LowbitError: another type, shape or kind.
        """
        if self.kind not in ("sign", "unsigned"):
            raise LowbitError(f"one bit is no code of kind {self.kind!r}; use 'sign' or 'unsigned'")
        flip = torch.zeros(outputs, dtype=torch.bool) if self.flip is None else self.flip
        return Threshold(
            threshold=_vector(self.threshold, torch.int32, outputs, "threshold"),
            flip=_vector(flip, torch.bool, outputs, "flip"),
            kind=self.kind,
        )

    def apply(self, sums: Tensor) -> Tensor:
        """The end in PyTorch, as words; outputs are the last axis."""
        bits = sums >= self.threshold
        return to_words(bits if self.flip is None else bits ^ self.flip)


End = Affine | Threshold

"""Floor 0: compiled kernels as operators of PyTorch; the formulas they compute stand in `core`."""

from __future__ import annotations

from lowbit.kernels.operators import (
    available,
    description,
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_masked,
    fake_quantize_masked_backward,
    supports,
)

__all__ = [
    "available",
    "description",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_masked",
    "fake_quantize_masked_backward",
    "supports",
]

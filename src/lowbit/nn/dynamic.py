"""Activations rounded by the range that they have themselves, at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.affine import fake_quantize, own_qparams, quantize
from lowbit.core.qtensor import QTensor
from lowbit.core.spec import QuantSpec
from lowbit.nn.layers import QLayer, QLinear
from lowbit.nn.quantizer import Quantizer

__all__ = ["DynamicQuantizer", "has_integer_product"]


class DynamicQuantizer(Quantizer):
    """One scale for the whole tensor, or for each token, from its own least and largest value.

    Nothing is calibrated and nothing learned: there is no scale to keep. In training the gradient passes
    straight through, for nothing lies outside of the range.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.observer, self.mode = None, "quantize"

    @property
    def ready(self) -> bool:
        return True

    def learn(self) -> None:
        """There is nothing to train."""

    def settle(self, values: Tensor | None = None) -> None:
        """There is nothing to end."""

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "off":
            return x
        return _StraightThrough.apply(x.float(), self.spec)  # type: ignore[no-untyped-call]

    def quantize(self, x: Tensor) -> QTensor:
        scale, zero_point = own_qparams(x, self.spec)
        return QTensor(quantize(x, scale, zero_point, self.spec), scale, zero_point, self.spec)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: QuantSpec) -> Tensor:
        return fake_quantize(x, *own_qparams(x, spec), spec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def has_integer_product(layer: nn.Module) -> bool:
    """Whether each output of a layer on such codes is one sum of integers times one scale."""
    if not isinstance(layer, QLayer) or not isinstance(layer, QLinear):
        return False
    spec, scale = layer.weight_quantizer.spec, layer.weight_quantizer.scale
    plain = spec.kind == "int" and spec.symmetric and not spec.split and spec.bits <= 8
    return plain and scale.ndim == 2 and scale.shape[1] == 1

"""Binary and ternary linear layers on float inputs: MatMulNBits of ONNX Runtime, two bits a weight.

The runtime has a fast kernel for blocks of 128 weights with accuracy level 4, which rounds the inputs of each
block to 8 bits as it goes; other blocks and levels take a scalar path, many times slower than float.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lowbit.core.packing import pack
from lowbit.core.spec import PerChannel, PerTensor
from lowbit.nn.layers import QLayer, QLinear

__all__ = ["LEVEL", "PRODUCT", "EmitTwoBits", "takes_two_bits"]

PRODUCT = "com.microsoft::MatMulNBits"
# name of the attribute, and its value
LEVEL = ("accuracy_level", 4)
BLOCK = 128
# the code that stands for 0 where a node names none
ZERO = 2


def takes_two_bits(layer: QLayer) -> bool:
    """Whether the weight of a layer on float inputs has that form."""
    spec = layer.weight_quantizer.spec
    small = (spec.is_binary or spec.is_ternary) and not spec.split
    return isinstance(layer, QLinear) and small and spec.granularity in (PerTensor(), PerChannel(0))


class EmitTwoBits(nn.Module):
    """y = x W^T + b with W [out, in] as codes 1, 2 and 3, for -1, 0 and 1, and one scale for each block."""

    def __init__(self, layer: QLinear) -> None:
        super().__init__()
        q = layer.qweight()
        self.outputs, self.inputs = q.codes.shape
        blocks = math.ceil(self.inputs / BLOCK)
        codes = torch.full((self.outputs, blocks * BLOCK), ZERO, dtype=torch.uint8)
        codes[:, : self.inputs] = q.codes + ZERO
        self.register_buffer("packed", pack(codes, 2).reshape(self.outputs, blocks, BLOCK // 4))
        scale = q.scale.reshape(-1, 1).expand(self.outputs, blocks)
        self.register_buffer("scale", scale.reshape(-1).clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        product = torch.onnx.ops.symbolic(
            PRODUCT,
            (x, self.packed, self.scale),
            {"K": self.inputs, "N": self.outputs, "bits": 2, "block_size": BLOCK, LEVEL[0]: LEVEL[1]},
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.outputs),
            version=1,
        )
        return product if self.bias is None else product + self.bias

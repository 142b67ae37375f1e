"""Ranges found at run time: DynamicQuantizeLinear, or the same for each token; and MatMulInteger on either.

ONNX Runtime fuses DynamicQuantizeLinear, MatMulInteger and what follows into one kernel. It has none for a
zero point of each row, so that for tokens the product of zero point and weight is subtracted from the sums;
and where it sees the scales of rows times those of columns it fuses as if all rows had the first one's, so
that sums are multiplied by the one and then by the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.core.affine import MIN_SCALE
from lowbit.core.spec import PerTensor
from lowbit.errors import LowbitError
from lowbit.export.qdq.emitters import CODES, EmitQuantizer, EmitSign, codes_mark, emit_layer, op
from lowbit.nn.dynamic import DynamicQuantizer, has_integer_product
from lowbit.nn.layers import QLayer, QLinear
from lowbit.nn.quantizer import Quantizer

__all__ = ["EmitDynamic", "emit_reader", "emit_tensor"]

# codes, scale, zero point: of type uint8 where there is one for all, else float32
Parts = tuple[Tensor, Tensor, Tensor]


class EmitDynamic(nn.Module):
    """From a tensor to codes, scale and zero point."""

    def __init__(self, quantizer: DynamicQuantizer, name: str) -> None:
        super().__init__()
        spec = quantizer.spec
        if spec.signed or spec.symmetric:
            raise LowbitError(
                f"'{name}': {spec} has no kernel, for ranges are found at run time for unsigned codes "
                "with a zero point; use signed=False, symmetric=False"
            )
        self.name, self.top = name, float(spec.qmax)
        self.whole = spec.granularity == PerTensor()
        if self.whole and spec.bits != 8:
            raise LowbitError(f"'{name}': DynamicQuantizeLinear makes 8 bits, not {spec.bits}; use 8")

    def forward(self, x: Tensor) -> Parts:
        mark = {CODES: self.name}
        if self.whole:
            codes, scale, zero = torch.onnx.ops.symbolic_multi_out(
                "DynamicQuantizeLinear",
                (x,),
                dtypes=(torch.uint8, torch.float32, torch.uint8),
                shapes=(x.shape, (), ()),
                metadata_props=mark,
            )
            return codes, scale, zero
        low = torch.amin(x, -1, keepdim=True).clamp(max=0.0)
        high = torch.amax(x, -1, keepdim=True).clamp(min=0.0)
        scale = ((high - low) / self.top).clamp(min=MIN_SCALE)
        zero = (0.0 - low / scale).clamp(0.0, self.top).round()
        real = ((x / scale).round() + zero).clamp(0.0, self.top)
        codes = op("Cast", (real,), torch.uint8, x.shape, to=_UINT8, metadata=mark)
        return codes, scale, zero


# of ONNX's TensorProto
_UINT8 = 2


class _Product(nn.Module):
    """MatMulInteger of codes, then the scales and the bias."""

    def __init__(self, layer: QLinear, source: DynamicQuantizer) -> None:
        super().__init__()
        q = layer.qweight()
        self.mark = codes_mark(layer, q.spec)
        self.whole = source.spec.granularity == PerTensor()
        self.register_buffer(self.mark, q.codes.t().contiguous())
        self.register_buffer("scale", q.scale.reshape(-1).clone())
        self.register_buffer("sums", q.codes.sum(1, dtype=torch.int32))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, parts: Parts) -> Tensor:
        codes, scale, zero = parts
        weight = self.get_buffer(self.mark)
        shape = (*codes.shape[:-1], weight.shape[1])
        if self.whole:
            product = op("MatMulInteger", (codes, weight, zero), torch.int32, shape)
            real = product.float() * (scale * self.scale)
        else:
            product = op("MatMulInteger", (codes, weight), torch.int32, shape) - zero.int() * self.sums
            real = product.float() * self.scale * scale
        return real if self.bias is None else real + self.bias


class _OnFloats(nn.Module):
    """A layer without an integer kernel reads what the codes stand for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, parts: Parts) -> Tensor:
        codes, scale, zero = parts
        return self.layer((codes.float() - zero.float()) * scale)


def emit_tensor(quantizer: Quantizer, name: str, step: Tensor | None = None) -> nn.Module:
    """The stand-in of a quantizer of activations; `step` as of `EmitSign`."""
    if isinstance(quantizer, DynamicQuantizer):
        return EmitDynamic(quantizer, name)
    return EmitSign(quantizer, name, step) if quantizer.spec.is_binary else EmitQuantizer(quantizer, name)


def emit_reader(layer: nn.Module, source: Quantizer | None, rank: int, name: str) -> nn.Module:
    """The stand-in of a layer, perhaps itself; arguments as of `emit_layer`."""
    if not isinstance(source, DynamicQuantizer):
        return emit_layer(layer, source, rank, name) if isinstance(layer, QLayer) else layer
    if has_integer_product(layer):
        assert isinstance(layer, QLinear)
        return _Product(layer, source)
    return _OnFloats(emit_layer(layer, None, rank, name) if isinstance(layer, QLayer) else layer)

"""Modules that stand in for quantizers and quantized layers during export and write the ONNX they mean.

The patterns are those that ONNX Runtime replaces by integer kernels: a QuantizeLinear / DequantizeLinear
pair on both sides of each operation, also of those that only move values; int32 biases at the scale of the
accumulator; fully connected layers as Gemm; global pooling as GlobalAveragePool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.core.integer import bias_codes
from lowbit.core.spec import PerChannel, PerGroup, PerTensor, QuantSpec, expand_to
from lowbit.errors import LowbitError
from lowbit.export.qdq.two_bits import EmitTwoBits, takes_two_bits
from lowbit.nn.layers import QConv1d, QConv2d, QConvTranspose2d, QEmbedding, QLayer, QLinear
from lowbit.nn.quantizer import Quantizer

__all__ = [
    "CODES",
    "NIBBLES",
    "NIBBLES_CAST",
    "SIGN_ZERO",
    "Clamped",
    "EmitGlobalAveragePool",
    "EmitQuantizer",
    "EmitSign",
    "accumulator_step",
    "codes_mark",
    "emit_layer",
    "op",
]

# metadata key of the operator whose codes `verify` reads, and marks of initializers that become 4-bit
# tensors: read as they are, or cast to int8 first, which integer kernels need and the runtime does once
CODES = "lowbit.codes"
NIBBLES, NIBBLES_CAST = "nibbles", "nibbles_cast_"
# what is added to the codes of signs, which integer kernels want unsigned
SIGN_ZERO = 1


def op(
    name: str, inputs: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[Any], **attributes: Any
) -> Tensor:
    """Write one ONNX operator."""
    metadata = attributes.pop("metadata", None)
    return torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=dtype, shape=shape, metadata_props=metadata
    )


def storage(spec: QuantSpec) -> torch.dtype:
    """The ONNX type that holds the codes of activations."""
    if spec.bits > 8:
        return torch.int16 if spec.signed else torch.uint16
    return torch.int8 if spec.signed else torch.uint8


class EmitQuantizer(nn.Module):
    """QuantizeLinear, Clip on the codes where the width is not that of the type, DequantizeLinear."""

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        super().__init__()
        spec = quantizer.spec
        if not spec.is_standard:
            raise LowbitError(
                f"'{name}': ONNX rounds half to even and saturates; rounding='{spec.rounding}' with "
                f"overflow='{spec.overflow}' cannot be exported"
            )
        self.name, self.spec, self.dtype = name, spec, storage(spec)
        self.axis = spec.granularity.axis if isinstance(spec.granularity, PerChannel) else None
        if spec.kind == "float":
            return
        flat = [-1] if self.axis is not None else []
        zero = (
            torch.zeros_like(quantizer.scale, dtype=torch.int32)
            if quantizer.zero_point is None
            else quantizer.zero_point
        )
        self.register_buffer("scale", quantizer.scale.reshape(flat).clone())
        self.register_buffer("zero_point", zero.reshape(flat).to(self.dtype))
        limits = torch.iinfo(self.dtype)
        self.clips = (spec.qmin, spec.qmax) != (limits.min, limits.max)
        if self.clips:
            self.register_buffer("qmin", torch.tensor(spec.qmin).to(self.dtype))
            self.register_buffer("qmax", torch.tensor(spec.qmax).to(self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.kind == "float":
            return x.half().float()
        axis = {} if self.axis is None else {"axis": self.axis}
        grid = (self.scale, self.zero_point)
        mark = {CODES: self.name}
        if not self.clips:
            codes = op("QuantizeLinear", (x, *grid), self.dtype, x.shape, metadata=mark, **axis)
        else:
            codes = op("QuantizeLinear", (x, *grid), self.dtype, x.shape, **axis)
            codes = op("Clip", (codes, self.qmin, self.qmax), self.dtype, x.shape, metadata=mark)
        return op("DequantizeLinear", (codes, *grid), torch.float32, x.shape, **axis)


class EmitSign(nn.Module):
    """The sign: Where, DequantizeLinear. In the file its codes are SIGN_ZERO - 1 and SIGN_ZERO + 1, of uint8.

    Behind an integer layer its sums are rounded first, at the smallest step of the accumulators, which keeps
    every sign and gives the layer an integer kernel.
    """

    def __init__(self, quantizer: Quantizer, name: str, step: Tensor | None) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("step", step)
        self.register_buffer("scale", quantizer.scale.reshape(()).clone())
        self.register_buffer("origin", torch.tensor(0.0))
        codes = {"middle": 128, "centre": SIGN_ZERO, "plus": SIGN_ZERO + 1, "minus": SIGN_ZERO - 1}
        for name_of, code in codes.items():
            self.register_buffer(name_of, torch.tensor(code, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.step is not None:
            codes = op("QuantizeLinear", (x, self.step, self.middle), torch.uint8, x.shape)
            x = op("DequantizeLinear", (codes, self.step, self.middle), torch.float32, x.shape)
        positive = op("GreaterOrEqual", (x, self.origin), torch.bool, x.shape)
        signs = (positive, self.plus, self.minus)
        codes = op("Where", signs, torch.uint8, x.shape, metadata={CODES: self.name})
        return op("DequantizeLinear", (codes, self.scale, self.centre), torch.float32, x.shape)


def accumulator_step(layer: QLayer, source: Quantizer | None) -> Tensor | None:
    """The smallest step of the sums of a layer over its channels; None where it has no integer kernel."""
    if source is None or not _has_accumulator(layer, source):
        return None
    return (source.scale.reshape(()) * layer.kernel_qweight(source.spec).scale).min()


class EmitGlobalAveragePool(nn.Module):
    """Mean over all positions, [N, C, ...] -> [N, C, 1, ...]."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        shape = (x.shape[0], x.shape[1], *[1] * (x.ndim - 2))
        return op("GlobalAveragePool", (x,), torch.float32, shape)


class Clamped(nn.Module):
    """ReLU in place of a clamp whose upper end the quantizer behind it enforces anyway."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return F.relu(x)


class _Weight(nn.Module):
    """DequantizeLinear of constant codes, or Cast of constant half-precision numbers.

    Codes of four bits and fewer are marked to be packed; with the mark goes the factor that makes them codes
    of an integer kernel.
    """

    def __init__(self, layer: QLayer, source: Quantizer | None, *, transpose: bool = False) -> None:
        super().__init__()
        integer = source is not None
        q = layer.qweight() if source is None else layer.kernel_qweight(source.spec)
        codes, spec, bits = q.codes, q.spec, layer.weight_quantizer.spec.code_bits
        self.attributes: dict[str, int] = {}
        self.is_half = spec.kind == "float"
        self.rows = codes.ndim
        scale, zero = q.scale, q.zero_point
        if isinstance(spec.granularity, PerGroup):
            axis = spec.granularity.axis % codes.ndim
            self.attributes = {"axis": axis, "block_size": spec.granularity.size}
            shape = [
                s if d == axis else n for d, (s, n) in enumerate(zip(scale.shape, codes.shape, strict=True))
            ]
            scale, zero = (
                expand_to(scale, shape).expand(shape),
                None if zero is None else expand_to(zero, shape).expand(shape),
            )
        elif isinstance(spec.granularity, PerChannel):
            self.attributes = {"axis": spec.granularity.axis % codes.ndim}
            scale, zero = scale.reshape(-1), None if zero is None else zero.reshape(-1)
        else:
            scale, zero = scale.reshape(()), None if zero is None else zero.reshape(())
        if transpose:
            codes = codes.t()
            self.attributes.update({"axis": 1 - self.attributes["axis"]} if self.attributes else {})
            scale = scale.t() if scale.ndim == 2 else scale
            zero = zero.t() if zero is not None and zero.ndim == 2 else zero
        self.mark = "codes"
        if not self.is_half and bits <= 4:
            self.mark = codes_mark(layer, spec) if integer else NIBBLES
        self.register_buffer(self.mark, codes.contiguous())
        if not self.is_half:
            self.register_buffer("scale", scale.contiguous().clone())
            # without it a layer with float output gets no integer kernel, and a runtime that avoids
            # saturating kernels makes up one of the wrong shape
            if zero is None and (integer or (bits > 4 and codes.dtype == torch.int8)):
                zero = torch.zeros_like(scale, dtype=codes.dtype)
            self.register_buffer("zero_point", None if zero is None else zero.to(codes.dtype).contiguous())

    def forward(self) -> Tensor:
        codes = self.get_buffer(self.mark)
        if self.is_half:
            return codes.float()
        inputs = (codes, self.scale) if self.zero_point is None else (codes, self.scale, self.zero_point)
        return op("DequantizeLinear", inputs, torch.float32, codes.shape, **self.attributes)


def codes_mark(layer: QLayer, spec: QuantSpec) -> str:
    """The name of the codes that an integer kernel reads, given their spec: it says how they are packed."""
    bits = layer.weight_quantizer.spec.code_bits
    return f"{NIBBLES_CAST}{1 << spec.code_bits - bits}" if bits <= 4 else "codes"


class _Bias(nn.Module):
    """int32 codes at the scale of the accumulator."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        axis = {"axis": 0} if self.scale.ndim else {}
        return op("DequantizeLinear", (self.codes, self.scale), torch.float32, self.codes.shape, **axis)


class _EmitLayer(nn.Module):
    """A layer on emitted weight and bias."""

    def __init__(self, layer: QLayer, source: Quantizer | None, rank: int) -> None:
        super().__init__()
        self.gemm = isinstance(layer, QLinear) and rank == 2 and source is not None
        matmul = isinstance(layer, QLinear) and not self.gemm
        self.weight = _Weight(layer, source, transpose=matmul)
        self.bias: nn.Module | None = None
        if layer.bias is not None:
            self.bias = _bias(layer, source, in_float=matmul)
        # only its geometry is used; the codes were copied
        self.geometry = {k: v for k, v in vars(layer).items() if not k.startswith("_")}
        self.kind = type(layer)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight()
        bias = None if self.bias is None else self.bias()
        if self.gemm:
            inputs = (x, weight) if bias is None else (x, weight, bias)
            return op("Gemm", inputs, torch.float32, (x.shape[0], weight.shape[0]), transB=1)
        if self.kind is QLinear:
            product = torch.matmul(x, weight)
            return product if bias is None else product + bias
        g = self.geometry
        if self.kind is QConvTranspose2d:
            return F.conv_transpose2d(
                x, weight, bias, g["stride"], g["padding"], g["output_padding"], g["groups"], g["dilation"]
            )
        padding = g["padding"]
        if g["padding_mode"] != "zeros":
            x, padding = F.pad(x, g["reversed_padding"], mode=g["padding_mode"]), 0
        convolve = F.conv1d if self.kind is QConv1d else F.conv2d
        return convolve(x, weight, bias, g["stride"], padding, g["dilation"], g["groups"])


def _bias(layer: QLayer, source: Quantizer | None, *, in_float: bool) -> nn.Module:
    """On the grid of the accumulator, if there is one; what is added behind a product is a float already."""
    assert layer.bias is not None
    if source is None:
        return _FloatBias(layer.bias)
    codes, scale = _integer_bias(layer, source)
    return _FloatBias(codes.float() * scale) if in_float else _Bias(codes, scale)


class _FloatBias(nn.Module):
    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", bias.detach().clone())

    def forward(self) -> Tensor:
        return self.get_buffer("value")


class _EmitEmbedding(nn.Module):
    """Look up codes, then scale the rows found: the table is never decoded as a whole."""

    def __init__(self, layer: QEmbedding) -> None:
        super().__init__()
        q = layer.qweight()
        self.register_buffer("codes", q.codes)
        self.register_buffer("scale", q.scale.expand(q.codes.shape[0], *q.scale.shape[1:]).clone())
        zero = (
            None
            if q.zero_point is None
            else q.zero_point.expand(q.codes.shape[0], *q.scale.shape[1:]).clone()
        )
        self.register_buffer("zero_point", zero)

    def forward(self, index: Tensor) -> Tensor:
        rows = F.embedding(index, self.codes).float()
        if self.zero_point is not None:
            rows = rows - expand_to(F.embedding(index, self.zero_point).float(), rows.shape)
        return rows * expand_to(F.embedding(index, self.scale), rows.shape)


def emit_layer(layer: QLayer, source: Quantizer | None, rank: int, name: str) -> nn.Module:
    """The stand-in of a quantized layer.

    Args:
        source: quantizer of its input, when integer kernels are meant.
        rank: number of axes of its input.
        name: of the layer, for messages.

    Raises:
        LowbitError: its weight has no ONNX form.
    """
    if layer.weight_quantizer.spec.split:
        raise LowbitError(
            f"'{name}': ONNX has no codes with a scale for each sign; train with the spec 'ternary', or keep "
            "the lowbit checkpoint"
        )
    if isinstance(layer, QEmbedding):
        return _EmitEmbedding(layer)
    if source is not None and not _has_accumulator(layer, source):
        source = None
    if source is None and takes_two_bits(layer):
        assert isinstance(layer, QLinear)
        return EmitTwoBits(layer)
    emitter = _EmitLayer(layer, source, rank)
    if isinstance(layer, (QConv1d, QConv2d)):
        emitter.geometry["reversed_padding"] = layer._reversed_padding_repeated_twice
    return emitter


def _has_accumulator(layer: QLayer, source: Quantizer) -> bool:
    """Whether the sums of each output channel have one scale, at which a bias can be codes."""
    weight = layer.weight_quantizer
    if (
        weight.spec.kind != "int"
        or weight.spec.split
        or source.spec.kind != "int"
        or source.scale.numel() != 1
    ):
        return False
    where = weight.spec.granularity
    if isinstance(where, PerTensor):
        return True
    if not isinstance(where, PerChannel) or where.axis % weight.scale.ndim != layer.channel_axis:
        return False
    # the channels of a grouped transposed convolution are not those of one axis: W is [in, out / groups, ...]
    return not (isinstance(layer, QConvTranspose2d) and layer.groups > 1)


def _integer_bias(layer: QLayer, source: Quantizer) -> tuple[Tensor, Tensor]:
    """Bias codes and their scale, that of the accumulator."""
    assert layer.bias is not None
    weight = layer.kernel_qweight(source.spec)
    scale = weight.scale.reshape(-1)
    if not isinstance(weight.spec.granularity, PerChannel):
        scale = scale[0]
    scale = source.scale.reshape(()) * scale
    return bias_codes(layer.bias.detach(), scale), scale

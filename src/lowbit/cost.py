"""What a network costs: bytes, multiply-accumulates and bit operations, from shapes and specs alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn

from lowbit.core.spec import QuantSpec
from lowbit.graph.match import path_name, quantizer_of
from lowbit.graph.ops import kind_of, module_label, module_of
from lowbit.nn.layers import BoundLayer, QLayer
from lowbit.nn.quantizer import Quantizer

__all__ = ["Cost", "LayerCost", "cost_of", "stored_bytes"]


@dataclass(frozen=True)
class LayerCost:
    """One call of a layer, for one sample."""

    name: str
    op: str
    weights: int
    # bits of one weight and of one input; 32 in float
    weight_bits: int
    input_bits: int
    # codes, scales and zero points; 4 bytes for each weight in float
    weight_bytes: int
    bias_bytes: int
    # multiply-accumulates
    macs: int

    @property
    def bops(self) -> int:
        """macs * weight bits * input bits (Baskin et al. 2021, without the accumulator term)."""
        return self.macs * self.weight_bits * self.input_bits


@dataclass(frozen=True)
class Cost:
    """Costs of all calls of layers, in order; only the first call of a layer counts its weights."""

    layers: tuple[LayerCost, ...]
    # parameters and buffers outside these layers, in float
    other_bytes: int

    @property
    def bytes(self) -> int:
        return sum(c.weight_bytes + c.bias_bytes for c in self.layers) + self.other_bytes

    @property
    def float_bytes(self) -> int:
        """The same network with its weights in float32."""
        return sum(4 * c.weights + c.bias_bytes for c in self.layers) + self.other_bytes

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def bops(self) -> int:
        return sum(layer.bops for layer in self.layers)


def cost_of(gm: fx.GraphModule) -> Cost:
    """Cost of a graph, for one sample of the shapes it was traced with."""
    rows: list[LayerCost] = []
    seen: set[int] = set()
    for name, layer, bits, calls in _calls(gm):
        rows.append(_layer_cost(name, layer, bits, calls, first=id(layer) not in seen))
        seen.add(id(layer))
    inside = {id(t) for m in gm.modules() if id(m) in seen for t in (*m.parameters(), *m.buffers())}
    quantizers = [m for m in gm.modules() if isinstance(m, Quantizer)]
    scales = {id(t) for m in quantizers for t in (*m.parameters(), *m.buffers())}
    others = {id(t): t for t in (*gm.parameters(), *gm.buffers()) if id(t) not in inside | scales}
    return Cost(tuple(rows), sum(t.numel() * t.element_size() for t in others.values()))


# inputs and outputs of each call, without their numbers
_Shapes = list[tuple[Tensor, Tensor]]


def _calls(gm: fx.GraphModule) -> Iterator[tuple[str, nn.Module, int, _Shapes]]:
    """Name, layer, bits of the input and shapes: each call in the graph, then layers no graph reaches."""
    for node in gm.graph.nodes:
        if kind_of(node) == "layer":
            source = node.args[0]
            quantizer = quantizer_of(source)
            bits = quantizer.spec.bits if quantizer else 32
            yield str(node.meta["name"]), module_of(node), bits, [(source.meta["value"], node.meta["value"])]
    for path, shapes in gm.meta["inside"].items():
        layer, bits = gm.get_submodule(path), 32
        if isinstance(layer, BoundLayer):
            quantizer = layer.input_quantizer
            bits = quantizer.spec.bits if quantizer is not None and quantizer.mode != "off" else 32
            layer = layer.layer
        yield path_name(gm, path), layer, bits, shapes


def _layer_cost(name: str, layer: nn.Module, input_bits: int, calls: _Shapes, *, first: bool) -> LayerCost:
    weight = layer.get_buffer("weight_codes") if _frozen(layer) else layer.weight
    count = weight.numel()
    spec = layer.weight_quantizer.spec if isinstance(layer, QLayer) else None
    bias = getattr(layer, "bias", None)
    return LayerCost(
        name=name,
        op=module_label(layer),
        weights=count if first else 0,
        weight_bits=spec.bits if spec else 32,
        input_bits=input_bits,
        weight_bytes=stored_bytes(tuple(weight.shape), spec) if first else 0,
        bias_bytes=4 * bias.numel() if first and bias is not None else 0,
        macs=sum(_macs(layer, source, out, count) for source, out in calls),
    )


def _frozen(layer: nn.Module) -> bool:
    return isinstance(layer, QLayer) and layer.frozen_spec is not None


def stored_bytes(shape: tuple[int, ...], spec: QuantSpec | None) -> int:
    """Bytes of a weight on disk: codes packed up to 8 bits, in whole bytes above, scales and zero points."""
    if spec is None:
        return 4 * math.prod(shape)
    width = spec.bits if spec.bits <= 8 else 8 * spec.dtype.itemsize
    codes = math.ceil(math.prod(shape) * width / 8)
    scales = 0 if spec.kind == "float" else math.prod(spec.scale_shape(shape))
    return codes + 4 * scales * (1 if spec.symmetric else 2)


def _macs(layer: nn.Module, source: Tensor, out: Tensor, weights: int) -> int:
    """Multiply-accumulates of one sample: each weight is used once for every position it is moved to."""
    if isinstance(layer, nn.Embedding):
        return 0
    if isinstance(layer, nn.Linear):
        return weights * (out.numel() // layer.out_features) // (out.shape[0] if out.ndim > 1 else 1)
    return weights * math.prod((source if isinstance(layer, nn.ConvTranspose2d) else out).shape[2:])

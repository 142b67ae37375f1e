"""What a network costs: bytes, multiply-accumulates and bit operations, from shapes and specs alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx, nn

from lowbit.core.spec import QuantSpec
from lowbit.graph.ops import kind_of, module_of
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer

__all__ = ["Cost", "LayerCost", "cost_of"]


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
        """Bit operations: macs * weight bits * input bits (Baskin et al. 2021, without the accumulator term)."""
        return self.macs * self.weight_bits * self.input_bits


@dataclass(frozen=True)
class Cost:
    """Costs of all calls of layers, in the order of execution; only the first call of a layer counts its weights."""

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
    for node in gm.graph.nodes:
        if kind_of(node) != "layer":
            continue
        layer = module_of(node)
        first = id(layer) not in seen
        seen.add(id(layer))
        rows.append(_layer_cost(node, layer, first))
    inside = {id(t) for m in gm.modules() if id(m) in seen for t in (*m.parameters(), *m.buffers())}
    scales = {id(t) for m in gm.modules() if isinstance(m, Quantizer) for t in m.buffers()}
    others = {id(t): t for t in (*gm.parameters(), *gm.buffers()) if id(t) not in inside | scales}
    return Cost(tuple(rows), sum(t.numel() * t.element_size() for t in others.values()))


def _layer_cost(node: fx.Node, layer: nn.Module, first: bool) -> LayerCost:
    weight = layer.get_buffer("weight_codes") if _frozen(layer) else layer.weight
    count = weight.numel()
    spec = layer.weight_quantizer.spec if isinstance(layer, QLayer) else None
    bias = getattr(layer, "bias", None)
    source = node.args[0]
    return LayerCost(
        name=str(node.meta["name"]),
        op=type(layer).__name__.removeprefix("Q"),
        weights=count if first else 0,
        weight_bits=spec.bits if spec else 32,
        input_bits=_bits(source) if isinstance(source, fx.Node) else 32,
        weight_bytes=_bytes(tuple(weight.shape), spec) if first else 0,
        bias_bytes=4 * bias.numel() if first and bias is not None else 0,
        macs=_macs(node, layer, count),
    )


def _frozen(layer: nn.Module) -> bool:
    return isinstance(layer, QLayer) and layer.frozen_spec is not None


def _bytes(shape: tuple[int, ...], spec: QuantSpec | None) -> int:
    if spec is None:
        return 4 * math.prod(shape)
    codes = math.ceil(math.prod(shape) * spec.bits / 8)
    scales = 0 if spec.kind == "float" else math.prod(spec.scale_shape(shape))
    return codes + 4 * scales * (1 if spec.symmetric else 2)


def _bits(node: fx.Node) -> int:
    while kind_of(node) == "pass" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return module_of(node).spec.bits if kind_of(node) == "quantizer" else 32


def _macs(node: fx.Node, layer: nn.Module, weights: int) -> int:
    """Multiply-accumulates of one sample: each weight is used once for every position it is moved to."""
    out, source = node.meta["value"], node.args[0]
    if isinstance(layer, nn.Embedding) or not isinstance(out, Tensor):
        return 0
    batch = out.shape[0] if out.ndim > 1 else 1
    if isinstance(layer, nn.Linear):
        return weights * (out.numel() // layer.out_features) // batch
    if isinstance(layer, nn.ConvTranspose2d):
        assert isinstance(source, fx.Node)
        return weights * math.prod(source.meta["value"].shape[2:])
    return weights * math.prod(out.shape[2:])

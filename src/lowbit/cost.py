"""What a network costs: bytes, memory, multiply-accumulates, bit operations; from shapes and specs alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn

from lowbit.core.spec import QuantSpec
from lowbit.graph.match import is_folded_later, path_name, quantizer_of
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
    # activations of one sample that live at once, at most: each at the bits of its quantizer, packed. What
    # only a quantizer, a clamp or a BatchNorm reads is part of the kernel before, and takes nothing
    activation_bytes: int

    @property
    def bytes(self) -> int:
        return sum(c.weight_bytes + c.bias_bytes for c in self.layers) + self.other_bytes

    @property
    def float_bytes(self) -> int:
        """The same network with its weights in float32."""
        return sum(4 * c.weights + c.bias_bytes for c in self.layers) + self.other_bytes

    @property
    def compression(self) -> float:
        """Float bytes over bytes, everything counted: scales, biases, layers left alone."""
        return self.float_bytes / self.bytes if self.bytes else 1.0

    @property
    def average_bits(self) -> float:
        """Mean over the weights of all layers, 32 for those in float."""
        weights = sum(c.weights for c in self.layers)
        return sum(c.weights * c.weight_bits for c in self.layers) / weights if weights else 0.0

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
    other = sum(t.numel() * t.element_size() for t in others.values())
    return Cost(tuple(rows), other, _peak_activations(gm))


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


def _peak_activations(gm: fx.GraphModule) -> int:
    """Bytes of the tensors of one sample that live at once, at most."""
    nodes = list(gm.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    home: dict[fx.Node, fx.Node] = {}
    bits: dict[fx.Node, int] = {}
    end: dict[fx.Node, int] = {}
    for node in nodes:
        value = node.meta.get("value")
        if not isinstance(value, Tensor) or not value.ndim or node.op == "get_attr":
            continue
        source = node.args[0] if node.args else None
        joins = kind_of(node) in ("quantizer", "clamp") or is_folded_later(node)
        fused = joins and len(getattr(source, "users", ())) == 1
        moved = kind_of(node) == "pass" and source in home and value.numel() == source.meta["value"].numel()
        home[node] = place = home[source] if source in home and (fused or moved) else node
        module = module_of(node) if node.op == "call_module" else None
        if isinstance(module, Quantizer):
            bits[place] = module.spec.bits
        elif not moved:
            bits[place] = 8 * value.element_size()
        end[place] = max([end.get(place, 0), *(order[user] for user in node.users)])
    sizes = {p: bits[p] * p.meta["value"].numel() // max(1, p.meta["value"].shape[0]) for p in end}
    live = [sum(sizes[p] for p in end if order[p] <= i <= end[p]) for i in range(len(nodes))]
    return math.ceil(max(live, default=0) / 8)


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
    return codes + 4 * scales * (2 if spec.split or not spec.symmetric else 1)


def _macs(layer: nn.Module, source: Tensor, out: Tensor, weights: int) -> int:
    """Multiply-accumulates of one sample: each weight is used once for every position it is moved to."""
    if isinstance(layer, nn.Embedding):
        return 0
    if isinstance(layer, nn.Linear):
        return weights * (out.numel() // layer.out_features) // (out.shape[0] if out.ndim > 1 else 1)
    return weights * math.prod((source if isinstance(layer, nn.ConvTranspose2d) else out).shape[2:])

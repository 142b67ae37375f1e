"""Frozen binary and ternary layers onto the bit kernels, with packed bits from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lowbit.core import integer
from lowbit.core.integer import Grid
from lowbit.graph.match import (
    input_quantizer,
    layer_nodes,
    max_pool_of,
    moves_of,
    pads,
    path_name,
    source_of,
)
from lowbit.graph.ops import clamp_bounds, kind_of, label, module_of
from lowbit.graph.rewrite import finish, insert_after, remove, retarget
from lowbit.nn.bit_layers import (
    BitConv2d,
    BitLayer,
    BitLinear,
    BitMaxPool2d,
    CodesLayer,
    Pack,
    obstacle_of,
    sums_codes,
)
from lowbit.nn.layers import QConv2d, QLayer, QLinear
from lowbit.nn.quantizer import Quantizer, grid_of

__all__ = ["Swap", "use_bit_kernels"]

# what gives back its input
_IDENTITIES = {"identity", "dropout", "dropout1d", "dropout2d", "detach", "clone", "contiguous"}


@dataclass(frozen=True)
class Swap:
    """What became of one call of a layer."""

    name: str
    # "sign x binary -> bits", or "float"
    runs_as: str
    # why it is in float; "" where it is not
    why: str = ""


def use_bit_kernels(gm: fx.GraphModule) -> list[Swap]:
    """Swap what can be swapped, in place.

    A quantizer that only such layers read packs its codes for them, and pooling between works on the bits;
    where others read it too, each layer packs for itself. Behind a layer a clamp and a quantizer of one bit
    become a threshold of its sums. Linear layers take floats too. Other layers on integer inputs sum codes,
    so that signs behind them are those of the integer reference; the weights of the rest are decoded, once.
    """
    found = {node: _obstacle(node) for node in layer_nodes(gm)}
    inputs = {node: input_quantizer(node) for node in found}
    swaps = [Swap(path_name(gm, path), "float", "no graph reaches it") for path in _hidden(gm)]
    readers: dict[fx.Node, list[fx.Node]] = {}
    kinds: dict[fx.Node, str] = {}
    for node in [n for n, why in found.items() if not why]:
        kinds[node] = f"{_codes(inputs[node])} x {_weight(node)}"
        layer = module_of(node)
        if inputs[node] is not None:
            readers.setdefault(_quantizer_node(node), []).append(node)
        elif isinstance(layer, QLinear):
            retarget(gm, node, f"bits.{node.name}", BitLinear(layer, None))
    for quantizer, nodes in readers.items():
        _use_bits(gm, quantizer, nodes)
    for quantizer in readers:
        _end_in_bits(gm, quantizer)
    for node, why in found.items():
        layer = module_of(node)
        if isinstance(layer, BitLayer):
            swaps.append(Swap(_name(node), f"{kinds[node]} -> {layer.gives}"))
            continue
        swaps.append(Swap(_name(node), "float", why))
        if isinstance(layer, QLayer):
            retarget(gm, node, f"decoded.{node.name}", _decoded(layer, inputs[node]), whole=True)
    finish(gm)
    return swaps


def _obstacle(node: fx.Node) -> str:
    """Why a call of a layer stays in float, or ''."""
    layer, quantizer = module_of(node), input_quantizer(node)
    if not isinstance(layer, QLayer):
        return "its weight is in float"
    signs = quantizer is not None and quantizer.spec.is_binary
    source = node.args[0]
    if signs and isinstance(source, fx.Node) and any(map(pads, moves_of(source))):
        return "its signs are padded with zeros before it; give the layer that padding"
    return obstacle_of(layer, quantizer)


def _quantizer_node(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source_of(source)


def _grid(quantizer: fx.Node) -> Grid:
    module = module_of(quantizer)
    assert isinstance(module, Quantizer)
    grid = grid_of(module)
    assert grid is not None
    return grid


def _use_bits(gm: fx.GraphModule, quantizer: fx.Node, nodes: list[fx.Node]) -> None:
    """Swap the layers that read a quantizer, and pack for them: once for all where nobody else reads it."""
    grid, kinds = _grid(quantizer), {_packing(node) for node in nodes}
    moves = _moves(quantizer, set(nodes), pooled=grid.spec.bits == 1) if len(kinds) == 1 else None
    for node in nodes:
        layer = module_of(node)
        assert isinstance(layer, QLayer)
        if moves is None:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            insert_after(gm, source, f"packed.{node.name}", Pack(grid, *_packing(node)), readers=[node])
        bit = BitConv2d(layer, grid) if isinstance(layer, QConv2d) else BitLinear(layer, grid)
        retarget(gm, node, f"bits.{node.name}", bit)
    if moves is None:
        return
    retarget(gm, quantizer, f"packed.{quantizer.name}", Pack(grid, *kinds.pop()))
    for move in moves:
        window = max_pool_of(move)
        if window is None:
            remove(gm, move)
        else:
            retarget(gm, move, f"bits.{move.name}", BitMaxPool2d(**window))


def _moves(quantizer: fx.Node, layers: set[fx.Node], *, pooled: bool) -> list[fx.Node] | None:
    """What moves codes between a quantizer and its layers; None where a float would be needed."""
    moves: list[fx.Node] = []
    waiting = list(quantizer.users)
    while waiting:
        node = waiting.pop()
        if node in layers:
            continue
        if label(node).lower() not in _IDENTITIES and not (pooled and max_pool_of(node) is not None):
            return None
        moves.append(node)
        waiting += node.users
    return moves


def _end_in_bits(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let the layer before a packing of one bit give the bits itself, through clamps that change none."""
    pack, source = module_of(node), node.args[0]
    if not isinstance(pack, Pack) or pack.grid.spec.bits > 1 or pack.groups > 1:
        return
    clamps: list[fx.Node] = []
    while isinstance(source, fx.Node) and kind_of(source) == "clamp" and _is_free(source, pack.grid):
        clamps.append(source)
        source = source.args[0]
    layer = module_of(source) if isinstance(source, fx.Node) and source.op == "call_module" else None
    if not isinstance(layer, BitLayer) or any(len(n.users) > 1 for n in (source, *clamps)):
        return
    if not layer.ends_in_bits(pack.grid):
        return
    for dead in (node, *clamps):
        remove(gm, dead)


def _is_free(clamp: fx.Node, grid: Grid) -> bool:
    """Whether a clamp changes no code of one bit."""
    ends = [float(integer.round_to(torch.tensor(float(b)), grid)) for b in clamp_bounds(clamp)]
    return ends == [grid.spec.qmin - grid.zero_point, grid.spec.qmax - grid.zero_point]


def _decoded(layer: QLayer, source: Quantizer | None) -> nn.Module:
    """A layer of the same numbers that holds its weight ready for use."""
    grid = None if source is None else grid_of(source)
    if sums_codes(layer, source) and isinstance(layer, (QLinear, QConv2d)) and grid is not None:
        return CodesLayer(layer, grid)
    kind = next(c for c in type(layer).__mro__ if c.__module__.startswith("torch.nn"))
    arguments: dict[str, Any] = {name: getattr(layer, name) for name in type(layer).arguments}
    if hasattr(layer, "bias"):
        arguments["bias"] = layer.bias is not None
    made = kind(**arguments, device="meta")
    made.weight = nn.Parameter(layer.effective_weight().detach(), requires_grad=False)
    if arguments.get("bias"):
        made.bias = layer.bias
    return made.eval()


def _hidden(gm: fx.GraphModule) -> list[str]:
    """Frozen layers inside submodules that were not traced."""
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    return [path for path, m in gm.named_modules() if isinstance(m, QLayer) and path not in called]


def _packing(node: fx.Node) -> tuple[int, bool]:
    """How a layer wants its input: in so many groups, and whether channels are the last axis."""
    layer = module_of(node)
    return int(getattr(layer, "groups", 1)), isinstance(layer, QLinear)


def _name(node: fx.Node) -> str:
    return str(node.meta["name"])


def _codes(quantizer: Quantizer | None) -> str:
    """Of activations, in a word."""
    if quantizer is None:
        return "float"
    spec = quantizer.spec
    if spec.is_binary:
        return "sign"
    return "bit" if spec.bits == 1 else f"{spec.bits}-bit codes"


def _weight(node: fx.Node) -> str:
    layer = module_of(node)
    assert isinstance(layer, QLayer)
    return "binary" if layer.weight_quantizer.spec.is_binary else "ternary"

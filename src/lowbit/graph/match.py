"""Questions about a graph. They return nodes and names; nothing is edited here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from lowbit.graph.ops import clamp_bounds, is_tensor, kind_of, label, module_of
from lowbit.nn.quantizer import Quantizer

__all__ = ["Operation", "Region", "batchnorms", "calls", "layer_nodes", "operations", "regions", "source_of", "tail_of"]

_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Operation:
    """One operation that a rule can match."""

    name: str
    op: str
    roles: frozenset[str]
    node: fx.Node


def calls(gm: fx.GraphModule) -> Counter[int]:
    """How often each module object is called, under whatever name."""
    return Counter(id(module_of(n)) for n in gm.graph.nodes if n.op == "call_module")


def layer_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Calls of layers with a weight, in the order of execution."""
    return [n for n in gm.graph.nodes if kind_of(n) == "layer"]


def operations(gm: fx.GraphModule) -> list[Operation]:
    """Everything a rule can match: one entry for each call, or for each module called more than once."""
    found: dict[str, Operation] = {}
    layers = [n for n in layer_nodes(gm) if not isinstance(module_of(n), nn.Embedding)]
    roles: dict[str, set[str]] = {}
    if layers:
        roles.setdefault(rule_name(layers[0]), set()).add("first")
        roles.setdefault(rule_name(layers[-1]), set()).add("last")
    for node in gm.graph.nodes:
        if kind_of(node) in ("layer", "add", "mul", "cat", "matmul", "average"):
            name = rule_name(node)
            found.setdefault(name, Operation(name, label(node), frozenset(roles.get(name, ())), node))
    return list(found.values())


def rule_name(node: fx.Node) -> str:
    """The name that rules see: calls of one module share it."""
    name = str(node.meta["name"])
    return name.split("#")[0] if node.op == "call_module" else name


def source_of(node: fx.Node) -> fx.Node:
    """The node that made the values which `node` may only have moved."""
    while kind_of(node) == "pass" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def input_quantizer(node: fx.Node) -> Quantizer | None:
    """The quantizer whose codes a layer call reads, perhaps moved; None when it reads floats."""
    source = source_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    module = module_of(source) if source is not None and source.op == "call_module" else None
    return module if isinstance(module, Quantizer) and module.mode == "quantize" else None


def is_global_pool(node: fx.Node) -> bool:
    """Whether the node takes the mean over all positions, keeping the axes."""
    if kind_of(node) != "average" or not is_tensor(node):
        return False
    source, value = node.args[0], node.meta["value"]
    assert isinstance(source, fx.Node)
    return value.ndim == 4 and tuple(value.shape[2:]) == (1, 1) and label(node).lower() in ("adaptiveavgpool2d", "adaptive_avg_pool2d")


def tail_of(node: fx.Node) -> fx.Node:
    """The last node that one integer kernel covers: the operation itself, or the clamp right behind it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and kind_of(users[0]) == "clamp" else node


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Nodes of floating point tensors that this node reads, each as often as it is read."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)
    return [n for n in found if is_tensor(n)]


def batchnorms(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """Each BatchNorm call with the reason why it cannot be folded into the layer before it, or ''."""
    counts = calls(gm)
    owners = Counter(id(p) for m in gm.modules() for p in m.parameters(recurse=False))
    for node in gm.graph.nodes:
        if node.op != "call_module" or not isinstance(module_of(node), _BATCHNORMS):
            continue
        bn, before = module_of(node), node.args[0]
        why = ""
        if bn.running_mean is None:
            why = "it keeps no running statistics"
        elif counts[id(bn)] > 1:
            why = "it is called more than once"
        elif not (isinstance(before, fx.Node) and before.op == "call_module" and isinstance(module_of(before), _FOLDABLE)):
            why = "no layer stands right before it"
        elif counts[id(module_of(before))] > 1:
            why = f"'{before.meta['name']}' is called more than once"
        elif len(before.users) > 1:
            why = f"the output of '{before.meta['name']}' is read elsewhere too"
        elif owners[id(module_of(before).weight)] > 1:
            why = f"the weight of '{before.meta['name']}' is shared"
        elif isinstance(module_of(before), nn.Linear) and node.meta["value"].ndim != 2:
            why = "it normalizes another axis than the linear layer writes"
        yield node, why


@dataclass(frozen=True)
class Region:
    """Tensors that must be scaled together, channel by channel, with the layers that write and read them."""

    producers: tuple[fx.Node, ...]
    consumers: tuple[fx.Node, ...]
    channels: int


def regions(gm: fx.GraphModule, *, relu6: bool = False) -> tuple[list[Region], list[tuple[str, str]]]:
    """Regions over which a scale per channel can move from weights to weights without changing the output.

    Operations that commute with a positive scale (ReLU, PReLU, pooling, add) tie their tensors together. A region
    counts only when nothing but layers writes it and nothing but layers reads it: a chain of two layers is the
    simplest, a residual stream the largest.

    Args:
        relu6: also pass through ReLU6, which does change the output.

    Returns:
        The regions, and (name, reason) of the places where a region was given up.
    """
    parent: dict[fx.Node, fx.Node] = {}

    def find(n: fx.Node) -> fx.Node:
        while parent.setdefault(n, n) is not n:
            n = parent[n]
        return n

    for node in gm.graph.nodes:
        if _equivariant(node, relu6):
            for source in tensor_inputs(node):
                parent[find(source)] = find(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if is_tensor(node):
            groups.setdefault(find(node), []).append(node)
    found, refused = [], []
    counts = calls(gm)
    for members in groups.values():
        producers = tuple(n for n in members if kind_of(n) == "layer")
        if not producers:
            continue
        inside = set(members)
        consumers = tuple(dict.fromkeys(u for n in members for u in n.users if u not in inside or kind_of(u) == "layer"))
        region = Region(producers, consumers, producers[0].meta["value"].shape[1])
        why = _obstacle(region, members, counts, relu6)
        if why:
            refused.append((str(producers[0].meta["name"]), why))
        elif consumers:
            found.append(region)
    return found, refused


def _equivariant(node: fx.Node, relu6: bool) -> bool:
    kind = kind_of(node)
    if kind == "clamp":
        lo, hi = clamp_bounds(node)
        return lo == 0.0 and (hi == float("inf") or relu6)
    if kind in ("add", "average"):
        return True
    if node.op == "call_module" and isinstance(module_of(node), (nn.PReLU, nn.LeakyReLU)):
        return True
    return kind == "pass" and label(node) in ("MaxPool2d", "max_pool2d", "Identity", "Dropout", "contiguous", "flatten", "Flatten")


def _obstacle(region: Region, members: list[fx.Node], counts: Counter[int], relu6: bool) -> str:
    for node in members:
        if kind_of(node) != "layer" and not _equivariant(node, relu6):
            return f"'{node.meta['name']}' writes into it"
        shapes = [s.meta["value"].shape for s in tensor_inputs(node)] if kind_of(node) == "add" else []
        if any(shape != node.meta["value"].shape for shape in shapes):
            return f"'{node.meta['name']}' broadcasts"
    for node in (*region.producers, *region.consumers):
        if kind_of(node) != "layer" or isinstance(module_of(node), (nn.ConvTranspose2d, nn.Embedding)):
            return f"'{node.meta.get('name', 'output')}' reads or writes it"
        if counts[id(module_of(node))] > 1:
            return f"'{node.meta['name']}' is called more than once"
        if node in region.producers and node.meta["value"].shape[1] != region.channels:
            return "its layers differ in channels"
        if isinstance(module_of(node), nn.Linear) and node.meta["value"].ndim != 2:
            return f"'{node.meta['name']}' works on the last axis"
    for node in region.consumers:
        inputs = module_of(node).in_features if isinstance(module_of(node), nn.Linear) else module_of(node).in_channels
        if inputs % region.channels or (not isinstance(module_of(node), nn.Linear) and inputs != region.channels):
            return f"'{node.meta['name']}' reads other channels"
    return ""

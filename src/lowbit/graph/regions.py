"""Regions: tensors that keep a common scale for each channel, between the layers that write and read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from lowbit.graph.match import calls, tensor_inputs
from lowbit.graph.ops import clamp_bounds, is_tensor, kind_of, label, module_of

__all__ = ["Region", "regions"]


@dataclass(frozen=True)
class Region:
    """Tensors that must be scaled together, channel by channel, with the layers that write and read them."""

    producers: tuple[fx.Node, ...]
    consumers: tuple[fx.Node, ...]
    channels: int


def regions(gm: fx.GraphModule, *, relu6: bool = False) -> tuple[list[Region], list[tuple[str, str]]]:
    """Regions over which a scale per channel can move from weights to weights without changing the output.

    Operations that commute with a positive scale (ReLU, PReLU, pooling, add) tie their tensors together. A
    region counts only when nothing but layers writes it and nothing but layers reads it: a chain of two
    layers is the simplest, a residual stream the largest.

    Args:
        relu6: also pass through ReLU6, which does change the output.

    Returns:
        The regions, and (name, reason) of the places where a region was given up.
    """
    found, refused = [], []
    counts = calls(gm)
    owners = Counter(id(p) for m in gm.modules() for p in m.parameters(recurse=False))
    for members in _tied(gm, relu6):
        producers = tuple(n for n in members if kind_of(n) == "layer")
        if not producers:
            continue
        readers = dict.fromkeys(u for n in members for u in n.users)
        consumers = tuple(u for u in readers if u not in members or kind_of(u) == "layer")
        region = Region(producers, consumers, _channels(producers[0]))
        why = _writes(region, members, relu6) or _foreign(region, counts, owners) or _misfit(region)
        if why:
            refused.append((str(producers[0].meta["name"]), why))
        elif consumers:
            found.append(region)
    return found, refused


def _tied(gm: fx.GraphModule, relu6: bool) -> Iterator[list[fx.Node]]:
    """Groups of tensors that have to keep a common scale for each channel."""
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
    yield from groups.values()


_CHANNELWISE = frozenset(
    (
        "MaxPool1d",
        "MaxPool2d",
        "max_pool1d",
        "max_pool2d",
        "Identity",
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "dropout",
    )
    + ("dropout2d", "contiguous", "Upsample", "UpsamplingNearest2d", "interpolate", "ZeroPad2d")
)


def _equivariant(node: fx.Node, relu6: bool) -> bool:
    """Whether scaling each channel of the inputs by a positive number scales the output likewise."""
    kind = kind_of(node)
    if kind == "clamp":
        lo, hi = clamp_bounds(node)
        return lo == 0.0 and (hi == float("inf") or relu6)
    if kind in ("add", "average"):
        return True
    if node.op == "call_module" and isinstance(module_of(node), (nn.PReLU, nn.LeakyReLU)):
        return True
    if node.target is nn.functional.leaky_relu:
        return True
    return kind == "pass" and is_tensor(node) and (label(node) in _CHANNELWISE or _flattens(node))


def _flattens(node: fx.Node) -> bool:
    """Whether all axes but the first become one, the channels outermost."""
    source = node.args[0]
    if label(node).lower() not in ("flatten", "view", "reshape") or not is_tensor(source):
        return False
    before, after = source.meta["value"].shape, node.meta["value"].shape
    return len(before) >= 2 and len(after) == 2 and before[0] == after[0]


def _channels(node: fx.Node) -> int:
    layer = module_of(node)
    return int(layer.out_features if isinstance(layer, nn.Linear) else getattr(layer, "out_channels", 0))


def _writes(region: Region, members: list[fx.Node], relu6: bool) -> str:
    """Why something else than layers writes the region, or ''."""
    for node in members:
        if kind_of(node) != "layer" and not _equivariant(node, relu6):
            return f"'{node.meta['name']}' writes into it"
        shapes = [s.meta["value"].shape for s in tensor_inputs(node)] if kind_of(node) == "add" else []
        if any(shape != node.meta["value"].shape for shape in shapes):
            return f"'{node.meta['name']}' broadcasts"
    return ""


def _foreign(region: Region, counts: Counter[int], owners: Counter[int]) -> str:
    """Why one of its readers or writers cannot be scaled, or ''."""
    for node in (*region.producers, *region.consumers):
        if kind_of(node) != "layer" or isinstance(module_of(node), (nn.ConvTranspose2d, nn.Embedding)):
            return f"'{node.meta.get('name', 'output')}' reads or writes it"
        layer = module_of(node)
        if counts[id(layer)] > 1:
            return f"'{node.meta['name']}' is called more than once"
        if owners[id(layer.weight)] > 1:
            return f"the weight of '{node.meta['name']}' is shared"
        if node.meta["value"].ndim != (2 if isinstance(layer, nn.Linear) else layer.weight.ndim):
            return f"'{node.meta['name']}' has its channels on another axis"
    return ""


def _misfit(region: Region) -> str:
    """Why the channels of writers and readers do not match, or ''."""
    if any(_channels(node) != region.channels for node in region.producers):
        return "its layers differ in channels"
    for node in region.consumers:
        layer = module_of(node)
        if isinstance(layer, nn.Linear):
            fits = layer.in_features % region.channels == 0
        else:
            fits = bool(layer.in_channels == region.channels)
        if not fits:
            return f"'{node.meta['name']}' reads other channels"
    return ""

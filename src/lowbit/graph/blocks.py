"""Blocks: stretches of a graph that one tensor leaves, which can be run by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from lowbit.graph.match import layer_nodes, tail_of
from lowbit.graph.ops import is_tensor, kind_of
from lowbit.graph.rewrite import finish
from lowbit.graph.run import evaluate

__all__ = ["Block", "blocks", "inputs_first", "layer_blocks"]

# (what a quantizer reads, what it gives) -> the value to go on with
Seen = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Block:
    """Nodes in the order of execution, at least one layer among them; of the last one the value leaves."""

    nodes: tuple[fx.Node, ...]

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @cached_property
    def reads(self) -> tuple[fx.Node, ...]:
        """The nodes before it whose values it needs."""
        inside = set(self.nodes)
        return tuple(dict.fromkeys(s for n in self.nodes for s in n.all_input_nodes if s not in inside))

    @cached_property
    def quantizers(self) -> tuple[fx.Node, ...]:
        """Calls of quantizers of activations."""
        return tuple(n for n in self.nodes if kind_of(n) == "quantizer")

    @property
    def layers(self) -> tuple[fx.Node, ...]:
        """Calls of layers with a weight."""
        return tuple(n for n in self.nodes if kind_of(n) == "layer")

    @property
    def name(self) -> str:
        """Its first layer and its last."""
        names = [str(n.meta["name"]) for n in self.layers]
        return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"

    def run(self, gm: fx.GraphModule, values: Mapping[fx.Node, Any], seen: Seen | None = None) -> Any:
        """The value that leaves, given those that it reads.

        Args:
            seen: is shown what quantizers read and give, and says with which to go on.
        """
        known = dict(values)
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            value = evaluate(gm, node, args, kwargs)
            known[node] = seen(args[0], value) if seen is not None and node in self.quantizers else value
        return known[self.end]


def blocks(gm: fx.GraphModule) -> list[Block]:
    """The graph cut wherever one tensor carries everything on: behind a layer of a chain, or a residual sum.

    What needs no layer goes with the block before it, so a block ends in its activation and the quantizer of
    that. Values that no layer has a part in are in no block. Layers behind the last cut, such as several
    heads, are blocks of their own.
    """
    own = _behind_layers(gm)
    place = {node: at for at, node in enumerate(own)}
    segments, segment, needed_until = list[list[fx.Node]](), list[fx.Node](), -1
    for at, node in enumerate(own):
        segment.append(node)
        ends = needed_until <= at and is_tensor(node)
        users = [place.get(user, len(own)) for user in node.users if not (ends and user.op == "output")]
        needed_until = max([needed_until, *users])
        if ends:
            segments.append(segment)
            segment = []
    rest = set(segment)
    return [Block(tuple(nodes)) for nodes in _joined(segments)] + [
        block for block in layer_blocks(gm) if block.nodes[0] in rest
    ]


def layer_blocks(gm: fx.GraphModule) -> list[Block]:
    """Each call of a layer, with the clamp that its kernel covers."""
    return [Block(_covered(node)) for node in layer_nodes(gm)]


def inputs_first(gm: fx.GraphModule) -> None:
    """Move what no layer has a part in, such as masks, before the first layer, in place.

    Everything that a block reads is then there when its first node is to run.
    """
    own = _behind_layers(gm)
    late = dict.fromkeys(own)
    for node in list(gm.graph.nodes):
        if node not in late and node.op not in ("placeholder", "output") and own:
            own[0].prepend(node)
    finish(gm)


def _covered(node: fx.Node) -> tuple[fx.Node, ...]:
    nodes, tail = [node], tail_of(node)
    while nodes[-1] is not tail:
        nodes.append(next(iter(nodes[-1].users)))
    return tuple(nodes)


def _behind_layers(gm: fx.GraphModule) -> list[fx.Node]:
    """Layers, and whatever their outputs have a part in, but for the output."""
    found: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        behind = any(source in found for source in node.all_input_nodes)
        if node.op != "output" and (behind or kind_of(node) == "layer"):
            found[node] = None
    return list(found)


def _joined(segments: Sequence[list[fx.Node]]) -> list[list[fx.Node]]:
    """Those without a layer added to the one before."""
    found: list[list[fx.Node]] = []
    for nodes in segments:
        if found and not any(kind_of(n) == "layer" for n in nodes):
            found[-1] += nodes
        else:
            found.append(list(nodes))
    return found

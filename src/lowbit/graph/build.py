"""A graph from a list of calls: for programs that read networks of plain layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

__all__ = ["Call", "build"]


@dataclass(frozen=True)
class Call:
    """A module, or a function of tensors; without either an input of the network."""

    name: str
    of: nn.Module | Callable[..., Tensor] | None
    # positions of the calls whose results are read
    inputs: tuple[int, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    # whether the function takes its tensors as one list
    listed: bool = False


def build(calls: Sequence[Call], outputs: Sequence[int]) -> fx.GraphModule:
    """A network that makes these calls in order; modules stand at its top, by the names of their calls.

    Args:
        outputs: positions of the calls whose results it returns.
    """
    graph, root = fx.Graph(), nn.Module()
    nodes: list[fx.Node] = []
    for call in calls:
        read = tuple(nodes[i] for i in call.inputs)
        if call.of is None:
            nodes.append(graph.placeholder(call.name))
        elif isinstance(call.of, nn.Module):
            root.add_module(call.name, call.of)
            nodes.append(graph.call_module(call.name, read))
        else:
            nodes.append(graph.call_function(call.of, (read,) if call.listed else read, dict(call.kwargs)))
    results = tuple(nodes[i] for i in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return fx.GraphModule(root, graph).eval()

"""Running a graph node by node, over several batches at once, keeping only what is still needed."""

from __future__ import annotations

import operator
from collections.abc import Generator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, fx

from lowbit.graph.inputs import Inputs
from lowbit.graph.shelf import Shelf

__all__ = ["bind_inputs", "evaluate", "flat_tensors", "last_uses", "noise_and_signal", "peak_bytes", "walk"]


def walk(
    gm: fx.GraphModule, data: Sequence[Inputs], limit: float = inf
) -> Generator[tuple[fx.Node, list[Any]], list[Any] | None, None]:
    """Run every batch through one node before any goes on to the next.

    Yields each node with its value for every batch; a list that is sent back takes the place of those values.

    Args:
        limit: bytes of values that later nodes need which may stay in memory; others go to temporary files.
    """
    values: dict[fx.Node, list[Any]] = {}
    shelf = Shelf(limit)
    last_use = last_uses(gm)
    starts = [bind_inputs(gm, inputs) for inputs in data]
    for node in gm.graph.nodes:
        with torch.no_grad():
            if node.op == "placeholder":
                result = [start[node.name] for start in starts]
            else:
                # one batch after the other: what lies in files is there only while it is read
                result = [
                    evaluate(gm, node, *_pick((node.args, node.kwargs), values, i)) for i in range(len(data))
                ]
        replaced = yield node, result
        values[node] = shelf.put(result if replaced is None else replaced)
        for dead in last_use.get(node, ()):
            shelf.drop(values.pop(dead))


def _pick(arguments: Any, values: dict[fx.Node, list[Any]], i: int) -> Any:
    """The arguments of a node for one batch."""
    return fx.node.map_arg(arguments, lambda n: Shelf.take(values[n][i]))


def evaluate(gm: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of one node, given those of its arguments."""
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(gm)
    return args[0]


def bind_inputs(gm: fx.GraphModule, inputs: Inputs) -> dict[str, Any]:
    """Values of the placeholders, by node name, where the graph's parameters lie."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    bound: dict[str, Any] = {}
    inputs = inputs.beside(gm)
    rest = dict(inputs.kwargs)
    for i, node in enumerate(placeholders):
        name = str(node.target)
        if name.startswith("**"):
            bound[node.name] = rest
        elif name.startswith("*"):
            bound[node.name] = inputs.args[i:]
        elif name in rest:
            bound[node.name] = rest.pop(name)
        elif i < len(inputs.args):
            bound[node.name] = inputs.args[i]
        elif node.args:
            bound[node.name] = node.args[0]
    return bound


def last_uses(gm: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the nodes whose values nobody needs once it has run."""
    found: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        for source in dict.fromkeys(node.all_input_nodes):
            if source not in seen:
                seen.add(source)
                found.setdefault(node, []).append(source)
        if not node.users and node.op != "output":
            found.setdefault(node, []).append(node)
    return found


def flat_tensors(output: Any) -> list[Tensor]:
    """Floating point tensors of an output, whatever holds them."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in flat_tensors(part)] if isinstance(output, (tuple, list)) else []


def noise_and_signal(wanted: Sequence[Tensor], output: Any) -> tuple[float, float]:
    """Sums of squares of what an output is off, and of what it should be, where that is finite."""
    noise = signal = 0.0
    for target, found in zip(wanted, flat_tensors(output), strict=True):
        finite = target.isfinite()
        noise += (target[finite].double() - found[finite].double()).square().sum().item()
        signal += target[finite].double().square().sum().item()
    return noise, signal


def peak_bytes(gm: fx.GraphModule) -> int:
    """Bytes that `walk` holds at most for one sample."""
    last_use, live, peak = last_uses(gm), 0, 0
    for node in gm.graph.nodes:
        live += _sample_bytes(node)
        peak = max(peak, live)
        live -= sum(_sample_bytes(dead) for dead in last_use.get(node, ()))
    return peak


def _sample_bytes(node: fx.Node) -> int:
    value = node.meta.get("value")
    return (
        value.numel() * value.element_size() // max(1, value.shape[0])
        if isinstance(value, Tensor) and value.ndim
        else 0
    )

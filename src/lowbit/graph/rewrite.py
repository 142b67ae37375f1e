"""The only edits of a graph: swap a module, insert one behind a node, call another, remove one."""

from __future__ import annotations

import copy

from torch import fx, nn

from lowbit.nn.network import replace_module

__all__ = ["clone", "finish", "insert_after", "remove", "retarget", "swap"]


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A deep copy: graph, modules and tensors."""
    return copy.deepcopy(gm)


def swap(gm: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` leads, in every place that holds the same object."""
    replace_module(gm, gm.get_submodule(path), module)


def insert_after(
    gm: fx.GraphModule, node: fx.Node, path: str, module: nn.Module, readers: list[fx.Node] | None = None
) -> fx.Node:
    """Call `module`, added at `path`, on the result of `node`; its readers, or those given, read the call."""
    gm.add_submodule(path, module)
    with gm.graph.inserting_after(node):
        call = gm.graph.call_module(path, (node,))
    call.meta.update(value=node.meta["value"], mask=node.meta.get("mask", False), name=path, scope="")
    moved = set(node.users if readers is None else readers) - {call}
    node.replace_all_uses_with(call, delete_user_cb=moved.__contains__)
    return call


def retarget(gm: fx.GraphModule, node: fx.Node, path: str, module: nn.Module, *, whole: bool = False) -> None:
    """Let a node call `module`, added at `path`, on its first argument, or on all when `whole`."""
    gm.add_submodule(path, module)
    node.op, node.target = "call_module", path
    if not whole:
        node.args, node.kwargs = (node.args[0],), {}


def remove(gm: fx.GraphModule, node: fx.Node) -> None:
    """Take out a node with one input: its readers read that input."""
    node.replace_all_uses_with(node.args[0])
    gm.graph.erase_node(node)


def finish(gm: fx.GraphModule) -> None:
    """Make edits take effect and drop modules that nothing calls."""
    gm.graph.lint()
    gm.delete_all_unused_submodules()
    gm.recompile()

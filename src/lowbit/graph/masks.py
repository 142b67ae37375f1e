"""Which tensors of a graph are masks: numbers so large that codes that hold them hold nothing else.

Told by what a graph says without its data, constants and plain arguments, so that a model traced again on
made-up inputs has the same masks; the one exception is a mask that is itself an input.
"""

from __future__ import annotations

from numbers import Number
from typing import Any

from torch import Tensor, fx

__all__ = ["HUGE", "holds_huge", "is_mask"]

# beside such a number an 8-bit step is above 10, where scores and activations live
HUGE = 1e4

# operations that put a plain argument into the result
_FILL = frozenset(("full", "full_like", "new_full", "mul", "imul", "masked_fill", "where"))
# operations that hand on the large numbers of an operand
_KEEP = _FILL | frozenset(
    ("add", "iadd", "sub", "isub", "neg", "triu", "tril", "cat", "stack", "getitem", "to", "type", "type_as")
    + ("view", "reshape", "expand", "expand_as", "unsqueeze", "squeeze", "repeat", "permute", "transpose")
    + ("contiguous", "clone", "detach", "float", "flatten", "narrow")
)


def holds_huge(value: Any) -> bool:
    """Whether a float tensor holds an infinity or a magnitude above HUGE."""
    return isinstance(value, Tensor) and value.is_floating_point() and bool((value.abs() > HUGE).any())


def is_mask(node: fx.Node, value: Any) -> bool:
    """Whether the tensor that a node makes is a mask; its operands were asked before.

    Args:
        value: what the node gives on the example.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if node.op == "placeholder" or not _depends_on_data(node):
        return holds_huge(value)
    if node.op == "call_module":
        return False
    name = str(getattr(node.target, "__name__", node.target)).strip("_")
    plain = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Number)]
    if name in _FILL and any(abs(a) > HUGE for a in plain if isinstance(a, float)):
        return True
    return name in _KEEP and any(n.meta.get("mask", False) for n in node.all_input_nodes)


def _depends_on_data(node: fx.Node) -> bool:
    """Whether numbers of an input go into a tensor; its sizes may."""
    todo, done = [node], set[fx.Node]()
    while todo:
        at = todo.pop()
        if at.op == "placeholder":
            return True
        if at not in done:
            done.add(at)
            todo += [n for n in at.all_input_nodes if _has_tensors(n.meta["value"])]
    return False


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_has_tensors, value)))

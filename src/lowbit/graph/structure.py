"""The architecture of a graph as plain data, and the first place where two architectures differ.

Quantizers leave no trace in it: a float graph and the quantized one made from it have equal structures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from lowbit.graph.ops import kind_of, module_of
from lowbit.nn.layers import BoundLayer, QLayer
from lowbit.nn.quantizer import Quantizer

__all__ = ["Part", "first_difference", "first_module_difference", "structure_of"]


class Part(NamedTuple):
    """One operation, or one module inside a submodule that could not be traced."""

    name: str
    # class of a module, name of a function; "placeholder", "output" or "get_attr"
    op: str
    # plain attributes of the module, and what the operation reads, as text
    fields: dict[str, str]


def structure_of(gm: fx.GraphModule) -> list[Part]:
    """Every operation in the order of execution, with all that shapes and plain attributes say of it."""
    return [part for node in gm.graph.nodes if kind_of(node) != "quantizer" for part in _parts(node)]


def first_difference(file: Sequence[Part], here: Sequence[Part]) -> str | None:
    """The first part that differs, in words; None where the structures are equal.

    Args:
        file: the structure that was saved.
        here: the structure of the model at hand.
    """
    for old, new in zip_longest(file, here):
        if new is None:
            return f"'{old.name}' ({old.op}) is missing from this model"
        if old is None:
            return f"'{new.name}' ({new.op}) of this model is not in the file"
        if (old.name, old.op) != (new.name, new.op):
            return f"where the file has '{old.name}' ({old.op}) this model has '{new.name}' ({new.op})"
        if old.fields != new.fields:
            return _fields_difference(old, new.fields)
    return None


def first_module_difference(file: Sequence[Part], model: nn.Module) -> str | None:
    """The same for a model that does not run on the saved example: modules of one name are compared."""
    modules = dict(model.named_modules())
    for part in file:
        module = modules.get(part.name.split("#")[0])
        if module is None:
            continue
        if _op(module) != part.op:
            return f"'{part.name}' is a {part.op} in the file and a {_op(module)} in this model"
        difference = _fields_difference(part, part.fields | _plain_fields(module))
        if difference is not None:
            return difference
    return None


def _parts(node: fx.Node) -> Iterator[Part]:
    name = str(node.meta.get("name", node.op))
    reads = ", ".join([*map(_text, node.args), *(f"{k}={_text(v)}" for k, v in node.kwargs.items())])
    if node.op == "call_module":
        first, *inner = _modules(name, module_of(node))
        yield first._replace(fields={"reads": reads, **first.fields})
        yield from inner
    elif node.op in ("call_function", "call_method"):
        yield Part(name, str(getattr(node.target, "__name__", node.target)), {"reads": reads})
    else:
        target = {"target": str(node.target)} if node.op == "get_attr" else {}
        yield Part(name, node.op, {"reads": reads} | target)


def _modules(name: str, module: nn.Module) -> Iterator[Part]:
    if isinstance(module, BoundLayer):
        module = module.layer
    yield Part(name, _op(module), _plain_fields(module))
    for child_name, child in module.named_children():
        if not isinstance(child, Quantizer):
            yield from _modules(f"{name}.{child_name}", child)


def _op(module: nn.Module) -> str:
    name = type(module).__name__
    return name.removeprefix("Q") if isinstance(module, QLayer) else name


def _plain_fields(module: nn.Module) -> dict[str, str]:
    values = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    return {k: _text(v) for k, v in values.items() if _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _text(value: Any) -> str:
    """Text that is the same in every process: no addresses, and nodes by the names that people see."""
    if isinstance(value, fx.Node):
        while kind_of(value) == "quantizer":
            value = value.args[0]
        return str(value.meta["name"])
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_text(v) for v in value) + ")"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step))}"
    if _is_plain(value) or isinstance(value, (torch.dtype, torch.device, torch.memory_format)):
        return repr(value)
    return str(getattr(value, "__name__", type(value).__name__))


def _fields_difference(old: Part, new: dict[str, str]) -> str | None:
    # what a layer is says more than what it reads
    keys = dict.fromkeys((*old.fields, *new))
    for key in sorted(keys, key="reads".__eq__):
        a, b = old.fields.get(key, "absent"), new.get(key, "absent")
        if a != b:
            return f"{key} of '{old.name}' ({old.op}) is {a} in the file and {b} in this model"
    return None

"""One way of writing each thing: what later passes can rely on after tracing."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lowbit.graph.attention import attention_to_products
from lowbit.graph.functional_weights import weights_to_modules
from lowbit.graph.ops import is_tensor, label, module_of

__all__ = ["name_nodes", "normalize"]

_IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
# operands that may be given by name, in their order
_OPERANDS = ("input", "tensors", "other", "mat2")


def normalize(gm: fx.GraphModule) -> None:
    """Rewrite in place: one spelling of each thing, no in-place operation, no dead code, every node named."""
    for rewrite in (
        _operands_first,
        _out_of_place,
        _views_to_reshapes,
        attention_to_products,
        weights_to_modules,
        _means_to_pooling,
        _windows_to_pooling,
        _drop_zero_sums,
        _drop_dead,
    ):
        rewrite(gm)
    gm.graph.lint()
    gm.recompile()
    name_nodes(gm)


def _operands_first(gm: fx.GraphModule) -> None:
    """conv(input=x) and torch.add(x, other=y) become positional: what is read stands in the arguments."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and not type(module_of(node)).__module__.startswith("torch.nn"):
            continue
        if node.op == "call_function" and not str(getattr(node.target, "__module__", "torch")).startswith(
            "torch"
        ):
            continue
        for name in _OPERANDS:
            given = 0 if name in ("input", "tensors") else 1
            if name in node.kwargs and len(node.args) == given:
                node.args = (*node.args, node.kwargs[name])
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != name}


def _out_of_place(gm: fx.GraphModule) -> None:
    """An in-place operation becomes an ordinary one whose result later readers of its input read instead."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    in_place = [
        node for node in order if node.args and isinstance(node.args[0], fx.Node) and _is_in_place(node)
    ]
    for node in in_place:
        source = node.args[0]
        assert isinstance(source, fx.Node)

        def later(user: fx.Node, at: fx.Node = node) -> bool:
            return order[user] > order[at]

        source.replace_all_uses_with(node, delete_user_cb=later)
    for node in in_place:
        _make_functional(node)


def _is_in_place(node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module_of(node), "inplace", False))
    if node.op == "call_function":
        return node.target in _IN_PLACE or _flagged(node) or _without_underscore(node.target) is not None
    name = str(node.target)
    return (
        node.op == "call_method"
        and name.endswith("_")
        and not name.endswith("__")
        and hasattr(Tensor, name[:-1])
    )


def _views_to_reshapes(gm: fx.GraphModule) -> None:
    """x.view(sizes) becomes x.reshape(sizes), which takes any layout of memory, so channels last too."""
    for node in gm.graph.find_nodes(op="call_method", target="view"):
        if not any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values())):
            node.target = "reshape"


def _flagged(node: fx.Node) -> bool:
    """F.relu(x, inplace=True) and its kin."""
    at = _flag_position(node)
    return bool(node.kwargs.get("inplace")) or (
        at is not None and at < len(node.args) and node.args[at] is True
    )


def _flag_position(node: fx.Node) -> int | None:
    """Which positional parameter of a function is `inplace`."""
    if not str(getattr(node.target, "__module__", "")).startswith("torch.nn"):
        return None
    try:
        names = list(inspect.signature(node.target).parameters)
    except ValueError:  # a builtin
        return None
    return names.index("inplace") if "inplace" in names else None


def _make_functional(node: fx.Node) -> None:
    if node.op == "call_module":
        module_of(node).inplace = False  # type: ignore[assignment]
    elif node.op == "call_method":
        node.target = str(node.target)[:-1]
    elif _flagged(node):
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        node.args = node.args[: _flag_position(node)]
    else:
        node.target = _IN_PLACE.get(node.target) or _without_underscore(node.target)


def _without_underscore(target: Any) -> Any:
    name = getattr(target, "__name__", "")
    if not name.endswith("_") or name.endswith("__"):
        return None
    return getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)


def _means_to_pooling(gm: fx.GraphModule) -> None:
    """x.mean((2, 3)) of an image is global average pooling, for which integer kernels exist."""
    for node in list(gm.graph.nodes):
        if node.target not in (torch.mean, "mean") or not node.args or not is_tensor(node.args[0]):
            continue
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        source = node.args[0]
        if source.meta["value"].ndim != 4 or "dtype" in node.kwargs or not _over_positions(dims):
            continue
        with gm.graph.inserting_before(node):
            pooled = gm.graph.call_function(F.adaptive_avg_pool2d, (source, 1))
            result = pooled if keep else gm.graph.call_function(torch.flatten, (pooled, 1))
        pooled.meta.update(node.meta, value=source.meta["value"].mean((2, 3), keepdim=True))
        result.meta.update(node.meta)
        if keep:
            pooled.meta["value"] = node.meta["value"]
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)


def _windows_to_pooling(gm: fx.GraphModule) -> None:
    """Average pooling whose window is the image, as in `F.avg_pool2d(x, x.size(3))`, is global pooling."""
    for node in list(gm.graph.nodes):
        if node.target is not F.avg_pool2d or not is_tensor(node.args[0]) or not is_tensor(node):
            continue
        source = node.args[0]
        kernel = node.args[1] if len(node.args) > 1 else node.kwargs.get("kernel_size")
        height, width = source.meta["value"].shape[-2:]
        window = fx.node.map_arg(kernel, lambda n: n.meta["value"])
        if window not in ((height, width), [height, width]) and not (window == height == width):
            continue
        if tuple(node.meta["value"].shape[-2:]) != (1, 1) or any(
            node.kwargs.get(k) for k in ("padding", "divisor_override")
        ):
            continue
        with gm.graph.inserting_before(node):
            pooled = gm.graph.call_function(F.adaptive_avg_pool2d, (source, 1))
        pooled.meta.update(node.meta)
        node.replace_all_uses_with(pooled)
        gm.graph.erase_node(node)


def _over_positions(dims: Any) -> bool:
    """Whether these are the last two of four axes."""
    plain = isinstance(dims, (tuple, list)) and all(isinstance(d, int) for d in dims)
    return plain and sorted(d % 4 for d in dims) == [2, 3]


def _drop_zero_sums(gm: fx.GraphModule) -> None:
    """sum([a, b]) starts at 0: take that addition out."""
    for node in list(gm.graph.nodes):
        operands = node.args[:2]
        if node.target is not operator.add or not any(type(a) is int and a == 0 for a in operands):
            continue
        source = next((a for a in operands if is_tensor(a)), None)
        if source is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)


def _drop_dead(gm: fx.GraphModule) -> None:
    """Operations that nothing reads; submodules called as they stand stay, for they may do more."""
    leaves = gm.meta["leaves"]
    for node in reversed(list(gm.graph.nodes)):
        if node.users or node.op in ("placeholder", "output") or node.target is operator.setitem:
            continue
        if not (node.op == "call_module" and str(node.target) in leaves):
            gm.graph.erase_node(node)
    gm.delete_all_unused_submodules()


def name_nodes(gm: fx.GraphModule) -> None:
    """Give every node the name that rules match and tables show: its module's path, or scope.operation."""
    seen: Counter[str] = Counter()
    modules = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    for node in gm.graph.nodes:
        if node.op in ("call_module", "placeholder"):
            name = str(node.target)
        else:
            name = ".".join(part for part in (node.meta.get("scope", ""), label(node).strip("_")) if part)
            while name in modules:  # a function must not answer to the name of a layer
                name += "_"
        if gm.meta["whole"]:
            name = name.removeprefix("model.")
        seen[name] += 1
        node.meta["name"] = name if seen[name] == 1 else f"{name}#{seen[name]}"

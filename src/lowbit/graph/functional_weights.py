"""F.conv2d(x, self.w) and its kin: a weight used by a function becomes a layer that holds it."""

from __future__ import annotations

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from lowbit.graph.ops import label

__all__ = ["weights_to_modules"]


def weights_to_modules(gm: fx.GraphModule) -> None:
    """F.conv2d(x, self.w) and its kin become a call of a layer that holds the very Parameter.

    `gm.meta["renamed"]` says under which names each tensor of the model stands from now on.
    """
    renamed = gm.meta.setdefault("renamed", {})
    made: dict[tuple[Any, ...], str] = {}
    for node in list(gm.graph.nodes):
        build = _BUILDERS.get(node.target) if node.op == "call_function" else None
        bound = _bound(node) if build else None
        if build is None or bound is None:
            continue
        tensors = {k: _parameter(gm, bound.pop(k, None)) for k in ("weight", "bias")}
        source = bound.pop("input")
        if tensors["weight"] is None or not all(_constant(v) for v in bound.values()):
            continue
        key = (
            node.target,
            tensors["weight"][0],
            tensors["bias"] and tensors["bias"][0],
            str(sorted(bound.items())),
        )
        if key not in made:
            weight, bias = tensors["weight"][1], tensors["bias"][1] if tensors["bias"] else None
            made[key] = _free_path(gm, tensors["weight"][0], node)
            gm.add_submodule(made[key], build(weight, bias, bound))
            for own, given in tensors.items():
                if given is not None:
                    renamed.setdefault(given[0], []).append(f"{made[key]}.{own}")
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(made[key], (source,))
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
            _forget(gm, str(node.target))


def _forget(gm: fx.GraphModule, path: str) -> None:
    """Let go of a tensor that no node reads any more; it would be stored and counted beside its layer."""
    owner, _, name = path.rpartition(".")
    called = [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    read = any(n.op == "get_attr" and n.target == path for n in gm.graph.nodes)
    if not read and not any(path.startswith(module + ".") for module in called):
        delattr(gm.get_submodule(owner), name)


def _bound(node: fx.Node) -> dict[str, Any] | None:
    names = _SIGNATURES[node.target]
    bound = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    bias = bound.get("bias")
    return None if isinstance(bias, fx.Node) and bias.op != "get_attr" else bound


def _parameter(gm: fx.GraphModule, node: Any) -> tuple[str, nn.Parameter] | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(gm)
    return (
        str(node.target),
        value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False),
    )


def _constant(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_constant(v) for v in value)
    return not isinstance(value, fx.Node)


def _free_path(gm: fx.GraphModule, weight: str, node: fx.Node) -> str:
    """A path beside the weight: `block.w` used by conv2d becomes `block.w_conv2d`.

    The weight of a layer (tied, or used without calling the layer) makes its neighbour: `embed.weight` in
    linear becomes `embed_weight_linear`. A weight computed from others is named after the place that uses it.
    """
    owner, _, name = weight.rpartition(".")
    if (
        owner
        and type(gm.get_submodule(owner)).__module__.startswith("torch.nn.modules.")
        and not _is_bare(gm.get_submodule(owner))
    ):
        weight = f"{owner}_{name}"
    if name.startswith("_tensor_constant"):
        weight = f"{node.meta['scope']}.weight".lstrip(".")
    path, names = f"{weight}_{label(node)}", {name for name, _ in gm.named_modules()}
    while path in names:
        path += "_"
    return path


def _is_bare(module: nn.Module) -> bool:
    """An empty module that only gives a tensor its path."""
    return type(module) is nn.Module


_CONV_SIGNATURE = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv1d: _CONV_SIGNATURE,
    F.conv2d: _CONV_SIGNATURE,
    F.conv_transpose2d: (
        "input",
        "weight",
        "bias",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
    ),
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
}


def _fill(layer: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _linear(weight: nn.Parameter, bias: nn.Parameter | None, options: dict[str, Any]) -> nn.Module:
    return _fill(
        nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"), weight, bias
    )


def _conv(kind: type[nn.Module], transposed: bool = False) -> Any:
    def build(weight: nn.Parameter, bias: nn.Parameter | None, options: dict[str, Any]) -> nn.Module:
        groups = options.get("groups", 1)
        inputs, outputs = weight.shape[0], weight.shape[1]
        inputs, outputs = (inputs, outputs * groups) if transposed else (outputs * groups, inputs)
        return _fill(
            kind(inputs, outputs, tuple(weight.shape[2:]), bias=bias is not None, device="meta", **options),
            weight,
            bias,
        )

    return build


def _embedding(weight: nn.Parameter, bias: nn.Parameter | None, options: dict[str, Any]) -> nn.Module:
    entries, width = weight.shape
    return _fill(nn.Embedding(entries, width, device="meta", **options), weight, None)


_BUILDERS: dict[Any, Any] = {
    F.linear: _linear,
    F.conv1d: _conv(nn.Conv1d),
    F.conv2d: _conv(nn.Conv2d),
    F.conv_transpose2d: _conv(nn.ConvTranspose2d, transposed=True),
    F.embedding: _embedding,
}

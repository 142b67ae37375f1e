"""What each operation is to a quantizer. The one table of operations; whoever adds one adds a row here."""

from __future__ import annotations

import operator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit.nn.layers import QLayer, obstacle, quantized_layer
from lowbit.nn.quantizer import Quantizer

__all__ = ["Kind", "adds_mask", "is_tensor", "kind_of", "label", "module_label", "module_of"]

# layer    a layer with a weight that can be quantized
# clamp    an activation that an integer kernel applies for free by clamping its codes
# add mul cat matmul average    operations with an integer kernel; operands and result are quantized
# pass     moves values without making new ones: input and output share a quantizer
# quantizer  put there by lowbit
# float    everything else: computed in floating point
Kind = Literal["layer", "clamp", "add", "mul", "cat", "matmul", "average", "pass", "quantizer", "float"]

INTEGER: frozenset[str] = frozenset({"layer", "add", "mul", "cat", "matmul", "average"})

_MODULES: dict[type[nn.Module], Kind] = {
    nn.ReLU: "clamp",
    nn.ReLU6: "clamp",
    nn.Hardtanh: "clamp",
    nn.AvgPool2d: "average",
    nn.AdaptiveAvgPool2d: "average",
    **dict.fromkeys(
        (
            nn.MaxPool1d,
            nn.MaxPool2d,
            nn.Flatten,
            nn.Unflatten,
            nn.Identity,
            nn.Dropout,
            nn.Dropout1d,
            nn.Dropout2d,
        )
        + (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad2d, nn.UpsamplingNearest2d),
        "pass",
    ),
}
_FUNCTIONS: dict[object, Kind] = {
    **dict.fromkeys(
        (F.relu, torch.relu, F.relu6, F.hardtanh, torch.clamp, torch.clamp_min, torch.clip), "clamp"
    ),
    **dict.fromkeys((operator.add, torch.add), "add"),
    **dict.fromkeys((operator.mul, torch.mul), "mul"),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "cat"),
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm), "matmul"),
    **dict.fromkeys((F.avg_pool2d, F.adaptive_avg_pool2d), "average"),
    **dict.fromkeys(
        (operator.getitem, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze)
        + (torch.unsqueeze, torch.chunk, torch.split, torch.unbind, torch.narrow, torch.select)
        + (torch.swapaxes, torch.flip, torch.movedim, F.max_pool1d, F.max_pool2d, torch.max_pool1d)
        + (torch.max_pool2d, F.dropout, F.dropout2d, F.pixel_shuffle, F.pad, F.interpolate, getattr),
        "pass",
    ),
}
_METHODS: dict[str, Kind] = {
    **dict.fromkeys(("relu", "clamp", "clamp_min", "clip"), "clamp"),
    "add": "add",
    "mul": "mul",
    **dict.fromkeys(("matmul", "bmm"), "matmul"),
    **dict.fromkeys(
        ("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split")
        + ("contiguous", "unbind", "narrow", "select", "expand", "expand_as", "repeat", "swapaxes")
        + ("movedim", "unflatten", "t", "detach", "clone", "float"),
        "pass",
    ),
}


def module_of(node: fx.Node) -> nn.Module:
    """The module that a call_module node calls."""
    assert node.graph.owning_module is not None
    return node.graph.owning_module.get_submodule(str(node.target))


def is_tensor(node: object) -> bool:
    """Whether the node makes one floating point tensor."""
    value = node.meta.get("value") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()


def kind_of(node: fx.Node) -> Kind:
    """What the operation of this node is to a quantizer."""
    kind = _listed_kind(node)
    return "float" if kind in ("add", "mul", "cat") and _reads_mask(node) else kind


def adds_mask(node: fx.Node) -> bool:
    """Whether an integer kernel could run the operation, did it not read a mask of very large numbers."""
    return _listed_kind(node) in ("add", "mul", "cat") and _reads_mask(node)


def _reads_mask(node: fx.Node) -> bool:
    return any(source.meta.get("mask", False) for source in node.all_input_nodes)


def _listed_kind(node: fx.Node) -> Kind:
    """The kind by the tables above and the arguments, whatever the size of the numbers."""
    kind: Kind = "float"
    if node.op == "call_module":
        module = module_of(node)
        if isinstance(module, Quantizer):
            return "quantizer"
        if isinstance(module, QLayer) or (quantized_layer(type(module)) and not obstacle(module)):
            return "layer"
        kind = _MODULES.get(type(module), "float")
        if isinstance(module, nn.Upsample) and module.mode == "nearest":
            kind = "pass"
    elif node.op == "call_function":
        kind = _FUNCTIONS.get(node.target, "float")
    elif node.op == "call_method":
        kind = _METHODS.get(str(node.target), "float")
    if kind in ("add", "mul", "matmul") and not all(is_tensor(a) for a in node.args[:2]):
        return "float"
    if kind == "add" and node.kwargs.get("alpha", 1) != 1:
        return "float"
    if kind == "clamp" and not _holds_zero(node):
        return "float"
    if kind == "pass" and not _moves_only(node):
        return "float"
    return kind


def clamp_bounds(node: fx.Node) -> tuple[float, float]:
    """Ends of the interval that an activation of kind "clamp" clamps to; infinite where it has none."""
    module = module_of(node) if node.op == "call_module" else None
    name = type(module).__name__.lower() if module else str(getattr(node.target, "__name__", node.target))
    if name == "relu":
        return 0.0, float("inf")
    if name == "relu6":
        return 0.0, 6.0
    if isinstance(module, nn.Hardtanh):
        return float(module.min_val), float(module.max_val)
    hard = name == "hardtanh"
    names, defaults = (("min_val", "max_val"), (-1.0, 1.0)) if hard else (("min", "max"), (None, None))
    given = dict(zip(names, defaults, strict=True)) | dict(zip(names, node.args[1:], strict=False))
    given |= dict(node.kwargs)
    lo, hi = given[names[0]], given[names[1]]
    return (float("-inf") if lo is None else lo), (float("inf") if hi is None else hi)  # type: ignore[return-value]


def _holds_zero(node: fx.Node) -> bool:
    """Codes can express the clamp only when its ends are plain numbers around zero."""
    try:
        lo, hi = clamp_bounds(node)
        return float(lo) <= 0.0 < float(hi)
    except (TypeError, ValueError, KeyError):
        return False


def _moves_only(node: fx.Node) -> bool:
    """Padding with other values than zero, mixing pixels, active dropout and casts make new values."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not _has_floats(source.meta.get("value")):
        return False
    if node.target is F.pad:
        # zero is the one value that every quantizer represents
        return _argument(node, 2, "mode", "constant") != "constant" or not _argument(node, 3, "value", None)
    if node.target is F.interpolate:
        return _argument(node, 3, "mode", "nearest") == "nearest"
    if node.target in (F.dropout, F.dropout2d):
        return _argument(node, 2, "training", True) is False
    if node.target is getattr:
        return node.args[1] in ("data", "T", "mT")
    return node.target != "float" or source.meta["value"].dtype == torch.float32


def _argument(node: fx.Node, position: int, name: str, default: object) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _has_floats(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_has_floats(v) for v in value)
    return isinstance(value, Tensor) and value.is_floating_point()


def module_label(module: nn.Module) -> str:
    """The class of a module; of a quantized layer that of the layer it was made from."""
    name = type(module).__name__
    return name.removeprefix("Q") if isinstance(module, QLayer) else name


def label(node: fx.Node) -> str:
    """The operation in a word, as a person would call it."""
    if node.op == "call_module":
        return module_label(module_of(node))
    if node.op in ("call_function", "call_method"):
        return str(getattr(node.target, "__name__", node.target))
    return node.op

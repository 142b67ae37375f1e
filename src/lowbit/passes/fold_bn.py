"""BatchNorm into the layer before it: before quantization, or after it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx, nn

from lowbit.graph.match import batchnorms, is_folded_later
from lowbit.graph.ops import module_of
from lowbit.graph.rewrite import finish, remove
from lowbit.nn.layers import QLayer

__all__ = ["fold_bn", "fold_later", "fold_quantized", "make_gains_positive"]


def fold_bn(gm: fx.GraphModule) -> list[tuple[str, str]]:
    """Multiply each BatchNorm into the weight and bias before it, in place.

    y = gamma (W x + b - mean) / sqrt(var + eps) + beta. The mean beta and the deviation |gamma| of each
    channel are kept in `gm.meta["statistics"]` under the name of the layer, for analytic bias correction;
    what is returned also stands in `gm.meta["unfolded"]`, for the coverage table.

    Returns:
        (name, reason) of each BatchNorm that stays.
    """
    foldable, kept = _split(gm)
    for node in foldable:
        _fold(gm, node)
    finish(gm)
    return kept


def fold_later(gm: fx.GraphModule, now: Collection[str] = ()) -> list[tuple[str, str]]:
    """Mark each BatchNorm for `fold_quantized`; until then it is part of the layer before it.

    That of a grouped transposed convolution is folded now: its channels share scales across groups.

    Args:
        now: names of other layers whose BatchNorm is folded now.

    Returns:
        (name, reason) of each BatchNorm that stays for good.
    """
    foldable, kept = _split(gm)
    gm.meta.setdefault("statistics", {})
    for node in foldable:
        layer = module_of(node.args[0])
        shared = isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1
        if shared or node.args[0].meta["name"] in now:
            _fold(gm, node)
        else:
            node.meta["folded_later"] = True
    finish(gm)
    return kept


@torch.no_grad()
def make_gains_positive(gm: fx.GraphModule) -> None:
    """Negate gamma, mean, weight and bias of each channel whose gamma is negative, in place.

    The network computes what it did. Codes reach one further below zero than above, so a negative gamma could
    not be folded into them exactly.
    """
    for node in _marked(gm):
        layer, bn = module_of(node.args[0]), module_of(node)
        if bn.weight is None:
            continue
        sign = torch.where(bn.weight < 0, -1.0, 1.0)
        for tensor in (bn.weight, bn.running_mean, layer.bias):
            if tensor is not None:
                tensor.mul_(sign)
        layer.weight.mul_(per_weight(layer, sign))


@torch.no_grad()
def fold_quantized(gm: fx.GraphModule) -> dict[str, int]:
    """Fold each marked BatchNorm into scales and bias, in place: s' = s |gamma| / sqrt(var + eps).

    One scale per tensor becomes one per channel. Where gamma has turned negative in training, codes change
    sign.

    Returns:
        By name of the layer, how many codes had no opposite and moved by one; layers without are left out.
    """
    moved = {}
    for node in _marked(gm):
        layer, bn = module_of(node.args[0]), module_of(node)
        factor, _, shift = _affine(bn)
        if isinstance(layer, QLayer):
            lost = layer.rescale(per_weight(layer, factor))
            if lost:
                moved[str(node.args[0].meta["name"])] = lost
        else:
            layer.weight = nn.Parameter(layer.weight * per_weight(layer, factor))
        _fold_bias(layer, bn, factor, shift)
        remove(gm, node)
    finish(gm)
    return moved


def _fold(gm: fx.GraphModule, node: fx.Node) -> None:
    layer, bn = module_of(node.args[0]), module_of(node)
    factor, gain, shift = _affine(bn)
    layer.weight = nn.Parameter(layer.weight.detach() * per_weight(layer, factor))
    _fold_bias(layer, bn, factor, shift)
    statistics = gm.meta.setdefault("statistics", {})
    statistics[node.args[0].meta["name"]] = (shift.clone(), gain.abs())
    remove(gm, node)


def _split(gm: fx.GraphModule) -> tuple[list[fx.Node], list[tuple[str, str]]]:
    """BatchNorm calls that can be folded, and (name, reason) of those that cannot."""
    found = list(batchnorms(gm))
    kept = [(str(node.meta["name"]), why) for node, why in found if why]
    gm.meta["unfolded"] = dict(kept)
    return [node for node, why in found if not why], kept


def _marked(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if is_folded_later(node)]


def _affine(bn: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """gamma / sqrt(var + eps), gamma and beta of each channel."""
    gain = torch.ones_like(bn.running_var) if bn.weight is None else bn.weight.detach()
    shift = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias.detach()
    return gain / (bn.running_var + bn.eps).sqrt(), gain, shift


def per_weight(layer: nn.Module, factor: Tensor) -> Tensor:
    """A factor for each output channel in a shape that multiplies the weight."""
    weight = layer.weight
    if not isinstance(layer, nn.ConvTranspose2d):
        return factor.reshape(-1, *[1] * (weight.ndim - 1))
    if layer.groups == 1:
        return factor.reshape(1, -1, *[1] * (weight.ndim - 2))
    # axis 1 holds the channels of one group; the groups lie along axis 0
    inputs = weight.shape[0] // layer.groups
    rows = factor.reshape(layer.groups, -1).repeat_interleave(inputs, dim=0)
    return rows.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))


def _fold_bias(layer: nn.Module, bn: nn.Module, factor: Tensor, shift: Tensor) -> None:
    bias = layer.bias.detach() if layer.bias is not None else 0.0
    layer.bias = nn.Parameter((bias - bn.running_mean) * factor + shift)

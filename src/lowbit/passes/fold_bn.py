"""BatchNorm into the layer before it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from lowbit.graph.match import batchnorms
from lowbit.graph.ops import module_of
from lowbit.graph.rewrite import finish, remove

__all__ = ["fold_bn"]


def fold_bn(gm: fx.GraphModule) -> list[tuple[str, str]]:
    """Multiply each BatchNorm into the weight and bias before it, in place.

    y = gamma (W x + b - mean) / sqrt(var + eps) + beta. The mean beta and the deviation |gamma| of each
    channel are kept in `gm.meta["statistics"]` under the name of the layer, for analytic bias correction;
    what is returned also stands in `gm.meta["unfolded"]`, for the coverage table.

    Returns:
        (name, reason) of each BatchNorm that stays.
    """
    statistics = gm.meta.setdefault("statistics", {})
    kept = []
    for node, why in list(batchnorms(gm)):
        if why:
            kept.append((str(node.meta["name"]), why))
            continue
        layer, bn = module_of(node.args[0]), module_of(node)
        gain = torch.ones_like(bn.running_var) if bn.weight is None else bn.weight.detach()
        shift = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias.detach()
        _fold(layer, gain / (bn.running_var + bn.eps).sqrt(), bn.running_mean, shift)
        statistics[node.args[0].meta["name"]] = (shift.clone(), gain.abs())
        remove(gm, node)
    finish(gm)
    gm.meta["unfolded"] = dict(kept)
    return kept


def _fold(layer: nn.Module, factor: Tensor, mean: Tensor, shift: Tensor) -> None:
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    weight = layer.weight.detach()
    per_weight = factor
    if axis == 1 and layer.groups > 1:  # axis 1 holds the channels of one group; the groups lie along axis 0
        per_weight = factor.reshape(layer.groups, -1).repeat_interleave(
            weight.shape[0] // layer.groups, dim=0
        )
        shape = (weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))
    else:
        shape = tuple(-1 if d == axis else 1 for d in range(weight.ndim))
    bias = layer.bias.detach() if layer.bias is not None else 0.0
    layer.weight = nn.Parameter(weight * per_weight.reshape(shape))
    layer.bias = nn.Parameter((bias - mean) * factor + shift)

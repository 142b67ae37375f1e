"""Rounding weights shifts the mean of each output channel; these passes put it back into the bias."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor, fx, nn

from lowbit.graph.match import calls, layer_nodes, source_of
from lowbit.graph.ops import clamp_bounds, kind_of, module_of
from lowbit.graph.run import walk
from lowbit.graph.trace import Inputs
from lowbit.nn.layers import QLayer

__all__ = ["correct_bias", "correct_bias_analytically"]


def correct_bias(gm: fx.GraphModule, float_gm: fx.GraphModule, data: Sequence[Inputs]) -> list[str]:
    """Empirical and sequential: each layer sees the inputs that the quantized, already corrected layers before it give.

    b += E[y] - E[y_q], the means over the samples and positions of each output channel (Nagel et al. 2019, section 4.2).

    Args:
        gm: the quantized graph, changed in place.
        float_gm: the graph before quantizers were placed.

    Returns:
        Names of the corrected layers.
    """
    means: dict[str, Tensor] = {}

    def remember(node: fx.Node, values: list[Tensor]) -> None:
        if kind_of(node) == "layer" and not isinstance(module_of(node), nn.Embedding):
            means[node.name] = _channel_mean(module_of(node), values)

    walk(float_gm, data, remember)
    counts = calls(gm)
    corrected = []

    def correct(node: fx.Node, values: list[Tensor]) -> list[Tensor] | None:
        if node.name not in means or not isinstance(module_of(node), QLayer) or counts[id(module_of(node))] > 1:
            return None
        layer = module_of(node)
        shift = means[node.name] - _channel_mean(layer, values)
        _add_to_bias(layer, shift)
        corrected.append(str(node.meta["name"]))
        shape = [-1 if d == _channel_dim(layer, values[0]) else 1 for d in range(values[0].ndim)]
        return [v + shift.reshape(shape) for v in values]

    walk(gm, data, correct)
    return corrected


def correct_bias_analytically(gm: fx.GraphModule) -> list[str]:
    """Without data: the mean of a layer's input follows from the BatchNorm that was folded into the layer before.

    With x = clamp(z, 0, top), z ~ N(beta, |gamma|^2), E[x] is the mean of a clipped normal distribution and the output
    of the next layer is shifted by sum(W_q - W) E[x] (Nagel et al. 2019, section 4.2.1 and appendix C).

    Returns:
        Names of the corrected layers: those whose input is written by a layer with a folded BatchNorm.
    """
    statistics = gm.meta.get("statistics", {})
    counts = calls(gm)
    corrected = []
    for node in layer_nodes(gm):
        layer = module_of(node)
        if not isinstance(layer, QLayer) or isinstance(layer, nn.Embedding) or counts[id(layer)] > 1:
            continue
        mean = _input_mean(node, statistics)
        if mean is None or isinstance(layer, nn.ConvTranspose2d):
            continue
        change = layer.effective_weight().detach() - layer.weight.detach()
        groups = getattr(layer, "groups", 1)
        change = change.reshape(groups, change.shape[0] // groups, mean.numel() // groups, -1).sum(-1)
        shift = torch.einsum("goi,gi->go", change, mean.reshape(groups, -1)).reshape(-1)
        _add_to_bias(layer, -shift)
        corrected.append(str(node.meta["name"]))
    return corrected


def _input_mean(node: fx.Node, statistics: dict[str, tuple[Tensor, Tensor]]) -> Tensor | None:
    """E[x] of each input channel of a layer, when a folded BatchNorm and at most one clamp lie before it."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    while kind_of(source) == "quantizer":
        source = source.args[0]  # type: ignore[assignment]
    if source_of(source) is not source:
        return None
    clamp = source if kind_of(source) == "clamp" else None
    producer = source.args[0] if clamp is not None else source
    name = producer.meta.get("name") if isinstance(producer, fx.Node) else None
    if name not in statistics:
        return None
    beta, gamma = (t.double() for t in statistics[str(name)])
    if clamp is None:
        return beta.float()
    return clipped_normal_mean(beta, gamma, *clamp_bounds(clamp)).float()


def clipped_normal_mean(mean: Tensor, std: Tensor, lo: float, hi: float) -> Tensor:
    """E[clamp(z, lo, hi)] of z ~ N(mean, std^2), elementwise, float64."""
    std = std.clamp(min=1e-12)

    def part(bound: float) -> tuple[Tensor, Tensor]:
        t = ((bound - mean) / std).clamp(-40, 40)
        return torch.exp(-t.square() / 2) / (2 * pi) ** 0.5, torch.special.ndtr(t)

    (density_lo, below), (density_hi, to_hi) = part(lo), part(hi)
    inner = mean * (to_hi - below) + std * (density_lo - density_hi)
    left = lo * below if lo != float("-inf") else 0.0
    right = hi * (1 - to_hi) if hi != float("inf") else 0.0
    return inner + left + right


def _channel_dim(layer: nn.Module, value: Tensor) -> int:
    return value.ndim - 1 if isinstance(layer, nn.Linear) else 1


def _channel_mean(layer: nn.Module, values: list[Tensor]) -> Tensor:
    """Mean over everything but the output channels, float64 inside."""
    total, count = 0.0, 0
    for value in values:
        rows = value.movedim(_channel_dim(layer, value), 0).flatten(1)
        total = total + rows.sum(dim=1, dtype=torch.float64)
        count += rows.shape[1]
    assert isinstance(total, Tensor)
    return (total / max(count, 1)).float()


def _add_to_bias(layer: nn.Module, shift: Tensor) -> None:
    bias = shift if layer.bias is None else layer.bias.detach() + shift
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))

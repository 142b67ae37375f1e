"""Quantized weights shift and shrink each output channel; here its bias and scale put that right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import pi
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.graph.match import calls, layer_nodes, source_of
from lowbit.graph.ops import clamp_bounds, kind_of, module_of
from lowbit.graph.run import walk
from lowbit.graph.trace import Inputs
from lowbit.nn.layers import QLayer

__all__ = ["Corrected", "correct_bias_analytically", "correct_outputs"]


def correct_outputs(
    gm: fx.GraphModule, float_gm: fx.GraphModule, data: Sequence[Inputs], *, scale: bool = False
) -> list[str]:
    """Empirical and sequential: each layer sees what the quantized, corrected layers before it give.

    Bias alone: b += E[y] - E[y_q] over the samples and positions of each output channel (Nagel et al. 2019,
    section 4.2). With `scale`, the least-squares fit y ~ a y_q + c of each channel: clipping and rounding to
    few levels shrink the output as well as shift it. The factor a goes into the scale of the weight's
    channel, codes stay as they are; where that scale is shared between channels or a power of two, only the
    bias is corrected.

    Args:
        gm: the quantized graph, changed in place.
        float_gm: the graph before quantizers were placed.

    Returns:
        Names of the corrected layers.
    """
    counts = calls(gm)
    floats = _layer_outputs(float_gm, data)
    steps = walk(gm, data)
    corrected = []
    item = next(steps, None)
    while item is not None:
        node, values = item
        replaced = None
        if kind_of(node) == "layer":
            layer, target = module_of(node), next(floats)
            if _can_be_corrected(layer, counts):
                factor, shift = _fit(layer, target, values, scale and _has_own_scales(layer))
                _absorb(layer, factor, shift)
                replaced = [_applied(layer, v, factor, shift) for v in values]
                corrected.append(str(node.meta["name"]))
        try:
            item = steps.send(replaced)
        except StopIteration:
            item = None
    return corrected


class Corrected:
    """What `correct_outputs` would do to a graph, done to its values, layer by layer as they are computed.

    The graph stays as it is, so that its quantizers may be given other specs before each run.
    """

    def __init__(self, targets: Mapping[fx.Node, list[Tensor]], *, scale: bool) -> None:
        """Fit to targets from `targets_of`: what the layers should give for the first batches."""
        self.targets, self.scale = targets, scale

    @staticmethod
    def targets_of(gm: fx.GraphModule, data: Sequence[Inputs]) -> dict[fx.Node, list[Tensor]]:
        """Outputs of the layers that can be corrected, with the graph as it is now."""
        counts = calls(gm)
        return {
            node: values
            for node, values in walk(gm, data)
            if kind_of(node) == "layer" and _can_be_corrected(module_of(node), counts)
        }

    def __call__(self, node: fx.Node, values: list[Any]) -> list[Any]:
        """The values of a node for every batch, corrected where it is a layer."""
        if node not in self.targets:
            return values
        layer, target = module_of(node), self.targets[node]
        fitted = values[: len(target)]
        if all(map(torch.equal, target, fitted)):
            return values
        factor, shift = _fit(layer, target, fitted, self.scale and _has_own_scales(layer))
        return [_applied(layer, value, factor, shift) for value in values]


def _can_be_corrected(layer: nn.Module, counts: Mapping[int, int]) -> bool:
    return isinstance(layer, QLayer) and not isinstance(layer, nn.Embedding) and counts[id(layer)] == 1


def _applied(layer: nn.Module, value: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """The output of a layer corrected, in place."""
    shape = [-1 if d == _channel_dim(layer, value) else 1 for d in range(value.ndim)]
    return value.mul_(factor.reshape(shape)).add_(shift.reshape(shape))


def _layer_outputs(gm: fx.GraphModule, data: Sequence[Inputs]) -> Iterator[list[Tensor]]:
    for node, values in walk(gm, data):
        if kind_of(node) == "layer":
            yield values


def _has_own_scales(layer: QLayer) -> bool:
    """Whether each output channel has a scale of its own that may take any value."""
    spec, axis = layer.weight_quantizer.spec, layer.channel_axis
    outputs = layer.weight.shape[axis] * (getattr(layer, "groups", 1) if axis == 1 else 1)
    return (
        spec.kind == "int" and spec.scale == "float" and spec.scale_shape(layer.weight.shape)[axis] == outputs
    )


def _fit(layer: nn.Module, target: list[Tensor], values: list[Tensor], scale: bool) -> tuple[Tensor, Tensor]:
    """Factor and shift of each output channel that take the values closest to the target, float32."""
    n, sums = 0, torch.zeros(4, 1, dtype=torch.float64, device=values[0].device)
    for wanted, got in zip(target, values, strict=True):
        dim = _channel_dim(layer, got)
        y, x = (t.movedim(dim, 0).flatten(1).double() for t in (wanted, got))
        sums = sums + torch.stack([y.sum(1), x.sum(1), (y * x).sum(1), (x * x).sum(1)])
        n += x.shape[1]
    mean_y, mean_x, mean_yx, mean_xx = sums / max(n, 1)
    factor = torch.ones_like(mean_y)
    if scale:
        variance = mean_xx - mean_x.square()
        varies = variance > 1e-9 * mean_xx
        factor = torch.where(
            varies, (mean_yx - mean_y * mean_x) / variance.where(varies, torch.ones_like(variance)), factor
        )
        # a factor far from 1 is a channel that is all noise: leave its scale alone
        factor = torch.where((factor > 0.5) & (factor < 2.0), factor, 1.0)
    return factor.float(), (mean_y - factor * mean_x).float()


def _absorb(layer: QLayer, factor: Tensor, shift: Tensor) -> None:
    """y -> factor * y + shift, by the scale of the weight and the bias."""
    bias = shift if layer.bias is None else layer.bias.detach() * factor + shift
    layer.bias = nn.Parameter(bias)
    if bool((factor != 1).any()):
        rows = factor.reshape([-1 if d == layer.channel_axis else 1 for d in range(layer.weight.ndim)])
        layer.rescale(rows)


def correct_bias_analytically(gm: fx.GraphModule) -> list[str]:
    """Without data: the mean of a layer's input follows from the BatchNorm folded into the layer before.

    With x = clamp(z, 0, top), z ~ N(beta, |gamma|^2), E[x] is the mean of a clipped normal distribution and
    the output of the next layer is shifted by sum(W_q - W) E[x] (Nagel et al. 2019, section 4.2.1 and
    appendix C).

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
        _absorb(layer, torch.ones_like(shift), -shift)
        corrected.append(str(node.meta["name"]))
    return corrected


def _input_mean(node: fx.Node, statistics: dict[str, tuple[Tensor, Tensor]]) -> Tensor | None:
    """E[x] of each input channel of a layer, when a folded BatchNorm and at most one clamp lie before it."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    while kind_of(source) == "quantizer":
        source = source.args[0]
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

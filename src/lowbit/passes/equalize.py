"""Cross-layer equalization: move the scale of a channel from the weights that write it to the readers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lowbit.graph.ops import module_of
from lowbit.graph.regions import Region, regions
from lowbit.nn.network import network_kind

__all__ = ["Equalized", "equalize"]


@dataclass(frozen=True)
class Equalized:
    """Regions scaled, and how uneven the channels were (largest over smallest range, median of layers)."""

    regions: int
    layers: int
    spread_before: float
    spread_after: float
    refused: tuple[tuple[str, str], ...]


def equalize(gm: fx.GraphModule, *, relu6: bool = False, sweeps: int = 10) -> Equalized:
    """Scale weights in place until those that write a channel and those that read it have equal ranges.

    A region is a chain of two layers, or a residual stream with all the layers that write and read it. Its
    channel c is divided by s_c = sqrt(r1_c / r2_c), with r1 and r2 the largest magnitudes in the weights that
    write and that read the channel (Nagel et al. 2019, eq. 11, over several layers). ReLU, PReLU, pooling and
    additions commute with a positive scale, so the output does not change; regions share layers, so sweeps
    repeat until nothing moves. Inside a tensor network more than scales are free: see `fix_gauge`.

    Args:
        relu6: pass through ReLU6 too, although its bound does not scale: the output then changes.
    """
    _fix_gauges(gm)
    found, refused = regions(gm, relu6=relu6)
    statistics = gm.meta.get("statistics", {})
    touched = [n for region in found for n in (*region.producers, *region.consumers)]
    before = _spread(found)
    with torch.no_grad():
        for _ in range(sweeps):
            moved = 0.0
            for region in found:
                factor = _factor(region)
                moved = max(moved, float((factor.log2().abs()).max()))
                _apply(region, factor, statistics)
            if moved < 1e-3:
                break
    return Equalized(len(found), len(set(touched)), before, _spread(found), tuple(refused))


def _fix_gauges(gm: fx.GraphModule) -> None:
    from lowbit.decompose.gauge import fix_gauge

    for path, blueprint in gm.meta.get("networks", {}).items():
        kind = network_kind(blueprint.kind)
        if kind.mixes:
            layers = [gm.get_submodule(name) for name in blueprint.paths(path)]
            train = kind.train_of([layer.weight.detach() for layer in layers], blueprint)
            for layer, weight in zip(layers, kind.weights_of(fix_gauge(train)), strict=True):
                layer.weight = nn.Parameter(weight.contiguous())


def _factor(region: Region) -> Tensor:
    writes = torch.stack([_rows(module_of(n)) for n in region.producers]).amax(dim=0)
    reads = torch.stack([_columns(module_of(n), region.channels) for n in region.consumers]).amax(dim=0)
    factor = (writes / reads).sqrt()
    # a dead channel, or one that nobody reads, has nothing to give
    return torch.where((writes > 0) & (reads > 0), factor.clamp(2.0**-10, 2.0**10), 1.0)


def _apply(region: Region, factor: Tensor, statistics: dict[str, tuple[Tensor, Tensor]]) -> None:
    for node in region.producers:
        layer = module_of(node)
        layer.weight = nn.Parameter(layer.weight / factor.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias / factor)
        name = node.meta["name"]
        if name in statistics:
            statistics[name] = (statistics[name][0] / factor, statistics[name][1] / factor)
    for node in region.consumers:
        layer = module_of(node)
        view = _by_input_channel(layer, region.channels)
        scaled = view * factor.reshape(_groups(layer), 1, -1, 1)
        layer.weight = nn.Parameter(scaled.reshape(layer.weight.shape))


def _rows(layer: nn.Module) -> Tensor:
    return layer.weight.detach().abs().flatten(1).amax(dim=1)


def _columns(layer: nn.Module, channels: int) -> Tensor:
    return _by_input_channel(layer, channels).abs().amax(dim=(1, 3)).reshape(-1)


def _groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def _by_input_channel(layer: nn.Module, channels: int) -> Tensor:
    """The weight as [groups, outputs of a group, input channels of a group, everything of one channel]."""
    groups = _groups(layer)
    weight = layer.weight.detach()
    return weight.reshape(groups, weight.shape[0] // groups, channels // groups, -1)


def _spread(found: list[Region]) -> float:
    ratios = []
    for region in found:
        for node in region.producers:
            rows = _rows(module_of(node))
            rows = rows[rows > 0]
            if rows.numel():
                ratios.append(float(rows.max() / rows.min()))
    return float(torch.tensor(ratios).median()) if ratios else 1.0

"""Smoothing: what is uneven among the channels of an activation moves into the weights that read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.graph.inputs import Inputs
from lowbit.graph.match import calls, rule_name
from lowbit.graph.ops import is_tensor, kind_of, module_of
from lowbit.graph.rewrite import finish, insert_after
from lowbit.graph.run import walk
from lowbit.nn.scale import Scale

__all__ = ["Factors", "factors_in", "smooth", "smoothing_factors"]

SCALES = "smoothing"
# no channel moves further than that, up or down
LIMIT = 2.0**10

# what each activation is multiplied with, [channels], by the path of the module that does it
Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Site:
    """A tensor with its channels on the last axis, and the linear layers that read it."""

    source: fx.Node
    layers: tuple[fx.Node, ...]

    @property
    def path(self) -> str:
        return f"{SCALES}.{self.source.name}"

    @property
    def columns(self) -> Tensor:
        """Largest magnitude among the weights that read each channel."""
        return torch.stack([module_of(n).weight.detach().abs().amax(0) for n in self.layers]).amax(0)


def smoothing_factors(
    gm: fx.GraphModule, names: Container[str], data: Sequence[Inputs], *, strength: float = 0.5
) -> dict[str, Tensor]:
    """The factors that even the channels of the inputs of linear layers.

    With X_j the largest magnitude of channel j over the data and W_j that in all weights that read it, the
    activation is multiplied with W_j^(1 - a) / X_j^a (Xiao et al. 2023, eq. 4), up to one factor for all
    channels, which no scale feels.

    Args:
        names: of the linear layers whose inputs are to be quantized.
        strength: the exponent a: 0 evens the weights alone, 1 the activations alone.
    """
    sites = {site.source: site for site in _sites(gm, names)}
    found = {}
    for node, values in walk(gm, data) if sites else ():
        if node in sites:
            reach = torch.stack([v.abs().flatten(0, -2).amax(0) for v in values]).amax(0)
            found[sites[node].path] = _factor(reach, sites[node].columns, strength)
    return found


def smooth(gm: fx.GraphModule, names: Container[str], factors: Factors) -> int:
    """Multiply activations with their factors and divide the weights that read them, in place.

    The output does not change. Only tensors that an operation in floating point makes, such as LayerNorm or
    GELU, are smoothed: the multiplication needs floats. A factor that is not given is 1.

    Returns:
        How many layers read smoothed inputs.
    """
    sites = _sites(gm, names)
    for site in sites:
        factor = factors.get(site.path, torch.ones_like(site.columns))
        for node in site.layers:
            layer = module_of(node)
            layer.weight = nn.Parameter(layer.weight.detach() / factor)
        insert_after(gm, site.source, site.path, Scale(factor), readers=list(site.layers))
    finish(gm)
    return sum(len(site.layers) for site in sites)


def factors_in(gm: fx.GraphModule) -> Factors:
    """The factors of a graph that was smoothed."""
    return {path: module.factor for path, module in gm.named_modules() if isinstance(module, Scale)}


def _sites(gm: fx.GraphModule, names: Container[str]) -> list[_Site]:
    counts = calls(gm)
    owners = Counter(id(p) for m in gm.modules() for p in m.parameters(recurse=False))
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if kind_of(node) != "layer" or not isinstance(module_of(node), nn.Linear):
            continue
        layer, source = module_of(node), node.args[0]
        shared = counts[id(layer)] > 1 or owners[id(layer.weight)] > 1
        if rule_name(node) in names and not shared and _is_float(source):
            found.setdefault(source, []).append(node)
    return [_Site(source, tuple(layers)) for source, layers in found.items()]


def _is_float(node: Any) -> bool:
    """Whether an operation in floating point made the values, whose channels are still where it put them."""
    while kind_of(node) == "pass" and is_tensor(node.args[0]) and _keeps_shape(node):
        node = node.args[0]
    return kind_of(node) == "float" and node.op.startswith("call") and is_tensor(node)


def _keeps_shape(node: fx.Node) -> bool:
    return bool(node.args[0].meta["value"].shape == node.meta["value"].shape)


def _factor(reach: Tensor, columns: Tensor, strength: float) -> Tensor:
    factor = columns ** (1 - strength) / reach**strength
    # a channel that is silent, or that nobody reads, has nothing to give
    alive = (reach > 0) & (columns > 0)
    if not alive.any():
        return torch.ones_like(factor)
    return torch.where(alive, factor / factor[alive].log().mean().exp(), 1.0).clamp(1 / LIMIT, LIMIT)

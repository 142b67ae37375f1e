"""Inside a tensor network each factor is solved again for what the rounded factors before it really give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.graph.ops import kind_of, module_of
from lowbit.graph.run import walk
from lowbit.graph.trace import Inputs
from lowbit.nn.layers import QLayer

__all__ = ["correct_bonds"]

# Of the mean variance on a bond, added to each: what hardly varies is not solved for.
RIDGE = 1e-6


def correct_bonds(gm: fx.GraphModule, float_gm: fx.GraphModule, data: Sequence[Inputs]) -> list[str]:
    """Least squares, bond after bond: with v what a factor should read and u what it reads, v ~ A u.

    A = E[v u^T] E[u u^T]^-1, [rank, rank], goes into the latent weight of the reader, whose scale is then
    chosen anew. So each factor takes back what the ones before it lost, as far as the bond can carry it.

    Args:
        gm: the quantized graph with latent weights, changed in place.
        float_gm: the graph before quantizers were placed.

    Returns:
        Names of the factors that were solved again.
    """
    networks = gm.meta.get("networks", {})
    ranks = {b.reader: b.rank for path, found in networks.items() for b in found.bonds(path)}
    wanted = _read_by(float_gm, data, ranks) if ranks else iter(())
    names = []
    for node, values in walk(gm, data) if ranks else ():
        for reader in _readers(node, ranks):
            layer = module_of(reader)
            rank, target = ranks[str(reader.target)], next(wanted)
            if isinstance(layer, QLayer) and layer.frozen_spec is None:
                matrix = _map(target, values, layer, rank)
                layer.weight = nn.Parameter(_read_through(layer.weight.detach(), matrix))
                layer.weight_quantizer.take(layer.weight_quantizer.fit(layer.weight.detach()))
                names.append(str(reader.meta["name"]))
    return names


def _readers(node: fx.Node, ranks: dict[str, int]) -> list[fx.Node]:
    """The factors with a bond that read this very node."""
    return [
        user
        for user in node.users
        if kind_of(user) == "layer" and str(user.target) in ranks and user.args[0] is node
    ]


def _read_by(gm: fx.GraphModule, data: Sequence[Inputs], ranks: dict[str, int]) -> Iterator[list[Any]]:
    """What each of these factors reads in float, in the order in which they are called."""
    for node, values in walk(gm, data):
        for _ in _readers(node, ranks):
            yield values


def _map(wanted: Sequence[Tensor], found: Sequence[Tensor], layer: nn.Module, rank: int) -> Tensor:
    """A with v ~ A u, float64."""
    cross, square = (torch.zeros(rank, rank, dtype=torch.float64) for _ in range(2))
    for pair in zip(wanted, found, strict=True):
        v, u = (_on_bond(t, layer, rank).double() for t in pair)
        cross += (v @ u.t()).cpu()
        square += (u @ u.t()).cpu()
    ridge = RIDGE * square.diagonal().mean().clamp(min=1e-30) * torch.eye(rank, dtype=torch.float64)
    return torch.linalg.solve(square + ridge, (cross + ridge).t()).t().float()


def _read_through(weight: Tensor, matrix: Tensor) -> Tensor:
    """A reader [out, rank * n, ...] as it must be if `matrix` times what arrives is what it should read."""
    bonds = torch.unflatten(weight, 1, (len(matrix), -1))
    return torch.einsum("ob...,bc->oc...", bonds, matrix.to(weight)).reshape(weight.shape)


def _on_bond(x: Tensor, layer: nn.Module, rank: int) -> Tensor:
    """An input of a factor as [rank, everything else]."""
    if isinstance(layer, nn.Linear):
        return torch.unflatten(x, -1, (rank, -1)).movedim(-2, 0).flatten(1)
    return x.movedim(1, 0).flatten(1)

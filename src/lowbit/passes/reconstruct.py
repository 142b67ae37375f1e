"""Weights rounded for what their layers do to the data, layer after layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.core.qtensor import sqnr_db
from lowbit.core.rounding import Gain, Objective, descend, feedback, refit_scale
from lowbit.finished import Finished
from lowbit.graph.match import calls, layer_nodes
from lowbit.graph.ops import kind_of, module_of
from lowbit.graph.run import walk
from lowbit.graph.trace import Inputs
from lowbit.nn.layers import QLayer
from lowbit.nn.patches import grid_matrix, is_matrix, patch_count, patches, weight_matrix
from lowbit.progress import track

__all__ = ["round_layers"]

# Rows of inputs that a layer is fitted to: for each of its columns, and at least.
ROWS_PER_COLUMN, FEWEST_ROWS = 6, 3072
# Values of each of the two networks that stay in memory; what is beyond lies in files.
WALK_BYTES = 96 << 20


def round_layers(
    gm: fx.GraphModule,
    float_gm: fx.GraphModule,
    data: Sequence[Inputs],
    *,
    seed: int = 0,
    finished: Finished | None = None,
) -> tuple[list[Gain], list[Any]]:
    """Each layer rounded by GPTQ for the inputs that the rounded layers before it give.

    The target is the output of the float network, so a layer also makes good what the ones before it lost:
    first the best float weight for its inputs, then feedback and coordinate descent, with the scales of
    output channels fitted anew, and the bias last. A layer whose error would rise stays as it was.

    Args:
        gm: the quantized graph with latent weights, changed in place.
        float_gm: the graph before quantizers were placed.
        seed: of the choice of positions.
        finished: layers that are done are taken from there, and others go there.

    Returns:
        One entry for each layer with a quantized weight, in the order of execution; and what the rounded
        graph gives for each batch.
    """
    counts, gains, outputs = calls(gm), list[Gain](), list[Any]()
    wanted = _Inputs(float_gm, data)
    total = len(layer_nodes(gm))
    for reader, found in track(_inputs(gm, data, outputs), "rounding layers", total):
        layer, name = module_of(reader), str(reader.meta["name"])
        target = wanted.of(name)
        if not isinstance(layer, QLayer) or layer.weight_quantizer.spec.kind != "int":
            continue
        why, done = _obstacle(layer, counts[id(layer)]), finished and finished.load(len(gains))
        if done:
            gains.append(_restored(layer, *done))
            continue
        gain = Gain(name, why=why) if why else _round(layer, name, target, found, seed)
        if finished:
            finished.save(len(gains), _state(layer) if not gain.why else {}, asdict(gain))
        gains.append(gain)
    return gains, outputs


def _inputs(
    gm: fx.GraphModule, data: Sequence[Inputs], outputs: list[Any]
) -> Iterator[tuple[fx.Node, list[Any]]]:
    """Each call of a layer and what it reads, in every batch, before it runs; then `outputs` is filled."""
    for node, values in walk(gm, data, WALK_BYTES):
        if node.op == "output":
            outputs += values
        for user in node.users:
            if kind_of(user) == "layer" and user.args[0] is node:
                yield user, values


class _Inputs:
    """What the layers of a graph read, asked for by name in any order that is near that of execution."""

    def __init__(self, gm: fx.GraphModule, data: Sequence[Inputs]) -> None:
        self.steps, self.ahead = _inputs(gm, data, []), dict[str, list[Any]]()

    def of(self, name: str) -> list[Any]:
        while name not in self.ahead:
            reader, values = next(self.steps)
            self.ahead[str(reader.meta["name"])] = values
        return self.ahead.pop(name)


def _obstacle(layer: QLayer, count: int) -> str:
    if not is_matrix(layer):
        return f"{type(layer).__name__.removeprefix('Q')} is no product with patches of its input"
    return layer.fixed_codes(count)


def _round(layer: QLayer, name: str, wanted: list[Tensor], found: list[Tensor], seed: int) -> Gain:
    weight = weight_matrix(layer, layer.weight.detach())
    rows = max(FEWEST_ROWS, ROWS_PER_COLUMN * weight.shape[-1])
    x, u = _samples(layer, wanted, found, rows, seed)
    if not x.shape[1]:
        return Gain(name, why="no data reached it")
    mean_x, mean_u = x.mean(1, keepdim=True), u.mean(1, keepdim=True)
    goal = Objective.of(weight, x - mean_x, u - mean_u)
    start = grid_matrix(layer)
    grid, rounded = start, goal.cheaper(feedback(goal, start), start.nearest(goal.target))
    if _has_scale_for_each_row(layer):
        factor = refit_scale(goal, rounded)
        grid, rounded = grid.scaled(factor), rounded * factor
    rounded = descend(goal, rounded, grid, 1)
    best = grid.nearest(rounded).float()
    shift = (mean_x @ weight.mT - mean_u @ best.mT).reshape(-1)
    signal = x @ weight.mT
    before = signal - u @ start.nearest(weight).float().mT
    after = signal - u @ best.mT - shift.reshape(len(best), 1, -1)
    power = float(signal.square().sum())
    before_db, after_db = (sqnr_db(power, float(noise.square().sum())) for noise in (before, after))
    if after_db < before_db:
        return Gain(name, before_db, before_db, f"its error would rise, to {after_db:.1f} dB")
    layer.weight = nn.Parameter(best.reshape(layer.weight.shape))
    if grid is not start:
        layer.weight_quantizer.scale = grid.scale[..., 0].reshape(layer.weight_quantizer.scale.shape)
    layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias.detach() + shift)
    return Gain(name, before_db, after_db)


def _state(layer: QLayer) -> dict[str, Tensor]:
    """What `_round` changes."""
    assert layer.bias is not None
    return {"weight": layer.weight, "scale": layer.weight_quantizer.scale, "bias": layer.bias}


def _restored(layer: QLayer, state: dict[str, Tensor], said: dict[str, Any]) -> Gain:
    """The layer as it was left, and what was said of it."""
    if state:
        place = layer.weight.device
        layer.weight, layer.bias = (nn.Parameter(state[name].to(place)) for name in ("weight", "bias"))
        layer.weight_quantizer.scale = state["scale"].to(place)
    return Gain(**said)


def _has_scale_for_each_row(layer: QLayer) -> bool:
    quantizer = layer.weight_quantizer
    rows = len(layer.weight)
    return quantizer.spec.scale == "float" and quantizer.scale.shape == (rows, *[1] * (layer.weight.ndim - 1))


def _samples(
    layer: QLayer, wanted: list[Tensor], found: list[Tensor], rows: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Rows of both inputs at the same positions, chosen at random, as many of each batch, in order."""
    counts = [patch_count(layer, value) for value in found]
    share = min(1.0, rows / max(1, sum(counts)))
    draw = torch.Generator().manual_seed(seed)
    picks = [
        torch.randperm(n, generator=draw)[: round(share * n)].to(v.device)
        for n, v in zip(counts, found, strict=True)
    ]
    pairs = [
        [patches(layer, value, pick) for value, pick in zip(values, picks, strict=True)]
        for values in (wanted, found)
    ]
    x, u = (torch.cat(parts, dim=1) for parts in pairs)
    return x, u

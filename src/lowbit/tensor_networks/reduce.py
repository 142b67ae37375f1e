"""Fewer ranks once the noise of rounding is known: singular values below it carry nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.core.qtensor import sqnr_db
from lowbit.decompose.ranks import Fixed
from lowbit.decompose.tt import orthogonal, rounded, spectra_of
from lowbit.errors import LowbitError
from lowbit.graph.inputs import Inputs
from lowbit.graph.run import flat_tensors, noise_and_signal
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer
from lowbit.nn.network import TensorNetwork
from lowbit.passes.calibrate import batches
from lowbit.ptq import calibrate, prepare, quantize
from lowbit.recipe import Recipe
from lowbit.tables import text_table

__all__ = ["Reduced", "ReducedRow", "reduce_ranks"]


@dataclass(frozen=True)
class ReducedRow:
    """What became of one network."""

    name: str
    ranks_before: tuple[int, ...]
    ranks_after: tuple[int, ...]
    weights_before: int
    weights_after: int
    # |w - rounded w| / |w|, of the dense weight, before any rank went
    noise: float
    # the same for the ranks that went
    truncated: float
    why: str = ""


@dataclass(frozen=True)
class _Bonds:
    """A network as it is quantized: with BatchNorm folded, and equalized."""

    path: str
    # with all ranks
    row: ReducedRow
    # singular values of each bond in units of the noise of one index; none where no rank can go
    spectra: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Reduced:
    """A float network with fewer ranks, and what it is once quantized."""

    model: nn.Module
    q: QuantizedModel
    rows: tuple[ReducedRow, ...]
    # SQNR of the output in dB, over the data, against the float network as it was
    before_db: float
    after_db: float
    tolerance: float

    def __str__(self) -> str:
        header = ("network", "ranks", "were", "weights", "were", "rounding", "truncation", "why")
        rows = [
            (
                r.name,
                " ".join(map(str, r.ranks_after)),
                " ".join(map(str, r.ranks_before)),
                f"{r.weights_after:,}",
                f"{r.weights_before:,}",
                f"{r.noise:.4f}",
                f"{r.truncated:.4f}",
                r.why,
            )
            for r in self.rows
        ]
        saved = 1 - sum(r.weights_after for r in self.rows) / sum(r.weights_before for r in self.rows)
        total = f"{100 * saved:.1f} % of their weights saved"
        return f"{text_table(header, rows)}\n{total}; output {self.before_db:.2f} -> {self.after_db:.2f} dB"


def reduce_ranks(
    model: nn.Module,
    recipe: str | Recipe,
    calibration: Any,
    tolerance: float = 1.0,
    *,
    lost_db: float = 0.1,
    num_batches: int | None = None,
) -> Reduced:
    """Drop the ranks that rounding hides: first round the ranks, then quantize. The model is left as it was.

    With N the error that quantization makes in the dense weight and r the rank of a bond, each of its indices
    carries noise of about N / sqrt(r). Singular values of the unfoldings below `tolerance` times that go, the
    smallest first and as many as can: the network is quantized anew, and the SQNR of its output, against that
    of `model`, may be worse than with all ranks by no more than `lost_db`. How many is found by bisection.

    Args:
        model: with tensor networks, as `tensorize` makes them; trained or not.
        recipe, calibration, num_batches: as for `lowbit.quantize`.
        tolerance: in units of the noise; larger singular values stay whatever is lost.
        lost_db: what the output may lose, in dB. Rounding other numbers moves it by a tenth, either way; a
            classifier that is far above the noise can lose much more.

    Returns:
        With `tolerance` that of the largest singular value that went, 0 where all stay.

    Raises:
        LowbitError: a model without tensor networks, or a tolerance that is not positive.
    """
    if not isinstance(tolerance, (int, float)) or isinstance(tolerance, bool) or not 0 < tolerance < math.inf:
        raise LowbitError(f"tolerance={tolerance!r} is not a positive number; 1 is the size of the noise")
    data = list(batches(calibration, num_batches))
    q = quantize(model, recipe, data)
    noisy = calibrate(prepare(model, recipe, data[0]), data)
    if not noisy.graph.meta["networks"]:
        raise LowbitError("the model has no tensor networks; make some with lowbit.tensor_networks.tensorize")
    floats = copy.deepcopy(model).eval()
    with torch.inference_mode():
        targets = [flat_tensors(inputs.call(floats)) for inputs in data]
    before = _quality(q, data, targets)
    bonds = [_bonds(floats.get_submodule(path), path, noisy.graph) for path in noisy.graph.meta["networks"]]
    sizes = sorted({float(v) for b in bonds for spectrum in b.spectra for v in spectrum if v < tolerance})
    found = Reduced(copy.deepcopy(model), q, tuple(b.row for b in bonds), before, before, 0.0)
    kept, refused = 0, len(sizes) + 1
    while refused - kept > 1:
        # all of them first
        tried = len(sizes) if refused > len(sizes) else (kept + refused) // 2
        small = copy.deepcopy(model)
        rows = tuple(_cut(small.get_submodule(b.path), b, sizes[tried - 1]) for b in bonds)
        other = quantize(small, recipe, data)
        after = _quality(other, data, targets)
        if after >= before - lost_db:
            kept, found = tried, Reduced(small, other, rows, before, after, sizes[tried - 1])
        else:
            refused = tried
    return found


def _bonds(network: nn.Module, path: str, noisy: fx.GraphModule) -> _Bonds:
    """The singular values of a network, beside the noise.

    Args:
        noisy: the graph in which its factors are quantized.
    """
    assert isinstance(network, TensorNetwork)
    blueprint, count = network.blueprint, network.weights
    row = ReducedRow(path, blueprint.ranks, blueprint.ranks, count, count, 0.0, 0.0)
    if not network.mixes:
        return _Bonds(path, replace(row, why="its bonds cannot be turned, so they have no singular values"))
    layers = [noisy.get_submodule(name) for name in blueprint.paths(path)]
    if not all(isinstance(layer, QLayer) for layer in layers):
        return _Bonds(path, replace(row, why="not all of its factors are quantized, so nothing is hidden"))
    latent = network.train_of([layer.weight.detach() for layer in layers], blueprint)
    noisy_train = network.train_of([layer.effective_weight().detach() for layer in layers], blueprint)
    spectra = spectra_of(orthogonal([core.double() for core in latent.cores]))
    size = max(float(spectra[0].norm()), 1e-30)
    noise = float((latent.dense().double() - noisy_train.dense().double()).norm())
    row = replace(row, noise=noise / size, why="each of its ranks is worth more than may be lost")
    unit = max(noise, 1e-30)
    return _Bonds(path, row, tuple(s * math.sqrt(len(s)) / unit for s in spectra))


def _cut(network: nn.Module, bonds: _Bonds, limit: float) -> ReducedRow:
    """Take ranks from a network, in place: singular values up to `limit`, one of each bond stays."""
    keep = tuple(max(1, int((s > limit).sum())) for s in bonds.spectra)
    if not keep or keep == bonds.row.ranks_before:
        return bonds.row
    assert isinstance(network, TensorNetwork)
    factors = network.train_of([factor.weight.detach() for factor in network.factors], network.blueprint)
    found = rounded(factors, Fixed(keep))
    network.load(found)
    ranks, weights = network.blueprint.ranks, network.weights
    return replace(bonds.row, ranks_after=ranks, weights_after=weights, truncated=found.error, why="")


@torch.inference_mode()
def _quality(model: nn.Module, data: Sequence[Inputs], targets: Sequence[Sequence[Tensor]]) -> float:
    """SQNR of the outputs in dB."""
    noise = signal = 0.0
    for inputs, wanted in zip(data, targets, strict=True):
        more = noise_and_signal(wanted, inputs.call(model))
        noise, signal = noise + more[0], signal + more[1]
    return sqnr_db(signal, noise)

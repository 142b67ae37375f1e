"""Ranks below the noise of rounding go, and the output does not get worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import lowbit
from lowbit import INT8, LowbitError, Recipe, Rule
from lowbit.decompose.ranks import Fixed
from lowbit.decompose.tt import Train, matrix_to_train, train_to_matrix
from lowbit.nn.tensorized import TTLinear
from lowbit.tensor_networks import CPConv2d, TensorRule, TuckerConv2d, reduce_ranks, tensorize

MODES = (4, 4, 4)


def noisy_train(rank: int = 3, noise: float = 0.01) -> TTLinear:
    """Of true rank 3, decomposed with more."""
    wide = (1, rank, rank, 1)
    cores = tuple(torch.randn(wide[k], 4, 4, wide[k + 1]) for k in range(3))
    weight = train_to_matrix(Train(cores))
    weight = weight / weight.norm() + noise * torch.randn(64, 64) / 64
    return TTLinear.from_train(matrix_to_train(weight, MODES, MODES, Fixed(12))).eval()


def recipe(bits: int) -> Recipe:
    return Recipe(rules=(Rule(weight=INT8.at(bits)),))


@pytest.mark.parametrize("bits", [6, 4])
def test_the_true_ranks_are_left(bits: int) -> None:
    model, x = noisy_train(), torch.eye(64)
    found = reduce_ranks(model, recipe(bits), [x], tolerance=4.0)
    assert found.model.ranks == (1, 3, 3, 1)
    assert model.ranks == (1, 12, 12, 1)
    assert found.after_db >= found.before_db - 0.1
    (row,) = found.rows
    assert row.weights_after == found.model.weights < row.weights_before == model.weights
    assert row.truncated < row.noise
    with torch.no_grad():
        error = (found.q(x) - model(x)).square().sum() / model(x).square().sum()
    assert -10 * torch.log10(error).item() == pytest.approx(found.after_db, abs=1e-3)
    assert "weights saved" in str(found)


def test_the_smallest_go_one_after_the_other_until_the_output_has_lost_what_it_may() -> None:
    model = TTLinear(MODES, MODES, 12).eval()
    saved, left = [], []
    for lost in (0.1, 0.5, 1.0, 3.0, 40.0):
        found = reduce_ranks(model, recipe(3), [torch.eye(64)], tolerance=20.0, lost_db=lost)
        assert found.before_db - lost <= found.after_db
        saved.append(found.rows[0].weights_before - found.rows[0].weights_after)
        left.append(found.tolerance)
    assert saved == sorted(saved)
    assert left == sorted(left)
    assert len(set(saved)) > 2  # neither all nor nothing
    assert left[-1] <= 20.0


def test_nothing_goes_that_is_above_the_noise() -> None:
    model = TTLinear(MODES, MODES, 8).eval()
    found = reduce_ranks(model, recipe(8), [torch.eye(64)])
    assert found.tolerance == 0
    assert found.before_db == found.after_db
    assert found.model.ranks == model.ranks
    assert found.rows[0].why


def test_convolutions_lose_ranks_too_and_others_are_said() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(
            torch.einsum("oa,abhw,bi->oihw", torch.randn(16, 3), torch.randn(3, 4, 3, 3), torch.randn(4, 16))
        )
        conv.weight.add_(0.02 * torch.randn_like(conv.weight))
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    rules = [TensorRule(match="0", rank=8), TensorRule(match="2", kind="cp", rank=8), TensorRule(kind="keep")]
    small = tensorize(model, rules).model
    found = reduce_ranks(small, recipe(4), [torch.randn(8, 16, 8, 8)], tolerance=2.0)
    rows = {row.name: row for row in found.rows}
    assert isinstance(found.model[0], TuckerConv2d)
    assert isinstance(found.model[2], CPConv2d)
    assert rows["0"].weights_after < rows["0"].weights_before
    assert "no singular values" in rows["2"].why
    assert found.after_db >= found.before_db - 0.1


@pytest.mark.parametrize("equalize", [False, True])
def test_the_noise_is_measured_where_the_factors_are_rounded(equalize: bool) -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)).eval()
    skew = torch.logspace(-1, 1, 16)
    with torch.no_grad():
        model[1].weight.copy_(skew)
        model[3].weight.div_(skew[None, :, None, None])
    small = tensorize(model, TensorRule(rank=(12, 12))).model
    folded = replace(lowbit.preset("w8"), fold_bn="before", equalize=equalize)
    found = reduce_ranks(small, folded, [torch.randn(8, 16, 6, 6)])
    assert max(row.noise for row in found.rows) < 0.1
    assert not small.training


def test_layers_in_float_hide_nothing() -> None:
    model = nn.Sequential(noisy_train(), nn.ReLU(), nn.Linear(64, 8))
    only = Recipe(rules=(Rule(match="2", weight=INT8),))
    found = reduce_ranks(model, only, [torch.randn(16, 64)])
    assert "not all of its factors are quantized" in found.rows[0].why


def test_bad_input_is_one_clear_error() -> None:
    with pytest.raises(LowbitError, match="no tensor networks"):
        reduce_ranks(nn.Linear(4, 4), recipe(4), [torch.randn(4, 4)])
    with pytest.raises(LowbitError, match="tolerance=0 is not a positive number"):
        reduce_ranks(noisy_train(), recipe(4), [torch.randn(4, 64)], tolerance=0)
    with pytest.raises(LowbitError, match="no batch"):
        reduce_ranks(noisy_train(), recipe(4), [])

"""Milliseconds of layers in the runtime, and budgets of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Fn, conv
from torch import nn

import lowbit
from lowbit import INT8, UINT8, LowbitError, Recipe, Rule
from lowbit.graph.inputs import Inputs
from lowbit.latency import _samples, timed
from lowbit.search import Budget, Sensitivity, allocate, sensitivity

pytest.importorskip("onnxruntime")
RECIPE = Recipe(rules=(Rule(weight=INT8, activation=UINT8),))


def network() -> nn.Sequential:
    """A heavy layer, a light one, and two that are alike."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 9, padding=4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()


@pytest.fixture(scope="module")
def table() -> Sensitivity:
    x = torch.randn(4, 3, 32, 32)
    q = lowbit.prepare(network(), RECIPE, x)
    plain = sensitivity(q, [x], bits=(8, 4), kinds=("weight",), curvature=False)
    assert not plain.timed
    with pytest.raises(LowbitError, match=r"needs a table with timings; make it with lowbit.latency.timed"):
        allocate(plain, Budget(latency=1.0))
    return timed(plain, network(), x, rounds=10)


def test_every_layer_is_timed_at_every_width(table: Sensitivity) -> None:
    assert table.timed
    times = {site.name: site.latency for site in table}
    assert all(len(t) == 2 and min(t) > 0 for t in times.values())
    assert max(times["0"]) > max(times["2"]), "60 times as many multiplications"
    assert times["2"] == times["3"], "layers alike are timed once"


def test_a_budget_of_latency_is_kept(table: Sensitivity) -> None:
    """Times made up, so that the answer is known: 4 bits are slower in one layer and faster in another."""
    made = {"0": (3.0, 1.0), "2": (1.0, 2.0), "3": (0.2, 0.2), "6": (0.5, 0.5)}
    sites = tuple(replace(site, latency=made[site.name]) for site in table)
    known = replace(table, sites=sites, other_latency=0.25)
    found = allocate(known, Budget(latency=3.0))
    bits = {site.name: found.specs[site.path].bits for site in known}
    assert bits == {"0": 4, "2": 8, "3": 8, "6": 8}
    assert found.latency == pytest.approx(2.95)
    assert "2.95 ms" in str(found)
    with pytest.raises(LowbitError, match=r"budget's latency: the furthest that the table goes is 2.95 ms"):
        allocate(known, Budget(latency=2.9))


def test_times_are_kept_in_the_file(table: Sensitivity, tmp_path: Path) -> None:
    table.save(tmp_path / "table.json")
    assert Sensitivity.load(tmp_path / "table.json") == table


def test_an_unknown_runtime(table: Sensitivity) -> None:
    with pytest.raises(LowbitError, match="no runtime is named 'onnx'; choose from: onnxruntime"):
        timed(table, network(), torch.randn(1, 3, 32, 32), runtime="onnx")


def test_a_layer_that_is_called_twice_takes_twice_the_time() -> None:
    torch.manual_seed(0)
    model = Fn(lambda m, x: m.b(torch.relu(m.b(torch.relu(m.a(x))))), a=conv(3, 8), b=conv(8, 8)).train()
    model.add_module("n", nn.BatchNorm2d(1))
    x = torch.randn(2, 3, 8, 8)
    q = lowbit.prepare(model, RECIPE, x)
    found = timed(sensitivity(q, [x], bits=(8,), kinds=("weight",), curvature=False), model, x, rounds=3)
    assert model.training
    assert all(m.training for m in model.modules())
    alone = Fn(lambda m, x: m.b(torch.relu(m.a(x))), a=model.a, b=model.b)
    assert _samples(alone, Inputs.of(x))["b"].calls == 1
    assert _samples(model, Inputs.of(x))["b"].calls == 2
    assert all(site.latency for site in found)

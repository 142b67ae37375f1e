"""Factors solved again for what the rounded ones before them give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import QuantSpec, Recipe, Rule
from lowbit.graph.rewrite import clone
from lowbit.nn.tensorized import TTLinear
from lowbit.nn.tensorized_conv import CPConv2d, TTConv2d, TuckerConv2d
from lowbit.passes.bonds import correct_bonds

RECIPE = Recipe(rules=(Rule(weight=QuantSpec(bits=3)),))
NETWORKS = {
    "train": (lambda: TTLinear((4, 4, 4), (4, 4, 4), 8), (256, 64), 2),
    "Tucker": (lambda: TuckerConv2d(nn.Conv2d(8, 12, 3, padding=1), (6, 8)), (16, 8, 8, 8), 2),
    "train of a convolution": (
        lambda: TTConv2d(nn.Conv2d(8, 12, 3, padding=1), (6, 8, 8)),
        (16, 8, 8, 8),
        3,
    ),
}


def noise(q: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((q(x) - model(x)).norm() / model(x).norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_comes_nearer(name: str) -> None:
    make, shape, bonds = NETWORKS[name]
    model, x = make().eval(), torch.randn(shape)
    q = lowbit.calibrate(lowbit.prepare(model, RECIPE, x), [x])
    floats = lowbit.prepare(model, RECIPE, x).graph
    before = noise(q, model, x)
    graph = clone(q.graph)
    assert len(correct_bonds(graph, floats, [lowbit.graph.inputs.Inputs.of(x)])) == bonds
    assert noise(graph, model, x) < before
    assert noise(q, model, x) == before  # the graph alone was changed


@pytest.mark.parametrize("name", NETWORKS)
def test_without_rounding_nothing_changes(name: str) -> None:
    make, shape, _ = NETWORKS[name]
    model, x = make().eval(), torch.randn(shape)
    recipe = Recipe(rules=(Rule(weight=QuantSpec(bits=16)),))
    q = lowbit.calibrate(lowbit.prepare(model, recipe, x), [x])
    before = {n: p.clone() for n, p in q.graph.named_parameters()}
    correct_bonds(q.graph, lowbit.prepare(model, recipe, x).graph, [lowbit.graph.inputs.Inputs.of(x)])
    for n, p in q.graph.named_parameters():
        torch.testing.assert_close(p, before[n], rtol=1e-2, atol=1e-3)


def test_the_flow_says_what_it_did_and_leaves_other_models_alone() -> None:
    x = torch.randn(64, 64)
    recipe = replace(RECIPE, refine=("bond_correct",), equalize=True)
    q = lowbit.quantize(nn.Sequential(TTLinear((8, 8), (8, 8), 8), nn.ReLU()), recipe, [x])
    assert [step.name for step in q.steps] == ["equalize", "bond_correct"]
    q = lowbit.quantize(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), recipe, [x])
    assert [step.name for step in q.steps] == ["equalize"]
    q = lowbit.quantize(CPConv2d(nn.Conv2d(4, 4, 3), (3, 3, 3)), recipe, [torch.randn(4, 4, 5, 5)])
    assert "bond_correct" not in [step.name for step in q.steps]


def test_equalization_fixes_the_gauge_and_keeps_the_function() -> None:
    torch.manual_seed(0)
    model, x = TTLinear((4, 4, 4), (4, 4, 4), 8).eval(), torch.randn(256, 64)
    with torch.no_grad():  # skewed bonds, the same function
        skew = torch.logspace(-2, 2, 8)
        model.cores[0].weight.mul_(skew.repeat(4)[:, None])
        model.cores[1].weight.div_(skew.repeat_interleave(4))
    tensor = Recipe(rules=(Rule(weight=QuantSpec(bits=6)),))
    plain, fixed = (
        lowbit.quantize(model, replace(tensor, equalize=equalize), [x]) for equalize in (False, True)
    )
    assert fixed.steps[0].kept
    assert noise(fixed, model, x) < 0.5 * noise(plain, model, x)
    floats = lowbit.prepare(model, replace(tensor, equalize=True), x)
    torch.testing.assert_close(floats(x), model(x), rtol=1e-4, atol=1e-4)

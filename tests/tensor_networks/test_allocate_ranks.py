"""Ranks and bits for a budget, against trying everything."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import lowbit
from lowbit import LowbitError
from lowbit.tensor_networks import TensorRule, allocate_ranks
from lowbit.tensor_networks.allocate import Plan, _Table

SETTINGS = {"bits": (8, 4), "shares": (0.4, 0.2)}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)
    )
    with torch.no_grad():
        model[4].weight.copy_(torch.randn(10, 3) @ torch.randn(3, 256) + 0.1 * torch.randn(10, 256))
    return model.eval()


def data() -> list[torch.Tensor]:
    return list(torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(16))


@pytest.mark.parametrize(("bytes", "macs"), [(4000, None), (2500, None), (1500, None), (3000, 24000)])
def test_the_answer_is_the_best_of_all(bytes: int, macs: int | None) -> None:
    model = network()
    table = _Table.of(model, data(), (8, 4), (0.4, 0.2), (TensorRule(),))
    found = allocate_ranks(model, data(), bytes=bytes, macs=macs, **SETTINGS)
    plans = [
        Plan(dict(zip(table.options, row, strict=True)), table.other_bytes, table.float_bytes, None)
        for row in itertools.product(*table.options.values())
    ]
    fits = [p for p in plans if p.bytes <= bytes and (macs is None or p.macs <= macs)]
    best = min(sum(o.noise for o in p.choice.values()) for p in fits)
    assert sum(o.noise for o in found.choice.values()) == pytest.approx(best)
    assert found.bytes <= bytes


@pytest.mark.parametrize("bytes", [4000, 1500])
def test_what_is_counted_is_what_is_made(bytes: int) -> None:
    model = network()
    plan = allocate_ranks(model, data(), bytes=bytes, **SETTINGS)
    made = plan.tensorize(model)
    q = lowbit.quantize(made.model, plan.recipe, data())
    assert q.cost().bytes <= plan.bytes
    assert q.cost().macs == plan.macs
    assert "MACs" in str(plan)
    for row in made.rows:
        assert row.ranks == plan.choice[row.name].ranks


def test_rules_by_role_are_kept() -> None:
    rules = [TensorRule(match="role:last", kind="keep"), TensorRule()]
    table = _Table.of(network(), data(), (4,), (0.4, 0.2), tuple(rules))
    assert [len(options) for options in table.options.values()] == [3, 1]


def test_the_noise_is_that_of_the_rounded_factors_in_the_network() -> None:
    model, inputs = network(), data()
    table = _Table.of(
        model, inputs, (4,), (0.4,), (TensorRule(match="4", kind="svd"), TensorRule(kind="keep"))
    )
    dense, svd = table.options["4"]
    assert not dense.ranks
    plan = Plan({"4": svd}, 0, 1, None)
    recipe = plan.recipe
    rules = (recipe.rules[0], replace(recipe.rules[1], weight=None))
    q = lowbit.quantize(
        plan.tensorize(model).model, replace(recipe, rules=rules, refine=(), equalize=False), inputs
    )
    with torch.no_grad():
        pairs = [(q(x), model(x)) for x in inputs]
    noise = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    assert svd.noise == pytest.approx(float(noise), rel=1e-3)


def test_an_accuracy_is_held_by_the_smallest_that_was_found() -> None:
    asked: list[int] = []

    def evaluate(plan: Plan) -> float:
        asked.append(plan.bytes)
        return plan.bytes / 1e4

    found = allocate_ranks(network(), data(), accuracy=0.2, evaluate=evaluate, **SETTINGS)
    assert found.holds
    assert found.accuracy is not None
    assert found.accuracy >= 0.2
    assert found.bytes == min(b for b in asked if b >= 2000)
    short = allocate_ranks(network(), data(), accuracy=9.0, evaluate=evaluate, **SETTINGS)
    assert not short.holds
    assert "Nothing that was found holds the accuracy" in str(short)


def test_bad_input_is_one_clear_error() -> None:
    with pytest.raises(LowbitError, match="no budget"):
        allocate_ranks(network(), data())
    with pytest.raises(LowbitError, match=r"accuracy=0\.9 must be measured"):
        allocate_ranks(network(), data(), accuracy=0.9)
    with pytest.raises(LowbitError, match="no choice of ranks and bits fits"):
        allocate_ranks(network(), data(), bytes=100, **SETTINGS)
    with pytest.raises(LowbitError, match="rule 'nosuch' matches no layer"):
        allocate_ranks(network(), data(), bytes=9000, rules=[TensorRule(match="nosuch"), TensorRule()])
    with pytest.raises(LowbitError, match=r"wrap a single layer in nn\.Sequential"):
        allocate_ranks(nn.Linear(8, 8), [torch.randn(2, 8)], bytes=9000)
    with pytest.raises(LowbitError, match="no batch"):
        allocate_ranks(network(), [], bytes=100)

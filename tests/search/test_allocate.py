"""Bits for a budget: the recipe that comes out, what it takes, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_measure import BITS, RECIPE, data, network, prepared

import lowbit
from lowbit import INT4, LowbitError, Recipe, Rule
from lowbit.search import Allocation, Budget, Sensitivity, allocate, repair, sensitivity
from lowbit.search.measure import prober_of
from lowbit.search.sites import places_of


@pytest.fixture(scope="module")
def table() -> Sensitivity:
    """Weights and activations."""
    return sensitivity(prepared(), data(), bits=BITS)


@pytest.fixture(scope="module")
def weights() -> Sensitivity:
    return sensitivity(prepared(), data(), bits=BITS, kinds=("weight",), curvature=False)


def every(table: Sensitivity) -> list[Allocation]:
    """All choices that keep the groups."""
    found = []
    for specs in itertools.product(*(site.specs for site in table)):
        choice = {site.path: spec for site, spec in zip(table, specs, strict=True)}
        if all(len({choice[path].bits for path in group}) == 1 for group in table.groups):
            found.append(Allocation(table=table, specs=choice, measure="kl"))
    return found


BUDGETS = {
    "bytes": lambda a: Budget(bytes=a.bytes),
    "compression": lambda a: Budget(compression=a.compression),
    "average bits": lambda a: Budget(average_bits=a.average_bits),
    "bops": lambda a: Budget(bops=a.bops),
    "two": lambda a: Budget(bytes=a.bytes, bops=1.2 * a.bops),
}


@pytest.mark.parametrize("kind", BUDGETS)
def test_no_choice_within_the_budget_is_better(kind: str, table: Sensitivity) -> None:
    """Weights and activations together: bit operations are products of both."""
    choices = every(table)
    assert len(choices) > 100
    for example in choices[:: len(choices) // 5]:
        budget = BUDGETS[kind](example)
        found = allocate(table, budget)
        fits = [a for a in choices if within(a, budget)]
        assert within(found, budget)
        assert found.damage == pytest.approx(min(a.damage for a in fits))


def within(a: Allocation, budget: Budget) -> bool:
    return (
        (budget.bytes is None or a.bytes <= budget.bytes)
        and (budget.compression is None or a.compression >= budget.compression)
        and (budget.average_bits is None or a.average_bits <= budget.average_bits + 1e-12)
        and (budget.bops is None or a.bops <= budget.bops)
    )


def test_the_recipe_is_what_was_counted(table: Sensitivity) -> None:
    """Quantized by it, the network has those specs and takes those bytes."""
    found = allocate(table, Budget(average_bits=4.5))
    q = lowbit.quantize(network(), replace(found.recipe, equalize=False), calibration=[x for x, _ in data()])
    for site in table:
        assert q.graph.get_submodule(site.path).spec.bits == found.specs[site.path].bits
    assert q.cost().bytes == found.bytes
    assert q.cost().bops == found.bops
    assert q.cost().float_bytes / q.cost().bytes == pytest.approx(found.compression)


def test_the_recipe_is_plain_data_with_reasons(weights: Sensitivity, tmp_path: Any) -> None:
    found = allocate(weights, Budget(average_bits=4))
    rule = next(r for r in found.recipe.rules if r.match == "b")
    assert rule.weight == found.specs[weights.site("b").path]
    assert "kl" in rule.reason
    found.recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == found.recipe
    shown = str(found)
    assert "bits a weight" in shown
    assert all(site.name in shown for site in weights)


def test_mixed_bits_can_be_trained(weights: Sensitivity) -> None:
    recipe = allocate(weights, Budget(average_bits=3)).recipe
    q = lowbit.calibrate(lowbit.prepare(network(), recipe, data()[0][0]), [x for x, _ in data()])
    lowbit.Trainer(q, data(), teacher=network()).fit()
    assert torch.isfinite(lowbit.freeze(q)(data()[0][0])).all()


def test_pins_hold(weights: Sensitivity) -> None:
    found = allocate(weights, Budget(average_bits=6), pins={"b": 2, "fc": INT4})
    assert found.specs[weights.site("b").path].bits == 2
    assert found.specs[weights.site("fc").path] == INT4
    assert found.reason(weights.site("b")) == "pinned"
    assert "pinned" in next(r for r in found.recipe.rules if r.match == "b").reason


def test_a_pin_of_one_is_a_pin_of_its_group(table: Sensitivity) -> None:
    group = table.groups[0]
    found = allocate(table, Budget(average_bits=8), pins={group[0]: 2})
    assert {found.specs[path].bits for path in group} == {2}
    with pytest.raises(LowbitError, match="must have the same bits, and are pinned to different ones"):
        allocate(table, Budget(average_bits=8), pins={group[0]: 2, group[1]: 4})


def test_a_budget_that_nothing_keeps(weights: Sensitivity) -> None:
    least = min(a.bytes for a in every(weights))
    with pytest.raises(LowbitError, match=rf"keeps the budget's bytes: .* is {least:,} bytes; ask for that"):
        allocate(weights, Budget(bytes=least - 1))
    assert allocate(weights, Budget(bytes=least)).bytes == least
    best = max(a.compression for a in every(weights))
    with pytest.raises(LowbitError, match=f"is a compression of {best:.4g}"):
        allocate(weights, Budget(compression=1000))
    with pytest.raises(LowbitError, match="is 2 bits a weight"):
        allocate(weights, Budget(average_bits=1.5))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing asked": ({}, "an empty budget asks for nothing; set one of compression"),
    "negative": ({"bytes": -3}, "bytes=-3 is not a positive number"),
    "text": ({"compression": "8x"}, "compression='8x' is not a positive number"),
    "nan": ({"bops": float("nan")}, "bops=nan is not a positive number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_budgets(name: str) -> None:
    values, message = BAD[name]
    with pytest.raises(LowbitError, match=message):
        Budget(**values)


def test_bad_questions(weights: Sensitivity) -> None:
    budget = Budget(average_bits=4)
    with pytest.raises(LowbitError, match="no measure is named 'kk'; choose from: drop"):
        allocate(weights, budget, measure="kk")
    with pytest.raises(LowbitError, match="the table has no 'fisher'; it has loss, kl"):
        allocate(weights, budget, measure="fisher")
    with pytest.raises(LowbitError, match="the table has no 'layer9'"):
        allocate(weights, budget, pins={"layer9": 4})
    with pytest.raises(LowbitError, match="'b' is pinned to 5, which was not measured; measured: 8, 4, 2"):
        allocate(weights, budget, pins={"b": 5})


def test_repair_never_makes_it_worse_and_keeps_the_budget(weights: Sensitivity) -> None:
    """From the worst start within the budget; what is reported is what a run measures."""
    q = prepared()
    prober = prober_of(q, places_of(q, ("weight",)), data())
    budget = Budget(average_bits=4.2)
    worst = max((a for a in every(weights) if within(a, budget)), key=lambda a: a.damage)
    found = repair(prober, worst, budget)
    assert found.damage[-1] < found.damage[0]
    assert list(found.damage) == sorted(found.damage, reverse=True)
    assert within(found.allocation, budget)
    with prober.quantizing(found.allocation.specs):
        which = range(len(prober.batches))
        sums = prober.measure(which, prober.cursor(which).behind())
    assert sums.kl / sums.samples == pytest.approx(found.damage[-1])
    assert {name for name, _, _ in found.changes} <= {site.name for site in weights}
    assert "measured kl" in str(found)


def test_repair_keeps_pins(weights: Sensitivity) -> None:
    q = prepared()
    prober = prober_of(q, places_of(q, ("weight",)), data())
    budget, pins = Budget(average_bits=5), {"b": 2}
    found = repair(prober, allocate(weights, budget, pins=pins), budget, pins=pins)
    assert found.allocation.specs[weights.site("b").path].bits == 2


def test_rules_by_name_are_exact() -> None:
    """A name that looks like a pattern is matched as it is."""
    from lowbit.recipe import exactly

    for name in ("layer1.0.conv", "relu#2", "odd[0]", "re:x"):
        rule = Rule(match=exactly(name))
        target = type("T", (), {"name": name, "op": "", "roles": frozenset()})()
        other = type("T", (), {"name": f"{name}x", "op": "", "roles": frozenset()})()
        assert rule.matches(target)
        assert not rule.matches(other)
    assert RECIPE.rules

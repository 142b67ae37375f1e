"""Bits for a budget: the recipe that comes out, what it takes, and what is refused."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import conv
from test_measure import BITS, RECIPE, data, network, prepared
from torch import nn

import lowbit
from lowbit import INT4, LowbitError, QuantSpec, Recipe, Rule
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
            found.append(Allocation(table=table, specs=choice, measure="noise"))
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
    assert "noise" in rule.reason
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
    with pytest.raises(LowbitError, match="the table has no 'fisher'; it has noise, kl"):
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
    assert sums.noise / sums.signal == pytest.approx(found.damage[-1])
    assert {name for name, _, _ in found.changes} <= {site.name for site in weights}
    assert "measured noise" in str(found)


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


def chain(*layers: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval(), torch.randn(8, 3, 6, 6)


def weights_of(model: nn.Module, x: torch.Tensor, recipe: Recipe, **options: Any) -> Sensitivity:
    q = lowbit.prepare(model, recipe, x)
    return sensitivity(q, [x], kinds=("weight",), curvature=False, **options)


def test_what_nobody_reads_as_codes_follows_its_writer() -> None:
    """The output of the last convolution has the width of the layer's inputs, and is measured with them."""
    model, x = chain(conv(3, 4), conv(4, 4), conv(4, 2))
    table = sensitivity(lowbit.prepare(model, RECIPE, x), [x], bits=(8, 2), curvature=False)
    assert len([s for s in table if s.kind == "activation"]) == 4
    found = allocate(
        table, Budget(average_bits=8), pins={next(p for p in table.groups[0] if "quant" in p): 2}
    )
    q = lowbit.quantize(model, found.recipe, [x])
    with torch.no_grad():
        noise = (q(x) - model(x)).square().sum() / model(x).square().sum()
    assert found.damage > 0.5 * noise


def test_bytes_are_those_of_the_network_that_comes_out() -> None:
    """Corrections add biases, and BatchNorm is folded."""
    for layers in (
        (conv(3, 4, bias=False), conv(4, 4, bias=False)),
        (conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()),
    ):
        model, x = chain(*layers)
        recipe = replace(lowbit.preset("w8a8"), equalize=False)
        table = weights_of(model, x, recipe, bits=(8, 4))
        found = allocate(table, Budget(average_bits=4))
        cost = lowbit.quantize(model, found.recipe, [x]).cost()
        assert cost.bytes <= found.bytes
        assert found.bytes - cost.bytes in (0, 32)  # a correction that was taken back has added no bias
        assert cost.float_bytes <= table.float_bytes


def test_a_budget_of_just_what_a_choice_takes(weights: Sensitivity) -> None:
    for a in every(weights):
        for budget in (
            Budget(average_bits=a.average_bits),
            Budget(compression=a.compression),
            Budget(bytes=a.bytes),
            Budget(bops=a.bops),
        ):
            assert allocate(weights, budget).damage <= a.damage * (1 + 1e-9)


def test_the_nearest_budget_that_is_named_can_be_asked_for(weights: Sensitivity) -> None:
    for name, value in (("compression", 1000.0), ("average_bits", 0.5), ("bops", 1.0)):
        with pytest.raises(LowbitError, match="ask for that") as caught:
            allocate(weights, Budget(**{name: value}))
        number = re.search(r"(?:goes is|of) (?:a compression of )?([\d.,]*\d)", str(caught.value))
        assert number is not None
        allocate(weights, Budget(**{name: float(number[1].replace(",", ""))}))


def test_widths_that_cost_nothing_more_are_taken(weights: Sensitivity) -> None:
    """The damage of all options is the same: the widest that fit."""
    flat = tuple(replace(s, probes=tuple(replace(p, drop=0.0, noise=1.0) for p in s.probes)) for s in weights)
    found = allocate(replace(weights, sites=flat), Budget(average_bits=8))
    assert {spec.bits for spec in found.specs.values()} == {8}
    with pytest.raises(LowbitError, match="every drop in the table is 0, which ranks nothing"):
        allocate(replace(weights, sites=flat), Budget(average_bits=8), measure="drop")


def test_a_width_that_gives_no_number_is_never_chosen(weights: Sensitivity) -> None:
    first, *rest = weights.sites
    for bad in (float("nan"), float("inf")):
        probes = (*first.probes[:-1], replace(first.probes[-1], noise=bad))
        table = replace(weights, sites=(replace(first, probes=probes), *rest))
        assert allocate(table, Budget(average_bits=3)).specs[first.path].bits > 2
        dead = replace(first, probes=tuple(replace(p, noise=bad) for p in first.probes))
        with pytest.raises(LowbitError, match="'a' makes every noise infinite or no number"):
            allocate(replace(weights, sites=(dead, *rest)), Budget(average_bits=8))


def test_tied_weights_may_have_two_specs_of_one_width() -> None:
    """A pin of the one decides the other too."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.e, self.o = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
            self.o.weight = self.e.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o(self.e(x).mean(1))

    x = torch.randint(0, 6, (8, 4))
    q = lowbit.prepare(Tied(), Recipe(rules=(Rule(weight=lowbit.INT8),)), x)
    tensor = QuantSpec(bits=4)
    table = sensitivity(q, [x], bits=(8, INT4, tensor), kinds=("weight",), curvature=False)
    assert len(table.groups) == 1
    found = allocate(table, Budget(average_bits=8), pins={"o": tensor})
    assert set(found.specs.values()) == {tensor}


def test_repair_says_nothing_that_was_not_measured(weights: Sensitivity) -> None:
    """It stays within the size of an answer that was found for an accuracy, and asks for the new one's."""
    q = prepared()
    prober = prober_of(q, places_of(q, ("weight",)), data())
    choices = every(weights)
    start = max(choices, key=lambda a: a.damage - min(b.damage for b in choices if b.bytes <= a.bytes))
    start = replace(start, accuracy=0.5)
    budget = Budget(accuracy=0.4)
    plain = repair(prober, start, budget).allocation
    assert plain.accuracy is None
    assert plain.bytes <= start.bytes
    better = repair(prober, start, budget, evaluate=lambda _: 0.6).allocation
    assert (better.accuracy, better.holds, better.specs) == (0.6, True, plain.specs)
    worse = repair(prober, start, Budget(accuracy=0.7), evaluate=lambda _: 0.3).allocation
    assert (worse.accuracy, worse.holds, worse.specs) == (0.5, False, start.specs)
    bare = prober_of(q, places_of(q, ("weight",)), [x for x, _ in data()])
    with pytest.raises(LowbitError, match="'loss' needs labels, and the data has none"):
        repair(bare, replace(start, measure="loss"), Budget(average_bits=8))

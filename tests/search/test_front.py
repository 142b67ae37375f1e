"""Size against accuracy: what is returned was evaluated, and nothing smaller that was tried holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_allocate import every
from test_measure import BITS, data, prepared

from lowbit import LowbitError, Recipe
from lowbit.search import (
    Allocation,
    Budget,
    Sensitivity,
    allocate,
    front_table,
    minimum_bits,
    pareto,
    plot,
    sensitivity,
    uniform,
)


@pytest.fixture(scope="module")
def table() -> Sensitivity:
    return sensitivity(prepared(), data(), bits=BITS, kinds=("weight",), curvature=False)


class Judge:
    """An accuracy that falls with the bits of the layers, and what it was asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, ...], float]] = []

    def __call__(self, recipe: Recipe) -> float:
        bits = tuple(rule.weight.bits for rule in recipe.rules if rule.weight is not None)
        self.seen.append((bits, 1 - 0.1 * sum(2.0**-b for b in bits)))
        return self.seen[-1][1]


def test_the_smallest_network_above_the_floor(table: Sensitivity) -> None:
    judge, floor = Judge(), 0.975
    found = allocate(table, Budget(accuracy=floor), evaluate=judge, tries=20)
    assert found.holds
    assert found.accuracy is not None
    assert found.accuracy >= floor
    assert found.accuracy in [score for _, score in judge.seen], "it was evaluated"
    # the oracle: of the best allocation for every size, the smallest that holds
    sizes = sorted({a.bytes for a in every(table)})
    best = [allocate(table, Budget(bytes=size), evaluate=judge) for size in sizes]
    holding = [a.bytes for a in best if a.accuracy is not None and a.accuracy >= floor]
    assert found.bytes == min(holding)


def test_a_floor_that_nothing_holds_gives_the_best(table: Sensitivity) -> None:
    found = minimum_bits(table, 0.9999, Judge())
    assert not found.holds
    assert {spec.bits for spec in found.specs.values()} == {8}
    assert "holds the accuracy; this is the best" in str(found)


def test_a_floor_within_a_budget(table: Sensitivity) -> None:
    found = allocate(table, Budget(accuracy=0.95, average_bits=5), evaluate=Judge())
    assert found.average_bits <= 5
    with pytest.raises(LowbitError, match="is 2 bits a weight"):
        allocate(table, Budget(accuracy=0.95, average_bits=1), evaluate=Judge())
    with pytest.raises(LowbitError, match=r"accuracy=0.95 must be measured; pass evaluate="):
        allocate(table, Budget(accuracy=0.95))


def test_the_fewest_bits_are_found_to_the_byte(table: Sensitivity) -> None:
    """An accuracy that everything has: the answer is the smallest network of all."""
    found = minimum_bits(table, 1e-9, lambda _: 1.0)
    assert found.bytes == min(a.bytes for a in every(table))


def test_an_accuracy_that_is_no_number(table: Sensitivity) -> None:
    with pytest.raises(LowbitError, match=r"evaluate\(recipe\) returned nan"):
        minimum_bits(table, 0.9, lambda _: float("nan"))


def test_the_front_rises_with_the_budget(table: Sensitivity, tmp_path: Path) -> None:
    budgets = [Budget(average_bits=b) for b in (8, 4, 3, 2)]
    points = pareto(table, budgets, evaluate=Judge())
    assert [p.average_bits for p in points] == sorted(p.average_bits for p in points)
    damages = [p.damage for p in points]
    assert damages == sorted(damages, reverse=True)
    marked = pareto(table, [Budget(bytes=uniform(table, b).bytes) for b in BITS])
    assert all(p.accuracy is None for p in marked)
    assert "bits of the layers" in front_table(points)
    pytest.importorskip("matplotlib")
    plot(points, tmp_path / "front.svg", marked=points[:1])
    assert "uniform" in (tmp_path / "front.svg").read_text()


def test_uniform_recipes(table: Sensitivity) -> None:
    one: Allocation = uniform(table, 4)
    assert {spec.bits for spec in one.specs.values()} == {4}
    assert one.average_bits == 4
    with pytest.raises(LowbitError, match="'a' was not measured at 5 bits"):
        uniform(table, 5)

"""The exact solver against trying everything."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.search.solve import Product, Resource, least, solve

numbers = st.integers(0, 1000).map(float)


def table(items: int, options: int) -> st.SearchStrategy[list[list[float]]]:
    row = st.lists(numbers, min_size=options, max_size=options)
    return st.lists(row, min_size=items, max_size=items)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[Resource], list[list[int]]]:
    """Up to 6 items with up to 5 options, one or two resources, products and groups."""
    items, options = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    damage, resources = draw(table(items, options)), []
    for name in ["bytes", "latency"][: draw(st.integers(1, 2))]:
        usage, products = draw(table(items, options)), []
        if items > 1 and draw(st.booleans()):
            pair = draw(st.permutations(range(items)))[:2]
            left, right = (draw(st.lists(numbers, min_size=options, max_size=options)) for _ in range(2))
            products = [Product(items=(pair[0], pair[1]), factor=0.01, left=left, right=right)]
        limit = draw(st.integers(0, 1500 * items))
        resources.append(Resource(name=name, limit=limit, usage=usage, products=tuple(products)))
    groups = [[0, items - 1]] if items > 2 and draw(st.booleans()) else []
    return damage, resources, groups


def everything(damage: Sequence[Sequence[float]], groups: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    choices = itertools.product(*(range(len(row)) for row in damage))
    return [c for c in choices if all(len({c[i] for i in group}) == 1 for group in groups)]


def total(damage: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    return sum(row[c] for row, c in zip(damage, choice, strict=True))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_choice_is_better(problem: tuple[list[list[float]], list[Resource], list[list[int]]]) -> None:
    damage, resources, groups = problem
    fits = [c for c in everything(damage, groups) if all(r.used(c) <= r.limit for r in resources)]
    found = solve(damage, resources, groups)
    if not fits:
        assert found is None
        return
    assert found is not None
    assert tuple(found) in fits
    assert total(damage, found) == min(total(damage, c) for c in fits)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_least_of_a_resource(problem: tuple[list[list[float]], list[Resource], list[list[int]]]) -> None:
    damage, (first, *others), groups = problem
    fits = [c for c in everything(damage, groups) if all(r.used(c) <= r.limit for r in others)]
    found = least(first, others, groups)
    assert found == pytest.approx(min((first.used(c) for c in fits), default=None))


def test_tolerances_of_the_solver_let_nothing_through() -> None:
    """A byte in a hundred million is less than what HiGHS tolerates."""
    usage = [[100_000_000.0, 100_000_001.0], [7.0, 8.0]]
    damage = [[1.0, 0.0], [1.0, 0.0]]
    found = solve(damage, [Resource(name="bytes", limit=100_000_008.0, usage=usage)])
    assert found in ([0, 1], [1, 0])
    assert solve(damage, [Resource(name="bytes", limit=100_000_007.0, usage=usage)]) == [0, 0]
    assert solve(damage, [Resource(name="bytes", limit=100_000_006.0, usage=usage)]) is None


def test_two_hundred_layers_take_less_than_a_second() -> None:
    rng = np.random.default_rng(0)
    sizes, bits = rng.integers(1000, 2_000_000, 200), np.array([2, 3, 4, 5, 6, 8, 12, 16])
    damage = rng.lognormal(0, 2, 200)[:, None] * 4.0**-bits * rng.lognormal(0, 0.3, (200, 8))
    usage = (sizes[:, None] * bits / 8).round()
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        limit = Resource(name="bytes", limit=float(sizes.sum() / 2), usage=usage.tolist())
        found = solve(damage.tolist(), [limit])
        best = min(best, time.process_time() - started)
    assert found is not None
    assert limit.used(found) <= limit.limit
    assert best < 1


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints to the standard output of the process for some programs, these among them."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        bits, elements = np.array([8, 7, 6, 5, 4, 3, 2, 1.5]), rng.integers(100, 50_000, 200)
        damage = rng.uniform(1e-4, 1, (200, 1)) * 4.0**-bits * rng.lognormal(0, 0.3, (200, 8))
        limit = Resource(name="bits", limit=4.0 * elements.sum(), usage=np.outer(elements, bits).tolist())
        assert solve(damage.tolist(), [limit]) is not None
    print("heard")
    assert capfd.readouterr().out == "heard\n"


def test_choices_that_are_not_wanted() -> None:
    damage = [[0.0, 1.0, 3.0], [0.0, 2.0]]
    order = sorted(itertools.product(range(3), range(2)), key=lambda c: damage[0][c[0]] + damage[1][c[1]])
    found: list[list[int]] = []
    for _ in order:
        choice = solve(damage, without=found)
        assert choice is not None
        found.append(choice)
    values = [damage[0][a] + damage[1][b] for a, b in found]
    assert values == sorted(values)
    assert solve(damage, without=found) is None


@pytest.mark.parametrize("huge", [1e6, 1e9, 1e15])
def test_damages_of_any_size_beside_each_other(huge: float) -> None:
    """Differences that matter are far below the largest damage."""
    rng = np.random.default_rng(1)
    damage = rng.uniform(0.1, 1.0, (5, 4)).tolist()
    usage = [[1.0, 2.0, 3.0, 4.0]] * 5
    damage[0][0] = huge
    limit = Resource(name="bits", limit=11.0, usage=usage)
    best = min(
        sum(damage[i][k] for i, k in enumerate(c))
        for c in itertools.product(range(4), repeat=5)
        if limit.used(c) <= limit.limit
    )
    found = solve(damage, [limit])
    assert found is not None
    assert sum(damage[i][k] for i, k in enumerate(found)) == pytest.approx(best, rel=1e-9)


def test_a_limit_just_out_of_reach_ends_soon() -> None:
    """Equal layers, and a limit that is short by the rounding of one sum."""
    n = 589_824.0
    usage = [[2 * n, 3 * n, 4 * n]] * 24
    limit = Resource(name="bits", limit=52 * n - 1e-3, usage=usage)
    found = solve([[3.0, 2.0, 1.0]] * 24, [limit])
    assert found is not None
    assert limit.used(found) <= 51 * n

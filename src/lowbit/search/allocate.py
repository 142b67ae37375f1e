"""Bits for a budget: the table turned into a knapsack, and solved exactly."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError, near_miss
from lowbit.progress import track
from lowbit.recipe import Recipe
from lowbit.search.allocation import Allocation
from lowbit.search.budget import Budget, Free, infeasible, limits_of
from lowbit.search.solve import Resource, least, solve
from lowbit.search.table import MEASURES, Sensitivity, Site

__all__ = ["Evaluate", "Pins", "allocate", "free_of", "groups_of", "judged", "minimum_bits"]

Pins = Mapping[str, int | QuantSpec]
# The accuracy of the network that a recipe makes, on real data: larger is better.
Evaluate = Callable[[Recipe], float]


def allocate(
    table: Sensitivity,
    budget: Budget,
    *,
    measure: str = "noise",
    pins: Pins | None = None,
    evaluate: Evaluate | None = None,
    tries: int = 8,
) -> Allocation:
    """The choice of least total damage within the budget: proven optimal for the table.

    With an accuracy in the budget the smallest network that reaches it is looked for, by bisection between
    the fewest and the most bytes that the budget allows: for each size the best choice is made, and
    evaluated. What is returned was evaluated; if the largest network falls short it is that one, and `holds`
    is False.

    Args:
        table: from `lowbit.search.sensitivity`.
        budget: what must hold.
        measure: the column to add up, one of `MEASURES`.
        pins: bits or a spec, by path or name of layer, that are settled beforehand.
        evaluate: accuracy of the network that a recipe makes, on real data; the answer tells what it found.
        tries: evaluations after the first, where an accuracy is asked for.

    Raises:
        LowbitError: nothing fits the budget (it says what would), an unknown layer or measure, a pin that is
            no candidate, an accuracy without `evaluate`, one that is no number, a latency without timings.
    """
    if measure not in MEASURES:
        raise LowbitError(f"no measure is named '{measure}'{near_miss(measure, MEASURES)}")
    if budget.latency is not None and not table.timed:
        raise LowbitError("a budget of latency needs a table with timings; make it with lowbit.latency.timed")
    if budget.accuracy is None:
        found = _solved(table, budget, measure, pins or {})
        return found if evaluate is None else judged(evaluate, found)
    if evaluate is None:
        raise LowbitError(
            f"accuracy={budget.accuracy} must be measured; pass evaluate=, a function from a recipe to the "
            "accuracy of its network"
        )
    return _smallest(table, budget, measure, pins or {}, evaluate, tries)


def minimum_bits(
    table: Sensitivity, floor: float, evaluate: Evaluate, *, measure: str = "noise", pins: Pins | None = None
) -> Allocation:
    """The fewest bits whose measured accuracy is at least `floor`: `allocate` for that accuracy alone."""
    return allocate(table, Budget(accuracy=floor), measure=measure, pins=pins, evaluate=evaluate)


def judged(evaluate: Evaluate, found: Allocation) -> Allocation:
    """The allocation with its accuracy.

    Raises:
        LowbitError: that is no number.
    """
    accuracy = float(evaluate(found.recipe))
    if math.isnan(accuracy):
        raise LowbitError("evaluate(recipe) returned nan; return the accuracy, a finite number")
    return replace(found, accuracy=accuracy)


def _solved(table: Sensitivity, budget: Budget, measure: str, pins: Pins) -> Allocation:
    free = _usable(free_of(table, pins), measure)
    groups = groups_of(table, free)
    damage = [[site.probes[k].damage(measure) for k in options] for site, options in free]
    limits = limits_of(table, budget, free)
    resources = [limit.resource for limit in limits]
    choice = solve(damage, resources, groups)
    if choice is None:
        raise LowbitError(infeasible(limits, groups))
    bits = [[site.specs[k].bits for k in options] for site, options in free]
    _widen(choice, bits, damage, resources, groups)
    specs = {site.path: site.specs[options[c]] for (site, options), c in zip(free, choice, strict=True)}
    pinned = frozenset(table.site(name).path for name in pins)
    return Allocation(table=table, specs=specs, measure=measure, pinned=pinned)


def _usable(free: Free, measure: str) -> Free:
    """Without options at which the network gave no number.

    Raises:
        LowbitError: a site has no other, or the measure tells nothing apart.
    """
    found = [(s, [k for k in options if s.probes[k].damage(measure) < math.inf]) for s, options in free]
    for site, options in found:
        if not options:
            raise LowbitError(f"'{site.name}' makes every {measure} infinite or no number; leave it in float")
    if not any(site.probes[k].damage(measure) for site, _ in free for k in range(len(site.probes))):
        raise LowbitError(
            f"every {measure} in the table is 0, which ranks nothing (KL needs two classes or more, loss and "
            "drop labels that are right); use measure='noise'"
        )
    return found


def _widen(
    choice: list[int],
    bits: Sequence[Sequence[int]],
    damage: Sequence[Sequence[float]],
    resources: Sequence[Resource],
    groups: Sequence[Sequence[int]],
) -> None:
    """Of choices with the same damage take one with more bits, as far as the limits go, in place."""
    grouped = {i for members in groups for i in members}
    for members in [*groups, *([i] for i in range(len(bits)) if i not in grouped)]:
        first, now = members[0], choice[members[0]]
        wider = [c for c in range(len(bits[first])) if bits[first][c] > bits[first][now]]
        free = [c for c in wider if all(damage[i][c] <= damage[i][now] for i in members)]
        for c in [*sorted(free, key=lambda c: -bits[first][c]), now]:
            for i in members:
                choice[i] = c
            if all(r.holds(choice) for r in resources):
                break


def _smallest(
    table: Sensitivity, budget: Budget, measure: str, pins: Pins, evaluate: Evaluate, tries: int
) -> Allocation:
    assert budget.accuracy is not None
    best = judged(evaluate, _solved(table, budget, measure, pins))
    assert best.accuracy is not None
    if best.accuracy < budget.accuracy:
        return replace(best, holds=False)
    low, high = _fewest_bytes(table, budget, measure, pins) - 1, best.bytes
    for _ in track(range(tries), "evaluating sizes", total=tries):
        middle = (low + high) // 2
        if middle == low:
            break
        found = judged(evaluate, _solved(table, replace(budget, bytes=middle), measure, pins))
        assert found.accuracy is not None
        if found.accuracy >= budget.accuracy:
            best, high = found, found.bytes
        else:
            low = middle
    return best


def _fewest_bytes(table: Sensitivity, budget: Budget, measure: str, pins: Pins) -> int:
    """Of the choices within the budget."""
    free = _usable(free_of(table, pins), measure)
    groups = groups_of(table, free)
    size, *others = limits_of(table, replace(budget, bytes=budget.bytes or sys.maxsize), free)
    found = least(size.resource, [limit.resource for limit in others], groups)
    if found is None:
        raise LowbitError(infeasible(others, groups))
    return table.other_bytes + round(found)


def free_of(table: Sensitivity, pins: Pins) -> Free:
    wanted = {table.site(name).path: pin for name, pin in pins.items()}
    found: Free = []
    for site in table:
        pin = wanted.get(site.path)
        options = [k for k, spec in enumerate(site.specs) if pin is None or pin in (spec, spec.bits)]
        if not options:
            have = ", ".join(str(spec.bits) for spec in site.specs)
            raise LowbitError(f"'{site.name}' is pinned to {pin}, which was not measured; measured: {have}")
        found.append((site, options))
    return found


def groups_of(table: Sensitivity, free: Free) -> list[list[int]]:
    """Numbers of the items that take the same option; a pin of one of them is a pin of all.

    Options that some of them lack go, and the others are put in one order, in place.
    """
    index = {site.path: i for i, (site, _) in enumerate(free)}
    groups = []
    for paths in table.groups:
        members = [index[path] for path in paths]
        options = [{label: k for label, k in _labels(free[i][0]) if k in free[i][1]} for i in members]
        shared = [label for label in options[0] if all(label in other for other in options)]
        if not shared:
            names = " and ".join(f"'{free[i][0].name}'" for i in members)
            raise LowbitError(f"{names} must have the same bits, and are pinned to different ones")
        for i, known in zip(members, options, strict=True):
            free[i] = free[i][0], [known[label] for label in shared]
        groups.append(members)
    return groups


def _labels(site: Site) -> Iterator[tuple[tuple[int, int], int]]:
    """(bits, how many before it have as many) of every spec, and its number: the same for sites alike."""
    seen: Counter[int] = Counter()
    for k, spec in enumerate(site.specs):
        yield (spec.bits, seen[spec.bits]), k
        seen[spec.bits] += 1

"""Sensitivities of one quantizer at a time do not add up; so measure around the answer, and solve again.

A round measures, for every site, one option more and one fewer, all other sites as the answer has them: what
each single change really does there. Within one step of the answer the knapsack is then solved for these
marginal damages. The new answer counts only when its measured damage is less; if not, the next best are
tried, then those with fewer changes at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError
from lowbit.progress import track
from lowbit.search.allocate import Evaluate, Pins, free_of, groups_of, judged
from lowbit.search.allocation import Allocation
from lowbit.search.budget import Budget, Free, limits_of
from lowbit.search.prober import Prober, Sums
from lowbit.search.solve import Resource, solve
from lowbit.search.table import Sensitivity, Site

__all__ = ["MEASURED", "Repaired", "measured", "repair"]

ROUNDS = 4
# answers that are measured for each number of changes, before fewer are allowed
TRIES = 4
# measures that a run of the network gives
MEASURED = ("kl", "loss", "noise")
# the spec of every site, by path
Specs = dict[str, QuantSpec]


@dataclass(frozen=True)
class Repaired:
    """The better allocation, and how it came about."""

    allocation: Allocation
    # measured damage at the start and after each change that was kept
    damage: tuple[float, ...]
    # (site, from, to) of every site that changed
    changes: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        moved = "; ".join(f"{name}: {old} -> {new}" for name, old, new in self.changes) or "nothing changed"
        kind = self.allocation.measure
        return f"measured {kind} {self.damage[0]:.4g} -> {self.damage[-1]:.4g}: {moved}"


def measured(prober: Prober, sums: Sums, measure: str) -> float:
    """The damage of a run, in the measure of the table.

    Raises:
        LowbitError: the measure is none that a run gives.
    """
    if measure not in MEASURED:
        raise LowbitError(f"'{measure}' is no measure of a run; use one of {', '.join(MEASURED)}")
    if measure == "loss" and not prober.labelled:
        raise LowbitError("'loss' needs labels, and the data has none; use kl or noise")
    if measure == "noise":
        return sums.noise / sums.signal if sums.signal else 0.0
    return (sums.kl if measure == "kl" else sums.loss) / sums.samples


def repair(
    prober: Prober,
    start: Allocation,
    budget: Budget,
    *,
    pins: Pins | None = None,
    evaluate: Evaluate | None = None,
    rounds: int = ROUNDS,
    memory: int = 1 << 30,
) -> Repaired:
    """Improve an allocation by true evaluations, within its budget.

    If a uniform width fits the budget and measures better than the start, it takes its place.

    Args:
        prober: over the places of the table, with the data to measure on.
        start: from `allocate`.
        budget, pins: as given to `allocate`. Where it asks for an accuracy, the answer is no larger than the
            start.
        evaluate: as for `allocate`: of the start and of what became of it, the answer is the more accurate.
        rounds: of measuring around the answer.
        memory: bytes of activations to hold, as for `sensitivity`.

    Raises:
        LowbitError: the measure of the start is none that a run gives, or one that needs labels.
    """
    within = budget if budget.accuracy is None else replace(budget, accuracy=None, bytes=start.bytes)
    free = free_of(start.table, pins or {})
    task = _Task(prober, start.table, within, start.measure, prober.parts(memory), free)
    now = dict(start.specs)
    history = [task.damage(now)]
    for specs in task.uniform():
        damage = task.damage(specs)
        if damage < history[-1]:
            now = specs
            history.append(damage)
    for _ in range(rounds):
        found = task.step(now, history[-1])
        if found is None:
            break
        now, damage = found
        history.append(damage)
    answer = start if now == start.specs else replace(start, specs=now, accuracy=None, holds=True)
    if evaluate is not None:
        answer = _more_accurate(start, answer, budget, evaluate)
    changes = tuple(
        (site.name, str(start.specs[site.path]), str(answer.specs[site.path]))
        for site in start.table
        if start.specs[site.path] != answer.specs[site.path]
    )
    return Repaired(answer, tuple(history), changes)


def _more_accurate(start: Allocation, found: Allocation, budget: Budget, evaluate: Evaluate) -> Allocation:
    """The better of two, each with its accuracy."""
    pair = [a if a.accuracy is not None else judged(evaluate, a) for a in (start, found)]
    best = max(pair, key=lambda a: a.accuracy or 0.0)
    return best if budget.accuracy is None else replace(best, holds=(best.accuracy or 0.0) >= budget.accuracy)


@dataclass(frozen=True)
class _Task:
    """What stays the same in a repair."""

    prober: Prober
    table: Sensitivity
    budget: Budget
    measure: str
    parts: Sequence[Sequence[int]]
    free: Free

    def damage(self, specs: Specs) -> float:
        """Measured, all sites at once."""
        total = Sums()
        with self.prober.quantizing(specs):
            for part in self.parts:
                total += self.prober.measure(part, self.prober.cursor(part).behind())
        return self._of(total)

    def _of(self, sums: Sums) -> float:
        return measured(self.prober, sums, self.measure)

    def uniform(self) -> Iterator[Specs]:
        """Each width that all sites may have within the budget."""
        limits = [limit.resource for limit in limits_of(self.table, self.budget, self.free)]
        for bits in dict.fromkeys(spec.bits for spec in self.table.sites[0].specs):
            found = [
                next((c for c, k in enumerate(options) if site.specs[k].bits == bits), None)
                for site, options in self.free
            ]
            choice = [c for c in found if c is not None]
            if len(choice) == len(found) and all(r.used(choice) <= r.limit for r in limits):
                yield _specs(self.free, choice)

    def step(self, now: Specs, damage: float) -> tuple[Specs, float] | None:
        """The best change that measures better; None where there is none."""
        marginal = self._around(now, damage)
        # only what was measured may be chosen
        near: Free = [(site, list(row)) for (site, _), row in zip(self.free, marginal, strict=True)]
        groups = groups_of(self.table, near)
        limits = [limit.resource for limit in limits_of(self.table, self.budget, near)]
        costs = [[row[k] for k in options] for row, (_, options) in zip(marginal, near, strict=True)]
        present = [options.index(site.specs.index(now[site.path])) for site, options in near]
        moves = [[float(c != p) for c in range(len(row))] for row, p in zip(costs, present, strict=True)]
        allowed, tried = len(near), [present]
        while allowed:
            count = Resource(name="changes", limit=allowed, usage=moves)
            for _ in range(TRIES):
                choice = solve(costs, [*limits, count], groups, without=tried)
                if choice is None or sum(row[c] for row, c in zip(costs, choice, strict=True)) >= 0:
                    break
                tried.append(choice)
                specs = _specs(near, choice)
                found = self.damage(specs)
                if found < damage:
                    return specs, found
                allowed = min(allowed, int(count.used(choice)))
            allowed //= 2
        return None

    def _around(self, now: Specs, damage: float) -> list[dict[int, float]]:
        """For each site the numbers of the specs within a step, and what each alone does to the damage."""
        prober = self.prober
        sums: list[dict[int, Sums]] = [{} for _ in self.free]
        near = [list(_neighbours(site, options, now)) for site, options in self.free]
        with prober.quantizing(now):
            for part in self.parts:
                cursor = prober.cursor(part)
                for i, (site, _) in track(enumerate(self.free), "measuring around the answer", len(near)):
                    cursor.advance(prober.places[site.path].node)
                    for k in near[i]:
                        prober.set(site.path, site.specs[k])
                        sums[i][k] = sums[i].get(k, Sums()) + prober.measure(part, cursor.behind())
                    prober.set(site.path, now[site.path])
        return [
            {site.specs.index(now[site.path]): 0.0}
            | {k: change for k, v in row.items() if math.isfinite(change := self._of(v) - damage)}
            for (site, _), row in zip(self.free, sums, strict=True)
        ]


def _specs(free: Free, choice: Sequence[int]) -> Specs:
    return {site.path: site.specs[options[c]] for (site, options), c in zip(free, choice, strict=True)}


def _neighbours(site: Site, options: list[int], now: Specs) -> Iterator[int]:
    """Those of the options that are next to the present one, in the order of their bits."""
    order = sorted(options, key=lambda k: site.specs[k].bits)
    at = order.index(site.specs.index(now[site.path]))
    yield from (order[a] for a in (at - 1, at + 1) if 0 <= a < len(order))

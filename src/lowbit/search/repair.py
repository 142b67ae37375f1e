"""Sensitivities of one quantizer at a time do not add up; so measure around the answer, and solve again.

A round measures, for every site, one option more and one fewer, all other sites as the answer has them: what
each single change really does there. Within one step of the answer the knapsack is then solved for these
marginal damages. The new answer counts only when its measured damage is less; if not, fewer changes are
allowed at once, down to one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError
from lowbit.progress import track
from lowbit.search.allocate import Allocation, Budget, Free, Pins, free_of, groups_of, limits_of
from lowbit.search.prober import Prober, Sums
from lowbit.search.solve import Resource, solve
from lowbit.search.table import Site

__all__ = ["Repaired", "measured", "repair"]

ROUNDS = 4
# measures that a run of the network gives
MEASURED = ("kl", "loss", "noise")


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
    if measure == "noise":
        return sums.noise / sums.signal if sums.signal else 0.0
    return (sums.kl if measure == "kl" else sums.loss) / sums.samples


def repair(
    prober: Prober,
    start: Allocation,
    budget: Budget,
    *,
    parts: Sequence[Sequence[int]] | None = None,
    pins: Pins | None = None,
    rounds: int = ROUNDS,
) -> Repaired:
    """Improve an allocation by true evaluations, within its budget.

    Args:
        prober: over the places of the table, with the data to measure on.
        start: from `allocate`.
        budget, pins: as given to `allocate`.
        parts: numbers of the batches to hold together; all at once by default.
        rounds: of measuring around the answer.
    """
    measure = start.measure
    parts = [list(range(len(prober.batches)))] if parts is None else parts
    free = free_of(start.table, pins or {})
    groups = groups_of(start.table, free)
    limits = [limit.resource for limit in limits_of(start.table, budget, free)]
    now = dict(start.specs)
    history = [_evaluate(prober, now, parts, measure)]
    for _ in range(rounds):
        marginal = _around(prober, start, now, parts, history[-1], free)
        found = _step(prober, now, parts, measure, marginal, free, limits, groups, history[-1])
        if found is None:
            break
        now, damage = found
        history.append(damage)
    changes = tuple(
        (site.name, str(start.specs[site.path]), str(now[site.path]))
        for site in start.table
        if start.specs[site.path] != now[site.path]
    )
    return Repaired(replace(start, specs=now), tuple(history), changes)


def _evaluate(
    prober: Prober, specs: dict[str, QuantSpec], parts: Sequence[Sequence[int]], measure: str
) -> float:
    total = Sums()
    with prober.quantizing(specs):
        for part in parts:
            total += prober.measure(part, prober.cursor(part).behind())
    return measured(prober, total, measure)


def _around(
    prober: Prober,
    start: Allocation,
    now: dict[str, QuantSpec],
    parts: Sequence[Sequence[int]],
    damage: float,
    free: Free,
) -> list[dict[int, float]]:
    """For each item the options within a step, by number, and what the change alone does to the damage."""
    items = [
        (i, site, list(_neighbours(site, options, now[site.path]))) for i, (site, options) in enumerate(free)
    ]
    found: list[dict[int, float]] = [
        {options.index(site.specs.index(now[site.path])): 0.0} for site, options in free
    ]
    sums: dict[tuple[int, int], Sums] = {}
    with prober.quantizing(now):
        for part in parts:
            cursor = prober.cursor(part)
            for i, site, options in track(items, "measuring around the answer", total=len(items)):
                cursor.advance(prober.places[site.path].node)
                for c in options:
                    prober.set(site.path, site.specs[free[i][1][c]])
                    sums[i, c] = sums.get((i, c), Sums()) + prober.measure(part, cursor.behind())
                prober.set(site.path, now[site.path])
    for (i, c), total in sums.items():
        found[i][c] = measured(prober, total, start.measure) - damage
    return found


def _neighbours(site: Site, options: list[int], spec: QuantSpec) -> Iterator[int]:
    """Numbers of the options next to the present one, in the order of their bits."""
    order = sorted(range(len(options)), key=lambda c: site.specs[options[c]].bits)
    at = next(k for k, c in enumerate(order) if site.specs[options[c]] == spec)
    yield from (order[k] for k in (at - 1, at + 1) if 0 <= k < len(order))


def _step(
    prober: Prober,
    now: dict[str, QuantSpec],
    parts: Sequence[Sequence[int]],
    measure: str,
    marginal: list[dict[int, float]],
    free: Free,
    limits: Sequence[Resource],
    groups: Sequence[Sequence[int]],
    damage: float,
) -> tuple[dict[str, QuantSpec], float] | None:
    """The best change that measures better; None where there is none."""
    present = [options.index(site.specs.index(now[site.path])) for site, options in free]
    far = 1e6 * (1.0 + max(abs(v) for row in marginal for v in row.values()))
    costs = [
        [row.get(c, far) for c in range(len(options))]
        for row, (_, options) in zip(marginal, free, strict=True)
    ]
    moves = [[float(c != p) for c in range(len(row))] for row, p in zip(costs, present, strict=True)]
    allowed = len(free)
    while allowed >= 1:
        count = Resource(name="changes", limit=allowed, usage=moves)
        choice = solve(costs, [*limits, count], groups)
        if choice is None or choice == present:
            return None
        specs = {site.path: site.specs[options[c]] for (site, options), c in zip(free, choice, strict=True)}
        found = _evaluate(prober, specs, parts, measure)
        if found < damage:
            return specs, found
        allowed = min(allowed, sum(c != p for c, p in zip(choice, present, strict=True))) // 2
    return None

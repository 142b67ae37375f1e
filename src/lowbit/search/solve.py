"""The multiple-choice knapsack, solved to optimality: one option for each item, least damage, within limits.

    minimize  sum_i damage[i, c_i]   subject to   sum_i usage_k[i, c_i] <= limit_k   for every resource k

A resource may also hold products of two items' options, as bit operations do: MACs times weight bits times
input bits. HiGHS solves it as an integer program (scipy.optimize.milp) with no gap between bound and answer.
What it returns is rounded and counted again; an answer that only its tolerances let through is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from lowbit.search.silence import silent

__all__ = ["Product", "Resource", "least", "solve"]

Table = Sequence[Sequence[float]]
# The largest number in what is minimized: HiGHS stops within 1e-6 of the optimum, whatever its size.
SCALE = 1e3
# Damages are solved again when those that can matter are so much smaller than the largest.
SPREAD = 1e3
# Answers beyond a limit that are cut off one by one, before the limits are made tighter by HiGHS's tolerance.
CUTS = 20


@dataclass(frozen=True, kw_only=True)
class Product:
    """factor * left[c_i] * right[c_j] for two items i and j."""

    items: tuple[int, int]
    factor: float
    left: Sequence[float]
    right: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Something of which there is only so much."""

    name: str
    limit: float
    # [items][options]
    usage: Table
    products: tuple[Product, ...] = ()

    def holds(self, choice: Sequence[int]) -> bool:
        """Whether a choice keeps the limit, but for the rounding of its sum."""
        return self.used(choice) <= self.limit + 1e-12 * abs(self.limit)

    def used(self, choice: Sequence[int]) -> float:
        """What a choice takes of it."""
        alone = sum(self.usage[i][c] for i, c in enumerate(choice))
        for p in self.products:
            i, j = p.items
            alone += p.factor * p.left[choice[i]] * p.right[choice[j]]
        return alone


def solve(
    damage: Table,
    resources: Sequence[Resource] = (),
    groups: Sequence[Sequence[int]] = (),
    without: Sequence[Sequence[int]] = (),
) -> list[int] | None:
    """The number of each item's option; None where nothing fits.

    Args:
        damage: [items][options], finite; items may have different numbers of options.
        resources: limits to keep.
        groups: items that must take the option of the same number; they have as many.
        without: choices that are not wanted.
    """
    reduced = _from_least(damage)
    while True:
        choice = _within(_Program(reduced, resources, groups), resources, without)
        if choice is None:
            return None
        # an option that alone costs more than the whole answer is in no better one; without it smaller
        # differences can be seen
        worst = sum(row[c] for row, c in zip(reduced, choice, strict=True))
        largest = max((v for row in reduced for v in row if v <= worst), default=0.0)
        if SPREAD * largest >= max(v for row in reduced for v in row if v < math.inf):
            return choice
        reduced = [[v if v <= worst else math.inf for v in row] for row in reduced]


def least(of: Resource, others: Sequence[Resource], groups: Sequence[Sequence[int]] = ()) -> float | None:
    """The least of a resource that a choice within the other limits takes; None where there is none."""
    choice = _within(_Program(of.usage, others, groups, of.products), others)
    return None if choice is None else of.used(choice)


def _from_least(damage: Table) -> list[list[float]]:
    """Each item's damages above its least, which changes no choice."""
    return [[v - min(row) for v in row] for row in damage]


def _within(
    program: _Program, resources: Sequence[Resource], without: Sequence[Sequence[int]] = ()
) -> list[int] | None:
    """The best answer that keeps every limit, not only within the tolerances of HiGHS."""
    for unwanted in without:
        program.cut(unwanted)
    turn = 0
    while True:
        choice = program.run()
        if choice is None or all(r.holds(choice) for r in resources):
            return choice
        program.cut(choice)
        turn += 1
        if turn > CUTS:
            program.tighten()


@dataclass
class _Program:
    """Variables: one for each option of each item, then one for each pair of options of each product."""

    cost: Table
    resources: Sequence[Resource]
    groups: Sequence[Sequence[int]]
    # products in what is minimized
    products: tuple[Product, ...] = ()
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = [len(row) for row in self.cost]
        self.start = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self.binary = int(self.start[-1])
        self.total = self.binary
        self.pairs: dict[tuple[tuple[int, int], int, int], int] = {}
        flat = [float(v) if v < math.inf else 0.0 for row in self.cost for v in row]
        self.allowed = np.array([v < math.inf for row in self.cost for v in row])
        for i, size in enumerate(sizes):
            self.rows.append(({self.at(i, c): 1.0 for c in range(size)}, 1.0, 1.0))
        for first, *rest in self.groups:
            for other in rest:
                for c in range(sizes[first]):
                    self.rows.append(({self.at(first, c): 1.0, self.at(other, c): -1.0}, 0.0, 0.0))
        for resource in self.resources:
            if np.isfinite(resource.limit):
                self._limit(resource)
        extra = [term for product in self.products for term in self._terms(product).items()]
        objective = np.array(flat + [0.0] * (self.total - self.binary))
        for variable, value in extra:
            objective[variable] += value
        self.objective = objective * (SCALE / max(1e-300, float(np.abs(objective).max())))

    def at(self, item: int, option: int) -> int:
        """Number of a variable."""
        return int(self.start[item]) + option

    def _terms(self, product: Product) -> dict[int, float]:
        """Variables of the pairs of options, each 1 when both are chosen, with what they add."""
        (i, j), found = product.items, {}
        for a, left in enumerate(product.left):
            for b, right in enumerate(product.right):
                if i == j:
                    if a == b:
                        found[self.at(i, a)] = product.factor * left * right
                    continue
                found[self._pair(i, j, a, b)] = product.factor * left * right
        return found

    def _pair(self, i: int, j: int, a: int, b: int) -> int:
        key = (i, j), a, b
        if key not in self.pairs:
            many = len(self.cost[i]), len(self.cost[j])
            for m in range(many[0]):
                for n in range(many[1]):
                    self.pairs[(i, j), m, n] = self.total
                    self.total += 1
            # the pairs of each option sum to whether it is chosen: with binary options pairs are 0 or 1
            for m in range(many[0]):
                sums = {self.pairs[(i, j), m, n]: 1.0 for n in range(many[1])}
                self.rows.append((sums | {self.at(i, m): -1.0}, 0.0, 0.0))
            for n in range(many[1]):
                sums = {self.pairs[(i, j), m, n]: 1.0 for m in range(many[0])}
                self.rows.append((sums | {self.at(j, n): -1.0}, 0.0, 0.0))
        return self.pairs[key]

    def _limit(self, resource: Resource) -> None:
        row: dict[int, float] = {}
        for i, options in enumerate(resource.usage):
            for c, value in enumerate(options):
                row[self.at(i, c)] = float(value)
        for product in resource.products:
            for variable, value in self._terms(product).items():
                row[variable] = row.get(variable, 0.0) + value
        size = max(abs(resource.limit), 1e-300)
        self.rows.append(({v: value / size for v, value in row.items()}, -np.inf, resource.limit / size))

    def tighten(self) -> None:
        """Lower every limit by what HiGHS may exceed it."""
        self.rows = [(row, low, high - 1e-6 if low == -np.inf else high) for row, low, high in self.rows]

    def cut(self, choice: Sequence[int]) -> None:
        """Exclude one answer."""
        row = {self.at(i, c): 1.0 for i, c in enumerate(choice)}
        self.rows.append((row, -np.inf, len(choice) - 1.0))

    def run(self) -> list[int] | None:
        """The best answer left."""
        entries = [(r, v, value) for r, (row, _, _) in enumerate(self.rows) for v, value in row.items()]
        r, v, value = (np.array(column) for column in zip(*entries, strict=True))
        matrix = coo_array((value, (r, v)), shape=(len(self.rows), self.total)).tocsr()
        lower, upper = (np.array([row[k] for row in self.rows]) for k in (1, 2))
        integrality = np.concatenate([np.ones(self.binary), np.zeros(self.total - self.binary)])
        with silent():
            found = milp(
                self.objective,
                integrality=integrality,
                bounds=Bounds(0, np.concatenate([self.allowed, np.ones(self.total - self.binary)])),
                constraints=LinearConstraint(matrix, lower, upper),
                options={"mip_rel_gap": 0.0},
            )
        if found.x is None:
            return None
        return [int(np.argmax(found.x[self.start[i] : self.start[i + 1]])) for i in range(len(self.cost))]

"""Bits for a budget: the table turned into a knapsack, solved exactly, and the answer as a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError, near_miss
from lowbit.recipe import Recipe, exactly
from lowbit.search.solve import Product, Resource, least, solve
from lowbit.search.table import KINDS, MEASURES, Sensitivity, Site
from lowbit.tables import text_table

__all__ = ["Allocation", "Budget", "allocate"]

Pins = Mapping[str, int | QuantSpec]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the answer must keep; None asks nothing. All that is set must hold together."""

    # float bytes over bytes, everything counted, at least
    compression: float | None = None
    # bytes on disk, everything counted, at most
    bytes: int | None = None
    # mean over the weights of the table, at most
    average_bits: float | None = None
    # sum of MACs * weight bits * input bits over the layers of the table, at most
    bops: float | None = None

    def __post_init__(self) -> None:
        """Check that every number is positive, and that there is one."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and value > 0 and math.isfinite(value)):
                raise LowbitError(f"{name}={value!r} is not a positive number; None asks nothing")
        if all(value is None for value in values.values()):
            raise LowbitError(f"an empty budget asks for nothing; set one of {', '.join(values)}")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One spec for each site, what it takes, and what the table expects it to cost."""

    table: Sensitivity
    # by path of the site
    specs: Mapping[str, QuantSpec]
    measure: str
    # sites that were pinned, by path
    pinned: frozenset[str] = frozenset()

    @property
    def damage(self) -> float:
        """The sum that was minimized."""
        return sum(s.probes[s.specs.index(self.specs[s.path])].damage(self.measure) for s in self.table)

    @property
    def bytes(self) -> int:
        """On disk, everything counted."""
        return self.table.other_bytes + sum(
            s.bytes[s.specs.index(self.specs[s.path])] for s in self.table if s.kind == "weight"
        )

    @property
    def compression(self) -> float:
        """Float bytes over bytes."""
        return self.table.float_bytes / self.bytes

    @property
    def average_bits(self) -> float:
        """Mean over the weights of the table."""
        weights = [s for s in self.table if s.kind == "weight"]
        total = sum(s.elements for s in weights)
        return sum(s.elements * self.specs[s.path].bits for s in weights) / total if total else 0.0

    @property
    def bops(self) -> int:
        """MACs times weight bits times input bits."""
        total = 0
        for site in self.table:
            bits = site.inputs if isinstance(site.inputs, int) else 0
            if isinstance(site.inputs, str) and site.inputs:
                bits = self.specs[site.inputs].bits
            total += site.macs * self.specs[site.path].bits * bits
        return total

    @property
    def recipe(self) -> Recipe:
        """One rule for each operation, with the reason."""
        chosen: dict[tuple[str, str], Site] = {}
        for site in self.table:
            chosen |= {(exactly(name), site.kind): site for name in site.operations}
        rules = []
        for rule in self.table.recipe.rules:
            found = {kind: chosen[rule.match, kind] for kind in KINDS if (rule.match, kind) in chosen}
            specs = {kind: self.specs[site.path] for kind, site in found.items()}
            why = "; ".join(f"{kind} {self.reason(site)}" for kind, site in found.items())
            rules.append(replace(rule, **specs, reason=why or rule.reason))  # type: ignore[arg-type]
        return replace(self.table.recipe, rules=tuple(rules))

    def reason(self, site: Site) -> str:
        """Why a site has its spec: what the steps to its neighbours would cost and save."""
        if site.path in self.pinned:
            return "pinned"
        k = site.specs.index(self.specs[site.path])
        here = site.probes[k].damage(self.measure)
        narrower = [i for i, s in enumerate(site.specs) if s.bits < site.specs[k].bits]
        if not narrower:
            return f"{self.measure} {here:.2g} at the fewest bits"
        below = max(narrower, key=lambda i: site.specs[i].bits)
        there = site.probes[below].damage(self.measure)
        return f"{self.measure} {here:.2g}; {there:.2g} at {site.specs[below].bits} bits"

    def __str__(self) -> str:
        rows = [
            (
                f"{site.name}{'' if site.kind == 'weight' else ', inputs'}",
                str(self.specs[site.path]),
                f"{site.elements:,}" if site.kind == "weight" else "",
                self.reason(site),
            )
            for site in self.table
        ]
        table = text_table(("layer", "spec", "weights", "why"), rows)
        return (
            f"{table}\n{self.bytes:,} bytes, {self.compression:.2f} times smaller than float32, "
            f"{self.average_bits:.2f} bits a weight; expected {self.measure} {self.damage:.3g}"
        )


def allocate(
    table: Sensitivity, budget: Budget, *, measure: str = "kl", pins: Pins | None = None
) -> Allocation:
    """The choice of least total damage within the budget: proven optimal for the table.

    Args:
        table: from `lowbit.sensitivity`.
        budget: what must hold.
        measure: the column to add up, one of `MEASURES`.
        pins: bits or a spec, by path or name of layer, that are settled beforehand.

    Raises:
        LowbitError: nothing fits the budget (it says what would), an unknown layer or measure, a pin that is
            no candidate.
    """
    if measure not in MEASURES:
        raise LowbitError(f"no measure is named '{measure}'{near_miss(measure, MEASURES)}")
    free = free_of(table, pins or {})
    groups = groups_of(table, free)
    damage = [[site.probes[k].damage(measure) for k in options] for site, options in free]
    limits = limits_of(table, budget, free)
    choice = solve(damage, [limit.resource for limit in limits], groups)
    if choice is None:
        raise LowbitError(_infeasible(limits, groups))
    specs = {site.path: site.specs[options[c]] for (site, options), c in zip(free, choice, strict=True)}
    pinned = frozenset(table.site(name).path for name in pins or {})
    return Allocation(table=table, specs=specs, measure=measure, pinned=pinned)


# a site, and the numbers of those of its probes that may be chosen
Free = list[tuple[Site, list[int]]]


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
    """Numbers of the items that take the same option; a pin of one of them is a pin of all."""
    index = {site.path: i for i, (site, _) in enumerate(free)}
    groups = []
    for paths in table.groups:
        members = [index[path] for path in paths]
        allowed = set.intersection(*({free[i][0].specs[k].bits for k in free[i][1]} for i in members))
        for i in members:
            site, options = free[i]
            free[i] = site, [k for k in options if site.specs[k].bits in allowed]
        if not allowed:
            names = " and ".join(f"'{free[i][0].name}'" for i in members)
            raise LowbitError(f"{names} must have the same bits, and are pinned to different ones")
        groups.append(members)
    return groups


@dataclass(frozen=True)
class Limit:
    """A resource, and its amounts in the words of the budget."""

    resource: Resource
    shown: Callable[[float], str]


def limits_of(table: Sensitivity, budget: Budget, free: Free) -> list[Limit]:
    """What the budget asks, over the options that are free."""
    found = []
    sizes = [[float(site.bytes[k]) for k in options] for site, options in free]
    other, whole = table.other_bytes, table.float_bytes
    if budget.bytes is not None:
        resource = Resource(name="bytes", limit=budget.bytes - other, usage=sizes)
        found.append(Limit(resource, lambda v: f"{v + other:,.0f} bytes"))
    if budget.compression is not None:
        most = math.floor(whole / budget.compression)
        resource = Resource(name="compression", limit=most - other, usage=sizes)
        found.append(Limit(resource, lambda v: f"a compression of {whole / (v + other):.4g}"))
    if budget.average_bits is not None:
        weights = sum(site.elements for site, _ in free if site.kind == "weight")
        usage = [
            [float(site.specs[k].bits * site.elements * (site.kind == "weight")) for k in options]
            for site, options in free
        ]
        resource = Resource(name="average_bits", limit=budget.average_bits * weights, usage=usage)
        found.append(Limit(resource, lambda v: f"{v / max(1, weights):.4g} bits a weight"))
    if budget.bops is not None:
        found.append(Limit(_bops(free, budget.bops), lambda v: f"{v:,.0f} bit operations"))
    return found


def _bops(free: Free, limit: float) -> Resource:
    index = {site.path: i for i, (site, _) in enumerate(free)}
    usage: list[list[float]] = [[0.0] * len(options) for _, options in free]
    products = []
    for i, (site, options) in enumerate(free):
        bits = [float(site.specs[k].bits) for k in options]
        if isinstance(site.inputs, int):
            usage[i] = [site.macs * b * site.inputs for b in bits]
        elif site.inputs:
            j = index[site.inputs]
            right = [float(free[j][0].specs[k].bits) for k in free[j][1]]
            products.append(Product(items=(i, j), factor=float(site.macs), left=bits, right=right))
    return Resource(name="bops", limit=limit, usage=usage, products=tuple(products))


def _infeasible(limits: Sequence[Limit], groups: list[list[int]]) -> str:
    """Which limit cannot be kept, and the nearest that can."""
    for limit in limits:
        best = least(limit.resource, (), groups)
        if best is not None and best > limit.resource.limit:
            return (
                f"no choice of bits keeps the budget's {limit.resource.name}: the furthest that the table "
                f"goes is {limit.shown(best)}; ask for that, or measure fewer bits"
            )
    nearest = []
    for limit in limits:
        others = [other.resource for other in limits if other is not limit]
        best = least(limit.resource, others, groups)
        if best is not None:
            nearest.append(limit.shown(best))
    return (
        "the limits of the budget can be kept one by one, but not together; with the others as they are, "
        f"the nearest is {', or '.join(nearest)}"
    )

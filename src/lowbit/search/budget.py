"""What an answer must keep, and what the options of each site take of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from lowbit.errors import LowbitError
from lowbit.search.solve import Product, Resource, least
from lowbit.search.table import Sensitivity, Site

__all__ = ["Budget", "Free", "infeasible", "limits_of"]

# a site, and the numbers of those of its probes that may be chosen
Free = list[tuple[Site, list[int]]]


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
    # milliseconds of one sample, at most; the table must have been timed
    latency: float | None = None
    # what the evaluated recipe reaches, at least; the smallest such network is looked for
    accuracy: float | None = None

    def __post_init__(self) -> None:
        """Check that every number is positive, and that there is one."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and value > 0 and math.isfinite(value)):
                raise LowbitError(f"{name}={value!r} is not a positive number; None asks nothing")
        if all(value is None for value in values.values()):
            raise LowbitError(f"an empty budget asks for nothing; set one of {', '.join(values)}")


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
        most = _whole(whole / budget.compression)
        resource = Resource(name="compression", limit=most - other, usage=sizes)
        found.append(Limit(resource, lambda v: f"a compression of {_down(whole / (v + other))}"))
    if budget.average_bits is not None:
        weights = sum(site.elements for site, _ in free if site.kind == "weight")
        usage = [
            [float(site.specs[k].bits * site.elements * (site.kind == "weight")) for k in options]
            for site, options in free
        ]
        resource = Resource(name="average_bits", limit=_whole(budget.average_bits * weights), usage=usage)
        found.append(Limit(resource, lambda v: f"{_up(v / max(1, weights))} bits a weight"))
    if budget.bops is not None:
        found.append(Limit(_bops(free, budget.bops), lambda v: f"{v:,.0f} bit operations"))
    if budget.latency is not None:
        rest = table.other_latency or 0.0
        usage = [[site.latency[k] if site.latency else 0.0 for k in options] for site, options in free]
        resource = Resource(name="latency", limit=(budget.latency - rest) * (1 + 1e-9), usage=usage)
        found.append(Limit(resource, lambda v: f"{_up(v + rest)} ms"))
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
    return Resource(name="bops", limit=_whole(limit), usage=usage, products=tuple(products))


def _whole(limit: float) -> float:
    """A limit of something that is counted, so that a budget of exactly what a choice takes admits it."""
    return math.floor(limit * (1 + 1e-12) + 1e-6)


def _down(value: float) -> str:
    """At most four decimals, never more than the value: what may be asked for instead."""
    return f"{math.floor(value * 1e4 + 1e-6) / 1e4:.4f}".rstrip("0").rstrip(".")


def _up(value: float) -> str:
    return _down(-value).removeprefix("-")


def infeasible(limits: Sequence[Limit], groups: list[list[int]]) -> str:
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

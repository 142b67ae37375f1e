"""One spec for each site: what it takes, what it is expected to cost, and the recipe that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lowbit.core.spec import QuantSpec
from lowbit.core.weight_observers import suits
from lowbit.errors import LowbitError
from lowbit.recipe import Recipe, exactly
from lowbit.search.table import KINDS, Sensitivity, Site
from lowbit.tables import text_table

__all__ = ["Allocation", "uniform"]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One spec for each site, what it takes, and what the table expects it to cost."""

    table: Sensitivity
    # by path of the site
    specs: Mapping[str, QuantSpec]
    measure: str
    # sites that were pinned, by path
    pinned: frozenset[str] = frozenset()
    # of the network that the recipe makes; None where nothing was evaluated
    accuracy: float | None = None
    # whether an accuracy that was asked for is reached
    holds: bool = True

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
    def latency(self) -> float | None:
        """Milliseconds of one sample; None for a table that was not timed."""
        if not self.table.timed:
            return None
        chosen = (s.latency[s.specs.index(self.specs[s.path])] for s in self.table if s.latency)
        return (self.table.other_latency or 0.0) + sum(chosen)

    @property
    def bits(self) -> tuple[int, ...]:
        """Of the weights, in the order of the table."""
        return tuple(self.specs[site.path].bits for site in self.table if site.kind == "weight")

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
            observer = rule.weight_observer
            if "weight" in specs and not suits(observer, specs["weight"]):
                observer = "mse"  # as it was measured
            why = "; ".join(f"{kind} {self.reason(site)}" for kind, site in found.items())
            changes = {**specs, "weight_observer": observer, "reason": why or rule.reason}
            rules.append(replace(rule, **changes))  # type: ignore[arg-type]
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
        parts = [
            f"{self.bytes:,} bytes, {self.compression:.2f} times smaller than float32",
            f"{self.average_bits:.2f} bits a weight",
            *([] if self.latency is None else [f"{self.latency:.3g} ms"]),
            f"expected {self.measure} {self.damage:.3g}",
            *([] if self.accuracy is None else [f"measured accuracy {self.accuracy:.4f}"]),
        ]
        end = "" if self.holds else "\nNo recipe that was found holds the accuracy; this is the best."
        return f"{table}\n{'; '.join(parts)}{end}"


def uniform(table: Sensitivity, bits: int, *, measure: str = "noise") -> Allocation:
    """Every site at the same width, to compare with.

    Raises:
        LowbitError: a site was not measured at that width.
    """
    specs = {}
    for site in table:
        found = [spec for spec in site.specs if spec.bits == bits]
        if not found:
            raise LowbitError(f"'{site.name}' was not measured at {bits} bits; add them to bits=...")
        specs[site.path] = found[0]
    return Allocation(table=table, specs=specs, measure=measure)

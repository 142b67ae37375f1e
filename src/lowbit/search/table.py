"""What is known of each quantizer at each width: the table that bits are chosen from. Plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError
from lowbit.files import atomic_path
from lowbit.recipe import Recipe
from lowbit.tables import text_table

__all__ = ["KINDS", "MEASURES", "Probe", "Sensitivity", "Site"]

# what a site is; also the name of the rule's field that decides about it
KINDS = ("weight", "activation")
# what a quantizer at a width costs, in the order of trust; all of them grow with the damage
MEASURES = ("noise", "kl", "loss", "drop", "fisher", "hessian")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One quantizer at one spec, everything else as it is in the reference: means over the samples.

    The reference has in float what the table is about; what else was calibrated is quantized in it.
    """

    spec: QuantSpec
    # KL(float network || probed) of the classes, in nats, less that of the reference
    kl: float
    # noise over signal of the output, 10^(-SQNR / 10), the float network's being the signal; less that of the
    # reference
    noise: float
    # loss minus that of the reference, and metric of the reference minus the metric; None without labels
    loss: float | None = None
    drop: float | None = None
    # 1/2 sum E[g^2] d^2, with g the gradient of the loss of one sample and d the change by rounding
    fisher: float | None = None
    # 1/2 tr(H) / n |d|^2, with H the Hessian of the loss by the n elements of a weight; activations have none
    hessian: float | None = None

    @property
    def sqnr_db(self) -> float:
        """Of the output."""
        return -10 * math.log10(self.noise) if self.noise > 0 else math.inf

    def damage(self, measure: str) -> float:
        """One of `MEASURES`; damage never helps, so that below zero, which is chance, counts as none.

        Where the network gave no number, the damage is infinite.

        Raises:
            LowbitError: it was not measured.
        """
        value = getattr(self, measure)
        if value is None:
            have = [m for m in MEASURES if getattr(self, m) is not None]
            raise LowbitError(f"the table has no '{measure}'; it has {', '.join(have)}")
        return math.inf if math.isnan(value) else max(0.0, float(value))


@dataclass(frozen=True, kw_only=True)
class Site:
    """One quantizer, what depends on its bits, and what was measured."""

    # where it is in the graph
    path: str
    # the layer of a weight, the first reader of an activation
    name: str
    # the operations whose rules decide about it: that layer, or all readers
    operations: tuple[str, ...]
    kind: Literal["weight", "activation"]
    # weight: its elements; activation: those of one sample
    elements: int
    # multiply-accumulates of the calls of a layer, for one sample; 0 for activations
    macs: int
    # the site of the inputs of a layer, or their bits where these are not to be chosen
    inputs: str | int
    # bytes on disk at each spec, in the order of the probes; zeros for activations
    bytes: tuple[int, ...]
    probes: tuple[Probe, ...]
    # milliseconds of the layer exported alone, at each spec; none for activations, and before `timed`
    latency: tuple[float, ...] = ()

    @property
    def specs(self) -> tuple[QuantSpec, ...]:
        return tuple(probe.spec for probe in self.probes)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The table, and the network that it was measured on."""

    sites: tuple[Site, ...]
    # sites, by path, that must have the same bits
    groups: tuple[tuple[str, ...], ...]
    samples: int
    # of the reference; None without labels
    loss: float | None
    metric: float | None
    # what the model was prepared with, a rule for each operation
    recipe: Recipe
    # bytes of what is not to be chosen: biases, layers left alone
    other_bytes: int
    # the same network in float32
    float_bytes: int
    # milliseconds of the whole network less those of its layers, alone; None before `timed`
    other_latency: float | None = None

    @property
    def timed(self) -> bool:
        """Whether the kernels were timed in the runtime."""
        return self.other_latency is not None

    def site(self, path: str) -> Site:
        """The site of that path, or of that layer's weight.

        Raises:
            LowbitError: there is none.
        """
        for site in self.sites:
            if path == site.path or (site.kind == "weight" and path == site.name):
                return site
        names = ", ".join(site.name for site in self.sites if site.kind == "weight")
        raise LowbitError(f"the table has no '{path}'; it has the weights of {names}")

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __str__(self) -> str:
        rows = []
        for site in self.sites:
            for k, probe in enumerate(site.probes):
                name = f"{site.name}{'' if site.kind == 'weight' else ', its inputs'}" if k == 0 else ""
                sqnr = f"{probe.sqnr_db:.1f}"
                values = [_shown(getattr(probe, m)) for m in ("loss", "drop", "kl", "fisher", "hessian")]
                rows.append((name, str(probe.spec), *values, sqnr))
        header = ("quantizer", "spec", "loss +", "accuracy -", "KL", "Fisher", "Hessian", "SQNR dB")
        keep = [c for c in range(len(header)) if any(row[c] for row in rows)]
        table = text_table([header[c] for c in keep], [[row[c] for c in keep] for row in rows])
        return f"{table}\none quantizer at a time, the others in float; {self.samples} samples"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `from_dict`."""
        data = asdict(replace(self, recipe=None)) | {"recipe": self.recipe.to_dict()}  # type: ignore[arg-type]
        for site, plain in zip(self.sites, data["sites"], strict=True):
            for probe, row in zip(site.probes, plain["probes"], strict=True):
                row["spec"] = probe.spec.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Inverse of `to_dict`.

        Raises:
            LowbitError: the data is not a table.
        """
        try:
            sites = []
            for plain in data["sites"]:
                probes = tuple(
                    Probe(**{**row, "spec": QuantSpec.from_dict(row["spec"])}) for row in plain["probes"]
                )
                lists = {name: tuple(plain[name]) for name in ("bytes", "operations", "latency")}
                sites.append(Site(**{**plain, **lists, "probes": probes}))
            rest = {f.name: data[f.name] for f in fields(cls)}
            rest |= {"sites": tuple(sites), "groups": tuple(tuple(g) for g in data["groups"])}
            return cls(**rest | {"recipe": Recipe.from_dict(data["recipe"])})
        except (LookupError, TypeError) as error:
            raise LowbitError(f"not a table of sensitivities: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` reads."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            LowbitError: there is no such file, or it is none.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LowbitError(f"'{path}' cannot be read as a table of sensitivities: {error}") from None
        return cls.from_dict(data)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

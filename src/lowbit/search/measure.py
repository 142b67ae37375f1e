"""What each quantizer costs at each width: one at a time, the others in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import distributed
from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError
from lowbit.files import digest
from lowbit.graph.inputs import Inputs
from lowbit.model import QuantizedModel
from lowbit.progress import track
from lowbit.search.curvature import Found, fisher_of, hessian_of
from lowbit.search.journal import Journal, Key, named
from lowbit.search.prober import Prober, Sums
from lowbit.search.sites import (
    Candidate,
    Place,
    candidates_of,
    groups_of,
    other_bytes,
    places_of,
    resolved,
    sites_of,
)
from lowbit.search.table import KINDS, Probe, Sensitivity
from lowbit.training.batches import Batch, split
from lowbit.training.losses import Objective
from lowbit.training.settings import Settings

__all__ = ["prober_of", "sensitivity"]


def sensitivity(
    q: QuantizedModel,
    data: Any,
    *,
    bits: Sequence[Candidate] = (8, 6, 4, 3, 2),
    kinds: Sequence[str] = KINDS,
    loss: str | Callable[[Any, Any], Any] = "cross_entropy",
    metric: str | Callable[[Any, Any], Any] = "accuracy",
    class_axis: int = 1,
    num_batches: int | None = None,
    curvature: bool = True,
    memory: int = 1 << 30,
    seed: int = 0,
    out: str | Path | None = None,
) -> Sensitivity:
    """Measure every quantizer at every candidate, one at a time, the others in float.

    A layer is probed where the graph reaches it: what comes before it was run once, and is held within
    `memory` bytes; data that needs more is gone through in parts. The model is left as it was.

    Args:
        q: from `lowbit.prepare`. Quantizers that are not asked for stay as they are: after `lowbit.calibrate`
            and with kinds=("weight",), say, activations are quantized throughout.
        data: batches (inputs, labels) or dicts, as for training; without labels there is neither loss nor
            metric.
        bits: widths, each a change of the recipe's spec; weights may be given QuantSpecs too.
        kinds: "weight", "activation", or both.
        loss, metric: as for the Trainer.
        class_axis: axis of the logits that runs over classes.
        num_batches: how many batches to use; all by default.
        curvature: Fisher information and Hessian trace too, which cost little; they need labels.
        memory: bytes of activations to hold; outputs, and what corrections are fitted on, come on top.
        seed: of the Hessian's random vectors.
        out: folder for `probes.jsonl`, in which every finished probe is; what is there is not measured again.

    Under `torchrun` the ranks share the places out among them, and all return the same table.

    Raises:
        LowbitError: no candidates, a frozen model, data without a batch, a metric that is no number, or a
            folder with probes of another model or other data.
    """
    distributed.join()
    for kind in kinds:
        if kind not in KINDS:
            raise LowbitError(f"kinds={tuple(kinds)!r}: '{kind}' is unknown; use {' and '.join(KINDS)}")
    places = places_of(q, kinds)
    wanted = [candidates_of(place, bits) for place in places]
    prober = prober_of(q, places, data, loss, metric, class_axis, num_batches)
    parts = prober.parts(memory)
    names = {"loss": loss, "metric": metric, "class_axis": class_axis, "kinds": sorted(kinds)}
    identity = {} if out is None else _identity(prober, parts, names)
    journal = Journal(None if out is None else Path(out), identity)
    try:
        reference = _reference(prober, parts)
        _probe(prober, wanted, parts, journal)
    finally:
        journal.close()
    asked = curvature and prober.labelled
    cheap = (fisher_of(prober, wanted), hessian_of(prober, wanted, seed)) if asked else ({}, {})
    return _table(prober, wanted, parts, journal, reference, *cheap)


def prober_of(
    q: QuantizedModel,
    places: Sequence[Place],
    data: Any,
    loss: Any = "cross_entropy",
    metric: Any = "accuracy",
    class_axis: int = 1,
    num_batches: int | None = None,
) -> Prober:
    """The places with their data at hand.

    Raises:
        LowbitError: the data holds no batch with a sample.
    """
    settings = Settings(loss=loss, metric=metric, class_axis=class_axis)
    device = next(q.parameters()).device
    if isinstance(data, (Tensor, dict)):
        data = [data]
    batches: list[Batch] = []
    for i, item in enumerate(data):
        if i == num_batches:
            break
        batch = split(item, tuple(q.example.kwargs))
        if batch.samples:
            batches.append(batch.to(device, channels_last=True))
    if not batches:
        raise LowbitError("the data holds no batch with a sample; pass at least one")
    return Prober(q, places, batches, Objective(settings, has_teacher=False))


def _identity(prober: Prober, parts: list[list[int]], names: dict[str, Any]) -> dict[str, Any]:
    """What two runs must share for their probes to be of one table."""
    return {
        "format": 1,
        "model": digest(prober.q.state_dict().values()),
        "data": digest(t for batch in prober.batches for t in _tensors((batch.inputs, batch.labels))),
        "parts": parts,
        "recipe": prober.q.recipe.to_dict(),
        **{name: value if isinstance(value, (int, list)) else named(value) for name, value in names.items()},
    }


def _tensors(value: Any) -> Iterator[Tensor]:
    """All of them, wherever they are in it; the names of dicts count too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Inputs):
        yield from _tensors((value.args, dict(value.kwargs)))
    elif isinstance(value, dict):
        for name in sorted(value):
            yield torch.tensor(list(str(name).encode()))
            yield from _tensors(value[name])
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _reference(prober: Prober, parts: list[list[int]]) -> Sums:
    total = Sums()
    with prober.quantizing({}):
        for part in parts:
            total += prober.measure(part, prober.cursor(part).behind())
    return total


def _probe(prober: Prober, wanted: list[list[QuantSpec]], parts: list[list[int]], journal: Journal) -> None:
    """Measure what the journal does not have, this rank's share of the places; then share the results."""
    places = list(prober.places.values())
    todo: list[Key] = []
    for number in range(len(parts)):
        for k, (place, specs) in enumerate(zip(places, wanted, strict=True)):
            if k % distributed.world() == distributed.rank():
                keys = ((number, place.path, spec) for spec in specs)
                todo += [key for key in keys if key not in journal.known]
    with prober.quantizing({}):
        cursor, at = None, -1
        for key in track(todo, "probing", total=len(todo)):
            number, path, spec = key
            if cursor is None or number != at:
                cursor, at = prober.cursor(parts[number]), number
            cursor.advance(prober.places[path].node)
            prober.set(path, spec)
            journal.add(key, prober.measure(parts[number], cursor.behind()))
            prober.set(path, None)
    _share(journal, places, wanted, len(parts))


def _share(journal: Journal, places: list[Place], wanted: list[list[QuantSpec]], parts: int) -> None:
    """Give every rank the probes of all."""
    if distributed.world() == 1:
        return
    keys = [
        (n, p.path, s) for n in range(parts) for p, specs in zip(places, wanted, strict=True) for s in specs
    ]
    mine = {str(i): list(vars(journal.known[k]).values()) for i, k in enumerate(keys) if k in journal.known}
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in mine.items()}
    for found in distributed.together(tensors):
        for name, values in found.items():
            journal.known.setdefault(keys[int(name)], Sums(*values.tolist()))


def _table(
    prober: Prober,
    wanted: list[list[QuantSpec]],
    parts: list[list[int]],
    journal: Journal,
    reference: Sums,
    fisher: Found,
    hessian: Found,
) -> Sensitivity:
    places, n = list(prober.places.values()), reference.samples
    rows = []
    for place, specs, site in zip(places, wanted, sites_of(prober.q, places), strict=True):
        probes = []
        for spec in specs:
            sums = sum((journal.known[number, place.path, spec] for number in range(len(parts))), Sums())
            probe = Probe(
                spec=spec,
                kl=(sums.kl - reference.kl) / n,
                noise=(sums.noise - reference.noise) / sums.signal if sums.signal else 0.0,
                loss=(sums.loss - reference.loss) / n if prober.labelled else None,
                drop=(reference.metric - sums.metric) / n if prober.labelled else None,
                fisher=fisher.get((place.path, spec)),
                hessian=hessian.get((place.path, spec)),
            )
            probes.append(probe)
        rows.append(replace(site, probes=tuple(probes), bytes=tuple(place.bytes(spec) for spec in specs)))
    other, whole = other_bytes(prober.q, places)
    return Sensitivity(
        sites=tuple(rows),
        groups=tuple(tuple(p.path for p in group) for group in groups_of(prober.q, places)),
        samples=int(n),
        recipe=resolved(prober.q),
        loss=reference.loss / n if prober.labelled else None,
        metric=reference.metric / n if prober.labelled else None,
        other_bytes=other,
        float_bytes=whole,
    )

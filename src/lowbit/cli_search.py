"""`lowbit search`: bits for a budget, measured, solved, checked; the answer is a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import lowbit
from lowbit import cli_inputs, distributed
from lowbit.cli_accuracy import accuracy_on, check_labels
from lowbit.cli_options import BatchSize, Data, Json, Model, NumBatches, OptionalData, Weights
from lowbit.cli_output import Answer, answering
from lowbit.errors import LowbitError, near_miss
from lowbit.latency import timed
from lowbit.model import QuantizedModel
from lowbit.search import Allocation, Budget, allocate, repair, sensitivity
from lowbit.search.measure import prober_of
from lowbit.search.repair import MEASURED
from lowbit.search.sites import places_of
from lowbit.search.table import KINDS, MEASURES
from lowbit.training.batches import split

__all__ = ["search"]

# activations are calibrated, and recipes evaluated, on so many batches of the data
CALIBRATION = 8
MinAccuracy = Annotated[
    str | None,
    typer.Option(
        metavar="0.92|0.98x", help="smallest network with that accuracy, or part of the float one's"
    ),
]
Pins = Annotated[
    list[str] | None, typer.Option(metavar="LAYER=BITS", help="settle a layer; may be given again")
]


def search(
    model: Model,
    data: Data,
    val: OptionalData = None,
    compression: Annotated[float | None, typer.Option(help="float32 bytes over bytes, at least")] = None,
    max_bytes: Annotated[int | None, typer.Option("--bytes", help="bytes on disk, at most")] = None,
    average_bits: Annotated[float | None, typer.Option(help="bits a weight, at most")] = None,
    bops: Annotated[float | None, typer.Option(help="bit operations a sample, at most")] = None,
    latency: Annotated[float | None, typer.Option(help="milliseconds a sample, at most; timed here")] = None,
    min_accuracy: MinAccuracy = None,
    recipe: Annotated[str, typer.Option(help="preset or YAML file whose bits are chosen anew")] = "w8a8",
    bits: Annotated[str, typer.Option(metavar="8,6,4,3,2", help="widths to choose from")] = "8,6,4,3,2",
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="activations keep the recipe's bits")
    ] = False,
    measure: Annotated[
        str, typer.Option(help="damage to add up: kl, loss, drop, noise, fisher, hessian")
    ] = "noise",
    pin: Pins = None,
    no_repair: Annotated[
        bool, typer.Option("--no-repair", help="leave the answer as the table gives it")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for all files")] = Path("out/search"),
    weights: Weights = None,
    num_batches: NumBatches = None,
    batch_size: BatchSize = None,
    as_json: Json = False,
) -> None:
    """Choose the bits of every layer for a budget; stopped, the same command goes on where it was.

    DIR gets probes.jsonl (every finished probe), table.json, and recipe.yaml, which `lowbit quantize` and
    `lowbit train` take.
    """
    distributed.join()
    limits = {"compression": compression, "bytes": max_bytes, "average_bits": average_bits, "bops": bops}
    asked: dict[str, Any] = limits | {"latency": latency}
    _check(asked | {"accuracy": min_accuracy}, measure, weights_only)
    with answering(as_json, silent=distributed.rank() > 0) as answer:
        task = _Task.of(model, weights, data, val, batch_size, num_batches, recipe)
        pins = dict(map(_pin, pin or ()))
        budget = Budget(**asked, accuracy=None if min_accuracy is None else _floor(min_accuracy, task))
        kinds = KINDS[:1] if weights_only else KINDS
        q = task.prepared(weights_only)
        _check_pins(pins, q, kinds)
        curvature = measure in ("fisher", "hessian")
        table = sensitivity(q, task.data, bits=_widths(bits), kinds=kinds, out=out, curvature=curvature)
        table = table if latency is None else timed(table, task.model, task.calibration[0])
        if distributed.rank() == 0:
            table.save(out / "table.json")
        answer.say(f"{table}\n")
        found = allocate(table, budget, measure=measure, pins=pins, evaluate=task.evaluate)
        if not no_repair and measure not in MEASURED:
            answer.say(f"repair: left out, for no run of the network measures '{measure}'\n")
        elif not no_repair:
            found = _repaired(task, q, kinds, found, budget, pins, answer)
        _tell(task, found, out, answer)
    if not found.holds:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Task:
    """The float model, its recipe, the data to measure on, and that to judge on."""

    model: nn.Module
    recipe: lowbit.Recipe
    data: list[Any]
    val: Iterable[Any]
    val_name: str

    @classmethod
    def of(
        cls,
        model: str,
        weights: str | None,
        data: str,
        val: str | None,
        batch_size: int | None,
        num_batches: int | None,
        recipe: str,
    ) -> _Task:
        network = cli_inputs.load_model(model, weights)
        batches = list(cli_inputs.load_data(data, batch_size, num_batches))[:num_batches]
        if not batches:
            raise LowbitError("--data holds no batch; give at least one (1,000 samples are wise)")
        held = None if val is None else cli_inputs.load_data(val, option="--val")
        for option, found in (("--data", batches), ("--val", held)):
            if found is not None:
                check_labels(found, option)
        name = "the data that was searched on, for there is no --val" if held is None else "validation data"
        return cls(network, lowbit.Recipe.get(recipe), batches, batches if held is None else held, name)

    def prepared(self, weights_only: bool) -> QuantizedModel:
        """Ready to be measured: with BatchNorm folded where it will be, for that is faster and the same."""
        early = "before" if self.recipe.fold_bn == "after" else self.recipe.fold_bn
        recipe = replace(self.recipe, fold_bn=early, equalize=False)
        q = lowbit.prepare(self.model, recipe, self.calibration[0])
        if weights_only and recipe.calibrates:
            lowbit.calibrate(q, self.calibration)
        return q

    @property
    def calibration(self) -> list[Any]:
        """Inputs alone."""
        return [split(batch).inputs for batch in self.data[:CALIBRATION]]

    def final(self, recipe: lowbit.Recipe) -> lowbit.Recipe:
        """A recipe that was found, with what was set aside for measuring."""
        return replace(recipe, fold_bn=self.recipe.fold_bn, equalize=self.recipe.equalize)

    def evaluate(self, recipe: lowbit.Recipe) -> float:
        """Accuracy after post-training quantization by a recipe."""
        return self.accuracy(lowbit.quantize(self.model, self.final(recipe), self.calibration))

    def accuracy(self, model: nn.Module) -> float:
        """Share of the judging data that is put in its class."""
        return accuracy_on(model, self.val, "accuracy")[0]


def _repaired(
    task: _Task,
    q: QuantizedModel,
    kinds: tuple[str, ...],
    start: Allocation,
    budget: Budget,
    pins: dict[str, int],
    answer: Answer,
) -> Allocation:
    """The answer after true evaluations, where it is more accurate."""
    prober = prober_of(q, places_of(q, kinds), task.data)
    found = repair(prober, start, budget, pins=pins, evaluate=task.evaluate)
    answer.say(f"repair: {found}\n")
    answer.record["repair"] = {"damage": found.damage, "changes": found.changes}
    return found.allocation


def _tell(task: _Task, found: Allocation, out: Path, answer: Answer) -> None:
    whole = task.accuracy(task.model)
    recipe = task.final(found.recipe)
    if distributed.rank() == 0:
        recipe.save(out / "recipe.yaml")
    answer.say(found)
    answer.say(f"float accuracy {whole:.4f}; both on {task.val_name}\nrecipe: {out / 'recipe.yaml'}")
    answer.record |= {
        "accuracy": found.accuracy,
        "float_accuracy": whole,
        "holds": found.holds,
        "bytes": found.bytes,
        "float_bytes": found.table.float_bytes,
        "compression": found.compression,
        "average_bits": found.average_bits,
        "bops": found.bops,
        "latency_ms": found.latency,
        "recipe": recipe.to_dict(),
        "file": out / "recipe.yaml",
        "bits": {site.path: found.specs[site.path].bits for site in found.table},
    }


def _widths(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise LowbitError(f"--bits '{text}' is not a list of numbers such as 8,6,4,3,2")
    return tuple(int(part) for part in parts)


def _pin(text: str) -> tuple[str, int]:
    name, equals, bits = text.rpartition("=")
    if not equals or not name or not bits.isdecimal():
        raise LowbitError(f"--pin '{text}' is not of the form LAYER=BITS, such as conv1=8")
    return name, int(bits)


def _check(asked: dict[str, Any], measure: str, weights_only: bool) -> None:
    """What can be wrong before anything is loaded."""
    if all(value is None for value in asked.values()):
        raise LowbitError(
            "a search needs a budget; give --compression, --bytes, --average-bits, --bops, --latency or "
            "--min-accuracy"
        )
    if measure not in MEASURES:
        raise LowbitError(f"--measure '{measure}' is unknown{near_miss(measure, MEASURES)}")
    if measure == "hessian" and not weights_only:
        raise LowbitError("--measure hessian knows weights alone; add --weights-only")


def _check_pins(pins: dict[str, int], q: QuantizedModel, kinds: tuple[str, ...]) -> None:
    """Before hours of measuring, not after."""
    names = {name for p in places_of(q, kinds) for name in (p.path, p.name if p.kind == "weight" else p.path)}
    for name in pins:
        if name not in names:
            raise LowbitError(f"--pin '{name}': no layer has that name{near_miss(name, names)}")


def _floor(text: str, task: _Task) -> float:
    found = re.fullmatch(r"(\d*\.?\d+)(x?)", text)
    if found is None or not 0 < float(found[1]) <= 1:
        raise LowbitError(f"--min-accuracy '{text}' is neither a share such as 0.92 nor a part such as 0.98x")
    return float(found[1]) * (task.accuracy(task.model) if found[2] else 1.0)

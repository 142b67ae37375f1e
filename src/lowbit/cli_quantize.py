"""`lowbit quantize`: one recipe, or the first of a ladder of recipes that keeps the accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Annotated, Any

import typer
from torch import nn

import lowbit
from lowbit import cli_inputs
from lowbit.cli_accuracy import accuracy_on, check_labels
from lowbit.cli_options import (
    DATA_HELP,
    AlsoOnnx,
    BatchSize,
    Json,
    Model,
    NumBatches,
    OptionalData,
    Output,
    Resume,
    Shape,
    Weights,
)
from lowbit.cli_output import Answer, answering
from lowbit.errors import LowbitError
from lowbit.ladder import BITS, MAX_DROP
from lowbit.model import QuantizedModel
from lowbit.tables import text_table
from lowbit.training.batches import split

__all__ = ["quantize"]

AUTO = "auto"


def quantize(
    model: Model,
    output: Output,
    recipe: Annotated[
        str,
        typer.Option(help="preset (w8a8, w4, w1, ternary, ...), YAML file, or auto: the first that holds"),
    ] = "w8a8",
    data: OptionalData = None,
    val: Annotated[
        str | None, typer.Option(metavar="DATA", help=f"of auto, to measure accuracy on: {DATA_HELP}")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help=f"of auto: points of accuracy that may be lost [{MAX_DROP}]")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help=f"of auto: bits of weights, but for a few layers [{BITS}]")
    ] = None,
    weights: Weights = None,
    onnx: AlsoOnnx = None,
    num_batches: NumBatches = None,
    batch_size: BatchSize = None,
    input_shape: Shape = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Calibrate and quantize a model; a recipe for weights alone takes --input-shape instead of --data.

    With --recipe auto recipes are tried from the cheapest to the dearest, and the first is taken that loses
    no more accuracy than allowed on --val, or on --data where there is none; exit code 1 where none holds.
    """
    _check_asked(recipe, {"--val": val, "--max-drop": max_drop, "--bits": bits}, resume)
    with answering(as_json) as answer:
        targets = [cli_inputs.writable(p, name) for p, name in ((output, "-o"), (onnx, "--onnx")) if p]
        answer.record["model"], holds = model, True
        if recipe == AUTO:
            network = cli_inputs.load_model(model, weights)
            drop, width = (MAX_DROP if max_drop is None else max_drop), (BITS if bits is None else bits)
            ladder = _Ladder.of(data, val, batch_size, num_batches)
            q, holds = ladder.climb(network, drop, width, answer)
        else:
            chosen = lowbit.Recipe.get(recipe)
            network = cli_inputs.load_model(model, weights)
            batches = cli_inputs.calibration(chosen, data, input_shape, batch_size, num_batches)
            _show_plan(answer, network, chosen, next(iter(batches), None))
            calibration = {"calibration": batches} if data else {"example_inputs": batches[0]}
            q = lowbit.quantize(network, chosen, num_batches=num_batches, out=resume, **calibration)
        _tell(q, answer)
        lowbit.save(q, output)
        if onnx:
            lowbit.export.onnx(q, onnx)
        sizes = {str(path): path.stat().st_size for path in targets}
        answer.say(f"\nweights in float32: {q.cost().float_bytes:,} bytes")
        for path, size in sizes.items():
            answer.say(f"{path}: {size:,} bytes")
        answer.record["files"] = sizes
    if not holds:
        raise typer.Exit(1)


def _check_asked(recipe: str, for_auto: dict[str, Any], resume: Any) -> None:
    """Raise LowbitError for an option that goes with other recipes."""
    stray = next((name for name, value in for_auto.items() if value is not None), None)
    if recipe != AUTO and stray is not None:
        raise LowbitError(f"{stray} is for --recipe auto, and the recipe is '{recipe}'; leave it out")
    if recipe == AUTO and resume is not None:
        raise LowbitError("--resume keeps the layers of one recipe, and auto tries several; leave it out")


def _tell(q: QuantizedModel, answer: Answer) -> None:
    """What was done, and what became of each layer."""
    coverage = q.coverage()
    for step in q.steps:
        answer.say("\n".join(map(str, (step, *step.layers))))
    answer.say(f"\n{coverage}")
    answer.record |= {"recipe": q.recipe.to_dict(), "steps": [asdict(s) for s in q.steps]}
    answer.record |= {"coverage": asdict(coverage), "float_bytes": q.cost().float_bytes}


@dataclass(frozen=True)
class _Ladder:
    """What recipes are tried with."""

    calibration: list[Any]
    # where accuracy is measured, and what that is
    judged: Iterable[Any]
    judged_name: str

    @classmethod
    def of(
        cls, data: str | None, val: str | None, batch_size: int | None, num_batches: int | None
    ) -> _Ladder:
        if data is None:
            raise LowbitError(
                "--recipe auto compares recipes on your data; give --data, and --val with labels"
            )
        batches = list(islice(cli_inputs.load_data(data, batch_size, num_batches), num_batches))
        held = batches if val is None else cli_inputs.load_data(val, option="--val")
        check_labels(held, "--data, for there is no --val," if val is None else "--val")
        name = "the calibration data, for there is no --val" if val is None else "validation data"
        return cls([split(batch).inputs for batch in batches], held, name)

    def climb(
        self, model: nn.Module, max_drop: float, bits: int, answer: Answer
    ) -> tuple[QuantizedModel, bool]:
        """The first recipe that holds, or else the best, and whether it holds."""
        values: list[float] = []

        def percent(network: nn.Module) -> float:
            share, _ = accuracy_on(network, self.judged, "accuracy")
            values.append(100 * share)
            return values[-1]

        q = lowbit.quantize(model, AUTO, self.calibration, metric=percent, max_drop=max_drop, bits=bits)
        whole, *found = values
        texts = (step.text.rpartition(":")[0] for step in q.steps if step.name == AUTO)
        rungs = [
            {"rung": text, "accuracy": value, "holds": value >= whole - max_drop}
            for text, value in zip(texts, found, strict=False)
        ]
        answer.say(
            f"float accuracy {whole:.2f} %, of which {max_drop:g} points may go; on {self.judged_name}"
        )
        answer.record |= {"float_accuracy": whole, "accuracy": max(found), "measured_on": self.judged_name}
        answer.record |= {"max_drop": max_drop, "ladder": rungs}
        return q, bool(rungs[-1]["holds"])


def _show_plan(answer: Answer, model: nn.Module, recipe: lowbit.Recipe, example: Any) -> None:
    """The resolved table: what the recipe says of each operation, before any work."""
    from lowbit.assembly import float_graph
    from lowbit.graph.trace import Inputs
    from lowbit.passes.place import resolve

    if example is None:
        raise LowbitError("--data holds no batch; give at least one (100 samples or more are wise)")
    graph, _ = float_graph(model, replace(recipe, equalize=False), Inputs.of(example))
    header = ("layer", "operation", "weight", "activation", "why")
    rows = [(d.name, d.op, _spec(d.weight), _spec(d.activation), d.why) for d in resolve(graph, recipe)]
    answer.say(f"{text_table(header, rows)}\n")
    answer.record["plan"] = [dict(zip(header, row, strict=True)) for row in rows]


def _spec(spec: lowbit.QuantSpec | None) -> str:
    return "float" if spec is None else str(spec)

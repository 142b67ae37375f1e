"""`lowbit tensorize`: factors in place of dense weights, quantized, in one checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

import lowbit
from lowbit import cli_inputs
from lowbit.cli_options import (
    AlsoOnnx,
    BatchSize,
    Json,
    Model,
    NumBatches,
    OptionalData,
    Output,
    Shape,
    Weights,
)
from lowbit.cli_output import answering
from lowbit.errors import LowbitError, near_miss
from lowbit.tensor_networks import Budget, Energy, Error, Fixed, TensorRule, Vbmf, reduce_ranks
from lowbit.tensor_networks import tensorize as tensorized
from lowbit.tensor_networks.accounting import account

__all__ = ["tensorize"]

RULE_HELP = (
    "what becomes of matching layers: fc*=tt:rank=16, layer3.*=tucker:energy=0.9, fc=svd:share=0.3, "
    "conv1=keep; may be given again, the first that matches wins"
)
Rules = Annotated[
    list[str] | None, typer.Option("--rule", metavar="LAYERS=KIND[:OPTION=VALUE,...]", help=RULE_HELP)
]


def tensorize(
    model: Model,
    output: Output,
    rule: Rules = None,
    recipe: Annotated[str, typer.Option(help="preset (w8a8, w4, ...) or YAML file for the factors")] = "w8a8",
    bits: Annotated[
        int | None, typer.Option(min=1, max=8, help="bits of all weights, instead of a recipe")
    ] = None,
    reduce: Annotated[
        float | None, typer.Option(help="then drop ranks below so many times the noise of rounding")
    ] = None,
    data: OptionalData = None,
    weights: Weights = None,
    onnx: AlsoOnnx = None,
    num_batches: NumBatches = None,
    batch_size: BatchSize = None,
    input_shape: Shape = None,
    as_json: Json = False,
) -> None:
    """Replace large weights by tensor networks and quantize these; `lowbit export` reads the file."""
    rules = [_rule(text) for text in rule or ()]
    if not rules:
        raise LowbitError("no --rule says what to do; give one, such as --rule 'type:Linear=tt:rank=16'")
    with answering(as_json) as answer:
        chosen = lowbit.Recipe.get(recipe if bits is None else f"w{bits}")
        targets = [cli_inputs.writable(p, name) for p, name in ((output, "-o"), (onnx, "--onnx")) if p]
        network = cli_inputs.load_model(model, weights)
        batches = cli_inputs.calibration(chosen, data, input_shape, batch_size, num_batches)
        found = tensorized(network, rules, next(iter(batches), None))
        answer.say(f"{found}\n")
        small = found.model
        if reduce is not None:
            reduced = reduce_ranks(small, chosen, batches, reduce, num_batches=num_batches)
            answer.say(f"{reduced}\n")
            small = reduced.model
            answer.record["reduced"] = [asdict(row) for row in reduced.rows]
        given = {"calibration": batches} if data else {"example_inputs": batches[0]}
        q = lowbit.quantize(small, chosen, num_batches=num_batches, **given)
        for step in q.steps:
            answer.say(step)
        table = account(network, small, q)
        answer.say(f"\n{table}")
        lowbit.save(q, output)
        if onnx:
            lowbit.export.onnx(q, onnx)
        dense = sum(t.nbytes for t in network.state_dict().values())
        sizes = {str(path): path.stat().st_size for path in targets}
        answer.say(f"\nthe dense network in float32: {dense:,} bytes")
        for path, size in sizes.items():
            answer.say(f"{path}: {size:,} bytes")
        answer.record |= {
            "layers": [asdict(row) for row in found.rows],
            "dense_float_bytes": dense,
            "files": sizes,
        }
        answer.record["networks"] = [
            {**asdict(row), "compression": row.compression, "advice": row.advice} for row in table.rows
        ]
        answer.record["steps"] = [asdict(step) for step in q.steps]


def _rule(text: str) -> TensorRule:
    """LAYERS=KIND[:OPTION=VALUE,...]; the pattern may hold colons, the kind does not."""
    found = re.fullmatch(r"(.+?)=([a-z]*)(?::(.*))?", text)
    if found is None:
        raise LowbitError(
            f"--rule '{text}' is not of the form LAYERS=KIND:OPTION=VALUE, such as fc*=tt:rank=16"
        )
    rule = TensorRule(match=found[1], kind=found[2])
    for part in filter(None, (found[3] or "").split(",")):
        name, _, value = part.partition("=")
        if name not in _OPTIONS:
            raise LowbitError(f"--rule '{text}' has no option '{name}'{near_miss(name, _OPTIONS)}")
        try:
            rule = replace(rule, **_OPTIONS[name](value))
        except ValueError as error:
            why = str(error) if isinstance(error, LowbitError) else f"'{value}' is not what {name} takes"
            raise LowbitError(f"--rule '{text}': {why}") from None
    return rule


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def _ranks(text: str) -> dict[str, Any]:
    ranks = _numbers(text)
    return {"rank": Fixed(ranks[0] if len(ranks) == 1 else ranks)}


_OPTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "rank": _ranks,
    "energy": lambda text: {"rank": Energy(float(text))},
    "error": lambda text: {"rank": Error(float(text))},
    "share": lambda text: {"rank": Budget(float(text))},
    "vbmf": lambda _: {"rank": Vbmf()},
    "cores": lambda text: {"cores": int(text)},
    "modes": lambda text: dict(zip(("out_modes", "in_modes"), map(_numbers, text.split("/")), strict=True)),
}

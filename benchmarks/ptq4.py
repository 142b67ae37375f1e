"""Three and four bits without training: rounding by GPTQ beside rounding to the nearest, on CIFAR-10.

512 calibration images, first and last layer in 8 bits, scored on the 10,000 test images: top-1, agreement
with the float network and SQNR of the logits. "gptq" is the default of the recipes; "nearest" has none of it,
"scale+BC" fits scale and bias of each output channel instead, "adaround" learns the rounding of each layer,
"brecq" that of each residual block with the scales of its activations. Part cost: processor time in plain
forward passes over the calibration images, and memory beyond one. Part auto: the ladder of
`quantize(model, "auto")`.

    python benchmarks/ptq4.py --data ../shared/data
    python benchmarks/ptq4.py --data ../shared/data --parts cost auto
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import cifar
import lowbit
from common import Claim, Table, arguments, progress, run_parts
from lowbit.demo import load_images, load_network
from measure import interleave, peak_bytes
from networks import CIFAR, load_cifar

RECIPES = ("w4a8", "w4a4", "w3a8")
METHODS: dict[str, tuple[str, ...]] = {
    "nearest": (),
    "scale+BC": ("affine_correct",),
    "gptq": ("gptq",),
    "adaround": ("adaround",),
    "brecq": ("brecq",),
    "gptq+brecq": ("gptq", "brecq"),
}
DEFAULT_METHODS = ("nearest", "scale+BC", "gptq", "brecq")
# top-1, agreement and SQNR that the default reaches
FLOORS = {"w4a8": (92.70, 98.2, 21.0), "w4a4": (91.2, 94.0, 12.5), "w3a8": (91.8, None, None)}
# forward passes, and MB beyond one
COST = {"gptq": 15.0, "brecq": 150.0}
MEMORY = 300.0
# points that "auto" may lose, and seconds that it may take
MAX_DROP, SECONDS = 0.3, 300.0
Found = tuple[list[Table], list[Claim]]


def quantize(model: nn.Module, batches: list[Tensor], recipe: str, method: str) -> nn.Module:
    """By one recipe, its rounding replaced by one of METHODS."""
    chosen = replace(lowbit.preset(recipe), refine=METHODS[method])
    return lowbit.quantize(model, chosen, calibration=batches)


def accuracy(options: Namespace) -> Found:
    """Every method at every width, for each network."""
    tables, claims = [], []
    for name in options.networks:
        test, model = cifar.load_images(options.data, "test", name), load_cifar(name, options.data)
        batches = cifar.calibration_batches(options.data, name, options.calibration)
        reference = cifar.logits(model, test.x)
        table = Table(
            title=name,
            columns=("recipe", "rounding", "top-1", "agreement", "sqnr dB", "seconds"),
            formats={"top-1": ".2f", "agreement": ".2f", "sqnr dB": ".1f", "seconds": ".0f"},
        )
        table.add(recipe="float", **{"top-1": cifar.accuracy(reference, test.y)})
        for recipe in RECIPES:
            for method in options.methods:
                progress(f"{name}, {recipe}, {method}")
                start = time.perf_counter()
                q = quantize(model, batches, recipe, method)
                seconds = time.perf_counter() - start
                found = cifar.score(cifar.logits(q, test.x), reference, test.y)
                scores = {"top-1": found.top1, "agreement": found.agreement, "sqnr dB": found.sqnr}
                table.add(recipe=recipe, rounding=method, seconds=seconds, **scores)
                if name == "resnet20-B" and method == "gptq":
                    claims += [
                        Claim(claim=f"{name} {recipe} {metric}", measured=scores[metric], bound=bound)
                        for metric, bound in zip(scores, FLOORS[recipe], strict=True)
                        if bound is not None
                    ]
        tables.append(table)
    return tables, claims


def cost(options: Namespace) -> Found:
    """Processor time and memory of the whole call, on ResNet-20."""
    name = "resnet20-B"
    model = load_cifar(name, options.data)
    batches = cifar.calibration_batches(options.data, name, options.calibration)
    table = Table(
        title=f"{name}, W4A4, {options.calibration} images",
        columns=("rounding", "forward passes", "extra MB"),
        formats={"forward passes": ".1f", "extra MB": ".0f"},
    )
    plain = partial(forward, model, batches)
    runs = {method: partial(quantize, model, batches, "w4a4", method) for method in options.methods}
    before = peak_bytes(plain)
    memory = {method: (peak_bytes(run) - before) / 2**20 for method, run in runs.items()}
    times = interleave({"plain": plain, **runs}, rounds=options.rounds, warmup=0)
    claims = []
    for method in runs:
        passes = times[method].cpu
        table.add(rounding=method, **{"forward passes": passes, "extra MB": memory[method]})
        if method in COST:
            text = f"{method}, forward passes"
            claims.append(Claim(claim=text, measured=passes, bound=COST[method], at_most=True))
            text = f"{method}, extra MB"
            claims.append(Claim(claim=text, measured=memory[method], bound=MEMORY, at_most=True))
    return [table], claims


def forward(model: nn.Module, batches: list[Tensor]) -> None:
    """One plain pass."""
    with torch.no_grad():
        for batch in batches:
            model(batch)


def auto(options: Namespace) -> Found:
    """The ladder on ResNet-20 and on the demo network, accuracy on 2,000 test images each."""
    steps = Table(title=f"auto, at most {MAX_DROP} points lost", columns=("network", "step"))
    found = Table(
        title="auto",
        columns=("network", "float", "found", "seconds"),
        formats=dict.fromkeys(("float", "found"), ".2f"),
    )
    claims = []
    for name, model, batches, test in candidates(options):
        metric = partial(accuracy_of, test)
        start = time.perf_counter()
        q = lowbit.quantize(model, "auto", batches, metric=metric, max_drop=MAX_DROP, bits=4)
        seconds = time.perf_counter() - start
        for step in q.steps:
            steps.add(network=name, step=str(step))
        reached, before = metric(q), metric(model)
        found.add(network=name, float=before, found=reached, seconds=seconds)
        claims.append(Claim(claim=f"auto, {name}", measured=reached, bound=before - MAX_DROP))
        claims.append(Claim(claim=f"auto, {name}, seconds", measured=seconds, bound=SECONDS, at_most=True))
    return [steps, found], claims


def candidates(options: Namespace) -> Iterator[tuple[str, nn.Module, list[Tensor], cifar.Images]]:
    """Name, network, calibration batches and test images."""
    name = "resnet20-B"
    batches = cifar.calibration_batches(options.data, name, options.calibration)
    yield name, load_cifar(name, options.data), batches, cifar.load_images(options.data, "test", name, 2000)
    (train, _), (images, labels) = load_images("train"), load_images("test")
    batches = list(train[: options.calibration].split(64))
    yield "demo", load_network(), batches, cifar.Images(x=images[:2000], y=labels[:2000])


def accuracy_of(test: cifar.Images, model: nn.Module) -> float:
    """Percent of the test images."""
    return cifar.accuracy(cifar.logits(model, test.x), test.y)


RUN = {"accuracy": accuracy, "cost": cost, "auto": auto}


def main() -> int:
    """Run the parts asked for; return the exit code."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with cifar10/ and models/")
    parser.add_argument("--parts", nargs="+", choices=RUN, default=list(RUN))
    parser.add_argument("--networks", nargs="+", choices=list(CIFAR), default=list(CIFAR), help="in accuracy")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS)
    parser.add_argument("--calibration", type=int, default=512, help="images, the first of training")
    parser.add_argument("--rounds", type=int, default=3, help="of part cost")
    options = parser.parse_args()
    torch.set_num_threads(1)
    return run_parts(RUN, options)


if __name__ == "__main__":
    sys.exit(main())

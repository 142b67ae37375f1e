"""Mixed precision on CIFAR-10: uniform bits beside bits chosen for the same bytes, and what choosing costs.

    python benchmarks/mixed.py --data DIR --out runs --plot docs/mixed.svg
    python benchmarks/mixed.py --data DIR --out runs --parts cost
    python benchmarks/mixed.py --data DIR --out runs --parts qat

accuracy: the weights of all layers in {2, 3, 4, 6, 8} bits, activations 8, no training; 1,024 training
images with labels, 10,000 test images. At the bytes of uniform 4 and of uniform 3 bits: uniform, the exact
answer for one-at-a-time damages, and that answer repaired by true evaluations; and the same at 85 % of the
bytes of uniform 4. All of it three times: as rounded, with `affine_correct` (scale and bias of each output
channel by least squares), and rounded by GPTQ, the library's default, whose damages the table takes to be
those of `affine_correct`. 'agrees' is the share of test images put in the class that
the float network puts them in; KL is that of the classes, from float to quantized. Then the rank correlation
of every measure with the measured loss. The VGG is trained here (SGD, seed 0), unless --out has it.

measures: 24 random choices of bits; what is measured on the training images against what 4,000 test images
show.

cost: the whole table of ResNet-20 beside the textbook loop, which for each probe copies the network,
quantizes one layer and evaluates everything; in turn, processor time.

qat: the table's answer for 3 bits a weight, with 4-bit activations, trained for two epochs from the float
network (augmentation and defaults of `benchmarks/qat.py`).
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

import cifar
import lowbit
from common import Claim, Table, add_device, arguments, progress, run_parts
from lowbit import INT8, QuantSpec
from lowbit.core.affine import choose_qparams, fake_quantize
from lowbit.core.ranges import least_error_range_of
from lowbit.presets import preset
from lowbit.search import (
    Allocation,
    Budget,
    Sensitivity,
    allocate,
    pareto,
    plot,
    repair,
    sensitivity,
    uniform,
)
from lowbit.search.measure import prober_of
from lowbit.search.prober import Prober, Sums
from lowbit.search.sites import narrowed, places_of
from measure import interleave
from mixed_networks import BASE, BITS, IMAGES, PIPELINES, Batches, Network, load
from qat import Augmented

# in part measures: random choices of bits, and test images
CHOICES, JUDGED = 24, 4000
# top-1 that the mixed network must reach at the bytes of uniform 4 and 3 bits
ASKED = {("resnet20-B", 4): 92.3, ("resnet20-B", 3): 89.0}
PARTS = ("accuracy", "measures", "cost", "qat")


def accuracy(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """Uniform against mixed, on every network."""
    tables, claims = [], []
    for name in options.networks:
        network = load(name, options)
        for pipeline in options.pipelines:
            network = replace(network, pipeline=pipeline)
            made, held = compare(network, options)
            tables.append(made)
            claims += held
        tables.append(correlations(name, network.table()))
    return tables, claims


def compare(network: Network, options: argparse.Namespace) -> tuple[Table, list[Claim]]:
    """One pipeline: uniform widths, and mixed ones of as many bytes, and of 15 % fewer than uniform 4."""
    table, q = network.table(), network.prepared()
    prober = prober_of(q, places_of(q, ("weight",)), network.batches)
    whole = cifar.accuracy(network.logits, network.test.y)
    columns = ("bits", "bytes", "bits a weight", "top-1", "agrees", "KL")
    shown = Table(
        title=f"{network.name}, weights {network.pipeline}; {whole:.2f} % in float",
        columns=columns,
        formats={"bits a weight": ".2f", "top-1": ".2f", "agrees": ".2f", "KL": ".4f"},
    )

    def row(label: str, a: Allocation) -> float:
        scores = network.scores(a.recipe)
        shown.add(bits=label, bytes=a.bytes, **{"bits a weight": a.average_bits}, **scores)
        return scores["top-1"]

    claims: list[Claim] = []
    for bits in (4, 3):
        row(f"uniform {bits}", uniform(table, bits))
    for bits, part in ((4, 1.0), (4, 0.85), (3, 1.0)):
        same = uniform(table, bits)
        budget = Budget(bytes=int(same.bytes * part))
        label = f"{bits}" if part == 1 else f"{bits}, 15 % fewer bytes"
        mixed = allocate(table, budget, measure=options.measure)
        row(f"mixed {label}", mixed)
        if network.pipeline == "by GPTQ":  # a repair would find what it found for `corrected`
            continue
        mended = repair(prober, mixed, budget)
        progress(f"{network.name}, {network.pipeline}, {bits} bits, {part:.0%} of the bytes: {mended}")
        found = row(f"mixed {label}, repaired", mended.allocation)
        if network.pipeline != "corrected":
            continue
        claim = f"{network.name}, corrected, bytes of uniform {label}"
        if part < 1:
            plain = replace(network, pipeline="as rounded")
            bound = plain.top1(uniform(plain.table(), bits).recipe)
            claims.append(
                Claim(claim=f"{claim}, beside uniform {bits} as rounded", measured=found, bound=bound)
            )
        elif (network.name, bits) in ASKED:
            claims.append(Claim(claim=claim, measured=found, bound=ASKED[network.name, bits]))
    if options.plot and network.name == "resnet20-B" and network.pipeline == "corrected":
        front(network, table, options.plot)
    return shown, claims


def front(network: Network, table: Sensitivity, path: Path) -> None:
    """The picture: accuracy against size, each network's bits, and the uniform ones."""
    budgets = [Budget(average_bits=b) for b in (2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0)]
    points = pareto(table, budgets, evaluate=network.top1)
    marked = [replace(a := uniform(table, b), accuracy=network.top1(a.recipe)) for b in (3, 4, 6, 8)]
    plot(points, path, marked)
    progress(f"wrote {path}")


def correlations(name: str, table: Sensitivity) -> Table:
    """Spearman's, over all probes, of every measure with the measured loss and the KL."""
    shown = Table(
        title=f"{name}: rank correlation over {sum(len(s.probes) for s in table)} probes",
        columns=("measure", "with loss", "with KL"),
        formats={"with loss": ".2f", "with KL": ".2f"},
    )
    probes = [p for site in table for p in site.probes]
    for measure in ("loss", "kl", "noise", "fisher", "hessian"):
        values = [p.damage(measure) for p in probes]
        pair = [spearmanr(values, [p.damage(other) for p in probes]).statistic for other in ("loss", "kl")]
        shown.add(measure=measure, **dict(zip(("with loss", "with KL"), map(float, pair), strict=True)))
    return shown


def measures(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """Which measure, taken on training images, foretells what is lost on test images."""
    names, tables = ("noise", "KL", "loss"), []
    for pipeline in ("as rounded", "corrected"):
        network = replace(load("resnet20-B", options), pipeline=pipeline)
        q, x, y = network.prepared(), network.test.x[:JUDGED], network.test.y[:JUDGED]
        places = places_of(q, ("weight",))
        probers = [
            prober_of(q, places, batches)
            for batches in (
                network.batches,
                list(zip(x.split(options.batch), y.split(options.batch), strict=True)),
            )
        ]
        found: list[list[float]] = []
        rng = random.Random(0)
        for n in range(CHOICES):
            odds = [rng.choice((0.2, 0.5, 1, 2)) for _ in BITS[:-1]]
            drawn = rng.choices(BITS[:-1], weights=odds, k=len(places))
            specs = {p.path: narrowed(p.spec, bits, "weight") for p, bits in zip(places, drawn, strict=True)}
            found.append([value for prober in probers for value in damages(prober, specs)])
            progress(f"{pipeline}, choice {n + 1} of {CHOICES}")
        columns = ("on training images", "noise", "KL", "loss", "errors")
        shown = Table(
            title=f"ResNet-20, weights {pipeline}: rank correlation with what test images show",
            columns=columns,
            formats=dict.fromkeys(columns[1:], ".2f"),
        )
        ours, theirs = zip(*[(row[:4], row[4:]) for row in found], strict=True)
        for i, name in enumerate(names):
            values = [
                float(spearmanr([r[i] for r in ours], [r[k] for r in theirs]).statistic) for k in range(4)
            ]
            shown.add(**{columns[0]: name}, **dict(zip(columns[1:], values, strict=True)))
        tables.append(shown)
    return tables, []


def damages(prober: Prober, specs: dict[str, QuantSpec]) -> list[float]:
    """Noise over signal, KL, loss and share of errors of one choice of bits."""
    total = Sums()
    with prober.quantizing(specs):
        for part in prober.parts(1 << 30):
            total += prober.measure(part, prober.cursor(part).behind())
    n = total.samples
    return [total.noise / total.signal, total.kl / n, total.loss / n, 1 - total.metric / n]


def textbook(model: nn.Module, batches: Batches) -> list[float]:
    """For every layer and width: a copy, one layer rounded, everything evaluated."""
    losses = []
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for name in names:
        for bits in BITS:
            probed = copy.deepcopy(model)
            weight = probed.get_submodule(name).weight
            spec = narrowed(INT8, bits, "weight")
            scale, zero = choose_qparams(*least_error_range_of(weight.detach(), spec), spec)
            weight.data = fake_quantize(weight.detach(), scale, zero, spec)
            with torch.inference_mode():
                found = [F.cross_entropy(probed(x), y).item() * len(y) for x, y in batches]
            losses.append(sum(found) / IMAGES)
    return losses


def cost(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """The whole table beside the textbook loop."""
    network = load("resnet20-B", options)
    batches = network.batches
    q = lowbit.prepare(network.model, replace(BASE, fold_bn="before"), network.train.x[:64])
    runs: dict[str, Callable[[], object]] = {
        "textbook": lambda: textbook(network.model, batches),
        "lowbit": lambda: sensitivity(q, batches, bits=BITS, kinds=("weight",), curvature=False),
    }
    timings = interleave(runs, rounds=options.rounds, warmup=0)
    shown = Table(
        title="the table of ResNet-20: 22 layers x 5 widths, 1,024 images",
        columns=("", "seconds", "times faster", "of processor time"),
        formats={"seconds": ".0f", "times faster": ".2f", "of processor time": ".2f"},
    )
    for name, t in timings.items():
        shown.add(
            **{"": name, "seconds": t.seconds, "times faster": t.speedup, "of processor time": 1 / t.cpu}
        )
    faster = 1 / timings["lowbit"].cpu
    return [shown], [Claim(claim="times faster than the textbook loop", measured=faster, bound=3.0)]


def qat(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """Mixed bits, trained."""
    network = load("resnet20-B", options)
    whole = cifar.load_images(options.data, "train", "resnet20-B").to(options.device)
    found = mixed_w3a4(network)
    q = lowbit.prepare(network.model, found.recipe, network.train.x[:64])
    lowbit.calibrate(q, network.train.x[:512].split(64))
    settings: dict[str, Any] = {"epochs": 2, "channels_last": True, "checkpoint_every": 100, "lr": 1e-3}
    lowbit.Trainer(
        q, Augmented(whole), teacher=network.model, out=options.out / "mixed-qat", **settings
    ).fit()
    score = cifar.accuracy(cifar.logits(lowbit.freeze(q), network.test.x), network.test.y)
    shown = Table(
        title="mixed weights, 4-bit activations, two epochs, seed 0",
        columns=("bits a weight", "bytes", "top-1 %"),
        formats={"bits a weight": ".2f", "top-1 %": ".2f"},
    )
    shown.add(**{"bits a weight": found.average_bits, "bytes": found.bytes, "top-1 %": score})
    return [shown], [Claim(claim="mixed QAT", measured=score, bound=92.0)]


def mixed_w3a4(network: Network) -> Allocation:
    """At most three bits a weight; activations as in w4a4, with 8 bits into the first and last layer."""
    found = allocate(network.table(), Budget(average_bits=3.0))
    base = preset("w4a4")
    specs = {site.name: found.specs[site.path] for site in found.table}
    rules = tuple(
        replace(rule, match=name, weight=specs[name])
        for name in specs
        for rule in [base.rules[0 if name == "conv1" else 1 if name == "fc" else 2]]
    )
    recipe = replace(base, rules=(*rules, base.rules[-1]), equalize=False)
    return replace(found, table=replace(found.table, recipe=recipe))


RUN = dict(zip(PARTS, (accuracy, measures, cost, qat), strict=True))


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--data", required=True, help="folder with cifar10/ and models/")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for tables and runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["accuracy"])
    names = ("resnet20-B", "resnet56-A", "vgg")
    parser.add_argument("--networks", nargs="+", choices=names, default=list(names), help="in accuracy")
    parser.add_argument(
        "--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES), help="in accuracy"
    )
    parser.add_argument("--measure", default="noise", help="of damage: noise, kl or loss; in accuracy")
    parser.add_argument("--vgg-epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="of part cost")
    parser.add_argument("--plot", type=Path, help="SVG file for the front of ResNet-20; needs matplotlib")
    add_device(parser)
    parser.add_argument("--batch", type=int, default=128, help="images at a time while probing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return run_parts(RUN, options)


if __name__ == "__main__":
    sys.exit(main())

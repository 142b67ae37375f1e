"""Mixed precision on CIFAR-10: uniform bits beside bits chosen for the same bytes, and what choosing costs.

    python benchmarks/mixed.py --data DIR --out runs --plot docs/mixed.svg
    python benchmarks/mixed.py --data DIR --out runs --parts cost
    python benchmarks/mixed.py --data DIR --out runs --parts qat

accuracy: the weights of all layers in {2, 3, 4, 6, 8} bits, activations 8, no training; 1,024 training
images with labels, 10,000 test images. At the bytes of uniform 4 and of uniform 3 bits: uniform, the exact
answer for one-at-a-time KL, and that answer repaired by true evaluations; each as rounded, and with
`affine_correct` (scale and bias of each output channel by least squares), the library's default. Then the
smallest network as accurate as uniform 4 bits, and the rank correlation of every measure with the measured
loss. The VGG is trained here (SGD, seed 0), unless --out has it.

cost: the whole table of ResNet-20 beside the textbook loop, which for each probe copies the network,
quantizes one layer and evaluates everything; in turn, processor time.

qat: the table's answer for 3 bits a weight, with 4-bit activations, trained for two epochs from the float
network (augmentation and defaults of `benchmarks/qat.py`).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import cifar
import lowbit
from common import Claim, Table, arguments, progress, report
from lowbit import INT8, UINT8, Recipe, Rule
from lowbit.core.affine import choose_qparams, fake_quantize
from lowbit.core.ranges import least_error_range_of
from lowbit.recipe import preset
from lowbit.search import (
    Allocation,
    Budget,
    Point,
    Sensitivity,
    allocate,
    pareto,
    plot,
    repair,
    sensitivity,
    uniform,
)
from lowbit.search.measure import prober_of
from lowbit.search.sites import narrowed, places_of
from measure import interleave
from networks import SmallVgg, load_cifar
from qat import Augmented

BITS = (8, 6, 4, 3, 2)
IMAGES = 1024
BATCH = 128
# top-1 that the mixed network must reach at the bytes of uniform 4 and 3 bits
ASKED = {("resnet20-B", 4): 92.3, ("resnet20-B", 3): 89.0}
PARTS = ("accuracy", "cost", "qat")
BASE = Recipe(rules=(Rule(weight=INT8, activation=UINT8),), refine=("affine_correct",))
Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Network:
    """A float network, its data, and the table of its weights."""

    name: str
    model: nn.Module
    train: cifar.Images
    test: cifar.Images
    folder: Path

    @property
    def batches(self) -> Batches:
        return list(zip(self.train.x[:IMAGES].split(BATCH), self.train.y[:IMAGES].split(BATCH), strict=True))

    def prepared(self) -> lowbit.model.QuantizedModel:
        q = lowbit.prepare(self.model, BASE, self.train.x[:64])
        return lowbit.calibrate(q, self.train.x[:512].split(64))

    def table(self) -> Sensitivity:
        path = self.folder / f"{self.name}-table.json"
        if path.exists():
            return Sensitivity.load(path)
        table = sensitivity(
            self.prepared(), self.batches, bits=BITS, kinds=("weight",), out=self.folder / self.name
        )
        table.save(path)
        return table

    def top1(self, recipe: Recipe) -> float:
        """Percent of the test images after post-training quantization; once for each recipe."""
        key = json.dumps([r.weight.bits if r.weight else 0 for r in recipe.rules] + [*recipe.refine])
        path = self.folder / f"{self.name}-top1.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if key not in known:
            q = lowbit.quantize(self.model, recipe, calibration=list(self.train.x[:512].split(64)))
            known[key] = cifar.accuracy(cifar.logits(q, self.test.x), self.test.y)
            path.write_text(json.dumps(known))
        return known[key]

    def scores(self, recipe: Recipe) -> dict[str, float]:
        return {
            "as rounded": self.top1(replace(recipe, refine=())),
            "corrected": self.top1(replace(recipe, refine=("affine_correct",))),
        }


def load(name: str, options: argparse.Namespace) -> Network:
    """One of the networks, with its images."""
    normalized = "resnet20-B" if name == "vgg" else name
    train = cifar.load_images(options.data, "train", normalized, None if name == "vgg" else IMAGES)
    test = cifar.load_images(options.data, "test", normalized)
    model = trained_vgg(train, options) if name == "vgg" else load_cifar(name, options.data)
    return Network(name, model.eval(), train, test, options.out)


def trained_vgg(train: cifar.Images, options: argparse.Namespace) -> nn.Module:
    """SGD with momentum, one cycle of the learning rate, crops and flips; from --out where it is there."""
    torch.manual_seed(0)
    model, path = SmallVgg(), options.out / f"vgg{options.vgg_epochs}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    data, epochs = Augmented(train), options.vgg_epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(data))
    model.train().to(memory_format=torch.channels_last)
    for epoch in range(epochs):
        for x, y in data:
            loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress(f"vgg, epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model


def accuracy(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """Uniform against mixed, on every network."""
    tables, claims = [], []
    for name in options.networks:
        network = load(name, options)
        made, held = compare(network, options)
        tables += made
        claims += held
    return tables, claims


def compare(network: Network, options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    table, q = network.table(), network.prepared()
    whole = cifar.accuracy(cifar.logits(network.model, network.test.x), network.test.y)
    columns = ("bits", "bytes", "bits a weight", "as rounded", "corrected")
    shown = Table(
        title=f"{network.name}, {whole:.2f} % in float: top-1 % on the test images",
        columns=columns,
        formats=dict.fromkeys(columns[2:], ".2f"),
    )
    claims: list[Claim] = []
    prober = prober_of(q, places_of(q, ("weight",)), network.batches)
    found: dict[str, Point] = {}
    for bits in (4, 3):
        same = uniform(table, bits)
        budget = Budget(bytes=same.bytes)
        mixed = allocate(table, budget)
        mended = repair(prober, mixed, budget)
        progress(f"{network.name}, {bits} bits: {mended}")
        for label, a in (("uniform", same), ("mixed", mixed), ("mixed, repaired", mended.allocation)):
            scores = network.scores(a.recipe)
            row = {"bits": f"{label} {bits}", "bytes": a.bytes, "bits a weight": a.average_bits}
            shown.add(**row, **scores)
            found[f"{label} {bits}"] = Point(a, scores["corrected"])
        if (network.name, bits) in ASKED:
            best = found[f"mixed, repaired {bits}"].accuracy
            claim = f"{network.name}, bytes of uniform {bits}"
            claims.append(Claim(claim=claim, measured=best or 0.0, bound=ASKED[network.name, bits]))
    small = smallest(network, table, prober, found["uniform 4"])
    row = {"bits": "mixed, as good as uniform 4", "bytes": small.allocation.bytes}
    shown.add(
        **row, **{"bits a weight": small.allocation.average_bits}, **network.scores(small.allocation.recipe)
    )
    saved = 100 * (1 - small.allocation.bytes / found["uniform 4"].allocation.bytes)
    claims.append(Claim(claim=f"{network.name}: % fewer bytes at that accuracy", measured=saved, bound=15))
    if options.plot and network.name == "resnet20-B":
        front(network, table, options.plot)
    return [shown, correlations(network.name, table)], claims


def smallest(network: Network, table: Sensitivity, prober: Any, asked: Point) -> Point:
    """The smallest repaired allocation that is as accurate on the test images, in steps of 3 % of bytes."""
    best = None
    for percent in range(96, 50, -3):
        budget = Budget(bytes=asked.allocation.bytes * percent // 100)
        found = repair(prober, allocate(table, budget), budget, rounds=2).allocation
        score = network.top1(found.recipe)
        progress(f"{network.name}, {percent} % of the bytes: {score:.2f} %")
        if score < (asked.accuracy or 0):
            break
        best = Point(found, score)
    return best or asked


def front(network: Network, table: Sensitivity, path: Path) -> None:
    """The picture: accuracy against size, each network's bits, and the uniform ones."""
    budgets = [Budget(average_bits=b) for b in (2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0)]
    points = pareto(table, budgets, evaluate=network.top1)
    marked = [Point(a := uniform(table, b), network.top1(a.recipe)) for b in (3, 4, 6, 8)]
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
    whole = cifar.load_images(options.data, "train", "resnet20-B")
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


RUN = dict(zip(PARTS, (accuracy, cost, qat), strict=True))


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--data", required=True, help="folder with cifar10/ and models/")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for tables and runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["accuracy"])
    names = ("resnet20-B", "resnet56-A", "vgg")
    parser.add_argument("--networks", nargs="+", choices=names, default=list(names), help="in accuracy")
    parser.add_argument("--vgg-epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="of part cost")
    parser.add_argument("--plot", type=Path, help="SVG file for the front of ResNet-20; needs matplotlib")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tables, claims = [], []
    for part in options.parts:
        made, held = RUN[part](options)
        tables += made
        claims += held
    return report(tables, claims, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

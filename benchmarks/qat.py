"""Quantization-aware training of ResNet-20 (option B) on CIFAR-10, and what each choice in it is worth.

    python benchmarks/qat.py --data DIR --out runs                                   # the protocol
    python benchmarks/qat.py --data DIR --out runs --bf16 --studies long --epochs 10
    python benchmarks/qat.py --data DIR --out studies --bf16 --images 12800 \\
        --studies ptq estimators granularity codes rates batchnorm --plot docs/learning_rates.svg

Protocol QAT-1ep: from the float network, one epoch over the 50,000 training images (random crop with padding
4, random flip), batch 128, the Trainer's default settings with the float network as teacher; what the weights
of the last step become when they are frozen is judged on the 10,000 test images. The first convolution and
the last linear layer keep 8-bit weights; every other layer, 1x1 convolutions too, has the given bits. The
studies take one seed and one epoch; with --images 12800 that is 100 steps.

Every run leaves its checkpoints, its metrics and its result in a folder of --out; a run that was stopped goes
on where it was, and one that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cifar
import lowbit
from common import Claim, Table, add_device, arguments, progress, report
from lowbit.core.estimators import estimators
from lowbit.presets import preset
from lowbit.qat import Trainer, restore
from lowbit.recipe import Recipe
from networks import load_cifar

NETWORK = "resnet20-B"
BATCH = 128
PAD = 4
NAMES = ("w4a4", "w3a3", "w2a2")
# what one epoch, and a longer run, must reach
ONE_EPOCH = {"w4a4": 92.0, "w3a3": 91.2, "w2a2": 86.0}
LONG = {"w4a4": 92.5, "w3a3": 92.2, "w2a2": 90.8}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
STUDIES = ("protocol", "ptq", "estimators", "granularity", "codes", "rates", "batchnorm", "long")


@dataclass(frozen=True)
class Augmented:
    """Batches of training images in a new order each time, each cropped and flipped at random.

    Iterating draws from torch's own generator, so that a seed decides everything.
    """

    images: cifar.Images

    def __len__(self) -> int:
        return math.ceil(len(self.images.y) / BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.split(torch.randperm(len(self.images.y)), BATCH):
            yield crop_and_flip(self.images.x[index]), self.images.y[index]


def crop_and_flip(x: Tensor) -> Tensor:
    """x [N, 3, H, W], padded by PAD zeros, cut to H x W somewhere, half of it mirrored."""
    n, _, height, width = x.shape
    padded = F.pad(x, [PAD] * 4).permute(0, 2, 3, 1)
    top, left = torch.randint(0, 2 * PAD + 1, (2, n, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    cut = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)


class Bench:
    """The float network, its data, and runs from it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = load_cifar(NETWORK, options.data).eval().to(options.device)
        self.train = cifar.load_images(options.data, "train", NETWORK, options.images).to(options.device)
        self.test = cifar.load_images(options.data, "test", NETWORK).to(options.device)
        self.calibration = list(torch.split(self.train.x[:512], 64))

    def top1(self, model: nn.Module) -> float:
        """Percent of the test images."""
        return cifar.accuracy(cifar.logits(model, self.test.x), self.test.y)

    def prepared(self, recipe: Recipe) -> lowbit.model.QuantizedModel:
        q = lowbit.prepare(self.model, recipe, self.calibration[0])
        return lowbit.calibrate(q, self.calibration)

    def ptq(self, name: str) -> float:
        """Post-training quantization under the same recipe, by `lowbit.quantize`."""

        def run() -> dict[str, float]:
            return {"top1": self.top1(lowbit.quantize(self.model, name, calibration=self.calibration))}

        return self.once(f"ptq-{name}", run)["top1"]

    def qat(
        self,
        name: str,
        recipe: Recipe,
        *,
        epochs: int = 1,
        seed: int = 0,
        start: str | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Train under the recipe; "top1" is that of the frozen model, the one that is deployed.

        Args:
            start: the run whose last weights and scales to start from (default: the float network's).
        """
        folder = self.folder(name)

        def run() -> dict[str, float]:
            torch.manual_seed(seed)
            q = self.prepared(recipe)
            if start is not None:
                restore(q, self.folder(start) / "last.safetensors")
            speed = {"bf16": self.options.bf16, "channels_last": True}
            settled = {"epochs": epochs, "seed": seed, "out": folder, "checkpoint_every": 100}
            Trainer(q, Augmented(self.train), teacher=self.model, **speed, **settled, **settings).fit()
            trained = self.top1(q)
            return {"top1": self.top1(lowbit.freeze(q)), "before freezing": trained}

        return self.once(name, run)

    def folder(self, name: str) -> Path:
        return self.options.out / name.replace(" ", "-")

    def once(self, name: str, run: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """The result of a run, from its folder if it is there, with the losses along the way."""
        path = self.folder(name) / "result.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            found = run()
            path.write_text(json.dumps(found | {"seconds": time.perf_counter() - started}))
        result = json.loads(path.read_text())
        progress(f"{name}: {result['top1']:.2f} %")
        return result | {"losses": losses(path.parent / "metrics.jsonl")}


def losses(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run, from its metrics file."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "step"]


def protocol(bench: Bench) -> tuple[list[Table], list[Claim]]:
    """One epoch with the default settings, several seeds."""
    table = Table(
        title="one epoch, default settings: top-1 % on the 10,000 test images",
        columns=("recipe", "mean", "lowest", "highest", "before freezing", "seeds", "asked"),
        formats=dict.fromkeys(("mean", "lowest", "highest", "before freezing"), ".2f"),
    )
    claims = []
    for name in bench.options.recipes:
        runs = [bench.qat(f"1ep-{name}-{seed}", preset(name), seed=seed) for seed in bench.options.seeds]
        found = [run["top1"] for run in runs]
        ends = {"lowest": min(found), "highest": max(found)}
        before = {"before freezing": statistics.mean(run["before freezing"] for run in runs)}
        mean, asked = statistics.mean(found), ONE_EPOCH[name]
        table.add(recipe=name, mean=mean, seeds=len(found), asked=asked, **ends, **before)
        claims.append(Claim(claim=f"{name}, one epoch, mean", measured=mean, bound=asked))
    return [table], claims


def ptq(bench: Bench) -> tuple[list[Table], list[Claim]]:
    """Post-training quantization and training, same model, same bits."""
    columns = ("recipe", "PTQ", "QAT, one epoch")
    formats = dict.fromkeys(columns[1:], ".2f")
    table = Table(title="PTQ and QAT: top-1 %", columns=columns, formats=formats)
    for name in NAMES:
        table.add(
            **{
                "recipe": name,
                "PTQ": bench.ptq(name),
                "QAT, one epoch": bench.qat(f"study-{name}", preset(name))["top1"],
            }
        )
    return [table], []


def compare_runs(
    bench: Bench, title: str, column: str, variants: dict[str, tuple[Recipe, dict[str, Any]]], study: str
) -> Table:
    """One row for each variant, one epoch each."""
    formats = {"top-1 %": ".2f", "seconds": ".0f"}
    table = Table(title=title, columns=(column, "top-1 %", "seconds"), formats=formats)
    for label, (recipe, settings) in variants.items():
        found = bench.qat(f"{study}-{label}", recipe, **settings)
        table.add(**{column: label, "top-1 %": found["top1"], "seconds": found["seconds"]})
    return table


def gradients(bench: Bench) -> tuple[list[Table], list[Claim]]:
    """Estimators against each other."""
    names = [name for name in estimators.names() if not estimators.get(name).one_bit]
    variants = {name: (preset("w2a2", estimator=name), {}) for name in names}
    return [compare_runs(bench, "estimators, w2a2, one epoch", "estimator", variants, "estimator")], []


def granularity(bench: Bench) -> tuple[list[Table], list[Claim]]:
    """One scale per output channel of a weight, or one for all."""
    variants = {
        f"{name} per {where}": (preset(name, weight_granularity=where), {})
        for name in ("w4a4", "w2a2")
        for where in ("channel", "tensor")
    }
    return [compare_runs(bench, "granularity of weights, one epoch", "weights", variants, "granularity")], []


def codes(bench: Bench) -> tuple[list[Table], list[Claim]]:
    """Weights with odd codes, as many on either side, or with a code for zero."""
    variants = {}
    for name in ("w3a3", "w2a2"):
        odd = preset(name)
        rules = tuple(
            replace(rule, weight=replace(rule.weight, mid_rise=False)) if rule.weight else rule
            for rule in odd.rules
        )
        variants |= {f"{name} odd": (odd, {}), f"{name} with a zero": (replace(odd, rules=rules), {})}
    return [compare_runs(bench, "codes of weights, one epoch", "codes", variants, "codes")], []


def batchnorm(bench: Bench) -> tuple[list[Table], list[Claim]]:
    """What becomes of BatchNorm in training."""
    keep = preset("w2a2")
    fold = replace(keep, fold_bn="before")
    variants: dict[str, tuple[Recipe, dict[str, Any]]] = {
        "trained (default)": (keep, {}),
        "folded before": (fold, {}),
        "frozen from the start": (keep, {"batch_norm": "freeze"}),
        "trained, re-estimated at the end": (keep, {"reestimate_bn": 50}),
    }
    return [compare_runs(bench, "BatchNorm, w2a2, one epoch", "BatchNorm", variants, "batchnorm")], []


def rates(bench: Bench) -> tuple[list[Table], list[Claim]]:
    """Learning rates, and how the loss falls under each; the curves go to docs/learning_rates.svg."""
    variants = {f"{rate:g}": (preset("w2a2"), {"lr": rate}) for rate in RATES}
    table = compare_runs(bench, "learning rates, w2a2, one epoch", "rate", variants, "rate")
    curves = {label: bench.qat(f"rate-{label}", *variants[label][:1])["losses"] for label in variants}
    if bench.options.plot:
        plot(curves, bench.options.plot)
    return [table], []


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Loss against step, one line for each learning rate."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="symmetric KL to the float network", yscale="log", title="w2a2, one epoch")
    axes.legend(title="learning rate")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    progress(f"wrote {path}")


def long(bench: Bench) -> tuple[list[Table], list[Claim]]:
    """More epochs, last epoch; each further cycle goes on from the end of the last, the rate raised again."""
    length = " + ".join(map(str, bench.options.epochs))
    table = Table(
        title=f"{length} epochs, last epoch: top-1 %",
        columns=("recipe", "top-1 %", "asked", "hours"),
        formats={"top-1 %": ".2f", "hours": ".2f"},
    )
    claims = []
    for name in bench.options.recipes:
        found, start = {"seconds": 0.0}, None
        for cycle, epochs in enumerate(bench.options.epochs):
            run = "long" + "+".join(map(str, bench.options.epochs[: cycle + 1])) + f"-{name}"
            spent = found["seconds"]
            found = bench.qat(run, preset(name), epochs=epochs, seed=cycle, start=start)
            found["seconds"] += spent
            start = run
        table.add(
            **{
                "recipe": name,
                "top-1 %": found["top1"],
                "asked": LONG[name],
                "hours": found["seconds"] / 3600,
            }
        )
        claims.append(Claim(claim=f"{name}, {length} epochs", measured=found["top1"], bound=LONG[name]))
    return [table], claims


RUN = dict(zip(STUDIES, (protocol, ptq, gradients, granularity, codes, rates, batchnorm, long), strict=True))


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--data", required=True, help="folder with cifar10/ and models/")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for runs (default: runs)")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=["protocol"])
    parser.add_argument("--recipes", nargs="+", choices=NAMES, default=list(NAMES), help="in protocol, long")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the protocol")
    parser.add_argument(
        "--epochs", nargs="+", type=int, default=[10], help="of each cycle of the long run (default: 10)"
    )
    parser.add_argument("--images", type=int, help="use the first so many training images (default: all)")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16: faster, for studies")
    parser.add_argument("--plot", type=Path, help="SVG file for the curves of study rates; needs matplotlib")
    add_device(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    tables, claims = [], []
    for study in options.studies:
        made, held = RUN[study](bench)
        tables += made
        claims += held
    return report(tables, claims, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

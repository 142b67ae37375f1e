"""Accuracy after post-training quantization: three CIFAR-10 networks, lowbit beside onnxruntime's quantizer.

Calibrated on the first 512 training images, scored on the 10,000 test images: top-1, agreement with the
float network and SQNR of the logits. For lowbit: the default recipe, every calibration method with weight
scales per channel and per tensor, and each correction on and off; W8A8, and W4A8 with the first and last
layer in 8 bits.

    python benchmarks/ptq.py --data ../shared/data
    python benchmarks/ptq.py --data ../shared/data --networks resnet20-B --rows default --json
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import cifar
import ours
import rivals
from common import Claim, Table, arguments, progress, report
from networks import CIFAR, load_cifar
from ours import AFFINE, BIAS, OBSERVERS, Variant

LABELS = ("tool", "bits", "method", "weights", "corrections")
COLUMNS = (*LABELS, "top-1", "drop", "agreement", "sqnr dB", "seconds")
FORMATS = {"top-1": ".2f", "drop": "+.2f", "agreement": ".2f", "sqnr dB": ".1f", "seconds": ".1f"}
DEFAULT = "default"
CORRECTIONS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "none": (False, ()),
    "CLE": (True, ()),
    "BC": (False, BIAS),
    "CLE+BC": (True, BIAS),
    "scale+BC": (False, AFFINE),
    "CLE+scale+BC": (True, AFFINE),
}
# onnxruntime's calibration method -> the observer of ours that does the same
SAME = {"minmax": "minmax", "entropy": "kl", "percentile": "percentile"}
# W8A8, the default recipe: the largest drop in points, and floors beside onnxruntime's best row
DROP = 0.10
# one standard error on 10,000 images: closer than that, two calibration methods are equally accurate
NOISE = {"top-1": 0.27, "agreement": 0.09, "sqnr dB": 0.0}
FLOORS = {"resnet20-B": {"agreement": 99.3, "sqnr dB": 29.5}}
# W4A8 with CLE and the correction of each channel's bias and scale: no rounding is learned
FLOORS_W4A8 = {"resnet20-B": {"top-1": 92.25, "agreement": 96.8, "sqnr dB": 17.0}}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row to measure: its labels, the group it belongs to, and what makes the quantized network."""

    group: str  # "rivals", "default", "observers" or "corrections"
    labels: dict[str, str]
    make: Callable[[], Callable[[Tensor], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One float network with its calibration batches [B, 3, 32, 32], test images and float logits [N, 10]."""

    name: str
    model: nn.Module
    batches: list[Tensor]
    test: cifar.Images
    reference: Tensor
    folder: Path


def load(name: str, options: Namespace, folder: Path) -> Bench:
    """The network `name` from --data, run once in float."""
    test = cifar.load_images(options.data, "test", name)
    batches = cifar.calibration_batches(options.data, name, options.calibration)
    model = load_cifar(name, options.data)
    reference = cifar.logits(model, test.x)
    return Bench(name=name, model=model, batches=batches, test=test, reference=reference, folder=folder)


def rival_rows(bench: Bench) -> Iterator[Row]:
    """onnxruntime's quantizer with each of its calibration methods."""
    float_path = rivals.export_float(bench.model, bench.batches[0], bench.folder / "float.onnx")
    prepared = rivals.preprocess(float_path, bench.folder / "prepared.onnx")

    def make(method: str) -> Callable[[Tensor], Tensor]:
        path = bench.folder / f"{method}.onnx"
        return rivals.runner(rivals.quantize(prepared, path, bench.batches, method))

    for method in rivals.METHODS:
        labels = {"tool": "onnxruntime", "bits": "w8a8", "method": method, "weights": "channel"}
        yield Row(group="rivals", labels=labels, make=partial(make, method))


def our_rows(bench: Bench) -> Iterator[Row]:
    """lowbit: the default recipe and each correction on and off, W8A8 and W4A8; every observer at W8A8."""

    def row(group: str, variant: Variant, method: str, corrections: str) -> Row:
        labels = {"tool": "lowbit", "bits": variant.preset, "method": method}
        labels |= {"weights": variant.weights or "channel", "corrections": corrections}
        make = partial(ours.quantize, bench.model, variant, bench.batches)
        return Row(group=group, labels=labels, make=make)

    for preset in ("w8a8", "w4a8"):
        yield row("default", Variant(preset=preset), DEFAULT, DEFAULT)
        for text, (equalize, refine) in CORRECTIONS.items():
            for weight_observer in ("mse", "minmax"):
                variant = Variant(
                    preset=preset, equalize=equalize, refine=refine, weight_observer=weight_observer
                )
                yield row("corrections", variant, f"weights {weight_observer}", text)
    for weights in ("channel", "tensor"):
        for observer in OBSERVERS:
            variant = Variant(observer=observer, weights=weights)
            yield row("observers", variant, observer, DEFAULT)


def measure(bench: Bench, row: Row) -> dict[str, str | float]:
    """The row's labels with its score; `seconds` is quantizing, calibration included, without scoring."""
    start = time.perf_counter()
    run = row.make()
    seconds = time.perf_counter() - start
    found = cifar.score(cifar.logits(run, bench.test.x), bench.reference, bench.test.y)
    return row.labels | {
        "top-1": found.top1,
        "drop": round(cifar.accuracy(bench.reference, bench.test.y) - found.top1, 4),
        "agreement": found.agreement,
        "sqnr dB": found.sqnr,
        "seconds": seconds,
    }


def claims(name: str, table: Table) -> Iterator[Claim]:
    """What must hold on the network `name`, for the rows that were measured."""
    rows = {(r["tool"], r["bits"], r["method"], r["corrections"], r["weights"]): r for r in table.rows}
    peers = [row for row in table.rows if row["tool"] == "onnxruntime"]
    default = rows.get(("lowbit", "w8a8", DEFAULT, DEFAULT, "channel"))
    if default:
        drop = _number(default["drop"])
        yield Claim(claim=f"{name} w8a8 drop, points", measured=drop, bound=DROP, at_most=True)
        for metric in ("agreement", "sqnr dB"):
            floors = FLOORS.get(name, {})
            bounds = [floors[metric]] if metric in floors else []
            bounds += [_number(peer[metric]) for peer in peers]
            text = f"{name} w8a8 {metric}, onnxruntime's best or the floor"
            if bounds:
                yield Claim(claim=text, measured=_number(default[metric]), bound=max(bounds))
    for peer in peers:
        same = rows.get(("lowbit", "w8a8", SAME[str(peer["method"])], DEFAULT, "channel"))
        if same:
            for metric, slack in NOISE.items():
                text = f"{name} w8a8 {same['method']} {metric}, onnxruntime {peer['method']}"
                bound = _number(peer[metric]) - slack
                yield Claim(claim=text, measured=_number(same[metric]), bound=bound)
    corrected = rows.get(("lowbit", "w4a8", DEFAULT, DEFAULT, "channel"))
    if corrected:
        for metric, bound in FLOORS_W4A8.get(name, {}).items():
            yield Claim(claim=f"{name} w4a8 {metric}", measured=_number(corrected[metric]), bound=bound)


def _number(cell: object) -> float:
    if not isinstance(cell, int | float):
        raise TypeError(f"expected a number in the table, found {cell!r}")
    return float(cell)


def parse() -> Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with cifar10/ and models/")
    parser.add_argument("--networks", nargs="+", choices=list(CIFAR), default=list(CIFAR))
    groups = ("rivals", "default", "observers", "corrections")
    parser.add_argument("--rows", nargs="+", choices=groups, default=list(groups), help="groups of rows")
    parser.add_argument(
        "--calibration", type=int, default=512, help="calibration images, the first of training"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; onnxruntime always has one")
    return parser.parse_args()


def main() -> int:
    """Measure every row asked for; return the exit code."""
    options = parse()
    torch.set_num_threads(options.threads)
    if not ours.available():
        progress("lowbit cannot be imported here: only onnxruntime's rows are measured")
    tables: list[Table] = []
    found: list[Claim] = []
    for name in options.networks:
        progress(f"{name}: the float network")
        with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as folder:
            bench = load(name, options, Path(folder))
            table = Table(title=name, columns=COLUMNS, formats=FORMATS)
            table.add(tool="float", **{"top-1": cifar.accuracy(bench.reference, bench.test.y)})
            for row in (*rival_rows(bench), *(our_rows(bench) if ours.available() else ())):
                if row.group in options.rows:
                    progress(f"{name}: {' '.join(row.labels.values())}")
                    table.add(**measure(bench, row))
        tables.append(table)
        found += claims(name, table)
    return report(tables, found, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

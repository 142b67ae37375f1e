"""What calibrating costs: ResNet-18 at 224x224 on 128 images, one thread, beside one plain pass over them.

Each method runs in its own process, interleaved with the plain pass: time as a ratio to torch's plain pass
(for onnxruntime also to its own), and how much higher the peak memory goes than in the plain pass.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --images 32 --rounds 1 --tools onnxruntime --json
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ours
import rivals
from common import Claim, Table, arguments, progress, report
from measure import Run, in_child, interleave, peak_bytes
from networks import load_imagenet_shape, smooth_images

COLUMNS = ("tool", "method", "plain s", "calibrate s", "ratio", "own ratio", "freeze s", "extra MB")
FORMATS = dict.fromkeys(COLUMNS[2:7], ".2f") | {"extra MB": ".0f"}
RATIO, EXTRA_MB = 1.3, 150.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much to calibrate on, and how often to repeat it."""

    images: int
    batch: int
    rounds: int

    def batches(self) -> list[Tensor]:
        """The calibration images: tensors [batch, 3, 224, 224]."""
        return list(torch.split(smooth_images(self.images), self.batch))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one method cost; seconds are medians, ratios are medians of per-round ratios."""

    plain: float  # torch's plain pass
    seconds: float
    ratio: float  # to torch's plain pass
    own_ratio: float | None = None  # to the plain pass of the method's engine, where that is not torch
    freeze: float | None = None  # what freeze() took afterwards: no calibration may hide there
    extra_mb: float  # peak memory above the peak of the plain pass of the method's engine


def forward(run: Callable[[Tensor], object], batches: list[Tensor]) -> None:
    """One plain pass of `run` over `batches` [B, 3, 224, 224]."""
    with torch.no_grad():
        for batch in batches:
            run(batch)


def extra_mb(plain: Run, calibrate: Run) -> float:
    """MB by which the peak memory of `calibrate` passes that of `plain`; it warms up both: call it first."""
    before = peak_bytes(plain)
    return (peak_bytes(calibrate) - before) / 2**20


def cost_of_ours(observer: str, work: Work) -> Cost:
    """lowbit.calibrate with `observer`, on a network prepared afresh (untimed) before each run."""
    import lowbit

    torch.set_num_threads(1)
    model, batches = load_imagenet_shape("resnet18"), work.batches()
    recipe = ours.Variant(observer=observer, equalize=False, refine=()).recipe()
    fresh: dict[str, nn.Module] = {}

    def prepare() -> None:
        fresh["q"] = lowbit.prepare(model, recipe, batches[0][:1])

    def calibrate() -> None:
        lowbit.calibrate(fresh["q"], batches)

    def freeze() -> None:
        lowbit.freeze(fresh["q"])

    plain = partial(forward, model, batches)
    prepare()
    memory = extra_mb(plain, calibrate)
    runs: dict[str, Run] = {"plain": plain, "calibrate": calibrate, "freeze": freeze}
    times = interleave(runs, rounds=work.rounds, warmup=0, before={"calibrate": prepare})
    return Cost(
        plain=times["plain"].seconds,
        seconds=times["calibrate"].seconds,
        ratio=times["calibrate"].paired,
        freeze=times["freeze"].seconds,
        extra_mb=memory,
    )


def cost_of_rival(method: str, work: Work) -> Cost:
    """onnxruntime's calibration with `method`, on a calibrator made afresh (untimed) before each run."""
    torch.set_num_threads(1)
    model, batches = load_imagenet_shape("resnet18"), work.batches()
    fresh: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as folder:
        float_path = rivals.export_float(model, batches[0], Path(folder) / "float.onnx")
        prepared = rivals.preprocess(float_path, Path(folder) / "prepared.onnx")
        engine = rivals.runner(float_path)

        def prepare() -> None:
            fresh["run"] = rivals.calibration(prepared, batches, method)

        def calibrate() -> None:
            fresh["run"]()

        own = partial(forward, engine, batches)
        prepare()
        memory = extra_mb(own, calibrate)
        runs: dict[str, Run] = {"plain": partial(forward, model, batches), "own": own, "calibrate": calibrate}
        times = interleave(runs, rounds=work.rounds, warmup=0, before={"calibrate": prepare})
    return Cost(
        plain=times["plain"].seconds,
        seconds=times["calibrate"].seconds,
        ratio=times["calibrate"].paired,
        own_ratio=times["calibrate"].paired / times["own"].paired,
        extra_mb=memory,
    )


def claims(table: Table) -> Iterator[Claim]:
    """What must hold for our rows."""
    bounds: tuple[tuple[str, float], ...] = (("ratio", RATIO), ("extra MB", EXTRA_MB))
    for row in table.rows:
        for column, bound in bounds if row["tool"] == "lowbit" else ():
            measured: Any = row[column]
            yield Claim(claim=f"{row['method']} {column}", measured=measured, bound=bound, at_most=True)


def parse() -> Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that is not counted")
    tools = ("lowbit", "onnxruntime")
    parser.add_argument("--tools", nargs="+", choices=tools, default=list(tools))
    methods = sorted({*ours.OBSERVERS, *rivals.METHODS})
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    return parser.parse_args()


def main() -> int:
    """Measure every method asked for; return the exit code."""
    options = parse()
    if not ours.available():
        progress("lowbit cannot be imported here: only onnxruntime's rows are measured")
    work = Work(images=options.images, batch=options.batch, rounds=options.rounds)
    cases: list[tuple[str, str, Callable[[str, Work], Cost]]] = []
    if "lowbit" in options.tools and ours.available():
        cases += [("lowbit", observer, cost_of_ours) for observer in ours.OBSERVERS]
    if "onnxruntime" in options.tools:
        cases += [("onnxruntime", method, cost_of_rival) for method in rivals.METHODS]
    cases = [case for case in cases if case[1] in options.methods]
    title = f"calibration of ResNet-18 on {work.images} images in batches of {work.batch}, one thread"
    table = Table(title=title, columns=COLUMNS, formats=FORMATS)
    for tool, method, cost_of in cases:
        progress(f"{tool} {method}")
        cost = in_child(cost_of, method, work)
        values = (cost.plain, cost.seconds, cost.ratio, cost.own_ratio, cost.freeze, cost.extra_mb)
        table.add(tool=tool, method=method, **dict(zip(COLUMNS[2:], values, strict=True)))
    return report([table], list(claims(table)), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

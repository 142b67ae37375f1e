"""Speed of the deployed file: ResNet-18 and MobileNetV2 at 224x224, batch 1, one thread, files run in turn.

The FP32 file, onnxruntime's own INT8 file and ours, in ONNX Runtime and (where it is installed) OpenVINO.
Speed-ups are medians of per-round ratios. OpenVINO is held to float32: on AMX it runs FP32 in bf16 unasked.

    python benchmarks/deploy.py
    python benchmarks/deploy.py --networks resnet18 --rounds 50 --json
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

import ours
import rivals
from common import Claim, Table, arguments, environment, progress, report
from measure import Run, interleave
from networks import IMAGENET, load_imagenet_shape, smooth_images

COLUMNS = (
    "file",
    "engine",
    "ms",
    "vs ORT FP32",
    "vs own FP32",
    "range",
    "MB",
    "size ratio",
    "float Conv",
    "float Gemm",
    "float Add",
)
FORMATS = {"ms": ".2f", "vs ORT FP32": ".2f", "vs own FP32": ".2f", "MB": ".2f", "size ratio": ".2f"}
# network -> least speed-up over the FP32 file in ONNX Runtime: in ONNX Runtime, in OpenVINO with AMX
SPEEDUPS = {"resnet18": (2.5, 8.0), "mobilenet_v2": (1.6, 2.3)}
ORT, OPENVINO = "ONNX Runtime", "OpenVINO"
# operators of an optimized graph that compute in float; the integer ones are QLinearConv, QGemm, QLinearAdd
FLOAT_OPS = {
    "Conv": {"Conv", "FusedConv", "ConvTranspose"},
    "Gemm": {"Gemm", "FusedGemm", "MatMul", "FusedMatMul"},
    "Add": {"Add", "Sum"},
}


def make_files(name: str, folder: Path, calibration: int) -> dict[str, Path]:
    """The files to compare, by label; "FP32" first."""
    model = load_imagenet_shape(name)
    batches = list(torch.split(smooth_images(calibration, seed=2), 16))
    files = {"FP32": rivals.export_float(model, batches[0], folder / "float.onnx")}
    prepared = rivals.preprocess(files["FP32"], folder / "prepared.onnx")
    files["INT8 onnxruntime"] = rivals.quantize(prepared, folder / "rival.onnx", batches, "minmax")
    if ours.available():
        import lowbit

        files["INT8 lowbit"] = folder / "ours.onnx"
        lowbit.export.onnx(ours.quantize(model, ours.Variant(), batches), files["INT8 lowbit"])
    return files


def in_onnxruntime(path: Path, x: Tensor) -> Run:
    """One inference of x [1, 3, 224, 224] in ONNX Runtime, on one thread."""
    opened = rivals.session(path)
    feed = {opened.get_inputs()[0].name: x.numpy()}
    return partial(opened.run, None, feed)


def in_openvino(path: Path, x: Tensor) -> Run:
    """One inference of x [1, 3, 224, 224] in OpenVINO: one thread, a fixed shape, nothing rounded to bf16."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(x.shape))
    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    return partial(request.infer)


def float_operators(path: Path, folder: Path) -> dict[str, int]:
    """How many float operators of each kind of FLOAT_OPS are left in the graph that ONNX Runtime runs."""
    optimized = folder / "optimized.onnx"
    rivals.session(path, optimized_to=optimized)
    operators = [node.op_type for node in onnx.load(str(optimized)).graph.node]
    return {kind: sum(op in members for op in operators) for kind, members in FLOAT_OPS.items()}


def compare(name: str, folder: Path, calibration: int, rounds: int) -> Table:
    """Every file in every engine, in turn."""
    progress(f"{name}: making the files")
    files = make_files(name, folder, calibration)
    x = smooth_images(1, seed=3)
    engines = {ORT: in_onnxruntime}
    if importlib.util.find_spec("openvino"):
        engines[OPENVINO] = in_openvino
    cases = [(label, engine) for engine in engines for label in files]
    progress(f"{name}: {rounds} rounds of {len(cases)} runs")
    runs = {f"{label} / {engine}": engines[engine](files[label], x) for label, engine in cases}
    times = interleave(runs, rounds=rounds, warmup=5)
    table = Table(title=f"{name}, 224x224, batch 1, one thread", columns=COLUMNS, formats=FORMATS)
    base = files["FP32"].stat().st_size
    for label, engine in cases:
        timing, own = times[f"{label} / {engine}"], times[f"FP32 / {engine}"]
        size = files[label].stat().st_size
        left = float_operators(files[label], folder) if engine == ORT else {}
        row: dict[str, Any] = {f"float {kind}": count for kind, count in left.items()}
        row |= {"vs ORT FP32": timing.speedup, "vs own FP32": timing.speedup / own.speedup}
        row |= {"range": f"{1 / timing.high:.2f}..{1 / timing.low:.2f}", "size ratio": base / size}
        table.add(file=label, engine=engine, ms=1e3 * timing.seconds, MB=size / 1e6, **row)
    return table


def claims(name: str, table: Table) -> Iterator[Claim]:
    """What must hold for our file."""
    needed = dict(zip((ORT, OPENVINO), SPEEDUPS[name], strict=True))
    for row in table.rows:
        if row["file"] != "INT8 lowbit":
            continue
        speedup: Any = row["vs ORT FP32"]
        if row["engine"] == ORT or environment()["amx_int8"]:
            text = f"{name} in {row['engine']}, times faster than FP32 in {ORT}"
            yield Claim(claim=text, measured=speedup, bound=needed[str(row["engine"])])
        if row["engine"] == ORT:
            left: Any = [row[f"float {kind}"] for kind in FLOAT_OPS]
            text = f"{name} float Conv, Gemm and Add left in {ORT}"
            yield Claim(claim=text, measured=sum(left), bound=0, at_most=True)


def parse() -> Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(IMAGENET), default=list(IMAGENET))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--calibration", type=int, default=32, help="calibration images, a multiple of 16")
    return parser.parse_args()


def main() -> int:
    """Measure every network asked for; return the exit code."""
    options = parse()
    torch.set_num_threads(1)
    if not ours.available():
        progress("lowbit cannot be imported here: its file is left out")
    tables: list[Table] = []
    found: list[Claim] = []
    for name in options.networks:
        with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as folder:
            table = compare(name, Path(folder), options.calibration, options.rounds)
        tables.append(table)
        found += claims(name, table)
    return report(tables, found, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

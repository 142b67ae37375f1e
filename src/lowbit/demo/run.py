"""`lowbit demo`: one trained network in 8 bits and with 4-bit weights, every figure measured on the spot."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.bench import time_files, timing_table
from lowbit.core.observers import observers
from lowbit.demo.data import load_images
from lowbit.demo.network import load_network
from lowbit.files import atomic_path
from lowbit.model import QuantizedModel
from lowbit.progress import track
from lowbit.tables import text_table

__all__ = ["Size", "run"]

PRESETS = {"w8a8": "INT8", "w4a8": "4-bit weights"}
BATCH = 64

# preset and kind of file -> path
Files = dict[tuple[str, str], Path]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured. The whole takes under a minute on two cores."""

    calibration_images: int = 512
    test_images: int = 3000
    # images on which every code is compared
    parity_images: int = 512
    # timed runs of each file
    rounds: int = 200


@dataclass(frozen=True)
class Score:
    """One quantized network on the test images."""

    recipe: str
    calibration: str
    # share of right answers, and of the float network's answers
    accuracy: float
    agreement: float


@dataclass(frozen=True)
class _Data:
    calibration: list[Tensor]
    test: list[Tensor]
    labels: Tensor
    # what the float network answers
    answers: Tensor


def run(out: Path, say: Callable[[str], None], size: Size | None = None) -> dict[str, Any]:
    """Quantize the demo network, show what became of it, and write its files into `out`.

    Args:
        out: folder, made where it is missing.
        say: takes the text, piece by piece.

    Returns:
        Every figure shown, as plain data; also written to `out/report.json`.
    """
    size = size or Size()
    out.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        network, data = load_network(), _data(size)
        say(_introduction(network, data))
        scores = _quantize_every_way(out, size)
        kept = {preset: lowbit.load(out / f"{preset}.safetensors", network) for preset in PRESETS}
        coverage = {preset: q.coverage() for preset, q in kept.items()}
        say(f"What became of each operation under preset w8a8:\n\n{coverage['w8a8']}\n")
        say(f"Under w4a8 (4-bit weights but in the first and last layer): {coverage['w4a8'].summary}.\n")
        right = _share(data.answers, data.labels)
        say(f"{_score_table(scores, right)}\n")
        files = _write(out, network, kept, data.calibration[0])
        say(f"{_size_table(files)}\n")
        timings = time_files([files[name, "onnx"] for name in ("float", *PRESETS)], rounds=size.rounds)
        say(
            f"Speed in ONNX Runtime, one image at a time on one thread, {size.rounds} runs of each in turn:\n"
        )
        say(f"{timing_table(timings)}\n")
        count = math.ceil(size.parity_images / BATCH)
        parity = {p: lowbit.verify(q, files[p, "onnx"], data.test, count) for p, q in kept.items()}
        say(f"{_parity_table(parity)}\n")
    record = {
        "float_accuracy": right,
        "scores": [asdict(score) for score in scores],
        "coverage": {p: asdict(table) for p, table in coverage.items()},
        "steps": {p: [asdict(step) for step in q.steps] for p, q in kept.items()},
        "bytes": {path.name: path.stat().st_size for path in files.values()},
        "speed": [asdict(timing) for timing in timings],
        "parity": {p: {"exact": found.exact, **asdict(found)} for p, found in parity.items()},
    }
    with atomic_path(out / "report.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    say(f"In {out}/: float.onnx; w8a8 and w4a8 as .safetensors, .onnx and .yaml; report.json.")
    return record


@contextmanager
def _one_thread() -> Iterator[None]:
    """The layers are small: threads that wait for each other would take longer than one alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _data(size: Size) -> _Data:
    train, _ = load_images("train")
    test, labels = load_images("test")
    batches = list(test[: size.test_images].split(BATCH))  # type: ignore[no-untyped-call]
    calibration = list(train[: size.calibration_images].split(BATCH))  # type: ignore[no-untyped-call]
    return _Data(calibration, batches, labels[: size.test_images], _answers(load_network(), batches))


def _answers(network: nn.Module, images: Iterable[Tensor]) -> Tensor:
    """The class that the network names for each image."""
    with torch.inference_mode():
        return torch.cat([network(batch).argmax(1) for batch in images])


def _share(a: Tensor, b: Tensor) -> float:
    return (a == b).double().mean().item()


def _quantize_every_way(out: Path, size: Size) -> list[Score]:
    """Each preset with each way to choose ranges of activations, in as many processes as there are cores."""
    ways = [(preset, observer) for preset in PRESETS for observer in observers.names()]
    workers = min(4, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        jobs = [pool.submit(_quantize, *way, out, size) for way in ways]
        for job in track(as_completed(jobs), "quantizing", total=len(jobs)):
            job.result()
        return [job.result() for job in jobs]


def _quantize(preset: str, observer: str, out: Path, size: Size) -> Score:
    """Quantize one way and judge it; the preset's own way is saved."""
    data, recipe = _data(size), lowbit.preset(preset, observer=observer)
    q = lowbit.quantize(load_network(), recipe, data.calibration)
    if recipe == lowbit.preset(preset):
        lowbit.save(q, out / f"{preset}.safetensors")
    found = _answers(q, data.test)
    return Score(preset, observer, _share(found, data.labels), _share(found, data.answers))


def _write(out: Path, network: nn.Module, kept: dict[str, QuantizedModel], example: Tensor) -> Files:
    """Write the files that are not there yet; the paths of all."""
    files: Files = {("float", "onnx"): lowbit.export.float_onnx(network, out / "float.onnx", example)}
    for preset, q in kept.items():
        files |= {(preset, kind): out / f"{preset}.{kind}" for kind in ("safetensors", "onnx", "yaml")}
        lowbit.export.onnx(q, files[preset, "onnx"])
        q.recipe.save(files[preset, "yaml"])
    return files


def _introduction(network: nn.Module, data: _Data) -> str:
    weights = sum(p.numel() for p in network.parameters())
    seen = sum(len(batch) for batch in data.calibration)
    return (
        f"A ResNet with {weights:,} weights that tells ten kinds of clothing apart, trained in float32.\n"
        f"Calibrated on {seen} training images, judged on {len(data.labels):,} test images it never saw.\n"
    )


def _score_table(scores: list[Score], right: float) -> str:
    default = lowbit.preset("w8a8").rules[0].observer
    rows = []
    for name in observers.names():
        found = [s for preset in PRESETS for s in scores if (s.recipe, s.calibration) == (preset, name)]
        cells = [f"{100 * share:.2f} %" for s in found for share in (s.accuracy, s.agreement)]
        rows.append((f"{name} (default)" if name == default else name, *cells))
    header = ("calibration", *(title for name in PRESETS.values() for title in (name, "agrees")))
    return (
        f"Test images answered right: {100 * right:.2f} % by the float network, as below by the quantized,\n"
        f"for each way to choose the ranges of activations. 'agrees': answered as the float network does.\n\n"
        f"{text_table(header, rows)}"
    )


def _size_table(files: Files) -> str:
    size = {key: path.stat().st_size for key, path in files.items()}
    whole = size["float", "onnx"]
    rows = [("float32", "", f"{whole:,}", "1.0x")]
    for preset, name in PRESETS.items():
        small, saved = size[preset, "onnx"], size[preset, "safetensors"]
        rows.append((f"{preset}, {name}", f"{saved:,}", f"{small:,}", f"{whole / small:.1f}x"))
    return "Bytes on disk:\n\n" + text_table(("network", "checkpoint", "ONNX", "ONNX smaller"), rows)


def _parity_table(parity: dict[str, Any]) -> str:
    rows = []
    for preset, found in parity.items():
        codes = sum(layer.codes for layer in found.layers)
        equal = sum(layer.codes * layer.equal for layer in found.layers) / codes
        simulated = sum(layer.codes * layer.simulation_equal for layer in found.layers) / codes
        worst = max(layer.max_lsb for layer in found.layers)
        rows.append((f"{preset}.onnx", f"{codes:,}", _percent(equal), str(worst), _percent(simulated)))
    first = next(iter(parity.values()))
    header = ("file", "codes", "equal to integers", "largest difference", "equal to simulation")
    return (
        f"Is the file the network that was measured? Every code inside it, on {first.samples} images, as\n"
        f"ONNX Runtime computes it, against exact integers, and against PyTorch's simulation, whose\n"
        f"rounding turns a code now and then:\n\n"
        f"{text_table(header, rows)}" + (f"\n{first.advice}" if first.advice else "")
    )


def _percent(share: float) -> str:
    """Never rounded up to 100."""
    return "100 %" if share == 1 else f"{math.floor(1e6 * share) / 1e4:.4f} %"

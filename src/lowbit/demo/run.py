"""`lowbit demo`: one trained network, quantized to 8 bits and to 4-bit weights, with every figure measured here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.bench import time_files, timing_table
from lowbit.demo.data import load_images
from lowbit.demo.network import load_network
from lowbit.files import atomic_path
from lowbit.progress import track
from lowbit.tables import text_table

__all__ = ["run"]

PRESETS = ("w8a8", "w4a8")
NAMES = {"w8a8": "INT8", "w4a8": "4-bit weights"}
CALIBRATION_IMAGES = 512
PARITY_IMAGES = 500
ROUNDS = 200

Say = Callable[[str], None]


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


def run(out: Path, say: Say) -> dict[str, Any]:
    """Quantize the demo network, show what became of it, and write its files into `out`.

    Args:
        out: folder, made where it is missing.
        say: takes the text, piece by piece.

    Returns:
        Every figure shown, as plain data; also written to `out/report.json`.
    """
    out.mkdir(parents=True, exist_ok=True)
    network, data = load_network(), _load()
    say(
        f"The network: a ResNet with {sum(p.numel() for p in network.parameters()):,} weights that tells ten kinds "
        f"of clothing apart.\nCalibrated on {CALIBRATION_IMAGES} training images, judged on {len(data.labels):,} "
        "test images that it never saw.\n"
    )
    answers = _answers(network, data.test)
    right = _share(answers, data.labels)
    scores, kept = _quantize_every_way(network, data, answers)
    say(
        "What is quantized (preset w8a8; in w4a8 all weights but the first and the last layer's have 4 bits):\n"
    )
    say(f"{kept['w8a8'].coverage()}\n")
    say(f"{_score_table(scores, right)}\n")
    files = _write(out, network, kept, data.calibration[0])
    say(f"{_size_table(files)}\n")
    timings = time_files([files["float"]["onnx"], *(files[p]["onnx"] for p in PRESETS)], rounds=ROUNDS)
    say(f"Speed in ONNX Runtime, one thread, one image at a time, {ROUNDS} rounds in turn; float is 1x:\n")
    say(f"{timing_table(timings)}\n")
    parity = {p: lowbit.verify(kept[p], files[p]["onnx"], data.test, PARITY_IMAGES // 100) for p in PRESETS}
    say(f"{_parity_table(parity)}\n")
    record = {
        "float_accuracy": right,
        "scores": [asdict(score) for score in scores],
        "coverage": {p: asdict(kept[p].coverage()) for p in PRESETS},
        "steps": {p: [asdict(step) for step in kept[p].steps] for p in PRESETS},
        "bytes": {
            name: {k: path.stat().st_size for k, path in paths.items()} for name, paths in files.items()
        },
        "speed": [asdict(timing) for timing in timings],
        "parity": {p: {"exact": found.exact, **asdict(found)} for p, found in parity.items()},
    }
    with atomic_path(out / "report.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    say(f"Files are in {out}/: float.onnx; w8a8 and w4a8 as .safetensors, .onnx and .yaml; report.json.")
    return record


def _load() -> _Data:
    x, _ = load_images("train")
    test, labels = load_images("test")
    return _Data(list(x[:CALIBRATION_IMAGES].split(64)), list(test.split(100)), labels)


def _answers(network: nn.Module, images: list[Tensor]) -> Tensor:
    """The class that the network names for each image."""
    with torch.inference_mode():
        return torch.cat([network(batch).argmax(1) for batch in images])


def _share(a: Tensor, b: Tensor) -> float:
    return (a == b).double().mean().item()


def _quantize_every_way(
    network: nn.Module, data: _Data, answers: Tensor
) -> tuple[list[Score], dict[str, lowbit.QuantizedModel]]:
    """Each preset with each way to choose the ranges of activations; the preset's own way is kept."""
    ways = [(preset, observer) for preset in PRESETS for observer in lowbit.observers.names()]
    scores, kept = [], {}
    for preset, observer in track(ways, "quantizing", total=len(ways)):
        recipe = lowbit.preset(preset, observer=observer)
        q = lowbit.quantize(network, recipe, data.calibration)
        found = _answers(q, data.test)
        scores.append(Score(preset, observer, _share(found, data.labels), _share(found, answers)))
        if recipe == lowbit.preset(preset):
            kept[preset] = q
    return scores, kept


def _score_table(scores: list[Score], right: float) -> str:
    default = lowbit.preset(PRESETS[0]).rules[0].observer
    rows = []
    for name in lowbit.observers.names():
        by_preset = {s.recipe: s for s in scores if s.calibration == name}
        found = [by_preset[preset] for preset in PRESETS]
        cells = [f"{100 * share:.2f} %" for s in found for share in (s.accuracy, s.agreement)]
        rows.append((f"{name} (default)" if name == default else name, *cells))
    return (
        f"Test images answered right; the float network: {100 * right:.2f} %. 'agrees': same answer as the float "
        "network.\nOne line for each way to choose the ranges of activations:\n\n"
        + text_table(("calibration", "INT8", "agrees", "4-bit weights", "agrees"), rows)
    )


def _write(
    out: Path, network: nn.Module, kept: dict[str, lowbit.QuantizedModel], example: Tensor
) -> dict[str, dict[str, Path]]:
    """Write every file; the paths by network and kind."""
    files = {"float": {"onnx": lowbit.export.float_onnx(network, out / "float.onnx", example)}}
    for preset, q in kept.items():
        files[preset] = {kind: out / f"{preset}.{kind}" for kind in ("safetensors", "onnx", "yaml")}
        lowbit.save(q, files[preset]["safetensors"])
        lowbit.export.onnx(q, files[preset]["onnx"])
        q.recipe.save(files[preset]["yaml"])
    return files


def _size_table(files: dict[str, dict[str, Path]]) -> str:
    size = {(n, k): path.stat().st_size for n, paths in files.items() for k, path in paths.items()}
    whole = size["float", "onnx"]
    rows = [("float, FP32", "", f"{whole:,}", "1.0x")]
    for preset in PRESETS:
        small = size[preset, "onnx"]
        saved = f"{size[preset, 'safetensors']:,}"
        rows.append((f"{preset}, {NAMES[preset]}", saved, f"{small:,}", f"{whole / small:.1f}x"))
    return "Bytes on disk:\n\n" + text_table(("network", "checkpoint", "ONNX", "smaller"), rows)


def _parity_table(parity: dict[str, Any]) -> str:
    rows = []
    for preset, found in parity.items():
        codes = sum(layer.codes for layer in found.layers)
        equal = sum(layer.codes * layer.equal for layer in found.layers)
        simulated = sum(layer.codes * layer.simulation_equal for layer in found.layers)
        worst = max(layer.max_lsb for layer in found.layers)
        rows.append(
            (f"{preset}.onnx", f"{codes:,}", _percent(equal / codes), str(worst), _percent(simulated / codes))
        )
    header = ("file", "codes compared", "equal", "largest difference", "equal to the float simulation")
    return (
        f"Is the file the network that was measured? Every code inside it on {PARITY_IMAGES} images, against exact "
        "integer\narithmetic, and against the simulation in floating point that PyTorch runs:\n\n"
        + text_table(header, rows)
    )


def _percent(share: float) -> str:
    """Never rounded up to 100."""
    return "100 %" if share == 1 else f"{math.floor(1e6 * share) / 1e4:.4f} %"

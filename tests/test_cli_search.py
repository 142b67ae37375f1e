"""`lowbit search`: a budget in, a recipe out that the other commands take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit import Recipe
from lowbit.cli import main

SCRIPT = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )

def data():
    torch.manual_seed(1)
    x = torch.rand(48, 1, 6, 6)
    return list(zip(x.split(16), build().eval()(x).argmax(1).split(16)))

def unlabelled():
    return [x for x, _ in data()]
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(SCRIPT)
    return str(path)


def run(script: str, out: Path, *options: str) -> int:
    arguments = ["search", f"{script}:build", "--out", str(out), "--bits", "8,4,2"]
    data = [] if "--data" in options else ["--data", f"{script}:data"]
    return main([*arguments, *data, *options])


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_budget_becomes_a_recipe(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s"
    assert run(script, out, "--average-bits", "4", "--json") == 0
    told = answer(capsys)
    assert told["average_bits"] <= 4
    assert told["holds"]
    recipe = Recipe.load(out / "recipe.yaml")
    assert recipe.to_dict() == told["recipe"]
    assert recipe.fold_bn == "after", "as in the preset, so that it can be trained"
    assert (out / "probes.jsonl").exists()
    assert (out / "table.json").exists()
    file = tmp_path / "m.safetensors"
    quantize = ["quantize", f"{script}:build", "--recipe", str(out / "recipe.yaml")]
    assert main([*quantize, "--data", f"{script}:data", "-o", str(file), "--json"]) == 0
    assert file.exists()


def test_run_again_it_measures_nothing_again(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    assert run(script, out, "--compression", "3", "--weights-only", "--json") == 0
    first, written = answer(capsys), (out / "probes.jsonl").read_text()
    assert run(script, out, "--compression", "3", "--weights-only", "--json") == 0
    assert answer(capsys) == first
    assert (out / "probes.jsonl").read_text() == written
    assert first["compression"] >= 3


def test_a_floor(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script, tmp_path / "s", "--min-accuracy", "0.5x", "--weights-only", "--json") == 0
    told = answer(capsys)
    assert told["accuracy"] >= 0.5 * told["float_accuracy"]


def test_pins_and_text(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script, tmp_path / "s", "--average-bits", "6", "--pin", "0=2", "--no-repair") == 0
    text = capsys.readouterr().out
    assert "pinned" in text
    assert "measured accuracy" in text


BAD: dict[str, tuple[list[str], str]] = {
    "no budget": ([], "a search needs a budget; give --compression"),
    "widths": (["--average-bits", "4", "--bits", "8,x"], "--bits '8,x' is not a list of numbers"),
    "pin": (["--average-bits", "4", "--pin", "0:4"], "--pin '0:4' is not of the form LAYER=BITS"),
    "floor": (["--min-accuracy", "92"], "--min-accuracy '92' is neither a share"),
    "unknown layer": (["--average-bits", "4", "--pin", "conv=4"], "--pin 'conv': no layer has that name"),
    "too small": (["--compression", "99"], "keeps the budget's compression"),
    "negative": (["--compression", "-1"], "compression=-1.0 is not a positive number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = BAD[name]
    assert run(script, tmp_path / "s", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")


def test_data_without_labels(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script, tmp_path / "s", "--average-bits", "4", "--data", f"{script}:unlabelled") == 2
    assert "--data has no labels, which accuracy needs" in capsys.readouterr().err


def test_a_budget_of_latency(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    options = ("--latency", "1000", "--weights-only", "--no-repair", "--bits", "8,4", "--json")
    assert run(script, tmp_path / "s", *options) == 0
    told = answer(capsys)
    assert 0 < told["latency_ms"] < 1000
    assert set(told["bits"].values()) == {8}, "nothing else was asked"

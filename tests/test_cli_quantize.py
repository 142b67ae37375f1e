"""`lowbit quantize --recipe auto`: the ladder on the command line, and what is for it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.cli import main
from lowbit.cli_inputs import load_data, load_model

# labels are those of the float model, so that its accuracy is 100 %
SCRIPT = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 9),
    )

def batches(seed):
    torch.manual_seed(seed)
    x = torch.randn(96, 1, 6, 6)
    return list(zip(x.split(32), build().eval()(x).argmax(1).split(32)))

def data():
    return batches(1)

def held():
    return batches(2)

def dicts():
    return [{"input": x, "labels": y} for x, y in data()]

def unlabelled():
    return [x for x, _ in data()]

def nothing():
    return []
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(SCRIPT)
    return str(path)


def run(script: str, *options: str, recipe: str = "auto", data: str | None = "data") -> int:
    output = str(Path(script).parent / "m.safetensors")
    given = ["--data", f"{script}:{data}"] if data else []
    return main(["quantize", f"{script}:build", "-o", output, "--recipe", recipe, *given, *options])


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def accuracy(model: Any, batches: Any) -> float:
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def test_the_ladder_as_data(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script, "--val", f"{script}:held", "--max-drop", "60", "--bits", "4", "--json") == 0
    found = told(capsys)
    assert found["float_accuracy"] == 100
    assert found["measured_on"] == "validation data"
    assert found["max_drop"] == 60
    assert found["ladder"][0]["rung"] == "w4a8, ranges by min-max"
    assert [rung["holds"] for rung in found["ladder"]] == [*[False] * (len(found["ladder"]) - 1), True]
    model = load_model(f"{script}:build")
    q = lowbit.load(Path(script).parent / "m.safetensors", model)
    with torch.no_grad():
        measured = accuracy(q, load_data(f"{script}:held"))
    assert found["ladder"][-1]["accuracy"] == found["accuracy"] == pytest.approx(measured)
    assert lowbit.Recipe.from_dict(found["recipe"]).rules == q.recipe.rules
    assert set(found) >= {"coverage", "steps", "files", "float_bytes", "model"}


def test_the_ladder_as_text_and_without_val(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script, "--max-drop", "100", data="dicts") == 0
    text = capsys.readouterr().out
    assert "auto: w8a8, ranges by min-max: " in text
    assert (
        "float accuracy 100.00 %, of which 100 points may go; on the calibration data, for there is no"
        in text
    )
    assert "runs as" in text


def test_where_none_holds_it_keeps_the_best_and_says_so(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, "--max-drop", "0", "--bits", "1", "--json") == 1
    found = told(capsys)
    assert not any(rung["holds"] for rung in found["ladder"])
    assert found["accuracy"] == max(rung["accuracy"] for rung in found["ladder"])
    assert any("no rung holds" in step["text"] for step in found["steps"])
    assert (Path(script).parent / "m.safetensors").exists()


BAD: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "a drop": ({"recipe": "w8"}, ["--max-drop", "1"], "--max-drop is for --recipe auto, and"),
    "bits": ({"recipe": "w4a8"}, ["--bits", "4"], "--bits is for --recipe auto"),
    "val": ({"recipe": "w4a8"}, ["--val", "x.npz"], "--val is for --recipe auto"),
    "resume": ({}, ["--resume", "folder"], "--resume keeps the layers of one recipe"),
    "no data": ({"data": None}, [], "--recipe auto compares recipes on your data; give --data"),
    "no labels": ({"data": "unlabelled"}, [], "--data, for there is no --val, has no labels"),
    "no batch": ({"data": "nothing"}, [], "--data, for there is no --val, holds no batch"),
    "a negative drop": ({}, ["--max-drop", "-1"], "max_drop=-1.0 is not a finite number from 0 up"),
    "too many bits": ({}, ["--bits", "9"], "no preset is named 'w9a8'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, script: str, capsys: pytest.CaptureFixture[str]) -> None:
    how, options, message = BAD[name]
    assert run(script, *options, **how) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")


def test_what_is_rounded_is_kept_where_asked(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(script).parent / "rounded"
    first, again = (run(script, "--resume", str(folder), recipe="w4a8") for _ in range(2))
    assert first == again == 0
    assert sorted(folder.glob("*-gptq-*.safetensors"))

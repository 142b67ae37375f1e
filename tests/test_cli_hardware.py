"""The command line on fixed point: quantize, inspect, export, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.cli import main

MODEL = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and its checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(MODEL)
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32))
    line = "quantize net.py:build --recipe fixed6 --data data.npz -o net.safetensors"
    assert main(line.split()) == 0
    return tmp_path


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main([*line.split(), "--json"])
    shown = capsys.readouterr()
    return code, json.loads(shown.out) if code == 0 else {"error": shown.err}


def test_types_costs_and_overflows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run("inspect net.safetensors --hardware --model net.py:build --data data.npz", capsys)
    assert code == 0
    assert [step["op"] for step in found["steps"]] == ["input", "dense", "relu", "dense"]
    assert found["ebops"] == sum(step["ebops"] for step in found["steps"])
    assert 0 <= found["steps"][0]["overflow"] < 0.1
    assert run("inspect net.safetensors --hardware", capsys)[1]["error"].startswith("error: --hardware needs")


@pytest.mark.parametrize(("to", "package"), [("qonnx", "qonnx"), ("hls4ml", "hls4ml"), ("verilog", "da4ml")])
def test_export(to: str, package: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    code, found = run(f"export net.safetensors --model net.py:build --to {to} -o out", capsys)
    assert code == 0, found
    assert found["to"] == to
    assert found["bytes"] > 500
    if to == "qonnx":
        code, found = run(
            "verify net.safetensors --model net.py:build --exported out --data data.npz", capsys
        )
        assert (code, found["ok"], found["equal"], found["samples"]) == (0, True, 1.0, 300)
    else:
        code, found = run(f"export net.safetensors --model net.py:build --to {to} -o out", capsys)
        assert code == 2
        assert "'out' exists" in found["error"] or "'out' is not empty" in found["error"]


def test_bad_targets(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        "hls4ml" in run("export net.safetensors --model net.py:build --to hls4m -o out", capsys)[1]["error"]
    )
    (here / "other").mkdir()
    line = "verify net.safetensors --model net.py:build --exported other --data data.npz"
    assert "no lowbit.json" in run(line, capsys)[1]["error"]

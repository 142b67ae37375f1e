"""`lowbit tensorize`: rules in, one checkpoint out that the other commands read with the dense model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lowbit import preset
from lowbit.cli import main

SCRIPT = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 3),
    )
    with torch.no_grad():
        model[4].weight.copy_(torch.randn(64, 6) @ torch.randn(6, 256) / 16)
    return model.eval()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(SCRIPT)
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype("float32"))
    return tmp_path


def run(place: Path, *options: str) -> int:
    model, output = f"{place}/net.py:build", f"{place}/m.safetensors"
    return main(["tensorize", model, "-o", output, *options])


def test_the_checkpoint_is_read_with_the_dense_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, recipe = ["--data", f"{place}/d.npz"], f"{place}/r.yaml"
    # GPTQ would put the ranks that are too many to use
    replace(preset("w4a8"), refine=("affine_correct",)).save(recipe)
    assert run(place, "--rule", "4=svd:rank=12", "--recipe", recipe, "--reduce", "2", *data, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    (row,) = told["reduced"]
    assert row["ranks_before"] == [12]
    assert row["ranks_after"] == [6]
    (network,) = told["networks"]
    assert network["name"] == "4"
    assert network["weights"] == 6 * (64 + 256)
    assert not network["advice"]
    assert told["files"] == {str(place / "m.safetensors"): (place / "m.safetensors").stat().st_size}
    dense = ["--model", f"{place}/net.py:build"]
    assert main(["export", f"{place}/m.safetensors", *dense, "-o", f"{place}/m.onnx"]) == 0
    checked = ["verify", f"{place}/m.safetensors", *dense, "--onnx", f"{place}/m.onnx", *data]
    assert main(checked) == 0


def test_it_says_when_a_dense_weight_is_the_better_buy(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, "--rule", "6=svd:rank=1", "--bits", "8", "--input-shape", "1,1,8,8") == 0
    assert "is the better buy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "no --rule says what to do"),
        (("--rule", "4"), "not of the form LAYERS=KIND:OPTION=VALUE"),
        (("--rule", "4=tt:rnk=3"), "has no option 'rnk'; did you mean 'rank'?"),
        (("--rule", "4=tt:rank=many"), "'many' is not what rank takes"),
        (("--rule", "4=tt:energy=7"), "Energy share 7.0 is not above 0 and at most 1"),
        (("--rule", "4=tt:modes=4x4x4/4x8x4"), "multiply to 128, and there are 256 inputs; use"),
        (("--rule", "9=tt"), "rule '9' matches no layer"),
        (("--rule", "4=tt", "--recipe", "w8a8"), "give --data or use w8"),
    ],
)
def test_bad_input_is_one_clear_error(
    place: Path, options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = () if "--recipe" in options else ("--bits", "8", "--input-shape", "1,1,8,8")
    assert run(place, *options, *shape) == 2
    told = capsys.readouterr().err
    assert says in told
    assert not (place / "m.safetensors").exists()

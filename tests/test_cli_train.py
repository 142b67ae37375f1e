"""`lowbit train` on a tiny model: what it writes, how a killed run goes on, the line that bad input gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import lowbit
from lowbit.cli import main
from lowbit.cli_inputs import load_data, load_model

MODEL = """
import numpy as np
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 3),
    )

def no_layer():
    return nn.Sequential(nn.Flatten(), nn.ReLU())

def batches():
    with np.load(DATA) as data:
        x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    return list(zip(x.split(32), y.split(32)))
"""


class Place:
    """A folder with a trained model, its data, and what `lowbit train` made of them without interruption."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "net.py").write_text(f"DATA = {str(folder / 'train.npz')!r}\n{MODEL}")
        generator = torch.Generator().manual_seed(4)
        patterns = torch.randn(3, 1, 6, 6, generator=generator)
        for name, count in (("train", 192), ("val", 96)):
            y = torch.randint(3, (count,), generator=generator)
            x = patterns[y] + 2.5 * torch.randn(count, 1, 6, 6, generator=generator)
            np.savez(folder / f"{name}.npz", x=x.numpy(), y=y.numpy())
        np.save(folder / "no_labels.npy", x.numpy())
        torch.save({"x": x}, folder / "data.pt")
        self.train_float()
        # the same name as a preset, and other bits
        other = folder / "other"
        other.mkdir()
        lowbit.preset("w3a3").save(other / "w4a4.yaml")

    def train_float(self) -> None:
        model = load_model(self.path("net.py:net")).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(6):
            for x, y in load_data(self.path("train.npz"), 32):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        save_file(model.state_dict(), self.path("float.safetensors"))

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def arguments(self, out: str, *more: str) -> list[str]:
        data = ["--data", self.path("train.npz"), "--val", self.path("val.npz"), "--batch-size", "32"]
        model = [self.path("net.py:net"), "--weights", self.path("float.safetensors")]
        return ["train", *model, *data, "--out", self.path(out), *more]

    def files(self) -> set[str]:
        return {
            str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if "__pycache__" not in str(p)
        }


FULL = ["--recipe", "w4a4", "--recipe", "w2a2", "--epochs", "20", "--lr", "0.05"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def whole(place: Place) -> dict[str, Any]:
    """The JSON of one uninterrupted run; its files are in `whole`."""
    command = [sys.executable, "-m", "lowbit.cli", *place.arguments("whole", *FULL, "--onnx", "--json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True, stdin=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def share_right(model: torch.nn.Module, data: str) -> float:
    with np.load(data) as arrays, torch.inference_mode():
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
        return (model(x).argmax(1) == y).double().mean().item()


# --- good input


def test_train_sets_ptq_and_qat_side_by_side(place: Place, whole: dict[str, Any]) -> None:
    model, val = load_model(place.path("net.py:net"), place.path("float.safetensors")), place.path("val.npz")
    assert whole["float_accuracy"] == pytest.approx(share_right(model, val))
    assert whole["samples"] == 96
    four, two = whole["recipes"]
    assert (four["recipe"], two["recipe"]) == ("w4a4", "w2a2")
    for found in (four, two):
        q = lowbit.load(found["file"], model)
        assert q.frozen
        assert found["qat_accuracy"] == pytest.approx(share_right(q, val))
        assert found["bytes"] == Path(found["file"]).stat().st_size
        assert found["exact"]
        assert len(found["epochs"]) == 20
        assert found["epochs"][-1]["loss"] < found["epochs"][0]["loss"]
    assert two["bytes"] < four["bytes"]
    names = {f"whole/{n}.{kind}" for n in ("w4a4", "w2a2") for kind in ("safetensors", "onnx")}
    names |= {f"whole/{n}/{file}" for n in ("w4a4", "w2a2") for file in ("last.safetensors", "metrics.jsonl")}
    assert names <= place.files()


def test_a_killed_run_goes_on_to_the_same_files(place: Place, whole: dict[str, Any]) -> None:
    arguments, folder = place.arguments("killed", *FULL), place.folder / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lowbit.cli", *arguments],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    lines, deadline = folder / "w2a2" / "metrics.jsonl", time.monotonic() + 60
    while not (lines.exists() and '"kind": "epoch"' in lines.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "w4a4.safetensors").exists()
    assert not (folder / "w2a2.safetensors").exists()
    finished = (folder / "w4a4" / "last.safetensors").stat().st_mtime_ns

    assert main(arguments) == 0
    assert (folder / "w4a4" / "last.safetensors").stat().st_mtime_ns == finished
    for name in ("w4a4", "w2a2"):
        one, other = (place.folder / f / f"{name}.safetensors" for f in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name


def test_restart_begins_anew_and_text_shows_the_table(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--recipe", "w2a2", "--epochs", "1"]
    assert main(place.arguments("again", *few)) == 0
    table = capsys.readouterr().out.split("\n\n")[-2]
    header, row = (line.split() for line in table.splitlines())
    assert header == ["recipe", "float", "PTQ", "QAT", "bytes"]
    size = (place.folder / "again" / "w2a2.safetensors").stat().st_size
    assert (row[0], row[-1]) == ("w2a2", f"{size:,}")
    assert main(place.arguments("again", *few, "--seed", "1")) == 2
    assert "--restart" in capsys.readouterr().err
    assert main(place.arguments("again", *few, "--seed", "1", "--restart")) == 0


def test_stages_labels_alone_and_batches_of_a_callable(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", place.path("net.py:net"), "--data", place.path("net.py:batches"), "--no-distill"]
    arguments += ["--recipe", "w4a4", "--bits", "32,8,4", "--epochs", "3", "--out", place.path("staged")]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [epoch["bits"] for epoch in found["recipes"][0]["epochs"]] == [32, 8, 4]
    assert found["samples"] == 192
    assert not found["distilled"]
    assert found["measured_on"].startswith("training data")


def test_without_a_model_it_trains_the_one_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On few images: the real ones take minutes."""
    from lowbit.demo import data

    images = data._read
    monkeypatch.setattr(data, "_read", lambda split: tuple(t[:192] for t in images(split)))
    arguments = ["train", "--batch-size", "64", "--recipe", "w2a2", "--epochs", "2", "--out", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["float_accuracy"] > 0.9
    assert found["recipes"][0]["qat_accuracy"] > 0.5
    assert found["measured_on"] == "shipped test images"


# --- bad input

GOOD = ["train", "net.py:net", "--data", "train.npz", "--val", "val.npz", "--out", "new", "--recipe", "w4a4"]


def changed(old: str, new: str) -> list[str]:
    return [new if a == old else a for a in GOOD]


BAD = {
    "no data": (["train", "net.py:net"], "give --data TRAIN"),
    "data without a model": (["train", "--data", "train.npz"], "goes with a MODEL"),
    "weights without a model": (["train", "--weights", "float.safetensors"], "goes with a MODEL"),
    "data without labels": (changed("train.npz", "no_labels.npy"), "--data has no labels"),
    "validation data without labels": (changed("val.npz", "no_labels.npy"), "--val has no labels"),
    "validation data missing": (changed("val.npz", "vall.npz"), "--val 'vall.npz' does not exist"),
    "validation data is a pickle": (changed("val.npz", "data.pt"), "--val 'data.pt' is a pickle"),
    "weights missing": ([*GOOD, "--weights", "flaot.safetensors"], "did you mean 'float.safetensors'?"),
    "model without a layer": (changed("net.py:net", "net.py:no_layer"), "no quantized layer"),
    "nothing to train": ([*changed("w4a4", "floats.yaml")], "no quantized layer"),
    "recipe near": (changed("w4a4", "w4a44"), "did you mean 'w4a4'?"),
    "recipes of one name": ([*GOOD, "--recipe", "other/w4a4.yaml"], "two are called 'w4a4'"),
    "teacher and none": ([*GOOD, "--teacher", "net.py:net", "--no-distill"], "one of the two"),
    "teacher near": ([*GOOD, "--teacher", "net.py:nett"], "did you mean 'net'?"),
    "bits that are none": ([*GOOD, "--bits", "4;2"], "'4;2' is not a list"),
    "bits that rise": ([*GOOD, "--bits", "2,4", "--epochs", "2"], "does not fall"),
    "no epoch": ([*GOOD, "--epochs", "0"], "--epochs"),
    "negative rate": ([*GOOD, "--lr", "-1"], "lr=-1.0"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_line(
    place: Place,
    arguments: list[str],
    reason: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place.folder)
    lowbit.Recipe(rules=(lowbit.Rule(activation=lowbit.UINT8),)).save("floats.yaml")
    before = place.files()
    capfd.readouterr()
    assert main([arguments[0], "--json", *arguments[1:]]) == 2
    shown = capfd.readouterr()
    assert len(shown.err.splitlines()) == 1, shown.err
    assert shown.err.startswith("error: ")
    assert reason in shown.err
    assert shown.out == ""
    assert place.files() == before


RESUME = {
    "another rate": (["--lr", "0.5"], ("lr = 0.05", "--restart")),
    "another recipe under the name": (["--recipe", "other/w4a4.yaml"], ("recipe.", "--restart")),
    "another number of batches": (["--batch-size", "16"], ("steps_per_epoch = 6", "--restart")),
}


@pytest.mark.parametrize(("change", "reasons"), RESUME.values(), ids=RESUME.keys())
def test_a_run_of_other_settings_is_not_gone_on_with(
    place: Place,
    whole: dict[str, Any],
    change: list[str],
    reasons: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place.folder)
    recipes = [] if "--recipe" in change else ["--recipe", "w4a4"]
    usual = ["--epochs", "20", *([] if "--lr" in change else ["--lr", "0.05"])]
    kept = (place.folder / "whole" / "w4a4.safetensors").read_bytes()
    assert main([*place.arguments("whole", *usual), *recipes, *change]) == 2
    error = capsys.readouterr().err
    assert all(reason in error for reason in reasons), error
    assert (place.folder / "whole" / "w4a4.safetensors").read_bytes() == kept


def test_a_damaged_checkpoint_is_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--recipe", "w4a4", "--epochs", "1"]
    assert main(place.arguments("torn", *few)) == 0
    last = place.folder / "torn" / "w4a4" / "last.safetensors"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert main(place.arguments("torn", *few)) == 2
    assert str(last) in capsys.readouterr().err

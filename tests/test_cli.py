"""The command line on a tiny model: what good input writes, and the one line that bad input gets."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

import lowbit
from lowbit.cli import main
from lowbit.cli_inputs import load_data, load_model
from lowbit.core.observers import observers

MODEL = """
import torch
from torch import nn

def net(seed=0):
    print("a model that talks")
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 3),
    )

other = net(1)

def wide(channels):
    return nn.Conv2d(1, channels, 3)

def broken():
    raise RuntimeError("no luck")

def three():
    return 3

def batches():
    torch.manual_seed(5)
    for _ in range(4):
        yield torch.randn(8, 1, 6, 6)
"""
RECIPE = "rules:\n- {match: '*', weight: int8, activation: uint8, obsever: mse}\n"


class Place:
    """A folder with a model, data and the files that `quantize` made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "net.py").write_text(MODEL)
        (folder / "typo.yaml").write_text(RECIPE)
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((48, 1, 6, 6))
        labels = np.zeros(48, np.int64)
        np.savez(folder / "data.npz", x=self.x, y=labels)
        np.savez(folder / "numbered.npz", x=self.x, y=np.arange(48))
        np.savez(folder / "no_x.npz", images=self.x)
        np.savez(folder / "short.npz", x=self.x, y=labels[:5])
        np.savez(folder / "bytes.npz", x=self.x.astype(np.uint8))
        np.savez(folder / "objects.npz", x=np.array([{}, []], dtype=object))
        np.savez(folder / "words.npz", x=np.array(["cat", "dog"]))
        np.savez(folder / "wrong_size.npz", x=self.x[:, :, :4])
        np.save(folder / "data.npy", self.x)
        save_file({"x": torch.from_numpy(self.x)}, folder / "data.safetensors")
        torch.save({"x": torch.ones(1)}, folder / "weights.pt")
        (folder / "torn.safetensors").write_bytes(b"not a safetensors file")
        (folder / "torn.onnx").write_bytes(b"not an onnx file")

    def run(self, *arguments: str) -> int:
        """Exit code; file names are taken in the folder."""
        return main(
            [str(self.folder / a) if (self.folder / a.partition(":")[0]).exists() else a for a in arguments]
        )

    def files(self) -> set[str]:
        return {p.name for p in self.folder.iterdir() if p.name != "__pycache__"}

    def path(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("cli"))
    files = ["-o", made.path("m.safetensors"), "--onnx", made.path("m.onnx")]
    assert made.run("quantize", "net.py:net", "--data", "data.npz", *files) == 0
    return made


def answer(capsys: pytest.CaptureFixture[str]) -> Any:
    """The one JSON object on stdout."""
    return json.loads(capsys.readouterr().out)


# --- good input


def test_quantize_shows_plan_steps_and_coverage(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        place.run("quantize", "net.py:net", "--data", "data.npz", "-o", place.path("again.safetensors")) == 0
    )
    shown = capsys.readouterr()
    plan, steps, coverage = (shown.out.index(s) for s in ("activation", "_correct: ", "runs as"))
    assert plan < steps < coverage
    assert "a model that talks" not in shown.out
    size = (place.folder / "again.safetensors").stat().st_size
    assert f"again.safetensors: {size:,} bytes" in shown.out


def test_quantize_equals_the_library(place: Place) -> None:
    model = load_model(f"{place.folder}/net.py:net")
    batches = torch.from_numpy(place.x).float().split(64)
    expected = lowbit.quantize(model, "w8a8", calibration=list(batches))
    loaded = lowbit.load(place.path("m.safetensors"), model)
    assert torch.equal(loaded(batches[0]), expected(batches[0]))


def test_quantize_says_everything_in_one_json_object(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    output = place.path("json.safetensors")
    arguments = ["--recipe", "w4a8", "--num-batches", "2", "--batch-size", "8", "-o", output, "--json"]
    assert place.run("quantize", "net.py:net", "--data", "data.npz", *arguments) == 0
    found = answer(capsys)
    assert found["files"] == {output: Path(output).stat().st_size}
    assert found["plan"][0]["layer"] == "0"
    assert {row["status"] for row in found["coverage"]["rows"]} == {"integer"}
    assert lowbit.Recipe.from_dict(found["recipe"]).quantizes_activations


def test_quantize_weights_alone_takes_a_shape(place: Place) -> None:
    output = place.path("w8.safetensors")
    shape = ["--input-shape", "1,1,6,6"]
    assert place.run("quantize", "net.py:net", "--recipe", "w8", *shape, "-o", output) == 0
    assert Path(output).exists()


def test_export_writes_the_file_that_quantize_wrote(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    output = place.path("second.onnx")
    assert place.run("export", "m.safetensors", "--model", "net.py:net", "-o", output, "--json") == 0
    assert answer(capsys) == {"file": output, "to": "onnx", "bytes": Path(output).stat().st_size}
    assert (
        place.run(
            "verify", "m.safetensors", "--model", "net.py:net", "--onnx", "second.onnx", "--data", "data.npy"
        )
        == 0
    )


@pytest.mark.parametrize("data", ["data.npz", "data.npy", "data.safetensors", "net.py:batches"])
def test_verify_finds_every_code_equal(place: Place, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "net.py:net", "--onnx", "m.onnx", "--data", data, "--json"]
    assert place.run("verify", "m.safetensors", *arguments) == 0
    found = answer(capsys)
    assert found["exact"]
    assert found["samples"] == (32 if data == "net.py:batches" else 48)


def test_verify_exits_with_1_when_codes_differ(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(place.path("m.onnx"))
    bias = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT32 and len(t.dims))
    bias.raw_data = (np.frombuffer(bias.raw_data, np.int32) + 5000).tobytes()
    onnx.save(model, place.path("changed.onnx"))
    arguments = ["--model", "net.py:net", "--onnx", "changed.onnx", "--data", "data.npz", "--json"]
    assert place.run("verify", "m.safetensors", *arguments) == 1
    assert not answer(capsys)["exact"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_bench_times_files_in_turn(place: Place, runtime: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(runtime)
    assert place.run("bench", "m.onnx", "m.onnx", "--rounds", "5", "--runtime", runtime, "--json") == 0
    first, second = answer(capsys)["files"]
    assert first["speedup"] == first["low"] == first["high"] == 1
    assert second["low"] <= second["speedup"] <= second["high"]
    assert second["bytes"] == Path(place.path("m.onnx")).stat().st_size


@pytest.mark.parametrize(("file", "names"), [("m.safetensors", ["0", "2", "5"]), ("m.onnx", ["0", "2", "5"])])
def test_inspect_counts_every_byte(
    place: Place, file: str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run("inspect", file, "--json") == 0
    found = answer(capsys)
    layers = {row["name"].removeprefix("_"): row for row in found["layers"]}
    assert [layers[name]["weights"] for name in names] == [8 * 9, 8 * 8 * 9, 128 * 3]
    assert {layers[name]["bits"] for name in names} == {8}
    assert layers["2"]["bytes"] >= 8 * 8 * 9 + 4 * 8 + 4 * 8
    assert (
        found["bytes"]
        == Path(place.path(file)).stat().st_size
        >= sum(row["bytes"] for row in found["layers"])
    )
    assert (found["recipe"] is not None) == file.endswith("safetensors")


def test_inspect_env_says_what_lowbit_runs_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--env", "--json"]) == 0
    found = answer(capsys)
    assert found["kernels"] == lowbit.kernels.description()
    assert (found["torch"], found["threads"]) == (torch.__version__, torch.get_num_threads())
    assert found["packages"]["onnx"] == onnx.__version__
    assert main(["inspect", "--env"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in (found["kernels"], found["torch"], onnx.__version__))


def test_inspect_env_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        importlib.metadata, "version", Mock(side_effect=importlib.metadata.PackageNotFoundError)
    )
    assert main(["inspect", "--env", "--json"]) == 0
    assert set(answer(capsys)["packages"].values()) == {None}


def test_the_script_runs_as_a_process(place: Place) -> None:
    command = [sys.executable, "-m", "lowbit.cli", "inspect", "m.safetensors", "--json"]
    done = subprocess.run(
        command, cwd=place.folder, capture_output=True, check=True, stdin=subprocess.DEVNULL
    )
    assert json.loads(done.stdout)["kind"] == "lowbit checkpoint"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(
        name in shown for name in ("demo", "quantize", "train", "export", "verify", "bench", "inspect")
    )


def test_weights_are_loaded_before_quantizing(place: Place) -> None:
    model = load_model(f"{place.folder}/net.py:other")
    save_file(model.state_dict(), place.path("w.safetensors"))
    loaded = load_model(f"{place.folder}/net.py:net", place.path("w.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_shuffled_arrays_follow_the_global_generator_and_drop_the_rest(place: Place) -> None:
    data = load_data(place.path("numbered.npz"), batch_size=20, shuffled=True)
    torch.manual_seed(3)
    first, second = ([y for _, y in data] for _ in range(2))
    torch.manual_seed(3)
    again = list(data)
    assert [len(y) for y in first] == [20, 20]
    assert len(set(torch.cat(first).tolist())) == 40
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert torch.equal(torch.cat([y for _, y in again]), torch.cat(first))
    x, y = again[0]
    assert torch.equal(x, torch.from_numpy(place.x).float()[y])
    whole = list(load_data(place.path("numbered.npz"), batch_size=100, shuffled=True))
    assert [len(y) for _, y in whole] == [48]


def test_arrays_come_in_batches_as_float32(place: Place) -> None:
    batches = list(load_data(place.path("data.npy"), batch_size=20))
    assert [len(x) for x in batches] == [20, 20, 8]
    assert torch.equal(torch.cat(batches), torch.from_numpy(place.x).float())


# --- bad input

QUANTIZE = ["quantize", "net.py:net", "--data", "data.npz", "-o", "new.safetensors"]
ONE_SHOT = ["quantize", "net.py:net", "--data", "net.py:batches", "-o", "new.safetensors"]
WEIGHTS_ALONE = ["quantize", "net.py:net", "--recipe", "w8", "-o", "new.safetensors"]
VERIFY = ["verify", "m.safetensors", "--model", "net.py:net", "--onnx", "m.onnx", "--data", "data.npz"]


def changed(arguments: list[str], old: str, new: str) -> list[str]:
    return [new if a == old else a for a in arguments]


BAD = {
    "unknown command": (["quantise"], "quantise"),
    "unknown option": ([*QUANTIZE, "--recipee", "w8a8"], "--recipee"),
    "option without value": ([*QUANTIZE, "--recipe"], "--recipe"),
    "missing argument": (["quantize"], "MODEL"),
    "not a number": ([*QUANTIZE, "--num-batches", "two"], "--num-batches"),
    "no batches": ([*QUANTIZE, "--num-batches", "0"], "--num-batches"),
    "model without callable": (changed(QUANTIZE, "net.py:net", "net.py"), "form module:callable"),
    "model file missing": (changed(QUANTIZE, "net.py:net", "nett.py:net"), "'nett.py' does not exist"),
    "model name near": (changed(QUANTIZE, "net.py:net", "net.py:nett"), "did you mean 'net'?"),
    "model module near": (changed(QUANTIZE, "net.py:net", "jsom:net"), "did you mean 'json'?"),
    "model needs arguments": (changed(QUANTIZE, "net.py:net", "net.py:wide"), "needs arguments (channels)"),
    "model raises": (changed(QUANTIZE, "net.py:net", "net.py:broken"), "RuntimeError: no luck"),
    "model is no module": (changed(QUANTIZE, "net.py:net", "net.py:three"), "is a int"),
    "weights missing": ([*QUANTIZE, "--weights", "w.safetenors"], "does not exist"),
    "weights are a pickle": ([*QUANTIZE, "--weights", "weights.pt"], "pickle"),
    "weights torn": ([*QUANTIZE, "--weights", "torn.safetensors"], "is not a safetensors file"),
    "weights of another model": ([*QUANTIZE, "--weights", "data.safetensors"], "the model has no 'x'"),
    "data missing, near": (changed(QUANTIZE, "data.npz", "dta.npz"), "does not exist"),
    "data is a pickle": (changed(QUANTIZE, "data.npz", "weights.pt"), "pickle"),
    "data of unknown kind": (changed(QUANTIZE, "data.npz", "data.csv"), "neither one of"),
    "data without x": (changed(QUANTIZE, "data.npz", "no_x.npz"), "has no array 'x' (it has images)"),
    "data and labels disagree": (changed(QUANTIZE, "data.npz", "short.npz"), "48 samples in x, 5 labels"),
    "data of bytes": (changed(QUANTIZE, "data.npz", "bytes.npz"), "x is uint8"),
    "data of words": (changed(QUANTIZE, "data.npz", "words.npz"), "x holds <U3, not numbers"),
    "data of objects": (changed(QUANTIZE, "data.npz", "objects.npz"), "is not a readable .npz file"),
    "data of wrong size": (changed(QUANTIZE, "data.npz", "wrong_size.npz"), "does not run"),
    "data from a function that is none": (changed(QUANTIZE, "data.npz", "net.py:three"), "iterable"),
    "batch size for a callable": ([*ONE_SHOT, "--batch-size", "4"], "own batches"),
    "no data": (["quantize", "net.py:net", "-o", "new.safetensors"], "give --data"),
    "no data and no shape": (WEIGHTS_ALONE, "--input-shape"),
    "bad shape": ([*WEIGHTS_ALONE, "--input-shape", "1,x"], "'1,x'"),
    "recipe near": ([*QUANTIZE, "--recipe", "w8a9"], "did you mean 'w8a8'?"),
    "recipe missing": ([*QUANTIZE, "--recipe", "none.yaml"], "none.yaml"),
    "recipe with unknown key": ([*QUANTIZE, "--recipe", "typo.yaml"], "did you mean 'observer'?"),
    "output folder missing": (changed(QUANTIZE, "new.safetensors", "none/m.safetensors"), "create it first"),
    "onnx folder missing": ([*QUANTIZE, "--onnx", "none/m.onnx"], "create it first"),
    "checkpoint missing": (changed(VERIFY, "m.safetensors", "mm.safetensors"), "does not exist"),
    "checkpoint torn": (changed(VERIFY, "m.safetensors", "torn.safetensors"), "torn.safetensors"),
    "onnx missing": (changed(VERIFY, "m.onnx", "none.onnx"), "does not exist"),
    "onnx torn": (changed(VERIFY, "m.onnx", "torn.onnx"), "torn.onnx"),
    "verify data of wrong size": (changed(VERIFY, "data.npz", "wrong_size.npz"), "does not run on a batch"),
    "bench file missing": (["bench", "none.onnx"], "does not exist"),
    "bench file torn": (["bench", "torn.onnx"], "is not a readable ONNX file"),
    "bench runtime near": (["bench", "m.onnx", "--runtime", "onnxruntim"], "did you mean 'onnxruntime'?"),
    "bench wrong shape": (["bench", "m.onnx", "--input-shape", "1,2,6,6"], "does not run in onnxruntime"),
    "inspect other file": (["inspect", "net.py"], "neither a .safetensors nor an .onnx"),
    "inspect nothing": (["inspect"], "a FILE or, with --env,"),
    "inspect both": (["inspect", "m.onnx", "--env"], "one of the two"),
    "inspect torn": (["inspect", "torn.onnx"], "is not a readable ONNX file"),
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
    before = place.files()
    capfd.readouterr()
    assert main([arguments[0], "--json", *arguments[1:]]) == 2
    shown = capfd.readouterr()
    talk = [line for line in shown.err.splitlines() if line != "a model that talks"]
    assert len(talk) == 1, shown.err
    assert talk[0].startswith("error: ")
    assert reason in talk[0]
    assert shown.out == ""
    assert place.files() == before


def test_no_file_is_left_when_writing_fails(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise lowbit.LowbitError("the model has no ONNX form")

    monkeypatch.setattr(lowbit.export, "onnx", fail)
    assert place.run("export", "m.safetensors", "--model", "net.py:net", "-o", place.path("none.onnx")) == 2
    assert "error: the model has no ONNX form" in capsys.readouterr().err
    assert not (place.folder / "none.onnx").exists()


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Place
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert place.run("inspect", "m.onnx") == 2
    assert "install lowbit[onnx]" in capsys.readouterr().err


# --- the demo


@pytest.fixture
def said() -> tuple[list[str], Callable[[str], None]]:
    lines: list[str] = []
    return lines, lines.append


def test_demo_on_a_few_images(tmp_path: Path, said: tuple[list[str], Callable[[str], None]]) -> None:
    from lowbit.demo.run import Size, run

    lines, say = said
    size = Size(calibration_images=64, test_images=128, parity_images=64, rounds=5)
    record = run(tmp_path / "out", say, size)
    names = {"float.onnx", "report.json"} | {
        f"{p}.{k}" for p in ("w8a8", "w4a8") for k in ("safetensors", "onnx", "yaml")
    }
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(record))
    assert len(record["scores"]) == 2 * len(observers.names())
    assert all(parity["exact"] for parity in record["parity"].values())
    assert min(score["accuracy"] for score in record["scores"]) > 0.8
    assert record["bytes"]["w4a8.onnx"] < record["bytes"]["w8a8.onnx"] < record["bytes"]["float.onnx"]
    assert any("adaptive_percentile" in line for line in lines)

"""The examples run: on few steps, as processes, and what they write is the network they trained."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit.demo import load_images, load_network

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(("name", "package"), [("qat_plain", "torch"), ("qat_accelerate", "accelerate")])
def test_an_own_loop_trains_and_exports(name: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{name}.py needs {package}; install lowbit[dev]")
    arguments = ["--recipe", "w2a2", "--steps", "3", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert done.stdout.rstrip().endswith("code for code: True")
    q = lowbit.load(tmp_path / "w2a2.safetensors", load_network())
    images, labels = load_images("test")
    right = (q(images[:1000]).argmax(1) == labels[:1000]).float().mean().item()
    assert right == pytest.approx(float(shown["QAT"].rstrip("%")) / 100, abs=0.03)


def test_the_binary_network_runs_on_its_kernels(tmp_path: Path) -> None:
    arguments = ["--epochs", "1", "--steps", "2", "--width", "8", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "binary_network.py", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 of 6 layers on bit kernels" in done.stdout
    assert "the kernels put images in the classes of the trained network: True" in done.stdout
    assert done.stdout.rstrip().endswith("code for code: True")

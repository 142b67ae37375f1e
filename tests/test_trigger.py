"""The trigger example on a small table of the same form, from training to a proven project."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "trigger.py"


def write_table(path: Path, classes: tuple[str, ...], columns: int, rows: int) -> None:
    """Clusters that overlap a little, as CSV with a header."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(len(classes), columns, generator=generator)
    labels = torch.randint(0, len(classes), (rows,), generator=generator)
    x = 10 + centres[labels] + torch.randn(rows, columns, generator=generator)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"j{k}" for k in range(columns)), "class"])
        for values, label in zip(x.tolist(), labels.tolist(), strict=True):
            writer.writerow([*values, classes[label]])


# as MAGIC is, and as the LHC jets are
@pytest.mark.parametrize(("classes", "columns"), [(("g", "h"), 10), (("g", "q", "t", "w", "z"), 16)])
def test_from_a_table_to_a_proven_project(classes: tuple[str, ...], columns: int, tmp_path: Path) -> None:
    for package in ("hls4ml", "da4ml", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"trigger.py needs {package}; install lowbit[fpga,plot]")
    write_table(tmp_path / "table.csv", classes, columns, 2000)
    arguments = [
        str(tmp_path / "table.csv"),
        "--epochs",
        "8",
        "--signal",
        "g",
        "--out",
        str(tmp_path / "out"),
    ]
    # neither compiler nor synthesizer: they have tests of their own, and take minutes
    done = subprocess.run(
        [sys.executable, EXAMPLE, *arguments],
        env={**os.environ, "PATH": str(tmp_path)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [s["name"] for s in scores] == ["float", "fixed8", "fixed6", "fixed4", "learned"]
    assert scores[0]["accuracy"] > 0.6
    assert all(0.5 < s["auc"] <= 1 for s in scores)
    assert scores[1]["ebops"] > scores[2]["ebops"] > scores[3]["ebops"]
    assert (tmp_path / "out" / "front.svg").stat().st_size > 1000
    assert (tmp_path / "out" / "hls4ml" / "lowbit.json").is_file()
    for tool in ("g++", "iverilog", "yosys"):
        assert f"{tool} is not there" in done.stdout

"""The trigger example on a small table of the same form, from training to a proven project."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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


def example() -> ModuleType:
    found = importlib.util.spec_from_file_location("trigger", EXAMPLE)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["trigger"] = module  # dataclasses look there
    found.loader.exec_module(module)
    return module


def test_auc_and_rejection_pair_by_pair() -> None:
    """With ties, as few bits give them."""
    trigger = example()
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(300, generator=generator) < 0.4
    value = (torch.randn(300, generator=generator) + wanted).mul(2).round()
    signal, background = value[wanted].tolist(), value[~wanted].tolist()
    pairs = [(s > b) + 0.5 * (s == b) for s in signal for b in background]
    for efficiency in (0.3, 0.5, 0.9):
        # the highest threshold that so much of the signal passes
        enough = [t for t in signal if sum(s >= t for s in signal) >= efficiency * len(signal)]
        passing = sum(b >= max(enough) for b in background)
        auc, rejection = trigger.separation(value, wanted, efficiency)
        assert auc == pytest.approx(sum(pairs) / len(pairs))
        assert rejection == pytest.approx(len(background) / passing)


def test_points_are_spread_over_the_front() -> None:
    trigger = example()
    assert trigger.spread(list(range(9)), 3) == [0, 4, 8]
    assert trigger.spread([7], 3) == [7]
    assert trigger.spread(list(range(9)), 0) == []


# as MAGIC is, and as the LHC jets are
@pytest.mark.timeout(300)
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
    names = [s["name"] for s in scores]
    assert names[:4] == ["float", "fixed8", "fixed6", "fixed4"]
    assert all(name.startswith("epoch") for name in names[4:])
    assert f"{names[-1]}  " in done.stdout
    assert scores[0]["accuracy"] > 0.6
    assert all(0.5 < s["auc"] <= 1 for s in scores)
    assert scores[1]["ebops"] > scores[2]["ebops"] > scores[3]["ebops"]
    picture = (tmp_path / "out" / "front.svg").read_text()
    for words in ("AUC", "background rejection", "effective bit operations", "yosys LUT"):
        assert f"<!-- {words}" in picture
    assert (tmp_path / "out" / "hls4ml" / "lowbit.json").is_file()
    for tool in ("g++", "iverilog", "yosys"):
        assert f"{tool} is not there" in done.stdout

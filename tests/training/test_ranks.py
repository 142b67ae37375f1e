"""Two processes under torchrun find what one process finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_two_ranks import OBSERVERS, everything
from safetensors.torch import load_file
from torch import Tensor

Found = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("on_two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script), str(where)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return where


@pytest.fixture(scope="module")
def ranks(folder: Path) -> tuple[Found, Found]:
    return load_file(folder / "rank0.safetensors"), load_file(folder / "rank1.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return everything(tmp_path_factory.mktemp("alone"))


def test_both_ranks_hold_the_same(ranks: tuple[Found, Found]) -> None:
    one, other = ranks
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


@pytest.mark.parametrize("observer", OBSERVERS)
def test_calibration_finds_exactly_the_ranges_of_one_process(
    observer: str, ranks: tuple[Found, Found], alone: Found
) -> None:
    names = [n for n in alone if n.startswith(f"{observer}.")]
    assert len(names) > 6
    assert [n for n in names if not torch.equal(ranks[0][n], alone[n])] == []


@pytest.mark.parametrize("run", ["plain", "stages"])
def test_training_on_shares_of_each_batch_is_training_on_the_batch(
    run: str, ranks: tuple[Found, Found], alone: Found
) -> None:
    names = [n for n in alone if n.startswith(f"{run}.") and alone[n].numel()]
    far = [
        n for n in names if not torch.allclose(ranks[0][n].float(), alone[n].float(), rtol=1e-3, atol=1e-5)
    ]
    assert far == []


def test_rank_0_writes(folder: Path) -> None:
    written = sorted(p.name for p in (folder / "out2").iterdir())
    assert written == ["best.safetensors", "last.safetensors", "metrics.jsonl"]
    assert len((folder / "out2" / "metrics.jsonl").read_text().splitlines()) == 1 + 3


def test_all_ranks_stop_at_a_loss_that_one_of_them_lost(folder: Path) -> None:
    told = [(folder / f"failure{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0].startswith("the loss is nan at step 1; no scale has moved")

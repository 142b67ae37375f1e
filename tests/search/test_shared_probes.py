"""Two processes under torchrun measure the table that one measures, each a part of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_measure import BITS, data, prepared

from lowbit.search import Sensitivity, sensitivity

HERE = Path(__file__).parent


@pytest.fixture
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_ranks_measure_one_table(tmp_path: Path, one_thread: None) -> None:
    script = HERE / "on_two_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    tables = [Sensitivity.load(tmp_path / f"table{rank}.json") for rank in (0, 1)]
    alone = sensitivity(prepared(), data(), bits=BITS)
    assert tables[0] == tables[1] == alone
    lines = [
        len((tmp_path / "probes" / n).read_text().splitlines()) for n in ("probes.jsonl", "probes.1.jsonl")
    ]
    assert sum(lines) - 2 == sum(len(site.probes) for site in alone)
    assert min(lines) > 3, "both measured a part"
    # and one process goes on with what two have measured
    assert sensitivity(prepared(), data(), bits=BITS, out=tmp_path / "probes") == alone

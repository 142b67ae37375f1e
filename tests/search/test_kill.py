"""A table that is killed with SIGKILL goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from measures_slowly import measure

HERE = Path(__file__).parent


def test_killed_and_resumed_the_same_table(tmp_path: Path) -> None:
    journal = tmp_path / "probes.jsonl"
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    command = [sys.executable, str(HERE / "measures_slowly.py"), str(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.DEVNULL)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -9
    kept = journal.read_bytes()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again, whole = measure(tmp_path), measure(None)
    finally:
        torch.set_num_threads(threads)
    assert again == whole
    total = sum(len(site.probes) for site in whole)
    assert 4 <= kept.count(b"\n") < 1 + total, "it was killed in the middle"
    finished = kept[: kept.rindex(b"\n") + 1]
    assert journal.read_bytes().startswith(finished), "what was finished is kept"
    assert journal.read_bytes().count(b"\n") == 1 + total, "and only the rest was measured"

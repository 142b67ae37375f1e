"""What is killed in the middle: a table on so much data that every probe takes a while."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_measure import BITS, data, prepared

from lowbit.search import Sensitivity, sensitivity

BATCHES = 50


def measure(out: Path | None) -> Sensitivity:
    return sensitivity(prepared(), data(BATCHES), bits=BITS, out=out, curvature=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(Path(sys.argv[1]))

"""What each rank does under `torchrun`: measure a table, and write it down."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_measure import BITS, data, prepared

from lowbit import distributed
from lowbit.search import sensitivity

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    table = sensitivity(prepared(), data(), bits=BITS, out=folder / "probes")
    table.save(folder / f"table{distributed.rank()}.json")

"""One thread and one seed, so that every test gives the same numbers whatever ran before it."""

from __future__ import annotations

import pytest
import torch
from compilers import quick_compiler
from hypothesis import settings

__all__ = ["quick_compiler"]

torch.set_num_threads(1)
settings.register_profile("lowbit", deadline=None, derandomize=True)  # shared machines are slow now and then
settings.load_profile("lowbit")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

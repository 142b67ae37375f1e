"""A quicker g++ for projects that are compiled once to be run once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

__all__ = ["quick_compiler"]

# hls4ml's headers take twice as long to read as C++23, and longer when they are optimized
SHIM = """#!/bin/bash
arguments=("${@/-O3/-O0}")
exec %s "${arguments[@]/-std=c++23/-std=c++14}"
"""


@pytest.fixture
def quick_compiler(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put it first on the PATH; without g++ the test is skipped."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ (package g++)")
    folder = tmp_path_factory.mktemp("bin")
    (folder / "g++").write_text(SHIM % compiler)
    (folder / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder

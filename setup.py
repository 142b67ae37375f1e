"""The compiled part of the package; everything else stands in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup

WINDOWS = sys.platform == "win32"

KERNELS = Path("src/lowbit/kernels")
# no flag that binds it to this processor, none that changes the rounding
COMPILE = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-g0", "-pthread"]


def extension(name: str) -> Extension:
    """The library lowbit.kernels._<name>, from <name>.cpp and any header beside it."""
    return Extension(
        f"lowbit.kernels._{name}",
        [str(KERNELS / f"{name}.cpp")],
        depends=[str(header) for header in sorted(KERNELS.glob("*.h"))],
        extra_compile_args=["/std:c++17"] if WINDOWS else COMPILE,
        extra_link_args=[] if WINDOWS else ["-pthread"],
        language="c++",
        # without a compiler the package installs all the same, and does this work in PyTorch
        optional=True,
    )


setup(ext_modules=[extension("fake_quantize"), extension("bits"), extension("tensor_train")])

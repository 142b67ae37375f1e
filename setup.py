"""The compiled part of the package; everything else stands in pyproject.toml."""

from __future__ import annotations

import sys

from setuptools import Extension, setup

WINDOWS = sys.platform == "win32"

setup(
    ext_modules=[
        Extension(
            "lowbit.kernels._fake_quantize",
            ["src/lowbit/kernels/fake_quantize.cpp"],
            depends=["src/lowbit/kernels/fake_quantize_loops.h"],
            # no flag that binds it to this processor, none that changes the rounding
            extra_compile_args=[]
            if WINDOWS
            else ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-g0", "-pthread"],
            extra_link_args=[] if WINDOWS else ["-pthread"],
            language="c++",
            # without a compiler the package installs all the same, and does this work in PyTorch
            optional=True,
        )
    ]
)

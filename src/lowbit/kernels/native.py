"""Finds and loads the compiled library; without one, says why."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_int, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from lowbit.errors import LowbitError

__all__ = ["PATHS", "Library", "load"]

# What the library calls its loops: the position is the number.
PATHS = ("portable", "AVX2", "AVX512")
VERSION = 2
VARIABLE = "LOWBIT_KERNELS"

_SHAPE = [c_int64, c_int64, c_int64]  # outer, scales, inner
_ARGUMENTS = {
    "lowbit_fake_quantize": [c_void_p] * 5 + [c_int, *_SHAPE] + [c_int] * 4,
    "lowbit_masked_backward": [c_void_p] * 3 + [c_int64, c_int, c_int],
    "lowbit_fake_quantize_backward": [c_void_p] * 7 + [c_int, *_SHAPE] + [c_int] * 5,
}


class Library:
    """The functions of fake_quantize.cpp, and the loops they take."""

    def __init__(self, path: Path) -> None:
        """Load the library at `path`.

        Raises:
            LowbitError: it does not load, or belongs to another release.
        """
        try:
            lib = ctypes.CDLL(str(path))
            version = lib.lowbit_version()
        except (OSError, AttributeError) as error:
            raise LowbitError(f"{path.name} does not load ({error}); reinstall lowbit") from error
        if version != VERSION:
            raise LowbitError(f"{path.name} is of version {version}, not {VERSION}; reinstall lowbit")
        for name, arguments in _ARGUMENTS.items():
            getattr(lib, name).argtypes = arguments
            getattr(lib, name).restype = None
        self.fake_quantize = lib.lowbit_fake_quantize
        self.masked_backward = lib.lowbit_masked_backward
        self.fake_quantize_backward = lib.lowbit_fake_quantize_backward
        # the fastest loops this processor runs; those of a smaller number run too
        self.best: int = lib.lowbit_best_path()
        # the loops in use
        self.path = self.best


def load() -> Library | str:
    """The library, or the reason why there is none.

    Raises:
        LowbitError: the environment variable LOWBIT_KERNELS is neither "on" nor "off".
    """
    wish = os.environ.get(VARIABLE, "on")
    if wish not in ("on", "off"):
        raise LowbitError(f"{VARIABLE} is {wish!r}; set it to on or off")
    if wish == "off":
        return f"{VARIABLE} is off"
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_fake_quantize{suffix}")
        if path.exists():
            try:
                return Library(path)
            except LowbitError as error:
                return str(error)
    return "no compiled library; install a C++ compiler and reinstall"

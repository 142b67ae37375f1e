"""Finds and loads the compiled libraries; without one, says why."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError

__all__ = ["BITS", "FAKE_QUANTIZE", "PATHS", "TENSOR_TRAIN", "Interface", "Library", "load"]

# What a library calls its loops: the position is the number.
PATHS = ("portable", "AVX2", "AVX512")
ARM_PATHS = ("portable", "NEON")
VARIABLE = "LOWBIT_KERNELS"


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What is expected of a library."""

    # its file is _<name>, its source <name>.cpp
    name: str
    # that of the signatures below
    version: int
    # before the names of functions
    prefix: str
    # arguments of functions that return nothing
    procedures: Mapping[str, list[Any]]
    # arguments of functions that return an int
    functions: Mapping[str, list[Any]]
    # names of the loops
    paths: tuple[str, ...] = PATHS


_SHAPE = [c_int64, c_int64, c_int64]  # outer, scales, inner
FAKE_QUANTIZE = Interface(
    name="fake_quantize",
    version=2,
    prefix="lowbit_",
    procedures={
        "fake_quantize": [c_void_p] * 5 + [c_int, *_SHAPE] + [c_int] * 4,
        "masked_backward": [c_void_p] * 3 + [c_int64, c_int, c_int],
        "fake_quantize_backward": [c_void_p] * 7 + [c_int, *_SHAPE] + [c_int] * 5,
    },
    functions={},
)
BITS = Interface(
    name="bits",
    version=1,
    prefix="lowbit_bits_",
    procedures={
        "pack_rows": [c_void_p] * 2 + [c_int64] * 2 + [c_float, c_int, c_int],
        "pack_planes": [c_void_p] * 2 + [c_int64] * 4 + [c_float, c_int, c_int],
        "pack_codes": [c_void_p] * 2 + [c_int64] * 4 + [c_int],
        "max_pool": [c_void_p] * 3 + [c_int],
        "product": [c_void_p] * 4 + [c_int, c_void_p, c_int, c_int],
        "float_product": [c_void_p] * 4 + [c_int] + [c_void_p] * 3 + [c_int, c_int],
    },
    functions={"unit": [c_int]},
    paths=ARM_PATHS if platform.machine().lower() in ("aarch64", "arm64") else PATHS,
)
TENSOR_TRAIN = Interface(
    name="tensor_train",
    version=1,
    prefix="lowbit_tensor_train_",
    procedures={"product": [c_void_p] * 3 + [c_int] * 2},
    functions={},
)


class Library:
    """A compiled library: its functions, by their names without the prefix, and the loops they take."""

    def __init__(self, path: Path, interface: Interface) -> None:
        """Load the library at `path`.

        Raises:
            LowbitError: it does not load, or belongs to another release.
        """
        try:
            self._lib = ctypes.CDLL(str(path))
            version = getattr(self._lib, f"{interface.prefix}version")()
        except (OSError, AttributeError) as error:
            raise LowbitError(f"{path.name} does not load ({error}); reinstall lowbit") from error
        if version != interface.version:
            raise LowbitError(
                f"{path.name} is of version {version}, not {interface.version}; reinstall lowbit"
            )
        for functions, result in ((interface.procedures, None), (interface.functions, c_int)):
            for name, arguments in functions.items():
                function = getattr(self._lib, interface.prefix + name)
                function.argtypes, function.restype = arguments, result
                setattr(self, name, function)
        self.paths = interface.paths
        # the fastest loops this processor runs; those of a smaller number run too
        self.best: int = getattr(self._lib, f"{interface.prefix}best_path")()
        # the loops in use
        self.path = self.best

    def __getattr__(self, name: str) -> Any:
        """For the eyes of a type checker: functions are set when the library is loaded."""
        raise AttributeError(name)

    @property
    def description(self) -> str:
        """Such as "native, AVX512"."""
        return f"native, {self.paths[self.path]}"


def load(interface: Interface = FAKE_QUANTIZE) -> Library | str:
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
        path = Path(__file__).with_name(f"_{interface.name}{suffix}")
        if path.exists():
            try:
                return Library(path, interface)
            except LowbitError as error:
                return str(error)
    return "no compiled library; install a C++ compiler and reinstall"

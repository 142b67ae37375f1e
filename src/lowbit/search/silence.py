"""Native code that prints, kept from the standard output, where `--json` and pipes are."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["silent"]


@contextmanager
def silent() -> Iterator[None]:
    """While open, what C and C++ write to file descriptor 1 goes nowhere.

    HiGHS in SciPy 1.17 prints a line of its own debugging there, with every output turned off.
    """
    sys.stdout.flush()
    _flush()
    try:
        saved = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        _flush()
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _flush() -> None:
    """Write out what C's stdio still holds."""
    library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    library.fflush(None)

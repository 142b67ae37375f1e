"""Files that are either whole or not there, and what tells one content from another."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from lowbit.errors import LowbitError

__all__ = ["atomic_path", "digest"]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends well.

    When the block fails nothing is left behind, and a file that was at `path` is still there, untouched.

    Raises:
        LowbitError: the folder does not exist, or the system refuses to write there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise LowbitError(f"'{path}' cannot be written: there is no folder '{path.parent}'; create it first")
    if path.is_dir():
        raise LowbitError(f"'{path}' cannot be written: it is a folder; name a file")
    # the same folder, for only within one file system is replacing atomic
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise LowbitError(f"'{path}' cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of values, shapes and types, shortened."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(f"{t.dtype}{tuple(t.shape)}".encode())
        found.update(t.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]

"""What a run measured, as lines of JSON and as events that TensorBoard shows."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError

__all__ = ["Log"]


class Log:
    """One file of JSON lines, `metrics.jsonl`, to which lines are only added; and events beside it.

    Every line has `kind`: "baseline" (of the teacher), "step" or "epoch". NaN and infinity stand as null.
    """

    def __init__(self, folder: Path, position: int, step: int, *, tensorboard: bool) -> None:
        """Drop what stands behind `position`, a number of bytes: it was written after the checkpoint.

        Raises:
            LowbitError: the file cannot be written, or TensorBoard's events need a package that is missing.
        """
        self.path = folder / "metrics.jsonl"
        self._events = _writer(folder, step) if tensorboard else None
        try:
            self._file = self.path.open("ab")
            self._file.truncate(min(position, self._file.tell()))
        except OSError as error:
            raise LowbitError(f"'{self.path}' cannot be written: {error.strerror or error}") from None

    def write(self, step: int, **values: Any) -> None:
        """Add one line; the numbers in it are also events."""
        line = {"step": step, **{k: _finite(v) for k, v in values.items()}}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{values.get('kind', 'step')}/{name}", value, step)

    def position(self) -> int:
        """Bytes so far, safely on the disk."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Nothing can be written any more."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _writer(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise LowbitError(
            "tensorboard=True needs the package tensorboardX; pip install 'lowbit[train]', or leave it out: "
            "metrics.jsonl has the same numbers"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step)

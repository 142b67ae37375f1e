"""Values of a walk, in memory up to a limit and in temporary files beyond it."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass
from math import inf
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Shelf"]


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in a file that is gone once nothing refers to it."""

    file: IO[bytes]
    # without numbers, in the layout that it had
    like: Tensor

    @classmethod
    def of(cls, value: Tensor) -> _OnDisk:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the last reference
        kept = cls(file, torch.empty_like(value, device="meta"))
        value.detach().permute(kept.order).contiguous().view(torch.uint8).numpy().tofile(file)
        weakref.finalize(kept, file.close)
        return kept

    @property
    def order(self) -> tuple[int, ...]:
        """Axes from the outermost in memory to the innermost."""
        return tuple(sorted(range(self.like.ndim), key=self.like.stride, reverse=True))

    def load(self) -> Tensor:
        self.file.seek(0)
        raw = torch.from_numpy(np.fromfile(self.file, dtype=np.uint8)).view(self.like.dtype)
        return raw.as_strided(self.like.shape, self.like.stride())


class Shelf:
    """Keeps lists of values; of tensors on the CPU only so many bytes at once stay in memory."""

    def __init__(self, limit: float = inf) -> None:
        self.limit, self.held = limit, 0

    def put(self, values: list[Any]) -> list[Any]:
        """What to keep in place of the values."""
        size = _bytes(values)
        if self.held + size <= self.limit:
            self.held += size
            return values
        return [_OnDisk.of(v) if _spills(v) else v for v in values]

    def drop(self, kept: list[Any]) -> None:
        """Values that `put` gave are not needed any more."""
        if not any(isinstance(v, _OnDisk) for v in kept):
            self.held -= _bytes(kept)

    @staticmethod
    def take(value: Any) -> Any:
        """One of them, as it was."""
        return value.load() if isinstance(value, _OnDisk) else value


def _spills(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.ndim > 0 and value.numel() > 0


def _bytes(values: list[Any]) -> int:
    return sum(v.numel() * v.element_size() for v in values if _spills(v))

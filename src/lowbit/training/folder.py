"""The folder of a run: its checkpoints, and whether they belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit import distributed
from lowbit.errors import LowbitError
from lowbit.training.metrics import Log
from lowbit.training.settings import Settings
from lowbit.training.state import first_difference, plain, read_checkpoint, write_checkpoint

__all__ = ["Folder", "check_recipe"]


class Folder:
    """`last.safetensors`, `best.safetensors` and `metrics.jsonl`; rank 0 alone writes."""

    def __init__(self, settings: Settings, identity: Mapping[str, Any]) -> None:
        """Make the folder.

        Args:
            identity: plain data under "recipe", "settings" and "data" that a checkpoint must share to be gone
                on with.

        Raises:
            LowbitError: it cannot be made.
        """
        assert settings.out is not None
        self.path, self.settings, self.identity = Path(settings.out), settings, plain(dict(identity))
        self.last, self.best = self.path / "last.safetensors", self.path / "best.safetensors"
        self.log: Log | None = None
        if distributed.rank() == 0:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                for left_over in self.path.glob(".*.safetensors.*.tmp"):
                    left_over.unlink()
            except OSError as error:
                raise LowbitError(
                    f"out='{self.path}' is no folder to write to: {error.strerror or error}"
                ) from None

    def found(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The checkpoint to go on with, or None to start anew.

        Raises:
            LowbitError: one is demanded and is not there, or the one there is of another run.
        """
        # what rank 0 sees counts, for the others may look after it has begun to write
        there = self.last.exists() and distributed.rank() == 0
        if self.settings.resume is False or (
            self.settings.resume == "auto" and not distributed.add_over_ranks([float(there)])[0]
        ):
            return None
        metadata, tensors = read_checkpoint(self.last)
        difference = first_difference({k: metadata.get(k) for k in self.identity}, self.identity)
        if difference:
            raise _other_run(self.last, *difference)
        return metadata, tensors

    def start(self, position: int | None, step: int) -> None:
        """Open the metrics file, and drop what stands behind `position`; None drops a former run."""
        if distributed.rank() == 0:
            self.log = Log(self.path, position or 0, step, tensorboard=self.settings.tensorboard)
            if position is None:
                self.last.unlink(missing_ok=True)
                self.best.unlink(missing_ok=True)

    def write(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, best: bool = False
    ) -> None:
        """Replace a checkpoint."""
        if self.log is not None:
            more = {**self.identity, "metrics": self.log.position()}
            write_checkpoint(self.best if best else self.last, tensors, {**more, **metadata})

    def note(self, step: int, **values: Any) -> None:
        """Add a line to the metrics."""
        if self.log is not None:
            self.log.write(step, **values)

    def close(self) -> None:
        """Nothing is written any more."""
        if self.log is not None:
            self.log.close()


def check_recipe(path: Path, metadata: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Raise LowbitError unless the checkpoint was trained with that recipe."""
    difference = first_difference({"recipe": metadata.get("recipe")}, {"recipe": plain(recipe)})
    if difference:
        raise _other_run(path, *difference)


def _other_run(path: Path, where: str, old: Any, new: Any) -> LowbitError:
    return LowbitError(
        f"'{path}' was trained with {where} = {old!r}, and now it is {new!r}; go on with the same, or start "
        "anew with another out or with resume=False"
    )

"""Work that is done already, piece by piece in a folder: what was interrupted goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.sealed import MALFORMED, read_sealed, write_sealed

__all__ = ["Finished"]

VERSION = 1


class Finished:
    """Pieces of one work, each a sealed file of tensors with what was said of them.

    Every file says what the work is about, and one about something else is refused, not mixed in.
    """

    def __init__(self, folder: str | Path, work: str, about: str) -> None:
        """Nothing is read yet.

        Args:
            work: its name, with which the names of its files begin.
            about: what tells it from the same work on something else, such as a digest.

        Raises:
            LowbitError: the folder cannot be made.
        """
        self.folder, self.work, self.about = Path(folder), work, about
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LowbitError(f"out='{folder}' is no folder to write to: {error.strerror or error}") from None

    def _path(self, piece: int) -> Path:
        return self.folder / f"{self.work}-{piece:04}.safetensors"

    def load(self, piece: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors of a piece and what was said of it; None where it is not done.

        Raises:
            LowbitError: the file is damaged, or about something else.
        """
        path = self._path(piece)
        if not path.exists():
            return None
        try:
            metadata, tensors = read_sealed(path, VERSION)
            about, said = metadata["about"], dict(metadata["said"])
        except MALFORMED as error:
            raise LowbitError(f"'{path}' is no piece of this work ({error}); take another folder") from None
        if about != self.about:
            raise LowbitError(
                f"'{path}' belongs to another model, other data or another recipe; go on with the same, or "
                "take another folder"
            )
        return tensors, said

    def save(self, piece: int, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
        """A piece is done.

        Raises:
            LowbitError: the file cannot be written.
        """
        own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        write_sealed(self._path(piece), own, {"about": self.about, "said": dict(said)}, VERSION)

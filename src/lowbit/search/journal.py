"""Every finished probe in a file: what was interrupted goes on, and new candidates join the old."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from lowbit import distributed
from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError
from lowbit.search.prober import Sums
from lowbit.training.state import first_difference, plain

__all__ = ["Journal", "Key", "named"]

# part of the data, path of the place, spec
Key = tuple[int, str, QuantSpec]


class Journal:
    """`probes.jsonl` in a folder; with several ranks each writes one of its own, and all are read.

    The first line says what was measured; a journal of something else is refused, not mixed in.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        """Read what is there.

        Raises:
            LowbitError: the folder cannot be made, or what is there was measured on something else.
        """
        self.known: dict[Key, Sums] = {}
        self.identity = plain(dict(identity))
        self.file: Any = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LowbitError(f"out='{folder}' is no folder to write to: {error.strerror or error}") from None
        rank = distributed.rank()
        mine = folder / ("probes.jsonl" if rank == 0 else f"probes.{rank}.jsonl")
        for path in sorted(folder.glob("probes*.jsonl")):
            self._read(path, mine=path == mine)
        fresh = not mine.exists() or not mine.stat().st_size
        self.file = mine.open("a", encoding="utf-8")
        if fresh:
            self._write(self.identity)

    def _read(self, path: Path, *, mine: bool) -> None:
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        if lines[-1] and mine:  # cut off in the middle of a line
            path.write_text(text[: len(text) - len(lines[-1])], encoding="utf-8")
        if len(lines) < 2:
            return
        try:
            identity, *rows = [json.loads(line) for line in lines[:-1]]
            difference = first_difference(identity, self.identity)
            if difference:
                where, old, new = difference
                raise LowbitError(
                    f"'{path}' was measured with {where} = {old!r}, and now it is {new!r}; go on with the "
                    "same, or take another folder"
                )
            for row in rows:
                key = row["part"], row["path"], QuantSpec.from_dict(row["spec"])
                self.known[key] = Sums(*row["sums"])
        except (LookupError, TypeError, ValueError) as error:
            if isinstance(error, LowbitError):
                raise
            raise LowbitError(f"'{path}' is no journal of probes ({error}); take another folder") from None

    def add(self, key: Key, sums: Sums) -> None:
        """A probe is finished."""
        self.known[key] = sums
        part, path, spec = key
        self._write({"part": part, "path": path, "spec": spec.to_dict(), "sums": list(vars(sums).values())})

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Nothing is written any more."""
        if self.file is not None:
            self.file.close()


def named(value: Any) -> str:
    """What a name or a function is, so that another one is noticed: for a function, by its code."""
    if isinstance(value, str):
        return value
    name = f"{getattr(value, '__qualname__', type(value).__qualname__)}"
    code = getattr(value, "__code__", None)
    if not isinstance(code, CodeType):
        shown = repr(value)
        return name if " at 0x" in shown else f"{name} {shown}"
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    fixed = [*cells, *(value.__defaults__ or ())]
    text = [v for v in fixed if isinstance(v, (int, float, str, type(None)))]
    return f"{name} {hashlib.sha256(_code(code) + repr(text).encode()).hexdigest()[:16]}"


def _code(code: CodeType) -> bytes:
    """What a function does, without where it is written."""
    inner = b"".join(_code(c) for c in code.co_consts if isinstance(c, CodeType))
    constants = [c for c in code.co_consts if not isinstance(c, CodeType)]
    return code.co_code + repr((code.co_names, constants)).encode() + inner

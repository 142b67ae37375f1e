"""What the command line says: text as it goes, or one JSON object; stdout is for nothing else."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Answer", "answering"]


@dataclass
class Answer:
    """What a command says: text as it goes, or one record at the end."""

    out: TextIO
    as_json: bool
    # one process of several that work together says what all found
    silent: bool = False
    record: dict[str, Any] = field(default_factory=dict)

    def say(self, text: object = "") -> None:
        if not self.as_json and not self.silent:
            self.out.write(f"{text}\n")
            self.out.flush()


@contextlib.contextmanager
def answering(as_json: bool, *, silent: bool = False) -> Iterator[Answer]:
    """Keep stdout for the answer: what models and runtimes print goes to stderr."""
    answer = Answer(sys.stdout, as_json, silent)
    with contextlib.redirect_stdout(sys.stderr):
        yield answer
    if as_json and not silent:
        answer.out.write(json.dumps(plain(answer.record), allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Data that JSON holds: of numbers only finite ones."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

"""The one exception of the library, and what its messages are made with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["LowbitError", "expect", "near_miss"]


class LowbitError(ValueError):
    """Bad input. The message names the value, the rule it breaks and the cure."""


def expect(value: object, kind: type, what: str, cure: str) -> None:
    """Raise LowbitError unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        shown = (
            f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
        )
        raise LowbitError(f"{what} is {shown}, not a {kind.__name__}; {cure}")


def near_miss(name: str, options: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"`, or the options themselves when none is close."""
    choices = sorted(set(options))
    close = difflib.get_close_matches(str(name), choices, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    return f"; choose from: {shown}" if choices else ""

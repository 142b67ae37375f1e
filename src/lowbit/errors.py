"""The one exception of the library, and the near-miss helper its messages use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["LowbitError", "near_miss"]


class LowbitError(ValueError):
    """Bad input. The message names the value, the rule it breaks and the cure."""


def near_miss(name: str, options: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"`, or the options themselves when none is close."""
    choices = sorted(set(options))
    close = difflib.get_close_matches(name, choices, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    return f"; choose from: {shown}" if choices else ""

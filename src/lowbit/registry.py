"""Names for interchangeable parts: register one, get one, list them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from lowbit.errors import LowbitError, near_miss

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Named parts of one kind; a miss also asks the entry points `lowbit.<kind>` of installed packages."""

    def __init__(self, kind: str) -> None:
        """Start empty; `kind` is what messages call a part."""
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator. A name registered twice is an error, so that nothing is replaced in silence."""

        def add(part: T) -> T:
            if name in self._parts:
                raise LowbitError(f"{self.kind} '{name}' is registered already; choose another name")
            self._parts[name] = part
            return part

        return add

    def get(self, key: str | T) -> T:
        """The part of that name; anything that is not a name is taken to be the part itself.

        Raises:
            LowbitError: no part has that name.
        """
        if not isinstance(key, str):
            return key
        if key not in self._parts:
            for point in entry_points(group=f"lowbit.{self.kind}", name=key):
                self._parts[key] = point.load()
        if key not in self._parts:
            raise LowbitError(f"no {self.kind} is named '{key}'{near_miss(key, self._parts)}")
        return self._parts[key]

    def names(self) -> tuple[str, ...]:
        """What `get` takes, without the parts of other packages that nobody asked for yet."""
        return tuple(sorted(self._parts))

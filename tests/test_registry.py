"""The registry: by name, by thing, from another package, and never silently twice."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from lowbit import LowbitError, registry
from lowbit.registry import Registry


@pytest.fixture
def colours() -> Registry[str]:
    colours: Registry[str] = Registry("colour")
    colours.register("red")("#f00")
    colours.register("blue")("#00f")
    return colours


def test_registered_parts(colours: Registry[str]) -> None:
    assert colours.get("red") == "#f00"
    assert colours.names() == ("blue", "red")


def test_register_returns_the_part() -> None:
    parts: Registry[type] = Registry("part")

    @parts.register("mine")
    class Mine:
        pass

    assert parts.get("mine") is Mine
    assert Mine.__name__ == "Mine"


def test_what_is_not_a_name_is_the_part_itself() -> None:
    parts: Registry[type] = Registry("part")
    assert parts.get(int) is int


def test_twice_is_an_error(colours: Registry[str]) -> None:
    with pytest.raises(LowbitError, match="colour 'red' is registered already; choose another name"):
        colours.register("red")("#e00")
    assert colours.get("red") == "#f00"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rad", r"no colour is named 'rad'; did you mean 'red'\?"),
        ("octarine", "no colour is named 'octarine'; choose from: blue, red"),
    ],
)
def test_a_miss_says_what_there_is(colours: Registry[str], name: str, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        colours.get(name)


def test_an_empty_registry_has_nothing_to_offer() -> None:
    with pytest.raises(LowbitError, match=r"no colour is named 'red'$"):
        Registry("colour").get("red")


def test_a_miss_asks_installed_packages(colours: Registry[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point `lowbit.<kind>` of another package, loaded once."""
    asked = []

    def entry_points(group: str, name: str) -> EntryPoints:
        asked.append((group, name))
        return EntryPoints([EntryPoint(name, "math:pi", group)] if name == "pi" else [])

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert [colours.get("pi"), colours.get("pi")] == [pytest.approx(3.14159, abs=1e-5)] * 2
    assert asked == [("lowbit.colour", "pi")]
    with pytest.raises(LowbitError, match="no colour is named 'tau'"):
        colours.get("tau")


def test_kinds_do_not_mix(colours: Registry[str]) -> None:
    shapes: Registry[str] = Registry("shape")
    assert shapes.names() == ()
    assert colours.names() == ("blue", "red")

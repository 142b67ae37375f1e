"""The one exception, and the near-miss hint in its messages."""

from __future__ import annotations

import pytest

from lowbit import LowbitError
from lowbit.errors import near_miss


def test_it_is_a_value_error() -> None:
    assert issubclass(LowbitError, ValueError)


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("conv_1", ["conv1", "fc"], "; did you mean 'conv1'?"),
        ("xyz", ["conv1", "fc", "fc"], "; choose from: conv1, fc"),
        ("xyz", [], ""),
        ("", ["a"], "; choose from: a"),
        (
            "xyz",
            [f"{i:02}" for i in range(13)],
            "; choose from: 00, 01, 02, 03, 04, 05, 06, 07, 08, 09, 10, 11, ...",
        ),
    ],
    ids=["close", "far", "none", "empty", "many"],
)
def test_near_miss(name: str, options: list[str], hint: str) -> None:
    assert near_miss(name, options) == hint

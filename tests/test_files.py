"""A path holds the old file or the new one, never half of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit import LowbitError
from lowbit.files import atomic_path


def test_the_file_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new") as temporary:
        temporary.write_bytes(b"whole")
        assert not (tmp_path / "new").exists()
        assert temporary.parent == tmp_path
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("new", b"whole")]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failing_block_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "old").write_bytes(b"old")

    def fail() -> None:
        with atomic_path(tmp_path / "old") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("old", b"old")]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="cannot be written: No such file"), atomic_path(tmp_path / "new"):
        pass


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="there is no folder"), atomic_path(tmp_path / "a" / "b"):
        pass
    with pytest.raises(LowbitError, match="it is a folder; name a file"), atomic_path(tmp_path):
        pass

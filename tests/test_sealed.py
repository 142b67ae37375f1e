"""The seal against hashlib on the raw bytes; what a broken one does is in export/test_checkpoint.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lowbit import LowbitError
from lowbit.sealed import read_sealed, write_sealed

TENSORS = {"b": torch.arange(6).reshape(2, 3), "a": torch.tensor([0.5, -1.0], dtype=torch.float16)}
# text that could be taken for the digest
METADATA = {"note": '"sha256":"' + "0" * 64 + '"', "values": [1, None, 0.5]}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    write_sealed(tmp_path / "m", TENSORS, METADATA, 3)
    metadata, tensors = read_sealed(tmp_path / "m", 3)
    assert {k: metadata[k] for k in METADATA} == METADATA
    assert (metadata["format"], metadata["version"]) == ("lowbit", 3)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items())


def test_the_seal_is_the_digest_of_the_file_without_it(tmp_path: Path) -> None:
    write_sealed(tmp_path / "m", TENSORS, METADATA, 1)
    data = (tmp_path / "m").read_bytes()
    with safe_open(tmp_path / "m", "pt") as file:
        digest = json.loads(file.metadata()["lowbit"])["sha256"]
    assert data.count(digest.encode()) == 1
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    write_sealed(tmp_path / "1", TENSORS, METADATA, 1)
    write_sealed(tmp_path / "2", dict(reversed(TENSORS.items())), METADATA, 1)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    write_sealed(tmp_path / "m", {}, {}, 1)
    assert read_sealed(tmp_path / "m", 1)[1] == {}


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"the metadata holds torch.int8, which JSON cannot"):
        write_sealed(tmp_path / "m", {}, {"dtype": torch.int8}, 1)
    assert not list(tmp_path.iterdir())


def test_an_older_version_is_not_read_as_the_present_one(tmp_path: Path) -> None:
    write_sealed(tmp_path / "m", {}, {}, 1)
    with pytest.raises(LowbitError, match="version"):
        read_sealed(tmp_path / "m", 2)

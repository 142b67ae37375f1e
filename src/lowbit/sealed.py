"""A safetensors file with JSON metadata and a seal: a digest that notices every changed byte.

The one metadata entry, `lowbit`, is JSON that starts with the format's name, its version and `sha256`: the
digest of the whole file, the digest itself written as 64 zeros. The same content gives the same file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.files import atomic_path

__all__ = ["MALFORMED", "read_sealed", "write_sealed"]

FORMAT = "lowbit"
# what parsing raises on bytes that nobody wrote on purpose
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RecursionError)
_ZEROS = "0" * 64
# the metadata is JSON inside JSON, so its quotes are escaped once
_DIGEST = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"')
_CURE = "save it again, or copy the file again"


def write_sealed(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], version: int
) -> None:
    """Write a new file, or replace one when the new one is complete.

    Args:
        tensors: contiguous, each with memory of its own.
        metadata: what JSON can hold.
        version: of the layout of both.

    Raises:
        LowbitError: the metadata holds something else, or the path cannot be written.
    """
    entries = {"format": FORMAT, "version": version, "sha256": _ZEROS, **metadata}
    text = json.dumps(entries, separators=(",", ":"), default=_refuse)
    data = bytearray(serialize_tensors(dict(tensors), metadata={FORMAT: text}))
    at = _digest_span(data)
    assert at is not None
    data[slice(*at)] = hashlib.sha256(data).hexdigest().encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_sealed(path: Path, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file that is whole.

    Args:
        version: the version that the caller reads.

    Raises:
        LowbitError: the file cannot be read, is truncated, foreign, altered or of another version.
    """
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise LowbitError(f"'{path}' cannot be read: {error.strerror or error}") from None
    metadata = _metadata_in(path, data)
    found = metadata.get("version")
    if isinstance(found, int) and found > version:
        raise LowbitError(
            f"'{path}' has format version {found} and this lowbit reads {version}; install a newer lowbit"
        )
    at = _digest_span(data)
    if at is not None:
        data[slice(*at)] = _ZEROS.encode()
    if found != version or at is None or hashlib.sha256(data).hexdigest() != metadata.get("sha256"):
        raise LowbitError(f"'{path}' is damaged or was altered: its checksum does not hold; {_CURE}")
    try:
        return metadata, parse_tensors(bytes(data))
    except safetensors.SafetensorError as error:
        raise LowbitError(f"'{path}' is damaged: {error}; {_CURE}") from None


def _metadata_in(path: Path, data: bytearray) -> dict[str, Any]:
    """The metadata of a file with a sound header, as long as that header says."""
    size = int.from_bytes(data[:8], "little")
    try:
        if len(data) < 8 or size > len(data) - 8:
            raise ValueError
        header = json.loads(data[8 : 8 + size])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        own = header.get("__metadata__", {}).get(FORMAT)
        metadata = None if own is None else json.loads(own)
        whole = 8 + size + max(ends, default=0)
    except MALFORMED:
        raise LowbitError(
            f"'{path}' is no safetensors file, or is cut off or damaged in its header; {_CURE}"
        ) from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise LowbitError(
            f"'{path}' is a safetensors file, but not one of lowbit's; write one with lowbit.save"
        )
    if len(data) < whole:
        raise LowbitError(f"'{path}' is cut off: {len(data)} of {whole} bytes are there; {_CURE}")
    return metadata


def _digest_span(data: bytearray) -> tuple[int, int] | None:
    """Where the digest stands in the header."""
    found = _DIGEST.search(data, 8, 8 + int.from_bytes(data[:8], "little"))
    return found.span(1) if found else None


def _refuse(value: Any) -> Any:
    raise LowbitError(f"the metadata holds {value!r}, which JSON cannot; use names and plain values")

"""The compiled library of bits, where there is one."""

from __future__ import annotations

from lowbit.kernels.native import BITS, Library, load

__all__ = ["available", "description", "library", "unit"]

_loaded = load(BITS)


def library() -> Library | None:
    """The compiled library; None where PyTorch does its work."""
    return _loaded if isinstance(_loaded, Library) else None


def available() -> bool:
    """Is the compiled library in use?"""
    return library() is not None


def description() -> str:
    """What does the work: "native, AVX512", or "pure torch: " and the reason."""
    return _loaded.description if isinstance(_loaded, Library) else f"pure torch: {_loaded}"


def unit() -> int:
    """Bytes of one output that stand side by side in the panels of weights for packed activations."""
    lib = library()
    return 8 if lib is None else int(lib.unit(lib.path))

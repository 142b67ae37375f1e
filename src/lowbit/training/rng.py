"""Random numbers in two streams: one for the data, the same on every rank that reads the same data, one for
the model. Each starts anew with every epoch, so that where training stands is all that a resume must know.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Streams", "kept"]

# (Python's, NumPy's, PyTorch's, that of the CUDA device or None)
State = tuple[Any, Any, Tensor, Tensor | None]


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """While open the global generators may be used at will; afterwards they are as they were."""
    state = _get(device)
    try:
        yield
    finally:
        _set(state, device)


class Streams:
    """The global generators of Python, NumPy and PyTorch, for two users that must not disturb each other.

    Outside of `data()` they are those of the model.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device,
        *,
        rank: int,
        same_data: bool,
        others: Iterable[torch.Generator],
    ) -> None:
        """Start at no epoch.

        Args:
            same_data: all ranks read the same batches, so the stream of the data must not depend on the rank.
            others: generators that the loader holds; they belong to the data.
        """
        self.seed, self.device, self.rank, self.same_data = seed, device, rank, same_data
        self.others = list(others)
        self._data: State = _get(device)

    def start(self, epoch: int) -> None:
        """Both streams as they are at the start of an epoch."""
        data_rank = 0 if self.same_data else self.rank
        for i, generator in enumerate(self.others):
            generator.manual_seed(_derive(self.seed, epoch, f"generator {i}", data_rank))
        _seed(_derive(self.seed, epoch, "data", data_rank))
        self._data = _get(self.device)
        _seed(_derive(self.seed, epoch, "model", self.rank))

    @contextmanager
    def data(self) -> Iterator[None]:
        """While open the global generators are those of the data."""
        model = _get(self.device)
        _set(self._data, self.device)
        try:
            yield
        finally:
            self._data = _get(self.device)
            _set(model, self.device)

    def drawn(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each produced with the random numbers of the data."""
        with self.data():
            iterator = iter(items)
        while True:
            with self.data():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def state(self) -> dict[str, Tensor]:
        """Both streams as bytes; the generators of the loader follow from how many batches were read."""
        return {"model": _pack(_get(self.device)), "data": _pack(self._data)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        self._data = _unpack(state["data"])
        _set(_unpack(state["model"]), self.device)


def _derive(seed: int, epoch: int, stream: str, rank: int) -> int:
    digest = hashlib.sha256(f"{seed}/{epoch}/{stream}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - the global generator is the one that datasets use
    torch.manual_seed(value)


def _get(device: torch.device) -> State:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def _set(state: State, device: torch.device) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)


# Layout: 625 words of Python's generator, 624 keys and the position of NumPy's (Mersenne twisters both), each
# as int64; then, as float64, for both whether a second normal number is waiting, and which; then the states
# of PyTorch, as they are.
_WORDS = 625 + 624 + 1
_CPU = torch.get_rng_state().numel()


def _pack(state: State) -> Tensor:
    (_, words, waiting), numpy, cpu, cuda = state
    _, keys, position, has_normal, normal = numpy
    whole = np.array([*words, *keys.tolist(), position], dtype=np.int64)
    rest = np.array([waiting is not None, waiting or 0.0, has_normal, normal], dtype=np.float64)
    head = torch.frombuffer(bytearray(whole.tobytes() + rest.tobytes()), dtype=torch.uint8)
    return torch.cat([head, cpu] if cuda is None else [head, cpu, cuda])


def _unpack(packed: Tensor) -> State:
    data = packed.numpy().tobytes()
    whole = np.frombuffer(data, np.int64, _WORDS)
    rest = np.frombuffer(data, np.float64, 4, _WORDS * 8)
    start = (_WORDS + 4) * 8
    python = (3, tuple(whole[:625].tolist()), float(rest[1]) if rest[0] else None)
    keys = whole[625:-1].astype(np.uint32)
    numpy = ("MT19937", keys, int(whole[-1]), int(rest[2]), float(rest[3]))
    cpu, cuda = packed[start : start + _CPU].clone(), packed[start + _CPU :].clone()
    return python, numpy, cpu, cuda if cuda.numel() else None

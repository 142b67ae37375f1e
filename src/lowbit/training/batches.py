"""Batches of labelled data: what is input, what is label, and which part belongs to this rank."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lowbit.errors import LowbitError
from lowbit.graph.inputs import Inputs, mapped, placed

__all__ = ["Batch", "check_data", "generators", "is_distributed", "length", "new_epoch", "split"]

_LABELS = ("labels", "label", "y")


@dataclass(frozen=True)
class Batch:
    """Inputs, labels (None where there are none), and how many samples all ranks have of this batch."""

    inputs: Inputs
    labels: Any
    # samples here that count; 0 where a batch has fewer samples than there are ranks
    samples: int
    # samples on all ranks together
    total: int

    def to(self, device: torch.device, channels_last: bool) -> Batch:
        """On a device; images with channels last when asked."""
        move = partial(placed, device=device, channels_last=channels_last)
        inputs = self.inputs.to(device, channels_last=channels_last)
        return Batch(inputs, mapped(move, self.labels), self.samples, self.total)

    def part(self, rank: int, world: int) -> Batch:
        """Samples rank, rank + world, ...; where there is none the first one, which counts for nothing."""
        size = self.total
        count = len(range(rank, size, world))
        where = slice(rank, None, world) if count else slice(0, 1)

        def cut(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
            return value[where] if batched else value

        inputs = Inputs(mapped(cut, self.inputs.args), mapped(cut, dict(self.inputs.kwargs)))
        return Batch(inputs, mapped(cut, self.labels), count, size)


def split(batch: Any, input_names: Collection[str] = ()) -> Batch:
    """Inputs and labels of a batch: (x, y), or a dict with the labels under "labels", "label" or "y".

    Args:
        input_names: keyword arguments of the model; an entry "y" among them is an input, and "labels" both.

    Raises:
        LowbitError: the batch is of an unknown kind.
    """
    labels = None
    if isinstance(batch, Mapping):
        found = sorted((n for n in _LABELS if n in batch), key=lambda n: n in input_names)
        if found and (found[0] not in input_names or found[0] != "y"):
            labels = batch[found[0]]
            batch = {k: v for k, v in batch.items() if k != found[0] or k in input_names}
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    inputs = Inputs.of(batch)
    size = inputs.batch_size
    return Batch(inputs, labels, size, size)


def check_data(data: Any, what: str) -> None:
    """Raise LowbitError unless `data` can be read again and again."""
    if isinstance(data, (str, bytes, Mapping, Tensor)) or not isinstance(data, Iterable):
        raise LowbitError(
            f"{what} is a {type(data).__name__}; pass a DataLoader, or a list of batches (inputs, labels)"
        )
    if isinstance(data, Iterator):
        raise LowbitError(
            f"{what} is a {type(data).__name__}, which can be read only once, and each epoch reads it; "
            "pass a DataLoader or a list"
        )


def length(data: Any) -> int | None:
    """Number of batches, where the data knows."""
    try:
        return len(data)
    except TypeError:
        return None


def is_distributed(data: Any) -> bool:
    """Whether each rank is given batches of its own."""
    return any(isinstance(part, DistributedSampler) for part in _parts(data))


def generators(data: Any) -> list[torch.Generator]:
    """The random generators that a loader and its samplers hold, each once."""
    held = [getattr(part, "generator", None) for part in _parts(data)]
    return list({id(g): g for g in held if isinstance(g, torch.Generator)}.values())


def new_epoch(data: Any, epoch: int) -> None:
    """Tell the loader and its samplers, where they want to know."""
    for part in _parts(data):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def _parts(data: Any) -> list[Any]:
    """A loader, its samplers, and the data behind it."""
    parts = [data]
    if isinstance(data, DataLoader) or hasattr(data, "batch_sampler"):
        batches = getattr(data, "batch_sampler", None)
        parts += [getattr(data, "sampler", None), batches, getattr(batches, "sampler", None)]
        parts.append(getattr(data, "dataset", None))
    return [part for part in {id(part): part for part in parts}.values() if part is not None]

"""The data of a run: read with the right random numbers, divided between ranks, on the right device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from lowbit import distributed
from lowbit.errors import LowbitError
from lowbit.model import QuantizedModel
from lowbit.training.batches import Batch, generators, is_distributed, length, new_epoch, split
from lowbit.training.rng import Streams
from lowbit.training.settings import Settings

__all__ = ["Feed"]


class Feed:
    """Training and validation data.

    Attributes:
        steps: batches of an epoch.
        streams: the random numbers of the data and of the model.
    """

    def __init__(self, q: QuantizedModel, train: Any, val: Any, settings: Settings) -> None:
        """Read nothing yet.

        Raises:
            LowbitError: the training data has no length and none was given, or no batch.
        """
        self.train, self.val, self.settings = train, val, settings
        self.names = tuple(q.example.kwargs)
        self.device = next(q.parameters()).device
        steps = settings.steps_per_epoch or length(train)
        if steps is None:
            raise LowbitError(
                "train does not know its length, which the schedule needs; pass steps_per_epoch=..."
            )
        self.steps = steps
        # ranks that read data of their own also augment it in their own way
        self.apart = is_distributed(train)
        self.streams = Streams(
            settings.seed,
            self.device,
            rank=distributed.rank(),
            same_data=not self.apart,
            others=[*generators(train), *generators(val)],
        )

    def batches(self, data: Iterable[Any], *, whole: bool = False) -> Iterator[Batch]:
        """Batches on the device; of each this rank's part, unless they are asked for `whole`."""
        divided = not (whole or is_distributed(data))
        for item in self.streams.drawn(data):
            batch = split(item, self.names)
            if divided:
                batch = batch.part(distributed.rank(), distributed.world())
            yield batch.to(self.device, self.settings.channels_last)

    def epoch(self, epoch: int, done: int, random: dict[str, Tensor]) -> Iterator[Batch]:
        """The batches of an epoch behind the first `done`, after which the random numbers were `random`."""
        new_epoch(self.train, epoch)
        self.streams.start(epoch)
        batches = islice(self.batches(self.train), self.steps)
        if done:
            for _ in zip(range(done), batches, strict=False):
                pass
            self.streams.load(random)
        return batches

    def first(self, count: int, epoch: int) -> Iterator[Batch]:
        """Up to `count` whole batches of the training data, as an epoch of that number starts."""
        new_epoch(self.train, max(0, epoch))
        self.streams.start(epoch)
        return islice(self.batches(self.train, whole=True), count)

    def weight(self, batch: Batch) -> tuple[float, int]:
        """(part of this rank's samples in those of all ranks, number of these)."""
        world = distributed.world()
        if self.apart:
            return 1 / world, batch.total * world
        return batch.samples / max(1, batch.total), batch.total

    def check(self, *, labels: bool) -> None:
        """Look at the first batches, before anything is trained.

        Args:
            labels: whether the training data needs them.

        Raises:
            LowbitError: there is no batch, or no label where one is needed.
        """
        needed = [("train", self.train, labels, "pass loss=None with a teacher")]
        if self.val is not None:
            judged = self.settings.metric == "accuracy"
            needed.append(("val", self.val, judged, "pass metric=function, or leave val out"))
        for what, data, asked, otherwise in needed:
            batch = next(self.batches(data, whole=True), None)
            if batch is None:
                raise LowbitError(f"{what} holds no batch; pass at least one")
            if asked and batch.labels is None:
                raise LowbitError(
                    f"{what} has no labels; give batches as (inputs, labels), or as dicts with the labels "
                    f"under 'labels', 'label' or 'y'. Without labels, {otherwise}"
                )

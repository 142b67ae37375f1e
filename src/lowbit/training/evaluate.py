"""How good a model is on labelled data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lowbit import distributed
from lowbit.errors import LowbitError
from lowbit.training.batches import Batch
from lowbit.training.losses import Objective, accuracy
from lowbit.training.settings import Settings

__all__ = ["Score", "evaluate"]


@dataclass(frozen=True)
class Score:
    """Means over all samples of all ranks."""

    metric: float
    # None where there is no loss, or no label
    loss: float | None


@torch.no_grad()
def evaluate(model: nn.Module, data: Iterable[Batch], settings: Settings, objective: Objective) -> Score:
    """Run a model in eval mode over this rank's batches; the ranks share what they found.

    Raises:
        LowbitError: there is no sample, or the metric is no number.
    """
    model.eval()
    metric = loss = 0.0
    samples = judged = 0
    for batch in data:
        if not batch.samples:
            continue
        output = batch.inputs.call(model)
        metric += _metric(output, batch.labels, settings) * batch.samples
        samples += batch.samples
        if settings.loss is not None and batch.labels is not None:
            loss += float(objective.task(output, batch.labels)) * batch.samples
            judged += batch.samples
    metric, loss, seen, with_loss = distributed.add_over_ranks([metric, loss, samples, judged])
    if not seen:
        raise LowbitError("val holds no batch with a sample; pass at least one, or leave it out")
    return Score(metric / seen, loss / with_loss if with_loss else None)


def _metric(output: object, labels: object, settings: Settings) -> float:
    if not callable(settings.metric):
        return accuracy(output, labels, settings.class_axis)
    value = settings.metric(output, labels)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise LowbitError(f"metric(output, labels) returned {value!r}; return one number") from None

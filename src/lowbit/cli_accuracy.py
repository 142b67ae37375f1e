"""Accuracy on labelled data, as every command measures it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.progress import track
from lowbit.training.batches import split
from lowbit.training.losses import accuracy

__all__ = ["accuracy_on", "check_labels"]


def accuracy_on(model: nn.Module, data: Iterable[Any], what: str) -> tuple[float, int]:
    """Share of the samples that a model puts in their class, and how many there are.

    Args:
        what: is measured, for the progress bar.
    """
    right, samples = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for batch in track(map(split, data), what):
            right += accuracy(batch.inputs.call(model), batch.labels) * batch.samples
            samples += batch.samples
    return right / max(1, samples), samples


def check_labels(data: Iterable[Any], option: str) -> None:
    """Raise LowbitError unless there is a batch, and it has labels.

    Args:
        option: what the user gave the data to.
    """
    first = next(iter(data), None)
    if first is None:
        raise LowbitError(f"{option} holds no batch; give at least one")
    if split(first).labels is None:
        raise LowbitError(
            f"{option} has no labels, which accuracy needs; store them as y in an .npz or .safetensors file, "
            "or return batches (x, y)"
        )

"""Training through quantizers, for those without a loop of their own.

Killed at any moment a run goes on from its last checkpoint, and ends with the weights that it would have
had: bit for bit on one thread, as long as the data draws from the global generators of Python, NumPy and
PyTorch, or from those that the loader holds. Workers that persist over epochs hold others, which nobody sees.

Under `torchrun` every rank runs the same script. Each batch is divided between the ranks (rank r of n takes
the samples r, r + n, ...), so that the gradient is that of one process on the whole batch; where the loader
has a DistributedSampler its batches are taken as they are. A BatchNorm that trains sees the samples of its
rank, and all go on with the statistics of rank 0, as in PyTorch's DistributedDataParallel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit import distributed
from lowbit.errors import LowbitError, expect
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer
from lowbit.training.batches import check_data
from lowbit.training.folder import check_recipe
from lowbit.training.groups import parameter_groups
from lowbit.training.losses import Objective, symmetric_kl
from lowbit.training.record import Epoch, Run
from lowbit.training.rng import kept
from lowbit.training.schedule import set_progress
from lowbit.training.session import Session
from lowbit.training.settings import Settings
from lowbit.training.starved import starved
from lowbit.training.state import load_weights, read_checkpoint, section

__all__ = [
    "Epoch",
    "Run",
    "Settings",
    "Trainer",
    "parameter_groups",
    "restore",
    "set_progress",
    "symmetric_kl",
]


class Trainer:
    """Trains a model that `lowbit.prepare` made; where nobody calibrated it, it is calibrated first."""

    def __init__(
        self,
        q: QuantizedModel,
        train: Any,
        val: Any = None,
        *,
        teacher: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        """Check everything that can be checked before training.

        Args:
            q: trained in place, on the device where it is.
            train: a DataLoader or a list of batches: (inputs, labels), or dicts with the labels under
                "labels", "label" or "y". A loss is a mean over the batch.
            val: likewise; evaluated after each epoch.
            teacher: the float model, or any other with the same classes; it is run, never changed.
            settings: the fields of `Settings`.

        Raises:
            LowbitError: the model is frozen or has no layer to train, an unknown setting, data that can be
                read only once.
        """
        expect(q, QuantizedModel, "q", "make it with lowbit.prepare(model, recipe, example)")
        self.q, self.train, self.val, self.teacher = q, train, val, teacher
        self.settings = Settings.of(settings)
        _check_trainable(q)
        check_data(train, "train")
        if val is not None:
            check_data(val, "val")
        else:
            _check_needs_no_val(self.settings)
        if teacher is not None:
            _check_teacher(teacher, q)
        self.objective = Objective(self.settings, teacher is not None)

    def fit(self) -> Run:
        """Train, or go on with a run that was stopped; the model is then in eval mode, with the last weights.

        Returns:
            What each epoch reached; `print` shows it as a table. With `out` given the folder has
            last.safetensors, best.safetensors (with validation data) and metrics.jsonl.

        Raises:
            LowbitError: data without labels, a checkpoint of another run, a GPU of another rank, or a loss
                that is no longer finite; the weights are then those of the last checkpoint.
        """
        _check_trainable(self.q)
        distributed.join()
        distributed.check_device(next(self.q.parameters()).device)
        with kept(next(self.q.parameters()).device):
            session = Session(self.q, self.train, self.val, self.teacher, self.settings, self.objective)
            record = session.run()
        record.notes += starved(self.q)
        return record


def restore(q: QuantizedModel, path: str | Path) -> QuantizedModel:
    """Give a prepared model the weights and scales of a checkpoint of the Trainer, such as best.safetensors.

    Raises:
        LowbitError: there is no such file, it is damaged, or it was written for another model or recipe.
    """
    expect(q, QuantizedModel, "q", "make it with lowbit.prepare(model, recipe, example)")
    _check_trainable(q)
    metadata, tensors = read_checkpoint(Path(path))
    check_recipe(Path(path), metadata, q.recipe.to_dict())
    if metadata["bits"] not in (None, *metadata["settings"]["bits"][-1:]):
        raise LowbitError(
            f"'{path}' stands in the stage of {metadata['bits']} bits, on the way to those of the recipe; "
            "go on with the run"
        )
    load_weights(q, section(tensors, "model."), str(path))
    return q.eval()


def _check_trainable(q: QuantizedModel) -> None:
    layers = [m for m in q.modules() if isinstance(m, QLayer)]
    if not layers:
        raise LowbitError(
            "the model has no quantized layer, so there is nothing to train; use a recipe that quantizes "
            "weights, and see q.coverage() for what became of each layer"
        )
    if any(layer.frozen_spec is not None for layer in layers):
        raise LowbitError(
            "the model is frozen, so its float weights are gone; train what lowbit.prepare returns, "
            "before freeze"
        )


def _check_needs_no_val(settings: Settings) -> None:
    for name, default in (("patience", None), ("restore", "last")):
        if getattr(settings, name) != default:
            raise LowbitError(
                f"{name}={getattr(settings, name)!r} goes by the metric on validation data; pass val=..."
            )


def _check_teacher(teacher: nn.Module, q: QuantizedModel) -> None:
    expect(teacher, nn.Module, "teacher", "pass the float model itself")
    ours = {id(p) for p in q.parameters()}
    if any(id(p) in ours for p in teacher.parameters()):
        raise LowbitError(
            "teacher shares parameters with q, so it would change with it; pass the float model"
        )
    places = {p.device for p in teacher.parameters()}
    device = next((p.device for p in q.parameters()), torch.device("cpu"))
    if places - {device}:
        raise LowbitError(
            f"teacher is on {min(map(str, places))} and q on {device}; move it with teacher.to('{device}')"
        )

"""The learning rate as a function of the step: a factor from 0 to 1 for every group."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.nn.quantizer import Quantizer
from lowbit.training.settings import Settings
from lowbit.training.stages import stage_of

__all__ = ["Pace", "Plateau", "factor", "set_progress", "warmup_steps"]


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of warm-up: a whole number is that many, a fraction that part of `total`."""
    return warmup if isinstance(warmup, int) else round(warmup * total)


def factor(schedule: str, step: int, total: int, warmup: int = 0) -> float:
    """Share of the learning rate at a step.

    For the first `warmup` steps (step + 1) / (warmup + 1). After them "cosine" gives
    (1 + cos(pi t)) / 2 with t running from 0 to 1 - 1 / (total - warmup) (Loshchilov, Hutter 2017, eq. 5,
    without restarts); any other schedule gives 1.

    Args:
        step: from 0 to total - 1.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule != "cosine":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


class Plateau:
    """torch's ReduceLROnPlateau on a factor that starts at 1: ten times less when no epoch gets better.

    The factor multiplies that of the warm-up.
    """

    def __init__(self, patience: int) -> None:
        """Start at 1; larger is better."""
        # the optimizer that torch's class wants to hold: its rate is the factor
        self._holder = torch.optim.SGD([torch.zeros(())], lr=1.0)
        self._rule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._holder, mode="max", factor=0.1, patience=patience
        )

    @property
    def factor(self) -> float:
        """Share of the learning rate."""
        return float(self._holder.param_groups[0]["lr"])

    def step(self, metric: float) -> None:
        """Take in what an epoch reached."""
        self._rule.step(metric)

    def state(self) -> dict[str, Any]:
        """Plain data for `load`."""
        kept = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
        return {"factor": self.factor, **{name: getattr(self._rule, name) for name in kept}}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        state = dict(state)
        self._holder.param_groups[0]["lr"] = state.pop("factor")
        vars(self._rule).update(state)


class Pace:
    """Sets the learning rates of an optimizer: those it was made with, times a share.

    The schedule starts over with each stage of bits.
    """

    def __init__(self, settings: Settings, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Take the rates that the optimizer has now; `steps` are those of an epoch."""
        self.settings, self.optimizer, self.steps = settings, optimizer, steps
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.plateau = Plateau(settings.plateau_patience)

    @property
    def lr(self) -> float:
        """Of the first group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def stage(self, epoch: int) -> tuple[int, int, int]:
        """(number of the stage, its first epoch, the epoch after its last)."""
        return stage_of(epoch, self.settings.epochs, max(1, len(self.settings.bits)))

    def set(self, epoch: int, done: int) -> float:
        """Set the rates of step `done` of an epoch; returns how much of training is done, from 0 to 1."""
        _, first, end = self.stage(epoch)
        total, step = (end - first) * self.steps, (epoch - first) * self.steps + done
        warmup = warmup_steps(self.settings.warmup, total)
        share = factor(self.settings.schedule, step, total, warmup) * self.plateau.factor
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        return (epoch * self.steps + done) / (self.settings.epochs * self.steps)

    def new_stage(self) -> None:
        """What was learned of a plateau does not hold at other bits."""
        self.plateau = Plateau(self.settings.plateau_patience)


def set_progress(model: nn.Module, share: float) -> None:
    """Tell the quantizers of a model how much of training is done, from 0 to 1.

    The Trainer does it in every step; a loop of your own calls it where a recipe names "relax", "ede",
    "reste" or "recu".

    Raises:
        LowbitError: the share is not from 0 to 1.
    """
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise LowbitError(f"share={share!r} of training is not from 0 to 1; pass step / steps")
    for module in model.modules():
        if isinstance(module, Quantizer) and module.progress is not None:
            module.progress.fill_(share)

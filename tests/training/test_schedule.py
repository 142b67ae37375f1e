"""Schedules against those of torch, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, SequentialLR

from lowbit.training.schedule import Pace, Plateau, factor, warmup_steps
from lowbit.training.settings import Settings

TOTAL = 20


def optimizer(lr: float = 1.0) -> SGD:
    return SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def rates(scheduler: Any, holder: SGD) -> list[float]:
    found = []
    for _ in range(TOTAL):
        found.append(holder.param_groups[0]["lr"])
        holder.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_factor(schedule: str, warmup: int) -> None:
    holder = optimizer()
    rest: Any = LinearLR(holder, 1.0, 1.0)
    if schedule == "cosine":
        rest = CosineAnnealingLR(holder, TOTAL - warmup)
    if warmup:
        rise = LinearLR(holder, 1 / (warmup + 1), total_iters=warmup)
        rest = SequentialLR(holder, [rise, rest], [warmup])
    ours = [factor(schedule, step, TOTAL, warmup) for step in range(TOTAL)]
    assert ours == pytest.approx(rates(rest, holder))


def test_plateau_is_that_of_torch_and_goes_on_where_it_was() -> None:
    holder, metrics = optimizer(), [0.1, 0.3, 0.2, 0.3, 0.29, 0.1, 0.4, 0.1, 0.1, 0.1, 0.1]
    reference, ours = ReduceLROnPlateau(holder, mode="max", patience=1), Plateau(1)
    for metric in metrics:
        reference.step(metric)
        resumed = Plateau(1)
        resumed.load(ours.state())
        ours = resumed
        ours.step(metric)
        assert ours.factor == pytest.approx(holder.param_groups[0]["lr"])
    assert ours.factor < 0.02


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (7, 7), (0.25, 5), (0.0, 0)])
def test_warmup_in_steps_or_as_a_fraction(warmup: float, steps: int) -> None:
    assert warmup_steps(warmup, TOTAL) == steps


def test_the_schedule_starts_over_with_each_stage() -> None:
    holder = optimizer(0.5)
    pace = Pace(Settings(epochs=4, bits=(8, 4), warmup=1), holder, steps=3)
    found = []
    for epoch in range(4):
        for step in range(3):
            pace.set(epoch, step)
            found.append(pace.lr)
    once = [0.5 * factor("cosine", step, 6, 1) for step in range(6)]
    assert found == pytest.approx(once * 2)


def test_groups_keep_their_ratio() -> None:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 0.01)]
    holder = SGD(groups)
    Pace(Settings(epochs=1, warmup=0), holder, steps=10).set(0, 5)
    assert [g["lr"] for g in holder.param_groups] == pytest.approx([0.5, 0.005])

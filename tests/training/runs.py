"""One small run of training, and the same in a process that is killed."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lowbit
from lowbit import Recipe, Rule
from lowbit.core.spec import UINT8, PerChannel, QuantSpec
from lowbit.model import QuantizedModel
from lowbit.qat import Run, Trainer
from lowbit.training import state
from lowbit.training.session import Session

CLASSES = 3


class Net(nn.Module):
    """Everything that resuming must get right: dropout, running statistics, learned scales."""

    def __init__(self, *, bn: bool = True, dropout: float = 0.2) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4) if bn else nn.Identity()
        self.drop, self.fc = nn.Dropout(dropout), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.a(x)))
        return self.fc(torch.relu(self.b(self.drop(x))).mean((2, 3)))


class Noisy(Dataset[Any]):
    """Squares of three sizes, augmented from all three global generators."""

    def __init__(self, n: int = 50, *, noise: float = 1.0) -> None:
        self.n, self.noise = n, noise

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        label = i % CLASSES
        x = torch.zeros(1, 6, 6)
        x[:, : 2 * label + 2, : 2 * label + 2] = 1.0
        x = x + self.noise * 0.1 * torch.randn(1, 6, 6)
        if self.noise and random.random() < 0.5:
            x = x.flip(-1)
        return x + self.noise * 0.1 * float(np.random.rand()), label  # noqa: NPY002


RULES = (Rule(weight=QuantSpec(bits=4, granularity=PerChannel(0)), activation=UINT8),)


def model(*, bn: bool = True, dropout: float = 0.2, fold: str = "after") -> tuple[nn.Module, QuantizedModel]:
    """A float network, always the same, and its quantized twin."""
    torch.manual_seed(1)
    net = Net(bn=bn, dropout=dropout).eval()
    return net, lowbit.prepare(net, Recipe(rules=RULES, fold_bn=fold), torch.zeros(2, 1, 6, 6))  # type: ignore[arg-type]


def loader(n: int = 50, batch: int = 8, *, own_generator: bool = False, **options: Any) -> DataLoader[Any]:
    generator = torch.Generator() if own_generator else None
    return DataLoader(Noisy(n), batch, shuffle=True, generator=generator, **options)


def val(n: int = 24) -> DataLoader[Any]:
    return DataLoader(Noisy(n, noise=0.0), 10)


def settings(**changes: Any) -> dict[str, Any]:
    # scales that move slowly: two runs that differ by a rounding error stay together
    rates = {"optimizer": "sgd", "lr": 0.05, "scale_lr": 1e-4, "warmup": 0, "temperature": 1.0}
    return {"epochs": 3, **rates, "distill": 0.5, "calibration_batches": 2, **changes}


def fit(
    folder: Path | None = None, *, own_generator: bool = False, **changes: Any
) -> tuple[QuantizedModel, Run]:
    net, q = model()
    data = loader(own_generator=own_generator)
    return q, Trainer(q, data, val(), teacher=net, **settings(out=folder, **changes)).fit()


def fit_and_die(folder: Path, step: int, where: str, options: dict[str, Any]) -> None:
    """`fit`, with a SIGKILL for this process: in a "step", or half way through a "write"."""
    torch.set_num_threads(1)
    train, write = Session._train_step, state.write_sealed
    writes = iter(range(1, 1000))

    def fatal_step(self: Session, batch: Any) -> None:
        train(self, batch)
        if self._step() + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def fatal_write(path: Path, *rest: Any) -> None:
        if next(writes) == step:
            path.with_name(f".{path.name}.dead.tmp").write_bytes(b"half a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, *rest)

    if where == "step":
        Session._train_step = fatal_step  # type: ignore[method-assign]
    else:
        state.write_sealed = fatal_write
    fit(folder, **options)

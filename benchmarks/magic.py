"""The MAGIC gamma / hadron table, its network, and how good a network is on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit import Recipe
from lowbit.model import QuantizedModel


@dataclass(frozen=True)
class Magic:
    """The table, each column with mean 0 and deviation 1 in training; a fifth of that judges the front."""

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor

    @classmethod
    def read(cls, folder: Path) -> Magic:
        (x, y), (x_test, y_test) = (_table(folder / f"magic_gamma_{part}.csv") for part in ("train", "test"))
        order, cut = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)), len(x) // 5
        mean, deviation = x.mean(0), x.std(0)
        x, y = ((x - mean) / deviation)[order], y[order]
        return cls(x[cut:], y[cut:], x[:cut], y[:cut], (x_test - mean) / deviation, y_test)

    @property
    def val(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x_val.split(1024), self.y_val.split(1024), strict=True))

    def val_accuracy(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(self.x_val).argmax(1) == self.y_val).double().mean())

    def __len__(self) -> int:
        return math.ceil(len(self.x) / 256)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.x)).split(256):
            yield self.x[index], self.y[index]

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Accuracy, area under the ROC curve, background rejection where half of the signal passes."""
        with torch.no_grad():
            chances = model(self.x_test).double().softmax(1)
        signal, background = (chances[:, 0][self.y_test == k] for k in (0, 1))
        ordered = background.sort().values
        below, upto = (torch.searchsorted(ordered, signal, right=right) for right in (False, True))
        passing = float((background >= signal.median()).double().mean())
        return {
            "accuracy %": 100 * float((chances.argmax(1) == self.y_test).double().mean()),
            "AUC": float((below + upto).double().mean() / 2 / len(background)),
            "rejection": 1 / max(passing, 1 / len(background)),
        }


def _table(path: Path) -> tuple[Tensor, Tensor]:
    rows = [line.split(",") for line in path.read_text().split()[1:]]
    return torch.tensor([[float(v) for v in row[:-1]] for row in rows]), torch.tensor(
        [int(row[-1] == "h") for row in rows]
    )


def trigger_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 64),
        nn.ReLU(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 2),
    )


def train_float(model: nn.Module, data: Magic, epochs: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def at_bits(model: nn.Module, recipe: Recipe, data: Magic) -> QuantizedModel:
    return lowbit.calibrate(lowbit.prepare(copy.deepcopy(model), recipe, data.x[:256]), [data.x[:2048]])

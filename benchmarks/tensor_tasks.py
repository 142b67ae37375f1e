"""Networks whose layers become tensor networks, their data, and how they are trained."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cifar
import lowbit
from common import progress
from lowbit import UINT8, Recipe, Rule
from lowbit.demo import load_images
from lowbit.demo.data import normalize, read_idx
from lowbit.tensor_networks import Budget, TensorRule
from networks import load_cifar
from qat import Augmented


@dataclass(frozen=True)
class Task:
    """A float network, its data, and how it is trained."""

    name: str
    model: nn.Module
    rules: Sequence[TensorRule]
    train: Iterable[tuple[Tensor, Tensor]]
    calibration: list[Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    lr: float
    # a dense network of about so many weights
    narrow: Callable[[int], nn.Module] | None = None

    def top1(self, model: nn.Module) -> float:
        x, y = self.test
        with torch.no_grad():
            found = torch.cat([model(part) for part in x.split(500)])
        return 100 * float((found.argmax(1) == y).float().mean())

    def trained(self, model: nn.Module) -> nn.Module:
        """In float, from where it is: Adam, cosine."""
        torch.manual_seed(0)
        found = copy.deepcopy(model).train()
        steps = self.epochs * sum(1 for _ in self.train)
        optimizer = torch.optim.Adam(found.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(self.epochs):
            for x, y in self.train:
                optimizer.zero_grad()
                loss = F.cross_entropy(found(x), y)
                loss.backward()
                optimizer.step()
                schedule.step()
            progress(f"{self.name}: epoch {epoch + 1} of {self.epochs}, loss {loss.item():.3f}")
        return found.eval()

    def ptq(self, model: nn.Module, recipe: Recipe) -> lowbit.model.QuantizedModel:
        return lowbit.quantize(model, recipe, self.calibration)

    def qat(self, model: nn.Module, recipe: Recipe) -> lowbit.model.QuantizedModel:
        q = lowbit.prepare(model, recipe, self.calibration[0])
        lowbit.calibrate(q, self.calibration)
        lowbit.Trainer(q, self.train, teacher=model, epochs=self.epochs, lr=self.lr).fit()
        return lowbit.freeze(q)


def weights_at(bits: int) -> Recipe:
    """Weights of so many bits, inputs of 8, first and last layer too."""
    base = lowbit.preset("w8a8")
    spec = lowbit.preset(f"w{bits}a8").rules[-1].weight
    return replace(
        base,
        rules=(Rule(weight=spec, activation=UINT8),),
        equalize=True,
        refine=("bond_correct", "affine_correct"),
    )


def perceptron(width: int) -> nn.Module:
    layers = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def narrow(weights: int) -> nn.Module:
    """The same, with about so many weights: 784 w + w^2 + 10 w."""
    torch.manual_seed(0)
    return perceptron(round((794**2 / 4 + weights) ** 0.5 - 794 / 2))


def fashion(options: argparse.Namespace) -> Task:
    """784-1024-1024-10 on Fashion-MNIST, untrained."""
    torch.manual_seed(0)
    if options.fashion is None:
        (x, y), test = load_images("train"), load_images("test")
        name = "Fashion-MNIST, the 10,000 images that ship with lowbit"
    else:
        parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        found = [read_idx(options.fashion / f"{part}-ubyte.gz") for part in parts]
        (x, y), test = (normalize(found[0]), found[1].long()), (normalize(found[2]), found[3].long())
        name = "Fashion-MNIST, all 60,000 images"
    data = Shuffled(x, y)
    model = perceptron(1024)
    rules = [
        TensorRule(match="1", rank=options.rank),
        TensorRule(match="3", rank=options.rank),
        TensorRule(kind="keep"),
    ]
    return Task(name, model, rules, data, list(x[:512].split(64)), test, options.epochs, 1e-3, narrow)


@dataclass(frozen=True)
class Shuffled:
    """Batches of 128 in a new order each time."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y) // 128

    def __iter__(self) -> Any:
        for index in torch.randperm(len(self.y)).split(128)[: len(self)]:
            yield self.x[index], self.y[index]


def resnet(options: argparse.Namespace) -> Task:
    """ResNet-20 with Tucker-2 convolutions on CIFAR-10."""
    train = cifar.load_images(options.data, "train", "resnet20-B", options.images)
    test = cifar.load_images(options.data, "test", "resnet20-B")
    model = load_cifar("resnet20-B", options.data).eval()
    rules = [
        TensorRule(match="re:layer[23].*conv[12]", kind="tucker", rank=Budget(options.share)),
        TensorRule(kind="keep"),
    ]
    calibration = list(train.x[:512].split(64))
    return Task(
        "ResNet-20, CIFAR-10",
        model,
        rules,
        Augmented(train),
        calibration,
        (test.x, test.y),
        options.epochs,
        1e-3,
    )

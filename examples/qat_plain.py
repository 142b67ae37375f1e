"""Quantization-aware training in a loop of one's own: prepare, calibrate, train as always, freeze, export.

    python examples/qat_plain.py --recipe w2a2 --steps 150 --out out

It trains the network that ships with lowbit on the images that ship with it. In a loop that exists already,
what is new are five lines, marked with their number.
"""

from __future__ import annotations

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.demo import load_images, load_network
from lowbit.demo.data import TrainingImages
from lowbit.qat import parameter_groups


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, 1, 28, 28] that the network puts in their class [N]."""
    network.eval()
    right = torch.cat([network(part).argmax(1) for part in images.split(500)]) == labels
    return right.float().mean().item()


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="w4a4", help="preset or YAML file (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="batches of 128 images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files")
    return parser.parse_args()


def main() -> None:
    """Train, and show what the bits cost without training and with it."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, batches = load_network(), TrainingImages(128)
    images, labels = (t[:1000] for t in load_images("test"))
    few = [x for x, _ in islice(batches, 4)]

    untrained = lowbit.quantize(model, options.recipe, calibration=few)
    print(f"float {accuracy(model, images, labels):.2%}")
    print(f"PTQ   {accuracy(untrained, images, labels):.2%}")

    q = lowbit.prepare(model, options.recipe, few[0])  # 1
    lowbit.calibrate(q, few)  # 2
    # 3: scales are Parameters now; like biases and norms they must not decay
    groups = parameter_groups(q, lr=0.01, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)

    q.train()
    epochs = chain.from_iterable(repeat(batches))  # one after the other, each in another order
    for step, (x, y) in enumerate(islice(epochs, options.steps), 1):
        loss = F.cross_entropy(q(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}")

    lowbit.freeze(q)  # 4: codes stay, floats go
    print(f"QAT   {accuracy(q, images, labels):.2%}")

    lowbit.save(q, options.out / f"{options.recipe}.safetensors")
    path = lowbit.export.onnx(q, options.out / f"{options.recipe}.onnx")  # 5
    parity = lowbit.verify(q, path, images[:200].split(100))
    print(f"{path} is the trained network, code for code: {parity.exact}")


if __name__ == "__main__":
    main()

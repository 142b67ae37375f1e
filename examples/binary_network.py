"""A binary network from nothing: build it, train it, and run it on bit kernels beside its float twin.

    python examples/binary_network.py --epochs 4 --out out

Blocks are those of XNOR-Net (Rastegari et al. 2016): the sign of what comes in, a convolution with binary
weights, BatchNorm, Hardtanh, and pooling where the image gets smaller. The sign and the weights' binarization
are the recipe's, `w1a1`, so the module below is an ordinary one; its first and last layer keep 8 bits. The
twin is the same module trained in float, from which the binary one starts and which teaches it. Images are
those of Fashion-MNIST that ship with lowbit.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.demo import load_images
from lowbit.demo.data import TrainingImages


class Block(nn.Sequential):
    """Convolution, BatchNorm, Hardtanh, and perhaps pooling; the sign is what the next layer reads."""

    def __init__(self, inputs: int, outputs: int, *, pool: bool = False) -> None:
        layers = [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.Hardtanh(),
        ]
        super().__init__(*layers, *([nn.MaxPool2d(2)] if pool else []))


class BinaryNet(nn.Module):
    """A small VGG for images [N, 1, 28, 28]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Block(1, width),
            Block(width, width, pool=True),
            Block(width, 2 * width),
            Block(2 * width, 2 * width, pool=True),
            Block(2 * width, 2 * width, pool=True),
        )
        self.head = nn.Linear(2 * width * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).flatten(1))


def train_float(model: nn.Module, batches: TrainingImages, epochs: int, steps: int | None) -> None:
    """Adam, one cycle of the learning rate."""
    total = epochs * (steps or len(batches))
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=total)
    model.train()
    for _ in range(epochs):
        for step, (x, y) in enumerate(batches):
            if step == steps:
                break
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that the network puts in their class."""
    right = torch.cat([network(part).argmax(1) for part in images.split(250)]) == labels
    return right.float().mean().item()


@torch.inference_mode()
def milliseconds(networks: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """Median time of one call of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(rounds + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            network(x)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(found) for name, found in times.items()}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=4, help="of each training (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="batches of an epoch (default: all)")
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer (default: 64)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files")
    return parser.parse_args()


def main() -> None:
    """Train both, and show what each is worth, weighs and takes."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    batches, (images, labels) = TrainingImages(128), load_images("test")
    twin = BinaryNet(options.width)
    train_float(twin, batches, options.epochs, options.steps)

    q = lowbit.prepare(twin, "w1a1", images[:2])
    steps = {} if options.steps is None else {"steps_per_epoch": options.steps}
    lowbit.Trainer(q, batches, teacher=twin, epochs=options.epochs, **steps).fit()
    lowbit.freeze(q)
    binary = q.compile_kernels()
    print(binary)

    files = {"float": options.out / "float.safetensors", "binary": options.out / "binary.safetensors"}
    save_file(twin.state_dict(), files["float"])
    lowbit.save(q, files["binary"])
    networks: dict[str, nn.Module] = {"float": twin, "binary": binary}
    took = milliseconds(networks, images[:1], rounds=30)
    for name, network in networks.items():
        right, size = accuracy(network, images, labels), files[name].stat().st_size
        print(f"{name:6}  {right:.2%}  {size:,} bytes  {took[name]:.2f} ms an image")

    path = lowbit.export.onnx(q, options.out / "binary.onnx")
    parity = lowbit.verify(q, path, images[:100])
    same = torch.equal(binary(images[:100]).argmax(1), q(images[:100]).argmax(1))
    print(f"the kernels put images in the classes of the trained network: {same}")
    print(f"{path} is the trained network, code for code: {parity.exact}")


if __name__ == "__main__":
    main()

"""Train the demo network from scratch; this wrote the weights shipped in `lowbit.demo`.

    python examples/train_demo.py --bf16 --out demo_resnet.safetensors

It trains on the 60,000 official Fashion-MNIST training images where `--data` has them (Debian's package
`dataset-fashion-mnist`, or https://github.com/zalandoresearch/fashion-mnist), else on the 10,000 shipped
ones. The test images are looked at once, when training is over: nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit.demo import DemoResNet, load_images
from lowbit.demo.data import IMAGES, augment, normalize, read_idx

BATCH = 128
LEARNING_RATE = 0.1
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.05


def training_images(folder: Path) -> tuple[Tensor, Tensor, str]:
    """Return x [N, 28, 28] uint8, y [N] int64 and a sentence that says where they are from."""
    images = folder / "train-images-idx3-ubyte.gz"
    labels = folder / "train-labels-idx1-ubyte.gz"
    if images.is_file() and labels.is_file():
        return read_idx(images), read_idx(labels).long(), f"official training images from {folder}"
    with np.load(IMAGES) as archive:
        x, y = torch.from_numpy(archive["x_train"]), torch.from_numpy(archive["y_train"]).long()
    return x, y, f"shipped training images, for {folder} has no {images.name}: expect a lower accuracy"


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Return the factor on LEARNING_RATE: linear from 0 to 1 in `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(network: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int, bf16: bool) -> None:
    """Train `network` in place on x [N, 28, 28] uint8 and y [N] int64; one printed line an epoch."""
    generator = torch.Generator().manual_seed(seed)
    loss_of = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    # The last, partial batch of an epoch is left out: BatchNorm would see few images there.
    batches = len(x) // BATCH
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, epochs * batches, batches)
    )
    network.train()
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        loss_sum = 0.0
        right = 0
        order = torch.randperm(len(x), generator=generator)[: batches * BATCH]
        for index in torch.split(order, BATCH):
            inputs = normalize(augment(x[index], generator)).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = network(inputs)
            loss = loss_of(logits.float(), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.item()
            right += int((logits.argmax(1) == y[index]).sum())
        print(
            f"epoch {epoch:3d}/{epochs}  loss {loss_sum / batches:.4f}"
            f"  training accuracy {right / len(order):.2%}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    network.eval()


@torch.inference_mode()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the part of x [N, 1, 28, 28] that `network` puts in its class y [N]."""
    # In parts, for the memory of the first stage.
    right = torch.cat([network(part).argmax(1) for part in torch.split(x, 500)]) == y
    return right.float().mean().item()


def save(network: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write the state dict as safetensors: first beside `path`, then renamed, so that no half file stays."""
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(state, str(partial), metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def arguments() -> argparse.Namespace:
    """Parse the command line; its defaults, with --bf16, are what trained the shipped weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder with Fashion-MNIST's idx files (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=int, default=32, help="passes over the images (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_resnet.safetensors"),
        help="file for the weights (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default: 1)")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="compute forward and backward in bfloat16; faster on a CPU with AVX512-BF16 or AMX, slower else",
    )
    options = parser.parse_args()
    if options.epochs < 1 or options.threads < 1:
        parser.error(f"--epochs {options.epochs} --threads {options.threads}: both must be at least 1")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}; make it first")
    return options


def main() -> None:
    """Train, save, and print the accuracy on the shipped test images."""
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    x, y, source = training_images(options.data)
    print(f"{len(x)} {source}")
    network = DemoResNet().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in network.parameters())} parameters, {options}", flush=True)

    train(network, x, y, options.epochs, options.seed, options.bf16)

    x_test, y_test = load_images("test")
    test_accuracy = accuracy(network, x_test, y_test)
    save(
        network,
        options.out,
        {
            "training_images": str(len(x)),
            "epochs": str(options.epochs),
            "seed": str(options.seed),
            "precision": "bfloat16" if options.bf16 else "float32",
            "accuracy": f"{test_accuracy:.4f} on {len(x_test)} shipped test images",
        },
    )
    print(f"accuracy {test_accuracy:.2%} on the {len(x_test)} shipped test images; wrote {options.out}")


if __name__ == "__main__":
    main()

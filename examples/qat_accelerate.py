"""Quantization-aware training with Accelerate: the loop of `qat_plain.py` on whatever devices there are.

    python examples/qat_accelerate.py --recipe w2a2 --steps 150 --out out
    accelerate launch --cpu --num_processes 2 examples/qat_accelerate.py

The quantized model is an nn.Module with Parameters, so `Accelerator.prepare` takes it as any other. Calibrate
before that: it is then that scales become Parameters.
"""

from __future__ import annotations

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lowbit
from lowbit.demo import load_images, load_network
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
    accelerator = Accelerator()
    model = load_network()
    train = TensorDataset(*load_images("train"))
    images, labels = (t[:1000] for t in load_images("test"))
    loader = DataLoader(train, batch_size=128, shuffle=True, drop_last=True)
    few = train.tensors[0][:512].split(128)

    accelerator.print(f"float {accuracy(model, images, labels):.2%}")
    q = lowbit.prepare(model, options.recipe, few[0])
    lowbit.calibrate(q, few)
    accelerator.print(f"PTQ   {accuracy(q, images, labels):.2%}")
    optimizer = torch.optim.SGD(parameter_groups(q, lr=0.01, weight_decay=1e-4), momentum=0.9)
    # left to itself: Accelerate would step it once for each process
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    wrapped, optimizer, loader = accelerator.prepare(q, optimizer, loader)

    wrapped.train()
    epochs = chain.from_iterable(repeat(loader))
    for step, (x, y) in enumerate(islice(epochs, options.steps), 1):
        loss = F.cross_entropy(wrapped(x), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            accelerator.print(f"step {step:4d}  loss {loss.item():.4f}")

    q = lowbit.freeze(accelerator.unwrap_model(wrapped).cpu())
    accelerator.print(f"QAT   {accuracy(q, images, labels):.2%}")
    if accelerator.is_main_process:
        lowbit.save(q, options.out / f"{options.recipe}.safetensors")
        path = lowbit.export.onnx(q, options.out / f"{options.recipe}.onnx")
        parity = lowbit.verify(q, path, images[:200].split(100))
        print(f"{path} is the trained network, code for code: {parity.exact}")


if __name__ == "__main__":
    main()

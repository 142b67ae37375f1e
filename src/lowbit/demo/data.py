"""The demo images: a part of Fashion-MNIST that is small enough to ship.

Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, https://arxiv.org/abs/1708.07747; MIT licence, see
`assets/LICENSE.fashion-mnist`) holds 28x28 grey images of ten kinds of clothing. Shipped are the first
10,000 of its 60,000 training images and the first 3,000 of its 10,000 test images, in their order.

The file is an ordinary npz archive (`x_train`, `y_train`, `x_test`, `y_test`, all uint8) whose members
are compressed by LZMA instead of deflate: 10 % smaller, and `numpy.load` reads it all the same.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError

__all__ = ["IMAGES", "MEAN", "STD", "TrainingImages", "augment", "load_images", "normalize", "read_idx"]

IMAGES = Path(__file__).parent / "assets" / "fashion_mnist.npz"

# Mean and standard deviation of the 60,000 official training images, as grey values in 0..1.
MEAN = 0.2860
STD = 0.3530

# The largest shift in pixels, in each direction, of an augmented image.
SHIFT = 2


def load_images(split: str) -> tuple[Tensor, Tensor]:
    """Return the shipped images of one split, normalized, and their classes.

    split: "train" (10,000 images) or "test" (3,000 images).

    Shapes: x [N, 1, 28, 28] float32, contiguous; y [N] int64 in 0..9.
    Errors: LowbitError for any other split.
    """
    x, y = _read(split)
    return normalize(x), y


def _read(split: str) -> tuple[Tensor, Tensor]:
    """x [N, 28, 28] uint8 and y [N] int64."""
    if split not in ("train", "test"):
        raise LowbitError(f"split {split!r} is not one of the demo images' splits; use 'train' or 'test'")
    with np.load(IMAGES) as archive:
        return torch.from_numpy(archive[f"x_{split}"]), torch.from_numpy(archive[f"y_{split}"]).long()


class TrainingImages:
    """The shipped training images in batches, each time in another order, flipped and shifted anew.

    Yields x [batch_size, 1, 28, 28] float32, normalized, and y [batch_size] int64. Whatever is random follows
    from PyTorch's global generator, as in a DataLoader. The last, partial batch is left out: BatchNorm would
    see few images there.
    """

    def __init__(self, batch_size: int = 128) -> None:
        """Read the images.

        Raises:
            LowbitError: a batch has no image, or more than there are.
        """
        self.x, self.y = _read("train")
        if not 1 <= batch_size <= len(self.x):
            raise LowbitError(f"batch size {batch_size} is not from 1 to {len(self.x)}, the number of images")
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.x) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
        order = torch.randperm(len(self.x), generator=generator)[: len(self) * self.batch_size]
        for index in torch.split(order, self.batch_size):
            yield normalize(augment(self.x[index], generator)), self.y[index]


def normalize(x: Tensor) -> Tensor:
    """Return `(x / 255 - MEAN) / STD` with a channel axis: x [N, 28, 28] uint8 -> [N, 1, 28, 28] float32."""
    return ((x.float() / 255 - MEAN) / STD).unsqueeze(1)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images left to right and shift each by up to SHIFT pixels.

    Shapes: x [N, 28, 28] uint8, with 0 for black -> the same; what a shift uncovers is black.
    """
    count, height, width = x.shape
    flipped = torch.rand(count, 1, 1, generator=generator) < 0.5
    x = nn.functional.pad(torch.where(flipped, x.flip(2), x), [SHIFT] * 4)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows = (top + torch.arange(height))[:, :, None]
    columns = (left + torch.arange(width))[:, None, :]
    return x[torch.arange(count)[:, None, None], rows, columns]


def read_idx(path: str | Path) -> Tensor:
    """Read one gzip-compressed idx file of bytes, the format of MNIST's and Fashion-MNIST's originals.

    The header is two zero bytes, the element type (8 is uint8), the rank, then every dimension as a
    big-endian 32-bit number (http://yann.lecun.com/exdb/mnist, "file format").

    Shapes: returns uint8 of the shape in the header: [N, 28, 28] for images, [N] for labels.
    Errors: LowbitError for another element type, or where the data do not fill that shape.
    """
    content = gzip.decompress(Path(path).read_bytes())
    zeros, kind, rank = struct.unpack_from(">HBB", content)
    if (zeros, kind) != (0, 8):
        raise LowbitError(f"{path} starts with {content[:4].hex()}: not an idx file of bytes (0000 08 rank)")
    shape = struct.unpack_from(f">{rank}I", content, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape):
        raise LowbitError(f"{path} holds {values.size} values, its header says {shape}; fetch it again")
    # A copy, for the bytes object is read-only and PyTorch warns of that.
    return torch.from_numpy(values.reshape(shape).copy())

"""Small networks that between them hold every operation with an integer kernel, and batches for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DEPLOYABLES", "build"]


class Pools(nn.Module):
    """Concatenation, ReLU6, and average pooling with and without overlap, padding and a whole window."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 5, padding=2)
        self.c, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(self.a(x)), F.relu6(self.b(x))], 1)
        y = F.max_pool2d(self.c(F.avg_pool2d(y, 2)), 2)
        y = F.avg_pool2d(F.avg_pool2d(y, 3, stride=1, padding=1), (1, 1))
        return self.fc(F.avg_pool2d(y, y.size(3)).flatten(1))


class Gates(nn.Module):
    """Products, a transposed convolution, activations without an integer kernel, a dict output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.gate, self.up = nn.Linear(8, 8), nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.a(x))
        g = F.hardsigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
        return {"up": self.up(y * g), "product": F.leaky_relu(self.b(x)) * y}


class Attention(nn.Module):
    """One transformer block with attention as plain products."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(50, 32), nn.Parameter(torch.randn(1, 12, 32) * 0.1)
        self.qkv, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.table(ids) + self.place
        n, t, c = x.shape
        q, k, v = (z.view(n, t, 4, 8).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2)) * 8**-0.5
        if mask is not None:
            scores = scores + mask
        x = self.norm(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, c)))
        return self.head((x + self.down(F.relu(self.up(x)))).mean(1))


class TwoInputs(nn.Module):
    """Two inputs, two outputs, a functional weight and a 1-d convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 8), nn.Conv1d(1, 3, 3, padding=1)
        self.w = nn.Parameter(torch.randn(5, 8) * 0.3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.relu(self.a(x) + self.b(y))
        return F.linear(z, self.w), self.c(z[:, None, :]).flatten(1)


class Shortcuts(nn.Module):
    """Padded and strided shortcuts as in option-A ResNets, depthwise and dilated convolution, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, padding="same", dilation=2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        y = self.down(F.relu(x))
        y = F.relu(self.depthwise(y) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.fc(y.mean([2, 3]))


class Recurrent(nn.Module):
    """Layers that are called again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.step, self.fc = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(8, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        y = F.relu(self.step(F.relu(self.step(F.relu(self.step(y)))))).mean((2, 3))
        return self.fc(F.relu(self.fc(y)))


def _images() -> list[Any]:
    return [torch.randn(8, 3, 16, 16) for _ in range(3)]


DEPLOYABLES: dict[str, tuple[type[nn.Module], Callable[[], list[Any]]]] = {
    "pools": (Pools, _images),
    "gates": (Gates, _images),
    "attention": (Attention, lambda: [{"ids": torch.randint(0, 50, (8, 12))} for _ in range(3)]),
    "two inputs": (TwoInputs, lambda: [((torch.randn(9, 6), torch.randn(9, 4)), 0) for _ in range(3)]),
    "shortcuts": (Shortcuts, _images),
    "recurrent": (Recurrent, _images),
}


def build(name: str) -> tuple[nn.Module, list[Any]]:
    """The network, in evaluation mode with fixed weights, and three batches for it."""
    torch.manual_seed(0)
    network, batches = DEPLOYABLES[name]
    return network().eval(), batches()

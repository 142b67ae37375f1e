"""Small models in the styles people write them in, and the measures that tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit.core.qtensor import sqnr_db
from lowbit.graph.inputs import Inputs
from lowbit.graph.ops import kind_of
from lowbit.graph.run import flat_tensors
from lowbit.graph.trace import trace

__all__ = [
    "STYLES",
    "BatchNormNet",
    "Chain",
    "Fn",
    "InvertedResidual",
    "Residual",
    "conv",
    "image",
    "quantizers",
    "settle",
    "sqnr",
    "traced",
]


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def image(batch: int = 8, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, channels, size, size)


def sqnr(reference: Any, output: Any) -> float:
    """SQNR in dB over all float tensors of two outputs."""
    pairs = list(zip(flat_tensors(reference), flat_tensors(output), strict=True))
    signal = sum(a.double().square().sum().item() for a, _ in pairs)
    return sqnr_db(signal, sum((a.double() - b.double()).square().sum().item() for a, b in pairs))


def traced(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    return trace(model, Inputs(args, kwargs))[0]


def quantizers(gm: fx.GraphModule) -> dict[str, str]:
    """Where quantizers stand: the node that each one reads, with those it is then moved to."""
    found: dict[str, str] = {}
    for node in gm.graph.nodes:
        if kind_of(node) == "quantizer":
            found[str(node.args[0].meta["name"])] = str(node.target)
    return found


def settle(model: nn.Module, *batches: Tensor) -> nn.Module:
    """Give every BatchNorm statistics and an affine map that are not those it starts with."""
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                if module.bias is not None:
                    module.bias.uniform_(-0.5, 0.5)
        for _ in range(5):
            for batch in batches:
                model(batch)
    return model.eval()


class Fn(nn.Module):
    """A forward pass given as a function of the module's children and the inputs."""

    def __init__(self, forward: Callable[..., Any], **children: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Residual(nn.Module):
    """Two convolutions beside the identity, a ReLU behind each."""

    def __init__(self, channels: int = 4, inner: int | None = None) -> None:
        super().__init__()
        wide = inner or channels
        self.a, self.b = conv(channels, wide), conv(wide, channels)

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(self.a(x).relu()) + x).relu()


class Chain(nn.Sequential):
    """Two convolutions with a ReLU between them, the channels of the first badly spread."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(conv(3, channels), nn.ReLU(), conv(channels, 4))
        with torch.no_grad():
            spread = torch.logspace(-1.5, 1.5, channels)
            self[0].weight.mul_(spread.reshape(-1, 1, 1, 1))
            self[0].bias.mul_(spread)
            self[2].weight.div_(spread.reshape(1, -1, 1, 1))


class BatchNormNet(nn.Module):
    """Convolution, BatchNorm and ReLU, twice, then a linear head."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.a, self.bn_a = conv(3, channels, bias=False), nn.BatchNorm2d(channels)
        self.b, self.bn_b = conv(channels, channels), nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_a(self.a(x)))
        x = F.relu(self.bn_b(self.b(x)))
        return self.fc(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project, with a residual add: MobileNetV2's block."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU, channels: int = 6, wide: int = 12) -> None:
        super().__init__()
        self.stem = conv(3, channels)
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide), activation())
        self.depthwise = nn.Sequential(conv(wide, wide, groups=wide), nn.BatchNorm2d(wide), activation())
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels))
        self.head = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.project(self.depthwise(self.expand(x))))


# --- the seven styles of docs/architecture.md


class FunctionalResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return F.relu(self.c(F.relu(self.b(x))) + x)


class OneReluTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = conv(3, 8), conv(8, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.relu(self.a(x))))


class OneConvTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.b(F.relu(self.a(x)))))


class ShapeBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if y.shape[2] > 4:
            y = F.max_pool2d(y, 2)
        return self.b(y)


class DataBranch(nn.Module):
    def __init__(self, inputs: int = 3) -> None:
        super().__init__()
        self.a, self.b = conv(inputs, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if y.mean() > 0.3:
            y = y * 0.5
        return self.b(y)


class DataBranchInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = conv(3, 6), DataBranch(6), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(F.relu(self.stem(x))).mean((2, 3)))


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.a(x))
        return {"features": y, "logits": self.b(y.mean((2, 3)))}


class FunctionalWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.3)
        self.v = nn.Parameter(torch.randn(5, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.conv2d(x, self.w, padding=1)).mean((2, 3)), self.v)


STYLES: dict[str, type[nn.Module]] = {
    "functional relu and residual add": FunctionalResidual,
    "one ReLU used twice": OneReluTwice,
    "one Conv2d used twice": OneConvTwice,
    "branch on a shape": ShapeBranch,
    "branch on data at the top": DataBranch,
    "branch on data inside": DataBranchInside,
    "dict output": DictOutput,
    "functional weight": FunctionalWeight,
}

"""The demo network: a small residual network in plain PyTorch, and its trained weights.

It is written as any author would write it, and knows nothing of quantization: convolution, BatchNorm
and ReLU are modules, the residual adds are the `+` operator, and a block that changes its shape has a
1x1 convolution on its shortcut. Whatever `lowbit` does to it, it does from outside.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["WEIGHTS", "DemoResNet", "ResidualBlock", "load_network"]

WEIGHTS = Path(__file__).parent / "assets" / "demo_resnet.safetensors"


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: `y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`.

    The shortcut is the identity where input and output have one shape, else a strided 1x1 convolution
    with its BatchNorm (He et al. 2015, https://arxiv.org/abs/1512.03385, option B).

    Shapes: x [N, in_channels, H, W] -> y [N, out_channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + shortcut
        out = self.relu2(out)
        return out


class DemoResNet(nn.Module):
    """A residual network for 28x28 grey images: a 3x3 stem, three stages of residual blocks, a linear head.

    widths: output channels of the three stages; the stem has as many as the first stage.
    depths: residual blocks in each stage. The second and third stage halve height and width.
    num_classes: outputs of the head.

    Shapes: x [N, 1, 28, 28] float, normalized as `lowbit.demo.load_images` does -> logits [N, num_classes].
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (16, 32, 64),
        depths: tuple[int, int, int] = (1, 2, 2),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        stages: list[nn.Module] = []
        channels = widths[0]
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for block in range(depth):
                blocks.append(ResidualBlock(channels, width, stride=2 if index > 0 and block == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn(self.conv(x)))
        out = self.layer1(out)
        out = self.layer2(out)
        out = self.layer3(out)
        out = self.pool(out).flatten(1)
        logits: Tensor = self.fc(out)
        return logits


def load_network(weights: str | Path = WEIGHTS) -> DemoResNet:
    """Return the trained demo network in float32, on the CPU, in eval mode.

    weights: a safetensors file with the state dict of `DemoResNet()`, as `examples/train_demo.py` writes it;
    by default the one shipped with the package.
    """
    network = DemoResNet()
    network.load_state_dict(load_file(str(weights)))
    return network.eval()

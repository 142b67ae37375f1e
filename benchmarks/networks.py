"""The networks under test, as their authors would write them: nothing here knows about quantization.

CIFAR-10: ResNet-20/56 with option-A shortcuts (functional ReLUs, a padding shortcut) and ResNet-20 with
option-B shortcuts (ReLU modules, a 1x1 convolution). ImageNet shapes: ResNet-18 and MobileNetV2 in
torchvision's structure, with seeded random weights, since only their shape matters for speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

RGB = tuple[float, float, float]


class CifarBlockA(nn.Module):
    """Two 3x3 convolutions; where the shape changes the shortcut subsamples and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = outputs // 4 if stride != 1 or inputs != outputs else 0

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> [B, C_out, H/stride, W/stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x
        return F.relu(out + shortcut)


class CifarResNetA(nn.Module):
    """ResNet-(6n+2) of He et al. 2015, section 4.2, option A; the last layer is called `linear`."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(CifarBlockA, 16, 16, blocks, 1)
        self.layer2 = _stage(CifarBlockA, 16, 32, blocks, 2)
        self.layer3 = _stage(CifarBlockA, 32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 32, 32] -> logits [B, classes]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size(3))
        return self.linear(out.view(out.size(0), -1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes the shortcut is a 1x1 convolution (option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> [B, C_out, H/stride, W/stride]."""
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class CifarResNetB(nn.Module):
    """ResNet-(6n+2) for CIFAR with option-B shortcuts; the last layer is called `fc`."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(BasicBlock, 16, 16, blocks, 1)
        self.layer2 = _stage(BasicBlock, 16, 32, blocks, 2)
        self.layer3 = _stage(BasicBlock, 32, 64, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 32, 32] -> logits [B, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class SmallVgg(nn.Module):
    """Six 3x3 convolutions with BatchNorm in three stages (Simonyan, Zisserman 2015, in small)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in widths:
            for _ in range(2):
                layers += [
                    nn.Conv2d(inputs, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(inputs * 16, 128), nn.ReLU(), nn.Linear(128, classes))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 32, 32] -> logits [B, classes]."""
        return self.classifier(self.features(x).flatten(1))


class BinaryVgg(nn.Module):
    """VGG-small as networks of bits have it (Zhang et al. 2018, LQ-Nets): Hardtanh, one linear layer."""

    def __init__(self, width: int = 128, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for factor in (1, 2, 4):
            for last in (False, True):
                outputs = factor * width
                conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(outputs), nn.Hardtanh()]
                layers += [nn.MaxPool2d(2)] if last else []
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 32, 32] -> logits [B, classes]."""
        return self.classifier(self.features(x).flatten(1))


class ResNet18(nn.Module):
    """ResNet-18 for ImageNet in torchvision's structure."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(BasicBlock, 64, 64, 2, 1)
        self.layer2 = _stage(BasicBlock, 64, 128, 2, 2)
        self.layer3 = _stage(BasicBlock, 128, 256, 2, 2)
        self.layer4 = _stage(BasicBlock, 256, 512, 2, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 224, 224] -> logits [B, classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(
    block: Callable[[int, int, int], nn.Module], inputs: int, outputs: int, blocks: int, stride: int
) -> nn.Sequential:
    rest = [block(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(inputs, outputs, stride), *rest)


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a residual add where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = [] if expand == 1 else [_conv_bn_relu6(inputs, hidden, 1)]
        layers.append(_conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden))
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> [B, C_out, H/stride, W/stride]."""
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018), width 1.0, in torchvision's structure."""

    # expansion, output channels, repeats, stride of the first
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu6(3, 32, 3, 2)]
        channels = 32
        for expand, outputs, repeats, stride in self.STAGES:
            for i in range(repeats):
                layers.append(InvertedResidual(channels, outputs, stride if i == 0 else 1, expand))
                channels = outputs
        layers.append(_conv_bn_relu6(channels, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 224, 224] -> logits [B, classes]."""
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


@dataclass(frozen=True, kw_only=True)
class Cifar:
    """A trained CIFAR-10 network: how to build it, its weights' file, what its training normalized with."""

    build: Callable[[], nn.Module]
    file: str
    mean: RGB
    std: RGB


_IMAGENET: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_APOT: tuple[RGB, RGB] = ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
CIFAR = {
    "resnet20-A": Cifar(
        build=lambda: CifarResNetA(3), file="resnet20_optionA_9173", mean=_IMAGENET[0], std=_IMAGENET[1]
    ),
    "resnet20-B": Cifar(
        build=lambda: CifarResNetB(3), file="resnet20_optionB_9296", mean=_APOT[0], std=_APOT[1]
    ),
    "resnet56-A": Cifar(
        build=lambda: CifarResNetA(9), file="resnet56_optionA_9339", mean=_IMAGENET[0], std=_IMAGENET[1]
    ),
}
IMAGENET: dict[str, Callable[[], nn.Module]] = {"resnet18": ResNet18, "mobilenet_v2": MobileNetV2}


def load_cifar(name: str, data_dir: str | Path) -> nn.Module:
    """The trained network `name` (a key of CIFAR) in eval mode, loaded strictly from `data_dir`/models."""
    entry = CIFAR[name]
    model = entry.build()
    model.load_state_dict(load_file(Path(data_dir) / "models" / f"{entry.file}.safetensors"), strict=True)
    return model.eval()


def smooth_images(count: int, size: int = 224, seed: int = 0) -> Tensor:
    """Seeded images [count, 3, size, size] of unit variance, most power at low frequencies, as photos have.

    A sum of bicubic noise at three scales; not pictures, but ranges and spatial correlation alike.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, size, size)
    for cells, amplitude in ((7, 1.0), (28, 0.5), (size, 0.25)):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        total += amplitude * F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)
    return (total - total.mean()) / total.std()


def load_imagenet_shape(name: str, seed: int = 0) -> nn.Module:
    """`name` (a key of IMAGENET) in eval mode: seeded random weights, BatchNorm statistics of smooth images.

    The statistics are a cumulative average over four training-mode passes of 8 images, so activations keep a
    realistic spread at every depth and the ranges that calibration finds mean something.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = IMAGENET[name]()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for batch in torch.split(smooth_images(32, seed=seed + 1), 8):
            model(batch)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()

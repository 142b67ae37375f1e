"""A layer as a matrix: the inputs that its weight multiplies, and the weight, as rows."""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.core.rounding import Grid
from lowbit.core.spec import expand_to
from lowbit.nn.layers import QLayer

__all__ = ["grid_matrix", "is_matrix", "patch_count", "patches", "weight_matrix"]


def is_matrix(layer: nn.Module) -> bool:
    """Whether the layer is a product of its weight with patches of its input."""
    return isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))


def weight_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A tensor shaped like the weight as [groups, rows, columns]."""
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def grid_matrix(layer: QLayer) -> Grid:
    """Where the values of `weight_matrix` may go."""
    quantizer, weight = layer.weight_quantizer, layer.weight
    scale, zero_point = quantizer.grid()

    def matrix(t: Tensor) -> Tensor:
        return weight_matrix(layer, expand_to(t.detach(), weight.shape).expand(weight.shape))

    return Grid(matrix(scale), None if zero_point is None else matrix(zero_point), quantizer.spec)


def patch_count(layer: nn.Module, x: Tensor) -> int:
    """How many rows an input has: positions where the weight is multiplied."""
    if isinstance(layer, nn.Linear):
        return prod(x.shape[:-1])
    windows = _windows(layer, x[:1, :1])  # only their number counts
    return len(x) * int(prod(windows.shape[2:4]))


def patches(layer: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
    """Those rows of an input, [groups, chosen, columns]; only they are copied.

    Args:
        chosen: indices below `patch_count`.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[chosen][None]
    windows = _windows(layer, x)
    height, width = windows.shape[2:4]
    sample, row, column = chosen // (height * width), chosen // width % height, chosen % width
    picked = windows.permute(0, 2, 3, 1, 4, 5)[sample, row, column]
    groups = int(layer.groups)  # type: ignore[arg-type]
    return picked.reshape(len(chosen), groups, -1).transpose(0, 1)


def _windows(layer: nn.Module, x: Tensor) -> Tensor:
    """[B, channels, height, width, kernel height, kernel width], a view of the padded input."""
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    one = isinstance(layer, nn.Conv1d)
    x = x.unsqueeze(2) if one else x
    sizes = (((1, *t) if one else t) for t in (layer.kernel_size, layer.stride, layer.dilation))
    for axis, (kernel, stride, dilation) in enumerate(zip(*sizes, strict=True), start=2):
        x = x.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    return x

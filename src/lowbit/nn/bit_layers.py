"""Frozen layers for inference: binary and ternary ones on the bit kernels, others on whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core import integer
from lowbit.core.affine import quantize
from lowbit.core.integer import Grid
from lowbit.core.spec import expand_to
from lowbit.kernels import bits
from lowbit.kernels.bits import Affine, PackedInput, Threshold
from lowbit.nn.layers import QConv2d, QLayer, QLinear
from lowbit.nn.quantizer import Quantizer, grid_of

# A code of n bits costs as much as n products of bits: beyond this a convolution of floats is faster.
CONV_BITS = 4

__all__ = [
    "BitConv2d",
    "BitLayer",
    "BitLinear",
    "BitMaxPool2d",
    "CodesLayer",
    "Pack",
    "obstacle_of",
    "sums_codes",
]


class Pack(nn.Module):
    """Floats to the packed codes of a quantizer.

    Channels are axis 1 of images, and for linear layers (`rows`) the last axis of anything.
    """

    def __init__(self, grid: Grid, groups: int, rows: bool) -> None:
        super().__init__()
        self.grid, self.groups, self.rows = grid, groups, rows

    def forward(self, x: Tensor) -> PackedInput:
        if not self.rows:
            return self._packed(x)
        found = self._packed(x.flatten(0, -2))
        return replace(found, words=found.words.reshape(*x.shape[:-1], found.words.shape[-1]))

    def _packed(self, x: Tensor) -> PackedInput:
        spec, grid = self.grid.spec, self.grid
        if spec.is_binary:
            return bits.pack_signs(x, groups=self.groups)
        rank = [1] * x.ndim
        zero = None if spec.symmetric else torch.full(rank, grid.zero_point, dtype=torch.int32)
        codes = quantize(x, grid.scale.reshape(rank), zero, spec)
        return bits.pack_codes(codes, bits=spec.bits, groups=self.groups)

    def extra_repr(self) -> str:
        return str(self.grid.spec)


class BitMaxPool2d(nn.Module):
    """Max pooling of packed bits."""

    def __init__(self, kernel_size: Any, stride: Any, padding: Any) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def forward(self, x: PackedInput) -> PackedInput:
        return bits.max_pool2d(x, self.kernel_size, stride=self.stride, padding=self.padding)


@dataclass(frozen=True)
class _Sums:
    """What a sum of products of codes stands for, as the integer reference has it."""

    # of each output: scale of a step of the accumulator, what zero points add to a sum, and the bias in steps
    scale: Tensor
    shift: Tensor
    bias: Tensor
    # steps in one product of codes
    factor: int
    # the largest magnitude of a sum
    reach: int

    @classmethod
    def of(cls, layer: QLayer, source: Grid, codes: Tensor) -> _Sums:
        """For raw codes of the inputs, and those of the weights [out, ...]."""
        plain, wide = layer.qweight(), layer.kernel_qweight(source.spec)
        rows = codes.flatten(1).long()
        factor = round((plain.scale / wide.scale).max().item())
        scale = (source.scale * wide.scale.reshape(-1)).expand(len(rows))
        bias = torch.zeros(len(rows), dtype=torch.float64)
        if layer.bias is not None:
            bias = integer.bias_codes(layer.bias.detach(), scale).double()
        largest = max(abs(source.spec.qmin), abs(source.spec.qmax)) + abs(source.zero_point)
        reach = int(rows.abs().sum(1).max()) * largest if rows.numel() else 0
        return cls(scale, rows.sum(1) * source.zero_point, bias, factor, reach)

    def exact(self, sums: Tensor) -> Tensor:
        """The accumulator of an integer kernel, bias included, float64."""
        return (sums - self.shift).double() * self.factor + self.bias

    def affine(self) -> Affine:
        """From sums to floats."""
        scale = (self.scale * self.factor).contiguous()
        bias = (self.bias - self.shift.double() * self.factor) * self.scale.double()
        return Affine(scale=scale, bias=bias.float())

    def threshold(self, grid: Grid) -> Threshold:
        """From sums to codes of one bit: the smallest sum that has the upper code, by bisection."""
        multiplier = self.scale / grid.scale

        def upper(sums: Tensor) -> Tensor:
            codes = integer.rescale(self.exact(sums), multiplier, grid) + grid.zero_point
            return codes >= grid.spec.qmax

        kind = "sign" if grid.spec.is_binary else "unsigned"
        found = _first(upper, -self.reach, self.reach + 1, len(self.scale))
        return Threshold(threshold=found.int(), kind=kind)  # type: ignore[arg-type]


def _first(holds: Callable[[Tensor], Tensor], low: int, high: int, count: int) -> Tensor:
    """The first whole number of [low, high] from which on `holds`, for each of `count`; else `high`."""
    first, last = torch.full((count,), low), torch.full((count,), high)
    while bool((first < last).any()):
        middle = torch.div(first + last, 2, rounding_mode="floor")
        found = holds(middle)
        last, first = torch.where(found, middle, last), torch.where(found, first, (middle + 1).minimum(last))
    return first


class BitLayer(nn.Module):
    """A layer of packed weights; gives floats, or after `ends_in_bits` the packed codes of the next."""

    def __init__(self, layer: QLayer, source: Grid | None) -> None:
        """`source` is the grid of the inputs; None takes floats."""
        super().__init__()
        q = layer.qweight()
        floats = source is None
        self.weight = bits.pack_weight(q.codes, groups=getattr(layer, "groups", 1), floats=floats)
        self.sums = None if source is None else _Sums.of(layer, source, q.codes)
        self.end: Affine | Threshold
        if self.sums is not None:
            self.end = self.sums.affine()
        else:
            bias = None if layer.bias is None else layer.bias.detach()
            self.end = Affine(scale=q.scale.reshape(-1).expand(len(q.codes)).contiguous(), bias=bias)
        # what images are padded with
        self.pad_code = 0 if source is None or source.spec.is_binary else source.zero_point

    def ends_in_bits(self, grid: Grid) -> bool:
        """Give the codes of a quantizer of one bit from now on; False where inputs in float cannot."""
        if self.sums is not None:
            self.end = self.sums.threshold(grid)
        return self.sums is not None

    @property
    def gives(self) -> str:
        """Bits or floats."""
        return "bits" if isinstance(self.end, Threshold) else "floats"

    def extra_repr(self) -> str:
        kind = "ternary" if self.weight.ternary else "binary"
        return f"{list(self.weight.shape)}, {kind} -> {self.gives}"


class BitLinear(BitLayer):
    """y = x W^T + b."""

    def forward(self, x: PackedInput | Tensor) -> Tensor | PackedInput:
        lead = x.shape[:-1] if isinstance(x, Tensor) else x.words.shape[:-1]
        rows = x.flatten(0, -2) if isinstance(x, Tensor) else replace(x, words=x.words.flatten(0, -2))
        if isinstance(rows, PackedInput) and isinstance(self.end, Threshold):
            found = bits.linear(rows, self.weight, self.end)
            return replace(found, words=found.words.reshape(*lead, found.words.shape[-1]))
        assert isinstance(self.end, Affine)
        return bits.linear(rows, self.weight, self.end).reshape(*lead, self.weight.shape[0])


class BitConv2d(BitLayer):
    """2-d cross-correlation, padding exact."""

    def __init__(self, layer: QConv2d, source: Grid) -> None:
        super().__init__(layer, source)
        self.window: dict[str, Any] = {
            name: getattr(layer, name) for name in ("stride", "padding", "dilation")
        }

    def forward(self, x: PackedInput) -> Tensor | PackedInput:
        return bits.conv2d(x, self.weight, self.end, **self.window, pad_code=self.pad_code)


class CodesLayer(nn.Module):
    """A layer of wider codes: products are summed as whole numbers in floating point, which is exact."""

    def __init__(self, layer: QLinear | QConv2d, source: Grid) -> None:
        super().__init__()
        q = layer.qweight()
        codes = q.codes.double()
        if q.zero_point is not None:
            codes -= expand_to(q.zero_point, q.codes.shape)
        sums = _Sums.of(layer, source, codes)
        largest = sums.reach * sums.factor + float(sums.bias.abs().max())
        self.dtype = torch.float32 if largest < 2**24 else torch.float64
        rank = [-1] if isinstance(layer, QLinear) else [-1, 1, 1]
        self.source, self.layer = source, layer
        self.codes = codes.to(self.dtype) * sums.factor
        self.bias = sums.bias.to(self.dtype).reshape(rank)
        self.scale = sums.scale.reshape(rank)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.round(x / self.source.scale).to(self.dtype)
        if isinstance(self.layer, QLinear):
            sums = nn.functional.linear(steps, self.codes)
        else:
            sums = self.layer._conv_forward(steps, self.codes, None)
        return (sums + self.bias).float() * self.scale


def sums_codes(layer: nn.Module, source: Quantizer | None) -> bool:
    """Whether a frozen layer can be a `CodesLayer`."""
    if not isinstance(layer, (QLinear, QConv2d)) or source is None:
        return False
    spec, scale, grid = layer.weight_quantizer.spec, layer.weight_quantizer.scale, grid_of(source)
    whole = spec.kind == "int" and not spec.split and scale.numel() in (1, scale.shape[0])
    return whole and grid is not None and grid.spec.bits <= 8


def obstacle_of(layer: nn.Module, source: Quantizer | None) -> str:
    """Why a frozen layer cannot run on the bit kernels, or ''."""
    if not isinstance(layer, (QLinear, QConv2d)):
        return "no bit kernel for that layer"
    spec = layer.weight_quantizer.spec
    if not (spec.is_binary or spec.is_ternary):
        return f"its weight is {spec}, neither binary nor ternary"
    if spec.split:
        return "each sign of its weight has a scale of its own"
    scale, grid = layer.weight_quantizer.scale, None if source is None else grid_of(source)
    if scale.numel() not in (1, scale.shape[0]):
        return "its scales do not leave the sum of an output"
    if grid is not None and grid.spec.bits == 1 and grid.spec.signed and not grid.spec.mid_rise:
        return "its input has the codes -1 and 0; use the spec 'sign' or 'bit'"
    if source is not None and (grid is None or grid.spec.bits > 8):
        return f"its input is {source.spec}, not codes of 8 bits or fewer with one scale"
    if isinstance(layer, QConv2d):
        if grid is None or grid.spec.bits > CONV_BITS:
            wide = "in float" if grid is None else f"codes of {grid.spec.bits} bits"
            return f"its input is {wide}, which convolutions sum faster in float"
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            return "its padding is neither zeros nor given in numbers"
    return ""

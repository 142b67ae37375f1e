"""Convolutions whose weight is a tensor network: chains of ordinary convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.decompose.ranks import Lost, RankRule
from lowbit.decompose.tt import Train, tensor_to_train
from lowbit.decompose.tucker import cp, tucker
from lowbit.errors import LowbitError
from lowbit.nn.network import Blueprint, TensorNetwork, networks, resize, std_of_factors

__all__ = ["CPConv2d", "ConvChain", "TTConv2d", "TuckerConv2d"]

# Seconds of a call, of a multiply-accumulate, and of a float read or written, on one core.
CALL, MAC, MOVE = 15e-6, 1 / 35e9, 1 / 4e9


class ConvChain(TensorNetwork):
    """Convolutions one after another; those before and after the spatial ones are 1x1, the last has the bias.

    In evaluation the dense convolution is called instead, and its weight kept, where that is cheaper.

    Args:
        like: a convolution whose channels, kernel, stride, padding, dilation and bias these have together.
        ranks: of the bonds, input to output.

    Raises:
        LowbitError: a grouped convolution, or another number of ranks.
    """

    def __init__(self, like: nn.Conv2d, ranks: Sequence[int]) -> None:
        super().__init__()
        if like.groups != 1:
            raise LowbitError(
                f"the convolution has {like.groups} groups, and each would be a tensor of its own; leave it "
                "as it is"
            )
        if len(ranks) != len(self.names) - 1 or not all(isinstance(r, int) and r >= 1 for r in ranks):
            bonds = len(self.names) - 1
            raise LowbitError(
                f"ranks={tuple(ranks)!r} are not {bonds} whole numbers from 1 up, one for each bond"
            )
        channels = (like.in_channels, *ranks, like.out_channels)
        for k, name in enumerate(self.names):
            options = self._options(name, like)
            last = k == len(self.names) - 1
            conv = nn.Conv2d(channels[k], channels[k + 1], bias=last and like.bias is not None, **options)
            self.add_module(name, conv)
        self.reset_parameters()

    def _options(self, name: str, like: nn.Conv2d) -> dict[str, Any]:
        """Kernel size, stride and so on of one factor: along height, along width, or 1x1."""
        axis = {"height": 0, "width": 1}.get(name)
        return {"kernel_size": 1} if axis is None else _along(like, axis)

    @classmethod
    def decompose(cls, weight: Tensor, rule: RankRule) -> tuple[list[Tensor], Lost]:
        """Weights of the factors of a dense weight [out, in, height, width], and what they leave out."""
        raise NotImplementedError

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, rule: RankRule) -> tuple[ConvChain, Lost]:
        """The chain nearest to a convolution, and what it leaves out."""
        weights, lost = cls.decompose(conv.weight.detach(), rule)
        layer = cls(conv, [len(weight) for weight in weights[:-1]])
        for factor, weight in zip(layer.factors, weights, strict=True):
            resize(factor, weight)
        if conv.bias is not None:
            layer.factors[-1].bias = nn.Parameter(conv.bias.detach().clone())
        return layer.to(conv.weight), lost

    @property
    def factors(self) -> Sequence[nn.Conv2d]:
        return [self._modules[name] for name in self.names]  # type: ignore[misc]

    @property
    def blueprint(self) -> Blueprint:
        return Blueprint(type(self).__name__, tuple(f.out_channels for f in self.factors[:-1]))

    @classmethod
    def like(cls, layer: nn.Module, blueprint: Blueprint) -> ConvChain:
        whole = layer.whole if isinstance(layer, ConvChain) else layer
        assert isinstance(whole, nn.Conv2d)
        return cls(whole, blueprint.ranks)

    @property
    def whole(self) -> nn.Conv2d:
        """The convolution with the shapes of all together, without numbers."""
        factors, (stride, padding, dilation) = self.factors, self._geometry
        height, width = (math.prod(f.kernel_size[axis] for f in factors) for axis in (0, 1))
        modes = {f.padding_mode for f in factors} - {"zeros"}
        return nn.Conv2d(
            factors[0].in_channels,
            factors[-1].out_channels,
            (height, width),
            stride,
            padding,
            dilation,
            bias=factors[-1].bias is not None,
            padding_mode=modes.pop() if modes else "zeros",
            device="meta",
        )

    def reset_parameters(self) -> None:
        """Normal factors with which an entry of the dense weight has variance 2 / fan-in (He et al. 2015)."""
        factors = self.factors
        fan_in = factors[0].in_channels * math.prod(math.prod(f.kernel_size) for f in factors)
        # a depthwise factor writes the bond that it reads: the sum over it is one
        summed = [f.out_channels for f in factors[:-1] if f.groups == 1]
        std = std_of_factors(2 / fan_in, summed, len(factors))
        for factor in factors:
            nn.init.normal_(factor.weight, std=std)
        if factors[-1].bias is not None:
            nn.init.zeros_(factors[-1].bias)

    @classmethod
    def train_of(cls, weights: Sequence[Tensor], blueprint: Blueprint) -> Train:
        """Cores [read, height, width, written]; channels of the whole are modes of the first and the last."""
        cores = [weight.permute(1, 2, 3, 0) for weight in weights]
        return Train((cores[0][None], *cores[1:-1], cores[-1][..., None]))

    @classmethod
    def weights_of(cls, train: Train) -> list[Tensor]:
        cores = [train.cores[0][0], *train.cores[1:-1], train.cores[-1][..., 0]]
        return [core.permute(3, 0, 1, 2) for core in cores]

    def macs(self, positions: int, size: tuple[int, ...]) -> int:
        total = 0
        for factor in self.factors:
            size = _size_after(factor, size)
            total += factor.weight.numel() * math.prod(size)
        return total

    def dense_weight(self) -> Tensor:
        """[out, in, height, width]."""
        whole: Tensor | None = None
        for factor in self.factors:
            weight = factor.weight
            if whole is None:
                whole = weight
            elif factor.groups > 1:  # [r, 1, h, w] and [r, i, h', w']
                product = weight[:, :, :, None, :, None] * whole[:, :, None, :, None, :]
                whole = product.flatten(4, 5).flatten(2, 3)
            else:  # along height and width at most one of the two is longer than 1
                product = torch.tensordot(weight, whole, dims=([1], [0])).permute(0, 3, 1, 4, 2, 5)
                whole = product.flatten(4, 5).flatten(2, 3)
        assert whole is not None
        return whole

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, height, width] -> [batch, out, height', width']."""
        evaluated = isinstance(x, Tensor) and not self.training and not torch.is_grad_enabled()
        if not evaluated:
            self._kept.clear()
        weights = self._plain_weights() if evaluated else []
        if not weights or not self._dense_is_faster(x):
            return self.chain(x)
        self._kept.follow(weights)
        (weight,) = self._kept.product("dense", lambda: [self.dense_weight()])
        stride, padding, dilation = self._geometry
        return F.conv2d(x, weight, self.factors[-1].bias, stride, padding, dilation)

    def chain(self, x: Any) -> Any:
        """One factor after another; what a graph sees."""
        for name in self.names:
            x = getattr(self, name)(x)
        return x

    @property
    def _geometry(self) -> tuple[Any, Any, Any]:
        """Stride, padding and dilation of all together."""
        stride, dilation = (
            tuple(math.prod(getattr(f, name)[axis] for f in self.factors) for axis in (0, 1))
            for name in ("stride", "dilation")
        )
        words = [f.padding for f in self.factors if isinstance(f.padding, str)]
        pairs = [f.padding for f in self.factors if not isinstance(f.padding, str)]
        summed = words[0] if words else tuple(map(sum, zip(*pairs, strict=True)))
        return stride, summed, dilation

    def _dense_is_faster(self, x: Tensor) -> bool:
        factors = self.factors
        if any(f.padding_mode != "zeros" for f in factors) or x.ndim != 4:
            return False
        size, moved, seconds = tuple(x.shape[2:]), x[0].numel(), 0.0
        for factor in factors:
            size = _size_after(factor, size)
            written = factor.out_channels * math.prod(size)
            macs = factor.weight[0].numel() * written
            seconds += CALL + len(x) * (MAC * macs + MOVE * (moved + written))
            moved = written
        kernel = math.prod(math.prod(f.kernel_size) for f in factors)
        dense = kernel * factors[0].in_channels * moved
        return CALL + len(x) * (MAC * dense + MOVE * (x[0].numel() + moved)) < seconds


def _size_after(conv: nn.Conv2d, size: Sequence[int]) -> tuple[int, ...]:
    """Height and width that a convolution writes."""
    if conv.padding == "same":
        return tuple(size)
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
    parts = zip(size, padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in parts)


def _one(of: Any, axis: int, other: int) -> Any:
    """A pair of which only one axis is kept; a word stays."""
    return of if isinstance(of, str) else tuple(v if k == axis else other for k, v in enumerate(of))


def _along(like: nn.Conv2d, axis: int) -> dict[str, Any]:
    """Options of a convolution along height (0) or width (1) alone."""
    return {
        "kernel_size": _one(like.kernel_size, axis, 1),
        "stride": _one(like.stride, axis, 1),
        "padding": _one(like.padding, axis, 0),
        "dilation": _one(like.dilation, axis, 1),
        "padding_mode": like.padding_mode,
    }


@networks.register("TuckerConv2d")
class TuckerConv2d(ConvChain):
    """Tucker-2: 1x1 into r_in channels, the kernel from r_in to r_out, 1x1 out (Kim et al. 2016)."""

    names = ("input", "core", "output")

    def _options(self, name: str, like: nn.Conv2d) -> dict[str, Any]:
        if name != "core":
            return super()._options(name, like)
        fields = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        return {field: getattr(like, field) for field in fields}

    @classmethod
    def decompose(cls, weight: Tensor, rule: RankRule) -> tuple[list[Tensor], Lost]:
        found = tucker(weight, rule, axes=(1, 0))
        into, out = found.factors[1], found.factors[0]
        return [into.t()[:, :, None, None], found.core, out[:, :, None, None]], found.lost


@networks.register("TTConv2d")
class TTConv2d(ConvChain):
    """A train over input channels, height, width, output channels: 1x1, then k x 1, then 1 x k, then 1x1."""

    names = ("input", "height", "width", "output")

    @classmethod
    def decompose(cls, weight: Tensor, rule: RankRule) -> tuple[list[Tensor], Lost]:
        train = tensor_to_train(weight.permute(1, 2, 3, 0), rule)
        first, height, width, last = train.cores
        found = Train((first[:, :, None, None], height[:, :, None], width[:, None], last[:, None, None]))
        return cls.weights_of(found), train.lost


@networks.register("CPConv2d")
class CPConv2d(ConvChain):
    """A sum of R products of four vectors: 1x1 into R channels, depthwise k x 1 and 1 x k, 1x1 out.

    Lebedev et al. 2015, "Speeding-up convolutional neural networks using fine-tuned CP-decomposition".
    """

    names = ("input", "height", "width", "output")
    mixes = False

    def __init__(self, like: nn.Conv2d, ranks: Sequence[int]) -> None:
        super().__init__(like, ranks)
        if len(set(ranks)) != 1:
            raise LowbitError(f"ranks={tuple(ranks)!r}: a CP decomposition has one rank; give it three times")
        rank = ranks[0]
        for name in ("height", "width"):
            options = self._options(name, like)
            self.add_module(name, nn.Conv2d(rank, rank, groups=rank, bias=False, **options))
        self.reset_parameters()

    @classmethod
    def decompose(cls, weight: Tensor, rule: RankRule) -> tuple[list[Tensor], Lost]:
        rank = getattr(rule, "rank", None)
        if not isinstance(rank, int):
            raise LowbitError(f"{rule} gives no rank of a CP decomposition; use Fixed(number)")
        (out, into, height, width), error = cp(weight, rank)
        return [
            into.t()[:, :, None, None],
            height.t()[:, None, :, None],
            width.t()[:, None, None, :],
            out[:, :, None, None],
        ], Lost(error)

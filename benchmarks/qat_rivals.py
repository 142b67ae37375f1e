"""Fake quantization as others do it, in the same float network: the peers to time a training step against.

Every Conv2d and Linear gets its input and its weight quantized: inputs per tensor, weights per output
channel, at the given bits, the first and the last layer at 8. Where a tool leaves the choice, it gets the
cheaper one: ranges of inputs are found once, before training, and not followed in every step.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EDGE_BITS = 8
BREVITAS = "brevitas"
TORCHAO = "torchao"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A network ready for training, and those of its modules that quantize activations."""

    model: nn.Module
    activations: list[nn.Module]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What one quantizer needs to know: codes in [qmin, qmax] and the largest magnitude of the tensor."""

    bits: int
    signed: bool
    # a number, or [C] for the output channels of a weight
    reach: Tensor

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def scale(self) -> Tensor:
        """Step that covers `reach`, in its shape."""
        return self.reach.clamp(min=1e-8) / self.qmax


class NaiveSTE(nn.Module):
    """x + (q(x) - x).detach(): gradients straight through; the weight's range is taken anew in each step."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.qmin, self.qmax, self.per_channel = grid.qmin, grid.qmax, grid.reach.ndim == 1
        self.register_buffer("scale", grid.scale)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale
        if self.per_channel:
            scale = x.detach().abs().amax(dim=tuple(range(1, x.ndim)), keepdim=True) / self.qmax
        rounded = (x / scale).round().clamp(self.qmin, self.qmax) * scale
        return x + (rounded - x).detach()


class TorchFixed(nn.Module):
    """torch.fake_quantize_per_tensor_affine and _per_channel_affine: gradients stop at the clamp."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.ends, self.per_channel = (grid.qmin, grid.qmax), grid.reach.ndim == 1
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", torch.zeros_like(grid.scale, dtype=torch.int32))
        self.step = float(grid.scale) if not self.per_channel else 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.per_channel:
            return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, 0, *self.ends)
        return torch.fake_quantize_per_tensor_affine(x, self.step, 0, *self.ends)


class TorchLearnable(nn.Module):
    """torch._fake_quantize_learnable_per_tensor_affine and _per_channel_affine: they train the scale."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.ends, self.per_channel = (grid.qmin, grid.qmax), grid.reach.ndim == 1
        self.scale = nn.Parameter(grid.scale.reshape(-1))
        self.register_buffer("zero_point", torch.zeros_like(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        gain = 1 / math.sqrt(x.numel() * self.ends[1])
        if self.per_channel:
            return torch._fake_quantize_learnable_per_channel_affine(
                x, self.scale, self.zero_point, 0, *self.ends, gain
            )
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, self.scale, self.zero_point, *self.ends, gain
        )


class TextbookLSQ(nn.Module):
    """Esser et al. 2020, appendix B, operation by operation, as github.com/zhutmost/lsq-net writes it."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.qmin, self.qmax, self.per_channel = grid.qmin, grid.qmax, grid.reach.ndim == 1
        self.scale = nn.Parameter(grid.scale)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.view(-1, *[1] * (x.ndim - 1)) if self.per_channel else self.scale
        scale = self._grad_scale(scale, 1 / math.sqrt(x.numel() * self.qmax))
        return self._round_pass(torch.clamp(x / scale, self.qmin, self.qmax)) * scale

    @staticmethod
    def _grad_scale(x: Tensor, gain: float) -> Tensor:
        scaled = x * gain
        return (x - scaled).detach() + scaled

    @staticmethod
    def _round_pass(x: Tensor) -> Tensor:
        return (x.round() - x).detach() + x


class TorchAO(nn.Module):
    """torchao.quantization.qat.IntxFakeQuantizer, made for Linear: it sees a weight as a matrix.

    Weights symmetric per channel and dynamic, its default. Of granularities for inputs it has "per token"
    alone, asymmetric: one token is the whole tensor here, laid out as it is in memory, its range kept.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

        self.per_channel = grid.reach.ndim == 1
        dtype = getattr(torch, f"int{grid.bits}")
        if self.per_channel:
            config = IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=True)
        else:
            config = IntxFakeQuantizeConfig(dtype, "per_token", is_symmetric=False, is_dynamic=False)
        self.quantizer = IntxFakeQuantizer(config)

    def forward(self, x: Tensor) -> Tensor:
        order = _order_in_memory(x)
        laid = x.permute(order)
        flat = laid.reshape(len(x), -1) if self.per_channel else laid.reshape(1, -1)
        back = [order.index(d) for d in range(x.ndim)]
        return self.quantizer(flat).reshape(laid.shape).permute(back)


def _order_in_memory(x: Tensor) -> tuple[int, ...]:
    """The permutation that makes a channels_last tensor contiguous; the identity for another."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return (0, 2, 3, 1) if last else tuple(range(x.ndim))


class Layer(nn.Module):
    """A Conv2d or Linear with its input and its weight through quantizers."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight, self.activation = layer, weight, activation

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.activation(x), self.weight(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


Quantizer = Callable[[Grid], nn.Module]
Swap = Callable[["nn.Conv2d | nn.Linear", Grid, Grid], "tuple[nn.Module, nn.Module]"]


def swapped(model: nn.Module, x: Tensor, bits: int, swap: Swap) -> Peer:
    """A copy of `model` with every Conv2d and Linear replaced by the first of what `swap` returns.

    Args:
        x: [B, ...] one batch, from which the ranges of inputs are taken.
        bits: of weights and inputs, but for the first and the last layer.
        swap: of a layer, the grid of its weight and that of its input; the module to put in its place, and
            the one in it that quantizes the input.
    """
    model = copy.deepcopy(model)
    inputs = _inputs(model, x)
    activations = []
    for i, (name, (lo, hi)) in enumerate(inputs.items()):
        layer: Any = model.get_submodule(name)
        width = EDGE_BITS if i in (0, len(inputs) - 1) else bits
        reach = layer.weight.detach().abs().flatten(1).amax(1)
        of_weight = Grid(bits=width, signed=True, reach=reach)
        of_input = Grid(bits=width, signed=bool(lo < 0), reach=torch.maximum(-lo, hi))
        module, quantizer = swap(layer, of_weight, of_input)
        model.set_submodule(name, module)
        activations.append(quantizer)
    return Peer(model=model, activations=activations)


def _inputs(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Smallest and largest input of every Conv2d and Linear, by name, in the order in which they run."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = torch.aminmax(args[0])

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def _with(quantizer: Quantizer) -> Swap:
    """Layers of ours around two quantizers of one class."""

    def swap(layer: nn.Conv2d | nn.Linear, weight: Grid, activation: Grid) -> tuple[nn.Module, nn.Module]:
        made = Layer(layer, quantizer(weight), quantizer(activation))
        return made, made.activation

    return swap


def _brevitas(layer: nn.Conv2d | nn.Linear, weight: Grid, activation: Grid) -> tuple[nn.Module, nn.Module]:
    """QuantConv2d or QuantLinear with Brevitas' integer quantizers, its scale of the input learned.

    That scale is initialized from the statistics of one step instead of 300: those steps are slower.
    """
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    options: dict[str, Any] = {
        "bias": layer.bias is not None,
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": weight.bits,
        "input_quant": Int8ActPerTensorFloat if activation.signed else Uint8ActPerTensorFloat,
        "input_bit_width": activation.bits,
        "input_collect_stats_steps": 1,
    }
    if isinstance(layer, nn.Linear):
        made = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
    else:
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
        made = qnn.QuantConv2d(*shape, stride=layer.stride, padding=layer.padding, **options)
    made.weight, made.bias = layer.weight, layer.bias
    return made, made.input_quant


_SWAPS: dict[str, Swap] = {
    "naive STE": _with(NaiveSTE),
    "torch fake_quantize": _with(TorchFixed),
    "torch learnable": _with(TorchLearnable),
    "textbook LSQ": _with(TextbookLSQ),
    TORCHAO: _with(TorchAO),
    BREVITAS: _brevitas,
}
PEERS = tuple(_SWAPS)


def version(name: str) -> str | None:
    """Version of the package that the peer comes from; None when it is not installed."""
    try:
        return importlib.metadata.version(name if name in (TORCHAO, BREVITAS) else "torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def build(name: str, model: nn.Module, x: Tensor, bits: int) -> Peer:
    """The peer `name` (one of PEERS, its package installed) on a copy of `model`; x [B, ...] gives ranges."""
    return swapped(model, x, bits, _SWAPS[name])

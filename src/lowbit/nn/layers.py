"""Float layers that carry a quantizer for their weight, and no other change.

Before `freeze` the latent weight is the very Parameter of the float layer, under the same name. After it only
codes, scale and zero point remain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.core.affine import MIN_SCALE
from lowbit.core.qtensor import QTensor
from lowbit.core.spec import Granularity, PerChannel, PerGroup, QuantSpec, expand_to
from lowbit.nn.quantizer import Quantizer
from lowbit.registry import Registry

__all__ = [
    "BoundLayer",
    "QConv1d",
    "QConv2d",
    "QConvTranspose2d",
    "QEmbedding",
    "QLayer",
    "QLinear",
    "kernel_bits",
    "layers",
    "obstacle",
    "quantized_layer",
]

layers: Registry[type[QLayer]] = Registry("layer")


class QLayer(nn.Module):
    """Mixin of every quantized layer: the weight as the forward pass must see it."""

    # axis of the weight that runs over output channels
    channel_axis: ClassVar[int] = 0
    # constructor arguments that are attributes of the float layer too
    arguments: ClassVar[tuple[str, ...]] = ()

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: Quantizer
    frozen_spec: QuantSpec | None = None

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        spec: QuantSpec,
        weight_observer: str = "mse",
        estimator: str = "lsq",
        reshape: str = "",
    ) -> QLayer:
        """The same layer, sharing its Parameters, with a quantizer of that spec for the weight."""
        kwargs: dict[str, Any] = {name: getattr(layer, name) for name in cls.arguments}
        if hasattr(layer, "bias"):
            kwargs["bias"] = layer.bias is not None
        q = cls(**kwargs, device="meta")
        q.weight = layer.weight  # type: ignore[assignment]
        if kwargs.get("bias"):
            q.bias = layer.bias  # type: ignore[assignment]
        q.weight_quantizer = Quantizer(spec, None, estimator, weight_observer, reshape)
        return q.train(layer.training)

    def effective_weight(self) -> Tensor:
        """float32 weight: latent, rounded or decoded, as the state of the layer has it."""
        if self.frozen_spec is not None:
            return self.qweight().dequantize()
        return self.weight_quantizer(self.weight)

    def qweight(self) -> QTensor:
        """The codes: those kept by `freeze`, or those the latent weight has now."""
        if self.frozen_spec is None:
            return self.weight_quantizer.quantize(self.weight.detach())
        codes, quantizer = self.get_buffer("weight_codes"), self.weight_quantizer
        if self.frozen_spec.kind == "float":
            return QTensor(codes, torch.ones([1] * codes.ndim, device=codes.device), None, self.frozen_spec)
        scales = quantizer.scale, quantizer.zero_point, self.frozen_spec, quantizer.negative_scale
        return QTensor(codes, *scales)

    def kernel_qweight(self, source: QuantSpec) -> QTensor:
        """The weight as an integer kernel on inputs of that spec holds it: see `kernel_bits`."""
        q = self.qweight()
        return q if q.spec.kind == "float" else q.widened(kernel_bits(q.spec, source))

    def settle(self) -> None:
        """End training: the latent weight as it is rounded, without learned scales or thresholds."""
        if self.frozen_spec is not None:
            return
        quantizer, weight = self.weight_quantizer, self.weight.detach()
        settled = weight if quantizer.reshape is None else quantizer.reshaped(weight)
        if quantizer.settles_values:
            settled = quantizer.quantize(weight).dequantize()
        if settled is not weight:
            self.weight = nn.Parameter(settled)
        quantizer.settle(settled)

    def rescale(self, factor: Tensor) -> int:
        """weight -> weight * factor, by the scale alone: codes stay, or change sign with the factor.

        Args:
            factor: broadcastable to the weight, equal over all inputs of an output channel.

        Returns:
            How many codes had no opposite, such as the -8 of four bits, and moved by one step.
        """
        quantizer = self.weight_quantizer
        if quantizer.spec.kind == "float" or not quantizer.ready:
            self.weight = nn.Parameter(self.weight.detach() * factor)
            return 0
        before, spec = self.qweight(), quantizer.spec
        # codes with a zero turn to it; odd ones have none, and their scale vanishes
        size = factor.abs() if spec.mid_rise else torch.where(factor == 0, 1.0, factor.abs())
        scale = (self._of_each_channel(before.scale) * size).clamp(min=MIN_SCALE)
        negative = before.negative_scale
        if negative is not None:
            negative = (self._of_each_channel(negative) * size).clamp(min=MIN_SCALE)
        if tuple(scale.shape) != spec.scale_shape(self.weight.shape):
            quantizer.spec = spec = replace(spec, granularity=_granularity_of(scale, self.channel_axis))
        flipped = factor < 0
        if before.zero_point is not None:
            zero = self._of_each_channel(before.zero_point).expand(scale.shape)
            quantizer.zero_point = torch.where(flipped, spec.qmin + spec.qmax - zero, zero)
        quantizer.scale, quantizer.negative_scale = scale, negative
        if negative is not None:  # codes that change sign change sides
            quantizer.scale = torch.where(flipped, negative, scale)
            quantizer.negative_scale = torch.where(flipped, scale, negative)
        self.weight = nn.Parameter(before.dequantize() * factor)
        codes = before.codes.int()
        opposite = -codes if before.zero_point is None else spec.qmin + spec.qmax - codes
        return int(((self.qweight().codes.int() != opposite) & flipped).sum())

    def fixed_codes(self, calls: int) -> str:
        """Why no code may be chosen by itself, in a graph that calls the layer so often, or ''."""
        if calls > 1:
            return "it is called more than once"
        if self.weight_quantizer.threshold is not None or self.weight_quantizer.spec.split:
            return "its codes have a threshold or a scale for each sign"
        return ""

    def _of_each_channel(self, scale: Tensor) -> Tensor:
        """A scale that groups of output channels share, repeated for each of them."""
        shape = list(scale.shape)
        shape[self.channel_axis] = self.weight.shape[self.channel_axis]
        return expand_to(scale, shape)

    def freeze(self, codes: Tensor | None = None) -> None:
        """Keep the codes (by default those of the latent weight) and let the latent weight go."""
        spec = self.weight_quantizer.spec
        codes = self.qweight().codes if codes is None else codes
        del self.weight
        self.register_buffer("weight_codes", codes)
        self.frozen_spec = spec


def _granularity_of(scale: Tensor, channel_axis: int) -> Granularity:
    """One scale per output channel; or, where it varies with the input channel too, groups of one."""
    varies = [d for d, n in enumerate(scale.shape) if n > 1 and d != channel_axis]
    return PerGroup(varies[0] or channel_axis, 1) if varies else PerChannel(channel_axis)


@layers.register("Linear")
class QLinear(QLayer, nn.Linear):
    """y = x W^T + b with W [out, in] quantized."""

    arguments = ("in_features", "out_features")

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.effective_weight(), self.bias)


_CONV = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


@layers.register("Conv1d")
class QConv1d(QLayer, nn.Conv1d):
    """1-d cross-correlation with the weight [out, in / groups, k] quantized."""

    arguments = _CONV

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.effective_weight(), self.bias)


@layers.register("Conv2d")
class QConv2d(QLayer, nn.Conv2d):
    """2-d cross-correlation with the weight [out, in / groups, kh, kw] quantized."""

    arguments = _CONV

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.effective_weight(), self.bias)


@layers.register("ConvTranspose2d")
class QConvTranspose2d(QLayer, nn.ConvTranspose2d):
    """Transposed convolution with the weight [in, out / groups, kh, kw] quantized; channels are axis 1."""

    channel_axis = 1
    arguments = (*_CONV, "output_padding")

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        options: list[Any] = [self.stride, self.padding, self.kernel_size, 2, self.dilation]
        more = self._output_padding(input, output_size, *options)
        stride, padding, _, _, dilation = options
        weight = self.effective_weight()
        return F.conv_transpose2d(input, weight, self.bias, stride, padding, more, self.groups, dilation)


@layers.register("Embedding")
class QEmbedding(QLayer, nn.Embedding):
    """Rows of a table [entries, width], quantized; only the rows looked up are decoded once frozen."""

    arguments = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )

    def forward(self, input: Tensor) -> Tensor:
        if self.frozen_spec is None:
            return F.embedding(input, self.effective_weight(), self.padding_idx)
        table, rows = self.qweight(), input.reshape(-1)

        def pick(t: Tensor) -> Tensor:
            return t if t.shape[0] == 1 else t[rows]

        zero, negative = (None if t is None else pick(t) for t in (table.zero_point, table.negative_scale))
        scales = {"scale": pick(table.scale), "zero_point": zero, "negative_scale": negative}
        picked = replace(table, codes=table.codes[rows], **scales)  # type: ignore[arg-type]
        return picked.dequantize().reshape(*input.shape, self.embedding_dim)


# Bytes hold 8 bits, but kernels without VNNI add two products in 16, and signed inputs reach them shifted up.
KERNEL_BITS = 7


def kernel_bits(weight: QuantSpec, source: QuantSpec) -> int:
    """Width of the codes of a weight in an integer kernel; on inputs below 8 bits it uses KERNEL_BITS.

    The steps of the accumulator, input scale times weight scale, are then finer by 2^k, and with them the
    bias, which is rounded to such steps: with 2 bits on both sides that is seen in the accuracy.
    """
    return max(weight.code_bits, KERNEL_BITS) if source.bits < 8 else weight.code_bits


def quantized_layer(kind: type[nn.Module]) -> type[QLayer] | None:
    """The quantized counterpart of a float layer's exact class, or None."""
    return (
        layers.get(kind.__name__)
        if kind.__name__ in layers.names() and kind.__module__.startswith("torch.nn")
        else None
    )


def obstacle(layer: nn.Module) -> str:
    """Why a layer of a known class must keep its float weight all the same, or ''."""
    if not isinstance(getattr(layer, "weight", None), nn.Parameter):
        return "its weight is computed by a hook"
    if layer._forward_pre_hooks or layer._forward_hooks:
        return "a hook runs with it"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm rewrites its weight"
    return ""


class BoundLayer(nn.Module):
    """A layer with the quantizers of its input and output, for places that no graph reaches."""

    def __init__(
        self, layer: nn.Module, input_quantizer: Quantizer | None, output_quantizer: Quantizer | None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.input_quantizer = input_quantizer
        self.output_quantizer = output_quantizer

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        output = self.layer(input, *args, **kwargs)
        return output if self.output_quantizer is None else self.output_quantizer(output)

    def __getattr__(self, name: str) -> Any:
        """What the code around it asks of the layer: `self.fc.in_features`, `self.fc.weight`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = super().__getattr__("layer")
            if name == "weight" and isinstance(layer, QLayer) and layer.frozen_spec is not None:
                return layer.effective_weight()
            return getattr(layer, name)

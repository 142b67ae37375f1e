"""Biases as integer kernels have them."""

from __future__ import annotations

import torch
from torch import fx, nn

from lowbit.core.affine import power_of_two
from lowbit.core.integer import bias_codes
from lowbit.graph.match import calls, input_quantizer, layer_nodes
from lowbit.graph.ops import module_of
from lowbit.nn.layers import QLayer, kernel_bits

__all__ = ["settle_biases"]


def settle_biases(gm: fx.GraphModule) -> None:
    """Put biases on the grid of 32-bit codes at the scale of the accumulator, in place.

    A channel so small that its bias would not fit gets a larger scale. A layer called once keeps the rounded
    bias, so that the simulation adds what the kernel adds.
    """
    counts = calls(gm)
    for node in layer_nodes(gm):
        layer, source = module_of(node), input_quantizer(node)
        if (
            not isinstance(layer, QLayer)
            or layer.frozen_spec is not None
            or source is None
            or layer.bias is None
        ):
            continue
        quantizer, bias = layer.weight_quantizer, layer.bias.detach()
        integer = quantizer.spec.kind == "int" and source.spec.kind == "int" and not quantizer.spec.split
        if not integer or source.scale.numel() != 1:
            continue
        # steps of the accumulator, as fine as the kernel's codes allow
        spare = kernel_bits(quantizer.spec, source.spec) - quantizer.spec.code_bits
        step = source.scale.reshape(()) / (1 << spare)
        need = bias.abs() / (step * 2.0**30)
        if quantizer.spec.scale == "pow2":
            need = power_of_two(need)
        if quantizer.scale.numel() != bias.numel():
            quantizer.scale = torch.maximum(quantizer.scale, need.max())
        else:
            quantizer.scale = torch.maximum(quantizer.scale, need.reshape(quantizer.scale.shape))
        scale = step * quantizer.scale.reshape(-1)
        if counts[id(layer)] == 1 and scale.numel() in (1, bias.numel()):
            layer.bias = nn.Parameter(bias_codes(bias, scale) * scale)

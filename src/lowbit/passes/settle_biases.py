"""Biases as integer kernels have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from lowbit.core.affine import power_of_two
from lowbit.core.integer import bias_codes
from lowbit.graph.match import input_quantizer, layer_nodes, quantizers_behind
from lowbit.graph.ops import module_of
from lowbit.nn.layers import QLayer, kernel_bits
from lowbit.nn.quantizer import Quantizer

__all__ = ["settle_biases"]


def settle_biases(gm: fx.GraphModule) -> None:
    """Put biases on the grid of 32-bit codes at the scale of the accumulator, in place.

    A channel so small that its bias would not fit gets a larger scale. A layer called once keeps the rounded
    bias, so that the simulation adds what the kernel adds; so does one of powers of two that is called more
    often, for the steps of its coarsest accumulator are whole steps of each. Where a sign is read from the
    sums, no bias is a multiple of what one product of codes adds: a sum of exactly zero, which floats miss by
    a hair on either side, then cannot be.
    """
    read = _sources(gm)
    for node in layer_nodes(gm):
        layer, source = module_of(node), input_quantizer(node)
        if not isinstance(layer, QLayer) or layer.frozen_spec is not None or source is None:
            continue
        coarsest = _coarsest(layer, read[layer])
        source = coarsest or source
        quantizer, signs = layer.weight_quantizer, any(q.spec.is_binary for q in quantizers_behind(node))
        integer = quantizer.spec.kind == "int" and source.spec.kind == "int" and not quantizer.spec.split
        once = len(read[layer]) == 1 or coarsest is not None
        if not integer or source.scale.numel() != 1:
            continue
        if getattr(layer, "bias", None) is None and signs and once:
            layer.bias = nn.Parameter(torch.zeros(_outputs(node), device=quantizer.scale.device))
        if layer.bias is not None:
            _settle(layer, source, once=once, signs=signs)


def _sources(gm: fx.GraphModule) -> dict[nn.Module, list[Quantizer | None]]:
    """What each call of a layer reads."""
    found: dict[nn.Module, list[Quantizer | None]] = {}
    for node in layer_nodes(gm):
        found.setdefault(module_of(node), []).append(input_quantizer(node))
    return found


def _coarsest(layer: QLayer, sources: Sequence[Quantizer | None]) -> Quantizer | None:
    """The source of largest steps, where all steps are powers of two."""
    known = [s for s in sources if s is not None and s.spec.scale == "pow2" and s.scale.numel() == 1]
    if layer.weight_quantizer.spec.scale != "pow2" or len(known) < len(sources):
        return None
    return max(known, key=lambda s: float(s.scale))


def _settle(layer: QLayer, source: Quantizer, *, once: bool, signs: bool) -> None:
    assert layer.bias is not None
    quantizer, bias = layer.weight_quantizer, layer.bias.detach()
    # steps of the accumulator, as fine as the kernel's codes allow
    spare = kernel_bits(quantizer.spec, source.spec) - quantizer.spec.code_bits
    if quantizer.spec.scale == source.spec.scale == "pow2":
        spare = 0  # each bit of an accumulator is paid for in hardware
    step = source.scale.reshape(()) / (1 << spare)
    need = bias.abs() / (step * 2.0**30)
    if quantizer.spec.scale == "pow2":
        need = torch.where(need > 0, power_of_two(need), 0.0)
    if quantizer.scale.numel() != bias.numel():
        quantizer.scale = torch.maximum(quantizer.scale, need.max())
    else:
        quantizer.scale = torch.maximum(quantizer.scale, need.reshape(quantizer.scale.shape))
    scale = step * quantizer.scale.reshape(-1)
    if once and scale.numel() in (1, bias.numel()):
        codes = bias_codes(bias, scale)
        if signs and spare:
            codes += (codes % (1 << spare) == 0).int()
        layer.bias = nn.Parameter(codes * scale)


def _outputs(node: fx.Node) -> int:
    """Channels that a call writes."""
    value, last = node.meta["value"], isinstance(module_of(node), nn.Linear)
    return int(value.shape[-1 if last else 1])

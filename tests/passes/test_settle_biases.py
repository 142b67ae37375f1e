"""Biases are whole numbers of the accumulator's steps, and fit 32 bits."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import BatchNormNet, conv, settle, sqnr
from torch import nn

import lowbit
from lowbit import INT8, UINT8, PerTensor, QuantSpec, Recipe, Rule
from lowbit.core.spec import PerChannel

X = torch.randn(32, 3, 8, 8)


def tiny_channel() -> nn.Module:
    """A channel whose weights are so small that its bias would need more than 32 bits."""
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4))
    with torch.no_grad():
        model[2].weight[1].mul_(1e-12)
        model[2].bias[1] = 3.0
    return model


def test_a_frozen_bias_is_what_a_kernel_adds() -> None:
    q = lowbit.quantize(settle(BatchNormNet(), X), "w8a8", calibration=[X])
    for path, source in (("a", "x"), ("b", "relu"), ("fc", "adaptive_avg_pool2d")):
        layer = q.graph.get_submodule(path)
        scale = q.graph.get_submodule(f"activation_quantizers.{source}").scale.double().reshape(())
        steps = layer.bias.double() / (scale * layer.weight_quantizer.scale.double().flatten())
        assert (steps - steps.round()).abs().max() < 1e-3 * steps.abs().max().clamp(min=1)
        assert steps.abs().max() < 2**31


@pytest.mark.parametrize(
    "weight",
    [
        INT8,
        QuantSpec(bits=8, granularity=PerTensor()),
        QuantSpec(bits=8, granularity=PerChannel(0), scale="pow2"),
    ],
    ids=str,
)
def test_a_channel_too_small_for_its_bias(weight: QuantSpec) -> None:
    model = tiny_channel()
    q = lowbit.quantize(model, Recipe(rules=(Rule(weight=weight, activation=UINT8),)), calibration=[X])
    assert sqnr(model(X), q(X)) > 25
    assert (q(X)[:, 1] - 3.0).abs().max() < 0.1
    scale = q.graph.get_submodule("2").weight_quantizer.scale
    if weight.scale == "pow2":
        assert all(math.frexp(s)[0] == 0.5 for s in scale.flatten().tolist()), "still powers of two"


def test_weights_alone_leave_biases_alone() -> None:
    model = tiny_channel()
    q = lowbit.quantize(model, Recipe(rules=(Rule(weight=INT8),)), example_inputs=X)
    assert torch.equal(q.graph.get_submodule("2").bias, model[2].bias)

"""Factors beside the dense weight of as many bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import INT8, LowbitError, Recipe, Rule
from lowbit.tensor_networks import TensorRule, tensorize
from lowbit.tensor_networks.accounting import account


def model() -> nn.Sequential:
    low, full = nn.Linear(128, 128), nn.Linear(128, 128)
    with torch.no_grad():
        low.weight.copy_(torch.randn(128, 4) @ torch.randn(4, 128) / 16)
    return nn.Sequential(low, nn.ReLU(), full).eval()


def test_the_better_buy_is_named() -> None:
    dense, x = model(), torch.randn(64, 128)
    small = tensorize(dense, TensorRule(kind="svd", rank=4)).model
    q = lowbit.quantize(small, "w4a8", [x])
    low, full = account(dense, small, q).rows
    assert low.weights == full.weights == 4 * 256
    assert low.by_factors == 16
    assert low.compression == pytest.approx(low.by_factors * low.by_bits)
    assert low.bytes == sum(c.weight_bytes for c in q.cost().layers if c.name.startswith("0."))
    assert not low.advice  # not even one bit a weight would fit
    assert low.dense_bits == 0
    larger = tensorize(dense, [TensorRule(match="2", kind="svd", rank=40), TensorRule(kind="keep")]).model
    (row,) = account(dense, larger, lowbit.quantize(larger, "w8", example_inputs=x)).rows
    assert row.advice == f"a dense weight of {row.dense_bits} bits is the better buy"
    assert "better buy" in str(account(dense, larger, lowbit.quantize(larger, "w8", example_inputs=x)))


def test_the_error_is_that_of_the_rounded_factors() -> None:
    dense, x = model(), torch.randn(64, 128)
    small = tensorize(dense, TensorRule(match="*", kind="svd", rank=4)).model
    plain = Recipe(rules=(Rule(weight=INT8.at(4)),))
    q = lowbit.quantize(small, plain, [x])
    network = copy.deepcopy(small[0])
    for factor, name in zip(network.factors, ("0.cores.0", "0.cores.1"), strict=True):
        factor.weight = nn.Parameter(q.graph.get_submodule(name).effective_weight())
    with torch.no_grad():
        error = (network.dense_weight() - dense[0].weight).norm() / dense[0].weight.norm()
    assert account(dense, small, q).rows[0].error == pytest.approx(float(error), rel=1e-3)
    with pytest.raises(LowbitError, match="'0' is no layer with a weight"):
        account(nn.ReLU(), small, q)

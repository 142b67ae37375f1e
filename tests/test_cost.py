"""Costs against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import STYLES, Fn, conv, image
from torch import Tensor, nn

import lowbit
from lowbit import FP16, INT8, PerGroup, QTensor, QuantSpec, Recipe, Rule, preset
from lowbit.cost import Cost


def cost(model: nn.Module, recipe: Any = "w8a8", x: Tensor | None = None) -> Cost:
    return lowbit.quantize(model, recipe, calibration=[image() if x is None else x]).cost()


MACS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "conv2d": (lambda: conv(3, 8), (4, 3, 8, 8), 8 * 8 * 8 * 3 * 9),
    "conv2d, stride 2": (lambda: nn.Conv2d(3, 8, 3, stride=2), (4, 3, 9, 9), 4 * 4 * 8 * 3 * 9),
    "conv2d, 2 groups": (lambda: conv(4, 8, groups=2), (4, 4, 8, 8), 8 * 8 * 8 * 2 * 9),
    "conv2d, depthwise": (lambda: conv(4, 4, groups=4), (4, 4, 8, 8), 8 * 8 * 4 * 9),
    "conv2d, dilated": (lambda: nn.Conv2d(3, 8, 3, dilation=2), (4, 3, 8, 8), 4 * 4 * 8 * 3 * 9),
    "conv1d": (lambda: nn.Conv1d(3, 8, 5), (4, 3, 12), 8 * 8 * 3 * 5),
    "transposed": (lambda: nn.ConvTranspose2d(3, 8, 2, stride=2), (4, 3, 5, 5), 5 * 5 * 3 * 8 * 4),
    "linear": (lambda: nn.Linear(8, 5), (4, 8), 8 * 5),
    "linear on a sequence": (lambda: nn.Linear(8, 5), (4, 7, 8), 7 * 8 * 5),
}


@pytest.mark.parametrize("name", MACS)
def test_multiply_accumulates(name: str) -> None:
    build, shape, macs = MACS[name]
    assert cost(nn.Sequential(build()), "w8a8", torch.randn(shape)).macs == macs


def test_a_lookup_multiplies_nothing() -> None:
    assert cost(nn.Sequential(nn.Embedding(9, 8)), "w8", torch.randint(0, 9, (4, 3))).macs == 0


BYTES: dict[str, tuple[Recipe, int]] = {
    # 7 outputs, 10 inputs, 7 biases of 4 bytes
    "w8": (preset("w8"), 70 + 4 * 7 + 28),
    "w4, 8 bits for first and last": (preset("w4"), 70 + 4 * 7 + 28),
    "4 bits": (Recipe(rules=(Rule(weight=QuantSpec(bits=4)),)), 35 + 4 + 28),
    "3 bits": (Recipe(rules=(Rule(weight=QuantSpec(bits=3)),)), 27 + 4 + 28),
    "4 bits with zero points": (
        Recipe(rules=(Rule(weight=QuantSpec(bits=4, signed=False, symmetric=False)),)),
        35 + 4 + 4 + 28,
    ),
    "4 bits in groups of 5": (
        Recipe(rules=(Rule(weight=QuantSpec(bits=4, granularity=PerGroup(1, 5))),)),
        35 + 4 * 14 + 28,
    ),
    "12 bits take 2 bytes": (Recipe(rules=(Rule(weight=QuantSpec(bits=12)),)), 140 + 4 + 28),
    "fp16": (Recipe(rules=(Rule(weight=FP16),)), 140 + 28),
    "float": (Recipe(rules=(Rule(),)), 280 + 28),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes(name: str) -> None:
    recipe, want = BYTES[name]
    q = lowbit.quantize(nn.Sequential(nn.Linear(10, 7)), recipe, example_inputs=torch.randn(4, 10))
    done = q.cost()
    assert done.bytes == want
    assert done.float_bytes == 280 + 28
    (layer,) = done.layers
    if layer.weight_bits < 32:
        assert layer.weight_bytes == q.graph.get_submodule("0").qweight().nbytes


def test_bit_operations() -> None:
    (layer,) = cost(nn.Sequential(nn.Linear(10, 7)), "w4a8", torch.randn(4, 10)).layers
    assert (layer.macs, layer.weight_bits, layer.input_bits) == (70, 8, 8)
    assert layer.bops == 70 * 64
    (layer,) = cost(nn.Sequential(nn.Linear(10, 7)), "w8", torch.randn(4, 10)).layers
    assert layer.bops == 70 * 8 * 32


def test_a_layer_called_twice_counts_its_weights_once() -> None:
    done = cost(STYLES["one Conv2d used twice"]())
    assert [(c.name, c.weights) for c in done.layers] == [("a", 216), ("b", 576), ("b#2", 0)]
    assert [c.macs for c in done.layers] == [64 * 216, 64 * 576, 64 * 576]
    assert done.bytes == (216 + 576) + 4 * (8 + 8) + 4 * (8 + 8)


@pytest.mark.parametrize("style", ["branch on data at the top", "branch on data inside"])
def test_layers_that_no_graph_reaches_count_too(style: str) -> None:
    """The oracle: the same layers in a row that can be traced."""
    prefix = "" if style.endswith("top") else "inner."
    inputs = 3 if style.endswith("top") else 6
    done = {c.name: c for c in cost(STYLES[style]()).layers}
    plain = cost(nn.Sequential(conv(inputs, 8), nn.ReLU(), conv(8, 8)), "w8a8", image(channels=inputs)).layers
    for name, want in zip(("a", "b"), plain, strict=True):
        got = done[prefix + name]
        assert (got.macs, got.weight_bytes) == (want.macs, want.weight_bytes)
        assert (got.weight_bits, got.input_bits, got.bops) == (8, 8, want.bops)


def test_what_is_no_layer_counts_in_float() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    assert cost(model, "w8", torch.randn(4, 8)).other_bytes == 2 * 8 * 4


def test_a_functional_weight_counts_once() -> None:
    done = cost(STYLES["functional weight"]())
    assert done.other_bytes == 0
    scales = biases = 4 * (8 + 5)  # the correction gave both layers a bias
    assert done.bytes == 216 + 40 + scales + biases


def test_before_and_after_freezing() -> None:
    model = Fn(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8), b=conv(8, 8))
    q = lowbit.prepare(model, "w8a8", image())
    lowbit.calibrate(q, [image()])
    before = q.cost()
    assert lowbit.freeze(q).cost() == before
    weight = model.a.weight.detach()
    assert before.layers[0].weight_bytes == QTensor.quantize(weight, INT8).nbytes


def test_summaries() -> None:
    done = cost(nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3)), "w4a8", torch.randn(4, 10))
    assert done.compression == done.float_bytes / done.bytes
    assert done.average_bits == 8
    assert replace(done, layers=()).average_bits == 0


PEAKS: dict[str, tuple[nn.Module, tuple[int, ...], str, int]] = {
    # the input and the output of a layer; its activation function takes no more
    "chain, 8 bits": (nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), (2, 3, 8, 8), "w8a8", 12 * 64),
    # the last layer writes floats
    "float output": (nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), (2, 3, 8, 8), "w8", 4 * 12 * 64),
    # 4 bits into the middle layer, 8 into the first and the last; the last has 8 bits in and 32 out
    "4 bits": (
        nn.Sequential(conv(2, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 1)),
        (2, 2, 8, 8),
        "w4a4",
        8 * 64 + 4 * 64,
    ),
    # a shortcut waits until it is added
    "shortcut": (
        Fn(lambda m, x: m.b(torch.relu(m.a(x))) + x, a=conv(4, 4), b=conv(4, 4)),
        (2, 4, 8, 8),
        "w8a8",
        3 * 4 * 64,
    ),
    # a view of what is there
    "flatten": (nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), (2, 3, 4, 4), "w8a8", 48 + 2 * 4),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peak_memory_of_activations(name: str) -> None:
    model, shape, recipe, expected = PEAKS[name]
    assert cost(model.eval(), recipe, torch.randn(shape)).activation_bytes == expected

"""Bias correction: quantized layers keep the mean of the float layers, and with a scale their best fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Fn, conv, image, settle, traced
from torch import Tensor, fx, nn

from lowbit import UINT8, PerChannel, PerTensor, QuantSpec, Recipe, Rule
from lowbit.graph.inputs import Inputs
from lowbit.graph.match import layer_nodes
from lowbit.graph.ops import kind_of, module_of
from lowbit.graph.rewrite import clone
from lowbit.graph.run import walk
from lowbit.passes.bias_correct import clipped_normal_mean, correct_bias_analytically, correct_outputs
from lowbit.passes.calibrate import calibrate_activations, calibrate_weights
from lowbit.passes.fold_bn import fold_bn
from lowbit.passes.place import place

W3 = QuantSpec(bits=3, granularity=PerChannel(0))


def rough(weight: QuantSpec = W3) -> Recipe:
    """Few levels, so that there is much to correct."""
    return Recipe(rules=(Rule(weight=weight, activation=UINT8),))


def quantized(model: nn.Module, data: list[Inputs], recipe: Recipe) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(quantized, float), node for node twins."""
    reference = traced(model, *data[0].args)
    fold_bn(reference)
    gm = clone(reference)
    place(gm, recipe)
    calibrate_weights(gm)
    calibrate_activations(gm, data)
    return gm, reference


def outputs(gm: fx.GraphModule, data: list[Inputs]) -> dict[str, Tensor]:
    """What each layer writes over all the data, [channels, everything else]."""
    found = {}
    for node, values in walk(gm, data):
        if kind_of(node) == "layer":
            dim = -1 if isinstance(module_of(node), nn.Linear) else 1
            found[str(node.meta["name"])] = torch.cat(
                [v.movedim(dim, 0).flatten(1) for v in values], 1
            ).double()
    return found


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "a residual": (
        lambda: Fn(
            lambda m, x: m.fc((F.relu(m.b(y := F.relu(m.a(x)))) + y).mean((2, 3))),
            a=conv(3, 8),
            b=conv(8, 8, bias=False),
            fc=nn.Linear(8, 5),
        ),
        image,
    ),
    "grouped and transposed": (
        lambda: nn.Sequential(
            conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=2), conv(8, 8, groups=4)
        ),
        image,
    ),
    "linear on the last axis": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4, bias=False)),
        lambda: torch.randn(9, 5, 8),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)),
        lambda: torch.randn(9, 3, 12),
    ),
}


@pytest.mark.parametrize("scale", [False, True], ids=["bias", "scale and bias"])
@pytest.mark.parametrize("name", MODELS)
def test_afterwards_every_layer_keeps_its_mean(name: str, scale: bool) -> None:
    build, sample = MODELS[name]
    data = [Inputs((sample(),)), Inputs((sample(),))]
    gm, reference = quantized(build(), data, rough())
    want, before = outputs(reference, data), outputs(gm, data)
    names = correct_outputs(gm, reference, data, scale=scale)
    assert names == list(want)
    for layer, y in outputs(gm, data).items():
        error = (y - want[layer]).mean(1).abs()
        assert error.max() <= 1e-4 * want[layer].std(), layer
    assert any((before[n] - want[n]).mean(1).abs().max() > 1e-2 * want[n].std() for n in want)


@pytest.mark.parametrize("name", MODELS)
def test_the_scale_is_the_least_squares_fit(name: str) -> None:
    """The oracle: the residual of the best fit is orthogonal to what is fitted."""
    build, sample = MODELS[name]
    data = [Inputs((sample(),))]
    gm, reference = quantized(build(), data, rough())
    correct_outputs(gm, reference, data, scale=True)
    want = outputs(reference, data)
    for layer, y in outputs(gm, data).items():
        node = next(n for n in layer_nodes(gm) if n.meta["name"] == layer)
        if isinstance(module_of(node), nn.ConvTranspose2d):
            continue  # its channels share scales across groups
        residual, centred = want[layer] - y, y - y.mean(1, keepdim=True)
        cosine = (residual * centred).sum(1) / (residual.norm(dim=1) * centred.norm(dim=1) + 1e-9)
        assert cosine.abs().max() < 1e-2


def test_codes_stay_as_they_are() -> None:
    build, sample = MODELS["a residual"]
    data = [Inputs((sample(),))]
    gm, reference = quantized(build(), data, rough())
    before = [module_of(n).qweight().codes for n in layer_nodes(gm)]
    correct_outputs(gm, reference, data, scale=True)
    after = [module_of(n).qweight().codes for n in layer_nodes(gm)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "weight",
    [QuantSpec(bits=3, granularity=PerTensor()), QuantSpec(bits=3, granularity=PerChannel(0), scale="pow2")],
    ids=["per tensor", "powers of two"],
)
def test_a_scale_that_cannot_move_stays(weight: QuantSpec) -> None:
    build, sample = MODELS["a residual"]
    data = [Inputs((sample(),))]
    gm, reference = quantized(build(), data, rough(weight))
    before = [module_of(n).weight_quantizer.scale.clone() for n in layer_nodes(gm)]
    correct_outputs(gm, reference, data, scale=True)
    after = [module_of(n).weight_quantizer.scale for n in layer_nodes(gm)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    want = outputs(reference, data)
    assert all((y - want[n]).mean(1).abs().max() < 1e-4 * want[n].std() for n, y in outputs(gm, data).items())


def test_a_layer_called_twice_is_left_alone() -> None:
    model = Fn(lambda m, x: m.b(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8))
    data = [Inputs((image(),))]
    gm, reference = quantized(model, data, rough())
    assert correct_outputs(gm, reference, data) == ["a"]


def test_it_is_sequential() -> None:
    """Each layer is fitted to what the corrected layers before it give, not to what the float model gives."""
    build, sample = MODELS["a residual"]
    data = [Inputs((sample(),))]
    gm, reference = quantized(build(), data, rough())
    alone = clone(gm)
    correct_outputs(gm, reference, data)
    floats, last = outputs(reference, data), layer_nodes(alone)[-1]
    layer = module_of(last)
    layer.bias = module_of(layer_nodes(gm)[-1]).bias
    error = (outputs(alone, data)["fc"] - floats["fc"]).mean(1).abs().max()
    assert error > 1e-3 * floats["fc"].std(), "without the corrections before it, its own is wrong"


INF = math.inf


@pytest.mark.parametrize(
    ("lo", "hi"), [(0.0, INF), (0.0, 6.0), (-1.0, 1.0), (-INF, 0.5), (-INF, INF)], ids=str
)
def test_mean_of_a_clipped_normal(lo: float, hi: float) -> None:
    """The oracle: numerical integration."""
    mean = torch.tensor([-3.0, -0.5, 0.0, 0.2, 4.0, 9.0], dtype=torch.float64)
    std = torch.tensor([1.0, 0.1, 1.0, 2.0, 3.0, 1e-6], dtype=torch.float64)
    t = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    density = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    values = (mean[:, None] + std[:, None] * t).clamp(lo, hi)
    want = torch.trapezoid(values * density, t)
    assert torch.allclose(clipped_normal_mean(mean, std, lo, hi), want, atol=1e-8)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"ReLU": F.relu, "ReLU6": F.relu6, "none": lambda x: x}


def normal_network(activation: Callable[[Tensor], Tensor], second: nn.Module) -> tuple[nn.Module, Tensor]:
    """conv 1x1, BatchNorm, activation, layer; fed with normal noise, BatchNorm writes normal numbers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = activation(m.n(m.a(x)))
        return m.b(y)

    model = Fn(forward, a=nn.Conv2d(6, 12, 1), n=nn.BatchNorm2d(12, momentum=None), b=second)
    x = torch.randn(64, 6, 16, 16)
    model = settle(model, x)
    with torch.no_grad():
        model.n.bias.uniform_(-1, 3)
    return model, x


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_analytic_correction_against_monte_carlo(activation: str, groups: int) -> None:
    model, x = normal_network(ACTIVATIONS[activation], nn.Conv2d(12, 12, 1, groups=groups, bias=False))
    reference = traced(model, x)
    fold_bn(reference)
    gm = clone(reference)
    place(gm, Recipe(rules=(Rule(match="b", weight=QuantSpec(bits=3)),)))
    calibrate_weights(gm)
    want = reference(x).transpose(0, 1).flatten(1)

    def mean_error() -> float:
        return (gm(x).transpose(0, 1).flatten(1) - want).mean(1).norm().item()

    before = mean_error()
    assert correct_bias_analytically(gm) == ["b"]
    assert mean_error() < 0.1 * before


def test_analytic_correction_reads_through_activation_quantizers() -> None:
    model, x = normal_network(F.relu, nn.Conv2d(12, 5, 1))
    gm, reference = quantized(model, [Inputs((x,))], rough())
    layer = module_of(layer_nodes(gm)[1])
    before = layer.bias.detach().clone()
    assert correct_bias_analytically(gm) == ["b"]
    seen = next(v[0] for n, v in walk(reference, [Inputs((x,))]) if n.meta.get("name") == "relu")
    change = layer.effective_weight().detach() - module_of(layer_nodes(reference)[1]).weight.detach()
    want = -(change.flatten(1) @ seen.mean((0, 2, 3)))
    assert torch.allclose(layer.bias.detach() - before, want, atol=0.02 * want.abs().max())


def test_without_statistics_nothing_is_corrected() -> None:
    build, sample = MODELS["a residual"]
    gm, _ = quantized(build(), [Inputs((sample(),))], rough())
    assert correct_bias_analytically(gm) == []

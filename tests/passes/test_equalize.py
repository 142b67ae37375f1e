"""Cross-layer equalization: other weights, the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Chain, Fn, InvertedResidual, conv, image, settle, traced
from torch import Tensor, fx, nn

from lowbit import QuantSpec
from lowbit.core.qtensor import quantization_error
from lowbit.graph.match import layer_nodes
from lowbit.graph.ops import module_of
from lowbit.graph.regions import regions
from lowbit.passes.equalize import equalize
from lowbit.passes.fold_bn import fold_bn


def spread(model: nn.Module) -> nn.Module:
    """Scale the output channels of every layer unevenly."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                factor = torch.logspace(-1, 1, module.weight.shape[0])[torch.randperm(module.weight.shape[0])]
                module.weight.mul_(factor.reshape(-1, *[1] * (module.weight.ndim - 1)))
                if module.bias is not None:
                    module.bias.mul_(factor)
    return model


def residual(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    x = F.relu(m.c(F.relu(m.b(x))) + x)
    return m.d(x)


def long_residual(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    x = x + m.c(F.relu(m.b(x)))
    x = x + m.e(F.relu(m.d(F.relu(x))))
    return m.f(F.adaptive_avg_pool2d(x, 1).flatten(1))


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "chain": (Chain, 1),
    "chain of four": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), conv(6, 4), nn.LeakyReLU(), conv(4, 4)),
        3,
    ),
    "grouped": (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8, groups=4), nn.ReLU(), conv(8, 4)), 2),
    "depthwise": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8, groups=8), nn.ReLU(), conv(8, 4)),
        2,
    ),
    "inverted residual": (InvertedResidual, 3),
    "PReLU": (lambda: nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 4)), 1),
    "flatten": (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)), 1),
    "view": (
        lambda: Fn(lambda m, x: m.b(F.relu(m.a(x)).view(x.shape[0], -1)), a=conv(3, 8), b=nn.Linear(512, 4)),
        1,
    ),
    "global pooling": (
        lambda: Fn(lambda m, x: m.b(F.relu(m.a(x)).mean((2, 3))), a=conv(3, 8), b=nn.Linear(8, 4)),
        1,
    ),
    "max pooling, dropout and nearest neighbour": (
        lambda: nn.Sequential(
            *(conv(3, 8), nn.MaxPool2d(2), nn.Dropout(), nn.Upsample(scale_factor=2), nn.ReLU(), conv(8, 4))
        ),
        1,
    ),
    "residual": (
        lambda: Fn(residual, a=conv(3, 8), b=conv(8, 6), c=conv(6, 8), d=conv(8, 4)),
        2,
    ),
    "residual stream": (
        lambda: Fn(
            *(long_residual,),
            a=conv(3, 8),
            b=conv(8, 6),
            c=conv(6, 8),
            d=conv(8, 6),
            e=conv(6, 8),
            f=nn.Linear(8, 4),
        ),
        3,
    ),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)), 1),
    "conv1d": (
        lambda: nn.Sequential(
            *(nn.Flatten(2), nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 4, 3))
        ),
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_output_does_not_change(name: str) -> None:
    build, count = CASES[name]
    x = image()
    gm = traced(spread(settle(build(), x)), x)
    fold_bn(gm)
    before, weights = gm(x), {k: v.clone() for k, v in gm.named_parameters()}
    done = equalize(gm)
    assert done.regions == count
    assert done.spread_after < done.spread_before
    assert any(not torch.equal(v, weights[k]) for k, v in gm.named_parameters())
    assert (gm(x) - before).abs().max() <= 1e-5 * before.abs().max()


def test_writer_and_reader_of_a_channel_get_equal_ranges() -> None:
    """Nagel et al. 2019, eq. 10 and 11: r1 = r2 = sqrt(r1 r2), channel by channel."""
    model = Chain()
    rows, columns = (w.detach().abs() for w in (model[0].weight, model[2].weight))
    want = (rows.amax((1, 2, 3)) * columns.amax((0, 2, 3))).sqrt()
    gm = traced(model, image())
    equalize(gm)
    after = [module_of(n).weight.detach().abs() for n in layer_nodes(gm)]
    assert torch.allclose(after[0].amax((1, 2, 3)), want, rtol=1e-4)
    assert torch.allclose(after[1].amax((0, 2, 3)), want, rtol=1e-4)


@pytest.mark.parametrize("name", ["depthwise", "residual", "inverted residual", "residual stream", "flatten"])
def test_it_settles_with_equal_ranges_in_every_region(name: str) -> None:
    """The oracle: the definition, for every region, once nothing moves any more."""
    x = image()
    gm = traced(spread(settle(CASES[name][0](), x)), x)
    fold_bn(gm)
    equalize(gm, sweeps=200)
    for region in regions(gm)[0]:
        writes = torch.stack([module_of(n).weight.abs().flatten(1).amax(1) for n in region.producers]).amax(0)
        reads = torch.stack([by_input(n, region.channels) for n in region.consumers]).amax(0)
        assert torch.allclose(writes, reads, rtol=2e-2)


def by_input(node: fx.Node, channels: int) -> Tensor:
    """Largest magnitude over what reads each channel, group by group, without reshaping tricks."""
    layer = module_of(node)
    weight, groups = layer.weight.detach().abs(), getattr(layer, "groups", 1)
    if isinstance(layer, nn.Linear):
        return torch.stack([part.max() for part in weight.split(layer.in_features // channels, dim=1)])
    size = channels // groups
    outputs = weight.shape[0] // groups
    ranges = [weight[g * outputs : (g + 1) * outputs, i].max() for g in range(groups) for i in range(size)]
    return torch.stack(ranges)


def test_weights_per_tensor_get_better() -> None:
    gm = traced(Chain(), image())
    spec = QuantSpec(bits=8)

    def worst() -> float:
        weights = [module_of(n).weight.detach() for n in layer_nodes(gm)]
        ends = [(w.min().reshape(1, 1, 1), w.max().reshape(1, 1, 1)) for w in weights]
        return min(
            quantization_error(row, spec, e).sqnr_db for w, e in zip(weights, ends, strict=True) for row in w
        )

    before = worst()
    equalize(gm)
    assert worst() > before + 10


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ReLU6": (lambda: nn.Sequential(conv(3, 8), nn.ReLU6(), conv(8, 4)), "'1' reads or writes it"),
    "sigmoid": (lambda: nn.Sequential(conv(3, 8), nn.Sigmoid(), conv(8, 4)), "'1' reads or writes it"),
    "the output reads it too": (
        lambda: Fn(lambda m, x: (y := m.a(x), m.b(y)), a=conv(3, 8), b=conv(8, 4)),
        "'output' reads or writes it",
    ),
    "added to the input": (
        lambda: Fn(lambda m, x: m.b(m.a(x) + x), a=conv(3, 3), b=conv(3, 4)),
        "'x' writes into it",
    ),
    "broadcast": (
        lambda: Fn(lambda m, x: m.b(m.a(x) + m.a(x).mean((2, 3), keepdim=True)), a=conv(3, 8), b=conv(8, 4)),
        "'add' broadcasts",
    ),
    "called twice": (
        lambda: Fn(lambda m, x: m.b(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8)),
        "'b' is called more than once",
    ),
    "transposed": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)),
        "'2' reads or writes it",
    ),
    "linear on the last axis": (
        lambda: Fn(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=nn.Linear(8, 4)),
        "'b' has its channels on another axis",
    ),
    "pixels become channels": (
        lambda: nn.Sequential(conv(3, 8), nn.PixelUnshuffle(2), conv(32, 4)),
        "'1' reads or writes it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_commute_is_left_alone_and_said(name: str) -> None:
    build, why = REFUSED[name]
    x = image()
    gm = traced(build(), x)
    before = [p.clone() for p in gm.parameters()]
    done = equalize(gm)
    assert done.regions == 0
    assert why in [reason for _, reason in done.refused]
    assert all(torch.equal(a, b) for a, b in zip(before, gm.parameters(), strict=True))


def test_tied_weights_are_left_alone() -> None:
    model = nn.Sequential(conv(3, 3), nn.ReLU(), conv(3, 3), nn.ReLU(), conv(3, 4))
    model[2].weight = model[0].weight
    done = equalize(traced(model, image()))
    assert {why for _, why in done.refused} >= {"the weight of '0' is shared"}


def test_relu6_only_when_asked() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU6(), conv(8, 4))
    assert equalize(traced(model, image())).regions == 0
    assert equalize(traced(model, image()), relu6=True).regions == 1


def test_dead_channels_are_left_alone() -> None:
    model = Chain()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[2].weight[:, 5] = 0
    gm, x = traced(model, image()), image()
    before = gm(x)
    equalize(gm)
    assert torch.isfinite(gm(x)).all()
    assert torch.allclose(gm(x), before, atol=1e-5)


def test_the_statistics_move_along() -> None:
    """What analytic bias correction reads of a folded BatchNorm must follow the scaled channel."""
    x = image(64)
    model = settle(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), conv(8, 4)), x)
    gm = traced(spread(model), x)
    fold_bn(gm)
    mean, deviation = gm.meta["statistics"]["0"]
    layer = module_of(layer_nodes(gm)[0])
    weight = layer.weight.detach().clone()
    equalize(gm)
    factor = (weight / layer.weight).amax((1, 2, 3))
    after = gm.meta["statistics"]["0"]
    assert torch.allclose(after[0], mean / factor, rtol=1e-4)
    assert torch.allclose(after[1], deviation / factor, rtol=1e-4)

"""BatchNorm folding: the same function with one operation fewer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import BatchNormNet, Fn, InvertedResidual, conv, image, settle, traced
from torch import Tensor, nn

from lowbit.graph.ops import label
from lowbit.passes.fold_bn import fold_bn


def without_shift(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """As newer releases of torch make it with bias=False."""
    norm.bias = None
    return norm


def sequence() -> Tensor:
    return torch.randn(6, 3, 12)


FOLDED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "conv2d": (lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)), image),
    "conv2d without bias": (lambda: nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8)), image),
    "conv2d, grouped": (lambda: nn.Sequential(conv(3, 9, groups=3), nn.BatchNorm2d(9)), image),
    "conv2d, not affine": (lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, affine=False)), image),
    "conv2d, no shift": (lambda: nn.Sequential(conv(3, 8), without_shift(nn.BatchNorm2d(8))), image),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), sequence),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8)), image),
    "transposed, grouped": (
        lambda: nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8)),
        image,
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)), lambda: torch.randn(9, 8)),
    "functional weight": (
        lambda: Fn(
            lambda m, x: m.n(nn.functional.conv2d(x, m.w)),
            w=nn.Parameter(torch.randn(8, 3, 3, 3)),
            n=nn.BatchNorm2d(8),
        ),
        image,
    ),
    "a network": (BatchNormNet, image),
    "an inverted residual": (InvertedResidual, image),
}


@pytest.mark.parametrize("name", FOLDED)
def test_the_output_does_not_change(name: str) -> None:
    build, data = FOLDED[name]
    x = data()
    model = settle(build(), data(), x)
    gm = traced(model, x)
    want, gone = model(x), [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert fold_bn(gm) == []
    assert not any(label(n).startswith("BatchNorm") for n in gm.graph.nodes)
    assert not any(isinstance(m, type(gone[0])) for m in gm.modules())
    assert (gm(x) - want).abs().max() <= 1e-5 * want.abs().max()
    assert len(gm.meta["statistics"]) == len(gone)


KEPT: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str]]]] = {
    "before a conv": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), conv(3, 8)),
        [("0", "no layer stands right before it")],
    ),
    "shared by two layers": (
        lambda: Fn(lambda m, x: m.n(m.b(m.n(m.a(x)))), a=conv(3, 8), b=conv(8, 8), n=nn.BatchNorm2d(8)),
        [("n", "it is called more than once"), ("n#2", "it is called more than once")],
    ),
    "behind a conv called twice": (
        lambda: Fn(lambda m, x: m.n(m.a(x)) + m.a(x), a=conv(3, 8), n=nn.BatchNorm2d(8)),
        [("n", "'a' is called more than once")],
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_folded_is_left_alone_and_said(name: str) -> None:
    build, kept = KEPT[name]
    x = image()
    model = settle(build(), x)
    gm = traced(model, x)
    assert fold_bn(gm) == kept
    assert torch.equal(gm(x), model(x))


def test_the_statistics_are_those_of_the_output() -> None:
    """The oracle: mean and deviation measured behind BatchNorm, on the data it was settled on."""
    x = image(64)
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, momentum=None))
    model = settle(model, x)
    gm = traced(model, x)
    fold_bn(gm)
    mean, deviation = gm.meta["statistics"]["0"]
    y = gm(x).transpose(0, 1).flatten(1)
    assert torch.allclose(mean, y.mean(1), atol=1e-4)
    assert torch.allclose(deviation, y.std(1), rtol=1e-3)

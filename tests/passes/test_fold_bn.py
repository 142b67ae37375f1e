"""BatchNorm folding: the same function with one operation fewer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import BatchNormNet, Fn, InvertedResidual, conv, image, settle, sqnr, traced
from torch import Tensor, nn

import lowbit
from lowbit import INT4, UINT8, PerChannel, PerGroup, QuantSpec, Recipe, Rule, ptq
from lowbit.graph.ops import label
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer
from lowbit.passes.fold_bn import fold_bn, make_gains_positive


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


# -- folded after training

AFTER = {n: case for n, case in FOLDED.items() if n != "transposed, grouped"}
INT4_NARROW = replace(INT4, narrow=True)
WEIGHTS = {
    "int4/channel": INT4,
    "int8/tensor": QuantSpec(bits=8),
    "uint3+zp/channel": QuantSpec(bits=3, signed=False, symmetric=False, granularity=PerChannel(0)),
    "int4+zp/tensor": QuantSpec(bits=4, symmetric=False),
    "groups of one input": QuantSpec(bits=4, granularity=PerGroup(1, 1)),
    "int2/channel": replace(INT4, bits=2),
}
every_weight = pytest.mark.parametrize("spec", WEIGHTS.values(), ids=WEIGHTS)


def recipe(spec: QuantSpec, activation: QuantSpec | None = None, estimator: str = "lsq") -> Recipe:
    rule = Rule(weight=spec, activation=activation, estimator=estimator)
    return Recipe(rules=(rule,), fold_bn="after")


def trained(model: nn.Module, how: Recipe, x: Tensor, steps: int = 3) -> QuantizedModel:
    """Calibrated, then trained with BatchNorm in training mode; returned in evaluation mode."""
    q = lowbit.prepare(model, how, x)
    lowbit.calibrate(q, [x])
    optimizer = torch.optim.SGD(q.train().parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (q(x) - 0.5).square().mean().backward()
        optimizer.step()
    return q.eval()


def codes(q: QuantizedModel) -> dict[str, Tensor]:
    return {n: m.qweight().codes for n, m in q.graph.named_modules() if isinstance(m, QLayer)}


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]


def same_codes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@every_weight
@pytest.mark.parametrize("name", AFTER)
def test_the_codes_are_those_that_were_trained(name: str, spec: QuantSpec) -> None:
    build, data = AFTER[name]
    x = data()
    model = settle(build(), x)
    q = trained(model, recipe(spec), x)
    assert len(norms(q)) == len(norms(model)), "kept, and trained"
    want, before = q(x), codes(q)
    lowbit.freeze(q)
    assert not norms(q)
    assert same_codes(codes(q), before)
    assert sqnr(want, q(x)) > 100
    assert q.steps == []
    assert q.recipe.fold_bn == "before", "what was done"


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", AFTER)
def test_no_code_of_an_activation_moves(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But where sums in another order round the other way; biases stay in float here."""
    build, data = AFTER[name]
    x = data()
    how = recipe(replace(INT4, bits=bits), replace(UINT8, bits=bits))
    q = trained(settle(build(), x), how, x)
    want, before = q(x), codes(q)
    monkeypatch.setattr(ptq, "settle_biases", lambda gm: None)
    lowbit.freeze(q)
    assert same_codes(codes(q), before)
    moved = (q(x) - want).abs() > 1e-4 * want.abs().max()
    assert moved.float().mean() < 2e-3


@every_weight
def test_a_frozen_file_gives_the_same_numbers(spec: QuantSpec, tmp_path: Path) -> None:
    x = image()
    model = settle(InvertedResidual(), x)
    q = lowbit.freeze(trained(model, recipe(spec, UINT8), x))
    path = lowbit.save(q, tmp_path / "m.safetensors")
    again = lowbit.load(path, InvertedResidual())
    assert torch.equal(again(x), q(x))
    assert same_codes(codes(again), codes(q))


def test_one_scale_for_all_becomes_one_for_each_channel() -> None:
    x = image()
    q = trained(settle(BatchNormNet(), x), recipe(QuantSpec(bits=8)), x)
    lowbit.freeze(q)
    specs = {n: str(m.frozen_spec) for n, m in q.graph.named_modules() if isinstance(m, QLayer)}
    assert specs == {"a": "int8/channel", "b": "int8/channel", "fc": "int8/tensor"}


def test_negative_gains_are_turned_before_calibration() -> None:
    """The network computes what it did, and no code lacks its opposite at freeze."""
    x = image()
    model = settle(InvertedResidual(), x)
    for norm in norms(model):
        with torch.no_grad():
            norm.weight[::2] *= -1
    q = lowbit.prepare(model, recipe(INT4), x)
    make_gains_positive(q.graph)
    assert all((norm.weight >= 0).all() for norm in norms(q))
    assert sqnr(model(x), q(x)) > 100
    q = trained(model, recipe(INT4), x)
    want, before = q(x), codes(q)
    lowbit.freeze(q)
    assert q.steps == []
    assert same_codes(codes(q), before)
    assert sqnr(want, q(x)) > 100


@pytest.mark.parametrize("spec", [INT4, INT4_NARROW, WEIGHTS["uint3+zp/channel"]], ids=str)
def test_gains_that_turn_negative_in_training(spec: QuantSpec) -> None:
    """Codes become their opposites; those that have none move by one step and are counted."""
    x = image()
    q = trained(settle(BatchNormNet(), x), recipe(spec), x)
    with torch.no_grad():
        q.graph.bn_a.weight[:5] *= -1
        q.graph.a.weight_quantizer.scale *= 0.5  # so that some codes are -8
    want, before = q(x), codes(q)
    lowbit.freeze(q)
    after, ends = codes(q), spec.qmin + spec.qmax
    opposite = -before["a"].int() if spec.symmetric else ends - before["a"].int()
    assert torch.equal(after["a"][:5].int(), opposite[:5].clamp(max=spec.qmax))
    assert torch.equal(after["a"][5:], before["a"][5:])
    assert torch.equal(after["b"], before["b"])
    lost = int((opposite[:5] > spec.qmax).sum())
    assert bool(lost) == (spec == INT4)
    assert sqnr(want, q(x)) > (15 if lost else 100)
    assert [s.text for s in q.steps] == (
        [f"gamma turned negative in training; codes moved by one step: {lost} of 'a'"] if lost else []
    )


@every_weight
def test_a_gain_of_zero(spec: QuantSpec) -> None:
    """The channel is its shift alone, and others do not notice."""
    x = image()
    q = trained(settle(BatchNormNet(), x), recipe(spec), x)
    with torch.no_grad():
        q.graph.bn_b.weight[2] = 0
    want, before = q(x), codes(q)
    lowbit.freeze(q)
    layer = q.graph.b
    others = torch.arange(len(layer.bias)) != 2
    assert not layer.effective_weight()[2].any()
    assert torch.equal(codes(q)["b"][others], before["b"][others])
    assert sqnr(want, q(x)) > 100


def test_a_grouped_transposed_convolution_is_folded_before() -> None:
    """Its channels share scales across groups."""
    build, data = FOLDED["transposed, grouped"]
    x = data()
    model = settle(build(), x)
    q = trained(model, recipe(INT4), x)
    assert not norms(q)
    want = q(x)
    assert sqnr(want, lowbit.freeze(q)(x)) > 100


def test_batchnorm_of_a_power_of_two_weight_is_folded_before() -> None:
    """A factor would take the scale off its grid; the other layer keeps its BatchNorm."""
    x = image()
    shift = replace(INT4, scale="pow2")
    how = Recipe(rules=(Rule(match="a", weight=shift), Rule(weight=INT4)), fold_bn="after")
    q = trained(settle(BatchNormNet(), x), how, x)
    assert len(norms(q)) == 1
    want, before = q(x), codes(q)
    lowbit.freeze(q)
    assert same_codes(codes(q), before)
    assert sqnr(want, q(x)) > 100
    scale = q.graph.a.weight_quantizer.scale
    assert torch.equal(scale, torch.exp2(scale.log2().round()))


def test_never_is_never() -> None:
    x = image()
    q = trained(settle(BatchNormNet(), x), replace(recipe(INT4), fold_bn="never"), x)
    want = q(x)
    lowbit.freeze(q)
    assert len(norms(q)) == 2
    assert torch.equal(q(x), want)
    assert q.recipe.fold_bn == "never"


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_folded_later_is_left_alone_and_said(name: str) -> None:
    build, kept = KEPT[name]
    x = image()
    q = trained(settle(build(), x), recipe(INT4), x)
    assert [(n.name, n.text) for n in q.notes] == [(n, f"BatchNorm stays, {why}") for n, why in kept]
    want = q(x)
    assert torch.equal(lowbit.freeze(q)(x), want)

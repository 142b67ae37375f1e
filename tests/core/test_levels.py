"""Binary and ternary levels: against brute force over all sets of survivors, and each paper's formula."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit import LowbitError, PerChannel, PerGroup, PerTensor, QTensor, QuantSpec, quantization_error
from lowbit.core import levels
from lowbit.core.affine import MIN_SCALE
from lowbit.core.spec import BINARY, TERNARY
from lowbit.core.weight_observers import fit, suits, weight_observers

SPLIT = replace(TERNARY, split=True)
ONE = {
    "binary": replace(BINARY, granularity=PerTensor()),
    "ternary": replace(TERNARY, granularity=PerTensor()),
}
numbers = st.lists(st.integers(-50, 50), min_size=1, max_size=5)


def error(x: Tensor, values: Tensor) -> float:
    return float((x.double() - values.double()).square().sum())


def least_of_all(x: Tensor, codes: tuple[int, ...], sides: bool) -> float:
    """The least squared error over every assignment of codes and the best scale for it."""
    best = float("inf")
    for chosen in product(codes, repeat=x.numel()):
        c = torch.tensor(chosen).double()
        found = 0.0
        parts = (c > 0, c < 0, c == 0) if sides else (c != 0, c == 0)
        for part in parts:
            values, signs = x.double()[part], c[part]
            scale = max(0.0, float((values * signs).mean())) if bool((signs != 0).any()) else 0.0
            found += float((values - scale * signs).square().sum())
        best = min(best, found)
    return best


@given(numbers)
@pytest.mark.parametrize("name", ["binary", "ternary", "split"])
def test_least_error_is_the_least_of_all(name: str, values: list[int]) -> None:
    x = torch.tensor(values).float()
    spec = replace(SPLIT, granularity=PerTensor()) if name == "split" else ONE[name]
    codes = (-1, 1) if name == "binary" else (-1, 0, 1)
    got = QTensor.quantize(x, spec)
    assert error(x, got.dequantize()) <= least_of_all(x, codes, name == "split") + 1e-3
    assert set(got.codes.tolist()) <= set(codes)


@pytest.mark.parametrize("where", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(1, 4)], ids=str)
@pytest.mark.parametrize("spec", [BINARY, TERNARY, SPLIT], ids=str)
def test_each_scale_by_itself(spec: QuantSpec, where: PerTensor | PerChannel | PerGroup) -> None:
    spec = replace(spec, granularity=where)
    x = torch.randn(6, 8) * torch.logspace(-2, 2, 6)[:, None]
    q = QTensor.quantize(x, spec)
    alone = replace(spec, granularity=PerTensor())
    if where == PerTensor():
        parts = [(x, q.dequantize())]
    elif where == PerChannel(1):
        parts = list(zip(x.t(), q.dequantize().t(), strict=True))
    elif where == PerChannel(0):
        parts = list(zip(x, q.dequantize(), strict=True))
    else:
        parts = list(zip(x.reshape(12, 4), q.dequantize().reshape(12, 4), strict=True))
    for part, got in parts:
        assert torch.equal(QTensor.quantize(part, alone).dequantize(), got)


def test_binary_is_the_mean_magnitude_and_zero_is_positive() -> None:
    x = torch.tensor([-3.0, 0.0, -0.0, 1.0])
    q = QTensor.quantize(x, ONE["binary"])
    assert q.scale.item() == 1.0
    assert q.codes.tolist() == [-1, 1, 1, 1]
    assert fit(x, ONE["binary"], "absmean").scale.item() == 1.0
    assert fit(x, ONE["binary"], "minmax").scale.item() == 3.0


def test_twn_ttq_and_absmean_are_their_papers() -> None:
    x = torch.randn(1000)
    spec = ONE["ternary"]
    delta = 0.7 * x.abs().mean()
    found = fit(x, spec, "twn")
    assert found.threshold is not None
    assert torch.allclose(found.threshold, delta)
    assert torch.allclose(found.scale, x.abs()[x.abs() > delta].mean())
    found, delta = fit(x, replace(spec, split=True), "ttq"), 0.05 * x.abs().max()
    assert found.threshold is not None
    assert found.negative_scale is not None
    assert torch.allclose(found.threshold, delta)
    assert torch.allclose(found.scale, x[x > delta].mean())
    assert torch.allclose(found.negative_scale, -x[x < -delta].mean())
    assert torch.allclose(fit(x, spec, "absmean").scale, x.abs().mean())
    assert fit(x, spec, "absmean").threshold is None


def test_the_optimum_of_a_normal_distribution() -> None:
    """Published: threshold 0.612 and scale 1.224 of the deviation, 0.19 of the power left (Max 1960)."""
    x = torch.randn(400_000)
    found = fit(x, ONE["ternary"])
    assert found.scale.item() == pytest.approx(1.224, abs=0.01)
    assert quantization_error(x, ONE["ternary"]).relative ** 2 == pytest.approx(0.190, abs=0.003)
    assert quantization_error(x, ONE["binary"]).relative ** 2 == pytest.approx(1 - 2 / torch.pi, abs=0.003)


OBSERVERS = [(o, s) for o in ("mse", "minmax", "absmean", "twn", "ttq") for s in (False, True)]


@pytest.mark.parametrize(("observer", "split"), [c for c in OBSERVERS if c != ("absmean", True)])
def test_degenerate_tensors_have_an_answer(observer: str, split: bool) -> None:
    spec = replace(TERNARY, split=split)
    for x in (torch.zeros(2, 5), torch.full((2, 5), -2.0), torch.zeros(2, 0), torch.zeros(0, 5)):
        found = fit(x, spec, observer)
        assert torch.isfinite(found.scale).all()
        assert (found.scale >= MIN_SCALE).all()
        assert found.scale.shape == spec.scale_shape(x.shape)
    flat = fit(torch.full((1, 6), -2.0), spec, observer)
    worth = flat.scale if flat.negative_scale is None else flat.negative_scale
    assert worth.item() == pytest.approx(2.0)


def test_all_zero_binary_weights_are_worth_nothing() -> None:
    for spec in (
        BINARY,
        QuantSpec(bits=2, mid_rise=True),
        QuantSpec(bits=3, mid_rise=True, granularity=PerChannel(0)),
    ):
        assert QTensor.quantize(torch.zeros(2, 3), spec).dequantize().abs().max().item() <= 8 * MIN_SCALE


def test_a_given_threshold_and_scale() -> None:
    x = torch.tensor([0.1, -0.4, 0.9, -1.1])
    spec = ONE["ternary"]
    found = levels.given_threshold(x, torch.tensor([0.5]), spec)
    assert found.scale.item() == pytest.approx(1.0)
    assert levels.given_threshold(x, torch.tensor([5.0]), spec).scale.item() == 5.0, "no survivor uses it"
    given = QTensor.quantize(x, spec, (torch.tensor([-2.0]), torch.tensor([2.0])))
    assert given.scale.item() == 2.0
    assert given.codes.tolist() == [0, 0, 0, -1]
    with pytest.raises(LowbitError, match="a threshold separates ternary codes, and the spec is binary"):
        levels.given_threshold(x, torch.tensor([0.5]), ONE["binary"])


def test_power_of_two_scales() -> None:
    for spec in (ONE["binary"], ONE["ternary"]):
        scale = QTensor.quantize(torch.randn(50), replace(spec, scale="pow2")).scale
        assert torch.equal(scale.log2(), scale.log2().round())
    x = torch.randn(400)
    x = x / x.abs().mean() * 1.02
    assert QTensor.quantize(x, replace(ONE["binary"], scale="pow2")).scale.item() == 1.0, "nearer than 2"


def test_who_is_for_what() -> None:
    assert set(weight_observers.names()) == {"mse", "minmax", "absmean", "twn", "ttq"}
    wide = QuantSpec(bits=4)
    assert [name for name in weight_observers.names() if suits(name, wide)] == ["minmax", "mse"]
    assert not suits("absmean", SPLIT)
    with pytest.raises(LowbitError, match="'twn' is for ternary codes, and the weight is int4"):
        fit(torch.ones(3), wide, "twn")
    with pytest.raises(LowbitError, match="split=True gives each sign of ternary codes a scale"):
        QuantSpec(bits=4, split=True)

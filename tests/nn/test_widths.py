"""Widths that are trained: what is rounded, what flows back, and what is left when training ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lowbit import LowbitError, QuantSpec
from lowbit.core.fixed import FixedPoint, from_real, to_real
from lowbit.nn.quantizer import Quantizer
from lowbit.nn.widths import WidthQuantizer


def calibrated(spec: QuantSpec, *, weight: bool = False) -> Quantizer:
    quantizer = Quantizer(spec, None if weight else "minmax")
    quantizer.set_range(torch.tensor([[-1.5]]), torch.tensor([[1.5]]))
    quantizer.mode = "quantize"
    return quantizer


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("fraction", [-2.0, 0.4, 3.6, 7.0])
@pytest.mark.parametrize("rounding", ["half_even", "half_up", "floor"])
def test_an_activation_is_rounded_to_a_type(signed: bool, fraction: float, rounding: str) -> None:
    """The place of the first bit stays, and the last one moves; a bit is always left."""
    spec = QuantSpec(bits=8, signed=signed, scale="pow2", rounding=rounding)  # type: ignore[arg-type]
    quantizer = WidthQuantizer.of(calibrated(spec), (1,))
    quantizer.fraction.data.fill_(fraction)  # type: ignore[union-attr]
    integer = FixedPoint.of(spec, quantizer.scale).integer
    x = torch.linspace(-3, 3, 1001)[:, None]
    width = max(integer + round(fraction), 1 + int(signed))
    with torch.no_grad():
        y = quantizer(x)
    to = FixedPoint(width, integer, signed, rounding, "saturate")  # type: ignore[arg-type]
    assert torch.equal(y, to_real(from_real(x, to), to.fraction).float())
    assert quantizer.bits().item() == width
    quantizer.settle()
    assert quantizer.spec.bits == width
    assert torch.equal(quantizer(x), y)


def test_gradients() -> None:
    """dy/dx = 1 where nothing is clipped; dy/df = ln(2) (x - y)."""
    quantizer = WidthQuantizer.of(calibrated(QuantSpec(bits=6, scale="pow2")), (1,))
    x = (4 * torch.randn(200, 1)).requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    inside = (x >= -2) & (x <= 2)
    assert torch.equal(x.grad, inside.float())
    assert quantizer.fraction is not None
    want = math.log(2) * (x - y)[inside].sum()
    assert quantizer.fraction.grad is not None
    assert quantizer.fraction.grad.item() == pytest.approx(want.item(), rel=1e-4)


def test_more_bits_lower_the_error_as_the_gradient_says() -> None:
    """The mean of (x - y)^2 falls by its derivative, 2 ln(2) of it for each bit."""
    quantizer = WidthQuantizer.of(calibrated(QuantSpec(bits=8, scale="pow2"), weight=True), (1, 1))
    x = torch.randn(4096, 1)
    error = (quantizer(x) - x).square().mean()
    error.backward()
    assert quantizer.fraction is not None
    assert quantizer.fraction.grad is not None
    assert quantizer.fraction.grad.item() == pytest.approx(-2 * math.log(2) * error.item(), rel=1e-3)


def test_bits_of_elements_are_those_from_the_highest_to_the_last() -> None:
    quantizer = WidthQuantizer.of(calibrated(QuantSpec(bits=8, scale="pow2"), weight=True), (1, 3))
    quantizer.fraction.data = torch.tensor([[3.0, 1.0, -1.0]])  # type: ignore[union-attr]
    x = torch.tensor([[1.25, -0.75, 0.25], [0.0, 3.0, 5.0]])
    bits = quantizer.bits(x)
    assert bits.tolist() == [[4.0, 1.0, 0.0], [0.0, 3.0, 2.0]]
    (slope,) = torch.autograd.grad(bits.sum(), quantizer.fraction)  # type: ignore[arg-type]
    assert slope.tolist() == [[1.0, 2.0, 1.0]]
    with torch.no_grad():
        assert quantizer(x).tolist() == [[1.25, -1.0, 0.0], [0.0, 3.0, 4.0]]


def test_a_weight_settles_on_the_finest_grid_that_it_uses() -> None:
    quantizer = WidthQuantizer.of(calibrated(QuantSpec(bits=8, scale="pow2"), weight=True), (2, 2))
    quantizer.fraction.data = torch.tensor([[5.0, 0.0], [2.0, 1.0]])  # type: ignore[union-attr]
    x = torch.tensor([[0.5, 3.0], [-0.75, 0.5]])
    q = quantizer.quantize(x)
    with torch.no_grad():
        y = quantizer(x)
    assert torch.equal(q.dequantize(), y)
    quantizer.settle(y)
    assert quantizer.fraction is None
    assert quantizer.scale.tolist() == [[0.25]]
    assert quantizer.spec.bits == 5
    assert torch.equal(quantizer(y), y)


def test_what_is_pruned_is_still_a_weight() -> None:
    quantizer = WidthQuantizer.of(calibrated(QuantSpec(bits=8, scale="pow2"), weight=True), (1, 1))
    quantizer.fraction.data.fill_(-9.0)  # type: ignore[union-attr]
    x = torch.randn(3, 3)
    assert torch.equal(quantizer.quantize(x).codes, torch.zeros(3, 3, dtype=torch.int8))
    quantizer.settle(torch.zeros(3, 3))
    assert torch.equal(quantizer(x * 0), torch.zeros(3, 3))


def test_a_state_without_widths_is_not_taken_for_one() -> None:
    plain = calibrated(QuantSpec(bits=8, scale="pow2"))
    made = WidthQuantizer.of(plain, (1,))
    assert made.load_state_dict(made.state_dict()).missing_keys == []
    with pytest.raises(LowbitError, match=r"a scale for '.*' and no learned width"):
        made.load_state_dict(plain.state_dict())


def test_it_needs_a_calibrated_power_of_two() -> None:
    with pytest.raises(LowbitError, match="calibrate"):
        WidthQuantizer.of(Quantizer(QuantSpec(bits=8, scale="pow2")), (1,))
    with pytest.raises(LowbitError, match="no shift"):
        WidthQuantizer.of(calibrated(QuantSpec(bits=8)), (1,))
    with pytest.raises(LowbitError, match="saturate"):
        WidthQuantizer.of(calibrated(QuantSpec(bits=8, scale="pow2", overflow="wrap")), (1,))
    learned = WidthQuantizer.of(calibrated(QuantSpec(bits=8, scale="pow2")), (1,))
    with pytest.raises(LowbitError, match="learned already"):
        WidthQuantizer.of(learned, (1,))
    grown = WidthQuantizer.of(calibrated(QuantSpec(bits=8, scale="pow2"), weight=True), (1, 1))
    assert isinstance(grown.fraction, nn.Parameter)
    grown.fraction.data.fill_(20.0)
    with pytest.raises(LowbitError, match="more than 16"):
        grown.settle(grown(torch.randn(4, 4)).detach())

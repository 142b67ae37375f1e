"""Fixed point against rational numbers, and the names of its types."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import LowbitError, PerChannel, QuantSpec
from lowbit.core.affine import fake_quantize, power_of_two
from lowbit.core.fixed import FixedPoint, align, cast, exponent_of, fixed, from_real, to_real

ROUNDINGS = ("half_even", "half_up", "floor")


@st.composite
def types(draw: st.DrawFn) -> FixedPoint:
    width = draw(st.integers(1, 20))
    signed = draw(st.booleans())
    overflow = draw(st.sampled_from(["saturate", "wrap"]))
    narrow = signed and overflow == "saturate" and width > 1 and draw(st.booleans())
    integer = draw(st.integers(-6, 26))
    return FixedPoint(width, integer, signed, draw(st.sampled_from(ROUNDINGS)), overflow, narrow)


def exactly(value: Fraction, to: FixedPoint) -> int:
    """The code of a rational number, by whole numbers of Python."""
    steps = value * Fraction(2) ** to.fraction
    code = {
        "half_even": round(steps),
        "half_up": math.floor(steps + Fraction(1, 2)),
        "floor": math.floor(steps),
    }[to.rounding]
    if to.overflow == "saturate":
        return min(max(code, to.qmin), to.qmax)
    low = code % 2**to.width
    return low - 2**to.width if to.signed and low >= 2 ** (to.width - 1) else low


@given(st.integers(-(2**30), 2**30), st.integers(-4, 24), types())
def test_a_cast_is_that_of_rational_numbers(code: int, fraction: int, to: FixedPoint) -> None:
    want = exactly(Fraction(code) / Fraction(2) ** fraction, to)
    assert cast(torch.tensor([code]), fraction, to).item() == want


@given(st.floats(-1e6, 1e6, width=32), types())
def test_real_numbers_become_codes_as_rational_ones_do(x: float, to: FixedPoint) -> None:
    codes = from_real(torch.tensor([x]), to)
    assert codes.item() == exactly(Fraction(x), to)
    assert Fraction(to_real(codes, to.fraction).item()) == codes.item() * Fraction(2) ** -to.fraction


@given(st.floats(-100, 100, width=32), types().filter(lambda t: 2 <= t.width <= 16))
def test_a_quantizer_of_its_spec_rounds_the_same_way(x: float, to: FixedPoint) -> None:
    """In float32, which is exact here: a product with a power of two, then whole numbers below 2^24."""
    tensor, scale = torch.tensor([x]), torch.tensor([to.scale])
    codes = fake_quantize(tensor, scale, None, to.spec) / scale
    if abs(x / to.scale) < 2**23:
        assert codes.item() == from_real(tensor, to).item()
    assert FixedPoint.of(to.spec, scale) == to


@given(types())
def test_its_name_says_everything(to: FixedPoint) -> None:
    assert FixedPoint.parse(str(to)) == to
    assert FixedPoint.parse("ap_" + str(to).replace(",", ", ")) == to


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (fixed(8, 3), "fixed<8,3,RND_CONV,SAT>"),
        (fixed(8, 3, signed=False, rounding="half_up"), "ufixed<8,3,RND,SAT>"),
        (fixed(6, -2, overflow="saturate_symmetric"), "fixed<6,-2,RND_CONV,SAT_SYM>"),
        (fixed(16, 6, rounding="floor", overflow="wrap"), "fixed<16,6>"),
        (fixed(16, 6, rounding="floor"), "fixed<16,6,TRN,SAT>"),
        (FixedPoint.holding(-128, 127, 4), "fixed<8,4>"),
        (FixedPoint.holding(0, 256, 0), "ufixed<9,9>"),
        (FixedPoint.holding(0, 0, 2), "ufixed<1,-1>"),
    ],
)
def test_names(made: FixedPoint, name: str) -> None:
    assert str(made) == name
    assert FixedPoint.parse(name) == made


@given(st.integers(-(2**40), 2**40), st.integers(0, 2**40), st.integers(-8, 8))
def test_the_narrowest_type_holds_both_ends(low: int, span: int, fraction: int) -> None:
    high = low + span
    held = FixedPoint.holding(low, high, fraction)
    assert held.qmin <= low
    assert high <= held.qmax
    if held.width > 1:
        smaller = FixedPoint(held.width - 1, 0, held.signed)
        assert low < smaller.qmin or high > smaller.qmax


@pytest.mark.parametrize(
    "text", ["float", "fixed<8>", "fixed<8,3", "fixed<8,3,UP>", "fixed<8,3,RND,CLIP>", "ufixed<a,1>"]
)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(LowbitError, match=r"fixed<8,3>|is none of"):
        FixedPoint.parse(text)


@pytest.mark.parametrize(
    ("spec", "scale", "message"),
    [
        (QuantSpec(bits=8), 0.3, "not a power of two, so it is no shift; quantize with .*fixed8"),
        (QuantSpec(bits=8, symmetric=False), 0.5, "no zero point"),
        (QuantSpec(bits=3, mid_rise=True), 0.5, "whole codes"),
        (QuantSpec(bits=8, granularity=PerChannel(0)), torch.tensor([0.5, 1.0]), "one type for a tensor"),
    ],
)
def test_what_is_no_fixed_point_is_refused(spec: QuantSpec, scale: object, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        FixedPoint.of(spec, scale)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "width=0 is not from 1 to 62"),
        ((8.0, 3), r"width=8\.0 is not a whole number"),
        ((8, 3, True, "nearest"), "rounding='nearest' is unknown"),
        ((8, 3, False, "floor", "saturate", True), "narrow=True"),
    ],
)
def test_bad_types(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        FixedPoint(*arguments)  # type: ignore[arg-type]


@given(st.floats(2.0**-50, 2.0**50, width=32))
def test_powers_of_two(scale: float) -> None:
    above = power_of_two(torch.tensor(scale)).item()
    near = power_of_two(torch.tensor(scale), "nearest").item()
    assert math.frexp(above)[0] == math.frexp(near)[0] == 0.5
    assert above / 2 < scale <= above
    assert near / math.sqrt(2) * 0.999999 <= scale <= near * math.sqrt(2) * 1.000001
    assert exponent_of(above) == round(math.log2(above))


def test_alignment_is_a_shift() -> None:
    assert align(torch.tensor([3, -5]), 4).tolist() == [48, -80]


def test_far_shifts_and_infinity() -> None:
    far = FixedPoint(8, 8, rounding="half_even", overflow="saturate")
    assert cast(torch.tensor([-1, 1]), 62, far).tolist() == [0, 0]
    fine = FixedPoint(8, -22, overflow="saturate")
    assert cast(torch.tensor([1 << 40, -(1 << 40)]), 0, fine).tolist() == [127, -128]
    assert from_real(torch.tensor([float("inf")]), far).item() == 127
    with pytest.raises(LowbitError, match="infinite"):
        from_real(torch.tensor([float("inf")]), FixedPoint(8, 3))

"""The one formula against plain Python numbers, for every granularity, sign, width, scale and rounding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit import FP16, UINT8, LowbitError, PerChannel, PerGroup, PerTensor, QuantSpec
from lowbit.core.affine import (
    MAX_REACH,
    MIN_SCALE,
    check_finite,
    choose_qparams,
    dequantize,
    fake_quantize,
    group_amin_amax,
    grouped,
    quantize,
)
from lowbit.core.spec import Granularity

GRANULARITIES: list[Granularity] = [
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerChannel(-1),
    PerGroup(1, 2),
    PerGroup(0, 2),
    PerGroup(-1, 2),
]
SHAPE = (4, 4, 2)
finite = st.floats(-1e6, 1e6, width=32)


def specs(bits: int, granularity: Granularity) -> Iterator[QuantSpec]:
    """Every spec of that width and granularity that is allowed."""
    if bits <= 7:
        for scale in ("float", "pow2"):
            yield QuantSpec(bits=bits, mid_rise=True, scale=scale, granularity=granularity)  # type: ignore[arg-type]
    options = itertools.product((True, False), (True, False), (False, True), ("float", "pow2"))
    for signed, symmetric, narrow, scale in options:
        if (narrow and not signed) or (bits == 1 and signed and (symmetric or narrow)):
            continue
        for rounding in ("half_even", "half_up"):
            yield QuantSpec(
                bits=bits,
                signed=signed,
                symmetric=symmetric,
                narrow=narrow,
                scale=scale,  # type: ignore[arg-type]
                rounding=rounding,
                granularity=granularity,
            )


def scale_index(index: tuple[int, ...], granularity: Granularity, rank: int) -> tuple[int, ...]:
    """Where the scale of one element lies, from the definition of the granularities."""
    at = [0] * rank
    if isinstance(granularity, PerChannel):
        at[granularity.axis] = index[granularity.axis]
    if isinstance(granularity, PerGroup):
        at[0] = index[0]
        at[granularity.axis] = index[granularity.axis] // granularity.size
    return tuple(at)


def plain_qparams(lo: float, hi: float, spec: QuantSpec) -> tuple[float, int]:
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if not spec.symmetric:
        scale = (hi - lo) / (spec.qmax - spec.qmin)
    elif spec.signed:
        scale = max(hi / spec.qmax, lo / spec.qmin)
    else:
        scale = hi / spec.qmax
    scale = max(scale, 2.0**-60) if scale else 1.0
    if spec.scale == "pow2":
        mantissa, exponent = math.frexp(scale)
        scale = math.ldexp(1.0, exponent - (mantissa == 0.5))
    scale = float(np.float32(scale))
    zero_point = 0 if spec.symmetric else min(max(round(spec.qmin - lo / scale), spec.qmin), spec.qmax)
    return scale, zero_point


def plain_code(x: float, scale: float, zero_point: int, spec: QuantSpec) -> int:
    """One code; the division is that of float32, everything after it is exact."""
    ratio = float(np.float32(x) / np.float32(scale))
    if spec.mid_rise:
        return min(max(2 * math.floor(Fraction(ratio) / 2) + 1, spec.qmin), spec.qmax)
    code = round(ratio) if spec.rounding == "half_even" else math.floor(Fraction(ratio) + Fraction(1, 2))
    return min(max(code + zero_point, spec.qmin), spec.qmax)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("bits", range(1, 17))
def test_against_plain_python(bits: int, granularity: Granularity) -> None:
    """Scale, zero point, code and real value of every element, one at a time."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(bits)).mul(3).sub(0.5)
    x[0] *= 10
    x[1] = x[1].abs()
    indices = list(np.ndindex(*x.shape))
    for spec in specs(bits, granularity):
        members: dict[tuple[int, ...], list[float]] = {}
        for i in indices:
            members.setdefault(scale_index(i, granularity, x.ndim), []).append(x[i].item())
        qparams = {at: plain_qparams(min(v), max(v), spec) for at, v in members.items()}

        lo, hi = group_amin_amax(x, spec)
        scale, zero_point = choose_qparams(lo, hi, spec)
        codes = quantize(x, scale, zero_point, spec)
        real = dequantize(codes, scale, zero_point)

        assert scale.ndim == x.ndim
        assert scale.numel() == len(qparams)
        assert (zero_point is None) == spec.symmetric
        for at, (plain_scale, plain_zero) in qparams.items():
            assert scale[at].item() == plain_scale, (spec, at)
            assert zero_point is None or zero_point[at].item() == plain_zero, (spec, at)
        want = [plain_code(x[i].item(), *qparams[scale_index(i, granularity, x.ndim)], spec) for i in indices]
        assert codes.flatten().tolist() == want, spec
        for i, code in zip(indices, want, strict=True):
            step, zero = qparams[scale_index(i, granularity, x.ndim)]
            assert real[i].item() == float(np.float32(code - zero) * np.float32(step)), spec


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_simulation_equals_codes(bits: int, granularity: Granularity) -> None:
    """fake_quantize is dequantize(quantize(x)), bit for bit, inside the range and outside."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    for spec in specs(bits, granularity):
        lo, hi = group_amin_amax(x, spec)
        qparams = choose_qparams(lo / 2, hi / 2, spec)
        assert torch.equal(
            fake_quantize(x, *qparams, spec), dequantize(quantize(x, *qparams, spec), *qparams)
        )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("granularity", "pieces"),
    [
        (PerChannel(0), [(slice(i, i + 1),) for i in range(4)]),
        (PerChannel(2), [(slice(None), slice(None), slice(i, i + 1)) for i in range(3)]),
        (PerGroup(1, 3), [(slice(i, i + 1), slice(j, j + 3)) for i in range(4) for j in (0, 3)]),
        (PerGroup(0, 2), [(slice(0, 2),), (slice(2, 4),)]),
    ],
    ids=repr,
)
def test_channel_equals_tensor_on_each_channel(
    granularity: Granularity, pieces: list[tuple[slice, ...]], symmetric: bool
) -> None:
    x = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=6, symmetric=symmetric, granularity=granularity)
    alone = QuantSpec(bits=6, symmetric=symmetric)
    whole = quantize(x, *choose_qparams(*group_amin_amax(x, spec), spec), spec)
    for piece in pieces:
        qparams = choose_qparams(*group_amin_amax(x[piece], alone), alone)
        assert torch.equal(whole[piece], quantize(x[piece], *qparams, alone))


TIES = [
    (0.5, 0, 1),
    (1.5, 2, 2),
    (2.5, 2, 3),
    (-0.5, 0, 0),
    (-1.5, -2, -1),
    (-2.5, -2, -2),
    (0.49999997, 0, 0),
    (-0.50000006, -1, -1),
    (3.4999998, 3, 3),
]


@pytest.mark.parametrize(("x", "even", "up"), TIES)
def test_rounding_of_ties(x: float, even: int, up: int) -> None:
    for rounding, want in (("half_even", even), ("half_up", up)):
        spec = QuantSpec(bits=8, rounding=rounding)  # type: ignore[arg-type]
        assert quantize(torch.tensor([x]), torch.ones(1), None, spec).item() == want


@given(finite, st.integers(-8, 8), st.sampled_from(["half_even", "half_up"]))
def test_power_of_two_scales_are_exact(x: float, exponent: int, rounding: str) -> None:
    """Against rational numbers: no rounding but the one that is asked for."""
    spec = QuantSpec(bits=16, scale="pow2", rounding=rounding)  # type: ignore[arg-type]
    ratio = Fraction(x) / Fraction(2) ** exponent
    code = round(ratio) if rounding == "half_even" else math.floor(ratio + Fraction(1, 2))
    code = min(max(code, spec.qmin), spec.qmax)
    scale = torch.tensor([2.0**exponent])
    codes = quantize(torch.tensor([x]), scale, None, spec)
    assert codes.item() == code
    assert Fraction(dequantize(codes, scale, None).item()) == code * Fraction(2) ** exponent


@pytest.mark.parametrize("mantissa", [1.0, 1.0 + 2**-23, 1.5, 2.0 - 2**-23])
def test_power_of_two_is_the_next_one_up(mantissa: float) -> None:
    spec = QuantSpec(bits=2, signed=False, scale="pow2")
    exponents = torch.arange(-58, 124)
    hi = 3 * mantissa * torch.exp2(exponents.double())
    scale, _ = choose_qparams(torch.zeros_like(hi), hi, spec)
    want = [math.ldexp(1.0, e + (mantissa > 1)) for e in exponents.tolist()]
    assert scale.tolist() == want


@given(st.lists(finite, min_size=1, max_size=20), st.integers(2, 16), st.booleans(), st.booleans())
def test_error_is_at_most_half_a_step(values: list[float], bits: int, signed: bool, symmetric: bool) -> None:
    """A whole one at the ends of an asymmetric range, whose zero point is rounded too."""
    spec = QuantSpec(bits=bits, signed=signed, symmetric=symmetric)
    x = torch.tensor(values)
    if symmetric and not signed:
        x = x.abs()
    scale, zero_point = choose_qparams(x.min()[None], x.max()[None], spec)
    error = (dequantize(quantize(x, scale, zero_point, spec), scale, zero_point) - x).abs().max().item()
    assert error <= scale.item() * (0.5 if symmetric else 1.0) + 1e-6 * x.abs().max().item()


@given(finite, finite, st.integers(1, 16), st.booleans(), st.booleans())
def test_zero_is_exact(lo: float, hi: float, bits: int, signed: bool, pow2: bool) -> None:
    spec = QuantSpec(bits=bits, signed=signed, symmetric=False, scale="pow2" if pow2 else "float")
    qparams = choose_qparams(torch.tensor([min(lo, hi)]), torch.tensor([max(lo, hi)]), spec)
    assert fake_quantize(torch.zeros(1), *qparams, spec).item() == 0


@given(st.integers(1, 16), st.booleans(), st.booleans(), st.floats(2**-59, 2**100, width=32), st.integers())
def test_codes_survive_a_second_time(
    bits: int, signed: bool, symmetric: bool, step: float, zero: int
) -> None:
    """quantize(dequantize(codes)) is codes, for every code."""
    if bits == 1 and signed:
        symmetric = False
    spec = QuantSpec(bits=bits, signed=signed, symmetric=symmetric)
    codes = torch.linspace(spec.qmin, spec.qmax, min(2**bits, 500)).round().to(spec.dtype)
    zero_point = None
    if not symmetric:
        zero_point = torch.tensor([spec.qmin + zero % 2**bits], dtype=torch.int32)
    scale = torch.tensor([step])
    assert torch.equal(quantize(dequantize(codes, scale, zero_point), scale, zero_point, spec), codes)


@given(st.lists(finite, min_size=2, max_size=20, unique=True))
def test_order_is_kept(values: list[float]) -> None:
    x = torch.tensor(sorted(values))
    qparams = choose_qparams(x.min()[None], x.max()[None], UINT8)
    assert (quantize(x, *qparams, UINT8).int().diff() >= 0).all()


def test_symmetric_range_uses_the_larger_side() -> None:
    spec = QuantSpec(bits=8)
    scales = [
        choose_qparams(torch.tensor([lo]), torch.tensor([hi]), spec)[0].item() for lo, hi in [(-1, 0), (0, 1)]
    ]
    assert scales == [1 / 128, np.float32(1 / 127)]
    narrow = QuantSpec(bits=8, narrow=True)
    assert choose_qparams(torch.tensor([-1.0]), torch.tensor([0.0]), narrow)[0].item() == np.float32(1 / 127)


def test_unsigned_symmetric_clips_what_is_negative() -> None:
    spec = QuantSpec(bits=8, signed=False)
    x = torch.tensor([-3.0, 0.0, 1.0])
    qparams = choose_qparams(torch.tensor([-3.0]), torch.tensor([1.0]), spec)
    assert quantize(x, *qparams, spec).tolist() == [0, 0, 255]


@pytest.mark.parametrize("spec", [QuantSpec(bits=8), UINT8, QuantSpec(bits=1, signed=False)], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, MAX_REACH], ids="{:g}".format)
def test_extreme_sizes_stay_finite(spec: QuantSpec, size: float) -> None:
    for scaling in ("float", "pow2"):
        spec = QuantSpec.from_dict(spec.to_dict() | {"scale": scaling})
        x = torch.tensor([-size, 0.0, size])
        scale, zero_point = choose_qparams(x.min()[None], x.max()[None], spec)
        assert scale.item() >= MIN_SCALE
        assert torch.isfinite(fake_quantize(x, scale, zero_point, spec)).all()
        ends = torch.tensor([spec.qmin, spec.qmax])
        assert torch.isfinite(dequantize(ends, scale, zero_point)).all()


@pytest.mark.parametrize(
    ("lo", "hi"),
    [
        (math.nan, 1.0),
        (0.0, math.nan),
        (-math.inf, 1.0),
        (0.0, math.inf),
        (-math.inf, -math.inf),
        (1.0, -1.0),
        (0.0, 3e38),
        (-3e38, 0.0),
    ],
)
def test_ranges_that_are_refused(lo: float, hi: float) -> None:
    """Among good ones, so that the message must name the bad one."""
    with pytest.raises(LowbitError, match=r"no range to quantize") as caught:
        choose_qparams(torch.tensor([-1.0, lo]), torch.tensor([1.0, hi]), UINT8)
    assert f"[{lo:g}, {hi:g}]" in str(caught.value)


def test_values_that_are_not_finite() -> None:
    scale = torch.ones(1)
    spec = QuantSpec(bits=4)
    with pytest.raises(LowbitError, match="holds 1 NaN and 2 infinite values"):
        check_finite(torch.tensor([math.nan, math.inf, -math.inf, 0.0]))
    with pytest.raises(LowbitError, match="1 NaN"):
        quantize(torch.tensor([1.0, math.nan]), scale, None, spec)
    infinite = torch.tensor([math.inf, -math.inf])
    assert quantize(infinite, scale, None, spec).tolist() == [7, -8]
    assert quantize(infinite, scale, torch.tensor([3], dtype=torch.int32), UINT8).tolist() == [255, 0]
    assert fake_quantize(infinite, scale, None, spec).tolist() == [7, -8]
    assert fake_quantize(torch.tensor([math.nan]), scale, None, spec).isnan().all()


def test_half_precision_saturates() -> None:
    x = torch.tensor([1.0, 1 / 3, 65504.0, 65519.0, 1e6, -1e6, 1e-8, math.inf])
    codes = quantize(x, torch.ones(1), None, FP16)
    assert codes.dtype == torch.float16
    want = [1.0, float(np.float16(1 / 3)), 65504.0, 65504.0, 65504.0, -65504.0, 0.0, 65504.0]
    assert codes.tolist() == want
    assert torch.equal(fake_quantize(x, torch.ones(1), None, FP16), codes.float())
    scale, zero_point = choose_qparams(torch.tensor([-1.0]), torch.tensor([1.0]), FP16)
    assert (scale.item(), zero_point) == (1.0, None)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_grouped_rows_are_the_elements_of_each_scale(granularity: Granularity) -> None:
    x = torch.arange(math.prod(SHAPE)).reshape(SHAPE)
    shape = granularity.scale_shape(x.shape)
    rows = grouped(x, shape)
    members: dict[tuple[int, ...], set[int]] = {at: set() for at in np.ndindex(*shape)}
    for i in np.ndindex(*x.shape):
        members[scale_index(i, granularity, x.ndim)].add(int(x[i]))
    assert [set(row.tolist()) for row in rows] == list(members.values())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    for granularity in (PerTensor(), PerChannel(0)):
        spec = QuantSpec(bits=8, granularity=granularity)
        x = torch.empty(shape)
        scale, zero_point = choose_qparams(*group_amin_amax(x, spec), spec)
        assert (scale == 1).all()
        assert quantize(x, scale, zero_point, spec).shape == x.shape


def test_gradients_do_not_pass_silently() -> None:
    """Rounding has no gradient: it must be zero, not wrong."""
    x = torch.randn(5, requires_grad=True)
    fake_quantize(x, torch.ones(1), None, QuantSpec(bits=8)).sum().backward()
    assert isinstance(x.grad, Tensor)
    assert (x.grad == 0).all()

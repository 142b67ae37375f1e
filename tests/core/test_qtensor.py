"""QTensor keeps its invariant for every kind of tensor; quantization_error against plain Python."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import (
    FP16,
    INT4,
    INT8,
    UINT8,
    LowbitError,
    PerChannel,
    PerGroup,
    QTensor,
    QuantSpec,
    quantization_error,
)
from lowbit.core.affine import choose_qparams
from lowbit.core.packing import pack
from lowbit.core.qtensor import sqnr_db
from lowbit.core.spec import expand_to

SPECS = [
    INT8,
    INT4,
    UINT8,
    FP16,
    QuantSpec(bits=1, signed=False),
    QuantSpec(bits=3, granularity=PerGroup(1, 2)),
    QuantSpec(bits=5, symmetric=False, granularity=PerGroup(0, 2)),
    QuantSpec(bits=16, symmetric=False, granularity=PerChannel(-1)),
    QuantSpec(bits=6, scale="pow2", narrow=True),
]
all_specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@all_specs
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 2), (2, 4, 3, 3)], ids=str)
def test_invariant(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    q = QTensor.quantize(normal(*shape), spec)
    zero_point = 0 if q.zero_point is None else expand_to(q.zero_point, shape)
    assert torch.equal(q.dequantize(), (q.codes.float() - zero_point) * expand_to(q.scale, shape))
    assert q.dequantize().dtype == torch.float32
    assert q.scale.ndim == q.codes.ndim == len(shape)
    assert q.codes.dtype == spec.dtype


@all_specs
@given(size=st.floats(2**-40, 2**60, width=32), negative=st.booleans())
def test_constant(spec: QuantSpec, size: float, negative: bool) -> None:
    """A constant is represented, up to the rounding of its scale, wherever its sign has codes."""
    x = torch.full((4, 4), -size if negative else size)
    q = QTensor.quantize(x, spec).dequantize()
    assert (q == q[0, 0]).all()
    if negative and spec.symmetric and not spec.signed:
        assert (q == 0).all()
    elif spec.kind == "float":
        assert torch.equal(q, x.clamp(-65504, 65504).half().float())
    elif spec.scale == "pow2":
        step = QTensor.quantize(x, spec).scale[0, 0].item()
        assert abs(q[0, 0].item() - x[0, 0].item()) <= step / 2
    else:
        torch.testing.assert_close(q, x, rtol=1e-6, atol=0)


@all_specs
def test_all_zero(spec: QuantSpec) -> None:
    q = QTensor.quantize(torch.zeros(4, 4), spec)
    assert (q.scale == 1).all()
    assert (q.dequantize() == 0).all()
    error = quantization_error(torch.zeros(4, 4), spec)
    assert (error.mse, error.relative, error.sqnr_db) == (0, 0, math.inf)


@all_specs
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_empty(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    q = QTensor.quantize(torch.empty(shape), spec)
    assert q.dequantize().shape == shape
    with pytest.raises(LowbitError, match="empty tensor is undefined"):
        quantization_error(torch.empty(shape), spec)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("value", [-2.5, 0.0, 1e-20, 3.0])
def test_one_element(shape: tuple[int, ...], value: float) -> None:
    q = QTensor.quantize(torch.full(shape, value), UINT8)
    assert q.dequantize().shape == shape
    assert q.dequantize().item() == pytest.approx(value, rel=1e-6, abs=2**-60)


@all_specs
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(spec: QuantSpec, value: float) -> None:
    x = torch.ones(4, 4)
    x[1, 1] = value
    for call in (QTensor.quantize, quantization_error):
        with pytest.raises(LowbitError, match=r"holds \d NaN and \d infinite values; .* finite numbers"):
            call(x, spec)


def test_half_precision_equals_torch() -> None:
    x = normal(50, 3) * 1000
    q = QTensor.quantize(x, FP16)
    assert torch.equal(q.dequantize(), x.half().float())
    assert q.nbytes == 2 * x.numel()


def test_range_is_taken_as_given() -> None:
    x = torch.tensor([-1.0, 0.2, 5.0])
    q = QTensor.quantize(x, UINT8, (torch.tensor([0.0]), torch.tensor([1.0])))
    assert q.codes.tolist() == [0, 51, 255]
    with pytest.raises(LowbitError, match="scale of shape"):
        QTensor.quantize(normal(3, 4), INT8, (torch.tensor([[0.0]]), torch.tensor([[1.0]])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_float_types(dtype: torch.dtype) -> None:
    x = normal(4, 8).to(dtype)
    assert torch.equal(QTensor.quantize(x, INT8).codes, QTensor.quantize(x.float(), INT8).codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_those_of_the_packed_codes(bits: int) -> None:
    x = normal(5, 7)
    q = QTensor.quantize(x, QuantSpec(bits=bits, signed=False, symmetric=False, granularity=PerChannel(0)))
    assert q.nbytes == pack(q.codes, bits).numel() + 5 * 4 + 5 * 4


@pytest.mark.parametrize(
    ("bits", "signed", "width"), [(9, True, 2), (12, True, 2), (16, True, 2), (16, False, 4)]
)
def test_bytes_of_wide_codes_are_whole(bits: int, signed: bool, width: int) -> None:
    q = QTensor.quantize(normal(5, 7), QuantSpec(bits=bits, signed=signed))
    assert q.nbytes == q.codes.element_size() * 35 + 4 == width * 35 + 4


def test_parts_that_do_not_fit() -> None:
    q = QTensor.quantize(normal(3, 4), UINT8)
    with pytest.raises(LowbitError, match=r"scale of shape \[1\] does not fit codes of shape \[3, 4\]"):
        replace(q, scale=torch.ones(1))
    with pytest.raises(LowbitError, match=r"zero point of shape \[4\] does not fit"):
        replace(q, zero_point=torch.zeros(4))
    with pytest.raises(LowbitError, match=r"codes are torch\.int8; uint8\+zp/tensor asks for torch\.uint8"):
        replace(q, codes=q.codes.to(torch.int8))
    with pytest.raises(LowbitError, match="a zero point goes with an asymmetric spec"):
        replace(q, zero_point=None)
    with pytest.raises(LowbitError, match="a zero point goes with an asymmetric spec"):
        replace(QTensor.quantize(normal(3, 4), INT4), zero_point=torch.zeros(3, 1))


@all_specs
def test_error_against_plain_python(spec: QuantSpec) -> None:
    x = normal(4, 6)
    q = QTensor.quantize(x, spec)
    pairs = list(zip(x.flatten().tolist(), q.dequantize().flatten().tolist(), strict=True))
    mse = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    power = sum(a * a for a, _ in pairs) / len(pairs)
    error = quantization_error(x, spec)
    assert error.mae == pytest.approx(sum(abs(a - b) for a, b in pairs) / len(pairs))
    assert error.max == max(abs(a - b) for a, b in pairs)
    assert error.mse == pytest.approx(mse)
    assert error.relative == pytest.approx(math.sqrt(mse / power))
    assert error.sqnr_db == pytest.approx(10 * math.log10(power / mse))
    if spec.kind == "int":
        steps = q.scale.flatten().tolist()
        assert error.theoretical_mse == pytest.approx(sum(s * s for s in steps) / len(steps) / 12)


@pytest.mark.parametrize(
    "spec",
    [
        *(QuantSpec(bits=bits) for bits in (2, 4, 8, 12)),
        QuantSpec(bits=4, symmetric=False),
        QuantSpec(bits=5, granularity=PerChannel(0)),
        QuantSpec(bits=5, granularity=PerGroup(1, 10_000)),
        QuantSpec(bits=6, scale="pow2", rounding="half_up"),
    ],
    ids=str,
)
def test_theory_of_uniform_data(spec: QuantSpec) -> None:
    """scale^2 / 12 is what is measured where every step is evenly filled."""
    shape = (4, 50_000)
    ends = torch.arange(1.0, 5.0)[:, None].expand(4, spec.scale_shape(shape)[1])[: spec.scale_shape(shape)[0]]
    scale, zero_point = choose_qparams(-ends, ends, spec)
    codes = torch.randint(spec.qmin, spec.qmax + 1, shape) + torch.rand(shape) - 0.5
    codes -= 0 if zero_point is None else expand_to(zero_point, shape)
    error = quantization_error(codes * expand_to(scale, shape), spec, (-ends, ends))
    assert error.mse == pytest.approx(error.theoretical_mse, rel=0.02)


@pytest.mark.parametrize("bits", [6, 8, 10, 12])
@pytest.mark.parametrize("symmetric", [True, False])
def test_theory_of_uniform_data_over_the_whole_range(bits: int, symmetric: bool) -> None:
    x = torch.rand(400_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    error = quantization_error(x, QuantSpec(bits=bits, symmetric=symmetric))
    assert error.mse == pytest.approx(error.theoretical_mse, rel=0.05)
    assert error.max <= math.sqrt(12 * error.theoretical_mse) * (0.5 + (not symmetric) * 0.5) * 1.0001


def test_theory_of_half_precision() -> None:
    """Even over each octave, down to the subnormal numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.exp2(torch.randint(-16, 15, (400_000,), generator=generator).float())
    x *= 1 + torch.rand(len(x), generator=generator)
    for octave in (x, x[x < 2**-14], x[(x >= 1) & (x < 2)]):
        error = quantization_error(octave, FP16)
        assert error.mse == pytest.approx(error.theoretical_mse, rel=0.03, abs=0)


def test_each_bit_is_worth_six_decibels() -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sqnr = [quantization_error(x, QuantSpec(bits=bits, narrow=True)).sqnr_db for bits in range(5, 13)]
    for a, b in itertools.pairwise(sqnr):
        assert b - a == pytest.approx(20 * math.log10(2), abs=0.5)


@pytest.mark.parametrize(
    ("signal", "noise", "decibels"),
    [(1.0, 0.1, 10.0), (1.0, 1.0, 0.0), (1.0, 0.0, math.inf), (0.0, 0.0, math.inf), (0.0, 1.0, -math.inf)],
)
def test_sqnr(signal: float, noise: float, decibels: float) -> None:
    assert sqnr_db(signal, noise) == pytest.approx(decibels)

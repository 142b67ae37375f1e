"""QuantSpec: the codes it allows, the shapes of its scales, what it refuses, and its plain data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import FP16, INT4, INT8, UINT8, LowbitError, PerChannel, PerGroup, PerTensor, QuantSpec
from lowbit.core.spec import expand_to

granularities = st.one_of(
    st.just(PerTensor()),
    st.builds(PerChannel, st.integers(-3, 3)),
    st.builds(PerGroup, st.integers(-3, 3), st.integers(1, 64)),
)


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    if draw(st.booleans()):
        scale = draw(st.sampled_from(["float", "pow2"]))
        where = draw(granularities)
        return QuantSpec(bits=draw(st.integers(1, 7)), mid_rise=True, scale=scale, granularity=where)
    signed = draw(st.booleans())
    bits = draw(st.integers(2 if signed else 1, 16))
    return QuantSpec(
        bits=bits,
        signed=signed,
        symmetric=draw(st.booleans()),
        granularity=draw(granularities),
        narrow=signed and draw(st.booleans()),
        scale=draw(st.sampled_from(["float", "pow2"])),
        rounding=draw(st.sampled_from(["half_even", "half_up"])),
    )


@pytest.mark.parametrize(
    ("spec", "qmin", "qmax", "dtype"),
    [
        (QuantSpec(bits=8), -128, 127, torch.int8),
        (QuantSpec(bits=8, narrow=True), -127, 127, torch.int8),
        (QuantSpec(bits=8, signed=False), 0, 255, torch.uint8),
        (QuantSpec(bits=1, signed=False), 0, 1, torch.uint8),
        (QuantSpec(bits=1, symmetric=False), -1, 0, torch.int8),
        (QuantSpec(bits=2, narrow=True), -1, 1, torch.int8),
        (QuantSpec(bits=1, mid_rise=True), -1, 1, torch.int8),
        (QuantSpec(bits=2, mid_rise=True), -3, 3, torch.int8),
        (QuantSpec(bits=7, mid_rise=True), -127, 127, torch.int8),
        (QuantSpec(bits=9), -256, 255, torch.int16),
        (QuantSpec(bits=15, signed=False), 0, 32767, torch.int16),
        (QuantSpec(bits=16), -32768, 32767, torch.int16),
        (QuantSpec(bits=16, signed=False), 0, 65535, torch.int32),
    ],
    ids=str,
)
def test_codes(spec: QuantSpec, qmin: int, qmax: int, dtype: torch.dtype) -> None:
    assert (spec.qmin, spec.qmax, spec.dtype) == (qmin, qmax, dtype)
    assert FP16.dtype == torch.float16


@given(specs())
def test_every_code_fits_the_dtype(spec: QuantSpec) -> None:
    info = torch.iinfo(spec.dtype)
    assert info.min <= spec.qmin < spec.qmax <= info.max
    assert (spec.qmax - spec.qmin) // spec.step + 1 == 2**spec.bits - spec.narrow
    assert spec.qmax < 1 << spec.code_bits - spec.signed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, "bits=0 is not a whole number from 1 to 16"),
        ({"bits": 17}, "bits=17"),
        ({"bits": 8.0}, r"bits=8\.0"),
        ({"bits": "8"}, "bits='8'"),
        ({"bits": 8, "kind": "ternery"}, "kind='ternery' is unknown; use one of int, float"),
        ({"bits": 8, "scale": "log"}, "scale='log' is unknown; use one of float, pow2"),
        ({"bits": 8, "rounding": "down"}, "rounding='down' is unknown; use one of half_even, half_up"),
        ({"bits": 8, "signed": "no"}, "signed='no' is unknown; use one of True, False"),
        ({"bits": 8, "granularity": "channel"}, "granularity='channel' is unknown; use PerTensor"),
        ({"bits": 8, "kind": "float"}, "kind='float' has 16 bits, not 8; use FP16"),
        ({"bits": 8, "signed": False, "narrow": True}, "use signed=True"),
        ({"bits": 8, "mid_rise": True}, "odd codes of 7 bits fill a byte; use fewer"),
        ({"bits": 2, "mid_rise": True, "signed": False}, "mid_rise=True has codes symmetric about 0"),
        ({"bits": 2, "mid_rise": True, "symmetric": False}, "mid_rise=True"),
        ({"bits": 2, "mid_rise": True, "narrow": True}, "mid_rise=True"),
        ({"bits": 2, "mid_rise": 1.5}, r"mid_rise=1\.5 is unknown"),
        ({"bits": 1}, "no positive value exists; use signed=False"),
        ({"bits": 1, "symmetric": False, "narrow": True}, "narrow=False"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        QuantSpec(**fields)


@pytest.mark.parametrize(
    ("granularity", "shape", "scale_shape"),
    [
        (PerTensor(), (), ()),
        (PerTensor(), (4,), (1,)),
        (PerTensor(), (4, 6, 2), (1, 1, 1)),
        (PerChannel(0), (4, 6, 2), (4, 1, 1)),
        (PerChannel(1), (4, 6, 2), (1, 6, 1)),
        (PerChannel(-1), (4, 6, 2), (1, 1, 2)),
        (PerChannel(0), (0, 3), (0, 1)),
        (PerGroup(1, 3), (4, 6, 2), (4, 2, 1)),
        (PerGroup(0, 2), (4, 6, 2), (2, 1, 1)),
        (PerGroup(-1, 2), (4, 6, 2), (4, 1, 1)),
        (PerGroup(1, 6), (4, 6), (4, 1)),
        (PerGroup(1, 1), (4, 6), (4, 6)),
    ],
    ids=repr,
)
def test_scale_shape(granularity: Any, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> None:
    assert QuantSpec(bits=8, granularity=granularity).scale_shape(shape) == scale_shape


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (
            PerGroup(1, 48),
            (8, 100),
            "group size 48 does not divide the 100 entries of axis 1 .*; use 50 or 25",
        ),
        (PerGroup(1, 4), (8, 7), "use 7 or 1"),
        (PerGroup(1, 32), (8, 3, 3, 3), "does not divide the 3 entries"),
        (PerGroup(2, 1), (8, 3), "axis 2 does not exist in a tensor of shape"),
        (PerChannel(2), (8, 3), "axis 2 does not exist"),
        (PerChannel(-3), (8, 3), "axis -3 does not exist"),
        (PerChannel(0), (), "axis 0 does not exist"),
    ],
    ids=repr,
)
def test_shapes_that_do_not_fit(granularity: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        QuantSpec(bits=8, granularity=granularity).scale_shape(shape)


def test_the_cure_for_a_group_size_works() -> None:
    with pytest.raises(LowbitError) as caught:
        PerGroup(1, 48).scale_shape((8, 100))
    for size in str(caught.value).split("use ")[1].split(" or "):
        assert PerGroup(1, int(size)).scale_shape((8, 100)) == (8, 100 // int(size))


@pytest.mark.parametrize("size", [0, -4])
def test_group_size_must_be_positive(size: int) -> None:
    with pytest.raises(LowbitError, match=f"group size {size} is not positive"):
        PerGroup(1, size)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (INT8, "int8/channel"),
        (INT4, "int4/channel"),
        (UINT8, "uint8+zp/tensor"),
        (FP16, "fp16"),
        (QuantSpec(bits=3, granularity=PerGroup(1, 32), scale="pow2"), "int3/group32/pow2"),
    ],
)
def test_as_text(spec: QuantSpec, text: str) -> None:
    assert str(spec) == text


@given(specs())
def test_plain_data_round_trip(spec: QuantSpec) -> None:
    data = spec.to_dict()
    assert QuantSpec.from_dict(data) == spec
    assert all(isinstance(v, (int, str, dict)) for v in data.values())


def test_granularity_by_name() -> None:
    assert QuantSpec.from_dict({"bits": 8, "granularity": "channel"}) == INT8
    assert QuantSpec.from_dict({"bits": 8}) == QuantSpec(bits=8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"bits": 8, "granularity": "row"},
            "granularity 'row' is unknown; use one of tensor, channel, group",
        ),
        ({"bits": 8, "granularity": {"axis": 1}}, "granularity None is unknown"),
        ({"bits": 8, "granularity": {"per": "tensor", "axis": 1}}, "not a quantization spec"),
        ({"bits": 8, "width": 4}, "not a quantization spec: .*width"),
        ({}, "not a quantization spec: .*bits"),
    ],
    ids=str,
)
def test_plain_data_that_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        QuantSpec.from_dict(data)


def test_a_spec_is_a_value() -> None:
    assert QuantSpec(bits=8, granularity=PerChannel(0)) == INT8
    assert len({INT8, QuantSpec(bits=8, granularity=PerChannel(0)), INT4}) == 2
    with pytest.raises(AttributeError):
        INT8.bits = 4  # type: ignore[misc]


def test_expand_to_repeats_groups_only() -> None:
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert expand_to(scale, (2, 6)).tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]
    channel = torch.ones(2, 1)
    assert expand_to(channel, (2, 6)) is channel

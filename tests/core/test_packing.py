"""Packing: every code comes back, at the promised number of bytes, in the documented order of bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import LowbitError, QuantSpec
from lowbit.core import packing
from lowbit.core.packing import pack, pack_codes, pack_trits, unpack, unpack_codes, unpack_trits

widths = pytest.mark.parametrize("bits", range(1, 9))
signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def as_codes(values: list[int], bits: int, signed: bool) -> torch.Tensor:
    """The lowest `bits` bits of each value, read as a code of that width."""
    lowest = -(1 << bits >> 1) if signed else 0
    codes = [(v - lowest) % (1 << bits) + lowest for v in values]
    return torch.tensor(codes, dtype=torch.int8 if signed else torch.uint8)


def plain_stream(codes: list[int], bits: int) -> list[int]:
    """The bytes of one long integer that holds the codes side by side, the first lowest."""
    word = sum((code % (1 << bits)) << (i * bits) for i, code in enumerate(codes))
    return list(word.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


@given(st.lists(st.integers(0, 255), max_size=50), st.integers(1, 8), st.booleans())
def test_round_trip(values: list[int], bits: int, signed: bool) -> None:
    codes = as_codes(values, bits, signed)
    packed = pack(codes, bits)
    assert packed.tolist() == plain_stream(codes.tolist(), bits)
    back = unpack(packed, bits, tuple(codes.shape), signed=signed)
    assert back.dtype == codes.dtype
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_odd_codes_take_no_more_bits(bits: int) -> None:
    spec = QuantSpec(bits=bits, mid_rise=True)
    codes = torch.arange(spec.qmin, spec.qmax + 1, 2, dtype=torch.int8).repeat(3)
    packed = pack_codes(codes, spec)
    assert len(packed) == math.ceil(len(codes) * bits / 8)
    back = unpack_codes(packed, spec, tuple(codes.shape))
    assert back.dtype == codes.dtype
    assert torch.equal(back, codes)


@widths
@signs
def test_every_code_in_every_place(bits: int, signed: bool) -> None:
    """All codes at all eight offsets within a byte, padding of every length included."""
    for start in range(8):
        codes = as_codes(list(range(start, start + (1 << bits) + 1)), bits, signed)
        assert torch.equal(unpack(pack(codes, bits), bits, (len(codes),), signed=signed), codes)


@widths
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_bytes(bits: int, count: int) -> None:
    codes = torch.zeros(count, dtype=torch.uint8)
    assert pack(codes, bits).numel() == math.ceil(count * bits / 8)


def test_three_bit_codes_take_three_bits() -> None:
    assert pack(torch.zeros(8000, dtype=torch.int8), 3).numel() == 3000


def test_padding_is_zero() -> None:
    assert pack(torch.tensor([-1], dtype=torch.int8), 3).tolist() == [0b111]
    assert pack(torch.tensor([7, 7, 7], dtype=torch.uint8), 3).tolist() == [255, 1]


@signs
def test_chunks_join(monkeypatch: pytest.MonkeyPatch, signed: bool) -> None:
    monkeypatch.setattr(packing, "_CHUNK", 16)
    for bits in range(1, 9):
        for count in (15, 16, 17, 32, 50):
            codes = as_codes([37 * i for i in range(count)], bits, signed)
            packed = pack(codes, bits)
            assert packed.tolist() == plain_stream(codes.tolist(), bits)
            assert torch.equal(unpack(packed, bits, (count,), signed=signed), codes)


def test_shapes_and_views() -> None:
    codes = torch.arange(24, dtype=torch.int8).reshape(2, 3, 4).transpose(0, 2)
    assert torch.equal(unpack(pack(codes, 6), 6, (4, 3, 2), signed=True), codes)
    scalar = torch.tensor(5, dtype=torch.uint8)
    assert torch.equal(unpack(pack(scalar, 4), 4, (), signed=False), scalar)
    assert unpack(pack(codes[:0], 5), 5, (0, 7), signed=True).shape == (0, 7)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.tensor([4], dtype=torch.int8), 3, r"codes from 4 to 4 do not fit 3 bits, which hold -4\.\.3"),
        (torch.tensor([-5, 3], dtype=torch.int8), 3, "codes from -5 to 3 do not fit"),
        (
            torch.tensor([1, 8], dtype=torch.uint8),
            3,
            r"codes from 1 to 8 do not fit 3 bits, which hold 0\.\.7",
        ),
        (torch.tensor([1], dtype=torch.int16), 8, "packing takes int8 or uint8"),
        (torch.tensor([1], dtype=torch.int8), 0, "1 to 8 bits, not 0"),
        (torch.tensor([1], dtype=torch.int8), 12, "not 12; wider codes are stored as whole bytes"),
    ],
    ids=["high", "low", "unsigned", "dtype", "no-bits", "wide"],
)
def test_what_cannot_be_packed(codes: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        pack(codes, bits)


@pytest.mark.parametrize(
    ("packed", "bits", "message"),
    [
        (torch.zeros(3, dtype=torch.uint8), 3, "3 bytes .* cannot hold 10 codes of 3 bits; 4 bytes"),
        (torch.zeros(5, dtype=torch.uint8), 3, "5 bytes"),
        (torch.zeros(4, dtype=torch.int8), 3, r"torch\.int8 cannot hold"),
        (torch.zeros(10, dtype=torch.uint8), 9, "1 to 8 bits, not 9"),
    ],
    ids=["short", "long", "dtype", "wide"],
)
def test_streams_that_are_refused(packed: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        unpack(packed, bits, (10,), signed=True)


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=60))
def test_five_ternary_codes_to_a_byte(values: list[int]) -> None:
    codes = torch.tensor(values, dtype=torch.int8)
    packed = pack_trits(codes)
    assert packed.numel() == math.ceil(len(values) / 5)
    assert torch.equal(unpack_trits(packed, (len(values),)), codes)
    assert [
        sum((v + 1) * 3**i for i, v in enumerate(values[k : k + 5])) for k in range(0, len(values), 5)
    ] == (packed.tolist())


def test_what_is_not_base_3() -> None:
    with pytest.raises(LowbitError, match="codes from -2 to 1 are not ternary; pack them in bits"):
        pack_trits(torch.tensor([-2, 1], dtype=torch.int8))
    with pytest.raises(LowbitError, match=r"2 bytes of torch\.uint8 cannot hold 5 ternary codes; 1 bytes"):
        unpack_trits(torch.zeros(2, dtype=torch.uint8), (5,))
    with pytest.raises(LowbitError, match="byte 243 stands for no five ternary codes"):
        unpack_trits(torch.tensor([243], dtype=torch.uint8), (5,))

"""What products of bits refuse, before a library reads past anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowbit import LowbitError
from lowbit.kernels import bits, bits_layouts


def matrix(floats: bool = False) -> bits.PackedWeight:
    return bits.pack_weight(torch.ones(4, 8), floats=floats)


def images() -> bits.PackedInput:
    return bits.pack_signs(torch.ones(1, 8, 3, 3))


def kernel(**more: Any) -> Any:
    return bits.conv2d(images(), bits.pack_weight(torch.ones(4, 8, 3, 3)), **more)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "float64": (lambda: bits.pack_signs(torch.ones(2, 8).double()), r"float64.*use \.float\(\)"),
    "float64-sums": (lambda: bits.linear(torch.ones(2, 8).double(), matrix(True)), r"use \.float\(\)"),
    "int32-codes": (lambda: bits.pack_codes(torch.ones(2, 8).int()), r"int32.*\.to\(torch\.int8\)"),
    "bits": (lambda: bits.pack_codes(torch.ones(2, 8).char(), bits=1), "int8 codes of 1 bits; use 2 to 8"),
    "meta": (lambda: bits.pack_signs(torch.ones(2, 8, device="meta")), "on 'meta'"),
    "gradient": (lambda: bits.pack_signs(torch.ones(2, 8, requires_grad=True)), "inference_mode"),
    "vector": (lambda: bits.pack_signs(torch.ones(8)), r"shape \(8,\)"),
    "groups": (lambda: bits.pack_signs(torch.ones(2, 8), groups=3), "3 groups of 8 channels"),
    "no-channels": (lambda: bits.pack_signs(torch.ones(2, 0)), "of 0 channels"),
    "words": (
        lambda: bits.PackedInput(words=torch.zeros(2, 1).long(), channels=65, kind="sign"),
        r"shape \(2, 1\) for 1 bits of 65 channels in 1 groups; give torch.int64 of shape \[\.\.\., 2\]",
    ),
    "weight-values": (lambda: bits.pack_weight(torch.full((2, 2), 2)), "other than -1, 0 and 1"),
    "weight-fractions": (lambda: bits.pack_weight(torch.full((2, 2), 0.5)), "other than -1, 0 and 1"),
    "weight-nan": (lambda: bits.pack_weight(torch.full((2, 2), float("nan"))), "other than -1, 0 and 1"),
    "weight-shape": (lambda: bits.pack_weight(torch.ones(2, 2, 2)), r"shape \(2, 2, 2\)"),
    "weight-empty": (lambda: bits.pack_weight(torch.ones(2, 0)), r"shape \(2, 0\)"),
    "weight-groups": (lambda: bits.pack_weight(torch.ones(4, 2, 1, 1), groups=3), "3 groups do not divide 4"),
    "linear-groups": (lambda: bits.pack_weight(torch.ones(4, 2), groups=2), "2 groups of a linear layer"),
    "inputs": (lambda: bits.linear(bits.pack_signs(torch.ones(2, 9)), matrix()), "9 channels in 1 groups"),
    "floats-to-bits": (lambda: bits.linear(torch.ones(2, 8), matrix()), "floats=True"),
    "bits-to-floats": (lambda: bits.linear(bits.pack_signs(torch.ones(2, 8)), matrix(True)), "floats=False"),
    "images-to-linear": (lambda: bits.linear(images(), matrix()), "use conv2d"),
    "matrix-to-conv": (lambda: bits.conv2d(images(), matrix()), "use linear"),
    "window": (lambda: kernel(dilation=2), "is larger than an image"),
    "stride": (lambda: kernel(stride=0), "the stride is 0"),
    "padding": (lambda: kernel(padding=(1, -1)), "the padding is"),
    "pad-code": (lambda: kernel(padding=1, pad_code=1), "pad_code 1 of signs"),
    "pad-code-range": (
        lambda: bits.conv2d(
            bits.pack_codes(torch.ones(1, 8, 3, 3).byte(), bits=2),
            bits.pack_weight(torch.ones(4, 8, 3, 3)),
            padding=1,
            pad_code=4,
        ),
        "pad_code 4 is no unsigned code of 2 bits; use 0 to 3",
    ),
    "scale": (
        lambda: kernel(end=bits.Affine(scale=torch.ones(3))),
        r"scale is torch.float32 of shape \(3,\)",
    ),
    "threshold": (lambda: kernel(end=bits.Threshold(threshold=torch.ones(4))), "threshold is torch.float32"),
    "threshold-kind": (
        lambda: kernel(end=bits.Threshold(threshold=torch.ones(4).int(), kind="signed")),
        "one bit is no code of kind 'signed'",
    ),
    "threshold-floats": (
        lambda: bits.linear(torch.ones(2, 8), matrix(True), bits.Threshold(threshold=torch.ones(4).int())),  # type: ignore[call-overload]
        "meets sums of floats",
    ),
    "pool-codes": (
        lambda: bits.max_pool2d(bits.pack_codes(torch.ones(1, 8, 3, 3).byte()), 2),
        "unsigned codes of 8 bits",
    ),
    "pool-padding": (lambda: bits.max_pool2d(images(), 2, padding=2), "passes half of the kernel"),
}


@pytest.mark.parametrize(("call", "says"), BAD.values(), ids=BAD)
def test_bad_input(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(LowbitError, match=says):
        call()


def test_sums_that_pass_32_bits() -> None:
    w = matrix()
    long = bits.PackedWeight(
        panels=w.panels,
        shape=(4, 2**24),
        groups=1,
        unit=w.unit,
        negative=w.negative,
        nonzero=w.nonzero,
        tap_sums=w.tap_sums,
    )
    x = bits.PackedInput(words=torch.zeros(1, 8 * 2**18).long(), channels=2**24, kind="unsigned", bits=8)
    with pytest.raises(LowbitError, match="pass 2\\^31 - 1; split the layer or use fewer bits"):
        bits.linear(x, long)


def test_weights_packed_for_another_processor() -> None:
    w = bits.pack_weight(torch.ones(4, 8))
    other = bits_layouts.pack_weight(torch.ones(4, 8), unit=1 if w.unit == 8 else 8)
    with pytest.raises(LowbitError, match=r"use pack_weight\(unpack_weight\(w\)"):
        bits.linear(bits.pack_signs(torch.ones(2, 8)), other)


def test_gradients_are_not_wanted() -> None:
    x = torch.ones(2, 8, requires_grad=True)
    with torch.no_grad():
        assert bits.pack_signs(x).words.tolist() == [[255], [255]]

"""Products of bits against those of the codes in float64, on every path of this processor and in PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit import LowbitError
from lowbit.kernels import bits, bits_native
from lowbit.kernels.native import BITS, Library

library = bits_native.library()
TORCH = "torch"
RUNS = (TORCH, *BITS.paths[: library.best + 1]) if library else (TORCH,)


@pytest.fixture(params=RUNS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What computes: PyTorch, or a set of loops."""
    use(request.param, monkeypatch)
    yield request.param
    assert request.param in bits.description()


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == TORCH:
        monkeypatch.setattr(bits_native, "_loaded", "not wanted by torch")
        return
    assert isinstance(bits_native._loaded, Library)
    monkeypatch.setattr(bits_native._loaded, "path", BITS.paths.index(name))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def weights(shape: tuple[int, ...], kind: str) -> Tensor:
    codes = torch.randint(0, 2, shape) * 2 - 1
    return codes if kind == "binary" else torch.where(torch.rand(shape) < 0.3, 0, codes)


def signs(shape: tuple[int, ...], groups: int) -> tuple[bits.PackedInput, Tensor]:
    x = torch.randn(shape)
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45])
    if x.numel() > 20:
        x.view(-1)[: len(odd)] = odd
    return bits.pack_signs(x, groups=groups), torch.where(x >= 0, 1, -1)


def one_bit(shape: tuple[int, ...], groups: int) -> tuple[bits.PackedInput, Tensor]:
    codes = torch.randint(0, 2, shape)
    return bits.pack_bits(codes.float(), groups=groups), codes


def int_codes(least: int, most: int, dtype: torch.dtype, n: int) -> Callable[..., Any]:
    def make(shape: tuple[int, ...], groups: int) -> tuple[bits.PackedInput, Tensor]:
        codes = torch.randint(least, most + 1, shape)
        return bits.pack_codes(codes.to(dtype), bits=n, groups=groups), codes

    return make


# makers of packed activations and their codes; the code they are padded with
INPUTS: dict[str, tuple[Callable[..., Any], int]] = {
    "signs": (signs, 0),
    "bits": (one_bit, 0),
    "uint2": (int_codes(0, 3, torch.uint8, 2), 2),
    "int3": (int_codes(-4, 3, torch.int8, 3), -3),
    "uint8": (int_codes(0, 255, torch.uint8, 8), 117),
    "int8": (int_codes(-128, 127, torch.int8, 8), -128),
}
every_input = pytest.mark.parametrize("name", INPUTS)
every_weight = pytest.mark.parametrize("kind", ["binary", "ternary"])
# rows, inputs, outputs
SIZES = {
    "one": (1, 1, 1),
    "no-rows": (0, 65, 3),
    "63": (3, 63, 7),
    "64": (4, 64, 8),
    "65": (5, 65, 9),
    "127": (2, 127, 31),
    "128": (8, 128, 32),
    "129": (9, 129, 33),
    "row-of-many": (1, 1000, 200),
    "tall": (70, 40, 65),
    "deep": (3, 2100, 100),
}
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
# images, groups, weights, and what conv2d takes beside
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], dict[str, Any]]] = {
    "1x1": ((2, 70, 5, 4), 1, (9, 70, 1, 1), {}),
    "1x1-stride": ((2, 64, 5, 6), 1, (9, 64, 1, 1), {"stride": 2}),
    "1x1-padded": ((1, 65, 3, 3), 1, (33, 65, 1, 1), {"padding": 1}),
    "3x3": ((2, 65, 6, 7), 1, (40, 65, 3, 3), {"padding": 1}),
    "3x3-words": ((1, 128, 9, 8), 1, (66, 128, 3, 3), {"padding": 1}),
    "3x3-valid": ((1, 30, 5, 5), 1, (3, 30, 3, 3), {}),
    "3x3-stride": ((2, 33, 8, 7), 1, (17, 33, 3, 3), {"stride": (2, 1), "padding": (1, 2)}),
    "dilated": ((1, 20, 9, 10), 1, (5, 20, 3, 3), {"dilation": (2, 3), "padding": (2, 3)}),
    "5x2": ((1, 12, 7, 7), 1, (6, 12, 5, 2), {"padding": (2, 0)}),
    "1x7-wide": ((1, 3, 4, 9), 1, (4, 3, 1, 7), {"padding": (0, 3)}),
    "7x7-first": ((1, 3, 16, 16), 1, (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "all-padding": ((1, 8, 1, 1), 1, (4, 8, 3, 3), {"padding": 3}),
    "groups": ((2, 140, 5, 5), 2, (70, 70, 3, 3), {"padding": 1}),
    "groups-of-words": ((1, 256, 4, 4), 4, (12, 64, 3, 3), {"padding": 1}),
    "depthwise": ((2, 9, 6, 6), 9, (9, 1, 3, 3), {"padding": 1}),
    "depthwise-2": ((1, 5, 6, 6), 5, (10, 1, 3, 3), {"padding": 1, "stride": 2}),
    "no-images": ((0, 64, 5, 5), 1, (8, 64, 3, 3), {"padding": 1}),
}
every_convolution = pytest.mark.parametrize(
    ("shape", "groups", "weight", "more"), CONVOLUTIONS.values(), ids=CONVOLUTIONS
)


def reference(x: Tensor, w: Tensor, groups: int, more: dict[str, Any], pad_code: int) -> Tensor:
    """The convolution of codes, exact in float64."""
    more = dict(more)
    padding = more.pop("padding", 0)
    high, wide = padding if isinstance(padding, tuple) else (padding, padding)
    framed = F.pad(x.double(), (wide, wide, high, high), value=pad_code)
    if not framed.shape[0]:
        return F.conv2d(framed.new_zeros(1, *framed.shape[1:]), w.double(), groups=groups, **more)[:0].int()
    return F.conv2d(framed, w.double(), groups=groups, **more).int()


@every_input
@every_size
def test_packing_keeps_every_code(path: str, size: tuple[int, int, int], name: str) -> None:
    rows, channels, _ = size
    packed, codes = INPUTS[name][0]((rows, channels), 1)
    assert torch.equal(bits.unpack_input(packed).long(), codes)
    for groups in (1, 3):
        packed, codes = INPUTS[name][0]((rows, 3 * channels, 2, 5), groups)
        assert torch.equal(bits.unpack_input(packed).long(), codes)


@every_weight
@every_size
def test_weights_come_back(path: str, size: tuple[int, int, int], kind: str) -> None:
    for floats in (False, True):
        for shape, groups in ((size[:0:-1], 1), ((2 * size[2], size[1], 3, 2), 2)):
            codes = weights(shape, kind)
            packed = bits.pack_weight(codes.float(), groups=groups, floats=floats)
            assert torch.equal(bits.unpack_weight(packed).long(), codes)
            assert packed.ternary == bool((codes == 0).any())


@every_weight
@every_input
@every_size
def test_linear_is_the_product_of_codes(path: str, size: tuple[int, int, int], name: str, kind: str) -> None:
    rows, inputs, outputs = size
    x, codes = INPUTS[name][0]((rows, inputs), 1)
    w = weights((outputs, inputs), kind)
    assert torch.equal(bits.linear(x, bits.pack_weight(w)), (codes.double() @ w.double().T).int())


@every_weight
@every_input
@every_convolution
def test_convolution_is_that_of_codes(
    path: str, shape: Any, groups: int, weight: Any, more: Any, name: str, kind: str
) -> None:
    make, pad_code = INPUTS[name]
    x, codes = make(shape, groups)
    w = weights(weight, kind)
    y = bits.conv2d(x, bits.pack_weight(w, groups=groups), pad_code=pad_code, **more)
    assert torch.equal(y, reference(codes, w, groups, more, pad_code))


@every_weight
@every_convolution
def test_ends(path: str, shape: Any, groups: int, weight: Any, more: Any, kind: str) -> None:
    x, codes = signs(shape, groups)
    w = weights(weight, kind)
    packed, acc = bits.pack_weight(w, groups=groups), reference(codes, w, groups, more, 0)
    scale, bias = torch.randn(weight[0]), torch.randn(weight[0])
    line = bits.conv2d(x, packed, bits.Affine(scale=scale, bias=bias), **more)
    assert torch.equal(line, acc.float() * scale[:, None, None] + bias[:, None, None])
    assert torch.equal(
        bits.conv2d(x, packed, bits.Affine(scale=scale), **more), acc.float() * scale[:, None, None]
    )
    threshold = torch.randint(-9, 10, (weight[0],), dtype=torch.int32)
    threshold[0] = -(2**31)
    flip = torch.rand(weight[0]) < 0.5
    for kind_out in ("sign", "unsigned"):
        end = bits.Threshold(threshold=threshold, flip=flip, kind=kind_out)
        found = bits.unpack_input(bits.conv2d(x, packed, end, **more))
        set_ = (acc >= threshold[:, None, None]) != flip[:, None, None]
        assert torch.equal(found, (2 * set_.int() - 1) if kind_out == "sign" else set_.int())


@every_weight
@every_size
def test_ends_of_linear(path: str, size: tuple[int, int, int], kind: str) -> None:
    rows, inputs, outputs = size
    x, codes = one_bit((rows, inputs), 1)
    w = weights((outputs, inputs), kind)
    acc = (codes.double() @ w.double().T).int()
    scale, bias = torch.randn(outputs), torch.randn(outputs)
    packed = bits.pack_weight(w)
    assert torch.equal(
        bits.linear(x, packed, bits.Affine(scale=scale, bias=bias)), acc.float() * scale + bias
    )
    y = bits.linear(x, packed, bits.Threshold(threshold=torch.ones(outputs, dtype=torch.int32)))
    assert torch.equal(bits.unpack_input(y), torch.where(acc >= 1, 1, -1).int())
    # what comes out goes in
    again = weights((5, outputs), kind)
    expected = torch.where(acc >= 1, 1.0, -1.0).double() @ again.double().T
    assert torch.equal(bits.linear(y, bits.pack_weight(again)), expected.int())


@every_weight
@every_size
def test_floats_that_are_whole_numbers(path: str, size: tuple[int, int, int], kind: str) -> None:
    rows, inputs, outputs = size
    x, w = torch.randint(-9, 10, (rows, inputs)).float(), weights((outputs, inputs), kind)
    packed = bits.pack_weight(w, floats=True)
    y, scale, bias = x @ w.float().T, torch.randn(outputs), torch.randn(outputs)
    assert torch.equal(bits.linear(x, packed), y)
    assert torch.equal(bits.linear(x, packed, bits.Affine(scale=scale, bias=bias)), y * scale + bias)


@every_weight
@every_convolution
def test_convolution_of_floats(path: str, shape: Any, groups: int, weight: Any, more: Any, kind: str) -> None:
    x, w = torch.randint(-9, 10, shape).float(), weights(weight, kind)
    packed = bits.pack_weight(w, groups=groups, floats=True)
    assert torch.equal(bits.conv2d(x, packed, **more), reference(x, w, groups, more, 0).float())


@every_weight
def test_sums_of_floats_have_one_order(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    x, w = torch.randn(6, 140) * torch.logspace(-3, 3, 140), weights((50, 140), kind)
    images, w_images = torch.randn(2, 6, 5, 7), weights((20, 3, 3, 3), kind)
    found = []
    for name in RUNS:
        use(name, monkeypatch)
        found.append(bits.linear(x, bits.pack_weight(w, floats=True)))
        packed = bits.pack_weight(w_images, groups=2, floats=True)
        found.append(bits.conv2d(images, packed, padding=1))
        monkeypatch.undo()
    products, expected = x[:, None] * w, torch.zeros(6, 50)
    for block in products.split(32, -1):
        part = torch.zeros(6, 50)
        for term in block.unbind(-1):
            part = part + term
        expected = expected + part
    for y, y_images in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(y, expected)
        assert torch.equal(y_images, found[1])
    torch.testing.assert_close(found[1], F.conv2d(images, w_images.float(), padding=1, groups=2))


def test_a_weight_of_0_leaves_out_what_is_not_finite(path: str) -> None:
    x = torch.tensor([[float("inf"), 2.0, float("nan"), 3.0]])
    w = torch.tensor([[0, 1, 0, -1], [1, 0, 0, 0], [-1, 0, 0, 1]])
    y = bits.linear(x, bits.pack_weight(w, floats=True))
    assert y.tolist() == [[-1.0, float("inf"), -float("inf")]]


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: torch.cat([x, x], dim=3)[..., ::2],
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
    "row-major": lambda x: x.clone(),
}


@pytest.mark.parametrize("stretch", STRIDES.values(), ids=STRIDES)
def test_strides(path: str, stretch: Callable[[Tensor], Tensor]) -> None:
    x = stretch(torch.randn(2, 70, 4, 9))
    codes, w = torch.where(x >= 0, 1, -1), weights((10, 70, 3, 3), "ternary")
    assert torch.equal(bits.unpack_input(bits.pack_signs(x)).long(), codes)
    whole = stretch(torch.randint(-8, 8, (2, 70, 4, 9)).to(torch.int8))
    assert torch.equal(bits.unpack_input(bits.pack_codes(whole, bits=4)).int(), whole.int())
    y = bits.conv2d(whole.float(), bits.pack_weight(w, floats=True), padding=1)
    assert torch.equal(y, reference(whole, w, 1, {"padding": 1}, 0).float())
    rows = bits.pack_signs(x[:, :, 0].transpose(1, 2))
    matrix = weights((3, 70), "binary")
    expected = codes[:, :, 0].transpose(1, 2).double() @ matrix.double().T
    assert torch.equal(bits.linear(rows, bits.pack_weight(matrix)), expected.int())
    # a slice of what is packed
    packed = bits.pack_signs(x)
    part = bits.PackedInput(words=packed.words[:, ::2], channels=70, kind="sign")
    expected = reference(codes[:, :, ::2], w, 1, {"padding": 1}, 0)
    assert torch.equal(bits.conv2d(part, bits.pack_weight(w), padding=1), expected)


POOLS: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "2x2": ((2, 70, 6, 8), 2, {}),
    "3x3-stride-2": ((1, 64, 7, 9), 3, {"stride": 2, "padding": 1}),
    "1x3": ((1, 3, 5, 6), (1, 3), {"stride": (2, 1), "padding": (0, 1)}),
    "whole": ((3, 130, 4, 4), 4, {}),
    "no-images": ((0, 3, 4, 4), 2, {}),
}


@pytest.mark.parametrize("make", [signs, one_bit], ids=["signs", "bits"])
@pytest.mark.parametrize(("shape", "kernel", "more"), POOLS.values(), ids=POOLS)
def test_pooling_of_bits(path: str, shape: Any, kernel: Any, more: Any, make: Callable[..., Any]) -> None:
    x, codes = make(shape, 1)
    found = bits.unpack_input(bits.max_pool2d(x, kernel, **more))
    if shape[0]:
        assert torch.equal(found.float(), F.max_pool2d(codes.float(), kernel, **more))
    assert found.shape[0] == shape[0]


@given(
    st.sampled_from(RUNS),
    st.sampled_from(sorted(INPUTS)),
    st.sampled_from(["binary", "ternary"]),
    st.tuples(*[st.integers(1, n) for n in (2, 80, 7, 7, 40)]),
    st.tuples(*[st.integers(1, 3)] * 4),
    st.integers(0, 2),
    st.sampled_from([1, 2, 3]),
)
def test_any_convolution(
    run: str, name: str, kind: str, extents: Any, window: Any, padding: int, groups: int
) -> None:
    n, channels, height, width, outputs = extents
    kernel_height, kernel_width, stride, dilation = window
    more = {"stride": stride, "padding": padding, "dilation": dilation}
    too_large = any(
        size + 2 * padding <= dilation * (k - 1)
        for size, k in ((height, kernel_height), (width, kernel_width))
    )
    with pytest.MonkeyPatch.context() as patch:
        use(run, patch)
        make, pad_code = INPUTS[name]
        x, codes = make((n, channels * groups, height, width), groups)
        w = weights((outputs * groups, channels, kernel_height, kernel_width), kind)
        packed = bits.pack_weight(w, groups=groups)
        if too_large:
            with pytest.raises(LowbitError, match="is larger than an image"):
                bits.conv2d(x, packed, pad_code=pad_code, **more)
            return
        y = bits.conv2d(x, packed, pad_code=pad_code, **more)
    assert torch.equal(y, reference(codes, w, groups, more, pad_code))


def test_a_sum_longer_than_sixteen_bits(path: str) -> None:
    """All bits match, over more than 65535 of them: no count on the way may overflow."""
    inputs = 70_003
    for value in (1, -1):
        w = torch.full((33, inputs), value)
        x = bits.pack_signs(torch.full((2, inputs), float(value)))
        assert torch.equal(
            bits.linear(x, bits.pack_weight(w)), torch.full((2, 33), inputs, dtype=torch.int32)
        )
        w[:, 0] = 0
        y = bits.linear(x, bits.pack_weight(w))
        assert torch.equal(y, torch.full((2, 33), inputs - 1, dtype=torch.int32))


@pytest.mark.skipif(library is None, reason=bits.description())
@pytest.mark.parametrize("rows", [1, 700], ids=["outputs", "rows"])
def test_threads_share_the_work(two_threads: None, rows: int) -> None:
    inputs, outputs = 2000, 200 if rows > 1 else 4100
    x, codes = INPUTS["int8"][0]((rows, inputs), 1)
    w = weights((outputs, inputs), "ternary")
    packed, acc = bits.pack_weight(w), (codes.float() @ w.float().T).int()
    assert torch.equal(bits.linear(x, packed), acc)
    y = bits.linear(x, packed, bits.Threshold(threshold=torch.zeros(outputs, dtype=torch.int32)))
    assert torch.equal(bits.unpack_input(y), torch.where(acc >= 0, 1, -1).int())
    whole = codes.float()
    assert torch.equal(bits.linear(whole, bits.pack_weight(w, floats=True)), acc.float())


@pytest.mark.skipif(library is None, reason=bits.description())
def test_callers_at_the_same_time_do_not_wait_for_each_other(two_threads: None) -> None:
    x, codes = signs((512, 1024), 1)
    w = weights((1024, 1024), "binary")
    packed, expected = bits.pack_weight(w), (codes.float() @ w.float().T).int()

    def call(_: int) -> bool:
        torch.set_num_threads(2)
        return torch.equal(bits.linear(x, packed), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40)))


FORK = """
import os, torch
from lowbit.kernels import bits

torch.set_num_threads(2)
x, w = torch.randn(512, 1024), bits.pack_weight(torch.ones(1024, 1024))
before = bits.linear(bits.pack_signs(x), w).numpy()
child = os.fork()
after = bits.linear(bits.pack_signs(x), w).numpy()
if child == 0:
    os._exit(not (before == after).all())
assert os.waitpid(child, 0)[1] == 0 and (before == after).all()
"""


@pytest.mark.skipif(library is None or not hasattr(os, "fork"), reason="no native kernels, or no fork")
def test_a_child_of_a_process_with_threads_has_its_own() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)

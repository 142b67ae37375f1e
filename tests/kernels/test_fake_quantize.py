"""The compiled loops against the formula in PyTorch: forward bit for bit, gradients in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit import LowbitError, kernels
from lowbit.kernels import operators
from lowbit.kernels.native import PATHS, Library, load

library = load()
compiled = pytest.mark.skipif(not kernels.available(), reason=kernels.description())
RUNS = PATHS[: library.best + 1] if isinstance(library, Library) else PATHS[:1]
every_path = pytest.mark.parametrize("path", RUNS, indirect=True)
# shape of x, shape of the scale
LAYOUTS = {
    **{f"tensor-{n}": ((n,), (1,)) for n in (0, 1, 7, 15, 16, 17, 600, 1_000_003)},
    "scalar-scale": ((3, 5), ()),
    "channel-0": ((5, 3, 3, 3), (5, 1, 1, 1)),
    "channel-0-of-many": ((70, 4, 8, 8), (70, 1, 1, 1)),
    "axis-1": ((3, 6, 7, 5), (1, 6, 1, 1)),
    "axis-1-empty": ((0, 6, 7, 5), (1, 6, 1, 1)),
    "axis-1-long": ((2, 3, 700), (1, 3, 1)),
    "group": ((6, 96), (6, 3)),
    "group-of-odd": ((9, 21), (9, 7)),
    "group-of-one-row": ((1, 96), (1, 6)),
    "rows-in-groups": ((8, 10), (4, 1)),
}
every_layout = pytest.mark.parametrize(("shape", "scale_shape"), LAYOUTS.values(), ids=LAYOUTS)
# with a type, codes have zero points of that type; "odd" are those of a mid-rise quantizer
ODD = "odd"
RANGES: dict[str, tuple[int, int, torch.dtype | str | None]] = {
    "signed-8": (-128, 127, None),
    "narrow-8": (-127, 127, None),
    "unsigned-4": (0, 15, None),
    "binary": (0, 1, None),
    "sign": (-1, 1, ODD),
    "mid-rise-2": (-3, 3, ODD),
    "mid-rise-7": (-127, 127, ODD),
    "zero-point-2": (0, 3, torch.int32),
    "zero-point-4": (-8, 7, torch.int32),
    "zero-point-8": (0, 255, torch.float32),
    "zero-point-16": (-32768, 32767, torch.int64),
}


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    assert isinstance(operators._loaded, Library)
    monkeypatch.setattr(operators._loaded, "path", PATHS.index(request.param))
    yield request.param
    assert operators.description() == f"native, {request.param}"


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def widened(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One scale for each element."""
    if scale.numel() == 1:
        return scale.reshape(())
    for d, n in enumerate(shape):
        if scale.shape[d] != n:
            index = torch.arange(n) * scale.shape[d] // max(n, 1)
            scale = scale.index_select(d, index)
    return scale


def formula(
    x: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int, odd: bool = False
) -> tuple[Tensor, Tensor]:
    """The result, and what is inside."""
    s = widened(scale, tuple(x.shape))
    if odd:
        v = x / s
        codes = (2 * torch.floor(v / 2) + 1).clamp(qmin, qmax)
        return codes * s, (qmin - 1 <= v) & (v <= qmax + 1)
    z = 0 if zero is None else widened(zero, tuple(x.shape)).to(x.dtype)
    v = x / s
    codes = v.round()
    if zero is not None:
        codes = codes + z
    codes = codes.clamp(qmin, qmax)
    if zero is not None:
        codes = codes - z
    return codes * s, (qmin - z <= v) & (v <= qmax - z)


def gradients(
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    qmin: int,
    qmax: int,
    inside_scale: bool,
    odd: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gx, then in float64 for each element that of the scale and that of the zero point, and the magnitude.

    What is inside is decided in float32, as the formula says: on the edge of the range the gradient jumps.
    """
    y, inside = formula(x, scale, zero, qmin, qmax, odd)
    s = widened(scale, tuple(x.shape)).double()
    c, v, g64 = (y.double() / s).round(), (x / widened(scale, tuple(x.shape))).double(), g.double()
    ds = torch.where(inside, c - v if inside_scale else 0.0, c)
    return torch.where(inside, g, 0.0), g64 * ds, torch.where(inside, 0.0, -g64 * s), (g64 * ds).abs()


def summed(each: Tensor, scale_shape: tuple[int, ...]) -> Tensor:
    if not scale_shape or scale_shape == (1,):
        return each.sum().reshape(scale_shape)
    split = [m for n, k in zip(each.shape, scale_shape, strict=True) for m in (k, n // k)]
    return each.reshape(split).sum(dim=list(range(1, 2 * each.ndim, 2)))


def unpacked(mask: Tensor, n: int) -> Tensor:
    """Bits in the order of memory."""
    return ((mask.reshape(-1, 1) >> torch.arange(8)) & 1).bool().flatten()[:n]


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32)


def case(
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    qmin: int,
    qmax: int,
    zero_type: torch.dtype | str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x over three times the range, with ties and edges; the first elements are zeros and not finite."""
    scale = torch.rand(scale_shape) * 0.2 + 0.01
    zero = None
    if isinstance(zero_type, torch.dtype):
        zero = torch.randint(qmin, qmax + 1, scale_shape).to(zero_type)
    steps = (torch.rand(shape) - 0.5) * 3 * (qmax - qmin)
    ties = torch.randint(0, 3, shape)
    steps = torch.where(ties == 0, steps, torch.where(ties == 1, steps.round(), steps.floor() + 0.5))
    x = steps * widened(scale, shape)
    odd = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, -1e-45])
    if x.numel() > 100:
        x.view(-1)[: len(odd)] = odd
    return x, scale, zero


def check_forward(shape: Any, scale_shape: Any, name: str) -> None:
    """All that gives or takes the mask, too."""
    qmin, qmax, zero_type = RANGES[name]
    x, scale, zero = case(shape, scale_shape, qmin, qmax, zero_type)
    odd = zero_type == ODD
    y, inside = formula(x, scale, zero, qmin, qmax, odd)
    assert kernels.supports(x, scale)
    assert torch.equal(bits(kernels.fake_quantize(x, scale, zero, qmin, qmax, odd)), bits(y)), name
    masked, mask = kernels.fake_quantize_masked(x, scale, zero, qmin, qmax, odd)
    assert torch.equal(bits(masked), bits(y)), name
    assert mask.shape == ((x.numel() + 7) // 8,)
    assert torch.equal(unpacked(mask, x.numel()), inside.flatten()), name
    g = torch.randn(shape)
    gx = kernels.fake_quantize_masked_backward(g, mask)
    assert torch.equal(bits(gx), bits(torch.where(inside, g, 0.0))), name


def check_backward(shape: Any, scale_shape: Any, name: str, inside_scale: bool) -> None:
    qmin, qmax, zero_type = RANGES[name]
    x, scale, zero = case(shape, scale_shape, qmin, qmax, zero_type)
    x, g = x.nan_to_num().clamp(-1e6, 1e6), torch.randn(shape)
    odd = zero_type == ODD
    gx, gs, gz, size = gradients(g, x, scale, zero, qmin, qmax, inside_scale, odd)
    found = kernels.fake_quantize_backward(g, x, scale, zero, qmin, qmax, inside_scale, True, odd)
    assert torch.equal(bits(found[0]), bits(gx)), name
    for got, each, reach in zip(found[1:], (gs, gz), (size, gz.abs()), strict=True):
        assert got.shape == scale.shape
        error = (got.double() - summed(each, scale_shape)).abs()
        assert (error <= 1e-6 * summed(reach, scale_shape) + 1e-40).all(), (name, float(error.max()))
    without = kernels.fake_quantize_backward(g, x, scale, zero, qmin, qmax, inside_scale, False, odd)
    assert torch.equal(without[1], found[1])
    assert not without[2].any()


@compiled
@every_path
@every_layout
def test_forward_is_the_formula(path: str, shape: Any, scale_shape: Any) -> None:
    for name in RANGES:
        check_forward(shape, scale_shape, name)


@compiled
@every_path
@every_layout
@pytest.mark.parametrize("inside_scale", [True, False], ids=["lsq", "pact"])
def test_backward_is_the_formula(path: str, shape: Any, scale_shape: Any, inside_scale: bool) -> None:
    for name in RANGES:
        check_backward(shape, scale_shape, name, inside_scale)


@compiled
@pytest.mark.parametrize(
    ("shape", "scale_shape"),
    [((1_000_003,), (1,)), ((1001, 1001), (1001, 1)), ((1001, 1001), (1001, 7)), ((3, 5, 70001), (1, 5, 1))],
    ids=["tensor", "channel-0", "group", "axis-1"],
)
def test_threads_share_the_work(shape: Any, scale_shape: Any, two_threads: None) -> None:
    for name in ("unsigned-4", "zero-point-4"):
        check_forward(shape, scale_shape, name)
        check_backward(shape, scale_shape, name, True)


@compiled
@given(
    st.integers(1, 16),
    st.booleans(),
    st.lists(st.floats(width=32), max_size=40),
    st.floats(2.0**-60, 2.0**60),
)
def test_forward_of_any_numbers(n_bits: int, signed: bool, values: list[float], step: float) -> None:
    qmin, qmax = (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)
    x, scale = torch.tensor(values, dtype=torch.float32), torch.tensor([step])
    for zero in (None, torch.tensor([(qmin + qmax) // 2], dtype=torch.int32)):
        y, inside = formula(x, scale, zero, qmin, qmax)
        got, mask = kernels.fake_quantize_masked(x, scale, zero, qmin, qmax)
        assert torch.equal(bits(got), bits(y))
        assert torch.equal(unpacked(mask, len(values)), inside)


STRIDES = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: torch.cat([x, x], dim=3)[..., ::2],
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}


@compiled
@pytest.mark.parametrize("stretch", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize(
    "scale_shape", [(1,), (6, 1, 1, 1), (1, 10, 1, 1)], ids=["tensor", "axis-0", "axis-1"]
)
def test_strides_of_x_and_of_its_gradient(stretch: Any, scale_shape: tuple[int, ...]) -> None:
    x, scale, zero = case((6, 10, 4, 4), scale_shape, -8, 7, torch.int32)
    x, g = stretch(x.nan_to_num().clamp(-1e6, 1e6)), torch.randn(6, 10, 4, 4)
    y, inside = formula(x, scale, zero, -8, 7)
    kept = stretch is STRIDES["channels-last"] and scale_shape != (1, 10, 1, 1)
    got, mask = kernels.fake_quantize_masked(x, scale, zero, -8, 7)
    assert torch.equal(got, y)
    assert got.stride() == (x.stride() if kept else x.contiguous().stride())
    assert torch.equal(kernels.fake_quantize(x, scale, zero, -8, 7), y)
    for grad in (g, g.contiguous(memory_format=torch.channels_last), STRIDES["expanded"](g)):
        expected = torch.where(inside, grad, 0.0)
        gx, gs, _ = kernels.fake_quantize_backward(grad, x, scale, zero, -8, 7, True, False)
        assert torch.equal(kernels.fake_quantize_masked_backward(grad, mask), expected)
        assert torch.equal(gx, expected)
        assert gx.stride() == got.stride()
        each = gradients(grad, x, scale, zero, -8, 7, True)[1]
        torch.testing.assert_close(gs.double(), summed(each, scale_shape), rtol=1e-5, atol=1e-5)


@compiled
def test_sums_are_the_same_every_time(two_threads: None) -> None:
    x, g, scale = torch.randn(2_000_001), torch.randn(2_000_001), torch.tensor([0.1])
    first, second = (kernels.fake_quantize_backward(g, x, scale, None, -8, 7, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("order", ["row-major", "channels-last"])
def test_operators_keep_the_rules_of_torch(order: str) -> None:
    x, scale, zero = case((2, 4, 3, 5), (1,), -8, 7, torch.int32)
    x = x.nan_to_num().clamp(-1e6, 1e6)
    if order == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    g, ops = torch.randn_like(x), torch.ops.lowbit
    _, mask = kernels.fake_quantize_masked(x, scale, zero, -8, 7)
    torch.library.opcheck(ops.fake_quantize.default, (x, scale, zero, -8, 7))
    torch.library.opcheck(ops.fake_quantize_masked.default, (x, scale, None, -8, 7))
    torch.library.opcheck(ops.fake_quantize_masked_backward.default, (g, mask))
    torch.library.opcheck(ops.fake_quantize_backward.default, (g, x, scale, zero, -8, 7, True, True))


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        y, mask = kernels.fake_quantize_masked(x, scale, None, -8, 7)
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return kernels.fake_quantize_masked_backward(g, ctx.saved_tensors[0]), None


@compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_graph_gives_the_same() -> None:
    scale = torch.tensor([0.1])

    def network(x: Tensor) -> Tensor:
        return Clipped.apply(x * 2, scale).sin()

    grads = []
    for run in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
        x = torch.linspace(-1, 1, 60).reshape(4, 15).requires_grad_()
        run(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])


LEFT_TO_TORCH = {
    "float64": (torch.zeros(4, 4, dtype=torch.float64), torch.ones(1)),
    "bfloat16": (torch.zeros(4, 4, dtype=torch.bfloat16), torch.ones(1)),
    "float64-scale": (torch.zeros(4, 4), torch.ones(1, dtype=torch.float64)),
    "meta": (torch.zeros(4, 4, device="meta"), torch.ones(1)),
    "last-axis": (torch.zeros(4, 4), torch.ones(1, 4)),
    "rank": (torch.zeros(4, 4), torch.ones(4)),
    "no-divisor": (torch.zeros(4, 4), torch.ones(3, 1)),
    "two-axes": (torch.zeros(4, 4, 4), torch.ones(4, 1, 2)),
    "x-learns": (torch.zeros(4, 4, requires_grad=True), torch.ones(1)),
    "scale-learns": (torch.zeros(4, 4), torch.ones(1, requires_grad=True)),
}


@compiled
@pytest.mark.parametrize(("x", "scale"), LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_what_is_left_to_torch(x: Tensor, scale: Tensor) -> None:
    assert not kernels.supports(x, scale)


@compiled
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x, s: kernels.fake_quantize(x.double(), s, None, 0, 1), "float64"),
        (lambda x, s: kernels.fake_quantize(x, torch.ones(1, 4), None, 0, 1), r"scale of shape \(1, 4\)"),
        (lambda x, s: kernels.fake_quantize(x, s, torch.zeros(2), 0, 1), "2 zero points for 1 scales"),
        (lambda x, s: kernels.fake_quantize(x, s, torch.zeros(1), -1, 1, True), "no zero point"),
        (
            lambda x, s: kernels.fake_quantize_masked_backward(x, torch.zeros(1, dtype=torch.uint8)),
            "mask of 1",
        ),
        (
            lambda x, s: kernels.fake_quantize_backward(x[:2], x, s, None, 0, 1, True, False),
            r"shape \(2, 4\)",
        ),
    ],
    ids=["float64", "layout", "zero-points", "odd", "mask", "gradient"],
)
def test_bad_arguments_never_reach_the_library(call: Any, says: str) -> None:
    with pytest.raises(LowbitError, match=says):
        call(torch.zeros(4, 4), torch.ones(1))


PROGRAM = """
import torch
from lowbit import kernels
print(kernels.available(), kernels.supports(torch.ones(3), torch.ones(1)), kernels.description())
"""


def started(wish: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LOWBIT_KERNELS": wish}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )


def test_the_variable_turns_it_off() -> None:
    assert started("off").stdout.strip() == "False False pure torch: LOWBIT_KERNELS is off"
    refused = started("never")
    assert refused.returncode != 0
    assert "LOWBIT_KERNELS is 'never'; set it to on or off" in refused.stderr

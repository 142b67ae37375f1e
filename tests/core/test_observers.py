"""Every observer: exact merge, one pass, constant memory, growth, and its range against the data itself."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit import INT8, UINT8, LowbitError, PerChannel, PerGroup, QuantSpec, quantization_error
from lowbit.core.observers import HistogramObserver, Observer, observers
from lowbit.core.ranges import PERCENTILES

NAMES = ("minmax", "moving_average", "percentile", "adaptive_percentile", "kl", "mse")
PER_TENSOR = QuantSpec(bits=8, symmetric=False)
PER_CHANNEL = QuantSpec(bits=8, symmetric=False, granularity=PerChannel(1))
every_observer = pytest.mark.parametrize("name", NAMES)
both_granularities = pytest.mark.parametrize("spec", [PER_TENSOR, PER_CHANNEL], ids=["tensor", "channel"])


def observed(name: str, spec: QuantSpec, batches: list[Tensor]) -> Observer:
    observer = observers.get(name)(spec)
    for x in batches:
        observer.update(x)
    return observer


def tensors(thing: object) -> dict[str, Any]:
    """Everything an observer holds: tensors, numbers, and those of its histogram."""
    held = dict(vars(thing))
    if "histogram" in held:
        held |= {f"histogram.{k}": v for k, v in vars(held.pop("histogram")).items()}
    return held


def assert_same(a: Observer, b: Observer) -> None:
    """Equal in every bit."""
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        assert same, key


def activations(batches: int = 4, seed: int = 0, channels: int = 3, positive: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.5, 3.0, channels)[:, None, None]
    data = [torch.randn(8, channels, 10, 10, generator=generator) * spread for _ in range(batches)]
    return [x.relu() for x in data] if positive else data


def test_the_names() -> None:
    assert observers.names() == tuple(sorted(NAMES))


values = st.floats(-(2.0**60), 2.0**60, width=32)
batch_lists = st.lists(
    st.lists(st.lists(values, min_size=2, max_size=2), min_size=1, max_size=4), min_size=1, max_size=6
)


@every_observer
@both_granularities
@given(batch_lists, st.data())
@settings(max_examples=25)
def test_merge_of_two_halves_equals_one_pass(
    name: str, spec: QuantSpec, batches: list[list[list[float]]], data: st.DataObject
) -> None:
    """State and range, bit for bit, wherever the data is cut; an empty half included."""
    x = [torch.tensor(b) for b in batches]
    cut = data.draw(st.integers(0, len(x)))
    first, second, whole = (observed(name, spec, part) for part in (x[:cut], x[cut:], x))
    untouched = copy.deepcopy(second)
    first.merge(second)
    assert_same(first, whole)
    assert_same(second, untouched)
    assert all(torch.equal(a, b) for a, b in zip(first.range(), whole.range(), strict=True))


@every_observer
@both_granularities
def test_merge_goes_on_as_one(name: str, spec: QuantSpec) -> None:
    """Three shards in order, then more data: what one observer would hold."""
    x = activations(7)
    merged = observed(name, spec, x[:2])
    for shard in (x[2:3], x[3:5]):
        merged.merge(observed(name, spec, shard))
    for batch in x[5:]:
        merged.update(batch)
    assert_same(merged, observed(name, spec, x))


@every_observer
def test_merge_of_what_was_seen_in_inference_mode(name: str) -> None:
    x = activations(4)
    with torch.inference_mode():
        first, second = observed(name, PER_TENSOR, x[:2]), observed(name, PER_TENSOR, x[2:])
    first.merge(second)
    assert_same(first, observed(name, PER_TENSOR, x))


@every_observer
@both_granularities
def test_deterministic(name: str, spec: QuantSpec) -> None:
    one, other = (observed(name, spec, activations()).range() for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "moving_average"])
@both_granularities
def test_growth_equals_all_data_at_once(name: str, spec: QuantSpec) -> None:
    """A range that grows after the first batch, by a little and by far, ends as if it had been known."""
    x = [batch * scale for batch, scale in zip(activations(4), (1e-3, 1.0, 40.0, 1e5), strict=True)]
    growing, known = observed(name, spec, x), observed(name, spec, [torch.cat(x)])
    assert all(torch.equal(a, b) for a, b in zip(growing.range(), known.range(), strict=True))
    assert growing.range()[1].max().item() > 1e4


@every_observer
def test_channels_are_observed_apart(name: str) -> None:
    x = activations()
    lo, hi = observed(name, PER_CHANNEL, x).range()
    assert lo.shape == hi.shape == (1, 3, 1, 1)
    for c in range(3):
        alone = observed(name, PER_TENSOR, [b[:, c : c + 1] for b in x]).range()
        assert (lo[0, c].item(), hi[0, c].item()) == (alone[0].item(), alone[1].item())


def held_bytes(observer: Observer) -> int:
    """Of the storages, so that a view of an activation would count with all of it."""
    return sum(v.untyped_storage().nbytes() for v in tensors(observer).values() if isinstance(v, Tensor))


@every_observer
@both_granularities
def test_memory_is_constant(name: str, spec: QuantSpec) -> None:
    observer = observed(name, spec, activations(1))
    after_one = held_bytes(observer)
    for k in range(300):
        observer.update(torch.randn(2, 3, 4, 4) * 1.1**k)
    assert held_bytes(observer) == after_one
    assert after_one < 60_000 * (3 if spec is PER_CHANNEL else 1)


@every_observer
@both_granularities
def test_range_lies_within_the_data(name: str, spec: QuantSpec) -> None:
    x = activations()
    lo, hi = observed(name, spec, x).range()
    smallest, largest = observed("minmax", spec, x).range()
    assert (smallest <= lo).all()
    assert (lo < 0).all()
    assert (hi > 0).all()
    assert (hi <= largest).all()
    assert lo.dtype == hi.dtype == torch.float32


@every_observer
def test_one_sided_data_starts_at_zero(name: str) -> None:
    for sign in (1, -1):
        lo, hi = observed(name, UINT8, [sign * x for x in activations(positive=True)]).range()
        assert (lo.item() if sign == 1 else hi.item()) == 0


# -- each observer's own range


def test_minmax_against_the_data() -> None:
    x = activations()
    lo, hi = observed("minmax", PER_CHANNEL, x).range()
    everything = torch.cat(x)
    assert torch.equal(lo, everything.amin(dim=(0, 2, 3), keepdim=True))
    assert torch.equal(hi, everything.amax(dim=(0, 2, 3), keepdim=True))


@pytest.mark.parametrize("count", [1, 2, 7, 199, 200, 201, 450])
def test_moving_average_against_the_recursion(count: int) -> None:
    """S = 0.9 S + 0.1 x, divided by 1 - 0.9^t."""
    batches = [torch.randn(20) * (1 + k % 5) for k in range(count)]
    lo = hi = 0.0
    for x in batches:
        lo, hi = 0.9 * lo + 0.1 * x.min().item(), 0.9 * hi + 0.1 * x.max().item()
    correction = 1 - 0.9**count
    got = observed("moving_average", PER_TENSOR, batches).range()
    assert got[0].item() == pytest.approx(lo / correction, rel=1e-6)
    assert got[1].item() == pytest.approx(hi / correction, rel=1e-6)


def test_moving_average_of_equal_batches_is_their_range() -> None:
    x = activations(1)[0]
    lo, hi = observed("moving_average", PER_TENSOR, [x] * 11).range()
    assert (lo.item(), hi.item()) == (x.min().item(), x.max().item())


def test_percentile_against_numpy() -> None:
    x = activations(40)
    lo, hi = observed("percentile", PER_CHANNEL, x).range()
    everything = torch.cat(x).movedim(1, 0).flatten(1).double().numpy()
    want_lo, want_hi = np.quantile(everything, [0.00001, 0.99999], axis=1, method="inverted_cdf")
    np.testing.assert_allclose(lo.flatten(), want_lo, rtol=1 / 128)
    np.testing.assert_allclose(hi.flatten(), want_hi, rtol=1 / 128)


HEAVY = {
    "normal": lambda t: t,
    "heavy-tail": lambda t: t**3,
    "relu": torch.relu,
    "outliers": lambda t: torch.where(torch.rand(t.shape) < 1e-4, 30 * t, t),
}


def measured(x: Tensor, spec: QuantSpec, ends: tuple[Tensor, Tensor]) -> float:
    return quantization_error(x, spec, ends).mse


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", HEAVY)
def test_adaptive_percentile_is_the_best_of_them(kind: str, bits: int) -> None:
    """Exact quantiles of the raw data, each tried on the raw data."""
    x = HEAVY[kind](torch.randn(200_000))
    spec = QuantSpec(bits=bits, signed=False, symmetric=False)
    tried = []
    for share in (p / 100 for p in PERCENTILES):
        lo = -np.quantile(-x.numpy(), share, method="inverted_cdf")
        hi = np.quantile(x.numpy(), share, method="inverted_cdf")
        tried.append(measured(x, spec, (torch.tensor([min(lo, 0.0)]), torch.tensor([max(hi, 0.0)]))))
    chosen = measured(x, spec, observed("adaptive_percentile", spec, [x]).range())
    assert chosen <= 1.02 * min(tried)


def test_adaptive_percentile_follows_the_bits() -> None:
    """Fewer codes are worth more clipping."""
    x = [torch.randn(100_000)]
    ends = [
        observed("adaptive_percentile", replace(PER_TENSOR, bits=b), x).range()[1].item() for b in (2, 4, 8)
    ]
    assert ends == sorted(ends)
    assert ends[0] < ends[2]


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(bits=8), QuantSpec(bits=4), QuantSpec(bits=3, signed=False, symmetric=False), UINT8],
    ids=str,
)
@pytest.mark.parametrize("kind", HEAVY)
def test_mse_against_brute_force_over_the_raw_data(kind: str, spec: QuantSpec) -> None:
    x = HEAVY[kind](torch.randn(20_000))
    lo, hi = x.min()[None].clamp(max=0.0), x.max()[None]
    factors = [2 ** (-k / 6) for k in range(36)]
    pairs = [(a, b) for a in factors for b in (factors if lo < 0 and not spec.symmetric else [a])]
    pairs = [(a, b) for a, b in pairs if abs(math.log2(a / b)) <= 1]
    best = min(measured(x, spec, (lo * a, hi * b)) for a, b in pairs)
    assert measured(x, spec, observed("mse", spec, [x]).range()) <= 1.03 * best


@pytest.mark.parametrize("bits", [8, 4])
def test_mse_is_the_best_observer_by_its_own_measure(bits: int) -> None:
    x = torch.cat([b.flatten() for b in activations(8)]) ** 3
    spec = QuantSpec(bits=bits)
    errors = {name: measured(x, spec, observed(name, spec, [x]).range()) for name in NAMES}
    assert errors["mse"] <= 1.005 * min(errors.values())


def test_kl_ignores_what_hardly_occurs() -> None:
    x = torch.cat([torch.randn(200_000).abs(), torch.tensor([40.0])])
    lo, hi = observed("kl", UINT8, [x]).range()
    assert lo.item() == 0
    assert 4 < hi.item() < 10


# -- inputs of every kind


@every_observer
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(name: str, value: float) -> None:
    x = activations(2)
    observer = observed(name, PER_CHANNEL, x[:1])
    before = copy.deepcopy(observer)
    x[1][0, 0, 0, 0] = value
    with pytest.raises(LowbitError, match=r"a calibration tensor holds \d NaN and \d infinite values"):
        observer.update(x[1])
    assert_same(observer, before)


@every_observer
@pytest.mark.parametrize("value", [0.0, 2.0, -3.0])
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (1, 1, 1, 1)], ids=str)
def test_constants_and_single_values(name: str, value: float, shape: tuple[int, ...]) -> None:
    lo, hi = observed(name, PER_TENSOR, [torch.full(shape, value)]).range()
    assert lo.shape == hi.shape == (1,) * len(shape)
    assert min(lo.item(), 0.0) == min(value, 0.0)
    assert max(hi.item(), 0.0) == max(value, 0.0)


@every_observer
@both_granularities
def test_an_empty_batch_changes_nothing(name: str, spec: QuantSpec) -> None:
    x = activations(1)
    observer = observed(name, spec, [torch.empty(0, 3, 10, 10), *x, torch.empty(0, 3, 10, 10)])
    assert_same(observer, observed(name, spec, x))


@every_observer
def test_nothing_observed(name: str) -> None:
    for batches in ([], [torch.empty(0, 3)]):
        with pytest.raises(LowbitError, match="nothing was observed"):
            observed(name, PER_TENSOR, batches).range()


@every_observer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_float_types(name: str, dtype: torch.dtype) -> None:
    x = [b.to(dtype) for b in activations(2)]
    assert_same(observed(name, PER_CHANNEL, x), observed(name, PER_CHANNEL, [b.float() for b in x]))


@every_observer
@both_granularities
@pytest.mark.parametrize("batch", [1, 2])
def test_memory_layouts(name: str, spec: QuantSpec, batch: int) -> None:
    """Channels-last, slices, transposes and single columns hold the same values as their copies."""
    x = torch.randn(batch, 3, 4, 4)
    strided = [
        x.to(memory_format=torch.channels_last),
        x[:, :, ::2],
        x.transpose(2, 3),
        x.expand(2, batch, 3, 4, 4)[1],
        torch.randn(3, 1).T,
        torch.randn(7, 5).T[2:3, :3],
        torch.randn(4, 3)[::2],
    ]
    for view in strided:
        assert_same(
            observed(name, spec, [view]),
            observed(name, spec, [view.clone(memory_format=torch.contiguous_format)]),
        )


@every_observer
def test_gradients_are_not_held(name: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    held = tensors(observed(name, PER_CHANNEL, [x * 2])).values()
    assert not any(v.requires_grad for v in held if isinstance(v, Tensor))


@every_observer
def test_what_does_not_fit(name: str) -> None:
    with pytest.raises(LowbitError, match="no fixed groups; use PerTensor or PerChannel"):
        observers.get(name)(QuantSpec(bits=8, granularity=PerGroup(1, 2)))
    observer = observed(name, PER_CHANNEL, [torch.randn(2, 3)])
    with pytest.raises(LowbitError, match="a tensor with 4 channels follows one with 3"):
        observer.update(torch.randn(2, 4))
    with pytest.raises(LowbitError, match="axis 1 does not exist"):
        observer.update(torch.randn(3))
    with pytest.raises(LowbitError, match="4 channels cannot merge into 3"):
        observer.merge(observed(name, PER_CHANNEL, [torch.randn(2, 4)]))
    with pytest.raises(LowbitError, match="one kind and one spec"):
        observer.merge(observed(name, PER_TENSOR, [torch.randn(2, 3)]))
    other = "minmax" if name != "minmax" else "mse"
    with pytest.raises(LowbitError, match="one kind and one spec"):
        observer.merge(observed(other, PER_CHANNEL, [torch.randn(2, 3)]))


def test_tensors_of_several_ranks_share_a_tensor_observer() -> None:
    lo, hi = observed("minmax", PER_TENSOR, [torch.tensor([[-2.0, 1.0]]), torch.tensor([3.0])]).range()
    assert (lo.tolist(), hi.tolist()) == ([-2.0], [3.0])


def test_a_new_observer_is_one_method() -> None:
    class Half(HistogramObserver):
        def _choose(self, counts: Tensor, edges: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
            return lo / 2, hi / 2

    observer = observers.get(Half)(INT8)
    observer.update(torch.tensor([[-4.0, 2.0], [1.0, 6.0]]))
    lo, hi = observer.range()
    assert (lo.flatten().tolist(), hi.flatten().tolist()) == ([-2.0, 0.0], [1.0, 3.0])

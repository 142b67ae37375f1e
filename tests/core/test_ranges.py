"""Ranges against brute force: every end tried, every value quantized, every divergence summed by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import UINT8, PerChannel, PerGroup, QuantSpec
from lowbit.core import ranges
from lowbit.core.affine import choose_qparams, fake_quantize, group_amin_amax
from lowbit.core.histogram import FloatHistogram
from lowbit.core.observers import observers
from lowbit.core.ranges import histogram_error, kl_range, least_error_range_of, percentile_range


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=generator(seed))


def laplace(n: int) -> Tensor:
    return normal(n) * torch.empty(n).exponential_(generator=generator(1)).mul(2).sqrt()


DATA: dict[str, Callable[[int], Tensor]] = {
    "normal": normal,
    "relu": lambda n: normal(n).relu(),
    "gelu": lambda n: F.gelu(3 * normal(n)),
    "laplace": laplace,
    "lognormal": lambda n: normal(n).exp(),
    "cubed": lambda n: normal(n) ** 3,
    "one-outlier": lambda n: torch.cat([normal(n - 1), torch.tensor([40.0])]),
    "skewed": lambda n: torch.cat([-normal(n - 1).abs(), torch.tensor([20.0])]),
}
SPECS = [
    QuantSpec(bits=8),
    QuantSpec(bits=4),
    QuantSpec(bits=2),
    QuantSpec(bits=4, signed=False, symmetric=False),
    QuantSpec(bits=2, signed=False, symmetric=False),
    UINT8,
]


def histogram_of(x: Tensor) -> tuple[Tensor, Tensor]:
    histogram = FloatHistogram(1)
    histogram.add(x.reshape(1, -1), x.abs().max().item())
    return histogram.counts[0], histogram.edges()


def mean_square_errors(x: Tensor, lo: Tensor, hi: Tensor, spec: QuantSpec) -> Tensor:
    """Measured, for each of many ranges [n, 1]."""
    rows = x[None].expand(len(lo), -1)
    return (fake_quantize(rows, *choose_qparams(lo, hi, spec), spec) - rows).double().square().mean(dim=1)


def least_mean_square_error(x: Tensor, spec: QuantSpec) -> float:
    """Over a grid of shrunken ranges: each end apart where both count, else both together and finer."""
    lo, hi = x.min().clamp(max=0.0), x.max().clamp(min=0.0)
    if spec.symmetric or lo == 0 or hi == 0:
        factors = torch.exp2(-torch.arange(0, 9, 1 / 32))
        return mean_square_errors(x, lo * factors[:, None], hi * factors[:, None], spec).min().item()
    factors = torch.exp2(-torch.arange(0, 6, 1 / 8))
    a, b = torch.cartesian_prod(factors, factors).T
    return mean_square_errors(x, lo * a[:, None], hi * b[:, None], spec).min().item()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", DATA)
def test_least_error_against_brute_force(name: str, spec: QuantSpec) -> None:
    x = DATA[name](1000)
    lo, hi = least_error_range_of(x, spec)
    found = mean_square_errors(x, lo[None], hi[None], spec).item()
    assert found <= 1.15 * least_mean_square_error(x, spec)
    assert found <= mean_square_errors(x, x.min()[None, None], x.max()[None, None], spec).item()


def test_least_error_behind_a_plateau() -> None:
    """An outlier of 300 sigma takes all codes but zero: the error hardly changes until the range is small."""
    x = torch.cat([normal(2_000_000), torch.tensor([300.0])])
    spec = QuantSpec(bits=4)
    lo, hi = least_error_range_of(x, spec)
    assert hi.item() < 4
    assert mean_square_errors(x, lo[None], hi[None], spec).item() < 0.1


@pytest.mark.parametrize(
    "granularity", [PerChannel(0), PerChannel(1), PerGroup(1, 4), PerGroup(0, 2)], ids=repr
)
def test_each_scale_is_chosen_for_itself(granularity: PerChannel | PerGroup) -> None:
    x = normal(4 * 8 * 20).reshape(4, 8, 20) ** 3
    spec = QuantSpec(bits=3, granularity=granularity)
    lo, hi = least_error_range_of(x, spec)
    assert lo.shape == hi.shape == spec.scale_shape(x.shape)
    for at in itertools.product(*(range(n) for n in lo.shape)):
        sizes = [n // groups for n, groups in zip(x.shape, lo.shape, strict=True)]
        part = x[tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, sizes, strict=True))]
        alone = least_error_range_of(part, QuantSpec(bits=3))
        # up to the last bits of exp2, in which vectors of a processor differ from single numbers
        assert (lo[at].item(), hi[at].item()) == pytest.approx((alone[0].item(), alone[1].item()), rel=1e-12)


def test_importance_decides_what_is_clipped() -> None:
    x = torch.cat([normal(500), torch.tensor([10.0, -10.0])])
    spec = QuantSpec(bits=3)
    important = torch.ones(502)
    important[-2:] = 1000.0
    plain, weighted = (least_error_range_of(x, spec, w)[1].item() for w in (None, important))
    assert plain < 5
    assert weighted > 9
    ones = least_error_range_of(x, spec, torch.ones(1))
    assert ones[1].item() == plain


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 4), torch.empty(3, 0), torch.full((3, 4), 2.0)], ids=["zero", "empty", "flat"]
)
def test_least_error_of_degenerate_tensors(x: Tensor) -> None:
    spec = QuantSpec(bits=4, granularity=PerChannel(0))
    lo, hi = least_error_range_of(x, spec)
    q = fake_quantize(x, *choose_qparams(lo, hi, spec), spec)
    torch.testing.assert_close(q, x)


ERROR_SPECS = [
    *SPECS,
    QuantSpec(bits=3, narrow=True),
    QuantSpec(bits=5, signed=False),
    QuantSpec(bits=4, scale="pow2", rounding="half_up"),
    QuantSpec(bits=6, symmetric=False, scale="pow2"),
    QuantSpec(bits=16),
    QuantSpec(bits=6, rounding="floor"),
    QuantSpec(bits=4, symmetric=False, rounding="floor"),
]


@pytest.mark.parametrize("spec", ERROR_SPECS, ids=str)
@pytest.mark.parametrize("ends", [(-1.0, 1.5), (-0.3, 4.0), (-6.0, 0.2), (-8.0, 8.0)], ids=str)
def test_closed_form_error_against_monte_carlo(spec: QuantSpec, ends: tuple[float, float]) -> None:
    """Values drawn evenly within the bins of the histogram, quantized one by one."""
    counts, edges = histogram_of(torch.cat([normal(2000) * 2, torch.zeros(500)]))
    copies = 40
    left, width = (t.repeat_interleave(counts * copies) for t in (edges[:-1], edges.diff()))
    x = left + width * torch.rand(len(left), generator=generator(), dtype=torch.float64)
    lo, hi = (torch.tensor([end]) for end in ends)
    measured = (fake_quantize(x, *choose_qparams(lo, hi, spec), spec) - x).square().sum().item() / copies
    assert histogram_error(counts, edges, spec)(lo, hi).item() == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("name", DATA)
def test_percentile_against_numpy(name: str, percentile: float) -> None:
    """Within the width of the bin that holds the exact quantile: 1/128 of its value."""
    x = DATA[name](30_011)
    lo, hi = percentile_range(*histogram_of(x), percentile)
    numbers, share = x.double().numpy(), percentile / 100
    want_lo = -np.quantile(-numbers, share, method="inverted_cdf")
    want_hi = np.quantile(numbers, share, method="inverted_cdf")
    floor = x.abs().max().item() * 2**-23  # the bin of zero
    assert lo.item() == pytest.approx(want_lo, rel=1 / 128, abs=floor)
    assert hi.item() == pytest.approx(want_hi, rel=1 / 128, abs=floor)


def plain_threshold(magnitudes: list[float], top: float, bins: int, levels: int) -> float:
    """Migacz's search in plain Python, over raw magnitudes: every threshold, every bin, every level."""
    histogram = [0] * bins
    for m in magnitudes:
        histogram[min(int(m / top * bins), bins - 1)] += 1
    last = max(i for i, n in enumerate(histogram) if n)

    def divergence(n: int) -> float:
        p = [float(v) for v in histogram[:n]]
        q = [0.0] * n
        for level in range(levels):
            members = [i for i in range(n) if i * levels // n == level]
            filled = [i for i in members if histogram[i]]
            for i in filled:
                q[i] = sum(histogram[j] for j in members) / len(filled)
        p[-1] += sum(histogram[n:])
        smooth = 1e-4 / n
        p = [v / sum(p) + smooth for v in p]
        q = [v / max(sum(q), 1e-30) + smooth for v in q]
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / sum(p)

    return min(range(levels, last + 2), key=divergence) * top / bins


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["normal", "laplace", "lognormal", "one-outlier"])
def test_kl_against_plain_python(monkeypatch: pytest.MonkeyPatch, name: str, bits: int) -> None:
    """With 64 even bins up to a power of two each bin of the histogram lies within one: counts are exact."""
    monkeypatch.setattr(ranges, "KL_BINS", 64)
    x = DATA[name](3000)
    top = 2.0 ** math.ceil(math.log2(x.abs().max().item()))
    x = torch.cat([x, torch.tensor([top * 0.9999])])
    lo, hi = kl_range(*histogram_of(x), QuantSpec(bits=bits))
    assert hi.item() == -lo.item() == plain_threshold(x.abs().tolist(), top, 64, 2 ** (bits - 1))


N = 200_000
WITH_OUTLIERS = torch.tensor([20.0, 25.0, 30.0, 35.0, 40.0])


@pytest.mark.parametrize(
    ("x", "spec", "least", "most"),
    [
        (normal(N).abs(), UINT8, 0.9, 1.0),
        (normal(N).relu(), UINT8, 0.9, 1.0),
        (normal(N).abs(), QuantSpec(bits=8), 0.9, 1.0),
        (normal(N), QuantSpec(bits=8), 0.85, 1.0),
        (normal(N), UINT8, 0.85, 1.0),
        (torch.rand(N, generator=generator()), UINT8, 1.0, 1.0),
        (torch.cat([normal(N).abs(), WITH_OUTLIERS]), UINT8, 0.1, 0.25),
        (torch.cat([normal(N), WITH_OUTLIERS]), QuantSpec(bits=8), 0.1, 0.25),
        (normal(N).exp(), UINT8, 0.1, 0.5),
    ],
    ids=[
        "half-normal",
        "relu",
        "half-normal-signed",
        "signed",
        "signed-zero-point",
        "uniform",
        "half-normal-outliers",
        "signed-outliers",
        "heavy-tail",
    ],
)
def test_kl_clips_outliers_and_little_else(x: Tensor, spec: QuantSpec, least: float, most: float) -> None:
    """The threshold as a share of the largest magnitude."""
    hi = kl_range(*histogram_of(x), spec)[1].item()
    largest = x.abs().max().item()
    assert least * largest <= min(hi, largest) <= most * largest


def test_kl_gives_one_sided_data_every_code() -> None:
    """A zero point makes the same 256 levels of signed and unsigned codes, whichever side the data is on."""
    relu = normal(N).relu()
    signed = QuantSpec(bits=8, symmetric=False)
    thresholds = [kl_range(*histogram_of(x), s)[1].item() for x in (relu, -relu) for s in (UINT8, signed)]
    assert len(set(thresholds)) == 1
    assert kl_range(*histogram_of(relu), QuantSpec(bits=9))[1].item() == thresholds[0]


@pytest.mark.parametrize(
    "x", [torch.zeros(10), torch.ones(10), torch.tensor([3.0])], ids=["zero", "flat", "one"]
)
def test_kl_of_degenerate_tensors(x: Tensor) -> None:
    lo, hi = kl_range(*histogram_of(x), QuantSpec(bits=8))
    assert -lo.item() == hi.item() >= x.max().item()


def test_ends_have_the_shape_of_the_scale() -> None:
    x = normal(24).reshape(2, 3, 4)
    for granularity in (PerChannel(1), PerGroup(2, 2)):
        spec = QuantSpec(bits=4, symmetric=False, granularity=granularity)
        for ends in (group_amin_amax(x, spec), least_error_range_of(x, spec)):
            assert [tuple(end.shape) for end in ends] == [spec.scale_shape(x.shape)] * 2


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_what_would_wrap_is_kept_inside(bits: int) -> None:
    """Clipping an outlier costs little, wrapping it much."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=bits, scale="pow2", overflow="wrap")
    observer = observers.get("mse")(spec)
    observer.update(x)
    scale, _ = choose_qparams(*observer.range(), spec)
    error = (fake_quantize(x, scale, None, spec) - x).square().mean()
    best = min(
        (fake_quantize(x, torch.tensor([2.0**-k]), None, spec) - x).square().mean() for k in range(-4, 12)
    )
    assert error <= 2 * best

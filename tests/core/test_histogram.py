"""The histogram against NumPy's over the same edges, whatever the order and the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.core.histogram import HALF, FloatHistogram

floats = st.floats(-(2.0**100), 2.0**100, width=32)
tables = st.lists(st.lists(floats, min_size=2, max_size=2), min_size=1, max_size=12)


def counted(batches: list[Tensor], rows: int) -> FloatHistogram:
    histogram = FloatHistogram(rows)
    for x in batches:
        histogram.add(x, x.abs().max().item())
    return histogram


def plain_counts(row: Tensor, edges: Tensor) -> np.ndarray:
    """NumPy's count of magnitudes over the positive edges, for each sign; the rest is the bin of zero."""
    positive = edges[HALF + 1 :].numpy()
    x = row.double().numpy()
    up, down = (np.histogram(side[side >= positive[0]], positive)[0] for side in (x, -x))
    return np.concatenate([down[::-1], [len(x) - up.sum() - down.sum()], up])


def scaled_batches(shape: tuple[int, ...], scales: list[float]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * scale for scale in scales]


SCALES = {
    "steady": [1.0, 1.0, 1.0],
    "growing": [1e-3, 1.0, 50.0, 1e6],
    "shrinking": [1e6, 1.0, 1e-3],
    "jump-past-the-window": [1e-20, 1e20],
    "subnormal": [1e-42, 1e-39],
    "near-the-end-of-float32": [1e37, 3e37],
}


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES.keys())
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])
def test_against_numpy(scales: list[float], rows: int, positive: bool) -> None:
    batches = scaled_batches((rows, 500), scales)
    if positive:
        batches = [x.relu() for x in batches]
    histogram = counted(batches, rows)
    everything = torch.cat(batches, dim=1)
    for counts, row in zip(histogram.counts, everything, strict=True):
        assert np.array_equal(counts.numpy(), plain_counts(row, histogram.edges()))


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES.keys())
@pytest.mark.parametrize("rows", [1, 3])
def test_growth_equals_all_at_once(scales: list[float], rows: int) -> None:
    """Nothing is clipped, and the window that moved holds what one that knew the range would have held."""
    batches = scaled_batches((rows, 500), scales)
    growing, known = counted(batches, rows), counted([torch.cat(batches, dim=1)], rows)
    assert growing.base == known.base
    assert torch.equal(growing.counts, known.counts)


@given(tables, st.randoms(use_true_random=False), st.integers(1, 5))
@settings(max_examples=50)
def test_order_and_batching_do_not_matter(table: list[list[float]], random: object, size: int) -> None:
    x = torch.tensor(table).T.contiguous()
    shuffled = list(range(x.shape[1]))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = counted([x], 2), counted(list(x[:, shuffled].split(size, dim=1)), 2)
    assert one.base == other.base
    assert torch.equal(one.counts, other.counts)
    assert (one.counts.sum(dim=1) == x.shape[1]).all()


@given(tables, tables)
@settings(max_examples=50)
def test_merge_equals_one_pass(first: list[list[float]], second: list[list[float]]) -> None:
    a, b = (torch.tensor(t).T.contiguous() for t in (first, second))
    one, other, both = counted([a], 2), counted([b], 2), counted([a, b], 2)
    before = other.counts.clone(), other.base
    one.merge(other)
    assert one.base == both.base
    assert torch.equal(one.counts, both.counts)
    assert torch.equal(other.counts, before[0])
    assert other.base == before[1]


def test_rows_are_counted_apart() -> None:
    x = scaled_batches((4, 300), [1.0])[0] * torch.tensor([1.0, 10.0, 0.1, 1e-3])[:, None]
    together = counted([x], 4)
    for i, row in enumerate(x):
        alone = FloatHistogram(1)
        alone.add(row[None], x.abs().max().item())
        assert torch.equal(together.counts[i], alone.counts[0])


def test_bins_are_narrow_and_cover_everything() -> None:
    histogram = counted([torch.tensor([[3.0, -0.1]])], 1)
    edges = histogram.edges()
    assert (edges.diff() > 0).all()
    assert edges.shape == (histogram.counts.shape[1] + 1,)
    assert torch.equal(edges, -edges.flip(0))
    positive = edges[HALF + 1 :]
    assert (positive.diff() / positive[:-1]).max().item() <= 1 / 128
    assert positive[0].item() == 4 * 2.0**-24
    assert positive[-1].item() == 4.0


def test_zeros_of_both_signs_share_a_bin() -> None:
    counts = counted([torch.tensor([[0.0, -0.0, 1.0]])], 1).counts[0]
    assert counts[HALF].item() == 2


def test_the_largest_float_has_a_bin() -> None:
    histogram = counted([torch.tensor([[torch.finfo(torch.float32).max]])], 1)
    assert histogram.counts[0, -1].item() == 1
    assert histogram.edges()[-1].item() == 2.0**128


@pytest.mark.parametrize(
    "x", [torch.randn(7, 5).T[2:3, :1], torch.randn(7, 5).T[:3, :1]], ids=["one", "column"]
)
def test_dimensions_of_size_one_may_have_any_stride(x: Tensor) -> None:
    assert torch.equal(counted([x], len(x)).counts, counted([x.clone()], len(x)).counts)

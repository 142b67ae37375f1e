"""Another basis on every bond: the same tensor, and cores that round better."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import QuantSpec
from lowbit.core.affine import fake_quantize
from lowbit.core.weight_observers import fit
from lowbit.decompose.gauge import fix_gauge, mixing
from lowbit.decompose.tt import Train

MODES = (4, 3, 5)


def train_of(ranks: tuple[int, ...], scale: float = 1.0) -> Train:
    wide = (1, *ranks, 1)
    cores = [torch.randn(wide[k], n, wide[k + 1]) for k, n in enumerate(MODES)]
    return Train((cores[0] * scale, *cores[1:]))


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_tensor_stays_even_where_ranks_are_too_large(ranks: tuple[int, int], scale: float) -> None:
    train = train_of(ranks, scale)
    found = fix_gauge(train)
    assert [c.shape for c in found.cores] == [c.shape for c in train.cores]
    torch.testing.assert_close(found.dense(), train.dense(), rtol=1e-4, atol=1e-4 * scale)


def test_both_sides_of_a_bond_have_equal_ranges() -> None:
    found = fix_gauge(train_of((4, 4), 1e3))
    for left, right in zip(found.cores, found.cores[1:], strict=False):
        ranges = left.abs().flatten(0, -2).amax(0), right.abs().flatten(1).amax(1)
        torch.testing.assert_close(*ranges, rtol=0.05, atol=0)


def test_a_dead_index_stays_dead() -> None:
    train = train_of((3, 3))
    train.cores[0][..., 1] = 0
    train.cores[1][1] = 0
    found = fix_gauge(train)
    assert all(core.isfinite().all() for core in found.cores)
    torch.testing.assert_close(found.dense(), train.dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 12, 16])
def test_mixing_is_orthogonal_and_spreads_every_entry(n: int) -> None:
    found = mixing(n)
    torch.testing.assert_close(found @ found.t(), torch.eye(n, dtype=torch.float64))
    assert found.abs().max() <= (2 / n) ** 0.5 + 1e-12


def test_a_skewed_train_rounds_better() -> None:
    torch.manual_seed(1)
    wide = (1, 8, 8, 1)
    cores = [torch.randn(wide[k], 16, wide[k + 1]) for k in range(3)]
    cores[1] = cores[1] * torch.logspace(-2, 2, 8)  # what the next core makes small again
    cores[2] = cores[2] / torch.logspace(-2, 2, 8)[:, None, None]
    train, spec = Train(tuple(cores)), QuantSpec(bits=6)

    def error(t: Train) -> float:
        rounded = []
        for core in t.cores:
            found = fit(core, spec)
            rounded.append(fake_quantize(core, found.scale, None, spec))
        return float((Train(tuple(rounded)).dense() - train.dense()).norm() / train.dense().norm())

    assert error(fix_gauge(train)) < 0.2 * error(train)

"""Tensor trains: dense again, errors as promised, and the best ranks for a budget by brute force."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit import LowbitError
from lowbit.decompose.ranks import Budget, Energy, Error, Fixed, Vbmf
from lowbit.decompose.tt import (
    Train,
    factorize,
    matrix_to_train,
    rounded,
    tensor_to_train,
    train_to_matrix,
)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / x.norm())


def low_rank(rank: int, noise: float = 0.0) -> Tensor:
    modes = [(8, 8), (8, 4), (4, 8)]
    ranks = [1, rank, rank, 1]
    cores = tuple(torch.randn(ranks[k], *modes[k], ranks[k + 1]) for k in range(3))
    w = train_to_matrix(Train(cores))
    w = w / w.norm()
    return w + noise * torch.randn_like(w) / math.sqrt(w.numel())


@given(st.lists(st.integers(2, 6), min_size=2, max_size=4), st.integers(0, 1000))
def test_full_ranks_are_exact(shape: list[int], seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    train = tensor_to_train(x, Fixed(10**6))
    assert relative(x, train.dense()) < 1e-5
    assert train.error < 1e-10
    assert (train.ranks[0], train.ranks[-1]) == (1, 1)


def test_a_core_is_a_row_of_matrices() -> None:
    """The definition: one entry is a product of one matrix from each core."""
    w = torch.randn(24, 60)
    train = matrix_to_train(w, (4, 3, 2), (5, 4, 3), Fixed(9))
    dense = train_to_matrix(train)
    for out, into in ((0, 0), (5, 17), (23, 59)):
        i = (out // 6, out // 2 % 3, out % 2)
        j = (into // 12, into // 3 % 4, into % 3)
        entry = torch.ones(1, 1)
        for k, core in enumerate(train.cores):
            entry = entry @ core[:, i[k], j[k]]
        assert torch.allclose(entry[0, 0], dense[out, into], atol=1e-4)


@pytest.mark.parametrize("rule", [Fixed(5), Fixed((5, 3)), Energy(0.9), Error(0.4), Budget(0.2)], ids=str)
def test_the_error_is_the_measured_one_and_what_was_asked(rule: Fixed | Energy | Error | Budget) -> None:
    w = torch.randn(48, 64)
    train = matrix_to_train(w, (4, 4, 3), (4, 4, 4), rule)
    assert train.error == pytest.approx(relative(w, train_to_matrix(train)), rel=1e-3)
    if isinstance(rule, Error):
        assert train.error <= rule.relative
    if isinstance(rule, Budget):
        assert train.parameters <= rule.share * w.numel()


@pytest.mark.parametrize("rule", [Vbmf(), Energy(0.99), Error(0.1)], ids=str)
def test_the_true_ranks_are_found_under_noise(rule: Vbmf | Energy | Error) -> None:
    train = matrix_to_train(low_rank(6, 0.02), (8, 8, 4), (8, 4, 8), rule)
    assert all(4 <= r <= 6 for r in train.ranks[1:-1])


def test_a_budget_is_spent_as_well_as_any_choice_of_ranks() -> None:
    """The oracle: all pairs of ranks that fit."""
    w = low_rank(5, 0.3)
    got = matrix_to_train(w, (8, 8, 4), (8, 4, 8), Budget(0.15))
    fitting = [
        (a, b) for a, b in product(range(1, 33), repeat=2) if 64 * a + 32 * a * b + 32 * b <= 0.15 * w.numel()
    ]
    best = [(a, b) for a, b in fitting if (a + 1, b) not in fitting and (a, b + 1) not in fitting]
    errors = [matrix_to_train(w, (8, 8, 4), (8, 4, 8), Fixed(ranks)).error for ranks in best]
    assert got.error <= 1.05 * min(errors)


def test_rounding_a_train() -> None:
    """As good as decomposing the tensor anew, without ever making it."""
    wide = matrix_to_train(low_rank(6, 0.02), (8, 8, 4), (8, 4, 8), Fixed(20))
    dense = train_to_matrix(wide)
    for rule in (Fixed(6), Error(0.3)):
        got, anew = rounded(wide, rule), matrix_to_train(dense, (8, 8, 4), (8, 4, 8), rule)
        assert got.ranks == anew.ranks
        assert got.error == pytest.approx(anew.error, rel=1e-3)
        assert got.error == pytest.approx(relative(dense, train_to_matrix(got)), rel=1e-3)


@given(st.integers(1, 5000), st.integers(1, 5))
def test_factors_multiply_and_are_near_to_each_other(n: int, parts: int) -> None:
    found = factorize(n, parts)
    assert math.prod(found) == n
    assert len(found) == parts
    assert list(found) == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        (((4, 4), (8, 8)), r"modes \(4, 4\) multiply to 16, and there are 48 outputs; use \(8, 6\)"),
        (((8, 6), (8, 9)), r"modes \(8, 9\) multiply to 72, and there are 64 inputs; use \(8, 8\)"),
        (((8, 6), (4, 4, 4)), "2 modes of outputs and 3 of inputs"),
    ],
)
def test_wrong_modes(modes: tuple[tuple[int, ...], tuple[int, ...]], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        matrix_to_train(torch.randn(48, 64), *modes, Fixed(2))


def test_other_bad_input() -> None:
    with pytest.raises(LowbitError, match="3 ranks for 1 bonds of 2 cores"):
        matrix_to_train(torch.randn(48, 64), (8, 6), (8, 8), Fixed((1, 2, 3)))
    with pytest.raises(LowbitError, match=r"no two axes to separate"):
        tensor_to_train(torch.randn(5), Fixed(2))
    with pytest.raises(LowbitError, match="ranks of 1 take 112 parameters, and 31 are allowed"):
        matrix_to_train(torch.randn(48, 64), (8, 6), (8, 8), Budget(0.01))

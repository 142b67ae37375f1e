"""Ranks from singular values: each rule against its definition."""

from __future__ import annotations

import pytest
import torch

from lowbit import LowbitError
from lowbit.decompose.ranks import Budget, Energy, Error, Fixed, Vbmf, rank_of, vbmf_rank

VALUES = torch.tensor([4.0, 2.0, 1.0, 0.5])  # squares 16, 4, 1, 0.25 of 21.25


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        (Fixed(2), 2),
        (Fixed(9), 4),
        (Energy(16 / 21.25), 1),
        (Energy(16.1 / 21.25), 2),
        (Energy(1.0), 4),
        (Error((0.25 / 21.25) ** 0.5), 3),
        (Error((1.2 / 21.25) ** 0.5), 3),
        (Error((1.25 / 21.25) ** 0.5), 2),
        (Error(1.0), 1),
    ],
    ids=str,
)
def test_rules(rule: Fixed | Energy | Error, rank: int) -> None:
    assert rank_of(VALUES, rule) == rank


def test_an_error_is_shared_among_unfoldings() -> None:
    assert rank_of(VALUES, Error((1.25 / 21.25) ** 0.5), unfoldings=5) == 3


def test_zeros_keep_one() -> None:
    for rule in (Energy(0.9), Error(0.1), Vbmf()):
        assert rank_of(torch.zeros(3), rule, shape=(3, 5)) == 1


@pytest.mark.parametrize(("rows", "columns"), [(60, 200), (200, 60), (100, 100)])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_vbmf_finds_the_rank_in_noise(rows: int, columns: int, noise: float) -> None:
    x = torch.randn(rows, 7) @ torch.randn(7, columns) + noise * torch.randn(rows, columns)
    assert vbmf_rank(torch.linalg.svdvals(x), rows, columns) == 7


def test_vbmf_finds_nothing_in_noise_alone() -> None:
    assert vbmf_rank(torch.linalg.svdvals(torch.randn(80, 300)), 80, 300) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(0), "rank=0 is not a whole number from 1 up"),
        (lambda: Fixed((2, 1.5)), "is not a whole number"),  # type: ignore[arg-type]
        (lambda: Energy(1.2), r"Energy share 1\.2 is not above 0 and at most 1"),
        (lambda: Error(0), "relative Error 0 is not above 0"),
        (lambda: Budget(True), "Budget share True"),
        (lambda: rank_of(VALUES, Budget(0.5)), "is about all unfoldings together"),
        (lambda: rank_of(VALUES, Fixed((2, 2))), "is about all unfoldings together"),
    ],
)
def test_what_is_refused(make: object, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        make()  # type: ignore[operator]

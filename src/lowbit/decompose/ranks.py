"""How many singular values to keep: of one unfolding of a tensor, or of all of them together.

A rank is chosen from singular values alone, largest first. `Fixed` says the number, `Energy` the share of the
squared norm to keep, `Error` the relative error to allow, `Budget` the parameters to spend, `Vbmf` asks which
values stand out of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import LowbitError

__all__ = [
    "NOTHING",
    "Budget",
    "Energy",
    "Error",
    "Fixed",
    "Lost",
    "RankRule",
    "TooSmallError",
    "Vbmf",
    "affordable",
    "lost_at_bonds",
    "rank_of",
    "vbmf_rank",
]


@dataclass(frozen=True)
class Fixed:
    """So many, for every unfolding or for each; more than there are is clipped."""

    rank: int | tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the numbers."""
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        if not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in ranks):
            raise LowbitError(f"rank={self.rank!r} is not a whole number from 1 up, or a tuple of such")


@dataclass(frozen=True)
class Energy:
    """The fewest that keep this share of the squared norm, of each unfolding."""

    share: float

    def __post_init__(self) -> None:
        """Check the share."""
        _check_share("Energy share", self.share)


@dataclass(frozen=True)
class Error:
    """The fewest with which the relative error |x - y| / |x| stays below this (Oseledets 2011, theorem 2.2).

    Each of k unfoldings may lose error / sqrt(k) of the norm.
    """

    relative: float

    def __post_init__(self) -> None:
        """Check the error."""
        _check_share("relative Error", self.relative)


@dataclass(frozen=True)
class Budget:
    """The smallest error that so many parameters allow: a share of those of the dense tensor."""

    share: float

    def __post_init__(self) -> None:
        """Check the share."""
        _check_share("Budget share", self.share)


@dataclass(frozen=True)
class Vbmf:
    """Those that stand out of the noise: variational Bayesian matrix factorization (Nakajima et al. 2013)."""


@dataclass(frozen=True)
class Lost:
    """What a decomposition leaves out of w: norms, relative to |w|."""

    total: float = 0.0
    # what the rank of each bond leaves out on its own; together no more than the root of the sum of squares
    bonds: tuple[float, ...] = ()


NOTHING = Lost()


class TooSmallError(LowbitError):
    """Even ranks of 1 take more than a budget allows."""


RankRule = Fixed | Energy | Error | Budget | Vbmf


def _check_share(what: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise LowbitError(f"{what} {value!r} is not above 0 and at most 1; write 0.95, say")


def rank_of(values: Tensor, rule: RankRule, *, unfoldings: int = 1, shape: Sequence[int] = ()) -> int:
    """How many of the singular values of one unfolding to keep, at least 1.

    Args:
        values: [min(rows, columns)], largest first.
        rule: any but `Budget`, which needs all unfoldings together; of `Fixed` one number.
        unfoldings: how many share an allowed error.
        shape: of the unfolding, for `Vbmf`.

    Raises:
        LowbitError: a rule that one unfolding cannot decide.
    """
    values = values.double()
    total = float(values.square().sum())
    if isinstance(rule, Fixed) and isinstance(rule.rank, int):
        return min(rule.rank, len(values))
    if total == 0:
        return 1
    if isinstance(rule, Vbmf):
        return max(1, vbmf_rank(values, *shape))
    if isinstance(rule, Energy):
        lost = 1 - rule.share
    elif isinstance(rule, Error):
        lost = rule.relative**2 / unfoldings
    else:
        raise LowbitError(
            f"{rule} is about all unfoldings together; give Fixed(number), Energy, Error or Vbmf"
        )
    # what is lost by keeping 0, 1, 2, ... of them
    tails = torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    return max(1, int((tails > lost * total * (1 + 1e-12)).sum()))


def lost_at_bonds(spectra: Sequence[Tensor], ranks: Sequence[int]) -> tuple[float, ...]:
    """Norm of the singular values beyond the rank, relative to that of all, for each unfolding."""
    pairs = [
        (values.double().norm(), values[r:].double().norm()) for values, r in zip(spectra, ranks, strict=True)
    ]
    return tuple(float(tail / size) if size else 0.0 for size, tail in pairs)


def affordable(
    spectra: Sequence[Tensor], count: Callable[[Sequence[int]], int], parameters: float
) -> tuple[int, ...]:
    """Ranks that `parameters` allow, from 1 up: each time the one that saves most error for each parameter.

    Args:
        spectra: singular values of each unfolding, largest first.
        count: parameters of a decomposition with given ranks.

    Raises:
        TooSmallError: ranks of 1 are too many already.
    """
    ranks = [1] * len(spectra)
    if count(ranks) > parameters:
        raise TooSmallError(
            f"ranks of 1 take {count(ranks)} parameters, and {parameters:.0f} are allowed; allow more, or "
            "leave the layer as it is"
        )
    while True:
        offers = []
        for k in [k for k, values in enumerate(spectra) if ranks[k] < len(values)]:
            more = [r + (i == k) for i, r in enumerate(ranks)]
            if count(more) <= parameters:
                gain = float(spectra[k][ranks[k]]) ** 2
                offers.append((gain / max(1, count(more) - count(ranks)), k))
        if not offers:
            return tuple(ranks)
        ranks[max(offers)[1]] += 1


def vbmf_rank(values: Tensor, rows: int, columns: int) -> int:
    """Rank of a matrix seen in noise whose size is unknown, by the analytic global solution.

    Nakajima, Sugiyama, Babacan, Tomioka 2013, "Global analytic solution of fully-observed variational
    Bayesian matrix factorization", theorem 2 and corollary 3: with a = L / M the values beyond
    sqrt(M s^2 (1 + t) (1 + a / t)), t = 2.5129 sqrt(a), are signal, and the variance s^2 of the noise is the
    one of least free energy.
    """
    from scipy.optimize import minimize_scalar

    small, large = min(rows, columns), max(rows, columns)
    alpha = small / large
    t = 2.5129 * math.sqrt(alpha)
    edge = (1 + t) * (1 + alpha / t)
    squares = values.double().square().numpy()
    count = min(math.ceil(small / (1 + alpha)) - 1, len(squares) - 1)
    if count < 1:
        return len(squares)
    upper = squares.sum() / (small * large)
    lower = max(squares[count] / (large * edge), squares[count:].mean() / large)
    if not 0 < lower < upper:
        return len(squares)

    def free_energy(log_variance: float) -> float:
        x = squares / (large * math.exp(log_variance))
        signal, noise = x[x > edge], x[x <= edge]
        shifted = signal - (1 + alpha)
        tau = (shifted + np.sqrt(np.maximum(shifted**2 - 4 * alpha, 0))) / 2
        of_noise = noise - np.log(np.maximum(noise, 1e-300))
        of_signal = signal - tau + np.log((tau + 1) / signal) + alpha * np.log(tau / alpha + 1)
        return float(of_noise.sum() + of_signal.sum())

    best = minimize_scalar(free_energy, bounds=(math.log(lower), math.log(upper)), method="bounded")
    return int((squares > large * math.exp(float(best.x)) * edge).sum())

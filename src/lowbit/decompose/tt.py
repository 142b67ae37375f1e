"""Tensor trains: a tensor as a product of small cores (Oseledets 2011).

x[i1, i2, ..., id] = G1[i1] G2[i2] ... Gd[id], each Gk[ik] a matrix [r(k-1), r(k)] and r(0) = r(d) = 1. Of a
matrix [out, in] with out = m1 ... md and in = n1 ... nd each index is a pair (mk, nk), so that a core is
[r(k-1), mk, nk, r(k)] (Novikov et al. 2015, "Tensorizing neural networks").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.decompose.ranks import NOTHING, Budget, Fixed, Lost, RankRule, affordable, lost_at_bonds, rank_of
from lowbit.errors import LowbitError

__all__ = [
    "Train",
    "check_modes",
    "factorize",
    "matrix_to_train",
    "orthogonal",
    "rounded",
    "spectra_of",
    "tensor_to_train",
    "train_to_matrix",
]


@dataclass(frozen=True)
class Train:
    """The cores of a tensor train, and what they leave out of the tensor they were made from.

    Invariant: cores[k] is [r(k), ...modes, r(k + 1)], neighbours agree on their rank, the outermost are 1.
    """

    cores: tuple[Tensor, ...]
    lost: Lost = NOTHING

    @property
    def ranks(self) -> tuple[int, ...]:
        """r(0) to r(d)."""
        return (*(core.shape[0] for core in self.cores), self.cores[-1].shape[-1])

    @property
    def error(self) -> float:
        """|x - dense()| / |x|."""
        return self.lost.total

    @property
    def parameters(self) -> int:
        return sum(core.numel() for core in self.cores)

    def dense(self) -> Tensor:
        """The tensor [modes of the first core, ..., modes of the last], each core's modes in their order."""
        product = self.cores[0].reshape(-1, self.cores[0].shape[-1])
        for core in self.cores[1:]:
            product = (product @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
        return product.reshape([n for core in self.cores for n in core.shape[1:-1]])


def factorize(n: int, parts: int) -> tuple[int, ...]:
    """`parts` factors of n, as near to each other as they can be, the larger first.

    >>> factorize(1024, 4)
    (8, 8, 4, 4)
    """
    found = [1] * parts
    for prime in reversed(_primes(n)):
        found[found.index(min(found))] *= prime
    return tuple(sorted(found, reverse=True))


def _primes(n: int) -> list[int]:
    """Prime factors in rising order."""
    found, divisor = [], 2
    while n > 1:
        while n % divisor == 0:
            found.append(divisor)
            n //= divisor
        divisor = divisor + 1 if divisor * divisor <= n else max(n, divisor + 1)
    return found


def tensor_to_train(x: Tensor, rule: RankRule) -> Train:
    """TT-SVD of a tensor [n1, ..., nd].

    Raises:
        LowbitError: fewer than two axes, or as many ranks as there are no bonds.
    """
    if x.ndim < 2:
        raise LowbitError(f"a tensor of shape {list(x.shape)} has no two axes to separate; reshape it")
    return rounded(_exact(x.double()), rule)


def _exact(x: Tensor) -> Train:
    """A train that is the tensor: cores of full rank, orthogonal from the left but the last."""
    cores, rest, rank = [], x.reshape(1, -1), 1
    for n in x.shape[:-1]:
        q, rest = torch.linalg.qr(rest.reshape(rank * n, -1))
        cores.append(q.reshape(rank, n, -1))
        rank = q.shape[1]
    return Train((*cores, rest.reshape(rank, x.shape[-1], 1)))


def rounded(train: Train, rule: RankRule) -> Train:
    """The train with fewer ranks, its error relative to what it was (Oseledets 2011, algorithm 2)."""
    wide = orthogonal([core.double() for core in train.cores])
    spectra = spectra_of(wide)
    ranks = _choose(train, spectra, rule)
    cores = list(wide)
    for k in range(len(cores) - 1, 0, -1):
        left, values, right = _split(cores[k])
        keep = min(ranks[k - 1], len(values))
        cores[k] = right[:keep].reshape(keep, *cores[k].shape[1:])
        cores[k - 1] = torch.tensordot(cores[k - 1], left[:, :keep] * values[:keep], 1)
    found, size = Train(tuple(cores)), float(wide[-1].norm())
    error = float((Train(tuple(wide)).dense() - found.dense()).norm()) / size if size else 0.0
    lost = Lost(error, lost_at_bonds(spectra, found.ranks[1:-1]))
    return Train(tuple(core.float() for core in cores), lost)


def orthogonal(cores: list[Tensor]) -> list[Tensor]:
    """The same tensor, every core but the last orthogonal from the left: the last has its norm."""
    for k in range(len(cores) - 1):
        q, r = torch.linalg.qr(cores[k].reshape(-1, cores[k].shape[-1]))
        cores[k] = q.reshape(*cores[k].shape[:-1], -1)
        cores[k + 1] = torch.tensordot(r, cores[k + 1], 1)
    return cores


def _split(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of a core, its left bond against everything else."""
    return torch.linalg.svd(core.reshape(core.shape[0], -1), full_matrices=False)


def spectra_of(orthogonal: Sequence[Tensor]) -> list[Tensor]:
    """Singular values of the unfolding at each bond, first to last."""
    found, cores = [], list(orthogonal)
    for k in range(len(cores) - 1, 0, -1):
        left, values, _ = _split(cores[k])
        found.append(values)
        cores[k - 1] = torch.tensordot(cores[k - 1], left * values, 1)
    return found[::-1]


def _choose(train: Train, spectra: list[Tensor], rule: RankRule) -> tuple[int, ...]:
    """Ranks of all bonds."""
    bonds = len(spectra)
    if isinstance(rule, Fixed) and isinstance(rule.rank, tuple):
        if len(rule.rank) != bonds:
            raise LowbitError(f"{len(rule.rank)} ranks for {bonds} bonds of {bonds + 1} cores; give one each")
        return rule.rank
    sizes = [math.prod(core.shape[1:-1]) for core in train.cores]
    if isinstance(rule, Budget):

        def count(ranks: Sequence[int]) -> int:
            wide = (1, *ranks, 1)
            return sum(wide[k] * n * wide[k + 1] for k, n in enumerate(sizes))

        return affordable(spectra, count, rule.share * math.prod(sizes))
    shapes = [(math.prod(sizes[: k + 1]), math.prod(sizes[k + 1 :])) for k in range(bonds)]
    pairs = zip(spectra, shapes, strict=True)
    return tuple(rank_of(values, rule, unfoldings=bonds, shape=shape) for values, shape in pairs)


def matrix_to_train(w: Tensor, out_modes: Sequence[int], in_modes: Sequence[int], rule: RankRule) -> Train:
    """The train of a matrix [out, in], cores [r(k-1), mk, nk, rk].

    Raises:
        LowbitError: modes whose products are not out and in, or whose numbers differ.
    """
    check_modes(w.shape[0], out_modes, "outputs")
    check_modes(w.shape[1], in_modes, "inputs")
    if len(out_modes) != len(in_modes):
        raise LowbitError(
            f"{len(out_modes)} modes of outputs and {len(in_modes)} of inputs; a core has one of each, so "
            "give as many"
        )
    d = len(out_modes)
    pairs = [axis for k in range(d) for axis in (k, d + k)]
    x = w.reshape(*out_modes, *in_modes).permute(pairs)
    sizes = [m * n for m, n in zip(out_modes, in_modes, strict=True)]
    train = tensor_to_train(x.reshape(sizes), rule)
    shapes = zip(train.cores, out_modes, in_modes, strict=True)
    return Train(tuple(c.reshape(c.shape[0], m, n, c.shape[-1]) for c, m, n in shapes), train.lost)


def train_to_matrix(train: Train) -> Tensor:
    """Inverse of `matrix_to_train`, but for its error: [out, in]."""
    d = len(train.cores)
    x = train.dense().permute([*range(0, 2 * d, 2), *range(1, 2 * d, 2)])
    return x.reshape(math.prod(core.shape[1] for core in train.cores), -1)


def check_modes(n: int, modes: Sequence[int], what: str) -> None:
    """Raise LowbitError unless the product of the modes is n; it names the nearest factors that are."""
    if math.prod(modes) != n or any(m < 1 for m in modes):
        near = factorize(n, max(1, len(modes)))
        raise LowbitError(
            f"modes {tuple(modes)} multiply to {math.prod(modes)}, and there are {n} {what}; use {near}"
        )

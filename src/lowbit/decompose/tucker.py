"""Tucker and CP decompositions of convolution weights, by TensorLy.

Tucker-2: w[o, i, h, x] = sum over a, b of core[a, b, h, x] left[o, a] right[i, b], a 1x1 convolution, a small
one and a 1x1 convolution (Kim et al. 2016, "Compression of deep convolutional neural networks"). Full Tucker
also has factors for height and width. CP: a sum of products of four vectors (Lebedev et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.decompose.ranks import NOTHING, Budget, Fixed, Lost, RankRule, affordable, lost_at_bonds, rank_of
from lowbit.errors import LowbitError

__all__ = ["Tucker", "cp", "cp_to_tensor", "tucker", "tucker_to_tensor"]


@dataclass(frozen=True)
class Tucker:
    """w = core x_m factor for each mode m that has one; a factor is [size of the mode, rank]."""

    core: Tensor
    # by axis of the tensor
    factors: dict[int, Tensor]
    lost: Lost = NOTHING

    @property
    def error(self) -> float:
        """|w - dense| / |w|."""
        return self.lost.total

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the axes that have a factor."""
        return tuple(factor.shape[1] for factor in self.factors.values())

    @property
    def parameters(self) -> int:
        return self.core.numel() + sum(factor.numel() for factor in self.factors.values())


def tucker(w: Tensor, rule: RankRule, axes: Sequence[int] = (0, 1)) -> Tucker:
    """Higher-order orthogonal iteration; the axes (0, 1) are Tucker-2, all of them full Tucker.

    Raises:
        LowbitError: other axes than the tensor has, or another number of ranks.
    """
    import tensorly
    from tensorly.decomposition import partial_tucker

    if not axes or len(set(axes)) != len(axes) or not all(0 <= a < w.ndim for a in axes):
        raise LowbitError(f"axes {tuple(axes)} are not different axes of a tensor of shape {list(w.shape)}")
    spectra = [torch.linalg.svdvals(w.double().movedim(axis, 0).flatten(1)) for axis in axes]
    ranks = _possible(dict(zip(axes, _ranks(w, spectra, rule, axes), strict=True)), w.shape)
    rising = sorted(axes)
    with tensorly.backend_context("pytorch"):
        (core, factors), _ = partial_tucker(
            w.double(), rank=[ranks[a] for a in rising], modes=rising, init="svd"
        )
    by_axis = dict(zip(rising, factors, strict=True))
    found = Tucker(core, {axis: by_axis[axis] for axis in axes})
    lost = Lost(_error(w, tucker_to_tensor(found)), lost_at_bonds(spectra, found.ranks))
    return Tucker(core.float(), {axis: f.float() for axis, f in found.factors.items()}, lost)


def tucker_to_tensor(found: Tucker) -> Tensor:
    """The dense tensor."""
    dense = found.core
    for axis, factor in found.factors.items():
        dense = torch.tensordot(factor, dense, dims=([1], [axis])).movedim(0, axis)
    return dense


def _ranks(w: Tensor, spectra: Sequence[Tensor], rule: RankRule, axes: Sequence[int]) -> tuple[int, ...]:
    if isinstance(rule, Fixed) and isinstance(rule.rank, tuple):
        if len(rule.rank) != len(axes):
            raise LowbitError(f"{len(rule.rank)} ranks for the axes {tuple(axes)}; give one for each")
        return tuple(min(r, w.shape[a]) for r, a in zip(rule.rank, axes, strict=True))
    if isinstance(rule, Budget):

        def count(ranks: Sequence[int]) -> int:
            core = list(w.shape)
            for axis, rank in zip(axes, ranks, strict=True):
                core[axis] = rank
            return math.prod(core) + sum(w.shape[a] * r for a, r in zip(axes, ranks, strict=True))

        return affordable(spectra, count, rule.share * w.numel())
    shapes = [(w.shape[axis], w.numel() // w.shape[axis]) for axis in axes]
    pairs = zip(spectra, shapes, strict=True)
    return tuple(rank_of(values, rule, unfoldings=len(axes), shape=shape) for values, shape in pairs)


def _possible(ranks: dict[int, int], shape: Sequence[int]) -> dict[int, int]:
    """No rank above the product of the other sizes of the core: more would be empty."""
    while True:
        core = [ranks.get(axis, size) for axis, size in enumerate(shape)]
        clipped = {axis: min(rank, math.prod(core) // core[axis]) for axis, rank in ranks.items()}
        if clipped == ranks:
            return ranks
        ranks = clipped


def cp(w: Tensor, rank: int, *, seed: int = 0) -> tuple[list[Tensor], float]:
    """Alternating least squares: a factor [size, rank] for each axis, and the relative error.

    Raises:
        LowbitError: a rank below 1.
    """
    import tensorly
    from tensorly.decomposition import parafac

    if not isinstance(rank, int) or rank < 1:
        raise LowbitError(f"rank={rank!r} is not a whole number from 1 up")
    with tensorly.backend_context("pytorch"):
        weights, factors = parafac(w.double(), rank=rank, init="random", random_state=seed, n_iter_max=200)
    factors = [factors[0] * weights, *factors[1:]]
    return [f.float() for f in factors], _error(w, cp_to_tensor(factors))


def cp_to_tensor(factors: Sequence[Tensor]) -> Tensor:
    """The dense tensor."""
    dense = factors[0]
    for factor in factors[1:]:
        dense = torch.einsum("...r,nr->...nr", dense, factor)
    return dense.sum(-1)


def _error(w: Tensor, found: Tensor) -> float:
    size = float(w.double().norm())
    return float((w.double() - found.double()).norm()) / size if size else 0.0

"""The freedom inside a train: G A and A^-1 G' are the same product, and not the same once rounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.decompose.tt import Train, orthogonal

__all__ = ["fix_gauge", "mixing"]


def fix_gauge(train: Train, sweeps: int = 10) -> Train:
    """The same tensor, from cores that round well.

    Every bond is made orthonormal from the left (QR, first to last), turned by a Hadamard matrix, which
    spreads large entries over all of its indices, and scaled, index by index, until the cores on both sides
    have equal ranges (cross-layer equalization, Nagel et al. 2019, for trains).
    """
    if any(c.reshape(-1, c.shape[-1]).shape[0] < c.shape[-1] for c in train.cores):
        cores = [core.double() for core in train.cores]  # more indices than can be independent
    else:
        cores = orthogonal([core.double() for core in train.cores])
    for k in range(len(cores) - 1):
        turn = mixing(cores[k].shape[-1]).to(cores[k])
        cores[k], cores[k + 1] = cores[k] @ turn, torch.tensordot(turn.t(), cores[k + 1], 1)
    for _ in range(sweeps):
        for k in range(len(cores) - 1):
            left = cores[k].abs().reshape(-1, cores[k].shape[-1]).amax(0)
            right = cores[k + 1].abs().flatten(1).amax(1)
            scale = torch.where((left > 0) & (right > 0), (left / right).sqrt(), 1.0)
            cores[k] = cores[k] / scale
            cores[k + 1] = cores[k + 1] * scale.reshape(-1, *[1] * (cores[k + 1].ndim - 1))
    return Train(tuple(new.to(old.dtype) for new, old in zip(cores, train.cores, strict=True)), train.lost)


def mixing(n: int) -> Tensor:
    """An orthogonal matrix [n, n] with entries of about one size: Hadamard's, else a cosine transform."""
    if n & (n - 1) == 0:
        found = torch.ones(1, 1, dtype=torch.float64)
        while len(found) < n:
            found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
        return found / math.sqrt(n)
    places = torch.arange(n, dtype=torch.float64)
    found = torch.cos(math.pi / n * (places + 0.5) * places[:, None]) * math.sqrt(2 / n)
    found[0] /= math.sqrt(2)
    return found

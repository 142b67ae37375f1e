"""What is done to a latent weight before it is rounded: by name, as a rule says.

Means, deviations and quantiles are those of the elements that share a scale. A reshape that *projects* moves
the latent weight itself in every step of training, so that no weight strays to where no gradient reaches it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.affine import grouped
from lowbit.core.spec import QuantSpec, expand_to
from lowbit.registry import Registry

__all__ = ["Reshape", "reshapes"]

# (weight, spec, progress of training from 0 to 1) -> weight; without progress it is 0
Function = Callable[[Tensor, QuantSpec, Tensor | None], Tensor]
RECU_START, RECU_END = 0.85, 0.99


@dataclass(frozen=True)
class Reshape:
    """A function of the weight."""

    function: Function
    # whether training moves the latent weight to its value
    projects: bool = False
    # whether it changes with the progress of training
    scheduled: bool = False

    def __call__(self, w: Tensor, spec: QuantSpec, progress: Tensor | None = None) -> Tensor:
        """The weight to be rounded, as shaped as `w`."""
        return self.function(w, spec, progress) if w.numel() else w


reshapes: Registry[Reshape] = Registry("reshape")


def _reshape(name: str, *, projects: bool = False, scheduled: bool = False) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        reshapes.register(name)(Reshape(function, projects, scheduled))
        return function

    return add


@_reshape("none")
def none(w: Tensor, spec: QuantSpec, progress: Tensor | None = None) -> Tensor:
    """The weight as it is."""
    return w


@_reshape("tanh")
def tanh(w: Tensor, spec: QuantSpec, progress: Tensor | None = None) -> Tensor:
    """w' = max|w| tanh(w) / max|tanh(w)|, over the whole tensor: Zhou et al. 2016, "DoReFa-Net", eq. 9.

    The range is kept instead of [-1, 1], for a trained network depends on it.
    """
    bent = torch.tanh(w)
    return bent * (w.detach().abs().amax() / bent.detach().abs().amax().clamp(min=1e-12))


@_reshape("standardize")
def standardize(w: Tensor, spec: QuantSpec, progress: Tensor | None = None) -> Tensor:
    """w' = d (w - m) / d, m the mean and d the deviation, of which the first is held constant.

    Codes are balanced between the signs, and no gradient changes the size of the weight: Qin et al. 2020,
    "IR-Net", eq. 7, with the deviation kept instead of 1, for a trained network depends on it.
    """
    shape = spec.scale_shape(w.shape)
    rows = grouped(w, shape)
    mean, deviation = rows.mean(1).reshape(shape), rows.std(1, unbiased=False).clamp(min=1e-12).reshape(shape)
    kept = deviation.detach() / deviation
    return (w - expand_to(mean, w.shape)) * expand_to(kept, w.shape)


@_reshape("clip", projects=True)
def clip(w: Tensor, spec: QuantSpec, progress: Tensor | None = None) -> Tensor:
    """w' = clamp(w, -1, 1): Courbariaux et al. 2015, "BinaryConnect", section 2.4."""
    return w.clamp(-1.0, 1.0)


@_reshape("recu", projects=True, scheduled=True)
def recu(w: Tensor, spec: QuantSpec, progress: Tensor | None = None) -> Tensor:
    """w' = clamp(w, -q, q), q the quantile that leaves out a share 1 - t at each end, t from 0.85 to 0.99.

    Weights of large magnitude hardly ever change sign; brought nearer they do. Xu et al. 2021, "ReCU", eq. 11
    and section 3.4; the quantile is that of the magnitudes.
    """
    shape = spec.scale_shape(w.shape)
    done = torch.zeros((), device=w.device) if progress is None else progress
    share = 2 * (RECU_START + (RECU_END - RECU_START) * done) - 1
    rising = grouped(w.detach(), shape).abs().sort(dim=1).values
    rank = (share * rising.shape[1]).round().long().clamp(1, rising.shape[1]) - 1
    ends = expand_to(rising.index_select(1, rank.reshape(1)).reshape(shape), w.shape)
    return torch.minimum(torch.maximum(w, -ends), ends)

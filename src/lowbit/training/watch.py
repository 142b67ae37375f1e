"""Whose scale ran away when training diverged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowbit.training.stages import active

__all__ = ["all_lost", "scales_of", "worst"]


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every scale, by the path of its quantizer."""
    return {name: quantizer.scale.detach().clone() for name, quantizer in active(model).items()}


def worst(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """(path, factor) of the quantizer whose scale moved furthest: the largest |log ratio| of all.

    NaN and infinity go before everything else; their factor is what they are. None when no scale has moved.
    """
    found: tuple[float, str, float] | None = None
    for name, scale in now.items():
        old = before.get(name)
        if old is None or old.shape != scale.shape:
            continue
        ratio = (scale.abs() / old).flatten()
        broken = ratio[~torch.isfinite(ratio)]
        distance = torch.where(ratio > 0, ratio, 2.0**-60).log().abs()
        far = float("inf") if len(broken) else distance.max().item()
        factor = broken[0].item() if len(broken) else ratio[distance.argmax()].item()
        if far > (found[0] if found else 0.0):
            found = far, name, factor
    return None if found is None else found[1:]


def all_lost(scales: Mapping[str, Tensor]) -> bool:
    """Whether not one is finite, so that they tell nothing any more."""
    return not any(bool(torch.isfinite(scale).all()) for scale in scales.values())

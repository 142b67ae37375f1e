"""How far training has come, for estimators and reshapes that change as it goes on."""

from __future__ import annotations

from torch import nn

from lowbit.errors import LowbitError
from lowbit.nn.quantizer import Quantizer

__all__ = ["set_progress"]


def set_progress(model: nn.Module, share: float) -> None:
    """Tell the quantizers of a model how much of training is done, from 0 to 1.

    The Trainer does it in every step; a loop of your own calls it where a recipe names "ede", "reste" or
    "recu".

    Raises:
        LowbitError: the share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise LowbitError(f"share={share!r} of training is not from 0 to 1; pass step / steps")
    for module in model.modules():
        if isinstance(module, Quantizer) and module.scheduled:
            module.progress = float(share)

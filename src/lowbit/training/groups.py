"""Parameters in groups: what decays, what does not, and the scales."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.nn.quantizer import Quantizer
from lowbit.nn.widths import WidthQuantizer
from lowbit.training.settings import Settings

__all__ = ["make_optimizer", "parameter_groups"]

MOMENTUM = 0.9
# a width has bits to travel where a weight has parts of itself
WIDTH_RATE = 10.0


def parameter_groups(
    q: nn.Module, lr: float, scale_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trainable Parameters of a model as an optimizer takes them, each once.

    Groups, of which an empty one is left out: "weights", which decay; "biases and norms", everything with
    fewer than two axes; "zero points"; "widths", in bits, at ten times `lr`; and "scales of 2^k", the learned
    scales near that size, whose rate is `scale_lr` times 2^k: a step must be small beside the scale that it
    moves, and scales differ by orders of magnitude. Decay would pull scales and the gains of norms to zero,
    whatever the data say, so only weights have it.

    Args:
        q: a calibrated model; before `lowbit.calibrate` there are no learned scales.
        scale_lr: learning rate of scales, relative to each, and of zero points, in codes; `lr` when None.
    """
    rate = lr if scale_lr is None else scale_lr
    quantizers = [m for m in q.modules() if isinstance(m, Quantizer) and m.learned]
    zero_points = [m.zero_point for m in quantizers if isinstance(m.zero_point, nn.Parameter)]
    scales: dict[int, list[nn.Parameter]] = {}
    for m in quantizers:
        if isinstance(m.scale, nn.Parameter):
            scales.setdefault(_exponent(m.unit), []).append(m.scale)
    widths = [m.fraction for m in q.modules() if isinstance(m, WidthQuantizer) and m.fraction is not None]
    taken = {id(p) for p in chain(zero_points, widths, *scales.values())}
    others = [p for p in q.parameters() if id(p) not in taken]
    kinds: tuple[tuple[str, list[nn.Parameter], float, float], ...] = (
        ("weights", [p for p in others if p.ndim > 1], lr, weight_decay),
        ("biases and norms", [p for p in others if p.ndim <= 1], lr, 0.0),
        ("zero points", zero_points, rate, 0.0),
        ("widths", widths, WIDTH_RATE * lr, 0.0),
        *((f"scales of 2^{k}", scales[k], rate * 2.0**k, 0.0) for k in sorted(scales)),
    )
    groups = []
    for name, parameters, own, decay in kinds:
        kept = [p for p in parameters if p.requires_grad]
        if kept:
            groups.append({"params": kept, "lr": own, "weight_decay": decay, "name": name})
    return groups


def _exponent(unit: Tensor | None) -> int:
    """The nearest power of two of a scale, as it was when training began: the same after a resume."""
    assert unit is not None
    return round(math.log2(unit.item()))


def _default_lr(q: nn.Module, optimizer: object) -> float:
    """The fewer bits, the further the weights must travel."""
    if optimizer == "sgd":
        return 0.01
    bits = [m.spec.bits for m in q.modules() if isinstance(m, Quantizer)]
    return 1e-3 if min(bits, default=8) <= 3 else 3e-4


def make_optimizer(q: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for, over the parameter groups of a model.

    Raises:
        LowbitError: nothing is trainable, or the function that makes the optimizer returns something else.
    """
    lr = settings.lr if settings.lr is not None else _default_lr(q, settings.optimizer)
    groups = parameter_groups(q, lr, settings.scale_lr, settings.weight_decay)
    if not groups:
        raise LowbitError("no parameter of the model is trainable; set requires_grad on those that should be")
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=lr)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    assert callable(settings.optimizer)
    made = settings.optimizer(groups)
    if not isinstance(made, torch.optim.Optimizer):
        raise LowbitError(
            f"optimizer(groups) returned a {type(made).__name__}; return a torch.optim.Optimizer "
            "over the groups"
        )
    return made

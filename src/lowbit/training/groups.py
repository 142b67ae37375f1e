"""Parameters in groups: what decays, what does not, and the scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.nn.quantizer import Quantizer
from lowbit.training.settings import Settings

__all__ = ["make_optimizer", "parameter_groups"]

MOMENTUM = 0.9


def parameter_groups(
    q: nn.Module, lr: float, scale_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trainable Parameters of a model as an optimizer takes them, each once.

    Three groups, of which an empty one is left out: "weights", which decay; "biases and norms", everything
    with fewer than two axes; "scales", the learned scales and zero points of quantizers. Decay would pull
    scales and the gains of norms to zero, whatever the data say, so only weights have it.

    Args:
        q: a calibrated model; before `lowbit.calibrate` there are no learned scales.
        scale_lr: learning rate of the last group; a tenth of `lr` when None.
    """
    scales = [p for m in q.modules() if isinstance(m, Quantizer) for p in m.parameters(recurse=False)]
    taken = {id(p) for p in scales}
    others = [p for p in q.parameters() if id(p) not in taken]
    kinds = (
        ("weights", [p for p in others if p.ndim > 1], lr, weight_decay),
        ("biases and norms", [p for p in others if p.ndim <= 1], lr, 0.0),
        ("scales", scales, lr / 10 if scale_lr is None else scale_lr, 0.0),
    )
    groups = []
    for name, parameters, rate, decay in kinds:
        kept = [p for p in parameters if p.requires_grad]
        if kept:
            groups.append({"params": kept, "lr": rate, "weight_decay": decay, "name": name})
    return groups


def _default_lr(q: nn.Module, optimizer: object) -> float:
    """What `docs/benchmarks.md` found: the fewer bits, the further the weights must travel."""
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

"""BatchNorm in training: frozen, or measured anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowbit.graph.inputs import Inputs

__all__ = ["batchnorms", "reestimate", "set_frozen"]


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm that keeps running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def set_frozen(model: nn.Module, trainable: set[nn.Parameter], frozen: bool) -> None:
    """Stop or start statistics and affine map of every BatchNorm of a model in training mode.

    Args:
        trainable: the Parameters that train at all.
    """
    for bn in batchnorms(model):
        bn.train(not frozen)
        for parameter in bn.parameters(recurse=False):
            if parameter in trainable:
                parameter.requires_grad_(not frozen)


@torch.no_grad()
def reestimate(model: nn.Module, data: Iterable[Inputs]) -> int:
    """Statistics of every BatchNorm anew: the mean over batches of what each batch has, all weights fixed.

    Everything else runs as in evaluation. Afterwards the model is in eval mode, momenta as they were.

    Returns:
        How many batches there were; with none the statistics stay.
    """
    norms, count = batchnorms(model), 0
    model.eval()
    momenta = [bn.momentum for bn in norms]
    kept = [{n: b.clone() for n, b in bn.named_buffers(recurse=False)} for bn in norms]
    try:
        for bn in norms:
            bn.reset_running_stats()
            bn.momentum = None  # torch's name for a cumulative average
            bn.train()
        for inputs in data:
            inputs.call(model)
            count += 1
    finally:
        for bn, momentum, buffers in zip(norms, momenta, kept, strict=True):
            bn.momentum = momentum
            bn.eval()
            if not count:
                for name, value in buffers.items():
                    bn.get_buffer(name).copy_(value)
    return count

"""Every scale of a prepared model, chosen once: what calibration is, for PTQ and for training."""

from __future__ import annotations

from typing import Any

from lowbit import distributed
from lowbit.graph.inputs import Note
from lowbit.model import QuantizedModel
from lowbit.nn.quantizer import Quantizer
from lowbit.passes.calibrate import calibrate_activations, calibrate_weights
from lowbit.passes.fold_bn import make_gains_positive

__all__ = ["calibrate_for_training", "choose_scales"]


def choose_scales(
    q: QuantizedModel, data: Any, num_batches: int | None = None, *, over_ranks: bool = False
) -> None:
    """Ranges of the weights from themselves, of the activations from the data, streamed once.

    Args:
        over_ranks: every rank calls this; each runs a part of the data.
    """
    calibrate_weights(q.graph)
    unreached = calibrate_activations(q.graph, data, num_batches, over_ranks=over_ranks)
    q.notes += [Note(name, "no calibration data reached it; it stays in float") for name in unreached]


def calibrate_for_training(q: QuantizedModel, data: Any, num_batches: int | None = None) -> None:
    """Choose every scale, and make Parameters of those that the recipe's estimators train."""
    distributed.join()
    # ranks that began with other weights would find other ranges
    distributed.same_everywhere([*q.parameters(), *q.buffers()])
    make_gains_positive(q.graph)
    choose_scales(q, data, num_batches, over_ranks=True)
    for module in q.graph.modules():
        if isinstance(module, Quantizer):
            module.learn()

"""From data to scales: run the float model, let every quantizer watch, then let them quantize."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from lowbit import distributed
from lowbit.core.affine import check_finite
from lowbit.errors import LowbitError
from lowbit.graph.trace import Inputs
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.progress import track

__all__ = ["batches", "calibrate_activations", "calibrate_weights"]


def batches(data: Any, num_batches: int | None = None) -> Iterator[Inputs]:
    """Model inputs from a DataLoader, a list, any iterable of batches; one tensor or dict is one batch.

    Raises:
        LowbitError: the data is no iterable, or a batch is of an unknown kind.
    """
    if isinstance(data, (torch.Tensor, dict)):
        data = [data]
    if not isinstance(data, Iterable):
        raise LowbitError(
            f"calibration data is a {type(data).__name__}; "
            "pass a DataLoader, a list or any iterable of batches"
        )
    if num_batches is not None and (not isinstance(num_batches, int) or num_batches < 1):
        raise LowbitError(f"num_batches={num_batches!r} is not a whole number from 1 up; None takes all")
    for i, batch in enumerate(data):
        if i == num_batches:
            return
        yield Inputs.of(batch)


def calibrate_weights(model: nn.Module) -> None:
    """Choose the scale of every latent weight, as its weight observer does.

    Raises:
        LowbitError: a weight holds NaN or infinity.
    """
    for path, layer in model.named_modules():
        if not isinstance(layer, QLayer) or layer.frozen_spec is not None:
            continue
        quantizer = layer.weight_quantizer
        weight = quantizer.reshaped(layer.weight.detach())
        check_finite(weight, f"the weight of '{path}'")
        if quantizer.spec.kind == "int":
            quantizer.take(quantizer.fit(layer.weight.detach()))
        quantizer.observer = None
        quantizer.mode = "quantize"


def calibrate_activations(
    model: nn.Module, data: Any, num_batches: int | None = None, *, over_ranks: bool = False
) -> list[str]:
    """Stream the data once through the float model and set every activation quantizer from what it saw.

    Args:
        over_ranks: every rank of the process group calls this, and runs its share of the batches.

    Returns:
        Paths of the quantizers that no data reached; they stay off.

    Raises:
        LowbitError: there is no data, or it holds NaN or infinity.
    """
    activations = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, Quantizer) and not n.endswith("weight_quantizer") and not m.spec.dynamic
    }
    if not activations:
        return []
    modes = [
        (m, m.mode) for n, m in model.named_modules() if isinstance(m, Quantizer) and n not in activations
    ]
    for quantizer, _ in modes:
        quantizer.mode = "off"
    for quantizer in activations.values():
        quantizer.mode = "observe"
    count = samples = 0
    mine = _share(data, num_batches) if over_ranks else None
    with torch.inference_mode():
        for i, inputs in enumerate(track(batches(data, num_batches), "calibrating")):
            if mine is not None and i not in mine:
                continue
            try:
                inputs.call(model)
            except LowbitError as error:
                behind = [
                    n
                    for n, m in activations.items()
                    if m.observer is not None and m.observer.batches <= count
                ]
                raise LowbitError(f"'{behind[0]}', batch {i}: {error}" if behind else str(error)) from None
            count += 1
            samples += inputs.batch_size
    if mine is not None:
        distributed.merge_observers({n: m.observer for n, m in activations.items() if m.observer is not None})
        samples = round(distributed.add_over_ranks([samples])[0])
    if not samples:
        raise LowbitError(
            "the calibration data holds no batch with a sample; pass at least one (100 samples are wise)"
        )
    for quantizer, mode in modes:
        quantizer.mode = mode
    return [name for name, quantizer in activations.items() if not quantizer.finish_observing()]


def _share(data: Any, num_batches: int | None) -> Container[int] | None:
    """Numbers of the batches that this rank runs; None for all, without merging: every rank sees the same."""
    if distributed.world() == 1:
        return None
    samplers = (getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    if any(isinstance(s, DistributedSampler) for s in samplers):
        return range(sys.maxsize)
    try:
        total = 1 if isinstance(data, (torch.Tensor, dict)) else len(data)
    except TypeError:
        return None
    return distributed.share(total if num_batches is None else min(total, num_batches))

"""Weights that training cannot move any more."""

from __future__ import annotations

import torch

from lowbit.graph.match import path_name
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer

__all__ = ["starved"]

# of the weights of a layer: beyond it a reader should know
SHARE = 0.5


def starved(q: QuantizedModel) -> list[str]:
    """A sentence for each layer most of whose weights get no gradient, because they lie outside the clip."""
    found = []
    for path, layer in q.graph.named_modules():
        if isinstance(layer, QLayer) and layer.frozen_spec is None and layer.weight_quantizer.ready:
            share = _without_gradient(layer)
            if share > SHARE:
                name = path_name(q.graph, path)
                found.append(
                    f"'{name}': {share:.0%} of the weights lie where their estimator has no gradient, and no "
                    "longer move; in the rule reshape='recu' or 'clip' brings them back, and estimator='ede' "
                    "reaches them"
                )
    return found


def _without_gradient(layer: QLayer) -> float:
    quantizer, training = layer.weight_quantizer, layer.weight_quantizer.training
    if quantizer.mode != "quantize" or quantizer.spec.kind != "int" or not layer.weight.numel():
        return 0.0
    quantizer.eval()  # nothing follows the tensor
    try:
        with torch.enable_grad():
            weight = layer.weight.detach().clone().requires_grad_()
            # no even gradient, for what takes a mean off would cancel it
            generator = torch.Generator().manual_seed(0)
            g = torch.randn(weight.shape, generator=generator).to(weight.device)
            (slope,) = torch.autograd.grad(quantizer(weight), weight, g)
    finally:
        quantizer.train(training)
    return float((slope.abs() < 1e-6).float().mean())

"""Bits that fall step by step: 32, 4, 3, 2. A stage of b bits keeps every quantizer at b or more.

Zhuang et al. 2018, "Towards effective low-bitwidth convolutional neural networks", section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer

__all__ = ["OFF", "active", "check", "enter", "stage_of", "targets_of"]

# quantizers do not quantize in a stage of that many bits
OFF = 32


def active(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers that have a scale, by path."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}
    return {n: m for n, m in found.items() if m.spec.kind == "int" and m.scale.numel()}


def targets_of(model: nn.Module) -> dict[str, QuantSpec]:
    """The spec that each quantizer must end with."""
    return {n: m.spec for n, m in active(model).items() if m.mode == "quantize"}


def check(bits: tuple[int, ...], targets: Mapping[str, QuantSpec]) -> None:
    """Raise LowbitError unless the last stage has every quantizer at its target."""
    narrowest = min((spec.bits for spec in targets.values()), default=OFF)
    if bits and bits[-1] > narrowest:
        raise LowbitError(
            f"bits={bits!r} ends at {bits[-1]} bits, and the recipe asks for {narrowest}; "
            f"end with {narrowest}"
        )


def stage_of(epoch: int, epochs: int, stages: int) -> tuple[int, int, int]:
    """(number of the stage, its first epoch, the epoch after its last); the epochs are split evenly."""
    index = epoch * stages // epochs
    return index, -(-index * epochs // stages), -(-(index + 1) * epochs // stages)


def enter(model: nn.Module, targets: Mapping[str, QuantSpec], bits: int, *, search: bool = True) -> list[str]:
    """Set every quantizer to the wider of `bits` and its target.

    Where the width changes, activations keep their range; that of a weight is searched anew, and so it is
    after a stage without quantization, in which the weight has moved.

    Args:
        search: False sets the width alone, for scales that are loaded next.

    Returns:
        Paths of the quantizers whose scale has another meaning now.
    """
    changed = []
    for module in model.modules():
        if isinstance(module, Quantizer) and module.spec.dynamic:
            module.mode = "off" if bits == OFF else "quantize"
    weights = {id(m.weight_quantizer): m for m in model.modules() if isinstance(m, QLayer)}
    for path, quantizer in active(model).items():
        if path not in targets:
            continue
        rested = quantizer.mode == "off" and bits != OFF
        quantizer.mode = "off" if bits == OFF else "quantize"
        for name in quantizer.learned:
            getattr(quantizer, name).requires_grad_(bits != OFF)
        wanted = targets[path] if bits == OFF else _widened(targets[path], bits)
        layer = weights.get(id(quantizer))
        if wanted == quantizer.spec and not (rested and layer is not None):
            continue
        changed.append(path)
        if search and layer is not None:
            quantizer.spec = wanted
            quantizer.take(quantizer.fit(layer.weight.detach()))
            continue
        ends = _range(quantizer)
        quantizer.spec = wanted
        if search:
            quantizer.set_range(*ends)
    return changed


def _widened(spec: QuantSpec, bits: int) -> QuantSpec:
    return spec.at(bits) if spec.bits < bits else spec


def _range(quantizer: Quantizer) -> tuple:  # type: ignore[type-arg]
    """Ends of what the codes stand for."""
    scale, zero_point = (t if t is None else t.detach() for t in quantizer.grid())
    assert scale is not None
    zero = 0 if zero_point is None else zero_point
    return (quantizer.spec.qmin - zero) * scale, (quantizer.spec.qmax - zero) * scale

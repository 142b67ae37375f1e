"""Recipes by name."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

from lowbit.core.spec import (
    DYNAMIC8,
    FP16,
    INT8,
    TERNARY,
    UINT8,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
)
from lowbit.errors import LowbitError, near_miss
from lowbit.recipe import SPECS, Recipe, Rule

__all__ = ["preset", "presets"]

_EDGES = "the first and the last layer keep 8 bits"
_SHORTCUTS = "with one bit elsewhere, 1x1 convolutions beside a residual branch keep 8 bits"
_NAME = re.compile(r"(?:w([1-8])|ternary)(?:a([1-8])|a(8)-dynamic)?")
_FIXED = re.compile(r"fixed([2-9]|1[0-6])")
# activations of one bit; behind a ReLU `place` makes the codes 0 and 1 of it
SIGN = SPECS["sign"]


def presets() -> tuple[str, ...]:
    """Names that `preset` takes; any other width from 1 to 8 is written in the same way."""
    return (
        "w8a8",
        "w8",
        "w4a8",
        "w8a8-dynamic",
        "w4a8-dynamic",
        "w4",
        "w4a4",
        "w3a3",
        "w2a2",
        "ternary",
        "b1.58",
        "w1",
        "w1a1",
        "fixed8",
        "fixed6",
        "fp16",
    )


def preset(
    name: str,
    *,
    observer: str = "mse",
    weight_granularity: Literal["channel", "tensor"] | int = "channel",
    estimator: str = "lsq",
) -> Recipe:
    """A recipe by name: `w8a8`, `w4a4`, ... `w1a1`, `w8`, ... `w1` (weights alone); `ternary`; `fp16`.

    Below 8 bits the first and the last layer keep 8-bit weights and inputs. Where activations have fewer than
    8 bits, these are the inputs of layers; sums, averages and the residual stream keep 8. Codes of
    `w1` to `w3` are odd (-3, -1, 1 and 3): as many on either side. Activations of one bit are signs, behind a
    ReLU 0 and 1. With one bit, 1x1 convolutions that are a shortcut by themselves keep 8 bits as well: they
    are few, and carry everything past a block (Liu et al., "Bi-Real Net", 2018). `ternary`, `ternarya8` and
    so on have weights of -1, 0 and 1; `b1.58` has them with the mean magnitude of the tensor for the scale,
    whatever the granularity, and 8-bit activations. BatchNorm is kept for training and folded at freeze.
    Without training, weights below 8 bits are rounded by GPTQ.

    `w8a8-dynamic`, `w4a8-dynamic` and so on: what linear layers read is rounded by the range that each token
    has itself as the network runs, and everything else stays in float; activations need no data.

    `fixed8`, `fixed6` and so on, up to 16 bits, are fixed point for hardware: one power of two for each
    tensor, first and last layer too; no zero point, and no sign behind a ReLU; BatchNorm folded at once.

    Args:
        observer: how ranges of activations are chosen; see `lowbit.core.observers`.
        weight_granularity: one scale per output channel, per tensor, or per group of that many inputs.
        estimator: gradient of rounding in training; see `lowbit.core.estimators`.

    Raises:
        LowbitError: no such preset, observer, granularity or estimator.
    """
    if name == "fp16":
        return Recipe(rules=(Rule(weight=FP16),))
    point = _FIXED.fullmatch(str(name))
    if point is not None:
        return _fixed(int(point[1]), observer, weight_granularity, estimator)
    if name == "b1.58":
        base = preset("ternarya8", observer=observer, weight_granularity="tensor", estimator=estimator)
        return replace(base, rules=(*base.rules[:-1], replace(base.rules[-1], weight_observer="absmean")))
    found = _NAME.fullmatch(str(name))
    if found is None:
        raise LowbitError(f"no preset is named '{name}'{near_miss(name, presets())}")
    where = _granularity(weight_granularity)
    bits, inputs = int(found[1] or 2), int(found[2] or found[3] or 0)
    activation = DYNAMIC8 if found[3] else UINT8 if inputs else None
    weight = replace(INT8, granularity=where)
    wide = Rule(weight=weight, activation=activation, observer=observer, estimator=estimator)
    more: dict[str, Any] = {"fold_bn": "after", "refine": ("affine_correct",), "smooth": True}
    if bits == 8 and inputs in (8, 0):
        return Recipe(rules=(wide,), equalize=where == PerTensor(), **more)
    codes = replace(TERNARY, granularity=where) if found[1] is None else _odd_when_few(bits, where)
    more["refine"] = ("gptq",)
    return Recipe(rules=_few_bits(wide, codes, inputs), equalize=True, **more)


def _few_bits(wide: Rule, codes: QuantSpec, inputs: int) -> tuple[Rule, ...]:
    """Weights of these codes but in the first and the last layer, and what layers read in so many bits."""
    # a group size that suits the inner layers rarely divides the inputs of the first
    edge = wide if codes.granularity == PerTensor() else replace(wide, weight=INT8)
    edge = replace(edge, reason=_EDGES)
    edges = tuple(replace(edge, match=f"role:{role}") for role in ("first", "last"))
    if codes.is_binary or inputs == 1:
        edges = (*edges, replace(edge, match="role:shortcut", reason=_SHORTCUTS))
    narrow = replace(wide, weight=codes)
    if not 0 < inputs < 8:
        return (*edges, narrow)
    read = SIGN if inputs == 1 else replace(UINT8, bits=inputs)
    layers = replace(narrow, match="role:layer", activation=read)
    return (*edges, layers, replace(wide, weight=None))


def _fixed(bits: int, observer: str, where: Any, estimator: str) -> Recipe:
    """Powers of two everywhere; hardware has one type for a tensor, so by default one scale too."""
    if isinstance(where, int):
        raise LowbitError(
            f"weight_granularity={where}: in hardware no group of weights has a scale of its own; use "
            "'tensor'"
        )
    code = QuantSpec(bits=bits, scale="pow2")
    weight = replace(code, granularity=PerTensor())
    rule = Rule(weight=weight, activation=code, observer=observer, estimator=estimator)
    return Recipe(rules=(rule,), equalize=True, refine=("bias_correct",))


def _odd_when_few(bits: int, where: Granularity) -> QuantSpec:
    return QuantSpec(bits=bits, granularity=where, mid_rise=bits <= 3)


def _granularity(where: str | int) -> Granularity:
    if isinstance(where, int):
        return PerGroup(1, where)
    if where not in ("channel", "tensor"):
        raise LowbitError(f"weight_granularity='{where}' is unknown; use 'channel', 'tensor' or a group size")
    return PerTensor() if where == "tensor" else PerChannel(0)

"""Choosing for the user: recipes from the cheapest to the dearest, and the first that holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from torch import nn

from lowbit.core.rounding import Gain
from lowbit.errors import LowbitError
from lowbit.model import QuantizedModel, Step
from lowbit.presets import preset
from lowbit.recipe import Recipe, exactly

__all__ = ["BITS", "MAX_DROP", "Metric", "Rung", "climb"]

# of the metric that may be lost, in its own units, and bits of weights, unless asked
MAX_DROP, BITS = 0.5, 8

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Rung:
    """One recipe of the ladder, in words and as data."""

    text: str
    recipe: Recipe


def climb(
    model: nn.Module,
    quantize: Callable[[Recipe], QuantizedModel],
    metric: Metric,
    *,
    max_drop: float = MAX_DROP,
    bits: int = BITS,
) -> QuantizedModel:
    """The first recipe whose metric is at most `max_drop` below that of the float model.

    The rungs: ranges by min-max; by least squared error; equalized, scale and bias of each output channel
    corrected; rounding by GPTQ; then 8 bits for the layers that keep least of their output, one, two, four of
    them and so on. Where none holds, the best of them. Each rung is a step of the result.

    Args:
        quantize: what a recipe makes of the model.
        metric: of a model, larger is better.
        bits: of the weights, but in the first and last layer.

    Raises:
        LowbitError: `metric` gives no finite number, `max_drop` is none from 0 up, or there is no preset of
            so many bits.
    """
    if isinstance(max_drop, bool) or not isinstance(max_drop, Real) or not 0 <= max_drop < math.inf:
        raise LowbitError(
            f"max_drop={max_drop!r} is not a finite number from 0 up; it says how much may be lost"
        )
    rungs = _rungs(bits)
    model.eval()
    ladder = _Ladder(quantize, metric, _value(metric, model) - max_drop)
    if not any(ladder.holds(rung) for rung in rungs) and bits < 8:
        any(ladder.holds(rung) for rung in _wider(rungs[-1], ladder.last))
    return ladder.answer()


class _Ladder:
    """What was tried, and the best of it."""

    def __init__(self, quantize: Callable[[Recipe], QuantizedModel], metric: Metric, floor: float) -> None:
        self.quantize, self.metric, self.floor = quantize, metric, floor
        self.steps: list[Step] = []
        self.value = -math.inf

    def holds(self, rung: Rung) -> bool:
        """Try one rung."""
        self.last = self.quantize(rung.recipe)
        value = _value(self.metric, self.last)
        found = "holds" if value >= self.floor else f"less than {self.floor:.6g}"
        self.steps.append(Step("auto", f"{rung.text}: {value:.6g}, {found}"))
        if value > self.value:
            self.value, self.best = value, self.last
        return value >= self.floor

    def answer(self) -> QuantizedModel:
        """The best model, which holds if any does, with the ladder before its own steps."""
        if self.value < self.floor:
            self.steps.append(Step("auto", f"no rung holds; this is the best, {self.value:.6g}"))
        self.best.steps = [*self.steps, *self.best.steps]
        return self.best


def _value(metric: Metric, model: nn.Module) -> float:
    value: Any = metric(model)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise LowbitError(f"metric(model) returned {value!r}, which ranks nothing; return a finite number")
    return number


def _rungs(bits: int) -> list[Rung]:
    name = f"w{bits}a8"
    plain: dict[str, Any] = {"equalize": False, "smooth": False, "refine": ()}
    whole = preset(name)
    return [
        Rung(f"{name}, ranges by min-max", replace(preset(name, observer="minmax"), **plain)),
        Rung(f"{name}, ranges by least squared error", replace(whole, **plain)),
        Rung(f"{name}, equalized and corrected", replace(whole, refine=("affine_correct",))),
        Rung(f"{name}, rounded by GPTQ", replace(whole, refine=("gptq",))),
    ]


def _kept(gain: Gain) -> float:
    """What is left of the output of a layer, in dB."""
    return -math.inf if gain.after_db is None else gain.after_db


def _wider(rung: Rung, q: QuantizedModel) -> Iterator[Rung]:
    """More and more layers in 8 bits, those first of whose output `q` keeps least."""
    gains = sorted((g for s in q.steps for g in s.layers if not g.why), key=_kept)
    edge, count = rung.recipe.rules[0], 1
    while count < 2 * len(gains):
        worst = gains[:count]
        reason = f"among the {len(worst)} layers of whose output least was left"
        rules = (replace(edge, match=exactly(g.name), reason=reason) for g in worst)
        recipe = replace(rung.recipe, rules=(*rules, *rung.recipe.rules))
        yield Rung(f"{rung.text}, {len(worst)} of {len(gains)} layers in 8 bits", recipe)
        count *= 2

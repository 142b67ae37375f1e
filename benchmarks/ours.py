"""lowbit's rows: the variants that are measured, through its public API and nothing else."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    import lowbit

OBSERVERS = ("minmax", "moving_average", "percentile", "adaptive_percentile", "kl", "mse")
BIAS = ("bias_correct",)  # Recipe.refine: empirical bias correction alone
AFFINE = ("affine_correct",)  # Recipe.refine: scale and bias of each output channel, the default


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A preset and what is changed in it; None leaves the preset's own choice."""

    preset: str = "w8a8"
    observer: str | None = None
    weights: str | None = None  # granularity of weight scales: "tensor" or "channel"
    weight_observer: str | None = None  # how weight ranges are chosen: "mse" or "minmax"
    equalize: bool | None = None
    refine: tuple[str, ...] | None = None

    def recipe(self) -> lowbit.Recipe:
        """The preset with the changes in it."""
        import lowbit

        options: dict[str, Any] = {"observer": self.observer, "weight_granularity": self.weights}
        recipe = lowbit.preset(self.preset, **{k: v for k, v in options.items() if v is not None})
        changes: dict[str, Any] = {"equalize": self.equalize, "refine": self.refine}
        if self.weight_observer is not None:
            rules = (dataclasses.replace(r, weight_observer=self.weight_observer) for r in recipe.rules)
            changes["rules"] = tuple(rules)
        return dataclasses.replace(recipe, **{k: v for k, v in changes.items() if v is not None})


def available() -> bool:
    """Whether lowbit can be imported here."""
    return importlib.util.find_spec("lowbit") is not None


def quantize(model: nn.Module, variant: Variant, batches: Sequence[Tensor]) -> nn.Module:
    """`model` quantized after calibration on `batches` [B, ...]; `model` itself is not changed."""
    import lowbit

    return lowbit.quantize(model, variant.recipe(), calibration=list(batches))

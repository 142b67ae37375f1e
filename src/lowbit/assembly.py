"""The float graph that a recipe asks for, and quantizers placed on it."""

from __future__ import annotations

import torch
from torch import fx, nn

from lowbit.errors import LowbitError, expect
from lowbit.graph.trace import Inputs, Note, trace
from lowbit.model import QuantizedModel
from lowbit.passes.equalize import equalize
from lowbit.passes.fold_bn import fold_bn, fold_later
from lowbit.passes.place import place, resolve
from lowbit.passes.smooth import Factors, smooth
from lowbit.recipe import Recipe

__all__ = ["assemble", "float_graph", "smoothed"]

NEVER_NEGATIVE = (
    "it is never negative, so its sign would always be 1; its bit is 0 or 1 instead. For -1 and 1 put no "
    "ReLU in front of a sign: use Hardtanh, PReLU, or nothing"
)


def float_graph(
    model: nn.Module, recipe: Recipe, example: Inputs, factors: Factors | None = None
) -> tuple[fx.GraphModule, list[Note]]:
    """The float model as the recipe prepares it: traced, folded, equalized; the quantized one's twin.

    A scale that is a power of two cannot take up a factor: BatchNorm behind such a weight is folded at once.

    Args:
        factors: of smoothing, as they were found on data; without them all are 1.
    """
    expect(model, nn.Module, "model", "pass the network itself, such as nn.Linear(4, 2)")
    if isinstance(model, QuantizedModel):
        raise LowbitError("model is quantized already; pass the float model that it was made from")
    gm, notes = trace(model, example)
    kept: list[tuple[str, str]] = []
    if recipe.fold_bn == "before":
        kept = fold_bn(gm)
    elif recipe.fold_bn == "after":
        now = {d.name for d in resolve(gm, recipe) if d.weight is not None and d.weight.scale == "pow2"}
        kept = fold_later(gm, now)
    notes += [Note(name, f"BatchNorm stays, {why}") for name, why in kept]
    if recipe.equalize:
        equalize(gm)
    if recipe.smooth:
        smooth(gm, smoothed(gm, recipe), factors or {})
    return gm, notes


def smoothed(gm: fx.GraphModule, recipe: Recipe) -> frozenset[str]:
    """Names of the layers that gain from smooth inputs: those that round them, and those of narrow weights.

    The scales of hardware are powers of two, and take up no factor.
    """
    found = [d for d in resolve(gm, recipe) if d.weight is not None and d.weight.kind == "int"]
    gains = [d for d in found if d.activation is not None or (d.weight is not None and d.weight.bits < 8)]
    return frozenset(d.name for d in gains if "pow2" not in {s.scale for s in (d.weight, d.activation) if s})


def assemble(gm: fx.GraphModule, recipe: Recipe, example: Inputs, notes: list[Note]) -> QuantizedModel:
    """Quantizers placed on what `float_graph` returned; nothing is calibrated."""
    gm.meta["decisions"] = place(gm, recipe)
    weight = next(gm.parameters(), None)
    if weight is not None:
        gm.to(weight.device)  # the quantizers too
    signs = [Note(name, NEVER_NEGATIVE) for name in dict.fromkeys(gm.meta.pop("bits_for_signs", ()))]
    return QuantizedModel(gm, recipe, _stand_in(example, gm), [*notes, *signs])


def _stand_in(example: Inputs, gm: fx.GraphModule) -> Inputs:
    """A call of the shapes that tracing saw, which holds none of the data."""
    few = example.with_samples(2)
    try:
        with torch.no_grad():
            few.call(gm)
    except Exception:  # as in tracing: the first axis is not the batch
        few = example
    return few.made_up()

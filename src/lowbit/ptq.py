"""Post-training quantization: from a float model to codes, each step measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.assembly import assemble, float_graph
from lowbit.errors import LowbitError, expect
from lowbit.graph.trace import Inputs
from lowbit.ladder import Metric, climb
from lowbit.model import QuantizedModel, Step
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.passes.bias_correct import correct_bias_analytically
from lowbit.passes.calibrate import batches
from lowbit.passes.fold_bn import fold_quantized
from lowbit.passes.settle_biases import settle_biases
from lowbit.recipe import Recipe
from lowbit.scales import calibrate_for_training, choose_scales
from lowbit.trial import Trial

__all__ = ["calibrate", "freeze", "prepare", "quantize"]


def quantize(
    model: nn.Module,
    recipe: str | Recipe = "w8a8",
    calibration: Any = None,
    *,
    num_batches: int | None = None,
    example_inputs: Any = None,
    metric: Metric | None = None,
    max_drop: float | None = None,
    bits: int | None = None,
    out: str | Path | None = None,
) -> QuantizedModel:
    """Post-training quantization in one call. The model is left as it was.

    Trace, fold BatchNorm, equalize, smooth, place quantizers, calibrate, correct biases, freeze. What evens
    ranges, and what corrects, is kept only when it raises the SQNR of the output on the calibration data;
    `result.steps` says what each did.

    Args:
        model: any nn.Module; it is evaluated, never trained.
        recipe: a preset ("w8a8", "w8", "w4a8", "w4", "fp16"), a Recipe, or the path of a YAML file. Or
            "auto": recipes are tried from the cheapest to the dearest, and the first that holds is taken.
        calibration: a DataLoader, a list, or any iterable of tensors, tuples (the first element is the input)
            or dicts (keyword arguments). Labels are never needed. Without it only weights can be quantized.
        num_batches: how many batches of it to use; all by default.
        example_inputs: one batch, for tracing, when there is no calibration data.
        metric: of "auto": what is compared, larger is better; it is given the float model and quantized ones.
        max_drop: of "auto": how much of the metric may be lost, in its own units; 0.5 by default.
        bits: of "auto": of weights, but for the first and last layer and those that turn out to need more; 8
            by default.
        out: folder in which every layer or block is that `gptq`, `adaround` or `brecq` has rounded; the same
            call goes on from there. Not for "auto".

    Raises:
        LowbitError: activations are to be quantized without data, a rule matches nothing, the model does not
            run; what is for "auto" goes with another recipe.
    """
    asked = {"metric": metric, "max_drop": max_drop, "bits": bits}
    for_auto = {name: value for name, value in asked.items() if value is not None}
    if recipe == "auto":
        if out is not None:
            raise LowbitError("out keeps the layers of one recipe, and 'auto' tries several; leave it out")
        return _first_that_holds(model, calibration, num_batches, for_auto)
    for name, value in for_auto.items():
        shown = f"'{recipe}'" if isinstance(recipe, str) else f"a {type(recipe).__name__}"
        raise LowbitError(
            f"{name}={value!r} is for the recipe 'auto', and the recipe is {shown}; leave {name} out, or "
            "pass 'auto'"
        )
    recipe = Recipe.get(recipe)
    if recipe.fold_bn == "after":  # without training in between it is the same, and corrections see the fold
        recipe = replace(recipe, fold_bn="before")
    if calibration is None:
        return _quantize_without_data(model, recipe, example_inputs)
    return _quantize_on_data(model, recipe, calibration, num_batches, out)


def _first_that_holds(
    model: nn.Module, calibration: Any, num_batches: int | None, asked: dict[str, Any]
) -> QuantizedModel:
    """The recipe "auto"; `asked` are the arguments that are its own."""
    if "metric" not in asked or calibration is None:
        raise LowbitError(
            "'auto' compares recipes on your data; pass calibration=... and metric=..., a function of a "
            "model, such as its accuracy"
        )
    data = list(batches(calibration, num_batches))
    return climb(model, partial(quantize, model, calibration=data), **asked)


def _quantize_on_data(
    model: nn.Module, recipe: Recipe, calibration: Any, num_batches: int | None, out: str | Path | None
) -> QuantizedModel:
    if isinstance(calibration, Iterator):
        calibration = list(batches(calibration, num_batches))
    example = next((b for b in batches(calibration, num_batches) if b.batch_size), None)
    if example is None:
        raise LowbitError(
            "the calibration data holds no batch with a sample; pass at least one (100 samples are wise)"
        )

    plain = replace(recipe, equalize=False, smooth=False)
    base, notes = float_graph(model, plain, example)
    trial = Trial.on(base, example, notes, calibration, num_batches, out)
    q, reference = trial.calibrated(base, plain), base
    quality = trial.quality(q.graph)
    if recipe.equalize:
        q, reference, quality = trial.equalize(q, base, quality)
    if recipe.smooth:
        q, reference, quality = trial.smooth(q, reference, quality)
    for step in recipe.refine:
        q, quality = trial.refine(step, q, reference, quality)
    return freeze(q)


def prepare(model: nn.Module, recipe: str | Recipe, example_inputs: Any) -> QuantizedModel:
    """Trace, fold, equalize and place quantizers; ready for `calibrate`, and then for training.

    The latent weights keep their names, so with BatchNorm kept (`fold_bn="after"`, as in the presets)
    `load_state_dict` takes a checkpoint of the float model.

    Smoothing, which needs data before quantizers are placed, is left to `quantize`.

    Args:
        example_inputs: one batch, as calibration data has them.
    """
    recipe, example = replace(Recipe.get(recipe), smooth=False), Inputs.of(example_inputs)
    gm, notes = float_graph(model, recipe, example)
    return assemble(gm, recipe, example, notes)


def calibrate(q: QuantizedModel, calibration: Any, *, num_batches: int | None = None) -> QuantizedModel:
    """Choose every scale: of the weights from themselves, of the activations from the data, streamed once.

    Scales that the recipe's estimators train become Parameters: make the optimizer after this.

    Under `torchrun` every rank calls this with the same data in the same order: each runs a contiguous share
    of the batches, and all end with the ranges that one process would have found, exactly. Data without a
    length is run by every rank; batches of a DistributedSampler are a rank's own.

    Args:
        calibration: as for `quantize`.

    Raises:
        LowbitError: the model is frozen, or the data does not fit it.
    """
    expect(q, QuantizedModel, "q", "make it with lowbit.prepare(model, recipe, example)")
    if any(isinstance(m, QLayer) and m.frozen_spec is not None for m in q.graph.modules()):
        raise LowbitError(
            "the model is frozen, so its float weights are gone; calibrate what lowbit.prepare returns"
        )
    calibrate_for_training(q, calibration, num_batches)
    return q


def freeze(q: QuantizedModel) -> QuantizedModel:
    """Keep only codes, scales and zero points of the quantized weights; the latent floats go.

    BatchNorm kept for training goes into scales and biases, so that the codes are those that were trained.

    Raises:
        LowbitError: a scale is not known yet.
    """
    expect(q, QuantizedModel, "q", "make it with lowbit.prepare(model, recipe, example)")
    layers = {p: m for p, m in q.graph.named_modules() if isinstance(m, QLayer) and m.frozen_spec is None}
    for path, layer in layers.items():
        if not layer.weight_quantizer.ready:
            raise LowbitError(f"'{path}' has no scale yet; call lowbit.calibrate(q, data) before freeze")
        layer.settle()
    for module in q.graph.modules():
        if isinstance(module, Quantizer):
            module.settle()
    moved = fold_quantized(q.graph)
    if moved:
        where = ", ".join(f"{count} of '{name}'" for name, count in moved.items())
        q.steps.append(
            Step("fold_bn", f"gamma turned negative in training; codes moved by one step: {where}")
        )
    if q.recipe.fold_bn == "after":
        q.recipe = replace(q.recipe, fold_bn="before")
    settle_biases(q.graph)
    for layer in layers.values():
        layer.freeze()
    return q.eval()


def _quantize_without_data(model: nn.Module, recipe: Recipe, example_inputs: Any) -> QuantizedModel:
    if recipe.calibrates:
        raise LowbitError(
            "the recipe quantizes activations, whose ranges come from data; pass calibration=..., or use "
            "'w8' or 'w8a8-dynamic'"
        )
    if example_inputs is None:
        raise LowbitError("tracing needs one batch to see shapes; pass calibration=... or example_inputs=...")
    q = prepare(model, recipe, example_inputs)
    choose_scales(q, [], None)
    if recipe.refine:
        names = correct_bias_analytically(q.graph)
        q.steps.append(
            Step("bias_correct", f"{len(names)} layers, from BatchNorm statistics, for there is no data")
        )
    return freeze(q)

"""Post-training quantization: from a float model to codes, each step measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.core.integer import bias_codes
from lowbit.core.qtensor import sqnr_db
from lowbit.errors import LowbitError
from lowbit.graph.match import calls, input_quantizer, layer_nodes
from lowbit.graph.ops import module_of
from lowbit.graph.rewrite import clone
from lowbit.graph.run import flat_tensors, peak_bytes
from lowbit.graph.trace import Inputs, Note, trace
from lowbit.model import QuantizedModel, Step
from lowbit.nn.layers import QLayer
from lowbit.passes.bias_correct import correct_bias_analytically, correct_outputs
from lowbit.passes.calibrate import batches, calibrate_activations, calibrate_weights
from lowbit.passes.equalize import equalize
from lowbit.passes.fold_bn import fold_bn
from lowbit.passes.place import place
from lowbit.recipe import Recipe

__all__ = ["assemble", "calibrate", "float_graph", "freeze", "prepare", "quantize"]

# Corrections hold the activations of their samples in memory; this bounds them.
SAMPLE_BYTES = 1 << 30
MAX_SAMPLES = 512


def quantize(
    model: nn.Module,
    recipe: str | Recipe = "w8a8",
    calibration: Any = None,
    *,
    num_batches: int | None = None,
    example_inputs: Any = None,
) -> QuantizedModel:
    """Post-training quantization in one call. The model is left as it was.

    Trace, fold BatchNorm, equalize, place quantizers, calibrate, correct biases, freeze. Equalization and corrections are
    kept only when they raise the SQNR of the output on the calibration data; `result.steps` says what each did.

    Args:
        model: any nn.Module; it is evaluated, never trained.
        recipe: a preset ("w8a8", "w8", "w4a8", "w4", "fp16"), a Recipe, or the path of a YAML file.
        calibration: a DataLoader, a list, or any iterable of tensors, tuples (the first element is the input) or dicts
            (keyword arguments). Labels are never needed. Without it only weights can be quantized.
        num_batches: how many batches of it to use; all by default.
        example_inputs: one batch, for tracing, when there is no calibration data.

    Raises:
        LowbitError: activations are to be quantized without data, a rule matches nothing, the model does not run.
    """
    recipe = Recipe.get(recipe)
    if calibration is None and recipe.quantizes_activations:
        raise LowbitError("the recipe quantizes activations, whose ranges come from data; pass calibration=..., or use 'w8'")
    if calibration is None:
        if example_inputs is None:
            raise LowbitError("tracing needs one batch to see shapes; pass calibration=... or example_inputs=...")
        return _quantize_without_data(model, recipe, Inputs.of(example_inputs))
    if isinstance(calibration, Iterator):
        calibration = list(batches(calibration, num_batches))
    example = next(batches(calibration, num_batches), None)
    if example is None:
        raise LowbitError("the calibration data holds no batch; pass at least one (100 samples or more are wise)")

    base, notes = float_graph(model, replace(recipe, equalize=False), example)
    data = _sample(calibration, num_batches, base)
    q, reference = _calibrated(base, recipe, example, notes, calibration, num_batches), base
    quality = _output_sqnr(reference, q.graph, data)
    if recipe.equalize:
        other, reference = _equalized(base, recipe, example, notes, calibration, num_batches)
        after = _output_sqnr(base, other.graph, data)
        kept = after >= quality
        step = replace(other.steps.pop(), before_db=quality, after_db=after, kept=kept)
        q, reference, quality = (other, reference, after) if kept else (q, base, quality)
        q.recipe = replace(recipe, equalize=kept)
        q.steps.insert(0, step)
    for name in recipe.refine:
        q, quality = _refine(name, q, reference, data, quality)
    return freeze(q)


def prepare(model: nn.Module, recipe: str | Recipe, example_inputs: Any) -> QuantizedModel:
    """Trace, fold, equalize and place quantizers; ready for `calibrate`, or for training.

    Args:
        example_inputs: one batch, as calibration data has them.
    """
    recipe, example = Recipe.get(recipe), Inputs.of(example_inputs)
    gm, notes = float_graph(model, recipe, example)
    return assemble(gm, recipe, example, notes)


def calibrate(q: QuantizedModel, calibration: Any, *, num_batches: int | None = None) -> QuantizedModel:
    """Choose every scale: of the weights from themselves, of the activations from the data, streamed once.

    Args:
        calibration: as for `quantize`.
    """
    calibrate_weights(q.graph)
    unreached = calibrate_activations(q.graph, calibration, num_batches)
    q.notes += [Note(name, "no calibration data reached it; it stays in float") for name in unreached]
    return q


def freeze(q: QuantizedModel) -> QuantizedModel:
    """Keep only codes, scales and zero points of the quantized weights; the latent floats go.

    Raises:
        LowbitError: a scale is not known yet.
    """
    _settle_biases(q.graph)
    for path, layer in q.graph.named_modules():
        if isinstance(layer, QLayer) and layer.frozen_spec is None:
            if not layer.weight_quantizer.ready:
                raise LowbitError(f"'{path}' has no scale yet; call lowbit.calibrate(q, data) before freeze")
            layer.freeze()
    return q.eval()


def float_graph(model: nn.Module, recipe: Recipe, example: Inputs) -> tuple[fx.GraphModule, list[Note]]:
    """The float model as the recipe prepares it: traced, folded, equalized; node for node the quantized one's twin."""
    gm, notes = trace(model, example)
    if recipe.fold_bn:
        notes += [Note(name, f"BatchNorm stays, {why}") for name, why in fold_bn(gm)]
    if recipe.equalize:
        equalize(gm)
    return gm, notes


def assemble(gm: fx.GraphModule, recipe: Recipe, example: Inputs, notes: list[Note]) -> QuantizedModel:
    """Quantizers placed on what `float_graph` returned; nothing is calibrated."""
    gm.meta["decisions"] = place(gm, recipe)
    return QuantizedModel(gm, recipe, _stand_in(example, gm), list(notes))


def _calibrated(
    base: fx.GraphModule, recipe: Recipe, example: Inputs, notes: list[Note], data: Any, num_batches: int | None
) -> QuantizedModel:
    return calibrate(assemble(clone(base), recipe, example, notes), data, num_batches=num_batches)


def _equalized(
    base: fx.GraphModule, recipe: Recipe, example: Inputs, notes: list[Note], data: Any, num_batches: int | None
) -> tuple[QuantizedModel, fx.GraphModule]:
    """The same with equalized weights; also the equalized float graph. What was done is the last step."""
    scaled = clone(base)
    done = equalize(scaled)
    q = _calibrated(scaled, recipe, example, notes, data, num_batches)
    text = (
        f"{done.regions} regions over {done.layers} layers; "
        f"largest over smallest channel range {done.spread_before:.1f} -> {done.spread_after:.1f}"
    )
    q.steps.append(Step("equalize", text))
    return q, scaled


def _refine(
    step: str, q: QuantizedModel, reference: fx.GraphModule, data: list[Inputs], quality: float
) -> tuple[QuantizedModel, float]:
    """Apply one correction to a copy; keep it when the output gets better."""
    corrected = clone(q.graph)
    names = correct_outputs(corrected, reference, data, scale=step == "affine_correct")
    after = _output_sqnr(reference, corrected, data)
    kept = after >= quality
    samples = sum(_count(inputs) for inputs in data)
    q.steps.append(Step(step, f"{len(names)} layers over {samples} samples", quality, after, kept))
    if kept:
        q.graph = corrected
    return q, max(quality, after)


def _quantize_without_data(model: nn.Module, recipe: Recipe, example: Inputs) -> QuantizedModel:
    q = prepare(model, recipe, example)
    calibrate(q, [])
    if recipe.refine:
        names = correct_bias_analytically(q.graph)
        q.steps.append(Step("bias_correct", f"{len(names)} layers, from BatchNorm statistics, for there is no data"))
    return freeze(q)


def _settle_biases(gm: fx.GraphModule) -> None:
    """Put biases where integer kernels have them: 32 bits at the scale of the accumulator.

    A channel so small that its bias would not fit gets a larger scale. A layer called once keeps the rounded bias, so
    that the simulation adds what the kernel adds.
    """
    counts = calls(gm)
    for node in layer_nodes(gm):
        layer, source = module_of(node), input_quantizer(node)
        if not isinstance(layer, QLayer) or layer.frozen_spec is not None or source is None or layer.bias is None:
            continue
        quantizer, bias = layer.weight_quantizer, layer.bias.detach()
        if quantizer.spec.kind != "int" or source.spec.kind != "int" or source.scale.numel() != 1:
            continue
        need = bias.abs() / (source.scale.reshape(()) * 2.0**30)
        if quantizer.scale.numel() != bias.numel():
            quantizer.scale = torch.maximum(quantizer.scale, need.max())
        else:
            quantizer.scale = torch.maximum(quantizer.scale, need.reshape(quantizer.scale.shape))
        scale = source.scale.reshape(()) * quantizer.scale.reshape(-1)
        if counts[id(layer)] == 1 and scale.numel() in (1, bias.numel()):
            layer.bias = nn.Parameter(bias_codes(bias, scale) * scale)


def _sample(data: Any, num_batches: int | None, gm: fx.GraphModule) -> list[Inputs]:
    """As many batches as corrections can hold in memory, at most MAX_SAMPLES samples, at least one batch."""
    room = min(MAX_SAMPLES, SAMPLE_BYTES // max(1, 2 * peak_bytes(gm)))
    taken: list[Inputs] = []
    for inputs in batches(data, num_batches):
        if taken and room < _count(inputs):
            break
        taken.append(inputs)
        room -= _count(inputs)
    return taken


def _count(inputs: Inputs) -> int:
    tensors = [v for v in (*inputs.args, *inputs.kwargs.values()) if isinstance(v, Tensor) and v.ndim]
    return tensors[0].shape[0] if tensors else 1


def _output_sqnr(reference: nn.Module, q: nn.Module, data: list[Inputs]) -> float:
    """SQNR in dB of everything the model returns, over the data."""
    signal = noise = 0.0
    with torch.inference_mode():
        for inputs in data:
            for f, o in zip(flat_tensors(inputs.call(reference)), flat_tensors(inputs.call(q)), strict=True):
                signal += f.double().square().sum().item()
                noise += (f.double() - o.double()).square().sum().item()
    return sqnr_db(signal, noise)


def _stand_in(example: Inputs, gm: fx.GraphModule) -> Inputs:
    """A call of the shapes that tracing saw, which holds none of the data."""
    few = example.with_samples(2)
    try:
        with torch.no_grad():
            few.call(gm)
    except Exception:  # as in tracing: the first axis is not the batch
        few = example
    return few.made_up()

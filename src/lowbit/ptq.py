"""Post-training quantization: from a float model to codes, each step measured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.core.qtensor import sqnr_db
from lowbit.core.rounding import Gain
from lowbit.errors import LowbitError, expect
from lowbit.graph.rewrite import clone
from lowbit.graph.run import flat_tensors, noise_and_signal, peak_bytes
from lowbit.graph.trace import Inputs, Note, trace
from lowbit.ladder import Metric, climb
from lowbit.model import QuantizedModel, Step
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.passes.bias_correct import correct_bias_analytically, correct_outputs
from lowbit.passes.bonds import correct_bonds
from lowbit.passes.calibrate import batches
from lowbit.passes.equalize import equalize
from lowbit.passes.fold_bn import fold_bn, fold_later, fold_quantized
from lowbit.passes.place import place, resolve
from lowbit.passes.reconstruct import round_layers
from lowbit.passes.settle_biases import settle_biases
from lowbit.passes.smooth import Factors, smooth, smoothing_factors
from lowbit.recipe import Recipe
from lowbit.scales import calibrate_for_training, choose_scales

__all__ = ["assemble", "calibrate", "float_graph", "freeze", "prepare", "quantize"]

NEVER_NEGATIVE = (
    "it is never negative, so its sign would always be 1; its bit is 0 or 1 instead. For -1 and 1 put no "
    "ReLU in front of a sign: use Hardtanh, PReLU, or nothing"
)
# Corrections hold the activations of their samples in memory; this bounds them.
SAMPLE_BYTES = 1 << 30
MAX_SAMPLES = 512
# Samples that may say at once that a trial is not worth more.
FEW = 64
# how much of what is uneven smoothing takes from the activations: those tried
STRENGTHS = (0.5, 0.8)


def quantize(
    model: nn.Module,
    recipe: str | Recipe = "w8a8",
    calibration: Any = None,
    *,
    num_batches: int | None = None,
    example_inputs: Any = None,
    metric: Metric | None = None,
    max_drop: float = 0.5,
    bits: int = 8,
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
        max_drop: of "auto": how much of the metric may be lost, in its own units.
        bits: of "auto": of weights, but for the first and last layer and those that turn out to need more.

    Raises:
        LowbitError: activations are to be quantized without data, a rule matches nothing, the model does not
            run.
    """
    if recipe == "auto":
        if metric is None or calibration is None:
            raise LowbitError(
                "'auto' compares recipes on your data; pass calibration=... and metric=..., a function of a "
                "model, such as its accuracy"
            )
        data = list(batches(calibration, num_batches))
        return climb(model, partial(quantize, model, calibration=data), metric, max_drop=max_drop, bits=bits)
    recipe = Recipe.get(recipe)
    if recipe.fold_bn == "after":  # without training in between it is the same, and corrections see the fold
        recipe = replace(recipe, fold_bn="before")
    if calibration is None and recipe.quantizes_activations:
        raise LowbitError(
            "the recipe quantizes activations, whose ranges come from data; pass calibration=..., or use 'w8'"
        )
    if calibration is None:
        if example_inputs is None:
            raise LowbitError(
                "tracing needs one batch to see shapes; pass calibration=... or example_inputs=..."
            )
        return _quantize_without_data(model, recipe, Inputs.of(example_inputs))
    return _quantize_on_data(model, recipe, calibration, num_batches)


def _quantize_on_data(
    model: nn.Module, recipe: Recipe, calibration: Any, num_batches: int | None
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
    trial = _Trial.on(base, example, notes, calibration, num_batches)
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
        smooth(gm, _smoothed(gm, recipe), factors or {})
    return gm, notes


def _smoothed(gm: fx.GraphModule, recipe: Recipe) -> frozenset[str]:
    """Names of the layers that gain from smooth inputs: those that round them, and those of narrow weights.

    The scales of hardware are powers of two, and take up no factor.
    """
    found = [d for d in resolve(gm, recipe) if d.weight is not None and d.weight.kind == "int"]
    gains = [d for d in found if d.activation is not None or (d.weight is not None and d.weight.bits < 8)]
    return frozenset(d.name for d in gains if "pow2" not in {s.scale for s in (d.weight, d.activation) if s})


def assemble(gm: fx.GraphModule, recipe: Recipe, example: Inputs, notes: list[Note]) -> QuantizedModel:
    """Quantizers placed on what `float_graph` returned; nothing is calibrated."""
    gm.meta["decisions"] = place(gm, recipe)
    signs = [Note(name, NEVER_NEGATIVE) for name in dict.fromkeys(gm.meta.pop("bits_for_signs", ()))]
    return QuantizedModel(gm, recipe, _stand_in(example, gm), [*notes, *signs])


@dataclass(frozen=True)
class _Trial:
    """One call of `quantize`: what stays the same while steps are tried, measured, and kept or not."""

    example: Inputs
    notes: list[Note]
    calibration: Any
    num_batches: int | None
    # the samples that corrections and measurements use, and the float outputs on them
    sample: list[Inputs]
    targets: list[list[Tensor]]

    @classmethod
    def on(
        cls,
        base: fx.GraphModule,
        example: Inputs,
        notes: list[Note],
        calibration: Any,
        num_batches: int | None,
    ) -> _Trial:
        sample = _sample(calibration, num_batches, base)
        with torch.inference_mode():
            targets = [flat_tensors(inputs.call(base)) for inputs in sample]
        return cls(example, notes, calibration, num_batches, sample, targets)

    def _on_few(self) -> _Trial:
        """The same on the first FEW samples, in whole batches."""
        count = bisect_left([*accumulate(inputs.batch_size for inputs in self.sample)], FEW) + 1
        sample, targets = self.sample[:count], self.targets[:count]
        return replace(self, calibration=sample, num_batches=None, sample=sample, targets=targets)

    def calibrated(self, gm: fx.GraphModule, recipe: Recipe) -> QuantizedModel:
        """A quantized copy of a float graph."""
        q = assemble(clone(gm), recipe, self.example, self.notes)
        choose_scales(q, self.calibration, self.num_batches)
        return q

    def quality(self, gm: fx.GraphModule) -> float:
        """SQNR in dB of everything the graph returns, over the sample."""
        signal = noise = 0.0
        with torch.inference_mode():
            for inputs, targets in zip(self.sample, self.targets, strict=True):
                more = noise_and_signal(targets, inputs.call(gm))
                noise, signal = noise + more[0], signal + more[1]
        return sqnr_db(signal, noise)

    def equalize(
        self, q: QuantizedModel, base: fx.GraphModule, quality: float
    ) -> tuple[QuantizedModel, fx.GraphModule, float]:
        """The better of `q` and its like with equalized weights, its float graph, and its quality.

        Where a few samples say that it makes the output worse, the others are not asked.
        """
        scaled, recipe = clone(base), replace(q.recipe, equalize=True)
        done = equalize(scaled)
        text = (
            f"{done.regions} regions over {done.layers} layers; "
            f"largest over smallest channel range {done.spread_before:.1f} -> {done.spread_after:.1f}"
        )
        few = self._on_few()
        before, after = few.quality(q.graph), few.quality(few.calibrated(scaled, recipe).graph)
        if after < before:
            q.steps.append(Step("equalize", text, before, after, kept=False))
            return q, base, quality
        other = self.calibrated(scaled, recipe)
        after = self.quality(other.graph)
        kept = after >= quality
        best = (other, scaled, after) if kept else (q, base, quality)
        best[0].steps.append(Step("equalize", text, quality, after, kept))
        return best

    def smooth(
        self, q: QuantizedModel, base: fx.GraphModule, quality: float
    ) -> tuple[QuantizedModel, fx.GraphModule, float]:
        """The best of `q` and its like with smoothed inputs, its float graph, and its quality."""
        names, tried = _smoothed(base, q.recipe), []
        for strength in STRENGTHS:
            factors = smoothing_factors(base, names, self.sample, strength=strength)
            if not factors:  # nothing but convolutions, nothing to say
                return q, base, quality
            scaled = clone(base)
            layers = smooth(scaled, names, factors)
            other = self.calibrated(scaled, replace(q.recipe, smooth=True))
            text = f"{len(factors)} tensors that {layers} layers read, strength {strength}"
            tried.append((self.quality(other.graph), text, other, scaled))
        after, text, other, scaled = max(tried, key=lambda trial: trial[0])
        kept = after >= quality
        best = (other, scaled, after) if kept else (q, base, quality)
        best[0].steps = [*q.steps, Step("smooth", text, quality, after, kept)]
        return best

    def refine(
        self, step: str, q: QuantizedModel, reference: fx.GraphModule, quality: float
    ) -> tuple[QuantizedModel, float]:
        """Apply one correction to a copy; keep it when the output gets better."""
        corrected = clone(q.graph)
        gains: list[Gain] = []
        if step == "bond_correct":
            names = correct_bonds(corrected, reference, self.sample)
            if not names:  # no tensor network, nothing to say
                return q, quality
        elif step == "gptq":
            gains = round_layers(corrected, reference, self.sample)
            names = [gain.name for gain in gains if not gain.why]
        else:
            names = correct_outputs(corrected, reference, self.sample, scale=step == "affine_correct")
        after = self.quality(corrected)
        kept = after >= quality
        samples = sum(inputs.batch_size for inputs in self.sample)
        text = f"{len(names)} layers over {samples} samples"
        q.steps.append(Step(step, text, quality, after, kept, tuple(gains)))
        if kept:
            q.graph = corrected
        return q, max(quality, after)


def _quantize_without_data(model: nn.Module, recipe: Recipe, example: Inputs) -> QuantizedModel:
    q = prepare(model, recipe, example)
    choose_scales(q, [], None)
    if recipe.refine:
        names = correct_bias_analytically(q.graph)
        q.steps.append(
            Step("bias_correct", f"{len(names)} layers, from BatchNorm statistics, for there is no data")
        )
    return freeze(q)


def _sample(data: Any, num_batches: int | None, gm: fx.GraphModule) -> list[Inputs]:
    """As many batches as corrections can hold in memory, at most MAX_SAMPLES samples, at least one batch."""
    room = min(MAX_SAMPLES, SAMPLE_BYTES // max(1, 2 * peak_bytes(gm)))
    taken: list[Inputs] = []
    for inputs in batches(data, num_batches):
        if taken and room < inputs.batch_size:
            break
        taken.append(inputs)
        room -= inputs.batch_size
    return taken


def _stand_in(example: Inputs, gm: fx.GraphModule) -> Inputs:
    """A call of the shapes that tracing saw, which holds none of the data."""
    few = example.with_samples(2)
    try:
        with torch.no_grad():
            few.call(gm)
    except Exception:  # as in tracing: the first axis is not the batch
        few = example
    return few.made_up()

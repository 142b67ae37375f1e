"""Steps of post-training quantization, each tried and measured, and kept where the output gets better."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from lowbit.assembly import assemble, smoothed
from lowbit.core.qtensor import sqnr_db
from lowbit.core.rounding import Gain
from lowbit.files import digest
from lowbit.finished import Finished
from lowbit.graph.inputs import mapped
from lowbit.graph.rewrite import clone
from lowbit.graph.run import flat_tensors, noise_and_signal, peak_bytes
from lowbit.graph.trace import Inputs, Note
from lowbit.model import QuantizedModel, Step
from lowbit.passes.bias_correct import correct_outputs
from lowbit.passes.bonds import correct_bonds
from lowbit.passes.calibrate import batches
from lowbit.passes.equalize import equalize
from lowbit.passes.reconstruct import round_layers
from lowbit.passes.smooth import smooth, smoothing_factors
from lowbit.recipe import Recipe
from lowbit.scales import choose_scales
from lowbit.training.batchnorm import batchnorms, reestimate

__all__ = ["Trial"]

# Corrections hold the activations of their samples in memory; this bounds them.
SAMPLE_BYTES = 1 << 30
MAX_SAMPLES = 512
# Samples that may say at once that a trial is not worth more.
FEW = 64
# Refinements that choose codes, and say of each layer or block what became of it.
ROUNDINGS = ("gptq", "adaround", "brecq")
# how much of what is uneven smoothing takes from the activations: those tried
STRENGTHS = (0.5, 0.8)


@dataclass(frozen=True)
class Trial:
    """One call of `quantize`: what stays the same while steps are tried, measured, and kept or not."""

    example: Inputs
    notes: list[Note]
    calibration: Any
    num_batches: int | None
    # the samples that corrections and measurements use, and the float outputs on them
    sample: list[Inputs]
    targets: list[list[Tensor]]
    # folder for layers and blocks that are rounded
    out: str | Path | None = None

    @classmethod
    def on(
        cls,
        base: fx.GraphModule,
        example: Inputs,
        notes: list[Note],
        calibration: Any,
        num_batches: int | None,
        out: str | Path | None = None,
    ) -> Trial:
        sample = _sample(calibration, num_batches, base)
        with torch.inference_mode():
            targets = [flat_tensors(inputs.call(base)) for inputs in sample]
        return cls(example, notes, calibration, num_batches, sample, targets, out)

    def _on_few(self) -> Trial:
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
        with torch.inference_mode():
            return self.quality_of(inputs.call(gm) for inputs in self.sample)

    def quality_of(self, outputs: Iterable[Any]) -> float:
        """The same of what a graph has returned for each batch of the sample."""
        signal = noise = 0.0
        for output, targets in zip(outputs, self.targets, strict=True):
            more = noise_and_signal(targets, output)
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
        names, tried = smoothed(base, q.recipe), []
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
        gains, outputs = list[Gain](), list[Any]()
        if step == "bond_correct":
            names = correct_bonds(corrected, reference, self.sample)
            if not names:  # no tensor network, nothing to say
                return q, quality
        elif step == "reestimate_bn":
            kept_norms = set(map(id, batchnorms(corrected)))
            names = [name for name, m in corrected.named_modules() if id(m) in kept_norms]
            if not names:  # all are folded, nothing to say
                return q, quality
            reestimate(corrected, self.sample)
        elif step in ROUNDINGS:
            finished = self._finished(f"{len(q.steps)}-{step}", corrected)
            gains, outputs = _rounded(step, corrected, reference, self.sample, finished)
            names = [gain.name for gain in gains if not gain.why]
        else:
            names = correct_outputs(corrected, reference, self.sample, scale=step == "affine_correct")
        after = self.quality_of(outputs) if outputs else self.quality(corrected)
        kept = after >= quality
        samples = sum(inputs.batch_size for inputs in self.sample)
        text = f"{len(names)} {'blocks' if step == 'brecq' else 'layers'} over {samples} samples"
        q.steps.append(Step(step, text, quality, after, kept, tuple(gains)))
        if kept:
            q.graph = corrected
        return q, max(quality, after)

    def _finished(self, work: str, gm: fx.GraphModule) -> Finished | None:
        """Where what is done of that work is kept."""
        if self.out is None:
            return None
        read: list[Any] = []
        for inputs in self.sample:
            mapped(read.append, (inputs.args, inputs.kwargs))
        tensors = [t for t in read if isinstance(t, Tensor)]
        return Finished(self.out, work, digest([*gm.state_dict().values(), *tensors]))


def _rounded(
    step: str,
    gm: fx.GraphModule,
    reference: fx.GraphModule,
    data: list[Inputs],
    finished: Finished | None,
) -> tuple[list[Gain], list[Any]]:
    """By the rounding of that name; and the outputs, where the rounding has come by them."""
    if step == "gptq":
        return round_layers(gm, reference, data, finished=finished)
    from lowbit.passes.learn_rounding import learn_rounding  # asked for by few, and not loaded for all

    by: Literal["block", "layer"] = "block" if step == "brecq" else "layer"
    return learn_rounding(gm, reference, data, by=by, finished=finished), []


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

"""Measures a network with some quantizers at other specs, without a copy or a new trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lowbit.core.affine import choose_qparams
from lowbit.core.levels import Fit
from lowbit.core.observers import Observer, observers
from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError
from lowbit.graph.cursor import Cursor
from lowbit.graph.rewrite import swap
from lowbit.graph.run import flat_tensors, noise_and_signal, peak_bytes
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.passes.bias_correct import Corrected
from lowbit.search.sites import Place
from lowbit.training.batches import Batch
from lowbit.training.losses import Objective, accuracy, logits_of

__all__ = ["Choice", "Prober", "Sums"]

# The spec of some places; None is float, and so is a place that is not named.
Choice = Mapping[str, QuantSpec | None]
# Refinements of a recipe that fit the outputs of layers, and whether their scale too.
CORRECTIONS = {"affine_correct": True, "bias_correct": False, "gptq": True, "adaround": True, "brecq": True}
# Samples that outputs are fitted on, in whole batches.
FITTED = 128


@dataclass(frozen=True)
class Sums:
    """What was measured, summed over samples, so that parts add up."""

    samples: float = 0.0
    loss: float = 0.0
    metric: float = 0.0
    kl: float = 0.0
    noise: float = 0.0
    signal: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class _Reference:
    """Outputs of the float network for one batch."""

    outputs: list[Tensor]
    # log-probabilities of the classes
    log_p: Tensor


class Prober:
    """A prepared model, its data, and the range of every place at any spec."""

    def __init__(
        self, q: QuantizedModel, places: Sequence[Place], batches: Sequence[Batch], objective: Objective
    ) -> None:
        """Look at the float network: what each activation is like, and what the outputs are."""
        self.q, self.gm, self.batches, self.objective = q, q.graph, batches, objective
        self.places = {place.path: place for place in places}
        self.labelled = all(batch.labels is not None for batch in batches)
        self.fits: dict[tuple[str, QuantSpec], Fit] = {}
        self.observers: dict[str, Observer] = {}
        # numbers of batches, and what layers give for them in float
        self.targets: tuple[tuple[int, ...], dict[fx.Node, list[Tensor]]] = ((), {})
        self.stand_ins = {path: _stand_in(place) for path, place in self.places.items()}
        self.references = self._look()

    def _look(self) -> list[_Reference]:
        for path, place in self.places.items():
            if place.kind == "activation":
                self.observers[path] = observers.get(place.observer)(place.quantizer.spec)
        found = []
        with self.in_float(), torch.inference_mode():
            for path, observer in self.observers.items():
                self.stand_ins[path].observer = observer
                self.stand_ins[path].mode = "observe"
            for batch in self.batches:
                output = batch.inputs.call(self.gm)
                found.append(_Reference(flat_tensors(output), self._log_softmax(output)))
        return found

    @contextmanager
    def quantizing(self, choice: Choice) -> Iterator[None]:
        """While open, places have the specs of `choice`, others are in float; then all is as it was.

        Quantizers that are no places stay as they are.
        """
        training = [(m, m.training) for m in self.gm.modules()]
        try:
            self.gm.eval()
            for path in self.places:
                swap(self.gm, path, self.stand_ins[path])
            for path in self.places:
                self.set(path, choice.get(path))
            yield
        finally:
            for path, place in self.places.items():
                swap(self.gm, path, place.quantizer)
            for module, mode in training:
                module.training = mode

    @contextmanager
    def in_float(self) -> Iterator[None]:
        """While open, nothing quantizes, places or not: what is differentiated twice must be smooth."""
        with self.quantizing({}), self._all_off():
            yield

    @contextmanager
    def _all_off(self) -> Iterator[None]:
        quantizers = [m for m in self.gm.modules() if isinstance(m, Quantizer)]
        modes = [m.mode for m in quantizers]
        for quantizer in quantizers:
            quantizer.mode = "off"
        try:
            yield
        finally:
            for quantizer, mode in zip(quantizers, modes, strict=True):
                quantizer.mode = mode

    def set(self, path: str, spec: QuantSpec | None) -> None:
        """Give one place another spec; only inside `quantizing`."""
        place, quantizer = self.places[path], self.stand_ins[path]
        quantizer.observer, quantizer.mode = None, "off"
        if spec is not None:
            quantizer.spec = place.applied(spec)
            quantizer.take(self.fit_of(place, spec))
            quantizer.mode = "quantize"

    def fit_of(self, place: Place, spec: QuantSpec) -> Fit:
        """The scale of a place at a spec, chosen once."""
        key = place.path, spec
        if key not in self.fits:
            if isinstance(place.layer, QLayer):
                self.fits[key] = _stand_in(place, spec).fit(place.layer.weight.detach())
            else:
                observer = self.observers[place.path]
                if not observer.batches:
                    raise LowbitError(f"no data reached '{place.name}', so its bits cannot be chosen")
                observer.spec = spec
                self.fits[key] = Fit(*choose_qparams(*observer.range(), spec))
        return self.fits[key]

    def rounded(self, place: Place, x: Tensor, spec: QuantSpec) -> Tensor:
        """A tensor as a place at that spec would give it."""
        quantizer = _stand_in(place, spec)
        quantizer.take(self.fit_of(place, spec))
        return quantizer.quantize(x).dequantize()

    def parts(self, memory: int) -> list[list[int]]:
        """Numbers of the batches that a cursor holds at once, within so many bytes of activations.

        Where outputs are corrected, a part has FITTED samples at least, for the fit.
        """
        each, least = max(1, peak_bytes(self.gm)), 0 if self._corrects is None else FITTED
        found: list[list[int]] = [[]]
        samples = 0
        for i, batch in enumerate(self.batches):
            if samples and samples >= least and each * (samples + batch.samples) > memory:
                found.append([])
                samples = 0
            found[-1].append(i)
            samples += batch.samples
        if len(found) > 1 and samples < least:
            last = found.pop()
            found[-1] += last
        return found

    @property
    def _corrects(self) -> bool | None:
        """Whether the recipe corrects the scale of outputs too; None where it corrects nothing."""
        steps = [CORRECTIONS[name] for name in self.q.recipe.refine if name in CORRECTIONS]
        return any(steps) if steps else None

    def cursor(self, which: Sequence[int]) -> Cursor:
        """Before the first node, over some of the batches.

        Where the recipe corrects the outputs of layers, so does the run, by a fit on the first FITTED.
        """
        data = [self.batches[i].inputs for i in which]
        if self._corrects is None:
            return Cursor(self.gm, data)
        return Cursor(self.gm, data, Corrected(self._targets(which), scale=self._corrects))

    def _targets(self, which: Sequence[int]) -> dict[fx.Node, list[Tensor]]:
        """What layers give in float for the first batches, kept for the next cursor over the same."""
        samples = [0, *accumulate(self.batches[i].samples for i in which)]
        first = tuple(i for i, before in zip(which, samples, strict=False) if before < FITTED)
        if self.targets[0] != first:
            with self._all_off(), torch.inference_mode():
                outputs = Corrected.targets_of(self.gm, [self.batches[i].inputs for i in first])
            self.targets = first, outputs
        return self.targets[1]

    def measure(self, which: Sequence[int], outputs: Sequence[Any]) -> Sums:
        """Outputs of some of the batches, against labels and the float network.

        Raises:
            LowbitError: the metric is no number.
        """
        total = Sums()
        for i, output in zip(which, outputs, strict=True):
            total += self._measure_batch(self.batches[i], self.references[i], output)
        return total

    @torch.inference_mode()
    def _measure_batch(self, batch: Batch, reference: _Reference, output: Any) -> Sums:
        n, log_q = batch.samples, self._log_softmax(output)
        # of two classes that are both impossible there is nothing to compare
        terms = F.kl_div(log_q, reference.log_p, log_target=True, reduction="none")
        possible = reference.log_p > -math.inf
        kl = terms.where(possible, torch.zeros_like(terms)).sum().item() * log_q.shape[-1] / log_q.numel()
        noise, signal = noise_and_signal(reference.outputs, output)
        loss = metric = 0.0
        if self.labelled:
            loss = float(self.objective.task(output, batch.labels))
            metric = self._metric(output, batch.labels)
        return Sums(n, loss * n, metric * n, kl * n, noise, signal)

    def _log_softmax(self, output: Any) -> Tensor:
        """Log-probabilities of the classes, on the last axis; of one class where there is no such axis."""
        logits, axis = logits_of(output).double(), self.objective.settings.class_axis
        return F.log_softmax(logits.movedim(axis, -1) if logits.ndim > axis else logits[..., None], dim=-1)

    def _metric(self, output: Any, labels: Any) -> float:
        settings = self.objective.settings
        if not callable(settings.metric):
            return accuracy(output, labels, settings.class_axis)
        value = float(settings.metric(output, labels))
        if math.isnan(value):
            raise LowbitError(
                "metric(output, labels) returned nan, which ranks nothing; return a finite number"
            )
        return value


def _stand_in(place: Place, spec: QuantSpec | None = None) -> Quantizer:
    """A quantizer that can be given any spec, while the real one stays as it is."""
    quantizer = place.quantizer
    made = Quantizer(quantizer.spec, None, quantizer.estimator, quantizer.weight_observer)
    made.is_weight, made.reshape = quantizer.is_weight, quantizer.reshape
    made.spec = quantizer.spec if spec is None else place.applied(spec)
    return made

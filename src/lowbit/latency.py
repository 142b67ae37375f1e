"""How long each layer takes at each width, in the runtime that will run it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import export, ptq
from lowbit.bench import check_runtime, time_files
from lowbit.core.spec import QuantSpec
from lowbit.graph.inputs import Inputs
from lowbit.progress import track
from lowbit.recipe import Recipe, Rule, exactly
from lowbit.search.table import Sensitivity, Site

__all__ = ["timed"]


@dataclass(frozen=True)
class _Sample:
    """A layer, and how one sample reaches it."""

    layer: nn.Module
    shape: tuple[int, ...]
    # in one run of the network
    calls: int

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """Layers with the same key take the same time."""
        return repr(self.layer), self.shape


def timed(
    table: Sensitivity, model: nn.Module, example: Any, *, rounds: int = 50, runtime: str = "onnxruntime"
) -> Sensitivity:
    """The table with milliseconds for each weight at each spec.

    Each layer is exported alone at each of its specs, with its inputs as the table's recipe has them, and
    the files are timed in turn, one sample on one thread. So is the whole network as the recipe has it: the
    time of a choice is that of the whole plus the differences of its layers. Layers alike are timed once.
    Widths of activations do not count: runtimes keep up to 8 bits in bytes.

    Args:
        table: from `lowbit.search.sensitivity`.
        model: the float network it was measured on.
        example: one input, a tuple of inputs or a dict, as for `lowbit.prepare`.
        rounds: inferences of each file; the median counts.
        runtime: "onnxruntime" or "openvino".

    Raises:
        LowbitError: the runtime is unknown or not installed, or a layer cannot be exported.
    """
    check_runtime(runtime)
    inputs, model = Inputs.of(example), copy.deepcopy(model).eval()
    samples = _samples(model, inputs)
    rules = {rule.match: rule for rule in table.recipe.rules}
    sites = [s for s in table if s.kind == "weight" and s.name in samples]
    known: dict[object, dict[QuantSpec, float]] = {}
    found: dict[str, dict[QuantSpec, float]] = {}
    base = 0.0
    with TemporaryDirectory() as folder:
        for site in track(sites, "timing layers", total=len(sites)):
            rule = rules[exactly(site.name)]
            assert rule.weight is not None
            specs = tuple(dict.fromkeys((*site.specs, rule.weight)))
            key = samples[site.name].key, rule.activation, specs
            if key not in known:
                paths = list(_files(samples[site.name], rule, specs, Path(folder)))
                times = [t.milliseconds for t in time_files(paths, rounds=rounds, runtime=runtime)]
                known[key] = dict(zip(specs, times, strict=True))
            found[site.path] = {spec: samples[site.name].calls * ms for spec, ms in known[key].items()}
            base += found[site.path][rule.weight]
        q = ptq.quantize(model, replace(table.recipe, refine=()), calibration=[inputs])
        (whole,) = time_files([export.onnx(q, Path(folder) / "whole.onnx")], rounds=rounds, runtime=runtime)
    done = tuple(_with_times(site, found.get(site.path)) for site in table)
    return replace(table, sites=done, other_latency=whole.milliseconds - base)


def _with_times(site: Site, times: Mapping[QuantSpec, float] | None) -> Site:
    return site if times is None else replace(site, latency=tuple(times[spec] for spec in site.specs))


def _samples(model: nn.Module, inputs: Inputs) -> dict[str, _Sample]:
    """Every module that takes one tensor, with the shape of one sample that reaches it first."""
    found: dict[str, _Sample] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if name in found:
            found[name] = replace(found[name], calls=found[name].calls + 1)
        elif len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_floating_point():
            found[name] = _Sample(module, (1, *args[0].shape[1:]), 1)

    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: note(name, m, args))
        for name, module in model.named_modules()
    ]
    try:
        with torch.inference_mode():
            inputs.call(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _files(sample: _Sample, rule: Rule, specs: Sequence[QuantSpec], folder: Path) -> Iterator[Path]:
    """The layer alone at each spec."""
    network = nn.Sequential(sample.layer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sample.shape, generator=generator).abs().to(next(sample.layer.parameters()))
    for k, spec in enumerate(specs):
        alone = replace(rule, match="*", weight=spec)
        q = ptq.quantize(network, Recipe(rules=(alone,)), calibration=[x])
        yield export.onnx(q, folder / f"{k}.onnx")

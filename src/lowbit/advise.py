"""Checks of a quantized model that have teeth: each says what was measured, what follows, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.assembly import float_graph
from lowbit.compare import Comparison, Metric, compare
from lowbit.core.qtensor import quantization_error
from lowbit.core.ranges import least_error_range_of
from lowbit.core.spec import PerChannel, PerTensor, QuantSpec
from lowbit.errors import expect
from lowbit.graph.match import layer_nodes
from lowbit.graph.ops import kind_of, module_of
from lowbit.graph.run import walk
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.passes.calibrate import batches
from lowbit.passes.smooth import factors_in
from lowbit.progress import track

__all__ = ["Advice", "advise"]

# fewer samples than this leave ranges to chance
SAMPLES = 100
# share of a tensor's evaluation values outside its range, and how many times the share on calibration data
OUTSIDE, TIMES = 0.005, 4
# evaluation that spans less of a range than this leaves most codes unused
SPAN = 0.25
# largest over smallest channel range: 4 costs the smallest channel two of its bits
SPREAD = 4.0
# part of the metric, and of the multiply-accumulates, that is worth a word
DROP = 0.02
FLOAT_SHARE = 0.1
SHOWN = 3


@dataclass(frozen=True)
class Advice:
    """One thing that is wrong, with its measured cause."""

    # name of the check
    check: str
    # the numbers that made it fire
    measured: str
    # what they mean
    text: str
    # what to do
    cure: str

    def __str__(self) -> str:
        return f"{self.check}: {self.measured}; {self.text}\n  -> {self.cure}"


def advise(
    model: nn.Module,
    q: QuantizedModel,
    calibration: Any,
    evaluation: Any = None,
    metric: Metric | None = None,
) -> list[Advice]:
    """Look for the usual causes of lost accuracy or speed, and measure each.

    Args:
        model: the float model that `q` was made from.
        calibration: the data that `q` was calibrated with; None where there was none.
        evaluation: data as for `compare`; without it ranges and accuracy are not checked.
        metric: as for `compare`, more being better. The default, top-1 accuracy, may lose 2 points, any other
            metric 2 % of its float value.

    Returns:
        What was found wrong; nothing where all is well.

    Raises:
        LowbitError: as `compare`.
    """
    expect(q, QuantizedModel, "q", "call advise(model, q, ...): the float model comes first")
    calibration, evaluation = _again(calibration), _again(evaluation)
    seen = None if calibration is None else _Watch(q).run(calibration)
    found = [_few_samples(q, seen)]
    if seen is not None and evaluation is not None:
        found.append(_other_ranges(seen, _Watch(q).run(evaluation)))
    found += [_weights_only(q), _spread_channels(model, q)]
    if evaluation is not None:
        found.append(_drop(compare(model, q, evaluation, metric), points=metric is None))
    found.append(_float_macs(q))
    return [advice for advice in found if advice is not None]


def _again(data: Any) -> Any:
    """Data that can be read more than once."""
    return list(data) if isinstance(data, Iterator) else data


@dataclass
class _Use:
    """How one tensor uses the range of its quantizer."""

    values: int = 0
    outside: int = 0
    lo: float = float("inf")
    hi: float = float("-inf")

    @property
    def share(self) -> float:
        return self.outside / max(self.values, 1)

    @property
    def span(self) -> float:
        return max(self.hi - self.lo, 0.0)


class _Watch:
    """Counts, for each quantized activation, the values that its codes cannot express."""

    def __init__(self, q: QuantizedModel) -> None:
        self.q = q
        self.samples = 0
        self.uses: dict[str, _Use] = {}

    def run(self, data: Any) -> _Watch:
        hooks = [
            quantizer.register_forward_pre_hook(self._hook(self.uses.setdefault(name, _Use())))
            for name, quantizer in _activation_quantizers(self.q)
        ]
        try:
            with torch.no_grad():
                for inputs in track(batches(data), "checking ranges"):
                    self.samples += inputs.batch_size
                    if hooks:
                        inputs.call(self.q)
        finally:
            for hook in hooks:
                hook.remove()
        return self

    @staticmethod
    def _hook(use: _Use) -> Any:
        def count(quantizer: Quantizer, args: tuple[Tensor]) -> None:
            (x,) = args
            if not x.numel():
                return
            zero = 0 if quantizer.zero_point is None else quantizer.zero_point
            lo = (quantizer.spec.qmin - zero - 0.5) * quantizer.scale
            hi = (quantizer.spec.qmax - zero + 0.5) * quantizer.scale
            use.values += x.numel()
            use.outside += int(((x < lo) | (x > hi)).sum())
            use.lo, use.hi = min(use.lo, float(x.amin())), max(use.hi, float(x.amax()))

        return count


def _activation_quantizers(q: QuantizedModel) -> Iterator[tuple[str, Quantizer]]:
    """Quantizers of integer codes at work, by the name of the operation that writes their tensor."""
    names = {
        str(n.target): str(n.args[0].meta["name"]) for n in q.graph.graph.nodes if kind_of(n) == "quantizer"
    }
    for path, module in q.graph.named_modules():
        works = isinstance(module, Quantizer) and module.mode == "quantize" and module.scale.numel()
        if works and not path.endswith("weight_quantizer"):
            yield names.get(path, path), module


def _few_samples(q: QuantizedModel, seen: _Watch | None) -> Advice | None:
    needed = q.recipe.refine or any(True for _ in _activation_quantizers(q))
    if seen is None or not needed or seen.samples >= SAMPLES:
        return None
    return Advice(
        "calibration samples",
        f"{seen.samples} samples, {SAMPLES} are the least",
        "ranges of activations and corrections hang on these few",
        f"pass {SAMPLES} to 500 samples drawn at random from the training data",
    )


def _other_ranges(calibrated: _Watch, evaluated: _Watch) -> Advice | None:
    pairs = [(name, calibrated.uses[name], use) for name, use in evaluated.uses.items()]
    # a share of 8 / n is chance: of n values, 2 / n lie beyond the ends of as many others
    outside = [
        (name, c, e) for name, c, e in pairs if e.share > max(OUTSIDE, TIMES * c.share) + 8 / max(c.values, 1)
    ]
    unused = [(name, c, e) for name, c, e in pairs if c.span and e.span < SPAN * c.span]
    if not outside and not unused:
        return None
    outside.sort(key=lambda row: row[2].share, reverse=True)
    unused.sort(key=lambda row: row[2].span / row[1].span)
    parts = [
        f"'{name}' {_percent(e.share)} outside its calibrated range ({_percent(c.share)} on calibration data)"
        for name, c, e in outside[:SHOWN]
    ]
    parts += [f"'{name}' uses {_percent(e.span / c.span)} of its range" for name, c, e in unused[:SHOWN]]
    count = len({name for name, *_ in (*outside, *unused)})
    return Advice(
        "ranges",
        f"{count} of {len(pairs)} tensors differ: {', '.join(parts)}",
        "evaluation data is not like calibration data, so it is clipped or left with few codes",
        "calibrate on a random sample of the same source, with the same preprocessing",
    )


def _weights_only(q: QuantizedModel) -> Advice | None:
    weights = sum(isinstance(m, QLayer) for m in q.graph.modules())
    if not weights or any(True for _ in _activation_quantizers(q)):
        return None
    return Advice(
        "weights only",
        f"quantized weights in {weights} layers, integer activations in 0",
        "the file is smaller, but every operation computes in float: no integer kernel runs",
        "for speed give the rules activation=UINT8 (presets w8a8, w4a8) and calibration data",
    )


def _spread_channels(model: nn.Module, q: QuantizedModel) -> Advice | None:
    """Convolutions with one scale for all channels, although these differ."""
    layers = {str(n.target): module_of(n) for n in layer_nodes(q.graph)}
    layers = {path: layer for path, layer in layers.items() if _is_per_tensor_conv(layer)}
    if not layers:
        return None
    twin, _ = float_graph(model, q.recipe, q.example, factors_in(q.graph))
    rows = [(p, *_spread_and_gain(m, twin.get_parameter(f"{p}.weight"))) for p, m in layers.items()]
    spread, gain = median(r[1] for r in rows), median(r[2] for r in rows)
    if spread <= SPREAD:
        return None
    name, worst, _ = max(rows, key=lambda r: r[1])
    tried = q.recipe.equalize or any(step.name == "equalize" for step in q.steps)
    return Advice(
        "channel ranges",
        f"the largest channel is {spread:.1f} times the smallest (median of {len(rows)} convolutions with "
        f"one scale; {worst:.1f} in '{name}')",
        f"small channels have few codes; a scale per channel gains {gain:.1f} dB of weight SQNR (median)",
        "granularity=PerChannel(0) for weights" + ("" if tried else ", or equalize=True in the recipe"),
    )


def _is_per_tensor_conv(layer: nn.Module) -> bool:
    if not isinstance(layer, QLayer) or not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
        return False
    spec = layer.weight_quantizer.spec
    return spec.kind == "int" and spec.granularity == PerTensor()


def _spread_and_gain(layer: nn.Module, weight: Tensor) -> tuple[float, float]:
    """Largest over smallest channel range, and the weight SQNR in dB that a scale per channel would gain."""
    assert isinstance(layer, QLayer)
    weight, spec = weight.detach(), layer.weight_quantizer.spec
    ranges = weight.movedim(layer.channel_axis, 0).flatten(1).abs().amax(dim=1)
    ranges = ranges[ranges > 0]

    def sqnr(spec: QuantSpec) -> float:
        ends = least_error_range_of(weight, spec) if layer.weight_quantizer.weight_observer == "mse" else None
        return quantization_error(weight, spec, ends).sqnr_db

    if not ranges.numel():
        return 1.0, 0.0
    gain = sqnr(replace(spec, granularity=PerChannel(layer.channel_axis))) - sqnr(spec)
    return float(ranges.max() / ranges.min()), gain


def _drop(comparison: Comparison, *, points: bool) -> Advice | None:
    if comparison.drop is None or comparison.float_value is None:
        return None
    lost = comparison.drop / (1.0 if points else abs(comparison.float_value) or 1.0)
    if lost <= DROP:
        return None
    worst = ", ".join(f"'{r.name}' {r.alone_db:.1f} dB at {r.weight}" for r in comparison.worst)
    return Advice(
        "accuracy",
        f"{comparison.metric} {comparison.float_value:.4f} -> {comparison.quantized_value:.4f}, "
        f"{_percent(lost)} lost over {comparison.samples:,} samples",
        f"most error is added by {worst}" if worst else "the error is not in the layers' weights",
        "train the quantized network (quantization-aware training, from lowbit.prepare), or spend bits: "
        "lowbit.compare(...).override",
    )


def _float_macs(q: QuantizedModel) -> Advice | None:
    """What stays in float and computes much."""
    macs, rows = _macs(q), [r for r in q.coverage().rows if r.status == "float"]
    total = max(sum(macs.values()), 1)
    shares = sorted(((macs.get(r.name, 0) / total, r) for r in rows), key=lambda s: s[0], reverse=True)
    share = sum(s for s, _ in shares)
    if share <= FLOAT_SHARE:
        return None
    large = [(s, r) for s, r in shares[:SHOWN] if s > 0]
    cures = dict.fromkeys(f"'{r.name}': {r.cure or 'no integer form exists yet'}" for _, r in large)
    return Advice(
        "left in float",
        f"{_percent(share)} of the multiply-accumulates: "
        + ", ".join(f"'{r.name}' ({r.op}) {_percent(s)}" for s, r in large),
        "; ".join(dict.fromkeys(f"{r.op}: {r.why}" for _, r in large)),
        "; ".join(cures),
    )


def _macs(q: QuantizedModel) -> dict[str, int]:
    """Multiply-accumulates of everything in the coverage table, as torch counts them, by name."""
    from torch.utils.flop_counter import FlopCounterMode

    macs: dict[str, int] = {}
    with FlopCounterMode(display=False) as counter:
        before = 0
        for node, _ in walk(q.graph, [q.example]):
            now = counter.get_total_flops()
            macs[str(node.meta.get("name", "output"))] = (now - before) // 2
            before = now
    samples = q.example.batch_size
    inside = {c.name: c.macs * samples for c in q.cost().layers if c.name not in macs}
    for leaf in q.graph.meta["leaves"]:
        own = [n for n in inside if q.graph.meta["whole"] or n.startswith(f"{leaf}.")]
        macs[leaf] = max(macs.get(leaf, 0) - sum(inside[n] for n in own), 0)
    return macs | inside


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

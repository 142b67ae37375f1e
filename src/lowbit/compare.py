"""A quantized model beside the float one it came from: accuracy, agreement, and where the error is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.assembly import float_graph
from lowbit.core.affine import fake_quantize
from lowbit.core.qtensor import sqnr_db
from lowbit.core.spec import QuantSpec
from lowbit.core.weight_observers import suits
from lowbit.errors import LowbitError, expect
from lowbit.graph.inputs import Inputs
from lowbit.graph.match import input_quantizer, layer_nodes, rule_name, tail_of
from lowbit.graph.ops import kind_of, label, module_of
from lowbit.graph.run import evaluate, flat_tensors, walk
from lowbit.graph.structure import first_difference, structure_of
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer
from lowbit.passes.calibrate import batches
from lowbit.passes.smooth import factors_in
from lowbit.progress import track
from lowbit.recipe import SPECS, Recipe, Rule
from lowbit.tables import text_table

__all__ = ["Comparison", "LayerError", "Metric", "compare"]

# metric(output, label) of one batch -> one number, or one for each sample; averaged over the samples
Metric = Callable[[Any, Any], Any]
# how many layers count as the worst
WORST = 3


@dataclass(frozen=True)
class LayerError:
    """The output of one call of a layer, behind its clamp and its quantizer, against the float model."""

    name: str
    # the name that rules see: calls of one layer share it
    rule_name: str
    op: str
    # spec of the weight; "" where it stays in float
    weight: str
    # SQNR in dB with all the error that layers before it have made
    sqnr_db: float
    # SQNR in dB of what this layer alone adds: it reads what the float model gives it
    alone_db: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What quantization cost, on this data."""

    samples: int
    # name of the metric; None where there were no labels to measure it with
    metric: str | None
    float_value: float | None
    quantized_value: float | None
    # share of samples whose largest output is the same; None where outputs are not [N, classes]
    agreement: float | None
    # 10 log10(|y|^2 / |y - y_q|^2) over everything that the model returns
    sqnr_db: float
    # in the order of execution
    layers: tuple[LayerError, ...]
    # parameters as float32, and as codes
    float_bytes: int
    quantized_bytes: int
    # YAML of rules that spend more bits on the worst layers; "" where every layer is in float
    override: str = field(repr=False)

    @property
    def drop(self) -> float | None:
        """Float value minus quantized value: above 0 it got worse, if more is better."""
        if self.float_value is None or self.quantized_value is None:
            return None
        return self.float_value - self.quantized_value

    @property
    def ratio(self) -> float:
        """How many times smaller."""
        return self.float_bytes / max(self.quantized_bytes, 1)

    @property
    def worst(self) -> tuple[LayerError, ...]:
        """The quantized layers that add the most error by themselves, the worst first."""
        return _worst(self.layers)

    def __str__(self) -> str:
        header = ("layer", "operation", "weight", "SQNR dB", "alone dB")
        rows = [
            (r.name, r.op, r.weight or "float", f"{r.sqnr_db:.1f}", f"{r.alone_db:.1f}") for r in self.layers
        ]
        parts = [text_table(("", "float", "quantized", "difference"), self._values())]
        agree = "" if self.agreement is None else f", top-1 agreement with float {100 * self.agreement:.2f} %"
        parts += [
            f"{self.samples:,} samples: output SQNR {self.sqnr_db:.2f} dB{agree}",
            text_table(header, rows),
        ]
        if self.override:
            parts += [
                f"most error is added by {', '.join(r.name for r in self.worst)}; to give them more bits:"
            ]
        return "\n\n".join(parts) + (f"\n{self.override}" if self.override else "")

    def _values(self) -> list[tuple[str, str, str, str]]:
        sizes = f"{self.float_bytes:,}", f"{self.quantized_bytes:,}", f"{self.ratio:.2f}x smaller"
        rows = [("bytes", *sizes)]
        if self.metric is not None and self.drop is not None:
            values = f"{self.float_value:.4f}", f"{self.quantized_value:.4f}", f"{0.0 - self.drop:+.4f}"
            rows.insert(0, (self.metric, *values))
        return rows


def compare(
    model: nn.Module,
    q: QuantizedModel,
    data: Any,
    metric: Metric | None = None,
    num_batches: int | None = None,
) -> Comparison:
    """Run both models side by side, once over the data, one batch in memory at a time.

    Args:
        model: the float model that `q` was made from, with its weights.
        data: a DataLoader, a list or any iterable of batches: (input, label), or inputs alone.
        metric: a function of the output and the label of one batch: one number, or one for each sample. By
            default top-1 accuracy, where labels are class indices and the output is [N, classes].
        num_batches: how many batches to use; all by default.

    Raises:
        LowbitError: there is no data, the metric fails, or `model` has another architecture than the one that
            was quantized.
    """
    expect(q, QuantizedModel, "q", "call compare(model, q, data): the float model comes first")
    if metric is not None and not callable(metric):
        raise LowbitError(f"metric={metric!r} is not a function; pass metric(output, label) -> number")
    twin, _ = float_graph(model, q.recipe, q.example, factors_in(q.graph))
    difference = first_difference(structure_of(q.graph), structure_of(twin))
    if difference is not None:
        difference = difference.replace("the file", "the quantized model")
        raise LowbitError(
            f"compare needs the model that was quantized, and this is another one: {difference}"
        )
    run = _Run(twin, q.graph, metric)
    for inputs, target in track(_labelled(data, num_batches), "comparing"):
        run.add(inputs, target)
    if not run.samples:
        raise LowbitError("there is no data to compare on; pass at least one batch")
    layers, cost = run.layers(), q.cost()
    values = [v / run.scored if run.scored else None for v in run.values]
    return Comparison(
        samples=run.samples,
        metric=run.metric_name,
        float_value=values[0],
        quantized_value=values[1],
        agreement=run.agree / run.samples if run.agree is not None else None,
        sqnr_db=run.output.db,
        layers=layers,
        float_bytes=cost.float_bytes,
        quantized_bytes=cost.bytes,
        override=_override(q, _worst(layers)),
    )


def top1(output: Tensor, target: Tensor) -> Tensor:
    """1 for each sample whose largest output [N, classes] is at its class [N], else 0."""
    return (output.argmax(1) == target).double()


@dataclass
class _Error:
    """Running powers of a signal and of its error."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Tensor, value: Tensor) -> None:
        self.signal += _power(reference)
        self.noise += _power(reference - value)

    @property
    def db(self) -> float:
        return sqnr_db(self.signal, self.noise)


def _power(x: Tensor) -> float:
    """Sum of squares, in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


class _Run:
    """Both graphs, node by node, and the sums that grow with each batch."""

    def __init__(self, twin: fx.GraphModule, gm: fx.GraphModule, metric: Metric | None) -> None:
        self.twin, self.gm, self.metric = twin, gm, metric
        self.metric_name: str | None = None
        self.samples = self.scored = 0
        self.values = [0.0, 0.0]
        self.agree: int | None = 0
        self.output = _Error()
        layers = layer_nodes(gm)
        self.total, self.alone = {n: _Error() for n in layers}, {n: _Error() for n in layers}
        # where the output of each layer is complete, in the order of execution
        ends = {_end_of(n): n for n in layers}
        self.ends = {n: ends[n] for n in gm.graph.nodes if n in ends}
        # the last to read each value that is kept of the float model
        self.last_reader = {
            name: end for end, n in self.ends.items() for name in (_source_name(n), tail_of(n).name)
        }

    def add(self, inputs: Inputs, target: Any) -> None:
        with torch.no_grad(), inputs.explaining(self.gm):
            outputs = self._side_by_side(inputs)
        for reference, value in zip(*(flat_tensors(o) for o in outputs), strict=True):
            self.output.add(reference, value)
        self.samples += inputs.batch_size
        if self.agree is not None and _are_classes(outputs[0]):
            self.agree += int((outputs[0].argmax(1) == outputs[1].argmax(1)).sum())
        else:
            self.agree = None
        metric = self.metric or (top1 if _are_classes(outputs[0]) and _is_class(target, outputs[0]) else None)
        if metric is not None:
            self.metric_name = "top-1 accuracy" if metric is top1 else getattr(metric, "__name__", "metric")
            self.scored += inputs.batch_size
            for i, output in enumerate(outputs):
                self.values[i] += _measured(metric, output, target) * inputs.batch_size

    def layers(self) -> tuple[LayerError, ...]:
        return tuple(
            LayerError(
                str(n.meta["name"]), rule_name(n), label(n), _weight(n), self.total[n].db, self.alone[n].db
            )
            for n in self.total
        )

    def _side_by_side(self, inputs: Inputs) -> tuple[Any, Any]:
        """Both outputs for one batch; of the float one is kept what a layer is still to be compared with."""
        # a copy, for a submodule that is called as it stands may write to its input
        floats = walk(self.twin, [inputs.with_samples(inputs.batch_size)])
        held: dict[str, Any] = {}
        reference = value = None
        for node, (value,) in walk(self.gm, [inputs]):
            if kind_of(node) != "quantizer":
                _, (reference,) = next(floats)
                if node.name in self.last_reader:
                    held[node.name] = reference
            if node in self.ends:
                layer = self.ends[node]
                target = held[tail_of(layer).name]
                self.total[layer].add(target, value)
                self.alone[layer].add(target, self._alone(layer, node, held[_source_name(layer)], value))
                held = {name: v for name, v in held.items() if self.last_reader[name] is not node}
        return reference, value

    def _alone(self, layer: fx.Node, end: fx.Node, x: Any, value: Tensor) -> Tensor:
        """What the quantized layer makes of a float model's input; `value` where that cannot be told."""
        quantizer, tail, source = input_quantizer(layer), tail_of(layer), layer.args[0]
        assert isinstance(source, fx.Node)
        if len(layer.all_input_nodes) > 1:
            return value
        if quantizer is not None and (kind_of(source) == "quantizer" or quantizer.spec.kind == "float"):
            x = quantizer(x)
        elif quantizer is not None:
            if quantizer.scale.numel() > 1:  # which channel is which is not known once they were moved
                return value
            one = [1] * x.ndim
            zero_point = None if quantizer.zero_point is None else quantizer.zero_point.reshape(one)
            x = fake_quantize(x, quantizer.scale.reshape(one), zero_point, quantizer.spec)
        y = evaluate(self.gm, layer, (x, *layer.args[1:]), dict(layer.kwargs))
        if tail is not layer:
            y = evaluate(self.gm, tail, (y, *tail.args[1:]), dict(tail.kwargs))
        return y if end is tail else module_of(end)(y)


def _end_of(layer: fx.Node) -> fx.Node:
    """The layer, its clamp, or its quantizer: the node whose value others read."""
    tail = tail_of(layer)
    users = list(tail.users)
    return users[0] if len(users) == 1 and kind_of(users[0]) == "quantizer" else tail


def _source_name(layer: fx.Node) -> str:
    """Name of the node in the float graph that a layer reads."""
    source = layer.args[0]
    assert isinstance(source, fx.Node)
    while kind_of(source) == "quantizer":
        source = source.args[0]
        assert isinstance(source, fx.Node)
    return source.name


def _weight(node: fx.Node) -> str:
    layer = module_of(node)
    return str(layer.weight_quantizer.spec) if isinstance(layer, QLayer) else ""


def _are_classes(output: Any) -> bool:
    return (
        isinstance(output, Tensor) and output.is_floating_point() and output.ndim == 2 and output.shape[1] > 1
    )


def _is_class(target: Any, output: Tensor) -> bool:
    whole = isinstance(target, Tensor) and not target.is_floating_point()
    return whole and target.shape == output.shape[:1]


def _measured(metric: Metric, output: Any, target: Any) -> float:
    """The metric of one batch."""
    if isinstance(output, Tensor) and isinstance(target, Tensor):
        target = target.to(output.device)
    try:
        values = metric(output, target)
    except LowbitError:
        raise
    except Exception as error:
        what = "no label" if target is None else f"a label of type {type(target).__name__}"
        raise LowbitError(
            f"the metric failed with {type(error).__name__}: {error}; it is called as metric(output, label), "
            f"here with an output of type {type(output).__name__} and {what}"
        ) from error
    try:
        return torch.as_tensor(values).double().mean().item()
    except (TypeError, ValueError, RuntimeError):
        raise LowbitError(
            f"the metric returned a {type(values).__name__}; return a number, or one for each sample"
        ) from None


def _labelled(data: Any, num_batches: int | None) -> Iterator[tuple[Inputs, Any]]:
    """Inputs and label of each batch; None where a batch holds inputs alone."""
    batch: Any = None

    def seen(item: Any) -> Any:
        nonlocal batch
        batch = item
        return item

    single = isinstance(data, (Tensor, dict)) or not isinstance(data, Iterable)
    for inputs in batches(data if single else map(seen, data), num_batches):
        yield inputs, batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def _worst(layers: tuple[LayerError, ...]) -> tuple[LayerError, ...]:
    quantized = sorted(
        (r for r in layers if r.weight and r.alone_db < float("inf")), key=lambda r: r.alone_db
    )
    first = {r.rule_name: r for r in reversed(quantized)}
    return tuple(r for r in quantized if first[r.rule_name] is r)[:WORST]


def _override(q: QuantizedModel, worst: tuple[LayerError, ...]) -> str:
    """YAML that `Recipe.from_dict` reads: 8-bit weights where they have fewer, else float."""
    import yaml

    rules = {d.name: d.rule for d in q.graph.meta["decisions"]}
    found = [_wider(r, rules[r.rule_name]) for r in worst]
    if not found:
        return ""
    rules_of = Recipe(rules=tuple(found)).to_dict()["rules"]
    for plain, rule in zip(rules_of, found, strict=True):
        plain |= {k: _short(spec) for k in ("weight", "activation") if (spec := getattr(rule, k)) is not None}
    text = yaml.safe_dump({"rules": rules_of}, sort_keys=False)
    return f"# above the other rules of the recipe\n{text}"


def _short(spec: QuantSpec) -> str | dict[str, Any]:
    """The name of a spec, or the fields that are not as usual."""
    usual = QuantSpec(bits=8).to_dict() | {"bits": None}
    fields = {k: v for k, v in spec.to_dict().items() if v != usual[k]}
    return next((name for name, known in SPECS.items() if known == spec), fields)


def _wider(layer: LayerError, rule: Rule) -> Rule:
    reason = f"adds the most error: {layer.alone_db:.1f} dB at {layer.weight}"
    if rule.weight is not None and rule.weight.bits < 8:
        wide = rule.weight.at(8)
        observer = rule.weight_observer if suits(rule.weight_observer, wide) else "mse"
        changes = {"match": layer.rule_name, "weight": wide, "weight_observer": observer, "reason": reason}
        return replace(rule, **changes)  # type: ignore[arg-type]
    return Rule(match=layer.rule_name, reason=reason)

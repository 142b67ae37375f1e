"""Where quantizers go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Size, Tensor, fx, nn

from lowbit.core.spec import PerChannel, PerGroup, QuantSpec
from lowbit.errors import LowbitError
from lowbit.graph.match import (
    hidden_layers,
    is_folded_later,
    never_negative,
    operands,
    operations,
    path_name,
    quantizer_of,
    readers_of,
    rule_name,
    source_of,
    tail_of,
)
from lowbit.graph.ops import INTEGER, is_tensor, kind_of, module_of
from lowbit.graph.rewrite import finish, insert_after, swap
from lowbit.nn.dynamic import DynamicQuantizer
from lowbit.nn.layers import BoundLayer, QLayer, quantized_layer
from lowbit.nn.quantizer import Quantizer
from lowbit.recipe import SPECS, Recipe, Rule

__all__ = ["Decision", "place", "resolve"]

QUANTIZERS = "activation_quantizers"
ELEMENTWISE = ("add", "mul")


@dataclass(frozen=True)
class Decision:
    """What the recipe says of one operation."""

    name: str
    op: str
    rule: Rule | None

    @property
    def weight(self) -> QuantSpec | None:
        return self.rule.weight if self.rule else None

    @property
    def activation(self) -> QuantSpec | None:
        return self.rule.activation if self.rule else None

    @property
    def why(self) -> str:
        if self.rule is None:
            return "no rule matches"
        return self.rule.reason or f"rule '{self.rule.match}'"


def resolve(gm: fx.GraphModule, recipe: Recipe) -> list[Decision]:
    """The decision for each operation that could be quantized, in order of execution; nothing is changed.

    Raises:
        LowbitError: a rule that matches nothing.
    """
    targets = operations(gm)
    rules = recipe.resolve(targets)
    return [Decision(t.name, t.op, rules[t.name]) for t in targets]


def place(gm: fx.GraphModule, recipe: Recipe) -> list[Decision]:
    """Put a quantizer on every weight and on every tensor that an integer kernel reads or writes, in place.

    A tensor is quantized where it is produced: behind the clamp of the layer or addition that made it,
    and not between the two; operations that only move values share the quantizer of their input. Its spec is
    the widest that its readers ask for; readers that ask for fewer bits share a second quantizer behind it. A
    model input or the result of a floating point operation is quantized for the integer kernels that read it,
    and for nobody else. A product of matrices that only operations in float read, or the output of the model,
    hands out its accumulators, scaled: rounding them once more would only lose accuracy. An addition or a
    product of elements runs on integers where its result is read as integers. In fixed point, whose scales
    are powers of two, every tensor has a type, whoever reads it. A range found at run time is that of what a
    linear layer reads, right in front of it.

    Raises:
        LowbitError: a rule that matches nothing, a group size that does not divide.
    """
    decisions = resolve(gm, recipe)
    rules = {d.name: d.rule for d in decisions}
    runs = _integer_nodes(gm, rules)
    wanted: dict[fx.Node, Rule] = {}
    for node, rule in runs.items():
        for operand in operands(node):
            source = source_of(operand)
            wanted[source] = max(wanted.get(source, rule), rule, key=_bits)
    for node, rule in runs.items():
        if not _leaves_as_float(node, runs):
            wanted.setdefault(tail_of(node), rule)
    made_by = {tail_of(node): node for node in runs}
    points = [
        (at, readers, rule)
        for node, rule in wanted.items()
        for at, readers in _points(node, made_by.get(node), rule, runs)
    ]
    for path, layer in _layers(gm):
        name, kind = path_name(gm, path), quantized_layer(type(layer))
        asked = rules[name]
        if asked is not None and asked.weight is not None and kind is not None:
            swap(gm, path, _quantized(layer, kind, asked, name))
    for node, readers, rule in points:
        insert_after(gm, node, _path_behind(node), _activation_quantizer(rule, node), readers=readers)
    _narrow(gm, runs)
    _put_dynamic(gm, rules)
    for path, layer in [found for leaf in gm.meta["leaves"] for found in hidden_layers(gm, leaf)]:
        _bind(gm, path, layer, rules)
    finish(gm)
    return decisions


def _narrow(gm: fx.GraphModule, runs: dict[fx.Node, Rule]) -> None:
    """A second quantizer, behind the one that all readers share, for those that ask for fewer bits."""
    asking: dict[tuple[fx.Node, int], list[tuple[fx.Node, Rule]]] = {}
    for node, rule in runs.items():
        for operand in operands(node):
            wide = quantizer_of(operand)
            if wide is not None and wide.spec.bits > _bits(rule):
                asking.setdefault((operand, _bits(rule)), []).append((node, rule))
    for (operand, bits), found in asking.items():
        made_by = operand.args[0] if kind_of(operand) == "quantizer" else operand
        quantizer = _activation_quantizer(found[0][1], made_by)
        readers = [node for node, _ in found]
        insert_after(gm, operand, f"{_path_behind(made_by)}_{bits}_bits", quantizer, readers=readers)


def _put_dynamic(gm: fx.GraphModule, rules: dict[str, Rule | None]) -> None:
    """Quantizers that find their range at run time, one for all linear layers that read a tensor alike."""
    asking: dict[tuple[fx.Node, QuantSpec], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        spec = (
            _dynamic_spec(module_of(node), rules.get(rule_name(node))) if kind_of(node) == "layer" else None
        )
        if spec is not None:
            asking.setdefault((node.args[0], spec), []).append(node)
    for (operand, spec), readers in asking.items():
        path = f"{_path_behind(operand)}_{str(spec).replace('/', '_').replace('+', '_')}"
        insert_after(gm, operand, path, DynamicQuantizer(spec), readers=readers)


def _dynamic_spec(layer: nn.Module, rule: Rule | None) -> QuantSpec | None:
    asked = rule is not None and rule.activation is not None and rule.activation.dynamic
    return rule.activation if asked and isinstance(layer, nn.Linear) else None


def _path_behind(node: fx.Node) -> str:
    """Where the quantizer behind a node is kept: of the same name before and after BatchNorm is folded."""
    layer = node.args[0] if is_folded_later(node) else node
    assert isinstance(layer, fx.Node)
    return f"{QUANTIZERS}.{layer.name}"


def _activation_quantizer(rule: Rule, source: fx.Node | None = None) -> Quantizer:
    """As the rule says; but of what is never negative one bit is 0 or 1, and fixed point has no sign."""
    spec = rule.activation
    assert spec is not None
    plain = not spec.is_binary and spec.scale == "pow2" and spec.symmetric and not spec.mid_rise
    if (spec.is_binary or plain) and source is not None and never_negative(source):
        spec = replace(spec, signed=False, narrow=False) if plain else SPECS["bit"]
        if not plain:
            source.graph.owning_module.meta.setdefault("bits_for_signs", []).append(str(source.meta["name"]))
    return Quantizer(spec, rule.observer, rule.estimator)


def _points(
    node: fx.Node, kernel: fx.Node | None, rule: Rule, runs: dict[fx.Node, Rule]
) -> list[tuple[fx.Node, list[fx.Node] | None]]:
    """Where the quantizers of a tensor go, and which readers each serves; None for all of them.

    What an integer kernel rounded, everybody reads rounded. Floats are rounded for integer kernels alone:
    before operations that move values where only these follow, else behind.

    Args:
        kernel: what runs on integers and ends in the tensor, if any does.
    """
    if _is_fixed_point(rule) or (kernel is not None and not _has_free_floats(kernel)):
        return [(node, None)]
    return list(_behind(node, runs))


def _behind(node: fx.Node, runs: dict[fx.Node, Rule]) -> Iterator[tuple[fx.Node, list[fx.Node] | None]]:
    served: list[fx.Node] = []
    for user in node.users:
        moves = kind_of(user) == "pass"
        found = {reader in runs for reader in readers_of(user) if _reads_numbers(reader)} if moves else set()
        if user in runs or (found == {True} and is_tensor(node)):
            served.append(user)
        elif True in found:
            yield from _behind(user, runs)
    if served:
        yield node, served


def _reads_numbers(node: fx.Node) -> bool:
    """Whether a node makes tensors, or is the output; a shape is the same in codes."""
    value = node.meta.get("value")
    return node.op == "output" or (isinstance(value, (Tensor, tuple, list)) and not isinstance(value, Size))


def _leaves_as_float(node: fx.Node, runs: dict[fx.Node, Rule]) -> bool:
    """Whether nobody needs the result of an integer kernel rounded."""
    if not _has_free_floats(node):
        return False
    if _is_fixed_point(runs[node]):
        return _is_table(node) or all(user.op == "output" for user in node.users)
    return _is_table(node) or not any(reader in runs for reader in readers_of(tail_of(node)))


def _has_free_floats(node: fx.Node) -> bool:
    """A product of matrices can hand out its accumulators, scaled, and a table holds floats."""
    return kind_of(node) == "matmul" or (node.op == "call_module" and isinstance(module_of(node), _FREE))


_FREE = (nn.Linear, nn.Embedding)


def _is_table(node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module_of(node), nn.Embedding)


def _is_fixed_point(rule: Rule) -> bool:
    return rule.activation is not None and rule.activation.scale == "pow2"


def _bits(rule: Rule) -> int:
    return rule.activation.bits if rule.activation else 0


def _integer_nodes(gm: fx.GraphModule, rules: dict[str, Rule | None]) -> dict[fx.Node, Rule]:
    """Calls that run on an integer kernel under these rules, in the order of execution."""
    runs: dict[fx.Node, Rule] = {}
    for node in gm.graph.nodes:
        rule = rules.get(rule_name(node)) if kind_of(node) in INTEGER else None
        if rule is not None and rule.activation is not None and not rule.activation.dynamic:
            runs[node] = rule
    for node in reversed(list(runs)):  # whether a reader runs on integers is known before
        if kind_of(node) in ELEMENTWISE and not _gains(node, runs):
            del runs[node]
    return runs


def _gains(node: fx.Node, runs: dict[fx.Node, Rule]) -> bool:
    """Whether an addition or a product of elements should run on integers.

    It should where a layer reads it, or nothing but others of its kind; and at the output where an operand is
    rounded anyway. The residual stream of a transformer, which LayerNorm reads, stays in float.
    """
    readers = [reader for reader in readers_of(node, clamped=True) if _reads_numbers(reader)]
    if _is_fixed_point(runs[node]) or any(r in runs and kind_of(r) not in ELEMENTWISE for r in readers):
        return True
    if any(reader not in runs and reader.op != "output" for reader in readers):
        return False
    made_by = {tail_of(n): n for n in runs}
    kernels = [made_by.get(source_of(operand)) for operand in operands(node)]
    rounded = any(kernel is not None and not _has_free_floats(kernel) for kernel in kernels)
    return rounded or all(reader in runs for reader in readers)


def _layers(gm: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    """Each layer module that the graph calls, once."""
    seen = set()
    for node in list(gm.graph.nodes):
        if kind_of(node) == "layer" and node.target not in seen:
            seen.add(node.target)
            yield str(node.target), module_of(node)


def _quantized(layer: nn.Module, kind: type[QLayer], rule: Rule, name: str) -> QLayer:
    spec = _spec_of(layer, kind, rule, name)
    return kind.from_float(layer, spec, rule.weight_observer, rule.estimator, rule.reshape)


def _spec_of(layer: nn.Module, kind: type[QLayer], rule: Rule, name: str) -> QuantSpec:
    """The spec with its channels on the axis where this layer has them, checked against the weight."""
    spec = rule.weight
    assert spec is not None
    if isinstance(spec.granularity, PerChannel) and spec.granularity.axis == 0:
        spec = replace(spec, granularity=PerChannel(kind.channel_axis))
    try:
        spec.scale_shape(layer.weight.shape)
    except LowbitError as error:
        grouped = isinstance(spec.granularity, PerGroup)
        other = f"; or put {_per_channel_rule(rule, name)} before the other rules" if grouped else ""
        raise LowbitError(f"'{name}': {error}{other}") from None
    integer = rule.activation is not None and rule.activation.kind == "int"
    if integer and isinstance(spec.granularity, PerChannel) and not issubclass(kind, nn.Embedding):
        axis, channels = spec.granularity.axis % layer.weight.ndim, kind.channel_axis
        if axis != channels:
            raise LowbitError(
                f"'{name}': a scale for each index of weight axis {axis} cannot leave the sum of an integer "
                f"kernel; use PerChannel(0), the output channels, or activation=None"
            )
    return spec


def _per_channel_rule(rule: Rule, name: str) -> str:
    """The rule, as text, that gives a layer one scale per output channel."""
    assert rule.weight is not None
    activation = ", activation=UINT8" if rule.activation is not None else ""
    return f"Rule(match='{name}', weight={'INT4' if rule.weight.bits <= 4 else 'INT8'}{activation})"


def _bind(gm: fx.GraphModule, path: str, layer: nn.Module, rules: dict[str, Rule | None]) -> None:
    """Inside an untraceable submodule a layer carries the quantizers of its input and output along."""
    name, kind = path_name(gm, path), quantized_layer(type(layer))
    rule = rules[name]
    if rule is None or kind is None or (rule.weight is None and rule.activation is None):
        return
    inner = _quantized(layer, kind, rule, name) if rule.weight else layer
    if rule.activation is not None and rule.activation.dynamic:
        spec = _dynamic_spec(layer, rule)
        swap(gm, path, BoundLayer(inner, None if spec is None else DynamicQuantizer(spec), None))
        return
    reads = rule.activation is not None and not isinstance(layer, nn.Embedding)
    quantizers = [_activation_quantizer(rule) if reads else None for _ in range(2)]
    swap(gm, path, BoundLayer(inner, *quantizers))

"""What can be given other bits: the quantizers of a prepared model, and which of them go together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from lowbit.core.spec import PerChannel, QuantSpec
from lowbit.cost import cost_of, stored_bytes
from lowbit.errors import LowbitError, expect
from lowbit.graph.match import is_folded_later, operands, path_name, quantizer_of, rule_name, tail_of
from lowbit.graph.ops import INTEGER, kind_of, module_of
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.recipe import Recipe, exactly
from lowbit.search.table import Site

__all__ = [
    "Candidate",
    "Place",
    "candidates_of",
    "groups_of",
    "narrowed",
    "other_bytes",
    "places_of",
    "resolved",
    "sites_of",
]

# A width, or a spec as a rule has it.
Candidate = int | QuantSpec


@dataclass(frozen=True, kw_only=True)
class Place:
    """A quantizer in the graph that can be given other bits."""

    path: str
    name: str
    operations: tuple[str, ...]
    kind: Literal["weight", "activation"]
    quantizer: Quantizer
    # of a weight
    layer: QLayer | None
    # the call that reaches it first: what runs before does not depend on it
    node: fx.Node
    # its spec, and the way its range is found, as a rule has them
    spec: QuantSpec
    observer: str

    def applied(self, spec: QuantSpec) -> QuantSpec:
        """A rule's spec with its channels on the axis where this layer has them."""
        if self.layer is not None and spec.granularity == PerChannel(0):
            return replace(spec, granularity=PerChannel(self.layer.channel_axis))
        return spec

    def bytes(self, spec: QuantSpec) -> int:
        """On disk."""
        if self.layer is None:
            return 0
        return stored_bytes(tuple(self.layer.weight.shape), self.applied(spec))


def narrowed(spec: QuantSpec, bits: int, kind: str) -> QuantSpec:
    """A spec at another width: as presets have it, weights of 1 to 3 bits have odd codes."""
    plain = spec.signed and spec.symmetric and not spec.narrow and spec.is_standard and spec.scale == "float"
    odd = kind == "weight" and bits <= 3 and plain
    # in one step, for one bit has no other codes
    return replace(spec, bits=bits, mid_rise=odd, split=spec.split and bits == spec.bits)


def candidates_of(place: Place, candidates: Sequence[Candidate]) -> list[QuantSpec]:
    """The specs that a place is tried at, each once, in the order given.

    Raises:
        LowbitError: there is none, or one that does not fit the place.
    """
    if not isinstance(candidates, Sequence) or not candidates:
        raise LowbitError(
            f"bits={candidates!r} leaves nothing to choose from; pass widths, such as (8, 4, 2)"
        )
    found: list[QuantSpec] = []
    for candidate in candidates:
        if isinstance(candidate, QuantSpec):
            if place.kind == "activation":
                continue
            spec = candidate
            if isinstance(spec.granularity, PerChannel) and spec.granularity != PerChannel(0):
                raise LowbitError(
                    f"the candidate {spec} has an axis of its own; PerChannel(0) is the outputs'"
                )
            assert place.layer is not None
            try:
                place.applied(spec).scale_shape(place.layer.weight.shape)
            except LowbitError as error:
                raise LowbitError(f"'{place.name}' cannot have the candidate {spec}: {error}") from None
        else:
            expect(candidate, int, f"bits entry {candidate!r}", "pass whole numbers, or QuantSpecs")
            spec = narrowed(place.spec, candidate, place.kind)
        if spec.kind != "int":
            raise LowbitError(f"the candidate {spec} is no integer; pass widths or specs of kind 'int'")
        if spec not in found:
            found.append(spec)
    if not found:
        raise LowbitError(
            f"no candidate is a width, so the inputs of '{place.name}' have nothing to choose from; add "
            'widths, or measure kinds=("weight",)'
        )
    return found


def places_of(q: QuantizedModel, kinds: Iterable[str]) -> list[Place]:
    """Weights and activations with an integer spec, in the order in which the graph reaches them.

    Raises:
        LowbitError: the model is frozen, or there is nothing to choose.
    """
    expect(q, QuantizedModel, "q", "make it with lowbit.prepare(model, recipe, example)")
    gm = q.graph
    if any(isinstance(m, QLayer) and m.frozen_spec is not None for m in gm.modules()):
        raise LowbitError(
            "the model is frozen, so its float weights are gone; measure what lowbit.prepare returns"
        )
    found = {
        id(place.quantizer): place
        for kind, places in (("weight", _weights), ("activation", _activations))
        for place in places(gm)
        if kind in kinds
    }
    if not found:
        raise LowbitError(
            f"the model has no {' or '.join(kinds)} with an integer spec, so there are no bits to choose; "
            "prepare it with a recipe that quantizes, such as 'w8a8'"
        )
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    return sorted(found.values(), key=lambda place: order[place.node])


def _weights(gm: fx.GraphModule) -> Iterator[Place]:
    rules = {d.name: d.rule for d in gm.meta["decisions"]}
    for path, layer in gm.named_modules():
        node = _caller(gm, path)
        if not isinstance(layer, QLayer) or node is None:
            continue
        bound = path.removesuffix(".layer")  # inside an untraceable submodule
        name = rule_name(node) if path == node.target else path_name(gm, bound)
        spec = rules[name].weight
        if spec.kind == "int":
            yield Place(
                path=f"{path}.weight_quantizer",
                name=name,
                operations=(name,),
                kind="weight",
                quantizer=layer.weight_quantizer,
                layer=layer,
                node=node,
                spec=spec,
                observer=rules[name].weight_observer,
            )


def _activations(gm: fx.GraphModule) -> Iterator[Place]:
    readers, rules = _readers(gm), {d.name: d.rule for d in gm.meta["decisions"]}
    writers = {tail_of(n): rule_name(n) for n in gm.graph.nodes if kind_of(n) in INTEGER}
    for path, quantizer in gm.named_modules():
        node = _caller(gm, path)
        if not isinstance(quantizer, Quantizer) or quantizer.spec.kind != "int" or node is None:
            continue
        if quantizer.spec.dynamic:  # it has no range to measure others against
            continue
        # what nobody reads as codes follows the rule of its writer
        names = readers.get(id(quantizer)) or [writers[n] for n in node.all_input_nodes if n in writers]
        if not names:
            continue
        yield Place(
            path=path,
            name=names[0],
            operations=tuple(dict.fromkeys(names)),
            kind="activation",
            quantizer=quantizer,
            layer=None,
            node=node,
            spec=quantizer.spec,
            observer=rules[names[0]].observer,
        )


def _caller(gm: fx.GraphModule, path: str) -> fx.Node | None:
    """The first call of a module, or of the one that it is in."""
    calls = (node for node in gm.graph.nodes if node.op == "call_module")
    return next((n for n in calls if path == n.target or path.startswith(f"{n.target}.")), None)


def _readers(gm: fx.GraphModule) -> dict[int, list[str]]:
    """Names of the operations that read each activation quantizer, by its id."""
    found: dict[int, list[str]] = {}
    for node in gm.graph.nodes:
        if kind_of(node) not in INTEGER:
            continue
        for operand in operands(node):
            quantizer = quantizer_of(operand)
            if quantizer is not None:
                found.setdefault(id(quantizer), []).append(rule_name(node))
    return found


def groups_of(q: QuantizedModel, places: Sequence[Place]) -> list[list[Place]]:
    """Places that must have the same bits: all that one operation reads, and layers with one weight."""
    shared: dict[object, list[Place]] = {}
    for place in places:
        if place.layer is not None:
            shared.setdefault(id(place.layer.weight), []).append(place)
        else:
            for name in place.operations:
                shared.setdefault(name, []).append(place)
    group = {place.path: place.path for place in places}
    for members in shared.values():
        first = _root(group, members[0].path)
        for other in members[1:]:
            group[_root(group, other.path)] = first
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(_root(group, place.path), []).append(place)
    return [members for members in found.values() if len(members) > 1]


def _root(group: dict[str, str], path: str) -> str:
    while group[path] != path:
        path = group[path]
    return path


def sites_of(q: QuantizedModel, places: Sequence[Place]) -> list[Site]:
    """The table's rows, nothing measured yet."""
    chosen = {id(p.quantizer): p.path for p in places if p.kind == "activation"}
    macs: dict[str, int] = {}
    bits: dict[str, int | str] = {}
    for layer in cost_of(q.graph).layers:
        name = layer.name.partition("#")[0]
        macs[name] = macs.get(name, 0) + layer.macs
        bits[name] = layer.input_bits
    for node in q.graph.graph.nodes:
        if kind_of(node) == "layer" and isinstance(node.args[0], fx.Node):
            source = quantizer_of(node.args[0])
            if source is not None and id(source) in chosen:
                bits[rule_name(node)] = chosen[id(source)]
    return [
        Site(
            path=p.path,
            name=p.name,
            operations=p.operations,
            kind=p.kind,
            elements=p.layer.weight.numel() if p.layer is not None else _sample_size(p.node),
            macs=macs.get(p.name, 0) if p.kind == "weight" else 0,
            inputs=bits.get(p.name, 32) if p.kind == "weight" else "",
            bytes=(),
            probes=(),
        )
        for p in places
    ]


def _sample_size(node: fx.Node) -> int:
    value = node.meta["value"]
    return value.numel() // max(1, value.shape[0]) if hasattr(value, "numel") and value.ndim else 1


def other_bytes(q: QuantizedModel, places: Sequence[Place]) -> tuple[int, int]:
    """Bytes of everything but the chosen weights, and of the whole network in float32.

    Both with BatchNorm folded and every bias in place, as the network is deployed.
    """
    cost = cost_of(q.graph)
    chosen = sum(p.bytes(p.quantizer.spec) for p in places)
    change = 0
    for node in q.graph.graph.nodes:
        if is_folded_later(node):
            norm = module_of(node)
            change -= sum(t.numel() * t.element_size() for t in (*norm.parameters(), *norm.buffers()))
        layer = module_of(node) if kind_of(node) == "layer" else None
        if isinstance(layer, QLayer) and getattr(layer, "bias", 0) is None:
            gains = q.recipe.refine or any(map(is_folded_later, node.users))
            change += 4 * _outputs(layer) if gains else 0
    return cost.bytes + change - chosen, cost.float_bytes + change


def _outputs(layer: QLayer) -> int:
    """Channels that a layer writes."""
    groups = getattr(layer, "groups", 1) if layer.channel_axis == 1 else 1
    return layer.weight.shape[layer.channel_axis] * groups


def resolved(q: QuantizedModel) -> Recipe:
    """The recipe of a model with one rule for each operation, by its name alone."""
    rules = [replace(d.rule, match=exactly(d.name)) for d in q.graph.meta["decisions"] if d.rule is not None]
    return replace(q.recipe, rules=tuple(rules))

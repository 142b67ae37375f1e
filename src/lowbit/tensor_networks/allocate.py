"""Ranks and bits together: for each layer the dense weight or a network, at some width, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.core.spec import INT8, QuantSpec
from lowbit.core.weight_observers import rounded
from lowbit.cost import stored_bytes
from lowbit.decompose.ranks import Budget as Share
from lowbit.decompose.ranks import Fixed, TooSmallError
from lowbit.errors import LowbitError
from lowbit.graph.cursor import Cursor
from lowbit.graph.match import calls, layer_nodes
from lowbit.graph.ops import module_of
from lowbit.graph.run import flat_tensors, noise_and_signal
from lowbit.graph.trace import trace
from lowbit.nn.layers import obstacle
from lowbit.nn.network import TensorNetwork
from lowbit.passes.calibrate import batches
from lowbit.progress import track
from lowbit.recipe import Recipe, Rule, exactly
from lowbit.search.sites import narrowed
from lowbit.search.solve import Resource, least, solve
from lowbit.tables import text_table
from lowbit.tensor_networks.tensorize import (
    Tensorized,
    TensorRule,
    dense_layers,
    network_of,
    rules_of,
    tensorize,
)

__all__ = ["Option", "Plan", "allocate_ranks"]


@dataclass(frozen=True)
class Option:
    """One way to hold the weight of one layer."""

    # ranks of the network; empty for the dense weight
    ranks: tuple[int, ...]
    kind: str
    modes: tuple[tuple[int, ...], tuple[int, ...]]
    bits: int
    bytes: int
    # multiply-accumulates for one sample
    macs: int
    # noise over signal of the output with this weight alone changed
    noise: float

    def __str__(self) -> str:
        shape = f"{self.kind} {' '.join(map(str, self.ranks))}" if self.ranks else "dense"
        return f"{shape}, {self.bits} bits"


@dataclass(frozen=True)
class Plan:
    """An option for each layer."""

    choice: dict[str, Option]
    # bytes of what is not chosen: biases, other parameters
    other_bytes: int
    float_bytes: int
    activation: QuantSpec | None
    # of the quantized network; None where nothing was evaluated
    accuracy: float | None = None
    # whether an accuracy that was asked for is reached
    holds: bool = True

    @property
    def bytes(self) -> int:
        return self.other_bytes + sum(option.bytes for option in self.choice.values())

    @property
    def macs(self) -> int:
        return sum(option.macs for option in self.choice.values())

    @property
    def compression(self) -> float:
        return self.float_bytes / self.bytes

    def tensorize(self, model: nn.Module) -> Tensorized:
        """The float network with the chosen ranks; quantize it with `recipe`."""
        rules = []
        for name, option in self.choice.items():
            if not option.ranks:
                rules.append(TensorRule(match=exactly(name), kind="keep"))
                continue
            out_modes, in_modes = option.modes
            ranks = option.ranks[0] if option.kind == "cp" else option.ranks
            modes = {"out_modes": out_modes, "in_modes": in_modes} if out_modes else {}
            rules.append(TensorRule(match=exactly(name), kind=option.kind, rank=ranks, **modes))
        return tensorize(model, [*rules, TensorRule(kind="keep")] if rules else TensorRule(kind="keep"))

    @property
    def recipe(self) -> Recipe:
        """The chosen bits, for every factor of a layer the same."""
        rules = []
        for name, option in self.choice.items():
            spec = narrowed(INT8, option.bits, "weight")
            match = f"{name}.*" if option.ranks else exactly(name)
            why = f"noise {option.noise:.2g}"
            rules.append(Rule(match=match, weight=spec, activation=self.activation, reason=why))
        rest = Rule(weight=INT8, activation=self.activation)
        return Recipe(rules=(*rules, rest), equalize=True, refine=("bond_correct", "affine_correct"))

    def __str__(self) -> str:
        rows = [
            (name, str(option), f"{option.bytes:,}", f"{option.macs:,}", f"{option.noise:.2g}")
            for name, option in self.choice.items()
        ]
        table = text_table(("layer", "weight", "bytes", "MACs", "noise"), rows)
        total = f"{self.bytes:,} bytes, {self.compression:.2f} times smaller than float32; {self.macs:,} MACs"
        accuracy = "" if self.accuracy is None else f"; measured accuracy {self.accuracy:.4f}"
        end = "" if self.holds else "\nNothing that was found holds the accuracy; this is the best."
        return f"{table}\n{total}{accuracy}{end}"


def allocate_ranks(
    model: nn.Module,
    data: Any,
    *,
    bytes: int | None = None,
    compression: float | None = None,
    macs: int | None = None,
    accuracy: float | None = None,
    evaluate: Callable[[Plan], float] | None = None,
    bits: Sequence[int] = (8, 6, 4),
    shares: Sequence[float] = (0.5, 0.35, 0.25, 0.15, 0.1, 0.05),
    rules: Sequence[TensorRule] = (TensorRule(),),
    activation: QuantSpec | None = None,
    tries: int = 8,
) -> Plan:
    """The least sum of output noise that a budget allows, proven optimal for what was measured.

    Each layer may stay dense or become a network with so many parameters (`shares` of the dense ones), at
    each width. An option is measured by running the float network with the rounded weight in its place, from
    that layer on. With an accuracy the smallest network that reaches it is looked for, by bisection, and
    `evaluate` decides.

    Args:
        model: trained; dense layers.
        data: batches, as for calibration.
        bytes, compression, macs: limits; at most, at least, at most.
        accuracy: what `evaluate` must return, at least.
        evaluate: accuracy of the network that a plan makes; the answer tells what it found.
        rules: kind and modes of the networks; their ranks are chosen here.
        activation: goes into the recipe.

    Raises:
        LowbitError: no limit, nothing that fits, or an accuracy without `evaluate`.
    """
    if all(limit is None for limit in (bytes, compression, macs, accuracy)):
        raise LowbitError("no budget; set bytes=, compression=, macs= or accuracy=")
    if accuracy is not None and evaluate is None:
        raise LowbitError(f"accuracy={accuracy} must be measured; pass evaluate=, a function of a plan")
    table = _Table.of(model, data, bits, shares, tuple(rules))
    if compression is not None:
        most = math.floor(table.float_bytes / compression)
        bytes = most if bytes is None else min(bytes, most)
    best = table.solve(bytes, macs, activation)
    if evaluate is None:
        return best
    best = replace(best, accuracy=float(evaluate(best)))
    if accuracy is None or best.accuracy is None:
        return best
    if best.accuracy < accuracy:
        return replace(best, holds=False)
    return _smallest(table, best, macs, accuracy, evaluate, tries)


def _smallest(
    table: _Table,
    best: Plan,
    macs: int | None,
    accuracy: float,
    evaluate: Callable[[Plan], float],
    tries: int,
) -> Plan:
    """By bisection of bytes below a plan that holds the accuracy."""
    low, high = table.least_bytes(macs) - 1, best.bytes
    for _ in track(range(tries), "evaluating sizes", total=tries):
        middle = (low + high) // 2
        if middle <= low:
            break
        found = table.solve(middle, macs, best.activation)
        found = replace(found, accuracy=float(evaluate(found)))
        if found.accuracy is not None and found.accuracy >= accuracy:
            best, high = found, found.bytes
        else:
            low = middle
    return best


@dataclass(frozen=True)
class _Table:
    """Every option of every layer, measured."""

    options: dict[str, list[Option]]
    other_bytes: int
    float_bytes: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Any,
        bits: Sequence[int],
        shares: Sequence[float],
        rules: tuple[TensorRule, ...],
    ) -> _Table:
        inputs = list(batches(data))
        if not inputs:
            raise LowbitError("the data holds no batch; pass at least one")
        gm, _ = trace(model, inputs[0])
        counts = calls(gm)
        layers = dense_layers(model)
        nodes = {
            str(node.target): node
            for node in layer_nodes(gm)
            if str(node.target) in layers and counts[id(module_of(node))] == 1
        }
        if not nodes:
            raise LowbitError(
                "the model calls no nn.Linear or nn.Conv2d of its own, once; wrap a single layer in "
                "nn.Sequential, and where functions use weights pass lowbit.graph.trace.trace(model, x)[0]"
            )
        chosen_rules = rules_of({name: layers[name] for name in nodes}, rules)
        cursor = Cursor(gm, inputs)
        with torch.inference_mode():
            wanted = [flat_tensors(batch.call(gm)) for batch in inputs]
        options: dict[str, list[Option]] = {}
        for name, node in track(nodes.items(), "measuring ranks and bits", total=len(nodes)):
            cursor.advance(node)
            options[name] = list(_measured(cursor, node, chosen_rules[name], bits, shares, wanted))
        weights = [module_of(node).get_parameter("weight") for node in nodes.values()]
        chosen = sum(weight.nbytes for weight in weights)
        whole = sum(t.nbytes for t in model.state_dict().values())
        return cls(options, whole - chosen, whole)

    def solve(self, bytes: int | None, macs: int | None, activation: QuantSpec | None) -> Plan:
        resources = self._resources(bytes, macs)
        rows = list(self.options.values())
        choice = solve([[o.noise for o in row] for row in rows], resources)
        if choice is None:
            nearest = [
                f"{least(r, [o for o in resources if o is not r]) or 0:,.0f} {r.name}" for r in resources
            ]
            raise LowbitError(
                f"no choice of ranks and bits fits; with the other limit as it is, the least is "
                f"{' or '.join(nearest)}, biases and other parameters aside ({self.other_bytes:,} bytes)"
            )
        picked = {name: row[c] for (name, row), c in zip(self.options.items(), choice, strict=True)}
        return Plan(picked, self.other_bytes, self.float_bytes, activation)

    def least_bytes(self, macs: int | None) -> int:
        size, *others = self._resources(2**62, macs)
        return self.other_bytes + round(least(size, others) or 0)

    def _resources(self, bytes: int | None, macs: int | None) -> list[Resource]:
        rows = list(self.options.values())
        found = []
        if bytes is not None:
            usage = [[float(o.bytes) for o in row] for row in rows]
            found.append(Resource(name="bytes", limit=bytes - self.other_bytes, usage=usage))
        if macs is not None:
            usage = [[float(o.macs) for o in row] for row in rows]
            found.append(Resource(name="MACs", limit=macs, usage=usage))
        return found


def _measured(
    cursor: Cursor,
    node: fx.Node,
    rule: TensorRule | None,
    bits: Sequence[int],
    shares: Sequence[float],
    wanted: Sequence[Sequence[Tensor]],
) -> Any:
    layer = module_of(node)
    original = layer.weight
    positions = node.meta["value"][0].numel() // layer.weight.shape[0]
    size = tuple(node.args[0].meta["value"].shape[2:])
    for network in [None, *_networks(str(node.target), layer, rule, shares)]:
        for width in bits:
            spec = narrowed(INT8, width, "weight")
            weight, stored = _rounded(layer, network, spec)
            layer.weight = nn.Parameter(weight)
            noise = _noise(cursor.behind(), wanted)
            layer.weight = original
            if network is None:
                macs = original.numel() * positions
                yield Option((), "", ((), ()), width, stored, macs, noise)
            else:
                shape = network.blueprint
                macs = network.macs(positions, size)
                kind = {"TTLinear": "tt", "TTConv2d": "tt", "CPConv2d": "cp"}.get(shape.kind, "tucker")
                modes = shape.out_modes, shape.in_modes
                yield Option(shape.ranks, kind, modes, width, stored, macs, noise)


def _networks(
    name: str, layer: nn.Module, rule: TensorRule | None, shares: Sequence[float]
) -> list[TensorNetwork]:
    """Those that are smaller than the weight, each once."""
    if rule is None or rule.kind == "keep" or getattr(layer, "groups", 1) > 1 or obstacle(layer):
        return []
    found: dict[tuple[int, ...], TensorNetwork] = {}
    for share in shares:
        rank = _cp_rank(layer, share) if rule.kind == "cp" else Share(share)
        try:
            network, _ = network_of(name, layer, replace(rule, rank=rank))
        except TooSmallError:
            continue
        if network.weights < layer.weight.numel():
            found.setdefault(network.blueprint.ranks, network)
    return list(found.values())


def _cp_rank(layer: nn.Module, share: float) -> Fixed:
    return Fixed(max(1, int(share * layer.weight.numel() / sum(layer.weight.shape))))


def _rounded(layer: nn.Module, network: TensorNetwork | None, spec: QuantSpec) -> tuple[Tensor, int]:
    """The dense weight of a layer once the factors are rounded, and the bytes of these."""

    if network is None:
        return rounded(layer.weight.detach(), spec), _bytes(layer, spec, layer)
    weights = [factor.weight for factor in network.factors]
    try:
        for factor, weight in zip(network.factors, weights, strict=True):
            factor.weight = nn.Parameter(rounded(weight.detach(), spec))
        stored = sum(_bytes(factor, spec, layer) for factor in network.factors)
        return network.dense_weight().detach(), stored
    finally:
        for factor, weight in zip(network.factors, weights, strict=True):
            factor.weight = weight


def _bytes(factor: nn.Module, spec: QuantSpec, layer: nn.Module) -> int:
    """On disk, with the bias that corrections give it; that of the layer itself is counted elsewhere."""
    own = factor is layer or factor.bias is not None
    shape = tuple(factor.weight.shape)
    return stored_bytes(shape, spec) + (0 if own and layer.bias is not None else 4 * shape[0])


def _noise(outputs: Sequence[Any], wanted: Sequence[Sequence[Tensor]]) -> float:
    """Noise over signal."""
    pairs = [noise_and_signal(targets, output) for targets, output in zip(wanted, outputs, strict=True)]
    noise, signal = map(sum, zip(*pairs, strict=True))
    return noise / signal if signal else 0.0

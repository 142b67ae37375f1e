"""From a trained network to one with factors in place of its large weights; nothing is trained here."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lowbit.cost import cost_of
from lowbit.decompose.ranks import Energy, Fixed, Lost, RankRule, TooSmallError
from lowbit.decompose.tt import factorize, matrix_to_train
from lowbit.errors import LowbitError, expect, near_miss
from lowbit.graph.inputs import Inputs
from lowbit.graph.match import Operation
from lowbit.graph.rewrite import swap
from lowbit.graph.trace import trace
from lowbit.nn.layers import obstacle
from lowbit.nn.network import TensorNetwork
from lowbit.nn.tensorized import TTLinear
from lowbit.nn.tensorized_conv import ConvChain, CPConv2d, TTConv2d, TuckerConv2d
from lowbit.recipe import Rule
from lowbit.tables import text_table

__all__ = ["Row", "TensorRule", "Tensorized", "dense_layers", "network_of", "rules_of", "tensorize"]

_CONVS: dict[str, type[ConvChain]] = {"tucker": TuckerConv2d, "tt": TTConv2d, "cp": CPConv2d}
KINDS = ("tt", "svd", "tucker", "cp", "keep")
# Without a number of cores a train has so many that each has about this many entries for a pair of rank
# indices.
PER_CORE = 32
RANK = Energy(0.95)


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """What becomes of the Linear and Conv2d layers whose name matches."""

    # as in `lowbit.Rule`
    match: str = "*"
    # "tt" a train, "svd" two factors of a Linear, "tucker" or "cp" of a Conv2d, "keep" the dense weight; by
    # default a train for a Linear and Tucker-2 for a Conv2d
    kind: str = ""
    # a number, a tuple of one for each bond, or a rule: Energy, Error, Budget, Vbmf
    rank: RankRule | int | tuple[int, ...] = RANK
    # how many cores a train of a Linear has; by default it depends on the size
    cores: int | None = None
    # factors of the outputs and inputs of a Linear, instead of a number of cores
    out_modes: tuple[int, ...] = ()
    in_modes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        if self.kind and self.kind not in KINDS:
            raise LowbitError(f"kind='{self.kind}' is unknown{near_miss(self.kind, KINDS)}")
        if isinstance(self.rank, (int, tuple)):
            object.__setattr__(self, "rank", Fixed(self.rank))
        if self.cores is not None and (not isinstance(self.cores, int) or self.cores < 2):
            raise LowbitError(f"cores={self.cores!r} is not a whole number from 2 up; a train has a bond")
        for name in ("out_modes", "in_modes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if bool(self.out_modes) != bool(self.in_modes):
            raise LowbitError("out_modes and in_modes go together; give both, or a number of cores")
        Rule(match=self.match)

    def matches(self, name: str, layer: nn.Module, roles: frozenset[str]) -> bool:
        return Rule(match=self.match).matches(Operation(name, type(layer).__name__, roles))


@dataclass(frozen=True)
class Row:
    """What became of one layer."""

    name: str
    op: str
    # class of the network; empty where the layer was left alone
    kind: str
    ranks: tuple[int, ...]
    # |w - dense| / |w|
    error: float
    weights_before: int
    weights_after: int
    # multiply-accumulates for one sample; None without an example
    macs_before: int | None = None
    macs_after: int | None = None
    # why it was left alone, or what else there is to say
    why: str = ""
    # what the rank of each bond leaves out on its own
    bond_errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tensorized:
    """The network with factors, and what each layer saved and lost."""

    model: nn.Module
    rows: tuple[Row, ...]

    @property
    def compression(self) -> float:
        """Weights of all Linear and Conv2d layers, before over after."""
        return sum(r.weights_before for r in self.rows) / max(1, sum(r.weights_after for r in self.rows))

    def __str__(self) -> str:
        header = (
            "layer",
            "operation",
            "becomes",
            "ranks",
            "error",
            "at bonds",
            "weights",
            "were",
            "MACs",
            "were",
            "why",
        )
        rows = [
            (
                r.name,
                r.op,
                r.kind,
                " ".join(map(str, r.ranks)),
                f"{r.error:.3f}" if r.kind else "",
                " ".join(f"{e:.3f}" for e in r.bond_errors),
                f"{r.weights_after:,}",
                f"{r.weights_before:,}",
                "" if r.macs_after is None else f"{r.macs_after:,}",
                "" if r.macs_before is None else f"{r.macs_before:,}",
                r.why,
            )
            for r in self.rows
        ]
        total = f"weights of these layers: {self.compression:.2f} times fewer"
        return f"{text_table(header, rows)}\n{total}"


def tensorize(
    model: nn.Module, rules: TensorRule | Sequence[TensorRule], example_inputs: Any = None
) -> Tensorized:
    """Replace the weights of trained layers by tensor networks that are near to them, in a copy of the model.

    The first rule that matches a layer wins, and a rule that matches none is an error. A layer that would not
    get smaller is left alone, as are grouped convolutions, shared weights and layers with hooks.

    Args:
        model: any network of nn.Linear and nn.Conv2d. Where weights are used by functions, as in
            F.conv2d(x, self.w), pass `lowbit.graph.trace.trace(model, example)[0]`, in which they are layers.
        example_inputs: one batch; with it multiply-accumulates are counted too.

    Raises:
        LowbitError: a rule that matches nothing, or that does not suit the layer it matches.
    """
    expect(model, nn.Module, "model", "pass the network itself, such as nn.Linear(4, 2)")
    rules = (rules,) if isinstance(rules, TensorRule) else tuple(rules)
    found = copy.deepcopy(model)
    layers = dense_layers(found)
    if not layers:
        raise LowbitError("the model has no nn.Linear and no nn.Conv2d, and other layers are not decomposed")
    obstacles, rows = _obstacles(found), []
    for (path, layer), rule in zip(layers.items(), rules_of(layers, rules).values(), strict=True):
        row, network = _decomposed(path, layer, rule, obstacles.get(id(layer), ""))
        rows.append(row)
        if network is not None and path:
            swap(found, path, network.train(layer.training))
        elif network is not None:
            found = network.train(layer.training)
    if example_inputs is not None:
        rows = _with_macs(rows, model, found, Inputs.of(example_inputs))
    return Tensorized(found, tuple(rows))


def dense_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The Linear and Conv2d layers that are no factors of a network already, by path."""
    inside = {id(part) for m in model.modules() if isinstance(m, TensorNetwork) for part in m.modules()}
    return {
        path: m
        for path, m in model.named_modules()
        if type(m) in (nn.Linear, nn.Conv2d) and id(m) not in inside
    }


def rules_of(layers: Mapping[str, nn.Module], rules: Sequence[TensorRule]) -> dict[str, TensorRule | None]:
    """The first rule that matches each layer.

    Raises:
        LowbitError: a rule that matches none.
    """
    names = list(layers)
    found: dict[str, TensorRule | None] = {}
    matched: set[TensorRule] = set()
    for path, layer in layers.items():
        roles = frozenset(
            {"layer"}
            | {r for r, n in zip(("first", "last"), (names[0], names[-1]), strict=True) if n == path}
        )
        fits = [rule for rule in rules if rule.matches(path, layer, roles)]
        found[path] = fits[0] if fits else None
        matched |= set(fits)
    for rule in rules:
        if rule not in matched:
            raise LowbitError(f"rule '{rule.match}' matches no layer{near_miss(rule.match, names)}")
    return found


def _obstacles(model: nn.Module) -> dict[int, str]:
    """Why layers must keep their dense weight, by their ids."""
    found: dict[int, str] = {}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for parent in model.modules():
        for layer in parent.children():
            if uses[id(getattr(layer, "weight", None))] > 1:
                found[id(layer)] = "its weight is shared with another layer"
            elif isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
                found[id(layer)] = f"the {type(parent).__name__} around it reads the weight itself"
    return found


def _decomposed(
    path: str, layer: nn.Module, rule: TensorRule | None, why: str
) -> tuple[Row, TensorNetwork | None]:
    """What becomes of a layer, and the network to put in its place.

    Args:
        why: what speaks against it.
    """
    count = layer.weight.numel()
    row = Row(path, type(layer).__name__, "", (), 0.0, count, count)
    if rule is None or rule.kind == "keep":
        return replace(row, why="no rule asks for it" if rule is None else "a rule keeps it"), None
    why = why or obstacle(layer)
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        why = f"it has {layer.groups} groups, each a tensor of its own"
    if why:
        return replace(row, why=why), None
    try:
        network, lost = network_of(path, layer, rule)
    except TooSmallError as small:
        return replace(row, why=str(small)), None
    if network.weights >= count:
        grown = f"it would grow: {network.weights:,} weights with ranks {_text(network.blueprint.ranks)}"
        return replace(row, why=grown), None
    ranks = network.blueprint.ranks
    asked = rule.rank.rank if isinstance(rule.rank, Fixed) else ranks
    asked = (asked,) * len(ranks) if isinstance(asked, int) else asked
    why = "" if asked == ranks else f"of the ranks {_text(asked)} no more fit"
    done = replace(
        row, kind=type(network).__name__, ranks=ranks, error=lost.total, bond_errors=lost.bonds, why=why
    )
    return replace(done, weights_after=network.weights), network


def _text(ranks: Sequence[int]) -> str:
    return " ".join(map(str, ranks))


def network_of(path: str, layer: nn.Module, rule: TensorRule) -> tuple[TensorNetwork, Lost]:
    """The network that a rule makes of a layer, and what it leaves out.

    Raises:
        LowbitError: the rule does not suit the layer.
    """
    assert not isinstance(rule.rank, (int, tuple))
    try:
        network, lost = _made(layer, rule)
    except TooSmallError:
        raise
    except LowbitError as error:
        raise LowbitError(f"'{path}': {error}") from None
    return network.to(layer.weight).requires_grad_(layer.weight.requires_grad), lost


def _made(layer: nn.Module, rule: TensorRule) -> tuple[TensorNetwork, Lost]:
    if isinstance(layer, nn.Linear):
        out_modes, in_modes = _modes(layer, rule)
        train = matrix_to_train(layer.weight.detach(), out_modes, in_modes, rule.rank)
        return TTLinear.from_train(train, layer.bias), train.lost
    kind = rule.kind or "tucker"
    if kind not in _CONVS:
        raise LowbitError(f"kind='{kind}' is for nn.Linear; use one of {', '.join(_CONVS)}")
    return _CONVS[kind].from_conv(layer, rule.rank)


def _modes(layer: nn.Linear, rule: TensorRule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rising outputs beside falling inputs: so the tensors on the way stay small."""
    if rule.kind not in ("", "tt", "svd"):
        raise LowbitError(f"kind='{rule.kind}' is for nn.Conv2d; use 'tt' or 'svd'")
    out, into = layer.out_features, layer.in_features
    if rule.kind == "svd":
        return (1, out), (into, 1)
    if rule.out_modes:
        return rule.out_modes, rule.in_modes
    cores = rule.cores or max(2, round(math.log(out * into, PER_CORE)))
    return factorize(out, cores)[::-1], factorize(into, cores)


def _with_macs(rows: list[Row], before: nn.Module, after: nn.Module, example: Inputs) -> list[Row]:
    """Multiply-accumulates of each layer, all of its factors together."""
    old, new = (_macs(model, example) for model in (before, after))
    return [replace(row, macs_before=old(row.name), macs_after=new(row.name)) for row in rows]


def _macs(model: nn.Module, example: Inputs) -> Callable[[str], int]:
    """Multiply-accumulates for one sample of all layers at or below a path."""
    layers = cost_of(trace(model, example)[0]).layers

    def below(path: str) -> int:
        names = (layer.name.partition("#")[0] for layer in layers)
        return sum(
            layer.macs
            for name, layer in zip(names, layers, strict=True)
            if not path or name == path or name.startswith(f"{path}.")
        )

    return below

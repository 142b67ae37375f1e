"""What layers made of factors share: how they are described, and what they keep between calls."""

from __future__ import annotations

import copy
import importlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.registry import Registry

if TYPE_CHECKING:  # importing lowbit stays cheap
    from typing_extensions import Self

    from lowbit.decompose.tt import Train
    from lowbit.nn.contraction import Run

__all__ = [
    "Blueprint",
    "Bond",
    "Kept",
    "TensorNetwork",
    "network_kind",
    "networks",
    "replace_module",
    "resize",
    "std_of_factors",
    "with_networks",
]

# Bytes of products that a layer keeps in evaluation.
KEEP_BYTES = 1 << 26
_PLAIN = (nn.Linear, nn.Conv2d)
_VERSION = operator.attrgetter("_version")

networks: Registry[type[TensorNetwork]] = Registry("tensor network")


def network_kind(name: str) -> type[TensorNetwork]:
    """The class of that name; the layers are imported when the first is asked for."""
    importlib.import_module("lowbit.nn.tensorized_conv")
    importlib.import_module("lowbit.nn.tensorized")
    return networks.get(name)


class Bond(NamedTuple):
    """An index that two factors share: outputs of the one, inputs of the other.

    The weight of the writer is [m * rank, ...], that of the reader [out, rank * n, ...]; m and n are modes of
    a train, else 1.
    """

    writer: str
    reader: str
    rank: int


@dataclass(frozen=True)
class Blueprint:
    """All of a tensor network but its numbers, as plain data."""

    # name in `networks`
    kind: str
    ranks: tuple[int, ...]
    # of trains of matrices
    out_modes: tuple[int, ...] = ()
    in_modes: tuple[int, ...] = ()

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Blueprint:
        """From what `asdict` made, by way of JSON."""
        names = ("ranks", "out_modes", "in_modes")
        return cls(data["kind"], **{name: tuple(data[name]) for name in names})

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the layers, in the order in which they are called."""
        names = network_kind(self.kind).names
        return names or tuple(f"cores.{k}" for k in range(len(self.ranks) + 1))

    def bonds(self, path: str = "") -> tuple[Bond, ...]:
        """Those whose basis is free to choose, between paths of layers."""
        if not network_kind(self.kind).mixes:
            return ()
        names = self.paths(path)
        return tuple(Bond(*pair) for pair in zip(names, names[1:], self.ranks, strict=False))

    def paths(self, path: str) -> list[str]:
        """Those of the factors, of a network at that path."""
        return [f"{path}.{name}".lstrip(".") for name in self.factors]


class TensorNetwork(nn.Module):
    """A layer made of layers, the factors of its weight.

    A graph sees the factors. Called outside of a graph the layer may multiply weights first, and keeps what
    it made for as long as nothing is trained through it.
    """

    # names of the factors, where they are always the same
    names: ClassVar[tuple[str, ...]] = ()
    # whether the indices of a bond may be mixed
    mixes: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._kept = Kept(KEEP_BYTES)

    @property
    def factors(self) -> Sequence[nn.Linear | nn.Conv2d]:
        """The layers it is made of, in the order in which they are called."""
        raise NotImplementedError

    @property
    def blueprint(self) -> Blueprint:
        raise NotImplementedError

    @classmethod
    def like(cls, layer: nn.Module, blueprint: Blueprint) -> TensorNetwork:
        """A new network in place of a float layer, or of a network with other ranks, with random numbers."""
        raise NotImplementedError

    @classmethod
    def train_of(cls, weights: Sequence[Tensor], blueprint: Blueprint) -> Train:
        """Weights of factors as cores [r, ..., s], neighbours joined by their bond."""
        raise NotImplementedError

    @classmethod
    def weights_of(cls, train: Train) -> list[Tensor]:
        """Inverse of `train_of`."""
        raise NotImplementedError

    def load(self, train: Train) -> None:
        """Take cores of the same modes; the ranks may be others."""
        for factor, weight in zip(self.factors, self.weights_of(train), strict=True):
            resize(factor, weight)

    def dense_weight(self) -> Tensor:
        """The weight of the layer that computes the same."""
        raise NotImplementedError

    def macs(self, positions: int, size: tuple[int, ...]) -> int:
        """Multiply-accumulates of its factors for one sample.

        Args:
            positions: how often the dense weight is used: rows of a sample, or outputs of a channel.
            size: height and width of the input of a convolution.
        """
        raise NotImplementedError

    @property
    def weights(self) -> int:
        """How many numbers the factors have."""
        return sum(factor.weight.numel() for factor in self.factors)

    def _plain_weights(self) -> list[Tensor]:
        """Weights of the factors, where products of these do what calls of the factors would; else none.

        They do not while compiling, and where factors were quantized, replaced or given hooks.
        """
        found: list[Tensor] = []
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return found
        # small products take as long as all of this: a loop is faster than all(), and a module finds in its
        # __dict__ faster than as an attribute
        for factor in self.factors:
            held = factor.__dict__
            if type(factor) not in _PLAIN or held["_forward_hooks"] or held["_forward_pre_hooks"]:
                return []
            weight = held["_parameters"].get("weight")
            if weight is None or held["_backward_hooks"] or held["_backward_pre_hooks"]:
                return []
            found.append(weight)
        return found

    def train(self, mode: bool = True) -> Self:
        """As of any module; what was kept goes, for fused optimizers change weights without a trace."""
        self._kept.clear()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept: copies and files hold factors alone."""
        return {**self.__dict__, "_kept": Kept(self._kept.limit)}


def resize(factor: nn.Linear | nn.Conv2d, weight: Tensor) -> None:
    """Give a factor a weight with another number of inputs or outputs; a depthwise one stays so."""
    factor.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if isinstance(factor, nn.Linear):
        factor.out_features, factor.in_features = weight.shape
    else:
        grouped = factor.groups > 1
        factor.out_channels = len(weight)
        factor.in_channels, factor.groups = (len(weight), len(weight)) if grouped else (weight.shape[1], 1)


def with_networks(model: nn.Module, blueprints: Mapping[str, Blueprint]) -> nn.Module:
    """The model, or a copy in which the layers at these paths are such networks, with random numbers.

    Raises:
        LowbitError: a path of the blueprints leads to no layer of the model.
    """
    modules = dict(model.named_modules())
    for path in blueprints:
        if path not in modules:
            raise LowbitError(f"'{path}' was a tensor network, and this model has no such layer")
    wanted = {p: b for p, b in blueprints.items() if getattr(modules[p], "blueprint", None) != b}
    if not wanted:
        return model
    found = copy.deepcopy(model)
    for path, blueprint in wanted.items():
        old = found.get_submodule(path)
        network = network_kind(blueprint.kind).like(old, blueprint)
        network.to(next(old.parameters()).device)
        if not path:
            return network
        replace_module(found, old, network)
    return found


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in every place that holds another."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children skips second names of one module
            if child is old:
                setattr(parent, name, new)


class Kept:
    """Products of factors, kept within a bound of bytes for as long as no factor changes.

    An in-place change of a factor, a loaded state or a move to another device drops all of them. What writes
    to `factor.weight.data`, behind autograd's back, is not seen: call `clear`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # held so that no other can take their place
        self.watched: list[Tensor] = []
        # their versions, then their addresses
        self.state: list[int] = []
        self.products: dict[Any, list[Tensor]] = {}
        # what to do with an input of a shape, in PyTorch or in the library that its lanes stand for
        self.runs: dict[Any, Run] = {}

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Let all go if these are not the tensors of the last time, as they were."""
        watched = self.watched
        # all of this at every call, for small products: functions over lists are faster than loops
        if (
            len(watched) == len(tensors)
            and all(map(operator.is_, watched, tensors))
            and [*map(_VERSION, tensors), *map(Tensor.data_ptr, tensors)] == self.state
        ):
            return
        self.clear()
        if not any(t.is_inference() for t in tensors):  # those have no version
            self.watched = list(tensors)
            self.state = [*map(_VERSION, tensors), *map(Tensor.data_ptr, tensors)]

    def clear(self) -> None:
        """Let all go."""
        self.watched, self.state, self.products, self.runs = [], [], {}, {}

    def product(self, key: Any, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The product of that name, made where it is not there; the oldest go where there is no room."""
        if key not in self.products:
            kind = self.watched[0].device.type if self.watched else "cpu"
            with torch.autocast(kind, enabled=False):  # what is kept serves calls without it too
                found = make()
            if _bytes(found) > self.limit:
                return found
            while self.products and sum(map(_bytes, [found, *self.products.values()])) > self.limit:
                del self.products[next(iter(self.products))]
                self.runs.clear()
            self.products[key] = found
        return self.products[key]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def std_of_factors(variance: float, ranks: Sequence[int], factors: int) -> float:
    """Of the entries of each factor, so that an entry of the dense weight has that variance.

    It is a sum of r1 r2 ... products of as many numbers as there are factors.
    """
    return (variance / math.prod(ranks)) ** (0.5 / factors)

"""A linear layer whose weight is a tensor train, made of ordinary linear layers.

A graph sees through it, so recipes, training, bit search and export take each core as they take any Linear.
Called outside of a graph it chooses the cheapest order for the batch at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.decompose.tt import Train, check_modes
from lowbit.errors import LowbitError
from lowbit.kernels import tensor_train
from lowbit.nn.contraction import Order, Run, Shape, best_order, matrices, merged
from lowbit.nn.network import Blueprint, Kept, TensorNetwork, networks, std_of_factors

__all__ = ["TTLinear", "clipped_ranks"]


@networks.register("TTLinear")
class TTLinear(TensorNetwork):
    """y = x W^T + b, W [out, in] a tensor train (Novikov et al. 2015, "Tensorizing neural networks").

    W[(i1..id), (j1..jd)] = G1[i1, j1] ... Gd[id, jd], Gk[i, j] a matrix [r(k-1), r(k)]. Core k is the Linear
    `cores[k]`, weight [out_modes[k] * r(k), r(k-1) * in_modes[k]]: it reads the bond and an input mode, and
    writes an output mode and the next bond.

    Args:
        out_modes, in_modes: factors of out and in, as many of each. Rising outputs beside falling inputs,
            such as (4, 4, 8, 8) and (8, 8, 4, 4), cost least.
        ranks: of the bonds, one fewer than modes; or one number for all. What a bond cannot have is clipped.

    Raises:
        LowbitError: unequal numbers of modes or ranks.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        out_modes: Sequence[int],
        in_modes: Sequence[int],
        ranks: int | Sequence[int],
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.out_modes, self.in_modes = tuple(out_modes), tuple(in_modes)
        self.out_features, self.in_features = math.prod(self.out_modes), math.prod(self.in_modes)
        check_modes(self.out_features, self.out_modes, "outputs")
        check_modes(self.in_features, self.in_modes, "inputs")
        inner = clipped_ranks(self.out_modes, self.in_modes, ranks)
        wide = (1, *inner, 1)
        sizes = zip(wide, self.out_modes, self.in_modes, wide[1:], strict=False)
        self.cores = nn.ModuleList(nn.Linear(r * n, m * s, bias=False) for r, m, n, s in sizes)
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.out_features)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal cores with which an entry of W has variance 2 / in (He et al. 2015); a bias of 0."""
        std = std_of_factors(2 / self.in_features, self.ranks[1:-1], len(self.cores))
        for core in self.factors:
            nn.init.normal_(core.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_train(cls, train: Train, bias: Tensor | None = None) -> TTLinear:
        """The layer with these cores [r, m, n, s]; the bias goes by value."""
        modes = [(core.shape[1], core.shape[2]) for core in train.cores]
        out_modes, in_modes = zip(*modes, strict=True)
        layer = cls(out_modes, in_modes, train.ranks[1:-1], bias is not None)
        layer.load(train)
        if layer.bias is not None and bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer.to(train.cores[0].device)

    @classmethod
    def train_of(cls, weights: Sequence[Tensor], blueprint: Blueprint) -> Train:
        """Cores [r, m, n, s]."""
        parts = zip(weights, blueprint.out_modes, blueprint.in_modes, strict=True)
        split = [w.reshape(m, w.shape[0] // m, w.shape[1] // n, n) for w, m, n in parts]
        return Train(tuple(w.permute(2, 0, 3, 1) for w in split))

    @classmethod
    def weights_of(cls, train: Train) -> list[Tensor]:
        return matrices(train.cores, forward=True)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r(0) to r(d), the outermost 1."""
        written = (core.out_features // m for core, m in zip(self.factors, self.out_modes, strict=True))
        return (1, *written)

    @property
    def shape(self) -> Shape:
        return Shape(self.out_modes, self.in_modes, self.ranks)

    @property
    def factors(self) -> Sequence[nn.Linear]:
        # not self.cores, which takes longer than a small product
        return list(self.__dict__["_modules"]["cores"].__dict__["_modules"].values())

    @property
    def blueprint(self) -> Blueprint:
        return Blueprint("TTLinear", self.ranks[1:-1], self.out_modes, self.in_modes)

    @classmethod
    def like(cls, layer: nn.Module, blueprint: Blueprint) -> TTLinear:
        has_bias = layer.bias is not None
        return cls(blueprint.out_modes, blueprint.in_modes, blueprint.ranks, has_bias)

    @property
    def cores_of_train(self) -> tuple[Tensor, ...]:
        """The cores as [r, m, n, s]."""
        return self.train_of([core.weight for core in self.factors], self.blueprint).cores

    def macs(self, positions: int, size: tuple[int, ...] = ()) -> int:
        return positions * Order(self.shape, (1,) * len(self.cores), True, 1).macs

    def dense_weight(self) -> Tensor:
        """W [out, in]."""
        return merged(self.cores_of_train, (len(self.cores),))[0].flatten(2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out].

        Raises:
            LowbitError: another number of inputs.
        """
        watched = self._plain_weights() if isinstance(x, Tensor) else []
        if not watched:
            return self.sweep(x)
        held = self.__dict__
        kept: Kept = held["_kept"]
        if held["training"] or torch.is_grad_enabled():
            kept.clear()
            return self._made(x.shape, 0, 0)(x)
        if (bias := held["_parameters"]["bias"]) is not None:
            watched.append(bias)
        kept.follow(watched)
        lanes = tensor_train.lanes_for(x)
        run = kept.runs.get((x.shape, lanes))
        return self._made(x.shape, kept.limit // 4, lanes)(x) if run is None else run(x)

    def _made(self, shape: torch.Size, room: int, lanes: int) -> Run:
        """What to do with inputs of a shape: the cheapest order, kept with its products where there is room.

        Args:
            room: floats that may be kept; 0 where something is trained through them.
            lanes: of the compiled library, if it takes such an input.
        """
        if shape[-1] != self.in_features:
            raise LowbitError(f"an input of shape {list(shape)} has not {self.in_features} features")
        rows = shape.numel() // self.in_features
        if not rows:
            return lambda x: F.linear(x, self.dense_weight(), self.bias)
        native = lanes > 0 and all(map(tensor_train.readable, self.parameters()))
        order = best_order(self.shape, rows, room, lanes if native else 0)
        products, key = self._kept, (order.groups, order.forward, order.lanes)
        found = products.product(key, lambda: self._matrices(order)) if room else self._matrices(order)
        run = order.bound(found, self.bias, (*shape[:-1], self.out_features))
        if key in products.products and room:
            products.runs[shape, lanes] = run
        return run

    def _matrices(self, order: Order) -> list[Tensor]:
        if order.forward and max(order.groups) == 1:
            return order.prepared([core.weight for core in self.factors])
        return order.prepared(matrices(merged(self.cores_of_train, order.groups), order.forward))

    def sweep(self, x: Any) -> Any:
        """Core after core, each the call of a Linear; what a graph sees, whatever the size of the batch.

        Before core k the last axis runs over (j(k), ..., jd, i1, ..., i(k-1), r(k-1)).
        """
        for k, core in enumerate(self.cores):
            others = math.prod(self.in_modes[k + 1 :]) * math.prod(self.out_modes[:k])
            x = x.unflatten(-1, (self.in_modes[k], -1)).transpose(-1, -2)
            x = core(x.flatten(-2).unflatten(-1, (others, -1))).flatten(-2)
        return x if self.bias is None else x + self.bias

    def extra_repr(self) -> str:
        modes = f"{self.in_features} -> {self.out_features}, modes {self.in_modes} -> {self.out_modes}"
        return f"{modes}, ranks {self.ranks[1:-1]}, bias={self.bias is not None}"


def clipped_ranks(
    out_modes: Sequence[int], in_modes: Sequence[int], ranks: int | Sequence[int]
) -> tuple[int, ...]:
    """Ranks of the bonds, each at most what the modes on its smaller side can fill."""
    if len(out_modes) != len(in_modes):
        raise LowbitError(
            f"{len(out_modes)} modes of outputs and {len(in_modes)} of inputs; a core has one of each"
        )
    bonds = len(out_modes) - 1
    given = (ranks,) * bonds if isinstance(ranks, int) else tuple(ranks)
    if len(given) != bonds or not all(isinstance(r, int) and r >= 1 for r in given):
        raise LowbitError(f"ranks={ranks!r} are not {bonds} whole numbers from 1 up, one for each bond")
    sizes = [m * n for m, n in zip(out_modes, in_modes, strict=True)]
    most = [min(math.prod(sizes[: k + 1]), math.prod(sizes[k + 1 :])) for k in range(bonds)]
    return tuple(map(min, given, most))

"""What factors and few bits save together, beside the dense weight of as many bytes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.core.spec import INT8
from lowbit.core.weight_observers import rounded
from lowbit.cost import stored_bytes
from lowbit.errors import LowbitError
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer
from lowbit.nn.network import TensorNetwork
from lowbit.search.sites import narrowed
from lowbit.tables import text_table

__all__ = ["Account", "AccountRow", "account"]


@dataclass(frozen=True)
class AccountRow:
    """One network. Errors are |w - what is stored| / |w| of the dense weight w."""

    name: str
    dense_weights: int
    weights: int
    # of the factors: codes, scales, zero points
    bytes: int
    error: float
    # the widest dense weight that takes no more bytes, and its error; 0 bits: not even one
    dense_bits: int
    dense_error: float

    @property
    def by_factors(self) -> float:
        """Compression by having fewer weights."""
        return self.dense_weights / self.weights

    @property
    def by_bits(self) -> float:
        """Compression by having fewer bits a weight."""
        return 4 * self.weights / self.bytes

    @property
    def compression(self) -> float:
        """Both together, against the dense float weight."""
        return 4 * self.dense_weights / self.bytes

    @property
    def advice(self) -> str:
        if self.dense_bits and self.dense_error < self.error:
            return f"a dense weight of {self.dense_bits} bits is the better buy"
        return ""


@dataclass(frozen=True)
class Account:
    """All networks of a model."""

    rows: tuple[AccountRow, ...]

    def __str__(self) -> str:
        header = ("network", "factors", "bits", "together", "bytes", "error", "dense bits", "error", "")
        rows = [
            (
                r.name,
                f"{r.by_factors:.2f}x",
                f"{r.by_bits:.2f}x",
                f"{r.compression:.2f}x",
                f"{r.bytes:,}",
                f"{r.error:.3f}",
                str(r.dense_bits),
                f"{r.dense_error:.3f}",
                r.advice,
            )
            for r in self.rows
        ]
        return text_table(header, rows)


def account(model: nn.Module, small: nn.Module, q: QuantizedModel) -> Account:
    """Each tensor network of a quantized model beside the dense weight that it stands for.

    Factors are rounded with the specs that `q` has for them, without its equalization and corrections; the
    dense weight is rounded per channel, to as many bits as fit into the same bytes.

    Args:
        model: the dense network.
        small: the float network that was made from it by `tensorize`.
        q: what was made from that.

    Raises:
        LowbitError: the models do not belong together.
    """
    dense, networks = dict(model.named_modules()), dict(small.named_modules())
    rows = []
    for path, blueprint in q.graph.meta["networks"].items():
        weight, network = getattr(dense.get(path), "weight", None), networks.get(path)
        if not isinstance(weight, Tensor) or not isinstance(network, TensorNetwork):
            raise LowbitError(
                f"'{path}' is no layer with a weight in the dense network, or no tensor network in the "
                "other; pass the network that was tensorized, and what tensorize made of it"
            )
        network, stored = copy.deepcopy(network), 0
        for factor, name in zip(network.factors, blueprint.paths(path), strict=True):
            layer = q.graph.get_submodule(name)
            spec = layer.weight_quantizer.spec if isinstance(layer, QLayer) else None
            stored += stored_bytes(tuple(factor.weight.shape), spec)
            if spec is not None:
                factor.weight = nn.Parameter(rounded(factor.weight.detach(), spec))
        with torch.no_grad():
            error = _error(weight, network.dense_weight())
        bits, dense_error = _dense(weight.detach(), stored)
        rows.append(AccountRow(path, weight.numel(), network.weights, stored, error, bits, dense_error))
    return Account(tuple(rows))


def _dense(weight: Tensor, most: int) -> tuple[int, float]:
    """The widest codes within so many bytes, and their error."""
    for bits in range(8, 0, -1):
        spec = narrowed(INT8, bits, "weight")
        if stored_bytes(tuple(weight.shape), spec) <= most:
            return bits, _error(weight, rounded(weight, spec))
    return 0, 1.0


def _error(weight: Tensor, found: Tensor) -> float:
    return float((weight - found).detach().double().norm() / weight.detach().double().norm().clamp(min=1e-30))

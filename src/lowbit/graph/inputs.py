"""One call of a model, and what must be said of one place of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError

__all__ = ["Inputs", "Note"]


@dataclass(frozen=True)
class Inputs:
    """One call of a model: positional and keyword arguments."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """A batch of data as model inputs: a tensor, a tuple (its first element; labels follow), or a dict.

        Several positional inputs are a tuple inside the tuple: `((a, b), label)`, or `((a, b),)`.
        """
        if isinstance(batch, Inputs):
            return batch
        if isinstance(batch, (tuple, list)) and batch:
            first = batch[0]
            return cls(args=tuple(first)) if isinstance(first, (tuple, list)) else cls.of(first)
        if isinstance(batch, Tensor):
            return cls(args=(batch,))
        if isinstance(batch, Mapping):
            return cls(kwargs=dict(batch))
        raise LowbitError(
            f"a batch is a {type(batch).__name__}; pass a tensor, a tuple whose first element is the input, "
            "or a dict of keyword arguments"
        )

    def call(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)

    @property
    def batch_size(self) -> int:
        """Length of the first axis of the first tensor; 1 where there is none."""
        tensors = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor) and v.ndim]
        return tensors[0].shape[0] if tensors else 1

    def with_samples(self, n: int) -> Inputs:
        """A copy with `n` samples, repeated where there are fewer; tensors of another length stay."""
        size = self.batch_size

        def pick(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            batched = value.ndim > 0 and value.shape[0] == size > 0
            return value[torch.arange(n, device=value.device) % size] if batched else value.clone()

        return Inputs(tuple(pick(a) for a in self.args), {k: pick(v) for k, v in self.kwargs.items()})

    def made_up(self) -> Inputs:
        """The same shapes and dtypes without the data: numbers in [0, 1), always the same; integers are 0.

        Not 0 throughout, for tracing asks whether a graph computes what the model does, and zeros hide that.
        """
        generator = torch.Generator().manual_seed(0)

        def draw(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(draw(v) for v in value)
            if isinstance(value, dict):
                return {k: draw(v) for k, v in value.items()}
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return torch.zeros_like(value)
            return torch.rand(value.shape, generator=generator).to(value.dtype)

        return Inputs(tuple(draw(a) for a in self.args), {k: draw(v) for k, v in self.kwargs.items()})


@dataclass(frozen=True)
class Note:
    """Something the reader of the coverage table must know about one place of the model."""

    name: str
    text: str

"""One call of a model, and what must be said of one place of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.errors import LowbitError
from lowbit.graph.masks import holds_huge

__all__ = ["Inputs", "Note", "mapped", "placed"]


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
        """What the module returns for this call.

        Raises:
            LowbitError: it does not run, with the shapes of the call and those that tracing saw.
        """
        own = self.beside(module)
        with self.explaining(module):
            return module(*own.args, **own.kwargs)

    def beside(self, module: nn.Module) -> Inputs:
        """The same call where the module's parameters lie; data that comes from the CPU may feed a GPU.

        Images come to a traced graph with channels last in memory, in which convolutions are faster.
        """
        device = next((t.device for t in chain(module.parameters(), module.buffers())), None)
        # what is called as it stands may rely on the usual layout
        traced = isinstance(module, fx.GraphModule) and not module.meta.get("leaves", True)

        return self if device is None else self.to(device, channels_last=traced)

    def to(self, device: torch.device, *, channels_last: bool) -> Inputs:
        """The same call with its tensors on a device; images with channels last in memory when asked."""
        move = partial(placed, device=device, channels_last=channels_last)
        return Inputs(mapped(move, self.args), mapped(move, dict(self.kwargs)))

    @contextmanager
    def explaining(self, module: nn.Module) -> Iterator[None]:
        """While open, an error of any kind becomes one LowbitError that says what the module was given."""
        try:
            yield
        except LowbitError:
            raise
        except Exception as error:
            seen = _seen_by_tracing(module)
            given = _shapes((*self.args, *self.kwargs.values()))
            why = (str(error).strip().splitlines() or ["no reason given"])[0]
            cure = f"; tracing saw {seen}: pass batches like it, of any size" if seen else ""
            raise LowbitError(
                f"the model does not run on a batch of {given}: {type(error).__name__}: {why}{cure}"
            ) from error

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

    def split(self, n: int) -> Iterator[Inputs]:
        """Calls of at most `n` samples each, in order; tensors of another length go into every one."""
        size = self.batch_size

        def part(value: Any, start: int) -> Any:
            batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
            return value[start : start + n] if batched else value

        for start in range(0, size, n):
            args = tuple(part(a, start) for a in self.args)
            yield Inputs(args, {k: part(v, start) for k, v in self.kwargs.items()})

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
                return torch.zeros(value.shape, dtype=value.dtype)
            made = torch.rand(value.shape, generator=generator).to(value.dtype)
            if holds_huge(value):  # a mask among the inputs stays one, or placement would differ
                made.view(-1)[0] = float("-inf")
            return made

        return Inputs(tuple(draw(a) for a in self.args), {k: draw(v) for k, v in self.kwargs.items()})


def placed(value: Any, device: torch.device, *, channels_last: bool) -> Any:
    """A tensor on a device, an image with channels last in memory when asked; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if channels_last and value.ndim == 4 and value.is_floating_point():
        return value.to(device, non_blocking=True, memory_format=torch.channels_last)
    return value.to(device, non_blocking=True)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The function of everything in tuples, lists and dicts, in the same tuples, lists and dicts."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(function, v) for v in value)
    if isinstance(value, Mapping):
        return {k: mapped(function, v) for k, v in value.items()}
    return function(value)


def _shapes(values: Iterable[Any]) -> str:
    """Shape and dtype of each tensor; of anything else its type."""
    return ", ".join(
        f"{list(v.shape)} {str(v.dtype).removeprefix('torch.')}"
        if isinstance(v, Tensor)
        else type(v).__name__
        for v in values
    )


def _seen_by_tracing(module: nn.Module) -> str:
    """The inputs of a traced graph as `_shapes` shows them; "" for other modules."""
    inner = getattr(module, "graph", None)
    graph = inner.graph if isinstance(inner, fx.GraphModule) else inner
    nodes = graph.find_nodes(op="placeholder") if isinstance(graph, fx.Graph) else []
    return _shapes(n.meta["value"] for n in nodes if "value" in n.meta)


@dataclass(frozen=True)
class Note:
    """Something the reader of the coverage table must know about one place of the model."""

    name: str
    text: str

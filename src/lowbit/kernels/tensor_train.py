"""A tensor train times its input in one call of the compiled library, for small batches.

PyTorch spends more time between the products of a train than in them, where samples are few. Inference only:
there is no derivative, and no operator for a graph to hold; `lanes_for` says where the library may be used.
What PyTorch does in its place stands in `nn.contraction`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lowbit.errors import LowbitError
from lowbit.kernels.native import TENSOR_TRAIN, Library, load

__all__ = ["Step", "available", "description", "lanes_for", "packed", "product", "readable"]

_loaded = load(TENSOR_TRAIN)

# columns side by side in a packed matrix
PANEL = 16
# floats in a vector, by the number of the path
LANES = (4, 8, 16)
_PLAIN = (Tensor, nn.Parameter)


class Step(NamedTuple):
    """Of one sample: [batch, depth, rest] -> [batch, outputs, rest], by a matrix [outputs, depth]."""

    batch: int
    outputs: int
    depth: int
    rest: int


class _Step(ctypes.Structure):
    """The struct Step of tensor_train.cpp."""

    _fields_ = (("matrix", c_void_p), *((name, c_int64) for name in Step._fields))


class _Train(ctypes.Structure):
    """The struct Train of tensor_train.cpp."""

    _fields_ = (
        *(("steps", c_void_p), ("bias", c_void_p)),
        *((name, c_int64) for name in ("count", "samples", "inputs", "outputs", "between")),
    )


def available() -> bool:
    """Is the compiled library in use?"""
    return isinstance(_loaded, Library)


def description() -> str:
    """What does the work: "native, AVX512", or "pure torch: " and the reason."""
    return _loaded.description if isinstance(_loaded, Library) else f"pure torch: {_loaded}"


def readable(t: Tensor) -> bool:
    """Is this a tensor of float32 in the CPU's memory, row after row?"""
    return type(t) in _PLAIN and t.dtype is torch.float32 and t.is_cpu and t.is_contiguous()


def lanes_for(x: Tensor) -> int:
    """Floats in a vector of the loops that can take this input here and now; 0 where only PyTorch can.

    What watches or changes the operations of PyTorch must see them: tracing, autocast, forward derivatives,
    modes such as counters of operations, transformations such as vmap. No backward derivative is looked for.
    """
    if not isinstance(_loaded, Library) or not readable(x) or x.is_neg():
        return 0
    if torch.is_autocast_enabled("cpu") or torch._C._len_torch_dispatch_stack():
        return 0
    if forward_ad._current_level >= 0:
        return 0
    try:
        # tensors that wrap others have no address, or say that it is 0
        return LANES[_loaded.path] if x.data_ptr() else 0
    except RuntimeError:
        return 0


def packed(matrix: Tensor) -> Tensor:
    """A matrix [outputs, depth] as it is read where rest = 1: [panels, depth, PANEL], zeros last."""
    outputs, depth = matrix.shape
    panels = -(-outputs // PANEL)
    whole = F.pad(matrix, (0, 0, 0, panels * PANEL - outputs))
    return whole.reshape(panels, PANEL, depth).transpose(1, 2).contiguous()


def product(
    steps: Sequence[Step],
    matrices: Sequence[Tensor],
    bias: Tensor | None,
    samples: int,
    shape: Sequence[int],
) -> Callable[[Tensor], Tensor]:
    """The steps with their matrices, as a function of inputs that `lanes_for` takes.

    Args:
        matrices: [outputs, depth], or `packed` where rest = 1; they are read at every call, not copied.
        bias: of the last step, [outputs of a sample].
        samples: of every input.
        shape: of every result.

    Raises:
        LowbitError: no library, or a tensor that it cannot read.
    """
    if not isinstance(_loaded, Library):
        raise LowbitError(f"the library of tensor trains is not there: {_loaded}")
    for step, matrix in zip(steps, matrices, strict=True):
        columns = -(-step.outputs // PANEL) * PANEL if step.rest == 1 else step.outputs
        if not readable(matrix) or matrix.numel() != columns * step.depth:
            raise LowbitError(
                f"a matrix of shape {tuple(matrix.shape)} and {matrix.dtype} meets a step of {step.outputs} "
                f"x {step.depth}; give it contiguous in float32 on the CPU, packed where rest = 1"
            )
    first, last = steps[0], steps[-1]
    outputs = last.batch * last.outputs * last.rest
    if bias is not None and not (readable(bias) and bias.numel() == outputs):
        raise LowbitError(
            f"a bias of shape {tuple(bias.shape)} and {bias.dtype} meets {outputs} outputs; give each one, "
            "contiguous in float32 on the CPU"
        )
    table = (_Step * len(steps))(*(_Step(m.data_ptr(), *s) for s, m in zip(steps, matrices, strict=True)))
    train = _Train(
        *(ctypes.addressof(table), None if bias is None else bias.data_ptr()),
        *(len(steps), samples, first.batch * first.depth * first.rest, outputs),
        max((s.batch * s.outputs * s.rest for s in steps[:-1]), default=0),
    )
    held = (table, train, *matrices, bias)
    # tensors like this one are made faster than from a shape; it has one float
    like = torch.empty(1, dtype=torch.float32, device="cpu").expand(*shape)
    call, at, path, threads = _loaded.product, ctypes.addressof(train), _loaded.path, torch.get_num_threads

    def run(x: Tensor, _held: object = held) -> Tensor:
        y = torch.empty_like(like)
        call(at, x.data_ptr(), y.data_ptr(), threads(), path)
        return y

    return run

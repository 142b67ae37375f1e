"""Several processes that work on one model, as `torchrun` starts them; alone, everything here does nothing.

Nothing that travels between processes is pickled: tensors go as the bytes of a safetensors file.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from lowbit.core.histogram import FloatHistogram
from lowbit.core.observers import Observer
from lowbit.errors import LowbitError

__all__ = [
    "add_over_ranks",
    "check_device",
    "join",
    "merge_observers",
    "rank",
    "same_everywhere",
    "share",
    "together",
    "world",
]


def join() -> None:
    """Enter the group that `torchrun` describes in the environment, unless there is one or none is needed.

    gloo serves the CPU, nccl the GPU where there is one. The group is left when the process ends.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not dist.is_available() or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Number of processes in the group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the group, from 0."""
    return dist.get_rank() if world() > 1 else 0


def check_device(device: torch.device) -> None:
    """Raise LowbitError where this rank's model is on a GPU that is not its own: nccl would only hang."""
    if world() == 1 or device.type != "cuda":
        return
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if device.index != own:
        raise LowbitError(
            f"the model of rank {rank()} is on {device}, and each rank needs a GPU of its own; move it with "
            f"q.to('cuda:{own}'), which is LOCAL_RANK"
        )


def share(total: int) -> range:
    """The items of `total` that are this rank's: contiguous, in rank order, as many on each as possible."""
    return range(total * rank() // world(), total * (rank() + 1) // world())


def add_over_ranks(values: Sequence[float]) -> list[float]:
    """The sum of each value over all ranks, the same on each; NaN on one rank is NaN on all."""
    if world() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(sums)
    found: list[float] = sums.tolist()
    return found


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor, in place, with that of rank 0; all ranks pass as many, in one order."""
    if world() == 1:
        return
    for tensor in tensors:
        if tensor.numel():
            sent = tensor.detach().to(_device()).contiguous()
            dist.broadcast(sent, 0)
            with torch.no_grad():
                tensor.copy_(sent)


def together(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each rank passes, on every rank, in rank order; on the CPU."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    if world() == 1:
        return [plain]
    mine = torch.frombuffer(bytearray(serialize_tensors(plain)), dtype=torch.uint8).to(_device())
    sizes = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(mine)], device=mine.device))
    longest = max(int(size) for size in sizes)
    parts = [torch.empty(longest, dtype=torch.uint8, device=mine.device) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
    return [
        parse_tensors(part[: int(size)].cpu().numpy().tobytes())
        for part, size in zip(parts, sizes, strict=True)
    ]


def merge_observers(observers: Mapping[str, Observer]) -> None:
    """Make each observer what it would be had it seen, in rank order, what those of all ranks saw.

    Raises:
        LowbitError: an observer of another package keeps statistics that are neither tensors nor numbers.
    """
    if world() == 1:
        return
    states: dict[str, Tensor] = {}
    for name, observer in observers.items():
        states |= {f"{name}|{field}": value for field, value in _state(observer).items()}
    everyone = together(states)
    for name, observer in observers.items():
        merged = None
        for state in everyone:
            seen = {f.rpartition("|")[2]: t for f, t in state.items() if f.rpartition("|")[0] == name}
            part = _observer(observer, seen)
            if merged is None:
                merged = part
            else:
                merged.merge(part)
        assert merged is not None
        vars(observer).update(vars(merged))


def _state(observer: Observer) -> dict[str, Tensor]:
    """The statistics as tensors, by attribute."""
    state: dict[str, Tensor] = {}
    for name, value in vars(observer).items():
        if isinstance(value, Tensor):
            state[name] = value
        elif isinstance(value, FloatHistogram):
            state[f"{name}.counts"], state[f"{name}.base"] = value.counts, torch.tensor(value.base)
        elif isinstance(value, (int, float, tuple)):
            state[name] = torch.tensor(
                value, dtype=torch.float64 if isinstance(value, float) else torch.int64
            )
        elif name != "spec":
            raise LowbitError(
                f"an observer {type(observer).__name__} keeps a {type(value).__name__} in '{name}', which "
                "ranks cannot exchange; keep tensors and numbers, or calibrate in one process"
            )
    return state


def _observer(like: Observer, state: Mapping[str, Tensor]) -> Observer:
    """Inverse of `_state`."""
    observer = type(like)(like.spec)
    device = like.lo.device
    for name, value in state.items():
        attribute, _, part = name.partition(".")
        old = getattr(observer, attribute, None)
        if part == "counts":
            histogram = FloatHistogram(len(value), device)
            histogram.counts, histogram.base = value.to(device), int(state[f"{attribute}.base"])
            setattr(observer, attribute, histogram)
        elif not part:
            plain = value.to(device) if isinstance(old, Tensor) or old is None else value.tolist()
            setattr(observer, attribute, tuple(plain) if isinstance(old, tuple) else plain)
    return observer


def _device() -> torch.device:
    """Where tensors must lie to travel."""
    if "cpu:" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())

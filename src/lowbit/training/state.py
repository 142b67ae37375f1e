"""A checkpoint of training: weights, optimizer, random numbers and position in one sealed file.

Tensors are named `model.<name>`, `optimizer.<parameter>.<key>` and `random.<rank>.<stream>`; everything that
is no tensor is JSON in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.model import QuantizedModel
from lowbit.sealed import read_sealed, write_sealed

__all__ = [
    "copy_of_weights",
    "first_difference",
    "flatten_optimizer",
    "load_optimizer",
    "load_weights",
    "named",
    "plain",
    "read_checkpoint",
    "section",
    "write_checkpoint",
]

VERSION = 1
KIND = "training"


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Replace the file when the new one is complete."""
    # no two of them may share memory: tied weights have several names
    apart = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    write_sealed(path, apart, {"kind": KIND, **metadata}, VERSION)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors.

    Raises:
        LowbitError: there is no such file, it is damaged, or it is none of the Trainer's.
    """
    if not path.exists():
        raise LowbitError(
            f"there is no checkpoint '{path}'; check the folder, or start anew with resume=False"
        )
    metadata, tensors = read_sealed(path, VERSION)
    if metadata.get("kind") != KIND:
        raise LowbitError(f"'{path}' is no checkpoint of training; read it with lowbit.load")
    return metadata, tensors


def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `section`: "prefix.name" for every name."""
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


def copy_of_weights(q: QuantizedModel) -> dict[str, Tensor]:
    """What `load_weights` takes, with memory of its own."""
    return {name: t.detach().clone() for name, t in q.state_dict().items()}


def load_weights(q: QuantizedModel, state: Mapping[str, Tensor], where: str) -> None:
    """Weights, statistics and scales, in place.

    Raises:
        LowbitError: they belong to another model; `where` says where they come from.
    """
    try:
        q.load_state_dict(dict(state))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        why = " ".join(lines[1:3]) or lines[0]
        raise LowbitError(
            f"'{where}' belongs to another model: {why} Pass the model it was made of"
        ) from None


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by "<parameter>.<key>", everything else as plain data) of an optimizer's state dict.

    Raises:
        LowbitError: its state holds other things than tensors and plain values.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                rest.setdefault(str(index), {})[key] = value
    try:
        return tensors, plain({"rest": rest, "groups": state["param_groups"]})
    except TypeError as error:
        raise LowbitError(
            f"the state of {type(optimizer).__name__} cannot be saved: {error}; "
            "use an optimizer whose state is tensors and numbers, or out=None"
        ) from None


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Inverse of `flatten_optimizer`, into an optimizer of the same class over the same parameters.

    Raises:
        LowbitError: the optimizer has other groups of parameters.
    """
    now = optimizer.state_dict()["param_groups"]
    if [len(g["params"]) for g in now] != [len(g["params"]) for g in rest["groups"]]:
        raise LowbitError(
            "the optimizer of the checkpoint has other groups of parameters; resume with the same optimizer, "
            "or start anew with resume=False"
        )
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in rest["rest"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    groups = [  # JSON has no tuples
        {k: tuple(v) if isinstance(old.get(k), tuple) else v for k, v in group.items()}
        for group, old in zip(rest["groups"], now, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: tuples are lists, keys are text."""
    return json.loads(json.dumps(value))


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(where, old value, new value) of the first place where two plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            found = first_difference(*pair, f"{path}[{i}]")
            if found:
                return found
        return None
    return None if old == new else (path, old, new)

"""What the command line is given, by name: models, weights and data. Nothing here ever unpickles a file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import itertools
import math
import pkgutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lowbit.errors import LowbitError, near_miss
from lowbit.recipe import Recipe

__all__ = [
    "ArrayData",
    "ShuffledData",
    "calibration",
    "dims",
    "existing",
    "load_data",
    "load_model",
    "writable",
]

ARRAYS = (".npz", ".npy", ".safetensors")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")


class ArrayData:
    """Arrays cut into batches; iterate as often as you like.

    Yields x [B, ...], or (x, y) where there are labels. float64 becomes float32; the last batch may be short.
    """

    def __init__(self, x: Any, y: Any | None, batch_size: int) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.x), self.batch_size):
            yield self._batch(slice(start, start + self.batch_size))

    def _batch(self, part: Any) -> Any:
        x = _tensor(self.x[part])
        return x if self.y is None else (x, _tensor(self.y[part]))


class ShuffledData(ArrayData):
    """The same in another order each time, drawn from PyTorch's global generator as a DataLoader draws it.

    A short batch at the end is left out unless it is the only one: BatchNorm would see few samples there, and
    in the next epoch others fall off.
    """

    def __len__(self) -> int:
        return max(1, len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.x)).numpy()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self._batch(order[start : start + self.batch_size])


def load_model(name: str, weights: str | Path | None = None) -> nn.Module:
    """The model called `module:callable` or `file.py:callable`, in evaluation mode.

    The callable takes no arguments and returns the model; it may also be the model itself.

    Args:
        weights: safetensors file with its state dict, loaded strictly.

    Raises:
        LowbitError: there is no such module, file or name, it is no model, or the weights do not fit.
    """
    found = _call(name, "MODEL")
    if not isinstance(found, nn.Module):
        raise LowbitError(f"MODEL '{name}' is a {type(found).__name__}, not a torch.nn.Module")
    if weights is not None:
        _load_weights(found, existing(weights, "--weights"))
    return found.eval()


def load_data(
    name: str,
    batch_size: int | None = None,
    num_batches: int | None = None,
    *,
    option: str = "--data",
    shuffled: bool = False,
) -> Iterable[Any]:
    """Batches from an array file (`x`, and labels `y` where they are), or from `module:callable`.

    Args:
        batch_size: samples in one batch of an array file, 64 by default.
        num_batches: how many of the batches that a callable makes are kept, when they come from an iterator.
        option: what the user gave the name to; errors say it.
        shuffled: an array file comes in another order each time; a callable decides for itself.

    Raises:
        LowbitError: the file is missing, unreadable, a pickle, or has no x; the callable gives no batches.
    """
    path = Path(name)
    if batch_size is not None and batch_size < 1:
        raise LowbitError(f"--batch-size {batch_size} is not positive; use 1 or more")
    if path.suffix in PICKLES:
        raise LowbitError(
            f"{option} '{name}' is a pickle, which can run any code when it is read; "
            "save the array x (and y) with numpy.savez"
        )
    if path.suffix in ARRAYS:
        kind = ShuffledData if shuffled else ArrayData
        return kind(*_read_arrays(existing(path, option), option), 64 if batch_size is None else batch_size)
    if ":" not in name:
        raise LowbitError(f"{option} '{name}' is neither one of {', '.join(ARRAYS)} nor module:callable")
    if batch_size is not None:
        raise LowbitError(f"{option} '{name}' makes its own batches; --batch-size is for array files")
    data = _call(name, option)
    if isinstance(data, Iterator):
        return list(itertools.islice(data, num_batches))
    if not isinstance(data, Iterable):
        raise LowbitError(f"{option} '{name}' is a {type(data).__name__}; it must be an iterable of batches")
    return data


def calibration(
    recipe: Recipe,
    data: str | None,
    shape: str | None,
    batch_size: int | None,
    num_batches: int | None,
) -> Any:
    """Calibration data; without it one batch of zeros, which shows shapes to a recipe for weights alone."""
    if data is not None:
        return load_data(data, batch_size, num_batches)
    if recipe.calibrates:
        raise LowbitError(
            "the recipe quantizes activations, whose ranges come from data; give --data or use w8"
        )
    if shape is None:
        raise LowbitError("without --data the input is unknown; give --input-shape, such as 1,3,224,224")
    return [torch.zeros(dims(shape))]


def dims(shape: str) -> list[int]:
    """The numbers of a shape such as 1,3,224,224."""
    parts = shape.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise LowbitError(f"shape '{shape}' is not a list of positive numbers such as 1,3,224,224")
    return [int(part) for part in parts]


def existing(path: str | Path, what: str, *, folder: bool = False) -> Path:
    """The path of a file that is there, or of a folder where one will do.

    Raises:
        LowbitError: it is not there; the message has the nearest name in its folder.
    """
    path = Path(path)
    if path.is_file() or (folder and path.is_dir()):
        return path
    if path.is_dir():
        raise LowbitError(f"{what} '{path}' is a folder; name a file")
    beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
    raise LowbitError(f"{what} '{path}' does not exist{_close(path.name, beside)}")


def writable(path: Path, what: str) -> Path:
    """The path of a file to write, checked before any work is done.

    Raises:
        LowbitError: its folder does not exist, or it is a folder itself.
    """
    if path.is_dir():
        raise LowbitError(f"{what} '{path}' is a folder; name a file in it")
    if not path.parent.is_dir():
        raise LowbitError(f"{what} '{path}': the folder '{path.parent}' does not exist; create it first")
    return path


def _call(name: str, what: str) -> Any:
    """What `module:attribute` names, called when it is a function or class."""
    place, colon, attribute = name.rpartition(":")
    if not (place and colon and attribute):
        raise LowbitError(f"{what} '{name}' is not of the form module:callable or file.py:callable")
    found: Any = _import(place, what)
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [n for n in vars(found) if not n.startswith("_")]
            raise LowbitError(f"{what}: '{place}' has no '{part}'{near_miss(part, public)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    missing = _required(found)
    if missing:
        needs = f"needs arguments ({', '.join(missing)})"
        raise LowbitError(f"{what} '{name}' {needs}; name a function that needs none")
    try:
        return found()
    except Exception as error:
        raise LowbitError(f"{what} '{name}' failed with {_text(error)}") from error


def _import(place: str, what: str) -> ModuleType:
    """The module of that name, or the script at that path; its neighbours can be imported too."""
    script = existing(place, what).resolve() if place.endswith(".py") else None
    folder = str(script.parent if script else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if script is None:
        _check_module(place, what)
    try:
        return importlib.import_module(place) if script is None else _run_script(script)
    except Exception as error:
        raise LowbitError(f"{what}: importing '{place}' failed with {_text(error)}") from error


def _run_script(script: Path) -> ModuleType:
    """Run a file once, as a module whose name is neither an installed one's nor a namesake's elsewhere."""
    name = f"{script.stem}_{zlib.crc32(bytes(script)):08x}"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    if name not in sys.modules:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _check_module(place: str, what: str) -> None:
    try:
        if importlib.util.find_spec(place) is not None:
            return
    except (ImportError, ValueError):
        pass
    names = [info.name for info in pkgutil.iter_modules()]
    raise LowbitError(f"{what}: there is no module '{place}'{_close(place, names)}")


def _required(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return [p.name for p in named if p.default is p.empty]


def _load_weights(model: nn.Module, path: Path) -> None:
    if path.suffix in PICKLES:
        raise LowbitError(
            f"--weights '{path}' is a pickle, which can run any code when it is read; "
            "convert it once with safetensors.torch.save_file(torch.load(path, weights_only=True), ...)"
        )
    state = _read_safetensors(path)
    expected = model.state_dict()
    unknown = sorted(set(state) - set(expected))
    missing = sorted(set(expected) - set(state))
    if unknown:
        hint = near_miss(unknown[0], missing or expected)
        raise LowbitError(f"--weights '{path}': the model has no '{unknown[0]}'{hint}")
    if missing:
        count = f"{len(missing)} of {len(expected)} tensors are missing"
        raise LowbitError(f"--weights '{path}' lacks '{missing[0]}' ({count})")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            shapes = f"{list(value.shape)}, the model's is {list(expected[key].shape)}"
            raise LowbitError(f"--weights '{path}': '{key}' has shape {shapes}; is it the same architecture?")
    model.load_state_dict(state)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise LowbitError(f"'{path}' is not a safetensors file: {error}") from None


def _read_arrays(path: Path, option: str) -> tuple[Any, Any | None]:
    """x, and y where there are labels."""
    arrays = _read_safetensors(path) if path.suffix == ".safetensors" else _read_numpy(path, option)
    if "x" not in arrays:
        names = ", ".join(arrays) or "none"
        raise LowbitError(f"{option} '{path}' has no array 'x' (it has {names}); name the inputs x")
    unknown = sorted(set(arrays) - {"x", "y"})
    if unknown:
        raise LowbitError(f"{option} '{path}' has an array '{unknown[0]}' beside x and y; leave it out")
    x, y = arrays["x"], arrays.get("y")
    if x.ndim == 0 or len(x) == 0:
        raise LowbitError(f"{option} '{path}': x has shape {list(x.shape)}, so there is no sample")
    if x.dtype in (np.uint8, torch.uint8):
        raise LowbitError(f"{option} '{path}': x is uint8; store it as the model takes it, in float32")
    for name, array in arrays.items():
        if isinstance(array, np.ndarray) and array.dtype.kind not in "biuf":
            raise LowbitError(
                f"{option} '{path}': {name} holds {array.dtype}, not numbers; store it as float32"
            )
    if y is not None and len(y) != len(x):
        raise LowbitError(f"{option} '{path}': {len(x)} samples in x, {len(y)} labels in y; they must agree")
    return x, y


def _read_numpy(path: Path, option: str) -> dict[str, Any]:
    """Arrays by name; a lone array is x, left on disk until a batch of it is wanted."""
    try:
        if path.suffix == ".npy":
            return {"x": np.load(path, mmap_mode="r", allow_pickle=False)}
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise LowbitError(f"{option} '{path}' is not a readable {path.suffix} file: {_text(error)}") from None


def _tensor(values: Any) -> Tensor:
    # a copy: a memory-mapped array cannot be written, and torch warns of that
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _close(name: str, options: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(options), n=1)
    return near_miss(name, close)


def _text(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

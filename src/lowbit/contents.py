"""What is in a file: bytes and bits of each layer, and the recipe where the file knows it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.nn.quantizer import TRAINED
from lowbit.tables import text_table

__all__ = ["Contents", "LayerBytes", "contents"]


@dataclass(frozen=True)
class LayerBytes:
    """What one layer takes on disk."""

    name: str
    # how its weight is stored, "int4/channel" or the type of its largest tensor
    stored: str
    # bits of one weight
    bits: int
    weights: int
    # weight, bias, scales and zero points
    bytes: int


@dataclass(frozen=True)
class Contents:
    """One file: a checkpoint of lowbit, or an ONNX file of anyone."""

    path: str
    kind: str
    # size of the file
    bytes: int
    layers: tuple[LayerBytes, ...]
    # plain data of the recipe, where the file holds it
    recipe: dict[str, Any] | None = None

    @property
    def average_bits(self) -> float:
        """Bits of the average weight."""
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.bits * layer.weights for layer in self.layers) / max(weights, 1)

    def __str__(self) -> str:
        rows = [
            (r.name, r.stored, str(r.bits or ""), f"{r.weights:,}" if r.weights else "", f"{r.bytes:,}")
            for r in self.layers
        ]
        rest = self.bytes - sum(layer.bytes for layer in self.layers)
        table = text_table(("layer", "stored as", "bits", "weights", "bytes"), rows)
        sums = f"{self.bytes:,} bytes, {rest:,} of them structure; {self.average_bits:.2f} bits a weight"
        return f"{table}\n{self.path}: {self.kind}, {sums}"


def contents(path: str | Path) -> Contents:
    """Read what a checkpoint or an ONNX file holds; no model is needed.

    Raises:
        LowbitError: the file is neither, or is damaged.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _of_checkpoint(path)
    if path.suffix == ".onnx":
        return _of_onnx(path)
    raise LowbitError(f"'{path}' is neither a .safetensors nor an .onnx file")


def _of_checkpoint(path: Path) -> Contents:
    from lowbit.export import checkpoint

    record, tensors = checkpoint.read(path)
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    rows = []
    for layer, shape in record.codes.items():
        spec, _ = record.quantizers[f"{layer}.weight_quantizer"]
        own = _take(sizes, f"{layer}.")
        rows.append(LayerBytes(layer, str(spec), spec.bits, math.prod(shape), sum(own.values())))
    of_scales = tuple(f".{name}" for name in TRAINED)
    floats = {n: size for n, size in sizes.items() if not n.endswith(of_scales)}
    rows += [LayerBytes(n, "float32", 32, tensors[n].numel(), size) for n, size in floats.items()]
    scales = sum(sizes.values()) - sum(floats.values())
    rows.append(LayerBytes("(scales of activations)", "", 0, 0, scales))
    return Contents(str(path), "lowbit checkpoint", path.stat().st_size, tuple(rows), record.recipe.to_dict())


def _of_onnx(path: Path) -> Contents:
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise LowbitError(f"'{path}' is not a readable ONNX file: {type(error).__name__}") from error
    groups: dict[str, list[tuple[int, str]]] = {}
    for tensor in model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        groups.setdefault(_layer_of(tensor.name), []).append((math.prod(tensor.dims), kind))
    rows = [_onnx_row(name, sized) for name, sized in groups.items()]
    layers = [row for row in rows if row.weights > 1 and row.stored != "int64"]
    rest = sum(row.bytes for row in rows) - sum(row.bytes for row in layers)
    layers.append(LayerBytes("(scales of activations, constants)", "", 0, 0, rest))
    return Contents(str(path), "ONNX", path.stat().st_size, tuple(layers))


def _onnx_row(name: str, sized: list[tuple[int, str]]) -> LayerBytes:
    """The largest tensor of a layer is its weight."""
    count, kind = max(sized)
    total = sum(math.ceil(n * _bits(k) / 8) for n, k in sized)
    return LayerBytes(
        name, {"float": "float32", "double": "float64"}.get(kind, kind), _bits(kind), count, total
    )


def _bits(kind: str) -> int:
    """Of one element of an ONNX type: int4, float16, bfloat16, float8e4m3fn, ..."""
    digits = "".join(c for c in kind.partition("e")[0] if c.isdigit())
    return int(digits) if digits else {"float": 32, "double": 64}.get(kind, 8)


def _layer_of(tensor: str) -> str:
    """`layer1.conv` of `layer1.conv.weight`, and of what the exporter makes of it."""
    name = tensor.removeprefix("emitters.").removesuffix(".packed")
    for mark in (".weight", ".bias", ".scale", ".zero_point"):
        name = name.partition(mark)[0]
    return name


def _take(sizes: dict[str, int], prefix: str) -> dict[str, int]:
    """Remove and return the entries under a prefix."""
    return {name: sizes.pop(name) for name in list(sizes) if name.startswith(prefix)}

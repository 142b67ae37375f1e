"""A quantized model in one safetensors file: packed codes, scales, what stayed in float, and the recipe.

The file holds one metadata entry, `lowbit`: JSON with the format's name and version, the recipe, the shapes of the
example, the structure of the graph (deflated), the spec and mode of each quantizer and the shape of each tensor of
codes. `load` replays the recipe on a model of the same architecture and fills in the tensors; the weights of that model
do not matter.

Integrity: `sha256` in the metadata is the digest of the whole file, with the digest itself written as 64 zeros.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor, fx, nn

from lowbit.core.packing import pack, unpack
from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError
from lowbit.files import atomic_path
from lowbit.graph.structure import Part, first_difference, first_module_difference, structure_of
from lowbit.graph.trace import Inputs, Note
from lowbit.model import QuantizedModel, Step
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.ptq import assemble, float_graph
from lowbit.recipe import Recipe

__all__ = ["load", "save"]

FORMAT = "lowbit"
VERSION = 1
_NO_DIGEST = "0" * 64
# the metadata is JSON inside JSON, so its quotes are escaped once
_DIGEST = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"')
_CURE = "save it again with lowbit.save(q, path), or copy the file again"


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The metadata, parsed."""

    recipe: Recipe
    example: Inputs
    structure: list[Part]
    # (spec, mode) of each quantizer by its path
    quantizers: dict[str, tuple[QuantSpec, str]]
    # shape of each tensor of codes by the path of its layer
    codes: dict[str, tuple[int, ...]]
    notes: list[Note]
    steps: list[Step]


def save(q: QuantizedModel, path: str | Path) -> Path:
    """Write a frozen model; a file that is there already is replaced only when the new one is complete.

    Codes of 1 to 8 bits are packed, wider ones are int16 or int32, fp16 is float16. Shared layers are stored once.

    Returns:
        The path.

    Raises:
        LowbitError: the model is not frozen, its example holds other things than tensors and plain values, or the path
            cannot be written.
    """
    _check_finished(q)
    tensors = dict(_tensors_of(q.graph))
    text = json.dumps(_metadata_of(q), separators=(",", ":"), default=_refuse)
    data = bytearray(serialize_tensors(tensors, metadata={FORMAT: text}))
    at = _digest_span(data)
    assert at is not None
    data[slice(*at)] = hashlib.sha256(data).hexdigest().encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def load(path: str | Path, model: nn.Module) -> QuantizedModel:
    """Read what `save` wrote; the result is frozen, and its outputs equal those of the saved model bit for bit.

    Args:
        model: a model of the architecture that was quantized; its weights do not matter and it is left as it was.

    Raises:
        LowbitError: the file is truncated, foreign, altered or of a newer version; or the architecture of `model` is
            another one, with the first layer that differs.
    """
    path = Path(path)
    record, tensors = _read(path)
    gm, _ = _matching_graph(path, model, record)
    q = assemble(gm, record.recipe, record.example, record.notes)
    q.steps = record.steps
    try:
        _fill(q.graph, record, tensors)
    except LowbitError as error:
        raise LowbitError(f"'{path}' does not fit this model: {error}") from None
    return q.eval()


# --- writing


def _check_finished(q: QuantizedModel) -> None:
    if not q.frozen:
        raise LowbitError("only codes are saved, and this model still has float weights; call lowbit.freeze(q) first")
    for path, quantizer in _quantizers(q.graph):
        if quantizer.mode == "observe" or (quantizer.mode == "quantize" and not quantizer.ready):
            raise LowbitError(f"'{path}' has no scale yet; call lowbit.calibrate(q, data) before save")


def _tensors_of(gm: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Everything that `load` needs, each tensor once, under its path in the graph."""
    for path, layer in _layers(gm):
        yield _codes_name(path), _packed(layer)
    for path, quantizer in _quantizers(gm):
        for name in ("scale", "zero_point"):
            value = getattr(quantizer, name)
            if value is not None and value.numel():
                yield f"{path}.{name}", _plain_tensor(value)
    special = _special_names(gm)
    for name, value in (*gm.named_parameters(), *gm.named_buffers()):
        if name not in special:
            yield name, _plain_tensor(value)


def _packed(layer: QLayer) -> Tensor:
    q = layer.qweight()
    return pack(q.codes, q.spec.bits) if _is_packed(q.spec) else _plain_tensor(q.codes)


def _plain_tensor(value: Tensor) -> Tensor:
    """A tensor with memory of its own: safetensors refuses views of one storage."""
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _metadata_of(q: QuantizedModel) -> dict[str, Any]:
    quantizers = dict(_quantizers(q.graph))
    specs = list(dict.fromkeys(m.spec for m in quantizers.values()))
    return {
        "format": FORMAT,
        "version": VERSION,
        "sha256": _NO_DIGEST,
        "recipe": q.recipe.to_dict(),
        "example": {
            "args": [_blank(v, f"argument {i}") for i, v in enumerate(q.example.args)],
            "kwargs": {k: _blank(v, f"argument '{k}'") for k, v in q.example.kwargs.items()},
        },
        "specs": [spec.to_dict() for spec in specs],
        "quantizers": {path: [specs.index(m.spec), m.mode] for path, m in quantizers.items()},
        "codes": {path: list(layer.get_buffer("weight_codes").shape) for path, layer in _layers(q.graph)},
        "structure": _squeeze(structure_of(q.graph)),
        "notes": [asdict(note) for note in q.notes],
        "steps": [asdict(step) for step in q.steps],
    }


def _squeeze(structure: list[Part]) -> str:
    """JSON, deflated, as text: it repeats itself, and plain it would be as large as the codes of a small network."""
    return base64.b85encode(zlib.compress(json.dumps(structure).encode(), 9)).decode()


def _unsqueeze(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b85decode(text)))


def _refuse(value: Any) -> Any:
    raise LowbitError(f"the recipe holds {value!r}, which JSON cannot; name observers by their registered names")


def _blank(value: Any, what: str) -> Any:
    """A value of the example as JSON; of tensors only shape and dtype."""
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_blank(v, what) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: _blank(v, what) for k, v in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise LowbitError(f"{what} of the example is a {type(value).__name__}; only tensors and plain values can be saved")


# --- reading


def _read(path: Path) -> tuple[_Record, dict[str, Tensor]]:
    """The metadata and the tensors of a file that is whole."""
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise LowbitError(f"'{path}' cannot be read: {error.strerror or error}") from None
    metadata = _metadata_in(path, data)
    version = metadata.get("version")
    if isinstance(version, int) and version > VERSION:
        raise LowbitError(f"'{path}' has format version {version} and this lowbit reads {VERSION}; install a newer lowbit")
    digest, at = str(metadata.get("sha256")), _digest_span(data)
    if at is not None:
        data[slice(*at)] = _NO_DIGEST.encode()
    if version != VERSION or at is None or hashlib.sha256(data).hexdigest() != digest:
        raise LowbitError(f"'{path}' is damaged or was altered: its checksum does not hold; {_CURE}")
    try:
        return _record_of(metadata), parse_tensors(bytes(data))
    except (LookupError, TypeError, ValueError, AttributeError, zlib.error, safetensors.SafetensorError) as error:
        raise LowbitError(f"'{path}' is not as lowbit writes it: {error}; {_CURE}") from None


def _metadata_in(path: Path, data: bytearray) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    try:
        if len(data) < 8 or size > len(data) - 8:
            raise ValueError
        header = json.loads(data[8 : 8 + size])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        own = header.get("__metadata__", {}).get(FORMAT)
        metadata = None if own is None else json.loads(own)
        whole = 8 + size + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise LowbitError(f"'{path}' is no safetensors file, or is cut off or damaged in its header; {_CURE}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise LowbitError(f"'{path}' is a safetensors file, but not of a quantized model; write one with lowbit.save(q, path)")
    if len(data) < whole:
        raise LowbitError(f"'{path}' is cut off: {len(data)} of {whole} bytes are there; {_CURE}")
    return metadata


def _digest_span(data: bytearray) -> tuple[int, int] | None:
    """Where the digest stands in the header."""
    found = _DIGEST.search(data, 8, 8 + int.from_bytes(data[:8], "little"))
    return found.span(1) if found else None


def _record_of(metadata: dict[str, Any]) -> _Record:
    specs = [QuantSpec.from_dict(spec) for spec in metadata["specs"]]
    example = metadata["example"]
    return _Record(
        recipe=Recipe.from_dict(metadata["recipe"]),
        example=Inputs(
            args=tuple(_zeros(v) for v in example["args"]), kwargs={k: _zeros(v) for k, v in example["kwargs"].items()}
        ),
        structure=[Part(*part) for part in _unsqueeze(metadata["structure"])],
        quantizers={path: (specs[index], mode) for path, (index, mode) in metadata["quantizers"].items()},
        codes={path: tuple(shape) for path, shape in metadata["codes"].items()},
        notes=[Note(**note) for note in metadata["notes"]],
        steps=[Step(**step) for step in metadata["steps"]],
    )


def _zeros(value: Any) -> Any:
    """Inverse of `_blank`, with zeros in the tensors."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.zeros(value["tensor"], dtype=getattr(torch, value["dtype"]))
    ((kind, items),) = value.items()
    if kind == "dict":
        return {k: _zeros(v) for k, v in items.items()}
    return {"tuple": tuple, "list": list}[kind](_zeros(v) for v in items)


def _matching_graph(path: Path, model: nn.Module, record: _Record) -> tuple[fx.GraphModule, list[Note]]:
    """The float graph of `model`, whose structure is that of the file."""
    try:
        gm, notes = float_graph(model, record.recipe, record.example)
        difference = first_difference(record.structure, structure_of(gm))
    except LowbitError as error:
        difference = first_module_difference(record.structure, model) or str(error)
    if difference is not None:
        raise LowbitError(
            f"'{path}' was saved from another architecture: {difference}; pass the model that was quantized"
        ) from None
    # what folding saw in this model's BatchNorm says nothing of the saved one
    gm.meta.pop("statistics", None)
    return gm, notes


def _fill(gm: fx.GraphModule, record: _Record, tensors: dict[str, Tensor]) -> None:
    """Put every tensor of the file in its place; each is used and each place is filled."""
    names = set(tensors)
    quantizers, layers = dict(_quantizers(gm)), dict(_layers(gm))
    for what, file, here in (("quantizer", record.quantizers, quantizers), ("layer", record.codes, layers)):
        for path in sorted(set(file) ^ set(here)):
            raise LowbitError(f"{what} '{path}' is only in {'the file' if path in file else 'the model'}")
    for path, quantizer in quantizers.items():
        names -= _fill_quantizer(path, quantizer, *record.quantizers[path], tensors)
    for path, layer in layers.items():
        names -= _fill_layer(path, layer, record.codes[path], tensors)
    names -= _fill_rest(gm, tensors)
    if names:
        raise LowbitError(f"the model has no place for tensor '{min(names)}'")


def _fill_quantizer(path: str, quantizer: Quantizer, spec: QuantSpec, mode: str, tensors: dict[str, Tensor]) -> set[str]:
    scale, zero_point = f"{path}.scale", f"{path}.zero_point"
    if mode not in ("off", "quantize"):
        raise LowbitError(f"mode '{mode}' of '{path}' is unknown; it is 'off' or 'quantize'")
    quantizer.spec, quantizer.mode, quantizer.observer = spec, mode, None
    quantizer.scale = tensors.get(scale, torch.empty(0))
    quantizer.zero_point = tensors.get(zero_point, None if spec.symmetric else torch.empty(0, dtype=torch.int32))
    if mode == "quantize" and not quantizer.ready:
        raise _missing(scale)
    return {scale, zero_point}


def _fill_layer(path: str, layer: QLayer, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> set[str]:
    """Codes, and the bias where a correction has added one."""
    name, spec = _codes_name(path), layer.weight_quantizer.spec
    if tuple(layer.weight.shape) != shape:
        raise LowbitError(f"the weight of '{path}' is {list(shape)} in the file and {list(layer.weight.shape)} in this model")
    if name not in tensors:
        raise _missing(name)
    codes = tensors[name]
    layer.freeze(unpack(codes, spec.bits, shape, signed=spec.signed) if _is_packed(spec) else codes)
    layer.qweight()  # checks the shapes of codes, scale and zero point against each other
    bias = f"{path}.bias"
    if getattr(layer, "bias", None) is None and bias in tensors:
        layer.bias = nn.Parameter(tensors[bias])
    return {name}


def _fill_rest(gm: fx.GraphModule, tensors: dict[str, Tensor]) -> set[str]:
    """Parameters and buffers; what is one tensor under two names stays one."""
    special, first, made = _special_names(gm), dict[int, str](), dict[str, Tensor]()
    rest = (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    for name, old in rest:
        source = name if name in tensors else first.setdefault(id(old), name)
        first.setdefault(id(old), name)
        if name in special:
            continue
        if source not in tensors:
            raise _missing(source)
        new = tensors[source]
        if new.shape != old.shape:
            raise LowbitError(f"'{name}' is {list(new.shape)} in the file and {list(old.shape)} in this model")
        if source not in made:
            made[source] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        owner, _, attribute = name.rpartition(".")
        setattr(gm.get_submodule(owner), attribute, made[source])
    return set(made)


# --- both


def _layers(gm: fx.GraphModule) -> Iterator[tuple[str, QLayer]]:
    """Each quantized layer once, whatever number of paths leads to it."""
    return ((path, m) for path, m in gm.named_modules() if isinstance(m, QLayer))


def _quantizers(gm: fx.GraphModule) -> Iterator[tuple[str, Quantizer]]:
    return ((path, m) for path, m in gm.named_modules() if isinstance(m, Quantizer))


def _special_names(gm: fx.GraphModule) -> set[str]:
    """Names under which codes, scales and zero points stand; what is left is in float."""
    found = set()
    for path, module in gm.named_modules(remove_duplicate=False):
        if isinstance(module, QLayer):
            found.add(_codes_name(path))
        elif isinstance(module, Quantizer):
            found |= {f"{path}.scale", f"{path}.zero_point"}
    return found


def _codes_name(path: str) -> str:
    return f"{path}.weight_codes"


def _is_packed(spec: QuantSpec) -> bool:
    return spec.kind == "int" and spec.bits <= 8


def _missing(name: str) -> LowbitError:
    return LowbitError(f"tensor '{name}' is missing from the file")

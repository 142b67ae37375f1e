"""A quantized model in one safetensors file: packed codes, scales, what stayed in float, and the recipe.

Its metadata holds the recipe, the shapes of the example, the structure of the graph (deflated), the spec and
mode of each quantizer and the shape of each tensor of codes. `load` replays the recipe on a model of the same
architecture and fills in the tensors; the weights of that model do not matter.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.assembly import assemble, float_graph
from lowbit.core.packing import pack_codes, pack_trits, unpack_codes, unpack_trits
from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError, expect
from lowbit.graph.inputs import Inputs, Note
from lowbit.graph.masks import holds_huge
from lowbit.graph.structure import Part, first_difference, first_module_difference, structure_of
from lowbit.model import QuantizedModel, Step
from lowbit.nn.layers import QLayer
from lowbit.nn.network import Blueprint, with_networks
from lowbit.nn.quantizer import TRAINED, Quantizer
from lowbit.recipe import Recipe
from lowbit.sealed import MALFORMED, read_sealed, write_sealed

__all__ = ["Record", "load", "read", "save"]

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the metadata of a checkpoint says."""

    recipe: Recipe
    example: Inputs
    structure: list[Part]
    # (spec, mode) of each quantizer by its path
    quantizers: dict[str, tuple[QuantSpec, str]]
    # shape of each tensor of codes by the path of its layer
    codes: dict[str, tuple[int, ...]]
    # whether ternary codes are packed five to a byte
    base3: bool
    # every tensor network by its path
    networks: dict[str, Blueprint]
    notes: list[Note]
    steps: list[Step]


def save(q: QuantizedModel, path: str | Path, *, base3: bool = False) -> Path:
    """Write a frozen model; a file that is there already is replaced only when the new one is complete.

    Codes of 1 to 8 bits are packed, wider ones are int16 or int32, fp16 is float16; a shared layer is stored
    once.

    Args:
        base3: pack ternary codes five to a byte, 1.6 bits each, instead of in 2 bits.

    Returns:
        The path.

    Raises:
        LowbitError: the model is not frozen, its example holds other things than tensors and plain values, or
            the path cannot be written.
    """
    expect(q, QuantizedModel, "q", "make it with lowbit.quantize(model, ...)")
    _check_finished(q)
    path = Path(path)
    write_sealed(path, dict(_tensors_of(q.graph, base3)), {**_metadata_of(q), "base3": base3}, VERSION)
    return path


def load(path: str | Path, model: nn.Module) -> QuantizedModel:
    """Read what `save` wrote: a frozen model whose outputs equal those of the saved one bit for bit.

    Args:
        model: of the architecture that was quantized, before or after tensor networks took the place of its
            layers; its weights do not matter, and it is left as it was.

    Raises:
        LowbitError: the file is truncated, foreign, altered or of a newer version; or the architecture of
            `model` is another one, with the first layer that differs.
    """
    expect(model, nn.Module, "model", "pass the network itself, such as Net()")
    record, tensors = read(path)
    gm = _matching_graph(Path(path), model, record)
    q = assemble(gm, record.recipe, record.example, record.notes)
    q.steps = record.steps
    try:
        _fill(q.graph, record, tensors)
    except LowbitError as error:
        raise LowbitError(f"'{path}' does not fit this model: {error}") from None
    return q.eval()


def read(path: str | Path) -> tuple[Record, dict[str, Tensor]]:
    """What a checkpoint holds, without a model: the metadata, and the tensors as they are stored.

    Raises:
        LowbitError: the file is truncated, foreign, altered or of a newer version.
    """
    metadata, tensors = read_sealed(Path(path), VERSION)
    try:
        return _record_of(metadata), tensors
    except (*MALFORMED, zlib.error) as error:
        raise LowbitError(f"'{path}' is not as lowbit writes it: {error}; save it again") from None


def _check_finished(q: QuantizedModel) -> None:
    if not q.frozen:
        raise LowbitError(
            "only codes are saved, and this model has float weights; call lowbit.freeze(q) first"
        )
    for path, quantizer in _quantizers(q.graph):
        if quantizer.mode == "observe" or (quantizer.mode == "quantize" and not quantizer.ready):
            raise LowbitError(f"'{path}' has no scale yet; call lowbit.calibrate(q, data) before save")


def _tensors_of(gm: fx.GraphModule, base3: bool) -> Iterator[tuple[str, Tensor]]:
    """Everything that `load` needs, each tensor once, under its path in the graph."""
    for path, layer in _layers(gm):
        yield _codes_name(path), _packed(layer, base3)
    for path, quantizer in _quantizers(gm):
        for name in TRAINED:
            value = getattr(quantizer, name)
            if value is not None and value.numel():
                yield f"{path}.{name}", _plain_tensor(value)
    special = _special_names(gm)
    for name, value in (*gm.named_parameters(), *gm.named_buffers()):
        if name not in special:
            yield name, _plain_tensor(value)


def _packed(layer: QLayer, base3: bool) -> Tensor:
    q = layer.qweight()
    if base3 and q.spec.is_ternary:
        return pack_trits(q.codes)
    return pack_codes(q.codes, q.spec) if _is_packed(q.spec) else _plain_tensor(q.codes)


def _plain_tensor(value: Tensor) -> Tensor:
    """A tensor with memory of its own: safetensors refuses views of one storage."""
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _metadata_of(q: QuantizedModel) -> dict[str, Any]:
    quantizers = dict(_quantizers(q.graph))
    specs = list(dict.fromkeys(m.spec for m in quantizers.values()))
    return {
        "recipe": q.recipe.to_dict(),
        "example": {
            "args": [_blank(v, f"argument {i}") for i, v in enumerate(q.example.args)],
            "kwargs": {k: _blank(v, f"argument '{k}'") for k, v in q.example.kwargs.items()},
        },
        "specs": [spec.to_dict() for spec in specs],
        "quantizers": {path: [specs.index(m.spec), m.mode] for path, m in quantizers.items()},
        "codes": {path: list(layer.get_buffer("weight_codes").shape) for path, layer in _layers(q.graph)},
        "structure": _squeeze(structure_of(q.graph)),
        "networks": {path: asdict(found) for path, found in q.graph.meta["blueprints"].items()},
        "notes": [asdict(note) for note in q.notes],
        "steps": [asdict(step) for step in q.steps],
    }


def _squeeze(structure: list[Part]) -> str:
    """JSON, deflated, as text: plain it would be a tenth of the file of a small network."""
    return base64.b85encode(zlib.compress(json.dumps(structure).encode(), 9)).decode()


def _unsqueeze(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b85decode(text)))


def _blank(value: Any, what: str) -> Any:
    """A value of the example as JSON; of tensors only shape, dtype, and whether it is an attention mask."""
    if isinstance(value, Tensor):
        mask = {"mask": True} if holds_huge(value) else {}
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), **mask}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_blank(v, what) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: _blank(v, what) for k, v in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = type(value).__name__
    raise LowbitError(f"{what} of the example is a {kind}; only tensors and plain values can be saved")


def _record_of(metadata: dict[str, Any]) -> Record:
    specs = [QuantSpec.from_dict(spec) for spec in metadata["specs"]]
    example = metadata["example"]
    args, kwargs = example["args"], example["kwargs"]
    return Record(
        recipe=Recipe.from_dict(metadata["recipe"]),
        example=Inputs(tuple(_zeros(v) for v in args), {k: _zeros(v) for k, v in kwargs.items()}).made_up(),
        structure=[Part(*part) for part in _unsqueeze(metadata["structure"])],
        quantizers={path: (specs[index], mode) for path, (index, mode) in metadata["quantizers"].items()},
        codes={path: tuple(shape) for path, shape in metadata["codes"].items()},
        base3=bool(metadata.get("base3", False)),
        networks={path: Blueprint.of(found) for path, found in metadata.get("networks", {}).items()},
        notes=[Note(**note) for note in metadata["notes"]],
        steps=[Step.from_dict(step) for step in metadata["steps"]],
    )


def _zeros(value: Any) -> Any:
    """Inverse of `_blank`, with zeros in the tensors, -infinity in masks."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        fill = float("-inf") if value.get("mask") else 0
        return torch.full(value["tensor"], fill, dtype=getattr(torch, value["dtype"]))
    ((kind, items),) = value.items()
    if kind == "dict":
        return {k: _zeros(v) for k, v in items.items()}
    return {"tuple": tuple, "list": list}[kind](_zeros(v) for v in items)


def _matching_graph(path: Path, model: nn.Module, record: Record) -> fx.GraphModule:
    """The float graph of `model`, whose structure is that of the file."""
    try:
        model = with_networks(model, record.networks)
        gm, _ = float_graph(model, record.recipe, record.example)
        difference = first_difference(record.structure, structure_of(gm))
    except LowbitError as error:
        difference = first_module_difference(record.structure, model) or str(error)
    if difference is not None:
        raise LowbitError(
            f"'{path}' was saved from another architecture: {difference}; pass the model that was quantized"
        ) from None
    # what folding saw in this model's BatchNorm says nothing of the saved one
    gm.meta.pop("statistics", None)
    return gm


def _fill(gm: fx.GraphModule, record: Record, tensors: dict[str, Tensor]) -> None:
    """Put every tensor of the file in its place; each is used and each place is filled."""
    names = set(tensors)
    quantizers, layers = dict(_quantizers(gm)), dict(_layers(gm))
    for what, file, here in (("quantizer", record.quantizers, quantizers), ("layer", record.codes, layers)):
        for path in sorted(set(file) ^ set(here)):
            raise LowbitError(f"{what} '{path}' is only in {'the file' if path in file else 'the model'}")
    for path, quantizer in quantizers.items():
        names -= _fill_quantizer(path, quantizer, *record.quantizers[path], tensors)
    for path, layer in layers.items():
        names -= _fill_layer(path, layer, record, tensors)
    names -= _fill_rest(gm, tensors)
    if names:
        raise LowbitError(f"the model has no place for tensor '{min(names)}'")


def _fill_quantizer(
    path: str, quantizer: Quantizer, spec: QuantSpec, mode: str, tensors: dict[str, Tensor]
) -> set[str]:
    quantizer.spec, quantizer.observer, quantizer.progress = spec, None, None
    quantizer.mode = "quantize" if mode == "quantize" else "off"
    none_yet = None if spec.symmetric else torch.empty(0, dtype=torch.int32)
    for name, default in (("scale", torch.empty(0)), ("negative_scale", None), ("zero_point", none_yet)):
        setattr(quantizer, name, tensors.get(f"{path}.{name}", default))
    if mode == "quantize" and not quantizer.ready:
        raise _missing(f"{path}.scale")
    return {f"{path}.{name}" for name in TRAINED}


def _fill_layer(path: str, layer: QLayer, record: Record, tensors: dict[str, Tensor]) -> set[str]:
    """Codes, and the bias where a correction has added one."""
    name, spec, shape = _codes_name(path), layer.weight_quantizer.spec, record.codes[path]
    if tuple(layer.weight.shape) != shape:
        raise _other_shape(f"{path}.weight", shape, layer.weight)
    if name not in tensors:
        raise _missing(name)
    codes = tensors[name]
    if record.base3 and spec.is_ternary:
        codes = unpack_trits(codes, shape)
    elif _is_packed(spec):
        codes = unpack_codes(codes, spec, shape)
    layer.freeze(codes)
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
            raise _other_shape(name, tuple(new.shape), old)
        if source not in made:
            made[source] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        owner, _, attribute = name.rpartition(".")
        setattr(gm.get_submodule(owner), attribute, made[source])
    return set(made)


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
            found |= {f"{path}.{name}" for name in (*TRAINED, "progress")}
    return found


def _codes_name(path: str) -> str:
    return f"{path}.weight_codes"


def _is_packed(spec: QuantSpec) -> bool:
    return spec.kind == "int" and spec.bits <= 8


def _other_shape(name: str, shape: tuple[int, ...], here: Tensor) -> LowbitError:
    return LowbitError(f"'{name}' is {list(shape)} in the file and {list(here.shape)} in this model")


def _missing(name: str) -> LowbitError:
    return LowbitError(f"tensor '{name}' is missing from the file")

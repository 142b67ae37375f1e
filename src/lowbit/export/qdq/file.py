"""From a graph to an ONNX file: emitters in, torch's exporter, a few touches, an atomic write."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from lowbit.errors import LowbitError, near_miss
from lowbit.export.qdq.dynamic import emit_reader, emit_tensor
from lowbit.export.qdq.emitters import (
    CODES,
    NIBBLES,
    NIBBLES_CAST,
    Clamped,
    EmitGlobalAveragePool,
    accumulator_step,
)
from lowbit.files import atomic_path
from lowbit.graph.match import input_quantizer, is_global_pool, max_pool_of, moves_of, pads, source_of
from lowbit.graph.ops import clamp_bounds, is_tensor, kind_of, module_of
from lowbit.graph.rewrite import clone, finish, insert_after
from lowbit.graph.trace import Inputs
from lowbit.model import QuantizedModel
from lowbit.nn.layers import BoundLayer
from lowbit.nn.quantizer import Quantizer

__all__ = ["write_float", "write_quantized"]

OPSET = 21  # the first with 4-bit and 16-bit codes and blocked scales
IR_VERSION = 10  # of the same release; every runtime that knows opset 21 reads it


# axes, besides the first, whose length may differ from call to call, by the name of the input
Axes = Mapping[str, Sequence[int]]


def write_quantized(q: QuantizedModel, path: str | Path, dynamic: Axes) -> Path:
    """Write a frozen model as QDQ ONNX.

    Raises:
        LowbitError: the model is not frozen, or an operation has no ONNX form.
    """
    if not q.frozen:
        raise LowbitError("the model still holds float weights; call lowbit.freeze(q) before exporting it")
    gm = clone(q.graph)
    _emit(gm)
    return _write(gm, q.example, Path(path), dynamic)


def write_float(model: nn.Module, path: str | Path, example: Inputs, dynamic: Axes) -> Path:
    """Write the float model itself, for comparison."""
    return _write(model.eval(), example, Path(path), dynamic)


def _emit(gm: fx.GraphModule) -> None:
    """Swap every quantizer and quantized layer for its emitter."""
    _requantize_moved_values(gm)
    sources = {node: input_quantizer(node) for node in gm.graph.nodes if kind_of(node) == "layer"}
    swaps: list[tuple[fx.Node, nn.Module]] = []
    for node in gm.graph.nodes:
        if kind_of(node) == "quantizer":
            quantizer = module_of(node)
            assert isinstance(quantizer, Quantizer)
            if quantizer.mode == "quantize":
                swaps += _emit_quantizer(node, quantizer, sources)
        elif kind_of(node) == "layer":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            rank, name = source.meta["value"].ndim, str(node.meta["name"])
            emitter = emit_reader(module_of(node), sources[node], rank, name)
            swaps += [(node, emitter)] if emitter is not module_of(node) else []
        elif is_global_pool(node):
            swaps.append((node, EmitGlobalAveragePool()))
        elif kind_of(node) == "clamp" and _is_free(node):
            swaps.append((node, Clamped()))
    for node, emitter in swaps:
        path = f"emitters.{node.name}"
        gm.add_submodule(path, emitter)
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(path, (node.args[0],))
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    finish(gm)
    _emit_hidden(gm)


def _emit_quantizer(
    node: fx.Node, quantizer: Quantizer, sources: dict[fx.Node, Quantizer | None]
) -> list[tuple[fx.Node, nn.Module]]:
    """The emitter of a quantizer; behind a layer a sign makes its clamp superfluous."""
    name, source = str(node.target), node.args[0]
    assert isinstance(source, fx.Node)
    if not quantizer.spec.is_binary:
        return [(node, emit_tensor(quantizer, name))]
    clamps: list[tuple[fx.Node, nn.Module]] = []
    while kind_of(source) == "clamp" and len(source.users) == 1:
        clamps.append((source, nn.Identity()))
        source = source.args[0]
    step = accumulator_step(module_of(source), sources[source]) if source in sources else None
    return [*clamps, (node, emit_tensor(quantizer, name, step))]


def _requantize_moved_values(gm: fx.GraphModule) -> None:
    """Integer kernels want codes on both sides: repeat the quantizer behind operations that move values."""
    for node in list(gm.graph.nodes):
        if kind_of(node) != "pass" or not is_tensor(node) or kind_of(source_of(node)) != "quantizer":
            continue
        quantizer = module_of(source_of(node))
        assert isinstance(quantizer, Quantizer)
        if quantizer.spec.is_binary and any(map(pads, moves_of(node))):
            if max_pool_of(node) is not None:
                raise LowbitError(
                    f"'{node.meta['name']}' pools signs with zeros around them, which the runtime takes for "
                    "-1; give the pooling that padding, or pad behind it"
                )
            continue  # the zeros are no signs
        if quantizer.spec.kind == "int" and quantizer.scale.numel() == 1 and quantizer.mode == "quantize":
            again = Quantizer(quantizer.spec)
            rank = [1] * node.meta["value"].ndim
            zero = quantizer.zero_point
            again.scale, again.zero_point = (
                quantizer.scale.reshape(rank),
                None if zero is None else zero.reshape(rank),
            )
            again.mode = "quantize"
            insert_after(gm, node, f"moved.{node.name}", again)


def _is_free(node: fx.Node) -> bool:
    """A clamp from 0 whose upper end lies above all that the quantizer behind it can represent."""
    lo, hi = clamp_bounds(node)
    users = list(node.users)
    if lo != 0.0 or hi == float("inf") or len(users) != 1 or kind_of(users[0]) != "quantizer":
        return False
    quantizer = module_of(users[0])
    assert isinstance(quantizer, Quantizer)
    if quantizer.spec.kind != "int" or quantizer.scale.numel() != 1 or quantizer.mode != "quantize":
        return False
    zero = 0 if quantizer.zero_point is None else int(quantizer.zero_point)
    return zero + round(hi / quantizer.scale.item()) >= quantizer.spec.qmax


def _emit_hidden(gm: fx.GraphModule) -> None:
    """Layers inside submodules that were not traced."""
    for path, bound in list(gm.named_modules()):
        if isinstance(bound, BoundLayer):
            quantizers = (bound.input_quantizer, bound.output_quantizer)
            source = quantizers[0] if quantizers[0] is not None and quantizers[0].mode == "quantize" else None
            for side, quantizer in zip(("input_quantizer", "output_quantizer"), quantizers, strict=True):
                if quantizer is not None and quantizer.mode == "quantize":
                    name = f"{path}.{side}"
                    setattr(bound, side, emit_tensor(quantizer, name))
            rank = 2 if isinstance(bound.layer, nn.Linear) else 4
            bound.layer = emit_reader(bound.layer, source, rank, path)


def _write(module: nn.Module, example: Inputs, path: Path, axes: Axes) -> Path:
    if not path.parent.is_dir():
        raise LowbitError(f"folder '{path.parent}' does not exist; create it first")
    proto = _export(module, example, axes)
    _strip(proto)
    _pack_nibbles(proto)
    _separate_weights(proto.graph)
    _separate_zero_points(proto.graph)
    proto.ir_version = IR_VERSION
    with atomic_path(path) as temporary:
        onnx.save(proto, str(temporary))
    return path


def _export(module: nn.Module, example: Inputs, axes: Axes) -> onnx.ModelProto:
    """Run torch's exporter with a dynamic first axis; without where the model fixes the batch."""
    args, kwargs = (_pairs(v) for v in (example.args, dict(example.kwargs)))
    names = inspect.signature(module.forward).parameters
    given = dict(zip(names, args, strict=False)) | kwargs
    for name in axes:
        if name not in given:
            raise LowbitError(f"dynamic: the model has no input '{name}'{near_miss(name, given)}")
    dynamic = {name: _dynamic(value, axes.get(name, ())) for name, value in given.items()}
    failure: Exception | None = None
    with _quiet():
        for dynamic_shapes in (dynamic,) if axes else (dynamic, None):
            try:
                program = torch.onnx.export(
                    module,
                    args,
                    kwargs=kwargs,
                    dynamo=True,
                    opset_version=OPSET,
                    dynamic_shapes=dynamic_shapes,
                    verbose=False,
                )
                assert program is not None
                return program.model_proto
            except Exception as error:
                failure = failure or error
    reason = str(failure.__cause__ or failure).strip().splitlines()[0]
    raise LowbitError(
        f"the model has no ONNX form: {reason}; see q.coverage() for what could not be traced"
    ) from failure


def _pairs(values: Any) -> Any:
    """At least two samples: the exporter takes an axis of length 1 for a constant."""

    def grow(value: Any) -> Any:
        return (
            torch.cat([value, value])
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1
            else value
        )

    return (
        {k: grow(v) for k, v in values.items()}
        if isinstance(values, dict)
        else tuple(grow(v) for v in values)
    )


def _dynamic(value: Any, more: Sequence[int]) -> dict[int, Any] | None:
    if not isinstance(value, Tensor) or not value.ndim:
        return None
    return {axis % value.ndim: torch.export.Dim.DYNAMIC for axis in (0, *more)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of packages it can do without; that is no news to the user of this library."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _strip(proto: onnx.ModelProto) -> None:
    """Drop the exporter's records of source lines, which weigh more than the codes of a small network."""
    for node in proto.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == CODES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.ClearField("doc_string")
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]


def _pack_nibbles(proto: onnx.ModelProto) -> None:
    """Store marked int8 codes as 4-bit tensors; where an integer kernel reads them, behind a Cast to int8."""
    graph = proto.graph
    for tensor in list(graph.initializer):
        mark = tensor.name.rsplit(".", 1)[-1]
        codes = onnx.numpy_helper.to_array(tensor)
        signed = codes.dtype == np.int8
        kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
        if mark == NIBBLES:
            packed = onnx.helper.make_tensor(tensor.name, kind, codes.shape, _nibbles(codes), raw=True)
            _replace(graph, tensor, packed)
            _narrow_zero_point(graph, tensor.name, kind)
        elif mark.startswith(NIBBLES_CAST):
            factor = int(mark.removeprefix(NIBBLES_CAST))
            name = f"{tensor.name}.packed"
            packed = onnx.helper.make_tensor(name, kind, codes.shape, _nibbles(codes // factor), raw=True)
            _replace(graph, tensor, packed)
            for node in reversed(_unpacking(name, tensor, factor, graph)):
                graph.node.insert(0, node)


def _unpacking(
    name: str, tensor: onnx.TensorProto, factor: int, graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    """From packed codes to the kernel's: Cast, and a product with the factor; folded at loading."""
    target, wide = tensor.name, tensor.data_type
    if factor == 1:
        return [onnx.helper.make_node("Cast", [name], [target], name=f"{target}.cast", to=wide)]
    times = f"lowbit.times_{factor}"
    if all(known.name != times for known in graph.initializer):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.int32), times))
    steps, int32 = (f"{target}.int32", f"{target}.product"), onnx.TensorProto.INT32
    return [
        onnx.helper.make_node("Cast", [name], [steps[0]], name=f"{target}.unpack", to=int32),
        onnx.helper.make_node("Mul", [steps[0], times], [steps[1]], name=f"{target}.times"),
        onnx.helper.make_node("Cast", [steps[1]], [target], name=f"{target}.cast", to=wide),
    ]


def _separate_weights(graph: onnx.GraphProto) -> None:
    """Give each call of a layer weights of its own, where the runtime may rewrite them: see below.

    It leaves codes that fit seven bits as they are.
    """
    values = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    calls: Counter[str] = Counter()
    for node in [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in values]:
        codes, output = values[node.input[0]], node.output[0]
        if codes.data_type != onnx.TensorProto.INT8 or not _beyond_seven_bits(codes):
            continue
        for k, reader in enumerate(readers.get(output, ())):
            call = calls[codes.name]
            calls[codes.name] += 1
            if not call:
                continue
            copied = onnx.TensorProto()
            copied.CopyFrom(codes)
            copied.name = f"{codes.name}.{call}"
            graph.initializer.append(copied)
            if not k:
                node.input[0] = copied.name
                continue
            own = onnx.NodeProto()
            own.CopyFrom(node)
            own.name, own.input[0], own.output[0] = f"{node.name}.{k}", copied.name, f"{output}.{k}"
            reader.input[list(reader.input).index(output)] = own.output[0]
            graph.node.insert(list(graph.node).index(node), own)


def _beyond_seven_bits(codes: onnx.TensorProto) -> bool:
    found = onnx.numpy_helper.to_array(codes)
    return bool(found.size) and (int(found.min()) < -64 or int(found.max()) > 63)


def _separate_zero_points(graph: onnx.GraphProto) -> None:
    """Give each weight a zero point of its own: the exporter lets equal ones be shared.

    Where the runtime avoids kernels that saturate it rewrites codes and zero points one node at a time, and
    fails at a tensor that it has rewritten before.
    """
    values = {tensor.name: tensor for tensor in graph.initializer}
    constant = set(values) | {node.output[0] for node in graph.node if node.op_type == "Cast"}
    taken: set[str] = set()
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[0] not in constant:
            continue
        name = node.input[2]
        if name in taken:
            own = onnx.TensorProto()
            own.CopyFrom(values[name])
            own.name = node.input[2] = f"{node.input[0]}.zero_point"
            graph.initializer.append(own)
        taken.add(name)


def _replace(graph: onnx.GraphProto, old: onnx.TensorProto, new: onnx.TensorProto) -> None:
    graph.initializer.remove(old)
    graph.initializer.append(new)


def _narrow_zero_point(graph: onnx.GraphProto, codes: str, kind: int) -> None:
    """DequantizeLinear wants codes and zero point of one type."""
    names = {
        n.input[2]
        for n in graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] == codes and len(n.input) > 2
    }
    for tensor in list(graph.initializer):
        if tensor.name in names:
            zeros = onnx.numpy_helper.to_array(tensor)
            packed = onnx.helper.make_tensor(tensor.name, kind, zeros.shape, _nibbles(zeros), raw=True)
            _replace(graph, tensor, packed)


def _nibbles(codes: np.ndarray[Any, Any]) -> bytes:
    """Two codes to a byte, the first in the low half."""
    flat = codes.reshape(-1).view(np.uint8) & 0xF
    flat = np.concatenate([flat, np.zeros(flat.size % 2, np.uint8)])
    return (flat[0::2] | (flat[1::2] << 4)).tobytes()

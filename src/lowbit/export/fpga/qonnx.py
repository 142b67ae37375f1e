"""QONNX files: written from a program, run by the package `qonnx`, read by hls4ml.

Pitfalls that the file avoids: QONNX has no wrapping; rounds half away from zero where it says "HALF_UP";
takes one signed bit for -1 and +1; and computes in float32, which holds whole numbers of 24 bits: programs
that go beyond are refused. hls4ml reads no AveragePool from QONNX, and gives a ReLU that no Quant follows
`fixed<16,6>`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lowbit.core.fixed import FixedPoint, exponent_of, outside
from lowbit.errors import LowbitError, expect
from lowbit.export.fpga.qonnx_graph import IR_VERSION, adds_half, graph_of
from lowbit.files import atomic_path
from lowbit.hardware.arithmetic import weighted_bounds
from lowbit.hardware.lower import lower
from lowbit.hardware.program import CHUNK, Program, Step
from lowbit.model import QuantizedModel

__all__ = ["export_qonnx", "hls4ml_from_qonnx", "run_qonnx"]

# float32 holds every whole number up to here
EXACT = 1 << 24


def export_qonnx(q: QuantizedModel | Program, path: str | Path) -> Path:
    """Write a program, or a frozen model that has one, as a QONNX file.

    Weights and biases are float32 on their grid, each with its `Quant`, and so is the input. The first axis
    is dynamic. Needs the extra `lowbit[onnx]`.

    Raises:
        LowbitError: what QONNX cannot say: values that wrap, one signed bit, sums above 24 bits; with the
            name of the step and the cure. Or the folder does not exist.
    """
    import onnx

    if not isinstance(q, Program):
        cure = "make it with lowbit.quantize(model, 'fixed8', ...), or pass a Program"
        expect(q, QuantizedModel, "q", cure)
        q = lower(q)
    for step in q.steps:
        _check(step, [q.steps[i] for i in step.inputs])
    proto = graph_of(q)
    with atomic_path(path) as temporary:
        onnx.save(proto, str(temporary))
    return Path(path)


def run_qonnx(path: str | Path, inputs: Sequence[Tensor | np.ndarray[Any, Any]]) -> list[Tensor]:
    """Run a QONNX file node by node in the package `qonnx`, which defines what it means; see `lowbit[fpga]`.

    Args:
        inputs: batches [n, ...], one for each input; taken as float32.

    Returns:
        float32 results, in the order of the file.

    Raises:
        LowbitError: the file does not exist or is no ONNX file, or other inputs than it has.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    proto = _read(path)
    arrays = [np.asarray(x, dtype=np.float32) for x in inputs]
    names = [i.name for i in proto.graph.input]
    samples = [_shape(i)[1:] for i in proto.graph.input]
    if [[*x.shape[1:]] for x in arrays] != samples or len({len(x) for x in arrays}) != 1:
        raise LowbitError(
            f"inputs of shapes {[[*x.shape] for x in arrays]} for a file whose samples are {samples}; pass "
            "one batch for each input, all of one length"
        )
    parts = []
    for start in range(0, max(1, len(arrays[0])), CHUNK):
        chunk = [x[start : start + CHUNK] for x in arrays]
        model = ModelWrapper(_with_batch(proto, len(chunk[0])))
        with _readable_by_runtime():
            found = execute_onnx(model, dict(zip(names, chunk, strict=True)))
        parts.append([torch.from_numpy(found[o.name]) for o in proto.graph.output])
    return [torch.cat(results) for results in zip(*parts, strict=True)]


def hls4ml_from_qonnx(
    path: str | Path,
    folder: str | Path,
    *,
    backend: str = "Vitis",
    io: Literal["io_parallel", "io_stream"] = "io_parallel",
    **options: Any,
) -> Any:
    """The hls4ml model of a file that `export_qonnx` wrote, for its methods `compile`, `predict` and `build`.

    Images go in channels last, and come out channels first; several results in the order of their steps.

    Args:
        folder: of the project, which hls4ml makes when it compiles or builds.
        options: of `hls4ml.converters.convert_from_onnx_model`, such as `part` and `clock_period`.

    Raises:
        LowbitError: the file does not exist, or has what hls4ml cannot read, or not rightly.
    """
    import hls4ml
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.util.cleanup import cleanup_model

    proto = _read(path)
    _check_for_hls4ml(proto.graph, io)
    with contextlib.redirect_stdout(StringIO()), _readable_by_runtime():
        model = cleanup_model(ModelWrapper(proto))
        if any(node.op_type in ("Conv", "MaxPool") for node in proto.graph.node):
            model = model.transform(ConvertToChannelsLastAndClean(make_input_channels_last=True))
            model = cleanup_model(model)
        config = hls4ml.utils.config_from_onnx_model(model, granularity="name", backend=backend)
        for given in model.graph.input:
            # it would be fixed<16,6>, and every input rounded twice
            precision = config["LayerName"][given.name]["Precision"]
            precision["result"] = str(_quantized_to(model, given.name))
        return hls4ml.converters.convert_from_onnx_model(
            model, hls_config=config, output_dir=str(folder), backend=backend, io_type=io, **options
        )


def _check_for_hls4ml(graph: Any, io: str) -> None:
    shapes = {value.name: _shape(value) for value in (*graph.value_info, *graph.output)}
    for node in graph.node:
        found, what = _attributes(node), ""
        if node.op_type == "Clip":
            what = "a clamp; use ReLU"
        elif node.op_type == "MaxPool" and len(found["kernel_shape"]) == 1:
            what = "max pooling along one axis; use MaxPool2d"
        elif node.op_type == "MaxPool" and io == "io_stream" and found["strides"] != found["kernel_shape"]:
            what = "windows that overlap in io_stream, where they end the process; use io='io_parallel'"
        elif node.op_type == "Div":
            what = "a mean of other than 2, 4, 8, ... values; export it with lowbit.export.hls4ml"
        elif node.op_type == "MatMul" and len(shapes[node.input[0]]) > 2:
            what = "a Linear on more than vectors; use a Conv1d with a kernel of 1"
        elif node.op_type == "Conv" and set(found["dilations"]) != {1}:
            what = f"dilation {found['dilations']}; use 1"
        elif node.op_type == "Conv" and found["group"] != 1:
            filters, channels = shapes[node.input[1]][:2]
            if channels != 1 or filters != found["group"]:
                what = f"{found['group']} groups of {channels} for {filters} filters; use 1, or depthwise"
        if what:
            raise LowbitError(f"'{node.name}': from QONNX hls4ml does not take {what}")


def _quantized_to(model: Any, name: str) -> FixedPoint:
    """The type of the Quant that reads a tensor."""
    (node,) = model.find_consumers(name)
    how = _attributes(node)
    scale, width = (float(model.get_initializer(node.input[i])) for i in (1, 3))
    return FixedPoint(
        int(width),
        int(width) + exponent_of(scale),
        bool(how["signed"]),
        "half_even" if how["rounding_mode"] == b"ROUND" else "floor",
        "saturate",
        bool(how["narrow"]),
    )


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


@contextlib.contextmanager
def _readable_by_runtime() -> Iterator[None]:
    """While open, onnx labels what it makes with a version that ONNX Runtime reads.

    qonnx 1.0 makes a file of every node that it runs, also where it transforms a graph, and leaves the
    version to onnx: onnx 1.23 writes 14, and ONNX Runtime 1.31 reads up to 13.
    """
    import onnx

    before = onnx.IR_VERSION
    setattr(onnx, "IR_VERSION", IR_VERSION)  # noqa: B010  (declared as an enum)
    try:
        yield
    finally:
        setattr(onnx, "IR_VERSION", before)  # noqa: B010


def _read(path: str | Path) -> Any:
    import onnx

    if not Path(path).is_file():
        raise LowbitError(f"file '{path}' does not exist; write it with export_qonnx(q, path)")
    try:
        return onnx.load(str(path))
    except Exception as error:
        raise LowbitError(f"'{path}' is not an ONNX file: {str(error).splitlines()[0]}") from None


def _shape(value: Any) -> list[int]:
    return [axis.dim_value for axis in value.type.tensor_type.shape.dim]


def _with_batch(proto: Any, size: int) -> Any:
    """A copy whose tensors are all of one length: qonnx takes a dynamic axis for an empty one."""
    fixed = type(proto)()
    fixed.CopyFrom(proto)
    for value in (*fixed.graph.input, *fixed.graph.output, *fixed.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = size
    return fixed


# --- what QONNX cannot say


def _check(step: Step, read: Sequence[Step]) -> None:
    if step.op == "softmax":
        raise LowbitError(
            f"'{step.name}' is a softmax of look-up tables, and QONNX has no tables; leave it out, for the "
            "order of the classes is that of the logits"
        )
    if step.rounds:
        _check_type(step)
    steps = _largest(step, read)
    if steps > EXACT:
        raise LowbitError(
            f"sums of '{step.name}' reach {steps} steps of 2^{-step.fraction}, which takes "
            f"{steps.bit_length()} bits, and QONNX computes in float32, which holds 24; use fewer bits for "
            "its weights or activations, or lowbit.export.hls4ml(q, folder)"
        )


def _check_type(step: Step) -> None:
    to = step.type
    if to.overflow == "wrap" and (step.op == "input" or _overflows(step)):
        raise LowbitError(
            f"'{step.name}' wraps to {to}, and QONNX has no wrapping; use overflow='saturate' in its spec"
        )
    if to.width == 1 and to.signed:
        raise LowbitError(
            f"'{step.name}' has one signed bit, which QONNX takes for -1 and +1; use signed=False, or 2 bits"
        )


def _overflows(step: Step) -> bool:
    """Whether some result lies outside the type."""
    return bool(outside(torch.tensor([step.low, step.high]), step.fraction, step.type).any())


def _largest(step: Step, read: Sequence[Step]) -> int:
    """The largest magnitude, in its smallest steps, of anything that float32 computes for a step."""
    if step.op == "input":
        return (step.type.qmax + 1) << (2 if step.type.rounding == "half_up" else 0)
    largest = max(-step.low, step.high)
    if step.weight is not None:
        low, high = _reach(read[0])
        weight = step.weight.codes
        bias = torch.zeros(len(weight), dtype=torch.long) if step.bias is None else step.bias.codes.abs()
        largest = max(
            weighted_bounds(weight, bias, low, high)[1], -weighted_bounds(weight, -bias, low, high)[0]
        )
    if step.rounds:
        if adds_half(step):
            largest += 1 << step.fraction - step.type.fraction - 1
        largest = max(largest, step.type.qmax)
    return largest


def _reach(step: Step) -> tuple[int, int]:
    return (step.type.qmin, step.type.qmax) if step.rounds else (step.low, step.high)

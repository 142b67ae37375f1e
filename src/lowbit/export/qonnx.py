"""QONNX files: plain ONNX with a `Quant` node behind everything that has a type; other tools read their widths.

real = Quant(x) = clip(round(x / s), qmin, qmax) s, with s = 2^-F for a type of F bits behind the point. Pitfalls
that the file avoids: QONNX rounds half away from zero where it says "HALF_UP"; takes one signed bit for -1 and
+1; has no wrapping; and computes in float32, so sums are exact up to 2^24 steps and wider ones are refused.
hls4ml gives an average the type of what is averaged, and a ReLU that no Quant follows `fixed<16,6>`.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.core.fixed import FixedPoint, align, cast
from lowbit.errors import LowbitError, expect
from lowbit.files import atomic_path
from lowbit.hardware.arithmetic import weighted_bounds
from lowbit.hardware.lower import lower
from lowbit.hardware.program import CHUNK, Constant, Program, Step
from lowbit.model import QuantizedModel

__all__ = ["export_qonnx", "run_qonnx"]

DOMAIN = "qonnx.custom_op.general"
# what the readers of these files know best
OPSET, IR_VERSION = 13, 8
BATCH = "N"
# float32 holds every whole number up to here
EXACT = 1 << 24


def export_qonnx(q: QuantizedModel | Program, path: str | Path) -> Path:
    """Write a program, or a frozen model that has one, as a QONNX file.

    Weights and biases are float32 on their grid, each with its `Quant`; so has the input. The first axis is
    dynamic. Needs the extra `lowbit[onnx]`.

    Raises:
        LowbitError: what QONNX cannot say: values that wrap, one signed bit, sums above 24 bits; with the name
            of the step and the cure. Or the folder does not exist.
    """
    import onnx

    if not isinstance(q, Program):
        expect(
            q, QuantizedModel, "q", "make it with lowbit.quantize(model, 'fixed8', ...), or pass a Program"
        )
        q = lower(q)
    for step in q.steps:
        _check(step, [q.steps[i] for i in step.inputs])
    proto = _Writer().proto(q)
    with atomic_path(path) as temporary:
        onnx.save(proto, str(temporary))
    return Path(path)


def run_qonnx(
    path: str | Path, inputs: Sequence[Tensor | np.ndarray[Any, Any]]
) -> list[np.ndarray[Any, Any]]:
    """Run a QONNX file node by node in the package `qonnx`, its reference implementation.

    Args:
        inputs: batches [n, ...], one for each input; taken as float32.

    Returns:
        float32 results, in the order of the file.

    Raises:
        LowbitError: the file does not exist or is no ONNX file, or other inputs than it has.
    """
    import onnx
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    if not Path(path).is_file():
        raise LowbitError(f"file '{path}' does not exist; write it with lowbit.export.qonnx.export_qonnx")
    try:
        proto = onnx.load(str(path))
    except Exception as error:
        raise LowbitError(f"'{path}' is not an ONNX file: {str(error).splitlines()[0]}") from None
    arrays = [np.asarray(x, dtype=np.float32) for x in inputs]
    names = [i.name for i in proto.graph.input]
    shapes = [[d.dim_value for d in i.type.tensor_type.shape.dim][1:] for i in proto.graph.input]
    if [list(x.shape[1:]) for x in arrays] != shapes or len({len(x) for x in arrays}) != 1:
        raise LowbitError(
            f"inputs of shapes {[x.shape for x in arrays]} for a file whose samples are {shapes}; pass one "
            "batch for each input, all of one length"
        )
    parts = []
    for start in range(0, max(1, len(arrays[0])), CHUNK):
        chunk = [x[start : start + CHUNK] for x in arrays]
        model = ModelWrapper(_with_batch(proto, len(chunk[0])))
        with readable_by_runtime():
            found = execute_onnx(model, dict(zip(names, chunk, strict=True)))
        parts.append([found[o.name] for o in proto.graph.output])
    return [np.concatenate(results) for results in zip(*parts, strict=True)]


@contextlib.contextmanager
def readable_by_runtime() -> Iterator[None]:
    """While open, onnx labels what it makes with a version that ONNX Runtime reads.

    qonnx 1.0 makes files of single nodes, also where it transforms a graph, and leaves the version to onnx:
    that of onnx 1.23 is 14, and ONNX Runtime 1.31 ends at 13.
    """
    import onnx

    before = onnx.IR_VERSION
    onnx.IR_VERSION = IR_VERSION
    try:
        yield
    finally:
        onnx.IR_VERSION = before


def _with_batch(proto: Any, size: int) -> Any:
    """A copy whose tensors are all of one length: qonnx takes a dynamic axis for an empty one."""
    fixed = type(proto)()
    fixed.CopyFrom(proto)
    graph = fixed.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = size
    return fixed


# --- what QONNX cannot say


def _check(step: Step, read: Sequence[Step]) -> None:
    if step.rounds:
        _check_type(step)
    for what, constant in (("weight", step.weight), ("bias", step.bias)):
        if constant is not None and not torch.equal(
            torch.ldexp(constant.real().double(), torch.tensor(constant.type.fraction)).long(), constant.codes
        ):
            raise LowbitError(
                f"{what} of '{step.name}' takes {constant.type.width} bits, and QONNX keeps it in float32, which "
                "holds 24; use fewer bits for weights and activations"
            )
    steps = _largest(step, read)
    if steps > EXACT:
        raise LowbitError(
            f"sums of '{step.name}' reach {steps} steps of 2^{-step.fraction}, which takes "
            f"{steps.bit_length()} bits, and QONNX computes in float32, which holds 24; use fewer bits for "
            "its weights or activations, or export to hls4ml"
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
    to = step.type
    free = replace(to, width=63, integer=63 - to.fraction, signed=True, overflow="saturate", narrow=False)
    low, high = cast(torch.tensor([step.low, step.high]), step.fraction, free).tolist()
    return low < to.qmin or high > to.qmax


def _largest(step: Step, read: Sequence[Step]) -> int:
    """The largest magnitude, in its smallest steps, of anything that float32 computes for a step."""
    if step.op == "input":
        return (step.type.qmax + 1) << (2 if step.type.rounding == "half_up" else 0)
    largest = max(-step.low, step.high)
    if step.weight is not None:
        low, high = _reach(read[0])
        weight = align(step.weight.codes, step.fraction - read[0].type.fraction - step.weight.type.fraction)
        bias = torch.zeros(len(weight), dtype=torch.long)
        if step.bias is not None:
            bias = align(step.bias.codes, step.fraction - step.bias.type.fraction).abs()
        largest = max(
            weighted_bounds(weight, bias, low, high)[1], -weighted_bounds(weight, -bias, low, high)[0]
        )
    if step.rounds:
        if _adds_half(step):
            largest += 1 << step.fraction - step.type.fraction - 1
        largest = max(largest, step.type.qmax)
    return largest


def _adds_half(step: Step) -> bool:
    """Whether the rounding is floor(x + 1/2), and there is something to round."""
    return step.type.rounding == "half_up" and step.fraction > step.type.fraction


def _reach(step: Step) -> tuple[int, int]:
    return (step.type.qmin, step.type.qmax) if step.rounds else (step.low, step.high)


# --- the file


class _Writer:
    """Nodes, constants and shapes of a file that grows step by step."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray[Any, Any]] = {}
        # of all that is no constant
        self.shapes: dict[str, tuple[int | str, ...]] = {}

    def proto(self, program: Program) -> Any:
        steps = program.steps
        readers = [i for step in steps for i in step.inputs] + [*program.outputs]
        # the tensor that each step became
        at: list[str] = []
        inputs: list[str] = []
        outputs: list[str] = []
        for n, step in enumerate(steps):
            name = f"{step.op}_{step.name}" if step.name[0].isdigit() else step.name
            if step.op == "input":
                result = self.name(name)
                self.shapes[result] = (BATCH, *step.shape)
                inputs.append(result)
            else:
                result = _EMITTERS[step.op](self, step, name, [at[i] for i in step.inputs])
            at.append(self._typed(step, name, result, readers.count(n)))
        for i in program.outputs:
            # the same result twice takes two names
            again = at[i] in outputs
            outputs.append(self.node("Identity", [at[i]], at[i], steps[i].shape) if again else at[i])
        return self._model(inputs, outputs)

    def _model(self, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
        from onnx import helper, numpy_helper

        shapes: dict[str, Sequence[int | str]] = {**self.shapes}
        # hls4ml asks for those of constants too
        shapes |= {name: array.shape for name, array in self.constants.items()}
        values = {
            name: helper.make_tensor_value_info(
                name,
                helper.np_dtype_to_tensor_dtype(self.constants.get(name, np.empty(0, np.float32)).dtype),
                shape,
            )
            for name, shape in shapes.items()
        }
        given, results = ([values.pop(name) for name in names] for names in (inputs, outputs))
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(
            self.nodes, "lowbit", given, results, constants, value_info=[*values.values()]
        )
        domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION, producer_name="lowbit")

    def name(self, wanted: str) -> str:
        """A name that nothing else has, and that C++ takes."""
        name = plain = re.sub(r"\W", "_", wanted)
        n = 1
        while name in self.shapes or name in self.constants:
            n += 1
            name = f"{plain}_{n}"
        return name

    def constant(self, name: str, value: Any) -> str:
        name = self.name(name)
        self.constants[name] = np.asarray(value)
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, shape: Sequence[int], **how: Any) -> str:
        """Append a node whose one result, for a sample, has such a shape; returns the name of that."""
        return self._append(op, inputs, name, (BATCH, *shape), **how)

    def _append(
        self, op: str, inputs: Sequence[str], name: str, shape: tuple[int | str, ...], **how: Any
    ) -> str:
        from onnx import helper

        name = self.name(name)
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **how))
        self.shapes[name] = shape
        return name

    def quant(self, x: str, to: FixedPoint, name: str) -> str:
        """x as a value of the type; "half_up" is floor here, of what has its half already."""
        parts = {"scale": to.scale, "zero": 0.0, "bits": to.width}
        inputs = [x, *(self.constant(f"{name}_{part}", np.float32(value)) for part, value in parts.items())]
        shape = self.shapes[x] if x in self.shapes else self.constants[x].shape
        how = {
            "signed": int(to.signed),
            "narrow": int(to.narrow),
            "rounding_mode": "ROUND" if to.rounding == "half_even" else "FLOOR",
        }
        return self._append("Quant", inputs, f"{name}_quant", shape, domain=DOMAIN, **how)

    def typed(self, constant: Constant, name: str, values: Tensor) -> str:
        """A weight or a bias and its Quant."""
        to = constant.type
        if to.width == 1 and to.signed:
            to = FixedPoint(2, to.integer + 1)
        return self.quant(self.constant(name, values.numpy()), _held(to), name)

    def _typed(self, step: Step, name: str, x: str, readers: int) -> str:
        """What a step hands on: rounded, or with the type that it has where hls4ml would take another."""
        if not step.rounds:
            # that is fixed<16,6> for a ReLU, and for a layer the type of the first Quant that reads it
            taken = step.op == "relu" or (step.weight is not None and readers > 1)
            return self.quant(x, _held(step.type), name) if taken else x
        half_up = step.type.rounding == "half_up"
        if half_up and step.op == "input":
            # floor(2 x) first: in float32 0.49999997 + 0.5 is 1
            x = self.quant(x, replace(step.type, width=step.type.width + 1, narrow=False), f"{name}_twice")
        if half_up and (step.op == "input" or step.fraction > step.type.fraction):
            half = self.constant(f"{name}_half", np.float32(step.type.scale / 2))
            x = self.node("Add", [x, half], f"{name}_plus_half", step.shape)
        return self.quant(x, step.type, name)


def _held(to: FixedPoint) -> FixedPoint:
    """The type of values that are its own already, for which any rounding will do."""
    return replace(to, rounding="half_even")


# --- what each operation becomes


def _dense(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    """MatMul and Add: hls4ml reads no Gemm."""
    assert step.weight is not None
    weight = to.typed(step.weight, f"{name}_weight", step.weight.real().t().contiguous())
    sums = to.node("MatMul", [read[0], weight], name, step.shape)
    if step.bias is None:
        return sums
    bias = to.typed(step.bias, f"{name}_bias", step.bias.real())
    return to.node("Add", [sums, bias], f"{name}_sum", step.shape)


def _conv(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    constants = [
        to.typed(constant, f"{name}_{part}", constant.real())
        for part, constant in (("weight", step.weight), ("bias", step.bias))
        if constant is not None
    ]
    groups = step.settings["groups"]
    return to.node("Conv", [*read, *constants], name, step.shape, group=groups, **_window(step))


def _window(step: Step) -> dict[str, Any]:
    kernel, found = step.settings["kernel"], step.settings.get
    padding, dilation = found("padding", (0,) * len(kernel)), found("dilation", (1,) * len(kernel))
    strides = step.settings["stride"]
    return {"kernel_shape": kernel, "strides": strides, "pads": [*padding, *padding], "dilations": dilation}


def _max_pool(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    return to.node("MaxPool", read, name, step.shape, **_window(step))


def _average_pool(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    """A convolution of each channel with 2^-k: hls4ml takes no AveragePool from these files."""
    kernel, channels = step.settings["kernel"], step.shape[0]
    k = math.prod(kernel).bit_length() - 1
    shares = Constant(torch.ones(channels, 1, *kernel, dtype=torch.long), FixedPoint(1, 1 - k, signed=False))
    weight = to.typed(shares, f"{name}_weight", shares.real())
    return to.node("Conv", [*read, weight], name, step.shape, group=channels, **_window(step))


def _clamp(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    ends = [to.constant(f"{name}_end", np.float32(end)) for end in step.settings["ends"]]
    return to.node("Clip", [*read, *ends], name, step.shape)


def _reshape(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    shape = to.constant(f"{name}_shape", np.array([-1, *step.shape], dtype=np.int64))
    return to.node("Reshape", [*read, shape], name, step.shape)


def _concat(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    return to.node("Concat", read, name, step.shape, axis=step.settings["axis"])


def _transpose(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    return to.node("Transpose", read, name, step.shape, perm=(0, *step.settings["axes"]))


_EMITTERS: dict[str, Callable[[_Writer, Step, str, Sequence[str]], str]] = {
    "dense": _dense,
    "conv": _conv,
    "relu": lambda to, step, name, read: to.node("Relu", read, name, step.shape),
    "clamp": _clamp,
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "add": lambda to, step, name, read: to.node("Add", read, name, step.shape),
    "concat": _concat,
    "reshape": _reshape,
    "transpose": _transpose,
    "cast": lambda to, step, name, read: read[0],
}

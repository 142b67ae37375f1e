"""The graph of a QONNX file: standard operations, and a `Quant` behind everything that has a type.

real = Quant(x) = clip(round(x / s), qmin, qmax) s, with s = 2^-F for a type of F bits behind the point.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.core.fixed import FixedPoint
from lowbit.hardware.program import Constant, Program, Step

__all__ = ["IR_VERSION", "adds_half", "graph_of"]

DOMAIN = "qonnx.custom_op.general"
# what the readers of these files know best
OPSET, IR_VERSION = 13, 8
BATCH = "N"


def graph_of(program: Program) -> Any:
    """The file, in memory; its first axis is dynamic."""
    return _Writer().proto(program)


def adds_half(step: Step) -> bool:
    """Whether it is rounded as floor(x + 1/2); QONNX's own "HALF_UP" rounds away from zero."""
    return step.type.rounding == "half_up" and (step.op == "input" or step.fraction > step.type.fraction)


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
        return self.quant(self.constant(name, values.numpy()), _held(constant.type), name)

    def _typed(self, step: Step, name: str, x: str, readers: int) -> str:
        """What a step hands on: rounded, or with the type that it has where hls4ml would take another."""
        if not step.rounds:
            # that is fixed<16,6> for a ReLU, and for a layer the type of the first Quant that reads it
            taken = step.op == "relu" or (step.weight is not None and readers > 1)
            return self.quant(x, _held(step.type), name) if taken else x
        if adds_half(step):
            if step.op == "input":
                # floor(2 x) first: in float32 0.49999997 + 0.5 is 1
                twice = replace(step.type, width=step.type.width + 1, narrow=False)
                x = self.quant(x, twice, f"{name}_twice")
            elif step.op == "relu":
                exact = FixedPoint.holding(step.low, step.high, step.fraction)
                x = self.quant(x, _held(exact), f"{name}_exact")
            one = Constant(torch.tensor(1), FixedPoint(1, -step.type.fraction, signed=False))
            half = self.typed(one, f"{name}_half", one.real())
            x = self.node("Add", [x, half], f"{name}_plus_half", step.shape)
        return self.quant(x, step.type, name)


def _held(to: FixedPoint) -> FixedPoint:
    """A type for values that are on its grid: any rounding will do, but one signed bit is -1 and +1."""
    if to.width == 1 and to.signed:
        to = FixedPoint(2, to.integer + 1)
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


def _bias(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    assert step.bias is not None
    bias = to.typed(step.bias, f"{name}_bias", step.bias.real())
    return to.node("Add", [read[0], bias], name, step.shape)


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
    """A convolution of each channel with 2^-k, and for other means a division.

    hls4ml takes no AveragePool from these files. A quotient in float32 is rounded as the exact one is.
    """
    kernel, channels, count = step.settings["kernel"], step.shape[0], step.settings["count"]
    exact = count & (count - 1) == 0
    k = count.bit_length() - 1 if exact else 0
    shares = Constant(torch.ones(channels, 1, *kernel, dtype=torch.long), FixedPoint(1, 1 - k, signed=False))
    weight = to.typed(shares, f"{name}_weight", shares.real())
    sums = to.node("Conv", [*read, weight], name, step.shape, group=channels, **_window(step))
    if exact:
        return sums
    return to.node("Div", [sums, to.constant(f"{name}_count", np.float32(count))], f"{name}_mean", step.shape)


def _clamp(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    ends = [to.constant(f"{name}_end", np.float32(end)) for end in step.settings["ends"]]
    return to.node("Clip", [*read, *ends], name, step.shape)


def _reshape(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    shape = to.constant(f"{name}_shape", np.array([-1, *step.shape], dtype=np.int64))
    return to.node("Reshape", [*read, shape], name, step.shape)


def _concat(to: _Writer, step: Step, name: str, read: Sequence[str]) -> str:
    """In pairs, for hls4ml joins no more than two."""
    axis, joined = step.settings["axis"], read[0]
    for other in read[1:]:
        shape = [*step.shape]
        shape[axis - 1] = sum(int(to.shapes[x][axis]) for x in (joined, other))
        joined = to.node("Concat", [joined, other], name, shape, axis=axis)
    return joined


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
    "bias": _bias,
    "concat": _concat,
    "reshape": _reshape,
    "transpose": _transpose,
    "cast": lambda to, step, name, read: read[0],
}

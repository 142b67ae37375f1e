"""From the graph of a frozen model to a program of fixed-point steps; what hardware lacks is refused here."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from lowbit.core.fixed import FixedPoint, cast, exponent_of, from_real, to_real
from lowbit.core.spec import expand_to
from lowbit.errors import LowbitError, expect
from lowbit.graph.match import quantizers_behind
from lowbit.graph.ops import clamp_bounds, kind_of, label, module_of
from lowbit.graph.run import evaluate
from lowbit.hardware.arithmetic import OPERATIONS, Bounds, weighted_bounds
from lowbit.hardware.program import Constant, Program, Step
from lowbit.hardware.softmax import SHARE, tables
from lowbit.hardware.windows import average_window_of, convolution_window, max_window
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QConv1d, QConv2d, QConvTranspose2d, QLayer, QLinear
from lowbit.nn.quantizer import Quantizer

__all__ = ["lower"]

_SAME = {"identity", "dropout", "dropout1d", "dropout2d", "contiguous", "detach", "clone", "float"}
_RESHAPES = {"flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze"}
_TRANSPOSES = {"permute", "transpose", "swapaxes", "movedim", "t"}
_MAX_POOLS = {"maxpool1d", "maxpool2d", "max_pool1d", "max_pool2d"}
_ROW_AVERAGES = ("avgpool1d", "avg_pool1d", "adaptiveavgpool1d", "adaptive_avg_pool1d")


def lower(q: QuantizedModel) -> Program:
    """The program of a frozen model whose scales are powers of two.

    Raises:
        LowbitError: what has no fixed-point form: a layer in float, a scale that is no power of two, an input
            that nothing rounds, an operation that hardware lacks; with its name and the cure.
    """
    expect(q, QuantizedModel, "q", "make it with lowbit.quantize(model, 'fixed8', ...)")
    if not q.frozen:
        raise LowbitError("hardware holds codes, and this model has float weights; call lowbit.freeze(q)")
    return _Lowering(q.graph).program()


class _Lowering:
    """Steps so far, and which of them each node became."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.steps: list[Step] = []
        self.at: dict[fx.Node, int] = {}
        # tensors of the model that are added, once they are quantized
        self.constants: dict[fx.Node, Constant] = {}
        self.kinds: dict[str, Callable[[fx.Node], int]] = {
            "quantizer": self._quantizer,
            "layer": self._layer,
            "clamp": self._clamp,
            "add": self._add,
            "cat": self._concat,
            "average": self._average,
            "pass": self._move,
            "softmax": self._softmax,
            **dict.fromkeys(_ROW_AVERAGES, self._average),
        }

    def program(self) -> Program:
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.at[node] = self._append(Step(_name(node), "input", (), _shape(node), _BIT))
            elif node.op == "get_attr":
                continue  # its quantizer makes a constant of it
            elif kind_of(node) == "quantizer" and node.args[0].op == "get_attr":
                self.constants[node] = self._constant(node)
            elif node.op != "output":
                self.at[node] = self.kinds.get(_kind(node), self._refuse)(node)
            else:
                results = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
                if not all(isinstance(n, fx.Node) and n in self.at for n in results):
                    raise LowbitError(
                        "the network returns more than tensors, and hardware has wires alone; return a "
                        "tensor, or a tuple of them"
                    )
                outputs = tuple(self.at[n] for n in results)
                self._check_inputs()
                self._check_means(outputs)
                return Program(tuple(self.steps), outputs)
        raise AssertionError("a graph has an output")

    def _check_inputs(self) -> None:
        for step in self.steps:
            if step.op == "input" and not step.rounds:
                raise LowbitError(
                    f"input '{step.name}' is not quantized, and hardware has no floats; use a recipe such as "
                    "'fixed8', which rounds what every layer reads"
                )

    def _check_means(self, outputs: Sequence[int]) -> None:
        """A mean of other than 2, 4, 8, ... values ends nowhere behind the point, unless it is rounded."""

        def ends(i: int) -> bool:
            step = self.steps[i]
            if step.rounds or i in outputs or step.op not in ("average_pool", "relu", "clamp"):
                return step.rounds
            return all(ends(k) for k, reader in enumerate(self.steps) if i in reader.inputs)

        for i, step in enumerate(self.steps):
            count = step.settings.get("count", 1)
            if count & (count - 1) and not ends(i):
                raise LowbitError(
                    f"'{step.name}' divides by {count}, and nothing rounds what comes out; let a layer read "
                    "it, or average over a window of 2, 4, 8, ... values"
                )

    # --- steps

    def _append(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1

    def _computed(
        self, node: fx.Node, op: str, inputs: Sequence[int], bias: Constant | None = None, **settings: Any
    ) -> int:
        """A step without weights, with the exact type of its result."""
        step = Step(_name(node), op, tuple(inputs), _shape(node), _BIT, bias=bias, settings=settings)
        bounds = OPERATIONS[op].bounds
        assert bounds is not None
        return self._append(_exact(step, bounds(step, [self._bounds(i) for i in inputs])))

    def _bounds(self, i: int) -> Bounds:
        """Lowest and highest code of a step once it is cast, and its bits behind the point."""
        step = self.steps[i]
        if not step.rounds:
            return step.low, step.high, step.fraction
        if step.op == "input" or step.type.overflow == "wrap":
            return step.type.qmin, step.type.qmax, step.type.fraction
        ends = cast(torch.tensor([step.low, step.high]), step.fraction, step.type)
        return int(ends[0]), int(ends[1]), step.type.fraction

    def _is_rounded(self, i: int) -> bool:
        """Whether a step hands on what a quantizer has rounded, perhaps moved."""
        while not self.steps[i].rounds and self.steps[i].op in ("max_pool", "reshape", "transpose"):
            i = self.steps[i].inputs[0]
        return self.steps[i].rounds

    def _read(self, node: fx.Node, argument: Any) -> int:
        if not isinstance(argument, fx.Node) or argument not in self.at:
            self._refuse(node)
        return self.at[argument]

    # --- what each kind of node becomes

    def _quantizer(self, node: fx.Node) -> int:
        quantizer, source = module_of(node), node.args[0]
        assert isinstance(quantizer, Quantizer)
        at = self._read(node, source)
        if quantizer.mode != "quantize":
            return at
        to = self._type(quantizer, f"the values behind '{self.steps[at].name}'")
        shared = len(source.users) > 1
        if self.steps[at].rounds or shared:
            at = self._computed(node, "cast", [at])
        self.steps[at] = self.steps[at].rounded_to(to)
        return at

    def _type(self, quantizer: Quantizer, what: str) -> FixedPoint:
        try:
            return FixedPoint.of(quantizer.spec, quantizer.scale)
        except LowbitError as error:
            raise LowbitError(f"{what}: {error}") from None

    def _layer(self, node: fx.Node) -> int:
        layer, name = module_of(node), _name(node)
        if not isinstance(layer, (QLinear, QConv1d, QConv2d)) or isinstance(layer, QConvTranspose2d):
            kind = label(node)
            known = isinstance(layer, QLayer) or kind in ("ConvTranspose2d", "Embedding")
            raise LowbitError(
                f"'{name}': hardware has no {kind}; use Linear, Conv1d or Conv2d"
                if known
                else f"'{name}' has weights in float; let a rule of the recipe quantize it"
            )
        at = self._read(node, node.args[0])
        if not self._is_rounded(at):
            raise LowbitError(f"'{name}' reads values that nothing rounds; let its rule quantize activations")
        weight = _weight(layer, name)
        low, high, fraction = self._bounds(at)
        fine = fraction + weight.type.fraction
        bias = None if layer.bias is None else _bias(layer.bias.detach(), fine, name)
        low, high = weighted_bounds(weight.codes, None if bias is None else bias.codes, low, high)
        dense = isinstance(layer, QLinear)
        op, settings = "dense" if dense else "conv", {} if dense else convolution_window(layer, name)
        step = Step(name, op, (at,), _shape(node), _BIT, weight=weight, bias=bias, settings=settings)
        return self._append(_exact(step, (low, high, fine)))

    def _clamp(self, node: fx.Node) -> int:
        at, (low, high) = self._read(node, node.args[0]), clamp_bounds(node)
        if (low, high) == (0.0, math.inf):
            return self._computed(node, "relu", [at])
        ends = [end for end in (low, high) if math.isfinite(end)]
        fraction = max([self._bounds(at)[2], *(_bits_behind(end) for end in ends)])
        if fraction > 30:
            raise LowbitError(
                f"'{_name(node)}' clamps to {low:g} and {high:g}, which take more than 30 bits behind "
                "the point; clamp to numbers such as 0.25"
            )
        least, most = (math.ldexp(end, fraction) for end in (low, high))
        codes = (-(1 << 62) if low == -math.inf else int(least), 1 << 62 if high == math.inf else int(most))
        return self._computed(node, "clamp", [at], codes=codes, fraction=fraction, ends=(low, high))

    def _constant(self, node: fx.Node) -> Constant:
        """A tensor of the model as its quantizer rounds it."""
        quantizer, source = module_of(node), node.args[0]
        assert isinstance(quantizer, Quantizer)
        to = self._type(quantizer, f"'{_name(source)}'")
        return Constant(from_real(operator.attrgetter(str(source.target))(self.gm).detach(), to), to)

    def _add(self, node: fx.Node) -> int:
        fixed = [n for n in node.args[:2] if n in self.constants]
        if len(fixed) == 1:
            (other,) = (n for n in node.args[:2] if n not in self.constants)
            at, bias = self._read(node, other), self.constants[fixed[0]]
            if tuple(bias.codes.shape) != self.steps[at].shape:
                raise LowbitError(
                    f"'{_name(node)}' adds a constant of shape {[*bias.codes.shape]} to samples of "
                    f"{[*self.steps[at].shape]}; hardware adds like to like"
                )
            return self._computed(node, "bias", [at], bias)
        a, b = (self._read(node, n) for n in node.args[:2])
        shapes = {self.steps[i].shape for i in (a, b)}
        if len(shapes) > 1:
            raise LowbitError(f"'{_name(node)}' adds tensors of different shapes; hardware adds like to like")
        return self._computed(node, "add", [a, b])

    def _concat(self, node: fx.Node) -> int:
        parts = [self._read(node, n) for n in node.args[0]]
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        axis = axis % node.meta["value"].ndim
        if axis == 0:
            self._refuse(node)
        return self._computed(node, "concat", parts, axis=axis)

    def _average(self, node: fx.Node) -> int:
        at, name = self._read(node, node.args[0]), _name(node)
        window = average_window_of(node, name)
        count, (_, _, fraction) = math.prod(window["kernel"]), self._bounds(at)
        finer = count.bit_length() - 1
        if count & (count - 1):
            # no mean is so near to where rounding turns that what is dropped matters
            behind = [q for q in quantizers_behind(node) if q.mode == "quantize"]
            halves = [self._type(q, f"the values behind '{name}'").fraction + 1 for q in behind]
            finer = max([fraction, *halves]) + count.bit_length() - fraction
        i = self._computed(node, "average_pool", [at], **window, count=count, finer=finer)
        mean = self.steps[i]
        _exact(mean, (mean.low * count, mean.high * count, mean.fraction))  # its sums have a type, too
        return i

    def _softmax(self, node: fx.Node) -> int:
        at, name = self._read(node, node.args[0]), _name(node)
        module = module_of(node) if node.op == "call_module" else None
        given = dict(zip(("dim",), node.args[1:], strict=False)) | dict(node.kwargs)
        axis = given.get("dim") if module is None else getattr(module, "dim", None)
        if len(self.steps[at].shape) != 1 or axis not in (None, 1, -1):
            raise LowbitError(
                f"'{name}' is a softmax along axis {axis} of samples {[*self.steps[at].shape]}; hardware "
                "takes one over a vector: leave it out of the part that is exported"
            )
        found = tables(self.steps[at].shape[0], *self._bounds(at))
        i = self._computed(node, "softmax", [at], **found)
        self.steps[i] = self.steps[i].rounded_to(SHARE)
        return i

    def _move(self, node: fx.Node) -> int:
        at, kind = self._read(node, node.args[0]), label(node).lower()
        shape, source = node.meta["value"].shape, node.args[0].meta["value"].shape
        if kind in _SAME or (shape == source and kind in _RESHAPES):
            return at
        if shape[0] != source[0]:
            self._refuse(node)
        if kind in _RESHAPES:
            return self._computed(node, "reshape", [at])
        if kind in _TRANSPOSES:
            return self._computed(node, "transpose", [at], axes=self._axes(node))
        if kind in _MAX_POOLS:
            return self._computed(node, "max_pool", [at], **max_window(node, _name(node)))
        return self._refuse(node)

    def _axes(self, node: fx.Node) -> tuple[int, ...]:
        """Where the axes of a sample come from, 1 up: a tensor is moved whose sizes are all different."""
        source = node.args[0]
        numbered = torch.empty([*range(2, 2 + source.meta["value"].ndim)], device="meta")
        args = fx.node.map_arg(node.args, lambda n: numbered if n is source else n.meta["value"])
        axes = tuple(n - 2 for n in evaluate(self.gm, node, args, node.kwargs).shape)
        return axes[1:] if axes[0] == 0 else self._refuse(node)

    def _refuse(self, node: fx.Node) -> NoReturn:
        raise LowbitError(
            f"'{_name(node)}' ({label(node)}) has no fixed-point form; hardware takes Linear, Conv1d, "
            "Conv2d, ReLU, max and average pooling, addition, concatenation, reshaping and a softmax at the "
            "end: leave it out of the part of the network that is exported"
        )


_BIT = FixedPoint(1, 1, signed=False)


def _exact(step: Step, bounds: Bounds) -> Step:
    """The step with bounds, and the type that holds them."""
    low, high, fraction = bounds
    try:
        held = FixedPoint.holding(low, high, fraction)
    except LowbitError as error:
        raise LowbitError(f"'{step.name}': {error}") from None
    return Step(**{**vars(step), "type": held, "low": low, "high": high, "fraction": fraction})


def _kind(node: fx.Node) -> str:
    """As integer kernels have it; what they lack goes by its name."""
    kind = kind_of(node)
    return label(node).lower() if kind == "float" else kind


def _name(node: fx.Node) -> str:
    return str(node.meta.get("name", node.name))


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Of one sample."""
    return tuple(node.meta["value"].shape[1:])


def _bits_behind(value: float) -> int:
    """How many bits behind the point a number has."""
    return value.as_integer_ratio()[1].bit_length() - 1


def _weight(layer: nn.Module, name: str) -> Constant:
    """Codes of a weight; where channels have powers of two of their own, on the finest of their steps."""
    q = layer.qweight()
    codes = q.codes.long()
    try:
        if q.scale.numel() == 1:
            return Constant(codes, FixedPoint.of(q.spec, q.scale))
        exponents = torch.tensor([exponent_of(s) for s in q.scale.flatten()]).reshape(q.scale.shape)
        FixedPoint.of(q.spec, 1.0)
    except LowbitError as error:
        raise LowbitError(f"weight of '{name}': {error}") from None
    finest = int(exponents.min())
    codes = codes << expand_to(exponents - finest, codes.shape)
    held = FixedPoint.holding(int(codes.min()), int(codes.max()), -finest)
    return Constant(codes, FixedPoint(held.width, held.integer, True, q.spec.rounding, q.spec.overflow))


def _bias(bias: Tensor, fraction: int, name: str) -> Constant:
    """Codes of a bias, as fine as the sums that it is added to."""
    codes = from_real(bias, FixedPoint.widest(fraction))
    if not torch.equal(to_real(codes, fraction), bias.double()):
        raise LowbitError(
            f"bias of '{name}' is no multiple of 2^{-fraction}, the step of its sums; give a layer that "
            "is called several times bias=False, or a copy for each call"
        )
    held = FixedPoint.holding(int(codes.min()), int(codes.max()), fraction)
    return Constant(codes, FixedPoint(held.width, held.integer, held.signed, "half_even", "saturate"))

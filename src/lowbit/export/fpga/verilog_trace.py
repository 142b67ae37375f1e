"""A program on symbolic whole numbers: what da4ml turns into adders, multiplexers and wires.

Every symbolic number is a code, never a real number, so shifts are free and nothing meets a float. da4ml
chooses how a constant matrix becomes shared additions (Sun et al. 2025, "da4ml: Distributed Arithmetic for
Real-time Neural Networks on FPGAs"); rounding, saturation and wrapping are composed here, bit for bit as in
`lowbit.core.fixed.cast`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit.core.fixed import FixedPoint, cast
from lowbit.errors import LowbitError
from lowbit.hardware.arithmetic import OPERATIONS, windows
from lowbit.hardware.program import Program, Step

__all__ = ["trace"]

# a symbolic whole number, da4ml's FixedVariable
Symbol = Any
Symbols = NDArray[np.object_]
# an adder takes one unit of time, however wide
HARDWARE = (1, -1, -1)
# how many adders deeper than the least a matrix may be, for fewer adders
EXTRA_DEPTH = 2
# floats in da4ml tell whole numbers apart up to here, with room to spare
MAX_SUM, MAX_WEIGHT = 40, 24


def trace(program: Program) -> Any:
    """The program as da4ml's `CombLogic`: codes of the inputs to codes of the results, all flattened.

    Raises:
        LowbitError: sums or weights too wide for da4ml.
    """
    from da4ml.trace import comb_trace

    _check(program)
    tracer = _Tracer(program)
    values = tracer.run()
    inputs = [s for i, step in enumerate(program.steps) if step.op == "input" for s in values[i].ravel()]
    outputs = [s for i in program.outputs for s in values[i].ravel()]
    return comb_trace(inputs, outputs, keep_dead_inputs=True)


def _check(program: Program) -> None:
    for step in program.steps:
        if max(step.low.bit_length(), step.high.bit_length(), step.type.width) > MAX_SUM:
            raise LowbitError(
                f"'{step.name}' has results of more than {MAX_SUM} bits, the most that da4ml counts exactly; "
                "use fewer bits"
            )
        if step.weight is not None and int(step.weight.codes.abs().max()).bit_length() > MAX_WEIGHT:
            raise LowbitError(
                f"'{step.name}' has weights of more than {MAX_WEIGHT} bits, once all have one step; use "
                "fewer bits, or one scale for the tensor"
            )


class _Tracer:
    """Symbols of each step, and the matrices that were solved before."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.solved: dict[Any, Any] = {}
        self.kinds: dict[str, Callable[[Step, list[Symbols]], Symbols]] = {
            "dense": self._dense,
            "conv": self._conv,
            "clamp": self._clamp,
            "max_pool": self._max_pool,
            "average_pool": self._average_pool,
            "add": lambda step, read: np.asarray(read[0] + read[1], dtype=object),
            "bias": lambda step, read: read[0] + _at(step).reshape(step.shape),
            "concat": lambda step, read: np.concatenate(read, step.settings["axis"] - 1),
            "relu": lambda step, read: read[0],
            "cast": lambda step, read: read[0],
            "reshape": lambda step, read: _moved(step, read[0]),
            "transpose": lambda step, read: _moved(step, read[0]),
        }

    def run(self) -> list[Symbols]:
        values: list[Symbols] = []
        for step in self.program.steps:
            if step.op == "input":
                values.append(_fresh(step))
                continue
            if step.op not in self.kinds:
                raise LowbitError(
                    f"'{step.name}' is a {step.op}, which has no Verilog here; leave it out, for the order "
                    "of the classes is that of the logits"
                )
            values.append(self._finished(step, self.kinds[step.op](step, self._read(step, values))))
        return values

    def _read(self, step: Step, values: Sequence[Symbols]) -> list[Symbols]:
        """What a step reads, as fine as its result; sums of products are aligned when they are made."""
        fractions = [self.program.steps[i].type.fraction for i in step.inputs]
        align = step.op in ("add", "bias", "concat", "clamp")
        shifts = [step.fraction - f if align else 0 for f in fractions]
        return [values[i] * 2**n for i, n in zip(step.inputs, shifts, strict=True)]

    def _finished(self, step: Step, exact: Symbols) -> Symbols:
        """Cast to the type of the step.

        Rounding goes before a ReLU: it is monotone and keeps 0, so the result is the same, and its half joins
        the bias of the layer before in one addition.
        """
        rectify = step.op == "relu"
        if not step.rounds:
            return _each(exact, lambda s: s.relu()) if rectify else exact
        return _each(exact, lambda s: _cast(s, step.fraction - step.type.fraction, step.type, rectify))

    # --- layers

    def _dense(self, step: Step, read: list[Symbols]) -> Symbols:
        assert step.weight is not None
        rows = read[0].reshape(-1, read[0].shape[-1])
        weight = step.weight.codes.numpy()
        return self._with_bias(step, np.stack([self._product(row, weight) for row in rows]))

    def _conv(self, step: Step, read: list[Symbols]) -> Symbols:
        assert step.weight is not None
        weight, groups = step.weight.codes.numpy(), step.settings["groups"]
        dims = len(step.shape) - 1
        found = _windows(read[0], step.settings)
        # [positions, groups, inputs of a group * kernel]
        patches = np.moveaxis(found, 0, dims).reshape(-1, groups, weight[0].size)
        split = weight.reshape(groups, -1, weight[0].size)
        sums = [np.concatenate([self._product(p[g], split[g]) for g in range(groups)]) for p in patches]
        return np.moveaxis(self._with_bias(step, np.stack(sums)), -1, 0)

    def _with_bias(self, step: Step, sums: Symbols) -> Symbols:
        """Sums [positions, out] plus the bias, as [*positions, out] of the step."""
        if step.bias is not None:
            sums = sums + _at(step)
        positions = step.shape[1:] if step.op == "conv" else step.shape[:-1]
        return sums.reshape(*positions, -1)

    def _product(self, vector: Symbols, weight: NDArray[np.int64]) -> Symbols:
        """[out] = weight [out, in] times vector [in]; what is constant costs nothing."""
        constant = np.array([s.low == s.high for s in vector])
        known = np.array(
            [int(s.low) if c else 0 for s, c in zip(vector, constant, strict=True)], dtype=object
        )
        result = np.array([_constant(int(n)) for n in weight.astype(object) @ known], dtype=object)
        columns, rows = ~constant & weight.any(0), (weight * ~constant).any(1)
        if not rows.any():
            return result
        inputs = vector[columns]
        sums = self._solution(inputs, weight[np.ix_(rows, columns)])(inputs)
        result[rows] = [s + int(c.low) for s, c in zip(sums, result[rows], strict=True)]
        return result

    def _solution(self, inputs: Symbols, weight: NDArray[np.int64]) -> Any:
        from da4ml.cmvm import solve

        intervals, latencies = [tuple(s.qint) for s in inputs], [float(s.latency) for s in inputs]
        key = (weight.tobytes(), weight.shape, tuple(intervals), tuple(latencies))
        if key not in self.solved:
            matrix = np.ascontiguousarray(weight.T.astype(np.float32))
            options = {"adder_size": HARDWARE[0], "carry_size": HARDWARE[1], "hard_dc": EXTRA_DEPTH}
            self.solved[key] = solve(matrix, qintervals=intervals, latencies=latencies, **options)
        return self.solved[key]

    # --- the rest

    def _clamp(self, step: Step, read: list[Symbols]) -> Symbols:
        low, high = step.settings["codes"]
        return _each(read[0], lambda s: _clipped(s, low, high))

    def _max_pool(self, step: Step, read: list[Symbols]) -> Symbols:
        return _reduced(step, read[0], lambda a, b: a.max_of(b))

    def _average_pool(self, step: Step, read: list[Symbols]) -> Symbols:
        sums, count = _reduced(step, read[0], lambda a, b: a + b), step.settings["count"]
        if count & (count - 1) == 0:
            return sums
        return _each(sums * 2 ** step.settings["finer"], lambda s: self._divided(step, s, count))

    def _divided(self, step: Step, symbol: Symbol, count: int) -> Symbol:
        """floor(symbol / count), by the product with a reciprocal that is exact for so many bits.

        With 0 <= n < 2^N and m = ceil(2^k / d), k = N + ceil(log2 d): floor(n / d) = floor(n m / 2^k)
        (Granlund and Montgomery 1994).
        """
        below = -(min(int(symbol.low), 0) // count)
        raised = symbol + below * count
        bits = int(raised.high).bit_length()
        k = bits + (count - 1).bit_length()
        factor = -(-(1 << k) // count)
        if factor.bit_length() > MAX_WEIGHT or bits + factor.bit_length() > MAX_SUM:
            raise LowbitError(
                f"'{step.name}' divides sums of {bits} bits by {count}, which takes more than {MAX_SUM} "
                "bits; average over 2, 4, 8, ... values, or use fewer bits"
            )
        (product,) = self._product(_array([raised]), np.array([[factor]]))
        return _floor(product, k) - below


# --- arrays of symbols


def _fresh(step: Step) -> Symbols:
    from da4ml.trace import FixedVariable

    kind = step.type
    made = [FixedVariable(kind.qmin, kind.qmax, 1, hwconf=HARDWARE) for _ in range(math.prod(step.shape))]
    return _array(made).reshape(step.shape)


def _at(step: Step) -> NDArray[Any]:
    """Codes of a bias, as fine as the result of its step."""
    assert step.bias is not None
    return (step.bias.codes << step.fraction - step.bias.type.fraction).numpy().astype(object)


def _array(symbols: Sequence[Symbol]) -> Symbols:
    made = np.empty(len(symbols), dtype=object)
    made[:] = symbols
    return made


def _each(symbols: Symbols, function: Callable[[Symbol], Symbol]) -> Symbols:
    return _array([function(s) for s in symbols.ravel()]).reshape(symbols.shape)


def _constant(value: int) -> Symbol:
    from da4ml.trace import FixedVariable, HWConfig

    return FixedVariable.from_const(value, hwconf=HWConfig(*HARDWARE))


def _numbers(symbols: Symbols) -> Tensor:
    """Each number's place, counted from 1, as a batch of one: what moves these moves the symbols."""
    return torch.arange(1, symbols.size + 1).reshape(1, *symbols.shape)


def _moved(step: Step, symbols: Symbols) -> Symbols:
    places = OPERATIONS[step.op].run(step, [(_numbers(symbols), 0)])[0]
    return symbols.ravel()[places.numpy() - 1]


def _windows(symbols: Symbols, settings: dict[str, Any]) -> Symbols:
    """[channels, ...positions, ...kernel] of [channels, ...size]; padded by code 0."""
    padded = _array([_constant(0), *symbols.ravel()])
    return padded[windows(_numbers(symbols), settings)[0].numpy()]


def _reduced(step: Step, symbols: Symbols, join: Callable[[Symbol, Symbol], Symbol]) -> Symbols:
    """Each window joined in a balanced tree."""
    found = _windows(symbols, step.settings).reshape(math.prod(step.shape), -1)
    return _array([_tree(list(row), join) for row in found]).reshape(step.shape)


def _tree(symbols: list[Symbol], join: Callable[[Symbol, Symbol], Symbol]) -> Symbol:
    while len(symbols) > 1:
        pairs = [join(a, b) for a, b in zip(symbols[::2], symbols[1::2], strict=False)]
        symbols = pairs + symbols[2 * len(pairs) :]
    return symbols[0]


# --- casts of one symbol


def _cast(symbol: Symbol, shift: int, to: FixedPoint, rectify: bool) -> Symbol:
    """`lowbit.core.fixed.cast` of a number with so many more bits behind the point than the type has."""
    if symbol.low == symbol.high:
        return _cast_constant(max(symbol.low, 0) if rectify else symbol.low, shift + to.fraction, to)
    symbol = symbol * 2**-shift if shift <= 0 else _shifted_right(symbol, shift, to.rounding)
    if rectify:
        symbol = symbol.relu()
    return _wrapped(symbol, to) if to.overflow == "wrap" else _saturated(symbol, to)


def _cast_constant(value: Any, fraction: int, to: FixedPoint) -> Symbol:
    return _constant(int(cast(torch.tensor([int(value)]), fraction, to)))


def _shifted_right(symbol: Symbol, shift: int, rounding: str) -> Symbol:
    if symbol.step >= 2**shift or rounding == "floor":
        return _floor(symbol, shift)
    raised = symbol + 2 ** (shift - 1)
    rounded = _floor(raised, shift)
    if rounding == "half_up":
        return rounded
    # a tie has left no bits behind the point, and goes down to the even number below it
    rest = raised.quantize(0, shift, 0).unary_bit_op("any")
    return rest.msb_mux(rounded, _floor(raised, shift + 1) * 2)


def _floor(symbol: Symbol, shift: int) -> Symbol:
    """symbol * 2^-shift, rounded down: lower bits are dropped."""
    signed, integer, _ = symbol.kif
    # what is negative keeps a bit, for it rounds down to -1 at most
    return symbol.quantize(signed, max(integer, shift) if signed else integer, -shift) * 2.0**-shift


def _wrapped(symbol: Symbol, to: FixedPoint) -> Symbol:
    if symbol.low == symbol.high:
        return _cast_constant(symbol.low, to.fraction, to)
    integer = to.width - to.signed
    if symbol.low < 0 and not to.signed and integer > symbol.kif[1]:
        # da4ml takes no more bits than there are, and the sign has to fill them
        symbol = symbol.msb_mux(symbol + 2**to.width, symbol)
    return symbol.quantize(int(to.signed), integer, 0)


def _clipped(symbol: Symbol, low: int, high: int) -> Symbol:
    return symbol.max_of(low).min_of(high)


def _saturated(symbol: Symbol, to: FixedPoint) -> Symbol:
    """To the ends of a type where bits above its own say so, which takes no comparing adder."""
    if not to.signed:
        symbol = symbol.max_of(0)
    if to.qmin <= symbol.low and symbol.high <= to.qmax:
        return symbol
    bits = to.width - to.signed
    if to.narrow or symbol.step > 2**bits:
        return _clipped(symbol, to.qmin, to.qmax)
    signed, integer, _ = symbol.kif
    above = symbol.quantize(signed, max(integer, bits), -bits)
    body, limit = symbol.quantize(int(to.signed), bits, 0), to.qmax
    if signed:
        # bits above that are like the sign are no overflow
        above, limit = above.msb_mux(~above, above), above.msb_mux(to.qmin, to.qmax)
    # inverted, else da4ml looks through a single bit, and its emulator misreads unsigned keys of more bits
    fits = ~above.unary_bit_op("any")
    return fits.msb_mux(body, limit, qint=(to.qmin, to.qmax, 1))

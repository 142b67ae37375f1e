"""Fixed point: whole numbers of a power of two, their names in hardware, and arithmetic that only shifts.

A type of W bits, I of them before the point, has codes c in two's complement, or from 0 up, and real =
c 2^-F with F = W - I. I may be negative or above W. As everywhere here I counts the sign, as `ap_fixed` does.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.core.affine import check_finite, round_codes, wrapped
from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError

__all__ = [
    "MAX_WIDTH",
    "FixedPoint",
    "Overflow",
    "Rounding",
    "align",
    "cast",
    "exponent_of",
    "fixed",
    "from_real",
    "outside",
    "to_real",
]

Rounding = Literal["half_even", "half_up", "floor"]
Overflow = Literal["saturate", "wrap"]
MAX_WIDTH = 62
_ROUNDING: dict[str, Rounding] = {"RND_CONV": "half_even", "RND": "half_up", "TRN": "floor"}
_OVERFLOW: dict[str, tuple[Overflow, bool]] = {
    "SAT": ("saturate", False),
    "SAT_SYM": ("saturate", True),
    "WRAP": ("wrap", False),
}
_NAME = re.compile(r"(?:ap_)?(u?)fixed<([^<>]*)>")


@dataclass(frozen=True)
class FixedPoint:
    """A fixed-point type: what values it has, and how others become one of them.

    Invariant: a code lies in [qmin, qmax] and stands for code * 2^-fraction.
    """

    # bits, the sign among them
    width: int
    # of these before the point; may be negative, or more than there are
    integer: int
    signed: bool = True
    rounding: Rounding = "floor"
    overflow: Overflow = "wrap"
    # without the code -2^(width-1)
    narrow: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("width", "integer"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise LowbitError(f"{name}={getattr(self, name)!r} is not a whole number")
        if not 1 <= self.width <= MAX_WIDTH:
            raise LowbitError(f"width={self.width} is not from 1 to {MAX_WIDTH} bits")
        choices: dict[str, tuple[str, ...]] = {
            "rounding": tuple(_ROUNDING.values()),
            "overflow": ("saturate", "wrap"),
        }
        for name, allowed in choices.items():
            if str(getattr(self, name)) not in allowed:
                raise LowbitError(
                    f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}"
                )
        if self.narrow and (self.overflow == "wrap" or not self.signed):
            raise LowbitError("narrow=True drops the lowest code, so it is for signed types that saturate")

    @property
    def fraction(self) -> int:
        """Bits behind the point."""
        return self.width - self.integer

    @property
    def scale(self) -> float:
        """What a step is worth."""
        return math.ldexp(1.0, -self.fraction)

    @property
    def qmin(self) -> int:
        return -(1 << self.width - 1) + int(self.narrow) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << self.width - int(self.signed)) - 1

    def __str__(self) -> str:
        """As `ap_fixed` writes it, such as `fixed<8,3,RND_CONV,SAT>`; without its own modes, TRN and WRAP."""
        name = f"{'' if self.signed else 'u'}fixed<{self.width},{self.integer}"
        if self.rounding == "floor" and self.overflow == "wrap":
            return f"{name}>"
        rounding = next(word for word, mode in _ROUNDING.items() if mode == self.rounding)
        overflow = next(w for w, mode in _OVERFLOW.items() if mode == (self.overflow, self.narrow))
        return f"{name},{rounding},{overflow}>"

    @classmethod
    def parse(cls, text: str) -> FixedPoint:
        """From the name that `str` gives; a leading `ap_` and blanks are let pass.

        Raises:
            LowbitError: not the name of such a type.
        """
        found = _NAME.fullmatch(text.replace(" ", ""))
        parts = found[2].split(",") if found else []
        if found is None or not 2 <= len(parts) <= 4 or not all(_is_whole(p) for p in parts[:2]):
            raise LowbitError(
                f"'{text}' is no fixed-point type; write fixed<8,3> or ufixed<8,3,RND_CONV,SAT>"
            )
        words = (*parts[2:], *("TRN", "WRAP")[len(parts) - 2 :])
        for word, known in zip(words, (tuple(_ROUNDING), tuple(_OVERFLOW)), strict=True):
            if word not in known:
                raise LowbitError(f"'{text}': {word} is none of {', '.join(known)}")
        overflow, narrow = _OVERFLOW[words[1]]
        return cls(int(parts[0]), int(parts[1]), not found[1], _ROUNDING[words[0]], overflow, narrow)

    @property
    def spec(self) -> QuantSpec:
        """How a quantizer rounds to it; the place of the point is the scale.

        Raises:
            LowbitError: a width that a spec does not have, such as 17 bits, or one signed bit.
        """
        return QuantSpec(
            bits=self.width,
            signed=self.signed,
            narrow=self.narrow,
            scale="pow2",
            rounding=self.rounding,
            overflow=self.overflow,
        )

    @classmethod
    def of(cls, spec: QuantSpec, scale: Tensor | float) -> FixedPoint:
        """The type of the codes of a spec, of which one is worth `scale`.

        Raises:
            LowbitError: a scale that is no power of two, several different ones, a zero point, odd codes.
        """
        if spec.kind != "int" or not spec.symmetric or spec.mid_rise or spec.split:
            raise LowbitError(
                f"{spec} is not fixed point, which has whole codes and no zero point; use QuantSpec(bits="
                f"{spec.bits}, scale='pow2'), or a recipe such as 'fixed{spec.bits}'"
            )
        exponent = exponent_of(scale)
        return cls(spec.bits, spec.bits + exponent, spec.signed, spec.rounding, spec.overflow, spec.narrow)

    @classmethod
    def holding(cls, low: int, high: int, fraction: int) -> FixedPoint:
        """The narrowest type whose codes are those from `low` to `high`, so many bits behind the point.

        Raises:
            LowbitError: no type of 62 bits does.
        """
        signed = low < 0
        width = max(1, max(max(high, 0).bit_length(), (-low - 1).bit_length() if signed else 0) + int(signed))
        if width > MAX_WIDTH:
            raise LowbitError(f"sums from {low} to {high} take {width} bits; use fewer bits, or fewer inputs")
        return cls(width, width - fraction, signed)

    @classmethod
    def widest(cls, fraction: int, rounding: Rounding = "half_even") -> FixedPoint:
        """The widest type with so many bits behind the point: it rounds, and in practice clips nothing."""
        return cls(MAX_WIDTH, MAX_WIDTH - fraction, True, rounding, "saturate")


def fixed(
    width: int,
    integer: int,
    signed: bool = True,
    rounding: Rounding = "half_even",
    overflow: Literal["saturate", "saturate_symmetric", "wrap"] = "saturate",
) -> FixedPoint:
    """The type `fixed<width, integer>`, or `ufixed` of it: scale 2^(integer - width).

    Args:
        rounding: "half_even" is RND_CONV, "half_up" RND, "floor" TRN.
        overflow: "saturate" is SAT, "saturate_symmetric" SAT_SYM, "wrap" WRAP.

    Raises:
        LowbitError: a width that is not from 1 to 62, or an unknown mode.
    """
    narrow = overflow == "saturate_symmetric"
    return FixedPoint(width, integer, signed, rounding, "saturate" if narrow else overflow, narrow)  # type: ignore[arg-type]


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def exponent_of(scale: Tensor | float) -> int:
    """e of a scale 2^e, one for a whole tensor.

    Raises:
        LowbitError: it is no power of two, or there are several.
    """
    values = torch.as_tensor(scale, dtype=torch.float64).detach().flatten()
    if not len(values) or not bool((values == values[0]).all()):
        raise LowbitError(f"{len(values)} scales, and hardware has one type for a tensor; use PerTensor()")
    mantissa, exponent = math.frexp(float(values[0]))
    if mantissa != 0.5:
        raise LowbitError(
            f"scale {float(values[0]):g} is not a power of two, so it is no shift; quantize with a recipe "
            "such as lowbit.preset('fixed8'), whose specs have scale='pow2'"
        )
    return exponent - 1


def align(codes: Tensor, shift: int) -> Tensor:
    """codes * 2^shift, exactly, of int64 codes; shift >= 0."""
    return codes << shift


def cast(codes: Tensor, fraction: int, to: FixedPoint) -> Tensor:
    """int64 codes with so many bits behind the point as codes of another type, by shifts and comparisons."""
    shift = fraction - to.fraction
    if shift > 0:
        codes = _shift_right(codes, min(shift, MAX_WIDTH), to.rounding)
    elif to.overflow == "wrap":
        codes = align(codes, -shift)
    else:  # no further than 64 bits go
        shift = min(-shift, MAX_WIDTH)
        codes = align(codes.clamp(-(1 << MAX_WIDTH - shift), 1 << MAX_WIDTH - shift), shift)
    return wrapped(codes, to.qmin, to.width) if to.overflow == "wrap" else codes.clamp(to.qmin, to.qmax)


def outside(codes: Tensor, fraction: int, to: FixedPoint) -> Tensor:
    """Which values, once they are rounded, a type cannot hold."""
    rounded = cast(codes, fraction, FixedPoint.widest(to.fraction, to.rounding))
    return (rounded < to.qmin) | (rounded > to.qmax)


def _shift_right(codes: Tensor, shift: int, rounding: Rounding) -> Tensor:
    below = codes >> shift
    if rounding == "floor":
        return below
    rest, half = codes - (below << shift), 1 << shift - 1
    up = rest >= half if rounding == "half_up" else (rest > half) | ((rest == half) & (below & 1 == 1))
    return below + up.long()


def from_real(x: Tensor, to: FixedPoint, *, clip: bool = True) -> Tensor:
    """int64 codes of floating point numbers: the one place where hardware meets them.

    Args:
        clip: else what the type has no code for is left as it is.

    Raises:
        LowbitError: NaN; infinity, where it cannot saturate.
    """
    if torch.isnan(x).any() or to.overflow == "wrap":
        check_finite(x)
    codes = round_codes(x.double() * math.ldexp(1.0, to.fraction), to.rounding)
    if not clip:
        return codes.clamp(-(2.0**62), 2.0**62).long()
    if to.overflow == "wrap":
        return wrapped(codes, to.qmin, to.width).long()
    return codes.clamp(to.qmin, to.qmax).long()


def to_real(codes: Tensor, fraction: int) -> Tensor:
    """codes * 2^-fraction as float64, exact up to 53 bits."""
    return codes.double() * math.ldexp(1.0, -fraction)

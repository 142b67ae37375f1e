"""How numbers look: `QuantSpec` and the granularity of its scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit.errors import LowbitError, expect

__all__ = [
    "BINARY",
    "DYNAMIC8",
    "FP16",
    "INT4",
    "INT8",
    "TERNARY",
    "UINT8",
    "Granularity",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QuantSpec",
]


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: scale shape [1, ..., 1]."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of that shape."""
        return (1,) * len(shape)

    def __str__(self) -> str:
        """As specs are shown."""
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of `axis`: scale shape [1, ..., shape[axis], ..., 1]."""

    axis: int = 0

    def __post_init__(self) -> None:
        """Check the axis."""
        _check_whole("axis", self.axis)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of that shape."""
        axis = _positive_axis(self.axis, shape)
        return tuple(n if d == axis else 1 for d, n in enumerate(shape))

    def __str__(self) -> str:
        """As specs are shown."""
        return "channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of `size` indices of `axis`, separately for each index of axis 0."""

    axis: int = 1
    size: int = 32

    def __post_init__(self) -> None:
        """Check the axis and the size."""
        _check_whole("axis", self.axis)
        _check_whole("group size", self.size)
        if self.size < 1:
            raise LowbitError(f"group size {self.size} is not positive; use 32, 64 or 128")

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of that shape; an error where the size does not divide the axis."""
        axis = _positive_axis(self.axis, shape)
        length = shape[axis]
        if length % self.size:
            fits = [n for n in range(1, length + 1) if length % n == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - self.size))[:2], reverse=True)
            cure = " or ".join(str(n) for n in near)
            raise LowbitError(
                f"group size {self.size} does not divide the {length} entries of axis {axis} "
                f"of a tensor of shape {list(shape)}; use {cure}"
            )
        return tuple(length // self.size if d == axis else n if d == 0 else 1 for d, n in enumerate(shape))

    def __str__(self) -> str:
        """As specs are shown."""
        return f"group{self.size}"


@dataclass(frozen=True)
class PerToken:
    """One scale for each vector along the last axis: scale shape [shape[0], ..., shape[-2], 1].

    How many there are changes from call to call, so that only ranges found at run time have it.
    """

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of that shape."""
        return (*shape[:-1], 1)[: len(shape)]

    def __str__(self) -> str:
        """As specs are shown."""
        return "token"


Granularity = PerTensor | PerChannel | PerGroup | PerToken
_GRANULARITIES = {"tensor": PerTensor, "channel": PerChannel, "group": PerGroup, "token": PerToken}


def _check_whole(what: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise LowbitError(f"{what} {value!r} is not a whole number; write one without quotes or a point")


def _positive_axis(axis: int, shape: Sequence[int]) -> int:
    if not -len(shape) <= axis < len(shape):
        raise LowbitError(f"axis {axis} does not exist in a tensor of shape {list(shape)}")
    return axis % len(shape)


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How the numbers of one tensor look; all that exporters, cost and reports need to know.

    Invariant: a code lies in [qmin, qmax] and stands for (code - zero_point) * scale.
    """

    # width of one code; 1..16
    bits: int
    # "int": affine integer codes; "float": IEEE half precision, for which bits is 16
    kind: Literal["int", "float"] = "int"
    # two's complement codes, or codes from 0 up
    signed: bool = True
    # symmetric <=> there is no zero point
    symmetric: bool = True
    # which elements share a scale
    granularity: Granularity = PerTensor()
    # drop the code -2^(bits-1), so that the codes are symmetric about 0
    narrow: bool = False
    # codes are odd, ..., -3, -1, 1, 3, ...: none stands for zero, and as many are negative as positive (a
    # mid-rise quantizer; Widrow, Kollar 2008, section 1.3). With one bit that is the sign
    mid_rise: bool = False
    # negative codes have a scale of their own: ternary ones alone, -a, 0 and b (Zhu et al. 2017)
    split: bool = False
    # "pow2" <=> the scale is a power of two: a shift in hardware
    scale: Literal["float", "pow2"] = "float"
    # to the nearest code, ties to the even one or up; or to the next code below
    rounding: Literal["half_even", "half_up", "floor"] = "half_even"
    # what becomes of values beyond the outermost codes: they take those, or lose their upper bits
    overflow: Literal["saturate", "wrap"] = "saturate"
    # the range is not calibrated: every tensor, or every token, has its own, found as the network runs
    dynamic: bool = False

    def __post_init__(self) -> None:
        """Check every field, and that they go together."""
        if isinstance(self.bits, bool) or not (isinstance(self.bits, int) and 1 <= self.bits <= 16):
            raise LowbitError(f"bits={self.bits!r} is not a whole number from 1 to 16")
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                choices = ", ".join(str(choice) for choice in allowed)
                raise LowbitError(f"{field}={getattr(self, field)!r} is unknown; use one of {choices}")
        if not isinstance(self.granularity, Granularity):
            raise LowbitError(
                f"granularity={self.granularity!r} is unknown; use PerTensor, PerChannel, PerGroup or "
                "PerToken"
            )
        if self.kind == "float":
            if self.bits != 16:
                raise LowbitError(f"kind='float' has 16 bits, not {self.bits}; use FP16, or kind='int'")
            if self.dynamic or isinstance(self.granularity, PerToken):
                raise LowbitError("kind='float' has no scale; leave dynamic and PerToken() out")
            return
        self._check_dynamic()
        if self.overflow == "wrap" and (self.narrow or self.mid_rise or not self.symmetric):
            raise LowbitError(
                "overflow='wrap' drops the upper bits of a code: narrow, mid_rise and a zero point do not go "
                "with it"
            )
        if self.split and not self.is_ternary:
            raise LowbitError("split=True gives each sign of ternary codes a scale; use bits=2, narrow=True")
        if self.mid_rise:
            self._check_mid_rise()
            return
        if self.narrow and not self.signed:
            raise LowbitError(
                "narrow=True drops -2^(bits-1), which unsigned codes do not have; use signed=True"
            )
        if self.bits == 1 and self.signed and (self.symmetric or self.narrow):
            raise LowbitError(
                "1-bit signed symmetric codes are {-1, 0}: no positive value exists; "
                "use signed=False, symmetric=False with narrow=False, or mid_rise=True for {-1, 1}"
            )

    def _check_dynamic(self) -> None:
        if not self.dynamic:
            if isinstance(self.granularity, PerToken):
                raise LowbitError("tokens differ from call to call; PerToken() goes with dynamic=True")
            return
        if not isinstance(self.granularity, PerTensor | PerToken):
            raise LowbitError(
                f"dynamic=True finds a range for a tensor or a token, not for each {self.granularity}; use "
                "PerToken() or PerTensor()"
            )
        if self.mid_rise or self.split or self.scale != "float" or not self.is_standard or self.bits > 8:
            raise LowbitError(
                "dynamic=True is for plain codes of at most 8 bits; leave mid_rise, split, scale, rounding "
                "and overflow at their defaults"
            )

    def _check_mid_rise(self) -> None:
        if not self.signed or not self.symmetric or self.narrow or self.rounding != "half_even":
            raise LowbitError(
                "mid_rise=True has codes symmetric about 0 and no ties; leave signed, symmetric, narrow and "
                "rounding at their defaults"
            )
        if self.bits > 7:
            raise LowbitError(
                f"mid_rise=True with bits={self.bits}: odd codes of 7 bits fill a byte; use fewer"
            )

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if self.mid_rise:
            return -self.qmax
        return -(1 << self.bits >> 1) + int(self.narrow) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.mid_rise:
            return (1 << self.bits) - 1
        return (1 << self.bits - int(self.signed)) - 1

    @property
    def is_binary(self) -> bool:
        """Whether codes are -1 and 1."""
        return self.kind == "int" and self.bits == 1 and self.mid_rise

    @property
    def is_ternary(self) -> bool:
        """Whether codes are -1, 0 and 1."""
        return self.kind == "int" and self.symmetric and self.narrow and self.bits == 2

    @property
    def is_standard(self) -> bool:
        """Whether it rounds half to even and saturates, as everything but hardware does."""
        return self.rounding == "half_even" and self.overflow == "saturate"

    @property
    def step(self) -> int:
        """Distance from a code to the next."""
        return 2 if self.mid_rise else 1

    @property
    def code_bits(self) -> int:
        """Width of the codes as integers of an arithmetic unit; odd ones need a bit that is not stored."""
        return self.bits + int(self.mid_rise)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest torch dtype that holds every code."""
        if self.kind == "float":
            return torch.float16
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed or self.bits < 16 else torch.int32

    def at(self, bits: int) -> QuantSpec:
        """The spec at another width, in plain codes: neither odd nor with a scale for each sign."""
        return self if bits == self.bits else replace(self, bits=bits, mid_rise=False, split=False)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of that shape; it has the same rank.

        Raises:
            LowbitError: an axis that does not exist, or a group size that does not divide its axis.
        """
        return self.granularity.scale_shape(shape)

    def __str__(self) -> str:
        """As tables show it, such as `uint8+zp/tensor`."""
        if self.kind == "float":
            return "fp16"
        sign, zero_point = "" if self.signed else "u", "" if self.symmetric else "+zp"
        scale = "/pow2" if self.scale == "pow2" else ""
        if self.is_binary or self.is_ternary:
            name = "binary" if self.is_binary else "ternary"
            return f"{name}/{self.granularity}{'/split' if self.split else ''}{scale}"
        rise, found = "/mid-rise" if self.mid_rise else "", "/dynamic" if self.dynamic else ""
        return f"{sign}int{self.bits}{zero_point}/{self.granularity}{rise}{scale}{found}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, equal after `from_dict`."""
        name = next(n for n, cls in _GRANULARITIES.items() if type(self.granularity) is cls)
        return asdict(self) | {"granularity": {"per": name, **asdict(self.granularity)}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantSpec:
        """Inverse of `to_dict`; the granularity may also be written as its name alone.

        Raises:
            LowbitError: a field that is unknown, missing or wrong.
        """
        expect(data, dict, f"spec {data!r}", "write it as a mapping such as {bits: 4, granularity: channel}")
        fields = dict(data)
        where = fields.pop("granularity", "tensor")
        where = {"per": where} if isinstance(where, str) else where
        expect(where, dict, f"granularity {where!r}", f"use one of {', '.join(_GRANULARITIES)}")
        where = dict(where)
        per = where.pop("per", None)
        if not isinstance(per, str) or per not in _GRANULARITIES:
            raise LowbitError(f"granularity {per!r} is unknown; use one of {', '.join(_GRANULARITIES)}")
        try:
            return cls(granularity=_GRANULARITIES[per](**where), **fields)
        except TypeError as error:
            raise LowbitError(f"not a quantization spec: {error}") from None


_CHOICES: dict[str, tuple[object, ...]] = {
    "kind": ("int", "float"),
    "signed": (True, False),
    "symmetric": (True, False),
    "narrow": (True, False),
    "mid_rise": (True, False),
    "split": (True, False),
    "scale": ("float", "pow2"),
    "rounding": ("half_even", "half_up", "floor"),
    "overflow": ("saturate", "wrap"),
    "dynamic": (True, False),
}

INT8 = QuantSpec(bits=8, granularity=PerChannel(0))
"""Weights: signed, symmetric, one scale per output channel."""
INT4 = QuantSpec(bits=4, granularity=PerChannel(0))
"""Weights in four bits: signed, symmetric, one scale per output channel."""
UINT8 = QuantSpec(bits=8, signed=False, symmetric=False)
"""Activations: unsigned with a zero point, one scale per tensor."""
DYNAMIC8 = QuantSpec(bits=8, signed=False, symmetric=False, granularity=PerToken(), dynamic=True)
"""Inputs of linear layers: unsigned with a zero point, each token by its own range."""
BINARY = QuantSpec(bits=1, mid_rise=True, granularity=PerChannel(0))
"""Weights of -1 and 1 times one scale per output channel; zero counts as positive."""
TERNARY = QuantSpec(bits=2, narrow=True, granularity=PerChannel(0))
"""Weights of -1, 0 and 1 times one scale per output channel."""
FP16 = QuantSpec(bits=16, kind="float")
"""IEEE half precision; no scale."""


def expand_to(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat a per-group `scale` so that it broadcasts against a tensor of `shape`; others pass through."""
    for d, (have, want) in enumerate(zip(scale.shape, shape, strict=True)):
        if have not in (1, want):
            scale = scale.repeat_interleave(want // have, dim=d)
    return scale

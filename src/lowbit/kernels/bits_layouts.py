"""Bits in memory: activations as 64-bit words, and weights as the panels that a kernel reads.

A word holds 64 neighbouring channels of one group, channel c in bit c % 64; what is left of the last word is
0. A weight is kept as `negative`, the bits where it is -1, and where some are 0 also `positive`, those where
it is 1. A panel holds them for 8, 16 or 32 outputs side by side, so that a vector of the processor meets one
activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import LowbitError

__all__ = [
    "PackedInput",
    "PackedWeight",
    "pack_weight",
    "unpack_input",
    "unpack_weight",
]

Kind = Literal["sign", "unsigned", "signed"]
WORD = 64
# bytes of one output that are neighbours in a panel -> outputs of a panel
LANES = {1: 32, 4: 16, 8: 8}
# of panels for float activations, whatever the processor
FLOAT_UNIT = 4
LIMIT = 2**31


@dataclass(frozen=True, kw_only=True)
class PackedInput:
    """Activations, one bit or a code of a few bits each.

    words: int64 [..., planes * groups * words of a group], planes of a code from the lowest bit on; the
    leading extents are those of rows of a matrix, or [N, H, W] of images.
    """

    words: Tensor
    # of all groups
    channels: int
    # "sign": -1 where the bit is 0 and 1 where it is 1; "unsigned" and "signed": codes of `bits` bits
    kind: Kind
    bits: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        """Refuse words that a kernel would read past."""
        row = self.bits * self.groups * words_of(self.channels // self.groups)
        if self.words.dtype is not torch.int64 or self.words.ndim < 2 or self.words.shape[-1] != row:
            raise LowbitError(
                f"words of {self.words.dtype} and shape {tuple(self.words.shape)} for {self.bits} bits of "
                f"{self.channels} channels in {self.groups} groups; give torch.int64 of shape [..., {row}]"
            )

    @property
    def largest(self) -> int:
        """The largest magnitude a code can have."""
        if self.kind == "sign":
            return 1
        return 2 ** (self.bits - 1) if self.kind == "signed" else 2**self.bits - 1

    @property
    def factors(self) -> list[int]:
        """What a bit of each plane is worth."""
        worth = [2**i for i in range(self.bits)]
        return [2] if self.kind == "sign" else worth[:-1] + [-worth[-1]] if self.kind == "signed" else worth


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """Binary or ternary weights, packed once by `pack_weight`."""

    # [groups, panels, steps, planes, outputs of a panel, bytes], uint8
    panels: Tensor
    # that of the codes: [out, in / groups] or [out, in / groups, kernel height, kernel width]
    shape: tuple[int, ...]
    groups: int
    # bytes of one output that are neighbours: 8 and 1 for bits, 4 for floats
    unit: int
    # int32 [out]: weights of each output that are -1, and that are not 0
    negative: Tensor
    nonzero: Tensor
    # int32 [taps, out]: sum of the weights of each tap
    tap_sums: Tensor

    @property
    def ternary(self) -> bool:
        """Are some weights 0?"""
        return self.panels.shape[3] == 2

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width; (1, 1) for a matrix."""
        return (self.shape[2], self.shape[3]) if len(self.shape) == 4 else (1, 1)

    @property
    def depth(self) -> int:
        """Products in one sum."""
        return self.shape[1] * self.kernel[0] * self.kernel[1]


def words_of(channels: int) -> int:
    """Words that hold as many bits."""
    return (channels + WORD - 1) // WORD


def to_bytes(bits: Tensor) -> Tensor:
    """bool [..., 8 n] as uint8 [..., n], lowest bit first."""
    worth = 2 ** torch.arange(8, dtype=torch.uint8)
    return (torch.unflatten(bits, -1, (-1, 8)) * worth).sum(-1, dtype=torch.uint8)


def to_bits(data: Tensor) -> Tensor:
    """uint8 [..., n] as uint8 [..., 8 n] of 0 and 1."""
    return ((data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2)


def padded(t: Tensor, multiple: int) -> Tensor:
    """`t` with zeros after its last axis, up to a multiple."""
    return torch.nn.functional.pad(t, (0, -t.shape[-1] % multiple))


def to_words(bits: Tensor) -> Tensor:
    """bool [..., channels] as int64 [..., words]."""
    return to_bytes(padded(bits, WORD)).contiguous().view(torch.int64)


def from_words(words: Tensor, channels: int) -> Tensor:
    """int64 [..., words] as uint8 [..., channels] of 0 and 1."""
    return to_bits(words.contiguous().view(torch.uint8))[..., :channels]


def unpack_input(x: PackedInput) -> Tensor:
    """The codes, int32: [..., channels], and [N, C, H, W] for an image."""
    per_group = x.channels // x.groups
    planes = torch.unflatten(x.words, -1, (x.bits, x.groups, words_of(per_group)))
    bits = from_words(planes, per_group).flatten(-2).int()
    factors = torch.tensor(x.factors, dtype=torch.int32)
    codes = (bits * factors[:, None]).sum(-2, dtype=torch.int32)
    if x.kind == "sign":
        codes = codes - 1
    return codes.permute(0, 3, 1, 2) if codes.ndim == 4 else codes


def _checked(codes: Tensor, groups: int) -> Tensor:
    """The codes as int8 [groups, out / groups, taps, in / groups]."""
    if codes.ndim not in (2, 4) or 0 in codes.shape:
        raise LowbitError(
            f"weights of shape {tuple(codes.shape)}; give [out, in] of a linear layer or [out, in / groups, "
            "height, width] of a convolution, none of them 0"
        )
    if groups < 1 or codes.shape[0] % groups:
        raise LowbitError(
            f"{groups} groups do not divide {codes.shape[0]} outputs; give a divisor of the outputs"
        )
    if codes.ndim == 2 and groups != 1:
        raise LowbitError(f"{groups} groups of a linear layer; give its weights as [out, in / groups, 1, 1]")
    if codes.device.type != "cpu":
        raise LowbitError(f"weights on '{codes.device}' meet kernels for the CPU; move them with .cpu()")
    small = codes.detach().to(torch.int8)
    if not torch.equal(small.to(codes.dtype), codes.detach()) or small.abs().amax() > 1:
        raise LowbitError("weights other than -1, 0 and 1; divide by the scale and round first")
    if small[0].numel() >= LIMIT:
        raise LowbitError(f"{small[0].numel()} weights of one output pass 2^31 - 1; split the layer")
    return small.reshape(groups, codes.shape[0] // groups, codes.shape[1], -1).transpose(2, 3)


def pack_weight(codes: Tensor, *, groups: int = 1, unit: int) -> PackedWeight:
    """Pack weights for kernels whose panels have `unit` bytes of an output side by side.

    Args:
        codes: -1, 0 and 1 in any type, [out, in] or [out, in / groups, kernel height, kernel width].
            Without a 0 they are binary and take half the room.
        groups: as in a convolution.
        unit: 8 or 1 for packed activations, 4 for floats.

    Raises:
        LowbitError: other values, a shape that is neither, or groups that do not divide the outputs.
    """
    ordered = _checked(codes, groups)
    if unit == FLOAT_UNIT:
        # the first of 32 weights in the highest bit, from where a kernel shifts one after the other out
        lined = torch.unflatten(padded(ordered.flatten(2), 32), -1, (-1, 32)).flip(-1).flatten(2)
    else:
        lined = padded(ordered, WORD).flatten(2)
    planes = [lined < 0] if bool(ordered.all()) else [lined < 0, lined > 0]
    lanes = LANES[unit]
    panels = []
    for plane in planes:
        data = to_bytes(plane)
        data = padded(data.transpose(1, 2), lanes).transpose(1, 2)
        panels.append(torch.unflatten(torch.unflatten(data, 2, (-1, unit)), 1, (-1, lanes)).transpose(2, 3))
    sums = ordered.sum(-1, dtype=torch.int32).flatten(0, 1)
    flat = ordered.flatten(2).flatten(0, 1)
    return PackedWeight(
        panels=torch.stack(panels, dim=3).contiguous(),
        shape=tuple(codes.shape),
        groups=groups,
        unit=unit,
        negative=(flat < 0).sum(-1, dtype=torch.int32),
        nonzero=(flat != 0).sum(-1, dtype=torch.int32),
        tap_sums=sums.T.contiguous(),
    )


def unpack_weight(w: PackedWeight) -> Tensor:
    """The codes, int8, in the shape they had."""
    outputs, taps = w.shape[0] // w.groups, w.kernel[0] * w.kernel[1]
    # [groups, planes, panels, outputs of a panel, steps, bytes] -> [planes, groups, outputs, bits]
    bits = to_bits(w.panels.permute(3, 0, 1, 4, 2, 5).flatten(4)).flatten(2, 3)[:, :, :outputs].to(torch.int8)
    if w.unit == FLOAT_UNIT:
        bits = torch.unflatten(bits, -1, (-1, 32)).flip(-1).flatten(3)[..., : w.depth]
        bits = torch.unflatten(bits, -1, (taps, -1))
    else:
        bits = torch.unflatten(bits, -1, (taps, -1))[..., : w.shape[1]]
    codes = bits[1] - bits[0] if w.ternary else 1 - 2 * bits[0]
    return codes.movedim(-1, 2).reshape(w.shape)

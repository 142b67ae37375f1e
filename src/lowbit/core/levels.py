"""Binary and ternary: where a weight turns from one code to the next, and what the codes are worth.

Codes are -1, (0,) 1 and stand for code * scale. A weight beyond the threshold d has the code of its sign, the
others 0; binary codes have no threshold, and 0 counts as positive. The squared error of a set of survivors,
those with a code, is least when the scale is their mean magnitude, and is then lower than the power of the
tensor by (sum of the survivors' magnitudes)^2 / (number of survivors).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.affine import MIN_SCALE, grouped, power_of_two
from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError

__all__ = ["Fit", "absmean", "given_threshold", "largest", "least_error", "ttq", "twn"]

TWN_FACTOR = 0.7
TTQ_FACTOR = 0.05


@dataclass(frozen=True)
class Fit:
    """What is chosen for a tensor; all in the shape of the scale, float32 but the zero point."""

    # of the codes; where the spec is split, of the positive ones
    scale: Tensor
    zero_point: Tensor | None = None
    # of ternary codes; None: half the scale, so that each element has the nearest level
    threshold: Tensor | None = None
    # of the negative codes, where the spec is split
    negative_scale: Tensor | None = None


def least_error(x: Tensor, spec: QuantSpec) -> Fit:
    """The levels of least squared error, exactly.

    Binary: mean |x| (Rastegari et al. 2016, "XNOR-Net", eq. 6). Ternary: of all k the k largest magnitudes
    with the largest (sum)^2 / k, found by sorting; their smallest lies above half their mean, so rounding to
    the nearest level finds the same survivors. Where the spec is split, each sign by itself. An all-zero
    tensor has the smallest scale there is; ternary codes are then 0, binary ones worth next to nothing.
    """
    if spec.split:
        signed = _rows(x, spec)
        positive, negative = (_shaped(_best_survivors((s * signed).clamp(min=0)), x, spec) for s in (1, -1))
        return Fit(positive, negative_scale=negative)
    rows = _rows(x, spec).abs()
    return Fit(_shaped(rows.double().mean(1) if spec.is_binary else _best_survivors(rows), x, spec))


def absmean(x: Tensor, spec: QuantSpec) -> Fit:
    """The mean magnitude: of binary codes the optimum; of ternary ones Ma et al. 2024, "BitNet b1.58"."""
    rows = _rows(x, spec).abs().double()
    return Fit(_shaped(rows.mean(1), x, spec))


def largest(x: Tensor, spec: QuantSpec) -> Fit:
    """The largest magnitude, where the spec is split that of each sign: nothing is clipped."""
    rows = _rows(x, spec)
    if spec.split:
        positive, negative = (_shaped((s * rows).amax(1), x, spec) for s in (1, -1))
        return Fit(positive, negative_scale=negative)
    return Fit(_shaped(rows.abs().amax(1), x, spec))


def twn(x: Tensor, spec: QuantSpec) -> Fit:
    """Threshold 0.7 mean |x|, near the optimum of a normal distribution (Li et al. 2016, "TWN", eq. 6)."""
    mean = _rows(x, spec).abs().double().mean(1)
    return given_threshold(x, _shaped(TWN_FACTOR * mean, x, spec), spec)


def ttq(x: Tensor, spec: QuantSpec) -> Fit:
    """Threshold 0.05 max |x|: few zeros to begin with (Zhu et al. 2017, "TTQ", eq. 9)."""
    ends = _rows(x, spec).abs().amax(1)
    return given_threshold(x, _shaped(TTQ_FACTOR * ends, x, spec), spec)


def given_threshold(x: Tensor, threshold: Tensor, spec: QuantSpec) -> Fit:
    """The best scales for ternary codes beyond a threshold: the mean magnitude of the survivors.

    Where nothing survives the scale is the threshold, which no code uses.

    Args:
        x: float tensor.
        threshold: positive, in the shape of the scale.

    Raises:
        LowbitError: the spec is not ternary.
    """
    if not spec.is_ternary:
        raise LowbitError(f"a threshold separates ternary codes, and the spec is {spec}; use a ternary one")
    rows, ends = _rows(x, spec).double(), threshold.reshape(-1, 1).double()

    def mean(survivors: Tensor) -> Tensor:
        count = survivors.sum(1)
        total = torch.where(survivors, rows.abs(), 0.0).sum(1)
        return _shaped(torch.where(count > 0, total / count.clamp(min=1), ends[:, 0]), x, spec)

    if spec.split:
        return Fit(mean(rows > ends), None, threshold, mean(rows < -ends))
    return Fit(mean(rows.abs() > ends), None, threshold)


def _rows(x: Tensor, spec: QuantSpec) -> Tensor:
    """The elements of each scale, [scales, n]; of an empty tensor one zero for each."""
    shape = spec.scale_shape(x.shape)
    return grouped(x, shape) if x.numel() else x.new_zeros(math.prod(shape), 1)


def _best_survivors(magnitudes: Tensor) -> Tensor:
    """Mean of the k largest of each row, for the k with the largest (sum)^2 / k."""
    falling = magnitudes.double().sort(dim=1, descending=True).values
    sums = falling.cumsum(1)
    counts = torch.arange(1, falling.shape[1] + 1, device=falling.device)
    best = (sums.square() / counts).argmax(1, keepdim=True)
    return (sums / counts).gather(1, best)[:, 0]


def _shaped(scale: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """One number for each scale, as it is kept: for zero the smallest there is."""
    scale = scale.float().clamp(min=MIN_SCALE)
    if spec.scale == "pow2":
        # of the powers around the optimum a the one of less error, which grows with |s - a|^2
        above = power_of_two(scale)
        scale = torch.where(above - scale <= scale - above / 2, above, above / 2)
    return scale.reshape(spec.scale_shape(x.shape))

"""Rounding that is learned: down or up, as the error of an output has it (Nagel et al. 2020, "AdaRound")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.core.affine import dequantize
from lowbit.core.qtensor import QTensor
from lowbit.core.spec import expand_to

__all__ = ["SoftRounding"]

# ends of the stretched sigmoid, which so reaches 0 and 1 with a gradient left
LOW, HIGH = -0.1, 1.1
# how near to an end a rounding may start, for beyond it hardly moves; and how far from its code towards its
# target, where less than a half leaves the code chosen
MARGIN, START = 0.01, 0.1


class SoftRounding(nn.Module):
    """A weight between neighbouring codes: W(V) = scale (lower + step h(V) - zero point).

    h(V) = clip(sigmoid(V) (HIGH - LOW) + LOW, 0, 1), the rectified sigmoid of eq. 23, one V for each element.
    It stands where the quantizer of the weight stood, and reads nothing of the weight.
    """

    lower: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, start: QTensor, target: Tensor) -> None:
        """Each element may stay at its code or go to the next one on the side of its target.

        Of nearest codes the two choices are the neighbours of the target. It starts near the code, which
        `hard` gives, and not at the target as in the paper: codes that GPTQ chose know more than that.

        Args:
            start: of kind "int", with one scale for either sign.
            target: the float weight, shaped like the codes.
        """
        super().__init__()
        spec, code = start.spec, start.codes.float()
        wanted = target / expand_to(start.scale, code.shape)
        if start.zero_point is not None:
            wanted = wanted + expand_to(start.zero_point, code.shape)
        self.step = spec.step
        lower = torch.where(wanted < code, code - self.step, code).clamp(spec.qmin, spec.qmax - self.step)
        away = ((wanted - code) / self.step).clamp(MARGIN - 1, 1 - MARGIN) * START
        share = ((code - lower) / self.step + away).clamp(MARGIN, 1 - MARGIN)
        self.register_buffer("lower", lower)
        self.register_buffer("scale", start.scale)
        self.register_buffer("zero_point", start.zero_point)
        self.v = nn.Parameter(torch.logit((share - LOW) / (HIGH - LOW)))

    @property
    def up(self) -> Tensor:
        """h(V), from 0 at the lower code to 1 at the upper."""
        return (torch.sigmoid(self.v) * (HIGH - LOW) + LOW).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as far as it is decided."""
        return dequantize(self.lower + self.step * self.up, self.scale, self.zero_point)

    def undecided(self, beta: float) -> Tensor:
        """Mean of 1 - |2 h(V) - 1|^beta, which is 0 where every element is down or up (eq. 24)."""
        return (1 - (2 * self.up - 1).abs().pow(beta)).mean()

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight with every element at the nearer of its two codes."""
        return dequantize(self.lower + self.step * (self.up > 0.5), self.scale, self.zero_point)

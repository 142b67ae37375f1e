"""What a program costs before any tool has seen it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.hardware.program import Program

__all__ = ["ebops", "significant_bits"]


def significant_bits(codes: Tensor) -> Tensor:
    """int64 bits of |code| from its highest to its lowest set bit: 3 of 20 = 0b10100, 0 of 0."""
    size = codes.abs()
    # frexp of a whole number is how many bits it has
    high, low = (torch.frexp(n.double())[1].long() for n in (size, size & -size))
    return torch.where(size > 0, high - low + 1, 0)


def ebops(program: Program) -> dict[str, int]:
    """Effective bit operations of each step with weights, for one sample.

    The sum over all multiplications of the bits of one operand times those of the other: a weight has its
    `significant_bits`, for zeros at its ends cost nothing, and what is read the width of its type (Sun et al.
    2024, "HGQ: High Granularity Quantization for Real-time Neural Networks on FPGAs"). Every position of a
    convolution counts, also those where it reads padding.

    Returns:
        EBOPs by the name of the step, in the order of the program.
    """
    found = {}
    for step in program.steps:
        if step.weight is not None:
            width = program.steps[step.inputs[0]].type.width
            found[step.name] = int(significant_bits(step.weight.codes).sum()) * width * step.positions
    return found

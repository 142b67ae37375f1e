"""Networks as hardware has them: steps on fixed-point numbers, each with its type, and what they cost."""

from lowbit.hardware.lower import lower
from lowbit.hardware.program import Constant, Program, Step

__all__ = ["Constant", "Program", "Step", "lower"]

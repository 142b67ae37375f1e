"""lowbit: quantize PyTorch networks from 8 bits to 1, and prove the result on the target that runs it."""

from lowbit import export
from lowbit.advise import advise
from lowbit.compare import compare
from lowbit.core.qtensor import QTensor, quantization_error
from lowbit.core.spec import (
    DYNAMIC8,
    FP16,
    INT4,
    INT8,
    UINT8,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
)
from lowbit.errors import LowbitError
from lowbit.export.checkpoint import load, save
from lowbit.presets import preset
from lowbit.ptq import calibrate, freeze, prepare, quantize
from lowbit.qat import Trainer
from lowbit.recipe import Recipe, Rule
from lowbit.verify import verify

__all__ = [
    "DYNAMIC8",
    "FP16",
    "INT4",
    "INT8",
    "UINT8",
    "LowbitError",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QTensor",
    "QuantSpec",
    "Recipe",
    "Rule",
    "Trainer",
    "advise",
    "calibrate",
    "compare",
    "export",
    "freeze",
    "load",
    "prepare",
    "preset",
    "quantization_error",
    "quantize",
    "save",
    "verify",
]

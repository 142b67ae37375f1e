"""Floor 3: files that other programs run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowbit.errors import expect
from lowbit.graph.trace import Inputs
from lowbit.model import QuantizedModel

__all__ = ["float_onnx", "onnx"]


def onnx(q: QuantizedModel, path: str | Path) -> Path:
    """Write a frozen model as an ONNX file that ONNX Runtime and OpenVINO run on integer kernels.

    Activations are QuantizeLinear / DequantizeLinear pairs, weights constant codes: int8, or INT4 up to four
    bits. The first axis of every input is dynamic. Needs the extra `lowbit[onnx]`.

    Where only weights are quantized, ONNX Runtime rounds the activations of linear layers to 8 bits of its
    own accord; the session option `session.qdq_matmulnbits_accuracy_level` set to "0" keeps them in float.

    Raises:
        LowbitError: the model is not frozen, an operation has no ONNX form, the folder does not exist.
    """
    from lowbit.export.qdq import write_quantized

    expect(q, QuantizedModel, "q", "make it with lowbit.quantize(model, ...), or use export.float_onnx")
    return write_quantized(q, path)


def float_onnx(model: nn.Module, path: str | Path, example_inputs: Any) -> Path:
    """Write a float model as ONNX, the rival of the quantized file.

    Args:
        example_inputs: one batch, as calibration data has them.
    """
    from lowbit.export.qdq import write_float

    expect(model, nn.Module, "model", "pass the network itself")
    return write_float(model, path, Inputs.of(example_inputs))

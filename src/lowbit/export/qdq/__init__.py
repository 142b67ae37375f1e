"""ONNX files in the QuantizeLinear / DequantizeLinear form, for integer kernels of ONNX Runtime, OpenVINO."""

from lowbit.export.qdq.emitters import CODES, SIGN_ZERO
from lowbit.export.qdq.file import write_float, write_quantized

__all__ = ["CODES", "SIGN_ZERO", "write_float", "write_quantized"]

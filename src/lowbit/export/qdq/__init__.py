"""ONNX files in the QuantizeLinear / DequantizeLinear form, for integer kernels of ONNX Runtime, OpenVINO."""

from lowbit.export.qdq.emitters import CODES, SIGN_ZERO
from lowbit.export.qdq.file import write_float, write_quantized
from lowbit.export.qdq.two_bits import LEVEL, PRODUCT

__all__ = ["CODES", "LEVEL", "PRODUCT", "SIGN_ZERO", "write_float", "write_quantized"]

"""Sessions of ONNX Runtime that compute what the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.processor import instructions

__all__ = ["PRECISE", "advice", "float_layers", "saturates", "session"]

# Without VNNI the kernels of ONNX Runtime for x86 add two products of uint8 and int8 in 16 bits, which
# saturate: 255 * 127 * 2 does not fit. With this entry they take others, exact and slower. So they do with
# VNNI, whose own are exact: never give it there.
PRECISE = ("session.x64quantprecision", "1")
# Rounds the float weights of a layer that reads quantized inputs to 8 bits, one scale for all, unasked.
ROUNDS_WEIGHTS = "WeightBiasQuantization"
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")


def session(
    model: Path | bytes, *, threads: int | None = None, optimized_to: Path | None = None, **entries: str
) -> Any:
    """An onnxruntime.InferenceSession on the CPU.

    Args:
        model: a file, or what stands in one.
        threads: of one operator; None leaves it to the runtime.
        optimized_to: where to write the graph that really runs.
        entries: further entries of the session's configuration, under "session.".
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
    if saturates():
        options.add_session_config_entry(*PRECISE)
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(
        source, options, providers=["CPUExecutionProvider"], disabled_optimizers=[ROUNDS_WEIGHTS]
    )


def saturates() -> bool:
    """Whether the kernels that ONNX Runtime would take saturate here; True where PyTorch cannot tell."""
    found = instructions()
    return found is None or ("avx2" in found and not {"avx512_vnni", "avx_vnni"} & set(found))


def advice(float_layers: int = 0) -> str:
    """What a user on this processor must know to run the file as it was measured; '' where nothing.

    Args:
        float_layers: as `float_layers` counts them in the file.
    """
    said = []
    if float_layers:
        said.append(
            f"{float_layers} layers with float weights read quantized inputs, and ONNX Runtime rounds such "
            f"weights to 8 bits: run the file as here, with disabled_optimizers=['{ROUNDS_WEIGHTS}']."
        )
    if instructions() is not None and saturates():
        name, value = PRECISE
        said.append(
            f"This processor has no VNNI: run the file as here, with {name} = {value} among the session's "
            "configuration entries, or kernels that saturate at 16 bits give other numbers."
        )
    return "\n".join(said)


def float_layers(proto: Any) -> int:
    """Layers of an onnx.ModelProto whose inputs are quantized and whose weights are float numbers."""
    dequantized = {n.output[0] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    constant = {i.name for i in proto.graph.initializer}
    return sum(
        n.op_type in _WEIGHTED and n.input[0] in dequantized and n.input[1] in constant
        for n in proto.graph.node
    )

"""Sessions of ONNX Runtime that compute what the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.processor import instructions

__all__ = ["PRECISE", "advice", "session"]

# Without VNNI the kernels of ONNX Runtime for x86 add two products of uint8 and int8 in 16 bits, which
# saturate: 255 * 127 * 2 does not fit. With this entry they take others, which are exact and slower; where
# there is VNNI it changes nothing.
PRECISE = ("session.x64quantprecision", "1")


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
    for name, value in (PRECISE, *((f"session.{name}", value) for name, value in entries.items())):
        options.add_session_config_entry(name, value)
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def advice() -> str:
    """What a user on this processor must know to run the file as it was measured; '' where nothing."""
    found = instructions()
    if found is None or "avx2" not in found or {"avx512_vnni", "avx_vnni"} & set(found):
        return ""
    name, value = PRECISE
    return (
        f"This processor has no VNNI: run the file as here, with {name} = {value} among the session's "
        "configuration entries, or kernels that saturate at 16 bits give other numbers."
    )

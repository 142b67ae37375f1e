"""Floor 3: files that other programs run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lowbit.errors import expect
from lowbit.graph.trace import Inputs
from lowbit.model import QuantizedModel

if TYPE_CHECKING:
    from lowbit.export.fpga.verilog import VerilogProject

__all__ = ["float_onnx", "hls4ml", "onnx", "qonnx", "verilog"]


def onnx(q: QuantizedModel, path: str | Path, *, dynamic: Mapping[str, Sequence[int]] | None = None) -> Path:
    """Write a frozen model as an ONNX file that ONNX Runtime and OpenVINO run on integer kernels.

    Activations are QuantizeLinear / DequantizeLinear pairs, weights constant codes: int8, or INT4 up to four
    bits. Ranges found at run time become DynamicQuantizeLinear, or for each token the operations that do the
    same, in front of MatMulInteger. The first axis of every input is dynamic. Needs the extra `lowbit[onnx]`.

    Where only weights are quantized, ONNX Runtime rounds the activations of linear layers to 8 bits of its
    own accord; the session option `session.qdq_matmulnbits_accuracy_level` set to "0" keeps them in float.

    Args:
        dynamic: axes, besides the first, whose length may differ from call to call, by the name of the input,
            such as {"input_ids": (1,), "attention_mask": (1,)}.

    Raises:
        LowbitError: the model is not frozen, an operation has no ONNX form, the folder does not exist.
    """
    from lowbit.export.qdq import write_quantized

    expect(q, QuantizedModel, "q", "make it with lowbit.quantize(model, ...), or use export.float_onnx")
    return write_quantized(q, path, dynamic or {})


def float_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    dynamic: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """Write a float model as ONNX, the rival of the quantized file.

    Args:
        example_inputs: one batch, as calibration data has them.
        dynamic: as for `onnx`.
    """
    from lowbit.export.qdq import write_float

    expect(model, nn.Module, "model", "pass the network itself")
    return write_float(model, path, Inputs.of(example_inputs), dynamic or {})


def hls4ml(
    q: QuantizedModel,
    folder: str | Path,
    *,
    backend: Literal["Vivado", "Vitis"] = "Vitis",
    io: Literal["io_parallel", "io_stream"] = "io_parallel",
    reuse: int = 1,
    strategy: Literal["Latency", "Resource"] = "Latency",
    part: str | None = None,
    clock_ns: float = 5.0,
) -> Path:
    """Write an hls4ml project whose C++ gives the codes of the integer reference, all of them.

    The model must have been quantized with powers of two, such as by the recipe `fixed8`. Needs the extra
    `lowbit[fpga]`; `lowbit.verify(q, folder, data)` compiles the project with g++ and compares it.

    Args:
        folder: where the project goes; not there yet, or empty.
        reuse: how often one multiplier is used for a sample.
        part: of the FPGA; by default that of the backend.
        clock_ns: the period of the clock.

    Raises:
        LowbitError: the model is not frozen, a scale is no power of two, hls4ml has no such operation, the
            folder has something in it.
    """
    from lowbit.export.fpga.hls import write_project
    from lowbit.hardware import lower

    options = {"reuse": reuse, "strategy": strategy, "part": part, "clock_ns": clock_ns}
    return write_project(lower(q), Path(folder), backend=backend, io=io, **options)


def qonnx(q: QuantizedModel, path: str | Path) -> Path:
    """Write a frozen model of powers of two as QONNX: plain ONNX, with a `Quant` node for every type.

    `lowbit.verify(q, path, data)` runs it in the package `qonnx`. Needs the extra `lowbit[fpga]`.

    Raises:
        LowbitError: the model is not frozen, a scale is no power of two, values that wrap, sums of more than
            24 bits, which float32 does not hold; the folder does not exist.
    """
    from lowbit.export.fpga.qonnx import export_qonnx

    return export_qonnx(q, path)


def verilog(
    q: QuantizedModel,
    folder: str | Path,
    *,
    name: str = "network",
    clock_ns: float = 5.0,
    adders_per_clock: int = 5,
) -> VerilogProject:
    """Write a frozen model of powers of two as Verilog, fully unrolled: one sample at every clock.

    `lowbit.verify(q, folder, data)` simulates it with iverilog. Needs the extra `lowbit[fpga]`.

    Args:
        folder: where the sources go; not there yet, or empty.
        name: of the module.
        clock_ns: period that the constraint file asks for.
        adders_per_clock: the longest chain between two registers; 0 makes a module without a clock.

    Returns:
        The project, with its estimate by da4ml; `lowbit.export.fpga.verilog.count` has yosys count its cells.

    Raises:
        LowbitError: the model is not frozen, a scale is no power of two, an operation that hardware lacks; a
            folder with something in it.
    """
    from lowbit.export.fpga.verilog import export_verilog

    return export_verilog(q, folder, name=name, clock_ns=clock_ns, adders_per_clock=adders_per_clock)

"""Is the hardware the model that was measured? Run what was written, and compare every code it gives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.core.fixed import from_real, to_real
from lowbit.errors import LowbitError
from lowbit.graph.run import bind_inputs, flat_tensors
from lowbit.graph.trace import Inputs
from lowbit.hardware.lower import lower
from lowbit.hardware.program import Program
from lowbit.model import QuantizedModel

__all__ = ["HardwareParity", "inputs_of", "is_qonnx", "verify_hardware"]

# float batches, one for each input, to results in real numbers
Runner = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class HardwareParity:
    """Results of hardware, against the integer reference and the simulation that was measured."""

    path: str
    samples: int
    # how the hardware was run
    by: str
    # result codes compared; of these the share equal to the integer reference, and the largest difference
    codes: int
    equal: float
    max_lsb: int
    # largest difference of a result from the simulation in float
    simulation_max: float
    # share of samples with the same top-1 class as in the simulation; None where the results are no classes
    top1_agreement: float | None

    @property
    def exact(self) -> bool:
        """Whether every code equals the integer reference."""
        return self.equal == 1.0

    @property
    def ok(self) -> bool:
        """The same: fixed point leaves nothing to rounding."""
        return self.exact

    def __str__(self) -> str:
        share = "100 %" if self.exact else f"{int(self.equal * 1e6) / 1e4:.4f} %"
        text = (
            f"{self.path}, {self.samples} samples by {self.by}: {share} of {self.codes:,} result codes equal "
            f"the integer reference, largest difference {self.max_lsb}; from the simulation "
            f"{self.simulation_max:.2g}"
        )
        if self.top1_agreement is not None:
            text += f", top-1 agreement {100 * self.top1_agreement:.2f} %"
        return text


def is_qonnx(path: Path) -> bool:
    """Whether a path is that of a QONNX file."""
    if not path.is_file():
        return False
    import onnx

    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception:  # whoever opens it next says what is wrong
        return False
    return any(opset.domain.startswith("qonnx") for opset in proto.opset_import)


def verify_hardware(q: QuantizedModel, path: Path, data: Sequence[Inputs]) -> HardwareParity:
    """Run the hls4ml project or the Verilog in a folder, or a QONNX file.

    Raises:
        LowbitError: nothing that lowbit wrote, or from another model; a tool is missing.
    """
    program = lower(q)
    run, by = _qonnx(path) if path.is_file() else _project(path, program)
    return compare(q, path, inputs_of(q, data), program, run, by)


def _qonnx(path: Path) -> tuple[Runner, str]:
    from lowbit.export.fpga.qonnx import run_qonnx

    return lambda x: run_qonnx(path, x), "qonnx"


def _project(folder: Path, program: Program) -> tuple[Runner, str]:
    from lowbit.export.fpga.hls import NOTE, run_project, shapes_of

    if not (folder / NOTE).is_file():
        raise LowbitError(
            f"'{folder}' has no {NOTE}, so it is no project that lowbit wrote; export it with "
            "lowbit.export.hls4ml(q, folder) or lowbit.export.verilog(q, folder)"
        )
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    compiled = "io" in note
    theirs = (
        note["shapes"] if compiled else [[p["shape"] for p in note[way]] for way in ("inputs", "outputs")]
    )
    ours = shapes_of(program)
    if theirs != ours:
        raise LowbitError(
            f"'{folder}' is from a model whose samples are {theirs[0]} and give {theirs[1]}; this one has "
            f"{ours[0]} and {ours[1]}; export this model"
        )
    if compiled:
        return lambda x: run_project(folder, x), "hls4ml and g++"
    return _simulated(folder, program), "iverilog"


def _simulated(folder: Path, program: Program) -> Runner:
    from lowbit.export.fpga.verilog import VerilogProject, simulate

    project = VerilogProject.load(folder)

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        codes = [from_real(x, step.type) for x, step in zip(inputs, program.inputs, strict=True)]
        return program.real(simulate(project, codes))

    return run


def inputs_of(q: QuantizedModel, data: Sequence[Inputs]) -> list[Tensor]:
    """All samples of some batches, one tensor for each input of the graph.

    Raises:
        LowbitError: no batch.
    """
    if not data:
        raise LowbitError("there is no data to verify with; pass at least one batch")
    bound = [[v for v in bind_inputs(q.graph, i).values() if isinstance(v, Tensor)] for i in data]
    return [torch.cat(parts) for parts in zip(*bound, strict=True)]


def compare(
    q: QuantizedModel, path: Path, inputs: Sequence[Tensor], program: Program, run: Runner, by: str
) -> HardwareParity:
    """Run hardware, reference and simulation on the same samples.

    Args:
        run: runs the hardware.
        by: its name.
    """
    want = program.run(*inputs)
    found = run(inputs)
    with torch.no_grad():
        simulated = flat_tensors(q(*inputs))
    equal, worst, off, codes = 0, 0, 0.0, 0
    for at, f, w, s in zip(program.outputs, found, want, simulated, strict=True):
        fraction = program.steps[at].type.fraction
        steps = f.reshape(w.shape).double() * math.ldexp(1.0, fraction) - w.double()
        equal += int((steps == 0).sum())
        worst = max(worst, int(steps.abs().ceil().max()))
        off = max(off, float((to_real(w, fraction) - s.double()).abs().max()))
        codes += w.numel()
    agreement = None
    if len(want) == 1 and want[0].ndim == 2 and want[0].shape[1] > 1:
        same = found[0].reshape(want[0].shape).argmax(1) == simulated[0].argmax(1)
        agreement = float(same.double().mean())
    return HardwareParity(str(path), len(inputs[0]), by, codes, equal / codes, worst, off, agreement)

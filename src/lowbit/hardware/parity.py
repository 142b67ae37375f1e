"""Is the hardware the model that was measured? Run what was written, and compare every code it gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.core.fixed import to_real
from lowbit.errors import LowbitError
from lowbit.graph.run import bind_inputs, flat_tensors
from lowbit.graph.trace import Inputs
from lowbit.hardware.lower import lower
from lowbit.hardware.program import Program
from lowbit.model import QuantizedModel

__all__ = ["HardwareParity", "verify_project"]

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


def verify_project(q: QuantizedModel, folder: Path, data: Sequence[Inputs]) -> HardwareParity:
    """Compile and run the project in a folder.

    Raises:
        LowbitError: no project that lowbit wrote, one of another model, or a tool is missing.
    """
    from lowbit.export.fpga.hls import NOTE, run_project, shapes_of

    if not (folder / NOTE).is_file():
        raise LowbitError(
            f"'{folder}' has no {NOTE}, so it is no project that lowbit wrote; export it with "
            "lowbit.export.hls4ml(q, folder)"
        )
    program = lower(q)
    theirs, ours = json.loads((folder / NOTE).read_text(encoding="utf-8"))["shapes"], shapes_of(program)
    if theirs != ours:
        raise LowbitError(
            f"'{folder}' is from a model whose samples are {theirs[0]} and give {theirs[1]}; this one has "
            f"{ours[0]} and {ours[1]}; export this model"
        )
    inputs = inputs_of(q, data)
    return compare(q, folder, inputs, program, lambda x: run_project(folder, x), "hls4ml and g++")


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
        steps = torch.ldexp(f.reshape(w.shape).double(), torch.tensor(fraction)) - w.double()
        equal += int((steps == 0).sum())
        worst = max(worst, int(steps.abs().ceil().max()))
        off = max(off, float((to_real(w, fraction) - s.double()).abs().max()))
        codes += w.numel()
    agreement = None
    if len(want) == 1 and want[0].ndim == 2 and want[0].shape[1] > 1:
        same = found[0].reshape(want[0].shape).argmax(1) == simulated[0].argmax(1)
        agreement = float(same.double().mean())
    return HardwareParity(str(path), len(inputs[0]), by, codes, equal / codes, worst, off, agreement)

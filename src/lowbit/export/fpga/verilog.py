"""Verilog without a vendor's tool: a network as adders between registers, bit for bit the integer reference.

The module has ports `clk`, `x` and `y`. `x` is the codes of the inputs one after another, `y` those of the
results, each element in as many bits as its type has, element 0 lowest. A sample is taken at every clock.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.core.fixed import FixedPoint
from lowbit.errors import LowbitError
from lowbit.export.fpga.verilog_trace import trace
from lowbit.hardware.cost import ebops
from lowbit.hardware.lower import lower
from lowbit.hardware.program import Program, Step
from lowbit.hardware.synthesis import Cells, Port, pack, simulate_module, synthesize, unpack
from lowbit.model import QuantizedModel
from lowbit.tables import text_table

__all__ = ["Estimate", "Layer", "Resources", "VerilogProject", "count", "export_verilog", "simulate"]

# beside the sources: what `VerilogProject.load` reads
NOTE = "lowbit.json"
# the modules that da4ml's code is made of
_PARTS = ("shift_adder", "mux", "negative", "multiplier", "binop", "lookup_table")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Estimate:
    """What da4ml reckons, before any tool."""

    lut: int
    # bits of the registers between the stages, those of the inputs and results among them
    ff: int
    # adders one after another, from the inputs to the last result
    depth: int


@dataclass(frozen=True)
class VerilogProject:
    """A folder of Verilog sources, and what its module reads and gives."""

    folder: Path
    # of the module
    name: str
    clock_ns: float
    # clocks from a sample to its result; 0 for a module without a clock
    latency: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    estimate: Estimate

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.v"))

    @classmethod
    def load(cls, folder: str | Path) -> VerilogProject:
        """The project in a folder that `export_verilog` has written.

        Raises:
            LowbitError: there is none.
        """
        note = Path(folder) / NOTE
        if not note.is_file():
            raise LowbitError(f"'{folder}' has no {NOTE}, so it is no Verilog project; export one first")
        read = json.loads(note.read_text(encoding="utf-8"))
        ports = {key: tuple(_port(p) for p in read.pop(key)) for key in ("inputs", "outputs")}
        return cls(folder=Path(folder), estimate=Estimate(**read.pop("estimate")), **ports, **read)

    def _save(self) -> None:
        plain = {k: v for k, v in asdict(self).items() if k != "folder"}
        (self.folder / NOTE).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def _port(read: dict[str, Any]) -> Port:
    return Port(**{**read, "shape": tuple(read["shape"])})


def export_verilog(
    q: QuantizedModel | Program,
    folder: str | Path,
    *,
    name: str = "network",
    clock_ns: float = 5.0,
    adders_per_clock: int = 5,
) -> VerilogProject:
    """Write a network as Verilog sources, fully unrolled: one sample at every clock. Needs `da4ml`.

    Args:
        q: a frozen model whose scales are powers of two, or its program.
        folder: to be made, or empty.
        name: of the module.
        clock_ns: period that the constraint file asks for.
        adders_per_clock: the longest chain between two registers; 0 makes a module without a clock.

    Raises:
        LowbitError: a folder with something in it, a bad name, what has no fixed-point form.
    """
    program, folder = q if isinstance(q, Program) else lower(q), Path(folder)
    _check(folder, name, clock_ns, adders_per_clock)
    logic, stages = _solved(program, adders_per_clock)
    latency = len(stages.solutions) + 1 if stages else 0
    estimate = Estimate(
        round(float(logic.cost)), int(stages.reg_bits) if stages else 0, round(max(logic.out_latency))
    )
    ports = _ports(program.inputs), _ports([program.steps[i] for i in program.outputs])
    project = VerilogProject(folder, name, clock_ns, latency, *ports, estimate)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            made = replace(project, folder=Path(temporary) / "project")
            _write(made, stages or logic)
            if folder.exists():
                folder.rmdir()
            shutil.move(made.folder, folder)
    except OSError as error:
        raise LowbitError(f"'{folder}' cannot be written: {error.strerror or error}") from error
    return project


def _check(folder: Path, name: str, clock_ns: float, adders_per_clock: int) -> None:
    if not _NAME.fullmatch(name) or name in _PARTS:
        raise LowbitError(
            f"name='{name}' is no free name of a Verilog module; use letters, digits and _, as in 'network'"
        )
    if not clock_ns > 0:
        raise LowbitError(f"clock_ns={clock_ns} is not above 0; 5 is 200 MHz")
    if adders_per_clock < 0:
        raise LowbitError(f"adders_per_clock={adders_per_clock} is negative; 0 means no registers at all")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LowbitError(f"'{folder}' exists already; name another folder, or remove it first")
    if not folder.parent.is_dir():
        raise LowbitError(f"'{folder}' cannot be made: there is no folder '{folder.parent}'; create it first")


def _solved(program: Program, adders_per_clock: int) -> tuple[Any, Any]:
    """da4ml's logic, and the same in stages, or None."""
    from da4ml.trace.pipeline import to_pipeline

    logic = trace(program)
    if not adders_per_clock:
        return logic, None
    return logic, to_pipeline(logic, adders_per_clock, retiming=True, verbose=False)


def _ports(steps: Sequence[Step]) -> tuple[Port, ...]:
    return tuple(Port(s.name, s.shape, s.type.width, s.type.signed) for s in steps)


# --- sources


def _write(project: VerilogProject, logic: Any) -> None:
    from da4ml.codegen import rtl
    from da4ml.codegen.rtl.verilog import comb_logic_gen, pipeline_logic_gen

    project.folder.mkdir()
    core = f"{project.name}_core"
    if project.latency:
        sources = pipeline_logic_gen(logic, core)
    else:
        sources = {core: comb_logic_gen(logic, core, timescale="`timescale 1 ns / 1 ps")}
    sources[project.name] = _top(project, core, logic)
    text = "\n".join(sources.values())
    parts = Path(rtl.__file__).parent / "verilog" / "source"
    for part in _PARTS:
        if f" {part} #(" in text:
            sources[part] = (parts / f"{part}.v").read_text(encoding="utf-8")
    for name, source in sources.items():
        (project.folder / f"{name}.v").write_text(source, encoding="utf-8")
    if project.latency:
        clock = f"create_clock -period {project.clock_ns:g} -name clk [get_ports clk]\n"
        (project.folder / f"{project.name}.xdc").write_text(clock, encoding="utf-8")
    project._save()


def _top(project: VerilogProject, core: str, logic: Any) -> str:
    """Codes in the bits of their types, around a core whose numbers have the bits they need."""
    clock, pin = ("input clk,\n    ", ".clk(clk), ") if project.latency else ("", "")
    given, results = (sum(p.bits for p in ports) for ports in (project.inputs, project.outputs))
    reads = [_kif(interval) for interval in logic.inp_qint]
    makes = [_kif(interval) for interval in logic.out_qint]
    lines = [
        *_inputs(reads, [p.width for p in project.inputs for _ in range(p.size)]),
        *_outputs(makes, [p.width for p in project.outputs for _ in range(p.size)]),
    ]
    body = "\n    ".join(lines)
    return f"""`timescale 1 ns / 1 ps

module {project.name} (
    {clock}input [{given - 1}:0] x,
    output [{results - 1}:0] y
);
    wire [{max(1, sum(map(sum, reads))) - 1}:0] core_x;
    wire [{max(1, sum(map(sum, makes))) - 1}:0] core_y;

    {core} core ({pin}.model_inp(core_x), .model_out(core_y));

    {body}
endmodule
"""


def _kif(interval: Any) -> tuple[int, int, int]:
    """Whether signed, bits from that of worth 1 up, and minus how many of these are always 0."""
    from da4ml.types import minimal_kif

    signed, integer, fraction = minimal_kif(interval)
    return int(signed), int(integer), int(fraction)


def _inputs(numbers: Sequence[tuple[int, int, int]], widths: Sequence[int]) -> list[str]:
    """The lowest bits of each code; what is never read has none."""
    runs: list[tuple[int, int]] = []
    at = 0
    for kif, width in zip(numbers, widths, strict=True):
        # one run where bits go on, for a simulator is slow with many parts of a wire
        if runs and runs[-1][1] == at:
            runs[-1] = (runs[-1][0], at + sum(kif))
        elif sum(kif):
            runs.append((at, at + sum(kif)))
        at += width
    parts = [f"x[{end - 1}:{start}]" for start, end in reversed(runs)]
    return [f"assign core_x = {{{', '.join(parts)}}};"] if parts else []


def _outputs(numbers: Sequence[tuple[int, int, int]], widths: Sequence[int]) -> list[str]:
    """Each number with its lowest zeros, and its sign or zeros above, cut to the width of its type."""
    lines, own, at = [], 0, 0
    for (signed, integer, fraction), width in zip(numbers, widths, strict=True):
        bits, zeros = signed + integer + fraction, -fraction
        kept = max(0, min(bits, width - zeros))
        fill = width - kept - zeros if kept else width
        parts = [f"{{{fill}{{core_y[{own + bits - 1}]}}}}" if signed else f"{fill}'b0"] if fill else []
        if kept:
            parts.append(f"core_y[{own + kept - 1}:{own}]")
            parts += [f"{zeros}'b0"] if zeros else []
        lines.append(f"assign y[{at + width - 1}:{at}] = {{{', '.join(parts)}}};")
        own, at = own + bits, at + width
    return lines


# --- tools


def simulate(project: VerilogProject, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Codes of the results for codes of the inputs, by the sources alone, in Icarus Verilog.

    Args:
        inputs: int64 [n, *shape] for each input, as `Program.run_codes` takes them.

    Raises:
        LowbitError: iverilog is not installed, other shapes, codes that the types do not have.
    """
    shapes = [tuple(codes.shape[1:]) for codes in inputs]
    want = [port.shape for port in project.inputs]
    if shapes != want or not len(inputs[0]):
        raise LowbitError(f"codes of samples {shapes}, where the module reads at least one of {want}")
    for codes, port in zip(inputs, project.inputs, strict=True):
        low = -(1 << port.width - 1) if port.signed else 0
        if int(codes.min()) < low or int(codes.max()) >= low + (1 << port.width):
            raise LowbitError(
                f"input '{port.name}' has codes from {int(codes.min())} to {int(codes.max())}, and "
                f"{port.width} bits hold {low} to {low + (1 << port.width) - 1}; give codes, not reals"
            )
    results = sum(port.bits for port in project.outputs)
    bits = simulate_module(
        project.files, project.name, pack(inputs, project.inputs), results, project.latency
    )
    return unpack(bits, project.outputs)


@dataclass(frozen=True)
class Layer:
    """A step with weights on its own: from the codes that it reads to its exact sums."""

    name: str
    # effective bit operations, see `lowbit.hardware.cost`
    ebops: int
    # da4ml's estimate
    lut: int
    # by Yosys; None where it was not asked
    cells: Cells | None = None


@dataclass(frozen=True)
class Resources:
    """What a module takes, counted by Yosys and reckoned by da4ml; `str()` is a table."""

    cells: Cells
    estimate: Estimate
    # clocks
    latency: int
    layers: tuple[Layer, ...] = ()

    @property
    def ebops(self) -> int:
        return sum(layer.ebops for layer in self.layers)

    def __str__(self) -> str:
        rows = [_row(n.name, n.ebops, n.lut, n.cells) for n in self.layers]
        if rows:
            rows.append(_row("the rest", None, self.estimate.lut - sum(n.lut for n in self.layers), None))
        rows.append(_row("total", self.ebops if self.layers else None, self.estimate.lut, self.cells))
        header = ("layer", "EBOPs", "estimated LUT", "yosys LUT", "FF", "DSP", "CARRY4")
        return (
            f"{text_table(header, rows)}\n{self.latency} clocks, {self.estimate.depth} adders deep, "
            f"{self.estimate.ff:,} FF estimated"
        )


def _row(name: str, operations: int | None, lut: int, cells: Cells | None) -> tuple[str, ...]:
    counted = [cells.lut, cells.ff, cells.dsp, cells.carry] if cells else [None] * 4
    return (name, *("" if n is None else f"{n:,}" for n in (operations, lut, *counted)))


def count(project: VerilogProject, program: Program | None = None, *, each: bool = False) -> Resources:
    """Cells of a project by Yosys, beside da4ml's estimate: "yosys LUT", for it knows no timing.

    Args:
        program: of the project, to have a row for each layer with weights.
        each: let Yosys count each layer as well.

    Raises:
        LowbitError: yosys is not installed.
    """
    cells = synthesize(project.files, project.name)
    layers = () if program is None else _layers(program, each)
    return Resources(cells, project.estimate, project.latency, layers)


def _layers(program: Program, each: bool) -> tuple[Layer, ...]:
    operations = ebops(program)
    rows = []
    for step in program.steps:
        if step.weight is None:
            continue
        with tempfile.TemporaryDirectory() as made:
            alone = export_verilog(_alone(program, step), Path(made) / "layer", adders_per_clock=0)
            cells = synthesize(alone.files, alone.name) if each else None
        rows.append(Layer(step.name, operations[step.name], alone.estimate.lut, cells))
    return tuple(rows)


def _alone(program: Program, step: Step) -> Program:
    """A step from the codes that it reads to its exact result."""
    read = program.steps[step.inputs[0]]
    exact = FixedPoint.holding(step.low, step.high, step.fraction)
    source = Step("input", "input", (), read.shape, read.type, rounds=True)
    return Program((source, replace(step, inputs=(0,), type=exact, rounds=False)), (1,))

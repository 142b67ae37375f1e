"""Free hardware tools as a library: Icarus Verilog runs a module, Yosys counts what it is made of.

Yosys maps to the cells of an FPGA and knows no timing, so its figures are called "yosys LUT" everywhere.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit.errors import LowbitError

__all__ = ["Cells", "Port", "pack", "simulate_module", "synthesize", "unpack"]

# family of cells that is counted: UltraScale+
FAMILY = "xcup"
_LUTS, _FLIP_FLOPS = tuple(f"LUT{n}" for n in range(1, 7)), ("FDRE", "FDSE", "FDCE", "FDPE")
# a shift register sits in a LUT
_SHIFTS = ("SRL16E", "SRLC16E", "SRLC32E")


@dataclass(frozen=True)
class Port:
    """A tensor as bits: element 0 lowest, each code in two's complement if it is signed."""

    name: str
    # of one sample
    shape: tuple[int, ...]
    # bits of each element
    width: int
    signed: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        return self.size * self.width


@dataclass(frozen=True)
class Cells:
    """What Yosys makes of a module; there is no timing in it."""

    # "yosys LUT"
    lut: int
    ff: int
    dsp: int
    # blocks of 4 carries (CARRY4)
    carry: int


def simulate_module(
    files: Sequence[Path], name: str, inputs: NDArray[np.uint8], outputs: int, latency: int
) -> NDArray[np.uint8]:
    """Bits of the results of a module, in Icarus Verilog.

    Args:
        files: Verilog sources.
        name: of the module; ports `x`, `y` and, where there is a latency, `clk`.
        inputs: bits [n, bits of x], lowest first; one row is taken at each clock.
        outputs: bits of y.
        latency: clocks from a row to its result; 0 for a module without a clock.

    Raises:
        LowbitError: iverilog is not installed, refuses the sources, or leaves bits undefined.
    """
    compiler, runner = _tool("iverilog", "iverilog"), _tool("vvp", "iverilog")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "inputs.hex").write_text("\n".join(_hex(row) for row in inputs) + "\n")
        bench = folder / "bench.v"
        bench.write_text(_bench(name, inputs.shape[1], outputs, len(inputs), latency))
        sources = [str(f.resolve()) for f in files]
        _run([compiler, "-g2012", "-s", "bench", "-o", "bench.vvp", str(bench), *sources], folder)
        _run([runner, "-n", "bench.vvp"], folder)
        lines = (folder / "outputs.hex").read_text().split()
    if len(lines) != len(inputs):
        raise LowbitError(
            f"Icarus Verilog gives {len(lines)} results for {len(inputs)} samples; run it again"
        )
    for row, line in enumerate(lines):
        if set(line) & set("xzXZ"):
            raise LowbitError(
                f"module '{name}' leaves bits of result {row} undefined: {line}; export it again"
            )
    return _bits(lines, outputs)


def _bench(name: str, inputs: int, outputs: int, count: int, latency: int) -> str:
    """A module that reads one row at each clock, and writes a result as many clocks later."""
    clock, ports = ("#1 clk = 1; #1 clk = 0;", ".clk(clk), ") if latency else ("#1;", "")
    late = max(latency, 1) - 1
    return f"""`timescale 1ns / 1ps
module bench;
  reg clk = 0;
  reg [{inputs - 1}:0] rows [0:{count - 1}];
  reg [{inputs - 1}:0] x;
  wire [{outputs - 1}:0] y;
  integer i, file;
  {name} dut ({ports}.x(x), .y(y));
  initial begin
    $readmemh("inputs.hex", rows);
    file = $fopen("outputs.hex", "w");
    for (i = 0; i < {count + late}; i = i + 1) begin
      x = rows[i < {count} ? i : {count - 1}];
      {clock}
      if (i >= {late}) $fdisplay(file, "%h", y);
    end
    $fclose(file);
  end
endmodule
"""


def _hex(bits: NDArray[np.uint8]) -> str:
    padded = np.pad(bits, (0, -len(bits) % 8))
    return np.packbits(padded[::-1]).tobytes().hex()


def _bits(lines: Sequence[str], count: int) -> NDArray[np.uint8]:
    digits = 2 * ((count + 7) // 8)
    packed = np.frombuffer(bytes.fromhex("".join(line.zfill(digits) for line in lines)), np.uint8)
    return np.unpackbits(packed.reshape(len(lines), -1), axis=1)[:, ::-1][:, :count]


def pack(codes: Sequence[Tensor], ports: Sequence[Port]) -> NDArray[np.uint8]:
    """Bits [n, bits of all ports], lowest first, of int64 codes [n, *shape] of each port."""
    parts = []
    for tensor, port in zip(codes, ports, strict=True):
        flat = tensor.reshape(len(tensor), -1, 1).numpy()
        bits = flat >> np.arange(port.width) & 1
        parts.append(bits.reshape(len(tensor), -1).astype(np.uint8))
    return np.concatenate(parts, 1)


def unpack(bits: NDArray[np.uint8], ports: Sequence[Port]) -> list[Tensor]:
    """Inverse of `pack`."""
    codes, start = [], 0
    for port in ports:
        own = bits[:, start : start + port.bits].reshape(len(bits), -1, port.width).astype(np.int64)
        worth = 1 << np.arange(port.width, dtype=np.int64)
        if port.signed:
            worth[-1] = -worth[-1]
        codes.append(torch.from_numpy(own @ worth).reshape(len(bits), *port.shape))
        start += port.bits
    return codes


def synthesize(files: Sequence[Path], name: str) -> Cells:
    """Cells of a module after `synth_xilinx -flatten` for UltraScale+; minutes for 40,000 of them.

    Raises:
        LowbitError: yosys is not installed, or refuses the sources.
    """
    yosys = _tool("yosys", "yosys")
    with tempfile.TemporaryDirectory() as made:
        sources = " ".join(f'"{f.resolve()}"' for f in files)
        script = (
            f"read_verilog {sources}; synth_xilinx -family {FAMILY} -noiopad -flatten -top {name}; "
            "tee -q -o cells.json stat -json"
        )
        _run([yosys, "-q", "-p", script], Path(made))
        found = json.loads((Path(made) / "cells.json").read_text())
    return _counted(found["modules"][f"\\{name}"]["num_cells_by_type"])


def _counted(cells: Mapping[str, int]) -> Cells:
    def total(*names: str) -> int:
        return sum(cells.get(name, 0) for name in names)

    dsp = sum(n for kind, n in cells.items() if kind.startswith("DSP"))
    return Cells(total(*_LUTS, *_SHIFTS), total(*_FLIP_FLOPS), dsp, total("CARRY4"))


def _tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise LowbitError(f"'{name}' is not installed; on Debian and Ubuntu: apt install {package}")
    return found


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise LowbitError(f"{Path(command[0]).name} fails: {said[-1] if said else done.returncode}")

"""Verilog against the integer reference, bit for bit: in Icarus Verilog, and in da4ml's own emulator."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import LowbitError, QuantSpec, Recipe, Rule
from lowbit.core.fixed import FixedPoint, cast, fixed, from_real
from lowbit.hardware import Program, Step, lower
from lowbit.hardware.cost import ebops, significant_bits
from lowbit.nn.tensorized import TTLinear

pytest.importorskip("da4ml", reason="da4ml writes the Verilog")

from lowbit.export.fpga import verilog_trace
from lowbit.export.fpga.verilog import VerilogProject, count, export_verilog, simulate

needs_iverilog = pytest.mark.skipif(not shutil.which("iverilog"), reason="iverilog runs the module")
needs_yosys = pytest.mark.skipif(not shutil.which("yosys"), reason="yosys counts the cells")


def spec(bits: int, rounding: str = "half_even", overflow: str = "saturate") -> QuantSpec:
    return QuantSpec(bits=bits, scale="pow2", rounding=rounding, overflow=overflow)


def recipe(*bits: int, rounding: str = "half_even", overflow: str = "saturate") -> Recipe:
    """Bits of the weights of each layer of `mlp`, or of all; activations have one more, and overflow."""
    names = [str(2 * k) for k in range(len(bits))] if len(bits) > 1 else ["*"]
    rules = (
        Rule(match=name, weight=spec(b), activation=spec(b + 1, rounding, overflow), observer="percentile")
        for name, b in zip(names, bits, strict=True)
    )
    return Recipe(rules=tuple(rules))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Identity(), nn.Linear(5, 3))


class Branches(nn.Module):
    """A CNN with everything that a program may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1, stride=2)
        self.second = nn.Conv2d(2, 2, 3, padding=2, dilation=2, groups=2)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.first(x))
        y = torch.relu(x + self.second(x))
        z = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(x, 2)], 1)
        return self.last(F.max_pool1d(z.transpose(1, 2).flatten(2), 2).flatten(1)), F.relu6(z)


class OneAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 4, 3, padding=1, groups=2), nn.Conv1d(4, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.hardtanh(self.first(x), -0.5, 0.75))


class Means(nn.Module):
    """Averages of 9 numbers, some negative, and of 3 that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.avg_pool2d(self.first(x), 3, 2, padding=1))
        return self.last(F.avg_pool1d(x.flatten(2), 3).flatten(1))


class Trains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.train_of_cores, self.last = TTLinear((2, 3), (3, 2), 2, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.train_of_cores(x)))


def lowered(model: nn.Module, shape: tuple[int, ...], how: str | Recipe) -> Program:
    torch.manual_seed(1)
    return lower(lowbit.quantize(model.eval(), how, calibration=[torch.randn(64, *shape)]))


def codes_for(program: Program, n: int) -> list[Tensor]:
    """Random reals as codes, some beyond the ends."""
    torch.manual_seed(2)
    return [from_real(2 * torch.randn(n, *step.shape), step.type) for step in program.inputs]


def emulated(program: Program, codes: list[Tensor]) -> list[Tensor]:
    """By da4ml, from the same logic that the sources are written from."""
    flat = torch.cat([c.flatten(1) for c in codes], 1).double().numpy()
    found = torch.from_numpy(verilog_trace.trace(program).predict(flat, 1)).long()
    steps = [program.steps[i] for i in program.outputs]
    parts = found.split([torch.Size(step.shape).numel() for step in steps], 1)
    return [part.reshape(-1, *step.shape) for part, step in zip(parts, steps, strict=True)]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- casts

SOURCES = [(-300, 211, 1), (0, 511, 1), (-3, 2, 1), (-296, 208, 8), (5, 200, 1), (-200, -7, 1)]


@pytest.mark.parametrize("overflow", ["saturate", "saturate_symmetric", "wrap"])
@pytest.mark.parametrize("rounding", ["half_even", "half_up", "floor"])
def test_every_code_is_cast_as_the_reference_casts_it(rounding: str, overflow: str) -> None:
    """All codes of several ranges, to types that drop bits at either end, after a ReLU too."""
    from da4ml.trace import FixedVariable, comb_trace

    types = [fixed(w, w, signed, rounding, overflow) for w, signed in product((1, 4, 9), (True,))]
    if overflow != "saturate_symmetric":
        types += [fixed(w, w, False, rounding, overflow) for w in (1, 4, 9)]
    for (low, high, step), shift, to, rectify in product(SOURCES, (-1, 0, 1, 3, 10), types, (False, True)):
        codes = torch.arange(low, high + 1, step)
        symbol = FixedVariable(low, high, step, hwconf=verilog_trace.HARDWARE)
        logic = comb_trace([symbol], [verilog_trace._cast(symbol, shift, to, rectify)], keep_dead_inputs=True)
        found = logic.predict(codes.double().numpy()[:, None], 1)[:, 0]
        wanted = cast(codes.clamp(min=0) if rectify else codes, shift + to.fraction, to)
        assert torch.equal(torch.from_numpy(found).long(), wanted), (low, high, step, shift, str(to), rectify)


# --- networks

MODES = [("half_even", "saturate"), ("half_up", "wrap"), ("floor", "saturate")]


@needs_iverilog
@pytest.mark.parametrize(("rounding", "overflow"), MODES)
def test_a_perceptron_of_mixed_bits(tmp_path: Path, rounding: str, overflow: str) -> None:
    program = lowered(mlp(), (6,), recipe(5, 3, 4, rounding=rounding, overflow=overflow))
    codes = codes_for(program, 200)
    beyond = []

    def watch(step: Step, exact: Tensor, fraction: int) -> None:
        free = cast(exact, fraction, fixed(50, 50 - step.type.fraction))
        beyond.append(step.rounds and bool(((free < step.type.qmin) | (free > step.type.qmax)).any()))

    wanted = program.run_codes(codes, watch)
    assert sum(beyond) >= 2
    assert equal(emulated(program, codes), wanted)
    project = export_verilog(program, tmp_path / "made", adders_per_clock=3)
    assert project.latency > 2
    assert equal(simulate(project, codes), wanted)
    assert int(wanted[0].min()) < 0


@needs_iverilog
def test_without_a_clock_from_a_model_and_loaded_again(tmp_path: Path) -> None:
    q = lowbit.quantize(mlp().eval(), "fixed4", calibration=[torch.randn(64, 6)])
    project = export_verilog(q, tmp_path / "made", name="net", adders_per_clock=0)
    assert VerilogProject.load(tmp_path / "made") == project
    assert (project.latency, project.estimate.ff) == (0, 0)
    program = lower(q)
    codes = codes_for(program, 50)
    assert equal(simulate(project, codes), program.run_codes(codes))
    assert "clk" not in (project.folder / "net.v").read_text()


@needs_iverilog
def test_a_network_with_branches(tmp_path: Path) -> None:
    program = lowered(Branches(), (1, 8, 8), "fixed4")
    assert {step.op for step in program.steps} >= {
        "conv",
        "add",
        "max_pool",
        "average_pool",
        "concat",
        "clamp",
    }
    codes = codes_for(program, 100)
    wanted = program.run_codes(codes)
    assert equal(emulated(program, codes), wanted)
    project = export_verilog(program, tmp_path / "made")
    assert equal(simulate(project, [c[:20] for c in codes]), [w[:20] for w in wanted])


@pytest.mark.parametrize(
    "how", ["fixed5", recipe(4, rounding="half_up"), recipe(3, overflow="wrap")], ids=str
)
def test_one_axis_groups_and_clamps(how: str | Recipe) -> None:
    program = lowered(OneAxis(), (2, 9), how)
    codes = codes_for(program, 300)
    assert equal(emulated(program, codes), program.run_codes(codes))


@needs_iverilog
@pytest.mark.parametrize("rounding", ["half_even", "half_up", "floor"])
def test_means_of_any_number_of_values(tmp_path: Path, rounding: str) -> None:
    program = lowered(Means(), (1, 5, 5), recipe(4, rounding=rounding))
    codes = codes_for(program, 300)
    wanted = program.run_codes(codes)
    assert equal(emulated(program, codes), wanted)
    assert equal(simulate(export_verilog(program, tmp_path / "made"), codes), wanted)


def test_a_mean_too_wide_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AvgPool2d(7), nn.Conv2d(1, 1, 1))
    with pytest.raises(LowbitError, match=r"'1' divides sums of .* by 49, which takes more than 40 bits"):
        export_verilog(lowered(model, (1, 7, 7), "fixed8"), tmp_path / "made")


def test_a_tensor_train_is_a_chain_of_layers() -> None:
    program = lowered(Trains(), (6,), "fixed6")
    assert [step.op for step in program.steps].count("dense") == 3
    codes = codes_for(program, 300)
    assert equal(emulated(program, codes), program.run_codes(codes))


@needs_iverilog
def test_what_never_changes_and_what_is_never_read(tmp_path: Path) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, 1] = 0
        model[0].weight[3] = 0
        model[4].weight[1] = 0
    program = lowered(model, (6,), "fixed5")
    codes = codes_for(program, 30)
    project = export_verilog(program, tmp_path / "made")
    assert equal(simulate(project, codes), program.run_codes(codes))
    with torch.no_grad():
        model[4].weight.zero_()
    program = lowered(model, (6,), "fixed5")
    project = export_verilog(program, tmp_path / "constant")
    assert equal(simulate(project, codes), program.run_codes(codes))


# --- cost


def test_significant_bits_go_from_the_highest_to_the_lowest_set_bit() -> None:
    codes = torch.arange(-300, 300)
    wanted = [len(f"{abs(int(c)):b}".strip("0")) for c in codes]
    assert significant_bits(codes).tolist() == wanted


def test_ebops_are_summed_over_all_multiplications() -> None:
    program = lowered(Branches(), (1, 8, 8), "fixed4")
    by_name = {step.name: step for step in program.steps}
    conv, dense = by_name["first"], by_name["last"]
    # 16 positions, 4 bits read
    bits = [len(f"{abs(int(c)):b}".strip("0")) for c in conv.weight.codes.flatten()]
    assert ebops(program)["first"] == 16 * 4 * sum(bits)
    width = program.steps[dense.inputs[0]].type.width
    assert ebops(program)["last"] == width * int(significant_bits(dense.weight.codes).sum())
    assert set(ebops(program)) == {"first", "second", "last"}


@needs_yosys
def test_cells_grow_with_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    found = []
    for bits in (3, 7):
        program = lowered(model, (4,), recipe(bits))
        project = export_verilog(program, tmp_path / str(bits), adders_per_clock=2)
        found.append(count(project, program))
    few, many = found
    assert 0 < few.cells.lut < many.cells.lut
    assert 0 < few.cells.ff < many.cells.ff
    assert few.cells.dsp == 0
    assert few.ebops < many.ebops
    assert [layer.name for layer in few.layers] == ["0", "2"]
    assert 0.5 < many.cells.lut / many.estimate.lut < 1.5
    assert sum(layer.lut for layer in many.layers) < many.estimate.lut
    assert "yosys LUT" in str(many)
    assert f"{many.latency} clocks" in str(many)


# --- refusals


@pytest.fixture(scope="module")
def program() -> Program:
    return lowered(mlp(), (6,), "fixed4")


def test_a_folder_is_made_whole_or_not_at_all(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.v").write_text("")
    with pytest.raises(LowbitError, match="full' exists already; name another folder"):
        export_verilog(program, tmp_path / "full")
    with pytest.raises(LowbitError, match="there is no folder"):
        export_verilog(program, tmp_path / "no" / "where")
    with pytest.raises(LowbitError, match=r"has no lowbit\.json"):
        VerilogProject.load(tmp_path / "full")

    def fail(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("lowbit.export.fpga.verilog._top", fail)
    with pytest.raises(LowbitError, match="new' cannot be written: disk full"):
        export_verilog(program, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_cannot_be_written(program: Program, tmp_path: Path) -> None:
    steps = program.steps
    odd = replace(program, steps=(*steps[:-1], replace(steps[-1], op="softmax")))
    with pytest.raises(LowbitError, match="'4' is a softmax, which has no Verilog"):
        export_verilog(odd, tmp_path / "made")
    wide = replace(steps[1], type=FixedPoint(45, 20))
    with pytest.raises(LowbitError, match="results of more than 40 bits"):
        export_verilog(replace(program, steps=(steps[0], wide, *steps[2:])), tmp_path / "made")
    weight = replace(steps[1].weight, codes=steps[1].weight.codes << 24)
    wide = replace(steps[1], weight=weight)
    with pytest.raises(LowbitError, match="weights of more than 24 bits"):
        export_verilog(replace(program, steps=(steps[0], wide, *steps[2:])), tmp_path / "made")
    for options, message in (
        ({"name": "8 bits"}, "no free name of a Verilog module"),
        ({"name": "mux"}, "no free name of a Verilog module"),
        ({"clock_ns": 0.0}, "not above 0"),
        ({"adders_per_clock": -1}, "negative"),
    ):
        with pytest.raises(LowbitError, match=message):
            export_verilog(program, tmp_path / "made", **options)
    assert not list(tmp_path.iterdir())


def test_wrong_codes_and_missing_tools(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = export_verilog(program, tmp_path / "made")
    codes = codes_for(program, 3)
    with pytest.raises(LowbitError, match=r"codes of samples \[\(5,\)\]"):
        simulate(project, [codes[0][:, :5]])
    with pytest.raises(LowbitError, match="bits hold -8 to 7; give codes, not reals"):
        simulate(project, [codes[0] + 8])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        LowbitError, match="'iverilog' is not installed; on Debian and Ubuntu: apt install iverilog"
    ):
        simulate(project, codes)
    with pytest.raises(LowbitError, match="apt install yosys"):
        count(project)

"""QONNX files, run by qonnx and by hls4ml, against the integer reference: every code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Fn
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit import LowbitError, QuantSpec, Recipe, Rule
from lowbit.core.fixed import FixedPoint
from lowbit.export.fpga.qonnx import export_qonnx, hls4ml_from_qonnx, run_qonnx
from lowbit.hardware import Program, Step, lower

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("qonnx", reason="qonnx is not installed")
# hls4ml leaves its description open
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in.*hls4ml_config")


def spec(bits: int = 6, **rest: Any) -> QuantSpec:
    return QuantSpec(bits=bits, scale="pow2", **rest)


def recipe(**rest: Any) -> Recipe:
    return Recipe(rules=(Rule(weight=spec(5), activation=spec(6, **rest)),))


def mixed() -> Recipe:
    return Recipe(
        rules=(
            Rule(match="0", weight=spec(4), activation=spec(8)),
            Rule(match="2", weight=spec(2), activation=spec(3)),
            Rule(weight=spec(7, narrow=True), activation=spec(5)),
        )
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)
    )


class Residual(nn.Module):
    """Convolutions with a stride and with groups, an addition, max and average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.wide, self.head = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(self.wide(F.relu(x + self.deep(x))))
        return self.head(F.avg_pool2d(x, 2).flatten(1))


def branches() -> nn.Module:
    """Three parts, one of them a result too: convolutions with dilation, with groups, and a clamp."""
    return Fn(
        lambda s, x: (y := s.b(x), s.d(torch.cat([F.relu(s.a(x)), y, F.relu6(s.c(x))], 1))),
        a=nn.Conv2d(2, 3, 3, padding=2, dilation=2),
        b=nn.Conv2d(2, 2, 3, padding=1),
        c=nn.Conv2d(2, 4, (1, 3), padding=(0, 1), groups=2),
        d=nn.Conv2d(9, 3, 1),
    )


def signal() -> nn.Module:
    return Fn(
        lambda s, x: s.c(F.relu(s.b(F.max_pool1d(F.relu(s.a(x)), 2)).transpose(1, 2))),
        a=nn.Conv1d(2, 4, 3, stride=2, padding=1),
        b=nn.Conv1d(4, 4, 3, groups=2),
        c=nn.Linear(4, 3),
    )


def padded_means() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.AvgPool2d((2, 4), 2, padding=1), nn.Flatten())


def means() -> nn.Module:
    """Averages of 9 and of 3 numbers, some negative."""
    return Fn(
        lambda s, x: s.b(F.avg_pool1d(F.avg_pool2d(s.a(x), 3, 2).flatten(2), 3).flatten(1)),
        a=nn.Conv2d(2, 3, 1),
        b=nn.Linear(9, 2),
    )


def shared() -> nn.Module:
    """One sum that a ReLU reads, and that is a result twice."""
    return Fn(lambda s, x: (y := s.a(x), s.b(F.relu(y)), y), a=nn.Linear(9, 4), b=nn.Linear(4, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    "mlp, 2 bits": (mlp, (9,), "fixed2"),
    "mlp, 4 bits": (mlp, (9,), "fixed4"),
    "mlp, 8 bits": (mlp, (9,), "fixed8"),
    "mlp, mixed bits": (mlp, (9,), mixed()),
    "mlp, floor": (mlp, (9,), recipe(rounding="floor")),
    "mlp, half up": (mlp, (9,), recipe(rounding="half_up")),
    "mlp, symmetric": (mlp, (9,), recipe(narrow=True)),
    "residual": (Residual, (2, 8, 8), "fixed6"),
    "residual, half up": (Residual, (2, 8, 8), recipe(rounding="half_up")),
    "branches": (branches, (2, 6, 6), "fixed5"),
    "signal": (signal, (2, 16), "fixed6"),
    "padded means": (padded_means, (2, 6, 6), "fixed6"),
    "means, 8 bits": (means, (2, 8, 8), "fixed8"),
    "means, half up": (means, (2, 8, 8), recipe(rounding="half_up")),
    "means, floor": (means, (2, 8, 8), recipe(rounding="floor")),
    "shared": (shared, (9,), "fixed6"),
}


@cache
def lowered(make: Callable[[], nn.Module], shape: tuple[int, ...], how: Any) -> tuple[Program, Tensor]:
    """The program, and samples beyond those it was calibrated on."""
    torch.manual_seed(0)
    x = torch.randn(300, *shape)
    return lower(lowbit.quantize(make().eval(), how, calibration=[x[:64] / 2])), 2 * x


@pytest.mark.parametrize("name", NETWORKS)
def test_every_code_equals_the_reference(name: str, tmp_path: Path) -> None:
    program, x = lowered(*NETWORKS[name])
    path = export_qonnx(program, tmp_path / "net.onnx")
    onnx.checker.check_model(onnx.load(path), full_check=True)
    found = run_qonnx(path, [x])
    assert len(found) == len(program.outputs)
    for result, want in zip(found, program.real(program.run(x)), strict=True):
        assert torch.equal(result.double(), want)


def test_a_model_is_lowered_and_two_inputs_are_fed(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.relu(self.a(x)) + self.b(y)

    inputs = torch.randn(20, 4), torch.randn(20, 5)
    q = lowbit.quantize(Two().eval(), "fixed6", calibration=[(inputs, 0)])
    path = export_qonnx(q, tmp_path / "net.onnx")
    program = lower(q)
    (found,) = run_qonnx(path, [x.numpy() for x in inputs])
    assert torch.equal(found.double(), program.real(program.run(*inputs))[0])


def only_input(to: FixedPoint) -> Program:
    return Program((Step("x", "input", (), (1,), to, rounds=True),), (0,))


@pytest.mark.parametrize("rounding", ["half_even", "half_up", "floor"])
@pytest.mark.parametrize(
    "to",
    [
        FixedPoint(5, 2, overflow="saturate"),
        FixedPoint(5, 2, overflow="saturate", narrow=True),
        FixedPoint(4, -1, signed=False, overflow="saturate"),
        FixedPoint(3, 6, overflow="saturate"),
        FixedPoint(1, 1, signed=False, overflow="saturate"),
        FixedPoint(20, 4, overflow="saturate"),
    ],
    ids=str,
)
def test_inputs_are_rounded_as_from_real_does(to: FixedPoint, rounding: Any, tmp_path: Path) -> None:
    to = replace(to, rounding=rounding)
    halves = torch.arange(2 * max(to.qmin, -40) - 5, 2 * min(to.qmax, 40) + 6) * (to.scale / 2)
    ends = torch.tensor([to.qmin, to.qmax]) * to.scale
    x = torch.cat([halves, ends, 1.5 * ends, torch.tensor([1e9, -1e9, 1e-30, -1e-30])])
    # the neighbours in float32 decide what is a half
    x = torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)])
    # a subnormal one divided by a scale above 1 is 0 in float32
    x = x[(x == 0) | (x.abs() > 1e-36)][:, None]
    program = only_input(to)
    (found,) = run_qonnx(export_qonnx(program, tmp_path / "x.onnx"), [x])
    assert torch.equal(found.double(), program.real(program.run(x))[0])


def test_weights_are_on_their_grid_and_typed(tmp_path: Path) -> None:
    program, _ = lowered(mlp, (9,), mixed())
    graph = onnx.load(export_qonnx(program, tmp_path / "net.onnx")).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quants = {node.input[0]: node for node in graph.node if node.op_type == "Quant"}
    for step in program.steps:
        if step.weight is None:
            continue
        (found,) = [v for v in values if v.endswith(f"{step.name}_weight")]
        assert np.array_equal(values[found].T, step.weight.real().numpy())
        node, to = quants[found], step.weight.type
        assert node.domain == "qonnx.custom_op.general"
        assert [values[name].item() for name in node.input[1:]] == [to.scale, 0.0, to.width]
        how = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert how == {"signed": to.signed, "narrow": to.narrow, "rounding_mode": b"ROUND"}


def changed(program: Program, at: int, **how: Any) -> Program:
    steps = [*program.steps]
    steps[at] = replace(steps[at], **how)
    return replace(program, steps=tuple(steps))


def test_what_qonnx_cannot_say_is_refused_with_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    program, _ = lowered(mlp, (9,), "fixed6")
    relu = program.steps[2]
    assert relu.rounds
    wraps = replace(relu.type, overflow="wrap")
    with pytest.raises(LowbitError, match=r"'1' wraps to .* QONNX has no wrapping; use overflow='saturate'"):
        export_qonnx(changed(program, 2, type=wraps), path)
    one = FixedPoint(1, 1, overflow="saturate")
    with pytest.raises(LowbitError, match=r"'1' has one signed bit, which QONNX takes for -1 and \+1"):
        export_qonnx(changed(program, 2, type=one), path)
    with pytest.raises(LowbitError, match=r"sums of '2' .* takes 25 bits, .* float32, which holds 24"):
        export_qonnx(lowered(mlp, (9,), "fixed12")[0], path)
    with pytest.raises(LowbitError, match="q is of type Linear, not a QuantizedModel"):
        export_qonnx(nn.Linear(2, 2), path)  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()]


def test_wrapping_that_never_happens_is_no_matter(tmp_path: Path) -> None:
    program, x = lowered(mlp, (9,), "fixed6")
    relu = program.steps[2]
    roomy = FixedPoint(16, 16 - relu.type.fraction, rounding="half_even")
    program = changed(program, 2, type=roomy)
    (found,) = run_qonnx(export_qonnx(program, tmp_path / "net.onnx"), [x])
    assert torch.equal(found.double(), program.real(program.run(x))[0])


def test_sums_are_exact_up_to_24_bits_and_refused_beyond(tmp_path: Path) -> None:
    """A layer of one weight, whose product reaches 2^24 and passes it."""
    given = FixedPoint(12, 12, signed=False, overflow="saturate")
    for largest in (4096, 4097):
        constant = lowbit.hardware.Constant(torch.tensor([[largest]]), FixedPoint(14, 14))
        product = Step(
            "fc", "dense", (0,), (1,), FixedPoint(25, 25), low=0, high=4095 * largest, weight=constant
        )
        bias = lowbit.hardware.Constant(torch.tensor([4096]), FixedPoint(14, 14))
        program = Program((Step("x", "input", (), (1,), given, True), replace(product, bias=bias)), (1,))
        if largest == 4097:
            with pytest.raises(LowbitError, match="sums of 'fc' reach 16781311 steps"):
                export_qonnx(program, tmp_path / "net.onnx")
        else:
            x = torch.tensor([[4095.0], [4094.0], [1.0]])
            (found,) = run_qonnx(export_qonnx(program, tmp_path / "net.onnx"), [x])
            assert found.flatten().tolist() == [16777216.0, 16773120.0, 8192.0]


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = lowered(mlp, (9,), "fixed6")

    def full(_: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(LowbitError, match="No space left on device"):
        export_qonnx(program, path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
    with pytest.raises(LowbitError, match="there is no folder"):
        export_qonnx(program, tmp_path / "nowhere" / "net.onnx")


def test_files_and_inputs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="does not exist; write it with export_qonnx"):
        run_qonnx(tmp_path / "none.onnx", [])
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(LowbitError, match="is not an ONNX file"):
        run_qonnx(tmp_path / "text.onnx", [])
    program, x = lowered(mlp, (9,), "fixed6")
    path = export_qonnx(program, tmp_path / "net.onnx")
    with pytest.raises(LowbitError, match=r"inputs of shapes \[\[300, 8\]\] .* samples are \[\[9\]\]"):
        run_qonnx(path, [x[:, :8]])


def test_the_version_that_onnx_writes_is_put_back(tmp_path: Path) -> None:
    before = onnx.IR_VERSION
    program, x = lowered(mlp, (9,), "fixed6")
    path = export_qonnx(program, tmp_path / "net.onnx")
    run_qonnx(path, [x])
    assert before == onnx.IR_VERSION
    assert onnx.load(path).ir_version == 8


# --- hls4ml


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("name", ["mlp, half up", "residual"])
def test_hls4ml_gives_the_codes_of_the_reference(name: str, tmp_path: Path) -> None:
    pytest.importorskip("hls4ml", reason="hls4ml is not installed")
    program, x = lowered(*NETWORKS[name])
    project = hls4ml_from_qonnx(export_qonnx(program, tmp_path / "net.onnx"), tmp_path / "hls")
    project.compile()
    found = project.predict(np.ascontiguousarray(x.movedim(1, -1).numpy()))
    want = program.real(program.run(x))[0]
    assert np.array_equal(found.reshape(want.shape), want.numpy())


def test_windows_that_end_the_process_in_a_stream_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("hls4ml", reason="hls4ml is not installed")
    program, _ = lowered(lambda: nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(2, 2, 1)), (2, 7, 7), "fixed6")
    path = export_qonnx(program, tmp_path / "net.onnx")
    with pytest.raises(LowbitError, match="does not take windows that overlap in io_stream"):
        hls4ml_from_qonnx(path, tmp_path / "hls", io="io_stream")


@pytest.mark.parametrize(
    ("make", "shape", "what"),
    [
        (lambda: nn.Sequential(nn.Linear(9, 4), nn.ReLU6()), (9,), "a clamp; use ReLU"),
        (lambda: nn.Sequential(nn.Conv1d(2, 2, 1), nn.MaxPool1d(2)), (2, 8), "max pooling along one axis"),
        (lambda: nn.Linear(8, 3), (2, 8), "a Linear on more than vectors; use a Conv1d"),
        (lambda: nn.Conv2d(2, 2, 3, dilation=2), (2, 8, 8), r"dilation \[2, 2\]; use 1"),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), (4, 8, 8), "2 groups of 2 for 4 filters; use 1"),
        (lambda: nn.Conv2d(2, 4, 3, groups=2), (2, 8, 8), "2 groups of 1 for 4 filters; use 1"),
        (
            lambda: nn.Sequential(nn.AvgPool2d(3), nn.Conv2d(2, 1, 1)),
            (2, 6, 6),
            "a mean of other than 2, 4, 8, ... values; export it with lowbit.export.hls4ml",
        ),
    ],
    ids=["clamp", "max pool 1d", "linear", "dilation", "groups", "multiplier", "means"],
)
def test_what_hls4ml_cannot_read_is_refused(
    make: Callable[[], nn.Module], shape: tuple[int, ...], what: str, tmp_path: Path
) -> None:
    pytest.importorskip("hls4ml", reason="hls4ml is not installed")
    program, _ = lowered(lambda: nn.Sequential(make()), shape, "fixed6")
    path = export_qonnx(program, tmp_path / "net.onnx")
    with pytest.raises(LowbitError, match=f"from QONNX hls4ml does not take {what}"):
        hls4ml_from_qonnx(path, tmp_path / "hls")

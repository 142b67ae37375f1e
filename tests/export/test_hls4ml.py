"""hls4ml's C++, compiled and run, against the integer reference; and what happens when a rule is dropped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit import LowbitError, QuantSpec, Recipe, Rule
from lowbit.core.fixed import fixed, to_real
from lowbit.export.fpga import hls as export
from lowbit.hardware import Constant, lower
from lowbit.model import QuantizedModel

pytest.importorskip("hls4ml", reason="hls4ml is not installed")
# hls4ml leaves its description open
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in.*hls4ml_config")


class Residual(nn.Module):
    """Two channels, averages of 9 numbers, an addition, max pooling, a flattened image, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.norm(self.first(x))), 3)
        return self.last(F.max_pool2d(F.relu(x + self.inner(x)), 2).flatten(1)).softmax(1)


class Branches(nn.Module):
    """Concatenation of three parts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(6, n) for n in (2, 3, 4))
        self.last = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([F.relu(part(x)) for part in self.parts], 1))


def means() -> nn.Module:
    """Averages of 3 numbers, some negative, in windows that overlap and are padded."""
    return nn.Sequential(nn.Conv1d(2, 2, 2), nn.AvgPool1d(3, 2, 1), nn.Flatten(), nn.Linear(10, 3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def mixed() -> Recipe:
    specs = {bits: QuantSpec(bits=bits, scale="pow2") for bits in (3, 4, 5, 8)}
    return Recipe(
        rules=(
            Rule(match="last", weight=specs[4], activation=specs[8]),
            Rule(weight=specs[3], activation=specs[5]),
        )
    )


def quantized(model: nn.Module, shape: tuple[int, ...], recipe: Any) -> tuple[QuantizedModel, Tensor]:
    torch.manual_seed(0)
    x = 2 * torch.randn(200, *shape)
    model(x)
    return lowbit.quantize(model.eval(), recipe, calibration=[x[:64]]), x


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(
    ("make", "shape", "recipe", "io"),
    [
        (Branches, (6,), mixed(), "io_parallel"),
        (Residual, (2, 12, 12), "fixed6", "io_parallel"),
        (Residual, (2, 12, 12), "fixed6", "io_stream"),
        (means, (2, 10), "fixed6", "io_parallel"),
    ],
    ids=["branches", "residual", "residual-stream", "means"],
)
def test_every_code_equals_the_reference(
    make: Callable[[], nn.Module], shape: tuple[int, ...], recipe: Any, io: Any, tmp_path: Path
) -> None:
    q, x = quantized(make(), shape, recipe)
    backend = "Vivado" if io == "io_stream" else "Vitis"
    folder = lowbit.export.hls4ml(q, tmp_path / "hls", io=io, backend=backend)
    parity = lowbit.verify(q, folder, [x])
    assert parity.exact, str(parity)
    assert "100 % of 600 result codes" in str(parity)


# hls4ml truncates weights, unless their type says otherwise
def without_rounded_weights(config: dict[str, Any]) -> None:
    for layer in config["LayerName"].values():
        if "weight" in layer["Precision"]:
            layer["Precision"]["weight"] = layer["Precision"]["weight"].partition(",RND")[0] + ">"
            layer["Precision"]["bias"] = layer["Precision"]["bias"].partition(",RND")[0] + ">"


def float_weights(constant: Constant) -> Tensor:
    """As they were before they were rounded."""
    return to_real(constant.codes, constant.type.fraction).float() - 0.4 * constant.type.scale


def without_types_of_relu(config: dict[str, Any]) -> None:
    for name, layer in config["LayerName"].items():
        if "relu" in name or name == "layer_1":
            layer["Precision"]["result"] = "auto"


def without_order_of_channels(config: dict[str, Any]) -> None:
    config["Model"]["ChannelsLastConversion"] = "off"


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(
    ("drop", "recipe"),
    [
        (without_rounded_weights, "fixed6"),
        (without_types_of_relu, "fixed6"),
        (without_order_of_channels, "fixed6"),
    ],
    ids=["rule 2", "rule 5", "rule 7"],
)
def test_a_dropped_rule_gives_another_network(
    drop: Callable[[dict[str, Any]], None], recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silently: hls4ml converts and compiles without a word."""
    q, x = quantized(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), (6,), recipe)
    whole = export.configuration

    def dropped(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = copy.deepcopy(whole(*args, **kwargs))
        drop(config)
        return config

    monkeypatch.setattr(export, "configuration", dropped)
    if drop is without_rounded_weights:
        monkeypatch.setattr(Constant, "real", float_weights)
    folder = lowbit.export.hls4ml(q, tmp_path / "hls")
    parity = lowbit.verify(q, folder, [x])
    assert not parity.ok


@pytest.mark.usefixtures("quick_compiler")
def test_float32_does_not_hold_wide_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 8: the same project, fed float32, gives rounded results."""
    q, x = quantized(mlp(), (6,), "fixed16")
    folder = lowbit.export.hls4ml(q, tmp_path / "hls")
    assert lowbit.verify(q, folder, [x]).exact
    monkeypatch.setattr(Tensor, "double", Tensor.float)
    results = export.run_project(folder, [x])
    monkeypatch.undo()
    program = lower(q)
    (want,) = program.real(program.run(x))
    assert (results[0].double() == want).double().mean() < 1


def test_the_project_says_what_it_is(tmp_path: Path) -> None:
    q, _ = quantized(mlp(), (6,), "fixed6")
    folder = lowbit.export.hls4ml(
        q, tmp_path / "hls", reuse=2, strategy="Resource", part="xcku115-flvb2104-2-i"
    )
    note = json.loads((folder / export.NOTE).read_text())
    assert note["config"]["Model"]["ReuseFactor"] == 2
    assert note["config"]["LayerName"]["layer_1"]["Precision"] == {"result": str(lower(q).steps[2].type)}
    described = yaml.safe_load((folder / "hls4ml_config.yml").read_text())  # and no Python object in it
    assert described["Part"] == "xcku115-flvb2104-2-i"
    assert described["OutputDir"] == str(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hls"]


def test_a_configuration_of_any_network() -> None:
    """From a plain table of widths."""
    table = {"fc1": {"weight": fixed(6, 1), "bias": "fixed<8,2>"}, "relu": {"result": "ufixed<6,2,RND,SAT>"}}
    config = export.configuration(table, reuse=4)
    assert config["LayerName"]["fc1"]["Precision"] == {
        "weight": "fixed<6,1,RND_CONV,SAT>",
        "bias": "fixed<8,2>",
        "result": "auto",
        "accum": "auto",
    }
    assert config["LayerName"]["relu"]["Precision"] == {"result": "ufixed<6,2,RND,SAT>"}
    assert config["Model"]["ReuseFactor"] == 4
    assert json.loads(json.dumps(config)) == config
    with pytest.raises(LowbitError, match="'fc1': a layer has no 'weights'"):
        export.configuration({"fc1": {"weights": "fixed<6,1>"}})
    with pytest.raises(LowbitError, match="no fixed-point type"):
        export.configuration({"fc1": {"weight": "int8"}})


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), (2, 6, 6), "'0' has 2 groups.*qonnx"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, dilation=2)), (1, 8, 8), "'0' has dilation"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(-0.25, 4.0), nn.Linear(4, 2)),
            (4,),
            "'1': hls4ml has no clamp",
        ),
        (
            nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Linear(4, 3)),
            (2, 6),
            "'2': hls4ml takes a Linear on vectors",
        ),
    ],
)
def test_what_hls4ml_cannot_take_is_refused_first(
    model: nn.Module, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    q, _ = quantized(model, shape, "fixed6")
    with pytest.raises(LowbitError, match=message):
        lowbit.export.hls4ml(q, tmp_path / "hls")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 2), nn.AvgPool2d(3, 3, padding=1)], ids=["overlapping", "padded"]
)
def test_windows_that_end_the_process_in_a_stream_are_refused(pool: nn.Module, tmp_path: Path) -> None:
    q, _ = quantized(nn.Sequential(pool, nn.Conv2d(1, 2, 2)), (1, 7, 7), "fixed6")
    with pytest.raises(LowbitError, match=r"'0' pools windows of \[3, 3\].*use io='io_parallel'"):
        lowbit.export.hls4ml(q, tmp_path / "hls", io="io_stream")


def test_bad_places_and_options(tmp_path: Path) -> None:
    q, x = quantized(mlp(), (6,), "fixed6")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(LowbitError, match="exists already"):
        lowbit.export.hls4ml(q, tmp_path / "full")
    with pytest.raises(LowbitError, match="there is no folder"):
        lowbit.export.hls4ml(q, tmp_path / "no" / "hls")
    with pytest.raises(LowbitError, match="backend='Quartus' is unknown"):
        lowbit.export.hls4ml(q, tmp_path / "hls", backend="Quartus")  # type: ignore[arg-type]
    with pytest.raises(LowbitError, match="io='stream' is unknown"):
        lowbit.export.hls4ml(q, tmp_path / "hls", io="stream")  # type: ignore[arg-type]
    with pytest.raises(LowbitError, match=r"no lowbit\.json"):
        lowbit.verify(q, tmp_path / "full", [x])
    float_scales, _ = quantized(mlp(), (6,), "w8a8")
    with pytest.raises(LowbitError, match="fixed8"):
        lowbit.export.hls4ml(float_scales, tmp_path / "hls")
    (tmp_path / "empty").mkdir()
    assert lowbit.export.hls4ml(q, tmp_path / "empty") == tmp_path / "empty"


def test_the_project_of_another_model_is_seen(tmp_path: Path) -> None:
    q, x = quantized(mlp(), (6,), "fixed6")
    folder = lowbit.export.hls4ml(q, tmp_path / "hls")
    other, _ = quantized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (6,), "fixed6")
    with pytest.raises(LowbitError, match="from a model whose samples are"):
        lowbit.verify(other, folder, [x])

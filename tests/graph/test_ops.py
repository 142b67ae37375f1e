"""The table of operations: what each is to a quantizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Fn, conv, image, traced
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lowbit import INT8
from lowbit.graph.ops import Kind, clamp_bounds, kind_of, module_label
from lowbit.nn.layers import QLinear


def last_node(forward: Callable[..., Any], **children: Any) -> Any:
    gm = traced(Fn(forward, **children), image())
    return next(iter(gm.graph.output_node().all_input_nodes))


def hooked() -> nn.Module:
    layer = conv(3, 8)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


MODULES: list[tuple[nn.Module, Kind]] = [
    (conv(3, 8), "layer"),
    (conv(3, 9, groups=3, dilation=2), "layer"),
    (nn.ConvTranspose2d(3, 8, 2), "layer"),
    (nn.Linear(8, 8), "layer"),
    (weight_norm(conv(3, 8)), "float"),
    (hooked(), "float"),
    (nn.ReLU(), "clamp"),
    (nn.ReLU6(), "clamp"),
    (nn.Hardtanh(-1, 1), "clamp"),
    (nn.Hardtanh(1, 2), "float"),
    (nn.PReLU(), "float"),
    (nn.GELU(), "float"),
    (nn.MaxPool2d(2), "pass"),
    (nn.AvgPool2d(2), "average"),
    (nn.AdaptiveAvgPool2d(1), "average"),
    (nn.Flatten(), "pass"),
    (nn.Identity(), "pass"),
    (nn.Dropout(), "pass"),
    (nn.PixelUnshuffle(2), "pass"),
    (nn.Upsample(scale_factor=2), "pass"),
    (nn.Upsample(scale_factor=2, mode="bilinear"), "float"),
    (nn.ZeroPad2d(1), "pass"),
    (nn.BatchNorm2d(3), "float"),
    (nn.GroupNorm(3, 3), "float"),
    (nn.LayerNorm(8), "float"),
    (nn.Softmax(1), "float"),
]


@pytest.mark.parametrize(("module", "kind"), MODULES, ids=lambda v: str(v).split("\n", maxsplit=1)[0])
def test_modules(module: nn.Module, kind: Kind) -> None:
    assert kind_of(last_node(lambda m, x: m.module(x), module=module)) == kind


FUNCTIONS: list[tuple[str, Callable[..., Any], Kind]] = [
    ("add", lambda m, x: x + x * 2, "add"),
    ("add of a number", lambda m, x: x + 1, "float"),
    ("add with alpha", lambda m, x: torch.add(x, x, alpha=2), "float"),
    ("sub", lambda m, x: x - x, "float"),
    ("mul", lambda m, x: x * x, "mul"),
    ("mul by a number", lambda m, x: x * 0.5, "float"),
    ("div", lambda m, x: x / 2, "float"),
    ("cat", lambda m, x: torch.cat([x, x], 1), "cat"),
    ("matmul", lambda m, x: x @ x.transpose(2, 3), "matmul"),
    ("softmax", lambda m, x: x.softmax(1), "float"),
    ("relu", lambda m, x: F.relu(x), "clamp"),
    ("clamp", lambda m, x: x.clamp(0, 3), "clamp"),
    ("clamp by name", lambda m, x: torch.clamp(x, max=3.0), "clamp"),
    ("clamp to tensors", lambda m, x: torch.clamp(x, min=x.mean()), "float"),
    ("clamp without zero", lambda m, x: x.clamp(1, 3), "float"),
    ("clip", lambda m, x: x.clip(min=0), "clamp"),
    ("reshape", lambda m, x: x.reshape(x.shape[0], -1), "pass"),
    ("permute", lambda m, x: x.permute(0, 2, 3, 1), "pass"),
    ("slice", lambda m, x: x[:, 1:], "pass"),
    ("chunk", lambda m, x: x.chunk(3, 1)[0], "pass"),
    ("max pooling", lambda m, x: F.max_pool2d(x, 2), "pass"),
    ("global mean", lambda m, x: x.mean((2, 3), keepdim=True), "average"),
    ("mean over channels", lambda m, x: x.mean(1), "float"),
    ("pad with zeros", lambda m, x: F.pad(x, (1, 1)), "pass"),
    ("pad with ones", lambda m, x: F.pad(x, (1, 1), value=1.0), "float"),
    ("pad by reflection", lambda m, x: F.pad(x, (1, 1, 1, 1), "reflect"), "pass"),
    ("nearest neighbour", lambda m, x: F.interpolate(x, scale_factor=2), "pass"),
    ("bilinear", lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"), "float"),
    ("dropout that is off", lambda m, x: F.dropout(x, training=False), "pass"),
    ("detach", lambda m, x: x.detach(), "pass"),
    ("data", lambda m, x: x.data, "pass"),
    ("transposed matrices", lambda m, x: x.mT, "pass"),
    ("to the precision it has", lambda m, x: x.float(), "pass"),
    ("to another precision", lambda m, x: x.half().float(), "float"),
    ("sine", lambda m, x: torch.sin(x), "float"),
]


@pytest.mark.parametrize(("name", "forward", "kind"), FUNCTIONS, ids=[f[0] for f in FUNCTIONS])
def test_functions(name: str, forward: Callable[..., Any], kind: Kind) -> None:
    assert kind_of(last_node(forward)) == kind


def test_dropout_that_is_always_on_makes_new_values() -> None:
    gm = torch.fx.symbolic_trace(Fn(lambda m, x: F.dropout(x)))
    node = gm.graph.output_node().args[0]
    node.args[0].meta["value"] = image()
    assert kind_of(node) == "float"


INF = math.inf


@pytest.mark.parametrize(
    ("forward", "bounds"),
    [
        pytest.param(lambda m, x: F.relu(x), (0, INF), id="relu"),
        pytest.param(lambda m, x: F.relu6(x), (0, 6), id="relu6"),
        pytest.param(lambda m, x: F.hardtanh(x), (-1, 1), id="hardtanh"),
        pytest.param(lambda m, x: F.hardtanh(x, 0.0, max_val=2.0), (0, 2), id="hardtanh with ends"),
        pytest.param(lambda m, x: x.clamp(-1, 2), (-1, 2), id="clamp"),
        pytest.param(lambda m, x: x.clamp(max=2), (-INF, 2), id="clamp from above"),
        pytest.param(lambda m, x: torch.clamp_min(x, 0), (0, INF), id="clamp_min"),
        pytest.param(lambda m, x: x.clip(None, 2), (-INF, 2), id="clip"),
    ],
)
def test_bounds_of_clamps(forward: Callable[..., Any], bounds: tuple[float, float]) -> None:
    """The oracle: what the operation makes of numbers far outside."""
    assert clamp_bounds(last_node(forward)) == bounds
    far = forward(None, torch.tensor([-1e30, 1e30])).tolist()
    assert [max(far[0], -1e29), min(far[1], 1e29)] == [max(bounds[0], -1e29), min(bounds[1], 1e29)]


def test_bounds_of_a_module() -> None:
    assert clamp_bounds(last_node(lambda m, x: m.act(x), act=nn.Hardtanh(-2, 3))) == (-2, 3)


def test_only_a_quantized_layer_loses_its_q() -> None:
    class Quantum(nn.Module):
        pass

    assert module_label(Quantum()) == "Quantum"
    assert module_label(QLinear.from_float(nn.Linear(2, 2), INT8)) == "Linear"

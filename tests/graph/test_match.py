"""Questions about a graph: what rules see, where values come from, which BatchNorm can be folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import STYLES, DataBranch, Fn, conv, image, traced
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lowbit.graph.match import batchnorms, hidden_layers, is_global_pool, operations, source_of, tail_of


def roles(model: nn.Module, *example: Tensor) -> list[tuple[str, str, list[str]]]:
    return [(o.name, o.op, sorted(o.roles)) for o in operations(traced(model, *example))]


@pytest.mark.parametrize(
    ("style", "want"),
    [
        (
            "functional relu and residual add",
            [
                ("a", "Conv2d", ["first", "layer"]),
                ("b", "Conv2d", ["layer"]),
                ("c", "Conv2d", ["last", "layer"]),
                ("add", "add", []),
            ],
        ),
        ("one Conv2d used twice", [("a", "Conv2d", ["first", "layer"]), ("b", "Conv2d", ["last", "layer"])]),
        (
            "branch on data at the top",
            [("a", "Conv2d", ["first", "layer"]), ("b", "Conv2d", ["last", "layer"])],
        ),
        (
            "branch on data inside",
            [
                ("stem", "Conv2d", ["first", "layer"]),
                ("inner.a", "Conv2d", ["layer"]),
                ("inner.b", "Conv2d", ["layer"]),
                ("adaptive_avg_pool2d", "adaptive_avg_pool2d", []),
                ("head", "Linear", ["last", "layer"]),
            ],
        ),
        (
            "functional weight",
            [
                ("w_conv2d", "Conv2d", ["first", "layer"]),
                ("adaptive_avg_pool2d", "adaptive_avg_pool2d", []),
                ("v_linear", "Linear", ["last", "layer"]),
            ],
        ),
    ],
)
def test_what_rules_see(style: str, want: Any) -> None:
    assert roles(STYLES[style](), image()) == want


def test_a_lookup_is_not_the_first_layer() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert roles(model, torch.randint(0, 9, (4, 3))) == [
        ("0", "Embedding", ["layer"]),
        ("1", "Linear", ["first", "layer"]),
        ("2", "Linear", ["last", "layer"]),
    ]


def test_the_last_call_decides_the_last_layer() -> None:
    model = Fn(lambda m, x: m.a(m.b(m.a(x))), a=conv(3, 3), b=conv(3, 3))
    assert roles(model, image()) == [("a", "Conv2d", ["first", "last", "layer"]), ("b", "Conv2d", ["layer"])]


def test_a_function_does_not_answer_to_the_name_of_a_layer() -> None:
    model = Fn(lambda m, x: m.matmul(x @ x), matmul=nn.Linear(8, 8))
    assert [name for name, _, _ in roles(model, image())] == ["matmul_", "matmul"]


def test_hidden_layers_are_found_once_and_only_where_they_can_be_swapped() -> None:
    class Leaf(DataBranch):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.normed = self.b, weight_norm(nn.Linear(8, 8))
            self.blocks = nn.ModuleList([nn.Sequential(conv(8, 8))])
            self.whole = nn.TransformerEncoderLayer(8, 2, 8)

    gm = traced(Leaf(), image())
    assert [path for path, _ in hidden_layers(gm, "model")] == ["model.a", "model.b", "model.blocks.0.0"]


def node_named(gm: Any, name: str) -> Any:
    return next(n for n in gm.graph.nodes if n.meta.get("name") == name)


@pytest.mark.parametrize(
    ("forward", "source"),
    [
        pytest.param(lambda m, x: m.a(x).flatten(1), "a", id="flatten"),
        pytest.param(
            lambda m, x: F.max_pool2d(m.a(x), 2).permute(0, 2, 3, 1)[:, 0], "a", id="three in a row"
        ),
        pytest.param(lambda m, x: m.a(x).chunk(2, 1)[1], "a", id="one of several parts"),
        pytest.param(lambda m, x: x.flatten(1), "x", id="the input"),
        pytest.param(lambda m, x: F.relu(m.a(x)), "relu", id="an activation makes new values"),
        pytest.param(lambda m, x: m.lstm(x[:, 0])[0][:, -1], "getitem#2", id="the sequence of an LSTM"),
        pytest.param(lambda m, x: m.lstm(x[:, 0])[1][0].squeeze(0), "getitem#3", id="the state of an LSTM"),
    ],
)
def test_where_values_come_from(forward: Callable[..., Any], source: str) -> None:
    gm = traced(Fn(forward, a=conv(3, 8), lstm=nn.LSTM(8, 8, batch_first=True)), image())
    (node,) = gm.graph.output_node().all_input_nodes
    assert source_of(node).meta["name"] == source
    assert torch.is_tensor(source_of(node).meta["value"])


@pytest.mark.parametrize(
    ("forward", "tail"),
    [
        pytest.param(lambda m, x: F.relu(m.a(x)), "relu", id="relu"),
        pytest.param(lambda m, x: F.relu6(m.a(x)), "relu6", id="relu6"),
        pytest.param(lambda m, x: F.gelu(m.a(x)), "a", id="no clamp"),
        pytest.param(lambda m, x: F.relu(y := m.a(x)) * y, "a", id="read twice"),
        pytest.param(lambda m, x: F.relu(F.max_pool2d(m.a(x), 2)), "a", id="not right behind"),
    ],
)
def test_tail_of_a_layer(forward: Callable[..., Any], tail: str) -> None:
    gm = traced(Fn(forward, a=conv(3, 8)), image())
    assert tail_of(node_named(gm, "a")).meta["name"] == tail


@pytest.mark.parametrize(
    ("forward", "want"),
    [
        pytest.param(lambda m, x: x.mean((2, 3)), True, id="mean"),
        pytest.param(lambda m, x: m.pool(x), True, id="AdaptiveAvgPool2d"),
        pytest.param(lambda m, x: F.adaptive_avg_pool2d(x, 2), False, id="to two by two"),
        pytest.param(lambda m, x: F.avg_pool2d(x, 2), False, id="windows"),
    ],
)
def test_global_pooling(forward: Callable[..., Any], want: bool) -> None:
    gm = traced(Fn(forward, pool=nn.AdaptiveAvgPool2d(1)), image())
    assert any(is_global_pool(n) for n in gm.graph.nodes) == want


class NoStatistics(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False))


def tied() -> nn.Module:
    model = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 3))
    model[3].weight = model[0].weight
    return model


BN = nn.BatchNorm2d
KEPT: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "conv and BatchNorm": (lambda: nn.Sequential(conv(3, 8), BN(8)), [""]),
    "before a conv": (lambda: nn.Sequential(BN(3), conv(3, 8)), ["no layer stands right before it"]),
    "behind an activation": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), BN(8)),
        ["no layer stands right before it"],
    ),
    "BatchNorm called twice": (
        lambda: Fn(lambda m, x: m.n(m.b(m.n(m.a(x)))), a=conv(3, 8), b=conv(8, 8), n=BN(8)),
        ["it is called more than once"] * 2,
    ),
    "conv called twice": (
        lambda: Fn(lambda m, x: m.n(m.a(m.a(x))), a=conv(3, 3), n=BN(3)),
        ["'a' is called more than once"],
    ),
    "conv read elsewhere": (
        lambda: Fn(lambda m, x: m.n(y := m.a(x)) + y, a=conv(3, 8), n=BN(8)),
        ["the output of 'a' is read elsewhere too"],
    ),
    "tied weights": (tied, ["the weight of '0' is shared"]),
    "without statistics": (NoStatistics, ["it keeps no running statistics"]),
    "parametrized conv": (
        lambda: nn.Sequential(weight_norm(conv(3, 8)), BN(8)),
        ["no layer stands right before it"],
    ),
    "another axis than the linear layer's": (
        lambda: Fn(lambda m, x: m.n(m.fc(x[:, 0])), fc=nn.Linear(8, 8), n=nn.BatchNorm1d(8)),
        ["it normalizes another axis than the linear layer writes"],
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_which_batchnorm_can_be_folded(name: str) -> None:
    build, want = KEPT[name]
    assert [why for _, why in batchnorms(traced(build(), image()))] == want


@pytest.mark.parametrize(
    ("make", "shortcuts"),
    [
        ("projection", {"down"}),
        ("pooled", {"down"}),
        ("bottleneck", set()),
        ("wide", set()),
        ("chain", set()),
    ],
)
def test_a_shortcut_is_a_small_convolution_alone_beside_a_branch(make: str, shortcuts: set[str]) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        y = m.b(m.a(x).relu())
        if make == "projection":
            return m.head(y + m.norm(m.down(x)))
        if make == "pooled":
            return m.head(y + m.down(F.avg_pool2d(x, 3, 1, 1)))
        if make == "wide":
            return m.head(y + m.b(x))
        return m.head(m.down(y) + x if make == "bottleneck" else m.down(y))

    parts = {"stem": conv(3, 4), "a": conv(4, 4), "b": conv(4, 4), "down": conv(4, 4, 1), "head": conv(4, 4)}
    gm = traced(Fn(forward, norm=nn.BatchNorm2d(4), **parts), image())
    assert {o.name for o in operations(gm) if "shortcut" in o.roles} == shortcuts

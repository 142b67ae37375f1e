"""The coverage table reads the graph: what stays in float is there with its reason and its cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import BatchNormNet, Fn, conv, image, settle
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import lowbit
from lowbit import FP16, INT8, UINT8, Recipe, Rule, preset
from lowbit.coverage import Row


def rows(model: nn.Module, recipe: Any = "w8a8", x: Tensor | None = None) -> dict[str, Row]:
    q = lowbit.quantize(settle(model), recipe, calibration=[image() if x is None else x])
    return {row.name: row for row in q.coverage().rows}


def hooked() -> nn.Module:
    layer = conv(3, 8)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


SEQUENCE = {"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)}
NO_KERNEL = "no integer kernel for it"
FLOAT: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "an activation": (lambda: nn.Sequential(conv(3, 8), nn.GELU()), "1", NO_KERNEL, ""),
    "LayerNorm": (lambda: nn.Sequential(nn.LayerNorm(8), conv(3, 8)), "0", NO_KERNEL, ""),
    "GroupNorm": (lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8)), "1", NO_KERNEL, ""),
    "BatchNorm before a layer": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), conv(3, 8)),
        "0",
        "not folded: no layer stands right before it",
        "put it right behind a layer of its own",
    ),
    "weight_norm": (
        lambda: nn.Sequential(weight_norm(conv(3, 8)), conv(8, 8)),
        "0",
        "its weight is computed by a parametrization",
        "torch.nn.utils.parametrize.remove_parametrizations before quantizing",
    ),
    "a hook": (
        lambda: nn.Sequential(hooked(), conv(8, 8)),
        "0",
        "a hook runs with it",
        "remove that before quantizing (torch.nn.utils.remove_weight_norm, hook.remove())",
    ),
    "a computed weight": (
        lambda: Fn(lambda m, x: F.conv2d(x, m.w * 2), w=nn.Parameter(torch.randn(4, 3, 3, 3))),
        "conv2d",
        "its weight is computed, not a Parameter",
        "compute the weight once, before quantizing, and hold it in a layer",
    ),
    "functional BatchNorm": (
        lambda: Fn(
            lambda m, x: F.batch_norm(m.a(x), m.n.running_mean, m.n.running_var),
            a=conv(3, 8),
            n=nn.BatchNorm2d(8),
        ),
        "batch_norm",
        NO_KERNEL,
        "use nn.BatchNorm1d or nn.BatchNorm2d, which can be folded",
    ),
    "LSTM": (
        lambda: Fn(lambda m, x: m.fc(m.lstm(x[:, 0])[0]), lstm=nn.LSTM(8, 8), fc=nn.Linear(8, 4)),
        "lstm",
        NO_KERNEL,
        "",
    ),
    "MultiheadAttention": (
        lambda: Fn(
            lambda m, x: m.fc(m.mha(x[:, 0], x[:, 1], x[:, 2])[0]),
            mha=nn.MultiheadAttention(8, 2),
            fc=nn.Linear(8, 4),
        ),
        "mha",
        NO_KERNEL,
        "write it with Linear layers and scaled_dot_product_attention",
    ),
    "scaled_dot_product_attention": (
        lambda: Fn(
            lambda m, x: m.out(F.scaled_dot_product_attention(*m.qkv(x).chunk(3, -1), enable_gqa=True)),
            **SEQUENCE,
        ),
        "scaled_dot_product_attention",
        NO_KERNEL,
        "write attention with matmul and softmax to quantize its products",
    ),
    "a ReLU behind a float operation": (
        lambda: Fn(lambda m, x: m.b(F.relu(m.a(x).tanh())), a=conv(3, 8), b=conv(8, 8)),
        "relu",
        "its input is not quantized",
        "",
    ),
    "a ReLU whose input is read elsewhere": (
        lambda: Fn(lambda m, x: m.b(F.relu(y := m.a(x))) + y, a=conv(3, 8), b=conv(8, 8)),
        "relu",
        "not fused: no layer or addition right before it that it alone reads",
        "",
    ),
}


@pytest.mark.parametrize("name", FLOAT)
def test_what_stays_in_float(name: str) -> None:
    build, where, why, cure = FLOAT[name]
    row = rows(build())[where]
    assert (row.status, row.why, row.cure) == ("float", why, cure)


def test_every_operation_that_computes_has_a_row() -> None:
    """The oracle: the model's own operations, counted by hand; what only moves values has none."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x)).flatten(2).transpose(1, 2)
        y = m.norm(y)
        return (m.fc(y) * 0.5).softmax(-1).mean(1)

    got = rows(Fn(forward, a=conv(3, 8), norm=nn.LayerNorm(8), fc=nn.Linear(8, 4)))
    assert list(got) == ["a", "relu", "norm", "fc", "mul", "softmax", "mean"]


def test_weights_only() -> None:
    got = rows(BatchNormNet(), "w8")
    statuses = {name: (row.status, row.inputs, row.output) for name, row in got.items()}
    assert statuses == {
        "a": ("weight", "", "float"),
        "relu": ("float", "", "float"),
        "b": ("weight", "", "float"),
        "relu#2": ("float", "", "float"),
        "adaptive_avg_pool2d": ("float", "", "float"),
        "fc": ("weight", "", "float"),
    }
    assert got["a"].cure == "Rule(match='a', weight=INT8, activation=UINT8)"
    assert got["adaptive_avg_pool2d"].cure == "Rule(match='adaptive_avg_pool2d', activation=UINT8)"


def test_a_relu_behind_a_layer_in_float_is_in_float() -> None:
    """Its result is quantized, because the next layer reads it; but no integer kernel computes it."""
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8))
    got = rows(model, preset("w8a8").with_rule(Rule(match="0", weight=INT8)))
    assert (got["0"].status, got["0"].output) == ("weight", "float")
    assert (got["1"].status, got["1"].output) == ("float", "uint8+zp/tensor")
    assert got["1"].why == "its input is not quantized"


def test_every_cure_that_is_a_rule_works() -> None:
    """The oracle: paste it into the recipe, and the operation runs as an integer."""
    model = settle(BatchNormNet(), image())
    recipe = preset("w8")
    for row in lowbit.quantize(model, recipe, calibration=[image()]).coverage().rows:
        if row.cure.startswith("Rule("):
            recipe = recipe.with_rule(eval(row.cure, vars(lowbit)))  # noqa: S307
    table = lowbit.quantize(model, recipe, calibration=[image()]).coverage()
    assert {row.status for row in table.rows} == {"integer"}


def test_a_rule_that_leaves_a_layer_in_float() -> None:
    recipe = preset("w8a8").with_rule(Rule(match="b"))
    row = rows(BatchNormNet(), recipe)["b"]
    assert (row.status, row.weight, row.inputs) == ("float", "", "uint8+zp/tensor")
    assert (row.why, row.cure) == ("no rule asks for its weight", "Rule(match='b', weight=INT8)")


@pytest.mark.parametrize(
    "rule",
    [Rule(weight=FP16, activation=UINT8), Rule(weight=INT8, activation=FP16)],
    ids=["weight", "inputs"],
)
def test_half_precision_is_not_integer(rule: Rule) -> None:
    row = rows(BatchNormNet(), Recipe(rules=(rule,)))["a"]
    assert (row.status, row.why) == ("weight", "no integer kernel for fp16")


def test_fold_bn_off() -> None:
    recipe = Recipe(rules=(Rule(weight=INT8, activation=UINT8),), fold_bn="never")
    row = rows(BatchNormNet(), recipe)["bn_a"]
    assert (row.status, row.why, row.cure) == (
        "float",
        "not folded: fold_bn is 'never' in the recipe",
        "fold_bn='before'",
    )


def test_a_lookup() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4))
    got = rows(model, "w8a8", torch.randint(0, 9, (16, 3)))
    assert (got["0"].status, got["0"].why, got["0"].output) == ("weight", "a table lookup", "uint8+zp/tensor")


def test_modules_inside_what_cannot_be_traced() -> None:
    class Leaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = conv(3, 8), nn.BatchNorm2d(8), weight_norm(conv(8, 8))
            self.skipped = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.a(x))
            return self.skipped(self.b(y)) if y.sum() < 1e9 else y

    recipe = preset("w8a8").with_rule(Rule(match="skipped"))
    got = rows(Leaf(), recipe)
    inside = "inside the model, which cannot be traced"
    assert {name: (row.status, row.why) for name, row in got.items()} == {
        "model": ("float", "cannot be traced; only the layers inside it are quantized"),
        "a": ("integer", inside),
        "norm": ("float", inside),
        "b": ("float", inside),
        "skipped": ("float", "no rule asks for its weight"),
    }


def test_the_printed_table() -> None:
    text = str(lowbit.quantize(settle(BatchNormNet(), image()), "w8a8", calibration=[image()]).coverage())
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert lines[-1] == "6 operations: 6 integer, 0 with a quantized weight only, 0 in float"
    assert all(len(line) == len(line.rstrip()) for line in lines)


def test_a_row_by_its_name() -> None:
    coverage = lowbit.quantize(settle(BatchNormNet(), image()), "w8a8", calibration=[image()]).coverage()
    assert coverage["fc"].op == "Linear"


def test_the_reason_of_a_rule_is_shown() -> None:
    got = rows(BatchNormNet(), preset("w4a8").with_rule(Rule(match="b", reason="too sensitive")))
    edge = "the first and the last layer keep 8 bits"
    assert [got[name].why for name in ("a", "b", "fc")] == [
        edge,
        "too sensitive; no rule asks for its weight",
        edge,
    ]


def test_an_operand_that_no_data_reached_is_in_float() -> None:
    """The part beyond the end of every calibration sample is empty."""
    model = Fn(lambda m, x: torch.cat([m.a(x), m.b(x[:, 4:])], 1), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    q = lowbit.prepare(model, "w8a8", torch.randn(4, 6, 8))
    lowbit.calibrate(q, [torch.randn(4, 4, 8)])
    row = q.coverage()["cat"]
    assert (row.status, row.why) == ("float", "no calibration data reached it")

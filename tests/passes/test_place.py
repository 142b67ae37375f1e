"""Quantizers stand exactly where docs/architecture.md says, and each rule decides what it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import STYLES, BatchNormNet, Fn, InvertedResidual, conv, image, quantizers, settle, traced
from torch import Tensor, nn

import lowbit
from lowbit import FP16, INT4, INT8, UINT8, LowbitError, PerChannel, PerGroup, QuantSpec, Recipe, Rule, preset
from lowbit.core.affine import choose_qparams
from lowbit.core.observers import observers
from lowbit.graph.match import quantizer_of
from lowbit.graph.ops import kind_of, module_of
from lowbit.nn.layers import BoundLayer, QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.passes.fold_bn import fold_bn, fold_later
from lowbit.passes.place import place, resolve
from lowbit.recipe import SPECS


def placed(model: nn.Module, recipe: Recipe, *example: Tensor) -> Any:
    gm = traced(model, *example)
    fold_bn(gm)
    place(gm, recipe)
    return gm


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    return m.out((q @ k.transpose(1, 2)).softmax(-1) @ v)


def fused_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    return m.out(F.scaled_dot_product_attention(q, k, v))


def lstm(m: Any, x: Tensor) -> Tensor:
    y, (h, _) = m.lstm(x[:, 0])
    return m.fc(y[:, -1]) + m.fc(h[0])


SEQUENCE = {"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)}
# where quantizers stand, by the name of the operation whose result they round
PLACES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "conv, BatchNorm and ReLU": (BatchNormNet, {"x", "relu", "relu#2", "adaptive_avg_pool2d"}),
    "add and ReLU": (STYLES["functional relu and residual add"], {"x", "relu", "relu#2", "c", "relu#3"}),
    "one ReLU used twice": (STYLES["one ReLU used twice"], {"x", "relu", "relu#2"}),
    "one Conv2d used twice": (STYLES["one Conv2d used twice"], {"x", "relu", "relu#2", "b#2"}),
    "max pooling shares": (STYLES["branch on a shape"], {"x", "relu", "b"}),
    "a submodule as it stands": (
        STYLES["branch on data inside"],
        {"x", "relu", "inner", "adaptive_avg_pool2d"},
    ),
    "dict output": (STYLES["dict output"], {"x", "relu", "adaptive_avg_pool2d"}),
    "functional weight": (STYLES["functional weight"], {"x", "relu", "adaptive_avg_pool2d"}),
    "inverted residual": (
        InvertedResidual,
        {"x", "stem", "expand.2", "depthwise.2", "project.0", "add", "head"},
    ),
    "moved values share": (
        lambda: Fn(
            lambda m, x: m.b(F.pad(F.max_pool2d(m.a(x), 2).permute(0, 1, 3, 2)[:, :4].contiguous(), (1, 1))),
            a=conv(3, 8),
            b=conv(4, 4),
        ),
        {"x", "a", "b"},
    ),
    "an activation in float": (
        lambda: Fn(lambda m, x: m.b(F.gelu(m.a(x))), a=conv(3, 8), b=conv(8, 4)),
        {"x", "a", "gelu", "b"},
    ),
    "read before and after its ReLU": (
        lambda: Fn(lambda m, x: m.b(F.relu(y := m.a(x))) + y, a=conv(3, 8), b=conv(8, 8)),
        {"x", "a", "relu", "b", "add"},
    ),
    "cat": (
        lambda: Fn(
            lambda m, x: m.c(torch.cat([F.relu(m.a(x)), m.b(x)], 1)), a=conv(3, 4), b=conv(3, 4), c=conv(8, 4)
        ),
        {"x", "relu", "b", "cat", "c"},
    ),
    "gate": (
        lambda: Fn(
            lambda m, x: (y := F.relu(m.a(x))) * torch.sigmoid(m.b(y.mean((2, 3), keepdim=True))),
            a=conv(3, 8),
            b=nn.Conv2d(8, 8, 1),
        ),
        {"x", "relu", "adaptive_avg_pool2d", "b", "sigmoid", "mul"},
    ),
    "attention as plain operations": (
        lambda: Fn(lambda m, x: attention(m, x[:, 0]), **SEQUENCE),
        {"x", "qkv", "softmax", "matmul#2"},
    ),
    "scaled_dot_product_attention": (
        lambda: Fn(lambda m, x: fused_attention(m, x[:, 0]), **SEQUENCE),
        {"x", "qkv", "softmax", "matmul#2"},
    ),
    "LSTM": (
        lambda: Fn(lstm, lstm=nn.LSTM(8, 8, batch_first=True), fc=nn.Linear(8, 4)),
        {"getitem#2", "getitem#4"},
    ),
    "a layer that writes the output": (
        lambda: Fn(lambda m, x: m.out(m.qkv(x)[..., :8]), **SEQUENCE),
        {"x", "qkv"},
    ),
    "nothing to quantize": (lambda: Fn(lambda m, x: x.softmax(1)), set()),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_quantizers_stand(name: str) -> None:
    build, want = PLACES[name]
    gm = placed(settle(build(), image()), preset("w8a8"), image())
    got = quantizers(gm)
    assert set(got) == want
    assert len(got) == sum(kind_of(n) == "quantizer" for n in gm.graph.nodes), "one for each tensor"


@pytest.mark.parametrize("name", PLACES)
def test_nothing_changes_before_calibration(name: str) -> None:
    model, x = settle(PLACES[name][0](), image()), image()
    want, got = model(x), placed(model, preset("w8a8"), x)(x)
    for a, b in zip(
        want.values() if isinstance(want, dict) else [want],
        got.values() if isinstance(got, dict) else [got],
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_one_layer_called_twice_has_one_weight_quantizer_and_two_outputs() -> None:
    gm = placed(STYLES["one Conv2d used twice"](), preset("w8a8"), image())
    layers = [module_of(n) for n in gm.graph.nodes if kind_of(n) == "layer"]
    assert layers[1] is layers[2]
    assert sum(isinstance(m, Quantizer) for m in gm.modules()) == 2 + 4


def test_layers_no_graph_reaches_carry_their_quantizers() -> None:
    gm = placed(STYLES["branch on data inside"](), preset("w8a8"), image())
    bound = {name: m for name, m in gm.named_modules() if isinstance(m, BoundLayer)}
    assert list(bound) == ["inner.a", "inner.b"]
    assert all(m.input_quantizer is not None and m.output_quantizer is not None for m in bound.values())
    assert all(isinstance(m.layer, QLayer) for m in bound.values())


@pytest.mark.parametrize("name", ["w8", "w4", "fp16"])
def test_presets_for_weights_leave_activations_alone(name: str) -> None:
    gm = placed(STYLES["functional relu and residual add"](), preset(name), image())
    assert quantizers(gm) == {}
    assert all(isinstance(module_of(n), QLayer) for n in gm.graph.nodes if kind_of(n) == "layer")


# --- rules

MODEL = STYLES["functional relu and residual add"]


def decided(recipe: Recipe, model: nn.Module | None = None, x: Tensor | None = None) -> dict[str, str]:
    gm = traced(model or MODEL(), image() if x is None else x)
    return {d.name: str(d.weight or d.activation or "float") for d in resolve(gm, recipe)}


W8, W4 = {"weight": INT8, "activation": UINT8}, {"weight": INT4, "activation": UINT8}
RULES: dict[str, tuple[tuple[Rule, ...], dict[str, str]]] = {
    "the first match wins": (
        (Rule(match="b", **W4), Rule(match="*", **W8)),
        {"a": "int8/channel", "b": "int4/channel", "c": "int8/channel", "add": "int8/channel"},
    ),
    "by class": (
        (Rule(match="type:Conv2d", **W4),),
        {"a": "int4/channel", "b": "int4/channel", "c": "int4/channel", "add": "float"},
    ),
    "by regular expression": (
        (Rule(match="re:[ab]", **W4), Rule(match="add", activation=UINT8)),
        {"a": "int4/channel", "b": "int4/channel", "c": "float", "add": "uint8+zp/tensor"},
    ),
    "by role": (
        (Rule(match="role:first", **W8), Rule(match="role:last", weight=FP16), Rule(match="?", **W4)),
        {"a": "int8/channel", "b": "int4/channel", "c": "fp16", "add": "float"},
    ),
    "a rule that leaves in float": (
        (Rule(match="c"), Rule(match="*", **W8)),
        {"a": "int8/channel", "b": "int8/channel", "c": "float", "add": "int8/channel"},
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    rules, want = RULES[name]
    assert decided(Recipe(rules=rules)) == want


def test_rules_reach_nested_and_hidden_layers() -> None:
    recipe = Recipe(rules=(Rule(match="inner.*", **W4), Rule(match="*", **W8)))
    gm = placed(STYLES["branch on data inside"](), recipe, image())
    specs = {n: str(m.weight_quantizer.spec) for n, m in gm.named_modules() if isinstance(m, QLayer)}
    assert specs == {
        "stem": "int8/channel",
        "inner.a.layer": "int4/channel",
        "inner.b.layer": "int4/channel",
        "head": "int8/channel",
    }


@pytest.mark.parametrize(
    ("match", "hint"),
    [
        ("ad", "did you mean 'add'"),
        ("type:Conv3d", "did you mean 'type:Conv2d'"),
        ("re:z.*", "choose from|did you mean"),
        ("layer1.*", "choose from: a, add, b, c"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error(match: str, hint: str) -> None:
    with pytest.raises(LowbitError, match=f"matches nothing in this model; ({hint})"):
        decided(Recipe(rules=(Rule(match=match, **W8), Rule(match="*", **W8))))


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4"])
@pytest.mark.parametrize("style", STYLES)
def test_presets_match_in_every_style(style: str, name: str) -> None:
    got = decided(preset(name), STYLES[style]())
    layers = [k for k, v in got.items() if "/channel" in v and k not in ("add", "adaptive_avg_pool2d")]
    if name.startswith("w4"):
        assert [got[layers[0]], got[layers[-1]]] == ["int8/channel"] * 2, "the first and the last keep 8 bits"


def test_the_widest_reader_decides() -> None:
    """`a` is read by a layer of 4-bit inputs, which rounds once more, and by one of 8-bit inputs."""
    model = Fn(lambda m, x: m.b(y := m.a(x)) + m.c(y), a=conv(3, 8), b=conv(8, 8), c=conv(8, 8))
    four = replace(UINT8, bits=4)
    recipe = Recipe(rules=(Rule(match="[ab]", weight=INT8, activation=four), Rule(match="*", **W8)))
    gm = placed(model, recipe, image())
    specs = {source: gm.get_submodule(path).spec.bits for source, path in quantizers(gm).items()}
    assert specs == {"x": 4, "a": 8, "activation_quantizers.a": 4, "b": 8, "c": 8, "add": 8}
    assert gm.get_submodule("activation_quantizers.a_4_bits").spec == four


def test_the_channels_of_a_transposed_convolution() -> None:
    gm = placed(nn.Sequential(nn.ConvTranspose2d(3, 8, 2)), preset("w8a8"), image())
    assert module_of(
        next(n for n in gm.graph.nodes if kind_of(n) == "layer")
    ).weight_quantizer.spec == replace(INT8, granularity=PerChannel(1))


def test_a_group_that_does_not_divide() -> None:
    spec = QuantSpec(bits=4, granularity=PerGroup(1, 3))
    with pytest.raises(LowbitError, match="'a': group size 3 does not divide the 8 entries"):
        placed(Fn(lambda m, x: m.a(x), a=nn.Linear(8, 4)), Recipe(rules=(Rule(weight=spec),)), image())


def test_a_depthwise_layer_has_no_groups_and_the_cure_says_what_to_write() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8, groups=8), nn.Conv2d(8, 4, 1))
    recipe = preset("w4", weight_granularity=32)
    with pytest.raises(LowbitError, match=r"'2': group size 32 does not .* put Rule") as caught:
        placed(model, recipe, image())
    rule = str(caught.value).partition("put ")[2].partition(" before")[0]
    placed(model, recipe.with_rule(eval(rule, {"Rule": Rule, "INT4": INT4})), image())  # noqa: S307


def test_scales_of_the_inputs_do_not_leave_an_integer_sum() -> None:
    spec = replace(INT8, granularity=PerChannel(1))
    with pytest.raises(LowbitError, match=r"'0': a scale for each index of weight axis 1 .* PerChannel\(0\)"):
        placed(nn.Sequential(conv(3, 8)), Recipe(rules=(Rule(weight=spec, activation=UINT8),)), image())
    placed(nn.Sequential(conv(3, 8)), Recipe(rules=(Rule(weight=spec),)), image())


def test_the_observer_of_the_rule() -> None:
    rule = Rule(weight=INT8, activation=UINT8, observer="kl", weight_observer="minmax")
    gm = placed(MODEL(), Recipe(rules=(rule,)), image())
    for module in gm.modules():
        if isinstance(module, QLayer):
            assert module.weight_quantizer.weight_observer == "minmax"
    names = {type(gm.get_submodule(path).observer).__name__ for path in quantizers(gm).values()}
    assert names == {"KL"}


@pytest.mark.parametrize(
    ("activation", "never"),
    [
        (nn.ReLU(), True),
        (nn.Hardtanh(), False),
        (nn.Hardtanh(0.0, 1.0), True),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), True),
        (nn.Sigmoid(), True),
        (nn.PReLU(), False),
        (nn.Tanh(), False),
        (nn.Identity(), False),
    ],
    ids=str,
)
def test_one_bit_of_what_is_never_negative(activation: nn.Module, never: bool) -> None:
    """Its sign would always be 1: it gets the codes 0 and 1, and that is said."""
    model = nn.Sequential(conv(3, 8), activation, conv(8, 4))
    rules = (Rule(match="role:first", weight=INT8), Rule(weight="binary", activation="sign"))
    q = lowbit.prepare(model, Recipe(rules=rules), image())
    node = next(n for n in q.graph.graph.nodes if n.target == "2")
    second = quantizer_of(node.args[0])
    assert second is not None
    assert second.spec == SPECS["bit" if never else "sign"]
    assert [n for n in q.notes if "no ReLU in front of a sign" in n.text] == (q.notes if never else [])
    assert bool(q.notes) == never


# -- inputs narrower than the tensor that is kept

FOUR = replace(UINT8, bits=4)
NARROW = Recipe(rules=(Rule(match="role:layer", weight=INT8, activation=FOUR), Rule(activation=UINT8)))


class Narrowed:
    """What stands before each reader of a placed graph."""

    def __init__(self, model: nn.Module, recipe: Recipe, x: Tensor | None = None) -> None:
        self.gm = placed(model, recipe, image() if x is None else x)
        self.nodes = {str(n.meta["name"]): n for n in self.gm.graph.nodes if n.op != "output"}

    def chain(self, reader: str, operand: int = 0) -> list[str]:
        """From the operand back to the operation that made it: "4", "max_pool2d", "8", "relu"."""
        node, found = self.nodes[reader].args[operand], []
        while kind_of(node) in ("quantizer", "pass"):
            quantizes = kind_of(node) == "quantizer"
            found.append(str(module_of(node).spec.bits) if quantizes else str(node.meta["name"]))
            node = node.args[0]
        return [*found, str(node.meta["name"])]

    def reads_same(self, first: str, second: str) -> bool:
        return self.nodes[first].args[0] is self.nodes[second].args[0]

    @property
    def count(self) -> int:
        return sum(isinstance(m, Quantizer) for m in self.gm.modules()) - sum(
            isinstance(m, QLayer) for m in self.gm.modules()
        )


def test_readers_of_one_tensor_share_a_narrow_quantizer() -> None:
    model = Fn(lambda m, x: m.b(y := F.relu(m.a(x))) + m.c(y) + y, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8))
    found = Narrowed(model, NARROW)
    assert found.chain("b") == found.chain("c") == ["4", "8", "relu"]
    assert found.reads_same("b", "c")
    assert found.chain("add#2", 1) == ["8", "relu"], "the sum reads the wide one"
    assert found.chain("a") == ["4", "x"], "no other reader, no second quantizer"
    assert found.count == 7


def test_a_narrow_quantizer_stands_behind_what_moves_the_values() -> None:
    """Rounded before a maximum or after it, the codes are the same; each branch has its own."""
    model = Fn(
        lambda m, x: m.fc(F.max_pool2d(y := F.relu(m.a(x)), 8).flatten(1)) + m.b(y + y).mean((2, 3)),
        a=conv(3, 8),
        b=conv(8, 5),
        fc=nn.Linear(8, 5),
    )
    found = Narrowed(model, NARROW)
    assert found.chain("fc") == ["4", "flatten", "max_pool2d", "8", "relu"]
    assert found.chain("add") == ["8", "relu"]


def test_equal_widths_need_one_quantizer() -> None:
    model = Fn(lambda m, x: m.b(y := F.relu(m.a(x))) + m.c(y), a=conv(3, 8), b=conv(8, 8), c=conv(8, 8))
    for recipe in (preset("w8a8"), preset("w4a8"), Recipe(rules=(Rule(weight=INT4, activation=FOUR),))):
        found = Narrowed(model, recipe)
        assert not any("_bits" in name for name in found.nodes)
        assert found.count == 5


def test_three_widths() -> None:
    two = replace(UINT8, bits=2)
    rules = (Rule(match="b", weight=INT8, activation=two), *NARROW.rules)
    model = Fn(lambda m, x: m.b(y := m.a(x)) + m.c(y) + y, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8))
    found = Narrowed(model, Recipe(rules=rules))
    assert found.chain("b") == ["2", "8", "a"]
    assert found.chain("c") == ["4", "8", "a"]


@pytest.mark.parametrize("name", ["w4a4", "w3a3", "w2a2", "w2a4"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_presets_narrow_the_inputs_of_inner_layers_alone(name: str, after: bool) -> None:
    """First and last layer, sums and averages have 8 bits, whenever BatchNorm is folded."""
    model = settle(InvertedResidual(), image())
    gm = traced(model, image())
    (fold_later if after else fold_bn)(gm)
    place(gm, preset(name))
    bits = int(name[3])
    layers = {str(n.meta["name"]): n for n in gm.graph.nodes if kind_of(n) == "layer"}
    weights = {n: module_of(node).weight_quantizer.spec.bits for n, node in layers.items()}
    inputs = {n: module_of(node.args[0]).spec.bits for n, node in layers.items()}
    inner = {"expand.0", "depthwise.0", "project.0"}
    assert {n for n, b in weights.items() if b == int(name[1])} == inner
    assert {n for n, b in inputs.items() if b == bits} == inner
    assert {b for n, b in (*weights.items(), *inputs.items()) if n not in inner} == {8}
    add = next(n for n in gm.graph.nodes if kind_of(n) == "add")
    assert [module_of(a).spec.bits for a in add.args] == [8, 8]
    paths = {str(n.target) for n in gm.graph.nodes if kind_of(n) == "quantizer"}
    assert paths == {
        f"activation_quantizers.{p}"
        for p in ("x", "stem", f"stem_{bits}_bits", "expand_2", "depthwise_2", "project_0", "add", "head")
    }


def test_both_quantizers_see_the_same_tensor() -> None:
    """Each has its own range: of the floats, not of what the other rounds."""
    x = image()
    model = Fn(lambda m, x: m.b(y := F.relu(m.a(x))) + y, a=conv(3, 8), b=conv(8, 8))
    q = lowbit.prepare(model, NARROW, x)
    lowbit.calibrate(q, [x])
    relu = F.relu(model.a(x)).detach()
    for bits, path in ((8, "relu"), (4, "relu_4_bits")):
        quantizer = q.graph.get_submodule(f"activation_quantizers.{path}")
        alone = observers.get("mse")(quantizer.spec)
        alone.update(relu)
        assert torch.equal(quantizer.scale, choose_qparams(*alone.range(), quantizer.spec)[0])
        assert quantizer.spec.bits == bits

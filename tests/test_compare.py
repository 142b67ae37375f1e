"""The comparison with the float model: every number against one computed by hand."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import lowbit
from lowbit import FP16, INT4, INT8, UINT8, LowbitError, PerChannel, QuantSpec, Recipe, Rule, preset
from lowbit.compare import compare

W8A8 = Recipe(rules=(Rule(weight=INT8, activation=UINT8),))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


class Net(nn.Module):
    """Convolutions with BatchNorm, one of them called twice, parallel branches, pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.conv(F.relu(self.conv(x))))
        a, b = self.left(x), self.right(x)
        b = F.relu(b)
        return self.fc(F.max_pool2d(F.relu(a) + b, 2).flatten(1))


def features(count: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def images(count: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def sqnr(reference: Tensor, value: Tensor) -> float:
    noise = (reference - value).double().square().sum().item()
    return 10 * math.log10(reference.double().square().sum().item() / noise) if noise else math.inf


def test_every_number_by_hand() -> None:
    model, x = mlp(), features()
    y = torch.arange(32) % 4
    q = lowbit.quantize(model, W8A8, [x])
    c = compare(model, q, [(x, y)])
    with torch.no_grad():
        want, got = model(x), q(x)
        g = q.graph
        read, write = list(g.activation_quantizers.children())[:2]  # of the input, and behind the ReLU
        hidden, hidden_q = F.relu(model[0](x)), write(F.relu(g.get_submodule("0")(read(x))))
        alone = g.get_submodule("2")(write(hidden))
    assert c.samples == 32
    assert c.metric == "top-1 accuracy"
    assert c.float_value == pytest.approx((want.argmax(1) == y).double().mean().item())
    assert c.quantized_value == pytest.approx((got.argmax(1) == y).double().mean().item())
    assert c.drop == pytest.approx(c.float_value - c.quantized_value)
    assert c.agreement == pytest.approx((want.argmax(1) == got.argmax(1)).double().mean().item())
    assert c.sqnr_db == pytest.approx(sqnr(want, got))
    assert [r.name for r in c.layers] == ["0", "2"]
    assert [r.sqnr_db for r in c.layers] == pytest.approx([sqnr(hidden, hidden_q), sqnr(want, got)])
    assert [r.alone_db for r in c.layers] == pytest.approx([sqnr(hidden, hidden_q), sqnr(want, alone)])
    assert (c.float_bytes, c.quantized_bytes) == (q.cost().float_bytes, q.cost().bytes)
    assert c.ratio == pytest.approx(c.float_bytes / c.quantized_bytes)


# layers that make good what the ones before them lost, as GPTQ's do, are no better alone
RECIPES = {
    "w8a8": "w8a8",
    "w4a8, equalized": replace(preset("w4a8"), refine=("affine_correct",)),
    "w4": replace(preset("w4"), refine=("affine_correct",)),
    "fp16": "fp16",
    "fp16 activations": Recipe(rules=(Rule(weight=FP16, activation=FP16),)),
    "activations per channel": Recipe(
        rules=(Rule(weight=INT8, activation=replace(UINT8, granularity=PerChannel(1))),)
    ),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_nodes_of_both_graphs_are_paired(recipe: Any) -> None:
    """A wrong pairing gives a ratio near 0 dB; the output's own ratio is the oracle of the last layer's."""
    model, x = Net().eval(), images()
    q = lowbit.quantize(model, recipe, [x])
    c = compare(model, q, [x])
    assert [r.name for r in c.layers] == ["stem", "conv", "conv#2", "left", "right", "fc"]
    assert all(r.sqnr_db > 8 for r in c.layers)
    assert all(r.alone_db >= r.sqnr_db - 1 for r in c.layers)
    assert c.layers[-1].sqnr_db == pytest.approx(c.sqnr_db)
    with torch.no_grad():
        assert c.sqnr_db == pytest.approx(sqnr(model(x), q(x)), abs=0.01)


def test_the_first_layer_reads_what_the_float_model_reads() -> None:
    model = Net().eval()
    first = compare(model, lowbit.quantize(model, W8A8, [images()]), [images()]).layers[0]
    assert first.alone_db == pytest.approx(first.sqnr_db)


def test_one_pass_over_batches_equals_one_batch() -> None:
    model, x, y = Net().eval(), images(), torch.arange(24) % 5
    q = lowbit.quantize(model, "w4a8", [x])
    whole = compare(model, q, [(x, y)])
    parts = compare(
        model, q, ((x[i : i + 7], y[i : i + 7]) for i in range(0, 24, 7))
    )  # 7, 7, 7, 3; once only
    assert parts.samples == whole.samples == 24
    for field in ("float_value", "quantized_value", "agreement", "sqnr_db"):
        assert getattr(parts, field) == pytest.approx(getattr(whole, field))
    for a, b in zip(parts.layers, whole.layers, strict=True):
        assert (a.sqnr_db, a.alone_db) == pytest.approx((b.sqnr_db, b.alone_db))


def test_no_batch_outlives_the_next() -> None:
    model, alive = mlp(), list[Callable[[], Any]]()

    def stream() -> Iterator[Tensor]:
        for seed in range(6):
            x = features(seed=seed)
            alive.append(weakref.ref(x))
            yield x
            del x
            assert sum(ref() is not None for ref in alive) <= 1

    q = lowbit.quantize(model, W8A8, [features()])
    assert compare(model, q, stream()).samples == 6 * 32


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(1)


METRICS = {
    "one for each sample": squared,
    "one tensor": lambda output, target: squared(output, target).mean(),
    "one float": lambda output, target: squared(output, target).mean().item(),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_a_metric_is_averaged_over_samples(metric: Callable[[Any, Any], Any]) -> None:
    model, x = mlp(), features()
    target = torch.randn(32, 4, generator=torch.Generator().manual_seed(2))
    q = lowbit.quantize(model, W8A8, [x])
    c = compare(model, q, [(x[:20], target[:20]), (x[20:], target[20:])], metric)
    with torch.no_grad():
        assert c.float_value == pytest.approx(squared(model(x), target).mean().item(), rel=1e-5)
        assert c.quantized_value == pytest.approx(squared(q(x), target).mean().item(), rel=1e-5)
    assert c.metric == metric.__name__


def test_a_metric_that_returns_something_else_is_refused() -> None:
    q = lowbit.quantize(mlp(), W8A8, [features()])
    with pytest.raises(LowbitError, match="the metric returned a str; return a number"):
        compare(mlp(), q, [features()], lambda output, target: "good")


@pytest.mark.parametrize(
    "batch",
    [features(), (features(), torch.randn(32, 4)), (features(), None), {"input": features()}],
    ids=["inputs alone", "labels that are no classes", "no labels", "keywords"],
)
def test_without_classes_there_is_no_accuracy(batch: Any) -> None:
    q = lowbit.quantize(mlp(), W8A8, [features()])
    c = compare(mlp(), q, [batch])
    assert (c.metric, c.float_value, c.quantized_value, c.drop) == (None, None, None, None)
    assert c.agreement is not None
    assert 20 < c.sqnr_db < 60


class Tokens(nn.Module):
    """Embedding, a dict as output: no classes anywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(self.embed(x))
        return {"y": y, "mean": y.mean(1)}


def test_outputs_of_any_form() -> None:
    model, x = Tokens(), torch.arange(27).reshape(3, 9) % 9
    q = lowbit.quantize(model, "w8", example_inputs=x)
    c = compare(model, q, [x])
    with torch.no_grad():
        want, got = (torch.cat([v.flatten() for v in m(x).values()]) for m in (model, q))
    assert c.sqnr_db == pytest.approx(sqnr(want, got))
    assert c.agreement is None
    assert [r.op for r in c.layers] == ["Embedding", "Linear"]


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(16, 16), nn.Tanh())))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_the_layer_that_makes_the_error_is_the_worst_and_the_override_cures_it() -> None:
    """Layers behind the coarse one carry its error, yet add little of their own."""
    model, x = Deep(), torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    coarse = Rule(match="layers.4", weight=QuantSpec(bits=2), activation=UINT8)
    recipe = replace(W8A8, rules=(coarse, *W8A8.rules))
    q = lowbit.quantize(model, recipe, [x])
    before = compare(model, q, [x])
    assert before.worst[0].name == "layers.4"
    assert len(before.worst) == 3
    override = Recipe.from_dict(yaml.safe_load(before.override))
    assert [r.match for r in override.rules] == [r.rule_name for r in before.worst]
    assert override.rules[0].weight == QuantSpec(bits=8)
    assert override.rules[0].activation == UINT8
    assert all(r.weight is r.activation is None for r in override.rules[1:])  # they had 8 bits already
    better = lowbit.quantize(model, replace(recipe, rules=(*override.rules, *recipe.rules)), [x])
    assert compare(model, better, [x]).sqnr_db > before.sqnr_db + 10


SPECS = {
    "int4": (INT4, INT8),
    "int2+zp": (QuantSpec(bits=2, symmetric=False), QuantSpec(bits=8, symmetric=False)),
    "int3/pow2": (QuantSpec(bits=3, scale="pow2"), QuantSpec(bits=8, scale="pow2")),
    "int8": (INT8, None),
    "int12": (QuantSpec(bits=12), None),
    "fp16": (FP16, None),
}


@pytest.mark.parametrize(("spec", "wider"), SPECS.values(), ids=SPECS.keys())
def test_the_override_gives_eight_bits_or_float(spec: QuantSpec, wider: QuantSpec | None) -> None:
    q = lowbit.quantize(mlp(), Recipe(rules=(Rule(weight=spec, activation=UINT8),)), [features()])
    rules = Recipe.from_dict(yaml.safe_load(compare(mlp(), q, [features()]).override)).rules
    assert {r.weight for r in rules} == {wider}
    assert {r.activation for r in rules} == {UINT8 if wider else None}


def test_a_layer_called_twice_has_two_rows_and_one_rule() -> None:
    model = Net().eval()
    c = compare(model, lowbit.quantize(model, W8A8, [images()]), [images()])
    names = [r.match for r in Recipe.from_dict(yaml.safe_load(c.override)).rules]
    assert len(set(names)) == len(names) == 3
    assert not any("#" in name for name in names)


def test_a_float_model_has_no_error_and_no_override() -> None:
    q = lowbit.quantize(mlp(), Recipe(rules=(Rule(),)), [features()])
    c = compare(mlp(), q, [features()])
    assert (c.sqnr_db, c.worst, c.override, c.ratio) == (math.inf, (), "", 1.0)
    assert "float" in str(c)


def test_both_models_stay_as_they_were() -> None:
    model = Net().train()
    q = lowbit.quantize(model, W8A8, [images()])
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(q.state_dict())
    compare(model, q, [images()])
    assert model.training
    for old, new in zip(before, (model.state_dict(), q.state_dict()), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in new)


def test_another_model_is_refused() -> None:
    q = lowbit.quantize(mlp(), W8A8, [features()])
    other = nn.Sequential(nn.Linear(6, 17), nn.ReLU(), nn.Linear(17, 4))
    with pytest.raises(
        LowbitError, match=r"out_features of '0' \(Linear\) is 16 in the quantized model and 17"
    ):
        compare(other, q, [features()])


@pytest.mark.parametrize("data", [[], 5], ids=["no batch", "no data"])
def test_data_that_is_none_is_refused(data: Any) -> None:
    q = lowbit.quantize(mlp(), W8A8, [features()])
    with pytest.raises(LowbitError, match=r"at least one batch|pass a DataLoader"):
        compare(mlp(), q, data)


def test_num_batches_stops_early() -> None:
    q = lowbit.quantize(mlp(), W8A8, [features()])
    assert compare(mlp(), q, [features()] * 4, num_batches=2).samples == 64


def test_the_table_shows_what_was_measured() -> None:
    q = lowbit.quantize(mlp(), "w4", [features()])
    text = str(compare(mlp(), q, [(features(), torch.arange(32) % 4)]))
    for part in ("top-1 accuracy", "bytes", "x smaller", "32 samples", "agreement with float", "rules:"):
        assert part in text


def test_the_demo_network() -> None:
    from lowbit.demo import load_images, load_network

    model, (x, y) = load_network(), load_images("test")
    q = lowbit.quantize(model, "w8a8", [load_images("train")[0][:64]])
    c = compare(model, q, [(x[i : i + 100], y[i : i + 100]) for i in range(0, 300, 100)])
    assert c.drop is not None
    assert abs(c.drop) <= 0.02
    assert c.agreement is not None
    assert c.agreement > 0.97
    assert c.sqnr_db > 28
    assert c.ratio > 3.5


@pytest.mark.parametrize("recipe", ["w1a1", "w2a2", "ternary", "b1.58"])
def test_narrow_codes_are_compared_and_widened(recipe: str) -> None:
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    model, x = nn.Sequential(*layers), torch.randn(32, 8)
    found = lowbit.compare(model, lowbit.quantize(model, recipe, [x]), [x])
    assert found.override

"""Each check fires on a model with the defect, with the number it measured, and is silent on one without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import INT8, UINT8, PerTensor, QuantSpec, Recipe, Rule
from lowbit.advise import Advice, advise
from lowbit.core.observers import observers
from lowbit.core.qtensor import quantization_error

W8A8 = Recipe(rules=(Rule(weight=INT8, activation=UINT8),))
PER_TENSOR = Recipe(rules=(Rule(weight=replace(INT8, granularity=PerTensor()), activation=UINT8),))


def features(count: int = 128, seed: int = 1) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def images(count: int = 128, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))


class Conv(nn.Module):
    """Two convolutions and a head; the first one's channels span `spread`, which the second undoes."""

    def __init__(self, spread: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)
        factor = torch.logspace(0, -torch.log10(torch.tensor(spread)).item(), 8)
        with torch.no_grad():
            self.a.weight *= factor[:, None, None, None]
            self.a.bias *= factor
            self.b.weight /= factor[None, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


def found(check: str, *args: Any, **kwargs: Any) -> Advice | None:
    """The advice of one check, or None."""
    return next((a for a in advise(*args, **kwargs) if a.check == check), None)


SAMPLES = {
    "99 for activations": (W8A8, 99, True),
    "100 for activations": (W8A8, 100, False),
    "32 for a correction": ("w8", 32, True),
    "32, weights alone": (Recipe(rules=(Rule(weight=INT8),)), 32, False),
}


@pytest.mark.parametrize(("recipe", "count", "fires"), SAMPLES.values(), ids=SAMPLES.keys())
def test_few_calibration_samples(recipe: Any, count: int, fires: bool) -> None:
    batches = list(features(count).split(10))
    q = lowbit.quantize(mlp(), recipe, batches)
    advice = found("calibration samples", mlp(), q, batches)
    assert (advice is not None) == fires
    assert advice is None or advice.measured == f"{count} samples, 100 are the least"


@pytest.mark.parametrize("observer", observers.names())
def test_data_of_the_same_kind_has_the_same_ranges(observer: str) -> None:
    q = lowbit.quantize(Conv(), lowbit.preset("w8a8", observer=observer), [images()])
    for seed in range(2, 5):
        assert found("ranges", Conv(), q, [images()], [images(seed=seed)]) is None


@pytest.mark.parametrize("factor", [2.0, 10.0])
def test_evaluation_outside_the_calibrated_ranges(factor: float) -> None:
    q = lowbit.quantize(
        mlp(), replace(W8A8, rules=(replace(W8A8.rules[0], observer="minmax"),)), [features()]
    )
    wide = factor * features(200, seed=2)
    advice = found("ranges", mlp(), q, [features()], [wide])
    assert advice is not None
    quantizer = next(q.graph.activation_quantizers.children())  # of the input
    step = quantizer.scale.item()
    lo, hi = -quantizer.zero_point.item() * step, (255 - quantizer.zero_point.item()) * step
    outside = ((wide < lo - step / 2) | (wide > hi + step / 2)).double().mean().item()
    assert (
        f"'input' {100 * outside:.1f} % outside its calibrated range (0.0 % on calibration data)"
        in advice.measured
    )
    assert "same preprocessing" in advice.cure


def test_evaluation_that_leaves_the_range_unused() -> None:
    """Calibrated on 0..255, run on 0..1: nothing is clipped, and everything falls on two codes."""
    x = torch.rand(128, 8, generator=torch.Generator().manual_seed(1))
    q = lowbit.quantize(mlp(), W8A8, [255 * x])
    advice = found("ranges", mlp(), q, [255 * x], [x])
    assert advice is not None
    assert "'input' uses 0.4 % of its range" in advice.measured
    assert "outside" not in advice.measured


def test_clipping_that_calibration_chose_is_no_difference() -> None:
    """A percentile leaves values outside on purpose, in both data alike."""
    data = [torch.distributions.StudentT(2.0).sample((128, 8))]
    recipe = Recipe(rules=(Rule(weight=INT8, activation=replace(UINT8, bits=3), observer="mse"),))
    q = lowbit.quantize(mlp(), recipe, data)
    assert found("ranges", mlp(), q, data, data) is None


WEIGHTS_ONLY = {"w8": True, "w4": True, "fp16": True, "w8a8": False, "w4a8": False}


@pytest.mark.parametrize(("recipe", "fires"), WEIGHTS_ONLY.items(), ids=WEIGHTS_ONLY.keys())
def test_weights_only(recipe: str, fires: bool) -> None:
    advice = found("weights only", mlp(), lowbit.quantize(mlp(), recipe, [features()]), [features()])
    assert (advice is not None) == fires
    assert advice is None or advice.measured == "quantized weights in 2 layers, integer activations in 0"


def test_a_float_model_is_not_weights_only() -> None:
    q = lowbit.quantize(mlp(), Recipe(rules=(Rule(),)), [features()])
    assert found("weights only", mlp(), q, None) is None


def test_spread_channels_with_one_scale() -> None:
    model = Conv(spread=100.0)
    advice = found("channel ranges", model, lowbit.quantize(model, PER_TENSOR, [images()]), [images()])
    assert advice is not None
    spreads, gains = [], []
    for weight in (model.a.weight.detach(), model.b.weight.detach()):
        rows = weight.flatten(1).abs().amax(1)
        spreads.append((rows.max() / rows.min()).item())
    assert f"{sum(spreads) / 2:.1f} times the smallest (median of 2" in advice.measured
    assert f"{spreads[0]:.1f} in 'a'" in advice.measured
    recipe = Recipe(rules=(replace(PER_TENSOR.rules[0], weight_observer="minmax"),))
    advice = found("channel ranges", model, lowbit.quantize(model, recipe, [images()]), None)
    for weight in (model.a.weight.detach(), model.b.weight.detach()):
        narrow, wide = (
            quantization_error(weight, s).sqnr_db for s in (INT8, replace(INT8, granularity=PerTensor()))
        )
        gains.append(narrow - wide)
    assert advice is not None
    assert f"gains {sum(gains) / 2:.1f} dB" in advice.text
    assert "equalize=True" in advice.cure


SPREAD = {
    "even channels": (1.0, PER_TENSOR),
    "a scale per channel": (100.0, W8A8),
    "equalized": (100.0, replace(PER_TENSOR, equalize=True)),
}


@pytest.mark.parametrize(("spread", "recipe"), SPREAD.values(), ids=SPREAD.keys())
def test_channels_that_need_nothing(spread: float, recipe: Recipe) -> None:
    q = lowbit.quantize(Conv(spread), recipe, [images()])
    assert q.recipe.equalize == recipe.equalize
    assert found("channel ranges", Conv(spread), q, [images()]) is None


def labels(x: Tensor) -> Tensor:
    """The classes that the float model itself gives: its accuracy is 1."""
    with torch.no_grad():
        return mlp()(x).argmax(1)


def test_a_drop_above_two_percent() -> None:
    x = features(400, seed=2)
    coarse = Recipe(rules=(Rule(match="2", weight=QuantSpec(bits=2), activation=UINT8), *W8A8.rules))
    advice = found("accuracy", mlp(), lowbit.quantize(mlp(), coarse, [features()]), None, [(x, labels(x))])
    assert advice is not None
    assert advice.measured.startswith("top-1 accuracy 1.0000 -> 0.")
    assert "lost over 400 samples" in advice.measured
    assert "'2' " in advice.text.split(",")[0]  # the cause comes first
    assert "quantization-aware training" in advice.cure


def test_no_drop_and_no_labels() -> None:
    x = features(400, seed=2)
    q = lowbit.quantize(mlp(), W8A8, [features()])
    assert found("accuracy", mlp(), q, [features()], [(x, labels(x))]) is None
    assert found("accuracy", mlp(), q, [features()], [x]) is None


@pytest.mark.parametrize(("lost", "fires"), [(1.5, False), (2.5, True)], ids=["1.5 %", "2.5 %"])
def test_another_metric_may_lose_two_percent_of_its_value(lost: float, fires: bool) -> None:
    values = iter([50.0, 50.0 * (1 - lost / 100)])  # float, then quantized
    q = lowbit.quantize(mlp(), W8A8, [features()])

    def score(output: Tensor, target: Any) -> float:
        return next(values)

    advice = found("accuracy", mlp(), q, [features()], [features()], score)
    assert (advice is not None) == fires
    assert advice is None or f"{lost} % lost" in advice.measured


class Head(nn.Module):
    """A small layer, and a large one in one of several forms that stay in float."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.small = nn.Linear(8, 8)
        self.large = nn.Linear(8, 64, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.small(x))
        if self.form == "computed weight":
            return F.linear(x, self.large.weight * 2)
        if self.form == "attention":
            return self.attention(x[:, None], x[:, None], x[:, None])[0].flatten(1)
        return self.large(x)


IN_FLOAT = {
    "by a rule": ("layer", Recipe(rules=(Rule(match="large"), *W8A8.rules)), "'large' (Linear) 88.9 %"),
    "a computed weight": ("computed weight", W8A8, "'linear' (linear) 88.9 %"),
    "attention as a module": ("attention", W8A8, "'attention' (MultiheadAttention)"),
    "nothing": ("layer", W8A8, None),
    "little": (
        "layer",
        Recipe(rules=(Rule(match="small"), Rule(match="*", weight=INT8))),
        "'small' (Linear) 11.1 %",
    ),
}


@pytest.mark.parametrize(("form", "recipe", "measured"), IN_FLOAT.values(), ids=IN_FLOAT.keys())
def test_layers_left_in_float(form: str, recipe: Recipe, measured: str | None) -> None:
    q = lowbit.quantize(Head(form), recipe, [features()])
    advice = found("left in float", Head(form), q, [features()])
    assert (advice is not None) == (measured is not None)
    if advice is not None and measured is not None:
        assert measured in advice.measured
        assert q.coverage()[measured.split("'")[1]].why in advice.text


def test_a_small_layer_in_float_is_not_worth_a_word() -> None:
    model = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 1))
    q = lowbit.quantize(model, Recipe(rules=(Rule(match="4"), *W8A8.rules)), [features()])
    assert found("left in float", model, q, [features()]) is None


class Branch(nn.Module):
    """A branch on data: it cannot be traced, yet the layers inside it are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x) if x.mean() > -100 else x)


@pytest.mark.parametrize(("match", "share"), [("*", None), ("out", "50.0 %")], ids=["all quantized", "half"])
def test_layers_inside_a_part_that_cannot_be_traced(match: str, share: str | None) -> None:
    q = lowbit.quantize(Branch(), Recipe(rules=(replace(W8A8.rules[0], match=match),)), [features()])
    advice = found("left in float", Branch(), q, [features()])
    assert (advice is not None) == (share is not None)
    assert advice is None or advice.measured == f"{share} of the multiply-accumulates: 'fc' (Linear) {share}"


def test_one_advice_in_two_lines() -> None:
    (advice,) = advise(mlp(), lowbit.quantize(mlp(), W8A8, [features(32)]), [features(32)])
    first, second = str(advice).split("\n")
    assert first.startswith("calibration samples: 32 samples")
    assert second.startswith("  -> pass 100 to 500 samples")


@pytest.mark.parametrize("form", [list, iter], ids=["a list", "once only"])
def test_data_in_any_form(form: Callable[[Any], Any]) -> None:
    q = lowbit.quantize(mlp(), W8A8, [features()])
    x = features(seed=2)
    assert advise(mlp(), q, form([features()]), form([(x, labels(x))])) == []


def test_the_model_stays_as_it_was() -> None:
    model, q = mlp(), lowbit.quantize(mlp(), W8A8, [features()])
    before = copy.deepcopy(q.state_dict())
    advise(model, q, [features()], [features(seed=2)])
    assert all(torch.equal(before[name], value) for name, value in q.state_dict().items())
    assert not any(m._forward_pre_hooks for m in q.modules())


def test_the_demo_network_is_well() -> None:
    from lowbit.demo import load_images, load_network

    model, (x, y) = load_network(), load_images("test")
    calibration = list(load_images("train")[0][:128].split(64))
    q = lowbit.quantize(model, "w8a8", calibration)
    assert advise(model, q, calibration, [(x[:200], y[:200])]) == []

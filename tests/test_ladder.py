"""Recipes from the cheapest to the dearest: the first that holds, or the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import conv, settle, sqnr
from torch import Tensor, nn

import lowbit
from lowbit import LowbitError

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten())
    return settle(nn.Sequential(*layers, nn.Linear(512, 5)))


def quality(model: nn.Module) -> Any:
    """SQNR beside `MODEL`, at most 60 dB so that the float model has a number too."""
    return min(60.0, sqnr(MODEL(X), model(X)))


MODEL = network()


@pytest.fixture(scope="module")
def ladder() -> lowbit.QuantizedModel:
    return lowbit.quantize(MODEL, "auto", [X], metric=quality, max_drop=0.0, bits=3)


def rungs(q: lowbit.QuantizedModel) -> list[str]:
    return [step.text for step in q.steps if step.name == "auto"]


def test_where_none_holds_it_climbs_to_the_end_and_returns_the_best(ladder: lowbit.QuantizedModel) -> None:
    texts = rungs(ladder)
    assert [t.split(":")[0] for t in texts[:4]] == [
        "w3a8, ranges by min-max",
        "w3a8, ranges by least squared error",
        "w3a8, equalized and corrected",
        "w3a8, rounded by GPTQ",
    ]
    assert texts[4].startswith("w3a8, rounded by GPTQ, 1 of 4 layers in 8 bits")
    assert texts[-1].startswith("no rung holds; this is the best")
    values = [float(t.rpartition(": ")[2].split(",")[0]) for t in texts[:-1]]
    assert quality(ladder) == pytest.approx(max(values), rel=1e-3)
    assert values[3] > values[1]


def test_it_stops_at_the_first_that_holds(ladder: lowbit.QuantizedModel) -> None:
    texts = rungs(ladder)
    third = float(texts[2].rpartition(": ")[2].split(",")[0])
    q = lowbit.quantize(MODEL, "auto", [X], metric=quality, max_drop=60 - third + 1e-3, bits=3)
    assert rungs(q)[-1].endswith("holds")
    assert quality(q) >= third - 1e-2
    assert len(rungs(q)) <= 3


def test_the_ladder_is_saved_and_the_recipe_can_be_used_again(
    ladder: lowbit.QuantizedModel, tmp_path: Path
) -> None:
    lowbit.save(ladder, tmp_path / "m.safetensors")
    again = lowbit.load(tmp_path / "m.safetensors", MODEL)
    assert [str(s) for s in again.steps] == [str(s) for s in ladder.steps]
    assert again.steps == ladder.steps
    same = lowbit.quantize(MODEL, ladder.recipe, [X])
    assert torch.equal(same(X), ladder(X))


@pytest.mark.parametrize("value", [float("nan"), None, "good", torch.tensor([1.0, 2.0])])
def test_a_metric_that_is_no_number(value: Any) -> None:
    with pytest.raises(LowbitError, match="which ranks nothing; return a finite number"):
        lowbit.quantize(MODEL, "auto", [X], metric=lambda model: value)


def test_what_it_needs() -> None:
    with pytest.raises(LowbitError, match="'auto' compares recipes on your data; pass calibration"):
        lowbit.quantize(MODEL, "auto", [X])
    with pytest.raises(LowbitError, match="'auto' compares recipes on your data"):
        lowbit.quantize(MODEL, "auto", metric=quality)
    with pytest.raises(LowbitError, match="no preset is named 'w9a8'"):
        lowbit.quantize(MODEL, "auto", [X], metric=quality, bits=9)


def test_tensors_are_metrics_too() -> None:
    def metric(model: nn.Module) -> Tensor:
        return model(X).isfinite().all().float()

    q = lowbit.quantize(MODEL, "auto", [X], metric=metric)
    assert len(rungs(q)) == 1


@pytest.mark.parametrize("drop", [-0.1, float("nan"), float("inf"), "0.3", True])
def test_a_drop_that_is_no_number_from_0_up(drop: Any) -> None:
    with pytest.raises(LowbitError, match=r"max_drop=.* is not a finite number from 0 up; it says how much"):
        lowbit.quantize(MODEL, "auto", [X], metric=quality, max_drop=drop)


@pytest.mark.parametrize(
    "given", [{"metric": quality}, {"max_drop": 0.0}, {"bits": 4}], ids=["metric", "max_drop", "bits"]
)
def test_what_is_for_auto_goes_with_no_other_recipe(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(LowbitError, match=rf"{name}=.* is for the recipe 'auto', and the recipe is 'w8a8'"):
        lowbit.quantize(MODEL, "w8a8", [X], **given)
    with pytest.raises(LowbitError, match=rf"the recipe is a Recipe; leave {name} out, or pass 'auto'"):
        lowbit.quantize(MODEL, lowbit.preset("w8a8"), [X], **given)

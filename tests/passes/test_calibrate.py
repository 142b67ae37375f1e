"""Calibration: data in every form, streamed once; ranges equal those of the tensors themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import STYLES, Fn, conv, quantizers, traced
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lowbit
from lowbit import INT8, UINT8, LowbitError, Recipe, Rule
from lowbit.core.affine import choose_qparams
from lowbit.core.ranges import least_error_range_of
from lowbit.graph.inputs import Inputs
from lowbit.graph.run import walk
from lowbit.nn.layers import QLayer
from lowbit.passes.calibrate import batches, calibrate_activations, calibrate_weights
from lowbit.passes.place import place

X = torch.randn(6, 3, 8, 8)
MINMAX = Recipe(rules=(Rule(weight=INT8, activation=UINT8, observer="minmax", weight_observer="minmax"),))


def two_halves() -> Iterator[Tensor]:
    yield X[:4]
    yield X[4:]


SOURCES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: X,
    "list": lambda: [X[:4], X[4:]],
    "generator": two_halves,
    "tuples with labels": lambda: [(X[:4], torch.arange(4)), (X[4:], torch.arange(2))],
    "dicts": lambda: [{"x": X[:4]}, {"x": X[4:]}],
    "one dict": lambda: {"x": X},
    "DataLoader with labels": lambda: DataLoader(TensorDataset(X, torch.arange(6)), batch_size=4),
    "DataLoader of tensors": lambda: DataLoader(list(X), batch_size=4),
    "one by one": lambda: DataLoader(list(X)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_ranges(name: str) -> None:
    """The oracle: the extremes of each tensor over all the data, found by walking the float graph."""
    model = STYLES["functional relu and residual add"]()
    gm, plain = traced(model, X), traced(model, X)
    place(gm, MINMAX)
    assert calibrate_activations(gm, SOURCES[name]()) == []
    seen = {
        node.meta["name"]: values[0] for node, values in walk(plain, [Inputs((X,))]) if node.op != "output"
    }
    for source, path in quantizers(gm).items():
        ends = seen[source].min().reshape(1, 1, 1, 1), seen[source].max().reshape(1, 1, 1, 1)
        scale, zero_point = choose_qparams(*ends, UINT8)
        quantizer = gm.get_submodule(path)
        assert torch.allclose(quantizer.scale, scale, rtol=1e-5), source
        assert torch.equal(quantizer.zero_point, zero_point), source
        assert not quantizer.scale.is_inference(), "later steps may train it"


@pytest.mark.parametrize(("n", "count"), [(None, 3), (1, 1), (2, 2), (9, 3)])
def test_num_batches(n: int | None, count: int) -> None:
    assert len(list(batches([X, X, X], n))) == count


def test_no_more_batches_are_drawn_than_asked_for() -> None:
    drawn = []

    def endless() -> Iterator[Tensor]:
        while True:
            drawn.append(1)
            yield X

    assert len(list(batches(endless(), 2))) == 2
    assert len(drawn) <= 3


@pytest.mark.parametrize(
    ("data", "n", "message"),
    [
        pytest.param(5, None, "calibration data is a int; pass a DataLoader", id="no iterable"),
        pytest.param([5], None, "a batch is a int", id="no batch"),
        pytest.param([X], 0, "num_batches=0 ", id="no batches asked for"),
        pytest.param([], None, "holds no batch", id="empty"),
        pytest.param([X[:0]], None, "no batch with a sample", id="no sample"),
    ],
)
def test_bad_data(data: Any, n: int | None, message: str) -> None:
    gm = traced(conv(3, 8), X)
    place(gm, MINMAX)
    with pytest.raises(LowbitError, match=message):
        calibrate_activations(gm, data, n)


def test_bad_numbers_are_found_where_they_arise() -> None:
    model = Fn(lambda m, x: m.b(torch.log(m.a(x))), a=conv(3, 8), b=conv(8, 8))
    gm = traced(model, X)
    place(gm, MINMAX)
    with pytest.raises(LowbitError, match=r"'activation_quantizers\.log', batch 0: .* NaN"):
        calibrate_activations(gm, [X])
    with pytest.raises(LowbitError, match=r"'activation_quantizers\.input_1', batch 1: .* 1 infinite"):
        calibrate_activations(place_anew(conv(3, 8)), [X, torch.where(X.max() == X, torch.inf, X)])


def place_anew(model: nn.Module) -> Any:
    gm = traced(model, X)
    place(gm, MINMAX)
    return gm


def test_activations_are_observed_on_the_float_weights() -> None:
    """Weights that are ready to be rounded are not, while ranges are gathered; afterwards they are again."""
    gm = place_anew(conv(3, 8))
    calibrate_weights(gm)
    layer = next(m for m in gm.modules() if isinstance(m, QLayer))
    assert layer.weight_quantizer.mode == "quantize"
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight_quantizer.mode))
    calibrate_activations(gm, [X])
    assert seen == ["off"]
    assert layer.weight_quantizer.mode == "quantize"


def test_a_layer_that_no_data_reaches_is_said() -> None:
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.rare = conv(3, 8), conv(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.rare(x) if x.mean() > 1e6 else self.often(x)

    q = lowbit.quantize(Rare(), "w8a8", calibration=[X])
    assert q.coverage()["often"].status == "integer"
    row = q.coverage()["rare"]
    assert (row.status, row.why) == ("weight", "no calibration data reached it")
    text = "no calibration data reached it; it stays in float"
    assert [n.name for n in q.notes if n.text == text] == [
        "model.rare.input_quantizer",
        "model.rare.output_quantizer",
    ]
    assert torch.isfinite(q(X)).all()


@pytest.mark.parametrize("observer", ["mse", "minmax"])
@pytest.mark.parametrize("style", ["functional relu and residual add", "branch on data at the top"])
def test_ranges_of_weights(style: str, observer: str) -> None:
    gm = traced(STYLES[style](), X)
    place(gm, Recipe(rules=(Rule(weight=INT8, weight_observer=observer),)))
    calibrate_weights(gm)
    for layer in (m for m in gm.modules() if isinstance(m, QLayer)):
        weight = layer.weight.detach()
        if observer == "minmax":
            ends = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
        else:
            ends = least_error_range_of(weight, INT8)
        assert torch.equal(layer.weight_quantizer.scale, choose_qparams(*ends, INT8)[0])


def test_a_weight_that_is_not_finite() -> None:
    model = nn.Sequential(conv(3, 8), conv(8, 8))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = torch.nan
    gm = traced(model, X)
    place(gm, MINMAX)
    with pytest.raises(LowbitError, match="the weight of '1' holds 1 NaN"):
        calibrate_weights(gm)

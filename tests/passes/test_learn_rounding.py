"""Learned rounding: nearer to the float network, on the grid, left alone where that cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from helpers import Fn, Residual, conv, sqnr, traced
from torch import Tensor, fx, nn

import lowbit
from lowbit import UINT8, PerChannel, QuantSpec, Recipe, Rule, preset
from lowbit.core.spec import BINARY
from lowbit.graph.inputs import Inputs
from lowbit.graph.rewrite import clone
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.passes import learn_rounding as module
from lowbit.passes.calibrate import calibrate_activations, calibrate_weights
from lowbit.passes.learn_rounding import learn_rounding
from lowbit.passes.place import place

W3 = QuantSpec(bits=3, granularity=PerChannel(0))
A4 = replace(UINT8, bits=4)
By = Literal["layer", "block"]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        conv(3, 4), nn.ReLU(), Residual(4, 6), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4, 3)
    )
    return layers.eval()


def images(n: int = 64, seed: int = 0) -> Tensor:
    """Neighbouring pixels alike, as in images; without that there is little to gain."""
    noise = torch.randn(n, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 5, 1) * 3 + 0.5


def quantized(
    model: nn.Module, data: list[Tensor], spec: QuantSpec = W3, activation: QuantSpec | None = A4
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(quantized, float), node for node twins."""
    reference = traced(model, data[0])
    gm = clone(reference)
    place(gm, Recipe(rules=(Rule(weight=spec, activation=activation),)))
    calibrate_weights(gm)
    calibrate_activations(gm, data)
    return gm, reference


def scales(gm: fx.GraphModule) -> list[Tensor]:
    return [m.scale for m in gm.modules() if isinstance(m, Quantizer) and not m.is_weight]


def layers(gm: fx.GraphModule) -> list[QLayer]:
    return [m for m in gm.modules() if isinstance(m, QLayer)]


@pytest.mark.parametrize("by", ["layer", "block"])
def test_blocks_of_a_residual_network_gain(by: By, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST_STEPS", 100)
    data = [images()]
    gm, reference = quantized(network(), data)
    start = clone(gm)
    gains = learn_rounding(gm, reference, [Inputs((x,)) for x in data], by=by, epochs=1)
    names = ["0", "2.a", "2.b", "5"] if by == "layer" else ["0", "2.a .. 2.b", "5"]
    assert [g.name for g in gains] == names
    assert all(g.after_db >= g.before_db for g in gains)
    assert sum(g.after_db - g.before_db for g in gains) > 4.0
    assert gains[-1].after_db == pytest.approx(sqnr(reference(data[0]), gm(data[0])), abs=1e-3)
    assert not any(isinstance(p, nn.Parameter) for p in scales(gm)), "learned no more"
    same = [torch.equal(a, b) for a, b in zip(scales(start), scales(gm), strict=True)]
    assert all(same) if by == "layer" else same[0] and not all(same), "no block has the input's quantizer"
    for before, after in zip(layers(start), layers(gm), strict=True):
        assert type(after.weight_quantizer) is Quantizer
        assert torch.equal(after.weight_quantizer.scale, before.weight_quantizer.scale)
        assert torch.allclose(after.effective_weight(), after.weight, rtol=1e-6, atol=1e-7), "on the grid"
        off = (after.qweight().codes.int() - before.qweight().codes.int()).abs()
        assert int(off.max()) <= 1
    moved = [not torch.equal(a.bias, b.bias) for a, b in zip(layers(start), layers(gm), strict=True)]
    assert any(moved)


@pytest.mark.parametrize("by", ["layer", "block"])
def test_what_would_get_worse_stays_as_it_was(by: By, monkeypatch: pytest.MonkeyPatch) -> None:
    def vandal(problem: Any, learned: Any, *args: Any) -> None:
        for soft in learned.soft:
            nn.init.constant_(soft.v, 9.0)
        for layer in learned.layers:
            layer.bias.data += 1
        for quantizer in learned.quantizers:
            quantizer.scale.data *= 3

    monkeypatch.setattr(module, "_descend", vandal)
    data = [images(8)]
    gm, reference = quantized(network(), data)
    start = clone(gm)
    gains = learn_rounding(gm, reference, [Inputs((x,)) for x in data], by=by)
    assert all("its error would rise, to" in g.why and g.after_db == g.before_db for g in gains)
    assert torch.equal(gm(data[0]), start(data[0]))
    assert all(torch.equal(a, b) for a, b in zip(scales(start), scales(gm), strict=True))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers(start), layers(gm), strict=True))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=4, scale="pow2"),
        QuantSpec(bits=3, granularity=PerChannel(0), mid_rise=True),
        QuantSpec(bits=4, signed=False, symmetric=False),
        BINARY,
    ],
    ids=str,
)
def test_every_spec_stays_on_its_grid(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST_STEPS", 20)
    data = [images(16)]
    gm, reference = quantized(nn.Sequential(conv(3, 4), nn.ConvTranspose2d(4, 3, 2)), data, spec, None)
    gains = learn_rounding(gm, reference, [Inputs((x,)) for x in data], by="block", epochs=1)
    assert all(g.after_db >= g.before_db for g in gains)
    for layer in layers(gm):
        assert torch.allclose(layer.effective_weight(), layer.qweight().dequantize(), rtol=1e-6, atol=1e-7)
        assert spec.qmin <= int(layer.qweight().codes.min()) <= int(layer.qweight().codes.max()) <= spec.qmax


def test_what_cannot_be_learned_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST_STEPS", 5)
    ids = torch.arange(12).reshape(4, 3)
    model = Fn(
        lambda m, x: m.last(m.twice(m.twice(m.table(x)).relu())),
        table=nn.Embedding(12, 4),
        twice=nn.Linear(4, 4),
        last=nn.Linear(4, 2),
    )
    gm, reference = quantized(model, [ids], W3, None)
    gains = learn_rounding(gm, reference, [Inputs((ids,))], by="block", epochs=1)
    why = {g.name: g.why for g in gains}
    assert "looks rows up" in why["table"]
    assert "called more than once" in why["twice"]
    assert set(why) == {"table", "twice", "twice#2", "last"}
    gm, reference = quantized(nn.Linear(4, 2), [torch.ones(2, 4)], W3, None)
    (gain,) = learn_rounding(gm, reference, [Inputs((torch.ones(0, 4),))], by="layer")
    assert gain.why == "no data reached it"


def test_the_same_in_memory_and_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST_STEPS", 10)
    data, found = [images(40), images(9, seed=1)], []
    for limit in (module.WALK_BYTES, 0):
        monkeypatch.setattr(module, "WALK_BYTES", limit)
        gm, reference = quantized(network(), data)
        with torch.no_grad():  # as the caller may have it
            gains = learn_rounding(gm, reference, [Inputs((x,)) for x in data], by="block", epochs=1)
        found.append((gains, gm(data[0])))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_by_name_in_a_recipe_up_to_the_verified_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST_STEPS", 10)
    model, data = network(), [images(32)]
    recipe = replace(preset("w4a4"), refine=("gptq", "brecq", "adaround"))
    q, again = (lowbit.quantize(model, recipe, data) for _ in range(2))
    steps = {step.name: step for step in q.steps}
    assert [len(steps[name].layers) for name in ("gptq", "brecq", "adaround")] == [4, 3, 4]
    assert "blocks over 32 samples" in steps["brecq"].text
    x = images(seed=5)
    assert torch.equal(q(x), again(x)), "seeded"
    file = lowbit.export.onnx(q, tmp_path / "model.onnx")
    assert lowbit.verify(q, file, x[:4]).ok

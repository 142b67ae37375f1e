"""Layers rounded by GPTQ: nearer to the float network, on the grid, and left alone where that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import Fn, conv, settle, sqnr, traced
from torch import Tensor, fx, nn

import lowbit
from lowbit import UINT8, PerChannel, PerGroup, PerTensor, QuantSpec, Recipe, Rule, preset
from lowbit.core.rounding import Gain
from lowbit.core.spec import BINARY, TERNARY
from lowbit.graph.inputs import Inputs
from lowbit.graph.rewrite import clone
from lowbit.nn.layers import QConv2d, QLayer
from lowbit.nn.patches import patch_count, patches, weight_matrix
from lowbit.passes.calibrate import calibrate_activations, calibrate_weights
from lowbit.passes.place import place
from lowbit.passes.reconstruct import round_layers

W3 = QuantSpec(bits=3, granularity=PerChannel(0))


def images(n: int = 24, channels: int = 4, size: int = 9, seed: int = 0) -> Tensor:
    """Neighbouring pixels alike, as in images; without that there is little to gain."""
    noise = torch.randn(n, channels, size + 4, size + 4, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 5, 1) * 3 + 0.5


def quantized(
    model: nn.Module, data: list[Tensor], spec: QuantSpec = W3
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(quantized, float), node for node twins."""
    reference = traced(model, data[0])
    gm = clone(reference)
    place(gm, Recipe(rules=(Rule(weight=spec, activation=UINT8),)))
    calibrate_weights(gm)
    calibrate_activations(gm, data)
    return gm, reference


CONVOLUTIONS: dict[str, nn.Module] = {
    "Conv2d": nn.Conv2d(4, 6, 3, padding=1),
    "stride, dilation": nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1)),
    "same": nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
    "groups": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, bias=False),
    "Conv1d": nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 5, stride=2, padding=1)),
    "Linear": nn.Sequential(nn.Flatten(2), nn.Linear(81, 7)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weight_times_patches_is_the_layer(name: str) -> None:
    whole, x = CONVOLUTIONS[name], images(3)
    layer = whole[-1] if isinstance(whole, nn.Sequential) else whole
    x = x.flatten(2) if isinstance(whole, nn.Sequential) else x
    count = patch_count(layer, x)
    rows = patches(layer, x, torch.arange(count)) @ weight_matrix(layer, layer.weight.detach()).mT
    got = rows.transpose(0, 1).reshape(count, -1)
    want = (
        layer(x) if layer.bias is None else layer(x) - layer.bias.reshape(-1, *[1] * (layer.weight.ndim - 2))
    )
    want = want if isinstance(layer, nn.Linear) else want.movedim(1, -1)
    assert torch.allclose(got, want.reshape(count, -1), atol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_kind_of_layer_gains(name: str) -> None:
    model, data = nn.Sequential(CONVOLUTIONS[name], nn.ReLU()), [images(12), images(12, seed=1)]
    gm, reference = quantized(model, data)
    before = sqnr(reference(data[0]), gm(data[0]))
    ((gain,), _) = round_layers(gm, reference, [Inputs((x,)) for x in data])
    assert not gain.why
    assert gain.after_db > gain.before_db + 0.5
    assert sqnr(reference(data[0]), gm(data[0])) > before
    layer = next(m for m in gm.modules() if isinstance(m, QLayer))
    assert torch.equal(layer.effective_weight(), layer.qweight().dequantize())
    assert torch.allclose(layer.effective_weight(), layer.weight, rtol=1e-6, atol=1e-7), "on the grid"


def test_a_network_gains_and_seeds_give_the_same_again() -> None:
    model = settle(
        nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(648, 5))
    )
    data = [images(16), images(16, seed=1)]
    found = [
        lowbit.quantize(model, replace(preset("w3a8"), refine=refine), data)
        for refine in (("gptq",), ("gptq",), ("affine_correct",), ())
    ]
    x = images(64, seed=7)
    assert torch.equal(found[0](x), found[1](x))
    quality = [sqnr(model(x), q(x)) for q in found]
    assert quality[0] > quality[2] > quality[3]
    step = next(s for s in found[0].steps if s.name == "gptq")
    assert step.kept
    assert [g.name for g in step.layers] == ["0", "2", "5"]
    assert all(isinstance(g, Gain) for g in step.layers)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=4, scale="pow2"),
        QuantSpec(bits=4, granularity=PerGroup(1, 2)),
        QuantSpec(bits=3, granularity=PerChannel(0), mid_rise=True),
        QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerTensor()),
        BINARY,
        TERNARY,
    ],
    ids=str,
)
def test_every_spec_keeps_its_scale_as_it_must_be(spec: QuantSpec) -> None:
    data = [images(16)]
    gm, reference = quantized(nn.Conv2d(4, 6, 3), data, spec)
    layer = next(m for m in gm.modules() if isinstance(m, QConv2d))
    scale = layer.weight_quantizer.scale.clone()
    ((gain,), _) = round_layers(gm, reference, [Inputs((x,)) for x in data])
    assert gain.after_db >= gain.before_db
    assert layer.weight_quantizer.scale.shape == scale.shape
    if spec.granularity != PerChannel(0):
        assert torch.equal(layer.weight_quantizer.scale, scale)
    codes = layer.qweight().codes
    assert spec.qmin <= int(codes.min()) <= int(codes.max()) <= spec.qmax


def test_what_cannot_be_rounded_so_is_said() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.up, self.last = (
                nn.Conv2d(4, 4, 3, padding=1),
                nn.ConvTranspose2d(4, 4, 2),
                conv(4, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.up(self.twice(self.twice(x).relu())))

    data = [images(8)]
    gm, reference = quantized(Net(), data)
    gains = {g.name: g.why for g in round_layers(gm, reference, [Inputs((x,)) for x in data])[0]}
    assert "called more than once" in gains["twice"]
    assert "ConvTranspose2d" in gains["up"]
    assert gains["last"] == ""


def test_few_samples_and_dead_inputs_do_no_harm() -> None:
    model = nn.Sequential(nn.Linear(40, 9), nn.ReLU(), nn.Linear(9, 3))
    x = torch.randn(3, 40)
    x[:, 5] = 0.0
    gm, reference = quantized(model, [x])
    before = sqnr(reference(x), gm(x))
    assert all(g.after_db >= g.before_db for g in round_layers(gm, reference, [Inputs((x,))])[0])
    assert sqnr(reference(x), gm(x)) >= before


def test_a_layer_that_reads_nothing_is_said() -> None:
    gm, reference = quantized(
        Fn(lambda self, x: self.a(x[x[:, 0] > 9]), a=nn.Linear(4, 2)), [torch.full((6, 4), 10.0)]
    )
    ((gain,), _) = round_layers(gm, reference, [Inputs((torch.zeros(5, 4),))])
    assert gain.why == "no data reached it"

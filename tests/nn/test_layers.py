"""A quantized layer is the float layer on a weight quantized beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lowbit import FP16, INT4, INT8, PerChannel, PerGroup, PerTensor, QTensor, QuantSpec
from lowbit.core.affine import group_amin_amax
from lowbit.core.estimators import estimators
from lowbit.core.qtensor import quantization_error
from lowbit.core.spec import expand_to
from lowbit.nn.layers import BoundLayer, QLayer, QLinear, obstacle, quantized_layer
from lowbit.nn.quantizer import Quantizer

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(4, 3, 8)),
    "Linear without bias": (lambda: nn.Linear(8, 6, bias=False), lambda: torch.randn(4, 8)),
    "Conv1d": (lambda: nn.Conv1d(8, 6, 3, padding="same"), lambda: torch.randn(4, 8, 9)),
    "Conv1d, circular": (
        lambda: nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular"),
        lambda: torch.randn(4, 8, 9),
    ),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), lambda: torch.randn(4, 8, 9, 9)),
    "Conv2d, grouped and dilated": (
        lambda: nn.Conv2d(8, 6, 3, groups=2, dilation=2, padding="valid", bias=False),
        lambda: torch.randn(4, 8, 9, 9),
    ),
    "Conv2d, depthwise, reflecting": (
        lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"),
        lambda: torch.randn(4, 8, 9, 9),
    ),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1, groups=2),
        lambda: torch.randn(4, 8, 5, 5),
    ),
    "Embedding": (lambda: nn.Embedding(8, 6, padding_idx=2), lambda: torch.randint(0, 8, (4, 3))),
}
SPECS = {
    "int8/channel": INT8,
    "int4/channel": INT4,
    "int8/tensor": replace(INT8, granularity=PerTensor()),
    "uint4+zp/channel": QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerChannel(0)),
    "fp16": FP16,
}


def on_axis(spec: QuantSpec, axis: int) -> QuantSpec:
    channel = isinstance(spec.granularity, PerChannel)
    return replace(spec, granularity=PerChannel(axis)) if channel else spec


def quantized(layer: nn.Module, spec: QuantSpec, estimator: str = "lsq") -> QLayer:
    """Calibrated from smallest to largest, ready to be trained."""
    kind = quantized_layer(type(layer))
    assert kind is not None
    q = kind.from_float(layer, spec, estimator=estimator)
    if spec.kind == "int":
        q.weight_quantizer.set_range(*group_amin_amax(layer.weight.detach(), spec))
    q.weight_quantizer.mode = "quantize"
    return q


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_float_layer_on_a_quantized_weight(name: str, spec_name: str) -> None:
    build, data = LAYERS[name]
    layer, x = build(), data()
    spec = on_axis(SPECS[spec_name], 1 if isinstance(layer, nn.ConvTranspose2d) else 0)
    q, reference = quantized(layer, spec), copy.deepcopy(layer)
    want = QTensor.quantize(layer.weight.detach(), spec)
    reference.weight = nn.Parameter(want.dequantize())
    assert torch.equal(q(x), reference(x))
    assert torch.equal(q.qweight().codes, want.codes)
    assert torch.equal(q.effective_weight(), want.dequantize())
    before = q(x)
    q.freeze()
    assert torch.equal(q(x), before)
    assert torch.equal(q.qweight().codes, want.codes)


def test_groups() -> None:
    layer, x = nn.Linear(12, 6), torch.randn(4, 12)
    q = quantized(layer, QuantSpec(bits=4, granularity=PerGroup(1, 4)))
    blocks = [QTensor.quantize(part, INT4).dequantize() for part in layer.weight.detach().split(4, dim=1)]
    assert torch.allclose(q(x), nn.functional.linear(x, torch.cat(blocks, 1), layer.bias), atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_until_it_is_calibrated_it_is_the_float_layer(name: str) -> None:
    build, data = LAYERS[name]
    layer, x = build(), data()
    q = quantized_layer(type(layer)).from_float(layer, INT8)  # type: ignore[union-attr]
    assert torch.equal(q(x), layer(x))
    assert q.weight is layer.weight, "the latent weight is the very Parameter"
    assert set(layer.state_dict()) <= set(q.state_dict()), "a float checkpoint fits by name"


@pytest.mark.parametrize("name", LAYERS)
def test_freeze_keeps_only_codes(name: str) -> None:
    build, _ = LAYERS[name]
    q = quantized(build(), on_axis(INT8, 0))
    entries = q.weight.numel()
    q.freeze()
    assert [k for k, _ in q.named_parameters()] in (["bias"], [])
    large = [t for t in q.state_dict().values() if t.numel() == entries]
    assert [t.dtype for t in large] == [torch.int8]


def test_a_frozen_lookup_decodes_only_the_rows_it_reads() -> None:
    """A table with one row that no code can stand for: it must not be touched."""
    q = quantized(nn.Embedding(8, 6), INT8)
    x = torch.tensor([[1, 3], [3, 0]])
    want = q(x)
    q.freeze()
    q.weight_quantizer.scale[7] = float("nan")
    assert torch.equal(q(x), want)


def test_the_scale_follows_the_channels() -> None:
    for name, axis in (("Linear", 0), ("Conv2d", 0), ("ConvTranspose2d", 1)):
        layer = LAYERS[name][0]()
        q = quantized(layer, on_axis(INT8, axis))
        assert q.channel_axis == axis
        assert q.weight_quantizer.scale.numel() == layer.weight.shape[axis]


def test_which_layers_are_known() -> None:
    class Own(nn.Linear):
        """A subclass may compute anything."""

    assert quantized_layer(Own) is None
    assert quantized_layer(nn.Conv3d) is None
    assert all(quantized_layer(type(build())) for build, _ in LAYERS.values())


def test_obstacles() -> None:
    plain, hooked = nn.Linear(3, 2), nn.Linear(3, 2)
    hooked.register_forward_pre_hook(lambda module, args: None)
    assert obstacle(plain) == ""
    assert obstacle(hooked) == "a hook runs with it"
    assert obstacle(nn.Embedding(4, 2, max_norm=1.0)) == "max_norm rewrites its weight"


class TestBoundLayer:
    def test_input_and_output_are_rounded(self) -> None:
        layer, x = nn.Linear(4, 3), torch.randn(5, 4)
        bound = BoundLayer(layer, Quantizer(QuantSpec(bits=8)), Quantizer(QuantSpec(bits=8)))
        assert torch.equal(bound(x), layer(x)), "off until calibrated"
        for quantizer, seen in ((bound.input_quantizer, x), (bound.output_quantizer, layer(x).detach())):
            assert quantizer is not None
            quantizer.set_range(seen.min().reshape(1, 1), seen.max().reshape(1, 1))
            quantizer.mode = "quantize"
        rounded = QTensor.quantize(x, QuantSpec(bits=8)).dequantize()
        step = bound.output_quantizer.scale.item()
        assert (bound(x) - layer(rounded)).abs().max() <= step / 2 * 1.001

    def test_it_answers_for_its_layer(self) -> None:
        bound = BoundLayer(quantized(nn.Linear(4, 3), INT8), None, None)
        assert bound.out_features == 3
        latent = bound.weight
        assert isinstance(latent, nn.Parameter)
        bound.layer.freeze()
        assert torch.equal(bound.weight, bound.layer.effective_weight())
        assert quantization_error(latent.detach(), INT8).max >= (bound.weight - latent).abs().max()
        with pytest.raises(AttributeError):
            _ = bound.nothing

    def test_it_can_be_copied(self) -> None:
        bound = copy.deepcopy(BoundLayer(nn.Linear(4, 3), None, Quantizer(INT8)))
        assert bound.in_features == 4


# -- what happens to a layer at the end of training

RESCALED: dict[str, tuple[Callable[[], nn.Module], QuantSpec]] = {
    "one scale": (lambda: nn.Linear(8, 6), QuantSpec(bits=4)),
    "channels": (lambda: nn.Conv2d(8, 6, 3), INT4),
    "eight bits": (lambda: nn.Conv1d(8, 6, 3), INT8),
    "two bits": (lambda: nn.Conv2d(8, 6, 3), replace(INT4, bits=2)),
    "narrow": (lambda: nn.Conv2d(8, 6, 3), replace(INT4, narrow=True)),
    "zero points": (lambda: nn.Conv2d(8, 6, 3), SPECS["uint4+zp/channel"]),
    "one zero point": (lambda: nn.Linear(8, 6), QuantSpec(bits=4, symmetric=False)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), INT4),
    "groups of inputs": (lambda: nn.Linear(8, 6), QuantSpec(bits=4, granularity=PerGroup(1, 4))),
    "groups of inputs, zero points": (
        lambda: nn.Conv2d(8, 6, 3),
        QuantSpec(bits=4, symmetric=False, granularity=PerGroup(1, 2)),
    ),
    "groups of outputs": (
        lambda: nn.Linear(8, 6),
        QuantSpec(bits=4, symmetric=False, granularity=PerGroup(0, 3)),
    ),
    "input channels": (lambda: nn.Conv2d(8, 6, 3), QuantSpec(bits=4, granularity=PerChannel(1))),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3), replace(INT4, granularity=PerChannel(1))),
    "transposed, one scale": (lambda: nn.ConvTranspose2d(8, 6, 3), QuantSpec(bits=4)),
    "transposed, groups of outputs": (
        lambda: nn.ConvTranspose2d(8, 6, 3),
        QuantSpec(bits=4, symmetric=False, granularity=PerGroup(1, 3)),
    ),
    "transposed, input channels": (
        lambda: nn.ConvTranspose2d(8, 6, 3),
        QuantSpec(bits=4, granularity=PerChannel(-4)),
    ),
}
FACTORS = {
    "positive": torch.tensor([0.3, 1.0, 2.5, 7.0, 1e-3, 40.0]),
    "negative too": torch.tensor([0.3, -1.0, 2.5, -7.0, 1e-3, 40.0]),
    "zero": torch.tensor([0.3, 0.0, 2.5, 7.0, 1e-3, 40.0]),
}


@pytest.mark.parametrize("sign", FACTORS)
@pytest.mark.parametrize("name", RESCALED)
def test_a_factor_goes_into_the_scale(name: str, sign: str) -> None:
    """The oracle: decoded weights times the factor. Codes stay, or turn into their opposites."""
    build, spec = RESCALED[name]
    q = quantized(build(), spec)
    by_channel = FACTORS[sign].reshape([-1 if d == q.channel_axis else 1 for d in range(q.weight.ndim)])
    before, negative = q.qweight(), (by_channel < 0).expand(q.weight.shape)
    want = before.dequantize() * by_channel
    lost = negative & (-before.codes.int() > spec.qmax) & spec.symmetric
    assert q.rescale(by_channel) == int(lost.sum())
    after = q.qweight()
    opposite = -before.codes.int() if spec.symmetric else spec.qmin + spec.qmax - before.codes.int()
    codes = torch.where(negative, opposite.clamp(max=spec.qmax), before.codes.int())
    assert torch.equal(after.codes.int()[want != 0], codes[want != 0])
    assert torch.allclose(after.dequantize()[~lost], want[~lost], rtol=1e-5)
    step = expand_to(after.scale, want.shape).expand(want.shape)
    assert ((after.dequantize() - want).abs()[lost] <= 1.001 * step[lost]).all()
    assert after.spec.scale_shape(want.shape) == tuple(after.scale.shape)
    assert after.spec == replace(spec, granularity=after.spec.granularity)
    assert torch.equal(q.effective_weight(), after.dequantize())
    q.freeze()
    assert torch.equal(q.effective_weight(), after.dequantize())


def test_one_scale_becomes_one_for_each_channel() -> None:
    q = quantized(nn.Linear(8, 6), QuantSpec(bits=4))
    q.rescale(FACTORS["positive"][:, None])
    assert str(q.weight_quantizer.spec) == "int4/channel"


def test_a_factor_on_halves_and_on_floats() -> None:
    factor = FACTORS["negative too"][:, None]
    for layer in (quantized(nn.Linear(8, 6), FP16), QLinear.from_float(nn.Linear(8, 6), INT8)):
        want = layer.weight.detach() * factor
        assert layer.rescale(factor) == 0
        assert torch.equal(layer.weight, want)


@pytest.mark.parametrize("estimator", estimators.names())
@pytest.mark.parametrize("name", LAYERS)
def test_settling_and_freezing_change_no_number(name: str, estimator: str) -> None:
    build, data = LAYERS[name]
    layer, x = build(), data()
    q = quantized(layer, on_axis(INT4, 1 if isinstance(layer, nn.ConvTranspose2d) else 0), estimator)
    q.weight_quantizer.learn()
    optimizer = torch.optim.SGD(q.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        q.train()(x).square().mean().backward()
        optimizer.step()
    want, codes = q.eval()(x), q.qweight().codes
    q.settle()
    assert torch.equal(q(x), want)
    q.settle()
    assert torch.equal(q(x), want), "twice is once"
    q.freeze()
    assert torch.equal(q(x), want)
    assert torch.equal(q.qweight().codes, codes)

"""Quantizers of binary and ternary weights: codes, what they are worth, and gradients by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import UINT8, LowbitError, PerChannel, PerTensor, QuantSpec, Recipe, Rule
from lowbit.core.spec import BINARY, TERNARY
from lowbit.nn.layers import QConv2d, QEmbedding, QLinear
from lowbit.nn.quantizer import Quantizer
from lowbit.training.schedule import set_progress

SPLIT = replace(TERNARY, split=True)
KINDS = {
    "binary": (BINARY, "mse"),
    "ternary": (TERNARY, "mse"),
    "absmean": (TERNARY, "absmean"),
    "twn": (TERNARY, "twn"),
    "ttq": (SPLIT, "ttq"),
    "split": (SPLIT, "mse"),
    "twn of a tensor": (replace(TERNARY, granularity=PerTensor()), "twn"),
    "ttq of a tensor": (replace(SPLIT, granularity=PerTensor()), "ttq"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def ready(kind: str, estimator: str = "lsq", reshape: str = "") -> tuple[Quantizer, nn.Parameter]:
    spec, observer = KINDS[kind]
    w = nn.Parameter(torch.randn(6, 40) * torch.logspace(-1, 1, 6)[:, None])
    quantizer = Quantizer(spec, None, estimator, observer, reshape)
    quantizer.take(quantizer.fit(w.detach()))
    quantizer.mode = "quantize"
    quantizer.learn()
    return quantizer, w


def by_hand(w: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Codes and values, from thresholds and scales."""
    scale, negative = quantizer.scale.detach(), quantizer.negative_scale
    below = scale if negative is None else negative.detach()
    if quantizer.spec.is_binary:
        codes = torch.where(w >= 0, 1.0, -1.0)
    else:
        ends = (scale / 2, below / 2) if quantizer.threshold is None else (quantizer.threshold,) * 2
        codes = (w > ends[0]).float() - (w < -ends[1]).float()
    return codes, torch.where(codes > 0, scale, below) * codes


@each_kind
@pytest.mark.parametrize("grad", [False, True])
def test_the_forward_pass(kind: str, grad: bool) -> None:
    quantizer, w = ready(kind)
    quantizer.eval()
    codes, values = by_hand(w.detach(), quantizer)
    with torch.set_grad_enabled(grad):
        assert torch.equal(quantizer(w).detach(), values)
    q = quantizer.quantize(w.detach())
    assert torch.equal(q.codes.float(), codes)
    assert torch.equal(q.dequantize(), values)


@pytest.mark.parametrize("kind", ["twn", "ttq", "split", "twn of a tensor", "ttq of a tensor"])
def test_scales_beside_a_threshold_are_learned(kind: str) -> None:
    """The gradient of what a code is worth: the sum over its codes, times 1 / sqrt(N)."""
    quantizer, w = ready(kind)
    g = torch.randn_like(w)
    quantizer.train()
    quantizer(w).backward(g)
    codes, _ = by_hand(w.detach(), quantizer)
    dims = (0, 1) if quantizer.scale.shape[0] == 1 else (1,)
    count = w.numel() // quantizer.scale.numel()
    positive = codes > 0 if quantizer.spec.split else codes != 0
    want = (g * codes * positive).sum(dims, keepdim=True) / count**0.5
    assert quantizer.scale.grad is not None
    assert torch.allclose(quantizer.scale.grad, want, rtol=1e-4, atol=1e-5)
    if quantizer.spec.split:
        assert quantizer.learned == ("scale", "negative_scale")
        assert quantizer.negative_scale is not None
        assert quantizer.negative_scale.grad is not None
        want = (g * codes * (codes < 0)).sum(dims, keepdim=True) / count**0.5
        assert torch.allclose(quantizer.negative_scale.grad, want, rtol=1e-4, atol=1e-5)
    assert w.grad is not None
    assert torch.isfinite(w.grad).all()
    assert (w.grad != 0).any()


@each_kind
def test_scales_that_are_not_learned_are_fitted_anew(kind: str) -> None:
    quantizer, w = ready(kind, "clipped_ste")
    assert quantizer.learned == ()
    quantizer.train()
    with torch.no_grad():
        w *= 3 * torch.rand(6, 1) + 0.1
    found = quantizer.fit(w.detach())
    quantizer(w)
    assert torch.equal(quantizer.scale, found.scale)
    for got, want in (
        (quantizer.threshold, found.threshold),
        (quantizer.negative_scale, found.negative_scale),
    ):
        assert (got is None) == (want is None)
        assert got is None or (want is not None and torch.equal(got, want))


@each_kind
def test_what_is_settled_is_what_was_trained(kind: str) -> None:
    layer = nn.Linear(40, 6)
    spec, observer = KINDS[kind]
    q = QLinear.from_float(layer, spec, observer).eval()
    quantizer = q.weight_quantizer
    quantizer.take(quantizer.fit(layer.weight.detach()))
    quantizer.mode = "quantize"
    quantizer.learn()
    with torch.no_grad():
        quantizer.scale *= 1.3
    want = q.effective_weight().detach()
    codes = q.qweight().codes
    q.settle()
    assert not list(quantizer.parameters())
    assert torch.equal(q.qweight().codes, codes)
    assert torch.equal(q.effective_weight(), want)
    q.freeze()
    assert torch.equal(q.effective_weight(), want)


@pytest.mark.parametrize("kind", ["binary", "ternary", "twn", "ttq"])
def test_batchnorm_of_either_sign_folds_into_the_scales(kind: str) -> None:
    """Binary and ternary codes have opposites; with a scale for each sign the scales change sides."""
    spec, observer = KINDS[kind]
    q = QConv2d.from_float(nn.Conv2d(5, 6, 3), spec, observer)
    quantizer = q.weight_quantizer
    quantizer.take(quantizer.fit(q.weight.detach()))
    quantizer.mode = "quantize"
    before = q.effective_weight().detach()
    factor = torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0, -1.0]).reshape(6, 1, 1, 1)
    q.settle()
    assert q.rescale(factor) == 0
    assert torch.allclose(q.effective_weight(), before * factor, rtol=1e-6)


def test_a_projection_moves_the_weight() -> None:
    quantizer, w = ready("binary", reshape="clip")
    quantizer.eval()
    big = w.detach().clone()
    quantizer(w)
    assert torch.equal(w.detach(), big), "only training moves it"
    quantizer.train()
    quantizer(w)
    assert torch.equal(w.detach(), big.clamp(-1, 1))


def test_progress_reaches_those_that_ask_for_it() -> None:
    asks, other = ready("binary", "ede")[0], ready("binary", "approx_sign")[0]
    recu = ready("binary", "approx_sign", "recu")[0]
    model = nn.ModuleList([asks, other, recu])
    set_progress(model, 0.25)
    assert (asks.progress, other.progress, recu.progress) == (0.25, None, 0.25)
    fresh = ready("binary", "ede")[0]
    fresh.load_state_dict(asks.state_dict())
    assert fresh.progress == 0.25, "a checkpoint of training knows it"
    asks.settle()
    assert asks.progress is None
    with pytest.raises(LowbitError, match=r"share=1\.5 of training is not from 0 to 1; pass step / steps"):
        set_progress(model, 1.5)


def test_more_bits_than_the_estimator_and_the_observer_are_for() -> None:
    """As in falling bits, and for the first and last layer."""
    quantizer = Quantizer(QuantSpec(bits=4, granularity=PerChannel(0)), None, "ede", "twn")
    plain = Quantizer(QuantSpec(bits=4, granularity=PerChannel(0)), None, "lsq")
    w = torch.randn(6, 40)
    found = []
    for one in (quantizer, plain):
        one.take(one.fit(w))
        one.mode = "quantize"
        one.learn()
        leaf = w.clone().requires_grad_()
        one(leaf).backward(torch.ones_like(w))
        found.append((leaf.grad, one.scale.grad))
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_state_of_thresholds_and_sides_comes_back() -> None:
    quantizer, w = ready("ttq")
    fresh = Quantizer(*KINDS["ttq"][:1], None, "lsq", "ttq")
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(w).detach(), quantizer(w).detach())
    assert fresh.learned == quantizer.learned


ODD = QuantSpec(bits=2, mid_rise=True, granularity=PerChannel(0))


@pytest.mark.parametrize("spec", [BINARY, ODD, TERNARY], ids=str)
def test_a_gain_of_zero_silences_a_channel(spec: QuantSpec) -> None:
    """As at the start of a residual branch; odd codes have no zero, so their scale vanishes."""
    q = QConv2d.from_float(nn.Conv2d(5, 6, 3), spec).eval()
    q.weight_quantizer.take(q.weight_quantizer.fit(q.weight.detach()))
    q.weight_quantizer.mode = "quantize"
    q.settle()
    q.rescale(torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0]).reshape(6, 1, 1, 1))
    largest = q.effective_weight().abs().amax(dim=(1, 2, 3))
    assert (largest[[0, 3]] < 1e-12).all()
    assert (largest[[1, 2, 4, 5]] > 0.01).all()


def test_rows_of_a_table_keep_a_scale_for_each_sign() -> None:
    q = QEmbedding.from_float(nn.Embedding(10, 8), SPLIT).eval()
    q.weight_quantizer.take(q.weight_quantizer.fit(q.weight.detach()))
    q.weight_quantizer.mode = "quantize"
    for index in (torch.randint(0, 10, (5, 2)), torch.randint(0, 10, (3,))):
        want = q(index)
        frozen = copy.deepcopy(q)
        frozen.freeze()
        assert torch.equal(frozen(index), want)


def test_a_scale_for_each_sign_rests_while_bits_fall() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 8)
    rule = Rule(weight=SPLIT, weight_observer="ttq", activation=UINT8)
    q = lowbit.calibrate(lowbit.prepare(net, Recipe(rules=(rule,)), x), x)
    lowbit.Trainer(q, [(x, torch.randint(0, 3, (16,)))], epochs=3, bits=(32, 4, 2)).fit()
    layer = q.get_submodule("graph.0")
    assert layer.weight_quantizer.spec.split
    assert set(layer.qweight().codes.unique().tolist()) == {-1, 0, 1}
    before = q(x)
    assert torch.allclose(lowbit.freeze(q)(x), before, atol=0.05)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself
def test_compile_sees_one_graph_whatever_the_progress() -> None:
    quantizer, w = ready("binary", "ede")
    graphs = []

    def backend(gm: torch.fx.GraphModule, _: object) -> object:
        graphs.append(gm)
        return gm.forward

    quantizer.train()
    compiled = torch.compile(quantizer, backend=backend)
    for step in range(4):
        set_progress(quantizer, step / 4)
        compiled(w).sum().backward()
    assert len(graphs) <= 2

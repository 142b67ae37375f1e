"""A quantizer watches, then rounds: the same numbers as the formula on bare tensors."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lowbit import FP16, INT8, UINT8, LowbitError, PerChannel, QTensor, QuantSpec
from lowbit.core.affine import fake_quantize, group_amin_amax
from lowbit.core.estimators import estimators
from lowbit.core.observers import Observer, observers
from lowbit.core.spec import TERNARY, PerTensor
from lowbit.nn.quantizer import Quantizer
from lowbit.training.schedule import set_progress

SPECS = {
    "uint8": UINT8,
    "int8": QuantSpec(bits=8),
    "int4 per channel": QuantSpec(bits=4, granularity=PerChannel(1)),
    "pow2": QuantSpec(bits=8, scale="pow2"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_it_rounds_to_what_it_observed(spec: QuantSpec, observer: str) -> None:
    """The oracle: the observer by itself and QTensor."""
    batches = [torch.randn(4, 3, 5), 2 * torch.randn(6, 3, 5)]
    quantizer, alone = Quantizer(spec, observer), observers.get(observer)(spec)
    quantizer.mode = "observe"
    for x in batches:
        assert quantizer(x) is x
        alone.update(x)
    assert quantizer.finish_observing()
    assert quantizer.mode == "quantize"
    assert quantizer.observer is None, "nothing observed is kept"
    x = torch.randn(2, 3, 5)
    want = QTensor.quantize(x, spec, alone.range())
    assert torch.equal(quantizer(x), want.dequantize())
    assert torch.equal(quantizer.quantize(x).codes, want.codes)


def test_off_is_the_identity() -> None:
    x = torch.randn(3)
    assert Quantizer(UINT8)(x) is x


def test_fp16_needs_no_range() -> None:
    quantizer, x = Quantizer(FP16), torch.randn(100)
    assert quantizer.ready
    quantizer.mode = "observe"
    assert quantizer(x) is x
    assert quantizer.finish_observing()
    assert torch.equal(quantizer(x), x.half().float())


def test_without_data_it_stays_off() -> None:
    quantizer = Quantizer(UINT8)
    quantizer.mode = "observe"
    assert not quantizer.finish_observing()
    assert quantizer.mode == "off"


def test_without_a_scale_it_says_what_to_do() -> None:
    quantizer = Quantizer(UINT8)
    quantizer.mode = "quantize"
    with pytest.raises(LowbitError, match=r"call lowbit\.calibrate"):
        quantizer(torch.randn(3))


def test_an_observer_may_be_a_class() -> None:
    assert isinstance(Quantizer(INT8, observers.get("kl")).observer, Observer)


def test_a_copy_of_an_observing_quantizer_observes_by_itself() -> None:
    quantizer = Quantizer(QuantSpec(bits=8, granularity=PerTensor()), "mse")
    quantizer.mode = "observe"
    quantizer(torch.ones(4))
    other = copy.deepcopy(quantizer)
    other(torch.full((4,), 9.0))
    quantizer.finish_observing()
    other.finish_observing()
    assert other.scale > 5 * quantizer.scale


# -- training

QUANTITIES = {"weight": None, "activation": "minmax"}
TRAINED = {
    "int4": QuantSpec(bits=4),
    "int4 per channel": QuantSpec(bits=4, granularity=PerChannel(1)),
    "uint8 with zero point": UINT8,
    "uint4 with zero points": QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerChannel(1)),
    "pow2": QuantSpec(bits=4, scale="pow2"),
}
each_spec = pytest.mark.parametrize("spec", TRAINED.values(), ids=TRAINED)
each_estimator = pytest.mark.parametrize("estimator", estimators.names())


def data(seed: int = 0) -> Tensor:
    """Samples of 5 channels, badly spread."""
    torch.manual_seed(seed)
    return torch.randn(6, 5, 7) * torch.logspace(-1, 1, 5)[:, None] + 0.3


def ready(spec: QuantSpec, estimator: str = "lsq", observer: str | None = "minmax") -> Quantizer:
    """A quantizer that saw a part of the data, in training."""
    quantizer = Quantizer(spec, observer, estimator)
    quantizer.set_range(*group_amin_amax(0.6 * data(), spec))
    quantizer.mode = "quantize"
    quantizer.learn()
    return quantizer.train()


def step(quantizer: Quantizer, x: Tensor, rate: float = 0.1) -> None:
    """One step of the optimizer, or of the running range."""
    error = (quantizer(x) - x).square().mean()
    if quantizer.learned:
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=rate)
        error.backward()
        optimizer.step()


@each_estimator
@each_spec
def test_what_is_learned_is_a_parameter(spec: QuantSpec, estimator: str) -> None:
    learns = estimators.get(estimator).learns
    want = {n for n in learns if n == "scale" or not spec.symmetric}
    quantizer = ready(spec, estimator)
    assert set(quantizer.learned) == set(dict(quantizer.named_parameters())) == want
    buffers = {n for n, _ in quantizer.named_buffers()}
    fixed = {"scale"} if spec.symmetric else {"scale", "zero_point"}
    assert ("progress" in buffers) == estimators.get(estimator).scheduled
    assert buffers - {"progress"} == fixed - want | ({"unit"} if want else set())
    before = quantizer(data())
    quantizer.learn()
    assert torch.equal(quantizer(data()), before), "twice is once"


RELAXED = {
    "sign": QuantSpec(bits=1, mid_rise=True, granularity=PerChannel(1)),
    "ternary": TERNARY,
    "int4": QuantSpec(bits=4),
}


@pytest.mark.parametrize("spec", RELAXED.values(), ids=RELAXED)
@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.35, 0.75), (0.7, 1.0), (1.0, 1.0)])
def test_a_relaxed_weight_goes_from_itself_to_its_codes(
    spec: QuantSpec, progress: float, share: float
) -> None:
    x = data()[0]
    relaxed, plain = (Quantizer(spec, None, name) for name in ("relax", "clipped_ste"))
    for quantizer in (relaxed, plain):
        quantizer.take(quantizer.fit(x))
        quantizer.mode = "quantize"
        quantizer.train()
    assert torch.equal(relaxed(x), plain(x)), "rounded, where no schedule says otherwise"
    set_progress(nn.Sequential(relaxed), progress)
    grads = []
    for quantizer in (relaxed, plain):
        w = x.clone().requires_grad_()
        quantizer(w).sum().backward()
        grads.append(w.grad)
    assert torch.allclose(relaxed(x), (1 - share) * x + share * plain(x), atol=1e-6)
    assert torch.allclose(grads[0], (1 - share) + share * grads[1])
    assert torch.equal(relaxed.eval()(x), plain.eval()(x))
    with torch.no_grad():
        assert torch.equal(relaxed.train()(x), plain(x))


@pytest.mark.parametrize("spec", [FP16, INT8], ids=["fp16", "no range"])
def test_what_has_no_scale_learns_nothing(spec: QuantSpec) -> None:
    quantizer = Quantizer(spec)
    quantizer.mode = "quantize"
    quantizer.learn()
    assert not list(quantizer.parameters())


@each_spec
@pytest.mark.parametrize("kind", QUANTITIES)
def test_the_gradient_of_the_scale_counts_one_sample(kind: str, spec: QuantSpec) -> None:
    """N is the elements of a weight, or of one sample of an activation, that share the scale."""
    quantizer, x = ready(spec, "lsq", QUANTITIES[kind]), data()
    scale, zero = (None if t is None else t.detach() for t in quantizer.grid())
    assert scale is not None
    g = torch.randn(x.shape)
    quantizer(x).backward(g)
    v, y = x / scale, quantizer(x).detach()
    zeros = 0 if zero is None else zero
    inside = (v >= spec.qmin - zeros) & (v <= spec.qmax - zeros)
    each = g * (y / scale - torch.where(inside, v, 0.0))
    shared = {1: 35, 5: 7}[scale.numel()] * (6 if kind == "weight" else 1)
    want = each.sum((0, 2), keepdim=True) if scale.numel() > 1 else each.sum().reshape(scale.shape)
    assert quantizer.scale.grad is not None
    assert torch.allclose(quantizer.scale.grad, want / (shared * spec.qmax) ** 0.5, rtol=1e-3, atol=1e-4)


@each_spec
def test_a_scale_never_passes_zero(spec: QuantSpec) -> None:
    """An optimizer carries it to the other side, or onto zero; the next pass, and freeze, mirror it."""
    quantizer, x = ready(spec), data()
    size = quantizer.scale.detach().abs().clone()
    quantizer.scale.data.neg_()
    settled = copy.deepcopy(quantizer)
    settled.settle()
    step(quantizer, x, rate=0.0)
    for scale in (quantizer.scale, settled.scale):
        assert torch.equal(scale, size)
    quantizer.scale.data.zero_()
    assert torch.isfinite(quantizer(x)).all()
    assert (quantizer.scale > 0).all()
    before = quantizer.scale.detach().clone()
    quantizer.scale.requires_grad_(False).neg_()
    quantizer(x)
    assert torch.equal(quantizer.scale, before), "one that is held fixed too"


def test_a_tensor_may_be_rounded_twice_before_the_backward_pass() -> None:
    """As the weight of a layer that is called twice."""
    quantizer, x = ready(UINT8, "lsq_plus"), data()
    once = copy.deepcopy(quantizer)
    (quantizer(x) + quantizer(2 * x)).sum().backward()
    once(x).sum().backward()
    once(2 * x).sum().backward()
    assert quantizer.scale.grad is not None
    assert torch.allclose(quantizer.scale.grad, once.scale.grad)


def test_a_power_of_two_stays_one_while_it_is_learned() -> None:
    quantizer, x = ready(TRAINED["pow2"]), data()
    for latent, used in ((0.3, 0.25), (0.4, 0.5), (0.5, 0.5), (0.51, 0.5), (0.8, 1.0)):
        quantizer.scale.data.fill_(latent)
        quantizer.scale.grad = None
        y = quantizer(x)
        assert torch.equal(y, fake_quantize(x, torch.full((1, 1, 1), used), None, quantizer.spec))
        y.sum().backward()
        assert quantizer.scale.grad is not None
        assert quantizer.scale.grad.item() != 0
    settled = copy.deepcopy(quantizer)
    settled.settle()
    assert settled.scale.item() == 1.0


@pytest.mark.parametrize(("latent", "used"), [(3.4, 3), (3.6, 4), (-7.0, 0), (900.0, 255), (2.5, 2)])
def test_a_learned_zero_point_is_rounded_and_kept_among_the_codes(latent: float, used: int) -> None:
    quantizer, x = ready(UINT8, "lsq_plus"), data()
    quantizer.zero_point.data.fill_(latent)  # type: ignore[union-attr]
    y = quantizer(x)
    whole = torch.tensor(used).reshape(1, 1, 1)
    assert torch.equal(y, fake_quantize(x, quantizer.scale.detach(), whole, UINT8))
    y.backward(torch.ones_like(y))
    assert quantizer.zero_point.grad is not None  # type: ignore[union-attr]
    quantizer.settle()
    assert torch.equal(quantizer.zero_point, whole.int())  # type: ignore[arg-type]
    assert quantizer.zero_point.dtype == torch.int32  # type: ignore[union-attr]


@pytest.mark.parametrize("estimator", [n for n in estimators.names() if not estimators.get(n).learns])
@pytest.mark.parametrize("spec", [s for s in TRAINED.values() if s.scale != "pow2"], ids=str)
def test_a_scale_that_is_not_learned_follows_the_range(spec: QuantSpec, estimator: str) -> None:
    """The oracle: a running mean of the largest magnitude, in which the newest batch has one hundredth."""
    quantizer = ready(spec, estimator)
    start, reach, first = quantizer.scale.clone(), torch.zeros(0), torch.zeros(0)
    for k in range(5):
        x = (1 + k) * data(k)
        dims = (0, 2) if start.numel() > 1 else (0, 1, 2)
        newest = x.abs().amax(dims, keepdim=True)
        if k == 0:
            first = reach = newest
        reach = 0.99 * reach + 0.01 * newest
        quantizer(x)
        assert torch.allclose(quantizer.scale, start * reach / first)
    assert (quantizer.scale > start).all()
    held = quantizer.scale.clone()
    with torch.no_grad():
        quantizer(9 * data())
    quantizer.eval()(9 * data())
    assert torch.equal(quantizer.scale, held), "without gradients and in evaluation it stays"
    assert not list(quantizer.parameters())


def test_the_scale_of_a_weight_follows_it_at_once() -> None:
    spec = TRAINED["int4 per channel"]
    quantizer, w = ready(spec, "clipped_ste", None), data()
    start = quantizer.scale.clone()
    for factor in (1.0, 3.0, 0.5, 0.0, 2.0):
        y = quantizer(w * factor)
        want = start * (factor or 0.5)
        assert torch.allclose(quantizer.scale, want), "an all-zero weight has no range"
        assert torch.equal(y, fake_quantize(w * factor, quantizer.scale, None, spec))


@each_estimator
@each_spec
@pytest.mark.parametrize("kind", QUANTITIES)
def test_what_is_settled_gives_the_same_numbers(kind: str, spec: QuantSpec, estimator: str) -> None:
    quantizer, x = ready(spec, estimator, QUANTITIES[kind]), data()
    for _ in range(3):
        step(quantizer, x)
    quantizer.eval()
    want, codes = quantizer(x).detach(), quantizer.quantize(x)
    bent = quantizer.reshaped(x)
    quantizer.settle()
    assert not list(quantizer.parameters())
    assert {"scale"} <= {n for n, _ in quantizer.named_buffers()} <= {"scale", "zero_point"}
    assert torch.equal(quantizer(bent), want), "the layer keeps the weight as it was reshaped"
    assert torch.equal(quantizer.quantize(bent).codes, codes.codes)
    assert torch.equal(codes.dequantize(), want)
    if spec.scale == "pow2":
        assert torch.equal(quantizer.scale.log2(), quantizer.scale.log2().round())


@each_estimator
@each_spec
def test_state_comes_back_whatever_shape_was_known(spec: QuantSpec, estimator: str) -> None:
    trained, x = ready(spec, estimator), data()
    for k in range(2):
        step(trained, x * (1 + k))
    state, shape = trained.state_dict(), (1,) * x.ndim
    fresh = Quantizer(spec, estimator=estimator)
    other = Quantizer(replace(spec, granularity=PerTensor()), estimator=estimator)
    other.spec = spec
    other.set_range(torch.full(shape, -9.0), torch.full(shape, 9.0))
    other.mode = "quantize"
    other.learn()
    for quantizer in (fresh, other):
        parameters = dict(quantizer.named_parameters())
        assert str(quantizer.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
        now = dict(quantizer.named_parameters())
        assert all(now[n] is p for n, p in parameters.items()), "an optimizer that holds them goes on"
        assert (quantizer.mode, quantizer.learned) == ("quantize", trained.learned)
        assert torch.equal(quantizer.eval()(x), trained.eval()(x))
        again = quantizer.state_dict()
        assert list(again) == list(state)
        assert all(torch.equal(again[n], state[n]) for n in state)
    trained.scale.data.mul_(2)
    assert not torch.equal(fresh.scale, trained.scale), "it is a copy"


def test_a_checkpoint_without_scales_leaves_them() -> None:
    quantizer, x = ready(UINT8, "lsq_plus"), data()
    want = quantizer(x)
    quantizer.load_state_dict({}, strict=True)
    assert torch.equal(quantizer(x), want)


@each_estimator
def test_a_copy_learns_by_itself(estimator: str) -> None:
    quantizer, x = ready(UINT8, estimator), data()
    other = copy.deepcopy(quantizer)
    assert other.learned == quantizer.learned
    want = quantizer.eval()(x).detach()
    for k in range(3):
        step(other, x * k)
    assert torch.equal(quantizer(x), want)
    assert not torch.equal(other.eval()(x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_in_float32(dtype: torch.dtype) -> None:
    quantizer, x = ready(UINT8), data().to(dtype)
    latent = x.clone().requires_grad_()
    y = quantizer(latent)
    assert y.dtype == torch.float32
    assert torch.equal(y, quantizer(x.float()))
    y.sum().backward()
    assert latent.grad is not None
    assert latent.grad.dtype == dtype

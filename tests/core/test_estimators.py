"""Every estimator: the same forward pass, and the gradient of its paper, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lowbit import LowbitError, PerChannel, PerGroup, PerTensor, QuantSpec, kernels
from lowbit.core.affine import dequantize, fake_quantize, quantize
from lowbit.core.estimators import Estimator, Gradients, Local, estimator, estimators
from lowbit.core.reshapes import reshapes
from lowbit.core.spec import Granularity, expand_to

# slope of y by x at position v with code c, both in steps, for a gradient g
Slope = Callable[[float, float, float], float]


def straight(v: float, c: float, g: float) -> float:
    return 1.0


def pushed(v: float, c: float, g: float) -> float:
    """EWGS, eq. 3."""
    return 1.0 + 0.02 * math.copysign(1.0, g) * (v - c)


def nearest(v: Tensor, spec: QuantSpec) -> Tensor:
    """The integer, or the odd one, that is nearest."""
    return 2 * torch.floor(v / 2) + 1 if spec.mid_rise else v.round()


def limits(spec: QuantSpec) -> tuple[int, int]:
    """Ends of what is inside: half a step beyond odd codes."""
    return (spec.qmin - 1, spec.qmax + 1) if spec.mid_rise else (spec.qmin, spec.qmax)


def staircase(v: float) -> float:
    """DSQ, eq. 4 to 8, alpha = 0.4, in steps: a tanh between each two codes, joined at the codes."""
    k, middle = math.log(2 / 0.4 - 1), math.floor(v) + 0.5
    return middle + 0.5 * math.tanh(k * (v - middle)) / math.tanh(k / 2)


def soft(v: float, c: float, g: float) -> float:
    """Its slope, by a finite difference."""
    h = 1e-5
    return (staircase(v + h) - staircase(v - h)) / (2 * h)


def learned_step(x: Tensor, s: Tensor, z: Tensor, spec: QuantSpec) -> Tensor:
    """LSQ+, eq. 1 and 2, straight through the two roundings; LSQ where z is fixed."""
    if spec.mid_rise:
        v = x / s
        inside = v.abs() <= spec.qmax + 1
        return torch.where(inside, v + (nearest(v, spec) - v).detach(), v.sign() * spec.qmax) * s
    z = z + (z.round() - z).detach()
    v = torch.minimum(torch.maximum(x / s, spec.qmin - z), spec.qmax - z) + z
    return (v + (v.round() - v).detach() - z) * s


def learned_clip(x: Tensor, s: Tensor, z: Tensor, spec: QuantSpec) -> Tensor:
    """PACT, eq. 1 and 2: clip to the learned ends, then round straight through."""
    if spec.mid_rise:  # the ends are the outermost codes, though what rounds to them is not clipped
        beyond = (x / s).abs() > spec.qmax + 1
        return torch.where(beyond, x.sign() * spec.qmax * s, x + (nearest(x / s, spec) * s - x).detach())
    y = torch.minimum(torch.maximum(x, s * (spec.qmin - z)), s * (spec.qmax - z))
    return y + ((y / s).round() * s - y).detach()


@dataclass(frozen=True, kw_only=True)
class Row:
    """What an estimator must do."""

    learns: tuple[str, ...] = ()
    # slope inside, and beyond the clamp
    inside: Slope = straight
    outside: float = 0.0
    # a composition in torch whose gradient by the scale, and the zero point if learned, is the paper's
    composition: Callable[[Tensor, Tensor, Tensor, QuantSpec], Tensor] | None = None
    fused: bool = False
    reshapes: bool = False


ROWS = {
    "ste": Row(outside=1.0),
    "clipped_ste": Row(fused=True),
    "relax": Row(fused=True),
    "lsq": Row(learns=("scale",), composition=learned_step, fused=True),
    "lsq_plus": Row(learns=("scale", "zero_point"), composition=learned_step, fused=True),
    "pact": Row(learns=("scale",), composition=learned_clip, fused=True),
    "ewgs": Row(learns=("scale",), inside=pushed, composition=learned_step),
    "dsq": Row(learns=("scale",), inside=soft, composition=learned_step),
    "dorefa": Row(fused=True, reshapes=True),
}
SHAPE = (4, 6, 5)
GRANULARITIES: dict[str, Granularity] = {
    "tensor": PerTensor(),
    "channel 0": PerChannel(0),
    "channel 1": PerChannel(1),
    "last channel": PerChannel(2),
    "group": PerGroup(1, 3),
}
KINDS = {
    "int": QuantSpec(bits=8),
    "uint": QuantSpec(bits=8, signed=False),
    "int+zp": QuantSpec(bits=8, symmetric=False),
    "uint+zp": QuantSpec(bits=8, signed=False, symmetric=False),
    "narrow": QuantSpec(bits=8, narrow=True),
    "half up": QuantSpec(bits=8, rounding="half_up"),
    "mid-rise": QuantSpec(bits=2, mid_rise=True),
}
each_row = pytest.mark.parametrize("name", ROWS)


@dataclass(frozen=True)
class OneBit:
    """An estimator for one bit: f(t) of its paper, codes at t = -1 and 1, and the |t| where it bends."""

    f: Callable[[float, float], float]
    bends: tuple[float, ...] = ()
    # slope near 0, where the paper cuts f off
    near: Callable[[float], float] | None = None


def quadratic(t: float, progress: float) -> float:
    """Bi-Real Net, eq. 7."""
    return math.copysign(1.0, t) if abs(t) >= 1 else 2 * t + t * t if t < 0 else 2 * t - t * t


def swish(t: float, progress: float) -> float:
    """BNN+, eq. 6, b = 5."""
    sigmoid = 1 / (1 + math.exp(-5 * t))
    return 2 * sigmoid * (1 + 5 * t * (1 - sigmoid)) - 1


def decaying(t: float, progress: float) -> float:
    """IR-Net, eq. 10 and 11: T from 0.1 to 10."""
    sharpness = 0.1 * 10 ** (progress * math.log10(10 / 0.1))
    return max(1 / sharpness, 1) * math.tanh(sharpness * t)


def power(t: float, progress: float) -> float:
    """ReSTE, eq. 8, the gradient cut off beyond 1.5."""
    size = min(abs(t), 1.5)
    return math.copysign(size ** (1 / (1 + 2 * progress)), t)


ONE_BIT = {
    "approx_sign": OneBit(quadratic, (0.0, 1.0)),
    "swish_sign": OneBit(swish),
    "ede": OneBit(decaying),
    "reste": OneBit(power, (0.1, 1.5), near=lambda p: 0.1 ** (1 / (1 + 2 * p)) / 0.1),
}
each_one_bit = pytest.mark.parametrize("name", ONE_BIT)
each_granularity = pytest.mark.parametrize("where", GRANULARITIES.values(), ids=GRANULARITIES)


def specs(kind: str, where: Granularity) -> list[QuantSpec]:
    """That kind of spec from 1 to 8 bits, where it exists."""
    made = []
    for bits in range(1, 9):
        try:
            made.append(replace(KINDS[kind], bits=bits, granularity=where))
        except LowbitError:
            assert bits == 1 or (kind == "mid-rise" and bits == 8)
    return made


@dataclass(frozen=True)
class Case:
    """A tensor that reaches beyond its codes, clear of ties and of the ends, with scales and a gradient."""

    spec: QuantSpec
    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    g: Tensor

    @classmethod
    def of(cls, spec: QuantSpec, shape: tuple[int, ...] = SHAPE) -> Case:
        scales = spec.scale_shape(shape)
        scale = torch.rand(scales) + 0.1
        zero = None if spec.symmetric else torch.randint(spec.qmin, spec.qmax + 1, scales, dtype=torch.int32)
        codes = torch.randint(spec.qmin - 2, spec.qmax + 3, shape).float()
        if spec.mid_rise:
            half = 2 ** (spec.bits - 1)
            codes = 2 * torch.randint(-half - 1, half + 1, shape).float() + 1
        away = (0.05 + 0.4 * torch.rand(shape)) * torch.randn(shape).sign()
        offset = 0 if zero is None else expand_to(zero, shape)
        x = (codes + spec.step * away - offset) * expand_to(scale, shape)
        return cls(spec, x, scale, zero, torch.randn(shape))

    def gradients(self, of: Estimator, count: int = 7) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of x, scale and zero point, as training gets them."""
        x, scale = self.x.clone().requires_grad_(), self.scale.clone().requires_grad_()
        zero = None if self.zero_point is None else self.zero_point.float().requires_grad_()
        of(x, scale, zero, self.spec, count).backward(self.g)
        assert x.grad is not None
        return x.grad, scale.grad, None if zero is None else zero.grad

    def positions(self) -> tuple[Tensor, Tensor, Tensor]:
        """v, c and whether inside, in float64."""
        v = self.x.double() / expand_to(self.scale, self.x.shape)
        zero = 0 if self.zero_point is None else expand_to(self.zero_point, self.x.shape)
        c = (nearest(v, self.spec) + zero).clamp(self.spec.qmin, self.spec.qmax) - zero
        lo, hi = limits(self.spec)
        return v, c, (v >= lo - zero) & (v <= hi - zero)


def close(got: Tensor, want: Tensor) -> bool:
    """Sums are compared by the size of what was summed."""
    return (got.double() - want).abs().max().item() <= 2e-4 * max(1.0, want.abs().max().item())


def test_every_estimator_has_its_row() -> None:
    assert estimators.names() == tuple(sorted([*ROWS, *ONE_BIT]))
    for name, row in ROWS.items():
        of = estimators.get(name)
        found = of.learns, of.fused is not None, of.reshape != "none", of.one_bit
        assert found == (row.learns, row.fused, row.reshapes, False)
    assert all(estimators.get(name).one_bit for name in ONE_BIT)


ONE_BIT_KINDS = {
    "sign": QuantSpec(bits=1, mid_rise=True),
    "bit": QuantSpec(bits=1, signed=False),
    "bit+zp": QuantSpec(bits=1, signed=False, symmetric=False),
    "sign per channel": QuantSpec(bits=1, mid_rise=True, granularity=PerChannel(0)),
}


@each_one_bit
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ONE_BIT_KINDS)
def test_one_bit_follows_its_paper(name: str, kind: str, progress: float) -> None:
    """The oracle: y = s f(t) differentiated by finite differences, t = -1 and 1 at the codes."""
    spec, row, of = ONE_BIT_KINDS[kind], ONE_BIT[name], estimators.get(name)
    case = Case.of(spec)
    x, scale = case.x.clone().requires_grad_(), case.scale.clone().requires_grad_()
    y = of(x, scale, case.zero_point, spec, 9, torch.tensor(progress))
    assert torch.equal(y, fake_quantize(case.x, case.scale, case.zero_point, spec))
    y.backward(case.g)
    v, c, _ = case.positions()
    zero = 0 if case.zero_point is None else expand_to(case.zero_point, SHAPE).double()
    middle, half = (spec.qmin + spec.qmax) / 2 - zero, spec.step / 2
    t = (v - middle) / half

    def slope(at: float) -> float:
        if row.near is not None and abs(at) < 0.1:
            return row.near(progress)
        return (row.f(at + 1e-5, progress) - row.f(at - 1e-5, progress)) / 2e-5

    clear = torch.ones(SHAPE, dtype=torch.bool)
    for bend in row.bends:
        clear &= (t.abs() - bend).abs() > 1e-3
    want = torch.tensor([slope(value) for value in t.flatten().tolist()]).reshape(SHAPE).double()
    assert x.grad is not None
    assert scale.grad is not None
    assert torch.allclose(x.grad.double()[clear], (case.g * want)[clear], rtol=1e-3, atol=1e-4)
    moved = case.g.double() * (c - v * want) / math.sqrt(9)
    shape = tuple(scale.shape)
    summed = moved.flatten(1).sum(1).reshape(shape) if shape[0] > 1 else moved.sum().reshape(shape)
    assert torch.allclose(scale.grad.double(), summed, rtol=1e-2, atol=1e-2)


def test_scheduled_estimators_sharpen() -> None:
    x = torch.tensor([0.05, 1.0])
    for name, rises in (("ede", (True, False)), ("reste", (True, False))):
        slopes = []
        for progress in (0.0, 1.0):
            leaf = x.clone().requires_grad_()
            estimators.get(name)(
                leaf, torch.ones(1), None, ONE_BIT_KINDS["sign"], 1, torch.tensor(progress)
            ).sum().backward()
            slopes.append(leaf.grad)
        assert tuple((slopes[1] > slopes[0]).tolist()) == rises


@each_row
@each_granularity
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_is_the_one_that_is_deployed(name: str, where: Granularity, kind: str) -> None:
    """Bit for bit fake_quantize, whose values are those of codes."""
    for spec in specs(kind, where):
        case = Case.of(spec)
        x = case.x.clone().requires_grad_()
        y = estimators.get(name)(x, case.scale, case.zero_point, spec, 1)
        assert torch.equal(y, fake_quantize(case.x, case.scale, case.zero_point, spec))
        codes = quantize(case.x, case.scale, case.zero_point, spec)
        assert spec.qmin <= codes.min()
        assert codes.max() <= spec.qmax
        assert torch.equal(y, dequantize(codes, case.scale, case.zero_point))


@each_row
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_never_falls(name: str, kind: str) -> None:
    for spec in specs(kind, PerTensor()):
        scale, zero = torch.tensor([0.37]), None if spec.symmetric else torch.tensor([spec.qmin + 1])
        reach = spec.step * 2**spec.bits
        x = torch.linspace(-0.5 * reach, 1.2 * reach, 3001, requires_grad=True) * 0.37
        y = estimators.get(name)(x, scale, zero, spec, 1)
        assert (y.diff() >= 0).all()
        assert len(y.unique()) == (spec.qmax - spec.qmin) // spec.step + 1, "every code is reached"


@each_row
@each_granularity
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_x_is_that_of_the_paper(name: str, where: Granularity, kind: str) -> None:
    """The oracle: one element after the other, in plain Python."""
    row = ROWS[name]
    for spec in specs(kind, where):
        case = Case.of(spec)
        got = case.gradients(estimators.get(name))[0]
        v, c, inside = case.positions()
        if spec.mid_rise:  # in steps, as if codes were integers
            v, c = (v - 1) / 2, (c - 1) / 2
        triples = zip(*(t.flatten().tolist() for t in (v, c, inside, case.g)), strict=True)
        want = [g * (row.inside(v, c, g) if inside else row.outside) for v, c, inside, g in triples]
        assert torch.allclose(got.double().flatten(), torch.tensor(want).double(), rtol=1e-4, atol=1e-6)


@each_row
@each_granularity
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "half up"])
def test_the_gradient_of_what_is_learned(name: str, where: Granularity, kind: str) -> None:
    """The oracle: autograd through a straight-through composition, in float64, times 1 / sqrt(N qmax)."""
    row = ROWS[name]
    for spec in specs(kind, where):
        case, count = Case.of(spec), 12
        _, of_scale, of_zero = case.gradients(estimators.get(name), count)
        if row.composition is None:
            assert of_scale is None
            assert of_zero is None
            continue
        scale = case.scale.double().requires_grad_()
        start = torch.zeros_like(case.scale) if case.zero_point is None else case.zero_point
        zero = start.double().requires_grad_()
        wide = [expand_to(t, SHAPE) for t in (scale, zero)]
        row.composition(case.x.double(), wide[0], wide[1], spec).backward(case.g.double())
        gain = 1 / math.sqrt(count * max(1, spec.qmax))
        assert scale.grad is not None
        assert of_scale is not None
        assert close(of_scale, scale.grad * gain)
        if "zero_point" in row.learns and not spec.symmetric:
            assert of_zero is not None
            assert close(of_zero, zero.grad * gain)
        else:
            assert of_zero is None or not of_zero.any()


@each_row
def test_the_ends_belong_to_the_inside(name: str) -> None:
    """At v = qmin - z and v = qmax - z, or half a step beyond odd codes, and one float further."""
    with_zero = QuantSpec(bits=4, signed=False, symmetric=False)
    for spec, ends, zero in (
        (with_zero, torch.tensor([-3.0, 12.0]), torch.tensor([3])),
        (QuantSpec(bits=2, mid_rise=True), torch.tensor([-4.0, 4.0]), None),
    ):
        beyond = torch.nextafter(ends, 2 * ends)
        case = Case(spec, 0.5 * torch.cat([ends, beyond]), torch.tensor([0.5]), zero, torch.ones(4))
        got = case.gradients(estimators.get(name))[0]
        assert (got[:2] > 0).all()
        assert torch.equal(got[2:], torch.full((2,), ROWS[name].outside))


def test_the_soft_staircase_has_slope_one_on_average() -> None:
    spec, n = QuantSpec(bits=4), 4001
    x = torch.linspace(-8, 7, n, requires_grad=True)
    estimators.get("dsq")(x, torch.ones(1), None, spec, 1).sum().backward()
    assert x.grad is not None
    assert x.grad[1:-1].mean().item() == pytest.approx(1, abs=1e-3)
    assert x.grad.max().item() > 1.15, "steep between codes"
    assert x.grad.min().item() < 0.75, "flat at them"


def test_dorefa_bends_weights_and_keeps_their_reach() -> None:
    """The oracle: eq. 9 of the paper, differentiated by hand, its largest value held fixed."""
    assert estimators.get("dorefa").reshape == "tanh"

    def bend(w: Tensor) -> Tensor:
        return reshapes.get("tanh")(w, QuantSpec(bits=4))

    w = (2 * torch.randn(6, 5)).requires_grad_()
    g = torch.randn(6, 5)
    bent = bend(w)
    ratio = w.detach().abs().max() / w.detach().abs().max().tanh()
    assert torch.allclose(bent, w.tanh() * ratio)
    assert bent.abs().max().item() == pytest.approx(w.abs().max().item(), rel=1e-6)
    bent.backward(g)
    assert w.grad is not None
    assert torch.allclose(w.grad, g * (1 - w.detach().tanh() ** 2) * ratio, rtol=1e-4, atol=1e-6)
    assert not bend(torch.zeros(3)).any()


@pytest.mark.skipif(not kernels.available(), reason="no compiled library")
@each_row
@each_granularity
def test_the_fused_pass_is_the_formula(
    name: str, where: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (8, 6, 41)
    cases = [
        Case.of(replace(KINDS[kind], bits=bits, granularity=where), shape)
        for kind, bits in (("int", 4), ("uint+zp", 8), ("uint+zp", 2), ("mid-rise", 1), ("mid-rise", 2))
    ]
    native = [case.gradients(estimators.get(name)) for case in cases]
    monkeypatch.setattr(kernels, "supports", lambda *_: False)
    for case, fast in zip(cases, native, strict=True):
        slow = case.gradients(estimators.get(name))
        assert torch.equal(fast[0], slow[0])
        for a, b in zip(fast[1:], slow[1:], strict=True):
            assert a is None or b is None or close(a, b.double())
            assert (a is None or not a.any()) == (b is None or not b.any())


@each_row
def test_channels_last_changes_nothing(name: str) -> None:
    case = Case.of(QuantSpec(bits=4, granularity=PerChannel(1)), (4, 6, 5, 3))
    other = replace(case, x=case.x.contiguous(memory_format=torch.channels_last))
    for a, b in zip(*(c.gradients(estimators.get(name)) for c in (case, other)), strict=True):
        assert a is None or b is None or torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@each_row
def test_an_empty_tensor(name: str) -> None:
    x = torch.empty(0, 3, requires_grad=True)
    estimators.get(name)(x, torch.ones(1, 1), None, QuantSpec(bits=4), 0).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 3)


def test_a_new_estimator_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "_parts", dict(estimators._parts))

    @estimator("halved", learns=("scale",))
    def halved(at: Local) -> Gradients:
        return Gradients(at.within(at.g / 2), at.g)

    case = Case.of(QuantSpec(bits=4))
    x, scale, _ = case.gradients(estimators.get("halved"), count=4)
    inside = case.positions()[2]
    assert torch.equal(x, torch.where(inside, case.g / 2, 0.0))
    assert scale is not None
    assert close(scale.sum(), case.g.double().sum() / math.sqrt(4 * 7))

"""Gradients of rounding: what training takes for the derivative of a staircase.

Every estimator has the same forward pass, the one that is deployed ("relax" comes to it in training):

    y = (clamp(round(x / s) + z, qmin, qmax) - z) * s

Its derivative is zero almost everywhere, so each estimator puts another in its place. With v = x / s, the
position in codes, and c = y / s, the code without its zero point, an element is *inside* when
qmin - z <= v <= qmax - z; where codes are odd, when qmin - 1 <= v <= qmax + 1. An estimator is one function
of these that returns the gradients of x, of s and of z for each element; what belongs to one scale is summed
here, and multiplied by 1 / sqrt(N qmax), where N counts the elements of a weight, or of one sample of an
activation, that share the scale (LSQ, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.core.affine import fake_quantize, grouped
from lowbit.core.spec import QuantSpec, expand_to
from lowbit.registry import Registry

__all__ = ["Estimator", "Gradients", "Local", "estimator", "estimators", "share_rounded"]


@dataclass(frozen=True)
class Local:
    """What is known of each element when its gradient is asked for; all as shaped as x, or broadcastable."""

    # gradient of the loss by y
    g: Tensor
    # x / s
    v: Tensor
    # (y / s): the code, zero point taken off
    c: Tensor
    inside: Tensor
    # s
    scale: Tensor
    # from one code to the next: 2 where codes are odd
    step: int
    # between the outermost codes, zero point taken off
    middle: Tensor | float = 0.0
    # of training, from 0 to 1
    progress: Tensor | float = 0.0

    @property
    def rest(self) -> Tensor:
        """Distance from the code, in steps: -1/2 to 1/2 inside."""
        return (self.v - self.c) / self.step

    @property
    def side(self) -> Tensor:
        """Of two codes: position between them, -1 at the lower and 1 at the upper."""
        return (self.v - self.middle) / (self.step / 2)

    def within(self, t: Tensor) -> Tensor:
        """`t` inside, zero outside."""
        return torch.where(self.inside, t, 0.0)

    def beyond(self, t: Tensor) -> Tensor:
        """`t` outside, zero inside."""
        return torch.where(self.inside, 0.0, t)


@dataclass(frozen=True)
class Gradients:
    """Gradient of each element, before those of one scale are summed."""

    x: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None


@dataclass(frozen=True)
class Estimator:
    """A gradient of rounding, with what it needs to know of itself."""

    gradients: Callable[[Local], Gradients]
    # of "scale" and "zero_point", those it trains; a scale that is not trained follows the tensor's range
    learns: tuple[str, ...] = ()
    # what is done to a weight before it is rounded; see `lowbit.core.reshapes`
    reshape: str = "none"
    # the fused pass that computes the same: "mask"; or, by what moves a trained scale, "full" or "ends"
    fused: str | None = None
    # whether it is for codes of one bit alone, and whether it changes with the progress of training
    one_bit: bool = False
    scheduled: bool = False
    # whether the forward pass of training goes from the float tensor to the rounded one; see `share_rounded`
    relaxed: bool = False

    def __call__(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        spec: QuantSpec,
        count: int,
        progress: Tensor | None = None,
    ) -> Tensor:
        """Quantize and dequantize `x`, with this estimator's gradients.

        Args:
            x: float32 tensor.
            scale: in the rank of `x`, positive.
            zero_point: as shaped as the scale, whole numbers of any type; None when the spec is symmetric.
            spec: of kind "int".
            count: elements that share a scale, for the size of its gradient.
            progress: of training, from 0 to 1, in one element; None is 0.
        """
        more = (spec, self, gain_of(count, spec), progress)
        return _FakeQuantize.apply(x, scale, zero_point, *more)  # type: ignore[no-untyped-call]


def gain_of(count: int, spec: QuantSpec) -> float:
    """What the gradient of a scale is multiplied by: 1 / sqrt(N qmax)."""
    return 1.0 / math.sqrt(max(1, count) * max(1, spec.qmax))


def damped(t: Tensor, gain: float) -> Tensor:
    """`t` itself, whose gradient is multiplied by `gain`."""
    return _Damped.apply(t, gain)  # type: ignore[no-untyped-call]


class _Damped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.gain, None


estimators: Registry[Estimator] = Registry("estimator")


def estimator(
    name: str,
    *,
    learns: tuple[str, ...] = (),
    reshape: str = "none",
    fused: str | None = None,
    one_bit: bool = False,
    scheduled: bool = False,
    relaxed: bool = False,
) -> Callable[[Callable[[Local], Gradients]], Callable[[Local], Gradients]]:
    """Decorator: the function becomes the estimator of that name."""

    def add(gradients: Callable[[Local], Gradients]) -> Callable[[Local], Gradients]:
        estimators.register(name)(Estimator(gradients, learns, reshape, fused, one_bit, scheduled, relaxed))
        return gradients

    return add


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        spec: QuantSpec,
        of: Estimator,
        gain: float,
        progress: Tensor | None,
    ) -> Tensor:
        ctx.spec, ctx.of, ctx.gain = spec, of, gain
        ctx.fused = of.fused if _is_fused(x, scale, spec) else None
        if ctx.fused == "mask":
            y, mask = kernels.fake_quantize_masked(x, scale, zero_point, spec.qmin, spec.qmax, spec.mid_rise)
            ctx.save_for_backward(mask)
            return y
        ctx.save_for_backward(x, scale, zero_point, progress)
        return fake_quantize(x, scale, zero_point, spec)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if ctx.fused == "mask":
            (mask,) = ctx.saved_tensors
            return kernels.fake_quantize_masked_backward(g, mask), *[None] * 6
        x, scale, zero_point, ctx.progress = ctx.saved_tensors
        gx, *sums = _gradients(ctx, g, x, scale, zero_point)
        asked = (ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        gains = [
            t * ctx.gain if t is not None and want else None for t, want in zip(sums, asked, strict=True)
        ]
        return gx, *gains, None, None, None, None


def _gradients(
    ctx: Any, g: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of x, and those of scale and zero point, summed over what shares them."""
    if ctx.fused is not None:
        whole, moves = ctx.fused == "full", "zero_point" in ctx.of.learns
        spec = ctx.spec
        return kernels.fake_quantize_backward(
            g, x, scale, zero_point, spec.qmin, spec.qmax, whole, moves, spec.mid_rise
        )
    found = ctx.of.gradients(_local(ctx, g, x, scale, zero_point))
    return found.x, _sum(found.scale, scale), _sum(found.zero_point, scale)


def _is_fused(x: Tensor, scale: Tensor, spec: QuantSpec) -> bool:
    return spec.is_standard and kernels.supports(x, scale)


def _local(ctx: Any, g: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Local:
    spec = ctx.spec
    y = fake_quantize(x, scale, zero_point, spec)
    each = expand_to(scale, x.shape)
    v = x / each
    zero = 0 if zero_point is None else expand_to(zero_point, x.shape)
    margin = spec.step - 1  # half a step on either side of odd codes
    inside = (spec.qmin - margin - zero <= v) & (v <= spec.qmax + margin - zero)
    middle = (spec.qmin + spec.qmax) / 2 - zero
    progress = 0.0 if ctx.progress is None else ctx.progress
    return Local(g, v, y / each, inside, each, spec.step, middle, progress)


def _sum(t: Tensor | None, scale: Tensor) -> Tensor | None:
    """Sums over the elements that share a scale, in its shape."""
    return None if t is None else grouped(t, tuple(scale.shape)).sum(dim=1).reshape(scale.shape)


@estimator("ste")
def ste(at: Local) -> Gradients:
    """Straight through: dy/dx = 1 everywhere, beyond the clamp too.

    Bengio, Leonard, Courville 2013, "Estimating or propagating gradients through stochastic neurons". Weights
    that were clipped go on growing; meant for comparisons.
    """
    return Gradients(at.g)


@estimator("clipped_ste", fused="mask")
def clipped_ste(at: Local) -> Gradients:
    """Straight through, stopped by the clamp: dy/dx = 1 inside, 0 outside.

    Hubara et al. 2016, "Quantized neural networks", eq. 6. The scale follows the range of the tensor.
    """
    return Gradients(at.within(at.g))


@estimator("relax", fused="mask", scheduled=True, relaxed=True)
def relax(at: Local) -> Gradients:
    """Clipped straight through, and a forward pass of (1 - a) x + a y, a from 0 to 1: see `share_rounded`.

    Weights move towards their codes while the network still works: Yin et al. 2018, "BinaryRelax: a
    relaxation approach for training deep neural networks with quantized weights", eq. 7, with a =
    lambda / (lambda + 1).
    """
    return clipped_ste(at)


RELAX_END = 0.7


def share_rounded(progress: Tensor) -> Tensor:
    """How much of a relaxed tensor is rounded: 1 - (1 - t)^2, t from 0 to 1 in the first 70 % of training."""
    left = (1 - progress / RELAX_END).clamp(min=0.0)
    return 1 - left.square()


@estimator("lsq", learns=("scale",), fused="full")
def lsq(at: Local) -> Gradients:
    """Learned step size: dy/dx = 1 inside; dy/ds = c - v inside, c outside.

    Esser et al. 2020, "Learned step size quantization", eq. 3 to 5.
    """
    return Gradients(at.within(at.g), at.g * torch.where(at.inside, at.c - at.v, at.c))


@estimator("lsq_plus", learns=("scale", "zero_point"), fused="full")
def lsq_plus(at: Local) -> Gradients:
    """LSQ with a learned offset: dy/dz = -s outside, 0 inside; z is rounded in the forward pass.

    Bhalgat et al. 2020, "LSQ+", eq. 6 and 7, for an offset of -z s. With a symmetric spec it equals `lsq`.
    """
    found = lsq(at)
    return Gradients(found.x, found.scale, at.beyond(-at.g * at.scale))


@estimator("pact", learns=("scale",), fused="ends")
def pact(at: Local) -> Gradients:
    """Parameterized clipping: the clipped elements alone move the scale, dy/ds = c outside, 0 inside.

    Choi et al. 2018, "PACT", eq. 2, with alpha = s (qmax - z); both ends count where there are two.
    """
    return Gradients(at.within(at.g), at.beyond(at.g * at.c))


@estimator("ewgs", learns=("scale",))
def ewgs(at: Local) -> Gradients:
    """Element-wise gradient scaling: dL/dx = g (1 + d sign(g) r) inside, d = 0.02; dy/ds as in `lsq`.

    Lee, Kim, Ham 2021, "Network quantization with element-wise gradient scaling", eq. 3. An element is pushed
    harder when the step carries it towards its code. Here r = v - c is in steps; the paper's range is 1.
    """
    pushed = at.g * (1 + EWGS_DELTA * torch.sign(at.g) * at.rest)
    return Gradients(at.within(pushed), lsq(at).scale)


EWGS_DELTA = 0.02


@estimator("dsq", learns=("scale",))
def dsq(at: Local) -> Gradients:
    """Differentiable soft quantization: dy/dx is the slope of a row of tanh steps; dy/ds as in `lsq`.

    phi(v) = m + tanh(k (v - m)) / (2 tanh(k / 2)) between two codes with middle m, v in steps, and
    dy/dx = phi'(v) inside, which is 1 on average. Gong et al. 2019, "Differentiable soft quantization", eq. 4
    to 8, alpha = 0.4: k = log(2 / alpha - 1).
    """
    offset = 0.5 - at.rest.abs()  # from the nearest middle
    slope = DSQ_K / (2 * math.tanh(DSQ_K / 2)) / torch.cosh(DSQ_K * offset).square()
    return Gradients(at.within(at.g * slope), lsq(at).scale)


DSQ_K = math.log(2 / 0.4 - 1)


@estimator("dorefa", reshape="tanh", fused="mask")
def dorefa(at: Local) -> Gradients:
    """DoReFa: weights are bent by tanh before they are rounded, w' (see `reshapes`), and dy/dw' = 1.

    Zhou et al. 2016, "DoReFa-Net", eq. 9. Activations are clipped and passed straight through (eq. 5).
    """
    return Gradients(at.within(at.g))


def _one_bit(at: Local, slope: Tensor) -> Gradients:
    """A surrogate f between two codes, y = s f(x / s): dy/dx = f', dy/ds = c - v f'."""
    return Gradients(at.g * slope, at.g * (at.c - at.v * slope))


@estimator("approx_sign", learns=("scale",), one_bit=True)
def approx_sign(at: Local) -> Gradients:
    """Piecewise quadratic: dy/dx = 2 - 2|t| for |t| < 1, else 0, with t = -1 and 1 at the two codes.

    Liu et al. 2018, "Bi-Real Net", eq. 7, where a code is worth 1.
    """
    return _one_bit(at, (2 - 2 * at.side.abs()).clamp(min=0))


@estimator("swish_sign", learns=("scale",), one_bit=True)
def swish_sign(at: Local) -> Gradients:
    """SignSwish: dy/dx = b (2 - b t tanh(b t / 2)) / (1 + cosh(b t)), b = 5: negative where t is large.

    Darabi et al. 2018, "BNN+: improved binary network training", eq. 6 and 7.
    """
    bt = SWISH_BETA * at.side
    return _one_bit(at, SWISH_BETA * (2 - bt * torch.tanh(bt / 2)) / (1 + torch.cosh(bt.clamp(-40, 40))))


SWISH_BETA = 5.0


@estimator("ede", learns=("scale",), one_bit=True, scheduled=True)
def ede(at: Local) -> Gradients:
    """Error decay: dy/dx = k r (1 - tanh^2(r t)), k = max(1 / r, 1); r goes from 0.1 to 10 with progress p.

    r = 0.1 * 100^p: at first nearly straight through everywhere, at last nearly the sign. Qin et al. 2020,
    "Forward and backward information retention (IR-Net)", eq. 10 to 12.
    """
    sharpness = 10.0 ** (2 * torch.as_tensor(at.progress) - 1)
    slope = sharpness.clamp(min=1.0) * (1 - torch.tanh(sharpness * at.side).square())
    return _one_bit(at, slope)


@estimator("reste", learns=("scale",), one_bit=True, scheduled=True)
def reste(at: Local) -> Gradients:
    """Rectified STE: f(t) = sign(t) |t|^(1/o), dy/dx = f' for 0.1 <= |t| <= 1.5, o from 1 to 3 with progress.

    Nearer to 0 the slope is that of the chord to 0.1, beyond 1.5 it is 0. Wu et al. 2023, "Estimator meets
    equilibrium perspective", eq. 8 to 11.
    """
    power = 1 + (RESTE_POWER - 1) * torch.as_tensor(at.progress)
    size = at.side.abs()
    steep = size.clamp(min=RESTE_NEAR) ** (1 / power - 1) / power
    chord = RESTE_NEAR ** (1 / power - 1)
    slope = torch.where(size < RESTE_NEAR, chord, steep)
    return _one_bit(at, torch.where(size > RESTE_FAR, 0.0, slope))


RESTE_POWER, RESTE_NEAR, RESTE_FAR = 3.0, 0.1, 1.5

"""Where a spec meets a model: a module that watches a tensor, then rounds it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.core.affine import (
    MIN_SCALE,
    choose_qparams,
    fake_quantize,
    group_amin_amax,
    power_of_two,
    quantize,
)
from lowbit.core.estimators import Estimator, damped, estimators, gain_of, share_rounded
from lowbit.core.integer import Grid
from lowbit.core.levels import Fit
from lowbit.core.observers import Observer, observers
from lowbit.core.qtensor import QTensor
from lowbit.core.reshapes import reshapes
from lowbit.core.spec import QuantSpec, expand_to
from lowbit.core.weight_observers import fit, suits
from lowbit.errors import LowbitError

__all__ = ["TRAINED", "Quantizer", "grid_of"]

Mode = Literal["off", "observe", "quantize"]
# Parameters that estimators train, and the buffers beside them that a state holds
TRAINED = ("scale", "negative_scale", "zero_point")
# The share of the newest batch in the running range of an activation whose scale is not learned.
MOMENTUM = 0.01


class Quantizer(nn.Module):
    """Simulated quantization of one tensor.

    `mode` is "off" (identity), "observe" (identity that feeds the observer) or "quantize". The scale and the
    zero point have the rank of the tensor and are empty until a range is known; they are buffers, or
    Parameters once `learn` has been called and the estimator trains them.

    """

    scale: Tensor
    zero_point: Tensor | None
    # of negative codes, where the spec is split
    negative_scale: Tensor | None
    # beyond it ternary codes are not zero; None: half the scale
    threshold: Tensor | None
    # largest magnitude that the tensor has had of late, in the shape of the scale: what a scale that is not
    # learned follows; None before training
    reach: Tensor | None
    # of training, from 0 to 1, for estimators and reshapes that change as it goes on; None for others
    progress: Tensor | None
    # mean of the scale when it began to be trained: the size of its steps goes with it; None before
    unit: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        observer: str | type[Observer] | None = "minmax",
        estimator: str | Estimator = "lsq",
        weight_observer: str = "mse",
        reshape: str = "",
    ) -> None:
        """Without an observer, as for a weight, whose values are at hand, `fit` chooses the scale."""
        super().__init__()
        self.spec = spec
        self.observer = observers.get(observer)(spec) if observer is not None and spec.kind == "int" else None
        self.estimator = estimators.get(estimator)
        self.is_weight = observer is None
        self.weight_observer = weight_observer
        # what is done to a weight before it is rounded
        self.reshape = reshapes.get(reshape or self.estimator.reshape) if self.is_weight else None
        self.mode: Mode = "off"
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", None if spec.symmetric else torch.empty(0, dtype=torch.int32))
        for name in ("negative_scale", "threshold", "reach", "unit", "progress"):
            self.register_buffer(name, None)
        if self.scheduled:
            # what is relaxed is rounded unless a schedule says otherwise
            self.progress = torch.ones(()) if self.estimator.relaxed else torch.zeros(())

    @property
    def ready(self) -> bool:
        """Whether the scale is known."""
        return self.spec.kind == "float" or self.scale.numel() > 0

    @property
    def scheduled(self) -> bool:
        """Whether it changes with the progress of training."""
        return self.estimator.scheduled or (self.reshape is not None and self.reshape.scheduled)

    @property
    def learned(self) -> tuple[str, ...]:
        """Of "scale", "negative_scale" and "zero_point", those that are Parameters now."""
        return tuple(n for n in TRAINED if isinstance(getattr(self, n), nn.Parameter))

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Cover [lo, hi], given in the shape of the scale, from now on."""
        self.take(Fit(*choose_qparams(lo, hi, self.spec)))

    def fit(self, x: Tensor) -> Fit:
        """What the weight observer chooses for a tensor at rest; nothing is changed.

        One that is for other codes, such as those at the end of falling bits, leaves it to "mse".
        """
        return self._fit_reshaped(self.reshaped(x))

    def _fit_reshaped(self, x: Tensor) -> Fit:
        return fit(x, self.spec, self.weight_observer if suits(self.weight_observer, self.spec) else "mse")

    def take(self, found: Fit) -> None:
        """Use these scales from now on."""
        for name in TRAINED:
            old, value = getattr(self, name), getattr(found, name)
            if not isinstance(old, nn.Parameter):
                setattr(self, name, value)
            elif value is not None:  # else it rests: a stage of more bits has no scale for each sign
                old.data = value.to(old.dtype)
        self.threshold, self.reach = found.threshold, None

    def finish_observing(self) -> bool:
        """Turn what was observed into a scale, drop the statistics and quantize from now on.

        Returns:
            False when no data came by: the quantizer then stays off.
        """
        if self.observer is not None and not self.observer.batches:
            self.mode = "off"
            return False
        if self.observer is not None:
            self.set_range(*self.observer.range())
            self.observer = None
        self.mode = "quantize"
        return True

    def learn(self) -> None:
        """Make Parameters of what the estimator trains: the scales, perhaps the zero point.

        Called again after a new calibration, it takes the size of the new scale.
        """
        if self.mode != "quantize" or self.spec.kind != "int" or not self.ready:
            return
        names = [n for n in TRAINED if n.removeprefix("negative_") in self.estimator.learns]
        for name in names:
            value = getattr(self, name)
            if value is not None and not isinstance(value, nn.Parameter):
                delattr(self, name)
                setattr(self, name, nn.Parameter(value.float().clone()))
        if self.learned:
            self.unit = self.scale.detach().mean()

    @property
    def settles_values(self) -> bool:
        """Whether a scale does not say how a weight is rounded: its layer then keeps rounded values."""
        return self.threshold is not None

    def settle(self, values: Tensor | None = None) -> None:
        """End training: scale and zero point become buffers, with the values that the forward pass uses.

        The layer holds its weight as it was reshaped from now on, or as it was rounded.

        Args:
            values: the weight as its layer holds it from now on.
        """
        if not self.ready:
            return
        scale, zero_point = (t if t is None else t.detach().clone() for t in self.grid())
        negative = self._negative()
        for name in self.learned:
            delattr(self, name)
            self.register_buffer(name, None)
        assert scale is not None
        self.scale, self.zero_point = scale, zero_point if zero_point is None else zero_point.int()
        self.negative_scale = negative if negative is None else negative.detach().clone()
        self.reach = self.unit = self.threshold = self.progress = self.reshape = None

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as the forward pass uses them.

        An optimizer may carry a learned scale through zero: it is mirrored back, in place. A scale that must
        be a power of two becomes the nearest one, and its gradient passes straight through.
        """
        zero_point = self.zero_point
        if isinstance(zero_point, nn.Parameter):
            zero_point.data.clamp_(self.spec.qmin, self.spec.qmax)
            zero_point = zero_point + (zero_point.round() - zero_point).detach()
        return self._positive(self.scale), zero_point

    def _positive(self, scale: Tensor) -> Tensor:
        # through .data, for a layer called twice has saved the scale for its backward pass; doing this again
        # changes nothing
        if isinstance(scale, nn.Parameter):
            scale.data.abs_().clamp_(min=MIN_SCALE)
        if self.spec.scale == "pow2":
            scale = scale + (power_of_two(scale.detach(), "nearest") - scale).detach()
        return scale

    def _negative(self) -> Tensor | None:
        """The scale of negative codes as the forward pass uses it."""
        return (
            self._positive(self.negative_scale)
            if self.spec.split and self.negative_scale is not None
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "observe":
            if self.observer is not None:
                self.observer.update(x)
            return x
        if self.mode == "off":
            return x
        if not self.ready:
            raise LowbitError("a quantizer has no scale yet; call lowbit.calibrate before running the model")
        if self.spec.kind == "float":
            return fake_quantize(x, self.scale, self.zero_point, self.spec)
        trains = self.training and torch.is_grad_enabled()
        x = self._trained_on(x) if trains else self.reshaped(x.float())
        scale, zero_point = self.grid()
        if trains and self.estimator.relaxed:
            return self._relaxed(x, self._on_grid(x, scale, zero_point))
        return self._on_grid(x, scale, zero_point)

    def _on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        if self.threshold is not None or self.spec.split:
            return self._on_levels(x, scale)
        if not torch.is_grad_enabled():
            return fake_quantize(x, scale, zero_point, self.spec)
        return self._gradients(x, scale, zero_point, self._count(x))

    def quantize(self, x: Tensor) -> QTensor:
        """Codes of `x` under the scale of this quantizer."""
        if self.spec.kind == "float":
            scale = torch.ones([1] * x.ndim, device=x.device)
            return QTensor(quantize(x, scale, None, self.spec), scale, None, self.spec)
        x = self.reshaped(x)
        with torch.no_grad():
            scale, zero_point = self.grid()
            negative = self._negative()
            zero_point = None if zero_point is None else zero_point.int()
            codes = quantize(x, self._unit(x, scale), zero_point, self.spec)
        return QTensor(codes, scale.detach(), zero_point, self.spec, negative)

    def reshaped(self, x: Tensor) -> Tensor:
        """A weight as it is before it is rounded; anything else as it is."""
        return x if self.reshape is None else self.reshape(x, self.spec, self.progress)

    def _trained_on(self, x: Tensor) -> Tensor:
        """The tensor to round in a step of training; what goes with the tensor is brought up to it."""
        if self.reshape is not None and self.reshape.projects:
            x.data.copy_(self.reshaped(x.detach()))
        else:
            x = self.reshaped(x.float())
        x = x.float()
        if not self.learned:
            self._follow(x.detach())
        elif self.threshold is not None:
            self.threshold = self._fit_reshaped(x.detach()).threshold
        return x

    def _gradients(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, count: int) -> Tensor:
        """Rounded, with the estimator's gradients; one that is for one bit leaves more to "lsq"."""
        of = estimators.get("lsq") if self.estimator.one_bit and self.spec.bits > 1 else self.estimator
        return of(x, scale, zero_point, self.spec, count, self.progress)

    def _relaxed(self, x: Tensor, y: Tensor) -> Tensor:
        """The rounded tensor, on its way there in training."""
        assert self.progress is not None
        return torch.lerp(x, y, share_rounded(self.progress))

    def _unit(self, x: Tensor, scale: Tensor) -> Tensor:
        """The width of a code: rounding goes up half of it beyond a code."""
        if self.threshold is not None:
            return 2 * self.threshold
        negative = self._negative()
        if negative is None:
            return scale
        return torch.where(x < 0, expand_to(negative.detach(), x.shape), expand_to(scale, x.shape))

    def _on_levels(self, x: Tensor, scale: Tensor) -> Tensor:
        """Ternary codes times what each is worth; the gradient of the codes is the estimator's."""
        v = x / expand_to(self._unit(x, scale.detach()), x.shape)
        one, count = torch.ones([1] * x.ndim, device=x.device), self._count(x)
        if not torch.is_grad_enabled():
            codes = fake_quantize(v, one, None, self.spec)
            gain = 1.0
        else:
            codes = self._gradients(v, one, None, count)
            gain = gain_of(count, self.spec)
        worth = expand_to(damped(scale, gain), x.shape)
        negative = self._negative()
        if negative is not None:
            worth = torch.where(codes < 0, expand_to(damped(negative, gain), x.shape), worth)
        return codes * worth

    def _count(self, x: Tensor) -> int:
        """Elements of a weight, or of one sample of an activation, that share a scale."""
        samples = 1 if self.is_weight or x.ndim < 2 else max(1, x.shape[0])
        return x.numel() // samples // max(1, self.scale.numel())

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """Let the scale go with the tensor.

        Binary and ternary weights are fitted anew; any other scale goes with the largest magnitude, of a
        weight now, of activations of late.
        """
        if not x.numel():
            return
        if self.is_weight and (self.spec.is_binary or self.spec.is_ternary):
            self.take(self._fit_reshaped(x))
            return
        lo, hi = group_amin_amax(x, self.spec)
        new = torch.maximum(-lo, hi)
        if self.reach is None:
            self.reach = new
            return
        new = torch.lerp(self.reach, new, 1.0 if self.is_weight else MOMENTUM)
        ratio = torch.where((new > 0) & (self.reach > 0), new / self.reach, 1.0)
        self.scale = (self.scale * ratio).clamp(min=MIN_SCALE)
        self.reach = torch.where(new > 0, new, self.reach)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Take the scale that is there, of any shape; a float checkpoint has none, and this one stays.

        With a scale the quantizer quantizes, and goes on learning where the saved one was learning.

        Raises:
            LowbitError: the saved one was learning its width, and this one is not.
        """
        if f"{prefix}fraction" in state_dict and getattr(self, "fraction", None) is None:
            raise LowbitError(
                f"the state has a learned width for '{prefix[:-1]}', and this model learns none; freeze the "
                "model that learned it, and use lowbit.save and lowbit.load"
            )
        saved = state_dict.get(prefix + "scale")
        if saved is not None and (saved.numel() or self.spec.kind == "float"):
            self.observer, self.mode = None, "quantize"
            self.reach = None  # a state from before training has none
        for name in (*TRAINED, "threshold", "reach", "unit", "progress"):
            value = state_dict.get(prefix + name)
            old = getattr(self, name)
            if value is None:
                continue
            if isinstance(old, nn.Parameter):
                old.data = value.detach().clone().to(old)
            else:
                setattr(self, name, value.detach().to(self.scale.device, copy=True))
        if self.unit is not None and not self.learned:
            unit = self.unit
            self.learn()
            self.unit = unit

    def extra_repr(self) -> str:
        return f"{self.spec}, {self.mode}"


def grid_of(quantizer: Quantizer) -> Grid | None:
    """The grid of a quantizer of integer codes with one scale; None for any other."""
    if quantizer.mode != "quantize" or quantizer.spec.kind != "int" or quantizer.scale.numel() != 1:
        return None
    zero = 0 if quantizer.zero_point is None else int(quantizer.zero_point)
    return Grid(quantizer.scale.reshape(()), zero, quantizer.spec)

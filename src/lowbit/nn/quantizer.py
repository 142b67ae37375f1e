"""Where a spec meets a model: a module that watches a tensor, then rounds it."""

from __future__ import annotations

from dataclasses import replace
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
from lowbit.core.estimators import Estimator, estimators
from lowbit.core.observers import Observer, observers
from lowbit.core.qtensor import QTensor
from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError

__all__ = ["Quantizer"]

Mode = Literal["off", "observe", "quantize"]
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
    # largest magnitude that the tensor has had of late, in the shape of the scale: what a scale that is not
    # learned follows; None before training
    reach: Tensor | None
    # mean of the scale when it began to be trained: the size of its steps goes with it; None before
    unit: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        observer: str | type[Observer] | None = "minmax",
        estimator: str | Estimator = "lsq",
    ) -> None:
        """Without an observer, as for a weight, whose values are at hand, `set_range` gives the range."""
        super().__init__()
        self.spec = spec
        self.observer = observers.get(observer)(spec) if observer is not None and spec.kind == "int" else None
        self.estimator = estimators.get(estimator)
        self.is_weight = observer is None
        self.mode: Mode = "off"
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", None if spec.symmetric else torch.empty(0, dtype=torch.int32))
        self.register_buffer("reach", None)
        self.register_buffer("unit", None)

    @property
    def ready(self) -> bool:
        """Whether the scale is known."""
        return self.spec.kind == "float" or self.scale.numel() > 0

    @property
    def learned(self) -> tuple[str, ...]:
        """Of "scale" and "zero_point", those that are Parameters now."""
        return tuple(n for n in ("scale", "zero_point") if isinstance(getattr(self, n), nn.Parameter))

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Cover [lo, hi], given in the shape of the scale, from now on."""
        scale, zero_point = choose_qparams(lo, hi, self.spec)
        for name, value in (("scale", scale), ("zero_point", zero_point)):
            old = getattr(self, name)
            if isinstance(old, nn.Parameter) and value is not None:
                old.data = value.to(old.dtype)
            else:
                setattr(self, name, value)
        self.reach = None

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
        """Make Parameters of what the estimator trains: the scale, perhaps the zero point.

        Called again after a new calibration, it takes the size of the new scale.
        """
        if self.mode != "quantize" or self.spec.kind != "int" or not self.ready:
            return
        for name in self.estimator.learns:
            value = getattr(self, name)
            if value is not None and not isinstance(value, nn.Parameter):
                delattr(self, name)
                setattr(self, name, nn.Parameter(value.float().clone()))
        if self.learned:
            self.unit = self.scale.detach().mean()

    def settle(self) -> None:
        """End training: scale and zero point become buffers, with the values that the forward pass uses."""
        if not self.ready:
            return
        scale, zero_point = (t if t is None else t.detach().clone() for t in self.grid())
        for name in self.learned:
            delattr(self, name)
            self.register_buffer(name, None)
        assert scale is not None
        self.scale, self.zero_point = scale, zero_point if zero_point is None else zero_point.int()
        self.reach = self.unit = None
        # the layer holds its weight as it was reshaped
        self.estimator = replace(self.estimator, reshape=None)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as the forward pass uses them.

        An optimizer may carry a learned scale through zero: it is mirrored back, in place. A scale that must
        be a power of two is rounded up to one, and its gradient passes straight through.
        """
        scale, zero_point = self.scale, self.zero_point
        # through .data, for a layer called twice has saved the scale for its backward pass; doing this again
        # changes nothing
        if isinstance(scale, nn.Parameter):
            scale.data.abs_().clamp_(min=MIN_SCALE)
        if self.spec.scale == "pow2":
            scale = scale + (power_of_two(scale) - scale).detach()
        if isinstance(zero_point, nn.Parameter):
            zero_point.data.clamp_(self.spec.qmin, self.spec.qmax)
            zero_point = zero_point + (zero_point.round() - zero_point).detach()
        return scale, zero_point

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
        x = self.reshaped(x.float())
        if self.training and torch.is_grad_enabled() and not self.learned:
            self._follow(x.detach())
        scale, zero_point = self.grid()
        if not torch.is_grad_enabled():
            return fake_quantize(x, scale, zero_point, self.spec)
        return self.estimator(x, scale, zero_point, self.spec, self._count(x))

    def quantize(self, x: Tensor) -> QTensor:
        """Codes of `x` under the scale of this quantizer."""
        if self.spec.kind == "float":
            scale, zero_point = torch.ones([1] * x.ndim), None
        else:
            x = self.reshaped(x)
            scale, zero_point = self.grid()
            scale, zero_point = (
                scale.detach(),
                zero_point if zero_point is None else zero_point.detach().int(),
            )
        return QTensor(quantize(x, scale, zero_point, self.spec), scale, zero_point, self.spec)

    def reshaped(self, x: Tensor) -> Tensor:
        """A weight as its estimator wants it before it is rounded; anything else as it is."""
        return self.estimator.reshape(x) if self.is_weight and self.estimator.reshape is not None else x

    def _count(self, x: Tensor) -> int:
        """Elements of a weight, or of one sample of an activation, that share a scale."""
        samples = 1 if self.is_weight or x.ndim < 2 else max(1, x.shape[0])
        return x.numel() // samples // max(1, self.scale.numel())

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """Let the scale go with the largest magnitude: of a weight now, of activations of late."""
        if not x.numel():
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
        """
        saved = state_dict.get(prefix + "scale")
        if saved is not None and (saved.numel() or self.spec.kind == "float"):
            self.observer, self.mode = None, "quantize"
            self.reach = None  # a state from before training has none
        for name in ("scale", "zero_point", "reach", "unit"):
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

"""A quantizer whose width is trained: bits behind the point for a tensor, a channel or each element.

y = round(x 2^f) 2^-f with f rounded to a whole number. With d = x - y, which shrinks as 2^-f does, dy/df =
ln(2) d; x is passed straight through (Sun et al. 2024, "HGQ: High Granularity Quantization for Real-time
Neural Networks on FPGAs"). What keeps no bit is zero, and so pruned.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.core.affine import round_codes
from lowbit.core.fixed import FixedPoint
from lowbit.core.qtensor import QTensor
from lowbit.errors import LowbitError
from lowbit.nn.quantizer import Quantizer

__all__ = ["Per", "WidthQuantizer"]

Per = Literal["tensor", "channel", "element"]
# what a spec can hold
MOST = 16


class WidthQuantizer(Quantizer):
    """Attributes:
    fraction: bits behind the point, trained; None once settled.
    ends: of an activation, the interval of its type but for the last step; a weight has none, for its codes
        take the bits that they need.
    """

    fraction: nn.Parameter | None
    ends: Tensor | None

    @classmethod
    def of(cls, old: Quantizer, shape: tuple[int, ...]) -> WidthQuantizer:
        """In place of a calibrated quantizer of a power of two.

        Args:
            shape: of the fraction; it broadcasts to the tensor.

        Raises:
            LowbitError: no fixed-point spec, or not calibrated.
        """
        if not old.ready or old.mode != "quantize":
            raise LowbitError(
                "a width is learned from a calibrated one; call lowbit.calibrate(q, data) first"
            )
        if isinstance(old, WidthQuantizer):
            raise LowbitError("its width is learned already; freeze the model, or prepare it anew")
        if old.spec.overflow == "wrap" or old.spec.narrow:
            raise LowbitError(
                f"{old.spec}: learned widths saturate and use every code; leave overflow and narrow at "
                "their defaults"
            )
        now = FixedPoint.of(old.spec, old.scale)
        made = cls(old.spec, None if old.is_weight else "minmax", old.estimator, old.weight_observer)
        made.observer, made.mode, made.scale = None, "quantize", old.scale.detach().clone()
        made.fraction = nn.Parameter(torch.full(shape, float(now.fraction), device=made.scale.device))
        low, high = (math.ldexp(end, now.integer - int(now.signed)) for end in (-float(now.signed), 1.0))
        made.register_buffer("ends", None if old.is_weight else made.scale.new_tensor([low, high]))
        made.progress = torch.zeros(())
        return made.train(old.training)

    @property
    def scheduled(self) -> bool:
        return True

    @property
    def settles_values(self) -> bool:
        return self.fraction is not None

    def learn(self) -> None:
        """The fraction is all that trains."""

    def forward(self, x: Tensor) -> Tensor:
        if self.fraction is None or self.mode != "quantize":
            return super().forward(x)
        x = x.float()
        with torch.no_grad():
            y, inside = self._rounded(x)
        if not torch.is_grad_enabled():
            return y
        d = torch.where(inside, x - y, 0.0).detach()
        straight = torch.where(inside, x, x.detach())
        return y + (straight - straight.detach()) + math.log(2) * d * (self.fraction - self.fraction.detach())

    def quantize(self, x: Tensor) -> QTensor:
        """Codes on the finest of the grids."""
        if self.fraction is None:
            return super().quantize(x)
        y, _ = self._rounded(x.detach().float())
        to = self._type(y)
        codes = (y * math.ldexp(1.0, to.fraction)).to(replace(self.spec, bits=to.width).dtype)
        return QTensor(codes, self._scale(x, to), None, replace(self.spec, bits=to.width))

    def bits(self, x: Tensor | None = None) -> Tensor:
        """Bits that are paid for, with a gradient for the fraction: of a weight those of each element.

        A bit for the sign is not counted in weights, where signs of constants cost nothing; an activation has
        the width of its type.
        """
        assert self.fraction is not None
        whole = self.fraction + (self._whole() - self.fraction).detach()
        if x is None:
            return self._integer + whole
        highest = torch.frexp(x.detach())[1].float()
        return torch.where(x.detach() == 0, 0.0, (highest + whole).clamp(min=0))

    def settle(self, values: Tensor | None = None) -> None:
        """The finest grid becomes the scale, and the width what the codes need."""
        if self.fraction is not None:
            to = self._type(values)
            self.spec = replace(self.spec, bits=to.width)
            self.scale = self._scale(self.scale if values is None else values, to)
            self.fraction, self.ends, self.progress = None, None, None
        super().settle()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        saved = state_dict.get(f"{prefix}fraction")
        if self.fraction is None:
            return
        if saved is None:
            if f"{prefix}scale" in state_dict:
                raise LowbitError(
                    f"the state has a scale for '{prefix[:-1]}' and no learned width, which this model has; "
                    "load it before lowbit.hardware.widths.learn_widths"
                )
            return
        if saved.shape == self.fraction.shape:
            self.fraction.data = saved.detach().clone().to(self.fraction)
        else:
            rest[-1].append(f"{prefix}fraction is {[*saved.shape]} there and {[*self.fraction.shape]} here")

    def _whole(self) -> Tensor:
        """The fraction as it is used; an activation keeps its sign and a bit."""
        assert self.fraction is not None
        whole = self.fraction.detach().round()
        if self.ends is None:
            return whole
        return whole.clamp(min=1 + int(self.spec.signed) - self._integer)

    @property
    def _integer(self) -> int:
        """Bits before the point of an activation, the sign among them."""
        assert self.ends is not None
        return round(math.log2(float(self.ends[1]))) + int(self.spec.signed)

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The values, and where they are not clipped."""
        assert self.fraction is not None
        step = torch.exp2(-self._whole())
        y = round_codes(x / step, self.spec.rounding) * step
        if self.ends is None:
            return y, torch.ones_like(x, dtype=torch.bool)
        low, high = self.ends[0], self.ends[1] - step
        return torch.minimum(y.clamp(min=low), high.clamp(min=0)), (x >= low) & (x <= high)

    def _type(self, values: Tensor | None) -> FixedPoint:
        """Of an activation from its fraction; of a weight the narrowest that holds its rounded values."""
        assert self.fraction is not None
        finest = int(self._whole().max())
        if self.ends is not None:
            return FixedPoint(self._integer + finest, self._integer, self.spec.signed)
        assert values is not None
        codes = (values.double() * math.ldexp(1.0, finest)).long()
        used = codes[codes != 0]
        if not len(used):
            return FixedPoint(2, 2 - finest)
        idle = int(torch.log2((used & -used).double()).min())  # zeros at the end of all codes
        held = FixedPoint.holding(int(codes.min()) >> idle, int(codes.max()) >> idle, finest - idle)
        width = max(held.width + int(not held.signed), 2)
        if width > MOST:
            raise LowbitError(
                f"a weight needs {width} bits, more than {MOST}: its width has grown; raise the strength of "
                "the penalty, or lower lr"
            )
        return FixedPoint(width, width - held.fraction)

    def _scale(self, like: Tensor, to: FixedPoint) -> Tensor:
        return torch.full([1] * like.ndim, to.scale, device=like.device)

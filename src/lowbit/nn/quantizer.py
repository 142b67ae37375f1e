"""Where a spec meets a model: a module that watches a tensor, then rounds it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lowbit.core.affine import choose_qparams, fake_quantize, quantize
from lowbit.core.observers import Observer, observers
from lowbit.core.qtensor import QTensor
from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError

__all__ = ["Quantizer"]

Mode = Literal["off", "observe", "quantize"]


class Quantizer(nn.Module):
    """Simulated quantization of one tensor.

    `mode` is "off" (identity), "observe" (identity that feeds the observer) or "quantize". The scale and the
    zero point are buffers in the rank of the tensor, empty until a range is known.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, spec: QuantSpec, observer: str | type[Observer] | None = "minmax") -> None:
        """Without an observer, as for a weight, whose values are at hand, `set_range` gives the range."""
        super().__init__()
        self.spec = spec
        self.observer = observers.get(observer)(spec) if observer is not None and spec.kind == "int" else None
        self.mode: Mode = "off"
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", None if spec.symmetric else torch.empty(0, dtype=torch.int32))

    @property
    def ready(self) -> bool:
        """Whether the scale is known."""
        return self.spec.kind == "float" or self.scale.numel() > 0

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Cover [lo, hi], given in the shape of the scale, from now on."""
        self.scale, self.zero_point = choose_qparams(lo, hi, self.spec)

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

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "observe":
            if self.observer is not None:
                self.observer.update(x)
            return x
        if self.mode == "off":
            return x
        if not self.ready:
            raise LowbitError("a quantizer has no scale yet; call lowbit.calibrate before running the model")
        return fake_quantize(x, self.scale, self.zero_point, self.spec)

    def quantize(self, x: Tensor) -> QTensor:
        """Codes of `x` under the scale of this quantizer."""
        scale = self.scale if self.spec.kind == "int" else torch.ones([1] * x.ndim)
        return QTensor(quantize(x, scale, self.zero_point, self.spec), scale, self.zero_point, self.spec)

    def extra_repr(self) -> str:
        return f"{self.spec}, {self.mode}"

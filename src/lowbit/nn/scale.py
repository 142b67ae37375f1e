"""A factor for each channel of the last axis."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Scale"]


class Scale(nn.Module):
    """y = x * factor, with `factor` [C] along the last axis of x [..., C]."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

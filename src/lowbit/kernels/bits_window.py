"""Where the windows of a convolution or a pooling lie."""

from __future__ import annotations

import ctypes
from ctypes import c_int64
from dataclasses import dataclass

from lowbit.errors import LowbitError

__all__ = ["Geometry", "Pair", "Window"]

Pair = int | tuple[int, int]


class Geometry(ctypes.Structure):
    """The struct of this name in bits_types.h."""

    _fields_ = tuple(
        (name, c_int64)
        for name in (
            *("batch", "height", "width", "out_height", "out_width", "kernel_height", "kernel_width"),
            *("stride_height", "stride_width", "pad_height", "pad_width", "dilation_height"),
            *("dilation_width", "planes", "groups", "run", "outputs"),
        )
    )


def _pair(value: Pair, name: str, least: int) -> tuple[int, int]:
    """Height and width.

    Raises:
        LowbitError: not one or two whole numbers that reach the least.
    """
    high, wide = value if isinstance(value, tuple | list) and len(value) == 2 else (value, value)
    if not (isinstance(high, int) and isinstance(wide, int) and high >= least and wide >= least):
        raise LowbitError(f"{name} is {value!r}; give one or two whole numbers of at least {least}")
    return high, wide


@dataclass(frozen=True)
class Window:
    """Windows over images: each field is (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @staticmethod
    def of(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Window:
        """A window from numbers or pairs of them.

        Raises:
            LowbitError: a number below 1, or a padding below 0.
        """
        return Window(
            _pair(kernel, "the kernel", 1),
            _pair(stride, "the stride", 1),
            _pair(padding, "the padding", 0),
            _pair(dilation, "the dilation", 1),
        )

    def outputs(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what comes out.

        Raises:
            LowbitError: the window is larger than the padded image.
        """
        high, wide = (
            size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1 for i in (0, 1)
        )
        if high < 0 or wide < 0:
            raise LowbitError(
                f"a kernel of {self.kernel} with dilation {self.dilation} is larger than an image of {size} "
                f"with padding {self.padding}; pad more or use a smaller kernel"
            )
        return high // self.stride[0] + 1, wide // self.stride[1] + 1

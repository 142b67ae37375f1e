"""Kernel, stride and padding of convolutions and poolings, as far as hardware has them."""

from __future__ import annotations

from typing import Any

from torch import fx

from lowbit.errors import LowbitError
from lowbit.graph.match import is_global_pool
from lowbit.graph.ops import label, module_of
from lowbit.reference import average_window

__all__ = ["average_window_of", "convolution_window", "max_window"]

_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")


def convolution_window(layer: Any, name: str) -> dict[str, Any]:
    """Settings of a convolution.

    Raises:
        LowbitError: padding with other values than zero, or more of it at one end.
    """
    if layer.padding_mode != "zeros":
        raise LowbitError(f"'{name}' pads with {layer.padding_mode}; hardware pads with zeros")
    kernel, dilation = tuple(layer.kernel_size), tuple(layer.dilation)
    padding: Any = layer.padding
    if isinstance(padding, str):
        both = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if padding == "same" and any(n % 2 for n in both):
            raise LowbitError(f"'{name}' pads more at the end than at the start; use an odd kernel")
        padding = tuple(n // 2 if padding == "same" else 0 for n in both)
    rest = {"stride": tuple(layer.stride), "dilation": dilation, "groups": int(layer.groups)}
    return {"kernel": kernel, "padding": tuple(padding), **rest}


def max_window(node: fx.Node, name: str) -> dict[str, Any]:
    """Settings of max pooling.

    Raises:
        LowbitError: padding, dilation, rounding up.
    """
    given, dims = _given(node, _MAX), node.meta["value"].ndim - 2
    kernel = _each(given["kernel_size"], dims)
    stride = _each(given.get("stride") or kernel, dims)
    padded = any(_each(given.get("padding", 0), dims))
    spread = set(_each(given.get("dilation", 1), dims)) != {1}
    if padded or spread or given.get("ceil_mode") or given.get("return_indices"):
        raise LowbitError(
            f"'{name}': max pooling in hardware has no padding, dilation or rounding up; drop them"
        )
    return {"kernel": kernel, "stride": stride}


def average_window_of(node: fx.Node, name: str) -> dict[str, Any]:
    """Settings of average pooling along one or two axes.

    Raises:
        LowbitError: windows that are not all of one size.
    """
    source = node.args[0]
    assert isinstance(source, fx.Node)
    size, positions = source.meta["value"].shape[2:], node.meta["value"].shape[2:]
    if is_global_pool(node):
        window: Any = (tuple(size), tuple(size), (0,) * len(size), True)
    else:
        window = average_window(node) if len(size) == 2 else _row_window(node, size[-1], positions[-1])
    kernel, stride, padding, padded = window or ((), (), (), True)
    if window is None or (any(padding) and not padded):
        raise LowbitError(
            f"'{name}': average pooling in hardware divides by one number everywhere; use windows of one "
            "size, without padding or with count_include_pad=True, and without rounding up"
        )
    return {"kernel": kernel, "stride": stride, "padding": padding}


def _row_window(node: fx.Node, size: int, positions: int) -> Any:
    """As `average_window`, along one axis."""
    if label(node).lower() in ("adaptiveavgpool1d", "adaptive_avg_pool1d"):
        kernel = (size // positions,)
        return None if size % positions else (kernel, kernel, (0,), True)
    given = _given(node, _AVERAGE)
    window = _each(given["kernel_size"], 1)
    if given.get("ceil_mode"):
        return None
    stride, padding = _each(given.get("stride") or window, 1), _each(given.get("padding", 0), 1)
    return window, stride, padding, given.get("count_include_pad", True)


def _given(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of a pooling by name."""
    if node.op == "call_module":
        return {name: getattr(module_of(node), name) for name in names}
    return dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)

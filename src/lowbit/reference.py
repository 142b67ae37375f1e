"""The integer reference: a frozen model run on codes, with the arithmetic of the kernels of the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lowbit.core import integer
from lowbit.core.integer import Grid
from lowbit.core.qtensor import QTensor
from lowbit.core.spec import PerTensor, expand_to
from lowbit.graph.match import is_global_pool
from lowbit.graph.ops import clamp_bounds, kind_of, label, module_of
from lowbit.graph.run import bind_inputs, evaluate, last_uses
from lowbit.graph.trace import Inputs
from lowbit.nn.dynamic import DynamicQuantizer, has_integer_product
from lowbit.nn.layers import QConv1d, QConv2d, QConvTranspose2d, QLinear
from lowbit.nn.quantizer import Quantizer, grid_of

__all__ = ["AnyCodes", "Codes", "DynamicCodes", "average_window", "run_on_codes"]


@dataclass(frozen=True)
class Codes:
    """A tensor of codes, centred (zero point taken off), as float32 that holds whole numbers."""

    centred: Tensor
    grid: Grid

    def real(self) -> Tensor:
        return integer.to_real(self.centred, self.grid)

    def codes(self) -> Tensor:
        """The codes themselves, int32."""
        return (self.centred + self.grid.zero_point).to(torch.int32)

    def with_codes(self, codes: Tensor) -> Codes:
        """Other codes of the same grid."""
        return Codes((codes - self.grid.zero_point).float(), self.grid)


@dataclass(frozen=True)
class DynamicCodes:
    """Codes under a range found at run time: a scale for the tensor, or for each token."""

    q: QTensor

    def real(self) -> Tensor:
        return self.q.dequantize()

    def codes(self) -> Tensor:
        """The codes, int32."""
        return self.q.codes.to(torch.int32)

    def with_codes(self, codes: Tensor) -> DynamicCodes:
        """Other codes under the same scales."""
        return DynamicCodes(replace(self.q, codes=codes.to(self.q.codes.dtype)))


AnyCodes = Codes | DynamicCodes


@dataclass(frozen=True)
class Accumulated:
    """The result of an integer kernel before it is rounded: what it becomes depends on who reads it."""

    to_codes: Callable[[Grid], Tensor]
    to_real: Callable[[], Tensor]
    # bounds of the clamps passed on the way
    clamps: tuple[tuple[float, float], ...] = field(default=())

    def real(self) -> Tensor:
        value = self.to_real()
        for lo, hi in self.clamps:
            value = value.clamp(lo, hi)
        return value

    def round_to(self, grid: Grid) -> Tensor:
        """Centred codes. A clamp costs nothing where the codes clamp as tightly; else it is done in float."""
        if all(_is_free(bounds, grid) for bounds in self.clamps):
            return self.to_codes(grid)
        return integer.round_to(self.real(), grid)


def _is_free(bounds: tuple[float, float], grid: Grid) -> bool:
    ends = [integer.round_to(torch.tensor(b), grid).item() + grid.zero_point for b in bounds]
    return ends == [grid.spec.qmin, grid.spec.qmax]


def run_on_codes(
    gm: fx.GraphModule, inputs: Inputs, seen: Callable[[str, AnyCodes], AnyCodes] | None = None
) -> Any:
    """Run one batch on integers.

    Args:
        gm: the graph of a frozen model.
        seen: told of the codes behind each quantizer, with its path; returns those to go on with.

    Returns:
        What the model returns, in float32.
    """
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        starts, last_use = bind_inputs(gm, inputs), last_uses(gm)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = starts[node.name]
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            result = _run(gm, node, args, kwargs)
            if node.op == "output":
                return _map(result)
            if seen is not None and kind_of(node) == "quantizer" and isinstance(result, AnyCodes):
                result = seen(str(node.target), result)
            values[node] = result
            for dead in last_use.get(node, ()):
                del values[dead]
    return None


def _run(gm: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kind = kind_of(node)
    if kind == "quantizer":
        quantizer = module_of(node)
        assert isinstance(quantizer, Quantizer)
        if isinstance(quantizer, DynamicQuantizer):
            return DynamicCodes(quantizer.quantize(_real(args[0])))
        grid = grid_of(quantizer)
        if grid is not None:
            source = args[0]
            return Codes(
                source.round_to(grid)
                if isinstance(source, Accumulated)
                else integer.round_to(_real(source), grid),
                grid,
            )
    elif kind == "clamp" and isinstance(args[0], Accumulated):
        return Accumulated(args[0].to_codes, args[0].to_real, (*args[0].clamps, clamp_bounds(node)))
    elif kind == "pass" and isinstance(args[0], Codes):
        return _move(evaluate(gm, node, (args[0].centred, *args[1:]), kwargs), args[0].grid)
    elif kind in _KERNELS:
        done = _KERNELS[kind](node, args)
        if done is not None:
            return done
    real_args, real_kwargs = _map((args, kwargs))
    return evaluate(gm, node, real_args, real_kwargs)


def _real(value: Any) -> Any:
    return value.real() if isinstance(value, AnyCodes | Accumulated) else value


def _map(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v) for v in value)
    if isinstance(value, dict):
        return {k: _map(v) for k, v in value.items()}
    return _real(value)


def _move(moved: Any, grid: Grid) -> Any:
    """Codes again; what comes along and is no codes, such as the indices of max pooling, stays as it is."""
    if isinstance(moved, Tensor):
        return Codes(moved, grid) if moved.is_floating_point() else moved
    return tuple(_move(m, grid) for m in moved) if isinstance(moved, (tuple, list)) else moved


def _dynamic_layer(layer: QLinear, source: DynamicCodes) -> Accumulated:
    """MatMulInteger and what is behind it, see `lowbit.export.qdq.dynamic`."""
    q, codes = layer.qweight(), source.q
    x = codes.codes.double() - (0 if codes.zero_point is None else codes.zero_point.double())
    sums, scale = F.linear(x, q.codes.double()).float(), q.scale.reshape(-1)
    whole = codes.spec.granularity == PerTensor()
    real = sums * (codes.scale * scale) if whole else sums * scale * codes.scale
    real = real if layer.bias is None else real + layer.bias.detach()
    return Accumulated(lambda grid: integer.round_to(real, grid), lambda: real)


def _layer(node: fx.Node, args: tuple[Any, ...]) -> Accumulated | None:
    layer = module_of(node)
    if isinstance(args[0], DynamicCodes) and isinstance(layer, QLinear) and has_integer_product(layer):
        return _dynamic_layer(layer, args[0])
    if (
        not isinstance(args[0], Codes)
        or not isinstance(layer, (QLinear, QConv1d, QConv2d))
        or isinstance(layer, QConvTranspose2d)
    ):
        return None
    of_weight, spec = layer.weight_quantizer.scale, layer.weight_quantizer.spec
    if spec.kind != "int" or spec.split or of_weight.numel() not in (1, _outputs(layer)):
        return None
    if of_weight.shape[layer.channel_axis] != of_weight.numel():
        return None  # scales of another axis do not leave the sum
    source = args[0]
    q = layer.kernel_qweight(source.grid.spec)
    weight = q.codes.double() - (0 if q.zero_point is None else expand_to(q.zero_point, q.codes.shape))
    x = source.centred.double()
    sums = F.linear(x, weight) if isinstance(layer, QLinear) else layer._conv_forward(x, weight, None)
    axis = sums.ndim - 1 if isinstance(layer, QLinear) else 1
    scale = source.grid.scale * q.scale.reshape(-1)

    def along(t: Tensor) -> Tensor:
        return t.reshape([-1 if d == axis else 1 for d in range(sums.ndim)])

    bias = None if layer.bias is None else integer.bias_codes(layer.bias.detach(), scale).double()
    if isinstance(layer, QLinear) and sums.ndim > 2 and bias is not None:
        # with a dynamic batch this is a product in float behind the integer one, then a float addition
        real = sums.float() * along(scale) + along(bias.float() * scale)
        return Accumulated(lambda grid: integer.round_to(real, grid), lambda: real)
    if bias is not None:
        sums = sums + along(bias)
    return Accumulated(
        lambda grid: integer.rescale(sums, along(scale / grid.scale), grid),
        lambda: sums.float() * along(scale),
    )


def _outputs(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def _pair(args: tuple[Any, ...]) -> tuple[Codes, Codes] | None:
    return (args[0], args[1]) if len(args) > 1 and all(isinstance(a, Codes) for a in args[:2]) else None


def _add(node: fx.Node, args: tuple[Any, ...]) -> Accumulated | None:
    pair = _pair(args)
    if pair is None:
        return None
    a, b = pair
    return Accumulated(
        lambda grid: integer.add(a.centred, a.grid, b.centred, b.grid, grid), lambda: a.real() + b.real()
    )


def _mul(node: fx.Node, args: tuple[Any, ...]) -> Accumulated | None:
    pair = _pair(args)
    if pair is None:
        return None
    a, b = pair
    return Accumulated(
        lambda grid: integer.multiply(a.centred, a.grid, b.centred, b.grid, grid), lambda: a.real() * b.real()
    )


def _matmul(node: fx.Node, args: tuple[Any, ...]) -> Accumulated | None:
    pair = _pair(args)
    if pair is None:
        return None
    a, b = pair
    sums, scale = torch.matmul(a.centred.double(), b.centred.double()), a.grid.scale * b.grid.scale
    return Accumulated(
        lambda grid: integer.rescale(sums, scale / grid.scale, grid), lambda: sums.float() * scale
    )


def _cat(node: fx.Node, args: tuple[Any, ...]) -> Accumulated | None:
    parts = args[0]
    if not all(isinstance(p, Codes) for p in parts):
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))

    def to_codes(grid: Grid) -> Tensor:
        same = [p.grid.scale == grid.scale and p.grid.zero_point == grid.zero_point for p in parts]
        moved = [
            p.centred if s else integer.round_to(p.real(), grid) for p, s in zip(parts, same, strict=True)
        ]
        return torch.cat(moved, dim)  # type: ignore[arg-type]

    return Accumulated(to_codes, lambda: torch.cat([p.real() for p in parts], dim))  # type: ignore[arg-type]


def _average(node: fx.Node, args: tuple[Any, ...]) -> Accumulated | None:
    if not isinstance(args[0], Codes) or args[0].centred.ndim != 4:
        return None
    source = args[0]
    if is_global_pool(node) or _covers_image(node, source.centred):
        return _global_average(source)
    window = average_window(node)
    if window is None:
        return None
    means = _window_means(source.real(), *window)
    return Accumulated(lambda grid: integer.average_pool(means, grid), lambda: means)


def _global_average(source: Codes) -> Accumulated:
    count = source.centred.shape[2] * source.centred.shape[3]
    sums = source.centred.double().sum((2, 3), keepdim=True)

    def to_codes(grid: Grid) -> Tensor:
        return integer.rescale(sums, source.grid.scale / (grid.scale * count), grid)

    return Accumulated(to_codes, lambda: source.real().mean((2, 3), keepdim=True))


Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int], bool]


def average_window(node: fx.Node) -> Window | None:
    """Kernel, stride, padding, count_include_pad of average pooling; None where the kernel is not known."""
    if label(node).lower() in ("adaptiveavgpool2d", "adaptive_avg_pool2d"):
        size, out = node.args[0].meta["value"].shape[2:], node.meta["value"].shape[2:]  # type: ignore[union-attr]
        if any(s % o for s, o in zip(size, out, strict=True)):
            return None
        kernel = size[0] // out[0], size[1] // out[1]
        return kernel, kernel, (0, 0), True
    if node.op == "call_module":
        pool = module_of(node)
        given = {k: getattr(pool, k) for k in _POOL}
    else:
        given = dict(zip(_POOL, node.args[1:], strict=False)) | node.kwargs
        given = fx.node.map_arg(given, lambda n: n.meta["value"])
    kernel = _both(given["kernel_size"])
    if given.get("ceil_mode") or given.get("divisor_override"):
        return None
    stride = given.get("stride")
    return (
        kernel,
        _both(stride) if stride else kernel,
        _both(given.get("padding", 0)),
        given.get("count_include_pad", True),
    )


_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def _both(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _covers_image(node: fx.Node, x: Tensor) -> bool:
    window = average_window(node)
    return window is not None and window[0] == tuple(x.shape[2:]) and window[2] == (0, 0)


def _window_means(
    x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], padded: bool
) -> Tensor:
    """float32 means, summed over each window row by row as the kernel does."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    inside = F.pad(
        torch.ones(1, 1, x.shape[2] - 2 * padding[0], x.shape[3] - 2 * padding[1]),
        (padding[1],) * 2 + (padding[0],) * 2,
    )
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride, strict=True))
    total, count = torch.zeros(*x.shape[:2], rows, columns), torch.zeros(1, 1, rows, columns)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            at = (
                ...,
                slice(i, i + (rows - 1) * stride[0] + 1, stride[0]),
                slice(j, j + (columns - 1) * stride[1] + 1, stride[1]),
            )
            total, count = total + x[at], count + inside[at]
    return total / (kernel[0] * kernel[1] if padded else count)


_KERNELS: dict[str, Callable[[fx.Node, tuple[Any, ...]], Accumulated | None]] = {
    "layer": _layer,
    "add": _add,
    "mul": _mul,
    "matmul": _matmul,
    "cat": _cat,
    "average": _average,
}

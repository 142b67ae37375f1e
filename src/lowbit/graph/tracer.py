"""The tracer: it evaluates what it records, so that a branch on a shape can be decided.

Two batches of different sizes go through side by side. A decision that depends on the size of the batch, or
on the data, is refused: recorded once, it would be wrong for the next call.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError
from torch.nn.modules import transformer

from lowbit.graph.attention import attend, attends_to_itself
from lowbit.graph.inputs import Note
from lowbit.graph.masks import is_mask

__all__ = ["Tracer", "describe"]

# what a tensor tells of itself without looking at its numbers
_SHAPES = frozenset(
    (
        "shape",
        "size",
        "dim",
        "ndim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "dtype",
        "device",
        "layout",
        "type",
    )
    + (
        "is_cuda",
        "is_contiguous",
        "is_nested",
        "is_floating_point",
        "is_complex",
        "is_tensor",
        "requires_grad",
        "element_size",
    )
)
# what asks for a type; the last gives a hint to kernels, and no number depends on it
_TYPES = (
    (torch, "finfo"),
    (torch, "iinfo"),
    (F, "_none_or_dtype"),
    (transformer, "_detect_is_causal_mask"),
)
_CREATORS = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros")
# modules of torch.nn that are made of others
_MADE_OF_OTHERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
_IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class _Proxy(fx.Proxy):
    """A proxy that also answers as the plain number it stands for, when that number is a size."""

    tracer: Tracer

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __index__(self) -> int:
        return int(self.tracer.fixed(self, operator.index))

    def __int__(self) -> int:
        return int(self.tracer.fixed(self, int))

    def __float__(self) -> float:
        return float(self.tracer.fixed(self, float))

    def __len__(self) -> int:
        return int(self.tracer.fixed(self, len))

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        """fx records `x += y` as `x = x + y`, which other names of the same tensor would not see."""
        if isinstance(self.tracer.values[self.node.name][0], Tensor):
            return self.tracer.create_proxy("call_function", function, (self, other), {})
        return _IN_PLACE[function](self, other)


class _Attribute(_Proxy, Attribute):
    """x.shape, x.device, x.flatten: recorded when it is used."""

    _recorded: fx.Proxy | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """As in fx, but it holds on to what was recorded, whose value goes with it."""
        if self._recorded is None:
            self._recorded = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {})
        return self._recorded.node


class Tracer(fx.Tracer):
    """Traces and evaluates side by side: every node that can still be read knows its value for each example.

    Args:
        leaves: paths of submodules to call as they stand.
        examples: arguments of `forward` by name; one mapping for each batch size.
        defaults: arguments that the examples leave out; they are fixed.
    """

    # a buffer is read where it is used, so that self.mask[:x.shape[1]] follows the input
    proxy_buffer_attributes = True

    def __init__(
        self, leaves: frozenset[str], examples: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.leaves = leaves
        self.examples = examples
        self.defaults = defaults
        self.values: dict[str, list[Any]] = {}
        self.failed: str | None = None
        self.evaluating = False
        # the attention that is being called, and is seen through
        self.attending: nn.Module | None = None
        self.decisions: list[Note] = []

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _taking_proxies(self):
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves:
            return True
        seen_through = isinstance(m, _MADE_OF_OTHERS) or m is self.attending
        return not seen_through and super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Parameters that the example leaves out keep their defaults: `if mask is None` is decided."""
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, arg in enumerate(args):
            if isinstance(arg, fx.Proxy) and arg.node.target in self.defaults:
                args[i] = self.defaults[str(arg.node.target)]
                self.graph.erase_node(arg.node)
        return fn, args

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.evaluating:
            return forward(*args, **kwargs)
        attends = attends_to_itself(m, args, kwargs) and self._rank(args, kwargs) == 3
        self.attending = m if attends else None
        forward = functools.partial(attend, m) if attends else forward
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise

    def _rank(self, args: Any, kwargs: Any) -> int:
        """Number of axes of the first argument."""
        first = next(iter((*args, *kwargs.values())))
        return self.values[first.node.name][0].ndim if isinstance(first, fx.Proxy) else 0

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        # once nothing can read a value any more it goes, or tracing would hold every activation of the model
        weakref.finalize(proxy, self.values.pop, node.name, None).atexit = False
        return proxy

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["scope"] = self.scope.module_path
        if kind != "output":
            self.evaluating = True
            try:
                self.values[node.name] = [self._evaluate(node, i) for i in range(len(self.examples))]
            finally:
                self.evaluating = False
            node.meta["value"] = describe(self.values[node.name][0])
            node.meta["mask"] = is_mask(node, self.values[node.name][0])
        return node

    def _evaluate(self, node: fx.Node, example: int) -> Any:
        if node.op == "placeholder":
            return self.examples[example].get(str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n.name][example])
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        # an in-place operation must not change the recorded value of its input
        args, kwargs = _protect(node, args, kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self.root.get_submodule(str(node.target))(*args, **kwargs)

    def fixed(self, proxy: fx.Proxy, reading: Callable[[Any], Any]) -> Any:
        """What a proxy stands for, as `reading` takes it, when every call of the model gives the same.

        Raises:
            TraceError: it depends on the data, or on the size of the batch.
        """
        values = self.values[proxy.node.name]
        if self._is_constant(proxy.node):
            return reading(values[0])
        if reading is not len and (isinstance(values[0], Tensor) or self._looks_at_data(proxy.node)):
            raise TraceError("the flow depends on the data")
        read = [reading(value) for value in values]
        if any(value != read[0] for value in read):
            raise TraceError("the flow depends on the size of the batch")
        if reading not in (bool, len):
            self._decided(f"a size was fixed at {read[0]}, as for the example input")
        return read[0]

    def to_bool(self, obj: fx.Proxy) -> bool:
        decision = bool(self.fixed(obj, bool))
        if not self._is_constant(obj.node):
            self._decided(f"a branch on a shape was taken as {decision}, as for the example input")
        return decision

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self.values[obj.node.name][0]
        if isinstance(value, (tuple, list, torch.Size)):
            return iter([obj[i] for i in range(len(value))])
        return super().iter(obj)

    def _decided(self, text: str) -> None:
        self.decisions.append(Note(self.scope.module_path, text))

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a value comes from parameters and buffers alone."""
        todo, done = [node], set[fx.Node]()
        while todo:
            at = todo.pop()
            if at.op == "placeholder":
                return False
            if at not in done:
                done.add(at)
                todo += at.all_input_nodes
        return True

    def _looks_at_data(self, node: fx.Node) -> bool:
        """Whether a plain value was read off the numbers of a tensor rather than off its shape."""
        todo, done = [node], set[fx.Node]()
        while todo:
            at = todo.pop()
            if at in done or isinstance(at.meta["value"], Tensor):
                continue
            done.add(at)
            reads_tensor = any(isinstance(n.meta["value"], Tensor) for n in at.all_input_nodes)
            if reads_tensor and _asks(at) not in _SHAPES:
                return True
            todo += at.all_input_nodes
        return False


def _asks(node: fx.Node) -> str:
    """Name of the attribute, method or function that a node asks of its input."""
    if node.op == "call_function" and node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "__name__", node.target))


@contextlib.contextmanager
def _taking_proxies(tracer: Tracer) -> Iterator[None]:
    """While open, functions that take no proxy do.

    torch.zeros(x.shape[0], 3) and its kin record themselves; torch.finfo(x.dtype) and its kin answer for the
    example, for a type is the same in every call.
    """
    answers: dict[tuple[Any, str], Callable[..., Any]] = {
        **{(torch, name): _recording(tracer, getattr(torch, name)) for name in _CREATORS},
        **{(owner, name): _answering(tracer, getattr(owner, name)) for owner, name in _TYPES},
    }
    originals = {(owner, name): getattr(owner, name) for owner, name in answers}
    try:
        for (owner, name), function in answers.items():
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name), function in originals.items():
            setattr(owner, name, function)


def _recording(tracer: Tracer, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def create(*args: Any, **kwargs: Any) -> Any:
        if not _proxies(args, kwargs):
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    return create


def _answering(tracer: Tracer, function: Callable[..., Any]) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        def value(argument: Any) -> Any:
            return tracer.values[argument.node.name][0] if isinstance(argument, fx.Proxy) else argument

        args, kwargs = fx.node.map_aggregate((args, kwargs), value)
        return function(*args, **kwargs)

    return answer


def _proxies(args: Any, kwargs: Any) -> list[fx.Proxy]:
    found: list[fx.Proxy] = []

    def collect(value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            found.append(value)
        return value

    fx.node.map_aggregate((args, kwargs), collect)
    return found


def _protect(node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv", "setitem")
    if in_place or kwargs.get("inplace") or any(a is True for a in args) or node.op == "call_module":
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    return args, kwargs


def describe(value: Any) -> Any:
    """What the graph remembers of a value: shape and dtype of a tensor, a plain number itself."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        return (
            type(value)(describe(v) for v in value)
            if type(value) in (tuple, list)
            else tuple(describe(v) for v in value)
        )
    if isinstance(value, dict):
        return {k: describe(v) for k, v in value.items()}
    return value

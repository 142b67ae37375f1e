"""From a module as its author wrote it to a graph, running it once on example inputs.

Shapes are known while tracing, so a branch on a shape is decided and said. A branch on data cannot be: the submodule
that holds it becomes a leaf, called as it stands, or the whole model does, and that is said too.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from lowbit.errors import LowbitError
from lowbit.graph.normalize import normalize

__all__ = ["Inputs", "Note", "trace"]


@dataclass(frozen=True)
class Inputs:
    """One call of a model: positional and keyword arguments."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """A batch of data as model inputs: a tensor, a tuple (its first element; the rest are labels), or a dict."""
        if isinstance(batch, Inputs):
            return batch
        if isinstance(batch, (tuple, list)) and batch:
            first = batch[0]
            return cls(args=tuple(first)) if isinstance(first, (tuple, list)) else cls.of(first)
        if isinstance(batch, Tensor):
            return cls(args=(batch,))
        if isinstance(batch, Mapping):
            return cls(kwargs=dict(batch))
        raise LowbitError(
            f"a batch is a {type(batch).__name__}; pass a tensor, a tuple whose first element is the input, "
            "or a dict of keyword arguments"
        )

    def call(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Note:
    """Something the reader of the coverage table must know about one place of the model."""

    name: str
    text: str


class _Proxy(fx.Proxy):
    """A proxy that also answers as the integer it stands for, when that integer is a shape."""

    def __index__(self) -> int:
        return int(self._shape_value())

    def __int__(self) -> int:
        return int(self._shape_value())

    def _shape_value(self) -> Any:
        return self.tracer.fixed_value(self)  # type: ignore[attr-defined]


class _Tracer(fx.Tracer):
    """Traces and evaluates side by side: every node knows its value for the example inputs."""

    def __init__(self, leaves: frozenset[str], example: dict[str, Any], defaults: dict[str, Any]) -> None:
        super().__init__()
        self.leaves = leaves
        self.example = example
        self.defaults = defaults
        self.values: dict[str, Any] = {}
        self.failed: str | None = None
        self.evaluating = False
        self.branches: list[Note] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Parameters that the example leaves out are fixed at their defaults, so that `if mask is None` is decided."""
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, arg in enumerate(args):
            if isinstance(arg, fx.Proxy) and arg.node.target in self.defaults:
                args[i] = self.defaults[arg.node.target]
                self.graph.erase_node(arg.node)
        return fn, args

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.evaluating:
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["scope"] = self.scope.module_path
        if kind != "output":
            self.evaluating = True
            try:
                self.values[node.name] = value = self._evaluate(node)
            finally:
                self.evaluating = False
            node.meta["value"] = describe(value)
        return node

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.example.get(str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n.name])
        # an in-place operation must not change the recorded value of its input
        if node.op == "call_function":
            args, kwargs = _protect(node, args, kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            args, kwargs = _protect(node, args, kwargs)
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        return self.root.get_submodule(str(node.target))(*args, **kwargs)

    def fixed_value(self, proxy: fx.Proxy) -> Any:
        value = self.values[proxy.node.name]
        if isinstance(value, Tensor):
            raise TraceError("the flow depends on the data")
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        decision = bool(self.fixed_value(obj))
        self.branches.append(
            Note(self.scope.module_path, f"a branch on a shape was taken as {decision}, as for the example input")
        )
        return decision

    def iter(self, obj: fx.Proxy) -> Any:
        value = self.values[obj.node.name]
        if isinstance(value, (tuple, list, torch.Size)):
            return iter([obj[i] for i in range(len(value))])
        return super().iter(obj)


def describe(value: Any) -> Any:
    """What the graph remembers of a value: shape and dtype of a tensor, the value itself of a plain number."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(describe(v) for v in value) if type(value) in (tuple, list) else tuple(describe(v) for v in value)
    if isinstance(value, dict):
        return {k: describe(v) for k, v in value.items()}
    return value


def _protect(node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or kwargs.get("inplace") or name in ("iadd", "isub", "imul", "itruediv", "setitem")
    if in_place and isinstance(args[0], Tensor):
        args = (args[0].clone(), *args[1:])
    return args, kwargs


class _Whole(nn.Module):
    """A model that cannot be traced, held as a single leaf."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def trace(model: nn.Module, example: Inputs) -> tuple[fx.GraphModule, list[Note]]:
    """Copy `model` and turn it into a graph; the model itself is never touched.

    Args:
        example: one call; its shapes decide branches on shapes, its batch size does not matter.

    Returns:
        The graph in evaluation mode, and what could not be followed.

    Raises:
        LowbitError: the model does not run on the example.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        example = _few(model, example)
        bound, defaults = _bind(model, example)
        leaves: dict[str, str] = {}
        while True:
            tracer = _Tracer(frozenset(leaves), bound, defaults)
            try:
                gm = fx.GraphModule(model, tracer.trace(model))
                notes = [Note(name, f"called as it stands, for it cannot be traced: {why}") for name, why in leaves.items()]
                notes += dict.fromkeys(tracer.branches)
                break
            except Exception as error:
                reason = str(error).split("\n")[0][:120]
                if tracer.failed is None or tracer.failed in leaves:
                    gm = _whole(model, example)
                    leaves = {"model": reason}
                    notes = [Note("", f"the whole model is called as it stands, for it cannot be traced: {reason}")]
                    break
                leaves[tracer.failed] = reason
    gm.meta["leaves"] = leaves
    normalize(gm)
    return gm.eval(), notes


def _few(model: nn.Module, example: Inputs) -> Inputs:
    """The example cut to two samples where the model takes that, so that tracing holds few activations."""
    cut = Inputs(args=tuple(_first(a) for a in example.args), kwargs={k: _first(v) for k, v in example.kwargs.items()})
    try:
        cut.call(model)
        return cut
    except Exception:  # the first axis is not the batch: take the example as it is
        try:
            example.call(model)
        except Exception as error:
            raise LowbitError(f"the model does not run on the example input: {type(error).__name__}: {error}") from error
        return example


def _first(value: Any) -> Any:
    return value[:2] if isinstance(value, Tensor) and value.ndim > 0 else value


def _bind(model: nn.Module, example: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of `forward`: those the example gives, and those it leaves at their defaults."""
    signature = inspect.signature(model.forward)
    given = signature.bind(*example.args, **example.kwargs).arguments
    rest = {n: p.default for n, p in signature.parameters.items() if n not in given}
    return dict(given), rest


def _whole(model: nn.Module, example: Inputs) -> fx.GraphModule:
    """A graph of one node that calls the whole model with the arguments of the example."""
    graph = fx.Graph()
    names = list(inspect.signature(model.forward).parameters)
    positional = [names[i] if i < len(names) else f"arg{i}" for i in range(len(example.args))]
    args = tuple(graph.placeholder(name) for name in positional)
    kwargs = {name: graph.placeholder(name) for name in example.kwargs}
    for node, value in zip([*args, *kwargs.values()], [*example.args, *example.kwargs.values()], strict=True):
        node.meta.update(scope="", value=describe(value))
    call = graph.call_module("model", args, kwargs)
    call.meta.update(scope="", value=describe(example.call(model)))
    graph.output(call)
    return fx.GraphModule(_Whole(model), graph)

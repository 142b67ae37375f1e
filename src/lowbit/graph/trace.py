"""From a module as its author wrote it to a graph, running it once on example inputs.

Shapes are known while tracing, so a branch on a shape is decided and said. A branch on data cannot be: the
submodule that holds it becomes a leaf, called as it stands, or the whole model does, and that is said too.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lowbit.errors import LowbitError
from lowbit.graph.inputs import Inputs, Note
from lowbit.graph.match import hidden_layers
from lowbit.graph.normalize import normalize
from lowbit.graph.run import flat_tensors
from lowbit.graph.tracer import Tracer, describe
from lowbit.nn.network import Blueprint, TensorNetwork

__all__ = ["Inputs", "Note", "trace"]


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
        The graph in evaluation mode, and what could not be followed. `meta["leaves"]` holds the path of each
        submodule that is called as it stands, with the reason; `meta["whole"]` says whether that is the model
        itself; `meta["inside"]` holds (input, output) of every call of a layer in there, as tensors without
        numbers; `meta["unused"]` holds the names of what the model keeps and never reads;
        `meta["blueprints"]` holds what every tensor network is, by its path; `meta["networks"]` those that
        the graph sees through.

    Raises:
        LowbitError: the model does not run on the example, or its parameters are not float32.
    """
    copied, example = _copy(model), example.beside(model)
    _check_dtype(copied)
    with torch.no_grad(), _slow_path():
        examples, outputs = _examples(copied, example)
        try:
            gm, leaves, notes = _follow(copied, examples)
            gm.meta.update(leaves=leaves, whole=False)
            normalize(gm)
            _check_equal(gm, examples, outputs)
        except Exception as error:
            reason = str(error).split("\n")[0][:120]
            gm = _whole(_copy(model), examples[0])
            gm.meta.update(leaves={"model": reason}, whole=True)
            notes = [Note("", f"the whole model is called as it stands, for it cannot be traced: {reason}")]
            normalize(gm)
        gm.meta["unused"] = frozenset() if gm.meta["whole"] else _unused(gm, copied)
        gm.meta["inside"] = _shapes_inside(gm, examples[0])
        gm.meta["blueprints"] = _blueprints(copied)
        gm.meta["networks"] = _networks(gm)
    return gm.eval(), notes


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy for evaluation; tensors with a gradient history (weight_norm keeps one) go by value."""
    computed = [
        t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf
    ]
    copied = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed}).eval()
    for module in copied.modules():
        if type(module) is NonDynamicallyQuantizableLinear:  # of nn.MultiheadAttention: a name, nothing else
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return copied


@contextlib.contextmanager
def _slow_path() -> Iterator[None]:
    """While open, torch's own transformer layers run operation by operation.

    Their fast path for evaluation cannot be seen through, and writes zeros at padded places, where training
    had numbers.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _check_dtype(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise LowbitError(
                f"parameter '{name}' is {parameter.dtype}; lowbit starts from float32: pass model.float()"
            )


def _follow(model: nn.Module, examples: list[Inputs]) -> tuple[fx.GraphModule, dict[str, str], list[Note]]:
    """Trace, again and again, each time with the submodule that failed as one more leaf."""
    bound = [_bind(model, example) for example in examples]
    leaves: dict[str, str] = {}
    while True:
        tracer = Tracer(frozenset(leaves), [given for given, _ in bound], bound[0][1])
        try:
            gm = fx.GraphModule(model, tracer.trace(model))
        except Exception as error:
            if tracer.failed is None or tracer.failed in leaves:
                raise
            leaves[tracer.failed] = str(error).split("\n")[0][:120]
            continue
        called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
        leaves = {name: why for name, why in leaves.items() if name in called}  # others lie inside these
        notes = [
            Note(name, f"called as it stands, for it cannot be traced: {why}") for name, why in leaves.items()
        ]
        return gm, leaves, notes + list(dict.fromkeys(tracer.decisions))


def _examples(model: nn.Module, example: Inputs) -> tuple[list[Inputs], list[Any]]:
    """The example with two samples and with three, where the model takes that, and its outputs."""
    few = [example.with_samples(n) for n in (2, 3)]
    try:
        return few, [_call(model, inputs) for inputs in few]
    except Exception:  # the first axis is not the batch: take the example as it is
        try:
            return [example], [_call(model, example)]
        except Exception as error:
            text = f"the model does not run on the example input: {type(error).__name__}: {error}"
            hint = (
                "; several inputs are a tuple inside the tuple: ((a, b), label)"
                if isinstance(error, TypeError)
                else ""
            )
            raise LowbitError(text + hint) from error


def _call(model: nn.Module, inputs: Inputs) -> Any:
    """The output for a copy of the inputs, which a model may write to; its own errors, for they say why."""
    own = inputs.with_samples(inputs.batch_size)
    return model(*own.args, **own.kwargs)


def _check_equal(gm: fx.GraphModule, examples: list[Inputs], outputs: list[Any]) -> None:
    """A graph that computes something else (a view written in place, a branch on a type) must not be used."""
    for example, want in zip(examples, outputs, strict=True):
        got = _call(gm, example)
        same = type(want) is type(got)
        for a, b in zip(flat_tensors(want), flat_tensors(got), strict=True):
            # sums in another order are off by a share of the largest
            largest = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
            close = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, largest), "equal_nan": True}
            same = same and a.shape == b.shape and torch.allclose(a, b, **close)
        if not same:
            raise LowbitError("its graph would compute something else")


def _unused(gm: fx.GraphModule, model: nn.Module) -> frozenset[str]:
    """Names of entries of the model's state dict that the graph does without."""
    kept = {id(t) for t in gm.state_dict(keep_vars=True).values()}
    return frozenset(n for n, t in model.state_dict(keep_vars=True).items() if id(t) not in kept)


def _blueprints(model: nn.Module) -> dict[str, Blueprint]:
    found = model.named_modules(remove_duplicate=True)
    return {path: module.blueprint for path, module in found if isinstance(module, TensorNetwork)}


def _networks(gm: fx.GraphModule) -> dict[str, Blueprint]:
    """Tensor networks whose factors the graph calls, each once."""
    calls = Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_module")
    return {
        path: blueprint
        for path, blueprint in gm.meta["blueprints"].items()
        if all(calls[name] == 1 for name in blueprint.paths(path))
    }


def _shapes_inside(gm: fx.GraphModule, example: Inputs) -> dict[str, list[tuple[Tensor, Tensor]]]:
    shapes: dict[str, list[tuple[Tensor, Tensor]]] = {}
    hooks = []
    for path, layer in [found for leaf in gm.meta["leaves"] for found in hidden_layers(gm, leaf)]:
        seen = shapes.setdefault(path, [])

        def remember(module: nn.Module, args: Any, kwargs: Any, output: Any, seen: list[Any] = seen) -> None:
            seen.append((describe((*args, *kwargs.values())[0]), describe(output)))

        hooks.append(layer.register_forward_hook(remember, with_kwargs=True))
    if hooks:
        _call(gm, example)
    for hook in hooks:
        hook.remove()
    return shapes


def _bind(model: nn.Module, example: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of `forward`: those the example gives, and those it leaves at their defaults."""
    signature = inspect.signature(model.forward)
    given = signature.bind(*example.args, **example.kwargs).arguments
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = signature.parameters
    rest = {n: p.default for n, p in parameters.items() if n not in given and p.kind not in stars}
    empty: Mapping[str, Any] = {
        n: () if s == "*" else {} for n, p in parameters.items() if (s := stars.get(p.kind))
    }
    return {stars.get(parameters[n].kind, "") + n: v for n, v in {**empty, **given}.items()}, rest


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
    call.meta.update(scope="", value=describe(_call(model, example)))
    graph.output(call)
    return fx.GraphModule(_Whole(model), graph)

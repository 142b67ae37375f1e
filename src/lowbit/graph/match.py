"""Questions about a graph. They return nodes and names; nothing is edited here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lowbit.graph.ops import INTEGER, clamp_bounds, is_tensor, kind_of, label, module_of
from lowbit.nn.layers import layers as known_layers
from lowbit.nn.layers import obstacle, quantized_layer
from lowbit.nn.quantizer import Quantizer

__all__ = [
    "Operation",
    "batchnorms",
    "calls",
    "hidden_layers",
    "input_quantizer",
    "is_folded_later",
    "is_global_pool",
    "layer_nodes",
    "max_pool_of",
    "moves_of",
    "never_negative",
    "operands",
    "operations",
    "pads",
    "path_name",
    "quantizer_of",
    "quantizers_behind",
    "readers_of",
    "rule_name",
    "source_of",
    "tail_of",
    "tensor_inputs",
]

# functions and modules, by their labels
_NEVER_NEGATIVE = {"sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "square"}
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Operation:
    """One operation that a rule can match."""

    name: str
    op: str
    roles: frozenset[str]


def calls(gm: fx.GraphModule) -> Counter[int]:
    """How often each module object is called, under whatever name."""
    return Counter(id(module_of(n)) for n in gm.graph.nodes if n.op == "call_module")


def layer_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Calls of layers with a weight, in the order of execution."""
    return [n for n in gm.graph.nodes if kind_of(n) == "layer"]


def operations(gm: fx.GraphModule) -> list[Operation]:
    """Everything a rule can match: one entry for each call, or for each module called more than once.

    Layers inside submodules that could not be traced follow the call of their submodule. Whatever has a
    weight has the role "layer"; the first and the last of these, lookups aside, are "first" and "last", and
    1x1 convolutions that are one side of a residual sum by themselves are "shortcut".
    """
    found: dict[str, str] = {}
    layers: list[str] = []  # one entry for each call
    for node in gm.graph.nodes:
        if kind_of(node) in INTEGER:
            here = {rule_name(node): label(node)}
        elif node.op == "call_module" and str(node.target) in gm.meta["leaves"]:
            here = {path_name(gm, p): type(m).__name__ for p, m in hidden_layers(gm, str(node.target))}
        else:
            continue
        found |= {name: op for name, op in here.items() if name not in found}
        layers += [name for name, op in here.items() if op in known_layers.names() and op != "Embedding"]
    roles = {name: {"layer"} if op in known_layers.names() else set() for name, op in found.items()}
    shortcuts = [rule_name(node) for node in layer_nodes(gm) if _is_shortcut(node)]
    named = [*zip(("first", "last"), layers[:1] + layers[-1:], strict=False)]
    for role, name in [*named, *(("shortcut", name) for name in shortcuts)]:
        roles[name].add(role)
    return [Operation(name, op, frozenset(roles[name])) for name, op in found.items()]


def _is_shortcut(node: fx.Node) -> bool:
    """Whether a 1x1 convolution reads what another branch reads too, and is added to that."""
    layer, source, end = module_of(node), node.args[0], node
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)) or {*layer.kernel_size} != {1}:
        return False
    while isinstance(source, fx.Node) and kind_of(source) in ("pass", "average") and len(source.users) == 1:
        source = source.args[0]
    norms = [
        user for user in end.users if user.op == "call_module" and isinstance(module_of(user), _BATCHNORMS)
    ]
    if len(end.users) == len(norms) == 1:
        (end,) = norms
    summed = any(kind_of(user) == "add" for user in end.users)
    return summed and isinstance(source, fx.Node) and len(source.users) > 1


def hidden_layers(gm: fx.GraphModule, leaf: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of every float layer inside a submodule that could not be traced, once."""
    seen: set[int] = set()
    for path, layer in _descend(gm.get_submodule(leaf), f"{leaf}."):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield path, layer


def _descend(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        container = isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        if quantized_layer(type(child)):
            if not obstacle(child):
                yield prefix + name, child
        elif container or not type(child).__module__.startswith("torch.nn"):
            yield from _descend(child, f"{prefix}{name}.")


def path_name(gm: fx.GraphModule, path: str) -> str:
    """The name that rules see for a module path; a model held whole shows the names its author gave."""
    return path.removeprefix("model.") if gm.meta["whole"] else path


def rule_name(node: fx.Node) -> str:
    """The name that rules see: calls of one module share it."""
    name = str(node.meta["name"])
    return name.partition("#")[0] if node.op == "call_module" else name


def source_of(node: fx.Node) -> fx.Node:
    """The node that made the values which `node` may only have moved; what picks from a tuple makes them."""
    made = node
    while kind_of(node) == "pass" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        made = node if is_tensor(node) else made
    return made


def readers_of(node: fx.Node, *, clamped: bool = False) -> Iterator[fx.Node]:
    """The nodes that read what `node` makes, perhaps moved; with `clamped` also behind clamps."""
    for user in node.users:
        kind = kind_of(user)
        if user.args[:1] == (node,) and (kind == "pass" or (clamped and kind == "clamp")):
            yield from readers_of(user, clamped=clamped)
        else:
            yield user


def quantizer_of(node: fx.Node) -> Quantizer | None:
    """The quantizer whose codes a node carries, perhaps moved; None when it carries floats."""
    source = source_of(node)
    module = module_of(source) if kind_of(source) == "quantizer" else None
    return module if isinstance(module, Quantizer) else None


def quantizers_behind(node: fx.Node) -> list[Quantizer]:
    """The quantizers that read what a node writes, perhaps clamped."""
    found: list[Quantizer] = []
    for user in node.users:
        module = module_of(user) if user.op == "call_module" else None
        if isinstance(module, Quantizer):
            found.append(module)
        elif kind_of(user) == "clamp":
            found += quantizers_behind(user)
    return found


def input_quantizer(node: fx.Node) -> Quantizer | None:
    """The quantizer whose codes a layer call reads, perhaps moved; None when it reads floats."""
    quantizer = quantizer_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    return quantizer if quantizer is not None and quantizer.mode == "quantize" else None


def is_global_pool(node: fx.Node) -> bool:
    """Whether the node takes the mean over all positions, keeping the axes."""
    if kind_of(node) != "average" or not is_tensor(node):
        return False
    source, value = node.args[0], node.meta["value"]
    assert isinstance(source, fx.Node)
    adaptive = label(node).lower() in ("adaptiveavgpool2d", "adaptive_avg_pool2d")
    return value.ndim == 4 and tuple(value.shape[2:]) == (1, 1) and adaptive


def moves_of(node: fx.Node) -> Iterator[fx.Node]:
    """The node itself and those before it, as long as they only move values."""
    while kind_of(node) == "pass":
        yield node
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return
        node = source


def pads(node: fx.Node) -> bool:
    """Whether a node that moves values puts zeros around them."""
    return label(node).lower() in ("pad", "zeropad2d")


def max_pool_of(node: fx.Node) -> dict[str, Any] | None:
    """kernel_size, stride and padding of 2-d max pooling without dilation, indices or a rounded-up size."""
    if label(node).lower() != "maxpool2d" and label(node) != "max_pool2d":
        return None
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if node.op == "call_module":
        given = {name: getattr(module_of(node), name) for name in names}
    else:
        given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    plain = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False} | given
    if plain["dilation"] not in (1, (1, 1)) or plain["ceil_mode"] or plain["return_indices"]:
        return None
    return {name: plain[name] for name in names[:3]}


def tail_of(node: fx.Node) -> fx.Node:
    """The last node that one integer kernel covers: the operation, its BatchNorm, or the clamp behind."""
    users = list(node.users)
    if len(users) == 1 and is_folded_later(users[0]):
        return tail_of(users[0])
    return users[0] if len(users) == 1 and kind_of(users[0]) == "clamp" else node


def never_negative(node: fx.Node) -> bool:
    """Whether a ReLU or its like made the values, perhaps moved, averaged or added since."""
    kind = kind_of(node)
    if kind == "clamp":
        return clamp_bounds(node)[0] >= 0
    if kind in ("pass", "average", "add", "cat", "quantizer"):
        return all(map(never_negative, tensor_inputs(node)))
    return kind == "float" and label(node).lower() in _NEVER_NEGATIVE


def is_folded_later(node: fx.Node) -> bool:
    """Whether the node is a BatchNorm that is kept for training and folded at freeze."""
    return bool(node.meta.get("folded_later", False))


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Nodes of floating point tensors that this node reads, each as often as it is read."""
    found: list[fx.Node] = []

    def collect(n: fx.Node) -> fx.Node:
        found.append(n)
        return n

    fx.node.map_arg((node.args, node.kwargs), collect)
    return [n for n in found if is_tensor(n)]


def operands(node: fx.Node) -> list[fx.Node]:
    """Activations that an integer kernel reads."""
    return tensor_inputs(node)[: 1 if kind_of(node) == "layer" else None]


def batchnorms(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """Each BatchNorm call with the reason why it cannot be folded into the layer before it, or ''."""
    counts = calls(gm)
    owners = Counter(id(p) for m in gm.modules() for p in m.parameters(recurse=False))
    for node in gm.graph.nodes:
        if node.op != "call_module" or not isinstance(module_of(node), _BATCHNORMS):
            continue
        bn, before = module_of(node), node.args[0]
        why = ""
        if bn.running_mean is None:
            why = "it keeps no running statistics"
        elif counts[id(bn)] > 1:
            why = "it is called more than once"
        elif not (isinstance(before, fx.Node) and _is_foldable(before)):
            why = "no layer stands right before it"
        elif counts[id(module_of(before))] > 1:
            why = f"'{rule_name(before)}' is called more than once"
        elif len(before.users) > 1:
            why = f"the output of '{before.meta['name']}' is read elsewhere too"
        elif owners[id(module_of(before).weight)] > 1:
            why = f"the weight of '{before.meta['name']}' is shared"
        elif isinstance(module_of(before), nn.Linear) and node.meta["value"].ndim != 2:
            why = "it normalizes another axis than the linear layer writes"
        yield node, why


def _is_foldable(node: fx.Node) -> bool:
    return kind_of(node) == "layer" and isinstance(module_of(node), _FOLDABLE)

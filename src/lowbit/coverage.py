"""The table that tells the truth: what is quantized, what stays in float, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from lowbit.graph.match import (
    input_quantizer,
    is_folded_later,
    path_name,
    quantizer_of,
    rule_name,
    tail_of,
    tensor_inputs,
)
from lowbit.graph.ops import INTEGER, adds_mask, is_tensor, kind_of, label, module_label, module_of
from lowbit.graph.trace import Note
from lowbit.nn.dynamic import DynamicQuantizer, has_integer_product
from lowbit.nn.layers import BoundLayer, QLayer, obstacle, quantized_layer
from lowbit.nn.quantizer import Quantizer
from lowbit.nn.scale import Scale
from lowbit.tables import text_table

__all__ = ["Coverage", "Row", "coverage_of"]


@dataclass(frozen=True)
class Row:
    """What became of one operation."""

    name: str
    op: str
    # "integer": weight and activations; "weight": the weight alone; "float": neither
    status: str
    weight: str = ""
    inputs: str = ""
    output: str = ""
    why: str = ""
    cure: str = ""


@dataclass(frozen=True)
class Coverage:
    """One row for each operation that computes, in the order of execution."""

    rows: tuple[Row, ...]
    notes: tuple[Note, ...]

    def __str__(self) -> str:
        header = ("layer", "operation", "runs as", "weight", "inputs", "output", "why", "what to do")
        rows = [(r.name, r.op, r.status, r.weight, r.inputs, r.output, r.why, r.cure) for r in self.rows]
        notes = [f"note: {n.name + ': ' if n.name else ''}{n.text}" for n in self.notes]
        return "\n".join([text_table(header, rows), *notes, self.summary])

    @property
    def summary(self) -> str:
        counts = {s: sum(r.status == s for r in self.rows) for s in ("integer", "weight", "float")}
        return (
            f"{len(self.rows)} operations: {counts['integer']} integer, "
            f"{counts['weight']} with a quantized weight only, {counts['float']} in float"
        )

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def coverage_of(gm: fx.GraphModule, notes: Sequence[Note]) -> Coverage:
    """Read the table off the graph itself, so that it cannot say what is not there."""
    rows = [row for node in gm.graph.nodes if (row := _row(node)) is not None]
    for leaf in gm.meta["leaves"]:
        rows += _inside(gm, leaf)
    reasons = {
        d.name: d.rule.reason for d in gm.meta.get("decisions", ()) if d.rule is not None and d.rule.reason
    }
    return Coverage(tuple(_with_reason(row, reasons) for row in rows), tuple(notes))


def _with_reason(row: Row, reasons: dict[str, str]) -> Row:
    """What the author of the rule has to say comes first."""
    reason = reasons.get(row.name) or reasons.get(row.name.partition("#")[0])
    return replace(row, why="; ".join(filter(None, (reason, row.why)))) if reason else row


def _row(node: fx.Node) -> Row | None:
    kind = kind_of(node)
    if (
        node.op in ("placeholder", "output", "get_attr")
        or kind in ("quantizer", "pass")
        or not _computes(node)
    ):
        return None
    name, op = str(node.meta["name"]), label(node)
    if kind == "layer":
        return _layer_row(node, name, op)
    output = _output(node)
    if kind in INTEGER:
        if _all_integer(node) and (output != "float" or kind == "matmul"):
            return Row(name, op, "integer", inputs=_inputs(node), output=output)
        why, cure = _why_not_integer(node)
        return Row(name, op, "float", output=output, why=why, cure=cure)
    if kind == "clamp" and _fused(node):
        return Row(name, op, "integer", output=output, why=f"part of '{_producer(node)}'")
    if node.op == "call_module" and isinstance(module_of(node), (nn.BatchNorm1d, nn.BatchNorm2d)):
        if is_folded_later(node):
            return Row(name, op, "integer", output=output, why=f"goes into '{_producer(node)}' at freeze")
        why = node.graph.owning_module.meta.get("unfolded", {}).get(name)
        cure = "put it right behind a layer of its own" if why else "fold_bn='before'"
        why = why or "fold_bn is 'never' in the recipe"
        return Row(name, op, "float", output=output, why=f"not folded: {why}", cure=cure)
    return Row(name, op, "float", output=output, why=_why_float(node), cure=_cure(node))


def _computes(node: fx.Node) -> bool:
    value = node.meta.get("value")
    return is_tensor(node) or (node.op == "call_module" and value is not None)


def _layer_row(node: fx.Node, name: str, op: str) -> Row:
    layer, output, inputs = module_of(node), _output(node), _inputs(node)
    weight = str(layer.weight_quantizer.spec) if isinstance(layer, QLayer) else ""
    match = f"match='{rule_name(node)}', weight=INT8"
    if not weight:
        cure = f"Rule({match})"
        return Row(name, op, "float", "", inputs, output, "no rule asks for its weight", cure)
    assert isinstance(layer, QLayer)
    if isinstance(layer, nn.Embedding):
        return Row(name, op, "weight", weight, output=output, why="a table lookup")
    if not inputs:
        why, cure = _why_not_integer(node)
        return Row(name, op, "weight", weight, output=output, why=why, cure=cure)
    if layer.weight_quantizer.spec.kind == "float" or not _all_integer(node):
        return Row(name, op, "weight", weight, inputs, output, why="no integer kernel for fp16")
    if isinstance(input_quantizer(node), DynamicQuantizer) and not has_integer_product(layer):
        why, cure = (
            "the scales of its weight do not leave a sum of integers",
            f"Rule({match}, activation=DYNAMIC8)",
        )
        return Row(name, op, "weight", weight, inputs, output, why=why, cure=cure)
    kernel = "ONNX Runtime has no integer kernel for it" if isinstance(layer, nn.ConvTranspose2d) else ""
    return Row(name, op, "integer", weight, inputs, output, why=kernel)


def _all_integer(node: fx.Node) -> bool:
    """Whether every tensor that the operation reads is made of integer codes."""
    return all(q is not None and q.spec.kind == "int" for q in _input_quantizers(node))


def _input_quantizers(node: fx.Node) -> list[Quantizer | None]:
    """The quantizer of each tensor that the operation computes with; None for floats."""
    sources = tensor_inputs(node)[: 1 if kind_of(node) == "layer" else None]
    return [_working(node, quantizer_of(source)) for source in sources]


def _working(node: fx.Node, quantizer: Quantizer | None) -> Quantizer | None:
    """The quantizer, unless calibration, which sets one going, has been and no data reached it."""
    return None if quantizer is None or _unreached(node, quantizer) else quantizer


def _unreached(node: fx.Node, quantizer: Quantizer) -> bool:
    gm = node.graph.owning_module
    assert gm is not None
    return quantizer.mode == "off" and any(
        isinstance(m, Quantizer) and m.mode == "quantize" and not m.spec.dynamic for m in gm.modules()
    )


def _why_not_integer(node: fx.Node) -> tuple[str, str]:
    """Why an operation with an integer kernel reads floats, and what to do."""
    found = [quantizer_of(source) for source in tensor_inputs(node)]
    if any(q is not None and _unreached(node, q) for q in found):
        return "no calibration data reached it", "calibrate on data that does"
    decisions = node.graph.owning_module.meta.get("decisions", ())
    asked = {d.name: d.activation for d in decisions if d.activation is not None}
    if rule_name(node) in asked and asked[rule_name(node)].dynamic:
        cure = f"Rule(match='{rule_name(node)}', activation=UINT8)"
        return "ranges found at run time are those of what linear layers read", cure
    if kind_of(node) in ("add", "mul") and rule_name(node) in asked:
        return "only operations in float read it, so that rounding it gains nothing", ""
    weight = ", weight=INT8" if kind_of(node) == "layer" else ""
    return "no rule asks for its activations", f"Rule(match='{rule_name(node)}'{weight}, activation=UINT8)"


def _inputs(node: fx.Node) -> str:
    found = _input_quantizers(node)
    return ", ".join(dict.fromkeys(str(q.spec) for q in found if q)) if all(found) else ""


def _output_quantizer(node: fx.Node) -> Quantizer | None:
    """What rounds the result as it is written; a range found at run time is known only after."""
    users = list((tail_of(node) if _runs_on_integers(node) else node).users)
    behind = users[0] if len(users) == 1 and kind_of(users[0]) == "quantizer" else None
    found = None if behind is None else _working(node, quantizer_of(behind))
    return None if isinstance(found, DynamicQuantizer) else found


def _output(node: fx.Node) -> str:
    quantizer = _output_quantizer(node)
    return str(quantizer.spec) if quantizer else "float"


def _runs_on_integers(node: fx.Node) -> bool:
    """Whether the operation has an integer kernel whose operands are all codes."""
    if kind_of(node) not in INTEGER or not _all_integer(node):
        return False
    if kind_of(node) != "layer":
        return True
    layer = module_of(node)
    known = isinstance(layer, QLayer) and not isinstance(layer, nn.Embedding)
    return known and layer.weight_quantizer.spec.kind == "int"


def _fused(node: fx.Node) -> bool:
    source = node.args[0]
    while isinstance(source, fx.Node) and is_folded_later(source) and len(source.users) == 1:
        source = source.args[0]
    direct = isinstance(source, fx.Node) and _runs_on_integers(source) and len(source.users) == 1
    return direct and _output_quantizer(node) is not None


def _producer(node: fx.Node) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return _producer(source) if is_folded_later(source) else str(source.meta["name"])


_CURES = {
    "the flow depends on the data": "replace the branch on data by torch.where",
    "the flow depends on the size of the batch": "make sizes follow the input: x.new_zeros(x.shape[0])",
}


def _why_float(node: fx.Node) -> str:
    if node.op == "call_module":
        if _leaf_reason(node) is not None:
            return "cannot be traced; only the layers inside it are quantized"
        return _why_module(module_of(node)) if kind_of(node) == "float" else _why_clamp(node)
    if adds_mask(node):
        return "adds a mask of very large numbers; 8 bits cannot hold them beside the rest"
    if node.target in _WEIGHTED:
        return "its weight is computed, not a Parameter"
    return _why_clamp(node) if kind_of(node) == "clamp" else "no integer kernel for it"


def _why_clamp(node: fx.Node) -> str:
    if not _all_integer(node):
        return "its input is not quantized"
    return "not fused: no layer or addition right before it that it alone reads"


def _why_module(module: nn.Module) -> str:
    if isinstance(module, Scale):
        return "evens the channels of what the layers behind it read"
    if hasattr(module, "parametrizations"):
        return "its weight is computed by a parametrization"
    return (obstacle(module) if quantized_layer(type(module)) else "") or "no integer kernel for it"


_WEIGHTED = {nn.functional.linear, nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv_transpose2d}


def _leaf_reason(node: fx.Node) -> str | None:
    """Why a submodule could not be traced; None for other nodes."""
    assert node.graph.owning_module is not None
    leaves: dict[str, str] = node.graph.owning_module.meta["leaves"]
    return leaves.get(str(node.target)) if node.op == "call_module" else None


def _cure(node: fx.Node) -> str:
    reason = _leaf_reason(node)
    if reason is not None:
        return _CURES.get(reason, "write it so that torch.fx can trace it")
    if node.target in _WEIGHTED:
        return "compute the weight once, before quantizing, and hold it in a layer"
    if node.target is nn.functional.batch_norm:
        return "use nn.BatchNorm1d or nn.BatchNorm2d, which can be folded"
    if node.target is nn.functional.scaled_dot_product_attention:
        return "write attention with matmul and softmax to quantize its products"
    return _cure_of(module_of(node)) if node.op == "call_module" else ""


def _cure_of(module: nn.Module) -> str:
    if hasattr(module, "parametrizations"):
        return "torch.nn.utils.parametrize.remove_parametrizations before quantizing"
    if quantized_layer(type(module)) and obstacle(module):
        return "remove that before quantizing (torch.nn.utils.remove_weight_norm, hook.remove())"
    if any(quantized_layer(type(m)) or isinstance(m, nn.MultiheadAttention) for m in module.modules()):
        return "write it with Linear layers and scaled_dot_product_attention"
    return ""


def _inside(gm: fx.GraphModule, leaf: str) -> list[Row]:
    """Rows of the modules inside a submodule that could not be traced."""
    rows: list[Row] = []
    done: set[str] = set()
    place = "inside the model" if gm.meta["whole"] else f"inside '{leaf}'"
    for path, module in gm.get_submodule(leaf).named_modules(prefix=leaf):
        name = path_name(gm, path)
        if any(path.startswith(f"{outer}.") for outer in done):
            continue
        if isinstance(module, BoundLayer):
            done.add(path)
            rows.append(_bound_row(name, module, place))
        elif type(module).__module__.startswith("torch.nn") and not isinstance(module, _CONTAINERS):
            done.add(path)
            asked = quantized_layer(type(module)) and not obstacle(module)
            why = "no rule asks for its weight" if asked else f"{place}, which cannot be traced"
            rows.append(Row(name, type(module).__name__, "float", why=why))
    return rows


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _bound_row(name: str, bound: BoundLayer, place: str) -> Row:
    layer, quantizers = bound.layer, (bound.input_quantizer, bound.output_quantizer)
    spec = layer.weight_quantizer.spec if isinstance(layer, QLayer) else None
    specs = [str(q.spec) if q is not None and q.mode != "off" else "" for q in quantizers]
    unreached = quantizers[0] is not None and quantizers[0].mode == "off"
    why = "no calibration data reached it" if unreached else f"{place}, which cannot be traced"
    integer = spec is not None and spec.kind == "int" and specs[0] not in ("", "fp16")
    status = "integer" if integer else "float" if spec is None else "weight"
    op = module_label(layer)
    return Row(name, op, status, str(spec or ""), specs[0], specs[1], why=why)

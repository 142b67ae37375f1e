"""The table that tells the truth: what is quantized, what stays in float, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from lowbit.graph.match import batchnorms, rule_name, tail_of, tensor_inputs
from lowbit.graph.ops import INTEGER, is_tensor, kind_of, label, module_of
from lowbit.graph.trace import Note
from lowbit.nn.layers import BoundLayer, QLayer, quantized_layer
from lowbit.nn.quantizer import Quantizer
from lowbit.recipe import Recipe

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
        header = Row("layer", "operation", "runs as", "weight", "inputs", "output", "why", "what to do")
        table = [(r.name, r.op, r.status, r.weight, r.inputs, r.output, r.why, r.cure) for r in (header, *self.rows)]
        widths = [max(len(line[c]) for line in table) for c in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        lines += [f"note: {n.name + ': ' if n.name else ''}{n.text}" for n in self.notes]
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        counts = {s: sum(r.status == s for r in self.rows) for s in ("integer", "weight", "float")}
        return (
            f"{len(self.rows)} operations: {counts['integer']} integer, {counts['weight']} with a quantized weight only, "
            f"{counts['float']} in float"
        )

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def coverage_of(gm: fx.GraphModule, recipe: Recipe, notes: Sequence[Note]) -> Coverage:
    """Read the table off the graph itself, so that it cannot say what is not there."""
    folds = {node: why for node, why in batchnorms(gm)}
    rows = [row for node in gm.graph.nodes if (row := _row(node, recipe, folds)) is not None]
    for leaf in gm.meta["leaves"]:
        rows += _inside(gm, leaf)
    return Coverage(tuple(rows), tuple(notes))


def _row(node: fx.Node, recipe: Recipe, folds: dict[fx.Node, str]) -> Row | None:
    kind = kind_of(node)
    if node.op in ("placeholder", "output", "get_attr") or kind in ("quantizer", "pass") or not _computes(node):
        return None
    name, op = str(node.meta["name"]), label(node)
    if kind == "layer":
        return _layer_row(node, name, op)
    if kind in INTEGER:
        if all(_quantized_by(n) for n in tensor_inputs(node)) and _output_quantizer(node):
            return Row(name, op, "integer", inputs=_inputs(node), output=_output(node))
        return Row(name, op, "float", why="no rule asks for its activations", cure=f"Rule(match='{rule_name(node)}', activation=UINT8)")
    if kind == "clamp" and _fused(node):
        return Row(name, op, "integer", output=_output(node), why=f"part of '{_producer(node)}'")
    if node in folds:
        why = folds[node] or "fold_bn is off in the recipe"
        return Row(name, op, "float", output=_output(node), why=f"not folded: {why}", cure="put it right behind a layer of its own")
    return Row(name, op, "float", output=_output(node), why=_why_float(node), cure=_cure(node))


def _computes(node: fx.Node) -> bool:
    value = node.meta.get("value")
    return is_tensor(node) or (node.op == "call_module" and value is not None)


def _layer_row(node: fx.Node, name: str, op: str) -> Row:
    layer = module_of(node)
    weight = str(layer.weight_quantizer.spec) if isinstance(layer, QLayer) else ""
    cure = f"Rule(match='{rule_name(node)}', weight=INT8)"
    if isinstance(layer, nn.Embedding):
        status = "weight" if weight else "float"
        return Row(name, op, status, weight, output=_output(node), why="a table lookup" if weight else "no rule asks for its weight")
    inputs = _inputs(node)
    if weight and inputs:
        kernel = "" if not isinstance(layer, nn.ConvTranspose2d) else "ONNX Runtime has no integer kernel for it"
        return Row(name, op, "integer", weight, inputs, _output(node), why=kernel)
    if weight:
        return Row(name, op, "weight", weight, output=_output(node), why="no rule asks for its activations")
    return Row(name, op, "float", inputs=inputs, output=_output(node), why="no rule asks for its weight", cure=cure)


def _quantized_by(node: fx.Node) -> Quantizer | None:
    while kind_of(node) == "pass" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if kind_of(node) != "quantizer":
        return None
    quantizer = module_of(node)
    assert isinstance(quantizer, Quantizer)
    return quantizer


def _inputs(node: fx.Node) -> str:
    sources = tensor_inputs(node)[: 1 if kind_of(node) == "layer" else None]
    found = [_quantized_by(s) for s in sources]
    return ", ".join(dict.fromkeys(str(q.spec) for q in found if q)) if all(found) else ""


def _output_quantizer(node: fx.Node) -> Quantizer | None:
    users = list(tail_of(node).users)
    return _quantized_by(users[0]) if len(users) == 1 and kind_of(users[0]) == "quantizer" else None


def _output(node: fx.Node) -> str:
    quantizer = _output_quantizer(node)
    return str(quantizer.spec) if quantizer else "float"


def _fused(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and kind_of(source) in INTEGER and len(source.users) == 1 and _output_quantizer(node) is not None


def _producer(node: fx.Node) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return str(source.meta["name"])


def _why_float(node: fx.Node) -> str:
    if node.op == "call_module":
        module = module_of(node)
        if str(node.target) in node.graph.owning_module.meta["leaves"]:  # type: ignore[union-attr]
            return "cannot be traced; only the layers inside it are quantized"
        if hasattr(module, "parametrizations"):
            return "its weight is computed by a parametrization"
    if node.target in _WEIGHTED:
        return "its weight is computed, not a Parameter"
    return "no integer kernel for it" if kind_of(node) == "float" else "its input is not quantized"


_WEIGHTED = {nn.functional.linear, nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv_transpose2d}


def _cure(node: fx.Node) -> str:
    if node.op == "call_module" and hasattr(module_of(node), "parametrizations"):
        return "torch.nn.utils.parametrize.remove_parametrizations before quantizing"
    if node.target is nn.functional.scaled_dot_product_attention:
        return "write attention with matmul and softmax to quantize its products"
    if node.op == "call_module" and isinstance(module_of(node), nn.MultiheadAttention):
        return "write it with Linear layers and scaled_dot_product_attention"
    if node.op == "call_module" and str(node.target) in node.graph.owning_module.meta["leaves"]:  # type: ignore[union-attr]
        return "replace the branch on data by torch.where"
    return ""


def _inside(gm: fx.GraphModule, leaf: str) -> list[Row]:
    """Rows of the layers inside a submodule that could not be traced."""
    rows: list[Row] = []
    bound: set[str] = set()
    for path, module in gm.get_submodule(leaf).named_modules(prefix=leaf):
        name = path.removeprefix("model.") if leaf == "model" else path
        if any(path.startswith(b + ".") for b in bound):
            continue
        if isinstance(module, BoundLayer):
            bound.add(path)
            weight = str(module.layer.weight_quantizer.spec) if isinstance(module.layer, QLayer) else ""
            specs = [str(q.spec) if q is not None and q.mode != "off" else "" for q in (module.input_quantizer, module.output_quantizer)]
            off = module.input_quantizer is not None and module.input_quantizer.mode == "off" and not specs[0]
            why = "no calibration data reached it" if off else f"inside '{leaf}', which cannot be traced" if leaf != "model" else ""
            status = "integer" if weight and specs[0] else "weight" if weight else "float"
            rows.append(Row(name, type(module.layer).__name__.removeprefix("Q"), status, weight, *specs, why=why))
        elif quantized_layer(type(module)):
            rows.append(Row(name, type(module).__name__, "float", why="no rule asks for its weight"))
    return rows

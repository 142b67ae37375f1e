"""The seven styles of docs/architecture.md, from the model as written to a frozen one, and its table."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import STYLES, image, sqnr
from torch import nn

import lowbit
from lowbit import preset
from lowbit.graph.run import flat_tensors

W, A = "int8/channel", "uint8+zp/tensor"
DATA = "replace the branch on data by torch.where"
ONLY = "cannot be traced; only the layers inside it are quantized"
# every row: name, operation, runs as, weight, inputs, output, why, what to do
TABLES: dict[str, list[tuple[str, ...]]] = {
    "functional relu and residual add": [
        ("a", "Conv2d", "integer", W, A, A, "", ""),
        ("relu", "relu", "integer", "", "", A, "part of 'a'", ""),
        ("b", "Conv2d", "integer", W, A, A, "", ""),
        ("relu#2", "relu", "integer", "", "", A, "part of 'b'", ""),
        ("c", "Conv2d", "integer", W, A, A, "", ""),
        ("add", "add", "integer", "", A, A, "", ""),
        ("relu#3", "relu", "integer", "", "", A, "part of 'add'", ""),
    ],
    "one ReLU used twice": [
        ("a", "Conv2d", "integer", W, A, A, "", ""),
        ("relu", "ReLU", "integer", "", "", A, "part of 'a'", ""),
        ("b", "Conv2d", "integer", W, A, A, "", ""),
        ("relu#2", "ReLU", "integer", "", "", A, "part of 'b'", ""),
    ],
    "one Conv2d used twice": [
        ("a", "Conv2d", "integer", W, A, A, "", ""),
        ("relu", "relu", "integer", "", "", A, "part of 'a'", ""),
        ("b", "Conv2d", "integer", W, A, A, "", ""),
        ("relu#2", "relu", "integer", "", "", A, "part of 'b'", ""),
        ("b#2", "Conv2d", "integer", W, A, A, "", ""),
    ],
    "branch on a shape": [
        ("a", "Conv2d", "integer", W, A, A, "", ""),
        ("relu", "relu", "integer", "", "", A, "part of 'a'", ""),
        ("b", "Conv2d", "integer", W, A, A, "", ""),
    ],
    "branch on data at the top": [
        ("model", "DataBranch", "float", "", "", "float", ONLY, DATA),
        ("a", "Conv2d", "integer", W, A, A, "inside the model, which cannot be traced", ""),
        ("b", "Conv2d", "integer", W, A, A, "inside the model, which cannot be traced", ""),
    ],
    "branch on data inside": [
        ("stem", "Conv2d", "integer", W, A, A, "", ""),
        ("relu", "relu", "integer", "", "", A, "part of 'stem'", ""),
        ("inner", "DataBranch", "float", "", "", A, ONLY, DATA),
        ("adaptive_avg_pool2d", "adaptive_avg_pool2d", "integer", "", A, A, "", ""),
        ("head", "Linear", "integer", W, A, "float", "", ""),
        ("inner.a", "Conv2d", "integer", W, A, A, "inside 'inner', which cannot be traced", ""),
        ("inner.b", "Conv2d", "integer", W, A, A, "inside 'inner', which cannot be traced", ""),
    ],
    "dict output": [
        ("a", "Conv2d", "integer", W, A, A, "", ""),
        ("relu", "relu", "integer", "", "", A, "part of 'a'", ""),
        ("adaptive_avg_pool2d", "adaptive_avg_pool2d", "integer", "", A, A, "", ""),
        ("b", "Linear", "integer", W, A, "float", "", ""),
    ],
    "functional weight": [
        ("w_conv2d", "Conv2d", "integer", W, A, A, "", ""),
        ("relu", "relu", "integer", "", "", A, "part of 'w_conv2d'", ""),
        ("adaptive_avg_pool2d", "adaptive_avg_pool2d", "integer", "", A, A, "", ""),
        ("v_linear", "Linear", "integer", W, A, "float", "", ""),
    ],
}
NOTES = {
    "branch on a shape": [("", "a branch on a shape was taken as True, as for the example input")],
    "branch on data at the top": [
        ("", "the whole model is called as it stands, for it cannot be traced: the flow depends on the data")
    ],
    "branch on data inside": [
        ("inner", "called as it stands, for it cannot be traced: the flow depends on the data")
    ],
}


@pytest.mark.parametrize("style", STYLES)
def test_quantizing_as_written(style: str) -> None:
    model, x = STYLES[style]().train(), image(32)
    state, modules = copy.deepcopy(model.state_dict()), [id(m) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]

    q = lowbit.quantize(model, "w8a8", calibration=[x])

    assert model.training
    assert [id(m) for m in model.modules()] == modules
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert not q.training
    assert q.frozen
    fresh = image(32)
    with torch.no_grad():
        want, got = model.eval()(fresh), q(fresh)
        assert type(got) is type(want)
        assert sqnr(want, got) > 20
        assert sqnr(want, got) < 100, "it is quantized"
        assert [t.shape for t in flat_tensors(model(image(3)))] == [
            t.shape for t in flat_tensors(q(image(3)))
        ]


@pytest.mark.parametrize("style", STYLES)
def test_the_table_tells_the_truth(style: str) -> None:
    coverage = lowbit.quantize(STYLES[style](), "w8a8", calibration=[image(32)]).coverage()
    rows = [(r.name, r.op, r.status, r.weight, r.inputs, r.output, r.why, r.cure) for r in coverage.rows]
    assert rows == TABLES[style]
    assert [(n.name, n.text) for n in coverage.notes] == NOTES.get(style, [])


@pytest.mark.parametrize("recipe", ["w8", "w4a8", "w4", "fp16"])
@pytest.mark.parametrize("style", STYLES)
def test_every_preset(style: str, recipe: str) -> None:
    model, x = STYLES[style](), image(32)
    q = lowbit.quantize(model, recipe, calibration=[x])
    assert sqnr(model.eval()(x), q(x)) > (12 if "4" in recipe else 30)


@pytest.mark.parametrize("style", STYLES)
def test_no_float_copy_of_a_weight_is_left(style: str) -> None:
    model = STYLES[style]()
    q = lowbit.quantize(model, "w8a8", calibration=[image()])
    sizes = {p.numel() for p in model.parameters() if p.ndim > 1}
    floats = [n for n, t in q.state_dict().items() if t.is_floating_point() and t.numel() in sizes]
    assert floats == []
    assert {n: p.dtype for n, p in q.named_parameters() if p.ndim > 1} == {}


def test_a_leaf_named_model_is_no_whole_model() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = STYLES["branch on data at the top"](), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.model(x))

    q = lowbit.quantize(Wrapped(), preset("w8a8"), calibration=[image()])
    assert [row.name for row in q.coverage().rows] == ["model", "head", "model.a", "model.b"]

"""Ranges found at run time: against brute force, against ONNX Runtime, through files and training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Fn
from torch import Tensor, nn

import lowbit
from lowbit import (
    DYNAMIC8,
    INT8,
    UINT8,
    LowbitError,
    PerChannel,
    PerTensor,
    PerToken,
    QuantSpec,
    Recipe,
    Rule,
)
from lowbit.cli import main
from lowbit.graph.ops import kind_of
from lowbit.nn.dynamic import DynamicQuantizer
from lowbit.training.stages import OFF, enter, targets_of

WHOLE = replace(DYNAMIC8, granularity=PerTensor())
SIGNED = QuantSpec(bits=8, granularity=PerToken(), dynamic=True)
FOUR = replace(DYNAMIC8, bits=4)
X = torch.randn(6, 7, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 7)[:, None]


def of(activation: QuantSpec, weight: Any = INT8) -> Recipe:
    return Recipe(rules=(Rule(weight=weight, activation=activation),))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8)).eval()


def by_hand(row: np.ndarray[Any, Any], spec: QuantSpec) -> np.ndarray[Any, Any]:
    """One token in numpy, in float32."""
    f = np.float32
    lo, hi = min(row.min(), f(0)), max(row.max(), f(0))
    if spec.symmetric:
        scale, zero = max(hi / f(spec.qmax), lo / f(spec.qmin)), f(0)
    else:
        scale = (hi - lo) / f(spec.qmax - spec.qmin)
        zero = np.rint(spec.qmin - lo / scale) if scale else f(0)
    if not scale:
        return row * 0
    return (np.clip(np.rint(row / scale) + zero, spec.qmin, spec.qmax) - zero) * scale


TENSORS = {
    "sequences": X,
    "rows": X[0],
    "one token": X[0, 0],
    "a batch of one": X[:1],
    "above zero": X.abs() + 3,
    "below zero": -X.abs() - 3,
    "zeros among them": torch.cat([X[0], torch.zeros(2, 16)]),
    "four axes": X.reshape(2, 3, 7, 16),
}


@pytest.mark.parametrize("spec", [DYNAMIC8, SIGNED, FOUR], ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_each_token_as_by_hand(name: str, spec: QuantSpec) -> None:
    x = TENSORS[name]
    want = np.stack([by_hand(row, spec) for row in x.reshape(-1, 16).numpy()])
    quantizer = DynamicQuantizer(spec)
    assert torch.equal(quantizer(x), torch.from_numpy(want).reshape(x.shape))
    assert torch.equal(quantizer.quantize(x).dequantize(), quantizer(x))


def test_nothing_outside_of_its_token_matters() -> None:
    broken = X.clone()
    broken[2, 3, 4] = torch.nan
    found, want = DynamicQuantizer(DYNAMIC8)(broken), DynamicQuantizer(DYNAMIC8)(X)
    assert found[2, 3].isnan().all()
    found[2, 3] = want[2, 3]
    assert torch.equal(found, want)
    assert DynamicQuantizer(DYNAMIC8)(X[:0]).shape == (0, 7, 16)


@pytest.mark.parametrize("name", [n for n in TENSORS if n != "one token"])
def test_the_whole_tensor_as_onnx_runtime_does_it(name: str) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"])
    ends = [
        [onnx.helper.make_empty_tensor_value_info(n) for n in names]
        for names in (("x",), ("codes", "scale", "zero"))
    ]
    ends[0][0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    file = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", *ends), opset_imports=[onnx.helper.make_opsetid("", 21)]
    )
    file.ir_version = 10
    session = ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    codes, scale, zero = session.run(None, {"x": TENSORS[name].numpy()})
    found = DynamicQuantizer(WHOLE).quantize(TENSORS[name])
    assert np.array_equal(found.codes.numpy(), codes)
    assert found.scale.item() == scale
    assert found.zero_point is not None
    assert found.zero_point.item() == zero


# --- files


WEIGHTS = {
    "channel": INT8,
    "tensor": replace(INT8, granularity=PerTensor()),
    "4 bits": replace(INT8, bits=4),
    "ternary": "ternary",
}


@pytest.mark.parametrize(("weight", "spec"), [*((w, DYNAMIC8) for w in WEIGHTS), ("channel", WHOLE)], ids=str)
def test_a_layer_in_a_file_is_exact(weight: str, spec: QuantSpec, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 8, bias=weight == "channel"))
    q = lowbit.quantize(model, of(spec, WEIGHTS[weight]), example_inputs=X)
    file = lowbit.export.onnx(q, tmp_path / "m.onnx", dynamic={"input": (1,)})
    ragged = [X, X[:1], X[:, :3], X[:1, :1]]
    parity = lowbit.verify(q, file, ragged)
    assert parity.exact, str(parity)
    assert parity.layers[0].codes == sum(x.numel() for x in ragged)
    assert parity.simulation_output_max <= 1e-5 * parity.output_peak
    operators = [n.op_type for n in pytest.importorskip("onnx").load(file).graph.node]
    assert operators.count("MatMulInteger") == 1
    assert ("DynamicQuantizeLinear" in operators) == (spec == WHOLE)
    assert "DequantizeLinear" not in operators


def test_rows_in_a_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    q = lowbit.quantize(nn.Sequential(nn.Linear(16, 8)), of(FOUR), example_inputs=X[0])
    assert lowbit.verify(q, lowbit.export.onnx(q, tmp_path / "m.onnx"), [X[0], X[1, :1]]).exact


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "groups", "static too"])
def test_networks_in_files(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    groups = lowbit.preset("w4a8-dynamic", weight_granularity=8)
    own: dict[str, Recipe] = {
        "groups": Recipe(rules=(groups.rules[-1],)),
        "static too": Recipe(rules=(Rule(match="0", weight=INT8, activation=UINT8), *of(DYNAMIC8).rules)),
    }
    q = lowbit.quantize(network(), own.get(recipe, recipe), [X])
    file = lowbit.export.onnx(q, tmp_path / "m.onnx", dynamic={"input": (1,)})
    parity = lowbit.verify(q, file, [X, X[:1, :2]])
    assert parity.ok
    assert parity.output_max <= 1e-5 * parity.output_peak, "operations in float come between"
    assert len(parity.layers) == 2
    assert parity.simulation_output_max <= 1e-3 * parity.output_peak


class Untraceable(nn.Module):
    """fx calls it with something that is no tensor; torch's exporter does not mind."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(type(x))
        return self.fc(x)


def test_layers_that_no_graph_reaches(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Linear(16, 16), Untraceable(), nn.Linear(16, 5)).eval()
    q = lowbit.quantize(model, "w8a8-dynamic", example_inputs=X)
    row = q.coverage()["1.fc"]
    assert (row.status, row.inputs) == ("integer", "uint8+zp/token/dynamic")
    assert lowbit.verify(q, lowbit.export.onnx(q, tmp_path / "m.onnx"), [X]).ok
    file = lowbit.save(q, tmp_path / "m.safetensors")
    assert torch.equal(lowbit.load(file, model)(X), q(X))


def test_a_float_layer_reads_what_was_rounded(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    q = lowbit.quantize(network(), of(DYNAMIC8, None), example_inputs=X)
    with torch.no_grad():
        assert not torch.equal(q(X), network()(X))
    assert lowbit.verify(q, lowbit.export.onnx(q, tmp_path / "m.onnx"), [X]).ok


REFUSED = {
    "no zero point": (SIGNED, "'activation_quantizers.* has no kernel, .* use signed=False, symmetric=False"),
    "4 bits, whole": (replace(WHOLE, bits=4), "DynamicQuantizeLinear makes 8 bits, not 4; use 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_onnx_has_no_form_for(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    spec, message = REFUSED[name]
    q = lowbit.quantize(network(), of(spec), example_inputs=X)
    with pytest.raises(LowbitError, match=message):
        lowbit.export.onnx(q, tmp_path / "m.onnx")


def test_hardware_has_no_such_ranges(tmp_path: Path) -> None:
    q = lowbit.quantize(nn.Sequential(nn.Linear(16, 8)), of(DYNAMIC8), example_inputs=X[0])
    with pytest.raises(LowbitError, match=r"token/dynamic is not fixed point, .* a recipe such as 'fixed8'"):
        lowbit.export.verilog(q, tmp_path / "v")


# --- where it stands


def attention(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    q, k, v = m.q(y), m.k(y), m.v(y)
    return m.out((q @ k.transpose(1, 2)).softmax(-1) @ v) + x


def test_layers_that_read_one_tensor_share_its_codes_and_the_rest_stays_in_float() -> None:
    model = Fn(attention, norm=nn.LayerNorm(16), **{n: nn.Linear(16, 16) for n in ("q", "k", "v", "out")})
    q = lowbit.quantize(model, "w8a8-dynamic", example_inputs=X)
    assert sum(kind_of(n) == "quantizer" for n in q.graph.graph.nodes) == 2
    coverage = q.coverage()
    assert {coverage[n].status for n in ("q", "k", "v", "out")} == {"integer"}
    assert {coverage[n].inputs for n in ("q", "k", "v", "out")} == {"uint8+zp/token/dynamic"}
    for name in ("matmul", "matmul#2", "add"):
        assert coverage[name].status == "float"
    assert "found at run time" in coverage["matmul"].why
    assert coverage["matmul"].cure == "Rule(match='matmul', activation=UINT8)"


def test_other_layers_keep_their_inputs_in_float() -> None:
    model = nn.Sequential(nn.Conv1d(7, 4, 3), nn.ReLU(), nn.Linear(14, 3))
    q = lowbit.quantize(model, of(DYNAMIC8), example_inputs=X)
    row = q.coverage()["0"]
    assert (row.status, row.cure) == ("weight", "Rule(match='0', activation=UINT8)")
    assert q.coverage()["2"].status == "integer"
    rows = lowbit.quantize(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)), of(DYNAMIC8),
                           example_inputs=X).coverage()  # fmt: skip
    assert (rows["0"].status, rows["0"].output) == ("integer", "float"), "its range is known only afterwards"
    assert rows["1"].status == "float"


def test_groups_of_a_weight_leave_no_sum_of_integers() -> None:
    row = lowbit.quantize(network(), of(DYNAMIC8, replace(INT8, granularity=lowbit.PerGroup(1, 8))),
                          example_inputs=X).coverage()["0"]  # fmt: skip
    assert (row.status, row.inputs) == ("weight", "uint8+zp/token/dynamic")
    assert row.why == "the scales of its weight do not leave a sum of integers"


# --- no data, checkpoints, training


def test_it_needs_no_data(tmp_path: Path) -> None:
    q = lowbit.quantize(network(), "w8a8-dynamic", example_inputs=X)
    assert torch.equal(
        q(X), lowbit.quantize(network(), replace(q.recipe, refine=()), [torch.zeros(1, 7, 16)])(X)
    )
    with torch.no_grad():
        assert (q(X) - network()(X)).norm() < 0.01 * network()(X).norm()
    script = tmp_path / "net.py"
    script.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(16, 8))\n")
    given = ["--recipe", "w8a8-dynamic", "--input-shape", "2,16", "-o", str(tmp_path / "m.safetensors")]
    assert main(["quantize", f"{script}:net", *given]) == 0


def test_checkpoints_and_states_keep_it(tmp_path: Path) -> None:
    q = lowbit.quantize(network(), "w4a8-dynamic", [X])
    again = lowbit.load(lowbit.save(q, tmp_path / "m.safetensors"), network())
    assert torch.equal(again(X), q(X))
    assert str(again.coverage()) == str(q.coverage())
    trained = lowbit.calibrate(lowbit.prepare(network(), "w8a8-dynamic", X), [X])
    other = lowbit.prepare(network(), "w8a8-dynamic", X)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(X), trained(X))


def test_gradients_pass_straight_through_and_weights_learn() -> None:
    x = X.clone().requires_grad_()
    (DynamicQuantizer(DYNAMIC8)(x) * X).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, X)
    q = lowbit.calibrate(lowbit.prepare(network(), "w4a8-dynamic", X), [X]).train()
    optimizer = torch.optim.Adam(q.parameters(), 1e-2)
    target, losses = torch.randn(6, 7, 8, generator=torch.Generator().manual_seed(1)), []
    for _ in range(20):
        loss = (q(X) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.allclose(lowbit.freeze(q)(X), q(X))


def test_falling_bits_leave_it_alone() -> None:
    q = lowbit.calibrate(lowbit.prepare(network(), "w4a8-dynamic", X), [X])
    targets, found = targets_of(q.graph), [m for m in q.graph.modules() if isinstance(m, DynamicQuantizer)]
    enter(q.graph, targets, OFF)
    assert torch.allclose(q(X), network()(X), atol=1e-6)
    assert all(path.endswith("weight_quantizer") for path in enter(q.graph, targets, 6))
    assert {(m.spec, m.mode) for m in found} == {(DYNAMIC8, "quantize")}


def test_what_reads_models_reads_these() -> None:
    q = lowbit.quantize(network(), "w8a8-dynamic", [X])
    assert lowbit.compare(network(), q, [X])
    assert lowbit.advise(network(), q, [X]) is not None
    assert q.cost().layers[0].input_bits == 8
    assert str(q.compile_kernels())
    prepared = lowbit.prepare(network(), "w8a8-dynamic", X)
    assert {site.kind for site in lowbit.search.sensitivity(prepared, [X], bits=(8, 4))} == {"weight"}


# --- specs


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "tokens at rest": (lambda: QuantSpec(bits=8, granularity=PerToken()), "goes with dynamic=True"),
    "channels": (lambda: QuantSpec(bits=8, granularity=PerChannel(1), dynamic=True), "not for each channel"),
    "powers of two": (lambda: replace(DYNAMIC8, scale="pow2"), "is for plain codes of at most 8"),
    "16 bits": (lambda: replace(DYNAMIC8, bits=16), "dynamic=True is for plain codes of at most 8 bits"),
    "half": (lambda: QuantSpec(bits=16, kind="float", dynamic=True), "leave dynamic and PerToken"),
    "no choice": (lambda: replace(DYNAMIC8, dynamic="yes"), "dynamic='yes' is unknown"),
    "a weight": (lambda: Rule(weight=DYNAMIC8), "weight has dynamic=True, and the range"),
    "few bits": (lambda: lowbit.preset("w8a4-dynamic"), "no preset is named 'w8a4-dynamic'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_specs_that_are_refused(name: str) -> None:
    build, message = BAD[name]
    with pytest.raises(LowbitError, match=message):
        build()


def test_specs_as_data() -> None:
    for spec in (DYNAMIC8, WHOLE, SIGNED):
        assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert str(SIGNED) == "int8/token/dynamic"
    assert Recipe.from_dict({"rules": [{"activation": "dynamic8"}]}) == of(DYNAMIC8, None)
    assert not lowbit.preset("w8a8-dynamic").calibrates
    assert lowbit.preset("w8a8-dynamic").quantizes_activations

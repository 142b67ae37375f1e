"""From training to a file: the exported model is the trained one, code for code."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import Fn, conv, settle, sqnr
from torch import Tensor, fx, nn

import lowbit
from lowbit import INT8, UINT8, PerChannel, QuantSpec, Recipe, Rule, preset, runtime
from lowbit.core.estimators import estimators
from lowbit.graph.inputs import Inputs
from lowbit.graph.ops import kind_of, module_of
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.reference import run_on_codes

X = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """A block with a depthwise convolution, its shortcut, and a strided layer, behind BatchNorm each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = conv(3, 8, bias=False), nn.BatchNorm2d(8)
        self.a, self.bn1 = conv(8, 8, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn2 = conv(8, 8, groups=8), nn.BatchNorm2d(8)
        self.c, self.bn3 = nn.Conv2d(8, 12, 1, stride=2), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn2(self.b(F.relu(self.bn1(self.a(x))))) + x)
        return self.fc(F.max_pool2d(F.relu(self.bn3(self.c(x))), 2).mean((2, 3)))


def trained(model: nn.Module, recipe: str | Recipe, steps: int = 3) -> QuantizedModel:
    q = lowbit.prepare(model, recipe, X)
    lowbit.calibrate(q, [X])
    optimizer = torch.optim.SGD(q.train().parameters(), lr=0.02, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(q(X), torch.arange(16) % 5).backward()
        optimizer.step()
    return q.eval()


def activations(q: nn.Module) -> dict[str, Quantizer]:
    return {n: m for n, m in q.named_modules() if isinstance(m, Quantizer) and "weight" not in n}


# --- every estimator, to the last bit


RUNS = [(name, bits) for name in estimators.names() for bits in ("w8a8", "w4a4", "w1a1", "ternary")]


@pytest.mark.parametrize(
    ("estimator", "recipe"), [r for r in RUNS if r[1] == "w1a1" or not estimators.get(r[0]).one_bit]
)
def test_freezing_changes_no_bit(estimator: str, recipe: str) -> None:
    """Without biases, which integer kernels round, and with BatchNorm folded before."""
    torch.manual_seed(0)
    model = Fn(
        lambda m, x: m.fc(F.relu(m.b(y := F.relu(m.a(x))) + y).mean((2, 3))),
        a=conv(3, 8, bias=False),
        b=conv(8, 8, bias=False),
        fc=nn.Linear(8, 5, bias=False),
    )
    q = trained(model, replace(preset(recipe, estimator=estimator), fold_bn="before"), 2)
    start = trained(model, replace(preset(recipe, estimator=estimator), fold_bn="before"), 0)
    assert sqnr(start(X), q(X)) < 60, "it was trained"
    want = q(X)
    codes = {n: m.qweight().codes for n, m in q.named_modules() if isinstance(m, QLayer)}
    lowbit.freeze(q)
    assert torch.equal(q(X), want)
    for name, layer in q.named_modules():
        if isinstance(layer, QLayer):
            assert torch.equal(layer.qweight().codes, codes[name])
    assert not any(n.endswith(("scale", "zero_point")) for n, _ in q.named_parameters())


# --- the file


ASYMMETRIC = Recipe(
    rules=(
        Rule(match="role:first", weight=INT8, activation=UINT8, estimator="lsq_plus"),
        Rule(
            match="role:layer",
            weight=QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerChannel(0)),
            activation=replace(UINT8, bits=5),
            estimator="lsq_plus",
        ),
        Rule(activation=UINT8, estimator="lsq_plus"),
    ),
    fold_bn="after",
)
PER_TENSOR = Recipe(
    rules=(
        Rule(match="role:layer", weight=QuantSpec(bits=4), activation=replace(UINT8, bits=4)),
        Rule(activation=UINT8, estimator="pact"),
    ),
    fold_bn="after",
)
# odd codes beside activations of 8 bits, whose kernels take the codes as they are, and of fewer
MID_RISE = Recipe(
    rules=(
        Rule(
            match="role:first",
            weight=QuantSpec(bits=4, granularity=PerChannel(0), mid_rise=True),
            activation=UINT8,
        ),
        Rule(
            match="role:layer",
            weight=QuantSpec(bits=1, granularity=PerChannel(0), mid_rise=True),
            activation=replace(UINT8, bits=4),
        ),
        Rule(activation=UINT8),
    ),
    fold_bn="after",
)
RECIPES: dict[str, str | Recipe] = {
    "odd codes": MID_RISE,
    "w8a8": "w8a8",
    "w4a4": "w4a4",
    "w2a2": "w2a2",
    "learned zero points": ASYMMETRIC,
    "one scale for all": PER_TENSOR,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[QuantizedModel, Path]]:
    """Trained, frozen and written, once for each recipe."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def make(name: str) -> tuple[QuantizedModel, Path]:
        torch.manual_seed(0)
        q = lowbit.freeze(trained(settle(Residual(), X), RECIPES[name]))
        return q, lowbit.export.onnx(q, folder / f"{name}.onnx")

    return make


Exported = Callable[[str], tuple[QuantizedModel, Path]]


def run(path: Path, x: Tensor) -> Tensor:
    """The file as a user runs it: reading codes in between keeps the runtime from merging what is around."""
    session = runtime.session(path)
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("name", RECIPES)
def test_every_code_of_the_file_is_that_of_the_trained_model(name: str, exported: Exported) -> None:
    q, path = exported(name)
    other = torch.randn(7, 3, 12, 12)
    parity = lowbit.verify(q, path, [X, other])
    assert parity.exact, str(parity)
    assert len(parity.layers) == len(activations(q))
    assert torch.equal(run(path, other), run_on_codes(q.graph, Inputs.of(other)))


@pytest.mark.parametrize("name", ["w4a4", "w2a2"])
def test_two_roundings_in_a_row_are_not_merged(name: str, exported: Exported) -> None:
    """8 bits, then fewer behind them: the oracle rounds twice, and rounding once would give other numbers."""
    q, path = exported(name)
    x = torch.randn(64, 3, 12, 12)
    once = copy.deepcopy(q)
    (narrow,) = [n for n in once.graph.graph.nodes if is_quantizer(n) and is_quantizer(n.args[0])]
    assert module_of(narrow.args[0]).spec.bits == 8
    assert module_of(narrow).spec.bits == int(name[3])
    narrow.args = narrow.args[0].args
    want = run_on_codes(q.graph, Inputs.of(x))
    assert not torch.equal(run_on_codes(once.graph, Inputs.of(x)), want), "the data tells the two apart"
    assert torch.equal(run(path, x), want)


def is_quantizer(node: fx.Node) -> bool:
    return kind_of(node) == "quantizer"


def test_integer_kernels_run_what_was_trained(exported: Exported, tmp_path: Path) -> None:
    """The graph that ONNX Runtime really runs at w4a4."""
    _, path = exported("w4a4")
    onnx = pytest.importorskip("onnx")
    runtime.session(path, optimized_to=tmp_path / "optimized.onnx")
    found = {node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node}
    assert {"QLinearConv", "QLinearAdd", "QGemm", "QLinearGlobalAveragePool"} <= found
    assert not found & {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Relu"}


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4", "w2a2"])
def test_a_saved_model_is_the_frozen_one(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = lowbit.freeze(trained(settle(Residual(), X), recipe))
    again = lowbit.load(lowbit.save(q, tmp_path / "m.safetensors"), Residual())
    assert torch.equal(again(X), q(X))
    assert again.recipe == q.recipe
    assert set(again.state_dict()) == set(q.state_dict())

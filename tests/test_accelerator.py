"""The whole path on a GPU: what the same calls give on the CPU, from data that stays on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import conv, settle, sqnr
from torch import Tensor, nn

import lowbit
from lowbit import Recipe, Rule, search, tensor_networks
from lowbit.core.estimators import estimators
from lowbit.core.observers import observers
from lowbit.hardware.widths import learn_widths

if not torch.accelerator.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

DEVICE = torch.accelerator.current_accelerator()
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(64, 3, 8, 8, generator=DRAW)
Y = torch.randint(0, 5, (64,), generator=DRAW)
BATCHES = [(X[:32], Y[:32]), (X[32:], Y[32:])]
PRESETS = ("w8a8", "w8", "w4a8", "w4", "w4a4", "w2a2", "ternary", "b1.58", "w1", "fixed8", "fixed6", "fp16")


class Block(nn.Module):
    """x + f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(8, 8, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(8, 8, groups=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), Block(), nn.MaxPool2d(2), nn.Flatten())
    return settle(nn.Sequential(*layers, nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 5)), X)


def there(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(DEVICE)


def assert_close(here: nn.Module, far: nn.Module, decibels: float = 30.0) -> None:
    with torch.no_grad():
        assert sqnr(here(X), far(X.to(DEVICE)).cpu()) > decibels


@pytest.mark.parametrize("name", PRESETS)
def test_quantize(name: str) -> None:
    model = network()
    q = lowbit.quantize(there(model), name, calibration=BATCHES)
    assert {t.device.type for t in q.state_dict().values()} == {DEVICE.type}
    # a value at the middle between two codes may round either way, which few bits show
    assert_close(
        lowbit.quantize(model, name, calibration=BATCHES), q, 30.0 if "8" in name or "16" in name else 12.0
    )


@pytest.mark.parametrize("observer", sorted(observers.names()))
def test_observers(observer: str) -> None:
    recipe, model = lowbit.preset("w8a8", observer=observer), network()
    assert_close(
        lowbit.quantize(model, recipe, calibration=BATCHES), lowbit.quantize(there(model), recipe, BATCHES)
    )


@pytest.mark.parametrize("estimator", sorted(estimators.names()))
def test_training(estimator: str, tmp_path: Path) -> None:
    recipe = lowbit.preset("w1a1" if estimators.get(estimator).one_bit else "w4a4", estimator=estimator)
    model = there(network())
    q = lowbit.calibrate(lowbit.prepare(model, recipe, X), BATCHES)
    run = lowbit.Trainer(q, BATCHES, epochs=2, val=BATCHES, teacher=model, out=tmp_path / "run").fit()
    assert torch.isfinite(torch.tensor([e.loss for e in run.epochs])).all()
    again = lowbit.calibrate(lowbit.prepare(model, recipe, X), BATCHES)
    lowbit.Trainer(again, BATCHES, epochs=2, val=BATCHES, teacher=model, out=tmp_path / "run").fit()
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), q.state_dict().values(), strict=True)
    )
    assert torch.isfinite(lowbit.freeze(q)(X.to(DEVICE))).all()


def test_training_of_bits_in_stages(tmp_path: Path) -> None:
    model = there(network())
    q = lowbit.calibrate(lowbit.prepare(model, "w2a2", X), BATCHES)
    lowbit.Trainer(q, BATCHES, epochs=2, bits=(8, 2), bf16=True, channels_last=True, reestimate_bn=2).fit()
    assert torch.isfinite(lowbit.freeze(q)(X.to(DEVICE))).all()


def test_reshapes_of_weights() -> None:
    model = there(network())
    for reshape in ("standardize", "clip", "recu"):
        recipe = Recipe(rules=(Rule(weight="binary", activation="sign", reshape=reshape),), fold_bn="after")
        q = lowbit.calibrate(lowbit.prepare(model, recipe, X), BATCHES)
        lowbit.Trainer(q, BATCHES, epochs=1).fit()
        assert torch.isfinite(lowbit.freeze(q)(X.to(DEVICE))).all()


def test_search(tmp_path: Path) -> None:
    model = there(network())
    q = lowbit.calibrate(lowbit.prepare(model, "w8a8", X), BATCHES)
    table = search.sensitivity(q, BATCHES, bits=(8, 4, 2), out=tmp_path)
    found = search.allocate(table, search.Budget(average_bits=4))
    here = lowbit.calibrate(lowbit.prepare(network(), "w8a8", X), BATCHES)
    twin = search.sensitivity(here, BATCHES, bits=(8, 4, 2))
    for ours, theirs in zip(table, twin, strict=True):
        for a, b in zip(ours.probes, theirs.probes, strict=True):
            assert a.damage("loss") == pytest.approx(b.damage("loss"), rel=0.05, abs=1e-3)
    lowbit.quantize(model, found.recipe, calibration=BATCHES)


@pytest.mark.parametrize(
    "step", ["gptq", "adaround", "brecq", "bond_correct", "affine_correct", "bias_correct"]
)
def test_tensor_networks(step: str) -> None:
    small = tensor_networks.tensorize(there(network()), tensor_networks.TensorRule(), X).model
    q = lowbit.quantize(small, replace(lowbit.preset("w4a8"), refine=(step,)), calibration=BATCHES)
    with torch.no_grad():
        assert sqnr(small(X.to(DEVICE)), q(X.to(DEVICE))) > 5


def test_files(tmp_path: Path) -> None:
    q = lowbit.quantize(there(network()), "w8a8", calibration=BATCHES)
    onnx = lowbit.export.onnx(q, tmp_path / "model.onnx")
    assert lowbit.verify(q, onnx, X).ok
    back = lowbit.load(lowbit.save(q, tmp_path / "model.safetensors"), network())
    assert_close(back, q, 60.0)
    assert lowbit.compare(there(network()), q, BATCHES)


def test_bit_kernels() -> None:
    recipe = Recipe(rules=(Rule(weight="binary", activation="sign"),), fold_bn="after")
    q = lowbit.quantize(there(network()), recipe, calibration=BATCHES)
    ours = q.compile_kernels()
    assert_close(ours, q, 60.0)


def test_auto() -> None:
    def accuracy(model: nn.Module) -> float:
        return float((model(X.to(DEVICE)).argmax(1).cpu() == Y).float().mean())

    model = there(network())
    q = lowbit.quantize(model, "auto", BATCHES, metric=accuracy, max_drop=0.5, bits=4)
    assert accuracy(q) >= accuracy(model) - 0.5


def test_advice() -> None:
    model = there(network())
    assert lowbit.advise(model, lowbit.quantize(model, "w4a4", calibration=BATCHES), BATCHES)


def test_learned_widths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = [(torch.randn(32, 4), torch.randint(0, 3, (32,)))]
    q = lowbit.calibrate(lowbit.prepare(there(model), "fixed6", data[0][0]), data)
    assert len(learn_widths(q, data, data, epochs=2).points) == 2


def test_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(8, 6, 16)
    q = lowbit.quantize(there(layer), lowbit.preset("w4a8"), calibration=[x])
    with torch.no_grad():
        assert sqnr(layer(x), q(x.to(DEVICE)).cpu()) > 10

"""The state dict of a quantized model has the names that the author of the float model gave."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import STYLES, BatchNormNet, Fn, InvertedResidual, conv, image, settle, sqnr
from torch import Tensor, nn

import lowbit
from lowbit import preset
from lowbit.graph.names import author_name, graph_names
from lowbit.model import QuantizedModel
from lowbit.nn.quantizer import Quantizer


class Tied(nn.Module):
    """An embedding whose table is the weight of the last layer, by one Parameter or by a function."""

    def __init__(self, function: bool) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(10, 8), nn.Linear(8, 8)
        if not function:
            self.out = nn.Linear(8, 10, bias=False)
            self.out.weight = self.embed.weight
        self.function = function

    def forward(self, ids: Tensor) -> Tensor:
        y = F.relu(self.fc(self.embed(ids)))
        return F.linear(y, self.embed.weight) if self.function else self.out(y)


class Untraceable(nn.Module):
    """It looks at its data; its children have the names that lowbit's own modules have; one has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.graph, self.model = conv(3, 8), conv(8, 8), nn.Sequential(conv(8, 8))
        self.again = self.graph

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.layer(x))
        if y.mean() > 1e6:
            y = y * 0.5
        return self.again(self.model(F.relu(self.graph(y))))


class Inside(nn.Module):
    """The same inside a model that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Untraceable(), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.inner(x)))


class Idle(nn.Module):
    """It keeps a head for training and a buffer that its forward pass does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.auxiliary = conv(3, 8), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x))


def ids() -> Tensor:
    return torch.randint(0, 10, (4, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{name: (style, image) for name, style in STYLES.items()},
    "BatchNorm": (BatchNormNet, image),
    "inverted residual": (InvertedResidual, image),
    "tied layers": (lambda: Tied(False), ids),
    "tied by a function": (lambda: Tied(True), ids),
    "untraceable": (Untraceable, image),
    "untraceable inside": (Inside, image),
    "one weight in two functions": (
        lambda: Fn(
            lambda m, x: F.conv2d(F.conv2d(x, m.w, m.b), m.w, m.b, padding=1),
            w=nn.Parameter(torch.randn(3, 3, 3, 3) * 0.3),
            b=nn.Parameter(torch.randn(3)),
        ),
        image,
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)
OURS = ("scale", "zero_point", "unit")


@functools.cache
def _prepared(name: str) -> tuple[nn.Module, QuantizedModel, Tensor]:
    build, data = MODELS[name]
    x = data()
    model = build()
    model = settle(model, x) if x.is_floating_point() else model.eval()
    q = lowbit.prepare(model, replace(preset("w4a4"), equalize=False), x)
    lowbit.calibrate(q, [x])
    return model, q, x


def prepared(name: str) -> tuple[nn.Module, QuantizedModel, Tensor]:
    """The float model, the same with quantizers, calibrated, and a batch; copies, for tests write to them."""
    return copy.deepcopy(_prepared(name))


def perturbed(model: nn.Module) -> nn.Module:
    """Another checkpoint of the same model."""
    other = copy.deepcopy(model)
    for value in other.state_dict().values():
        if value.is_floating_point():
            value.mul_(1.3).add_(0.1 * torch.rand_like(value))
    return other


@every_model
def test_the_names_are_the_authors(name: str) -> None:
    model, q, _ = prepared(name)
    state, own = q.state_dict(), model.state_dict()
    added = set(state) - set(own)
    assert set(own) <= set(state)
    assert all(n.endswith(OURS) for n in added), added
    assert all(torch.equal(state[n], own[n]) for n in own)
    assert added or not q.graph.meta["leaves"]


@every_model
def test_a_float_checkpoint_loads_strictly(name: str) -> None:
    """And the model, its quantizers off, computes the float function of those weights."""
    model, q, x = prepared(name)
    other = perturbed(model)
    scales = {n: v.clone() for n, v in q.state_dict().items() if n.endswith(OURS)}
    state = other.state_dict()
    assert str(q.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert list(state) == list(other.state_dict()), "the caller's dict is left alone"
    assert all(torch.equal(q.state_dict()[n], v) for n, v in scales.items()), "scales stay"
    for module in q.modules():
        if isinstance(module, Quantizer):
            module.mode = "off"
    assert sqnr(other(x), q(x)) > 100
    assert sqnr(model(x), q(x)) < 60


@every_model
def test_every_name_leads_back(name: str) -> None:
    _, q, _ = prepared(name)
    for own in q.graph.state_dict():
        assert own in graph_names(q.graph, author_name(q.graph, own))


@every_model
def test_inside_another_module(name: str) -> None:
    """A detector holds a quantized backbone: its state goes out and comes back."""
    model, q, x = prepared(name)
    parent, q_state = nn.ModuleDict({"backbone": q, "other": nn.Linear(2, 2)}), q.state_dict()
    state = parent.state_dict()
    assert {n.removeprefix("backbone.") for n in state if n.startswith("backbone.")} == set(q_state)
    again = nn.ModuleDict({"backbone": prepared(name)[1], "other": nn.Linear(2, 2)})
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    again.load_state_dict(state, strict=True)
    assert all(torch.equal(again.state_dict()[n], state[n]) for n in state)
    assert sqnr(q(x), again["backbone"](x)) > 200
    floats = nn.ModuleDict({"backbone": perturbed(model), "other": nn.Linear(2, 2)})
    again.load_state_dict(floats.state_dict(), strict=True)


@every_model
def test_a_copy_has_its_own_names(name: str) -> None:
    _, q, _ = prepared(name)
    other = copy.deepcopy(q)
    assert list(other.state_dict()) == list(q.state_dict())
    other.load_state_dict({n: torch.zeros_like(v) for n, v in q.state_dict().items() if n[-5:] != "scale"})
    assert any(v.any() for v in q.state_dict().values())


def test_what_the_model_never_reads_is_passed_over() -> None:
    x = image()
    model = settle(Idle(), x)
    q = lowbit.prepare(model, "w8a8", x)
    idle = {"auxiliary.weight", "auxiliary.bias", "mean"}
    assert set(model.state_dict()) - set(q.state_dict()) == idle
    q.load_state_dict(perturbed(model).state_dict(), strict=True)


@pytest.mark.parametrize("change", ["one too many", "one too few"])
def test_a_checkpoint_of_another_model_is_refused(change: str) -> None:
    model, q, _ = prepared("BatchNorm")
    state = model.state_dict()
    if change == "one too many":
        state["c.weight"] = torch.ones(1)
    else:
        del state["a.weight"]
    with pytest.raises(RuntimeError, match="c.weight" if "c.weight" in state else "a.weight"):
        q.load_state_dict(state, strict=True)

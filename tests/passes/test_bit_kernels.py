"""Networks on bit kernels give the numbers of the integer reference, and say what stayed in float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit import LowbitError, PerTensor, Recipe, Rule
from lowbit.core.spec import BINARY, INT8, TERNARY, UINT8
from lowbit.graph.inputs import Inputs
from lowbit.model import KernelModel, QuantizedModel
from lowbit.nn.bit_layers import BitLayer
from lowbit.recipe import SPECS
from lowbit.reference import run_on_codes

ACTIVATIONS = {
    "sign": "sign",
    "bit": "bit",
    "2 bits": replace(UINT8, bits=2),
    "8 bits": UINT8,
    "signed 4 bits": replace(UINT8, bits=4, signed=True, symmetric=True),
    "ternary": replace(TERNARY, granularity=PerTensor()),
}
WEIGHTS = {
    "binary": BINARY,
    "ternary": TERNARY,
    "binary of a tensor": replace(BINARY, granularity=PerTensor()),
}


def inner(weight: object, activation: object) -> Recipe:
    """First and last layer at 8 bits."""
    edges = tuple(Rule(match=f"role:{role}", weight=INT8, activation=UINT8) for role in ("first", "last"))
    narrow = Rule(match="role:layer", weight=weight, activation=activation)  # type: ignore[arg-type]
    return Recipe(rules=(*edges, narrow, Rule(activation=UINT8)), fold_bn="after")


def chain(*inner_layers: nn.Module, channels: int = 12) -> nn.Module:
    first = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Hardtanh())
    return nn.Sequential(first, *inner_layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


def block(inputs: int, outputs: int, **options: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, **options), nn.BatchNorm2d(outputs), nn.Hardtanh())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: chain(block(12, 70, padding=1), block(70, 9), block(9, 12)),
    "pooling": lambda: chain(block(12, 8), nn.MaxPool2d(2), block(8, 8, padding=1), nn.MaxPool2d(3, 1, 1)),
    "stride, dilation": lambda: chain(block(12, 8, stride=2, padding=2), block(8, 6, dilation=2, padding=1)),
    "groups": lambda: chain(block(12, 8, groups=4), block(8, 8, groups=8, padding=1)),
    "relu": lambda: chain(nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False)),
    "dropout": lambda: chain(block(12, 8), nn.Dropout(), nn.Identity(), block(8, 8)),
}


class Residual(nn.Module):
    """A sum reads what a binary layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = block(3, 8, padding=1), block(8, 8, padding=1), block(8, 8, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.b(x + self.a(x))
        return self.fc(F.dropout(x, training=self.training).mean((2, 3)))


NETWORKS["residual"] = Residual


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 3, 12, 12)


def frozen(model: nn.Module, recipe: str | Recipe, data: Tensor, *, steps: int = 2) -> QuantizedModel:
    with torch.no_grad():
        model(data)  # statistics of BatchNorm
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    q = lowbit.prepare(model.eval(), recipe, data)
    lowbit.calibrate(q, data)
    if steps:
        classes = model(data).shape[1]
        lowbit.Trainer(q, [(data, torch.randint(0, classes, (len(data),)))] * steps).fit()
    return lowbit.freeze(q)


def follows(k: KernelModel, q: QuantizedModel, data: Tensor, *, close: float = 0.01) -> bool:
    """Whether outputs are the reference's, within a share of their peak.

    A code of 8 bits behind a sum is rounded in floats here, where the reference multiplies once: one in a
    hundred thousand may differ by one.
    """
    expected = run_on_codes(q.graph, Inputs.of(data))
    return torch.allclose(k(data), expected, atol=close * float(expected.abs().max()))


def swapped(model: KernelModel) -> int:
    return sum(isinstance(m, BitLayer) for m in model.graph.modules())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_pair_of_codes_follows_the_reference(weight: str, activation: str) -> None:
    data = images()
    q = frozen(NETWORKS["chain"](), inner(WEIGHTS[weight], ACTIVATIONS[activation]), data, steps=0)
    k = q.compile_kernels()
    assert swapped(k) == (0 if activation == "8 bits" else 3)
    assert follows(k, q, data)


@pytest.mark.parametrize("recipe", ["w1a1", "ternarya1", "w1a3"])
@pytest.mark.parametrize("network", NETWORKS)
def test_trained_networks_follow_the_reference(network: str, recipe: str) -> None:
    data = images()
    q = frozen(NETWORKS[network](), recipe, data)
    k = q.compile_kernels()
    assert swapped(k) == 2 + (network == "chain")
    for batch in (data, data[:1], data.contiguous(memory_format=torch.channels_last), images(3)):
        assert follows(k, q, batch)
        assert not k(batch).requires_grad


@pytest.mark.parametrize("weight", ["binary", "ternary"])
@pytest.mark.parametrize("activation", ["sign", "bit"])
def test_chains_of_bits_are_exact(activation: str, weight: str) -> None:
    """From the first layer on every bit is that of the reference: a wrong one would move the output."""
    data = images(40)
    act = nn.Hardtanh() if activation == "sign" else nn.ReLU()
    layers = [nn.Conv2d(3, 12, 3), act, nn.Conv2d(12, 70, 3), act, nn.Conv2d(70, 9, 3), act, nn.Flatten()]
    rules = (
        Rule(match="role:first", weight=INT8, activation=UINT8),
        Rule(match="role:last", weight=INT8, activation=SPECS[activation]),
        Rule(weight=WEIGHTS[weight], activation=SPECS[activation]),
    )
    q = frozen(nn.Sequential(*layers, nn.Linear(9 * 36, 5)), Recipe(rules=rules), data)
    k = q.compile_kernels()
    assert [s.runs_as.partition("> ")[2] for s in k.swaps[1:3]] == ["bits", "floats"]
    assert follows(k, q, data, close=1e-6)


def test_bits_go_from_layer_to_layer() -> None:
    """Conv, BatchNorm, Hardtanh and sign are one call; so is pooling of bits."""
    k = frozen(NETWORKS["pooling"](), "w1a1", images()).compile_kernels()
    assert [s.runs_as for s in k.swaps] == [
        "float",
        "sign x binary -> bits",
        "sign x binary -> floats",
        "float",
    ]
    calls = [
        type(k.graph.get_submodule(str(n.target))).__name__
        for n in k.graph.graph.nodes
        if n.op == "call_module"
    ]
    between = calls[calls.index("Pack") : calls.index("BitConv2d", calls.index("BitConv2d") + 1) + 1]
    assert between == ["Pack", "BitConv2d", "BitMaxPool2d", "BitConv2d"]
    assert "2 of 4 layers on bit kernels" in str(k)


def test_an_empty_batch() -> None:
    k = frozen(NETWORKS["chain"](), "w1a1", images()).compile_kernels()
    assert k(images(0)).shape == (0, 5)
    for recipe in ("w1a1", "w1", "ternarya8"):
        k = frozen(ChannelsLast(), recipe, images()).compile_kernels()
        assert k(images(0)).shape == (0, 4)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            block(3, 8),
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        )
        self.d = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.pad(self.a(x), (1, 1, 1, 1)))
        return self.d(self.c(F.hardtanh(x)).mean((2, 3)))


def test_what_cannot_be_swapped_is_said() -> None:
    data = images()
    q = frozen(Padded(), "w1a1", data)
    k = q.compile_kernels()
    reasons = {s.name: s.why for s in k.swaps}
    assert "neither binary nor ternary" in reasons["a.0"]
    assert reasons["b"] == "its signs are padded with zeros before it; give the layer that padding"
    assert reasons["c"] == "its padding is neither zeros nor given in numbers"
    expected = run_on_codes(q.graph, Inputs.of(data))
    assert torch.allclose(k(data), expected, atol=1e-5 * float(expected.abs().max()))
    floats = lowbit.quantize(nn.Conv2d(3, 3, 3), Recipe(rules=(Rule(weight=BINARY),)), data)
    assert "which convolutions sum faster in float" in floats.compile_kernels().swaps[0].why
    split = Recipe(rules=(Rule(weight=replace(TERNARY, split=True), activation=UINT8),))
    q = lowbit.quantize(nn.Linear(4, 3), split, torch.randn(5, 4))
    assert [s.why for s in q.compile_kernels().swaps] == ["each sign of its weight has a scale of its own"]


@pytest.mark.parametrize("activation", [None, UINT8])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_linear_layers_take_floats_and_bytes(weight: str, activation: Any) -> None:
    rule = Rule(weight=WEIGHTS[weight], activation=activation)
    data = torch.randn(7, 2, 131)
    model = nn.Sequential(nn.Linear(131, 37), nn.Tanh(), nn.Linear(37, 5, bias=False))
    q = lowbit.quantize(model, Recipe(rules=(rule,)), data)
    k = q.compile_kernels()
    shown = f"{'float' if activation is None else '8-bit codes'} x {weight.split(maxsplit=1)[0]} -> floats"
    assert [s.runs_as for s in k.swaps] == [shown, shown]
    assert torch.allclose(k(data), q(data), atol=1e-5 if activation is None else 0.01)


class ChannelsLast(nn.Module):
    """Linear layers over the last axis of images, as transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Linear(6, 16), nn.Linear(16, 12)
        self.d = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardtanh(self.a(x)).permute(0, 2, 3, 1)
        y = F.hardtanh(self.c(F.hardtanh(self.b(y))))
        return self.d(y.mean((1, 2)))


@pytest.mark.parametrize("recipe", ["w1a1", "ternarya8", "w1"])
def test_linear_layers_on_images(recipe: str) -> None:
    data = images()
    q = frozen(ChannelsLast(), recipe, data)
    k = q.compile_kernels()
    assert swapped(k) == 2
    assert follows(k, q, data)


def test_other_arguments_of_a_layer_are_kept() -> None:
    class Upsampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.a(x), output_size=[22, 22])

    q = lowbit.quantize(Upsampling(), "w8", images())
    x = images(2)
    found = q.compile_kernels()(x)
    assert found.shape == (2, 3, 22, 22)
    assert torch.allclose(found, q(x), atol=1e-5)


def test_signed_codes_of_one_bit_are_no_signs() -> None:
    rule = Rule(weight=BINARY, activation=replace(UINT8, bits=1, signed=True))
    q = lowbit.quantize(nn.Linear(9, 3), Recipe(rules=(rule,)), torch.randn(5, 9))
    k = q.compile_kernels()
    assert "use the spec 'sign' or 'bit'" in k.swaps[0].why
    assert torch.allclose(k(torch.ones(2, 9)), q(torch.ones(2, 9)), atol=1e-5)


def test_a_model_that_is_not_frozen() -> None:
    q = lowbit.prepare(nn.Linear(4, 3), "w8", torch.randn(2, 4))
    with pytest.raises(LowbitError, match=r"this model has float weights; call lowbit\.freeze\(q\)"):
        q.compile_kernels()


def test_the_model_itself_stays_as_it_was() -> None:
    data = images()
    q = frozen(NETWORKS["chain"](), "w1a1", data)
    before = q(data)
    q.compile_kernels()
    assert torch.equal(q(data), before)

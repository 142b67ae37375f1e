"""Programs on whole numbers against the float simulation, which is exact where sums are short."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit import LowbitError, PerChannel, QuantSpec, Recipe, Rule
from lowbit.hardware import Program, lower
from lowbit.model import QuantizedModel
from lowbit.nn.tensorized import TTLinear


class Mixed(nn.Module):
    """Convolutions with stride, dilation, groups and an addition, both poolings, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.down = nn.Conv2d(8, 4, (3, 1), stride=2, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Linear(4 * 3 * 4 + 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.first(x))))
        x = F.relu(x + self.inner(x))
        mean = F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1)
        return self.last(torch.cat([self.down(x).flatten(1), mean.flatten(1)], 1))


class Rows(nn.Module):
    """Conv1d, ReLU6, a transposition between Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.last = nn.Conv1d(3, 6, 3, stride=2), nn.Linear(6, 4), nn.Linear(4 * 3, 2)
        self.pool, self.act = nn.MaxPool1d(2), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.conv(x)))
        return self.last(torch.relu(self.mix(x.transpose(1, 2))).flatten(1))


class Twice(nn.Module):
    """One layer with a bias, called on two grids."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.inner(torch.relu(self.inner(x)))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.Hardtanh(), nn.Linear(8, 3))


def train() -> nn.Module:
    """A chain of small Linear layers with a bias of its own behind them."""
    return nn.Sequential(TTLinear((2, 3), (3, 2), ranks=2), nn.ReLU(), nn.Linear(6, 3))


NETWORKS = {
    "mlp": (mlp, (6,)),
    "mixed": (Mixed, (2, 16, 16)),
    "rows": (Rows, (3, 15)),
    "train": (train, (6,)),
    "twice": (Twice, (6,)),
}


def quantized(name: str, recipe: Any = "fixed6") -> tuple[QuantizedModel, Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    x = 2 * torch.randn(300, *shape)
    model = make()
    model(x)  # BatchNorm has seen something
    return lowbit.quantize(model.eval(), recipe, calibration=[x[:64]]), x


def with_modes(bits: int, **modes: Any) -> Recipe:
    """The recipe with other modes of rounding or overflow."""
    recipe = lowbit.preset(f"fixed{bits}")
    rule = recipe.rules[0]
    assert rule.activation is not None
    spec = QuantSpec(bits=bits, scale="pow2", **modes)
    return Recipe(rules=(Rule(weight=rule.weight, activation=spec, observer="minmax"),))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "recipe",
    [
        "fixed4",
        "fixed8",
        with_modes(6, rounding="half_up"),
        with_modes(6, rounding="floor"),
        with_modes(5, overflow="wrap"),
        with_modes(5, narrow=True),
    ],
    ids=["fixed4", "fixed8", "half_up", "floor", "wrap", "narrow"],
)
def test_equals_the_simulation(name: str, recipe: Any) -> None:
    q, x = quantized(name, recipe)
    program = lower(q)
    (codes,) = program.run(x)
    assert torch.equal(program.real([codes])[0].float(), q(x))


def test_sixteen_bits_are_exact_where_float32_is_not() -> None:
    q, x = quantized("mlp", "fixed16")
    program = lower(q)
    (got,) = program.real(program.run(x))
    assert not torch.equal(got.float(), q(x))
    assert torch.equal(got, in_float64(program, x))


def in_float64(program: Program, x: Tensor) -> Tensor:
    """The same network by float64 layers, which are exact up to 53 bits."""
    for step in program.steps:
        if step.op == "input":
            x = x.double()
        elif step.weight is not None:
            bias = (
                None
                if step.bias is None
                else torch.ldexp(step.bias.codes.double(), torch.tensor(-step.bias.type.fraction))
            )
            x = F.linear(
                x, torch.ldexp(step.weight.codes.double(), torch.tensor(-step.weight.type.fraction)), bias
            )
        elif step.op == "relu":
            x = x.relu()
        elif step.op == "clamp":
            x = x.clamp(*step.settings["ends"])
        if step.rounds:
            x = (x / step.type.scale).round().clamp(step.type.qmin, step.type.qmax) * step.type.scale
    return x


class Floats(TorchDispatchMode):
    """Remembers which operations have read or made floating point numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        tensors = [t for t in (*args, result) if isinstance(t, Tensor)]
        if any(t.is_floating_point() for t in tensors):
            self.seen.add(str(func))
        return result


@pytest.mark.parametrize("name", NETWORKS)
def test_no_float_is_left_behind_the_input(name: str) -> None:
    """A product with a scale is a shift."""
    q, x = quantized(name)
    program = lower(q)
    codes = torch.randint(-20, 20, x.shape)
    with Floats() as floats:
        program.run_codes([codes])
    assert floats.operations > 10
    assert not floats.seen


def test_types_are_those_that_hold_every_result() -> None:
    q, x = quantized("mixed", "fixed8")
    program = lower(q)
    ends: dict[str, tuple[int, int]] = {}

    def remember(step: Any, exact: Tensor, fraction: int) -> None:
        if step.op == "input":
            return
        assert fraction == step.fraction
        low, high = ends.get(step.name, (0, 0))
        ends[step.name] = min(low, int(exact.min())), max(high, int(exact.max()))

    program.run(100 * x, seen=remember)
    for step in program.steps[1:]:
        low, high = ends[step.name]
        assert step.low <= low
        assert high <= step.high
        if not step.rounds:
            assert step.type.qmin <= step.low
            assert step.high <= step.type.qmax


def test_powers_of_two_of_each_channel_share_the_finest() -> None:
    spec = QuantSpec(bits=4, scale="pow2", granularity=PerChannel(0))
    rule = Rule(weight=spec, activation=QuantSpec(bits=6, scale="pow2"))
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(64, 6)
    with torch.no_grad():
        model[0].weight[3] *= 8
    q = lowbit.quantize(model, Recipe(rules=(rule,)), calibration=[x])
    program = lower(q)
    weight = program.steps[1].weight
    assert weight is not None
    assert weight.type.width > 4
    assert torch.equal(program.real(program.run(x))[0].float(), q(x))


def test_a_shared_tensor_is_rounded_twice_where_readers_differ() -> None:
    """The second rounding is a step of its own."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.wide(x), self.narrow(x)], 1)

    specs = [QuantSpec(bits=bits, scale="pow2") for bits in (8, 4)]
    rules = tuple(
        Rule(match=m, weight=specs[0], activation=s) for m, s in zip(("wide", "*"), specs, strict=True)
    )
    x = torch.randn(64, 4)
    q = lowbit.quantize(Two(), Recipe(rules=rules), calibration=[x])
    program = lower(q)
    assert "cast" in [step.op for step in program.steps]
    assert torch.equal(program.real(program.run(x))[0].float(), q(x))


def refused(model: nn.Module, shape: tuple[int, ...], recipe: Any = "fixed8") -> str:
    x = torch.randn(8, *shape)
    with pytest.raises(LowbitError) as error:
        lower(lowbit.quantize(model.eval(), recipe, calibration=[x]))
    return str(error.value)


def test_what_hardware_lacks_is_refused_with_its_name() -> None:
    assert "not a power of two" in refused(
        mlp(), (6,), Recipe(rules=(Rule(weight=QuantSpec(bits=8), activation=QuantSpec(bits=8)),))
    )
    assert "'1' (GELU)" in refused(nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 2)), (6,))
    assert "padding" in refused(
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(3, 2, 1), nn.Conv2d(2, 1, 1)), (1, 8, 8)
    )
    weights_only = Recipe(rules=(Rule(weight=QuantSpec(bits=8, scale="pow2")),))
    assert "nothing rounds" in refused(mlp(), (6,), weights_only)
    assert "ConvTranspose2d" in refused(nn.Sequential(nn.ConvTranspose2d(1, 2, 2)), (1, 4, 4))
    first = Recipe(
        rules=(
            Rule(
                match="2", weight=QuantSpec(bits=8, scale="pow2"), activation=QuantSpec(bits=8, scale="pow2")
            ),
        )
    )
    assert "'0' has weights in float" in refused(mlp(), (6,), first)


@pytest.mark.parametrize("padding", [1, (1, 1)])
def test_padded_max_pooling_is_refused(padding: Any) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(3, 1, padding), nn.Conv2d(2, 1, 1))
    assert "padding" in refused(model, (1, 8, 8))


def test_a_bias_of_zero_leaves_the_weights_alone() -> None:
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(64, 6)
    with torch.no_grad():
        model[0].bias[3] = 0.0
        model[0].weight[3] = 0.0
    q = lowbit.quantize(model, "fixed8", calibration=[x])
    assert (q(x) - model(x)).abs().max() < 0.1
    assert torch.equal(lower(q).real(lower(q).run(x))[0].float(), q(x))


def test_other_results_than_tensors_are_refused() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.last(x)}

    assert "returns more than tensors" in refused(Named(), (6,))


def test_other_inputs_are_refused() -> None:
    q, _ = quantized("mlp")
    with pytest.raises(
        LowbitError, match=r"inputs of shapes \[\(5,\)\] for a network whose samples are \[6\]"
    ):
        lower(q).run(torch.randn(2, 5))
    with pytest.raises(LowbitError, match="NaN"):
        lower(q).run(torch.full((2, 6), float("nan")))
    with pytest.raises(LowbitError, match="freeze"):
        lower(lowbit.prepare(mlp(), "fixed8", torch.randn(2, 6)))


@pytest.mark.parametrize("name", NETWORKS)
def test_an_empty_batch_has_no_results(name: str) -> None:
    q, x = quantized(name)
    program = lower(q)
    assert program.run(x[:0])[0].shape == (0, *program.steps[-1].shape)

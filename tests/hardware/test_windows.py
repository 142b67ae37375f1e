"""Means of any number of values: rounded as exact fractions are, equal to the simulation, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest
import torch
from helpers import Fn
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit import LowbitError, QuantSpec, Recipe, Rule
from lowbit.core.fixed import cast
from lowbit.hardware import lower
from lowbit.hardware.arithmetic import OPERATIONS


def recipe(bits: int, rounding: str) -> Recipe:
    spec = QuantSpec(bits=bits, scale="pow2", rounding=rounding)
    return Recipe(rules=(Rule(weight=QuantSpec(bits=6, scale="pow2"), activation=spec, observer="minmax"),))


def conv(dims: int) -> nn.Module:
    return (nn.Conv1d if dims == 1 else nn.Conv2d)(2, 3, 1)


NETWORKS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], tuple[int, ...]]] = {
    "3 x 3": (lambda s, x: s.b(F.avg_pool2d(s.a(x), 3)), (2, 9, 9)),
    "overlapping": (lambda s, x: s.b(F.avg_pool2d(F.relu(s.a(x)), (3, 2), (2, 1))), (2, 9, 9)),
    "padded": (lambda s, x: s.b(F.avg_pool2d(s.a(x), 3, 2, 1)), (2, 8, 8)),
    "before a clamp": (lambda s, x: s.b(F.relu6(F.avg_pool2d(s.a(x), 5))), (2, 10, 10)),
    "global": (lambda s, x: s.b(F.adaptive_avg_pool2d(s.a(x), 1)), (2, 7, 5)),
    "adaptive": (lambda s, x: s.b(F.adaptive_avg_pool2d(s.a(x), (3, 1))), (2, 9, 6)),
    "row": (lambda s, x: s.b(F.avg_pool1d(s.a(x), 3, 2)), (2, 15)),
    "row, padded": (lambda s, x: s.b(F.avg_pool1d(F.relu(s.a(x)), 5, padding=1)), (2, 13)),
    "row of 4": (lambda s, x: s.b(F.avg_pool1d(s.a(x), 4)), (2, 12)),
    "row, adaptive": (lambda s, x: s.b(F.adaptive_avg_pool1d(s.a(x), 2)), (2, 14)),
}


@pytest.mark.parametrize("rounding", ["half_even", "half_up", "floor"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_simulation(name: str, rounding: str) -> None:
    torch.manual_seed(0)
    forward, shape = NETWORKS[name]
    parts = {"a": conv(len(shape) - 1), "b": nn.Conv1d(3, 2, 1) if len(shape) == 2 else nn.Conv2d(3, 2, 1)}
    x = 2 * torch.randn(400, *shape)
    for bits in (3, 7):
        q = lowbit.quantize(Fn(forward, **parts).eval(), recipe(bits, rounding), calibration=[x[:64]])
        program = lower(q)
        assert "average_pool" in [step.op for step in program.steps]
        assert torch.equal(program.real(program.run(x))[0].float(), q(x))


def test_a_mean_whose_readers_differ_is_right_for_both() -> None:
    """The narrow one rounds a second time, what the wide one has rounded."""
    torch.manual_seed(0)
    model = Fn(
        lambda s, x: torch.cat([s.b(y := F.relu(F.avg_pool2d(s.a(x), 3))), s.c(y)], 1),
        a=nn.Conv2d(2, 3, 1),
        b=nn.Conv2d(3, 2, 1),
        c=nn.Conv2d(3, 2, 1),
    )
    (wide,), (narrow,) = recipe(7, "half_even").rules, recipe(3, "floor").rules
    x = 2 * torch.randn(400, 2, 9, 9)
    q = lowbit.quantize(model.eval(), Recipe(rules=(replace(narrow, match="c"), wide)), calibration=[x[:64]])
    program = lower(q)
    assert "cast" in [step.op for step in program.steps]
    assert torch.equal(program.real(program.run(x))[0].float(), q(x))


def rounded(value: Fraction, rounding: str) -> int:
    if rounding == "half_even":
        return round(value)
    return math.floor(value + Fraction(1, 2) if rounding == "half_up" else value)


@pytest.mark.parametrize("rounding", ["half_even", "half_up", "floor"])
def test_a_mean_is_rounded_as_the_exact_fraction_is(rounding: str) -> None:
    """Every sum of so many codes, to types that are finer and coarser, ties among them."""
    for kernel, bits in product((3, 6, 7, 9, 25), (3, 6)):
        x = torch.randn(64, 1, kernel)
        model = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), nn.AvgPool1d(kernel), nn.Conv1d(1, 1, 1))
        program = lower(lowbit.quantize(model.eval(), recipe(bits, rounding), calibration=[x]))
        at = next(i for i, step in enumerate(program.steps) if step.op == "average_pool")
        source, step = program.steps[program.steps[at].inputs[0]], program.steps[at]
        ends = range(kernel * source.type.qmin, kernel * source.type.qmax + 1)
        codes = torch.tensor([[n // kernel + (k < n % kernel) for k in range(kernel)] for n in ends])
        exact = OPERATIONS["average_pool"].run(step, [(codes[:, None], source.type.fraction)])
        found = cast(exact, step.fraction, step.type).flatten().tolist()
        for total, code in zip(ends, found, strict=True):
            mean = Fraction(total, kernel) * Fraction(2) ** (step.type.fraction - source.type.fraction)
            want = min(max(rounded(mean, rounding), step.type.qmin), step.type.qmax)
            assert code == want, (kernel, bits, total)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda s, x: s.b(F.avg_pool2d(s.a(x), 3, 2, 1, count_include_pad=False)), "divides by one number"),
        (lambda s, x: s.b(F.avg_pool2d(s.a(x), 3, ceil_mode=True)), "divides by one number"),
        (lambda s, x: s.b(F.adaptive_avg_pool2d(s.a(x), 3)), "divides by one number"),
        (lambda s, x: F.avg_pool1d(s.a(x).flatten(2), 3), "divides by 3, and nothing rounds"),
    ],
    ids=["padding is left out", "rounded up", "of several sizes", "a result"],
)
def test_what_has_no_one_divisor_is_refused(
    forward: Callable[[nn.Module, Tensor], Tensor], message: str
) -> None:
    x = torch.randn(16, 2, 8, 8)
    q = lowbit.quantize(
        Fn(forward, a=nn.Conv2d(2, 3, 1), b=nn.Conv2d(3, 2, 1)).eval(), "fixed6", calibration=[x]
    )
    with pytest.raises(LowbitError, match=message):
        lower(q)

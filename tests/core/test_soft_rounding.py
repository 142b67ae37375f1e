"""Learned rounding on bare tensors: two choices for each element, decided by the error of the output."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import exp

import pytest
import torch
from torch import Tensor

from lowbit import PerChannel, PerGroup, PerTensor, QuantSpec
from lowbit.core.affine import quantize
from lowbit.core.qtensor import QTensor
from lowbit.core.soft_rounding import SoftRounding
from lowbit.core.spec import BINARY, TERNARY, expand_to

SPECS = [
    QuantSpec(bits=3, granularity=PerChannel(0)),
    QuantSpec(bits=4, granularity=PerGroup(1, 4), scale="pow2"),
    QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerTensor()),
    QuantSpec(bits=2, granularity=PerChannel(0), mid_rise=True),
    BINARY,
    TERNARY,
]


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("v", [-9.0, -1.0, 0.0, 0.7, 9.0])
def test_the_stretched_sigmoid_and_what_it_costs_to_be_undecided(v: float) -> None:
    """Eqs. 23 and 24, by hand."""
    soft = SoftRounding(QTensor.quantize(weight(2, 3), SPECS[0]), weight(2, 3))
    torch.nn.init.constant_(soft.v, v)
    h = min(1.0, max(0.0, 1.2 / (1 + exp(-v)) - 0.1))
    assert soft.up.detach() == pytest.approx(h, abs=1e-6)
    for beta in (2.0, 20.0):
        assert float(soft.undecided(beta).detach()) == pytest.approx(1 - abs(2 * h - 1) ** beta, abs=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_choices_are_the_neighbours_of_the_weight(spec: QuantSpec) -> None:
    w = weight(6, 8)
    start = QTensor.quantize(w, spec)
    soft = SoftRounding(start, w)
    assert torch.equal(soft.hard(), start.dequantize()), "until it has learned it is the start"
    found = []
    for v in (-9.0, 9.0):
        torch.nn.init.constant_(soft.v, v)
        found.append(soft.hard())
        assert torch.equal(soft(w).detach(), found[-1]), "decided, soft is hard"
        codes = quantize(found[-1], start.scale, start.zero_point, spec)
        assert torch.equal(replace(start, codes=codes).dequantize(), found[-1]), "on the grid"
    lower, upper = found
    gap = expand_to(start.scale, w.shape) * spec.step
    assert torch.allclose(upper - lower, gap.expand_as(w))
    bottom, top = (
        replace(start, codes=torch.full_like(start.codes, end)).dequantize() for end in (spec.qmin, spec.qmax)
    )
    inside = w.clamp(bottom, top)
    assert bool(((inside >= lower - 1e-6) & (inside <= upper + 1e-6)).all())


def test_codes_that_another_method_chose_are_the_start() -> None:
    w, spec = weight(6, 8), SPECS[0]
    nearest = QTensor.quantize(w, spec)
    moved = (nearest.codes + torch.randint(-1, 2, w.shape)).clamp(spec.qmin, spec.qmax)
    start = replace(nearest, codes=moved.to(spec.dtype))
    assert torch.equal(SoftRounding(start, w).hard(), start.dequantize())


def test_it_finds_the_best_of_all_roundings() -> None:
    """The oracle: every one of 2^8 roundings of each row, for inputs that are alike."""
    w, spec = weight(12, 8), QuantSpec(bits=3, granularity=PerChannel(0))
    x = weight(200, 8, seed=1) + weight(200, 1, seed=2)
    start = QTensor.quantize(w, spec)
    soft = SoftRounding(start, w)

    def error(rounded: Tensor) -> Tensor:
        return (x @ (rounded - w).mT).square().sum(0)

    ways = torch.tensor(list(product((0.0, 1.0), repeat=8)))
    best = torch.stack([error((soft.lower + way) * start.scale) for way in ways]).amin(0)
    adam = torch.optim.Adam(soft.parameters(), lr=0.1)
    nearest = error(start.dequantize())
    for step in range(400):
        loss = (error(soft(w)) / nearest).sum() + 8 * soft.undecided(20.0 - 18.0 * step / 400)
        adam.zero_grad()
        loss.backward()
        adam.step()
    found = error(soft.hard())
    assert bool((found >= best * (1 - 1e-4)).all())
    assert int((found <= best * (1 + 1e-4)).sum()) >= 6, "the optimum itself in half of the rows"
    assert float((found - best).sum()) < 0.25 * float((nearest - best).sum())

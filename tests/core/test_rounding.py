"""Rounding by the error of the output, against brute force and against the nearest code."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.core.rounding import Gain, Grid, Moments, Objective, descend, feedback, refit_scale
from lowbit.core.spec import BINARY, INT4, TERNARY, QuantSpec

SPECS = {
    "int4": INT4,
    "int2 odd": replace(INT4, bits=2, mid_rise=True),
    "ternary": TERNARY,
    "binary": BINARY,
    "uint3 with a zero point": QuantSpec(bits=3, signed=False, symmetric=False),
    "half up": replace(INT4, rounding="half_up"),
}


def problem(
    rows: int, columns: int, *, groups: int = 1, samples: int = 256, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the inputs it should read, correlated as those of a network are, and those it reads."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, columns, generator=draw)
    mixing = torch.randn(groups, columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    x = torch.randn(groups, samples, columns, generator=draw) @ mixing
    return weight, x, x + 0.1 * torch.randn(groups, samples, columns, generator=draw)


def grid_of(weight: Tensor, spec: QuantSpec) -> Grid:
    """A scale for each row that clips a little."""
    reach = weight.abs().amax(-1, keepdim=True)
    zero = None if spec.symmetric else torch.full(reach.shape, 2**spec.bits // 2, dtype=torch.int32)
    return Grid(1.4 * reach / (spec.qmax - spec.qmin), zero, spec)


def cost(goal: Objective, rounded: Tensor) -> float:
    return float(goal.loss(rounded).sum())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("groups", "rows", "columns"), [(1, 4, 12), (3, 2, 5), (1, 3, 150)])
def test_feedback_beats_the_nearest_code_and_descent_beats_feedback(
    spec: QuantSpec, groups: int, rows: int, columns: int
) -> None:
    weight, x, u = problem(rows, columns, groups=groups)
    goal, grid = Objective.of(weight, x, u), grid_of(weight, spec)
    nearest, fed = grid.nearest(weight), feedback(goal, grid)
    down = descend(goal, fed, grid, 8)
    assert torch.equal(grid.nearest(fed), fed), "values lie on the grid"
    assert torch.equal(grid.nearest(down), down)
    assert cost(goal, fed) < cost(goal, nearest)
    assert cost(goal, down) <= cost(goal, fed)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_descent_ends_where_no_single_code_can_do_better_and_near_the_optimum(seed: int) -> None:
    spec = QuantSpec(bits=2)
    weight, x, u = problem(1, 5, seed=seed)
    goal, grid = Objective.of(weight, x, u), grid_of(weight, spec)
    nearest = grid.nearest(goal.target)
    found = descend(goal, goal.cheaper(feedback(goal, grid), nearest), grid, 50)
    places = [grid.scale.double() * code for code in range(spec.qmin, spec.qmax + 1)]
    for j, place in product(range(5), places):
        other = found.clone()
        other[..., j] = place[..., 0]
        assert cost(goal, other) >= cost(goal, found) - 1e-9
    best = min(
        cost(goal, torch.stack([p[..., 0] for p in choice], -1)) for choice in product(places, repeat=5)
    )
    assert best - 1e-9 <= cost(goal, found) <= cost(goal, nearest) + 1e-9


def test_with_uncorrelated_inputs_it_is_rounding_to_the_nearest() -> None:
    weight, _, _ = problem(4, 9)
    goal, grid = Objective(weight.double(), torch.eye(9).double()[None]), grid_of(weight, INT4)
    assert torch.equal(feedback(goal, grid), grid.nearest(weight.double()))


def test_a_group_is_a_layer_of_its_own() -> None:
    weight, x, u = problem(3, 7, groups=4)
    grid = grid_of(weight, INT4)
    goal = Objective.of(weight, x, u)
    together = feedback(goal, grid)
    for g in range(4):
        part = slice(g, g + 1)
        alone = Objective(goal.target[part], goal.hessian[part])
        own = Grid(grid.scale[part], None, INT4)
        assert torch.allclose(feedback(alone, own), together[part])


def test_the_target_is_the_least_squares_answer() -> None:
    weight, x, u = problem(3, 6, samples=4000)
    target = Moments.of(x, u).target(weight, 1e-9)
    want = torch.linalg.lstsq(u[0].double(), (x @ weight.mT)[0].double()).solution.t()
    assert torch.allclose(target[0], want, atol=1e-4)


def test_the_cost_is_the_error_of_the_output() -> None:
    weight, x, u = problem(3, 6, samples=4000)
    moments = Moments.of(x, u)
    goal = Objective(moments.target(weight, 1e-9), moments.square / 4000)
    least = (x @ weight.mT - u @ goal.target.float().mT).square().mean(1)
    rounded = grid_of(weight, INT4).nearest(weight)
    error = (x @ weight.mT - u @ rounded.float().mT).square().mean(1)
    assert torch.allclose((error - least).double(), goal.loss(rounded), rtol=1e-3)


def test_a_fitted_scale_costs_least() -> None:
    weight, x, u = problem(3, 6)
    goal = Objective.of(weight, x, u)
    rounded = grid_of(weight, INT4).nearest(weight.double())
    factor = refit_scale(goal, rounded)
    for near in (0.999, 1.001):
        assert (goal.loss(rounded * factor) < goal.loss(rounded * factor * near)).all()
    assert torch.equal(refit_scale(goal, -goal.target), torch.ones(1, 3, 1).double())


def test_fewer_samples_than_columns_and_dead_inputs_are_damped() -> None:
    weight, x, u = problem(4, 40, samples=6)
    u[..., 3] = x[..., 3] = 0.0
    goal, grid = Objective.of(weight, x, u), grid_of(weight, INT4)
    rounded = descend(goal, feedback(goal, grid), grid, 2)
    assert rounded.isfinite().all()
    assert torch.allclose(goal.target[..., 3], weight[..., 3].double()), "what is never read stays"
    one = Objective.of(weight, x[:, :1], u[:, :1])
    assert feedback(one, grid).isfinite().all()


def test_a_gain_reads_as_a_line() -> None:
    assert str(Gain("a", 10.04, 20.0)) == "  a: 10.0 -> 20.0 dB"
    assert (
        str(Gain("a", 10.0, 10.0, "its error would rise"))
        == "  a: 10.0 -> 10.0 dB; as it was, its error would rise"
    )
    assert str(Gain("a", why="no data reached it")) == "  a: as it was, no data reached it"

"""Every order of a train against the dense product, and the choice among them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import opt_einsum
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.kernels import tensor_train
from lowbit.nn.contraction import Order, Shape, best_order, matrices, merged, orders

KEPT = 1 << 40


def cores_of(shape: Shape) -> list[Tensor]:
    sizes = zip(shape.ranks, shape.out_modes, shape.in_modes, shape.ranks[1:], strict=False)
    return [torch.randn(*size, dtype=torch.float64) for size in sizes]


def dense(cores: list[Tensor]) -> Tensor:
    """[out, in], by one einsum."""
    d = len(cores)
    arguments: list[Any] = []
    for k, core in enumerate(cores):
        arguments += [core, [2 * d + k, 2 * k, 2 * k + 1, 2 * d + k + 1]]
    rows, columns = ([2 * k + side for k in range(d)] for side in (0, 1))
    whole = torch.einsum(*arguments, [2 * d, *rows, *columns, 3 * d])
    return whole.reshape(math.prod(c.shape[1] for c in cores), -1)


shapes = (
    st.integers(1, 4)
    .flatmap(
        lambda d: st.tuples(
            st.tuples(*[st.integers(1, 4)] * d),
            st.tuples(*[st.integers(1, 4)] * d),
            st.tuples(*[st.integers(1, 3)] * (d - 1)),
        )
    )
    .map(lambda found: Shape(found[0], found[1], (1, *found[2], 1)))
)


@given(shapes, st.sampled_from([1, 2, 7]), st.booleans())
def test_every_order_is_the_dense_product(shape: Shape, rows: int, has_bias: bool) -> None:
    cores = cores_of(shape)
    weight = dense(cores)
    x = torch.randn(rows, weight.shape[1], dtype=torch.float64)
    bias = torch.randn(weight.shape[0], dtype=torch.float64) if has_bias else None
    wanted = torch.nn.functional.linear(x, weight, bias)
    for order in orders(shape, rows):
        run = order.bound(matrices(merged(cores, order.groups), order.forward), bias)
        torch.testing.assert_close(run(x), wanted, rtol=1e-9, atol=1e-9, msg=str(order))


@pytest.mark.skipif(not tensor_train.available(), reason=tensor_train.description())
@given(shapes, st.sampled_from([1, 2, 7]), st.booleans())
def test_every_order_is_the_dense_product_in_the_library_too(shape: Shape, rows: int, has_bias: bool) -> None:
    exact = cores_of(shape)
    cores, weight = [core.float() for core in exact], dense([core.float().double() for core in exact])
    x, bias = torch.randn(rows, weight.shape[1]), torch.randn(weight.shape[0]) if has_bias else None
    wanted = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    for order in orders(shape, rows):
        order = replace(order, lanes=tensor_train.lanes_for(x))  # noqa: PLW2901
        run = order.bound(order.prepared(matrices(merged(cores, order.groups), order.forward)), bias)
        torch.testing.assert_close(run(x).double(), wanted, rtol=1e-4, atol=1e-3, msg=str(order))


@pytest.mark.parametrize("cores", [1, 2, 4])
def test_orders_are_all_the_ways_to_merge_neighbours_from_either_end(cores: int) -> None:
    found = list(orders(Shape((2,) * cores, (2,) * cores, (1, *[2] * (cores - 1), 1)), 1))
    assert len(found) == len(set(found)) == 2**cores - 1
    assert all(sum(order.groups) == cores for order in found)
    assert [o.groups for o in found].count((cores,)) == 1


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("rank", [2, 6])
def test_no_einsum_path_takes_fewer_products_than_the_best_order(rows: int, rank: int) -> None:
    shape = Shape((2, 3, 4), (4, 3, 2), (1, rank, rank, 1))
    cores = cores_of(shape)
    names = ["xabr", "rcds", "sefy"]  # cores as [bond, out, in, bond]
    path = opt_einsum.contract_path(
        f"{','.join(names)},Nbdf->Nace", *cores, torch.randn(rows, *shape.in_modes), optimize="optimal"
    )[1]
    fewest = min(order.macs for order in orders(shape, rows))
    assert fewest <= path.opt_cost / 2  # multiplications and additions


def test_the_best_order_goes_from_factors_to_the_dense_product_as_ranks_and_batches_grow() -> None:
    modes = (4, 4, 8, 8), (8, 8, 4, 4)
    small, large = (Shape(*modes, (1, r, r, r, 1)) for r in (4, 64))
    assert len(best_order(small, 1, KEPT).groups) > 1
    assert len(best_order(large, 256, KEPT).groups) == 1
    # with nothing kept, merging counts, and a batch of one is not worth a dense matrix
    assert len(best_order(large, 1, 0).groups) > 1
    assert best_order(large, 256, KEPT).floats == 1 << 20


def test_the_library_is_chosen_for_small_batches_where_it_may_be_and_what_it_reads_is_kept() -> None:
    shape = Shape((4, 4, 8, 8), (8, 8, 4, 4), (1, 8, 8, 8, 1))
    for lanes in (8, 16):
        assert best_order(shape, 1, KEPT, lanes).lanes == lanes
        assert best_order(shape, 1, KEPT, lanes).seconds < best_order(shape, 1, KEPT).seconds
    assert best_order(shape, 1, KEPT).lanes == 0
    assert best_order(shape, 1, 0, 8).lanes == 0
    # dense products of many rows are what PyTorch is best at
    large = Shape((4, 4, 8, 8), (8, 8, 4, 4), (1, 64, 64, 64, 1))
    assert best_order(large, 256, KEPT, 8) == best_order(large, 256, KEPT)


@given(shapes, st.sampled_from([1, 16]), st.sampled_from([0, 4, 8, 16]))
def test_the_best_order_is_the_one_of_least_predicted_time(shape: Shape, rows: int, lanes: int) -> None:
    def seconds(order: Order) -> float:
        return order.seconds + order.merging_seconds

    best = best_order(shape, rows, 0, lanes)
    assert best.lanes == 0  # what it reads cannot be kept
    assert seconds(best) == min(map(seconds, orders(shape, rows)))
    every = [replace(order, lanes=n) for order in orders(shape, rows) for n in {0, lanes}]
    assert best_order(shape, rows, KEPT, lanes).seconds == min(order.seconds for order in every)

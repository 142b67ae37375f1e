"""Layers made of factors: the dense layer they stand for, whatever the mode, batch or geometry."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit import LowbitError
from lowbit.decompose.ranks import Fixed
from lowbit.decompose.tt import matrix_to_train, train_to_matrix
from lowbit.nn.network import Blueprint, TensorNetwork, with_networks
from lowbit.nn.tensorized import TTLinear
from lowbit.nn.tensorized_conv import ConvChain, CPConv2d, TTConv2d, TuckerConv2d

MODES = (2, 3, 4), (4, 3, 2)
CONVS: list[tuple[type[ConvChain], tuple[int, ...]]] = [
    (TuckerConv2d, (3, 5)),
    (TTConv2d, (3, 6, 5)),
    (CPConv2d, (4, 4, 4)),
]
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1},
    "uneven": {"kernel_size": (3, 5), "padding": (2, 1), "stride": (1, 2), "dilation": (2, 1)},
    "same": {"kernel_size": 3, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "no bias": {"kernel_size": 3, "bias": False},
}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestTTLinear:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (2, 3, 24), (0, 24), (300, 24)])
    def test_is_a_linear_layer_with_its_dense_weight(self, shape: tuple[int, ...], bias: bool) -> None:
        layer, x = TTLinear(*MODES, 3, bias=bias), torch.randn(shape)
        if bias:
            nn.init.normal_(layer.bias)
        wanted = F.linear(x, layer.dense_weight(), layer.bias)
        close(layer(x), wanted)
        close(layer.sweep(x), wanted)
        layer.eval()
        close(layer(x), wanted)
        with torch.no_grad():
            close(layer(x), wanted)
            close(layer(x), wanted)
        with torch.inference_mode():
            close(layer(x), wanted)

    @pytest.mark.parametrize("rows", [1, 6, 64])
    def test_gradients_are_those_of_the_dense_layer(self, rows: int) -> None:
        layer, x = TTLinear(*MODES, 3), torch.randn(rows, 24, requires_grad=True)
        target = torch.randn(rows, 24)
        parameters = [x, *layer.parameters()]
        dense = F.linear(x, layer.dense_weight(), layer.bias)
        for found, wanted in zip(
            torch.autograd.grad((layer(x) * target).sum(), parameters),
            torch.autograd.grad((dense * target).sum(), parameters),
            strict=True,
        ):
            close(found, wanted)

    def test_a_train_goes_in_and_comes_out(self) -> None:
        weight = torch.randn(24, 24)
        train = matrix_to_train(weight, *MODES, Fixed(100))
        layer = TTLinear.from_train(train, torch.ones(24))
        close(layer.dense_weight(), weight)
        close(layer.dense_weight(), train_to_matrix(train))
        assert layer.ranks == train.ranks
        assert layer.weights == sum(core.numel() for core in train.cores)

    @pytest.mark.parametrize("ranks", [1, 3, 6])
    def test_begins_as_a_linear_layer_of_he_does(self, ranks: int) -> None:
        modes = (4, 4, 4), (4, 4, 4)
        found = torch.stack([TTLinear(*modes, ranks).dense_weight().var() for _ in range(60)]).mean()
        assert found.item() == pytest.approx(2 / 64, rel=0.25)

    def test_what_is_kept_goes_when_a_factor_changes(self) -> None:
        layer, x = TTLinear(*MODES, 2).eval(), torch.randn(4, 24)
        other = TTLinear(*MODES, 2)

        def check() -> None:
            with torch.no_grad():
                close(layer(x), F.linear(x, layer.dense_weight(), layer.bias))

        check()
        with torch.no_grad():
            layer.cores[1].weight.mul_(2)
        check()
        layer.load_state_dict(other.state_dict())
        check()
        layer.cores[0].weight = nn.Parameter(torch.randn_like(layer.cores[0].weight))
        check()
        layer.bias = nn.Parameter(torch.randn(24))
        check()
        with torch.no_grad():
            layer.bias.add_(1)
        check()
        layer.load(other.train_of([core.weight for core in TTLinear(*MODES, 3).cores], other.blueprint))
        check()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(x).square().sum().backward()
        optimizer.step()
        check()
        layer.double()
        x = x.double()
        check()

    def test_what_is_kept_stays_within_its_bound_and_out_of_copies(self) -> None:
        layer, x = TTLinear((4, 4, 4), (4, 4, 4), 8).eval(), torch.randn(64, 64)
        with torch.no_grad():
            for rows in (1, 2, 8, 64):
                layer(x[:rows])
            assert 0 < sum(t.nbytes for p in layer._kept.products.values() for t in p) <= layer._kept.limit
            layer._kept.limit = 100
            layer._kept.clear()
            close(layer(x), F.linear(x, layer.dense_weight(), layer.bias))
            assert not layer._kept.products
        with torch.no_grad():
            layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
            assert not other._kept.products
            close(other(x), layer(x))

    @pytest.mark.parametrize(
        "make", [lambda: TTLinear(*MODES, 6), lambda: TuckerConv2d(nn.Conv2d(24, 24, 1), (20, 20))]
    )
    def test_a_fused_optimizer_which_leaves_no_trace_is_seen(self, make: Any) -> None:
        layer = make().eval()
        x = torch.randn(4, 24) if isinstance(layer, TTLinear) else torch.randn(4, 24, 2, 2)
        plain = layer.sweep if isinstance(layer, TTLinear) else layer.chain
        with torch.no_grad():
            layer(x)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
        for training in (True, False):
            layer.train(training)
            layer(x).square().mean().backward()
            optimizer.step()
            layer.eval()
            with torch.no_grad():
                close(layer(x), plain(x))

    @pytest.mark.parametrize(
        "make", [lambda: TTLinear(*MODES, 6), lambda: TuckerConv2d(nn.Conv2d(24, 24, 1), (20, 20))]
    )
    def test_what_autocast_made_does_not_stay(self, make: Any) -> None:
        layer = make().eval()
        x = torch.randn(4, 24) if isinstance(layer, TTLinear) else torch.randn(4, 24, 2, 2)
        with torch.no_grad():
            wanted = layer(x)
            layer.train().eval()
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(layer(x).float(), wanted, rtol=0.05, atol=0.1)
            close(layer(x), wanted)

    def test_traced_it_takes_any_batch(self) -> None:
        layer, x = TTLinear(*MODES, 3).eval(), torch.randn(5, 24)
        compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
        close(compiled(x), layer(x))
        close(compiled(x[:2]), layer(x[:2]))

    def test_calls_its_factors_where_they_are_not_plain(self) -> None:
        layer, x, calls = TTLinear(*MODES, 2), torch.randn(3, 24), []
        layer.cores[0].register_forward_hook(lambda *_: calls.append(1))
        wanted = F.linear(x, layer.dense_weight(), layer.bias)
        close(layer(x), wanted)
        assert calls == [1]
        traced = fx.symbolic_trace(layer)
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == [
            "cores.0",
            "cores.1",
            "cores.2",
        ]
        close(traced(x), wanted)

    def test_ranks_that_a_bond_cannot_have_are_clipped(self) -> None:
        assert TTLinear((2, 3), (2, 2), 100).ranks == (1, 4, 1)

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: TTLinear((2, 3), (6,), 2), "2 modes of outputs and 1 of inputs"),
            (lambda: TTLinear((2, 3), (2, 3), (2, 2)), r"ranks=\(2, 2\) are not 1 whole numbers"),
            (lambda: TTLinear((2, 3), (2, 3), 0), "whole numbers from 1 up"),
            (lambda: TTLinear(*MODES, 2)(torch.randn(2, 12)), r"shape \[2, 12\] has not 24 features"),
        ],
    )
    def test_bad_input_is_one_clear_error(self, make: Any, says: str) -> None:
        with pytest.raises(LowbitError, match=says):
            make()


class TestConvChains:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize(("kind", "ranks"), CONVS)
    def test_are_a_convolution_with_their_dense_weight(
        self, kind: type[ConvChain], ranks: tuple[int, ...], geometry: str
    ) -> None:
        like = nn.Conv2d(6, 8, **GEOMETRIES[geometry])
        layer, x = kind(like, ranks).eval(), torch.randn(2, 6, 9, 11)
        like.weight = nn.Parameter(layer.dense_weight())
        if like.bias is not None:
            nn.init.normal_(like.bias)
            layer.factors[-1].bias = like.bias
        close(layer(x), like(x))
        with torch.no_grad():
            close(layer(x), like(x))
            assert bool(layer._kept.products) == (geometry != "reflect")  # small: the dense one is faster
            like.weight.mul_(2)
            layer.factors[0].weight.mul_(2)
            close(layer(x), like(x))

    @pytest.mark.parametrize(("kind", "ranks"), CONVS)
    def test_of_large_layers_the_factors_are_called(
        self, kind: type[ConvChain], ranks: tuple[int, ...]
    ) -> None:
        layer = kind(nn.Conv2d(256, 256, 3, padding=1), ranks).eval()
        with torch.no_grad():
            layer(torch.randn(1, 256, 16, 16))
        assert not layer._kept.products

    @pytest.mark.parametrize(("kind", "rank"), [(TuckerConv2d, 99), (TTConv2d, 999)])
    def test_at_full_rank_nothing_is_lost(self, kind: type[ConvChain], rank: int) -> None:
        conv = nn.Conv2d(4, 6, (3, 2))
        layer, lost = kind.from_conv(conv, Fixed(rank))
        assert lost.total < 1e-6
        assert max(lost.bonds) < 1e-6
        close(layer.dense_weight(), conv.weight)
        close(layer(torch.ones(1, 4, 5, 5)), conv(torch.ones(1, 4, 5, 5)))

    @pytest.mark.parametrize(("kind", "ranks"), CONVS)
    def test_begin_as_a_convolution_of_he_does(self, kind: type[ConvChain], ranks: tuple[int, ...]) -> None:
        like = nn.Conv2d(16, 16, 3)
        found = torch.stack([kind(like, ranks).dense_weight().var() for _ in range(80)]).mean()
        assert found.item() == pytest.approx(2 / 144, rel=0.3)

    @pytest.mark.parametrize(("kind", "ranks"), CONVS)
    def test_macs_are_those_of_the_factors(self, kind: type[ConvChain], ranks: tuple[int, ...]) -> None:
        layer = kind(nn.Conv2d(6, 8, 3, stride=2, padding=1), ranks)
        counted = []
        for factor in layer.factors:
            factor.register_forward_hook(
                lambda m, _, out: counted.append(m.weight.numel() * out.shape[2] * out.shape[3])
            )
        layer(torch.randn(1, 6, 9, 11))
        assert layer.macs(0, (9, 11)) == sum(counted)

    def test_groups_and_uneven_ranks_are_refused(self) -> None:
        with pytest.raises(LowbitError, match="has 2 groups"):
            TuckerConv2d(nn.Conv2d(4, 4, 3, groups=2), (2, 2))
        with pytest.raises(LowbitError, match="one rank; give it three times"):
            CPConv2d(nn.Conv2d(4, 4, 3), (2, 2, 3))
        with pytest.raises(LowbitError, match="not 2 whole numbers"):
            TuckerConv2d(nn.Conv2d(4, 4, 3), (2,))


@pytest.mark.parametrize(
    "network",
    [
        TTLinear(*MODES, (2, 3)),
        TuckerConv2d(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 3)),
        TTConv2d(nn.Conv2d(4, 6, (3, 5), dilation=(1, 2)), (2, 3, 4)),
        CPConv2d(nn.Conv2d(4, 6, 3, padding="same"), (3, 3, 3)),
    ],
    ids=lambda n: type(n).__name__,
)
def test_a_blueprint_makes_the_same_network_from_its_dense_layer_or_another_rank(
    network: TensorNetwork,
) -> None:
    blueprint = network.blueprint
    dense: nn.Module = nn.Linear(24, 24)
    if isinstance(network, ConvChain):
        whole = network.whole
        names = ("kernel_size", "stride", "padding", "dilation")
        options = {name: getattr(whole, name) for name in names}
        dense = nn.Conv2d(4, 6, **options, bias=network.factors[-1].bias is not None)
    for base in (
        dense,
        with_networks(
            dense, {"": Blueprint.of(vars(blueprint) | {"ranks": (3, 3, 3)[: len(blueprint.ranks)]})}
        ),
    ):
        made = with_networks(nn.Sequential(base), {"0": blueprint})
        state = {f"0.{name}": value for name, value in network.state_dict().items()}
        made.load_state_dict(state)
        x = torch.randn(2, 24) if isinstance(network, TTLinear) else torch.randn(2, 4, 12, 12)
        close(made(x), network(x))
    assert with_networks(made, {"0": blueprint}) is made
    with pytest.raises(LowbitError, match="'1' was a tensor network"):
        with_networks(made, {"1": blueprint})


@pytest.mark.parametrize(("kind", "ranks"), CONVS)
def test_weights_of_convolutions_are_a_train(kind: type[ConvChain], ranks: tuple[int, ...]) -> None:
    layer = kind(nn.Conv2d(5, 7, 3), ranks)
    weights = [factor.weight for factor in layer.factors]
    if layer.mixes:
        train = kind.train_of(weights, layer.blueprint)
        dense = train.dense()  # each core's height and width, then the outputs
        assert dense.numel() == layer.dense_weight().numel()
        close(dense.norm(), layer.dense_weight().norm())
        for a, b in zip(kind.weights_of(train), weights, strict=True):
            assert torch.equal(a, b)

"""What passes can rely on: one spelling, nothing in place, weights in modules, a name for every node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Fn, conv, image, traced
from torch import Tensor, fx, nn

from lowbit.graph.ops import kind_of, label, module_of


def names(gm: fx.GraphModule) -> list[str]:
    return [n.meta["name"] for n in gm.graph.nodes if n.op not in ("placeholder", "output")]


def labels(gm: fx.GraphModule) -> list[str]:
    return [label(n) for n in gm.graph.nodes if n.op not in ("placeholder", "output")]


@pytest.mark.parametrize(
    ("forward", "want"),
    [
        pytest.param(lambda m, x: x.relu_(), ["relu"], id="method"),
        pytest.param(lambda m, x: torch.relu_(x), ["relu"], id="function"),
        pytest.param(lambda m, x: F.relu(x, True), ["relu"], id="flag by position"),
        pytest.param(lambda m, x: F.hardtanh(x, 0.0, 1.0, inplace=True), ["hardtanh"], id="flag by name"),
        pytest.param(lambda m, x: F.leaky_relu(x, 0.1, True), ["leaky_relu"], id="flag in third place"),
        pytest.param(lambda m, x: m.act(x), ["SiLU"], id="module"),
        pytest.param(lambda m, x: x.clamp_(0, 6), ["clamp"], id="method with arguments"),
    ],
)
def test_nothing_happens_in_place(forward: Callable[..., Any], want: list[str]) -> None:
    model = Fn(forward, act=nn.SiLU(inplace=True))
    gm, x = traced(model, image()), image()
    kept = x.clone()
    got = gm(x)
    assert torch.equal(x, kept)
    assert labels(gm) == want
    assert torch.equal(got, model(x))


def test_a_flag_in_the_place_of_training_is_no_inplace_flag() -> None:
    """F.dropout(x, 0.5, False): the third argument says `training`, the fourth `inplace`."""
    model = Fn(lambda m, x: F.dropout(x * 2, 0.5, False, True) + x)
    gm, x = traced(model, image()), image()
    assert torch.equal(gm(x), x * 3)
    assert not next(n for n in gm.graph.nodes if label(n) == "dropout").kwargs.get("inplace")


@pytest.mark.parametrize(
    ("forward", "kinds"),
    [
        pytest.param(lambda m, x: m.a(input=x), ["layer"], id="layer"),
        pytest.param(lambda m, x: torch.add(input=x, other=x), ["add"], id="add"),
        pytest.param(lambda m, x: torch.cat(tensors=[x, x], dim=1), ["cat"], id="cat"),
        pytest.param(lambda m, x: torch.matmul(x, other=x), ["matmul"], id="matmul"),
        pytest.param(lambda m, x: F.relu(input=x), ["clamp"], id="relu"),
        pytest.param(lambda m, x: F.max_pool2d(input=x, kernel_size=2), ["pass"], id="pool"),
        pytest.param(lambda m, x: torch.flatten(input=x, start_dim=1), ["pass"], id="flatten"),
    ],
)
def test_operands_by_name_become_positional(forward: Callable[..., Any], kinds: list[str]) -> None:
    model = Fn(forward, a=conv(3, 8)).eval()
    gm, x = traced(model, image()), image()
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    assert [kind_of(n) for n in nodes] == kinds
    assert all(n.args for n in nodes)
    assert torch.equal(gm(x), model(x))


FUNCTIONAL: dict[str, tuple[Callable[..., Any], tuple[int, ...], type[nn.Module]]] = {
    "conv2d": (lambda m, x: F.conv2d(x, m.w, m.b, stride=2, padding="valid"), (8, 3, 3, 3), nn.Conv2d),
    "conv2d with groups": (lambda m, x: F.conv2d(x, m.w, m.b, 1, 2, 2, 3), (9, 1, 3, 3), nn.Conv2d),
    "conv1d": (lambda m, x: F.conv1d(x.flatten(2), m.w, bias=m.b, padding=1), (8, 3, 3), nn.Conv1d),
    "conv_transpose2d": (
        lambda m, x: F.conv_transpose2d(x, m.w, m.b, stride=2, output_padding=1, groups=3),
        (3, 2, 3, 3),
        nn.ConvTranspose2d,
    ),
    "linear": (lambda m, x: F.linear(x, m.w, m.b), (5, 8), nn.Linear),
    "linear by name": (lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), (5, 8), nn.Linear),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_a_functional_weight_becomes_a_layer_that_holds_it(name: str) -> None:
    forward, shape, kind = FUNCTIONAL[name]
    outputs = shape[1] * 3 if kind is nn.ConvTranspose2d else shape[0]
    model = Fn(forward, w=nn.Parameter(torch.randn(shape)), b=nn.Parameter(torch.randn(outputs)))
    gm, x = traced(model, image()), image()
    node = next(n for n in gm.graph.nodes if kind_of(n) == "layer")
    layer = module_of(node)
    assert type(layer) is kind
    assert torch.equal(layer.weight, model.w)
    assert torch.equal(layer.bias, model.b)
    assert torch.equal(gm(x), model(x))
    assert len(list(gm.parameters())) == 2, "the bare Parameters are gone"


def test_a_functional_embedding() -> None:
    model = Fn(lambda m, x: F.embedding(x, m.w, 0), w=nn.Parameter(torch.randn(7, 4)))
    gm, x = traced(model, torch.randint(0, 7, (5, 3))), torch.randint(0, 7, (5, 3))
    assert labels(gm) == ["Embedding"]
    assert torch.equal(gm(x), model(x))


def test_one_weight_with_two_biases_is_two_layers() -> None:
    model = Fn(
        lambda m, x: F.linear(x, m.w, m.b) - F.linear(x, m.w, m.c) * F.linear(x, m.w, m.b),
        w=nn.Parameter(torch.randn(8, 8)),
        b=nn.Parameter(torch.randn(8)),
        c=nn.Parameter(torch.randn(8)),
    )
    gm, x = traced(model, image()), image()
    assert names(gm)[:3] == ["w_linear", "w_linear_", "w_linear#2"]
    assert torch.equal(gm(x), model(x))


def test_the_weight_of_a_layer_used_elsewhere() -> None:
    """Tied weights: the second use is a layer beside the first, never inside it."""
    model = Fn(lambda m, x: F.linear(m.e(x), m.e.weight), e=nn.Embedding(9, 4))
    gm, x = traced(model, torch.randint(0, 9, (5, 3))), torch.randint(0, 9, (5, 3))
    assert names(gm) == ["e", "e_weight_linear"]
    assert torch.equal(gm(x), model(x))


def test_a_computed_weight_stays_an_operand() -> None:
    model = Fn(lambda m, x: F.linear(x, m.w * 2), w=nn.Parameter(torch.randn(5, 8)))
    assert labels(traced(model, image())) == ["get_attr", "mul", "linear"]


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("dims", [(2, 3), [-1, -2], (3, 2)], ids=str)
def test_the_mean_over_positions_is_global_pooling(dims: Any, keepdim: bool) -> None:
    model = Fn(lambda m, x: torch.mean(x, dims, keepdim) + x.mean(dim=dims, keepdim=keepdim))
    gm, x = traced(model, image()), image(size=13)
    assert labels(gm).count("adaptive_avg_pool2d") == 2
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: x.mean((1, 2)), id="other axes"),
        pytest.param(lambda m, x: x.mean(), id="all axes"),
        pytest.param(lambda m, x: x.flatten(2).mean(2), id="three axes"),
    ],
)
def test_other_means_stay(forward: Callable[..., Any]) -> None:
    assert "mean" in labels(traced(Fn(forward), image()))


def test_a_sum_of_a_list_starts_at_nothing() -> None:
    model = Fn(lambda m, x: sum([m.a(x), m.b(x)]), a=conv(3, 8), b=conv(3, 8))
    assert labels(traced(model, image())) == ["Conv2d", "Conv2d", "add"]


def test_dead_code_goes() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.b(x)
        _ = x.shape[0] * 2
        return m.a(x)

    gm = traced(Fn(forward, a=conv(3, 8), b=conv(3, 8)), image())
    assert names(gm) == ["a"]
    assert [name for name, _ in gm.named_parameters()] == ["a.weight", "a.bias"]


def test_names() -> None:
    """Modules by their path, functions by the scope and the operation; a repeated name is numbered."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu = nn.Linear(8, 8), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.relu(self.fc(x)) + self.relu(x))

    model = nn.Sequential(Block(), Block())
    assert names(traced(model, image())) == [
        *("0.fc", "0.relu", "0.relu#2", "0.add", "0.relu_"),
        *("1.fc", "1.relu", "1.relu#2", "1.add", "1.relu_"),
    ]

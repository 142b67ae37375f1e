"""Blocks are cut where one tensor carries on, and run by themselves as they do in the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import Fn, Residual, conv, image, traced
from torch import Tensor, nn

import lowbit
from lowbit.graph.blocks import Block, blocks, inputs_first, layer_blocks
from lowbit.graph.inputs import Inputs
from lowbit.graph.ops import kind_of
from lowbit.graph.run import walk


def heads(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = m.stem(x).relu()
    return m.left(x), m.right(x).relu()


def branches(m: nn.Module, x: Tensor) -> Tensor:
    a, b = m.stem(x).chunk(2, dim=1)
    return m.last(torch.cat((m.left(a), m.right(b).relu()), 1)).mean((2, 3))


def auxiliary(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = m.stem(x).relu()
    return x, m.last(x)


def late_mask(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * (x.sum(1, keepdim=True) > 0))


def four(**channels: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: conv(*pair) for name, pair in channels.items()}


GRAPHS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "sequential": (
        lambda: nn.Sequential(conv(3, 4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4), nn.Flatten()),
        ["0", "3"],
    ),
    "residual": (
        lambda: nn.Sequential(conv(3, 4), nn.ReLU(), Residual(), Residual(), conv(4, 2)),
        ["0", "2.a .. 2.b", "3.a .. 3.b", "4"],
    ),
    "branching": (
        lambda: Fn(branches, **four(stem=(3, 4), left=(2, 4), right=(2, 4), last=(8, 2))),
        ["stem", "left .. right", "last"],
    ),
    "heads": (
        lambda: Fn(heads, **four(stem=(3, 4), left=(4, 2), right=(4, 2))),
        ["stem", "left", "right"],
    ),
    "auxiliary output": (lambda: Fn(auxiliary, **four(stem=(3, 4), last=(4, 2))), ["stem", "last"]),
    "late mask": (lambda: Fn(late_mask, **four(a=(3, 4), b=(4, 2))), ["a", "b"]),
    "called twice": (
        lambda: Fn(lambda m, x: torch.cat((m.b(m.a(x)), m.a(x)), 1), **four(a=(3, 4), b=(4, 2))),
        ["a", "b", "a#2"],
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_where_graphs_are_cut(name: str) -> None:
    make, expected = GRAPHS[name]
    gm = traced(make(), image())
    found = blocks(gm)
    assert [block.name for block in found] == expected
    nodes = [node for block in found for node in block.nodes]
    assert len(nodes) == len(set(nodes))
    layers = [n for n in gm.graph.nodes if kind_of(n) == "layer"]
    assert sorted(n.name for b in found for n in b.layers) == sorted(n.name for n in layers)


@pytest.mark.parametrize("cut", [blocks, layer_blocks])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_block_alone_gives_what_it_gives_in_the_graph(name: str, cut: Callable[..., list[Block]]) -> None:
    gm, x = traced(GRAPHS[name][0](), image()), image(3)
    before = gm(x)
    inputs_first(gm)
    torch.testing.assert_close(gm(x), before, rtol=0, atol=0)
    values = {node: value for node, (value,) in walk(gm, [Inputs((x,))])}
    order = {node: at for at, node in enumerate(values)}
    for block in cut(gm):
        reads = {node: values[node] for node in block.reads}
        assert max(order[n] for n in reads) < order[block.nodes[0]], "all is there before it runs"
        assert torch.equal(block.run(gm, reads), values[block.end])


def test_what_quantizers_of_a_block_give_can_be_taken_back() -> None:
    x = image(3)
    q = lowbit.prepare(nn.Sequential(Residual(3), conv(3, 3)).eval(), "w4a4", x)
    lowbit.calibrate(q, [x])
    first = blocks(q.graph)[0]
    values = {node: value for node, (value,) in walk(q.graph, [Inputs((x,))])}
    reads = {node: values[node] for node in first.reads}
    assert first.quantizers
    assert torch.equal(first.run(q.graph, reads, lambda source, value: value), values[first.end])
    rounded = first.run(q.graph, reads)
    for node in first.quantizers:
        q.graph.get_submodule(str(node.target)).mode = "off"
    alone = first.run(q.graph, reads)
    for node in first.quantizers:
        q.graph.get_submodule(str(node.target)).mode = "quantize"
    assert not torch.equal(alone, rounded)
    assert torch.equal(first.run(q.graph, reads, lambda source, value: source), alone)

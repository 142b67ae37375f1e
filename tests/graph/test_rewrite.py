"""Edits of a graph."""

from __future__ import annotations

import torch
from helpers import Fn, conv, image, traced
from torch import nn

from lowbit.graph.ops import label
from lowbit.graph.rewrite import clone, finish, insert_after, remove, swap


def test_swap_reaches_every_name_of_a_module() -> None:
    layer, new = nn.Linear(4, 4), nn.Identity()
    model = nn.Module()
    model.a = model.b = layer
    model.list = nn.ModuleList([layer, nn.Sequential(layer)])
    swap(model, "a", new)
    assert model.a is model.b is model.list[0] is model.list[1][0] is new


def test_insert_after_changes_all_readers() -> None:
    gm = traced(Fn(lambda m, x: (y := m.a(x)) * y, a=conv(3, 8)), image())
    node = next(n for n in gm.graph.nodes if n.meta.get("name") == "a")
    before = gm(x := image())
    call = insert_after(gm, node, "added.negative", Fn(lambda m, x: -x))
    finish(gm)
    assert [label(u) for u in node.users] == ["Fn"]
    assert [label(u) for u in call.users] == ["mul"]
    assert torch.equal(gm(x), before), "the two signs cancel"


def test_remove_joins_the_neighbours() -> None:
    gm = traced(nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.Tanh()), image())
    remove(gm, next(n for n in gm.graph.nodes if label(n) == "Sigmoid"))
    finish(gm)
    x = image()
    assert torch.equal(gm(x), x.relu().tanh())
    assert [name for name, _ in gm.named_children()] == ["0", "2"]


def test_a_clone_shares_nothing() -> None:
    gm = traced(conv(3, 8), image())
    other = clone(gm)
    assert not {id(p) for p in gm.parameters()} & {id(p) for p in other.parameters()}
    assert other.meta["leaves"] == gm.meta["leaves"]

"""Attention masks of very large numbers stay in float, in whatever way they are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Fn, sqnr, traced
from torch import Tensor, nn

import lowbit
from lowbit.graph.ops import kind_of

INF, LOWEST = float("-inf"), torch.finfo(torch.float32).min
MASKS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "triu of full -inf": lambda n, a: torch.triu(torch.full((n, n), INF), 1),
    "1 - tril times finfo.min": lambda n, a: (1 - torch.tril(torch.ones(n, n))) * LOWEST,
    "triu times -1e9": lambda n, a: torch.triu(torch.ones(n, n), 1) * -1e9,
    "a constant": lambda n, a: torch.triu(torch.full((6, 6), INF), 1),
    "full_like": lambda n, a: torch.triu(torch.full_like(a, INF), 1),
    "masked_fill": lambda n, a: torch.zeros(n, n).masked_fill(torch.ones(n, n).triu(1).bool(), INF),
}
X = torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(0))
WHY = "adds a mask of very large numbers; 8 bits cannot hold them beside the rest"


class Attention(nn.Module):
    """Scores with a mask that the caller gives, as it is or as ones where a key may be read."""

    def __init__(self, additive: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.additive = nn.Linear(16, 48), nn.Linear(16, 16), additive

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = mask if self.additive else (1.0 - mask[:, None, :]) * -1e9
        return self.out((q @ k.transpose(1, 2) / 4 + mask).softmax(-1) @ v)


def attend(mask: Callable[[int, Tensor], Tensor]) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        a = q @ k.transpose(1, 2) / 4
        a = a + mask(x.shape[1], a)
        return m.out(a.softmax(-1) @ v)

    return Fn(forward, qkv=nn.Linear(16, 48), out=nn.Linear(16, 16))


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_the_model_makes(name: str) -> None:
    model = attend(MASKS[name])
    q = lowbit.quantize(model, "w8a8", [X])
    assert sqnr(model(X), q(X)) > 25
    row = q.coverage()["add"]
    assert (row.status, row.why) == ("float", WHY)


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "ones and zeros"])
def test_masks_among_the_inputs(additive: bool, tmp_path: Path) -> None:
    """Saved and loaded, for which the model is traced on made-up inputs, it has the same masks."""
    model = Attention(additive)
    mask = torch.triu(torch.full((6, 6), INF), 1) if additive else torch.ones(64, 6)
    q = lowbit.quantize(model, "w8a8", [((X, mask),)])
    assert sqnr(model(X, mask), q(X, mask)) > 25
    assert q.coverage()["add"].why == WHY
    lowbit.save(q, tmp_path / "q.safetensors")
    assert torch.equal(lowbit.load(tmp_path / "q.safetensors", model)(X, mask), q(X, mask))


def test_an_ordinary_constant_is_added_on_codes() -> None:
    gm = traced(Fn(lambda m, x: m.a(x) + m.p, a=nn.Linear(16, 16), p=nn.Parameter(torch.ones(16))), X)
    assert "add" in [kind_of(node) for node in gm.graph.nodes]

"""Reshapes of weights: each by its formula, its gradient, and what it promises."""

from __future__ import annotations

import pytest
import torch

from lowbit import PerChannel, QuantSpec
from lowbit.core.reshapes import reshapes

ROWS = QuantSpec(bits=1, mid_rise=True, granularity=PerChannel(0))


def test_every_reshape_is_tested() -> None:
    assert set(reshapes.names()) == {"none", "tanh", "standardize", "clip", "recu"}
    assert [n for n in reshapes.names() if reshapes.get(n).projects] == ["clip", "recu"]
    assert [n for n in reshapes.names() if reshapes.get(n).scheduled] == ["recu"]


@pytest.mark.parametrize("name", reshapes.names())
def test_shapes_and_finiteness(name: str) -> None:
    for w in (
        torch.randn(4, 3, 3, 3),
        torch.zeros(4, 5),
        torch.zeros(0, 5),
        torch.zeros(4, 0),
        torch.ones(1, 1),
    ):
        got = reshapes.get(name)(w, ROWS, torch.tensor(0.5))
        assert got.shape == w.shape
        assert torch.isfinite(got).all()


def test_standardize_balances_and_keeps_the_size() -> None:
    """The oracle: (w - m) / d times d as a constant, by autograd; no gradient along w itself."""
    w = (torch.randn(5, 40) * torch.tensor([1.0, 2.0, 0.1, 5.0, 1.0])[:, None] + 0.3).requires_grad_()
    got = reshapes.get("standardize")(w, ROWS)
    assert torch.allclose(got.mean(1), torch.zeros(5), atol=1e-6)
    assert torch.allclose(got.std(1), w.std(1), rtol=1e-5)
    g = torch.randn(5, 40)
    got.backward(g)
    assert w.grad is not None
    centred = (w - w.mean(1, keepdim=True)).detach()
    assert torch.allclose((w.grad * centred).sum(1), torch.zeros(5), atol=1e-3)
    assert torch.allclose(w.grad.sum(1), torch.zeros(5), atol=1e-4)


def test_clip_is_the_interval_of_binary_connect() -> None:
    got = reshapes.get("clip")(torch.tensor([[-3.0, 0.5, 1.0, 7.0]]), ROWS)
    assert got.tolist() == [[-1.0, 0.5, 1.0, 1.0]]


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.70), (1.0, 0.98)])
def test_recu_clamps_the_tails(progress: float, share: float) -> None:
    w = torch.randn(3, 1000) * torch.tensor([1.0, 10.0, 0.1])[:, None]
    got = reshapes.get("recu")(w, ROWS, torch.tensor(progress))
    kept = (got == w).float().mean(1)
    assert torch.allclose(kept, torch.full((3,), share), atol=2e-3)
    assert torch.equal(got.sign(), w.sign())
    assert (got.abs() <= w.abs()).all()

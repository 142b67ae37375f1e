"""A batch of data as a call of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit import LowbitError
from lowbit.graph.inputs import Inputs

X, Y = torch.arange(6.0).reshape(3, 2), torch.arange(3)


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        pytest.param(X, (X,), {}, id="tensor"),
        pytest.param((X, Y), (X,), {}, id="tuple with labels"),
        pytest.param([X, Y], (X,), {}, id="list with labels, as DataLoader makes it"),
        pytest.param(((X, X), Y), (X, X), {}, id="two inputs with labels"),
        pytest.param(((X, X),), (X, X), {}, id="two inputs without labels"),
        pytest.param({"x": X}, (), {"x": X}, id="dict"),
        pytest.param(({"x": X}, Y), (), {"x": X}, id="dict with labels"),
        pytest.param(Inputs((X,), {"scale": 2}), (X,), {"scale": 2}, id="a call"),
    ],
)
def test_a_batch_is_a_call(batch: Any, args: Any, kwargs: Any) -> None:
    inputs = Inputs.of(batch)
    assert len(inputs.args) == len(args)
    assert all(a is b for a, b in zip(inputs.args, args, strict=True))
    assert dict(inputs.kwargs) == kwargs


@pytest.mark.parametrize("batch", ["text", 3, None, ()], ids=["text", "number", "none", "empty tuple"])
def test_anything_else_is_refused(batch: Any) -> None:
    with pytest.raises(LowbitError, match="pass a tensor, a tuple whose first element is the input"):
        Inputs.of(batch)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_with_samples_cuts_and_repeats(n: int) -> None:
    table = torch.randn(5, 2)
    got = Inputs((X, table), {"y": Y, "flag": True}).with_samples(n)
    assert torch.equal(got.args[0], X[torch.arange(n) % 3])
    assert torch.equal(got.kwargs["y"], Y[torch.arange(n) % 3])
    assert torch.equal(got.args[1], table), "another first axis is not the batch"
    assert got.kwargs["flag"] is True
    assert got.batch_size == n


def test_with_samples_copies() -> None:
    x = torch.zeros(3, 2)
    Inputs((x,)).with_samples(3).args[0].add_(1)
    assert not x.any()


def test_a_call_is_split_by_samples() -> None:
    table = torch.ones(5, 2)
    parts = list(Inputs((X, table), {"y": Y, "scale": 2}).split(2))
    assert [part.batch_size for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part.args[0] for part in parts]), X)
    assert torch.equal(torch.cat([part.kwargs["y"] for part in parts]), Y)
    assert all(part.args[1] is table and part.kwargs["scale"] == 2 for part in parts)

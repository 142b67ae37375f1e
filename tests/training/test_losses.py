"""Losses against those of torch."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import LowbitError
from lowbit.training.losses import Objective, accuracy, logits_of, symmetric_kl
from lowbit.training.settings import Settings

Output = namedtuple("Output", "hidden logits")
SHAPES = {"classes last": ((6, 5), 1), "pixels": ((2, 5, 3, 4), 1), "tokens": ((2, 7, 5), 2)}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_kl_is_both_directions_of_torch(shape: str, temperature: float) -> None:
    size, axis = SHAPES[shape]
    a, b = (torch.randn(size).movedim(axis, -1).reshape(-1, 5) for _ in range(2))
    p, q = (F.log_softmax(t / temperature, dim=-1) for t in (a, b))
    both = sum(F.kl_div(*pair, reduction="batchmean", log_target=True) for pair in ((p, q), (q, p)))
    rest = [n for i, n in enumerate(size) if i != axis]
    given = [t.reshape(*rest, 5).movedim(-1, axis) for t in (a, b)]
    assert torch.allclose(symmetric_kl(*given, temperature, axis), both * temperature**2 / 2, rtol=1e-5)
    assert symmetric_kl(given[0], given[0], temperature, axis) == 0


def test_the_objective_is_the_weighted_sum() -> None:
    output, taught, labels = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    task, distance = F.cross_entropy(output, labels), symmetric_kl(output, taught, 2.0)
    objective = Objective(Settings(distill=0.25, temperature=2.0), True)
    assert torch.allclose(objective(output, labels, taught), 0.75 * task + 0.25 * distance)
    assert torch.equal(Objective(Settings(distill=0.25), False)(output, labels, None), task)
    alone = Objective(Settings(loss=None, distill=0.25, temperature=2.0), True)
    assert torch.equal(alone(output, None, taught), distance)
    assert not alone.needs_labels


def test_cross_entropy_finds_the_classes_on_their_axis() -> None:
    output, labels = torch.randn(2, 7, 5), torch.randint(0, 5, (2, 7))
    objective = Objective(Settings(class_axis=2), False)
    assert torch.allclose(
        objective.task(output, labels), F.cross_entropy(output.flatten(0, 1), labels.flatten())
    )


@pytest.mark.parametrize(
    "output",
    [torch.ones(2), {"loss": 3, "logits": torch.ones(2)}, {"x": torch.ones(2)}, (torch.ones(2), 1)],
    ids=["tensor", "logits of a dict", "first of a dict", "first of a tuple"],
)
def test_logits_of(output: Any) -> None:
    assert torch.equal(logits_of(output), torch.ones(2))


def test_logits_of_a_record() -> None:
    assert torch.equal(logits_of(Output(torch.zeros(1), torch.ones(2))), torch.ones(2))


def test_accuracy() -> None:
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 3, 3])) == 0.75


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: logits_of([1, 2]), "returns a list, in which there are no logits"),
        (
            lambda: accuracy(torch.eye(4), torch.eye(4)),
            r"shape \[4\], and the labels are \[4, 4\] torch.float32",
        ),
        (lambda: Objective(Settings(loss=None), False), "loss=None leaves nothing to train on"),
        (
            lambda: Objective(Settings(loss=lambda o, y: o), False).task(torch.ones(2), None),
            "mean over the batch",
        ),
        (lambda: Objective(Settings(loss=lambda o, y: 1.0), False).task(torch.ones(2), None), "returned 1.0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        call()


def test_gradient_of_the_symmetric_kl() -> None:
    student, teacher = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4)
    small = 1e-6
    symmetric_kl(student, teacher).backward()
    assert isinstance(student.grad, Tensor)
    moved = student.detach().clone()
    moved[1, 2] += small * 1e3
    slope = (symmetric_kl(moved, teacher) - symmetric_kl(student.detach(), teacher)) / (small * 1e3)
    assert slope.item() == pytest.approx(student.grad[1, 2].item(), rel=2e-2)

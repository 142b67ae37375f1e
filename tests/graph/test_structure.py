"""Quantization leaves the structure alone; every change of the architecture shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.assembly import float_graph
from lowbit.graph.inputs import Inputs
from lowbit.graph.structure import first_difference, first_module_difference, structure_of


class Net(nn.Module):
    """One convolution, called twice, and functions with constants."""

    def __init__(self, size: int = 2, slope: float = 0.1, bias: bool = True) -> None:
        super().__init__()
        self.size, self.slope = size, slope
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=bias)
        self.pool = nn.AvgPool2d(2, count_include_pad=bias)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv(self.conv(x)), self.slope)
        return self.fc(self.pool(F.max_pool2d(x, self.size, 2)).mean((2, 3))[:, None])


class Doubled(Net):
    """`Net` with more operations in front."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 2 * x)


def structure(model: nn.Module, recipe: Any = "w8a8") -> Any:
    gm, _ = float_graph(model, lowbit.Recipe.get(recipe), Inputs.of(torch.rand(2, 3, 9, 9)))
    return structure_of(gm)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "fp16"])
def test_quantizers_and_corrections_leave_no_trace(recipe: str) -> None:
    q = lowbit.quantize(Net(bias=False), recipe, [torch.rand(8, 3, 9, 9)])
    assert first_difference(structure_of(q.graph), structure(Net(bias=False), q.recipe)) is None


CHANGES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "argument of a function": (
        lambda: Net(slope=0.2),
        "reads of 'leaky_relu' (leaky_relu) is conv#2, negative_slope=0.1, inplace=False in the file and "
        "conv#2, negative_slope=0.2, inplace=False in this model",
    ),
    "attribute that is not printed": (
        lambda: Net(bias=False),
        "count_include_pad of 'pool' (AvgPool2d) is True in the file and False in this model",
    ),
    "operation": (Doubled, "where the file has 'conv' (Conv2d) this model has 'mul' (mul)"),
}


@pytest.mark.parametrize(("build", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_said(build: Callable[[], nn.Module], words: str) -> None:
    assert first_difference(structure(Net()), structure(build())) == words


def test_weights_do_not_count() -> None:
    assert first_difference(structure(Net()), structure(Net())) is None


def test_a_longer_and_a_shorter_structure() -> None:
    parts = structure(Net())
    assert first_difference(parts, parts[:-1]) == "'output' (output) is missing from this model"
    assert first_difference(parts[:-1], parts) == "'output' (output) of this model is not in the file"


def test_modules_of_a_model_that_does_not_run() -> None:
    parts = structure(Net())
    assert first_module_difference(parts, Net()) is None
    wrong = Net()
    wrong.conv = nn.Conv2d(4, 3, 3, padding=1)
    words = "in_channels of 'conv' (Conv2d) is 3 in the file and 4 in this model"
    assert first_module_difference(parts, wrong) == words
    wrong.conv = nn.Identity()
    words = "'conv' is a Conv2d in the file and a Identity in this model"
    assert first_module_difference(parts, wrong) == words

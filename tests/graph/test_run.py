"""Running node by node gives what the graph gives."""

from __future__ import annotations

import pytest
import torch
from helpers import STYLES, Fn, conv, image, traced
from torch import Tensor, nn

from lowbit.graph.inputs import Inputs
from lowbit.graph.ops import label
from lowbit.graph.run import bind_inputs, flat_tensors, peak_bytes, walk


@pytest.mark.parametrize("style", STYLES)
def test_walking_equals_calling(style: str) -> None:
    gm = traced(STYLES[style](), image())
    data = [Inputs((image(3),)), Inputs((image(5),))]
    *_, (node, outputs) = walk(gm, data)
    assert node.op == "output"
    for inputs, output in zip(data, outputs, strict=True):
        pairs = zip(flat_tensors(inputs.call(gm)), flat_tensors(output), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_values_sent_back_replace_those_that_were_computed() -> None:
    gm = traced(nn.Sequential(nn.Identity(), nn.ReLU()), image())
    steps, x = walk(gm, [Inputs((image(),))]), image()
    item = next(steps)
    while item[0].op != "output":
        item = steps.send([x]) if label(item[0]) == "Identity" else next(steps)
    assert torch.equal(item[1][0], x.relu())


def test_only_what_is_still_needed_is_kept() -> None:
    """The oracle: the most that is alive at once, counted by hand for one sample."""
    chain = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(20)))
    wide = Fn(lambda m, x: m.a(x) + x, a=conv(4, 4))
    x = image(channels=4)
    one = 4 * 8 * 8 * 4
    assert peak_bytes(traced(chain, x)) == 2 * one
    assert peak_bytes(traced(wide, x)) == 3 * one


class Call(nn.Module):
    def forward(self, x: Tensor, y: Tensor, *rest: Tensor, scale: float = 2.0, **named: Tensor) -> Tensor:
        return (x + y + rest[0]) * scale + named["bias"]


def test_arguments_find_their_placeholders() -> None:
    x, y, z = (torch.full((3, 1), float(i)) for i in range(3))
    inputs = Inputs((x, y, z), {"bias": z})
    gm = traced(Call(), *inputs.args, **inputs.kwargs)
    first, second, rest, named = bind_inputs(gm, inputs).values()
    assert first is x
    assert second is y
    assert rest[0] is named["bias"] is z
    *_, (_, (output,)) = walk(gm, [inputs])
    assert torch.equal(output, inputs.call(Call()))


def test_float_tensors_of_an_output() -> None:
    a, b = torch.randn(2), torch.randn(3)
    assert flat_tensors({"a": a, "ids": torch.arange(3), "rest": [(b, None), 4]}) == [a, b]


@pytest.mark.parametrize("limit", [0, 2000, 10**9])
def test_values_beyond_the_limit_go_to_files_and_come_back(limit: int) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.relu().chunk(2, dim=1)
            ranks = x.argmax(1)
            return (a.transpose(2, 3) + b.half().float()) * ranks[:, None] + x.sum()

    data = [Inputs((torch.randn(n, 4, 5, 5),)) for n in (3, 1, 2)]
    gm = traced(Net(), *data[0].args)
    want, got = ([(n.name, v) for n, v in walk(gm, data, size)] for size in (float("inf"), limit))
    for (name, before), (same, after) in zip(want, got, strict=True):
        assert name == same
        pairs = zip(flat_tensors([*before]), flat_tensors([*after]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

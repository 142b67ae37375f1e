"""A traced model computes the same, bit for bit, at any batch size; what cannot be followed is said."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import STYLES, DataBranch, Fn, conv, image, settle, traced
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

from lowbit import LowbitError
from lowbit.graph.inputs import Inputs, Note
from lowbit.graph.run import flat_tensors
from lowbit.graph.trace import trace
from lowbit.graph.tracer import Tracer


def assert_equal_at_any_batch(model: nn.Module, *example: Tensor, atol: float = 0.0) -> None:
    """The oracle: the model itself, on the example and on other batches than tracing saw."""
    model.eval()
    gm = traced(model, *example)
    for inputs in (example, [torch.cat([t, t + 1, t])[:-1] for t in example], [t[:1] for t in example]):
        want = flat_tensors(model(*(t.clone() for t in inputs)))
        got = flat_tensors(gm(*(t.clone() for t in inputs)))
        assert len(want) == len(got) > 0
        pairs = zip(want, got, strict=True)
        assert all(torch.allclose(a, b, rtol=0.0, atol=atol, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize("style", STYLES)
def test_the_styles(style: str) -> None:
    assert_equal_at_any_batch(STYLES[style](), image(5))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList([first, nn.Sequential(conv(8, 8), nn.ReLU6())])
        self.heads = nn.ModuleDict({"main": nn.Linear(8, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.heads["main"](x.mean([2, 3]))


class SharedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(conv(8, 8), nn.ReLU(inplace=True))
        self.stem, self.first, self.second = conv(3, 8), block, block

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.stem(x)))


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.fused = (
            nn.LayerNorm(16),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            fused,
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, steps, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * (q.size(-1) ** -0.5)).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(batch, steps, width))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros(1, x.shape[0], 8)
        y, (h, _) = self.lstm(x, (start, start))
        return self.fc(y[:, -1]) + self.fc(h[0])


class Same(nn.Conv2d):
    """A subclass as people write them: padding by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


def ops(forward: Callable[..., Any]) -> nn.Module:
    return Fn(forward, a=conv(3, 8), b=conv(8, 8), relu=nn.ReLU(inplace=True), fc=nn.Linear(512, 4))


def in_place_relu(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(m.relu(y)) + m.relu(y)


def in_place_methods(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = F.relu(y)
    z += y
    w = m.b(z)
    w.add_(z).mul_(0.5)
    torch.relu_(w)
    return m.b(w) - y


def alias(m: Any, x: Tensor) -> Tensor:
    y = z = m.a(x)
    y += 1
    y *= y
    return z + m.b(y)


def aliased_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.view(-1, 8, 64).add_(1)
    return m.b(y)


def writes_its_input(m: Any, x: Tensor) -> Tensor:
    x.sub_(0.5).div_(0.25)
    return m.a(x)


def many_outputs(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return y, {"twice": [y * 2, (m.b(y),)]}


def branch_on_a_type(m: Any, x: Any) -> Tensor:
    return m.a(x) if isinstance(x, Tensor) else x


def positions(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).flatten(2)
    return y + torch.arange(y.shape[-1]) / math.sqrt(y.shape[1])


def ifs(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if y.dim() == 4 and len(y.shape) == 4 and y.dtype == torch.float32:
        y = m.b(y)
    return y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "nested modules": (lambda: settle(Nested(), image()), (5, 3, 8, 8)),
    "a block under two names": (SharedBlock, (5, 3, 8, 8)),
    "attention as plain operations": (lambda: Attention(fused=False), (5, 6, 16)),
    "scaled_dot_product_attention": (lambda: Attention(fused=True), (5, 6, 16)),
    "LSTM with a state of the batch's size": (Recurrent, (5, 6, 16)),
    "subclass of a layer": (
        lambda: nn.Sequential(Same(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        (5, 3, 8, 8),
    ),
    "weight_norm": (lambda: nn.Sequential(weight_norm(conv(3, 8)), nn.ReLU()), (5, 3, 8, 8)),
    "one layer": (lambda: nn.Linear(16, 4), (5, 6, 16)),
    "in-place ReLU called twice": (lambda: ops(in_place_relu), (5, 3, 8, 8)),
    "in-place methods and functions": (lambda: ops(in_place_methods), (5, 3, 8, 8)),
    "in-place operators on two names of a tensor": (lambda: ops(alias), (5, 3, 8, 8)),
    "a view written in place": (lambda: ops(aliased_view), (5, 3, 8, 8)),
    "the input written in place": (lambda: ops(writes_its_input), (5, 3, 8, 8)),
    "nested outputs": (lambda: ops(many_outputs), (5, 3, 8, 8)),
    "branch on a type": (lambda: ops(branch_on_a_type), (5, 3, 8, 8)),
    "arange and sqrt of a size": (lambda: ops(positions), (5, 3, 8, 8)),
    "branches on rank and dtype": (lambda: ops(ifs), (5, 3, 8, 8)),
    "view": (lambda: ops(lambda m, x: m.fc(m.a(x).view(x.shape[0], -1))), (5, 3, 8, 8)),
    "zeros of the batch's size": (
        lambda: ops(lambda m, x: torch.cat([m.a(x), torch.zeros(x.size(0), 1, 8, 8)], 1)),
        (5, 3, 8, 8),
    ),
    "loop over the batch": (
        lambda: ops(lambda m, x: torch.stack([m.a(x)[i] for i in range(len(x))])),
        (5, 3, 8, 8),
    ),
    "loop over the rows": (
        lambda: ops(lambda m, x: sum(m.a(x)[:, :, i] for i in range(x.shape[2]))),
        (5, 3, 8, 8),
    ),
    "branch on item": (lambda: ops(lambda m, x: m.a(x) if x.sum().item() > 0 else x), (5, 3, 8, 8)),
    "branch on the batch size": (lambda: ops(lambda m, x: m.a(x) if x.shape[0] % 2 else x), (5, 3, 8, 8)),
    "interpolate to another's size": (
        lambda: ops(lambda m, x: F.interpolate(F.max_pool2d(m.a(x), 2), size=x.shape[2:])),
        (5, 3, 8, 8),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    build, shape = MODELS[name]
    written_out = name == "scaled_dot_product_attention"  # whose sums go in another order
    assert_equal_at_any_batch(build(), torch.randn(shape), atol=1e-5 if written_out else 0.0)


def notes_of(model: nn.Module, *example: Any) -> list[Note]:
    return trace(model, Inputs(example))[1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a view written in place", "its graph would compute something else"),
        ("branch on a type", "its graph would compute something else"),
        ("loop over the batch", "the flow depends on the size of the batch"),
        ("branch on the batch size", "the flow depends on the size of the batch"),
        ("branch on item", "the flow depends on the data"),
    ],
)
def test_what_cannot_be_followed_is_called_as_it_stands(name: str, reason: str) -> None:
    build, shape = MODELS[name]
    (note,) = notes_of(build(), torch.randn(shape))
    assert note == Note("", f"the whole model is called as it stands, for it cannot be traced: {reason}")


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("nested modules", []),
        ("arange and sqrt of a size", []),
        ("loop over the rows", ["a size was fixed at 8, as for the example input"]),
        ("branches on rank and dtype", ["a branch on a shape was taken as True, as for the example input"]),
    ],
)
def test_decisions_on_shapes_are_said(name: str, texts: list[str]) -> None:
    build, shape = MODELS[name]
    assert [note.text for note in notes_of(build(), torch.randn(shape))] == texts


class Causal(nn.Module):
    """A buffer that is cut to the length of the input, and a Parameter that decides a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(12, 12).tril().bool())
        self.register_buffer("flag", torch.tensor(1))
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        steps = x.size(1)
        y = (x @ x.mT).masked_fill(~self.mask[:steps, :steps], -1e9).softmax(-1)
        if self.gain > 1 and self.flag:
            y = y * self.gain
        return y @ x


def test_buffers_and_parameters_follow_the_input_or_decide() -> None:
    gm, notes = trace(Causal(), Inputs((torch.randn(4, 6, 8),)))
    assert notes == []
    for steps in (6, 3, 12):
        x = torch.randn(5, steps, 8)
        assert torch.equal(gm(x), Causal()(x))


def test_tracing_holds_few_activations() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    tracer = Tracer(frozenset(), [{"input": torch.randn(2, 4)}], {})
    most, evaluate = [], tracer._evaluate

    def watch(node: fx.Node, example: int) -> Any:
        most.append(len(tracer.values))
        return evaluate(node, example)

    tracer._evaluate = watch  # type: ignore[method-assign]
    tracer.trace(model)
    assert max(most) <= 3


def test_only_the_submodule_that_holds_the_branch_becomes_a_leaf() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.inner = conv(3, 3), nn.Sequential(nn.Identity(), DataBranch())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.plain(x))

    gm, notes = trace(Outer(), Inputs((image(),)))
    assert list(gm.meta["leaves"]) == ["inner.1"]
    assert not gm.meta["whole"]
    assert [note.name for note in notes] == ["inner.1"]


def test_a_leaf_swallows_the_leaves_inside_it() -> None:
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = DataBranch()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y if y.sum() > 0 else -y

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.middle = Middle()

        def forward(self, x: Tensor) -> Tensor:
            return self.middle(x) + 1

    gm, notes = trace(Outer(), Inputs((image(),)))
    assert list(gm.meta["leaves"]) == ["middle"]
    assert [note.name for note in notes] == ["middle"]
    assert sorted(gm.meta["inside"]) == ["middle.inner.a", "middle.inner.b"]


def test_the_model_is_untouched() -> None:
    model = ops(in_place_relu).train()
    before, ids = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    gm = traced(model, image())
    assert model.training
    assert model.relu.inplace
    assert [id(p) for p in model.parameters()] == ids
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not {id(p) for p in gm.parameters()} & set(ids), "the graph holds copies"
    assert not gm.training


def test_the_data_is_untouched() -> None:
    x = image()
    before = x.clone()
    traced(ops(writes_its_input), x)
    assert torch.equal(x, before)


def test_creators_are_restored_even_after_a_failure() -> None:
    before = torch.zeros, torch.arange
    traced(ops(branch_on_a_type), image())
    with pytest.raises(LowbitError):
        traced(nn.Linear(3, 2), torch.randn(2, 5))
    assert (torch.zeros, torch.arange) == before


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, flip: bool = False
    ) -> Tensor:
        y = self.fc(x) * scale
        if mask is not None:
            y = y * mask
        return -y if flip else y


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        pytest.param((torch.ones(4, 8),), {}, id="defaults"),
        pytest.param((torch.ones(4, 8), torch.ones(4, 1) * 2), {}, id="positional"),
        pytest.param((torch.ones(4, 8),), {"mask": torch.ones(4, 1) * 2, "flip": True}, id="by name"),
        pytest.param((), {"x": torch.ones(4, 8), "scale": 2.0}, id="all by name"),
    ],
)
def test_arguments(args: Any, kwargs: Any) -> None:
    model = Optional().eval()
    assert torch.equal(traced(model, *args, **kwargs)(*args, **kwargs), model(*args, **kwargs))


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, *parts: Tensor, **options: Tensor) -> Tensor:
        return self.fc(parts[0]) + parts[1] + sum(options.values(), torch.zeros(()))


@pytest.mark.parametrize("kwargs", [{}, {"bias": torch.ones(8)}], ids=["args", "kwargs"])
def test_starred_arguments(kwargs: dict[str, Tensor]) -> None:
    model, args = Many().eval(), (torch.randn(4, 8), torch.randn(4, 8))
    assert torch.equal(traced(model, *args, **kwargs)(*args, **kwargs), model(*args, **kwargs))


def test_an_axis_that_is_not_the_batch() -> None:
    """Cutting a square mask would not fit: only tensors of the batch's length are cut."""
    model = Fn(lambda m, x: m.fc(x), fc=nn.Linear(6, 6))
    pair = Fn(lambda m, x: m.fc(x[0]) @ x[1], fc=nn.Linear(6, 6))
    assert traced(model, torch.randn(9, 6)) is not None
    example = (torch.randn(9, 6), torch.eye(6))
    assert torch.equal(traced(pair, example)(example), pair(example))


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(LowbitError, match="does not run on the example input: RuntimeError"):
        traced(nn.Linear(3, 2), torch.randn(4, 5))
    with pytest.raises(
        LowbitError, match=r"several inputs are a tuple inside the tuple: \(\(a, b\), label\)"
    ):
        traced(nn.Bilinear(3, 3, 2), torch.randn(4, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(LowbitError, match=r"parameter 'weight' is torch\..*pass model\.float\(\)"):
        traced(nn.Linear(3, 2).to(dtype), torch.randn(4, 3, dtype=dtype))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_a_hook_computes() -> None:
    """The old weight_norm keeps a tensor with a gradient history, which deepcopy refuses."""
    model = nn.Sequential(nn.utils.weight_norm(conv(3, 8)), nn.ReLU())
    assert_equal_at_any_batch(model, image())

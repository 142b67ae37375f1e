"""Steps of trains in the compiled library against float64, on every path; and when the library stays away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from lowbit import LowbitError
from lowbit.kernels import tensor_train
from lowbit.kernels.native import PATHS, TENSOR_TRAIN, Library, load
from lowbit.kernels.tensor_train import LANES, PANEL, Step
from lowbit.nn.tensorized import TTLinear

library = tensor_train._loaded
RUNS = PATHS[: library.best + 1] if isinstance(library, Library) else PATHS[:1]
compiled = pytest.mark.skipif(not tensor_train.available(), reason=tensor_train.description())
every_path = pytest.mark.parametrize("path", RUNS, indirect=True)
CHAINS = {
    "one-number": [Step(1, 1, 1, 1)],
    "rows": [Step(5, 17, 9, 1)],
    "one-row": [Step(1, 100, 33, 1)],
    "columns": [Step(1, 13, 20, 100)],
    "products": [Step(3, 40, 33, 16)],
    "no-depth": [Step(2, 6, 1, 31)],
    "halves-forward": [Step(1, 12, 5, 6), Step(4, 33, 18, 1)],
    "halves-backward": [Step(6, 20, 5, 1), Step(2, 11, 15, 4)],
    "three": [Step(2, 9, 3, 10), Step(6, 5, 5, 6), Step(10, 19, 18, 1)],
}


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    assert isinstance(tensor_train._loaded, Library)
    monkeypatch.setattr(tensor_train._loaded, "path", PATHS.index(request.param))
    yield request.param
    assert tensor_train.description() == f"native, {request.param}"


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def parts(steps: Sequence[Step], samples: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Matrices, bias and input."""
    first, last = steps[0], steps[-1]
    x = torch.randn(samples, first.batch * first.depth * first.rest)
    bias = torch.randn(last.batch * last.outputs * last.rest)
    return [torch.randn(s.outputs, s.depth) for s in steps], bias, x


def native(
    steps: Sequence[Step], matrices: Sequence[Tensor], bias: Tensor | None, samples: int
) -> Callable[[Tensor], Tensor]:
    last = steps[-1]
    ready = [tensor_train.packed(m) if s.rest == 1 else m for m, s in zip(matrices, steps, strict=True)]
    shape = (samples, last.batch * last.outputs * last.rest)
    return tensor_train.product(steps, ready, bias, samples, shape)


def exact(steps: Sequence[Step], matrices: Sequence[Tensor], bias: Tensor | None, x: Tensor) -> Tensor:
    y = x.double()
    for s, matrix in zip(steps, matrices, strict=True):
        y = torch.einsum("od,bdr->bor", matrix.double(), y.reshape(-1, s.depth, s.rest))
    y = y.reshape(len(x), -1)
    return y if bias is None else y + bias


def check(steps: Sequence[Step], samples: int, has_bias: bool) -> None:
    """Within what rounding each product and each addition may move."""
    matrices, added, x = parts(steps, samples)
    bias = added if has_bias else None
    size = exact(steps, [m.abs() for m in matrices], added.abs() if has_bias else None, x.abs())
    found = native(steps, matrices, bias, samples)(x)
    assert found.dtype is torch.float32
    assert found.is_contiguous()
    roundings = sum(s.depth + 1 for s in steps) + 1
    lost = (found - exact(steps, matrices, bias, x)).abs()
    assert (lost <= roundings * 2**-24 * size).all(), str((steps, samples))


@compiled
@every_path
class TestProduct:
    @pytest.mark.parametrize("has_bias", [True, False])
    @pytest.mark.parametrize("samples", [1, 3])
    @pytest.mark.parametrize("steps", CHAINS.values(), ids=CHAINS)
    def test_is_that_of_float64(self, path: str, steps: list[Step], samples: int, has_bias: bool) -> None:
        check(steps, samples, has_bias)

    def test_of_every_height_and_width(self, path: str) -> None:
        for rows in range(1, 27):
            for columns in range(1, 2 * PANEL + 3):
                check([Step(1, rows, 3, columns)], 1, True)
                check([Step(rows, columns, 3, 1)], 1, True)

    def test_writes_nothing_beside_the_result(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for columns in range(1, PANEL + 2):
            steps = [Step(1, 5, 4, columns)]
            matrices, _, x = parts(steps, 1)
            call = native(steps, matrices, None, 1)
            wanted, whole = call(x), torch.full((64 + 5 * columns + 64,), 7.0)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty_like", lambda _, room=whole: room[64:-64])
                assert torch.equal(call(x), wanted.flatten())
            assert (whole[:64] == 7).all()
            assert (whole[-64:] == 7).all()

    @pytest.mark.usefixtures("two_threads")
    def test_is_the_same_each_time_in_any_batch_and_on_any_number_of_threads(self, path: str) -> None:
        steps, samples = [Step(1, 32, 64, 16), Step(4, 96, 128, 1)], 120
        matrices, bias, x = parts(steps, samples)
        assert samples * (32 * 64 * 16 + 4 * 96 * 128) / 8 > 1e6  # worth two threads
        call = native(steps, matrices, bias, samples)
        found = call(x)
        assert torch.equal(call(x), found)
        torch.set_num_threads(1)
        assert torch.equal(call(x), found)
        alone = native(steps, matrices, bias, 1)
        assert torch.equal(torch.cat([alone(row) for row in x.split(1)]), found)

    def test_holds_what_it_reads(self, path: str) -> None:
        steps = CHAINS["three"]
        matrices, bias, x = parts(steps, 2)
        wanted = exact(steps, matrices, bias, x)
        call = native(steps, matrices, bias, 2)
        del matrices, bias
        _ = [torch.full((n,), 1e9) for n in range(1, 400)]
        torch.testing.assert_close(call(x).double(), wanted, rtol=1e-3, atol=1e-3)


@compiled
class TestErrors:
    def test_a_matrix_or_a_bias_that_does_not_fit(self) -> None:
        step = Step(2, 3, 4, 5)
        for matrix in (torch.randn(3, 5), torch.randn(3, 4).double(), torch.randn(4, 3).t()):
            with pytest.raises(LowbitError, match="meets a step of 3 x 4; give it contiguous in float32"):
                tensor_train.product([step], [matrix], None, 1, (1, 30))
        with pytest.raises(LowbitError, match="packed where rest = 1"):
            tensor_train.product([Step(2, 3, 4, 1)], [torch.randn(3, 4)], None, 1, (1, 6))
        with pytest.raises(LowbitError, match="meets 30 outputs; give each one"):
            tensor_train.product([step], [torch.randn(3, 4)], torch.ones(6), 1, (1, 30))

    def test_no_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensor_train, "_loaded", "not wanted")
        assert tensor_train.description() == "pure torch: not wanted"
        assert tensor_train.lanes_for(torch.ones(2)) == 0
        with pytest.raises(LowbitError, match="not there: not wanted"):
            tensor_train.product([Step(1, 1, 1, 2)], [torch.ones(1, 1)], None, 1, (1, 2))


def test_without_a_library_a_layer_works_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_KERNELS", "off")
    monkeypatch.setattr(tensor_train, "_loaded", load(TENSOR_TRAIN))
    assert tensor_train.description() == "pure torch: LOWBIT_KERNELS is off"
    layer, x = TTLinear((2, 3), (3, 2), 2).eval(), torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.dense_weight().t())


class Wrapped(Tensor):
    pass


X = torch.randn(2, 24)
INPUTS: dict[str, Tensor] = {
    "double": X.double(),
    "transposed": torch.randn(24, 24).t(),
    "every-other": torch.randn(2, 48)[:, ::2],
    "meta": X.to("meta"),
    "sparse": X.to_sparse(),
    "subclass": X.as_subclass(Wrapped),
    "negated": torch._neg_view(X),
}


@compiled
class TestLanes:
    def test_are_those_of_the_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(len(RUNS)):
            monkeypatch.setattr(tensor_train._loaded, "path", number)
            assert tensor_train.lanes_for(X) == LANES[number]
            assert tensor_train.lanes_for(X[0]) == tensor_train.lanes_for(X[1:]) == LANES[number]

    @pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
    def test_are_none_where_memory_is_not_plain(self, x: Tensor) -> None:
        assert tensor_train.lanes_for(x) == 0

    @pytest.mark.parametrize(
        "context",
        [
            lambda: torch.autocast("cpu", torch.bfloat16),
            lambda: FlopCounterMode(display=False),
            forward_ad.dual_level,
        ],
        ids=["autocast", "flops", "forward-derivative"],
    )
    def test_are_none_where_operations_are_watched(
        self, context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        with context():
            assert tensor_train.lanes_for(X) == 0
        assert tensor_train.lanes_for(X)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # jvp's own
    @pytest.mark.parametrize(
        "transformed",
        [
            lambda f: torch.vmap(f)(X),
            lambda f: torch.func.jvp(f, (X,), (X,)),
            lambda f: torch.func.functionalize(f)(X),
            *(lambda f, mode=mode: make_fx(f, tracing_mode=mode)(X) for mode in ("real", "fake", "symbolic")),
        ],
        ids=["vmap", "jvp", "functionalize", "real", "fake", "symbolic"],
    )
    def test_are_none_where_functions_are_transformed(self, transformed: Any) -> None:
        seen = []

        def function(x: Tensor) -> Tensor:
            seen.append(tensor_train.lanes_for(x))
            return x * 2

        transformed(function)
        assert seen
        assert not any(seen)


@compiled
class TestTTLinear:
    """The layer calls the library where it may, and gives the same numbers where it may not."""

    def layer(self) -> tuple[TTLinear, Tensor]:
        torch.manual_seed(0)
        layer = TTLinear((4, 4, 8), (8, 4, 4), 4).eval()
        torch.nn.init.normal_(layer.bias)
        return layer, torch.randn(2, 128)

    def lanes_of(self, layer: TTLinear) -> list[int]:
        """Of the products that are kept."""
        return [key[2] for key in layer._kept.products]

    @every_path
    @pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 128), (0, 128), (70, 128)])
    def test_is_the_dense_layer(self, path: str, shape: tuple[int, ...]) -> None:
        layer, _ = self.layer()
        x = torch.randn(shape)
        wanted = torch.nn.functional.linear(x.double(), layer.dense_weight().double(), layer.bias.double())
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                for _ in range(2):
                    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.skipif(RUNS[-1] == PATHS[0], reason="the portable loops are slower than PyTorch")
    def test_calls_the_library_in_evaluation_alone(self) -> None:
        layer, x = self.layer()
        with torch.no_grad():
            wanted = layer(x)
        assert self.lanes_of(layer) == [LANES[-1] if RUNS[-1] == "AVX512" else 8]
        layer.train()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), wanted)
        layer.eval()
        torch.testing.assert_close(layer(x), wanted)
        assert layer(x).requires_grad
        assert not layer._kept.products

    def test_what_the_library_cannot_read_goes_to_pytorch(self) -> None:
        layer, x = self.layer()
        wide = torch.randn(2, 256)
        wide[:, ::2] = x
        with torch.no_grad():
            wanted = layer(x)
            torch.testing.assert_close(layer(wide[:, ::2]), wanted)
            torch.testing.assert_close(torch.vmap(layer)(x), wanted)
            torch.testing.assert_close(make_fx(layer)(x)(x), wanted)
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype is torch.bfloat16
            with FlopCounterMode(display=False) as counter:
                layer(x)
            assert counter.get_total_flops()
            torch.testing.assert_close(layer.double()(x.double()).float(), wanted)

    @pytest.mark.parametrize("context", [nullcontext(), torch.device("meta")], ids=["plain", "device"])
    def test_whatever_new_tensors_are(self, context: AbstractContextManager[Any]) -> None:
        layer, x = self.layer()
        before = torch.get_default_dtype()
        with torch.no_grad():
            wanted = layer(x)
            torch.set_default_dtype(torch.float64)
            try:
                with context:
                    found = layer(x)
            finally:
                torch.set_default_dtype(before)
        assert torch.equal(found, wanted)

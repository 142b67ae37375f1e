"""Checkpoints: what is loaded is what was saved, bit for bit, and anything else is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowbit
from lowbit import FP16, INT4, INT8, UINT8, LowbitError, PerGroup, PerTensor, QuantSpec, Recipe, Rule, sealed
from lowbit.core.qtensor import QTensor
from lowbit.core.spec import BINARY, TERNARY
from lowbit.export import checkpoint
from lowbit.export.checkpoint import load, save
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer


class Residual(nn.Module):
    """Convolution, BatchNorm, ReLU, a residual add and a linear head; `conv` is called twice."""

    def __init__(self, channels: int = 8, stride: int = 1, mode: str = "zeros", head: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, stride=stride, bias=False, padding_mode=mode)
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.fc = nn.Linear(channels, head)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.conv(x) + x)
        x = F.relu(self.conv(x) + x)
        return self.fc(x.mean((2, 3)))


class Sequence(nn.Module):
    """An embedding, a norm that stays in float, a weight used by hand, a constant; dicts in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.w = nn.Parameter(torch.randn(6, 8))
        self.register_buffer("gain", torch.randn(6), persistent=False)

    def forward(self, tokens: Tensor, flip: bool = False) -> dict[str, Tensor]:
        y = F.linear(self.norm(self.embed(tokens)), self.w) * self.gain
        return {"y": y.flip(-1) if flip else y, "mean": y.mean(1)}


class Branch(nn.Module):
    """A branch on data inside `inner`, which can therefore not be traced."""

    class Inner(nn.Module):
        def __init__(self, limit: float) -> None:
            super().__init__()
            self.limit = limit
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.mean() > self.limit else x

    def __init__(self, limit: float = -100.0) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.inner = self.Inner(limit)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.inner(self.a(x)))))


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens() -> dict[str, Any]:
    return {"tokens": torch.randint(0, 11, (16, 7), generator=torch.Generator().manual_seed(1)), "flip": True}


def features() -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "residual": (Residual, images),
    "sequence": (Sequence, tokens),
    "branch": (Branch, features),
}
GROUPED = Recipe(
    rules=(
        Rule(match="stem", weight=INT8, activation=UINT8),
        Rule(weight=replace(INT4, granularity=PerGroup(1, 4)), activation=UINT8),
    )
)
RECIPES: dict[str, Any] = {"grouped": GROUPED} | {name: name for name in ("w8a8", "w4a8", "w8", "w4", "fp16")}


def quantized(
    build: Callable[[], nn.Module] = Residual, data: Any = None, recipe: Any = "w8a8"
) -> QuantizedModel:
    """A frozen model; its weights come from seed 0."""
    torch.manual_seed(0)
    return lowbit.quantize(build().eval(), recipe, calibration=[images() if data is None else data])


def call(q: nn.Module, data: Any) -> list[Tensor]:
    """All outputs of one call."""
    with torch.no_grad():
        out = q(**data) if isinstance(data, dict) else q(data)
    return list(out.values()) if isinstance(out, dict) else [out]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file to damage."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return save(
        lowbit.quantize(model, "w4a8", [features()]), tmp_path_factory.mktemp("saved") / "model.safetensors"
    )


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_loaded_outputs_are_bit_equal(network: str, recipe: str, tmp_path: Path) -> None:
    build, data = NETWORKS[network]
    wanted = RECIPES[recipe]
    if recipe == "grouped" and network != "residual":  # the rule for 3 input channels would match nothing
        wanted = replace(wanted, rules=wanted.rules[1:])
    q = quantized(build, data(), wanted)
    torch.manual_seed(7)  # other weights: only the architecture counts
    r = load(save(q, tmp_path / "m.safetensors"), build())
    assert r.frozen
    assert not r.training
    assert all(torch.equal(a, b) for a, b in zip(call(q, data()), call(r, data()), strict=True))
    assert (str(r.coverage()), r.cost(), r.recipe) == (str(q.coverage()), q.cost(), q.recipe)
    assert (r.notes, r.steps) == (q.notes, q.steps)
    assert save(r, tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


SPECS = {
    **{f"int{bits}": QuantSpec(bits=bits) for bits in range(2, 17)},
    **{
        f"uint{bits}+zp": QuantSpec(bits=bits, signed=False, symmetric=False) for bits in (1, 3, 8, 9, 15, 16)
    },
    "int3+zp": QuantSpec(bits=3, symmetric=False),
    "int5/pow2": QuantSpec(bits=5, scale="pow2"),
    "int4/narrow": QuantSpec(bits=4, narrow=True),
    "fp16": FP16,
    "binary": BINARY,
    "ternary": TERNARY,
    "ternary/split": replace(TERNARY, split=True),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_every_width_of_code_survives(spec: QuantSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = lowbit.prepare(nn.Linear(7, 9), Recipe(rules=(Rule(weight=spec),)), torch.randn(2, 7))
    lowbit.freeze(lowbit.calibrate(q, []))
    r = load(save(q, tmp_path / "m"), nn.Linear(7, 9))
    (a,), (b,) = ([m.qweight() for m in g.modules() if isinstance(m, QLayer)] for g in (q, r))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.dequantize(), b.dequantize())
    assert a.spec == b.spec == spec


@pytest.mark.parametrize("split", [False, True])
def test_ternary_codes_five_to_a_byte(split: bool, tmp_path: Path) -> None:
    rule = Rule(weight=replace(TERNARY, split=split))
    q = lowbit.prepare(nn.Linear(7, 9), Recipe(rules=(rule,)), torch.randn(2, 7))
    lowbit.freeze(lowbit.calibrate(q, []))
    sizes = {}
    for base3 in (False, True):
        path = save(q, tmp_path / "m.safetensors", base3=base3)
        (sizes[base3],) = (t.numel() for n, t in load_file(path).items() if n.endswith("weight_codes"))
        x = torch.randn(4, 7)
        assert torch.equal(load(path, nn.Linear(7, 9))(x), q(x))
    assert sizes == {False: 16, True: 13}, "63 codes of 2 bits, or of 1.6"


@given(bits=st.integers(2, 8), inputs=st.integers(1, 20), outputs=st.integers(1, 20))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_codes_take_their_bits_on_disk(bits: int, inputs: int, outputs: int, tmp_path: Path) -> None:
    recipe = Recipe(rules=(Rule(weight=QuantSpec(bits=bits)),))
    q = lowbit.prepare(nn.Linear(inputs, outputs, bias=False), recipe, torch.randn(2, inputs))
    path = save(lowbit.freeze(lowbit.calibrate(q, [])), tmp_path / "m.safetensors")
    (codes,) = (t for name, t in load_file(path).items() if name.endswith("weight_codes"))
    assert codes.numel() == -(-inputs * outputs * bits // 8)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4"])
def test_the_file_is_as_large_as_the_cost_says(recipe: str, tmp_path: Path) -> None:
    q = quantized(lambda: Residual(32), recipe=recipe)
    path = save(q, tmp_path / "m.safetensors")
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert 0 <= path.stat().st_size - header - q.cost().bytes <= 200


def test_three_bits_are_three_eighths_of_eight(tmp_path: Path) -> None:
    def size(bits: int) -> int:
        recipe = Recipe(rules=(Rule(weight=replace(INT8, bits=bits)),))
        path = save(quantized(lambda: Residual(32), recipe=recipe), tmp_path / "m.safetensors")
        return sum(t.numel() for n, t in load_file(path).items() if n.endswith("weight_codes"))

    assert size(3) * 8 == size(8) * 3


def test_a_shared_layer_and_a_tied_weight_are_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.again = nn.Sequential(nn.Linear(8, 8))
            self.first = self.again[0]
            self.out = nn.Linear(8, 10, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.again(self.first(self.embed(x))))

    x = torch.randint(0, 10, (4, 6))
    recipe = Recipe(rules=(Rule(match="again.0", weight=INT8), Rule()))
    torch.manual_seed(0)
    q = lowbit.quantize(Tied(), recipe, example_inputs=x)
    names = set(load_file(save(q, tmp_path / "m.safetensors")))
    assert len([n for n in names if n.endswith("weight_codes")]) == 1
    assert len([n for n in names if n.endswith(("embed.weight", "out.weight"))]) == 1
    r = load(tmp_path / "m.safetensors", Tied())
    assert torch.equal(r(x), q(x))
    assert r.graph.embed.weight is r.graph.out.weight


def test_a_bias_that_correction_added_comes_along(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))

    recipe = Recipe(rules=(Rule(weight=QuantSpec(bits=2), activation=UINT8),), refine=("bias_correct",))
    q = quantized(build, features() + 1, recipe)
    assert [s.kept for s in q.steps] == [True]
    assert torch.equal(load(save(q, tmp_path / "m"), build())(features()), q(features()))


def test_a_quantizer_that_saw_no_data_stays_off(tmp_path: Path) -> None:
    q = quantized(lambda: Branch(limit=1e9), features())
    r = load(save(q, tmp_path / "m"), Branch(limit=1e9))
    assert [m.mode for m in r.graph.modules() if hasattr(m, "mode")] == [
        m.mode for m in q.graph.modules() if hasattr(m, "mode")
    ]
    assert "off" in [m.mode for m in r.graph.modules() if hasattr(m, "mode")]
    assert torch.equal(r(features()), q(features()))


class Viewed(nn.Module):
    """A view written in place: zeros would not show that its graph computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, :2].mul_(3)
        return self.a(y)


class Unbatched(nn.Module):
    """Its first axis is not the batch, and its second input is a table."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.a(x.t()) @ table


@pytest.mark.parametrize(
    ("build", "data"),
    [(Viewed, features()), (Unbatched, (features(), torch.ones(3, 5)))],
    ids=["view written in place", "first axis is no batch"],
)
def test_replaying_needs_none_of_the_data(build: Callable[[], nn.Module], data: Any, tmp_path: Path) -> None:
    q = quantized(build, (data,))
    inputs = data if isinstance(data, tuple) else (data,)
    assert torch.equal(load(save(q, tmp_path / "m"), build())(*inputs), q(*inputs))


class Shuffled(Residual):
    """`Residual` without one addition."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.conv(x))
        x = F.relu(self.conv(x) + x)
        return self.fc(x.mean((2, 3)))


DIFFERENT = {
    "width": (
        lambda: Residual(12),
        r"out_channels of 'stem' \(Conv2d\) is 8 in the file and 12 in this model",
    ),
    "stride": (
        lambda: Residual(stride=2),
        r"stride of 'stem' \(Conv2d\) is \(1, 1\) in the file and \(2, 2\)",
    ),
    "padding": (
        lambda: Residual(mode="reflect"),
        r"padding_mode of 'stem' .* is 'zeros' in the file and 'reflect'",
    ),
    "head": (
        lambda: Residual(head=6),
        r"out_features of 'fc' \(Linear\) is 5 in the file and 6 in this model",
    ),
    "operation": (Shuffled, r"where the file has 'add' \(add\) this model has 'relu#2' \(relu\)"),
    "input": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), r"another architecture"),
    "kind": (Branch, r"another architecture"),
}


@pytest.mark.parametrize(("build", "message"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_another_architecture_is_refused(
    build: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    path = save(quantized(), tmp_path / "m.safetensors")
    with pytest.raises(LowbitError, match=message):
        load(path, build())


def test_a_model_that_does_not_run_names_the_layer(saved: Path) -> None:
    with pytest.raises(
        LowbitError, match=r"in_features of '0' \(Linear\) is 4 in the file and 5 in this model"
    ):
        load(saved, nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))


@pytest.mark.parametrize("layers", [3, 5], ids=["missing", "more"])
def test_a_missing_or_additional_layer_is_named(layers: int, tmp_path: Path) -> None:
    def chain(count: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))

    path = save(quantized(lambda: chain(4), features(), "w8a8"), tmp_path / "m")
    with pytest.raises(
        LowbitError, match=f"'{min(layers, 4)}' \\(Linear\\)|reads of 'output'|where the file has"
    ):
        load(path, chain(layers))


def test_a_hidden_attribute_of_an_untraceable_part_is_compared(tmp_path: Path) -> None:
    path = save(quantized(Branch, features()), tmp_path / "m")
    with pytest.raises(LowbitError, match=r"limit of 'inner' \(Inner\) is -100.0 in the file and 0.5"):
        load(path, Branch(limit=0.5))


def test_every_flipped_byte_is_noticed(saved: Path, tmp_path: Path) -> None:
    whole, model, rng = saved.read_bytes(), small(), random.Random(0)
    broken = tmp_path / "broken"
    for i in range(len(whole)):
        data = bytearray(whole)
        data[i] ^= 1 << rng.randrange(8)
        broken.write_bytes(data)
        with pytest.raises(LowbitError, match="broken"):
            load(broken, model)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.9, 0.99, 0.9999])
def test_a_truncated_file_is_refused(saved: Path, tmp_path: Path, share: float) -> None:
    whole = saved.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(LowbitError, match=r"cut' is .*cut off"):
        load(tmp_path / "cut", small())


def test_an_appended_byte_is_noticed(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "longer").write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(LowbitError, match="checksum"):
        load(tmp_path / "longer", small())


@given(data=st.binary(max_size=400))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_are_refused(data: bytes, tmp_path: Path) -> None:
    for content in (data, len(data).to_bytes(8, "little") + data, (2).to_bytes(8, "little") + b"{}" + data):
        (tmp_path / "random").write_bytes(content)
        with pytest.raises(LowbitError):
            load(tmp_path / "random", small())


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    for name, metadata in (("plain", None), ("pt", {"format": "pt"}), ("odd", {"lowbit": "[]"})):
        save_file({"weight": torch.zeros(3)}, tmp_path / name, metadata)
        with pytest.raises(LowbitError, match="but not one of lowbit's"):
            load(tmp_path / name, small())


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="No such file"):
        load(tmp_path / "nothing", small())
    with pytest.raises(LowbitError, match="cannot be read"):
        load(tmp_path, small())


def test_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantized(small, features())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 2)
        save(q, tmp_path / "m")
    with pytest.raises(LowbitError, match="format version 2 and this lowbit reads 1; install a newer lowbit"):
        load(tmp_path / "m", small())


FORGED = {
    "missing tensor": (lambda tensors: tensors.pop("0.weight_quantizer.scale"), "scale' is missing"),
    "missing codes": (lambda tensors: tensors.pop("0.weight_codes"), "'0.weight_codes' is missing"),
    "missing bias": (lambda tensors: tensors.pop("2.bias"), "'2.bias' is missing"),
    "more tensors": (lambda tensors: tensors.update(extra=torch.zeros(2)), "no place for tensor 'extra'"),
    "other shape": (
        lambda tensors: tensors.update({"2.bias": torch.zeros(4)}),
        r"'2.bias' is \[4\] in the file",
    ),
    "short codes": (
        lambda tensors: tensors.update({"0.weight_codes": torch.zeros(3, dtype=torch.uint8)}),
        "3 bytes",
    ),
}


@pytest.mark.parametrize(("change", "message"), FORGED.values(), ids=FORGED.keys())
def test_tensors_must_fit_exactly(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer gone wrong, with a checksum that holds."""
    write = sealed.serialize_tensors

    def wrong(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
        change(tensors)
        return write(tensors, metadata)

    monkeypatch.setattr(sealed, "serialize_tensors", wrong)
    path = save(quantized(small, features()), tmp_path / "m")
    with pytest.raises(LowbitError, match=message):
        load(path, small())


def test_metadata_is_plain_json_with_the_recipe(saved: Path) -> None:
    data = saved.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = json.loads(header["__metadata__"]["lowbit"])
    assert metadata["format"] == "lowbit"
    assert metadata["example"] == {"args": [{"tensor": [2, 4], "dtype": "float32"}], "kwargs": {}}
    assert len(Recipe.from_dict(metadata["recipe"]).rules) == 3


@pytest.mark.parametrize("place", ["write_bytes", "replace"])
def test_a_failed_save_leaves_the_old_file(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    q = quantized(small, features())

    def fail(self: Path, *args: Any) -> None:
        if place == "write_bytes":
            self.open("wb").close()  # half-written
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, place, fail)
    with pytest.raises(LowbitError, match=r"m.safetensors' cannot be written: No space left"):
        save(q, path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.safetensors", b"old")]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    q = quantized(small, features())
    with pytest.raises(LowbitError, match="there is no folder"):
        save(q, tmp_path / "no" / "m.safetensors")
    with pytest.raises(LowbitError, match="it is a folder"):
        save(q, tmp_path)


def test_a_model_that_is_not_frozen_is_refused(tmp_path: Path) -> None:
    q = lowbit.prepare(small(), "w8a8", features())
    with pytest.raises(LowbitError, match=r"call lowbit\.freeze\(q\) first"):
        save(q, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_codes_in_the_file_are_those_of_the_formula(tmp_path: Path) -> None:
    """The oracle: codes unpacked by hand from the raw bytes."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    recipe = Recipe(
        rules=(Rule(weight=QuantSpec(bits=3, granularity=PerTensor()), weight_observer="minmax"),)
    )
    want = QTensor.quantize(layer.weight.detach(), QuantSpec(bits=3)).codes.flatten().tolist()
    q = lowbit.quantize(nn.Sequential(layer), recipe, example_inputs=torch.randn(2, 5))
    stream = load_file(save(q, tmp_path / "m.safetensors"))["0.weight_codes"].tolist()
    bits = [byte >> k & 1 for byte in stream for k in range(8)]
    codes = [bits[3 * i] + 2 * bits[3 * i + 1] - 4 * bits[3 * i + 2] for i in range(15)]
    assert codes == want


def test_the_demo_network(tmp_path: Path) -> None:
    from lowbit.demo import DemoResNet, load_images, load_network

    x = load_images("test")[0][:64]
    q = lowbit.quantize(load_network(), "w4a8", [x])
    path = save(q, tmp_path / "demo.safetensors")
    assert torch.equal(load(path, DemoResNet())(x), q(x))
    assert path.stat().st_size < 0.18 * q.cost().float_bytes

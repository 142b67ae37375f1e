"""The file is the model: every code of a running ONNX file equals the integer reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deployables import DEPLOYABLES, build
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit import INT4, INT8, UINT8, LowbitError, PerGroup, PerTensor, QuantSpec, Recipe, Rule, runtime
from lowbit.core.spec import TERNARY
from lowbit.graph.inputs import Inputs
from lowbit.reference import run_on_codes
from lowbit.verify import Parity

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


def deploy(name: str, recipe: str | Recipe, folder: Path) -> Parity:
    model, data = build(name)
    q = lowbit.quantize(model, recipe, data)
    return lowbit.verify(q, lowbit.export.onnx(q, folder / "m.onnx"), data)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
@pytest.mark.parametrize("name", DEPLOYABLES)
def test_every_code_equals_the_integer_reference(name: str, recipe: str, tmp_path: Path) -> None:
    parity = deploy(name, recipe, tmp_path)
    assert parity.layers
    # softmax is computed in floats: a code may round the other way there, and it spreads
    names = [layer.name for layer in parity.layers]
    exact = names.index("softmax") if name == "attention" else len(names)
    assert all(layer.equal == 1.0 for layer in parity.layers[:exact]), str(parity)
    assert all(layer.equal > 0.99 for layer in parity.layers), str(parity)
    assert parity.exact or name == "attention"
    # the simulation has one bias for all calls of a layer, the kernels one on the grid of each call's inputs
    least = 0.9 if name == "recurrent" else 0.99
    assert min(layer.simulation_equal for layer in parity.layers) > least
    assert parity.ok


RECIPES = {
    "per-tensor weights": Rule(weight=replace(INT8, granularity=PerTensor()), activation=UINT8),
    "asymmetric weights": Rule(weight=QuantSpec(bits=8, signed=False, symmetric=False), activation=UINT8),
    "weights in 3 bits": Rule(weight=replace(INT4, bits=3), activation=UINT8),
    "activations in 5 bits": Rule(weight=INT8, activation=replace(UINT8, bits=5)),
    "power-of-two scales": Rule(weight=replace(INT8, scale="pow2"), activation=replace(UINT8, scale="pow2")),
    "narrow weights": Rule(weight=replace(INT8, narrow=True), activation=UINT8),
}


@pytest.mark.parametrize("label", RECIPES)
@pytest.mark.parametrize("name", ["pools", "shortcuts"])
def test_integer_recipes_are_exact(name: str, label: str, tmp_path: Path) -> None:
    parity = deploy(name, Recipe(rules=(RECIPES[label],)), tmp_path)
    assert parity.exact, str(parity)


class Signs(nn.Module):
    """Signs behind Hardtanh, through pooling and zero padding, into a sum, and of what a ReLU made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3),
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.d, self.e = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.hardtanh(self.norms[0](self.a(x)))
        y = F.max_pool2d(F.hardtanh(self.norms[1](self.b(y))), 2)
        y = y + F.relu(self.norms[2](self.c(F.pad(y, (1, 1, 1, 1)))))
        return self.e(F.hardtanh(self.d(y.mean((2, 3)))))


@pytest.mark.parametrize("recipe", ["w1a1", "w1a8", "ternarya4", "b1.58"])
def test_binary_and_ternary_networks_are_exact(recipe: str, tmp_path: Path) -> None:
    model, data = Signs(), torch.randn(16, 3, 8, 8)
    model(data)
    q = lowbit.prepare(model.eval(), recipe, data)
    lowbit.calibrate(q, data)
    lowbit.Trainer(q, [(data, torch.randint(0, 4, (16,)))] * 3).fit()
    f = lowbit.freeze(q)
    parity = lowbit.verify(f, lowbit.export.onnx(f, tmp_path / "m.onnx"), data)
    assert parity.exact, str(parity)
    assert sum(layer.codes for layer in parity.layers) > 5000


@pytest.mark.parametrize(
    "move", [nn.Dropout(), nn.Identity(), nn.MaxPool2d(2)], ids=lambda m: type(m).__name__
)
def test_zeros_around_signs_stay_zeros(move: nn.Module, tmp_path: Path) -> None:
    """Whatever moves them on from the padding to the layer."""
    first = [nn.Conv2d(3, 8, 3), nn.Hardtanh(), nn.ZeroPad2d(1), move]
    layers = [*first, nn.Conv2d(8, 8, 3), nn.Hardtanh(), nn.Conv2d(8, 4, 1)]
    data = torch.randn(4, 3, 8, 8)
    q = lowbit.prepare(nn.Sequential(*layers).eval(), "w1a1", data)
    f = lowbit.freeze(lowbit.calibrate(q, data))
    if isinstance(move, nn.MaxPool2d):
        with pytest.raises(LowbitError, match="pools signs with zeros around them"):
            lowbit.export.onnx(f, tmp_path / "m.onnx")
        return
    parity = lowbit.verify(f, lowbit.export.onnx(f, tmp_path / "m.onnx"), data)
    assert parity.exact, str(parity)


def test_a_sum_that_a_sign_reads_is_never_zero(tmp_path: Path) -> None:
    """Floats miss zero by a hair on either side: the simulation would have signs of its own."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, bias=False), nn.Hardtanh()]
    for _ in range(3):
        layers += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Hardtanh()]
    data = torch.randn(16, 3, 8, 8)
    q = lowbit.prepare(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 36, 4)), "w1a1", data)
    f = lowbit.freeze(lowbit.calibrate(q, data))
    parity = lowbit.verify(f, lowbit.export.onnx(f, tmp_path / "m.onnx"), data)
    assert all(layer.equal == 1.0 for layer in parity.layers)
    assert min(layer.simulation_equal for layer in parity.layers[2:5]) > 0.998


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 40), (131, 7), (5, 3)])
@pytest.mark.parametrize("recipe", ["w1", "ternary"])
def test_two_bits_a_weight(recipe: str, inputs: int, outputs: int, bias: bool, tmp_path: Path) -> None:
    """The oracle is the layer itself; rounding inputs to 8 bits is the runtime's, and its size is said."""
    model = nn.Sequential(
        nn.Linear(4, inputs), nn.Tanh(), nn.Linear(inputs, outputs, bias), nn.Linear(outputs, 3)
    )
    data = torch.randn(6, 4)
    q = lowbit.quantize(model, recipe, data)
    path = lowbit.export.onnx(q, tmp_path / "m.onnx")
    (node,) = (n for n in onnx.load(str(path)).graph.node if n.op_type == "MatMulNBits")
    attributes = {a.name: a.i for a in node.attribute}
    assert attributes == {"K": inputs, "N": outputs, "bits": 2, "block_size": 128, "accuracy_level": 4}
    parity = lowbit.verify(q, path, data)
    assert parity.ok
    assert parity.output_max <= 1e-4 * parity.output_peak
    assert parity.rounded_products == 1
    assert 0 < parity.rounded_output_max <= 0.03 * parity.output_peak
    assert "in 1 products of two bits a weight the runtime rounds the inputs to 8 bits" in str(parity)


def test_a_scale_for_each_sign_has_no_file(tmp_path: Path) -> None:
    rule = Rule(weight=replace(TERNARY, split=True), weight_observer="ttq")
    q = lowbit.quantize(nn.Linear(4, 3), Recipe(rules=(rule,)), example_inputs=torch.randn(2, 4))
    with pytest.raises(LowbitError, match="ONNX has no codes with a scale for each sign"):
        lowbit.export.onnx(q, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


FLOAT_KERNELS = {
    "signed activations": Rule(weight=INT8, activation=QuantSpec(bits=8)),
    "activations in 16 bits": Rule(weight=INT8, activation=replace(UINT8, bits=16)),
    "weights in groups": Rule(weight=replace(INT4, granularity=PerGroup(0, 1))),
}


@pytest.mark.parametrize("recipe", ["w8", "w4", "fp16", *FLOAT_KERNELS])
@pytest.mark.parametrize("name", ["pools", "attention"])
def test_recipes_without_integer_kernels_stay_close(name: str, recipe: str, tmp_path: Path) -> None:
    chosen = Recipe(rules=(FLOAT_KERNELS[recipe],)) if recipe in FLOAT_KERNELS else recipe
    parity = deploy(name, chosen, tmp_path)
    assert parity.ok, str(parity)


MIXED = {
    "half-precision weights": Rule(weight=lowbit.FP16, activation=UINT8),
    "channels of activations": Rule(weight=INT8, activation=replace(UINT8, granularity=lowbit.PerChannel(1))),
}


@pytest.mark.parametrize("label", MIXED)
def test_specs_without_an_accumulator_keep_float_biases(label: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    data = [torch.randn(8, 3, 8, 8)]
    q = lowbit.quantize(model, Recipe(rules=(MIXED[label],)), data)
    parity = lowbit.verify(q, lowbit.export.onnx(q, tmp_path / "m.onnx"), data)
    assert parity.ok
    assert ("2 layers with float weights" in parity.advice) == (label == "half-precision weights")


def test_a_step_that_is_wrong_is_refused_whatever_comes_of_it(tmp_path: Path) -> None:
    class Off(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.0 * x

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), Off())
    data = [torch.randn(8, 3, 8, 8)]
    q = lowbit.quantize(model, "w8a8", data)
    path = lowbit.export.onnx(q, tmp_path / "m.onnx")
    assert lowbit.verify(q, path, data).ok
    other = onnx.load(path)
    weight = next(i for i in other.graph.initializer if i.name.endswith("_0.weight.codes"))
    weight.raw_data = weight.raw_data[:1] + bytes([weight.raw_data[1] ^ 64]) + weight.raw_data[2:]
    onnx.save(other, path)
    parity = lowbit.verify(q, path, data)
    assert parity.output_max == 0
    assert not parity.ok
    assert [layer.equal == 1 for layer in parity.layers] == [layer.name != "1" for layer in parity.layers]


TRANSPOSED = {
    "one scale for each channel": Rule(weight=INT8, activation=UINT8),
    "groups": Rule(weight=QuantSpec(bits=8, granularity=PerGroup(1, 2)), activation=UINT8),
}


@pytest.mark.parametrize("label", TRANSPOSED)
def test_transposed_convolution_in_groups(label: str, tmp_path: Path) -> None:
    """Its output channels lie on no one axis of the weight, so its sums have no one scale each."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=2))
    data = [torch.randn(8, 3, 8, 8)]
    rule = Rule(match="role:first", weight=INT8, activation=UINT8)
    q = lowbit.quantize(model, Recipe(rules=(rule, TRANSPOSED[label])), data)
    assert lowbit.verify(q, lowbit.export.onnx(q, tmp_path / "m.onnx"), data).ok


def written(folder: Path) -> tuple[Any, Path, Any]:
    """A quantized model, its file and its data."""
    model, data = build("two inputs")
    q = lowbit.quantize(model, "w8a8", data)
    return q, lowbit.export.onnx(q, folder / "m.onnx"), data


@pytest.mark.parametrize(
    ("instructions", "precise"),
    [
        (("avx2",), True),
        (("avx2", "avx_vnni"), False),
        (("avx2", "avx512_vnni", "amx_int8"), False),
        (None, True),
    ],
)
def test_exact_kernels_are_asked_for_where_others_saturate_alone(
    instructions: Any, precise: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where there is VNNI they are exact anyhow, and those asked for are slower."""
    monkeypatch.setattr(runtime, "instructions", lambda: instructions)
    _, path, _ = written(tmp_path)
    options = runtime.session(path, threads=1).get_session_options()
    if precise:
        assert options.get_session_config_entry(runtime.PRECISE[0]) == "1"
    else:
        with pytest.raises(RuntimeError, match="does not have"):
            options.get_session_config_entry(runtime.PRECISE[0])


@pytest.mark.parametrize(
    ("instructions", "says"),
    [(("avx2",), "no VNNI"), (("avx2", "avx512_vnni"), ""), (("neon",), ""), (None, "")],
)
def test_a_processor_that_saturates_is_named(
    instructions: Any, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runtime, "instructions", lambda: instructions)
    parity = lowbit.verify(*written(tmp_path))
    assert bool(parity.advice) == bool(says)
    assert says in str(parity)


class Unpooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, where = self.pool(self.a(x))
        return self.b(self.unpool(y, where))


def test_indices_are_no_codes() -> None:
    data = torch.randn(8, 3, 8, 8)
    q = lowbit.quantize(Unpooled(), "w8a8", [data])
    got = run_on_codes(q.graph, Inputs.of(data))
    assert torch.allclose(got, q(data), atol=0.05)


def test_a_wrong_file_is_found_out(tmp_path: Path) -> None:
    """One weight code changed in the file: the comparison is no formality."""
    model, data = build("pools")
    q = lowbit.quantize(model, "w8a8", data)
    path = lowbit.export.onnx(q, tmp_path / "m.onnx")
    proto = onnx.load(str(path))
    codes = next(
        t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
    )
    raw = bytearray(codes.raw_data)
    raw[0] = (raw[0] + 64) % 256
    codes.raw_data = bytes(raw)
    onnx.save(proto, str(path))
    parity = lowbit.verify(q, path, data)
    assert not parity.exact
    assert min(layer.equal for layer in parity.layers) < 1


def test_the_batch_is_dynamic(tmp_path: Path) -> None:
    model, data = build("pools")
    path = lowbit.export.onnx(lowbit.quantize(model, "w8a8", data), tmp_path / "m.onnx")
    session = runtime.session(path)
    for n in (1, 7):
        assert session.run(None, {"x": torch.randn(n, 3, 16, 16).numpy()})[0].shape == (n, 5)


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    model, data = build("two inputs")
    q = lowbit.quantize(model, "w8a8", data)
    other = lowbit.quantize(build("pools")[0], "w8a8", build("pools")[1])
    path = lowbit.export.onnx(other, tmp_path / "other.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    for bad, words in (
        (tmp_path / "no.onnx", "does not exist"),
        (tmp_path / "text.onnx", "not an ONNX file"),
        (path, "not exported from this"),
    ):
        with pytest.raises(lowbit.LowbitError, match=words):
            lowbit.verify(q, bad, data)
    with pytest.raises(lowbit.LowbitError, match="no data"):
        lowbit.verify(q, lowbit.export.onnx(q, tmp_path / "m.onnx"), [])


def test_an_unfrozen_model_is_not_exported(tmp_path: Path) -> None:
    q = lowbit.prepare(nn.Linear(4, 2), "w8", torch.randn(2, 4))
    with pytest.raises(lowbit.LowbitError, match="freeze"):
        lowbit.export.onnx(q, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_no_float_kernel_is_left(tmp_path: Path) -> None:
    """The graph that ONNX Runtime really runs, for a residual network."""
    from lowbit.demo import load_images, load_network

    x = load_images("train")[0][:64]
    path = lowbit.export.onnx(lowbit.quantize(load_network(), "w8a8", [x]), tmp_path / "m.onnx")
    runtime.session(path, optimized_to=tmp_path / "optimized.onnx")
    found = {node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node}
    assert {"QLinearConv", "QLinearAdd", "QGemm", "QLinearGlobalAveragePool"} <= found
    assert not found & {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Relu", "Clip"}

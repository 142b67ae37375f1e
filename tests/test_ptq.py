"""The flow: data in every form, each step measured and undone when it hurts, codes alone at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import STYLES, BatchNormNet, Chain, Fn, InvertedResidual, conv, settle, sqnr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lowbit
from lowbit import INT8, UINT8, LowbitError, PerChannel, QuantSpec, Recipe, Rule, preset, trial
from lowbit.graph.inputs import Inputs
from lowbit.model import Step
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.passes.settle_biases import settle_biases
from lowbit.training.batchnorm import reestimate

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    return settle(BatchNormNet(), X)


def generator() -> Iterator[Tensor]:
    yield from X.split(8)


SOURCES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: X,
    "list": lambda: list(X.split(8)),
    "generator": generator,
    "DataLoader with labels": lambda: DataLoader(TensorDataset(X, torch.arange(32)), batch_size=8),
    "dicts": lambda: [{"x": part} for part in X.split(8)],
    "tuples with labels": lambda: [(part, torch.arange(8)) for part in X.split(8)],
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_model(name: str) -> None:
    model = network()
    want = lowbit.quantize(model, "w4a8", calibration=list(X.split(8)))(X)
    got = lowbit.quantize(model, "w4a8", calibration=SOURCES[name]())(X)
    assert sqnr(want, got) > 40
    assert sqnr(model(X), got) > 12


def test_num_batches_is_as_good_as_fewer_batches() -> None:
    model, parts = network(), list(X.split(8))
    want = lowbit.quantize(model, "w8a8", calibration=parts[:2])(X)
    assert torch.equal(lowbit.quantize(model, "w8a8", calibration=parts, num_batches=2)(X), want)
    assert torch.equal(lowbit.quantize(model, "w8a8", calibration=generator(), num_batches=2)(X), want)


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 8), conv(3, 8)

        def forward(
            self, left: Tensor, right: Tensor, mask: Tensor | None = None
        ) -> tuple[Tensor, list[Tensor]]:
            y = F.relu(self.a(left)) + self.b(right)
            return y if mask is None else y * mask, [self.a(right)]

    model = Two()
    for batch in (((X, X.flip(0)), torch.zeros(32)), ((X, X.flip(0)),), {"right": X.flip(0), "left": X}):
        q = lowbit.quantize(model, "w8a8", calibration=[batch])
        assert sqnr(model(X, X.flip(0)), q(X, X.flip(0))) > 25
        assert sqnr(model(X, X.flip(0)), q(left=X, right=X.flip(0))) > 25
    with pytest.raises(LowbitError, match=r"several inputs are a tuple inside the tuple"):
        lowbit.quantize(model, "w8a8", calibration=[(X, X)])


@pytest.mark.parametrize("name", ["w8", "w4", "fp16"])
def test_weights_need_no_data(name: str) -> None:
    model = network()
    q = lowbit.quantize(model, name, example_inputs=X[:2])
    assert sqnr(model(X), q(X)) > (8 if name == "w4" else 30)
    assert not any(isinstance(m, Quantizer) and "weight" not in n for n, m in q.named_modules())


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        pytest.param(
            "w8a8", {}, r"ranges come from data; pass calibration=\.\.\., or use 'w8'", id="no data"
        ),
        pytest.param("w8a8", {"example_inputs": X}, "ranges come from data", id="an example is no data"),
        pytest.param("w8", {}, r"pass calibration=\.\.\. or example_inputs=", id="no shapes"),
        pytest.param("w8a8", {"calibration": []}, "holds no batch", id="empty"),
        pytest.param(
            "w8a8", {"calibration": [torch.randn(0, 3, 8, 8)]}, "no batch with a sample", id="no sample"
        ),
        pytest.param("w8a8", {"calibration": iter(())}, "holds no batch", id="empty generator"),
        pytest.param("w8a8", {"calibration": 3}, "pass a DataLoader", id="a number"),
        pytest.param("w8a9", {"calibration": X}, "no preset is named 'w8a9'; did you mean 'w", id="preset"),
    ],
)
def test_errors(recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        lowbit.quantize(network(), recipe, **options)


def test_a_shuffled_loader_and_one_batch() -> None:
    loader = DataLoader(TensorDataset(X, torch.arange(32)), batch_size=32, shuffle=True)
    model = network()
    assert sqnr(model(X), lowbit.quantize(model, "w8a8", calibration=loader)(X)) > 30


# --- networks that mix integers and floats


class Transformer(nn.Module):
    """Patches, a class token, a learned position, pre-norm attention and a GELU block."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 16, 4, stride=4), nn.Parameter(torch.randn(1, 1, 16) * 0.1)
        self.position, self.fused = nn.Parameter(torch.randn(1, 9, 16) * 0.1), fused
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.position[:, : x.size(1)]
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.mT / 8**0.5, -1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(x))[:, 0])


class UNet(nn.Module):
    """Down, up by a transposed convolution or nearest neighbour, and a skip by concatenation."""

    def __init__(self, nearest: bool) -> None:
        super().__init__()
        self.down = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(nn.MaxPool2d(2), conv(8, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.up, self.out, self.nearest = (
            nn.ConvTranspose2d(16, 16, 2, stride=2),
            nn.Conv2d(24, 2, 1),
            nearest,
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        skip = self.down(x)
        deep = self.deep(skip)
        wide = F.interpolate(deep, size=skip.shape[2:]) if self.nearest else self.up(deep)
        return {"mask": self.out(torch.cat((skip, wide), 1))}


class Mixed(nn.Module):
    """Layers that stay in float between others that do not."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(20, 16), middle, nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.middle(x, x, x) if isinstance(self.middle, nn.MultiheadAttention) else self.middle(x)
        return self.head(y[0])


IDS = torch.randint(0, 20, (32, 6))
# the residual stream, as far as LayerNorm reads it, and what evens the inputs of layers
STREAM = {
    "norm",
    "softmax",
    "mlp.0",
    "mlp.2",
    "add",
    "add#2",
    "smoothing.norm",
    "smoothing.mlp_0",
    "smoothing.mlp_2",
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str]]] = {
    "attention as plain operations": (
        lambda: Transformer(False),
        X,
        {*STREAM, "truediv"},
    ),
    "scaled_dot_product_attention": (
        lambda: Transformer(True),
        X,
        {*STREAM, "mul"},
    ),
    "U-Net, transposed": (lambda: UNet(False), X, set()),
    "U-Net, nearest neighbour": (lambda: UNet(True), X, set()),
    "LSTM": (lambda: Mixed(nn.LSTM(16, 16, batch_first=True)), IDS, {"middle"}),
    "MultiheadAttention": (
        lambda: Mixed(nn.MultiheadAttention(16, 4, batch_first=True)),
        IDS,
        {"middle.mul", "middle.softmax"},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    build, data, in_float = NETWORKS[name]
    model = settle(build(), data)
    q = lowbit.quantize(model, "w8a8", calibration=list(data.split(16)))
    smoothed = any(step.name == "smooth" and step.kept for step in q.steps)
    wanted = {name for name in in_float if smoothed or not name.startswith("smoothing.")}
    assert {row.name for row in q.coverage().rows if row.status == "float"} == wanted
    assert sqnr(model(data), q(data)) > 25
    assert sqnr(model(data[:5]), q(data[:5])) > 20, "at another batch size"


# --- freezing


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4", "fp16"])
@pytest.mark.parametrize("build", [BatchNormNet, InvertedResidual, STYLES["one Conv2d used twice"]])
def test_a_frozen_model_gives_the_same_numbers(build: Callable[[], nn.Module], recipe: str) -> None:
    """Bit for bit, once biases have the 32 bits that integer kernels give them."""
    q = lowbit.prepare(settle(build(), X), replace(preset(recipe), fold_bn="before"), X)
    lowbit.calibrate(q, [X])
    plain = copy.deepcopy(q)
    for quantizer in plain.modules():
        if isinstance(quantizer, Quantizer):
            quantizer.settle()
    settle_biases(plain.graph)
    assert not q.frozen
    want = plain(X)
    assert sqnr(q(X), want) > 40, "rounding biases is hardly seen"
    assert lowbit.freeze(q) is q
    assert q.frozen
    assert torch.equal(q(X), want)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(q)(X), want)


def test_freezing_twice_changes_nothing() -> None:
    q = lowbit.quantize(network(), "w8a8", calibration=[X])
    want = q(X)
    assert torch.equal(lowbit.freeze(q)(X), want)


def test_freezing_before_calibrating() -> None:
    with pytest.raises(
        LowbitError, match=r"'a' has no scale yet; call lowbit\.calibrate\(q, data\) before freeze"
    ):
        lowbit.freeze(lowbit.prepare(network(), "w8a8", X))


# --- names


def test_latent_weights_keep_their_names() -> None:
    model = InvertedResidual()
    q = lowbit.prepare(settle(model, X), replace(preset("w8a8"), fold_bn="after"), X)
    state = q.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    latent, own = dict(q.graph.named_parameters()), dict(model.named_parameters())
    assert set(latent) == set(own)
    assert all(latent[name] is not own[name] for name in own), "they are the copy's"


def test_latent_weights_can_be_trained() -> None:
    model = network()
    q = lowbit.prepare(model, "w8a8", X)
    lowbit.calibrate(q, [X])
    names = {n for n, p in q.graph.named_parameters() if p.requires_grad}
    scales = {n for n in names if n.endswith(".scale")}
    assert names - scales == {n for n, _ in model.named_parameters()}
    assert scales == {f"{p}.scale" for p, m in q.graph.named_modules() if isinstance(m, Quantizer)}


def test_modes_follow_the_graph() -> None:
    q = lowbit.prepare(network().train(), "w8a8", X)
    assert not q.training
    assert not any(m.training for m in q.modules())


# --- steps


def outlier_network() -> nn.Module:
    """Weights with badly spread channels, which one scale for all cannot hold."""
    return nn.Sequential(Chain(), nn.ReLU(), conv(4, 4))


def test_equalization_helps_where_one_scale_serves_all_channels() -> None:
    recipe = preset("w8a8", weight_granularity="tensor")
    model = outlier_network()
    q = lowbit.quantize(model, recipe, calibration=[X])
    plain = lowbit.quantize(model, replace(recipe, equalize=False), calibration=[X])
    step = q.steps[0]
    assert (step.name, step.kept) == ("equalize", True)
    assert step.after_db > step.before_db + 3
    assert q.recipe.equalize
    assert sqnr(model(X), q(X)) > sqnr(model(X), plain(X)) + 3


def test_measured_numbers_are_true() -> None:
    """The oracle: the SQNR of the model's own output, from outside."""
    model = network()
    recipe = replace(preset("w4a8"), refine=("bias_correct", "affine_correct"))
    q = lowbit.quantize(model, recipe, calibration=[X])
    assert [s.name for s in q.steps] == ["equalize", "bias_correct", "affine_correct"]
    best = max(s.after_db if s.kept else s.before_db for s in q.steps)
    assert sqnr(model(X), q(X)) == pytest.approx(best, abs=0.5)
    for earlier, later in zip(q.steps, q.steps[1:], strict=False):
        assert later.before_db == (earlier.after_db if earlier.kept else earlier.before_db)


def test_a_correction_that_hurts_is_undone_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def vandal(gm: Any, *args: Any, **options: Any) -> list[str]:
        layer = next(m for m in gm.modules() if isinstance(m, QLayer))
        layer.bias = nn.Parameter(layer.bias.detach() + 1)
        return ["a"]

    model, recipe = network(), preset("w8a8")
    want = lowbit.quantize(model, replace(recipe, refine=()), calibration=[X])(X)
    monkeypatch.setattr(trial, "correct_outputs", vandal)
    q = lowbit.quantize(model, recipe, calibration=[X])
    (step,) = q.steps
    assert not step.kept
    assert step.after_db < step.before_db
    assert str(step).endswith("dB]; reverted, it made the output worse")
    assert torch.equal(q(X), want)


def test_a_batchnorm_that_stays_is_measured_anew() -> None:
    layers = (
        conv(3, 8),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        conv(8, 8),
        nn.Flatten(),
        nn.Linear(512, 4),
    )
    model = nn.Sequential(*layers)
    reestimate(model, [Inputs.of(X)])
    recipe = Recipe(rules=(Rule(weight=QuantSpec(bits=2, granularity=PerChannel(0))),), fold_bn="before")
    plain, anew = (
        lowbit.quantize(model, replace(recipe, refine=refine), [X]) for refine in ((), ("reestimate_bn",))
    )
    (step,) = anew.steps
    assert step.kept
    assert step.text == f"1 layers over {len(X)} samples"
    assert step.after_db == pytest.approx(sqnr(model(X), anew(X)))
    norm = anew.graph.get_submodule("2")
    seen = plain.graph.get_submodule("0")(X).relu()
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)))
    folds = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)).eval()
    assert not lowbit.quantize(folds, replace(recipe, refine=("reestimate_bn",)), [X]).steps


def test_an_equalization_that_hurts_is_undone_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def vandal(gm: Any, **options: Any) -> Any:
        done = honest(gm, **options)
        with torch.no_grad():
            next(gm.parameters()).add_(1)
        return done

    honest, model = trial.equalize, network()
    recipe = replace(preset("w8a8"), equalize=True)
    want = lowbit.quantize(model, replace(recipe, equalize=False), calibration=[X])
    monkeypatch.setattr(trial, "equalize", vandal)
    q = lowbit.quantize(model, recipe, calibration=[X])
    assert (q.steps[0].name, q.steps[0].kept) == ("equalize", False)
    assert "reverted" in str(q.steps[0])
    assert not q.recipe.equalize, "the recipe says what was done"
    assert torch.equal(q(X), want(X))


def test_without_data_biases_are_corrected_from_batchnorm() -> None:
    model = settle(nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 8)), X)
    recipe = Recipe(
        rules=(Rule(weight=QuantSpec(bits=3, granularity=PerChannel(0))),), refine=("bias_correct",)
    )
    q = lowbit.quantize(model, recipe, example_inputs=X)
    plain = lowbit.quantize(model, replace(recipe, refine=()), example_inputs=X)
    assert q.steps == [Step("bias_correct", "1 layers, from BatchNorm statistics, for there is no data")]

    def mean_error(other: nn.Module) -> float:
        return (other(X) - model(X)).mean((0, 2, 3)).norm().item()

    assert mean_error(q) < mean_error(plain)


def test_corrections_hold_a_bounded_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MAX_SAMPLES", 16)
    q = lowbit.quantize(network(), "w8a8", calibration=list(X.split(8)))
    assert "over 16 samples" in q.steps[0].text


def test_a_layer_called_twice_is_said_to_be_left_alone() -> None:
    q = lowbit.quantize(STYLES["one Conv2d used twice"](), "w8a8", calibration=[X])
    assert q.steps[0].text.startswith("1 layers over")


def test_batchnorm_that_stays_is_noted() -> None:
    model = settle(nn.Sequential(nn.BatchNorm2d(3), conv(3, 8)), X)
    notes = lowbit.quantize(model, "w8a8", calibration=[X]).notes
    assert [(n.name, n.text) for n in notes] == [("0", "BatchNorm stays, no layer stands right before it")]


def test_the_example_keeps_shapes_and_no_data() -> None:
    q = lowbit.quantize(network(), "w8a8", calibration=[X])
    (example,) = q.example.args
    assert (example.shape, example.dtype) == ((2, 3, 8, 8), torch.float32)
    assert not torch.equal(example, X[:2])


def test_a_recipe_of_your_own() -> None:
    model = Fn(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 8), b=conv(8, 4))
    recipe = {
        "rules": [{"match": "a", "weight": "int8"}, {"match": "b", "weight": "int4", "activation": "uint8"}]
    }
    q = lowbit.quantize(model, Recipe.from_dict(recipe), calibration=[X])
    assert (q.coverage()["a"].status, q.coverage()["b"].status) == ("weight", "integer")
    same = Recipe(rules=(Rule(match="a", weight=INT8), Rule(match="b", weight=lowbit.INT4, activation=UINT8)))
    assert torch.equal(q(X), lowbit.quantize(model, same, calibration=[X])(X))


# --- recipes that keep BatchNorm for training

TRAINED = ("w8a8", "w4a4", "w2a2")


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("recipe", [*TRAINED, "w4"])
def test_without_training_it_does_not_matter_when_batchnorm_is_folded(recipe: str) -> None:
    model = settle(InvertedResidual(), X)
    after = lowbit.quantize(model, preset(recipe), calibration=[X])
    before = lowbit.quantize(model, replace(preset(recipe), fold_bn="before"), calibration=[X])
    assert torch.equal(after(X), before(X))
    assert after.recipe == before.recipe
    assert after.recipe.fold_bn == "before"


@pytest.mark.parametrize("build", [BatchNormNet, InvertedResidual])
@pytest.mark.parametrize("recipe", TRAINED)
def test_a_network_ready_for_training_computes_what_it_did(
    build: Callable[[], nn.Module], recipe: str
) -> None:
    """Until it is calibrated; BatchNorm stands where it stood."""
    model = settle(build(), X)
    q = lowbit.prepare(model, recipe, X)
    assert sqnr(model(X), q(X)) > 100
    assert [b.num_features for b in norms(q)] == [b.num_features for b in norms(model)]
    rows = [row for row in q.coverage().rows if row.op.startswith("BatchNorm")]
    assert [(row.status, row.why[:9]) for row in rows] == [("integer", "goes into")] * len(norms(q))
    lowbit.calibrate(q, [X])
    assert sqnr(model(X), q(X)) > {"w8a8": 28, "w4a4": 10, "w2a2": 0}[recipe]


@pytest.mark.parametrize("build", [BatchNormNet, InvertedResidual])
def test_prepared_calibrated_and_frozen_is_quantized(build: Callable[[], nn.Module]) -> None:
    """Per channel the best range of a weight does not depend on a factor, so neither does the network."""
    model = settle(build(), X)
    outputs = []
    for fold in ("before", "after"):
        q = lowbit.prepare(model, replace(preset("w8a8"), fold_bn=fold), X)  # type: ignore[arg-type]
        lowbit.calibrate(q, [X])
        assert bool(norms(q)) == (fold == "after")
        outputs.append(lowbit.freeze(q)(X))
        assert not norms(q)
        assert q.recipe.fold_bn == "before"
    assert sqnr(*outputs) > 35
    assert sqnr(model(X), outputs[1]) > sqnr(model(X), outputs[0]) - 1


def test_batchnorm_is_trained() -> None:
    q = lowbit.prepare(network(), "w4a4", X)
    lowbit.calibrate(q, [X])
    before = copy.deepcopy(q.state_dict())
    optimizer = torch.optim.SGD(q.train().parameters(), lr=0.1)
    (q(X) - 1).square().mean().backward()
    optimizer.step()
    moved = {n for n, v in q.state_dict().items() if not torch.equal(v, before[n])}
    for name in ("bn_a", "bn_b"):
        assert {f"{name}.{n}" for n in ("weight", "bias", "running_mean", "running_var")} <= moved
    assert {"a.weight", "b.weight", "fc.weight", "fc.bias"} <= moved
    scales = {f"{p}.scale" for p, m in q.graph.named_modules() if isinstance(m, Quantizer)}
    assert scales <= moved


def test_a_frozen_network_cannot_be_calibrated_again() -> None:
    q = lowbit.prepare(network(), "w4a4", X)
    lowbit.freeze(lowbit.calibrate(q, [X]))
    with pytest.raises(LowbitError, match="the model is frozen"):
        lowbit.calibrate(q, [X])


def test_calibrating_twice_is_calibrating_once() -> None:
    """Parameters stay the same objects, so an optimizer made in between goes on."""
    q = lowbit.prepare(network(), "w4a4", X)
    lowbit.calibrate(q, [X])
    want, parameters = q(X), list(q.parameters())
    lowbit.calibrate(q, [X])
    assert all(a is b for a, b in zip(q.parameters(), parameters, strict=True))
    assert torch.equal(q(X), want)

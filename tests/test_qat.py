"""The Trainer: what it learns, what it writes, when it stops, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lowbit
from lowbit import LowbitError
from lowbit.core.spec import UINT8
from lowbit.graph.inputs import Inputs
from lowbit.nn.quantizer import Quantizer
from lowbit.qat import Trainer
from lowbit.training import stages
from lowbit.training.state import read_checkpoint, section

sys.path.insert(0, str(Path(__file__).with_name("training")))
from runs import Net, Noisy, fit, loader, model, settings, val


def train(**changes: Any) -> tuple[lowbit.model.QuantizedModel, Any]:
    return fit(None, **changes)


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_training_learns() -> None:
    """A network that knows nothing reaches, at four bits, what it is taught."""
    _, q = model(dropout=0.0)
    before = {
        n: m.scale.clone()
        for n, m in lowbit.calibrate(q, [next(iter(val()))]).named_modules()
        if isinstance(m, Quantizer)
    }
    record = Trainer(q, loader(240), val(), epochs=6, optimizer="sgd", lr=0.1, scale_lr=1e-4).fit()
    assert record.best is not None
    assert record.best.metric is not None
    assert record.best.metric > 0.9
    assert record.epochs[-1].loss < record.epochs[0].loss
    assert not q.training
    after = {n: m.scale for n, m in q.named_modules() if isinstance(m, Quantizer)}
    assert all(not torch.equal(before[n], after[n]) for n in before if n in after)
    x = next(iter(val()))[0]
    with torch.no_grad():
        trained = q(x)
        assert torch.allclose(lowbit.freeze(q)(x), trained, atol=1e-2), "biases are rounded, codes stay"


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
def test_scales_of_any_magnitude_move_by_shares_of_themselves(magnitude: float) -> None:
    """A rate that suits a scale of 0.1 would throw one of 0.0000001 across zero at each step."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    with torch.no_grad():
        net[0].weight.mul_(magnitude)
        net[4].weight.mul_(magnitude)
    x = magnitude * torch.randn(64, 3, 8, 8)
    q = lowbit.calibrate(lowbit.prepare(net.eval(), "w2a2", x), [x])
    before = {n: m.scale.detach().clone() for n, m in q.named_modules() if isinstance(m, Quantizer)}
    Trainer(q, [x[:32], x[32:]] * 10, teacher=net, loss=None).fit()
    for name, module in q.named_modules():
        if isinstance(module, Quantizer):
            share = (module.scale.detach() / before[name]).mean()
            assert 0.9 < share < 1.1, f"{name}: {share:.3g}"


def test_one_seed_is_one_result_and_the_callers_generators_stay() -> None:
    held = []
    for seed in (0, 0, 1):
        net, q = model()
        torch.manual_seed(len(held))
        state = torch.get_rng_state()
        Trainer(q, loader(), val(), teacher=net, **settings(epochs=1, seed=seed)).fit()
        assert torch.equal(torch.get_rng_state(), state)
        held.append(q)
    assert same(held[0], held[1])
    assert not same(held[0], held[2])


def test_the_teacher_stays_as_it_is() -> None:
    net, q = model()
    net.train()
    net.bn.eval()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    Trainer(q, loader(), val(), teacher=net, **settings(epochs=1)).fit()
    assert (net.training, net.bn.training, net.drop.training) == (True, False, True)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_distillation_alone_needs_no_labels() -> None:
    net, q = model()
    x = [torch.rand(8, 1, 6, 6) for _ in range(4)]
    record = Trainer(q, x, teacher=net, **settings(loss=None, epochs=4, lr=0.02)).fit()
    assert record.epochs[-1].loss < record.epochs[0].loss
    assert record.best is None


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(torch.relu(self.embed(ids).mean(1) * scale))}


def test_dicts_in_and_out() -> None:
    batch = {
        "ids": torch.randint(0, 7, (6, 5)),
        "scale": torch.rand(6, 1),
        "labels": torch.randint(0, 3, (6,)),
    }
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    net = Words().eval()
    q = lowbit.prepare(net, "w8a8", inputs)
    record = Trainer(q, [batch] * 6, [batch], teacher=net, **settings(epochs=2, lr=0.1)).fit()
    assert record.epochs[-1].loss < record.epochs[0].loss
    assert record.baseline is not None


# --- what is written


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    q, record = fit(tmp_path / "new" / "folder", log_every=5, weight_decay=0.01)
    folder = tmp_path / "new" / "folder"
    assert (record.last, record.best_path) == (folder / "last.safetensors", folder / "best.safetensors")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("baseline", 0), ("step", 5), ("epoch", 7), ("step", 10), ("epoch", 14), ("step", 15), ("step", 20),
        ("epoch", 21),
    ]  # fmt: skip
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["metric"] for line in epochs] == [e.metric for e in record.epochs]
    assert all({"loss", "val_loss", "lr", "seconds", "epoch"} <= line.keys() for line in epochs)

    metadata, tensors = read_checkpoint(folder / "last.safetensors")
    assert metadata["recipe"] == q.recipe.to_dict()
    assert metadata["settings"]["weight_decay"] == 0.01
    assert metadata["position"] == {"epoch": 3, "step": 0}
    held = section(tensors, "model.")
    assert all(torch.equal(held[n], t) for n, t in q.state_dict().items())
    metadata, tensors = read_checkpoint(folder / "best.safetensors")
    assert record.best is not None
    assert metadata["history"]["epochs"][-1]["epoch"] == record.best.epoch
    with pytest.raises(LowbitError, match=r"last.safetensors"):
        lowbit.load(folder / "last.safetensors", Net())


def test_the_record_is_a_table() -> None:
    _, record = train(bits=(32, 8, 4))
    text = str(record)
    assert text.splitlines()[0].split() == [
        "epoch",
        "bits",
        "lr",
        "loss",
        "val",
        "loss",
        "accuracy",
        "seconds",
    ]
    assert [line.split()[:2] for line in text.splitlines()[1:4]] == [["1", "32"], ["2", "8"], ["3", "4"]]
    assert "accuracy of the teacher: " in text
    assert "calibrated on the first 2 batches of the training data" in text


def test_tensorboard_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    fit(tmp_path, epochs=1, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"epoch/metric" in events.read_bytes()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(LowbitError, match=r"pip install 'lowbit\[train\]'"):
        fit(tmp_path / "other", epochs=1, tensorboard=True)


# --- the course of a run


def scripted(values: list[float]) -> Any:
    """A metric that gives these numbers, one for each evaluation of one batch."""
    rest = iter(values)
    return lambda output, labels: next(rest)


def one_batch() -> list[Any]:
    return [next(iter(val(8)))]


@pytest.mark.parametrize(
    ("metrics", "patience", "epochs", "best"),
    [
        ([0.1, 0.2, 0.2, 0.1, 0.9], 2, 4, 2),
        ([0.1, 0.2, 0.1, 0.3, 0.3], 2, 5, 4),
        ([0.3, 0.2, 0.1, 0.3, 0.2], None, 5, 1),
        ([math.nan, 0.1, math.nan, 0.2, 0.1], None, 5, 4),
    ],
)
def test_early_stop_and_best(metrics: list[float], patience: int | None, epochs: int, best: int) -> None:
    _, q = model()
    changes = settings(epochs=5, patience=patience, metric=scripted(metrics))
    record = Trainer(q, loader(16), one_batch(), **changes).fit()
    assert len(record.epochs) == epochs
    assert bool(record.stopped) == (epochs < 5)
    assert record.best is not None
    assert record.best.epoch == best


@pytest.mark.parametrize("folder", [True, False])
def test_the_best_weights_can_be_taken_back(folder: bool, tmp_path: Path) -> None:
    held = []
    for epochs, restore in ((2, "last"), (3, "best"), (3, "last")):
        out = tmp_path / f"{epochs}{restore}" if folder else None
        _, q = model()
        metric = scripted([0.1, 0.3, 0.2][:epochs])
        changes = settings(epochs=epochs, schedule="constant", restore=restore, metric=metric, out=out)
        Trainer(q, loader(16), one_batch(), **changes).fit()
        held.append(q)
    assert same(held[0], held[1])
    assert not same(held[1], held[2])


def test_plateau_lowers_the_rate() -> None:
    _, q = model()
    metric = scripted([0.5, 0.4, 0.3, 0.6, 0.1])
    changes = settings(epochs=5, schedule="plateau", plateau_patience=1, metric=metric)
    record = Trainer(q, loader(16), one_batch(), **changes).fit()
    assert [e.lr for e in record.epochs] == pytest.approx([0.05, 0.05, 0.05, 0.005, 0.005])


def test_bits_fall_from_stage_to_stage() -> None:
    """Each stage runs at its width, the best epoch is of the last one, the model ends as the recipe says."""
    _, q = model()
    seen = []

    def metric(output: Tensor, labels: Tensor) -> float:
        widths = {m.spec.bits for n, m in q.named_modules() if isinstance(m, Quantizer) and "weight" in n}
        seen.append((widths, {m.mode for m in q.modules() if isinstance(m, Quantizer)}))
        return 1.0 / len(seen)

    record = Trainer(q, loader(16), one_batch(), **settings(epochs=4, bits=(32, 6, 4), metric=metric)).fit()
    assert seen == [({4}, {"off"}), ({4}, {"off"}), ({6}, {"quantize"}), ({4}, {"quantize"})]
    assert [e.bits for e in record.epochs] == [32, 32, 6, 4]
    assert record.best is record.epochs[3]
    specs = {m.spec.bits for n, m in q.named_modules() if isinstance(m, Quantizer)}
    assert specs == {4, UINT8.bits}
    assert all(p.requires_grad for p in q.parameters())


@pytest.mark.parametrize(
    ("changes", "statistics", "gains"),
    [
        ({}, False, False),
        ({"batch_norm": "freeze"}, True, True),
        ({"freeze_bn_after": 0}, True, True),
        ({"batch_norm": "freeze", "reestimate_bn": 3}, False, True),
    ],
    ids=str,
)
def test_batchnorm_modes(changes: dict[str, Any], statistics: bool, gains: bool) -> None:
    net, _ = model()
    q, record = train(epochs=2, **changes)
    state, before = q.state_dict(), net.state_dict()
    assert torch.equal(state["bn.running_mean"], before["bn.running_mean"]) == statistics
    assert torch.equal(state["bn.weight"], before["bn.weight"]) == gains
    assert ("measured anew on 3 batches" in str(record)) == ("reestimate_bn" in changes)
    assert all(p.requires_grad for p in q.parameters())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself
@pytest.mark.parametrize("changes", [{"bf16": True}, {"channels_last": True}, {"compile": True}], ids=str)
def test_the_ways_to_be_faster_learn_the_same(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, asked = torch.compile, []

    def interpreted(module: nn.Module) -> Any:
        asked.append(module)
        return compile_(module, backend="eager")

    monkeypatch.setattr(torch, "compile", interpreted)
    (plain, one), (fast, other) = train(epochs=1), train(epochs=1, **changes)
    assert [e.loss for e in other.epochs] == pytest.approx([e.loss for e in one.epochs], rel=0.05)
    assert len(asked) == ("compile" in changes)
    assert all(p.is_contiguous() for p in fast.parameters())
    assert fast.state_dict().keys() == plain.state_dict().keys()


# --- what goes wrong


@pytest.mark.parametrize("folder", [True, False])
def test_a_loss_that_is_lost(folder: bool, tmp_path: Path) -> None:
    """The run stops, says where and whose scale ran away, and goes back to the last good state."""
    net, q = model()
    steps = iter(range(100))

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        step = next(steps)
        if step == 9:  # in the second epoch
            q.graph.get_submodule("b.weight_quantizer").scale.data.mul_(50.0)
        return nn.functional.cross_entropy(output, labels) * (float("nan") if step == 10 else 1.0)

    out = tmp_path if folder else None
    changes = settings(epochs=2, schedule="constant", loss=loss, distill=0.0, out=out)
    with pytest.raises(LowbitError) as error:
        Trainer(q, loader(), teacher=net, **changes).fit()
    text = str(error.value)
    assert (
        "the loss is nan at step 11; the scale of 'graph.b.weight_quantizer' moved most, by a factor of"
        in text
    )
    assert ("last.safetensors" in text) == folder
    assert not q.training

    _, good = model()
    again = settings(epochs=1, schedule="constant", loss=nn.functional.cross_entropy, distill=0.0)
    Trainer(good, loader(), teacher=net, **again).fit()
    assert same(q, good)
    if folder:
        held = section(read_checkpoint(tmp_path / "last.safetensors")[1], "model.")
        assert all(torch.equal(held[n], t) for n, t in good.state_dict().items())


def test_weights_that_are_lost_reach_no_checkpoint(tmp_path: Path) -> None:
    """The loss is fine, its gradient is not: noticed before anything is written."""
    net, q = model()

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, labels) + (output * 0).sum().sqrt()

    changes = settings(loss=loss, distill=0.0, out=tmp_path, checkpoint_every=1)
    with pytest.raises(LowbitError, match=r"holds NaN or infinity after step 1; no scale has moved"):
        Trainer(q, loader(), teacher=net, **changes).fit()
    held = read_checkpoint(tmp_path / "last.safetensors")[1]
    assert all(torch.isfinite(t).all() for t in held.values() if t.is_floating_point())


@pytest.mark.parametrize("folder", [True, False])
def test_a_loss_lost_in_the_first_of_several_stages(folder: bool, tmp_path: Path) -> None:
    """The scales at the start are those of the recipe's bits, not of the stage."""
    net, q = model()
    lowbit.calibrate(q, [next(iter(val()))])
    want = {n: m.scale.clone() for n, m in q.named_modules() if isinstance(m, Quantizer)}

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, labels) * float("nan")

    changes = settings(bits=(8, 4), loss=loss, distill=0.0, out=tmp_path if folder else None)
    with pytest.raises(LowbitError, match="the loss is nan at step 1"):
        Trainer(q, loader(), teacher=net, **changes).fit()
    found = {n: m for n, m in q.named_modules() if isinstance(m, Quantizer)}
    assert {m.spec.bits for m in found.values()} == {4, 8}
    for name, scale in want.items():
        assert torch.allclose(found[name].scale, scale, rtol=0.3), name


def test_after_a_stage_in_float_the_ranges_of_weights_are_searched_anew() -> None:
    _, q = model()
    lowbit.calibrate(q, [next(iter(val()))])
    targets = stages.targets_of(q)
    stages.enter(q, targets, stages.OFF)
    layer = q.get_submodule("graph.a")
    before = layer.weight_quantizer.scale.detach().clone()
    layer.weight.data.mul_(3)
    assert "graph.a.weight_quantizer" in stages.enter(q, targets, 4)
    assert torch.allclose(layer.weight_quantizer.scale, 3 * before)


class Masked(nn.Module):
    """A causal mask, which holds -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ x.transpose(1, 2) + self.mask
        return self.fc((scores.softmax(-1) @ x).mean(1))


def test_infinity_in_a_mask_is_no_divergence(tmp_path: Path) -> None:
    x = torch.randn(8, 5, 4)
    net = Masked().eval()
    q = lowbit.prepare(net, "w8a8", x)
    record = Trainer(q, [(x, torch.arange(8) % 3)], teacher=net, out=tmp_path).fit()
    assert math.isfinite(record.epochs[-1].loss)


def test_the_best_checkpoint_is_finite(tmp_path: Path) -> None:
    """The last step of the epoch ruins the weights; a metric that does not look at them likes them best."""
    net, q = model()
    steps = iter(range(100))

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        poison = (
            (output * 0).sum().sqrt() if next(steps) == 3 + 6 else 0.0
        )  # three batches of val judge the teacher first
        return nn.functional.cross_entropy(output, labels) + poison

    changes = settings(epochs=1, loss=loss, distill=0.0, out=tmp_path, metric=lambda *_: 1.0)
    with pytest.raises(LowbitError, match="holds NaN or infinity after step 7"):
        Trainer(q, loader(), val(), teacher=net, **changes).fit()
    assert not (tmp_path / "best.safetensors").exists()


def stream() -> Iterator[Any]:
    yield from loader()


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (Noisy()[i % 50] for i in range(1000))


X = torch.rand(4, 1, 6, 6)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"train": [X]}, r"train has no labels; give batches as \(inputs, labels\).*loss=None"),
    "no labels in a dict": ({"train": [{"x": X}]}, "train has no labels"),
    "no labels to judge": ({"val": [X]}, "val has no labels.*leave val out"),
    "read once": ({"train": stream()}, "train is a generator, which can be read only once"),
    "one tensor": ({"train": X}, "train is a Tensor; pass a DataLoader"),
    "patience without val": (
        {"val": None, "patience": 2},
        "patience=2 goes by the metric on validation data; pass val",
    ),
    "best without val": ({"val": None, "restore": "best"}, "restore='best' goes by the metric"),
    "a number": ({"val": 3}, "val is a int; pass a DataLoader"),
    "no batch": ({"train": []}, "train holds no batch"),
    "no length": ({"train": DataLoader(Endless(), 8)}, "pass steps_per_epoch"),
    "teacher class": ({"teacher": Net}, "teacher is the class Net, not a Module"),
    "labels for accuracy": ({"val": [(X, torch.rand(4, 3))]}, r"accuracy needs class numbers of shape \[4\]"),
    "odd metric": ({"metric": lambda output, labels: "good"}, "returned 'good'; return one number"),
    "odd loss": ({"loss": lambda output, labels: output, "distill": 0}, "return the mean over the batch"),
    "wrong shape": (
        {"train": [(torch.rand(4, 3, 6, 6), torch.zeros(4).long())]},
        "does not run on a batch of",
    ),
    "bits end high": ({"bits": (8, 6)}, "ends at 6 bits, and the recipe asks for 4; end with 4"),
    "unknown setting": ({"epoch": 3}, "did you mean 'epochs'"),
    "nobody to learn from": ({"loss": None, "teacher": None}, "loss=None leaves nothing to train on"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, message = BAD[name]
    net, q = model()
    arguments = {"train": loader(), "val": val(), "teacher": net, **settings(), **changes}
    with pytest.raises(LowbitError, match=message):
        Trainer(q, arguments.pop("train"), arguments.pop("val"), **arguments).fit()


def test_models_that_cannot_be_trained(tmp_path: Path) -> None:
    net, q = model()
    with pytest.raises(LowbitError, match="q is of type Net, not a QuantizedModel"):
        Trainer(net, loader())  # type: ignore[arg-type]
    with pytest.raises(LowbitError, match="teacher shares parameters with q"):
        Trainer(q, loader(), teacher=q)
    lowbit.freeze(lowbit.calibrate(q, [X]))
    with pytest.raises(LowbitError, match="the model is frozen"):
        Trainer(q, loader())
    only = lowbit.prepare(nn.ReLU(), "w8a8", Inputs((X,)))
    with pytest.raises(LowbitError, match="no quantized layer, so there is nothing to train"):
        Trainer(only, loader())
    (tmp_path / "file").write_text("")
    with pytest.raises(LowbitError, match="is no folder to write to"):
        fit(tmp_path / "file")


def test_data_without_a_length() -> None:
    _, q = model()
    record = Trainer(q, DataLoader(Endless(), 8), epochs=2, steps_per_epoch=5).fit()
    assert [e.step for e in record.epochs] == [5, 10]


def test_starved_weights_are_told_of() -> None:
    """Far outside the clip of their estimator weights get no gradient; those within it say nothing."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(8, 8).sign() + 0.01 * torch.randn(8, 8))
    data = [(torch.randn(16, 8), torch.randint(0, 3, (16,)))]
    notes = {}
    for name in ("approx_sign", "ede"):
        q = lowbit.prepare(net, lowbit.preset("w1", estimator=name), data[0][0])
        lowbit.calibrate(q, [data[0][0]])
        q.get_submodule("graph.1").weight_quantizer.scale.data.mul_(0.5)
        notes[name] = Trainer(q, data, lr=1e-9, scale_lr=0.0).fit().notes
    assert len(notes["approx_sign"]) == 1
    assert "'1': 100% of the weights lie where their estimator has no gradient" in notes["approx_sign"][0]
    assert not notes["ede"]


def test_progress_goes_from_0_to_1() -> None:
    net, seen = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)), []
    data = [(torch.randn(4, 8), torch.randint(0, 3, (4,)))] * 5
    q = lowbit.prepare(net, lowbit.preset("w1", estimator="ede"), data[0][0])
    quantizer = q.get_submodule("graph.1").weight_quantizer
    q.register_forward_pre_hook(lambda *_: seen.append(float(quantizer.progress)))
    Trainer(lowbit.calibrate(q, [data[0][0]]), data, epochs=2).fit()
    assert seen[-10:] == pytest.approx([step / 10 for step in range(10)])

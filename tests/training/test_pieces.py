"""Groups of parameters, batches, random streams, saved optimizers, BatchNorm, stages and settings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Net, Noisy, loader, model
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import lowbit
from lowbit import LowbitError, distributed
from lowbit.core.affine import choose_qparams
from lowbit.core.ranges import least_error_range_of
from lowbit.graph.inputs import Inputs
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.qat import parameter_groups
from lowbit.training import stages
from lowbit.training.batches import generators, is_distributed, split
from lowbit.training.batchnorm import reestimate, set_frozen
from lowbit.training.groups import make_optimizer
from lowbit.training.rng import Streams, kept
from lowbit.training.settings import Settings
from lowbit.training.state import first_difference, flatten_optimizer, load_optimizer, plain

CPU = torch.device("cpu")
X = torch.rand(16, 1, 6, 6)


def calibrated() -> Any:
    return lowbit.calibrate(model()[1], [X])


# --- groups


def test_only_weights_decay_and_scales_have_their_own_rate() -> None:
    q = calibrated()
    groups = {g["name"]: g for g in parameter_groups(q, 0.1, scale_lr=0.01, weight_decay=0.5)}
    plain, scales = list(groups.values())[:2], list(groups.values())[2:]
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in plain] == [
        ("weights", 0.1, 0.5),
        ("biases and norms", 0.1, 0.0),
    ]
    names = {id(p): n for n, p in q.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for g in scales for p in g["params"]} == {"scale"}
    owners = [m for m in q.modules() if isinstance(m, Quantizer) and m.learned]
    assert sum(len(g["params"]) for g in scales) == len(owners) > 4
    for group in scales:
        assert group["weight_decay"] == 0.0
        for scale in group["params"]:
            share = group["lr"] / scale.detach().mean().item()
            assert 0.01 / 1.5 < share < 0.01 * 1.5, "a step is as large beside every scale"
    assert all(p.ndim > 1 for p in groups["weights"]["params"])
    every = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(every) == sorted(names), "each once"


def test_a_step_without_gradient_moves_only_weights() -> None:
    q = calibrated()
    before = {n: p.detach().clone() for n, p in q.named_parameters()}
    optimizer = make_optimizer(q, Settings(optimizer="sgd", weight_decay=0.5))
    for p in q.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {n for n, p in q.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in q.named_parameters() if n.endswith("weight") and p.ndim > 1}


def test_frozen_parameters_are_in_no_group() -> None:
    q = calibrated()
    for p in q.parameters():
        p.requires_grad_(False)
    with pytest.raises(LowbitError, match="no parameter of the model is trainable"):
        make_optimizer(q, Settings())
    with pytest.raises(LowbitError, match=r"returned a list; return a torch.optim.Optimizer"):
        make_optimizer(calibrated(), Settings(optimizer=lambda groups: groups))


# --- optimizer state


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_saved_optimizer_goes_on_bit_for_bit(name: str) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(2)
        net = nn.Linear(5, 3)
        return net, make_optimizer(net, Settings(optimizer=name, weight_decay=0.1))

    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            net(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
            optimizer.step()

    net, optimizer = start()
    steps(net, optimizer, range(3))
    tensors, rest = flatten_optimizer(optimizer)
    other, resumed = start()
    other.load_state_dict(net.state_dict())
    tensors = {n: t.clone() for n, t in tensors.items()}
    load_optimizer(resumed, tensors, json.loads(json.dumps(rest)))
    assert plain(resumed.state_dict()["param_groups"]) == plain(optimizer.state_dict()["param_groups"])
    for pair in ((net, optimizer), (other, resumed)):
        steps(*pair, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_optimizers_that_cannot_be_saved_or_loaded() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(LowbitError, match="other groups of parameters"):
        load_optimizer(other, *flatten_optimizer(optimizer))
    optimizer.state[optimizer.param_groups[0]["params"][0]]["odd"] = object()
    with pytest.raises(LowbitError, match="the state of SGD cannot be saved"):
        flatten_optimizer(optimizer)


def test_first_difference() -> None:
    old = {"a": 1, "b": [{"c": 2}, {"c": 3}]}
    assert first_difference(old, {"a": 1, "b": [{"c": 2}, {"c": 3}]}) is None
    assert first_difference(old, {"a": 1, "b": [{"c": 2}, {"c": 4}]}) == ("b[1].c", 3, 4)
    assert first_difference(old, {**old, "d": 0}) == ("d", None, 0)


# --- random numbers


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), *np.random.randn(3), *torch.randn(2).tolist()]  # noqa: NPY002


def streams(seed: int = 5, rank: int = 0, *, same_data: bool = True) -> Streams:
    return Streams(seed, CPU, rank=rank, same_data=same_data, others=[])


def test_data_and_model_do_not_disturb_each_other() -> None:
    one, seen = streams(), []
    for amount in (0, 3):
        one.start(7)
        for _ in range(amount):
            draws()
        with one.data():
            data = draws()
        model = draws()
        seen.append((data, model))
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]


@pytest.mark.parametrize(("other", "same"), [((5, 7), True), ((6, 7), False), ((5, 8), False)])
def test_seed_and_epoch_decide(other: tuple[int, int], same: bool) -> None:
    one = streams(5)
    one.start(7)
    first = draws()
    two = streams(other[0])
    two.start(other[1])
    assert (draws() == first) == same


@pytest.mark.parametrize("same_data", [True, False])
def test_ranks_share_the_data_they_both_read_and_nothing_else(same_data: bool) -> None:
    found = []
    for rank in (0, 1):
        one = streams(rank=rank, same_data=same_data)
        one.start(0)
        with one.data():
            data = draws()
        found.append((data, draws()))
    assert (found[0][0] == found[1][0]) == same_data
    assert found[0][1] != found[1][1]


def test_saved_streams_go_on() -> None:
    one = streams()
    one.start(0)
    draws()
    with one.data():
        draws()
    state = {name: t.clone() for name, t in one.state().items()}
    wanted = draws()
    with one.data():
        wanted += draws()
    two = streams()
    two.load(state)
    found = draws()
    with two.data():
        found += draws()
    assert found == wanted


def test_the_generators_of_the_caller_stay() -> None:
    random.seed(3)
    torch.manual_seed(3)
    state = random.getstate(), torch.get_rng_state()
    with kept(CPU):
        streams().start(0)
        draws()
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_generators_of_a_loader_are_found() -> None:
    generator = torch.Generator()
    assert generators(DataLoader(Noisy(), shuffle=True, generator=generator)) == [generator]
    assert generators([1]) == []
    assert not is_distributed(loader())
    assert is_distributed(DataLoader(Noisy(), sampler=DistributedSampler(Noisy(), num_replicas=2, rank=0)))


# --- batches

x, y = torch.arange(10.0).reshape(5, 2), torch.arange(5)


@pytest.mark.parametrize(
    ("batch", "names", "inputs", "labels"),
    [
        ((x, y), (), Inputs((x,)), y),
        ([x, y, "more"], (), Inputs((x,)), y),
        (((x, x), y), (), Inputs((x, x)), y),
        ((x,), (), Inputs((x,)), None),
        (x, (), Inputs((x,)), None),
        ({"x": x, "labels": y}, ("x",), Inputs(kwargs={"x": x}), y),
        ({"x": x, "label": y}, ("x",), Inputs(kwargs={"x": x}), y),
        ({"x": x, "y": y}, ("x",), Inputs(kwargs={"x": x}), y),
        ({"x": x, "y": y}, ("x", "y"), Inputs(kwargs={"x": x, "y": y}), None),
        ({"x": x, "labels": y}, ("x", "labels"), Inputs(kwargs={"x": x, "labels": y}), y),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, tuple) else str(len(v)),
)
def test_split(batch: Any, names: tuple[str, ...], inputs: Inputs, labels: Any) -> None:
    found = split(batch, names)
    assert [id(a) for a in found.inputs.args] == [id(a) for a in inputs.args]
    assert {k: id(v) for k, v in found.inputs.kwargs.items()} == {k: id(v) for k, v in inputs.kwargs.items()}
    assert found.labels is labels
    assert found.total == 5


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_parts_of_a_batch_are_the_batch(world: int) -> None:
    parts = [split(({"x": x}["x"], {"k": y})).part(rank, world) for rank in range(world)]
    assert sum(p.samples for p in parts) == 5
    real = [p for p in parts if p.samples]
    assert torch.cat([p.labels["k"] for p in real]).sort().values.tolist() == y.tolist()
    assert all(torch.equal(p.inputs.args[0], x[p.labels["k"]]) for p in real)
    assert all(len(p.inputs.args[0]) == 1 for p in parts if not p.samples)


# --- BatchNorm


def test_reestimation_is_the_mean_over_batches() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5))
    net[0].momentum = 0.3
    data = [torch.randn(6, 1, 4, 4) * k + k for k in (1, 2, 3)]
    assert reestimate(net, (Inputs((d,)) for d in data)) == 3
    assert net[0].running_mean is not None
    assert net[0].running_mean.item() == pytest.approx(np.mean([d.mean().item() for d in data]), rel=1e-5)
    assert net[0].running_var.item() == pytest.approx(np.mean([d.var().item() for d in data]), rel=1e-5)
    assert (net[0].momentum, net.training, net[0].training) == (0.3, False, False)
    kept_mean = net[0].running_mean.clone()
    assert reestimate(net, []) == 0
    assert torch.equal(net[0].running_mean, kept_mean)


def test_freezing_stops_statistics_and_affine_map() -> None:
    net = Net().train()
    mine = set(net.parameters()) - {net.bn.bias}
    net.bn.bias.requires_grad_(False)
    for frozen in (True, False):
        set_frozen(net, mine, frozen)
        before = net.bn.running_mean.clone()
        net(X).sum().backward()
        assert torch.equal(before, net.bn.running_mean) == frozen
        assert (net.bn.weight.grad is None) == frozen
        assert net.bn.bias.grad is None


# --- stages


@pytest.mark.parametrize(("epochs", "count"), [(4, 4), (10, 4), (3, 1), (7, 2)])
def test_stages_split_the_epochs_evenly(epochs: int, count: int) -> None:
    found = [stages.stage_of(e, epochs, count) for e in range(epochs)]
    sizes = [[f[0] for f in found].count(i) for i in range(count)]
    assert sum(sizes) == epochs
    assert max(sizes) - min(sizes) <= 1
    assert all(first <= e < end and end - first == sizes[i] for e, (i, first, end) in enumerate(found))


def test_a_stage_keeps_ranges_and_searches_those_of_weights() -> None:
    q, float_model = calibrated(), model()[0]
    targets = stages.targets_of(q)
    weight, inputs = (
        q.graph.get_submodule("a.weight_quantizer"),
        q.graph.get_submodule("activation_quantizers.x"),
    )
    scale, was = inputs.scale, inputs.scale.detach().clone()
    layer = q.graph.get_submodule("a")
    assert isinstance(layer, QLayer)

    stages.enter(q, targets, 32)
    assert torch.allclose(q(X), float_model(X), atol=1e-6)
    assert not scale.requires_grad
    changed = stages.enter(q, targets, 6)
    assert weight.spec.bits == 6
    assert inputs.spec.bits == 8
    assert "graph.a.weight_quantizer" in changed
    assert "graph.activation_quantizers.x" not in changed
    wanted, _ = choose_qparams(*least_error_range_of(layer.weight.detach(), weight.spec), weight.spec)
    assert torch.equal(weight.scale.detach(), wanted)
    stages.enter(q, targets, 12)
    assert inputs.spec.bits == 12
    assert (inputs.scale * inputs.spec.qmax).item() == pytest.approx((was * 255).item(), rel=1e-3)
    stages.enter(q, targets, 4)
    assert inputs.scale is scale, "the optimizer holds this very Parameter"
    assert scale.requires_grad
    assert inputs.scale.item() == pytest.approx(was.item(), rel=1e-3)
    assert stages.targets_of(q) == targets


# --- settings

BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"epoch": 3}, "no setting 'epoch'; did you mean 'epochs'"),
    "epochs": ({"epochs": 0}, "epochs=0 is not a whole number from 1 up"),
    "epochs fraction": ({"epochs": 1.5}, "epochs=1.5 is not a whole number"),
    "lr": ({"lr": -1}, "lr=-1 is not a number from 0 up"),
    "lr nan": ({"lr": float("nan")}, "lr=nan is not a number"),
    "lr text": ({"lr": "0.1"}, "lr='0.1' is not a number"),
    "distill": ({"distill": 2}, "distill=2 is not a number from 0 to 1"),
    "optimizer": ({"optimizer": "sdg"}, "did you mean 'sgd'"),
    "schedule": ({"schedule": "cosin"}, "did you mean 'cosine'"),
    "loss": ({"loss": "mse"}, "loss='mse' is unknown; use 'cross_entropy' or a function"),
    "metric": ({"metric": None}, "metric=None is unknown"),
    "flag": ({"bf16": "yes"}, "bf16='yes' is neither True nor False"),
    "warmup": ({"warmup": 2.5}, "warmup=2.5 is neither steps"),
    "bits up": ({"bits": (2, 4), "epochs": 2}, "does not fall"),
    "bits odd": ({"bits": (20, 4), "epochs": 2}, "20 is neither 1 to 16 nor 32"),
    "bits alone": ({"bits": 4}, "bits=4 is not a tuple"),
    "bits many": ({"bits": (4, 3, 2), "epochs": 2}, "3 stages for epochs=2"),
    "resume": ({"resume": "yes"}, "resume='yes' is unknown"),
    "resume nothing": ({"resume": True}, "resume=True needs the folder"),
    "checkpoints nowhere": ({"checkpoint_every": 3}, "checkpoint_every=3 writes files"),
    "events nowhere": ({"tensorboard": True}, "tensorboard=True writes files"),
    "out": ({"out": 3}, "out=3 is no path"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(name: str) -> None:
    values, message = BAD_SETTINGS[name]
    with pytest.raises(LowbitError, match=message):
        Settings.of(values)


def test_settings_that_decide() -> None:
    deciding = Settings(loss=nn.functional.cross_entropy, out=Path("x"), bits=(4,)).deciding()
    assert deciding["loss"] == "torch.nn.functional.cross_entropy"
    assert deciding["bits"] == [4]
    assert "out" not in deciding
    assert json.loads(json.dumps(deciding)) == deciding


@pytest.mark.parametrize(("device", "refused"), [("cpu", False), ("cuda:0", True), ("cuda:1", False)])
def test_each_rank_has_a_gpu_of_its_own(device: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    if refused:
        with pytest.raises(LowbitError, match=r"rank 1 is on cuda:0.*q.to\('cuda:1'\)"):
            distributed.check_device(torch.device(device))
    else:
        distributed.check_device(torch.device(device))

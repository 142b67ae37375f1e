"""Killed with SIGKILL, anywhere, a run ends with the weights of one that nobody killed, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import fit, fit_and_die, loader, model, settings, val
from torch import Tensor

from lowbit import LowbitError
from lowbit.qat import Trainer, restore
from lowbit.training.state import read_checkpoint, section

STEPS = 7  # of an epoch
# (step at which to die, where), one after the other
DEATHS = {
    "in the first epoch before any checkpoint": [(2, "step")],
    "inside two epochs": [(5, "step"), (STEPS + 4, "step")],
    "in the last step of an epoch": [(2 * STEPS, "step")],
    "while a checkpoint is written": [(6, "write")],
}
KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"checkpoint_every": 3},
    "adamw in stages": {
        "checkpoint_every": 3,
        "optimizer": "adamw",
        "lr": 0.01,
        "bits": (32, 8, 4),
        "own_generator": True,
        "schedule": "plateau",
        "warmup": 3,
        "freeze_bn_after": 2,
        "reestimate_bn": 2,
    },
}


def weights(folder: Path) -> dict[str, Tensor]:
    return read_checkpoint(folder / "last.safetensors")[1]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without what depends on the machine."""
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in told]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Where processes come from: a server that has imported everything, so that each starts at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["runs"])
        yield context


@pytest.fixture(scope="module", params=KINDS)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, **KINDS[request.param])
    return KINDS[request.param], folder


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    death: str, whole: tuple[dict[str, Any], Path], processes: Any, tmp_path: Path
) -> None:
    options, reference = whole
    for step, where in DEATHS[death]:
        process = processes.Process(target=fit_and_die, args=(tmp_path, step, where, options))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        read_checkpoint(tmp_path / "last.safetensors")  # it is whole

    q, record = fit(tmp_path, **options)  # and here the run goes on

    assert_same(weights(tmp_path), weights(reference))
    assert_same(dict(q.state_dict()), section(weights(reference), "model."))
    best = [section(read_checkpoint(f / "best.safetensors")[1], "model.") for f in (tmp_path, reference)]
    assert_same(*best)
    assert list(tmp_path.glob(".*")) == [], "the half-written file is gone"
    assert lines(tmp_path) == lines(reference)
    assert [e.epoch for e in record.epochs][:3] == [1, 2, 3]


def test_a_finished_run_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, record = fit(tmp_path)
    monkeypatch.setattr("lowbit.training.session.Session._train_step", None)
    again, told = fit(tmp_path, resume=True)
    assert_same(dict(first.state_dict()), dict(again.state_dict()))
    assert str(told) == str(record)


def test_resume_false_starts_anew(tmp_path: Path) -> None:
    fit(tmp_path, lr=0.2)
    q, record = fit(tmp_path, resume=False)
    reference, _ = fit(None)
    assert_same(dict(q.state_dict()), dict(reference.state_dict()))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1 + 3
    assert len(record.epochs) == 3


def test_restore_gives_a_fresh_model_the_best_weights(tmp_path: Path) -> None:
    q, record = fit(tmp_path, restore="best")
    assert record.best is not None
    fresh = restore(model()[1], tmp_path / "best.safetensors")
    assert_same(dict(fresh.state_dict()), dict(q.state_dict()))
    x = torch.randn(4, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(fresh(x), q(x))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"lr": 0.1}, "settings.lr = 0.05, and now it is 0.1"),
        ({"epochs": 4}, "settings.epochs = 3, and now it is 4"),
        ({"bits": (8, 4)}, r"settings.bits = \[\], and now it is \[8, 4\]"),
        ({"loss": torch.nn.functional.cross_entropy}, "settings.loss = 'cross_entropy'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], difference: str) -> None:
    fit(tmp_path)
    with pytest.raises(LowbitError, match=f"{difference}.*resume=False"):
        fit(tmp_path, **changes)


def test_other_runs_are_refused(tmp_path: Path) -> None:
    fit(tmp_path)
    net, q = model(fold="before")
    with pytest.raises(LowbitError, match=r"recipe.fold_bn = 'after', and now it is 'before'"):
        Trainer(q, loader(), val(), teacher=net, **settings(out=tmp_path)).fit()
    with pytest.raises(LowbitError, match=r"recipe.fold_bn"):
        restore(q, tmp_path / "last.safetensors")
    net, q = model(bn=False)
    with pytest.raises(LowbitError, match=r"belongs to another model: .*bn"):
        Trainer(q, loader(), val(), teacher=net, **settings(out=tmp_path)).fit()
    net, q = model()
    with pytest.raises(LowbitError, match=r"data.steps_per_epoch = 7, and now it is 6"):
        Trainer(q, loader(48), val(), teacher=net, **settings(out=tmp_path)).fit()


def test_bad_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"no checkpoint '.*last.safetensors'.*resume=False"):
        fit(tmp_path, resume=True)
    fit(tmp_path)
    file = tmp_path / "last.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(LowbitError, match="cut off"):
        fit(tmp_path)

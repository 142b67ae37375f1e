"""Networks whose widths are learned: cost falls, codes stay exact, a run that was killed goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit import LowbitError
from lowbit.hardware import lower
from lowbit.hardware.cost import ebops
from lowbit.hardware.widths import Front, Point, learn_widths
from lowbit.model import QuantizedModel
from lowbit.training.record import Epoch


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv(x.reshape(-1, 1, 4, 4))), 2)
        return self.last(x.flatten(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def task() -> list[tuple[Tensor, Tensor]]:
    """Three clusters of 16 numbers."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=generator)
    y = torch.randint(0, 3, (8, 64), generator=generator)
    x = centres[y] + 0.6 * torch.randn(8, 64, 16, generator=generator)
    return list(zip(x, y, strict=True))


def prepared(model: nn.Module) -> QuantizedModel:
    data = task()
    q = lowbit.prepare(model, "fixed8", data[0][0])
    return lowbit.calibrate(q, [x for x, _ in data])


@pytest.mark.parametrize("make", [mlp, Convolutional])
@pytest.mark.parametrize("weights", ["element", "channel", "tensor"])
def test_cost_falls_and_every_point_is_exact(make: type[nn.Module], weights: str) -> None:
    torch.manual_seed(0)
    q, data = prepared(make()), task()
    settings = {"epochs": 6, "lr": 0.01, "schedule": "constant", "strength": (0.1, 3.0)}
    front = learn_widths(q, data, data, weights=weights, **settings)  # type: ignore[arg-type]
    costs = [p.ebops for p in front.points]
    assert [p.epoch for p in front.points] == [1, 2, 3, 4, 5, 6]
    assert costs[-1] < 0.7 * costs[0]
    x = torch.cat([x for x, _ in data])
    for point in (front.points[0], front.points[-1]):
        frozen = front.model(point)
        program = lower(frozen)
        assert sum(ebops(program).values()) == point.ebops
        assert torch.equal(program.real(program.run(x))[0].float(), frozen(x))
        hits = frozen(x).argmax(1) == torch.cat([y for _, y in data])
        assert float(hits.double().mean()) == pytest.approx(point.metric, abs=1e-6)
    assert front.best[0].ebops == min(costs)
    assert str(front).count("*") == len(front.best)


class KilledError(Exception):
    pass


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path) -> Front:
        torch.manual_seed(0)
        settings = {"epochs": 4, "lr": 0.01, "strength": (0.1, 1.0), "out": folder}
        return learn_widths(prepared(mlp()), task(), task(), **settings)  # type: ignore[arg-type]

    whole = run(tmp_path / "whole")
    from lowbit.hardware import widths

    keep = widths._Keeper.keep

    def dying(self: widths._Keeper, epoch: Epoch) -> None:
        keep(self, epoch)
        if epoch.epoch == 2:
            raise KilledError

    monkeypatch.setattr(widths._Keeper, "keep", dying)
    with pytest.raises(KilledError):
        run(tmp_path / "parts")
    monkeypatch.undo()
    parts = run(tmp_path / "parts")
    assert parts.points == whole.points
    x = task()[0][0]
    last = whole.points[-1]
    assert torch.equal(parts.model(last, mlp())(x), whole.model(last, mlp())(x))
    with pytest.raises(LowbitError, match="pass the float network"):
        parts.model(last)


def test_another_run_keeps_out_of_the_folder(tmp_path: Path) -> None:
    data, told = task(), []
    learn_widths(prepared(mlp()), data, data, epochs=1, out=tmp_path / "run", on_epoch=told.append)
    assert [epoch.epoch for epoch in told] == [1]
    with pytest.raises(LowbitError, match="holds a run with"):
        learn_widths(prepared(mlp()), data, data, epochs=1, out=tmp_path / "run", weights="tensor")


def point(epoch: int, cost: int, metric: float) -> Point:
    return Point(epoch, cost, metric, 0.1, 2.0, 4.0, 0.5)


def test_the_front_has_what_nothing_beats() -> None:
    points = (
        point(1, 900, 0.9),
        point(2, 800, 0.92),
        point(3, 500, 0.85),
        point(4, 400, 0.85),
        point(5, 300, 0.7),
    )
    front = Front(points, {})
    assert [p.epoch for p in front.best] == [5, 4, 2]
    assert front.cheapest(0.8).epoch == 4
    with pytest.raises(LowbitError, match=r"no epoch reaches 0\.95; the best has 0\.92"):
        front.cheapest(0.95)


def test_a_state_with_widths_is_not_taken_for_one_without() -> None:
    q, data = prepared(mlp()), task()
    learn_widths(q, data, data, epochs=1)
    with pytest.raises(LowbitError, match=r"has a learned width for 'graph.*this model learns none"):
        prepared(mlp()).load_state_dict(q.state_dict())


def test_bad_calls() -> None:
    q, data = prepared(mlp()), task()
    with pytest.raises(LowbitError, match="does not rise"):
        learn_widths(q, data, data, strength=(1.0, 0.1))
    with pytest.raises(LowbitError, match="does not rise"):
        learn_widths(q, data, data, strength=0.5)  # type: ignore[arg-type]
    with pytest.raises(LowbitError, match="penalty= is what"):
        learn_widths(q, data, data, penalty=lambda: torch.zeros(()))
    with pytest.raises(LowbitError, match="pass a DataLoader"):
        learn_widths(q, data, None)
    with pytest.raises(LowbitError, match="GELU"):
        learn_widths(prepared(nn.Sequential(nn.Linear(16, 4), nn.GELU(), nn.Linear(4, 3))), data, data)
    with pytest.raises(LowbitError, match="weights='row' is unknown"):
        learn_widths(q, data, data, weights="row")  # type: ignore[arg-type]
    with pytest.raises(LowbitError, match="fixed8"):
        learn_widths(lowbit.calibrate(lowbit.prepare(mlp(), "w8a8", data[0][0]), [data[0][0]]), data, data)

"""Layers and blocks that are rounded stay so: what was cut off goes on, to the same codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Residual, conv
from torch import Tensor, nn

import lowbit
from lowbit import LowbitError
from lowbit.finished import Finished
from lowbit.passes import learn_rounding, reconstruct


def network() -> nn.Module:
    torch.manual_seed(0)
    body = [conv(3, 4), nn.ReLU(), Residual(4, 6), Residual(4, 6), nn.Flatten(), nn.Linear(4 * 36, 3)]
    return nn.Sequential(*body).eval()


def data() -> list[Tensor]:
    return list(torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1)).split(32))


def quantize(refine: tuple[str, ...], out: Path | None) -> lowbit.model.QuantizedModel:
    return lowbit.quantize(network(), replace(lowbit.preset("w4a4"), refine=refine), data(), out=out)


class CutError(Exception):
    """Somebody pulled the plug."""


REFINES = [("gptq",), ("adaround",), ("brecq",), ("gptq", "brecq")]


@pytest.mark.parametrize("refine", REFINES, ids="+".join)
def test_what_was_cut_off_goes_on_to_the_same_codes(
    refine: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn_rounding, "FEWEST_STEPS", 20)
    module, name = (reconstruct, "_round") if refine[-1] == "gptq" else (learn_rounding, "_learn")
    real, done = getattr(module, name), list[Any]()

    def watched(*arguments: Any) -> Any:
        if len(done) == stop:
            raise CutError
        done.append(real(*arguments))
        return done[-1]

    monkeypatch.setattr(module, name, watched)
    stop = -1
    whole = quantize(refine, None)
    total, stop = len(done), 2
    done.clear()
    with pytest.raises(CutError):
        quantize(refine, tmp_path)
    stop = -1
    found = quantize(refine, tmp_path)
    assert len(done) == total
    assert [str(step) for step in found.steps] == [str(step) for step in whole.steps]
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=0, atol=0)
    done.clear()
    again = quantize(refine, tmp_path)
    assert not done, "all of it is there"
    torch.testing.assert_close(again(data()[0]), whole(data()[0]), rtol=0, atol=0)


def test_another_work_is_refused(tmp_path: Path) -> None:
    lowbit.quantize(network(), "w4a4", data(), out=tmp_path)
    with pytest.raises(LowbitError, match="other data or another recipe; go on with the same"):
        lowbit.quantize(network(), "w4a4", data()[:1], out=tmp_path)
    other = network()
    with torch.no_grad():
        other[0].weight[0] += 0.1
    with pytest.raises(LowbitError, match="belongs to another model"):
        lowbit.quantize(other, "w4a4", data(), out=tmp_path)


def test_a_damaged_piece_is_one_clear_error(tmp_path: Path) -> None:
    finished = Finished(tmp_path, "gptq", "x")
    assert finished.load(0) is None
    finished.save(0, {"weight": torch.arange(3.0)}, {"name": "conv"})
    tensors, said = finished.load(0)
    assert tensors["weight"].tolist() == [0, 1, 2]
    assert said == {"name": "conv"}
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(LowbitError, match=path.name):
        finished.load(0)


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LowbitError, match="is no folder to write to"):
        lowbit.quantize(network(), "w4a4", data(), out=tmp_path / "file")
    with pytest.raises(LowbitError, match="'auto' tries several"):
        lowbit.quantize(network(), "auto", data(), metric=lambda m: 1.0, out=tmp_path)

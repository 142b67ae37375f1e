"""What each rank does under `torchrun`: calibrate, train, evaluate; and what it then holds goes to a file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from runs import loader, model, settings, val
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import lowbit
from lowbit import Recipe, Rule, distributed
from lowbit.core.spec import INT8, UINT8
from lowbit.graph.inputs import Inputs
from lowbit.nn.quantizer import Quantizer
from lowbit.qat import Trainer

OBSERVERS = ("minmax", "moving_average", "mse")


def calibrated(observer: str) -> dict[str, torch.Tensor]:
    """Every scale and zero point; seven batches, so that the shares differ."""
    net, _ = model()
    torch.manual_seed(3)
    data = [torch.randn(4, 1, 6, 6) * (1 + i) for i in range(7)]
    rule = Rule(weight=INT8, activation=UINT8, observer=observer)
    q = lowbit.calibrate(lowbit.prepare(net, Recipe(rules=(rule,)), Inputs((data[0],))), data)
    found = {n: m for n, m in q.named_modules() if isinstance(m, Quantizer) and m.ready}
    scales = {f"{observer}.{n}.scale": m.scale for n, m in found.items()}
    return scales | {
        f"{observer}.{n}.zero": m.zero_point for n, m in found.items() if m.zero_point is not None
    }


def trained(
    folder: Path | None = None, *, sampler: bool = False, bn: bool = False, **changes: object
) -> dict[str, torch.Tensor]:
    """Weights after training on 50 samples: the last batch has two, or one for each rank."""
    net, q = model(bn=bn, dropout=0.0, fold="after" if bn else "before")
    data = loader()
    if sampler:
        own = DistributedSampler(data.dataset, seed=1) if distributed.world() > 1 else None
        data = DataLoader(data.dataset, 4, sampler=own)
    record = Trainer(q, data, val(), teacher=net, **settings(out=folder, **changes)).fit()
    scores = [[e.loss, e.val_loss, e.metric] for e in record.epochs]
    return {**q.state_dict(), "scores": torch.tensor(scores, dtype=torch.float64)}


def everything(folder: Path) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    distributed.join()
    found = {}
    for observer in OBSERVERS:
        found |= calibrated(observer)
    runs = {
        "plain": trained(folder / f"out{distributed.world()}", checkpoint_every=3),
        "stages": trained(bits=(32, 8, 4), clip_norm=0.5),
        "norm": trained(bn=True, freeze_bn_after=2, reestimate_bn=2),
        "sampler": trained(sampler=True),
    }
    for run, state in runs.items():
        found |= {f"{run}.{name}": tensor for name, tensor in state.items()}
    return {name: t.detach().clone() for name, t in found.items()}


def failure() -> str:
    """What every rank is told when the loss is NaN on one of them."""
    net, q = model(bn=False, dropout=0.0, fold="before")

    def loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        bad = distributed.rank() == 1
        return torch.nn.functional.cross_entropy(output, labels) * (float("nan") if bad else 1.0)

    try:
        Trainer(q, loader(), teacher=net, **settings(loss=loss)).fit()
    except lowbit.LowbitError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tensors = everything(folder)
    save_file(tensors, folder / f"rank{distributed.rank()}.safetensors")
    (folder / f"failure{distributed.rank()}").write_text(failure())

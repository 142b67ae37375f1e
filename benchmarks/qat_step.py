"""Seconds of one training step with W4A4 quantizers over the float32 one, lowbit beside others, interleaved.

ResNet-20 option B, a batch of seeded random images: forward, cross-entropy, backward, one step of SGD with
momentum, on one thread, eager; BatchNorm trains. Ratios are medians over rounds in which every row runs once,
of processor time (the claim) and of wall time, with the smallest and the largest of the latter; the float
network runs a second time, whose ratio says how far noise goes. `quantizers` counts those of activations, `M
values` the millions that they round in one pass: lowbit's sums go through quantizers too, as they must in a
file that runs on integers, those of the others do not.

    python benchmarks/qat_step.py --data ../shared/data
    python benchmarks/qat_step.py --data ../shared/data --layouts contiguous --rounds 5 --json

torchao and Brevitas are measured where they are installed. They need an environment of their own:

    python -m venv peers && . peers/bin/activate
    pip install -c constraints.txt torch "setuptools<81"
    pip install -c constraints.txt brevitas torchao
    pip install -c constraints.txt .
"""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ours
import qat_rivals
from common import Claim, Table, arguments, progress, report
from measure import interleave
from networks import load_cifar

NETWORK = "resnet20-B"
BITS = 4
BOUND = 1.25
FLOAT = "float32"
DEFAULT = "lowbit w4a4"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
COLUMNS = ("row", "cpu ratio", "wall ratio", "wall low", "wall high", "seconds", "quantizers", "M values")
FORMATS = dict.fromkeys(COLUMNS[1:6], ".2f") | {"M values": ".1f"}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A network in training mode, the modules that quantize its activations, and whether kernels may run."""

    model: nn.Module
    activations: list[nn.Module]
    native: bool = True

    def stepper(self, x: Tensor, y: Tensor) -> Callable[[], float]:
        """One training step on x [B, 3, 32, 32] and labels y [B]; returns the loss."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

        def step() -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            optimizer.step()
            return loss.item()

        return step if self.native else _without_kernels(step)

    def rounded(self, x: Tensor) -> int:
        """How many activations are rounded in one pass over `x`."""
        sizes: list[int] = []

        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes.append(args[0].numel())

        handles = [module.register_forward_pre_hook(count) for module in self.activations]
        with torch.no_grad():
            self.model(x)
        for handle in handles:
            handle.remove()
        return sum(sizes)


def _without_kernels(step: Callable[[], float]) -> Callable[[], float]:
    """`step` as LOWBIT_KERNELS=off has it, in this process: the operators support no tensor."""
    from lowbit import kernels

    def run() -> float:
        with patch.object(kernels, "supports", lambda *_: False):
            return step()

    return run


def contenders(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Contender]]:
    """Every row by name; the float network comes first and last."""
    yield FLOAT, Contender(model=copy.deepcopy(model).train(), activations=[])
    if ours.available():
        yield from _ours(model, x)
    for name in qat_rivals.PEERS:
        version = qat_rivals.version(name)
        if version is None:
            progress(f"{name} is not installed: no row")
            continue
        peer = qat_rivals.build(name, model, x, BITS)
        label = f"{name} {version}" if name in (qat_rivals.TORCHAO, qat_rivals.BREVITAS) else name
        yield label, Contender(model=peer.model.train(), activations=peer.activations)
    yield f"{FLOAT} again", Contender(model=copy.deepcopy(model).train(), activations=[])


def _ours(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Contender]]:
    """lowbit's rows: the preset as it is, and with one thing changed."""
    import lowbit
    from lowbit import kernels

    preset = lowbit.preset(f"w{BITS}a{BITS}")
    progress(f"lowbit's kernels: {kernels.description()}")
    yield DEFAULT, _prepared(model, x, preset)
    yield f"{DEFAULT}, no kernels", _prepared(model, x, preset, native=False)
    yield f"{DEFAULT} clipped_ste", _prepared(model, x, lowbit.preset("w4a4", estimator="clipped_ste"))
    yield f"{DEFAULT} fold_bn=before", _prepared(model, x, replace(preset, fold_bn="before"))


def _prepared(model: nn.Module, x: Tensor, recipe: object, *, native: bool = True) -> Contender:
    import lowbit
    from lowbit.nn.quantizer import Quantizer

    q = lowbit.calibrate(lowbit.prepare(copy.deepcopy(model), recipe, x), [x])
    quantizers = [m for m in q.modules() if isinstance(m, Quantizer) and not m.is_weight]
    active = [m for m in quantizers if m.mode == "quantize"]
    return Contender(model=q.train(), activations=active, native=native)


def measure(layout: str, options: Namespace) -> Table:
    """Every row on the given memory layout."""
    memory = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.batch, 3, 32, 32, generator=generator).to(memory_format=memory)
    y = torch.randint(10, (options.batch,), generator=generator)
    model = load_cifar(NETWORK, options.data).to(memory_format=memory)
    rows = {}
    for name, contender in contenders(model, x):
        progress(f"{layout}: {name}")
        rows[name] = contender
    steps = {name: contender.stepper(x, y) for name, contender in rows.items()}
    times = interleave(steps, rounds=options.rounds, warmup=2)
    table = Table(title=f"{NETWORK}, batch {options.batch}, {layout}", columns=COLUMNS, formats=FORMATS)
    for name, timing in times.items():
        if not steps[name]() < float("inf"):
            raise SystemExit(f"{name}: the loss is not finite any more, so its time means nothing")
        cells = (timing.cpu, timing.paired, timing.low, timing.high, timing.seconds)
        work = (len(rows[name].activations), rows[name].rounded(x) / 1e6)
        table.add(**dict(zip(COLUMNS, (name, *cells, *work), strict=True)))
    return table


def claims(layout: str, table: Table) -> Iterator[Claim]:
    """The step of lowbit's default is at most BOUND float steps, on PyTorch's default layout."""
    for row in table.rows:
        ratio = row["cpu ratio"]
        if row["row"] == DEFAULT and layout == "contiguous" and isinstance(ratio, float):
            text = f"{DEFAULT}, step over float32's, {layout}"
            yield Claim(claim=text, measured=ratio, bound=BOUND, at_most=True)


def parse() -> Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with models/")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of every row")
    parser.add_argument("--batch", type=int, default=128)
    return parser.parse_args()


def main() -> int:
    """Measure every row on every layout asked for; return the exit code."""
    options = parse()
    torch.set_num_threads(1)
    tables: list[Table] = []
    found: list[Claim] = []
    for layout in options.layouts:
        table = measure(layout, options)
        tables.append(table)
        found += claims(layout, table)
    return report(tables, found, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

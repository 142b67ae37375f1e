"""A network for a trigger: trained, its bits learned, exported for an FPGA, proven and counted.

    python examples/trigger.py magic_gamma_train.csv --test magic_gamma_test.csv --signal g --out trigger
    python examples/trigger.py --openml hls4ml_lhc_jets_hlf --out jets      # needs scikit-learn and a network

The table is CSV with a header: numbers, and the class in the last column (MAGIC: ten numbers, g or h; the LHC
jets: sixteen, five classes). Steps: train in float; train at 8, 6 and 4 bits; learn bits; count the cells of
some of these networks; write an hls4ml project and compile it, write Verilog and simulate it; print a table
of accuracy, AUC and background rejection, and plot them against effective bit operations and against yosys
LUTs. What needs a tool that is not there (g++, iverilog, yosys) is left out, and said.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import lowbit
from lowbit.export.fpga.verilog import count
from lowbit.hardware import lower
from lowbit.hardware.cost import ebops
from lowbit.hardware.report import describe
from lowbit.hardware.widths import Front, Point, learn_widths
from lowbit.model import QuantizedModel
from lowbit.tables import text_table

BATCH = 256


@dataclass(frozen=True)
class Data:
    """Samples, each column with mean 0 and deviation 1 in training, and the numbers of their classes."""

    x: Tensor
    y: Tensor
    # a fifth of the training set, which judges the front: the test set chooses nothing
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Batches:
    """Training batches in a new order each time."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return math.ceil(len(self.x) / BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.x)).split(BATCH):
            yield self.x[index], self.y[index]


@dataclass(frozen=True)
class Score:
    """Of a network on the test set."""

    name: str
    accuracy: float
    # area under the ROC curve, signal against the rest
    auc: float
    # one background event in so many passes, where a given share of the signal does
    rejection: float
    ebops: int | None = None
    yosys_lut: int | None = None
    yosys_ff: int | None = None


def read_table(path: Path) -> tuple[Tensor, list[str]]:
    """Numbers and classes of a CSV file."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return torch.tensor([[float(v) for v in row[:-1]] for row in rows]), [row[-1] for row in rows]


def read_openml(name: str) -> tuple[Tensor, list[str]]:
    """The same from OpenML."""
    from sklearn.datasets import fetch_openml

    x, y = fetch_openml(name, version=1, return_X_y=True, as_frame=False)
    return torch.as_tensor(x.astype("float32")), [str(label) for label in y]


def prepare_data(options: argparse.Namespace) -> Data:
    x, labels = read_openml(options.openml) if options.openml else read_table(options.table)
    classes = tuple(sorted(set(labels)))
    order, part = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)), len(x) // 5
    x, y = x[order], torch.tensor([classes.index(c) for c in labels])[order]
    if options.test is not None:
        x_test, labels = read_table(options.test)
        y_test = torch.tensor([classes.index(c) for c in labels])
    else:
        x_test, y_test, x, y = x[:part], y[:part], x[part:], y[part:]
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-9)
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    return Data(x[part:], y[part:], x[:part], y[:part], x_test, y_test, classes)


def network(inputs: int, classes: int) -> nn.Module:
    """16-64-32-32-5 for the LHC jets (Duarte et al. 2018)."""
    widths = (inputs, 64, 32, 32)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def train(model: nn.Module, data: Data, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in Batches(data.x, data.y):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
    model.eval()


def score(name: str, model: nn.Module, data: Data, signal: int, efficiency: float) -> Score:
    """Of a network in float, or with its effective bit operations a frozen one."""
    with torch.no_grad():
        chances = model(data.x_test).double().softmax(1)
    accuracy = float((chances.argmax(1) == data.y_test).double().mean())
    cost = sum(ebops(lower(model)).values()) if isinstance(model, QuantizedModel) else None
    auc, rejection = separation(chances[:, signal], data.y_test == signal, efficiency)
    return Score(name, accuracy, auc, rejection, cost)


def separation(value: Tensor, wanted: Tensor, efficiency: float) -> tuple[float, float]:
    """Area under the ROC curve, and background rejection where such a share of the signal passes."""
    hit, background = value[wanted], value[~wanted].sort().values
    # Mann and Whitney: how often a signal event stands above one of the background
    below, upto = (torch.searchsorted(background, hit, right=right) for right in (False, True))
    auc = float((below + upto).double().mean() / 2 / len(background))
    # a threshold that is a value of the signal: ties pass
    threshold = hit.quantile(1 - efficiency, interpolation="lower")
    passing = int((background >= threshold).sum())
    return auc, len(background) / max(passing, 1)


def at_bits(model: nn.Module, data: Data, bits: int, epochs: int) -> QuantizedModel:
    q = lowbit.prepare(model, recipe(bits), data.x[:BATCH])
    lowbit.calibrate(q, [data.x[:2048]])
    lowbit.Trainer(q, Batches(data.x, data.y), epochs=epochs, lr=1e-3).fit()
    return lowbit.freeze(q)


def recipe(bits: int) -> lowbit.Recipe:
    """Fixed point that rounds half up, as gates do it cheapest."""
    plain = lowbit.preset(f"fixed{bits}").to_dict()
    for rule in plain["rules"]:
        rule["activation"]["rounding"] = "half_up"
    return lowbit.Recipe.from_dict(plain)


def learn(model: nn.Module, data: Data, epochs: int, out: Path) -> Front:
    q = lowbit.calibrate(lowbit.prepare(model, recipe(8), data.x[:BATCH]), [data.x[:2048]])
    val = list(zip(data.x_val.split(1024), data.y_val.split(1024), strict=True))
    settings = {"epochs": epochs, "lr": 1e-3, "schedule": "constant", "strength": (0.01, 1.0)}
    return learn_widths(q, Batches(data.x, data.y), val, out=out / "learned", **settings)


def spread(front: Sequence[Point], count: int) -> list[Point]:
    """So many points of a front, evenly from the cheapest to the dearest."""
    places = torch.linspace(0, len(front) - 1, min(count, len(front))).round().int().tolist()
    return [front[place] for place in places]


def choose(front: Front, model: nn.Module, data: Data) -> Point:
    """The cheapest point within half a percent of float; else the best."""
    with torch.no_grad():
        whole = float((model(data.x_val).argmax(1) == data.y_val).double().mean())
    return next((p for p in front.best if p.metric >= whole - 0.005), front.best[-1])


def with_cells(found: Score, q: QuantizedModel, out: Path) -> Score:
    """Verilog in a folder, and the cells that yosys makes of it."""
    folder = out / f"cells-{found.name}"
    shutil.rmtree(folder, ignore_errors=True)
    cells = count(lowbit.export.verilog(q, folder)).cells
    return replace(found, yosys_lut=cells.lut, yosys_ff=cells.ff)


def prove(q: QuantizedModel, data: Data, out: Path) -> None:
    """Every back end gives the codes of the integer reference."""
    targets = {"hls4ml": ("g++", lowbit.export.hls4ml), "verilog": ("iverilog", lowbit.export.verilog)}
    for name, (tool, export) in targets.items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        export(q, folder)
        if shutil.which(tool) is None:
            print(f"{tool} is not there, so {name} is not run")
        else:
            print(lowbit.verify(q, folder, [data.x_test[:1000]]))


def show(scores: Sequence[Score], efficiency: float) -> str:
    """A table, a row for each network."""
    header = ("network", "accuracy", "AUC", f"rejection at {efficiency:g}", "EBOPs", "yosys LUT", "FF")
    rows = [
        (
            s.name,
            f"{s.accuracy:.4f}",
            f"{s.auc:.4f}",
            f"{s.rejection:.1f}",
            *("" if n is None else f"{n:,}" for n in (s.ebops, s.yosys_lut, s.yosys_ff)),
        )
        for s in scores
    ]
    return text_table(header, rows)


def plot(scores: Sequence[Score], efficiency: float, path: Path) -> None:
    """How good networks are against what they cost: a row for each measure, a column for each cost."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    costs = {"ebops": "effective bit operations", "yosys_lut": "yosys LUT"}
    measures = {
        "accuracy": "accuracy",
        "auc": "AUC",
        "rejection": f"background rejection\nat signal efficiency {efficiency:g}",
    }
    figure, grid = pyplot.subplots(3, 2, figsize=(9, 9), sharex="col", sharey="row")
    for row, (measure, name) in zip(grid, measures.items(), strict=True):
        for axes, (cost, unit) in zip(row, costs.items(), strict=True):
            counted = sorted((s for s in scores if getattr(s, cost)), key=lambda s: getattr(s, cost))
            learned = [s for s in counted if s.name.startswith("epoch")]
            fixed = [s for s in counted if s not in learned]
            for part, style, label in ((learned, "o-", "learned bits"), (fixed, "s", "the same everywhere")):
                axes.plot(
                    [getattr(s, cost) for s in part], [getattr(s, measure) for s in part], style, label=label
                )
            axes.axhline(getattr(scores[0], measure), color="grey", linestyle="--", label="float")
            axes.locator_params(axis="x", nbins=5)
            axes.set(xlabel=unit if measure == "rejection" else "")
        row[0].set(ylabel=name)
    grid[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, nargs="?", help="CSV file of the training samples")
    parser.add_argument(
        "--test", type=Path, help="CSV file of the test samples (default: a fifth of the table)"
    )
    parser.add_argument("--openml", help="name of a data set at OpenML, instead of a table")
    parser.add_argument("--signal", help="the class that the trigger looks for (default: the first)")
    parser.add_argument(
        "--epochs", type=int, default=30, help="of training in float; of learning bits twice that"
    )
    parser.add_argument(
        "--efficiency", type=float, default=0.5, help="share of the signal that passes, for the rejection"
    )
    parser.add_argument(
        "--cells",
        type=int,
        default=3,
        help="further points of the front whose cells are counted, each a minute or two",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("trigger"), help="folder for what is made")
    options = parser.parse_args()
    if (options.table is None) == (options.openml is None):
        parser.error("give a table, or --openml NAME")
    if not 0 < options.efficiency < 1:
        parser.error("--efficiency is a share between 0 and 1")
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    data = prepare_data(options)
    signal = 0 if options.signal is None else data.classes.index(options.signal)
    options.out.mkdir(parents=True, exist_ok=True)

    model = network(data.x.shape[1], len(data.classes))
    train(model, data, options.epochs)
    fixed = {f"fixed{bits}": at_bits(model, data, bits, options.epochs) for bits in (8, 6, 4)}
    print(describe(lower(fixed["fixed6"]), [data.x_test]))
    front = learn(model, data, 2 * options.epochs, options.out)
    print(front)
    networks = fixed | {f"epoch{p.epoch}": front.model(p, model) for p in front.best}
    named = {"float": model, **networks}
    scores = [score(name, net, data, signal, options.efficiency) for name, net in named.items()]
    chosen = f"epoch{choose(front, model, data).epoch}"
    counted = {"fixed6", "fixed4", chosen} | {f"epoch{p.epoch}" for p in spread(front.best, options.cells)}
    if shutil.which("yosys") is None:
        print("yosys is not there, so no cells are counted; install package yosys")
    else:
        scores = [with_cells(s, networks[s.name], options.out) if s.name in counted else s for s in scores]
    prove(networks[chosen], data, options.out)
    print(show(scores, options.efficiency))
    print(f"{chosen} is exported: the cheapest within half a percent of float in validation, or the best")
    (options.out / "scores.json").write_text(json.dumps([asdict(found) for found in scores], indent=1))
    plot(scores, options.efficiency, options.out / "front.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fixed point on FPGAs: every code of every back end, learned bits against fixed ones, and what trains cost.

    python benchmarks/fpga.py                                         # parity, trains
    python benchmarks/fpga.py --parts magic --data DIR --out runs
    python benchmarks/fpga.py --parts magic --data DIR --out runs --peers PYTHON

parity: 10,000 inputs through hls4ml's C++ (g++), a QONNX file (qonnx) and Verilog (iverilog), against the
integer reference: an MLP 16-64-32-32-5 at 8, 6, 4, mixed and 16 bits, a convolutional network in both kinds
of hls4ml's io and one with an addition; each quantized after training and trained quantized.

magic: the MAGIC gamma / hadron table (DIR/magic), an MLP 10-64-32-32-2: float, 6 bits trained, bits learned;
accuracy, AUC, background rejection where half of the signal passes, effective bit operations (EBOPs), and the
cells that yosys counts, "yosys LUT", for it knows no timing. With --peers, the Python of an environment that
has HGQ2 and Keras, the same table and network there; and hls4ml's default type beside.

trains: a Linear and Tensor-Trains of several ranks at 6 bits: cells of each, and the rank at which they meet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from common import Claim, Table, arguments, progress, run_parts
from lowbit import QuantSpec, Recipe, Rule
from lowbit.demo import load_images
from lowbit.export.fpga.verilog import count
from lowbit.hardware import lower
from lowbit.hardware.cost import ebops
from lowbit.hardware.widths import learn_widths
from lowbit.model import QuantizedModel
from lowbit.tensor_networks import TTLinear
from magic import Magic, at_bits, train_float, trigger_network

PARTS = ("parity", "magic", "trains")
TARGETS = ("io_parallel", "io_stream", "qonnx", "verilog")
SAMPLES = 10_000


def half_up(recipe: Recipe) -> Recipe:
    """Gates round half up at the least cost."""
    rules = tuple(
        replace(rule, activation=rule.activation and replace(rule.activation, rounding="half_up"))
        for rule in recipe.rules
    )
    return replace(recipe, rules=rules)


def mixed() -> Recipe:
    """Four, three and six bits in one network."""
    specs = {bits: QuantSpec(bits=bits, scale="pow2") for bits in (3, 4, 6, 8)}
    rules = [
        Rule(match="0", weight=specs[6], activation=specs[8]),
        Rule(match="2", weight=specs[3], activation=specs[6]),
    ]
    return Recipe(rules=(*rules, Rule(weight=specs[4], activation=specs[4])))


# --- parity


class Cnn(nn.Module):
    """Two convolutions with pooling, on images of 12 x 12; with an addition a residual network."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(72, 10)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        y = self.second(x)
        return self.last(F.max_pool2d(F.relu(x + y if self.residual else y), 2).flatten(1))


def mlp() -> nn.Module:
    widths = (16, 64, 32, 32, 5)
    layers: list[nn.Module] = []
    for k in range(4):
        layers += [nn.Linear(widths[k], widths[k + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Case:
    """A network, what it is trained on, and which back ends run it."""

    name: str
    make: Callable[[], nn.Module]
    recipe: Recipe | str
    targets: tuple[str, ...]
    images: bool = False


CASES = (
    *(Case(f"MLP, {b} bits", mlp, f"fixed{b}", ("io_parallel", "qonnx")) for b in (8, 6, 4)),
    Case("MLP, mixed bits", mlp, mixed(), ("io_parallel", "qonnx")),
    Case("MLP, 16 bits", mlp, "fixed16", ("io_parallel",)),
    Case("MLP, 6 bits, half up", mlp, half_up(lowbit.preset("fixed6")), ("verilog",)),
    Case("CNN, 8 bits", lambda: Cnn(False), "fixed8", ("io_parallel", "io_stream", "qonnx"), images=True),
    Case(
        "CNN with an addition, 6 bits",
        lambda: Cnn(True),
        "fixed6",
        ("io_parallel", "io_stream", "qonnx"),
        images=True,
    ),
)


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Five classes of 16 numbers that overlap."""
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 5, (count,), generator=generator)
    return centres[y] + torch.randn(count, 16, generator=generator), y


def pictures(split: str, count: int = 0) -> tuple[Tensor, Tensor]:
    """Images of 12 x 12; where more are asked for than there are, again with a little noise."""
    images, labels = load_images(split)
    images = F.adaptive_avg_pool2d(images, 12)
    while len(images) < count:
        images, labels = (
            torch.cat([images, images + 0.05 * torch.randn_like(images)]),
            torch.cat([labels, labels]),
        )
    return images[: count or None], labels[: count or None]


def fitted(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """Two passes of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for index in [*torch.randperm(len(x)).split(128), *torch.randperm(len(x)).split(128)]:
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model.eval()


def trained(q: QuantizedModel, x: Tensor, y: Tensor) -> QuantizedModel:
    batches = list(zip(x.split(128), y.split(128), strict=True))
    lowbit.Trainer(q, batches, epochs=1, lr=1e-3).fit()
    return lowbit.freeze(q)


def parity(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """Codes of the results."""
    columns = ("network", "by", "target", "samples", "codes equal %", "largest difference")
    table = Table(title="result codes against the integer reference", columns=columns)
    for case in CASES:
        torch.manual_seed(0)
        x, y = pictures("train") if case.images else clusters(6400, 1)
        test, _ = pictures("test", options.samples) if case.images else clusters(options.samples, 2)
        model = fitted(case.make(), x, y)
        prepared = lowbit.calibrate(lowbit.prepare(model, case.recipe, x[:64]), [x[:512]])
        ways = {
            "PTQ": lowbit.quantize(model, case.recipe, calibration=[x[:512]]),
            "QAT": trained(prepared, x, y),
        }
        for way, q in ways.items():
            for target in [t for t in case.targets if t in options.targets]:
                found = proven(q, target, test)
                table.add(
                    **{
                        "network": case.name,
                        "by": way,
                        "target": target,
                        "samples": found.samples,
                        "codes equal %": 100 * found.equal,
                        "largest difference": found.max_lsb,
                    }
                )
                progress(f"{case.name}, {way}, {target}: {100 * found.equal:.4f} %")
    shares = [float(row["codes equal %"] or 0) for row in table.rows]
    return [table], [Claim(claim="codes equal to the reference, %", measured=min(shares), bound=100.0)]


def proven(q: QuantizedModel, target: str, x: Tensor) -> Any:
    """Write, run and compare."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("model.onnx" if target == "qonnx" else "project")
        if target == "qonnx":
            lowbit.export.qonnx(q, path)
        elif target == "verilog":
            lowbit.export.verilog(q, path)
        else:
            lowbit.export.hls4ml(q, path, io=target)  # type: ignore[arg-type]
        return lowbit.verify(q, path, [x])


# --- magic


def magic(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """Float, the same bits everywhere, learned bits."""
    data, seed = Magic.read(Path(options.data) / "magic"), options.seed
    torch.manual_seed(seed)
    model = train_float(trigger_network(), data, 30)
    columns = (
        "network",
        "accuracy %",
        "AUC",
        "rejection",
        "EBOPs",
        "yosys LUT",
        "FF",
        "estimated LUT",
        "zero weights %",
    )
    formats = {"accuracy %": ".2f", "AUC": ".4f", "rejection": ".1f", "zero weights %": ".0f"}
    table = Table(title=f"MAGIC, 10-64-32-32-2, seed {seed}", columns=columns, formats=formats)
    whole = data.scores(model)
    table.add(network="float", **whole)
    table.add(network="hls4ml, fixed<16,6> everywhere", **data.scores(by_default(model)))
    uniform: dict[int, int] = {}
    accuracy: dict[int, float] = {}
    for bits in (8, 6, 4):
        q = at_bits(model, half_up(lowbit.preset(f"fixed{bits}")), data)
        lowbit.Trainer(q, data, epochs=30, lr=1e-3, seed=seed).fit()
        row = measured(lowbit.freeze(q), data, options.cells and bits < 8)
        table.add(network=f"{bits} bits everywhere, trained", **row)
        uniform[bits], accuracy[bits] = row["EBOPs"], row["accuracy %"]
        progress(f"{bits} bits: {accuracy[bits]:.2f} %")
    q = at_bits(model, half_up(lowbit.preset("fixed8")), data)
    settings = {"epochs": options.epochs, "lr": 1e-3, "schedule": "constant", "strength": (0.03, 1.0)}
    out = options.out / f"magic-{seed}"
    front = learn_widths(q, data, data.val, weights=options.weights, out=out, seed=seed, **settings)
    (out / "front.txt").write_text(str(front))
    chosen = front.cheapest(data.val_accuracy(model))
    shown = [front.best[k * (len(front.best) - 1) // 4] for k in range(5)]
    cells, below = [], 0.0
    for point in dict.fromkeys([chosen, *shown]):
        row = measured(front.model(point, model), data, options.cells)
        mark = " (chosen)" if point is chosen else ""
        table.add(
            network=f"learned bits, epoch {point.epoch}{mark}",
            **row,
            **{"zero weights %": 100 * point.pruned},
        )
        cells.append((row["EBOPs"], row.get("yosys LUT")))
        below = whole["accuracy %"] - row["accuracy %"] if point is chosen else below
    ratio = chosen.ebops / uniform[6]
    claims = [
        Claim(
            claim="6 bits trained, points below float",
            measured=whole["accuracy %"] - accuracy[6],
            bound=0.3,
            at_most=True,
        ),
        Claim(claim="learned bits, points below float", measured=below, bound=0.5, at_most=True),
        Claim(claim="their EBOPs over those of 6 bits", measured=ratio, bound=1 / 3, at_most=True),
    ]
    if options.cells:
        pair = torch.tensor([[float(a), float(b)] for a, b in cells]).t()
        correlation = float(torch.corrcoef(pair)[0, 1])
        claims.append(Claim(claim="correlation of EBOPs and yosys LUT", measured=correlation, bound=0.9))
    if options.peers:
        table.rows += peers(options, table)
    return [table], claims


def by_default(model: nn.Module) -> nn.Module:
    """hls4ml's C++ of a float network with its own type for everything."""
    import hls4ml

    class Compiled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                found = {"backend": "Vitis", "granularity": "name", "default_precision": "fixed<16,6>"}
                config = hls4ml.utils.config_from_pytorch_model(
                    model, tuple(x.shape[1:]), channels_last_conversion="full", **found
                )
                project = hls4ml.converters.convert_from_pytorch_model(
                    model, output_dir=folder, backend="Vitis", hls_config=config
                )
                project.compile()
                return torch.from_numpy(project.predict(x.numpy()))

    return Compiled()


def measured(q: QuantizedModel, data: Magic, cells: bool) -> dict[str, Any]:
    """Scores and cost of a frozen network."""
    program = lower(q)
    row: dict[str, Any] = {**data.scores(q), "EBOPs": sum(ebops(program).values())}
    if cells:
        with tempfile.TemporaryDirectory() as folder:
            project = lowbit.export.verilog(q, Path(folder) / "verilog")
            counted = count(project).cells
            row |= {"yosys LUT": counted.lut, "FF": counted.ff, "estimated LUT": project.estimate.lut}
    return row


def peers(options: argparse.Namespace, table: Table) -> list[dict[str, Any]]:
    """Rows of HGQ2, from an environment of its own."""
    script = Path(__file__).parent / "fpga_hgq2.py"
    done = subprocess.run(
        [options.peers, script, "--data", options.data, "--epochs", str(options.epochs)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return [
        {name: row.get(name) for name in table.columns} for row in map(json.loads, done.stdout.splitlines())
    ]


# --- trains


def trains(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """A Linear of 64 x 64 and trains (8 x 8)(8 x 8) in its place, all at 6 bits."""
    columns = ("layer", "weights", "EBOPs", "yosys LUT", "estimated LUT", "clocks")
    table = Table(title="a layer of 64 x 64 at 6 bits", columns=columns)
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    layers: dict[str, nn.Module] = {"nn.Linear": nn.Linear(64, 64)}
    for rank in options.ranks:
        layers[f"TTLinear, rank {rank}"] = TTLinear((8, 8), (8, 8), ranks=rank)
    for name, layer in layers.items():
        q = lowbit.quantize(nn.Sequential(layer), half_up(lowbit.preset("fixed6")), calibration=[x])
        program = lower(q)
        with tempfile.TemporaryDirectory() as folder:
            project = lowbit.export.verilog(q, Path(folder) / "verilog")
            cells = count(project).cells
        weights = sum(step.weight.codes.numel() for step in program.steps if step.weight is not None)
        found = {"weights": weights, "EBOPs": sum(ebops(program).values()), "clocks": project.latency}
        table.add(layer=name, **found, **{"yosys LUT": cells.lut, "estimated LUT": project.estimate.lut})
        progress(f"{name}: {cells.lut:,} yosys LUT")
    return [table], []


RUN = {"parity": parity, "magic": magic, "trains": trains}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["parity", "trains"])
    parser.add_argument("--data", help="folder with magic/")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for runs (default: runs)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, help="of parity")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of parity (default: {SAMPLES})")
    parser.add_argument("--epochs", type=int, default=80, help="of learning bits (default: 80)")
    parser.add_argument(
        "--weights", default="channel", help="one learned width per element, channel or tensor"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8], help="of trains")
    parser.add_argument("--cells", action="store_true", help="let yosys count, in magic; minutes a network")
    parser.add_argument("--peers", help="Python of an environment with HGQ2 and Keras")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "magic" in options.parts and options.data is None:
        parser.error("part magic needs --data")
    torch.set_num_threads(1)
    return run_parts(RUN, options)


if __name__ == "__main__":
    sys.exit(main())

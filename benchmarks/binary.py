"""Binary and ternary networks: kernels against float kernels, whole networks, files, and accuracy.

    python benchmarks/binary.py                                       # kernels, network, linear
    python benchmarks/binary.py --parts accuracy --data DIR --out runs --epochs 2
    python benchmarks/binary.py --parts levels --data DIR --out studies --images 12800
    python benchmarks/binary.py --parts gradients --data DIR --out studies --images 12800

kernels: products of packed bits, packing of the activations included, beside torch's float32 product and
convolution, and for the convolution ONNX Runtime's; and int8 in ONNX Runtime. One thread, in turn, each for
20 ms: as a layer is called in practice, its weights in the cache where they fit. Results are compared first.
With --threads 2 also two against one.

network: a VGG-small (Zhang et al. 2018, LQ-Nets: 128-128-256-256-512-512, one linear layer), first and last
layer in float, on the bit kernels beside its float twin in ONNX Runtime; and the size of both files.

linear: a 4096x4096 layer with ternary and with binary weights in ONNX Runtime, batch 1, beside float32.

accuracy: ResNet-20 (option B) on CIFAR-10 from the float network, with the augmentation and the defaults of
`benchmarks/qat.py`: binary weights, ternary weights, and binary weights and activations, the network's own
ReLUs kept, so that activations are 0 and 1. 'textbook' is binary weights with the plain straight-through
estimator and the mean magnitude for the scale, in all layers but the first and the last; the presets keep 8
bits in the 1x1 convolutions of shortcuts. --recipes has three more, with one bit there as well: 'shortcuts
too', 'w1a1, shortcuts too', and 'relax', whose forward pass goes from the float weights to the rounded ones.

levels, gradients: how scale and threshold are chosen, and the estimators of one bit, shortcuts too; seed 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lowbit
from common import Claim, Table, add_device, arguments, progress, run_parts
from lowbit import PerTensor, Recipe, Rule, runtime
from lowbit.core.estimators import estimators
from lowbit.graph.inputs import Inputs
from lowbit.kernels import bits
from lowbit.presets import preset
from lowbit.reference import run_on_codes
from measure import Timing, interleave
from networks import BinaryVgg
from qat import Bench

PARTS = ("kernels", "network", "linear", "accuracy", "levels", "gradients")
# (M, N, K) of activations [M, K] and weights [N, K]: times faster than float32 asked of a processor with
# VPOPCNTDQ, for binary and for ternary weights
SHAPES = {(1024, 1024, 1024): (8.0, 10.0), (32, 4096, 4096): (30.0, 28.0), (1, 4096, 4096): (70.0, 28.0)}
TWO_THREADS = 1.7
# seconds of one run's turn
TURN = 0.02
CONV = {"torch": 9.0, "ONNX Runtime": 8.0}
# of a whole network, and of a linear layer in ONNX Runtime
NETWORK = {"speed": 3.0, "size": 15.0}
LINEAR = {"speed": 10.0, "size": 14.0}
Found = tuple[list[Table], list[Claim]]


def has_bit_counts() -> bool:
    """Whether the processor counts bits in vectors, which the figures asked for presume."""
    return "AVX512" in bits.description()


def kernels(options: argparse.Namespace) -> Found:
    """Products and a convolution."""
    columns = ("product", "times faster", "of processor time", "lowest", "highest", "asked")
    formats = dict.fromkeys(columns[1:5], ".1f")
    table = Table(
        title=f"against float32, one thread, {bits.description()}", columns=columns, formats=formats
    )
    claims: list[Claim] = []

    def row(label: str, t: Timing, asked: float | None) -> None:
        spread = {"lowest": 1 / t.high, "highest": 1 / t.low}
        shown = {"product": label, "times faster": t.speedup, "of processor time": 1 / t.cpu}
        table.add(**shown, **spread, asked=asked)
        if asked is not None and has_bit_counts():
            claims.append(Claim(claim=label, measured=t.speedup, bound=asked))

    for (m, n, k), (binary, ternary) in SHAPES.items():
        asked = {"binary": binary, "ternary": ternary, "int8": None}
        for name, t in products(m, n, k, options.rounds).items():
            inputs = "bytes" if name == "int8" else "signs"
            row(f"{inputs} [{m}, {k}] x {name} [{n}, {k}]", t, asked[name])
    for rival, t in convolution(options.rounds).items():
        row(f"3x3, 128 channels, 28x28, beside {rival}", t, CONV[rival])
    if not has_bit_counts():
        progress("no AVX512-VPOPCNTDQ here: ratios of the AVX2 kernels, without claims")
    more, held = threads(options)
    return [table, *more], claims + held


def products(m: int, n: int, k: int, rounds: int) -> dict[str, Timing]:
    """Binary and ternary weights, and int8 in ONNX Runtime, beside float32; bits are compared first."""
    x, weights = torch.randn(m, k), torch.randn(n, k)
    packed = {}
    for name, codes in (("binary", signs(weights)), ("ternary", torch.randint(-1, 2, (n, k)).float())):
        packed[name] = bits.pack_weight(codes.long())
        assert torch.equal(bits.linear(bits.pack_signs(x), packed[name]).float(), signs(x) @ codes.t())
    layer = nn.Sequential(nn.Linear(k, n, bias=False)).eval()
    with tempfile.TemporaryDirectory() as folder:
        q = lowbit.quantize(layer, "w8a8", calibration=x)
        session = runtime.session(lowbit.export.onnx(q, Path(folder) / "int8.onnx"), threads=1)
    feed = {session.get_inputs()[0].name: x.numpy()}
    runs: dict[str, Callable[[], object]] = {
        "float32": lambda: x @ weights.t(),
        "binary": lambda: bits.linear(bits.pack_signs(x), packed["binary"]),
        "ternary": lambda: bits.linear(bits.pack_signs(x), packed["ternary"]),
        "int8": lambda: session.run(None, feed),
    }
    timings = interleave(runs, rounds=rounds, fill=TURN)
    return {name: t for name, t in timings.items() if name != "float32"}


def signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def convolution(rounds: int) -> dict[str, Timing]:
    """3x3, 128 channels, 28x28, batch 1, beside torch and ONNX Runtime."""
    layer, x = nn.Conv2d(128, 128, 3, padding=1, bias=False).eval(), torch.randn(1, 128, 28, 28)
    codes = signs(layer.weight.detach())
    layer.weight.data = codes
    weight, last = bits.pack_weight(codes.long()), x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(bits.conv2d(bits.pack_signs(last), weight, padding=1).float(), layer(signs(x)))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = lowbit.export.float_onnx(layer, Path(folder) / "float.onnx", x)
        session = runtime.session(path, threads=1)
        feed = {session.get_inputs()[0].name: x.numpy()}

        def ours() -> Tensor:
            return bits.conv2d(bits.pack_signs(last), weight, padding=1)

        rivals: dict[str, Callable[[], object]] = {
            "torch": lambda: layer(x),
            "ONNX Runtime": lambda: session.run(None, feed),
        }
        pairs = {name: {name: run, "bits": ours} for name, run in rivals.items()}
        return {name: interleave(pair, rounds=rounds, fill=TURN)["bits"] for name, pair in pairs.items()}


def threads(options: argparse.Namespace) -> Found:
    """Two threads beside one."""
    if options.threads < 2:
        return [], []
    x, weight = torch.randn(1024, 1024), bits.pack_weight(torch.randint(0, 2, (1024, 1024)) * 2 - 1)
    runs: dict[str, Callable[[], object]] = {}
    for count in (1, options.threads):

        def run(count: int = count) -> Tensor:
            torch.set_num_threads(count)
            return bits.linear(bits.pack_signs(x), weight)

        runs[f"{count}"] = run
    timing = interleave(runs, rounds=options.rounds, fill=TURN)[f"{options.threads}"]
    torch.set_num_threads(1)
    table = Table(
        title="threads, 1024x1024x1024", columns=("threads", "times faster"), formats={"times faster": ".2f"}
    )
    table.add(**{"threads": options.threads, "times faster": timing.speedup})
    claim = Claim(claim=f"{options.threads} threads beside one", measured=timing.speedup, bound=TWO_THREADS)
    return [table], [claim] if options.threads == 2 else []


def network(options: argparse.Namespace) -> Found:
    """A whole network and its twin."""
    torch.manual_seed(0)
    model, x = BinaryVgg().eval(), torch.randn(1, 3, 32, 32)
    float_edges = tuple(Rule(match=f"role:{role}") for role in ("first", "last"))
    recipe = Recipe(rules=(*float_edges, Rule(weight="binary", activation="sign")), fold_bn="after")  # type: ignore[arg-type]
    q = lowbit.freeze(lowbit.calibrate(lowbit.prepare(model, recipe, x), [torch.randn(8, 3, 32, 32)]))
    ours = q.compile_kernels()
    progress(str(ours))
    expected = run_on_codes(q.graph, Inputs.of(x))
    assert torch.allclose(ours(x), expected, atol=1e-5 * float(expected.abs().max()))
    with tempfile.TemporaryDirectory() as folder:
        path = lowbit.export.float_onnx(model, Path(folder) / "float.onnx", x)
        session = runtime.session(path, threads=1)
        feed = {session.get_inputs()[0].name: x.numpy()}
        runs: dict[str, Callable[[], object]] = {
            "float32, ONNX Runtime": lambda: session.run(None, feed),
            "float32, torch": lambda: model(x),
            "bits": lambda: ours(x),
        }
        with torch.inference_mode():
            timings = interleave(runs, rounds=options.rounds, fill=TURN)
        save_file(model.state_dict(), Path(folder) / "float.safetensors")
        sizes = [
            file.stat().st_size
            for file in (
                Path(folder) / "float.safetensors",
                lowbit.save(q, Path(folder) / "bits.safetensors"),
            )
        ]
    columns = ("network", "times faster", "bytes")
    table = Table(title="VGG-small, batch 1, one thread", columns=columns, formats={"times faster": ".2f"})
    for name, t in timings.items():
        table.add(**{"network": name, "times faster": t.speedup, "bytes": sizes[name == "bits"]})
    speed, size = timings["bits"].speedup, sizes[0] / sizes[1]
    return [table], [
        Claim(claim="times faster than float32 in ONNX Runtime", measured=speed, bound=NETWORK["speed"]),
        Claim(claim="times smaller on disk", measured=size, bound=NETWORK["size"]),
    ]


def linear(options: argparse.Namespace) -> Found:
    """One layer as a file."""
    model, x = nn.Sequential(nn.Linear(4096, 4096, bias=False)).eval(), torch.randn(1, 4096)
    columns = ("weights", "times faster", "times smaller")
    formats = dict.fromkeys(columns[1:], ".1f")
    table = Table(title="4096x4096 in ONNX Runtime, batch 1, one thread", columns=columns, formats=formats)
    claims = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {"float32": lowbit.export.float_onnx(model, Path(folder) / "float.onnx", x)}
        for name in ("ternary", "binary"):
            q = lowbit.quantize(model, Recipe(rules=(Rule(weight=name),)), example_inputs=x)  # type: ignore[arg-type]
            paths[name] = lowbit.export.onnx(q, Path(folder) / f"{name}.onnx")
            parity = lowbit.verify(q, paths[name], x)
            assert parity.ok
            progress(f"{name}: {parity}")
        sessions = {name: runtime.session(path, threads=1) for name, path in paths.items()}

        def runner(name: str) -> Callable[[], object]:
            session = sessions[name]
            feed = {session.get_inputs()[0].name: x.numpy()}
            return lambda: session.run(None, feed)

        runs = {name: runner(name) for name in paths}
        timings = interleave(runs, rounds=options.rounds, fill=TURN)
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    for name, t in timings.items():
        smaller = sizes["float32"] / sizes[name]
        table.add(**{"weights": name, "times faster": t.speedup, "times smaller": smaller})
        if name != "float32":
            claims.append(Claim(claim=f"{name}, faster", measured=t.speedup, bound=LINEAR["speed"]))
            claims.append(Claim(claim=f"{name}, smaller", measured=smaller, bound=LINEAR["size"]))
    return [table], claims


def textbook() -> Recipe:
    """Binary weights as in the first papers: plain straight-through, the scale the mean magnitude."""
    base = all_of_one_bit("w1", "ste")
    return replace(base, rules=(*base.rules[:-1], replace(base.rules[-1], weight_observer="absmean")))


def all_of_one_bit(name: str, estimator: str = "lsq") -> Recipe:
    """A preset whose shortcuts are as narrow as everything else."""
    base = preset(name, estimator=estimator)
    return replace(base, rules=tuple(r for r in base.rules if r.match != "role:shortcut"))


def accuracy(options: argparse.Namespace) -> Found:
    """Trained networks, several seeds."""
    bench = Bench(options)
    recipes = {
        "w1": preset("w1"),
        "ternary": preset("ternary"),
        "w1a1": preset("w1a1"),
        "textbook": textbook(),
        "shortcuts too": all_of_one_bit("w1"),
        "w1a1, shortcuts too": all_of_one_bit("w1a1"),
        "relax": all_of_one_bit("w1", "relax"),
    }
    table = Table(
        title=f"{options.epochs} epochs, last epoch: top-1 % on the 10,000 test images",
        columns=("recipe", "mean", "lowest", "highest", "seeds"),
        formats=dict.fromkeys(("mean", "lowest", "highest"), ".2f"),
    )
    means = {}
    for name in options.recipes:
        found = [
            bench.qat(f"bits{options.epochs}-{name}-{seed}", recipes[name], epochs=options.epochs, seed=seed)[
                "top1"
            ]
            for seed in options.seeds
        ]
        means[name] = statistics.mean(found)
        table.add(recipe=name, mean=means[name], lowest=min(found), highest=max(found), seeds=len(found))
    pairs = (("ternary", "w1"), ("w1", "textbook"), ("ternary", "textbook"))
    return [table], [
        Claim(claim=f"{better} above {worse}", measured=means[better], bound=means[worse])
        for better, worse in pairs
        if better in means and worse in means
    ]


def levels(options: argparse.Namespace) -> Found:
    """Ways to choose the scale and the threshold."""

    def variant(name: str, estimator: str, observer: str = "mse", **changes: Any) -> Recipe:
        base = all_of_one_bit(name, estimator)
        last = base.rules[-1]
        assert last.weight is not None
        rule = replace(last, weight_observer=observer, weight=replace(last.weight, **changes))
        return replace(base, rules=(*base.rules[:-1], rule))

    variants = {
        "binary, mean": variant("w1", "clipped_ste"),
        "binary, learned": variant("w1", "lsq"),
        "binary, mean of the tensor": variant("w1", "clipped_ste", granularity=PerTensor()),
        "ternary, 0.7 mean (TWN)": variant("ternary", "clipped_ste", "twn"),
        "ternary, optimum": variant("ternary", "clipped_ste"),
        "ternary, absmean (b1.58)": variant("ternary", "clipped_ste", "absmean"),
        "ternary, learned": variant("ternary", "lsq"),
        "ternary, learned for each sign (TTQ)": variant("ternary", "lsq", "ttq", split=True),
        "ternary, learned for each sign, optimum": variant("ternary", "lsq", split=True),
    }
    return [runs(options, "scales and thresholds", "weights", variants, "levels")], []


def gradients(options: argparse.Namespace) -> Found:
    """Estimators and reshapes of one bit."""
    names = [n for n in estimators.names() if estimators.get(n).one_bit]
    variants = {f"w1a1, {name}": all_of_one_bit("w1a1", name) for name in ("lsq", "clipped_ste", *names)}
    for reshape in ("standardize", "clip", "recu"):
        base = all_of_one_bit("w1a1")
        rules = tuple(
            replace(r, reshape=reshape) if r.weight and r.weight.is_binary else r for r in base.rules
        )
        variants[f"w1a1, lsq, {reshape}"] = replace(base, rules=rules)
    return [runs(options, "gradients of one bit", "training", variants, "gradients")], []


def runs(
    options: argparse.Namespace, title: str, column: str, variants: dict[str, Recipe], study: str
) -> Table:
    """One row for each variant."""
    bench, epochs = Bench(options), options.epochs
    table = Table(
        title=f"{title}, {epochs} epochs: top-1 %", columns=(column, "top-1 %"), formats={"top-1 %": ".2f"}
    )
    for label, recipe in variants.items():
        name = f"{study}{epochs}-{label}".replace(",", "").replace("(", "").replace(")", "")
        table.add(**{column: label, "top-1 %": bench.qat(name, recipe, epochs=epochs)["top1"]})
    return table


RUN = dict(zip(PARTS, (kernels, network, linear, accuracy, levels, gradients), strict=True))


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["kernels", "network", "linear"])
    parser.add_argument("--rounds", type=int, default=30, help="of timings (default: 30)")
    parser.add_argument("--threads", type=int, default=1, help="also time so many (default: 1)")
    parser.add_argument("--data", help="folder with cifar10/ and models/; for training")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for runs (default: runs)")
    parser.add_argument("--epochs", type=int, default=2, help="of training (default: 2)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of part accuracy")
    parser.add_argument(
        "--recipes", nargs="+", default=["w1", "ternary", "w1a1", "textbook"], help="of accuracy"
    )
    parser.add_argument("--images", type=int, help="use the first so many training images (default: all)")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    add_device(parser)
    options = parser.parse_args()
    if options.data is None and set(options.parts) & {"accuracy", "levels", "gradients"}:
        parser.error("training needs --data, a folder with cifar10/ and models/")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return run_parts(RUN, options)


if __name__ == "__main__":
    sys.exit(main())

"""Tensor networks: how fast their layers are, what rounding costs them, and when they are worth it.

    python benchmarks/tensor_networks.py --parts speed noise
    python benchmarks/tensor_networks.py --parts images ranks
    python benchmarks/tensor_networks.py --parts cifar --data DIR

The layers of tensorly-torch are timed beside these where it is installed (`pip install tensorly-torch`).

speed: TTLinear 1024 x 1024, modes (4, 4, 8, 8) and (8, 8, 4, 4), beside nn.Linear and tensorly-torch's
block-tensor-train layer (its faster implementation), in turn, one thread; in evaluation, and forward and
backward.

noise: a train of true rank 12 with 2 % noise, 1024 x 1024, rounded: each core as it comes from the
decomposition (largest magnitude, and least squares), with the gauge fixed and bonds corrected, with a scale
for each output of a core; relative error against the matrix.

images: a network 784-1024-1024-10 trained on the Fashion-MNIST images that ship with lowbit (--fashion DIR:
on all 60,000), its first two layers as trains, trained on as long again; rounded to 8, 6 and 4 bits, and
trained with 4. Beside them the dense network at few bits, and a narrow dense one with as many weights as the
trains, trained for as long as these in all.

ranks: the same trains with more ranks than they need; what `reduce_ranks` saves at 8, 6 and 4 bits.

cifar: ResNet-20 with Tucker-2 convolutions in its last two stages, the same table.

latency: files of these networks in ONNX Runtime, float and rounded, batch 1; ResNet-20 with --data.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from common import Claim, Table, arguments, progress, run_parts
from lowbit import INT8, PerTensor, Recipe, Rule, runtime
from lowbit.core.spec import QuantSpec
from lowbit.decompose.tt import Train, matrix_to_train, train_to_matrix
from lowbit.tensor_networks import Fixed, TTLinear, reduce_ranks, tensorize
from measure import Timing, interleave
from tensor_tasks import Task, fashion, resnet, weights_at

MODES = (4, 4, 8, 8), (8, 8, 4, 4)
RANKS, BATCHES = (4, 8, 16), (1, 8, 32, 128, 256)
# times nn.Linear at a batch of one, by rank
ASKED = {16: 3.0, 8: 4.5, 4: 6.0}
BITS = (8, 6, 4)


def speed(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """TTLinear beside nn.Linear and tensorly-torch."""
    torch.set_num_threads(1)
    columns = ("rank", "batch", "nn.Linear us", "times nn.Linear", "times tensorly-torch", "training too")
    formats = {"nn.Linear us": ".0f", **dict.fromkeys(columns[3:], ".2f")}
    shown = Table(title="TTLinear 1024 x 1024, one thread", columns=columns, formats=formats)
    claims, worst, beside = [], [], []
    dense = nn.Linear(1024, 1024).eval()
    for rank in RANKS:
        layer = TTLinear(*MODES, rank).eval()
        peers = _peers(rank)
        for batch in BATCHES:
            x = torch.randn(batch, 1024)
            repeats = max(1, 200 // batch)
            with torch.no_grad():
                runs = {"dense": dense, "ours": layer, **peers}
                timed = interleave(
                    {k: _repeated(m, x, repeats) for k, m in runs.items()}, rounds=options.rounds
                )
            steps = {
                k: _repeated(_step(m), x, max(1, repeats // 4)) for k, m in {"ours": layer, **peers}.items()
            }
            trained = interleave(steps, rounds=options.rounds)
            times = 1 / timed["ours"].paired
            row = {"times nn.Linear": times, "nn.Linear us": timed["dense"].seconds / repeats * 1e6}
            if peers:
                row["times tensorly-torch"] = _fastest(timed) / timed["ours"].seconds
                row["training too"] = _fastest(trained) / trained["ours"].seconds
                beside += [row["times tensorly-torch"], row["training too"]]
            shown.add(rank=rank, batch=batch, **row)
            worst.append(times)
            if batch == 1:
                claims.append(
                    Claim(claim=f"times nn.Linear, rank {rank}, batch 1", measured=times, bound=ASKED[rank])
                )
            progress(f"rank {rank}, batch {batch}: {times:.2f}")
    claims.append(Claim(claim="times nn.Linear, the least of all", measured=min(worst), bound=0.95))
    if beside:
        claims.append(Claim(claim="times tensorly-torch, the least of all", measured=min(beside), bound=1.0))
    return [shown], claims


def _repeated(run: Callable[[Tensor], object], x: Tensor, times: int) -> Callable[[], object]:
    def repeated() -> None:
        for _ in range(times):
            run(x)

    return repeated


def _step(model: nn.Module) -> Callable[[Tensor], object]:
    """Forward and backward."""
    trained = copy.deepcopy(model).train()

    def run(x: Tensor) -> None:
        trained.zero_grad()
        trained(x).sum().backward()

    return run


def _peers(rank: int) -> dict[str, nn.Module]:
    try:
        import tensorly
        import tltorch
    except ImportError:
        return {}
    tensorly.set_backend("pytorch")
    out_modes, in_modes = MODES
    return {
        f"tensorly-torch, {way}": tltorch.FactorizedLinear(
            in_modes,
            out_modes,
            bias=True,
            factorization="blocktt",
            rank=[1, rank, rank, rank, 1],
            implementation=way,
        ).eval()
        for way in ("reconstructed", "factorized")
    }


def _fastest(timed: dict[str, Timing]) -> float:
    return min(t.seconds for name, t in timed.items() if name.startswith("tensorly"))


def noise(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """What rounding costs a train, and what gauge and correction save."""
    torch.manual_seed(0)
    modes, rank = (8, 8, 4, 4), 12
    wide = (1, rank, rank, rank, 1)
    pure = train_to_matrix(Train(tuple(torch.randn(wide[k], n, n, wide[k + 1]) for k, n in enumerate(modes))))
    weight = pure + 0.02 * pure.norm() * torch.randn_like(pure) / 1024
    train = matrix_to_train(weight, modes, modes, Fixed(rank))
    layer, whole = TTLinear.from_train(train).eval(), torch.eye(1024)

    def error(found: nn.Module) -> float:
        with torch.no_grad():
            return float((found(whole).t() - weight).norm() / weight.norm())

    def of(bits: int, observer: str, where: Any, **flow: Any) -> float:
        rule = Rule(weight=QuantSpec(bits=bits, granularity=where), weight_observer=observer)
        return error(lowbit.quantize(layer, Recipe(rules=(rule,), **flow), list(whole.split(256))))

    both = {"equalize": True, "refine": ("bond_correct",)}
    kinds: dict[str, Callable[[int], float]] = {
        "a core, largest magnitude": lambda b: of(b, "minmax", PerTensor()),
        "a core, least squares": lambda b: of(b, "mse", PerTensor()),
        "a core, gauge and correction": lambda b: of(b, "mse", PerTensor(), **both),
        "each output of a core": lambda b: of(b, "mse", lowbit.PerChannel(0)),
        "each output, gauge and correction": lambda b: of(b, "mse", lowbit.PerChannel(0), **both),
    }
    shown = Table(
        title=f"relative error of the matrix; the float train has {train.error:.4f}",
        columns=("a scale for", *(f"{b} bits" for b in BITS)),
        formats=dict.fromkeys((f"{b} bits" for b in BITS), ".4f"),
    )
    found = {name: {b: run(b) for b in BITS} for name, run in kinds.items()}
    for name, errors in found.items():
        shown.add(**{"a scale for": name, **{f"{b} bits": e for b, e in errors.items()}})
    plain, best = found["a core, least squares"], found["each output, gauge and correction"]
    saved = [
        Claim(claim=f"error saved at {b} bits, %", measured=100 * (1 - best[b] / plain[b]), bound=25.0)
        for b in (6, 4)
    ]
    return [shown, _reduced(weight, modes, error)], saved


def _reduced(weight: Tensor, modes: tuple[int, ...], error: Callable[[nn.Module], float]) -> Table:
    """Ranks that the weight does not have, and what rounding lets `reduce_ranks` see."""
    layer = TTLinear.from_train(matrix_to_train(weight, modes, modes, Fixed(20))).eval()
    columns = ("bits", "ranks", "were", "weights saved %", "error", "with all ranks")
    formats = {"weights saved %": ".1f", "error": ".4f", "with all ranks": ".4f"}
    shown = Table(
        title="reduce_ranks, the same matrix decomposed with more", columns=columns, formats=formats
    )
    whole = list(torch.eye(1024).split(256))
    for bits in BITS:
        recipe = Recipe(rules=(Rule(weight=INT8.at(bits)),))
        found = reduce_ranks(layer, recipe, whole, 4.0)
        (row,) = found.rows
        saved = 100 * (1 - row.weights_after / row.weights_before)
        ranks = {"ranks": str(row.ranks_after), "were": str(row.ranks_before)}
        before = error(lowbit.quantize(layer, recipe, whole))
        shown.add(
            bits=bits,
            **ranks,
            **{"weights saved %": saved, "error": error(found.q), "with all ranks": before},
        )
    return shown


def table_of(task: Task, options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """Dense and factors, float and rounded, on one task."""
    shown = Table(
        title=task.name,
        columns=("network", "weights", "top-1 %", "bytes", "times smaller", "MACs"),
        formats={"top-1 %": ".2f", "times smaller": ".1f", "bytes": ",", "MACs": ","},
    )
    small = tensorize(task.model, task.rules, task.calibration[0])
    progress(f"\n{small}")
    factors = task.trained(small.model)
    whole = lowbit.prepare(task.model, weights_at(8), task.calibration[0]).cost().float_bytes
    scores: dict[tuple[str, str], float] = {}
    points: dict[str, list[tuple[int, float]]] = {"dense": [], "factors": [], "narrow": []}

    def add(network: str, weights: str, model: nn.Module, cost: Any, size: int) -> None:
        scores[network, weights] = score = task.top1(model)
        shown.add(
            **{
                "network": network,
                "weights": weights,
                "top-1 %": score,
                "bytes": size,
                "times smaller": whole / size,
                "MACs": cost.macs,
            }
        )
        if weights != "float":
            points[network].append((size, score))
        progress(f"{task.name}: {network}, {weights}: {score:.2f} %, {size:,} bytes")

    models = {"dense": task.model, "factors": factors}
    if task.narrow is not None:
        count = sum(p.numel() for p in factors.parameters() if p.ndim > 1)
        models["narrow"] = replace(task, epochs=2 * task.epochs).trained(task.narrow(count))
    for network, model in models.items():
        cost = lowbit.prepare(model, weights_at(8), task.calibration[0]).cost()
        add(network, "float", model, cost, cost.float_bytes)
        for bits in (8, 4, 3, 2) if network == "dense" else (8, 6, 4):
            q = task.ptq(model, weights_at(bits))
            add(network, f"{bits} bits", q, q.cost(), q.cost().bytes)
        bits = 2 if network == "dense" else 4
        q = task.qat(model, weights_at(bits))
        add(network, f"{bits} bits, trained", q, q.cost(), q.cost().bytes)
    claims = [
        Claim(
            claim="factors, 8 bits less float",
            measured=scores["factors", "8 bits"] - scores["factors", "float"],
            bound=-0.1,
        ),
        Claim(
            claim="factors, 4 bits trained less float",
            measured=scores["factors", "4 bits, trained"] - scores["factors", "float"],
            bound=-0.3,
        ),
        Claim(
            claim="factors, 4 bits trained less 4 bits",
            measured=scores["factors", "4 bits, trained"] - scores["factors", "4 bits"],
            bound=0.0,
        ),
    ]
    better = [
        (size, score)
        for size, score in points["factors"]
        if all(score > other for have, other in points["dense"] + points["narrow"] if have <= size)
    ]
    progress(f"points at which no dense network of as few bytes is as good: {better}")
    return [shown], claims


def images(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """784-1024-1024-10 on Fashion-MNIST."""
    task = fashion(options)
    return table_of(replace(task, model=task.trained(task.model)), options)


def cifar(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """ResNet-20 on CIFAR-10."""
    return table_of(resnet(options), options)


def latency(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """Files in ONNX Runtime; weights do not matter, so nothing is trained."""
    tasks = [fashion(options)] + ([resnet(options)] if options.data else [])
    return [latency_of(task, options.rounds) for task in tasks], []


def latency_of(task: Task, rounds: int) -> Table:
    """Times the dense network in float, batch 1."""
    models = {"dense": task.model, "factors": tensorize(task.model, task.rules).model.eval()}
    if task.narrow is not None:
        models["narrow"] = task.narrow(sum(p.numel() for p in models["factors"].parameters() if p.ndim > 1))
    x = task.calibration[0][:1]
    shown = Table(
        title=f"{task.name}: times dense float in ONNX Runtime, batch 1, one thread",
        columns=("network", "float", "8 bits", "4 bits"),
        formats=dict.fromkeys(("float", "8 bits", "4 bits"), ".2f"),
    )
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for network, model in models.items():
            paths = {"float": lowbit.export.float_onnx(model, Path(folder) / f"{network}.onnx", x)}
            for bits in (8, 4):
                q = task.ptq(model, weights_at(bits))
                paths[f"{bits} bits"] = lowbit.export.onnx(q, Path(folder) / f"{network}{bits}.onnx")
            for weights, path in paths.items():
                session = runtime.session(path, threads=1)
                feed = {session.get_inputs()[0].name: x.numpy()}
                runs[network, weights] = partial(session.run, None, feed)
        times = interleave({" ".join(key): run for key, run in runs.items()}, rounds=rounds, warmup=3)
    for network in models:
        row = {weights: times[f"{network} {weights}"].speedup for weights in ("float", "8 bits", "4 bits")}
        shown.add(network=network, **row)
    return shown


def ranks(options: argparse.Namespace) -> tuple[list[Table], list[Claim]]:
    """What `reduce_ranks` saves."""
    options = argparse.Namespace(**{**vars(options), "rank": 2 * options.rank})
    task = fashion(options)
    task = replace(task, model=task.trained(task.model))
    small = task.trained(tensorize(task.model, task.rules).model)
    shown = Table(
        title=f"ranks under quantization, {task.name}",
        columns=("bits", "weights", "were", "saved %", "top-1 %", "was", "SQNR dB", "was dB"),
        formats={
            "saved %": ".1f",
            "weights": ",",
            "were": ",",
            **dict.fromkeys(("top-1 %", "was", "SQNR dB", "was dB"), ".2f"),
        },
    )
    claims = []
    for bits in BITS:
        found = reduce_ranks(
            small, weights_at(bits), task.calibration, options.tolerance, lost_db=options.lost_db
        )
        before, after = (task.top1(m) for m in (task.ptq(small, weights_at(bits)), found.q))
        now, were = (
            sum(getattr(row, f"weights_{when}") for row in found.rows) for when in ("after", "before")
        )
        row = {
            "bits": bits,
            "weights": now,
            "were": were,
            "saved %": 100 * (1 - now / were),
            "top-1 %": after,
        }
        shown.add(**row, was=before, **{"SQNR dB": found.after_db, "was dB": found.before_db})
        claims.append(
            Claim(
                claim=f"top-1 at {bits} bits, less that with all ranks", measured=after - before, bound=-0.1
            )
        )
    return [shown], claims


RUN = {"speed": speed, "noise": noise, "images": images, "ranks": ranks, "cifar": cifar, "latency": latency}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=RUN, default=["speed", "noise", "images", "ranks"])
    parser.add_argument("--rounds", type=int, default=30, help="timed turns")
    parser.add_argument("--epochs", type=int, default=10, help="of each training")
    parser.add_argument(
        "--rank", type=int, default=16, help="of the trains in images; twice as much in ranks"
    )
    parser.add_argument("--share", type=float, default=0.5, help="of the weights of a convolution, in cifar")
    parser.add_argument("--tolerance", type=float, default=1.0, help="of reduce_ranks, in ranks")
    parser.add_argument("--lost-db", type=float, default=0.1, help="that the output may lose, in ranks")
    parser.add_argument("--images", type=int, help="so many training images, in cifar")
    parser.add_argument("--fashion", type=Path, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--data", type=Path, help="folder with cifar10/ and models/, for cifar")
    options = parser.parse_args()
    if options.data is None and "cifar" in options.parts:
        parser.error("part cifar needs --data, a folder with cifar10/ and models/")
    return run_parts(RUN, options)


if __name__ == "__main__":
    sys.exit(main())

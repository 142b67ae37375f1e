"""Bit widths learned with the weights, under a penalty on what they cost; and the front that they trace.

The penalty is s E / E0, with E the effective bit operations (`lowbit.hardware.cost.ebops`) and E0 those at
the start; s rises evenly in its logarithm over training, so that one run passes from accurate to cheap.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowbit.errors import LowbitError, expect
from lowbit.export.checkpoint import load, save
from lowbit.graph.match import input_quantizer, layer_nodes
from lowbit.graph.ops import module_of
from lowbit.graph.rewrite import swap
from lowbit.hardware.cost import ebops
from lowbit.hardware.lower import lower
from lowbit.model import QuantizedModel
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.nn.widths import Per, WidthQuantizer
from lowbit.ptq import freeze
from lowbit.qat import Trainer
from lowbit.tables import text_table
from lowbit.training.batches import check_data, split
from lowbit.training.evaluate import Score, evaluate
from lowbit.training.record import Epoch

__all__ = ["Front", "Point", "learn_widths"]


@dataclass(frozen=True)
class Point:
    """A frozen network on the way: what it costs, and how good it is on the validation data."""

    epoch: int
    ebops: int
    metric: float
    loss: float | None
    # mean bits that a weight, and an activation, pays for
    weight_bits: float
    activation_bits: float
    # weights that are zero
    pruned: float


@dataclass(frozen=True, eq=False)
class Front:
    """Every epoch of a run, and those of them that nothing else beats in both cost and metric."""

    points: tuple[Point, ...]
    # frozen models by epoch, or the folder where they are
    models: dict[int, QuantizedModel] | Path

    @property
    def best(self) -> tuple[Point, ...]:
        """The front: cheapest first, each better than all that are cheaper."""
        found: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.ebops, -p.metric)):
            if not found or point.metric > found[-1].metric:
                found.append(point)
        return tuple(found)

    def cheapest(self, metric: float) -> Point:
        """The point of least cost that reaches a metric.

        Raises:
            LowbitError: none does.
        """
        for point in self.best:
            if point.metric >= metric:
                return point
        most = max((p.metric for p in self.points), default=-math.inf)
        raise LowbitError(
            f"no epoch reaches {metric:g}; the best has {most:g}: lower the strength, or train on"
        )

    def model(self, point: Point, architecture: nn.Module | None = None) -> QuantizedModel:
        """The frozen model of a point.

        Args:
            architecture: the float network, where models are in a folder.
        """
        if not isinstance(self.models, Path):
            return self.models[point.epoch]
        if architecture is None:
            raise LowbitError(
                f"the models are in '{self.models}'; pass the float network, as for lowbit.load"
            )
        return load(self.models / f"epoch{point.epoch}.safetensors", architecture)

    def __str__(self) -> str:
        header = ("epoch", "EBOPs", "metric", "weight bits", "activation bits", "zero weights", "front")
        best = set(self.best)
        rows = [
            (
                str(p.epoch),
                f"{p.ebops:,}",
                f"{p.metric:.4f}",
                f"{p.weight_bits:.2f}",
                f"{p.activation_bits:.2f}",
                f"{p.pruned:.0%}",
                "*" if p in best else "",
            )
            for p in self.points
        ]
        return text_table(header, rows)


def learn_widths(
    q: QuantizedModel,
    train: Any,
    val: Any,
    *,
    weights: Per = "element",
    strength: tuple[float, float] = (0.01, 1.0),
    out: str | Path | None = None,
    **settings: Any,
) -> Front:
    """Train weights and widths together; after each epoch the network is frozen, counted and kept.

    Args:
        q: prepared and calibrated under a recipe of powers of two, such as `fixed8`; its widths are where the
            search begins. It is trained in place.
        train, val, settings: as for `lowbit.Trainer`; epochs are points of the front.
        weights: one width for each "element", "channel" of outputs or "tensor". An activation tensor has one.
        strength: of the penalty, at the start and at the end.
        out: folder of the run: it goes on where it was stopped, and holds the models.

    Raises:
        LowbitError: what `Trainer` raises; a model that has no fixed-point form.
    """
    expect(q, QuantizedModel, "q", "make it with lowbit.prepare(model, 'fixed8', example)")
    _check(weights, strength, settings)
    check_data(val, "val")
    # what hardware lacks is known before a step is made
    program = lower(freeze(copy.deepcopy(q)))
    first, last = (float(s) for s in strength)
    pairs = _with_widths(q, weights, [s.positions for s in program.steps if s.weight is not None])
    start = float(_cost(pairs).detach())
    if not start:
        raise LowbitError("all weights are zero, so no width costs anything; train the network first")

    def penalty() -> Tensor:
        progress = pairs[0].source.progress
        share = 0.0 if progress is None else float(progress)
        return first * (last / first) ** share * _cost(pairs) / start

    folder = None if out is None else _folder(Path(out), [first, last], weights, start)
    keeper = _Keeper(q, folder, settings.pop("on_epoch", None))
    trainer = Trainer(q, train, val, penalty=penalty, on_epoch=keeper.keep, out=out, **settings)
    device = next(q.parameters()).device

    def judge(model: QuantizedModel) -> Score:
        data = (split(batch).to(device, channels_last=False) for batch in val)
        return evaluate(model, data, trainer.settings, trainer.objective)

    keeper.judge = judge
    trainer.fit()
    return Front(tuple(keeper.points), keeper.models if folder is None else folder)


def _check(weights: str, strength: Any, settings: dict[str, Any]) -> None:
    if weights not in ("element", "channel", "tensor"):
        raise LowbitError(f"weights='{weights}' is unknown; use 'element', 'channel' or 'tensor'")
    try:
        first, last = (float(s) for s in strength)
    except (TypeError, ValueError):
        first, last = math.nan, math.nan
    if not 0 < first <= last < math.inf:
        raise LowbitError(f"strength={strength!r} does not rise from above zero; write (0.01, 1.0), say")
    for name in ("penalty", "bits"):
        if settings.get(name):
            raise LowbitError(f"{name}= is what learn_widths decides itself; leave it out")


def _folder(folder: Path, strength: list[float], weights: Per, start: float) -> Path:
    """The folder of the run, if no other run is in it.

    Raises:
        LowbitError: there is, or it cannot be made.
    """
    path = folder / "widths.json"
    mine = {"strength": strength, "weights": weights, "start": start}
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != mine:
            raise LowbitError(
                f"'{folder}' holds a run with {theirs}, and this one has {mine}; name another out"
            )
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine), encoding="utf-8")
    except OSError as error:
        raise LowbitError(f"out='{folder}' is no folder to write to: {error.strerror or error}") from None
    return folder


@dataclass(frozen=True, eq=False)
class _Pair:
    """A layer and what it reads, both with widths that are learned."""

    layer: QLayer
    source: WidthQuantizer
    # how often each weight multiplies in one sample
    positions: int

    def cost(self) -> Tensor:
        quantizer = self.layer.weight_quantizer
        assert isinstance(quantizer, WidthQuantizer)
        return quantizer.bits(self.layer.weight).sum() * self.source.bits().sum() * self.positions


def _cost(pairs: Sequence[_Pair]) -> Tensor:
    """Effective bit operations, with gradients for the widths."""
    costs = [pair.cost() for pair in pairs]
    return sum(costs[1:], costs[0])


def _with_widths(q: QuantizedModel, per: Per, positions: Sequence[int]) -> list[_Pair]:
    """Give every quantizer a width that trains, in place.

    Args:
        positions: as `_Pair` has them, of each call of a layer.
    """
    found: dict[int, WidthQuantizer] = {}
    for path, module in list(q.graph.named_modules(remove_duplicate=False)):
        if isinstance(module, QLayer) and id(module.weight_quantizer) not in found:
            ndim, axis = module.weight.ndim, module.channel_axis
            sizes = {"tensor": [1] * ndim, "element": [*module.weight.shape]}
            sizes["channel"] = [n if d == axis else 1 for d, n in enumerate(module.weight.shape)]
            module.weight_quantizer = _with_width(path, module.weight_quantizer, tuple(sizes[per]))
            found[id(module.weight_quantizer)] = module.weight_quantizer
        elif isinstance(module, Quantizer) and not module.is_weight and module.mode == "quantize":
            if id(module) not in found:
                found[id(module)] = _with_width(path, module, (1,))
            swap(q.graph, path, found[id(module)])
    pairs = []
    for node, count in zip(layer_nodes(q.graph), positions, strict=True):
        layer, source = module_of(node), input_quantizer(node)
        if not isinstance(layer, QLayer) or not isinstance(source, WidthQuantizer):
            raise LowbitError(
                f"'{node.meta['name']}' and what it reads are not both quantized; widths are learned under a "
                "recipe such as 'fixed8'"
            )
        pairs.append(_Pair(layer, source, count))
    if not pairs:
        raise LowbitError("the model has no quantized layer, so there is no width to learn")
    return pairs


def _with_width(path: str, quantizer: Quantizer, shape: tuple[int, ...]) -> WidthQuantizer:
    try:
        return WidthQuantizer.of(quantizer, shape)
    except LowbitError as error:
        raise LowbitError(f"'{path}': {error}") from None


class _Keeper:
    """Freezes, counts and keeps the network after each epoch."""

    # how good a frozen model is
    judge: Callable[[QuantizedModel], Score]

    def __init__(self, q: QuantizedModel, folder: Path | None, also: Callable[[Epoch], None] | None) -> None:
        """`also` is told of each epoch, too."""
        self.q, self.folder, self.also = q, folder, also
        self.points: list[Point] = []
        self.models: dict[int, QuantizedModel] = {}
        if folder is not None and (folder / "front.jsonl").exists():
            lines = (folder / "front.jsonl").read_text(encoding="utf-8").splitlines()
            self.points = [Point(**json.loads(line)) for line in lines]

    def keep(self, epoch: Epoch) -> None:
        frozen = freeze(copy.deepcopy(self.q))
        program, score = lower(frozen), self.judge(frozen)
        weights = [step.weight.codes for step in program.steps if step.weight is not None]
        count = sum(codes.numel() for codes in weights)
        cost = ebops(program)
        reads = [
            (program.steps[s.inputs[0]].type.width, s.macs) for s in program.steps if s.weight is not None
        ]
        macs = sum(n for _, n in reads)
        bits = sum(cost.values()) / max(1, sum(width * n for width, n in reads))
        point = Point(
            epoch=epoch.epoch,
            ebops=sum(cost.values()),
            metric=score.metric,
            loss=score.loss,
            weight_bits=bits,
            activation_bits=sum(width * n for width, n in reads) / max(1, macs),
            pruned=sum(int((codes == 0).sum()) for codes in weights) / max(1, count),
        )
        # an epoch that was done before the run was killed, and is done again
        self.points = [p for p in self.points if p.epoch < point.epoch] + [point]
        if self.also is not None:
            self.also(epoch)
        if self.folder is None:
            self.models[point.epoch] = frozen
            return
        save(frozen, self.folder / f"epoch{point.epoch}.safetensors")
        lines = "".join(json.dumps(asdict(p)) + "\n" for p in self.points)
        (self.folder / "front.jsonl").write_text(lines, encoding="utf-8")

"""Weights whose rounding is learned, layer by layer or block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from lowbit.core.qtensor import sqnr_db
from lowbit.core.rounding import Gain
from lowbit.core.soft_rounding import SoftRounding
from lowbit.finished import Finished
from lowbit.graph.blocks import Block, blocks, inputs_first, layer_blocks
from lowbit.graph.match import calls
from lowbit.graph.ops import is_tensor, kind_of, module_of
from lowbit.graph.run import walk
from lowbit.graph.shelf import Shelf
from lowbit.graph.trace import Inputs
from lowbit.nn.layers import QLayer
from lowbit.nn.quantizer import Quantizer
from lowbit.progress import track

__all__ = ["learn_rounding"]

# How often each sample is seen, in batches of so many, and the fewest steps.
EPOCHS, BATCH, FEWEST_STEPS = 22, 32, 200
# Step sizes of Adam, which fall along a cosine: of roundings; of biases and scales, in units of their mean.
LEARNING_RATE, RELATIVE_RATE = 0.1, 3e-3
# Share of values that are not quantized in a step of a block.
DROP = 0.5
# What an undecided rounding costs beside the error once FREE of the steps are done, and its exponents.
PUSH, FREE, SHARP_FROM, SHARP_TO = 100.0, 0.2, 20.0, 2.0
# Values of either network, and those that blocks read, that stay in memory; what is beyond lies in files.
WALK_BYTES = 24 << 20


def learn_rounding(
    gm: fx.GraphModule,
    float_gm: fx.GraphModule,
    data: Sequence[Inputs],
    *,
    by: Literal["layer", "block"],
    epochs: int = EPOCHS,
    seed: int = 0,
    finished: Finished | None = None,
) -> list[Gain]:
    """Each layer or block rounded as Adam finds best for inputs of the quantized network, from its codes on.

    Minimized is |f(x_q; W(V), b, s) - f(x)|^2 / e + PUSH sum_l mean(1 - |2 h(V_l) - 1|^beta), with f the
    layer or block, x and x_q what it reads in the float and in the quantized network, e the error before, and
    W(V) of `SoftRounding`. beta falls, and with it every element is driven down or up.

    By layer: the codes and the bias, behind the clamp of the layer (AdaRound; Nagel et al. 2020, eq. 25). By
    block: of all its layers at once, and the scales of its activations too (BRECQ; Li et al. 2021, eq. 10),
    while half of all values, chosen anew in each step, are not quantized (QDrop; Wei et al. 2022, section
    4.3), which keeps the codes from fitting the noise of the samples.

    What would end with a larger error stays as it was.

    Args:
        gm: the quantized graph with latent weights, changed in place.
        float_gm: the graph before quantizers were placed.
        by: what is learned together.
        epochs: how often each sample is seen; each costs four to five forward passes.
        seed: of batches and masks, which each layer or block begins anew.
        finished: layers or blocks that are done are taken from there, and others go there.

    Returns:
        One entry for each layer or block, in order of execution, and for each layer that cannot be learned.
    """
    parts = [part for inputs in data for part in inputs.split(BATCH)]
    inputs_first(gm)
    found = blocks(gm) if by == "block" else layer_blocks(gm)
    counts, gains, masks = calls(gm), list[Gain](), _Masks(seed) if by == "block" else None
    twin = _Twin(float_gm, found, parts, mixes=masks is not None)
    steps = max(FEWEST_STEPS, epochs * len(parts))
    problems = track(_problems(gm, twin, found, parts), f"rounding {by}s", len(found))
    for piece, problem in enumerate(problems):
        learned = _Learned(problem, counts, scales=by == "block")
        gains += learned.obstacles
        if not learned.layers:
            continue
        done = finished and finished.load(piece)
        if done:
            gains.append(learned.restored(*done))
            continue
        gains.append(_learn(problem, learned, steps, masks, seed))
        if finished:
            finished.save(piece, learned.state() if not gains[-1].why else {}, asdict(gains[-1]))
    return gains


class _Kept:
    """Values of the nodes that somebody still has to read, for every batch."""

    def __init__(self, readers: Iterable[fx.Node]) -> None:
        """For nodes, each named once for every reader."""
        self.left, self.shelf = Counter(readers), Shelf(WALK_BYTES)
        self.values: dict[fx.Node, list[Any]] = {}

    def put(self, node: fx.Node, values: list[Any]) -> None:
        if self.left[node]:
            self.values[node] = self.shelf.put(values)

    def drop(self, node: fx.Node) -> None:
        self.left[node] -= 1
        if not self.left[node]:
            self.shelf.drop(self.values.pop(node))

    def of(self, node: fx.Node, batch: int) -> Any:
        return Shelf.take(self.values[node][batch])


class _Twin:
    """What nodes of the quantized graph give in the float one, asked for nearly in order."""

    def __init__(
        self, gm: fx.GraphModule, found: Sequence[Block], data: Sequence[Inputs], *, mixes: bool
    ) -> None:
        """For what blocks end in; where masks mix them in, for what blocks read as well."""
        self.gm, self.nodes = gm, {node.name: node for node in gm.graph.nodes}
        self.twins = dict[fx.Node, fx.Node]()
        ends = {block.end for block in found}
        self.asked = {
            block: [*(n for n in block.reads if mixes and _differs(n, ends)), block.end] for block in found
        }
        self.kept = _Kept(self.of(node) for nodes in self.asked.values() for node in nodes)
        self.steps = walk(gm, data, WALK_BYTES)

    def of(self, node: fx.Node) -> fx.Node:
        """The node of the same name; of a quantizer that of what it rounds."""
        if node not in self.twins:
            source = node
            while kind_of(source) == "quantizer":
                source = source.all_input_nodes[0]
            self.twins[node] = self.nodes[source.name]
        return self.twins[node]

    def reach(self, block: Block) -> None:
        for node in map(self.of, self.asked[block]):
            while node not in self.kept.values:
                self.kept.put(*next(self.steps))

    def drop(self, block: Block) -> None:
        for node in map(self.of, self.asked[block]):
            self.kept.drop(node)


def _differs(node: fx.Node, ends: set[fx.Node]) -> bool:
    """Whether a value that a block reads has two versions: it is quantized, or layers had a part in it."""
    return is_tensor(node) and (kind_of(node) == "quantizer" or node in ends)


@dataclass(frozen=True)
class _Problem:
    """A block with what it reads and what it should give."""

    gm: fx.GraphModule
    block: Block
    # values that it reads, and those of the float network
    kept: _Kept
    twin: _Twin
    batches: int

    def reads(self, batch: int) -> dict[fx.Node, Any]:
        return {node: self.kept.of(node, batch) for node in self.block.reads}

    def floats(self, node: fx.Node, batch: int) -> Any:
        return self.twin.kept.of(self.twin.of(node), batch)

    def signal(self) -> float:
        """Power of what the block should give, over all samples."""
        targets = (self.floats(self.block.end, batch) for batch in range(self.batches))
        return sum(float(target.square().sum()) for target in targets)

    @torch.no_grad()
    def noise(self) -> float:
        """Power of its error, over all samples."""
        return sum(float(self.loss(batch)) for batch in range(self.batches))

    def loss(self, batch: int, masks: _Masks | None = None) -> Tensor:
        """Power of the error on a batch; with masks some values are those before they were quantized."""
        values = self.reads(batch)
        if masks is None:
            output = self.block.run(self.gm, values)
        else:
            for node in self.twin.asked[self.block][:-1]:
                values[node] = masks.mixed(self.floats(node, batch), values[node])
            output = self.block.run(self.gm, values, masks.mixed)
        return (output - self.floats(self.block.end, batch)).square().sum()


class _Masks:
    """Says of each value anew whether it is quantized."""

    def __init__(self, seed: int) -> None:
        self.draw, self.seed = torch.Generator().manual_seed(seed), seed
        # by device: random zeros and ones, read from a random place on each time
        self.bits: dict[torch.device, Tensor] = {}

    def begin(self) -> None:
        """From the first one on, whatever was drawn before."""
        self.draw.manual_seed(self.seed)
        self.bits.clear()

    def mixed(self, before: Tensor, rounded: Tensor) -> Tensor:
        """Values before and after quantization, a share of DROP of the former."""
        size, bits = rounded.numel(), self.bits.get(rounded.device)
        if bits is None or len(bits) < 2 * size:
            own = torch.Generator().manual_seed(self.seed)
            bits = (torch.rand(2 * size, generator=own) >= DROP).float().to(rounded.device)
            self.bits[rounded.device] = bits
        start = int(torch.randint(len(bits) - size + 1, (), generator=self.draw))
        # laid out as the values are, for mixed layouts are slow
        layout = torch.empty_like(rounded, device="meta").stride()
        return torch.lerp(before, rounded, bits.as_strided(rounded.shape, layout, start))


def _problems(
    gm: fx.GraphModule, twin: _Twin, found: Sequence[Block], data: Sequence[Inputs]
) -> Iterator[_Problem]:
    """Each block once all that it reads is there, and before it runs."""
    place = {node: at for at, node in enumerate(gm.graph.nodes)}
    behind: dict[fx.Node, list[Block]] = {}
    for block in found:
        behind.setdefault(max(block.reads, key=place.__getitem__), []).append(block)
    kept = _Kept(node for block in found for node in block.reads)
    for node, values in walk(gm, data, WALK_BYTES):
        kept.put(node, values)
        for block in behind.get(node, ()):
            twin.reach(block)
            yield _Problem(gm, block, kept, twin, len(data))
            twin.drop(block)
            for read in block.reads:
                kept.drop(read)


class _Learned:
    """What is learned of a block, standing in the place of what it was; `end` puts the answer there."""

    def __init__(self, problem: _Problem, counts: Mapping[int, int], *, scales: bool) -> None:
        """See what can be learned; nothing is changed before `begin`."""
        self.layers, self.targets, self.obstacles = list[QLayer](), list[Tensor](), list[Gain]()
        for node in problem.block.layers:
            layer = module_of(node)
            if not isinstance(layer, QLayer) or layer.weight_quantizer.spec.kind != "int":
                continue
            why = _obstacle(layer, counts[id(layer)])
            if why:
                self.obstacles.append(Gain(str(node.meta["name"]), why=why))
            else:
                self.layers.append(layer)
                twin = problem.twin.gm.get_submodule(str(node.target))
                self.targets.append(twin.weight.detach())
        called = Counter(map(module_of, problem.block.quantizers))
        self.quantizers = [
            q
            for q, times in called.items()
            if scales and isinstance(q, Quantizer) and _has_scale(q) and times == counts[id(q)]
        ]

    def begin(self) -> None:
        self.was = [(layer, layer.weight, layer.bias) for layer in self.layers]
        self.grids = [(q, q.scale, q.zero_point) for q in self.quantizers]
        self.weight_quantizers = [layer.weight_quantizer for layer in self.layers]
        self.soft = []
        for layer, target in zip(self.layers, self.targets, strict=True):
            layer.settle()
            soft = SoftRounding(layer.qweight(), layer.weight_quantizer.reshaped(target))
            self.soft.append(soft)
            layer.weight_quantizer = soft  # type: ignore[assignment]
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach().clone())
        for quantizer in self.quantizers:
            quantizer.learn()

    def groups(self) -> list[dict[str, Any]]:
        """Of parameters, with their step size."""
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        rest = [*biases, *(p for q in self.quantizers for p in q.parameters())]
        return [{"params": [soft.v for soft in self.soft], "lr": LEARNING_RATE}] + [
            {"params": [p], "lr": RELATIVE_RATE * float(p.detach().abs().mean())} for p in rest
        ]

    def undecided(self, beta: float) -> Tensor:
        return torch.stack([soft.undecided(beta) for soft in self.soft]).sum()

    def end(self) -> None:
        for layer, soft, quantizer in zip(self.layers, self.soft, self.weight_quantizers, strict=True):
            layer.weight_quantizer = quantizer
            layer.weight = nn.Parameter(soft.hard())
        for quantizer in self.quantizers:
            quantizer.settle()

    def state(self) -> dict[str, Tensor]:
        """What was learned."""
        found: dict[str, Tensor | None] = {}
        for i, layer in enumerate(self.layers):
            found |= {f"{i}.weight": layer.weight, f"{i}.bias": layer.bias}
        for i, q in enumerate(self.quantizers):
            found |= {f"{i}.scale": q.scale, f"{i}.zero_point": q.zero_point}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def restored(self, state: dict[str, Tensor], said: dict[str, Any]) -> Gain:
        """The block as it was left, and what was said of it."""
        for i, layer in enumerate(self.layers if state else ()):
            place = layer.weight.device
            layer.weight = nn.Parameter(state[f"{i}.weight"].to(place))
            if layer.bias is not None:
                layer.bias = nn.Parameter(state[f"{i}.bias"].to(place))
        for i, q in enumerate(self.quantizers if state else ()):
            q.scale = state[f"{i}.scale"].to(q.scale.device)
            if q.zero_point is not None:
                q.zero_point = state[f"{i}.zero_point"].to(q.scale.device)
        return Gain(**said)

    def revert(self) -> None:
        """As it was before `begin`; to be called after `end`."""
        for layer, weight, bias in self.was:
            layer.weight, layer.bias = weight, bias
        for quantizer, scale, zero_point in self.grids:
            quantizer.scale, quantizer.zero_point = scale, zero_point


def _obstacle(layer: QLayer, count: int) -> str:
    if isinstance(layer, nn.Embedding):
        return "it looks rows up, and adds nothing that could make an error good"
    return layer.fixed_codes(count)


def _has_scale(quantizer: Quantizer) -> bool:
    return quantizer.spec.kind == "int" and quantizer.mode == "quantize" and quantizer.ready


def _learn(problem: _Problem, learned: _Learned, steps: int, masks: _Masks | None, seed: int) -> Gain:
    name = problem.block.name
    noise, signal = problem.noise(), problem.signal()
    if not noise or not signal:
        return Gain(name, why="no data reached it" if not signal else "its output has no error")
    before = sqnr_db(signal, noise)
    learned.begin()
    if masks is not None:
        masks.begin()
    _descend(problem, learned, steps, noise / problem.batches, masks, seed)
    learned.end()
    after = sqnr_db(signal, problem.noise())
    if not after > before:
        learned.revert()
        return Gain(name, before, before, f"its error would rise, to {after:.1f} dB")
    return Gain(name, before, after)


@torch.enable_grad()
def _descend(
    problem: _Problem, learned: _Learned, steps: int, unit: float, masks: _Masks | None, seed: int
) -> None:
    """Adam on what is learned; `unit` is the error of a batch before."""
    draw, groups = torch.Generator().manual_seed(seed), learned.groups()
    parameters = [p for group in groups for p in group["params"]]
    adam = torch.optim.Adam(groups)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        loss = problem.loss(int(torch.randint(problem.batches, (), generator=draw)), masks) / unit
        done = (step / steps - FREE) / (1 - FREE)
        if done > 0:
            loss = loss + PUSH * learned.undecided(SHARP_FROM + (SHARP_TO - SHARP_FROM) * done)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        adam.step()
        fall.step()

"""What `prepare` and `quantize` return: a graph with quantizers, and the record of how it came to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lowbit.core.rounding import Gain
from lowbit.cost import Cost, cost_of
from lowbit.coverage import Coverage, coverage_of
from lowbit.errors import LowbitError
from lowbit.graph.names import author_name, graph_names
from lowbit.graph.rewrite import clone
from lowbit.graph.trace import Inputs, Note
from lowbit.kernels import bits
from lowbit.nn.layers import QLayer
from lowbit.passes.bit_kernels import Swap, use_bit_kernels
from lowbit.recipe import Recipe
from lowbit.tables import text_table

__all__ = ["KernelModel", "QuantizedModel", "Step"]


@dataclass(frozen=True)
class Step:
    """One step of the flow: what it changed, and whether it was kept."""

    name: str
    text: str
    # SQNR of the output on calibration data, in dB, before and after; None where it was not measured
    before_db: float | None = None
    after_db: float | None = None
    kept: bool = True
    # of steps that go from layer to layer: what each gained
    layers: tuple[Gain, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Step:
        """Inverse of `dataclasses.asdict`."""
        return cls(**{**data, "layers": tuple(Gain(**gain) for gain in data.get("layers", ()))})

    def __str__(self) -> str:
        gain = "" if self.after_db is None else f" [{self.before_db:.2f} -> {self.after_db:.2f} dB]"
        return f"{self.name}: {self.text}{gain}{'' if self.kept else '; reverted, it made the output worse'}"


class QuantizedModel(nn.Module):
    """A network with quantizers. Call it like the model it was made from.

    Its state dict has the names of the float model, beside those of scales and zero points; until BatchNorm
    is folded a checkpoint of the float model loads, strictly.

    Attributes:
        graph: the fx.GraphModule that runs.
        recipe: what was done, resolved: replaying it on the float model gives the same graph.
        example: one call of the model with the shapes and dtypes that tracing saw, and made-up numbers.
        steps: what each step of the flow changed.
    """

    def __init__(self, graph: fx.GraphModule, recipe: Recipe, example: Inputs, notes: list[Note]) -> None:
        super().__init__()
        self.graph = graph
        self.recipe = recipe
        self.example = example
        self.notes = notes
        self.steps: list[Step] = []
        self.train(graph.training)
        self.register_state_dict_post_hook(_hide_graph)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_show_graph)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph(*args, **kwargs)

    @property
    def frozen(self) -> bool:
        """Whether only codes are left of the quantized weights."""
        layers = [m for m in self.graph.modules() if isinstance(m, QLayer)]
        return all(layer.frozen_spec is not None for layer in layers)

    def coverage(self) -> Coverage:
        """What is quantized, what stays in float, why, and how to change that."""
        return coverage_of(self.graph, self.notes)

    def compile_kernels(self) -> KernelModel:
        """The same network with its binary and ternary layers on the bit kernels of the CPU.

        Its codes are those of the integer reference, which the exported file follows too. What cannot be
        swapped stays in float, and `str()` of the result says why.

        Raises:
            LowbitError: the model is not frozen.
        """
        if not self.frozen:
            raise LowbitError(
                "bit kernels hold codes, and this model has float weights; call lowbit.freeze(q)"
            )
        graph = clone(self.graph).cpu()
        return KernelModel(graph, use_bit_kernels(graph))

    def cost(self) -> Cost:
        """Bits, bytes, multiply-accumulates and bit operations of each layer."""
        return cost_of(self.graph)


class KernelModel(nn.Module):
    """A frozen network on the bit kernels; call it like the model that it was made from, without gradients.

    Attributes:
        graph: the fx.GraphModule that runs.
        swaps: what became of each layer.
    """

    def __init__(self, graph: fx.GraphModule, swaps: list[Swap]) -> None:
        super().__init__()
        self.graph, self.swaps = graph, swaps
        self.eval()

    @torch.inference_mode()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph(*args, **kwargs)

    def __str__(self) -> str:
        rows = [(swap.name, swap.runs_as, swap.why) for swap in self.swaps]
        swapped = sum(not swap.why for swap in self.swaps)
        table = text_table(("layer", "runs as", "why"), rows)
        return f"{table}\n{swapped} of {len(rows)} layers on bit kernels ({bits.description()})"


def _hide_graph(q: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Give every entry the name that the float model has for it."""
    assert isinstance(q, QuantizedModel)
    ours = prefix + "graph."
    for name in [n for n in state if n.startswith(ours)]:
        state[prefix + author_name(q.graph, name.removeprefix(ours))] = state.pop(name)


def _show_graph(q: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Inverse of `_hide_graph`."""
    assert isinstance(q, QuantizedModel)
    for name in [n for n in state if n.startswith(prefix)]:
        value = state.pop(name)
        for own in graph_names(q.graph, name.removeprefix(prefix)):
            state[f"{prefix}graph.{own}"] = value

"""A graph that was run up to a node, over several batches; what lies behind can be run again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lowbit.graph.inputs import Inputs
from lowbit.graph.run import bind_inputs, evaluate, last_uses

__all__ = ["Cursor"]


class Cursor:
    """Holds what the nodes behind it read of those before it, and nothing else."""

    def __init__(self, gm: fx.GraphModule, data: Sequence[Inputs]) -> None:
        """Stand before the first node."""
        self.gm, self.nodes = gm, list(gm.graph.nodes)
        self.starts = [bind_inputs(gm, inputs) for inputs in data]
        self.values: list[dict[fx.Node, Any]] = [{} for _ in data]
        self.at = 0
        self.dead = last_uses(gm)

    @torch.inference_mode()
    def advance(self, to: fx.Node) -> None:
        """Run every batch through the nodes before `to`, which lies not before the cursor."""
        end = self.nodes.index(to)
        assert end >= self.at
        for start, values in zip(self.starts, self.values, strict=True):
            for node in self.nodes[self.at : end]:
                values[node] = self._run(node, start, values)
                for dead in self.dead.get(node, ()):
                    del values[dead]
        self.at = end

    @torch.inference_mode()
    def behind(self) -> list[Any]:
        """The output for each batch, from the cursor on; the cursor stays where it is."""
        outputs = []
        for start, held in zip(self.starts, self.values, strict=True):
            values = dict(held)
            for node in self.nodes[self.at :]:
                values[node] = result = self._run(node, start, values)
                for dead in self.dead.get(node, ()):
                    del values[dead]
            outputs.append(result)
        return outputs

    def _run(self, node: fx.Node, start: dict[str, Any], values: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return start[node.name]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return evaluate(self.gm, node, args, kwargs)

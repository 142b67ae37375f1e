"""A graph that was run up to a node, over several batches; what lies behind can be run again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from lowbit.graph.inputs import Inputs
from lowbit.graph.run import bind_inputs, evaluate, last_uses

__all__ = ["After", "Cursor"]

# (node, its value for every batch) -> the values to go on with
After = Callable[[fx.Node, list[Any]], list[Any]]
Values = dict[fx.Node, list[Any]]


class Cursor:
    """Holds what the nodes behind it read of those before it, for every batch, and nothing else."""

    def __init__(self, gm: fx.GraphModule, data: Sequence[Inputs], after: After | None = None) -> None:
        """Stand before the first node; `after` may change what any node gives."""
        self.gm, self.nodes, self.after = gm, list(gm.graph.nodes), after
        self.starts = [bind_inputs(gm, inputs) for inputs in data]
        self.values: Values = {}
        self.at = 0
        self.dead = last_uses(gm)

    @torch.inference_mode()
    def advance(self, to: fx.Node) -> None:
        """Run every batch through the nodes before `to`, which lies not before the cursor."""
        end = self.nodes.index(to)
        assert end >= self.at
        for node in self.nodes[self.at : end]:
            self._run(node, self.values)
        self.at = end

    @torch.inference_mode()
    def behind(self) -> list[Any]:
        """The output for each batch, from the cursor on; the cursor stays where it is.

        Batch after batch, so that what a node gives is still in the cache when the next one reads it; where
        `after` wants all batches of a node, node after node.
        """
        if self.after is None:
            return [self._one(k) for k in range(len(self.starts))]
        values, outputs = dict(self.values), []
        for node in self.nodes[self.at :]:
            outputs = self._run(node, values)
        return outputs

    def _one(self, k: int) -> Any:
        """The output for one batch."""
        values: Values = {node: [held[k]] for node, held in self.values.items()}
        found = None
        for node in self.nodes[self.at :]:
            found = self._value(node, values, k, 0)
            values[node] = [found]
            for dead in self.dead.get(node, ()):
                del values[dead]
        return found

    def _run(self, node: fx.Node, values: Values) -> list[Any]:
        found = [self._value(node, values, k, k) for k in range(len(self.starts))]
        values[node] = found = found if self.after is None else self.after(node, found)
        for dead in self.dead.get(node, ()):
            del values[dead]
        return found

    def _value(self, node: fx.Node, values: Values, batch: int, at: int) -> Any:
        """What a node gives for a batch, whose values stand at that place."""
        if node.op == "placeholder":
            return self.starts[batch][node.name]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n][at])
        return evaluate(self.gm, node, args, kwargs)

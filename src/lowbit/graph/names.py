"""Names of tensors: those of the graph, and those that the author of the model gave."""

from __future__ import annotations

from torch import fx

from lowbit.nn.layers import BoundLayer

__all__ = ["author_name", "graph_names"]

_OWN = ("input_quantizer", "output_quantizer", "layer")


def author_name(gm: fx.GraphModule, name: str) -> str:
    """The name of an entry of the graph's state dict in the state dict of the model it was traced from."""
    for ours, theirs in _bound(gm):
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    name = name.removeprefix("model.") if gm.meta["whole"] else name
    for path, made in gm.meta.get("renamed", {}).items():
        for ours in made:
            if name == ours:
                return path
    return name


def graph_names(gm: fx.GraphModule, name: str) -> list[str]:
    """Inverse of `author_name`: several names for a weight of several functions, none for an unused one."""
    if name in gm.meta.get("unused", ()):
        return []
    if name in gm.meta.get("renamed", {}):
        kept = [name] if name in gm.state_dict(keep_vars=True) else []
        return kept + list(gm.meta["renamed"][name])
    name = f"model.{name}" if gm.meta["whole"] else name
    for ours, theirs in reversed(_bound(gm)):
        rest = name.removeprefix(theirs)
        if name.startswith(theirs) and rest.partition(".")[0] not in _OWN:
            name = ours + rest
    return [name]


def _bound(gm: fx.GraphModule) -> list[tuple[str, str]]:
    """(prefix here, prefix in the model) of the layers that carry their quantizers along."""
    everything = gm.named_modules(remove_duplicate=False)
    return [(f"{path}.layer.", f"{path}.") for path, m in everything if isinstance(m, BoundLayer)]

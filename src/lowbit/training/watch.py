"""Whether training diverged, and whose scale ran away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lowbit.training.stages import active

__all__ = ["Watch"]


class Watch:
    """What a run was like while it was well."""

    def __init__(self, model: nn.Module) -> None:
        """Take note of what is infinite from the start, such as the -inf of an attention mask."""
        self.model = model
        state = model.state_dict(keep_vars=True).items()
        self.infinite = frozenset(_non_finite((n, t) for n, t in state if not isinstance(t, nn.Parameter)))
        # scales at the start of the stage, and some steps ago, when the loss was still finite
        self.start: dict[str, Tensor] = {}
        self.recent: dict[str, Tensor] = {}

    def begin(self) -> None:
        """A stage starts."""
        self.start = self.recent = self._scales()

    def look(self) -> None:
        """All is well now."""
        self.recent = self._scales()

    def broken(self) -> str | None:
        """Name of the first weight, statistic or scale that holds NaN or infinity and should not."""
        found = _non_finite(self.model.state_dict().items())
        return next((name for name in found if name not in self.infinite), None)

    def blame(self) -> str:
        """Which scale moved furthest since the stage began, in words."""
        now = self._scales()
        lost = not any(bool(torch.isfinite(scale).all()) for scale in now.values())
        found = _furthest(self.recent if lost else now, self.start)
        if found is None:
            return "no scale has moved"
        return f"the scale of '{found[0]}' moved most, by a factor of {found[1]:.3g}"

    def _scales(self) -> dict[str, Tensor]:
        """A copy of every scale, by the path of its quantizer."""
        return {name: quantizer.scale.detach().clone() for name, quantizer in active(self.model).items()}


def _non_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Names of those that hold NaN or infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield name


def _furthest(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """(path, factor) of the quantizer whose scale moved furthest: the largest |log ratio| of all.

    NaN and infinity go before everything else; their factor is what they are. None when no scale has moved.
    """
    found: tuple[float, str, float] | None = None
    for name, scale in now.items():
        old = before.get(name)
        if old is None or old.shape != scale.shape:
            continue
        ratio = (scale.abs() / old).flatten()
        broken = ratio[~torch.isfinite(ratio)]
        distance = torch.where(ratio > 0, ratio, 2.0**-60).log().abs()
        far = float("inf") if len(broken) else distance.max().item()
        factor = broken[0].item() if len(broken) else ratio[distance.argmax()].item()
        if far > (found[0] if found else 0.0):
            found = far, name, factor
    return None if found is None else found[1:]

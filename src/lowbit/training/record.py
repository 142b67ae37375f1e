"""What a run of training did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowbit.tables import text_table

__all__ = ["Epoch", "Run"]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over the training data, and the evaluation after it."""

    # from 1
    epoch: int
    # steps done since the start of the run
    step: int
    # width of the stage; None at the bits of the recipe
    bits: int | None
    # mean over the samples of the epoch
    loss: float
    # learning rate of the first group at its last step
    lr: float
    # of training alone
    seconds: float
    # on the validation data; None without
    val_loss: float | None = None
    metric: float | None = None
    # what else was done before the evaluation
    note: str = ""


@dataclass
class Run:
    """Every epoch of a run, in order; `str()` is a table."""

    epochs: list[Epoch] = field(default_factory=list)
    # metric of the teacher on the validation data
    baseline: float | None = None
    # the metric's name
    metric: str = "accuracy"
    # why training stopped before its last epoch; "" when it did not
    stopped: str = ""
    # what the reader should know
    notes: list[str] = field(default_factory=list)
    # files, where a folder was given
    last: Path | None = None
    best_path: Path | None = None
    metrics: Path | None = None

    @property
    def best(self) -> Epoch | None:
        """First epoch with the largest metric, of those at the last bits; None without validation data."""
        if not self.epochs:
            return None
        final = [e for e in self.epochs if e.bits == self.epochs[-1].bits and _comparable(e)]
        return max(final, key=lambda e: e.metric or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `from_dict`, without the paths."""
        rows = [asdict(e) for e in self.epochs]
        return {"epochs": rows, "baseline": self.baseline, "stopped": self.stopped, "notes": list(self.notes)}

    def take(self, data: dict[str, Any]) -> None:
        """Inverse of `to_dict`."""
        self.epochs = [Epoch(**row) for row in data["epochs"]]
        self.baseline, self.stopped, self.notes = data["baseline"], data["stopped"], list(data["notes"])

    def __str__(self) -> str:
        staged = any(e.bits for e in self.epochs)
        header = ["epoch", *(["bits"] if staged else []), "lr", "loss"]
        judged = any(e.metric is not None for e in self.epochs)
        header += [*(["val loss", self.metric] if judged else []), "seconds", ""]
        best, rows = self.best, []
        for e in self.epochs:
            row = [str(e.epoch), *([str(e.bits or "")] if staged else []), f"{e.lr:.3g}", f"{e.loss:.4f}"]
            if judged:
                row += [_shown(e.val_loss), _shown(e.metric)]
            mark = "best" if e is best else ""
            rows.append([*row, f"{e.seconds:.1f}", ", ".join(filter(None, (mark, e.note)))])
        lines = [text_table(header, rows)]
        if self.baseline is not None:
            lines.append(f"{self.metric} of the teacher: {self.baseline:.4f}")
        lines += [self.stopped] * bool(self.stopped) + self.notes
        return "\n".join(lines)


def _comparable(epoch: Epoch) -> bool:
    return epoch.metric is not None and epoch.metric == epoch.metric


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

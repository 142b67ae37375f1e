"""Size against accuracy: the whole front, and its picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.progress import track
from lowbit.search.allocate import Evaluate, Pins, allocate
from lowbit.search.allocation import Allocation
from lowbit.search.budget import Budget
from lowbit.search.table import Sensitivity
from lowbit.tables import text_table

__all__ = ["front_table", "pareto", "plot"]


def pareto(
    table: Sensitivity,
    budgets: Iterable[Budget],
    *,
    evaluate: Evaluate | None = None,
    measure: str = "noise",
    pins: Pins | None = None,
) -> list[Allocation]:
    """The best allocation for each budget, smallest first; each evaluated, where `evaluate` is given."""
    asked = list(budgets)
    found = [
        allocate(table, budget, measure=measure, pins=pins, evaluate=evaluate)
        for budget in track(asked, "solving the front", total=len(asked))
    ]
    return sorted(found, key=lambda a: a.bytes)


def front_table(points: Sequence[Allocation]) -> str:
    """The points as text."""
    header = ("bytes", "times smaller", "bits a weight", "expected damage", "accuracy", "bits of the layers")
    rows = [
        (
            f"{p.bytes:,}",
            f"{p.compression:.2f}",
            f"{p.average_bits:.2f}",
            f"{p.damage:.3g}",
            "" if p.accuracy is None else f"{p.accuracy:.4f}",
            " ".join(map(str, p.bits)),
        )
        for p in points
    ]
    return text_table(header, rows)


def plot(points: Sequence[Allocation], path: str | Path, marked: Sequence[Allocation] = ()) -> None:
    """Accuracy, or expected damage where none was measured, against bytes, as an SVG or PNG file.

    Args:
        marked: points to set apart, such as the uniform recipes.

    Raises:
        LowbitError: matplotlib is not installed, or there is no point.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LowbitError("a plot needs matplotlib; pip install matplotlib") from None
    if not points:
        raise LowbitError("there is no point to plot; pass what lowbit.search.pareto returns")
    measured = all(p.accuracy is not None for p in (*points, *marked))
    figure = Figure(figsize=(8, 7))
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    for series, style, label in ((points, "o-", "mixed"), (marked, "s", "uniform")):
        if series:
            size = [p.bytes / 1024 for p in series]
            height = [p.accuracy if measured else p.damage for p in series]
            above.plot(size, height, style, label=label)
    above.set(xlabel="KiB on disk", ylabel="accuracy" if measured else "expected damage")
    above.legend()
    names = [site.name for site in points[0].table if site.kind == "weight"]
    for p in points:
        below.step(range(len(p.bits)), p.bits, where="mid", label=f"{p.bytes / 1024:.0f} KiB")
    below.set(ylabel="bits", xticks=range(len(names)))
    below.set_xticklabels(names, rotation=90, fontsize=6)
    below.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)

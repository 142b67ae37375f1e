"""Size against accuracy: the smallest network above a floor, the whole front, and its picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.progress import track
from lowbit.recipe import Recipe
from lowbit.search.allocate import Allocation, Budget, Pins, allocate
from lowbit.search.table import Sensitivity
from lowbit.tables import text_table

__all__ = ["Point", "front_table", "minimum_bits", "pareto", "plot", "uniform"]

# The accuracy of the network that a recipe makes, on real data: larger is better.
Evaluate = Callable[[Recipe], float]


@dataclass(frozen=True)
class Point:
    """An allocation, and the accuracy that was measured of it."""

    allocation: Allocation
    # None where nothing was evaluated
    accuracy: float | None = None
    # whether a floor that was asked for is held
    holds: bool = True
    label: str = ""

    def __str__(self) -> str:
        text = str(self.allocation)
        if self.accuracy is not None:
            text += f"; measured accuracy {self.accuracy:.4f}"
        return text if self.holds else f"{text}\nNo recipe that was found holds the floor; this is the best."


def minimum_bits(
    table: Sensitivity,
    floor: float,
    evaluate: Evaluate,
    *,
    budget: Budget | None = None,
    measure: str = "kl",
    pins: Pins | None = None,
    tries: int = 8,
) -> Point:
    """The smallest network whose measured accuracy is at least `floor`.

    Bytes are halved between the fewest and the most that the table allows: for each size the best allocation
    is made, and evaluated. What is returned was evaluated; where nothing holds the floor it is the best of
    what was tried, and `holds` is False.

    Args:
        evaluate: accuracy of the network that a recipe makes, on real data.
        budget: what else must hold.
        tries: evaluations after the first.

    Raises:
        LowbitError: nothing fits the budget, or the accuracy is no number.
    """
    low = min_bytes(table)
    best = _judged(evaluate, _within(table, budget, None, measure, pins))
    if best.accuracy is not None and best.accuracy < floor:
        return replace(best, holds=False)
    high = best.allocation.bytes
    for _ in track(range(tries), "evaluating sizes", total=tries):
        middle = (low + high) // 2
        if middle in (low, high):
            break
        try:
            found = _judged(evaluate, _within(table, budget, middle, measure, pins))
        except LowbitError:  # nothing is so small
            low = middle
            continue
        if found.accuracy is not None and found.accuracy >= floor:
            best, high = found, found.allocation.bytes
        else:
            low = middle
    return best


def min_bytes(table: Sensitivity) -> int:
    """Of any choice."""
    return table.other_bytes + sum(min(site.bytes, default=0) for site in table)


def _within(
    table: Sensitivity, budget: Budget | None, most: int | None, measure: str, pins: Pins | None
) -> Allocation:
    """The best allocation of at most that many bytes, and within the budget."""
    if most is None:
        largest = table.other_bytes + sum(max(site.bytes, default=0) for site in table)
        most = largest
    asked = budget or Budget(bytes=most)
    smaller = most if asked.bytes is None else min(most, asked.bytes)
    return allocate(table, replace(asked, bytes=smaller), measure=measure, pins=pins)


def _judged(evaluate: Evaluate, allocation: Allocation) -> Point:
    accuracy = float(evaluate(allocation.recipe))
    if math.isnan(accuracy):
        raise LowbitError("evaluate(recipe) returned nan; return the accuracy, a finite number")
    return Point(allocation, accuracy)


def uniform(table: Sensitivity, bits: int, *, measure: str = "kl") -> Allocation:
    """Every site at the same width, to compare with.

    Raises:
        LowbitError: a site was not measured at that width.
    """
    specs = {}
    for site in table:
        found = [spec for spec in site.specs if spec.bits == bits]
        if not found:
            raise LowbitError(f"'{site.name}' was not measured at {bits} bits; add them to bits=...")
        specs[site.path] = found[0]
    return Allocation(table=table, specs=specs, measure=measure)


def pareto(
    table: Sensitivity,
    budgets: Iterable[Budget],
    *,
    evaluate: Evaluate | None = None,
    measure: str = "kl",
    pins: Pins | None = None,
) -> list[Point]:
    """The best allocation for each budget, smallest first; each evaluated, where `evaluate` is given."""
    found = [allocate(table, budget, measure=measure, pins=pins) for budget in budgets]
    points = [
        Point(a) if evaluate is None else _judged(evaluate, a)
        for a in track(found, "evaluating the front", total=len(found))
    ]
    return sorted(points, key=lambda p: p.allocation.bytes)


def front_table(points: Sequence[Point]) -> str:
    """The points as text."""
    rows = [
        (
            p.label,
            f"{p.allocation.bytes:,}",
            f"{p.allocation.compression:.2f}",
            f"{p.allocation.average_bits:.2f}",
            f"{p.allocation.damage:.3g}",
            "" if p.accuracy is None else f"{p.accuracy:.4f}",
            " ".join(str(p.allocation.specs[s.path].bits) for s in p.allocation.table if s.kind == "weight"),
        )
        for p in points
    ]
    header = (
        "",
        "bytes",
        "times smaller",
        "bits a weight",
        "expected damage",
        "accuracy",
        "bits of the layers",
    )
    return text_table(header, rows)


def plot(points: Sequence[Point], path: str | Path, marked: Sequence[Point] = ()) -> None:
    """Accuracy, or expected damage where none was measured, against bytes, as an SVG or PNG file.

    Args:
        marked: points to set apart, such as the uniform recipes.

    Raises:
        LowbitError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise LowbitError("a plot needs matplotlib; pip install matplotlib") from None
    mpl.use("agg")
    from matplotlib import pyplot

    measured = all(p.accuracy is not None for p in (*points, *marked))
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), height_ratios=(3, 2))
    for series, style, label in ((points, "o-", "mixed"), (marked, "s", "uniform")):
        if series:
            size = [p.allocation.bytes / 1024 for p in series]
            height = [p.accuracy if measured else p.allocation.damage for p in series]
            above.plot(size, height, style, label=label)
    above.set(xlabel="KiB on disk", ylabel="accuracy" if measured else "expected damage")
    above.legend()
    names = [site.name for site in points[0].allocation.table if site.kind == "weight"]
    for p in points:
        bits = [p.allocation.specs[s.path].bits for s in p.allocation.table if s.kind == "weight"]
        below.step(range(len(bits)), bits, where="mid", label=f"{p.allocation.bytes / 1024:.0f} KiB")
    below.set(ylabel="bits", xticks=range(len(names)))
    below.set_xticklabels(names, rotation=90, fontsize=6)
    below.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)

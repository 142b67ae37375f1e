"""Text tables: the one way that records are laid out on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["text_table"]


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells under their header, two spaces apart; a column of numbers is set to the right.

    >>> print(text_table(("layer", "bits"), [("conv", "8"), ("fc", "16")]))
    layer  bits
    conv      8
    fc       16
    """
    body = [tuple(row) for row in rows]
    columns = list(zip(*body, strict=True)) if body else [() for _ in header]
    right = [any(cells) and all(_is_number(c) for c in cells if c) for cells in columns]
    widths = [max(map(len, (name, *cells))) for name, cells in zip(header, columns, strict=True)]
    lines = []
    for row in (tuple(header), *body):
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    """Also with a sign, a unit or thousands separators behind the first digit: 1,024, -0.2 %, 2.5x."""
    return cell.lstrip("+-~")[:1].isdigit() and cell[-1:] in "0123456789%x"

"""What every benchmark here shares: the command line, the table, the claims and the line about the machine.

A benchmark prints a table to stdout, or with --json exactly one JSON object; progress goes to stderr. Its
exit code is 1 when a claim that was measured does not hold.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

Cell = str | int | float | bool | None
_WIDTH = 160


@dataclass(kw_only=True)
class Table:
    """Rows of cells under named columns; `formats` gives a format spec (".2f") for a column's numbers."""

    title: str
    columns: Sequence[str]
    formats: Mapping[str, str] = field(default_factory=dict)
    rows: list[dict[str, Cell]] = field(default_factory=list)

    def add(self, **row: Cell) -> None:
        """Append a row; a column that is left out stays blank, one that does not exist is an error."""
        unknown = set(row) - set(self.columns)
        if unknown:
            raise KeyError(
                f"no column {sorted(unknown)} in table {self.title!r}; it has {list(self.columns)}"
            )
        self.rows.append({name: row.get(name) for name in self.columns})

    def render(self) -> str:
        """The table as plain text, numbers to the right; a column blank in every row is left out."""
        shown = [name for name in self.columns if any(row[name] is not None for row in self.rows)]
        rich = RichTable(title=self.title, title_justify="left", box=None, pad_edge=False)
        for name in shown:
            numeric = all(isinstance(row[name], int | float | None) for row in self.rows)
            rich.add_column(name, justify="right" if numeric else "left", no_wrap=True)
        for row in self.rows:
            rich.add_row(*(self._text(name, row[name]) for name in shown))
        console = Console(width=_WIDTH, color_system=None, highlight=False, markup=False)
        with console.capture() as captured:
            console.print(rich)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _text(self, name: str, cell: Cell) -> str:
        if cell is None:
            return ""
        if isinstance(cell, bool):
            return "yes" if cell else "NO"
        return format(cell, self.formats.get(name, "")) if isinstance(cell, int | float) else cell


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One number that must hold: `measured` at least (or, with `at_most`, at most) `bound`."""

    claim: str
    measured: float
    bound: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


# one part of a benchmark: its tables and its claims
Part = Callable[[argparse.Namespace], tuple[list[Table], list[Claim]]]


def environment() -> dict[str, Cell]:
    """The processor, its integer instructions and the versions of everything that is measured."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(fields.get("flags", "").split())
    found: dict[str, Cell] = {
        "cpu": fields.get("model name", "unknown"),
        "avx512_vnni": "avx512_vnni" in flags,
        "amx_int8": "amx_int8" in flags,
    }
    for package in ("lowbit", "torch", "onnx", "onnxruntime", "openvino"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def environment_line() -> str:
    """`environment()` in one line of text."""
    parts = []
    for name, value in environment().items():
        if isinstance(value, bool):
            parts.append(name if value else f"no {name}")
        elif value is not None:
            parts.append(str(value) if name == "cpu" else f"{name} {value}")
    return ", ".join(parts)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; the description is the module's docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object instead of tables")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, for benchmarks that train or search."""
    parser.add_argument("--device", default="cpu", help="where networks run: cpu (default), cuda")


_STARTED = time.perf_counter()


def progress(text: str) -> None:
    """One line on stderr, so that long work is seen and stdout stays clean."""
    print(f"[{time.perf_counter() - _STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


def run_parts(run: Mapping[str, Part], options: argparse.Namespace) -> int:
    """Run `options.parts` in their order and report them all; the exit code."""
    tables: list[Table] = []
    claims: list[Claim] = []
    for part in options.parts:
        made, held = run[part](options)
        tables += made
        claims += held
    return report(tables, claims, as_json=options.json)


def report(tables: Sequence[Table], claims: Sequence[Claim], *, as_json: bool) -> int:
    """Print the tables and the claims, or one JSON object; return 1 if a claim does not hold, else 0."""
    if as_json:
        record = {
            "environment": environment(),
            "tables": {table.title: table.rows for table in tables},
            "claims": [asdict(claim) | {"holds": claim.holds} for claim in claims],
        }
        print(json.dumps(record, indent=1))
    else:
        print(environment_line())
        for table in [*tables, *([_claims_table(claims)] if claims else [])]:
            print(f"\n{table.render()}")
    return 0 if all(claim.holds for claim in claims) else 1


def _claims_table(claims: Sequence[Claim]) -> Table:
    held = sum(claim.holds for claim in claims)
    title = f"claims: {held} of {len(claims)} hold"
    table = Table(title=title, columns=("claim", "measured", "needed", "holds"))
    for claim in claims:
        needed = f"{'<=' if claim.at_most else '>='} {claim.bound:.4g}"
        table.add(claim=claim.claim, measured=f"{claim.measured:.4g}", needed=needed, holds=claim.holds)
    return table

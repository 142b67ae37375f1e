"""The documentation is true: its Python runs, its command lines parse, the package's doctests pass.

The Python blocks of one page run in order and share their names, in an empty folder. A block that cannot run
here has a line `<!-- not run: why -->` right above it.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lowbit

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
FENCE = re.compile(r"^(<!-- not run: .+ -->\n)?```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(lowbit.__path__, "lowbit.")
    if not info.name.rpartition(".")[2].startswith("_")  # compiled libraries are no modules
)


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of each block that runs."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        skip, language, body = found.groups()
        if language in languages and not skip:
            yield text.count("\n", 0, found.start(3)) + 1, body


def run_examples(test: doctest.DocTest) -> None:
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append, clear_globs=False)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for line, body in blocks(page, "python", "pycon"):
        if ">>> " in body:
            examples = doctest.DocTestParser().get_doctest(body, names, page.name, str(page), line - 1)
            run_examples(examples)
            names.update(examples.globs)
        else:
            exec(compile("\n" * (line - 1) + body, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_of_a_page_parse(page: Path) -> None:
    """Every `lowbit ...` line names a command and options that exist."""
    from typer.main import get_command

    commands = get_command(importlib.import_module("lowbit.cli").app).commands  # type: ignore[attr-defined]
    for line, body in blocks(page, "console", "bash", "sh"):
        for text in body.replace("\\\n", " ").splitlines():
            words = shlex.split(text.removeprefix("$ "), comments=True)
            if len(words) < 2 or words[0] != "lowbit" or words[1].startswith("-"):
                continue
            assert words[1] in commands, f"{page.name}:{line}: {text}"
            known = {option for p in commands[words[1]].params for option in p.opts} | {"--help"}
            unknown = [w for w in words[2:] if w.startswith("-") and w.partition("=")[0] not in known]
            assert not unknown, f"{page.name}:{line}: {text}: no option {unknown}"


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)):
        run_examples(test)

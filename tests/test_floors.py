"""The floors of docs/architecture.md: imports go down, never up, never across between passes or flows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowbit

SRC = Path(lowbit.__file__).parent
# The longest prefix decides. "" is lowbit/__init__.py: the public names, which only the top floor may use.
FLOORS = {
    **dict.fromkeys(("core", "decompose", "kernels", "demo"), 0),
    **dict.fromkeys(("errors", "files", "processor", "progress", "registry", "sealed", "tables"), 0),
    **dict.fromkeys(("distributed", "finished"), 0),
    **dict.fromkeys(("presets", "recipe", "nn", "graph"), 1),
    **dict.fromkeys(("passes", "cost", "coverage", "model", "scales", "training"), 2),
    **dict.fromkeys(
        ("assembly", "trial", "ptq", "qat", "search", "export", "reference", "verify", "compare", "advise"), 3
    ),
    **dict.fromkeys(("hardware", "ladder", "tensor_networks"), 3),
    **dict.fromkeys(("bench", "contents", "environment", "latency", "report", "runtime"), 3),
    **dict.fromkeys(
        (
            "",
            "cli",
            "cli_accuracy",
            "cli_inputs",
            "cli_options",
            "cli_output",
            "cli_quantize",
            "cli_search",
            "cli_tensorize",
            "cli_train",
            "demo.run",
        ),
        4,
    ),
}
FLOWS = ("ptq", "qat", "search")
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in SRC.rglob("*.py")
}


def floor(module: str) -> int:
    prefixes = [p for p in FLOORS if p and (module == p or module.startswith(p + "."))] if module else [""]
    assert prefixes, f"'{module}' stands on no floor; add it to FLOORS"
    return FLOORS[max(prefixes, key=len)]


def imports(module: str) -> Iterator[str]:
    """Modules of lowbit that a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "lowbit":
                yield rest if rest in MODULES else rest.rpartition(".")[0]


def stand(module: str) -> tuple[str, str] | None:
    """(group, member) of a module whose group's members must not know each other."""
    group, *rest = module.split(".")
    if group in FLOWS:
        return "flow", group
    return (group, rest[0]) if group in ("passes", "export") and rest else None


def across(module: str, other: str) -> bool:
    here, there = stand(module), stand(other)
    return here is not None and there is not None and here[0] == there[0] and here[1] != there[1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    up = [other for other in imports(module) if floor(other) > floor(module)]
    sideways = [other for other in imports(module) if across(module, other)]
    assert not up, f"'{module}' on floor {floor(module)} imports from above: {up}"
    assert not sideways, f"'{module}' imports its neighbour: {sideways}"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if not m.startswith("graph")))
def test_only_graph_builds_graphs(module: str) -> None:
    """Elsewhere `from torch import fx` serves to name types and to map over arguments."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not any(name.startswith("torch.fx") for name in names), f"line {node.lineno}: {names}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fx":
            assert node.attr in {"Node", "GraphModule", "node"}, f"line {node.lineno}: fx.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert ast.unparse(node.func.value) != "fx", f"line {node.lineno}: {ast.unparse(node.func)}()"

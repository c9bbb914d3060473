"""The house: who may import whom, and what nothing is called."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("simulator", "planner", "runtime", "reports")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# The doors of the house: they may open every room, but only when somebody walks through.
DOORS = ("planner/cli.py", "planner/commands/", "planner/demo.py", "planner/sync_trial.py", "planner/here_trial.py")
ALLOWED = {
    "simulator": ("simulator",),
    "planner": ("simulator", "planner"),
    "runtime": ("simulator", "planner.plan", "runtime"),
    "reports": ("simulator", "planner.plan", "planner.scaling", "reports"),
}
HEAVY = {"torch": "runtime", "matplotlib": "reports"}
DRAWERS = {"utils", "util", "common", "core", "helpers", "helper", "base", "manager", "misc"}


def imports(nodes: list[ast.stmt], package: str, inside: bool = True) -> Iterator[str]:
    """Dotted names that statements import; `inside` follows functions too. `from a.b import c` gives `a.b.c`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from imports(getattr(node, field, []), package, inside)


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(one + ".") for one in allowed)


def show(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=show)
def test_packages_import_in_one_direction(path: Path) -> None:
    door = show(path).startswith(DOORS)
    package = show(path).split("/")[0]
    body = ast.parse(path.read_text(encoding="utf-8")).body
    ours = [name for name in imports(body, show(path), inside=not door) if name.split(".")[0] in PACKAGES]
    assert [name for name in ours if not within(name, ALLOWED[package])] == []


@pytest.mark.parametrize("path", MODULES, ids=show)
def test_only_the_runtime_imports_torch_and_only_reports_import_matplotlib(path: Path) -> None:
    package = show(path).split("/")[0]
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = {name.split(".")[0] for name in imports(body, show(path))}
    assert {heavy for heavy, home in HEAVY.items() if heavy in names and package != home} == set()


def test_planning_loads_neither_torch_nor_matplotlib() -> None:
    paths = [path for path in MODULES if show(path).startswith(("simulator/", "planner/"))]
    names = [show(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]
    assert {"planner.plan", "simulator.job"} <= set(names)
    script = f"import sys, {', '.join(names)}; print(sorted({{'torch', 'matplotlib'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nothing_is_named_like_a_drawer() -> None:
    names = [part for path in MODULES for part in path.relative_to(ROOT).with_suffix("").parts]
    assert DRAWERS.isdisjoint(names)

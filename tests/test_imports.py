"""Check the import stack: a package imports lower floors only, and no import is circular."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STACK = (
    ("plugins", "utils"),
    ("config",),
    ("datasets", "runs"),
    ("models",),
    ("evaluation", "profiling"),
    ("attention", "export", "training"),
    ("experiments", "report"),
    ("cli",),
)
"""Packages from the lowest floor to the highest. Packages on one floor do not import each other."""
FLOORS = {package: number for number, floor in enumerate(STACK) for package in floor}
FLAT = {"__init__", "__main__"}
PLUGIN_IMPORTS = {"torch", "timm", "einops", "jaxtyping"}
TORCH_FREE = ("config", "runs", "report.html", "evaluation.stats", "cli")
"""Packages and modules whose import loads no torch."""


def modules() -> dict[str, Path]:
    """Return the source file of each module."""
    paths = {}
    for top in ("smallvit", "plugins", "datasets", "cli"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if top == "smallvit" else ("smallvit", *parts)
            paths[".".join(parts).removesuffix(".__init__")] = path
    return paths


MODULES = modules()


def imported(tree: ast.AST, *, nested: bool) -> set[str]:
    """Return the modules that a syntax tree imports, with those inside functions only if `nested`."""
    names = set()
    pending = list(ast.iter_child_nodes(tree))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & MODULES.keys() or {node.module}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not nested:
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or nested:
            pending += ast.iter_child_nodes(node)
    return names


def package(module: str) -> str:
    """Return the package of a module of ours: `smallvit.models.t2t` lies in `models`."""
    return module.split(".")[1] if "." in module else ""


def test_packages_import_lower_floors_only() -> None:
    violations = []
    for module, path in MODULES.items():
        if path.parent == ROOT / "smallvit":
            continue  # __init__ resolves names on first use, __main__ runs the command line
        for name in sorted(imported(ast.parse(path.read_text()), nested=True)):
            if name.startswith("smallvit.") and package(name) != package(module):
                if FLOORS[package(name)] >= FLOORS[package(module)]:
                    violations.append(f"{module} imports {name}")
            elif package(module) == "plugins" and not name.startswith("smallvit"):
                if name.split(".")[0] not in PLUGIN_IMPORTS | set(sys.stdlib_module_names):
                    violations.append(f"{module} imports {name}")
            elif {name.split(".")[0]} & {"plugins", "datasets", "cli"}:
                violations.append(f"{module} imports {name} by its folder's name")
    assert not violations, "\n".join(violations)


def test_no_import_is_circular() -> None:
    graph = {
        module: imported(ast.parse(path.read_text()), nested=False) & MODULES.keys() - {module}
        for module, path in MODULES.items()
        if module != "smallvit"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_smallvit_holds_packages_only() -> None:
    assert {path.stem for path in (ROOT / "smallvit").glob("*.py")} == FLAT


def test_listed_modules_import_no_torch() -> None:
    names = [
        name for name in MODULES if name.removeprefix("smallvit.").startswith(TORCH_FREE) and "__main__" not in name
    ]
    check = f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n"
    check += "    if 'torch' in sys.modules: sys.exit(name)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_wheel_contains_every_package() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(packages) == {"smallvit", *(f"smallvit.{package}" for package in FLOORS)}

"""What leans on what: the imports between the rooms of the house, walked."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"smallvit": "smallvit", "plugins": "smallvit.plugins", "datasets": "smallvit.datasets", "cli": "smallvit.cli"}
PLAIN = ("smallvit/config.py", "smallvit/options", "smallvit/errors.py")
"""What leans on the standard library alone."""
TORCHLESS = (
    *(f"smallvit/{name}.py" for name in ("report", "watching", "runs", "opening", "files", "learnt")),
    *(f"smallvit/attention/{name}.py" for name in ("gaze", "heads", "mosaic")),
    *(f"smallvit/judgement/{name}.py" for name in ("chance", "pictures", "verdict")),
    *(f"smallvit/pages/{name}.py" for name in ("page", "dossier", "telling", "charts", "drawings", "illustrations")),
    *(f"smallvit/comparison/{name}.py" for name in ("rows", "standings", "scatter")),
    *(f"smallvit/reproduction/{name}.py" for name in ("trials", "experiments", "literature", "records")),
    *(f"smallvit/reproduction/{name}.py" for name in ("ledger", "outcomes", "tables", "plots", "notes", "document")),
    *(f"smallvit/costs/{name}.py" for name in ("loglog", "savings", "tables")),
)
"""What reads records and draws, and what must be there at once."""
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or within; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def of(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(package + ".")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_lean_only_on_what_they_may(path: Path) -> None:
    room, names = path.relative_to(ROOT).parts[0], imports(path)
    ours = of(names, "smallvit") - {"smallvit", "smallvit.__version__"}
    if room != "cli" and path.name != "__main__.py":
        assert not of(names, "smallvit.cli")
    if room == "plugins":
        assert ours == of(names, "smallvit.plugins")
        outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"smallvit"}
        assert outside <= {"torch", "timm", "einops", "jaxtyping"}
    if room == "datasets":
        assert ours == of(names, "smallvit.datasets") | of(names, "smallvit.errors") | of(names, "smallvit.options")
    if path.name in ("models.py", "objectives.py", "optim.py"):
        assert not of(names, "smallvit.datasets")
    if str(path.relative_to(ROOT)).startswith(TORCHLESS):
        assert not of(names, "torch")
    if str(path.relative_to(ROOT)).startswith(PLAIN):
        assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "smallvit"}


def test_what_is_to_need_no_torch_is_there() -> None:
    assert all((ROOT / name).exists() for name in TORCHLESS)


def test_the_heart_is_imported_by_its_own_names_only() -> None:
    for path in FILES:
        assert not {"plugins", "datasets", "cli"} & {name.split(".")[0] for name in imports(path)}, path


def test_the_wheel_has_every_package() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {f"smallvit.{path.parent.name}" for path in (ROOT / "smallvit").glob("*/__init__.py")}
    rooms = {"smallvit", "smallvit.plugins", "smallvit.datasets", "smallvit.cli"}
    assert {*packages} == folders | rooms

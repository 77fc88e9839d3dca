"""The house rules: who may import whom, and no module that hides an installed package."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"config", "log"},
    {"disk"},
    {"model", "optim", "matrices", "hardware", "tokenizer", "shards"}
    | {"parallel", "trackers", "hub", "cleaning", "demo_world", "page", "terminal"},
    {"text_shards", "readers", "layouts", "conversation", "batches", "checkpoint", "engine", "eight_bit"},
    {"corpora", "gradients", "report", "tasks"},
    {"ingest", "planning"},
    {"training"},
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - set(FLOOR)


def imported_modules(path: Path) -> set[str]:
    """The project's own modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found & {p.stem for p in ROOT.glob("*.py")}


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_modules_import_lower_floors_only(path: Path) -> None:
    floor = FLOOR.get(path.stem, len(FLOORS))
    too_high = {name for name in imported_modules(path) if FLOOR.get(name, len(FLOORS)) >= floor}
    # floor 0 is config and log: both stand alone
    assert not too_high, f"{path.name} (floor {floor}) imports {too_high}"


def test_every_floor_lists_modules_that_exist() -> None:
    assert {name for name in FLOOR if not (ROOT / f"{name}.py").exists()} == set()


def test_every_script_can_be_run_and_says_how() -> None:
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert '__name__ == "__main__"' in text, name
        assert f"uv run {name}.py" in ast.get_docstring(ast.parse(text)), name


def test_module_names_hide_no_installed_package() -> None:
    installed = set(packages_distributions()) | set(sys.stdlib_module_names)
    assert {path.stem for path in ROOT.glob("*.py")} & installed == set()


def test_nothing_runs_at_import() -> None:
    """Top-level statements are definitions, imports, constants and the main guard."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_guard = isinstance(node, ast.If)
            assert is_docstring or is_guard or isinstance(node, allowed), f"{path.name}:{node.lineno}"

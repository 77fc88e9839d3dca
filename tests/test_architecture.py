"""The house rules: who may import whom, and no module that hides an installed package."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "hearth"
FLOORS = (
    {"config"},
    {"disk"},
    {"log"},
    {"model", "optim", "matrices", "hardware", "tokenizer", "shards"}
    | {"parallel", "trackers", "hub", "cleaning", "demo_world", "page", "terminal"},
    {"text_shards", "readers", "layouts", "conversation", "batches", "checkpoint", "engine", "eight_bit"},
    {"corpora", "gradients", "report", "tasks"},
    {"ingest", "planning", "harness"},
    {"training"},
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
FILES = {path.stem: path for path in (*ROOT.glob("*.py"), *PARTS.glob("*.py")) if path.stem != "__init__"}
SCRIPTS = {name for name, path in FILES.items() if path.parent == ROOT} - set(FLOOR)


def imported_modules(path: Path) -> set[str]:
    """The project's own modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[-1] for alias in node.names if alias.name.split(".")[0] in OWN}
        elif isinstance(node, ast.ImportFrom) and node.module == PARTS.name:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OWN:
            found.add(node.module.split(".")[-1])
    return found


OWN = {PARTS.name, *(path.stem for path in ROOT.glob("*.py"))}


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_modules_import_lower_floors_only(path: Path) -> None:
    floor = FLOOR.get(path.stem, len(FLOORS))
    too_high = {name for name in imported_modules(path) if FLOOR.get(name, len(FLOORS)) >= floor}
    assert not too_high, f"{path.name} (floor {floor}) imports {too_high}"


def test_every_floor_lists_modules_that_exist() -> None:
    assert set(FLOOR) <= set(FILES)
    assert {path.stem for path in PARTS.glob("*.py")} <= {*FLOOR, "__init__"}


def test_the_top_holds_the_stages_and_what_is_edited_alone() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} - SCRIPTS == {"config", "model"}


def test_every_script_can_be_run_and_says_how() -> None:
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert '__name__ == "__main__"' in text, name
        assert f"uv run {name}.py" in ast.get_docstring(ast.parse(text)), name


def test_module_names_hide_no_installed_package() -> None:
    installed = set(packages_distributions()) | set(sys.stdlib_module_names)
    assert OWN & installed == set()


def test_nothing_runs_at_import() -> None:
    """Top-level statements are definitions, imports, constants and the main guard."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for path in FILES.values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_guard = isinstance(node, ast.If)
            assert is_docstring or is_guard or isinstance(node, allowed), f"{path.name}:{node.lineno}"

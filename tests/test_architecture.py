"""The house rules: who may import whom, and no module that hides an installed package."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "hearth"
# A room imports only rooms before it; inside a room files import each other in one direction.
ROOMS: dict[str, tuple[str, ...]] = {
    "top": ("config", "model"),
    "hearth": ("cli", "storage", "log", "hardware", "run"),
    "reporting": ("page", "report", "trackers"),
    "data": (
        *("tokenizer", "chat_format", "cleaning", "hub", "readers", "layouts", "problems"),
        "demo_world",
        *("shard_folder", "token_shards", "text_shards", "sources", "ingest"),
    ),
    "decoding": (
        "calculator",
        "tools",
        "matrices",
        "kv_cache",
        "slots",
        "graphs",
        "engine",
        "scheduler",
    ),
    "training": (
        *("batches", "distributed", "optim", "eight_bit", "attention", "gradients", "held_out"),
        *("planning", "sizing", "checkpoint", "loop", "rewards", "rollouts"),
    ),
    "evaluation": ("pass_at_k", "tasks", "scores", "chat_tasks", "battery", "lm_eval_adapter"),
    "export": ("modeling_hearth", "qwen3", "card", "huggingface", "gguf", "onnx"),
    "serving": (
        *("marks", "terminal", "conversation", "commands"),
        *("requests", "answers", "workers", "api"),
    ),
}
PLACE = {
    (room, name): (r, n)
    for r, (room, names) in enumerate(ROOMS.items())
    for n, name in enumerate(names)
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - set(ROOMS["top"])
FILES = sorted(path for path in (*ROOT.glob("*.py"), *HOUSE.rglob("*.py")))


def place_of(path: Path) -> tuple[str, str]:
    """Room and name of a file."""
    folder = path.parent
    room = "top" if folder == ROOT else "hearth" if folder == HOUSE else folder.name
    return room, path.stem


def imported(path: Path) -> set[tuple[str, str]]:
    """The project's own modules that a file imports, wherever in it."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {("top", a.name) for a in node.names if (ROOT / f"{a.name}.py").is_file()}
        elif isinstance(node, ast.ImportFrom) and node.module:
            where, *inside = node.module.split(".")
            if where != "hearth":
                found |= {("top", where)} if (ROOT / f"{where}.py").is_file() else set()
                continue
            folder = HOUSE.joinpath(*inside)
            if not folder.is_dir():
                found.add(place_of(folder.with_suffix(".py")))
                continue
            found |= {place_of(folder / f"{a.name}.py") for a in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    here = PLACE.get(place_of(path), (len(ROOMS), 0))
    wrong = {name for name in imported(path) if PLACE.get(name, (len(ROOMS), 0)) >= here}
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_every_file_has_its_place_in_a_room() -> None:
    known = {place_of(path) for path in FILES if path.stem != "__init__"}
    assert known - {("top", name) for name in SCRIPTS} == set(PLACE)


def test_tests_mirror_the_rooms() -> None:
    for path in (ROOT / "tests").glob("*/test_*.py"):
        room, name = path.parent.name, path.stem.removeprefix("test_")
        is_page = (HOUSE / room / f"{name}.html").is_file()
        assert (room, name) in PLACE or is_page, f"{path.relative_to(ROOT)} tests no file of a room"


def test_the_top_holds_the_stages_and_what_is_edited_alone() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} - SCRIPTS == set(ROOMS["top"])


def test_every_script_can_be_run_and_says_how() -> None:
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert '__name__ == "__main__"' in text, name
        assert f"uv run {name}.py" in ast.get_docstring(ast.parse(text)), name


def test_module_names_hide_no_installed_package() -> None:
    installed = set(packages_distributions()) | set(sys.stdlib_module_names)
    own = {HOUSE.name, *(path.stem for path in ROOT.glob("*.py"))}
    assert own & installed == set()


def test_nothing_runs_at_import() -> None:
    """Top-level statements are definitions, imports, constants and the main guard."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    allowed = (ast.Import, ast.ImportFrom, *definitions, ast.Assign, ast.AnnAssign)
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_guard = isinstance(node, ast.If)
            assert is_docstring or is_guard or isinstance(node, allowed), (
                f"{path.name}:{node.lineno}"
            )


# What a stranger may want to do, and where the folder tree leads: file, and the name in it.
ERRANDS = {
    "change the chat format": ("hearth/data/chat_format.py", "def render("),
    "add an optimizer": ("hearth/training/optim.py", "def build_optimizers("),
    "why was this document dropped": ("hearth/data/cleaning.py", "class Rejected"),
    "how is the cache rewound": ("hearth/decoding/kv_cache.py", "def rewind("),
    "add a layout of conversations": ("hearth/data/layouts.py", "LAYOUTS"),
    "how is the next token drawn": ("hearth/decoding/engine.py", "def draw("),
    "how are documents packed into batches": ("hearth/training/batches.py", "def pack_rows("),
    "when is a step skipped": ("hearth/training/loop.py", "class SpikeGuard"),
    "what makes a stage stale": ("hearth/run.py", "def settings_of("),
    "what is in a checkpoint": ("hearth/training/checkpoint.py", "def save("),
    "add a task to score": ("hearth/evaluation/tasks.py", "TASKS"),
    "add a prompt to the battery for chat models": ("hearth/evaluation/battery.py", "BATTERY"),
    "add an environment to practise in": ("hearth/training/rewards.py", "ENVIRONMENTS"),
    "change a command of the chat": ("hearth/serving/commands.py", "def do_"),
}


@pytest.mark.parametrize(("file", "name"), ERRANDS.values(), ids=ERRANDS)
def test_the_tree_leads_a_stranger_to_the_place(file: str, name: str) -> None:
    assert name in (ROOT / file).read_text(encoding="utf-8")

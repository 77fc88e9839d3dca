"""The README's commands, links and numbers hold."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

from config import PRESETS
from model import Model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip().startswith("uv run ")
]
INLINE = [c for c in re.findall(r"`(uv run [^`]+)`", README) if "…" not in c]


@pytest.mark.parametrize("command", [*COMMANDS, *INLINE])
def test_every_command_names_a_script_and_options_that_exist(command: str) -> None:
    words = shlex.split(command)[2:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    while words[0] in ("--extra", "--group"):
        extras = project["project"]["optional-dependencies"]
        assert words[1] in (extras if words[0] == "--extra" else project["dependency-groups"])
        words = words[2:]
    if words[0] == "pytest":
        return
    assert (ROOT / words[0]).exists(), command
    if not words[0].startswith("benchmarks/"):
        script = importlib.import_module(words[0].removesuffix(".py"))
        script.SCRIPT.parse(words[1:])


def test_the_first_screen_holds_the_commands_and_the_presets() -> None:
    first_screen = "\n".join(README.splitlines()[:50])
    assert "uv run run_pipeline.py --preset demo" in first_screen
    assert "uv run pytest" in first_screen
    for preset in PRESETS:
        assert f"`{preset}`" in first_screen


def test_the_table_of_presets_tells_the_models_size() -> None:
    for name, told in re.findall(r"^\| (`\w+`.*?) \|.*?\| ([\d.]+)M \|", README, flags=re.M):
        for preset in re.findall(r"`(\w+)`", name):
            with torch.device("meta"):
                n = Model(PRESETS[preset].model).n_parameters()
            assert (
                abs(n / 1e6 - float(told)) < 0.5
                if float(told) > 10
                else abs(n / 1e6 - float(told)) < 0.05
            )


def test_the_file_map_names_every_module() -> None:
    missing = [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in README]
    assert missing == []


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_uv_compiles_no_bytecode_at_every_start() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    assert not tool.get("compile-bytecode", False)

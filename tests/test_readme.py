"""The commands, links, pictures and figures of the README and of the pages in docs/ hold."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import stages
import torch

import pretrain
from config import PRESETS
from model import Model

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/first-evening.md", "CONTRIBUTING.md")
}
README = PAGES["README.md"]
BOOK = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
FORMS = [path.read_text(encoding="utf-8") for path in (ROOT / ".github").rglob("*.yml")]
# every block of commands: its page, the mark in front that says whether a test executes it, itself
BLOCKS = [
    (name, mark, block)
    for name, text in PAGES.items()
    for mark, language, block in re.findall(
        r"(?:^<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```", text, re.M | re.S
    )
    if not language
]


def commands_of(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("uv run ")]


INLINE = [
    command
    for text in (*PAGES.values(), *FORMS)
    for command in re.findall(r"`(uv run [^`]+)`", " ".join(text.split()))
    if "…" not in command
]
COMMANDS = list(dict.fromkeys([c for *_, b in BLOCKS for c in commands_of(b)] + INLINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_script_and_options_that_exist(command: str) -> None:
    words = shlex.split(command)[2:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    while words[0] in ("--extra", "--group"):
        extras = project["project"]["optional-dependencies"]
        assert words[1] in (extras if words[0] == "--extra" else project["dependency-groups"])
        words = words[2:]
    if words[0] == "torchrun":  # its own options, each with a value, stand before the script
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    if words[0] in ("pytest", "ruff"):
        return
    assert (ROOT / words[0]).exists(), command
    if not words[0].startswith("benchmarks/"):
        script = importlib.import_module(words[0].removesuffix(".py"))
        script.SCRIPT.parse(words[1:])


def test_every_block_of_commands_is_executed_or_says_why_not() -> None:
    for name, mark, block in BLOCKS:
        if "uv run" in block or "uv sync" in block:
            said = mark == "executed" or re.fullmatch(r"not executed: \S.*", mark)
            assert said, f"{name}: no mark in front of\n{block}"


# -------------------------------------------------------------------------------- they are executed


MAKERS = ("run_pipeline.py", *stages.SCRIPTS)  # that may begin a run


def smaller(script: str, words: list[str], small: list[str]) -> list[str]:
    """The words of a command; of one that begins a run with the demo's preset also the tests' tiny
    sizes, for what it does not set itself.
    """
    if not (script in MAKERS and "demo" in words):
        return words
    kept, i = [], 0
    while i < len(small):
        n = 1 if i + 1 == len(small) or small[i + 1].startswith("--") else 2
        if small[i] not in words and not (small[i] == "--model.window" and "portable" in words):
            kept += small[i : i + n]
        i += n
    return words + kept


def execute(command: str, folder: Path, small: list[str]) -> None:
    """The command, in `folder`; a server is asked to end once it has printed its link."""
    script, *words = shlex.split(command)[2:]
    words = smaller(script, words, small)
    serves = script == "serve_chat.py"
    words += ["--port", "0"] if serves else []
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        while serves and process.poll() is None and "http://" not in log.read_text():
            time.sleep(0.1)
        if serves:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=600) == 0, f"{command}\n{log.read_text()[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_its_order(page: str, tmp_path: Path) -> None:
    """As they stand, but for sizes: what begins a run takes the tiny ones of the other tests."""
    small = stages.write_inputs(tmp_path / "inputs")
    (tmp_path / "books").mkdir()
    (tmp_path / "notes").mkdir()
    text = (tmp_path / "inputs" / "text.jsonl").read_text().splitlines()
    for n, line in enumerate(text):
        place = tmp_path / ("notes" if n % 3 else "books") / f"{n}.md"
        place.write_text(json.loads(line)["text"])
    for *_, block in re.findall(r"(```jsonl\n)(.*?)```", PAGES[page], re.S):
        (tmp_path / "chats.jsonl").write_text(block)
    for name, mark, block in BLOCKS:
        if name == page and mark == "executed":
            for command in commands_of(block):
                execute(command, tmp_path, small)


# ------------------------------------------------------------------------------------ what is where


def test_the_first_screen_holds_the_commands_and_the_presets() -> None:
    first_screen = "\n".join(README.splitlines()[:50])
    assert "pip install uv" in first_screen
    assert "uv run run_pipeline.py --preset demo" in first_screen
    assert "uv run pytest" in first_screen
    for preset in PRESETS:
        assert f"`{preset}`" in first_screen


def test_the_file_map_names_every_module() -> None:
    missing = [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in README]
    assert missing == []


def test_links_lead_somewhere() -> None:
    for name, text in (PAGES | {"EXPERIMENTS.md": BOOK}).items():
        place = (ROOT / name).parent
        anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings(text)}
        for target in re.findall(r"\]\(([^):]+)\)", " ".join(text.split())):
            file, _, anchor = target.partition("#")
            if file:
                assert (place / file).exists(), f"{name}: {target}"
                if Path(file).suffix != ".md":
                    continue
                there = headings((place / file).read_text(encoding="utf-8"))
                known = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in there}
            assert not anchor or anchor in (known if file else anchors), f"{name}: {target}"


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.*)", text, re.M)


def test_every_picture_is_there_small_and_put_into_words() -> None:
    for name, text in PAGES.items():
        for tag in re.findall(r"<img [^>]*>", text):
            source, alt = (re.search(rf'{a}="([^"]*)"', tag) for a in ("src", "alt"))
            picture = (ROOT / name).parent / source[1]
            assert picture.stat().st_size <= 150_000, picture
            assert len(alt[1]) > 40, f"{name}: {tag}"


def test_uv_compiles_no_bytecode_at_every_start() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    assert not tool.get("compile-bytecode", False)


# ---------------------------------------------------------------------------------------- figures


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables under a heading, without the lines that only draw."""
    part = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)[1]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not set("".join(row)) <= set("-: ")]


def card_rows() -> list[tuple[str, str, str, str, str, str]]:
    """Preset, parameters, tokens, card, hours and kWh as the first screen's table has them."""
    rows, before = [], ["", "", ""]
    for row in rows_of(README, "Hearth"):
        if len(row) == 6 and row[3].startswith("RTX"):
            before = [new or old for new, old in zip(row[:3], before, strict=True)]
            rows.append((*before, *row[3:]))
    return rows


def test_the_table_of_cards_is_what_the_plan_prints(capsys: pytest.CaptureFixture) -> None:
    rows = card_rows()
    assert {row[0].split("`")[1] for row in rows} == set(PRESETS) - {"demo"}
    for preset, parameters, tokens, card, hours, kwh in rows:
        pretrain.show_plan_of_card(PRESETS[preset.split("`")[1]], card)
        said = capsys.readouterr().out
        n = int(re.search(r"model +([\d,]+)", said)[1].replace(",", ""))
        read = re.search(r"tokens +(\S+) in", said)[1]
        chosen = next(line for line in said.splitlines() if re.match(r" *> +\d", line)).split()
        expected = f"{n / 1e6:.1f}M", f"{read} tokens", chosen[-2], chosen[-1]
        assert (parameters, tokens, hours, kwh) == expected, (preset, card)


def test_the_demos_size_is_that_of_its_model() -> None:
    with torch.device("meta"):
        n = Model(PRESETS["demo"].model).n_parameters()
    assert f"| `demo` | {n / 1e6:.2f}M |" in README


def test_the_comparison_tells_how_long_we_are() -> None:
    files = [*ROOT.glob("*.py"), *(ROOT / "hearth").rglob("*.py")]
    n_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    told = re.search(r"^\| lines of Python, .*? \| ([\d,]+) \|", README, re.M)[1]
    assert abs(int(told.replace(",", "")) / n_lines - 1) < 0.1


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:[.,:]\d+)*", text)


def recorded() -> tuple[set[str], list[float]]:
    """The figures that EXPERIMENTS.md holds, and those of the result files."""
    files = (ROOT / "benchmarks" / "results").glob("*.json")
    found = re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", " ".join(p.read_text("utf-8") for p in files))
    return set(numbers(BOOK)), [float(number) for number in found]


@pytest.mark.parametrize(
    ("heading", "columns"),
    [
        ("Measured", (1,)),
        ("The HRM head, and what it brings", (1, 2, 3)),
        ("The demo, and what it gets wrong", (1, 2, 3)),
    ],
)
def test_a_measured_figure_stands_in_the_laboratory_book(
    heading: str, columns: tuple[int, ...]
) -> None:
    known, results = recorded()
    rows = rows_of(README, heading)[1:]
    assert rows
    for row in rows:
        for cell in (row[i] for i in columns if i < len(row)):
            for figure in numbers(cell):
                decimals = len(figure.partition(".")[2])
                value = float(figure.replace(",", "").replace(":", "."))
                held = any(round(result, decimals) == value for result in results)
                assert figure in known or held, f"{figure} in {row} is in no book or result file"

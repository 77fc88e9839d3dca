"""Draw the README's pictures from a finished run: the chat in a terminal, the chat page in light
and dark, the curves of pretraining, and those of practice with rewards where the run has them.

In: a run's folder. Out: terminal.svg, page-light.png, page-dark.png, loss.svg, practice.svg, each
at most 150 kB; what they show, in words, on the console. Nothing is staged: the terminal is a
session in a pseudo-terminal, the page is the server's own in headless Chromium. Wants the group
`dev` (playwright) and Chromium.

    uv run benchmarks/pictures.py runs/demo docs/pictures
    uv run benchmarks/pictures.py runs/demo docs/pictures --only loss practice
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import UserError
from hearth.cli import run_script
from hearth.reporting import page, report

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 150_000  # bytes of a picture
PATIENCE = 120  # seconds that an answer may take
COLUMNS, LINES = 78, 30  # of the terminal
IN_TERMINAL = (
    *("Who owns the hammer?", "What is 47 + 25?"),
    *("/think on", "Which is larger, 38 or 83?", "/think off", "How do you spell lantern?"),
    "What is 1234 + 4321?",
)
PAGE_SIZE = {"width": 760, "height": 560}


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--only", nargs="+", choices=list(PICTURES), default=list(PICTURES))
    options = parser.parse_args()
    run = options.run.resolve()
    if not (run / "config.json").is_file():
        raise UserError(f"{options.run} is no run: it holds no config.json.")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        for file, content, words in PICTURES[name](run):
            if len(content) > LARGEST:
                raise UserError(f"{file} has {len(content)} bytes, may have {LARGEST}.")
            (options.out / file).write_bytes(content)
            print(f"{options.out / file}: {len(content) / 1000:.0f} kB. {words}")


Picture = tuple[str, bytes, str]  # file, content, what it shows


@contextlib.contextmanager
def aside(run: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder to work in, where the run lies as runs/<name>, and the words that choose it; what is
    written there (a history of the chat) does not reach the run.
    """
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "runs" / run.name
        copy.mkdir(parents=True)
        for item in run.iterdir():
            (copy / item.name).symlink_to(item)
        yield Path(place), ["--name", run.name]


# --------------------------------------------------------------------------------------- a terminal


class Screen:
    """What a terminal shows after the bytes it was sent: characters in a grid, each with the codes
    of its looks. Knows the control sequences that prompt_toolkit and rich use, skips all others.
    """

    CONTROL = re.compile(
        r"\x1b(?:\[([?>=]?)([\d;]*)[ -/]*([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\^-~])"
    )

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self.cells: list[dict[int, tuple[str, str]]] = [{}]  # of every line since the start
        self.top, self.x, self.y, self.looks, self.rest = 0, 0, 0, "", ""
        self.asked = 0  # how often the program has asked where the cursor is

    def feed(self, text: str) -> None:
        """Draw `text`; a control sequence that is cut off waits for its rest."""
        text, self.rest, at = self.rest + text, "", 0
        while at < len(text):
            if text[at] != "\x1b":
                self._put(text[at])
                at += 1
            elif found := self.CONTROL.match(text, at):
                self._obey(*(group or "" for group in found.groups()))
                at = found.end()
            else:
                self.rest = text[at:]
                return

    def _put(self, letter: str) -> None:
        if letter == "\r":
            self.x = 0
        elif letter == "\n":
            self._down()
        elif letter == "\b":
            self.x = max(0, self.x - 1)
        elif letter >= " ":
            if self.x >= self.columns:
                self.x = 0
                self._down()
            self.cells[self.y][self.x] = (letter, self.looks)
            self.x += 1

    def _down(self, n: int = 1) -> None:
        self.y += n
        while len(self.cells) <= self.y:
            self.cells.append({})
        self.top = max(self.top, self.y - self.lines + 1)

    def _obey(self, private: str, numbers: str, kind: str) -> None:
        given = [int(n) if n else 0 for n in numbers.split(";")]
        n = max(1, given[0])
        if not kind:
            return
        if kind == "m":
            self.looks = "" if given == [0] else f"{self.looks}\x1b[{numbers}m"
        elif kind == "n" and not private and given[0] == 6:
            self.asked += 1
        elif kind == "A":
            self.y = max(self.top, self.y - n)
        elif kind == "B":
            self._down(n)
        elif kind in "CD":
            self.x = max(0, min(self.columns - 1, self.x + (n if kind == "C" else -n)))
        elif kind == "G":
            self.x = n - 1
        elif kind in "Hf":
            self.y, self.x = self.top, max(1, (given[1:] or [1])[0]) - 1
            self._down(n - 1)
        elif kind in "JK":
            self._erase(given[0], below=kind == "J")

    def _erase(self, what: int, *, below: bool) -> None:
        """What: 0 from the cursor on, 1 up to the cursor, 2 all; of the line, or of the screen."""
        row = self.cells[self.y]
        for x in [x for x in row if what == 2 or (x >= self.x if what == 0 else x <= self.x)]:
            del row[x]
        for y in range(self.top if what else self.y + 1, len(self.cells)) if below else ():
            if what == 2 or (y > self.y) == (what == 0):
                self.cells[y].clear()

    def ansi(self) -> list[str]:
        """Each line that holds something, with its looks as SGR codes; empty ones at the end go."""
        lines = []
        for row in self.cells:
            line, before = "", ""
            for x in range(max(row, default=-1) + 1):
                letter, looks = row.get(x, (" ", ""))
                line += (f"\x1b[0m{looks}" if looks != before else "") + letter
                before = looks
            lines.append(line + "\x1b[0m" * bool(before))
        while lines and not re.sub(r"\x1b\[[\d;]*m", "", lines[-1]).strip():
            lines.pop()
        return lines

    def text(self) -> list[str]:
        return [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in self.ansi()]


class Session:
    """A program in a pseudo-terminal, and what its screen shows."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.screen = Screen(COLUMNS, LINES)
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        env = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=slave, stdout=slave, stderr=slave, close_fds=True
        )
        os.close(slave)

    def wait(self, holds: Callable[[Screen], bool]) -> None:
        """Read until the screen shows what is waited for and the program is quiet."""
        end, answered = time.monotonic() + PATIENCE, self.screen.asked
        while time.monotonic() < end:
            if select.select([self.master], [], [], 0.5)[0]:
                self.screen.feed(os.read(self.master, 65536).decode("utf-8", "replace"))
                if self.screen.asked > answered:
                    answered = self.screen.asked
                    row, column = self.screen.y - self.screen.top + 1, self.screen.x + 1
                    os.write(self.master, f"\x1b[{row};{column}R".encode())
            elif holds(self.screen):
                return
        raise UserError("The chat did not answer:\n" + "\n".join(self.screen.text()))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.master)


def is_prompt(screen: Screen) -> bool:
    """Whether the cursor stands behind an empty prompt."""
    row = screen.cells[screen.y]
    line = "".join(row.get(x, (" ", ""))[0] for x in range(max(row, default=-1) + 1))
    return line.strip() == ">"


def draw_terminal(run: Path) -> Iterator[Picture]:
    """A chat in the terminal, as the person sees it after the last answer."""
    with aside(run) as (folder, words):
        session = Session([sys.executable, str(ROOT / "chat_inference.py"), *words], folder)
        try:
            session.wait(is_prompt)
            for line in IN_TERMINAL:
                session.type(line + "\r")
                session.wait(is_prompt)
        finally:
            session.end()
    lines = session.screen.ansi()
    while lines and not session.screen.text()[len(lines) - 1].startswith(">"):
        lines.pop()  # the status below the last prompt
    svg = to_svg([f"\x1b[2m$ uv run chat_inference.py {' '.join(words)}\x1b[0m", *lines[:-1]])
    yield "terminal.svg", svg.encode(), "A chat in a terminal: " + " | ".join(IN_TERMINAL)


SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>
.{unique_id}-matrix {{
font: {char_height}px/{line_height}px ui-monospace, Menlo, Consolas, monospace; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>{lines}</defs>
{chrome}<g transform="translate({terminal_x}, {terminal_y})"
clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def to_svg(lines: list[str]) -> str:
    """Lines with SGR codes as a picture of a terminal; it loads no font."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    return console.export_svg(title="Hearth", code_format=SVG, unique_id="t")


# ----------------------------------------------------------------------------------------- the page


def draw_page(run: Path) -> Iterator[Picture]:
    """The chat page: light with a token's probability under the mouse, dark with all tokens."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise UserError("No Chromium here. On Debian: apt-get install chromium.")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with aside(run) as (folder, words), serving(folder, words) as url, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=flags)
        for scheme, show in (("light", show_hover), ("dark", show_tokens)):
            context = browser.new_context(
                color_scheme=scheme, viewport=PAGE_SIZE, device_scale_factor=1.5
            )
            tab = context.new_page()
            tab.goto(url)
            until(tab, "models.length > 0")
            shown = show(tab)
            yield f"page-{scheme}.png", smaller(tab.screenshot()), shown
            context.close()
        browser.close()


@contextlib.contextmanager
def serving(folder: Path, words: list[str]) -> Iterator[str]:
    """The address of a server of the run."""
    command = [sys.executable, str(ROOT / "serve_chat.py"), *words, "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            if (found := re.search(r"http://\S+", line)) is None:
                raise UserError(f"The server did not start: {line}")
            yield found[0]
        finally:
            server.terminate()


def until(tab: Any, expression: str) -> None:
    """Wait for it; playwright's own way needs an `eval` that the page's policy forbids."""
    end = time.monotonic() + PATIENCE
    while not tab.evaluate(expression):
        if time.monotonic() > end:
            raise UserError(f"The page did not come to: {expression}")
        time.sleep(0.05)


def ask(tab: Any, question: str, *, effort: str = "") -> None:
    """Ask on the page and wait for the whole answer; effort: of the reasoning."""
    tab.click("#settings")
    tab.select_option("#effort", effort)
    tab.click("text=Done")
    tab.fill("#text", question)
    tab.press("#text", "Enter")
    until(tab, "!running && document.querySelector('.answer')")


def conversation(tab: Any) -> str:
    """What the page shows of the questions and the answers, in words."""
    said = tab.locator(".user > .body, .answer > .body").all_inner_texts()
    return " | ".join(text.strip() for text in said)


# where the least likely token of the latest answer stands
DOUBT = """() => {
const view = [...shown.values()].at(-1)[0], tokens = tokensOf.get(view.said).content;
const least = tokens.reduce((a, b) => b[1] < a[1] ? b : a), at = tokens.indexOf(least);
const walker = document.createTreeWalker(view.body, NodeFilter.SHOW_TEXT), range = new Range();
let from = tokens.slice(0, at).reduce((sum, token) => sum + token[0].length, 0);
while (walker.nextNode() && walker.currentNode.length <= from) from -= walker.currentNode.length;
range.setStart(walker.currentNode, from);
range.setEnd(walker.currentNode, from + 1);
const box = range.getBoundingClientRect();
return [box.x + box.width / 2, box.y + box.height / 2];
}"""


def show_hover(tab: Any) -> str:
    """An answer with its reasoning, and one to a question that the model does not know, the mouse
    over the token that it doubted most.
    """
    ask(tab, "Which is larger, 38 or 83?", effort="low")
    ask(tab, "Spell apple.")
    tab.locator("summary").first.click()
    tab.mouse.move(*tab.evaluate(DOUBT))
    tab.wait_for_selector("#tip:not([hidden])")
    under = " ".join(tab.locator("#tip").inner_text().split())
    return f"{conversation(tab)} | Under the mouse: {under}."


def show_tokens(tab: Any) -> str:
    """A question that the model knows and one that it does not, every token of both marked."""
    ask(tab, "Who owns the hammer?")
    ask(tab, "Spell apple.")
    for button in tab.get_by_role("button", name="Show each token and its probability").all():
        button.click()
    return f"{conversation(tab)} | Each token apart, the less likely the darker."


def smaller(png: bytes) -> bytes:
    """The picture in 128 colours."""
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(out, "PNG", optimize=True)
    return out.getvalue()


# ---------------------------------------------------------------------------------------- curves


def draw_loss(run: Path) -> Iterator[Picture]:
    """Pretraining's loss and held-out figure over the tokens seen, as the report draws them."""
    trace = report.Trace(run / "base")
    charts = report.learning_charts(trace, report.x_axes(trace)[0])[:2]
    yield "loss.svg", beside(charts).encode(), " ".join(map(page.describe, charts))


def draw_practice(run: Path) -> Iterator[Picture]:
    """Right answers to held-out problems over the minutes of practice with rewards; nothing where
    the run has no such stage.
    """
    if not (run / "rl" / "metrics.jsonl").is_file():
        return
    trace = report.Trace(run / "rl")
    minutes = report.x_axes(trace, short=True)[1]
    looked = trace.column("step", "eval")
    at = report.np.interp(looked, trace.column("step"), minutes.at, left=0.0)
    series = tuple(
        report.marked(name.removeprefix("pass@1 "), at, trace.column(name, "eval"))
        for name in report.figure_names(trace, "eval")
        if name.startswith("pass@1 ")
    )
    chart = page.Chart("pass@1 on held-out problems", series, "minutes", "share", from_zero=True)
    yield "practice.svg", beside([chart]).encode(), page.describe(chart)


def beside(charts: list[Any]) -> str:
    """Charts side by side in one file, in the report's colours for light and for dark."""
    css = page.STYLE.read_text(encoding="utf-8")
    light, dark = re.findall(r"--page:[^}]*", css)[:2]
    width, height, gap = 360, 252, 12
    drawn = []
    for n, chart in enumerate(charts):
        x, svg = gap + n * (width + gap), page.draw(chart)
        for name in set(re.findall(r' id="([^"]*)"', svg)):  # of groups: every figure has the same
            svg = svg if f"#{name}" in svg else svg.replace(f' id="{name}"', "")
        drawn.append(
            f'<text x="{x}" y="{gap + 12}" class="title">{chart.title}</text>'
            f'<svg x="{x}" y="{gap + 20}" width="{width}" height="{height - 22}" '
            f"{svg}"
        )
    whole = len(charts) * (width + gap) + gap
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {whole} {height + gap}">\n<title>{" ".join(map(page.describe, charts))}'
        f"</title>\n<style>svg {{ {light} font-family: system-ui, sans-serif; }}\n"
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}\n"
        ".title { font-size: 13px; font-weight: 600; fill: var(--ink); }</style>\n"
        f'<rect width="{whole}" height="{height + gap}" rx="8" style="fill: var(--card)"/>\n'
        f"{''.join(drawn)}</svg>\n"
    )


PICTURES: dict[str, Callable[[Path], Iterator[Picture]]] = {
    "terminal": draw_terminal,
    "page": draw_page,
    "loss": draw_loss,
    "practice": draw_practice,
}


if __name__ == "__main__":
    run_script(main, "stopped.")

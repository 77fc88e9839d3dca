"""What a chat looks like: text made harmless, answers drawn as they come, lines typed by a person.

In: pieces of an answer. Out: the terminal, or a pipe. Knows nothing of models and tokens.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from hearth.serving.marks import ARROW, mark

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
JOINERS = "\u200c\u200d"  # invisible, but emoji and several scripts need them
NO_ANSWER = "(no answer)"
FILE_COMMANDS = ("/save", "/load", "/compare")  # what follows them is a path
REFRESH_SECONDS = 0.04  # between two drawings of the block that is being written


def neutral(text: str) -> str:
    """`text` without anything that a terminal obeys or that makes it lie: escapes, other control
    characters, changes of writing direction and half surrogates become U+FFFD; line ends and tabs
    stay, carriage returns go.
    """
    return "".join(letter for letter in map(_neutral_letter, text) if letter)


def _neutral_letter(letter: str) -> str:
    if (
        letter.isprintable()
        or letter in "\n\t"
        or letter in JOINERS
        or unicodedata.category(letter) == "Zs"
    ):
        return letter
    return "" if letter == "\r" else UNKNOWN


def say(text: str, indent: int = 0) -> None:
    """Print text of the program's own, made harmless; on a terminal its lines break between words,
    and those that go on are indented. What must be copied whole, such as a path, is not broken.
    """
    for line in neutral(text).splitlines() or [""]:
        if sys.stdout.isatty():
            width = max(20, shutil.get_terminal_size().columns)
            inner = " " * min(indent, width // 2)
            line = textwrap.fill(
                line,
                width,
                subsequent_indent=inner,
                break_long_words=False,
                break_on_hyphens=False,
                replace_whitespace=False,
                drop_whitespace=True,
            )
        print(line)


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of the parts, most important first, as a line of `width` holds."""
    line = ""
    for part in parts:
        longer = f"{line} · {part}" if line else part
        if len(longer) > width:
            break
        line = longer
    return line


class Screen(Protocol):
    """Where an answer appears, piece by piece, each its kind (thinking, content, or a tool's call
    with its result) and its text. An answer without content shows the thinking that was hidden, and
    that it has none.
    """

    def add(self, kind: str, text: str) -> None: ...

    def end(self, *, whole: bool) -> None: ...


def new_screen(*, thoughts: bool) -> Screen:
    """The best that standard output can do."""
    if not sys.stdout.isatty() or is_dumb():
        return PlainScreen(sys.stdout, thoughts=thoughts)
    from rich.console import Console

    return RichScreen(Console(highlight=False), thoughts=thoughts)


def show(pieces: Iterable[tuple[str, str]], screen: Screen) -> None:
    """Draw an answer as it comes; whatever ends it, what was said stays on the screen."""
    whole = False
    try:
        for kind, text in with_results(pieces):
            screen.add(kind, text)
        whole = True
    finally:
        screen.end(whole=whole)


def with_results(pieces: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The pieces, a call and the result that follows it as one."""
    call = None
    try:
        for kind, text in pieces:
            if call is not None:
                yield "call", f"{call}{ARROW}{text}" if kind == "result" else call
            call = text if kind == "call" else None
            if kind not in ("call", "result"):
                yield kind, text
    except (Exception, KeyboardInterrupt):
        if call is not None:
            yield "call", call
        raise
    if call is not None:
        yield "call", call


class PlainScreen:
    """An answer as plain text, for pipes and for terminals that can only print; `thoughts` shows
    the thinking too, and calls of tools, marked.
    """

    def __init__(self, out: TextIO, *, thoughts: bool) -> None:
        self._out, self._thoughts, self._was_thinking, self._last = out, thoughts, False, ""
        self._hidden, self._said = "", False

    def add(self, kind: str, text: str) -> None:
        text, thinking = neutral(text), kind == "thinking"
        self._said |= kind == "content" and bool(text.strip())
        if kind == "call":
            text = mark(text, None) if self._thoughts else ""
        if thinking and not self._thoughts:
            self._hidden += text
        elif text:
            self._write(thinking, text)

    def _write(self, thinking: bool, text: str) -> None:
        if thinking and not self._was_thinking:
            text = f"[thinking] {text}"
        elif self._was_thinking and not thinking:
            text = f"\n[answer] {text}"
        self._was_thinking, self._last = thinking, text
        print(text, end="", file=self._out, flush=True)

    def end(self, *, whole: bool) -> None:
        if not self._said and self._hidden:
            self._write(True, self._hidden)
        if not self._said and whole:
            self._write(False, NO_ANSWER)
        if not self._last.endswith("\n"):
            print(file=self._out, flush=True)


class RichScreen:
    """An answer on a terminal: the block being written as it comes, each complete one as Markdown;
    a tool's call and its result as a dim line.

    thoughts: show the thinking, dimmed, or fold it into one line once the answer begins.
    """

    def __init__(self, console: Any, *, thoughts: bool) -> None:
        from rich.live import Live

        self._console, self._thoughts = console, thoughts
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._thought, self._block, self._said = "", "", False
        self._drawn = 0.0
        self._live.start()

    def add(self, kind: str, text: str) -> None:
        if kind == "thinking":
            self._thought += neutral(text)
        elif kind == "call":
            self._add_call(neutral(text))
        else:
            self._block += neutral(text)
            if self._block.strip():
                self._said = True
                self._end_thinking(folded=not self._thoughts)
            while (end := block_end(self._block)) is not None:
                self._print(markdown(self._block[:end]))
                self._block = self._block[end:]
        if time.monotonic() - self._drawn > REFRESH_SECONDS:
            self._draw()

    def end(self, *, whole: bool) -> None:
        """Leave the whole answer on the screen."""
        self._end_thinking(folded=False)
        if self._block.strip():
            self._print(markdown(self._block))
        elif whole and not self._said:
            self._print(NO_ANSWER)
        self._live.update("")
        self._live.stop()

    def _add_call(self, text: str) -> None:
        from rich.text import Text

        self._end_thinking(folded=not self._thoughts)
        if self._block.strip():
            self._print(markdown(self._block))
        self._block = ""
        self._print(Text(text, style="dim"))

    def _print(self, block: Any) -> None:
        self._live.update("")
        self._console.print(block)
        self._console.print()

    def _draw(self) -> None:
        from rich.text import Text

        style = "dim" if self._thought else ""
        if self._thought and not self._thoughts:
            text = Text(f"thinking … {len(self._thought.split())} words", style=style)
        else:
            text = Text(self._thought or self._block, style=style)
        # a live region taller than the screen cannot be taken back: show its end
        lines = text.wrap(self._console, max(1, self._console.width))[
            -max(1, self._console.height - 3) :
        ]
        self._live.update(Text("\n").join(lines), refresh=True)
        self._drawn = time.monotonic()

    def _end_thinking(self, *, folded: bool) -> None:
        from rich.text import Text

        if words := len(self._thought.split()):
            fold = f"thought for {words} words (/think show unfolds it)"
            self._print(Text(fold if folded else self._thought.strip(), style="dim"))
        self._thought = ""


def block_end(text: str) -> int | None:
    """Where the first complete block of Markdown ends: behind a blank line, or behind the fence
    that closes code.
    """
    fence, at, begun = "", 0, False
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            return None
        at += len(line)
        bare = line.strip()
        if fence:
            if bare and set(bare) == {fence[0]} and len(bare) >= len(fence):
                return at
        elif bare.startswith(("```", "~~~")):
            if begun:
                return at - len(line)  # code begins a block of its own
            fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
        elif not bare and begun:
            return at
        begun = begun or bool(bare)
    return None


def markdown(text: str) -> Any:
    """`text` as Markdown that hides nothing: HTML stays text, links show where they lead, line ends
    are kept.
    """
    from markdown_it import MarkdownIt
    from rich.markdown import Markdown

    drawn = Markdown("", hyperlinks=False)
    drawn.parsed = (
        MarkdownIt("commonmark", {"html": False})
        .enable(["strikethrough", "table"])
        .parse(text.rstrip())
    )
    for token in drawn.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return Trimmed(drawn)


class Trimmed:
    """Something to draw, without the blank lines and the spaces at line ends that rich puts around
    it.
    """

    def __init__(self, drawn: Any) -> None:
        self._drawn = drawn

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.segment import Segment

        def without_padding(line: list[Any]) -> list[Any]:
            while line and not (line[-1].style and line[-1].style.bgcolor):
                text, style, control = line[-1]
                if text.rstrip():
                    return [*line[:-1], Segment(text.rstrip(), style, control)]
                line = line[:-1]
            return line

        lines = [
            without_padding(line) for line in console.render_lines(self._drawn, options, pad=False)
        ]
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        for line in lines:
            yield from line
            yield Segment.line()


def is_dumb() -> bool:
    return os.environ.get("TERM", "") in ("", "dumb", "unknown")


class Keyboard:
    """Lines typed by a person: with history, several lines, completion and Ctrl-Z where the
    terminal can.
    """

    def __init__(
        self, commands: Sequence[str], history: Path | None, status: Callable[[], Sequence[str]]
    ) -> None:
        self._session = None if is_dumb() else prompt_session(commands, history, status)

    def read(self) -> str:
        """What was typed; EOFError where the person is done, KeyboardInterrupt on Ctrl-C."""
        if self._session is not None:
            return self._session.prompt()
        line = input("> ")
        while line.endswith("\\"):  # continued in the next line
            line = line[:-1] + "\n" + input(". ")
        return line


def prompt_session(
    commands: Sequence[str], history: Path | None, status: Callable[[], Sequence[str]]
) -> Any:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion, PathCompleter, WordCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.keys import Keys
    from prompt_toolkit.styles import Style

    class TolerantHistory(FileHistory):
        """A history that half a surrogate or a full disk cannot break."""

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string.encode("utf-8", "replace").decode())

    words, paths = WordCompleter(list(commands), sentence=True), PathCompleter(expanduser=True)

    class CommandCompleter(Completer):
        """Commands, and the paths that some of them take."""

        def get_completions(self, document: Document, event: Any) -> Iterable[Completion]:
            name, space, path = document.text_before_cursor.partition(" ")
            if space and name in FILE_COMMANDS:
                return paths.get_completions(Document(path), event)
            return words.get_completions(document, event)

    def ignore(event: KeyPressEvent) -> None:
        """An escape before a key that then means nothing; the rest of an unknown sequence goes too.
        Keys that are more than a character keep their meaning.
        """
        key, queue = event.key_sequence[-1], event.key_processor.input_queue
        if isinstance(key.key, Keys):
            event.key_processor.feed(key, first=True)
        elif key.key in "[O":
            while queue and not "@" <= queue.popleft().data <= "~":
                pass

    keys = KeyBindings()
    keys.add("escape", "<any>")(ignore)
    # colours that were pasted look like a mouse that was never asked for
    keys.add(Keys.Vt100MouseEvent)(lambda event: None)
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return PromptSession(
        "> ",
        multiline=True,
        prompt_continuation=lambda width, line_number, is_soft_wrap: ". ".rjust(width),
        key_bindings=keys,
        history=TolerantHistory(str(history))
        if history and os.access(history.parent, os.W_OK)
        else InMemoryHistory(),
        completer=CommandCompleter(),
        complete_while_typing=False,
        enable_suspend=True,
        bottom_toolbar=lambda: fitting(status(), shutil.get_terminal_size().columns),
        style=Style.from_dict({"bottom-toolbar": "noreverse ansibrightblack"}),
    )


def lines_of(stream: TextIO | None) -> list[str]:
    """The lines of a pipe that hold something; bytes that are no UTF-8 become U+FFFD."""
    if stream is None:
        return []
    data = (
        stream.buffer.read()
        if hasattr(stream, "buffer")
        else stream.read().encode("utf-8", "replace")
    )
    return [line.strip() for line in data.decode("utf-8", "replace").split("\n") if line.strip()]

"""The terminal: nothing a model or a user writes takes it over, nothing that was said is lost."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import Application, create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from hearth.serving.terminal import (
    Keyboard,
    PlainScreen,
    RichScreen,
    block_end,
    fitting,
    lines_of,
    markdown,
    neutral,
    prompt_session,
    say,
    show,
)

HOSTILE = (
    "\x1b[2J\x1b[H",  # clears the screen
    "\x1b]0;title\x07",  # renames the window
    "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",  # a link that hides where it leads
    "\x9b31m",  # the one-byte form of escape [
    "over\rwritten\x08\x08",
    "\u202egnp.exe",  # writes from right to left
    "\x00\x7f\ud83c\U000e0041",  # NUL, DEL, half a surrogate pair, an invisible tag
)
HARMLESS = "tabs\tand\nlines, é 中文 👩‍👩‍👧 عربي می‌خواهم\u3000wide\u00a0space"


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_obeys_becomes_a_mark(text: str) -> None:
    shown = neutral(f"a{text}b")
    assert all(letter.isprintable() or letter in "\n\t" for letter in shown)
    assert shown[0] + shown[-1] == "ab"
    shown.encode("utf-8")


def test_ordinary_text_of_any_script_stays_as_it_is() -> None:
    assert neutral(HARMLESS) == HARMLESS
    assert neutral("a\r\nb") == "a\nb"


def rich_output(
    pieces: list[tuple[str, str]],
    *,
    thoughts: bool = True,
    whole: bool = True,
    width: int = 60,
    **settings,
) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=width, height=20, force_terminal=True, color_system="standard", **settings
    )
    screen = RichScreen(console, thoughts=thoughts)
    for kind, text in pieces:
        screen.add(kind, text)
    screen.end(whole=whole)
    return file.getvalue()


def visible(output: str) -> str:
    """What stands on a terminal in the end, by a small model of one: cursor up, carriage return,
    erase, line feed.
    """
    lines, row, column, at = [""], 0, 0, 0
    while at < len(output):
        if output.startswith("\x1b[", at):
            end = next(i for i in range(at + 2, len(output)) if output[i].isalpha())
            number, kind = output[at + 2 : end], output[end]
            if kind == "A":
                row = max(0, row - int(number or 1))
            elif kind == "K":
                lines[row] = ""
            else:
                assert kind in "mhl", f"unexpected sequence {output[at : end + 1]!r}"
            at = end + 1
            continue
        letter = output[at]
        at += 1
        if letter == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        elif letter == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1
    return "\n".join(line.rstrip() for line in lines)


@pytest.mark.parametrize("text", HOSTILE)
def test_an_answer_cannot_send_sequences_of_its_own(text: str) -> None:
    out = io.StringIO()
    plain = PlainScreen(out, thoughts=True)
    for kind in ("thinking", "content", "call"):
        plain.add(kind, text)
    plain.end(whole=True)
    assert not set(out.getvalue()) & set("\x1b\x9b\r\x07\x08\x00\u202e")
    # colours and lines only
    visible(
        rich_output([("thinking", text), ("content", f"{text}\n\n`{text}`\n\n```\n{text}\n```\n")])
    )
    assert "]8;" not in rich_output([("content", "[here](http://evil.example)")])


def test_an_answer_is_whole_however_it_is_cut_into_pieces() -> None:
    answer = "One line\nand another.\n\n- **bold** item\n- `x < y` <b>\n\n"
    answer += "```python\nx = 1\n\ny = 2\n```\nEnd [a](http://b.c) \\"
    whole = visible(rich_output([("content", answer)])).strip()
    for expected in (
        "One line\nand another.",
        "• bold item",
        "x < y <b>",
        "x = 1",
        "y = 2",
        "End a (http://b.c)",
    ):
        assert expected in "\n".join(line.strip() for line in whole.splitlines())
    rng = random.Random(0)
    for _ in range(10):
        cuts = sorted(rng.choices(range(len(answer)), k=rng.randrange(1, 60)))
        pieces = [
            ("content", answer[a:b]) for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)
        ]
        assert visible(rich_output(pieces)).strip() == whole


@pytest.mark.parametrize("width", [1, 4, 15])
def test_a_narrow_screen_breaks_nothing(width: int) -> None:
    pieces = [
        ("thinking", "thinking hard"),
        ("content", "word " * 50),
        ("content", "\n\n```\ncode\n```"),
    ]
    shown = visible(rich_output(pieces, width=width))
    assert "".join(shown.split()).count("word") == 50


def test_an_answer_longer_than_the_screen_stays_whole() -> None:
    lines = [f"line {n}" for n in range(200)]
    shown = visible(rich_output([("content", line + "\n") for line in lines]))
    assert [line for line in shown.splitlines() if line.strip()] == lines


def test_thinking_is_dimmed_or_folded_into_a_line() -> None:
    pieces = [
        ("thinking", "first 2 + 7 = 9"),
        ("thinking", " then 19"),
        ("content", "The answer is 19."),
    ]
    shown, folded = rich_output(pieces), rich_output(pieces, thoughts=False)
    assert "\x1b[2mfirst 2 + 7 = 9 then 19\x1b[0m" in shown
    assert "then 19" not in folded
    assert "thought for 8 words" in visible(folded)
    assert all("The answer is 19." in visible(output) for output in (shown, folded))


CALLED = [
    ("content", "It is"),
    ("call", "calculate 12*7"),
    ("result", "84"),
    ("content", " cats."),
    ("call", "search x"),
]


def test_a_call_and_its_result_are_one_dim_line() -> None:
    file = io.StringIO()
    console = Console(file=file, width=60, height=20, force_terminal=True, color_system="standard")
    show(CALLED, RichScreen(console, thoughts=True))
    assert "\x1b[2mcalculate 12*7 → 84\x1b[0m" in file.getvalue()
    lines = [line.strip() for line in visible(file.getvalue()).splitlines() if line.strip()]
    assert lines == ["It is", "calculate 12*7 → 84", "cats.", "search x"]


def test_plain_text_marks_calls_or_leaves_them_out() -> None:
    for thoughts, expected in (
        (True, "It is⟦calculate 12*7 → 84⟧ cats.⟦search x⟧\n"),
        (False, "It is cats.\n"),
    ):
        out = io.StringIO()
        show(CALLED, PlainScreen(out, thoughts=thoughts))
        assert out.getvalue() == expected


def test_plain_text_marks_thinking_or_leaves_it_out() -> None:
    for thoughts, expected in ((True, "[thinking] hm\n[answer] yes\n"), (False, "yes\n")):
        out = io.StringIO()
        screen = PlainScreen(out, thoughts=thoughts)
        for kind, text in (
            ("thinking", "h"),
            ("thinking", "m"),
            ("content", "y"),
            ("content", "es"),
        ):
            screen.add(kind, text)
        screen.end(whole=True)
        assert out.getvalue() == expected


@pytest.mark.parametrize(
    "pieces", [[], [("content", "")], [("content", " \n\n \n"), ("content", "\n")]]
)
def test_an_empty_answer_says_so_unless_it_was_broken_off(pieces: list[tuple[str, str]]) -> None:
    out = io.StringIO()
    show(pieces, PlainScreen(out, thoughts=True))
    assert out.getvalue().strip() == "(no answer)"
    assert visible(rich_output(pieces)).strip() == "(no answer)"
    assert visible(rich_output(pieces, whole=False)).strip() == ""


def test_folded_thinking_unfolds_where_there_is_nothing_else() -> None:
    pieces = [("thinking", "first 2 + 7"), ("thinking", " then 19"), ("content", "\n")]
    shown = visible(rich_output(pieces, thoughts=False))
    assert shown.split("\n\n")[:2] == ["first 2 + 7 then 19", "(no answer)"]
    assert "first 2 + 7 then 19" in visible(rich_output(pieces, thoughts=False, whole=False))
    out = io.StringIO()
    show(pieces, PlainScreen(out, thoughts=False))
    assert "[thinking] first 2 + 7 then 19\n[answer] (no answer)\n" in out.getvalue()


def test_what_was_said_stays_when_an_answer_is_broken_off() -> None:
    def pieces() -> Iterator[tuple[str, str]]:
        yield "content", "the cat"
        yield "call", "calculate 1+1"
        raise KeyboardInterrupt

    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        show(pieces(), PlainScreen(out, thoughts=True))
    assert out.getvalue() == "the cat⟦calculate 1+1⟧\n"


def test_without_colour_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    output = rich_output([("thinking", "hm"), ("content", "**b** `c`\n\n```python\nx = 1\n```\n")])
    colours = {str(n) for n in (*range(30, 50), *range(90, 108))} - {"39", "49"}
    sequences = [part.split("m")[0] for part in output.split("\x1b[")[1:]]
    assert not colours & {code for sequence in sequences for code in sequence.split(";")}


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a line", None),
        ("a line\n", None),
        ("a line\n\n", "a line\n\n"),
        ("\n\nlate\n\nnext", "\n\nlate\n\n"),
        ("```\ncode\n\nmore\n```\nafter", "```\ncode\n\nmore\n```\n"),
        ("```\ncode\n\n", None),
        ("~~~~\n```\n~~~~\n", "~~~~\n```\n~~~~\n"),
        ("text\n```\ncode", "text\n"),
        ("", None),
    ],
)
def test_blocks_end_at_blank_lines_and_closing_fences(text: str, first: str | None) -> None:
    assert block_end(text) == (None if first is None else len(first))


def test_markdown_hides_nothing() -> None:
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(
            markdown(
                "a <script>x</script> & <!-- comment --> b\nsecond line\n\n![alt](http://x.y/z.png)"
            )
        )
    shown = capture.get()
    assert "<script>x</script> & <!-- comment --> b\nsecond line" in shown


def test_its_own_words_break_between_words_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    text = "  /think    on, off: ask for reasoning or not; see /a/rather/long/path/that/is/copied"
    say(text)
    assert capsys.readouterr().out == text + "\n"  # a pipe gets lines as they are
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    say(text, 13)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(line.strip() for line in lines) == text.strip()
    assert lines[0].startswith("  /think    on")
    assert all(
        line.startswith(" " * 13) and (len(line) <= 30 or "/a/rather" in line) for line in lines[1:]
    )


def test_a_narrow_status_line_leaves_out_what_matters_least() -> None:
    parts = ["400 tok/s", "context 30/512", "sft2"]
    assert fitting(parts, 80) == "400 tok/s · context 30/512 · sft2"
    assert fitting(parts, 30) == "400 tok/s · context 30/512"
    assert fitting(parts, 3) == ""


def test_lines_of_a_pipe_survive_any_bytes() -> None:
    stream = io.TextIOWrapper(io.BytesIO(b" one \n\n\xff\xfetwo\x00\r\n" + b"x" * 10**6))
    assert lines_of(stream) == ["one", "\ufffd\ufffdtwo\x00", "x" * 10**6]
    assert lines_of(None) == []
    assert lines_of(io.StringIO("a\ud800b\n")) == ["a?b"]


# ------------------------------------------------------------------------------------- the keyboard


def typed(keys: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the prompt gives for these keys and Enter; raises what a key did."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(  # instead of drawing it and waiting for Enter
        Application,
        "_handle_exception",
        lambda app, loop, context: app.exit(exception=context["exception"]),
    )
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        keyboard = Keyboard(["/help"], None, lambda: ["status"])
        pipe.send_text(f"{keys}\r")
        return keyboard.read()


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("ab\x1b[31mcd", "abcd"),  # a colour
        ("ab\x1b[1Mcd", "abcd"),
        ("ab\x1b[<0;1Mcd", "abcd"),
        ("ab\x1b[M/!!cd", "abcd"),
        ("ab\x1b[99~cd", "abcd"),  # a sequence that nobody knows
        ("ab\x1bOzcd", "abcd"),
        ("ab\x1bzcd", "abcd"),  # Alt-z
        ("ab\x1b\x1bzcd", "abcd"),
        ("ab\x1b\x7fcd", "cd"),  # Alt-Backspace has a meaning
        ("ab\x1b\rcd", "ab\ncd"),  # Alt-Enter has one too
        ("ab\x1b\x1b[Dcd", "cdab"),  # so has Alt-Left
        ("ab\x1b\x01cd", "cdab"),  # Ctrl-A keeps its own
        ("ab\x1b\x1b[200~paste\x1b[201~", "abpaste"),
    ],
)
def test_an_escape_that_means_nothing_is_ignored(
    keys: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed(keys, monkeypatch) == line


def test_commands_and_the_paths_behind_them_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    (tmp_path / "conversation.json").touch()
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        completer = prompt_session(["/help", "/save", "/seed"], None, list).completer
    begun = f"{tmp_path}/conv"
    for typed, rest in (("/he", ["/help"]), (f"/save {begun}", ["ersation.json"])):
        found = completer.get_completions(Document(typed), CompleteEvent())
        assert [completion.text for completion in found] == rest
    assert not [*completer.get_completions(Document(f"/seed {begun}"), CompleteEvent())]


def test_ctrl_z_suspends_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    suspended = []
    monkeypatch.setattr(Application, "suspend_to_background", lambda *a: suspended.append("Ctrl-Z"))
    assert typed("ab\x1acd", monkeypatch) == "abcd"
    assert suspended == ["Ctrl-Z"]

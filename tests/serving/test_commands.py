"""The chat of a person: every command, and an answer in words to every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chats import new_chat, script

from hearth.serving.commands import Terminal
from hearth.serving.conversation import Chat


@pytest.fixture
def terminal(chat: Chat, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "dumb")
    return Terminal(chat, lambda name: new_chat(checkpoints / name), None)


def type_in(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys, *lines: str) -> str:
    """What a person sees who types these lines and then Ctrl-D."""
    typed = iter(lines)

    def read(prompt: str = "") -> str:
        for line in typed:
            if line == "^C":
                raise KeyboardInterrupt
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    terminal.run()
    return capsys.readouterr().out


def test_a_whole_conversation_in_the_terminal(
    terminal: Terminal, monkeypatch, capsys, tmp_path: Path
) -> None:
    script(terminal.chat, (None, "the cat"), (None, "a mat"), ("so", "19"))
    file = tmp_path / "chat.json"
    lines = ["one", "", "^C", "/system sat on", "two \\", "lines", "/think on", "/regen"]
    lines += [f"/save {file}", "/undo", "/stats", f"/load {file}", "/quit", "never read"]
    out = type_in(terminal, monkeypatch, capsys, *lines)
    for expected in (
        "the cat",
        "a mat",
        "Ctrl-D ends",
        "[thinking] so\n[answer] 19",
        "taken back: two",
        "saved 6",
    ):
        assert expected in out
    assert [m["content"] for m in terminal.chat.messages()] == [
        "one",
        "the cat",
        "two \nlines",
        "19",
    ]
    assert (terminal.chat.system, terminal.chat.think) == ("sat on", True)
    saved = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in saved] == [
        "system",
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/nonsense", "no command /nonsense; /help lists them"),
        ("/sytem be kind", "no command /sytem; did you mean /system?"),
        ("/top_p 1", "did you mean /top-p?"),
        ("/", "no command /"),
        ("/\x1b[2J", "no command"),
        ("/temp warm", "'warm' is no number"),
        ("/temp -1", "temperature is -1"),
        ("/temp nan", "temperature is nan"),
        ("/top-p 2", "top_p is 2"),
        ("/temp none", "'none' is no number"),
        ("/top-k 0", "top_k is 0"),
        ("/top-k 1.5", "no whole number"),
        ("/seed -1", "seed is -1"),
        ("/seed 99999999999999999999999", "seed is 9999"),
        ("/seed " + "9" * 5000, "no whole number"),
        ("/cycles 1.5", "no whole number"),
        ("/cycles early x", "no number"),
        ("/cycles early -1", "at least 0"),
        ("/cycles 0", "0 cycles"),
        ("/cycles 99999999999", "cycles; give"),
        ("/think perhaps", "no whole number"),
        ("/think -3", "negative"),
        ("/save", "a file is missing"),
        ("/save /", "exists"),
        ("/save /no/such/folder/x.json", "cannot be written"),
        ("/save a\x00b", "a file is missing"),
        ("/load", "a file is missing"),
        ("/load /no/such/file", "cannot be read"),
        ("/load /", "cannot be read"),
        (f"/load {__file__}", "holds no conversation"),
        ("/compare", "a file is missing"),
        ("/compare /no/such/folder", "There is no question"),
        ("/regen", "There is no question"),
    ],
)
def test_a_command_that_cannot_be_obeyed_is_answered_in_words(
    terminal: Terminal, monkeypatch, capsys, line: str, complaint: str
) -> None:
    out = type_in(terminal, monkeypatch, capsys, line)
    assert "error: " in out
    assert complaint in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "3",
        "null",
        '{"messages": 3}',
        '[{"role": "boss"}]',
        '[["role", "user"]]',
        "[" * 100_000,
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(
    terminal: Terminal, monkeypatch, capsys, tmp_path: Path, content: str
) -> None:
    script(terminal.chat, (None, "the cat"))
    file = tmp_path / "odd.json"
    file.write_text(content)
    out = type_in(terminal, monkeypatch, capsys, "one", f"/load {file}")
    assert "holds no conversation" in out
    assert [m["content"] for m in terminal.chat.messages()] == ["one", "the cat"]


def test_the_head_is_set_and_seen(
    terminal: Terminal, monkeypatch, capsys, checkpoints: Path
) -> None:
    lines = [
        "/cycles 4",
        "/cycles early 1e9",
        "one",
        "/stats",
        f"/compare {checkpoints / 'sft1'}",
    ]
    out = type_in(terminal, monkeypatch, capsys, *lines)
    assert "cycles: 4, left early below 1e+09 nats" in out
    assert "trained with 1 cycle: with 4" in out
    assert "of 4 cycles per token" in out
    assert "cycles" in " ".join(terminal.chat.status())
    (other,) = terminal.others.values()  # answers with the same settings
    assert (other.engine.h_cycles, other.engine.exit_kl_threshold) == (4, 1e9)
    out = type_in(terminal, monkeypatch, capsys, "/cycles", "/cycles early none")
    assert "cycles: 1, as trained\n" in out


def test_every_command_shows_its_help(terminal: Terminal, monkeypatch, capsys) -> None:
    out = type_in(terminal, monkeypatch, capsys, "/help")
    wanted = [
        "clear",
        "compare",
        "cycles",
        "help",
        "load",
        "quit",
        "regen",
        "save",
        "seed",
        "stats",
        "system",
        "temp",
        "think",
        "top-k",
        "top-p",
    ]
    wanted.append("undo")
    assert sorted(terminal.commands) == wanted
    assert all(f"/{name} " in out for name in wanted)


def test_another_checkpoint_answers_the_question(
    terminal: Terminal, monkeypatch, capsys, checkpoints: Path
) -> None:
    script(terminal.chat, (None, "the cat"))
    # a folder, and a stage of this run
    lines = ["one", f"/compare {checkpoints / 'sft1'}", "/compare base"]
    out = type_in(terminal, monkeypatch, capsys, *lines)
    assert "Fine-tuning, stage 1" in out
    assert "Pretraining" in out
    assert [m["content"] for m in terminal.chat.messages()] == ["one", "the cat"]


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal: Terminal, monkeypatch, capsys) -> None:
    engine = script(terminal.chat, (None, "the cat sat"), (None, "yes"))
    stream = engine.stream

    def interrupted(prompt: list[int], **settings):
        said = stream(prompt)

        class Broken:
            reused, read, dropped, finish, n_cycles = 0, 0, 0, "", 0

            def __iter__(self):
                yield from said[:4]
                raise KeyboardInterrupt

        return Broken() if len(engine.prompts) == 1 else said

    engine.stream = interrupted
    out = type_in(terminal, monkeypatch, capsys, "one", "two")
    assert "(stopped)" in out
    assert "yes" in out
    assert len(terminal.chat.messages()) == 4


def test_drawing_is_set_and_shown(terminal: Terminal, monkeypatch, capsys) -> None:
    lines = ["/temp 0.5", "/top-k 7", "/top-p 0.9", "/seed 3", "/stats"]
    out = type_in(terminal, monkeypatch, capsys, *lines)
    config = terminal.chat.config
    assert (config.temperature, config.top_k, config.top_p, config.seed) == (0.5, 7, 0.9, 3)
    assert "temperature 0.5, top-k 7, top-p 0.9, seed 3" in out
    out = type_in(terminal, monkeypatch, capsys, "/top-k none", "/top-p none", "/seed none")
    assert "top-k: none\ntop-p: none\nseed: none" in out
    assert (terminal.chat.config.top_k, terminal.chat.config.seed) == (None, None)


def test_a_cleared_conversation_has_no_question(terminal: Terminal, monkeypatch, capsys) -> None:
    script(terminal.chat, (None, "the cat"))
    out = type_in(terminal, monkeypatch, capsys, "one", "/clear", "/regen", "/undo")
    assert "There is no question yet" in out
    assert "nothing to take back" in out


def test_an_empty_answer_is_shown_as_one(terminal: Terminal, monkeypatch, capsys) -> None:
    script(terminal.chat, (None, ""), ("12 + 7", ""))
    out = type_in(terminal, monkeypatch, capsys, "/think fold", "one", "two")
    assert out.count("(no answer)") == 2
    assert "[thinking] 12 + 7" in out


def test_a_missing_compiler_is_said_at_the_start_and_in_stats(
    terminal: Terminal, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("hearth.serving.conversation.compiler_missing", lambda: True)
    out = type_in(terminal, monkeypatch, capsys, "/undo", "/stats")
    assert out.count("apt install gcc") == 2

"""The chat as a program: the right checkpoint, honest answers in a pipe, no traceback for anything
a user can do.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from chats import CONFIG, new_chat, say, script, write_checkpoint, write_run

import chat_inference
from chat_inference import Options
from config import Config, UserError
from hearth.run import find_checkpoint
from hearth.serving.terminal import neutral
from hearth.training.checkpoint import load_for_inference

ROOT = Path(chat_inference.__file__).parent


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


# -------------------------------------------------------------------------------------- checkpoints


def test_the_newest_checkpoint_of_the_furthest_stage_is_taken(tmp_path: Path) -> None:
    config = replace(CONFIG, runs=str(tmp_path))
    with pytest.raises(UserError, match=r"no run .*run_pipeline.py --preset demo"):
        find_checkpoint(None, config)
    for stage, step in (("base", 900), ("sft1", 20), ("sft1", 100), ("sft2", 3)):
        expected = write_checkpoint(tmp_path / "demo" / stage, stage, step)
        assert find_checkpoint(None, config) == expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (Options(cycles=0), "0 cycles"),
        (Options(early_exit=float("nan")), "at least 0"),
        (Options(checkpoint="/nonexistent"), "is no checkpoint"),
        (Options(prompt="  "), "prompt is empty"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    checkpoints: Path, options: Options, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match=complaint):
        chat_inference.main(replace(CONFIG, runs=str(checkpoints.parent)), options)


# ------------------------------------------------------------------------------- pipes and programs


def run(
    checkpoints: Path, options: Options, capsys: pytest.CaptureFixture, config: Config = CONFIG
) -> tuple[str, str]:
    chat_inference.main(replace(config, runs=str(checkpoints.parent)), options)
    return capsys.readouterr()


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch):
    def give(data: bytes | None) -> None:
        monkeypatch.setattr(
            sys, "stdin", None if data is None else io.TextIOWrapper(io.BytesIO(data))
        )

    return give


def test_each_line_of_a_pipe_is_answered(checkpoints: Path, capsys, piped) -> None:
    piped(b"one\n\n\xff\x1b[31m two\n")
    out, err = run(checkpoints, Options(), capsys)
    assert [line for line in out.splitlines() if line.startswith("> ")] == [
        "> one",
        "> \ufffd\ufffd[31m two",
    ]
    assert "sft2" in err
    assert "\x1b" not in out + err


@pytest.mark.parametrize("data", [b"", None, b"\n \n"])
def test_nothing_on_the_pipe_gets_the_sample_questions(
    checkpoints: Path, capsys, piped, data: bytes | None
) -> None:
    piped(data)
    out, _ = run(checkpoints, Options(), capsys)
    assert [line[2:] for line in out.splitlines() if line.startswith("> ")] == list(
        CONFIG.sft2.prompts
    )


def test_one_prompt_prints_the_answer_alone(checkpoints: Path, capsys, piped) -> None:
    piped(b"not read")
    out, _ = run(checkpoints, Options(prompt="the cat"), capsys)
    chat = new_chat(checkpoints / "sft2", CONFIG.chat)
    assert out.rstrip("\n") == neutral(say(chat, "the cat")).rstrip("\n")


def test_json_gives_ids_text_and_timings(checkpoints: Path, capsys, piped) -> None:
    piped(b"one\ntwo\n")
    out, _ = run(checkpoints, Options(json=True), capsys)
    reports = [json.loads(line) for line in out.splitlines()]
    tokenizer = load_for_inference(checkpoints / "sft2").tokenizer
    assert len(reports) == 2
    for report in reports:
        assert len(report["ids"]) <= 12
        assert report["finish"] in ("stop", "length")
        assert report["seconds"] >= report["first_token_seconds"] > 0
        spoken = [token for token in report["ids"] if token not in tokenizer.special.values()]
        assert report["text"] == tokenizer.decode(spoken) or report["thinking"] is not None
    assert reports[1]["reused_tokens"] > 0


def test_an_empty_text_to_stop_at_is_refused(checkpoints: Path) -> None:
    with pytest.raises(UserError, match="--stop holds an empty text"):
        chat_inference.main(CONFIG, Options(prompt="one", stop=("x", "")))


def test_json_counts_the_cycles_of_the_head(checkpoints: Path, capsys, piped) -> None:
    piped(None)
    for early_exit, fewer in ((None, False), (1e9, True)):
        out, _ = run(
            checkpoints, Options(prompt="one", json=True, cycles=4, early_exit=early_exit), capsys
        )
        n, ran = len(json.loads(out)["ids"]), json.loads(out)["cycles_per_token"]
        # the prompt runs all of them
        assert ran == pytest.approx((4 + n - 1) / n if fewer else 4, abs=1e-3)


def test_the_options_of_the_head_can_be_typed() -> None:
    words = ["--preset", "demo", "--think-cycles", "3", "--early-exit", "0.01"]
    _, options = chat_inference.SCRIPT.parse(words)
    assert (options.cycles, options.early_exit) == (3, 0.01)
    assert chat_inference.SCRIPT.parse(["--preset", "demo", "--cycles", "2"])[1].cycles == 2


def test_as_a_program_it_ends_with_codes_that_mean_something(
    checkpoints: Path, tmp_path: Path
) -> None:
    def start(*words: str, data: bytes = b"") -> subprocess.CompletedProcess:
        command = [sys.executable, "chat_inference.py", "--preset", "demo", *words]
        return subprocess.run(command, cwd=ROOT, input=data, capture_output=True, timeout=100)

    given = "--checkpoint", str(checkpoints / "sft2"), "--chat.max_tokens", "5"
    fine = start(*given, data=b"\xff\x00 one\n")
    assert (fine.returncode, b"Traceback" in fine.stderr) == (0, False)
    wrong = start("--runs", str(tmp_path))
    assert (wrong.returncode, b"Traceback" in wrong.stderr) == (2, False)
    assert wrong.stderr.startswith(b"error: There is no run")


def test_an_empty_answer_is_said_in_words_and_stays_empty_as_json(
    checkpoints: Path, capsys, piped, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = chat_inference.load
    monkeypatch.setattr(
        chat_inference, "load", lambda *a: script(chat := load(*a), (None, "")) and chat
    )
    piped(b"one\n")
    assert "\n> one\n(no answer)\n" in run(checkpoints, Options(), capsys)[0]
    assert run(checkpoints, Options(prompt="one"), capsys)[0] == "(no answer)\n"
    out, _ = run(checkpoints, Options(prompt="one", json=True), capsys)
    assert json.loads(out)["text"] == ""


def test_cycles_it_was_not_trained_with_are_warned_about(checkpoints: Path, capsys, piped) -> None:
    _, err = run(checkpoints, Options(prompt="one", cycles=4), capsys)
    assert "trained with 1 cycle" in err
    out, _ = run(checkpoints, Options(prompt="one", cycles=4, json=True), capsys)
    assert "trained with 1 cycle" in json.loads(out)["notes"][0]


def test_a_missing_compiler_is_mentioned_once_and_never_in_the_answers(
    checkpoints: Path, capsys, piped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hearth.serving.conversation.compiler_missing", lambda: True)
    piped(b"one\ntwo\n")
    out, err = run(checkpoints, Options(json=True), capsys)
    assert err.count("apt install gcc") == 1
    assert "gcc" not in out


@pytest.mark.parametrize("name", ["chat_inference", "pretrain", "score", "sft"])
def test_ctrl_c_while_torch_is_imported_ends_in_a_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    command = [sys.executable, f"{name}.py", "--runs", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=100)
    assert done.stderr == b"stopped.\n"
    assert done.returncode in (130, -signal.SIGINT)

"""The command line: words to a config and back, help, saved settings, how a script ends."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from config import PRESETS, Config, HRMConfig, ModelConfig, UserError
from hearth import cli, log

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "create_shard",
    "train_tokenizer",
    "pretrain",
    "sft",
    "score",
    "chat_inference",
    "run_pipeline",
)


@dataclass(frozen=True)
class Own:
    """Options of a script of the tests' own."""

    polish: int = 1  # how often it is polished


def parsed(words: list[str]) -> Config:
    return cli.Script("").parse(words)[0]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name: str) -> None:
    assert cli.from_plain(Config, json.loads(cli.to_json(PRESETS[name])), "x") == PRESETS[name]


def test_json_of_a_dense_model_keeps_the_head_off() -> None:
    dense = ModelConfig(hrm=None)
    assert cli.from_plain(ModelConfig, json.loads(cli.to_json(dense)), "x") == dense


def test_json_with_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="flavour"):
        cli.from_plain(HRMConfig, {"flavour": 1}, "x")


def test_command_line_overrides_the_preset() -> None:
    made = parsed(["--preset", "demo", "--pretrain.lr", "1e-3", "--data.text_files", "a", "b"])
    assert made.pretrain.lr == 1e-3
    assert made.data.corpora()[0].files == ("a", "b")
    assert made.model == PRESETS["demo"].model


def test_the_head_can_be_switched_off_on_the_command_line() -> None:
    assert parsed(["--preset=demo", "--model.hrm", "None"]).model.hrm is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "dmeo"], "16gb, 12gb, 24gb, 8gb, demo"),
        (["--preset"], "needs a value"),
        (["--preset", "demo", "--pretrain.lrr", "1"], "--pretrain.lr"),
        (["--preset", "demo", "--pretrain.steps", "many"], "--pretrain.steps"),
        (["--preset", "demo", "--model.window", "0"], "model.window"),
    ],
)
def test_a_mistake_exits_with_2_and_names_the_remedy(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(words)
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert said in told.out + told.err
    assert "Traceback" not in told.out + told.err


def test_help_shows_own_options_first_and_only_what_the_script_reads(capsys) -> None:
    script = cli.Script("What it does.", Own(), ("model", "pretrain.lr"))
    with pytest.raises(SystemExit):
        script.parse(["--preset", "demo", "--help"])
    told = capsys.readouterr().out
    assert told.startswith("What it does.")
    assert told.index("--polish") < told.index("--preset") < told.index("--model.n_layer")
    assert "how often it is polished" in told
    assert "attention reach of a short layer" in told
    assert "--pretrain.lr" in told
    assert "--pretrain.steps" not in told
    with pytest.raises(SystemExit):
        script.parse(["--help-all"])
    told = capsys.readouterr().out
    assert "--pretrain.steps" in told
    assert "--chat.temperature" in told


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_on_two_screens(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = cli.help_text(importlib.import_module(script).SCRIPT).splitlines()
    assert len(lines) <= 2 * 48
    assert max(map(len, lines)) <= 100
    assert any(line.lstrip().startswith("--preset") for line in lines)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--model.hrm", "None", "--pretrain.lr", "0.5"],
        ["--data.text_files", "a b.txt", "it's here/*.md", "--report.no_draw"],
        ["--pretrain.stages.0.share", "0.3", "--pretrain.stages.1.share", "0.4"],
        ["--pretrain.stages.0.weights", "2", "--mid.sources.0.calls"],
        ["--model.hrm.deep_supervision", "--seed", "7", "--chat.top_p", "0.5"],
        ["--sft1.files", "x.jsonl", "--chat.system", "Say -- nothing", "--model.window", "None"],
    ],
)
def test_words_of_a_config_ask_for_that_config(words: list[str]) -> None:
    made = parsed(["--preset", "demo", *words])
    assert parsed(["--preset", "demo", *shlex.split(shlex.join(cli.words_of(made)))]) == made


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ({"model": 3}, "model is '3', must be an object"),
        ({"model": {"n_layer": "two"}}, "model.n_layer is 'two', must be a whole number"),
        ({"model": {"n_layer": True}}, "model.n_layer is 'True', must be a whole number"),
        ({"pretrain": {"stages": "x"}}, "pretrain.stages is 'x', must be a list"),
        ({"pretrain": {"stages": [{"context": None}]}}, "pretrain.stages.0.context is 'None'"),
        ({"optim": {"name": "sgd"}}, "optim.name is 'sgd', must be one of muon"),
        ({"pretrain": {"stages": None}}, "pretrain.stages is 'None', must be a list"),
        ({"colour": "red"}, "colour is a field that this version lacks"),
    ],
)
def test_a_saved_config_of_wrong_types_names_file_and_field(harm: dict, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"x.json cannot be used: {said}")):
        cli.from_plain(Config, harm, "x.json")


def stopped_in(broken: Exception | None = None) -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        if broken is None:
            raise
        raise broken from None


@pytest.fixture
def handlers() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "broken", [None, ValueError("write to closed file"), UserError("half a file")]
)
def test_ctrl_c_and_what_it_breaks_end_in_one_line(
    broken: Exception | None, handlers: None, capsys
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run_script(lambda: stopped_in(broken), "stopped.")
    assert (end.value.code, capsys.readouterr().err) == (130, "stopped.\n")


def test_a_users_mistake_ends_in_one_line(handlers: None, capsys) -> None:
    def work() -> None:
        raise UserError("no such file")

    with pytest.raises(SystemExit) as end:
        cli.run_script(work)
    assert (end.value.code, capsys.readouterr().err) == (2, "error: no such file\n")


def test_a_stop_that_was_dealt_with_hides_no_later_error(handlers: None) -> None:
    def work() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run_script(work)


def test_our_own_mistake_shows_where_it_is(handlers: None) -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run_script(lambda: 1 / 0)


def test_a_reader_of_the_pipe_that_goes_away_is_no_error() -> None:
    code = (
        "from hearth import cli\nimport sys\n"
        "cli.run_script(lambda: [print('x' * 999, flush=True) for _ in range(999)])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


def test_a_pipe_that_lacks_a_character_gets_a_question_mark(monkeypatch) -> None:
    """As a console's or a pipe's encoding on Windows may: no run ends for want of an arrow."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    cli.run_script(lambda: log.say("curriculum  1024 → 2048 · 4 × 5"))
    sys.stdout.flush()
    assert raw.getvalue().split() == "curriculum 1024 ? 2048 · 4 × 5".encode("cp1252").split()


@pytest.mark.parametrize("depth", [(), ("--depth", "7")])
@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("words", [("--model.hrm", "None"), ("--model.shape", "portable")])
def test_a_model_without_the_head_has_as_many_blocks_and_asking_twice_changes_nothing(
    preset: str, depth: tuple[str, ...], words: tuple[str, ...]
) -> None:
    script, asked = cli.Script(""), ["--preset", preset, *depth, *words]
    made, _ = script.parse(asked)
    n_blocks = int(depth[1]) if depth else PRESETS[preset].model.n_blocks
    assert (made.model.hrm, made.model.n_layer) == (None, n_blocks)
    assert script.parse(asked, saved=lambda folder: made)[0] == made
    assert script.parse(["--preset", preset, *cli.words_of(made)])[0].model == made.model

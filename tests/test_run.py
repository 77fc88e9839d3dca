"""A run's folder: what it remembers, what contradicts it, what is stale, who works on it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import config as settings
import sft
from config import FINE_TUNING, PRESETS, Config, UserError
from hearth import cli, run


def demo(tmp_path: Path, **changes: Any) -> Config:
    return replace(PRESETS["demo"], runs=str(tmp_path / "my runs"), name="mine", **changes)


def begin(config: Config, *stages: str, **inputs: str) -> None:
    """Begin stages, as their scripts do."""
    with run.working_on(config, makes=stages, creates=True) as work:
        for stage in stages:
            work.begin(stage, inputs)
            (work.folder / run.STAGES[stage].folders[0]).mkdir(exist_ok=True)


def asked(config: Config, *words: str) -> Config:
    """What a later command line asks for."""
    return run.parse(cli.Script(""), ["--name", config.name, "--runs", config.runs, *words])[0]


# ---------------------------------------------------------------------------------------- settings


def test_a_run_remembers_its_settings_and_needs_its_name_alone(tmp_path: Path) -> None:
    made = demo(tmp_path, model=replace(PRESETS["demo"].model, hrm=None), seed=5)
    begin(made, "text")
    assert asked(made) == made


@pytest.mark.parametrize("start", ["mine", "mine/sft1", "mine/base/step-00000005"])
def test_a_new_run_that_starts_from_another_one_takes_over_its_settings(
    tmp_path: Path, start: str
) -> None:
    made = demo(tmp_path, seed=5)
    begin(made, "base", "sft1")
    (made.run_dir / "base" / "step-00000005").mkdir()
    script = cli.Script("", sft.Options(), keywords=("from",))
    words = ["--runs", made.runs, "--name", "new", "--from"]
    for place in (start, str(Path(made.runs) / start)):
        assert run.parse(script, [*words, place])[0] == replace(made, name="new")
    other = run.parse(script, [*words, start, "--preset", "8gb"])[0]  # unless a preset is named
    assert other == replace(PRESETS["8gb"], runs=made.runs, name="new")


def test_a_setting_of_a_stage_not_begun_is_accepted_and_written_down(tmp_path: Path) -> None:
    begin(demo(tmp_path), "text", "tokenizer")
    begin(asked(demo(tmp_path), "--pretrain.lr", "0.5"), "base")
    assert asked(demo(tmp_path)).pretrain.lr == 0.5


@pytest.mark.parametrize(
    "words",
    [
        ("--data.text_files", "books", "--data.text_column", "story"),
        ("--mid.files", "chat.jsonl", "--mid.calls", "--mid.exclude_files", "tests.jsonl"),
        ("--chat.name", "Ada", "--chat.owner", "Bo"),
    ],
)
def test_what_a_stage_not_begun_will_read_is_written_down(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    begin(demo(tmp_path))
    once = asked(demo(tmp_path), *words)
    begin(once)
    assert asked(demo(tmp_path)) == once != demo(tmp_path)


def test_a_setting_that_a_stage_has_used_is_refused_with_both_values_and_the_remedy(
    tmp_path: Path,
) -> None:
    made = demo(tmp_path)
    begin(made, "text", "tokenizer", "base")
    with pytest.raises(UserError, match=r"Pretraining.*pretrain.lr was 0.012, is 0.5") as caught:
        begin(asked(made, "--pretrain.lr", "0.5"), "sft1")
    (command,) = re.findall(r"`(uv run .*?)`", str(caught.value))
    assert command.startswith("uv run pretrain.py --name mine")
    assert command.endswith("--pretrain.lr 0.5 --redo base")
    assert asked(made) == made  # nothing was written down


def test_a_free_setting_is_taken_for_one_command_alone(tmp_path: Path) -> None:
    made = demo(tmp_path)
    begin(made, "text", "tokenizer", "base")
    once = asked(made, "--pretrain.micro_batch_tokens", "512", "--chat.temperature", "0.9")
    begin(once, "sft1")
    assert once.chat.temperature == 0.9
    assert asked(made) == made


def test_what_is_edited_in_config_py_is_followed_or_refused_like_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = demo(tmp_path, seed=3)
    begin(made, "text")
    edited = replace(PRESETS["demo"], seed=9, pretrain=replace(PRESETS["demo"].pretrain, lr=0.25))
    monkeypatch.setitem(settings.PRESETS, "demo", edited)
    now = asked(made)
    assert now.pretrain.lr == 0.25  # as config.py says now
    assert now.seed == 3  # set by hand for this run
    begin(now, "base")
    again = replace(edited, pretrain=replace(edited.pretrain, lr=0.125))
    monkeypatch.setitem(settings.PRESETS, "demo", again)
    with pytest.raises(UserError, match=r"pretrain.lr was 0.25, is 0.125"):
        begin(asked(made), "sft1")


def test_another_preset_for_a_run_that_has_begun_is_refused(tmp_path: Path) -> None:
    begin(demo(tmp_path), "text")
    with pytest.raises(UserError, match=r"Text shards.*has used other settings"):
        begin(asked(demo(tmp_path), "--preset", "16gb"), "text")


def test_the_head_cannot_be_taken_off_or_put_on_a_model_that_was_trained(tmp_path: Path) -> None:
    with_head, without = (
        demo(tmp_path / name, model=replace(PRESETS["demo"].model, **changes))
        for name, changes in (("with", {}), ("without", {"hrm": None}))
    )
    for made, other in ((with_head, without), (without, with_head)):
        begin(made, "base")
        with pytest.raises(UserError, match=r"model.hrm was (True|False)"):
            begin(replace(made, model=other.model), "sft1")


def test_a_setting_that_an_earlier_version_lacked_contradicts_nothing(tmp_path: Path) -> None:
    made = demo(tmp_path)
    begin(made, "base")
    path = made.run_dir / "config.json"
    record = json.loads(path.read_text())
    del record["stages"]["base"]["settings"]["model.shape"]
    del record["settings"]["model"]["shape"], record["preset"]["model"]["shape"]
    path.write_text(json.dumps(record))
    begin(asked(made), "sft1")
    assert asked(made) == made


def test_a_run_of_a_version_without_a_stage_is_read_and_leaves_it_out(tmp_path: Path) -> None:
    made = demo(tmp_path)
    begin(made, "base", "sft1")
    path = made.run_dir / "config.json"
    record = json.loads(path.read_text())
    for part in (record["settings"], record["preset"]):
        del part["mid"]
        for stage in ("sft1", "sft2"):  # and with the fields that these had
            for name in ("calls", "loss", "exclude", "exclude_files", "weight_decay"):
                del part[stage][name]
            for source in part[stage]["sources"]:
                del source["calls"], source["persona"], source["made"]
    path.write_text(json.dumps(record))
    assert run.fine_tuning(asked(made)) == ["sft1", "sft2"]
    begin(asked(made), "sft2")
    assert run.fine_tuning(asked(made)) == ["sft1", "sft2"]


def test_stages_of_fine_tuning_are_the_fields_of_the_config_in_their_order() -> None:
    assert tuple(FINE_TUNING) == ("mid", "sft1", "sft2")
    assert ("base", *FINE_TUNING, "rl") == run.TRAINED
    names = list(run.STAGES)
    assert names[names.index("base") :] == list(run.TRAINED)
    for name, title in FINE_TUNING.items():
        assert run.STAGES[name].title == title
        assert run.STAGES[name].script == "sft.py"
        assert f"{name}.lr" in cli.flat(PRESETS["demo"])


def test_a_name_for_the_model_is_a_setting_of_the_stages_that_teach_it(tmp_path: Path) -> None:
    made = demo(tmp_path)
    begin(made, "base", "mid")
    with pytest.raises(UserError, match=r"Middle stage.*mid.files was .*--redo mid"):
        begin(asked(made, "--chat.name", "Ada"), "sft1")
    begin(asked(made, "--chat.temperature", "0.5"), "sft1")


def test_files_are_the_same_however_their_place_is_written(tmp_path: Path) -> None:
    def with_files(name: str) -> Config:
        return demo(tmp_path, data=replace(PRESETS["demo"].data, text_files=(name,)))

    begin(with_files("books/x.txt"), "text")
    begin(with_files(str(Path("books/../books/x.txt").absolute())), "text")
    with pytest.raises(UserError, match="corpora was"):
        begin(with_files("books/y.txt"), "text")


def test_a_part_that_a_run_never_heard_of_is_as_its_preset_has_it(tmp_path: Path) -> None:
    """A run of before there was reinforcement learning practises what the demo practises."""
    made = demo(tmp_path)
    begin(made, "text")
    path = made.run_dir / "config.json"
    record = json.loads(path.read_text())
    for part in ("settings", "preset"):
        del record[part]["rl"]
    path.write_text(json.dumps(record))
    assert run.load_settings(made.run_dir).rl == PRESETS["demo"].rl


# ------------------------------------------------------------------------------------ inputs, redo


def test_a_stage_whose_input_changed_is_stale_and_names_it(tmp_path: Path) -> None:
    begin(demo(tmp_path), "base", tokens="a")
    begin(demo(tmp_path), "base", tokens="a")
    with pytest.raises(UserError, match=r"stale.*[\s\S]*tokens was a, is b[\s\S]*--redo base"):
        begin(demo(tmp_path), "base", tokens="b")


def test_redo_removes_the_stage_and_what_follows_and_nothing_else_does(tmp_path: Path) -> None:
    made = demo(tmp_path)
    begin(made, "text", "tokenizer", "base", "sft1")
    other = asked(made, "--pretrain.lr", "0.5")
    with run.working_on(other, makes=("base",), redo="base") as work:
        there = {path.name for path in made.run_dir.iterdir()}
        assert there == {"text", "tokenizer", "config.json", "lock"}
        assert work.begun("sft1") is None
    assert asked(made).pretrain.lr == 0.5
    with (
        pytest.raises(UserError, match="this script makes sft1"),
        run.working_on(other, makes=("sft1",), redo="base"),
    ):
        pass


def test_a_redo_that_is_refused_removes_nothing(tmp_path: Path) -> None:
    made = demo(tmp_path)
    begin(made, "text", "tokenizer", "base", "sft1")
    before = sorted(made.run_dir.rglob("*"))
    with (
        pytest.raises(UserError, match=r"Tokenizer.*seed was 0, is 7"),
        run.working_on(asked(made, "--seed", "7"), makes=("base",), redo="base"),
    ):
        pass
    assert sorted(made.run_dir.rglob("*")) == before


def test_a_run_of_an_earlier_version_is_said_to_be_one(tmp_path: Path) -> None:
    (demo(tmp_path).run_dir / "base").mkdir(parents=True)
    with pytest.raises(UserError, match="earlier version"):
        begin(demo(tmp_path), "text")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "should hold an object"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps({"version": 1, "settings": 3}), "settings should be an object"),
        (json.dumps({"version": 99}), "another version"),
    ],
)
def test_damaged_settings_are_named_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    folder = demo(tmp_path).run_dir
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        run.load_settings(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------- commands


def test_commands_that_are_printed_ask_for_this_run_when_pasted(tmp_path: Path) -> None:
    asked_for = demo(tmp_path, data=replace(PRESETS["demo"].data, text_files=("my books/*.txt",)))

    def pasted(command: str) -> Config:
        words = shlex.split(command)
        assert words[:3] == ["uv", "run", "pretrain.py"]
        return run.parse(cli.Script(""), words[3:])[0]

    assert pasted(run.command(asked_for, "pretrain.py")) == asked_for
    begin(asked_for, "text")
    command = run.command(asked_for, "pretrain.py")
    assert pasted(command) == asked_for
    assert "books" not in command  # the run remembers
    assert pasted(run.command(replace(asked_for, device="cpu"), "pretrain.py")).device == "cpu"


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def trained(tmp_path: Path) -> Config:
    """A run with checkpoints, as far as their folders tell."""
    made = demo(tmp_path)
    begin(made, "base", "sft1")
    for stage, step in (("base", 5), ("base", 10), ("sft1", 3)):
        folder = made.run_dir / stage / f"step-{step:08}"
        folder.mkdir()
        (folder / "state.json").write_text("{}")
    return made


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (lambda c: None, "sft1/step-00000003"),
        (lambda c: "base", "base/step-00000010"),
        (lambda c: "mine", "sft1/step-00000003"),
        (lambda c: str(c.run_dir), "sft1/step-00000003"),
        (lambda c: str(c.run_dir / "base"), "base/step-00000010"),
        (lambda c: str(c.run_dir / "base/step-00000005"), "base/step-00000005"),
    ],
)
def test_a_checkpoint_is_found_by_run_stage_or_folder(
    name: Callable[[Config], str | None], found: str, trained: Config
) -> None:
    assert run.find_checkpoint(name(trained), trained) == trained.run_dir / found


@pytest.mark.parametrize(
    ("name", "said"),
    [("sft2", "it has base, sft1"), ("nothing", "mine"), (".", "is no checkpoint")],
)
def test_a_checkpoint_that_is_none_is_answered_with_what_there_is(
    name: str, said: str, trained: Config
) -> None:
    with pytest.raises(UserError, match=said):
        run.find_checkpoint(name, trained)


def test_the_current_folder_as_a_run_without_checkpoints_is_named_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    with pytest.raises(UserError, match="--name mine"):
        run.find_checkpoint(".", PRESETS["demo"])


def test_a_run_that_is_none_is_answered_with_those_there_are(trained: Config) -> None:
    typo = replace(trained, name="mien")
    for ask in (lambda: run.find_checkpoint(None, typo), lambda: begin_later(typo)):
        with pytest.raises(UserError, match="no run 'mien'") as caught:
            ask()
        assert f"{Path(trained.runs).absolute()} holds mine" in str(caught.value)
    assert not typo.run_dir.exists()


def begin_later(config: Config) -> None:
    with run.working_on(config, makes=("base",)):
        pass


# -------------------------------------------------------------------------------------------- lock


def _hold(folder: str, held: Any, let_go: Any) -> None:
    with run.locked(Path(folder)):
        held.set()
        let_go.wait(60)


def test_a_second_process_is_told_who_works_on_the_run_and_a_dead_one_holds_nothing(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("forkserver")
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), held, let_go))
    other.start()
    assert held.wait(60)
    with (
        pytest.raises(UserError, match=f"Another process works on .*pid {other.pid}"),
        run.locked(tmp_path),
    ):
        pass
    other.kill()
    other.join()
    with run.locked(tmp_path):
        assert (tmp_path / "lock").read_text().split() == [str(os.getpid())]


def test_on_windows_the_lock_is_that_of_its_own_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks there keep others from reading what is locked: a byte far beyond the process id."""
    held: set[tuple[int, int]] = set()

    def locking(handle: int, mode: int, n_bytes: int) -> None:
        place = (os.fstat(handle).st_ino, os.lseek(handle, 0, os.SEEK_CUR))
        if place in held:
            raise OSError(errno.EACCES, "Permission denied")
        held.add(place)

    windows = ModuleType("msvcrt")
    windows.LK_NBLCK, windows.locking = 2, locking
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with run.locked(tmp_path):
        assert (tmp_path / "lock").read_text().split() == [str(os.getpid())]
        with pytest.raises(UserError, match=f"Another process .*pid {os.getpid()}"):
            run.locked(tmp_path).__enter__()

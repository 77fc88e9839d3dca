"""The stages as a person runs them: in order, twice, killed, and with the mistakes people make."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import stages
from safetensors.torch import load_file, save_file

import run_pipeline
from config import PRESETS, Config, UserError
from hearth import run
from hearth.run import newest
from hearth.training import checkpoint


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return stages.write_inputs(tmp_path_factory.mktemp("input"))


ROAD = run.TRAINED[:-1]  # practice is walked where it is asked for: tests/test_rl.py


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """A folder in which the whole road was walked without a break."""
    folder = tmp_path_factory.mktemp("unbroken")
    for script in stages.SCRIPTS:
        output = folder / "output"
        assert stages.run(script, [*words, "--runs", str(folder)], output) == 0, output.read_text()
    return folder


def test_the_road_makes_every_folder_of_the_plan(unbroken: Path) -> None:
    made = {path.name for path in (unbroken / "demo").iterdir()}
    assert {"text", "tokenizer", "tokens", "chat_tokens", *ROAD} <= made


def test_started_again_every_stage_says_that_it_is_done(
    unbroken: Path, words: list[str], tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (unbroken / "demo").rglob("*.safetensors")}
    for script in ("pretrain.py", "sft.py"):
        assert stages.run(script, [*words, "--runs", str(unbroken)], tmp_path / "output") == 0
    assert (tmp_path / "output").read_text().count("done") == len(ROAD)
    assert before == {
        path: path.stat().st_mtime_ns for path in (unbroken / "demo").rglob("*.safetensors")
    }


def test_two_runs_with_one_seed_give_identical_checkpoints(
    unbroken: Path, words: list[str], tmp_path: Path
) -> None:
    for script in stages.SCRIPTS:
        assert stages.run(script, [*words, "--runs", str(tmp_path)], tmp_path / "output") == 0
    for stage in ROAD:
        assert stages.weights(tmp_path / "demo", stage) == stages.weights(unbroken / "demo", stage)


@pytest.mark.parametrize("script", ["pretrain.py", "sft.py"])
def test_a_stage_killed_at_random_moments_ends_like_an_unbroken_one(
    script: str, unbroken: Path, words: list[str], tmp_path: Path
) -> None:
    """Twenty SIGKILLs, or as many as there is work for; what each leaves behind is what the next
    start finds.
    """
    run_dir, rng = tmp_path / "demo", random.Random(script)
    kept = ("text", "tokenizer", "tokens") + (("base",) if script == "sft.py" else ())
    stages.copy_run(unbroken / "demo", run_dir, *kept)
    killed = 0
    while killed < 20:
        process = stages.start(script, [*words, "--runs", str(tmp_path)], tmp_path / "output")
        process.join(rng.uniform(0.3, 1.6))
        if process.exitcode is not None:
            assert process.exitcode == 0, (tmp_path / "output").read_text()
            break
        process.kill()
        process.join()
        killed += 1
    assert stages.run(script, [*words, "--runs", str(tmp_path)], tmp_path / "output") == 0
    assert killed > 0
    for stage in ("base",) if script == "pretrain.py" else ROAD[1:]:
        assert stages.weights(run_dir, stage) == stages.weights(unbroken / "demo", stage)
    metrics = [
        json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()
    ]
    numbers = [record["step"] for record in metrics if record["kind"] == "step"]
    assert numbers == list(range(1, len(numbers) + 1))


def test_ctrl_c_saves_and_says_how_to_go_on(
    unbroken: Path, words: list[str], tmp_path: Path
) -> None:
    stages.copy_run(unbroken / "demo", tmp_path / "demo", "tokenizer", "tokens")
    longer = [*words, "--runs", str(tmp_path), "--pretrain.steps", "3000"]
    process = stages.start("pretrain.py", longer, tmp_path / "output")
    output = tmp_path / "output"
    while "step " not in (output.read_text() if output.exists() else ""):
        assert process.is_alive(), output.read_text()
        time.sleep(0.05)
    process.terminate()
    process.join()
    assert process.exitcode == 143
    assert "Continue with: uv run pretrain.py --preset demo" in output.read_text()


def test_the_whole_road_hands_a_closed_terminal_on_to_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stage.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))\n"
        "time.sleep(0.2)\n"
        "pathlib.Path(__file__).with_name('started').touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(run_pipeline, "HERE", tmp_path)
    started = tmp_path / "started"

    def close_terminal() -> None:
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)

    closing = threading.Thread(target=close_terminal)
    closing.start()
    assert run_pipeline.run_stage("stage.py", PRESETS["demo"]) == (129, True)
    closing.join()


def test_the_whole_road_makes_practice_again_and_continues_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(PRESETS["demo"], runs=str(tmp_path), name="mine")
    with run.working_on(config, makes=["rl"], creates=True) as work:
        work.begin("rl", {})
        (config.run_dir / "rl").mkdir()
    walked: list[str] = []

    def walk(script: str, config: Config) -> tuple[int, bool]:
        walked.append(script)
        return 0, script == "rl.py"

    monkeypatch.setattr(run_pipeline, "run_stage", walk)
    with pytest.raises(SystemExit):
        run_pipeline.main(config, run_pipeline.Options(redo="rl"))
    assert walked[-1] == "rl.py"
    assert re.search(
        r"Continue with: uv run run_pipeline\.py .*--practise", capsys.readouterr().out
    )


def test_the_whole_road_removes_no_text_whose_files_are_missing(tmp_path: Path) -> None:
    data = replace(PRESETS["demo"].data, text_files=("nope.txt",))
    config = replace(PRESETS["demo"], runs=str(tmp_path), name="mine", data=data)
    with run.working_on(config, makes=["text"], creates=True) as work:
        work.begin("text", {})
        (config.run_dir / "text").mkdir()
    with pytest.raises(UserError, match=r"nope\.txt"):
        run_pipeline.main(config, run_pipeline.Options(redo="text"))
    assert (config.run_dir / "text").is_dir()


@pytest.mark.parametrize("words", [["--depth", "9"], ["--pretrain.steps", "77"]])
def test_what_hours_decides_cannot_be_asked_for_beside_it(words: list[str], tmp_path: Path) -> None:
    asked = ["--preset", "demo", "--runs", str(tmp_path), "--hours", "1", *words]
    with pytest.raises(UserError, match="--hours picks"):
        run_pipeline.main(*run.parse(run_pipeline.SCRIPT, asked))


# ----------------------------------------------------------------------------- what users get wrong


def mistake(script: str, words: list[str], tmp_path: Path, code: int = 2) -> str:
    output = tmp_path / "said"
    output.unlink(missing_ok=True)
    assert stages.run(script, words, output) == code, output.read_text()
    said = output.read_text()
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("script", "remedy"),
    [
        ("train_tokenizer.py", "create_shard.py --preset demo"),
        ("pretrain.py", "train_tokenizer.py --preset demo"),
        ("sft.py", "pretrain.py --preset demo"),
        ("chat_inference.py", "run_pipeline.py --preset demo"),
        ("score.py", "run_pipeline.py --preset demo"),
    ],
)
def test_a_stage_without_its_input_names_the_command_that_makes_it(
    script: str, remedy: str, unbroken: Path, tmp_path: Path
) -> None:
    stages.copy_run(unbroken / "demo", tmp_path / "demo")
    said = mistake(script, ["--preset", "demo", "--runs", str(tmp_path)], tmp_path)
    assert f"uv run {remedy}" in said


def test_a_corpus_smaller_than_one_batch_is_refused(
    unbroken: Path, words: list[str], tmp_path: Path
) -> None:
    stages.copy_run(unbroken / "demo", tmp_path / "demo", "tokenizer", "tokens")
    big = [*words, "--runs", str(tmp_path), "--pretrain.tokens_per_step", "1048576"]
    assert "--pretrain.tokens_per_step" in mistake("pretrain.py", big, tmp_path)


def test_shards_of_another_tokenizer_are_refused(
    unbroken: Path, words: list[str], tmp_path: Path
) -> None:
    stages.copy_run(unbroken / "demo", tmp_path / "demo", "tokenizer", "tokens")
    path = tmp_path / "demo" / "tokenizer" / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["merges"] = facts["model"]["merges"][:-1]
    path.write_text(json.dumps(facts))
    assert "another tokenizer" in mistake(
        "pretrain.py", [*words, "--runs", str(tmp_path)], tmp_path
    )


def test_a_folder_that_cannot_be_written_is_named(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said = mistake("create_shard.py", [*words, "--runs", str(tmp_path / "file")], tmp_path)
    assert str(tmp_path / "file") in said


def test_a_card_that_torch_cannot_use_is_an_error_with_its_remedy(
    unbroken: Path, words: list[str], tmp_path: Path
) -> None:
    stages.copy_run(unbroken / "demo", tmp_path / "demo", "tokenizer", "tokens")
    said = mistake("pretrain.py", [*words, "--runs", str(tmp_path), "--device", "cuda"], tmp_path)
    assert "--device cpu" in said
    assert "driver" in said or "CUDA build" in said


# ------------------------------------------------------------------------------- a run knows itself


def printed(said: str) -> list[str]:
    """The words of the command that a stage printed for the next one, as a shell splits them."""
    (command,) = re.findall(r"Next: uv run (.+)", said)
    return shlex.split(command)


def test_commands_that_are_printed_lead_from_stage_to_stage_when_pasted(tmp_path: Path) -> None:
    """Own files, a name, another folder for runs, and spaces in every path."""
    words = stages.write_inputs(tmp_path / "my files")
    where = ["--name", "my first", "--runs", str(tmp_path / "my runs")]
    said = tmp_path / "said"
    pasted = ["create_shard.py", *words, *where]
    for expected in ("create_shard.py", "train_tokenizer.py", "pretrain.py", "sft.py", "chat"):
        assert pasted[0].startswith(expected)
        assert stages.run(pasted[0], pasted[1:], said) == 0, said.read_text()
        if expected == "chat":
            break
        pasted = printed(said.read_text())
        said.unlink()
    # each needed the run's name alone
    assert pasted == ["chat_inference.py", *where]


def test_a_later_stage_rebuilds_the_model_that_was_trained(
    words: list[str], tmp_path: Path
) -> None:
    where, said = ["--name", "mine", "--runs", str(tmp_path)], tmp_path / "said"
    for script in stages.SCRIPTS[:3]:
        given = [*words, *where, "--model.hrm", "None"] if script == "create_shard.py" else where
        assert stages.run(script, given, said) == 0, said.read_text()
    assert stages.run("sft.py", where, said) == 0, said.read_text()
    loaded = checkpoint.load_for_inference(newest(tmp_path / "mine" / "sft2"))
    assert loaded.model.head is None
    assert loaded.config.model.d_model == 32


@pytest.fixture
def finished(unbroken: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A run whose road was walked, and the words that name it."""
    shutil.copytree(unbroken / "demo", tmp_path / "demo")
    return tmp_path / "demo", ["--preset", "demo", "--runs", str(tmp_path)]


def remedy(said: str) -> list[str]:
    (command,) = re.findall(r"`uv run (.*?--redo \w+)`", said)
    return shlex.split(command)


@pytest.mark.parametrize(
    ("script", "stage", "change"),
    [
        ("pretrain.py", "base", ["--pretrain.lr", "0.5"]),
        ("sft.py", "sft1", ["--sft1.lr", "0.5"]),
        ("sft.py", "sft2", ["--sft2.epochs", "2.0"]),
        ("sft.py", "base", ["--model.d_model", "64"]),
    ],
)
def test_a_setting_that_contradicts_a_stage_is_refused_and_redone_on_demand(
    script: str, stage: str, change: list[str], finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run_dir, words = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.safetensors")}
    said = mistake(script, [*words, *change], tmp_path)
    assert change[0].removeprefix("--") in said
    assert f"--redo {stage}" in said
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.safetensors")}
    if stage == "sft2":
        old = stages.weights(run_dir, "sft2")
        again = remedy(said)
        assert stages.run(again[0], again[1:], tmp_path / "again") == 0
        assert stages.weights(run_dir, "sft2") != old


def test_conversations_edited_in_place_make_their_stage_stale(
    unbroken: Path, words: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "demo"
    shutil.copytree(unbroken / "demo", run_dir)
    given = ["--preset", "demo", "--runs", str(tmp_path)]
    talks = Path(words[words.index("--sft1.files") + 1])
    was = talks.read_text()
    try:
        talks.write_text(was.replace('"output": "b', '"output": "z'))
        assert len(talks.read_text()) == len(was)
        said = mistake("sft.py", given, tmp_path)
        assert "stale" in said
        assert "--redo mid" in said
        again = remedy(said)
        assert stages.run(again[0], again[1:], tmp_path / "again") == 0, said
        assert stages.weights(run_dir, "mid") != stages.weights(unbroken / "demo", "mid")
        assert "done" in (tmp_path / "again").read_text()
    finally:
        talks.write_text(was)


def test_a_base_trained_again_makes_what_was_built_on_it_stale(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run_dir, words = finished
    path = newest(run_dir / "base") / "model.safetensors"
    weights = load_file(path)
    weights["output_gain"] += 1
    save_file(weights, path)
    said = mistake("sft.py", words, tmp_path)
    assert "weights was" in said
    assert "--redo mid" in said


def test_text_made_again_makes_its_tokens_stale_and_they_the_base(
    unbroken: Path, words: list[str], tmp_path: Path
) -> None:
    run_dir, given = tmp_path / "demo", ["--preset", "demo", "--runs", str(tmp_path)]
    stages.copy_run(unbroken / "demo", run_dir, "text", "tokenizer", "tokens", "base")
    text = Path(words[words.index("--data.text_files") + 1])
    was = text.read_text()
    try:
        text.write_text(was.replace("ba", "be"))
        said = mistake("create_shard.py", given, tmp_path)
        assert "content of the files was" in said
        shutil.rmtree(run_dir / "text")
        assert stages.run("create_shard.py", given, tmp_path / "out") == 0
        for script in ("train_tokenizer.py", "pretrain.py"):
            said = mistake(script, given, tmp_path)
            assert "--redo tokenizer" in said
    finally:
        text.write_text(was)


@pytest.mark.parametrize("script", ["create_shard.py", "pretrain.py"])
def test_of_two_processes_on_one_run_the_second_is_told_of_the_first(
    script: str, unbroken: Path, words: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "demo"
    stages.copy_run(unbroken / "demo", run_dir, "tokenizer", "tokens")
    with run.locked(run_dir):
        said = mistake(script, ["--preset", "demo", "--runs", str(tmp_path)], tmp_path)
    assert f"pid {os.getpid()}" in said
    assert len(said.strip().splitlines()) == 1

"""Scoring checkpoints, the whole script."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scored import make_run, write_files

import score
from config import PRESETS, Config, ReportConfig, UserError
from hearth.evaluation import battery, tasks
from hearth.reporting import report
from hearth.training import checkpoint
from hearth.training.checkpoint import Loaded
from score import Options


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def loaded(run: Config) -> Loaded:
    return checkpoint.load_for_inference(run.run_dir / "base")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_files(tmp_path / "files")


def scores_of(config: Config) -> list[dict[str, Any]]:
    return report.read_json(config.run_dir / "report" / "score.json")["scores"]


def test_every_score_has_an_error_a_chance_level_and_a_count(run: Config, files: Path) -> None:
    wanted = ("bpb", "copa", "winograd", "lambada_openai")
    score.main(run, Options(checkpoint=("base",), tasks=wanted, files=str(files), limit=12))
    found = {s["task"]: s for s in scores_of(run)}
    assert set(found) == {
        "world, held out",
        "copa",
        "winograd",
        "lambada_openai",
        "3 of CORE's 22 tasks",
    }
    for s in found.values():
        assert s["stderr"] is not None
        assert s["n"] == (
            12 if s["task"] in ("copa", "winograd", "lambada_openai", "world, held out") else 36
        )
        assert (s["chance"] is None) == (s["metric"] == "bits per byte")
    centred = [
        (found[name]["value"] - chance) / (1 - chance)
        for name, chance in (("copa", 0.5), ("winograd", 0.5))
    ]
    assert found["3 of CORE's 22 tasks"]["value"] == pytest.approx(
        (sum(centred) + found["lambada_openai"]["value"]) / 3
    )


def test_the_demo_preset_asks_the_demo_worlds_questions(
    run: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    score.main(run, Options(n_questions=8))
    found = {s["task"] for s in scores_of(run) if s["stage"] == "sft2"}
    kinds = {f"world: {kind}" for kind in ("facts", "comparison", "counting", "arithmetic")}
    assert {"world", *kinds, "world: stops by itself", "world: thinks exactly when asked"} <= found
    assert len(report.read_json(run.run_dir / "report" / "score.json")["asked"]) == 8
    assert "world" in capsys.readouterr().out


def test_comparing_takes_scores_that_are_there(
    run: Config, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(compare=("base", "sft2"), tasks=("copa",), files=str(files))
    score.main(run, options)
    first = capsys.readouterr().out
    monkeypatch.setattr(tasks, "outcomes", None)  # nothing is scored again
    score.main(run, options)
    rows = [line for line in first.splitlines() if line.startswith("copa")]
    assert rows[-1] in capsys.readouterr().out
    assert rows[-1].count("±") == 2
    with pytest.raises(TypeError):
        score.main(run, replace(options, limit=5))  # another limit is another score


def test_a_world_score_over_other_questions_is_scored_again(run: Config) -> None:
    for n in (2, 4):
        score.main(run, Options(compare=("sft2",), tasks=("world",), n_questions=n))
        assert [s["n"] for s in scores_of(run) if s["task"] == "world"] == [n]


@pytest.mark.parametrize(
    "options",
    [Options(limit=0), Options(limit=-3), Options(n_questions=0), Options(n_questions=-1)],
)
def test_less_than_one_item_is_refused_before_anything_is_loaded(
    options: Options, run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load_for_inference", None)
    with pytest.raises(UserError, match=r"--\w+ is -?\d; give at least 1"):
        score.main(run, options)


def test_every_spelling_of_a_checkpoint_adds_to_the_one_book_of_its_run(
    run: Config, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "demo"
    shutil.copytree(run.run_dir, folder)
    shutil.rmtree(folder / "report", ignore_errors=True)
    draws = replace(run, runs="runs", report=ReportConfig(draw=True))
    tasks = ("copa", "winograd", "arc_easy", "lambada_openai")
    ways = (
        (tmp_path, "runs/demo"),
        (tmp_path, str(folder)),
        (folder, "."),
        (folder / "sft2", "."),
    )
    before = {path for path in tmp_path.rglob("*") if files not in path.parents}
    for (here, name), task in zip(ways, tasks, strict=True):
        monkeypatch.chdir(here)
        options = Options(checkpoint=(name,), tasks=(task,), files=str(files), limit=2)
        score.main(draws, options)
    book = report.read_scores(folder / "report" / "score.json")
    assert {s["task"] for s in book} == set(tasks)
    made = {path for path in tmp_path.rglob("*") if files not in path.parents} - before
    assert all(folder / "report" in (path, *path.parents) for path in made)


def test_runs_of_one_name_stand_side_by_side_in_the_table_and_on_the_page(
    run: Config, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "a" / "runs" / "demo", tmp_path / "b" / "runs2" / "demo"]
    for folder in folders:
        shutil.copytree(run.run_dir, folder)
        shutil.rmtree(folder / "report", ignore_errors=True)
    compare = tuple(map(str, folders))
    score.main(run, Options(compare=compare, tasks=("copa",), files=str(files), limit=4))
    out = capsys.readouterr().out
    page = (folders[0] / "report" / "compare-runs2-demo.md").read_text(encoding="utf-8")
    for head in ("runs/demo sft2", "runs2/demo sft2"):
        assert out.count(head) == 1
        assert head in page
    (row,) = [line for line in page.splitlines() if line.startswith("| copa")]
    assert row.count("±") == 2


def test_the_battery_of_two_checkpoints_stands_side_by_side(
    run: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(battery, "MAX_TOKENS", 4)
    options = Options(checkpoint=("sft2",), tasks=("battery",), limit=1)
    score.main(run, options)
    noted = {s["task"]: s for s in scores_of(run) if s["source"] == "battery"}
    categories = {name.removeprefix("battery: ") for name in noted if name != "battery"}
    assert categories <= set(battery.BATTERY)
    assert len(categories) >= 35
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in noted)
    asked = report.read_json(run.run_dir / "report" / "score.json")["battery"]
    assert {record["category"] for record in asked} == categories
    # its scores are there already; beside it a base model's places stay empty
    monkeypatch.setattr(battery, "battery_scores", None)
    compare = ("base", "sft2")
    draws = replace(run, report=ReportConfig(draw=True))
    score.main(draws, replace(options, checkpoint=(), compare=compare))
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[-2] for row in rows if row.startswith("battery: capitals")] == ["–"]
    (page,) = (run.run_dir / "report").glob("*.html")
    drawn = page.read_text(encoding="utf-8")
    assert all(f"battery: {name}" in drawn for name in categories)


def test_beside_chat_models_a_base_model_is_not_asked_to_chat(loaded: Loaded) -> None:
    base = replace(loaded, state={**loaded.state, "stage": "base"})
    chat = replace(loaded, state={**loaded.state, "stage": "sft2"})
    several, one = (
        Options(compare=("base", "sft2"), tasks=("copa", "gsm8k_chat", "battery")),
        Options(tasks=("gsm8k_chat",)),
    )
    assert score.tasks_wanted(base, several) == ["copa"]
    assert score.tasks_wanted(chat, several) == ["copa", "gsm8k_chat", "battery"]
    assert score.tasks_wanted(base, one) == ["gsm8k_chat"]  # and refuses, with the reason


def test_a_task_that_is_none_is_answered_with_those_there_are(loaded: Loaded) -> None:
    with pytest.raises(UserError, match=r"no task piqua.*arc_easy"):
        score.tasks_wanted(loaded, Options(tasks=("piqua",)))


def test_a_group_goes_on_where_a_file_is_missing_and_a_task_by_name_does_not(
    run: Config, files: Path
) -> None:
    score.main(run, Options(checkpoint=("base",), tasks=("core",), files=str(files), limit=2))
    assert "4 of CORE's 22 tasks" in {s["task"] for s in scores_of(run)}
    with pytest.raises(UserError, match=r"piqa\.jsonl"):
        score.main(run, Options(checkpoint=("base",), tasks=("piqa",), files=str(files)))


def test_a_network_that_is_not_there_is_asked_once(
    run: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """22 tasks that cannot be fetched make one line, after one wait."""
    monkeypatch.delenv("HEARTH_DATA", raising=False)
    asked = []

    def refuse(address: str, timeout: float) -> None:
        asked.append(address)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    score.main(run, Options(checkpoint=("base",), tasks=("core",)))
    assert len(asked) == 1
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert "hellaswag_zeroshot, jeopardy," in told
    assert "--files" in told


def test_two_steps_of_a_stage_have_columns_of_their_own(tmp_path: Path) -> None:
    config = replace(PRESETS["demo"], runs=str(tmp_path), name="mine")
    steps = [config.run_dir.resolve() / "base" / step for step in ("step-05", "step-10")]
    assert score.heads_of(steps, config) == ["base step-05", "base step-10"]
    assert score.heads_of(steps[:1], config) == ["base"]

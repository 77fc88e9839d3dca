"""The study of the HRM head: rows that resume, are shared, and lose nothing; figures that mean what
they say.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import hrm
from hrm import ARMS, Row, Study, Tally, plan

from hearth.training.batches import Batch


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, float]]:
    """Rows that were run, with a learning rate that makes 1e-2 the best."""
    calls: list[tuple[str, float]] = []

    def fake(row: Row, lr: float, subject: None) -> dict[str, Any]:
        calls.append((row.key, lr))
        return {"key": row.key, "task": row.task, "lr": lr, "final": {"loss": abs(lr - 1e-2)}}

    monkeypatch.setattr(hrm, "run", fake)
    return calls


TUNING = hrm.tuned_on(Row("main", "automaton", "dense", 1))
ROWS = [*TUNING, Row("main", "automaton", "dense", 0), Row("main", "addition", "dense", 0)]


def test_rows_that_are_there_are_not_run_again(tmp_path: Path, ran) -> None:
    Study(tmp_path).work(ROWS[:2], lambda row: None)
    Study(tmp_path).work(ROWS, lambda row: None)
    assert [key for key, _ in ran] == [
        row.key for row in ROWS if row.key != "automaton-dense-main-s0"
    ]
    assert dict(ran)["addition-dense-main-s0"] == 1e-2
    assert list((tmp_path / "locks").iterdir()) == []


def test_the_best_tuning_row_is_the_first_seed_of_its_task(tmp_path: Path, ran) -> None:
    study = Study(tmp_path)
    study.work(ROWS, lambda row: None)
    best, adopted = (
        study.results()[row.key] for row in (Row("tune", "automaton", "dense", 0, 1e-2), ROWS[-2])
    )
    assert adopted == {**best, "key": "automaton-dense-main-s0", "kind": "main"}


def test_a_row_that_was_killed_is_run_again_and_its_torn_line_hurts_no_other(
    tmp_path: Path, ran, monkeypatch
) -> None:
    study = Study(tmp_path)
    study.work(ROWS[:1], lambda row: None)
    fake = hrm.run

    def dies(*given: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(hrm, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        study.work(ROWS[:2], lambda row: None)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"key": "automaton-dense-tune-s0-lr0.0')
    monkeypatch.setattr(hrm, "run", fake)
    study.work(ROWS[:2], lambda row: None)
    assert [key for key, _ in ran] == [row.key for row in ROWS[:2]]
    assert set(study.results()) == {row.key for row in ROWS[:2]}


def test_a_row_of_a_living_process_is_left_alone_and_one_of_a_dead_is_taken_over(
    tmp_path: Path,
) -> None:
    claim = f"import sys; sys.path[:0] = {sys.path!r}; import hrm, pathlib; "
    claim += f"print(hrm.Study(pathlib.Path({str(tmp_path)!r})).claim('a'), flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", claim], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "True\n"
    study = Study(tmp_path)
    assert not study.claim("a")
    assert study.claim("b")
    other.communicate("\n")
    assert study.claim("a")
    assert not study.claim("a")


def test_rows_wait_for_their_learning_rate(tmp_path: Path, ran, monkeypatch) -> None:
    """Another process is at work on a tuning row: the rows that need it come after it."""
    study = Study(tmp_path)
    assert study.claim(TUNING[0].key)
    monkeypatch.setattr("time.sleep", lambda seconds: study.release(TUNING[0].key))
    study.work(ROWS, lambda row: None)
    assert [key for key, _ in ran] == [row.key for row in [*TUNING[1:], TUNING[0], ROWS[-1]]]


def test_a_learning_rate_that_one_seed_likes_by_luck_is_not_taken(tmp_path: Path) -> None:
    study = Study(tmp_path)
    losses = {5e-3: (0.1, 0.99), 1e-2: (0.4, 0.4), 2e-2: (0.38, 0.41)}  # 0.01 and 0.02 tie
    for row in TUNING:
        loss = losses[row.lr][hrm.TUNINGS["automaton"].seeds.index(row.seed)]
        study.add({"key": row.key, "task": row.task, "lr": row.lr, "final": {"loss": loss}})
    assert study.rate(Row("main", "automaton", "dense", 1), study.results()) == 1e-2


def test_every_row_of_the_plan_is_told_apart_and_tuned_before_it_is_needed() -> None:
    keys = [row.key for row in plan()]
    assert len(set(keys)) == len(keys)
    for row in plan():
        if not row.lr:
            assert max(keys.index(tuned.key) for tuned in hrm.tuned_on(row)) < keys.index(row.key)


def test_arms_of_equal_parameters_and_flops_are_that() -> None:
    for task, base in (("text", hrm.TEXT), ("automaton", hrm.REASONING)):
        n = {arm: hrm.Model(ARMS[arm].shape(base)).n_parameters() for arm in ARMS}
        flops = {arm: hrm.flops_a_token(arm, task, base.context) for arm in ARMS}
        for arm in ("dense", "looped", "full_ds"):
            assert abs(n[arm] / n["full"] - 1) < 0.05, arm
        for arm in ("deep", "looped"):
            assert abs(flops[arm] / flops["full"] - 1) < 0.03, arm
        longer = Row("flops", task, "dense", 0).steps(base.context) / Row(
            "main", task, "dense", 0
        ).steps(base.context)
        assert longer == pytest.approx(flops["full"] / flops["dense"], rel=0.01)


def test_tally_counts_tokens_and_whole_rows() -> None:
    targets = torch.tensor([1, 2, 3, 1, 2, 3])
    batch = Batch(
        targets, targets, torch.tensor([0, 1, 1, 1.0, 1, 0]), torch.zeros(6, dtype=torch.bool), 3
    )
    logits = torch.full((4, 5), -20.0)
    # the last one, of the second row, is wrong
    logits[torch.arange(4), torch.tensor([2, 3, 1, 0])] = 0.0
    tally = Tally()
    tally.add(batch, logits)
    assert (tally.right, tally.tokens, tally.whole, tally.rows) == (3, 4, 1, 2)
    assert tally.nats == pytest.approx(20.0 + 4 * math.log1p(4 * math.exp(-20)), rel=1e-4)


@pytest.mark.parametrize("arm", ["dense", "looped", "full_ds"])
def test_an_arm_trains_and_is_examined(arm: str, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setitem(hrm.SIZES, "sudoku", hrm.Size(5, 2, 1.0))
    row = Row("main", "sudoku", arm, 0)
    result = hrm.run(row, 1e-2, hrm.Reasoning("sudoku", 0))
    assert len(result["curve"]) == hrm.N_POINTS
    assert set(result["sizes"]) == {"4", "6", "8", "10 (untrained)"}
    if arm.startswith("full"):
        trained = ARMS[arm].hrm.h_cycles
        assert result["by_cycle"][trained]["accuracy"] == pytest.approx(
            result["final"]["accuracy"], abs=0.02
        )
    study = Study(tmp_path)
    study.add(result)
    hrm.print_tables(study)
    assert ARMS[arm].label in capsys.readouterr().out


def test_text_is_asked_for_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(hrm.UserError, match="--data"):
        hrm.text_tokens(tmp_path, None)
    assert os.listdir(tmp_path) == []

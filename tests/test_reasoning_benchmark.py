"""The study of reasoning: runs that are not repeated, marks that mean what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import reasoning
from reasoning_tasks import TASKS, VOCAB_SIZE

from model import Model


def test_a_symbol_that_is_wrong_costs_its_row_and_no_other() -> None:
    batch = reasoning.exam(TASKS["addition"], 2)
    counts = batch.weights > 0
    right = torch.nn.functional.one_hot(batch.targets[counts], VOCAB_SIZE).float()
    assert reasoning.marks(batch, right) == {"symbols": 1.0, "rows": 1.0}
    right[0] = right[0].roll(1)
    n_symbols, n_rows = int(counts.sum()), reasoning.EXAM_ROWS
    found = reasoning.marks(batch, right)
    assert found["symbols"] == pytest.approx(1 - 1 / n_symbols)
    assert found["rows"] == pytest.approx(1 - 1 / n_rows)


def test_both_arms_are_as_deep_and_all_rows_fit() -> None:
    for task in TASKS.values():
        plain, head = (reasoning.shape(arm, task.row_length) for arm in reasoning.ARMS)
        assert plain.hrm is None
        assert head.hrm is not None
        assert plain.n_blocks == head.n_blocks == reasoning.DEPTH
        with torch.device("meta"):
            assert Model(head).n_parameters() == pytest.approx(
                Model(plain).n_parameters(), rel=0.02
            )


def test_runs_that_are_there_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reasoning, "STEPS", 2)
    monkeypatch.setattr(reasoning, "EXAM_ROWS", 8)
    command = [str(tmp_path), "--tasks", "permutation", "--seeds"]
    reasoning.main([*command, "0"])
    first = (tmp_path / "reasoning.jsonl").read_text()
    assert len(first.splitlines()) == len(reasoning.ARMS)
    reasoning.main([*command, "0", "1"])
    both = (tmp_path / "reasoning.jsonl").read_text()
    assert both.startswith(first)
    assert len(both.splitlines()) == 2 * len(reasoning.ARMS)
    assert "| permutation | " in capsys.readouterr().out

"""Every part of benchmarks/card.py runs, in small, on a machine without a card."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import stages

from config import UserError

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import card


def measured(part: str, out: Path, *words: str) -> list[dict]:
    card.main(["--part", part, "--tiny", "--out", str(out), *words])
    (path,) = out.glob(f"*-{part}.json")
    said = json.loads(path.read_text())
    assert (said["part"], said["device"][:3]) == (part, "CPU")
    return said["rows"]


def test_the_check_counts_the_tests_that_want_a_card(tmp_path: Path) -> None:
    (row,) = measured("check", tmp_path)
    assert row["exit code"] == 0
    assert row["passed"] + row["skipped"] >= 3


def test_speed_is_measured_plain_and_with_the_head(tmp_path: Path) -> None:
    rows = measured("speed", tmp_path)
    assert [(row["model"], row["context"]) for row in rows] == [
        (model, context) for model in ("plain", "HRM head") for context in card.TINY.contexts
    ]
    assert all(row["MFU"] > 0 and row["tokens/s"] > 0 for row in rows)


def test_memory_is_measured_beside_its_estimate(tmp_path: Path) -> None:
    rows = measured("memory", tmp_path)
    assert {row["recompute"] for row in rows} == {"none", "head", "all"}
    assert all(row["measured GiB"] > 0 for row in rows)


def test_decoding_is_measured_for_each_number_of_rows(tmp_path: Path) -> None:
    rows = measured("decode", tmp_path)
    assert [row["rows"] for row in rows] == list(card.TINY.batches)
    assert all(row["tokens/s"] > 0 for row in rows)


def test_training_stops_in_time_and_the_next_call_finishes_it(tmp_path: Path) -> None:
    words = stages.write_inputs(tmp_path / "in")
    at = words.index("--data.text_files")
    settings = [*words[2:at], *words[at + 2 :]]
    call = ["--runs", str(tmp_path), "--text", str(tmp_path / "in" / "text.jsonl")]
    assert measured("train", tmp_path / "a", *call, "--seconds", "0", "--", *settings) == []
    rows = measured("train", tmp_path / "b", *call, "--", *settings)
    assert rows[-1]["step"] == 30
    assert any(name.startswith("bpb") for name in rows[-1])


def test_a_script_is_asked_to_stop_by_what_the_system_has(monkeypatch, tmp_path: Path) -> None:
    """Windows knows no SIGINT of another process: its group gets a Ctrl-Break."""
    asked: list[object] = []

    class Process:
        def __init__(self, words, **own) -> None:
            asked.append(own.get("creationflags"))

        def wait(self, seconds: float | None = None) -> int:
            if seconds is not None:
                raise subprocess.TimeoutExpired("x", seconds)
            return 0

        def send_signal(self, number) -> None:
            asked.append(number)

    monkeypatch.setattr(card.subprocess, "Popen", Process)
    assert not card.run_until(0.0, ["a.py"])
    monkeypatch.setattr(card.signal, "CTRL_BREAK_EVENT", "ctrl-break", raising=False)
    monkeypatch.setattr(card.subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    assert not card.run_until(0.0, ["a.py"])
    assert asked == [0, signal.SIGINT, 512, "ctrl-break"]


def test_training_without_text_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--text"):
        measured("train", tmp_path)


def test_a_table_is_markdown_with_a_line_a_row() -> None:
    assert card.table([{"a": 1, "b": 0.12345}, {"a": 2, "b": 12345.6}]) == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | 0.123 |",
        "| 2 | 12,346 |",
    ]
    assert card.table([]) == ["nothing was measured"]

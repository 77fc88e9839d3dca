"""Every part of benchmarks/card.py runs, in small, on a machine without a card."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import stages
import torch

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
    assert row["failed"] == row["error"] == 0


def test_the_check_stops_in_time_and_says_what_failed(tmp_path: Path, monkeypatch) -> None:
    """The third test stands for one that is still running when the time is up."""
    test, timers = tmp_path / "test_x.py", []
    test.write_text(
        "import os, pytest, signal\n\n\n@pytest.mark.gpu\ndef test_wrong(): assert False\n\n\n"
        "@pytest.mark.gpu\ndef test_right(): pass\n\n\n@pytest.mark.gpu\n"
        "def test_waits(): os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))\n"
    )

    class Timer:
        def __init__(self, seconds: float, kill) -> None:
            timers.append((seconds, kill.__name__))

        start = cancel = lambda self: None

    monkeypatch.setattr(card.threading, "Timer", Timer)
    monkeypatch.setattr(card, "TINY", replace(card.TINY, tests=(str(test),)))
    failed, counts = measured("check", tmp_path, "--seconds", "480")
    assert failed == {"test": "test_wrong", "result": "failed"}
    assert (counts["passed"], counts["failed"]) == (1, 1)
    assert counts["exit code"] != 0
    ((seconds, what),) = timers
    assert what == "kill"
    assert 400 < seconds <= 480


def test_a_row_that_fails_keeps_the_others_and_each_is_written_at_once(
    tmp_path: Path, monkeypatch
) -> None:
    seen = []

    def rates(config, n_tokens: int, repeats: int) -> list[float]:
        seen.append([json.loads(p.read_text())["rows"] for p in tmp_path.glob("*-speed.json")])
        if len(seen) == 2:
            raise RuntimeError("no kernel image")
        return [1000.0]

    monkeypatch.setattr(card, "micro_step_rates", rates)
    rows = measured("speed", tmp_path)
    assert ["error" in row for row in rows] == [False, True, False, False]
    assert rows[1]["error"] == "RuntimeError: no kernel image"
    assert [len(s[0]) if s else 0 for s in seen] == [0, 1, 2, 3]


def test_no_row_begins_when_the_time_is_up(tmp_path: Path) -> None:
    rows = measured("decode", tmp_path, "--seconds", "0")
    assert [row["error"] for row in rows] == ["not measured: the time was up"] * 2


def test_speed_is_measured_plain_and_with_the_head(tmp_path: Path) -> None:
    rows = measured("speed", tmp_path)
    assert [(row["model"], row["context"]) for row in rows] == [
        (model, context) for model in ("plain", "HRM head") for context in card.TINY.contexts
    ]
    assert all(row["MFU"] > 0 and row["tokens/s"] > 0 for row in rows)


# as much of nanoGPT's model.py as a race wants
NANOGPT = """
import torch


class GPTConfig:
    def __init__(self, **fields):
        vars(self).update(fields)


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_layer > 1 and config.block_size in (128, 256)
        self.table = torch.nn.Parameter(torch.randn(config.vocab_size, config.n_embd))

    def configure_optimizers(self, *given):
        return None

    def forward(self, ids, targets):
        logits = self.table[ids] @ self.table.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_rivals_are_timed_beside_the_plain_model(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "model.py").write_text(NANOGPT)
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)
    rows = measured("speed", tmp_path, "--nanogpt", str(tmp_path))
    rates = {(row["model"], row["context"]): row["tokens/s"] for row in rows}
    for context in card.TINY.contexts:
        (row,) = (r for r in rows if (r["model"], r["context"]) == ("nanogpt", context))
        assert row["bar"] == 1.3
        ratio = rates["plain", context] / rates["nanogpt", context]
        assert row["hearth / it"] == pytest.approx(ratio)


def test_memory_is_measured_beside_its_estimate(tmp_path: Path) -> None:
    rows = measured("memory", tmp_path)
    assert {row["recompute"] for row in rows} == {"none", "all"}
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
    assert rows[-1]["loss"] > 0
    assert any(name.startswith("bpb") for row in rows for name in row)


# finds what is installed, but for what a machine lent for an hour may lack
BARE = """
import sys
from importlib.machinery import PathFinder

ABSENT = {
    *("psutil", "tyro", "datasets", "huggingface_hub", "xdist", "pytest_timeout", "matplotlib"),
    *("rich", "schedulefree", "transformers", "torchao", "pynvml", "starlette", "uvicorn"),
    *("math_verify", "zstandard", "prompt_toolkit", "jinja2", "pandas", "scipy"),
}


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return None
        return PathFinder.find_spec(name, path, target)


sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.parametrize("part", ["check", "speed", "memory", "train", "decode"])
def test_a_part_runs_with_little_more_than_torch(part: str, tmp_path: Path) -> None:
    """On a machine that has only what the benchmark says it needs: every other package is gone."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    text = tmp_path / "text"
    text.mkdir()
    stages.write_inputs(tmp_path)
    (tmp_path / "text.jsonl").rename(text / "text.jsonl")
    words = [str(card.ROOT / "benchmarks" / "card.py"), "--part", part, "--tiny"]
    words += ["--out", str(tmp_path), "--text", str(text), "--runs", str(tmp_path)]
    words += ["--tokens", "20480"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    # the plugins that pyproject.toml asks for are found by their own entry points
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob(f"*-{part}.json")
    rows = json.loads(path.read_text())["rows"]
    assert rows
    assert not any(row.get("error") for row in rows), rows


def test_a_script_is_asked_to_stop_by_what_the_system_has(monkeypatch, tmp_path: Path) -> None:
    """Windows knows no SIGINT of another process: its group gets a Ctrl-Break."""
    asked: list[object] = []

    class Process:
        def __init__(self, words, **own) -> None:
            asked.append(own.get("creationflags"))

        def wait(self, seconds: float | None = None) -> int:
            if seconds == 0:
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


def test_a_script_that_does_not_stop_when_asked_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(card, "SAVING", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    assert not card.run_until(began + 3, ["-c", deaf])
    assert time.monotonic() < began + 30


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

"""The console line and metrics.jsonl."""

from __future__ import annotations

import os

import pytest

from hearth import log


def test_step_line_has_fixed_width_columns() -> None:
    early = {
        "loss": 10.4,
        "lr": 5e-4,
        "grad_norm": 0.8,
        "tokens_per_second": 118_000.0,
        "mfu": 0.41,
        "memory_gb": 14.2,
    }
    late = {
        "loss": 2.9,
        "lr": 1e-5,
        "grad_norm": 11.25,
        "tokens_per_second": 9_000.0,
        "mfu": 0.05,
        "memory_gb": 3.1,
    }
    lines = [
        log.step_line(step, 9600, figures | {"eta_seconds": 11520})
        for step, figures in ((1, early), (9600, late))
    ]
    assert [c for c in range(len(lines[0])) if lines[0][c] == "|"] == [
        c for c in range(len(lines[1])) if lines[1][c] == "|"
    ]
    assert (
        lines[0] == "step    1/9600 | loss 10.400 | lr 5.0e-04 | grad  0.80 |"
        "   118k tok/s | mfu  41% | 14.2 GB | eta  3h12m"
    )


def test_a_terminal_that_was_closed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, inside = os.openpty()
    os.close(terminal)
    with open(inside, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        log.say("nobody reads this")
        log.say("nor this")


def test_a_resumed_log_holds_each_step_once(tmp_path) -> None:
    first = log.RunLog(tmp_path)
    for step in (1, 2, 3):
        first.note("step", step, loss=0.1)
    again = log.RunLog(tmp_path, start=2)
    again.note("step", 3, loss=0.2)
    assert [(r["step"], r["loss"]) for r in log.read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 0.1),
        (2, 0.1),
        (3, 0.2),
    ]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert log.read_metrics(path) == [{"step": 1}]
    log.RunLog(tmp_path, start=1)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    "line", ["[1]", '"x"', "5", "null", "{}", '{"step": "2"}', '{"step": true}', "[" * 100_000]
)
def test_a_line_that_is_no_record_is_left_out(line: str, tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    assert log.read_metrics(path) == [{"step": 1}, {"step": 2}]
    log.RunLog(tmp_path, start=1)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    ("seconds", "text"), [(42, "42s"), (425, "7m05s"), (11_520, "3h12m"), (187_200, "2d04h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert log.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(950, "950"), (12_345, "12k"), (999_999, "1.0M"), (2.5e9, "2.5B")]
)
def test_counts(number: float, text: str) -> None:
    assert log.count(number) == text

"""What pretraining draws beside its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pretrain
from config import PRESETS
from hearth import log
from hearth.reporting.report import Reporter


def test_the_loss_is_drawn_beside_the_report(tmp_path: Path) -> None:
    config = replace(PRESETS["demo"], runs=str(tmp_path))
    run_log = log.RunLog(config.run_dir / "base")
    run_log.note("start", 0, steps=10)
    for step in range(1, 11):
        run_log.note(
            "step",
            step,
            loss=5 / step,
            tokens=100 * step,
            seconds=1.0 * step,
            tokens_per_second=100.0,
        )
    run_log.note("eval", 10, **{"bpb world": 1.5})
    pretrain.draw(config, Reporter(config))
    assert (config.run_dir / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (config.run_dir / "report" / "report.md").is_file()


def test_no_picture_where_none_is_wanted(tmp_path: Path) -> None:
    config = replace(PRESETS["demo"], runs=str(tmp_path))
    config = replace(config, report=replace(config.report, draw=False))
    pretrain.draw(config, Reporter(config))
    assert list(tmp_path.iterdir()) == []

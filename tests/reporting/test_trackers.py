"""Figures go to the services that were asked for, and a missing library is named with
its remedy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from config import UserError
from hearth import log
from hearth.reporting import trackers


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"uv run --with {name}"):
        trackers.open_trackers([name], tmp_path, 0, {})


def fake(name: str, seen: list[Any]) -> ModuleType:
    """A library that notes what it is given; trackio logs by itself, wandb by what `init` gives."""
    module = ModuleType(name)
    module.log = lambda figures, step: seen.append((step, figures))
    module.init = lambda **options: seen.append(options) or SimpleNamespace(log=module.log)
    return module


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_numbers_of_each_record_arrive_with_their_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setitem(sys.modules, name, fake(name, seen))
    run_log = log.RunLog(tmp_path / "mine" / "base")
    run_log.trackers = trackers.open_trackers(
        [name], tmp_path / "mine" / "base", 0, {"parameters": 5}
    )
    run_log.note("step", 3, loss=2.5, told="a word")
    run_log.note("sample", 3, prompt="The", text="end")
    options, first = seen
    assert options["name"] == "mine-base"
    assert options["config"] == {"parameters": 5}
    assert options["resume"] == "allow"
    assert first == (3, {"step/loss": 2.5})
    assert [r["kind"] for r in log.read_metrics(tmp_path / "mine" / "base" / "metrics.jsonl")] == [
        "step",
        "sample",
    ]


def test_tensorboard_gets_curves_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: Path, purge_step: int) -> None:
            seen.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def add_text(self, name: str, text: str, step: int) -> None:
            seen.append((name, text, step))

    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter)
    )
    (note,) = trackers.open_trackers(["tensorboard"], tmp_path, 7, {})
    note("step", 8, {"loss": 1.5})
    note("sample", 8, {"prompt": "The", "text": "end", "tokens": 9})
    assert seen == [
        (tmp_path / "tensorboard", 8),
        ("step/loss", 1.5, 8),
        ("sample/tokens", 9, 8),
        ("The", "end", 8),
    ]

"""Figures of a run in TensorBoard, trackio or wandb, beside `metrics.jsonl`, through their own
libraries.

In: the records that a run notes. Knows nothing of models or training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from config import UserError

Tracker = Callable[[str, int, dict[str, Any]], None]  # kind of record, step, figures
PROJECT = "hearth"


def open_trackers(
    names: Sequence[str], folder: Path, start: int, facts: dict[str, Any]
) -> list[Tracker]:
    """What sends each record to the services `names`; `folder` is the stage's, runs/<run>/<stage>.

    Raises `UserError` with the command to install where a library is missing.
    """
    return [
        {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}[n](folder, start, facts)
        for n in names
    ]


def _tensorboard(folder: Path, start: int, facts: dict[str, Any]) -> Tracker:
    _library("tensorboard")
    writer = import_module("torch.utils.tensorboard").SummaryWriter(
        folder / "tensorboard", purge_step=start + 1
    )

    def note(kind: str, step: int, figures: dict[str, Any]) -> None:
        for name, value in _numbers(figures).items():
            writer.add_scalar(f"{kind}/{name}", value, step)
        if kind == "sample":
            writer.add_text(figures["prompt"], figures["text"], step)

    return note


def _trackio(folder: Path, start: int, facts: dict[str, Any]) -> Tracker:
    library = _library("trackio")
    library.init(project=PROJECT, name=_name(folder), config=facts, resume="allow")
    return _logging_into(library.log)


def _wandb(folder: Path, start: int, facts: dict[str, Any]) -> Tracker:
    library = _library("wandb")
    name = _name(folder)
    run = library.init(
        project=PROJECT, name=name, id=name, dir=str(folder), config=facts, resume="allow"
    )
    return _logging_into(run.log)


def _logging_into(log: Callable[..., None]) -> Tracker:
    def note(kind: str, step: int, figures: dict[str, Any]) -> None:
        if numbers := _numbers(figures):
            log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)

    return note


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"log_to {name} needs the package {name}, which is not here ({error}). Start with "
            f"`uv run --with {name} …` instead of `uv run …`, or leave log_to away."
        ) from error


def _name(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}"


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    return {
        n: v for n, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }

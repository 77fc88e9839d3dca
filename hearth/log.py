"""What a person and a program see of a run: the console line, `metrics.jsonl`, progress bars.

In: a step's figures. Out: one fixed-width line per step on the terminal, the same values as JSON in
the run's folder. Knows nothing of models or data.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hearth.storage import write_text, writing


def is_first() -> bool:
    """Whether this is the process that talks, where torchrun started several."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Print a line without breaking a progress bar that is on screen."""
    if not is_first():
        return
    try:
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        # the terminal was closed: nobody reads, but a run has still to save
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def progress(total: float | None, unit: str, title: str, start: float = 0) -> tqdm:
    """A progress bar on a terminal, nothing in a pipe or a log file."""
    hidden = not (sys.stderr.isatty() and is_first())
    return tqdm(
        total=total,
        initial=start,
        unit=unit,
        desc=title,
        unit_scale=True,
        dynamic_ncols=True,
        leave=False,
        disable=hidden,
    )


def count(number: float) -> str:
    """A count in at most five characters: 950, 12k, 3.4M, 2.5B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            short = number / size
            return f"{short:.1f}{letter}" if short < 9.95 else f"{short:.0f}{letter}"
    return f"{number:.0f}"


def size(n_bytes: float) -> str:
    """A size in 10^3, 10^6, 10^9 bytes, as text."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.1f} {name}"
    return f"{n_bytes:.0f} B"


def duration(seconds: float) -> str:
    """A span of time as 42s, 7m05s, 3h12m or 2d04h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02}h"


# One column a figure, in one order for ever: name in metrics.jsonl, and how the console shows it.
COLUMNS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("loss", lambda v: f"loss {v:6.3f}"),
    ("lr", lambda v: f"lr {v:7.1e}"),
    ("grad_norm", lambda v: f"grad {v:5.2f}"),
    ("tokens_per_second", lambda v: f"{count(v):>6} tok/s"),
    ("mfu", lambda v: f"mfu {v:4.0%}"),
    ("memory_gb", lambda v: f"{v:4.1f} GB"),
    ("eta_seconds", lambda v: f"eta {duration(v):>6}"),
    ("skipped", lambda v: f"skipped {v}" if v else ""),
    ("reward", lambda v: f"reward {v:5.3f}"),
    ("stops", lambda v: f"stops {v:4.0%}"),
    ("length", lambda v: f"length {v:3.0f}"),
    ("entropy", lambda v: f"entropy {v:4.2f}"),
    ("dead_groups", lambda v: f"dead {v:4.0%}"),
)


def step_line(step: int, steps: int, figures: dict[str, Any]) -> str:
    """The log line of one step; a figure that was not measured leaves its column out."""
    width = len(str(steps))
    cells = [show(figures[name]) for name, show in COLUMNS if figures.get(name) is not None]
    return " | ".join([f"step {step:>{width}}/{steps}", *(cell for cell in cells if cell)])


class RunLog:
    """`metrics.jsonl` of one stage, and its lines on the console.

    A run that continues from step `start` first forgets what was noted after that step, so each
    step stands there once.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        # what else gets each record
        self.trackers: Sequence[Callable[[str, int, dict[str, Any]], None]] = ()
        if not is_first():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            before = read_metrics(self.path) if start else []
            kept = [record for record in before if record["step"] <= start]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def note(self, kind: str, step: int, **figures: Any) -> None:
        """Append one record to `metrics.jsonl`; `kind` says what it is: step, eval,
        sample, start.
        """
        if not is_first():
            return
        for tracker in self.trackers:
            tracker(kind, step, figures)
        with writing(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")


def was_noted(path: Path, kind: str, step: int) -> bool:
    """Whether a `metrics.jsonl` holds a record of this kind at a step, by whichever start."""
    noted = read_metrics(path) if path.exists() else []
    return any(r.get("kind") == kind and r["step"] == step for r in noted)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`: JSON objects with a step. A line that is none, such as one
    cut off by a kill, is left out.
    """
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53:
            records.append(record)
    return records

"""The HRM head against the plain model on six reasoning tasks, both by the presets' rule.

In: nothing; the problems are made (`reasoning_tasks.py`). Out: a line of JSON a run in
OUT/reasoning.jsonl, and a table. Runs that are there already are not run again.

    uv run benchmarks/reasoning.py OUT

Four blocks of the presets' shape, 128 symbols, the rule's learning rate. Both arms see the same
problems in the same order for as many steps; seconds are the process' own, in training steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a study takes one core

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import reasoning_tasks
from reasoning_tasks import TASKS, VOCAB_SIZE, Task, lay

from config import PRESETS, LoopConfig, ModelConfig, OptimConfig, bigram_rows_for, lr_for, shaped
from hearth.cli import run_script
from hearth.training import gradients
from hearth.training.batches import Batch
from hearth.training.optim import build_optimizers
from model import Model, PackedSequences, build_model

ARMS = ("plain", "head")
DEPTH, STEPS, ROWS = 4, 450, 32  # blocks; optimizer steps of a run; rows of a step
EXAM_ROWS = 384  # held out, of each size
LOOP, OPTIM = LoopConfig(), OptimConfig(momentum_warmup_steps=50)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    book = options.out / "reasoning.jsonl"
    for seed in options.seeds:
        for task in options.tasks:
            for arm in ARMS:
                if (task, arm, seed) not in done(book):
                    found = run(task, arm, seed)
                    with book.open("a") as file:
                        file.write(json.dumps(found) + "\n")
    print(table(list(done(book).values())))


def done(book: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    lines = book.read_text().splitlines() if book.exists() else []
    return {(r["task"], r["arm"], r["seed"]): r for r in map(json.loads, lines)}


def shape(arm: str, row_length: int) -> ModelConfig:
    """The presets' shape for symbols and rows of a few dozen, each of which sees all before it."""
    card = replace(PRESETS["16gb"].model, context=row_length, window=None)
    card = replace(card, hrm=card.hrm if arm == "head" else None)
    rows = bigram_rows_for(VOCAB_SIZE)
    return replace(shaped(card, DEPTH), vocab_size=VOCAB_SIZE, bigram_rows=rows)


def run(task_name: str, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm on one task; its figures by size, the one beyond the trained ones last."""
    task = TASKS[task_name]
    model = build_model(shape(arm, task.row_length), seed=seed)
    model.dtype = torch.float32
    lr = lr_for(model.config, STEPS)
    optimizers = build_optimizers(model, OPTIM, lr)
    stream = reasoning_tasks.rows(task, str(seed), held_out=False)
    seconds = 0.0
    for step in range(STEPS):
        batch = lay(list(islice(stream, ROWS)), task.row_length)
        started = time.process_time()
        train_step(model, optimizers, batch, step)
        seconds += time.process_time() - started
    sizes = {str(size): examined(model, exam(task, size)) for size in (*task.sizes, task.beyond)}
    return {
        **{"task": task_name, "arm": arm, "seed": seed, "lr": lr, "cpu_seconds": seconds},
        **{"parameters": model.n_parameters(), "sizes": sizes},
    }


def train_step(model: Model, optimizers: Any, batch: Batch, step: int) -> None:
    optimizers.schedule(step, STEPS, LOOP)
    gradients.accumulate(model, batch, len(batch.ids))
    torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
    optimizers.step()
    optimizers.zero_grad()


def exam(task: Task, size: int) -> Batch:
    given = list(
        islice(reasoning_tasks.rows(task, "held out", held_out=True, size=size), EXAM_ROWS)
    )
    return lay(given, max(task.row_length, len(given[0][0]) - 1))


@torch.no_grad()
def examined(model: Model, batch: Batch) -> dict[str, float]:
    hidden = model(batch.ids, PackedSequences(batch.starts, batch.row_length))
    return marks(batch, model.logits(hidden[batch.weights > 0]))


def marks(batch: Batch, logits: Tensor) -> dict[str, float]:
    """Share of right symbols, and of rows whose every answer is right, for the logits (K, V) at the
    targets that count.
    """
    counts = batch.weights > 0
    wrong = logits.argmax(dim=-1) != batch.targets[counts]
    row = counts.nonzero().flatten() // batch.row_length
    n_rows = len(row.unique())
    return {
        "symbols": 1 - wrong.float().mean().item(),
        "rows": (n_rows - len(row[wrong].unique())) / n_rows,
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Right symbols and right rows in per cent over the trained sizes, a seed after the other."""

    def cell(task: str, arm: str, what: str) -> str:
        of = sorted(
            (r for r in runs if (r["task"], r["arm"]) == (task, arm)), key=itemgetter("seed")
        )
        return ", ".join(f"{100 * mean(r, what):.1f}" for r in of) or "–"

    def mean(r: dict[str, Any], what: str) -> float:
        return statistics.fmean(r["sizes"][str(size)][what] for size in TASKS[r["task"]].sizes)

    lines = ["| task | plain: symbols | rows | head: symbols | rows | CPU seconds, head / plain |"]
    lines.append("|" + "---|" * 6)
    for task in TASKS:
        cells = [cell(task, arm, what) for arm in ARMS for what in ("symbols", "rows")]
        took = {
            arm: [r["cpu_seconds"] for r in runs if r["arm"] == arm and r["task"] == task]
            for arm in ARMS
        }
        ratio = f"{sum(took['head']) / sum(took['plain']):.2f}" if all(took.values()) else "–"
        lines.append(f"| {task} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def seconds_of(runs: list[dict[str, Any]], task: str, arm: str) -> float:
    """Of a run in the mean; 0 where there is none."""
    of = [r["cpu_seconds"] for r in runs if (r["task"], r["arm"]) == (task, arm)]
    return statistics.fmean(of) if of else 0.0


if __name__ == "__main__":
    run_script(main)

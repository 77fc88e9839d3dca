"""How fast tasks are scored: batches with shared beginnings against one text a forward pass, and
that both agree.

In: a folder with the tasks' files (llm-foundry's local_data). Out: tokens per second of both ways,
by task, over items taken evenly from each; and how long all items take, estimated by their tokens
at the speeds found. A token is one of a text as the paper scores it: beginning and ending of every
option, whether recomputed or not.

    uv run benchmarks/score.py --files local_data --checkpoint runs/16gb/base      a trained model
    uv run benchmarks/score.py --files local_data --preset 16gb --tokenizer FOLDER  untrained
    uv run benchmarks/score.py --files local_data --preset 16gb --limit 4
        the whole of CORE, a rough idea
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.agreement import add_model, alone, load
from config import UserError
from hearth import hardware, log
from hearth.cli import run_script
from hearth.evaluation import tasks
from hearth.training.checkpoint import Loaded


def one_by_one(loaded: Loaded, asked: list[tasks.Prompt]) -> list[tasks.Outcome]:
    """The obvious way: every text in a forward pass of its own, with the logits of all
    its tokens.
    """
    found = []
    for prompt in asked:
        texts = zip(prompt.rows, prompt.starts, strict=True)
        pairs = [alone(loaded, row[1:start], row[start:]) for row, start in texts]
        n_tokens = [len(row) - start for row, start in zip(prompt.rows, prompt.starts, strict=True)]
        nats, greedy = [-likelihood for likelihood, _ in pairs], [is_top for _, is_top in pairs]
        found.append(tasks.Outcome(nats, n_tokens, greedy, prompt.gold, prompt.category))
    return found


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--files", type=Path, help="folder with the tasks' files")
    add_model(words)
    words.add_argument("--tasks", nargs="+", default=[task.name for task in tasks.CORE])
    words.add_argument("--limit", type=int, default=16, help="items of each task")
    words.add_argument("--batch-tokens", type=int, default=4096, help="columns of a pass")
    options = words.parse_args()
    loaded = load(options)
    model, tokenizer = loaded.model, loaded.tokenizer
    print(
        f"{hardware.describe(model.device)}, {model.n_parameters():,} parameters, "
        f"{str(model.dtype).removeprefix('torch.')}"
    )
    print(
        f"{'task':<34}{'items':>7}{'tokens':>13}{'alone':>10}{'batched':>10}  tok/s  {'ratio':>6}  "
        "same choice"
    )
    whole = [0, 0, 0.0, 0.0]  # items, tokens, seconds of both ways, for the tasks as they are
    for name in options.tasks:
        task = tasks.TASKS[name]
        try:
            items = tasks.read_items(tasks.find_file(task.file, options.files, Path("runs/tasks")))
        except UserError as error:
            print(f"{name:<34}left out: {str(error).split(':')[0]}")
            continue
        prompts = tasks.prompts(task, items, tokenizer, model.config.context, None)
        asked = prompts[:: max(1, len(prompts) // options.limit)][: options.limit]
        n_tokens, n_all_tokens = (
            sum(len(row) for p in some for row in p.rows) for some in (asked, prompts)
        )
        alone, by_itself = timed(one_by_one, loaded, asked)
        batched, together = timed(tasks.outcomes, model, asked, batch_tokens=options.batch_tokens)
        same = sum(
            a.choice() == b.choice() and a.greedy == b.greedy
            for a, b in zip(by_itself, together, strict=True)
        )
        print(
            row(name, len(asked), n_tokens, alone, batched) + f"  {same}/{len(asked)}", flush=True
        )
        part = n_all_tokens / n_tokens
        mine = (len(prompts), n_all_tokens, part * alone, part * batched)
        whole = [x + y for x, y in zip(whole, mine, strict=True)]
    print(row("all items, at these speeds", *whole))
    print(
        f"one text a pass {log.duration(whole[2])}, batched {log.duration(whole[3])}: computed "
        "from the items' tokens"
    )


def timed(
    way: Callable[..., list[tasks.Outcome]], *given: Any, **named: Any
) -> tuple[float, list[tasks.Outcome]]:
    """Seconds that a way of scoring takes, and what it finds."""
    started = time.perf_counter()
    found = way(*given, **named)
    return time.perf_counter() - started, found


def row(name: str, n_items: float, n_tokens: float, alone: float, batched: float) -> str:
    speeds = f"{n_tokens / alone:>10,.0f}{n_tokens / batched:>10,.0f}"
    return f"{name:<34}{n_items:>7.0f}{n_tokens:>13,.0f}{speeds}  tok/s  {alone / batched:>5.2f}×"


if __name__ == "__main__":
    run_script(main, "stopped.")

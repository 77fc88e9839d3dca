"""Score checkpoints: bits per byte, CORE's 22 tasks, chat tasks, the demo world's questions; side
by side if you like.

In: a run's furthest checkpoint, or any others; the tasks' files, from a folder or fetched. Out: a
table on the console, runs/<run>/report/score.json, and the run's report redrawn.

    uv run score.py --preset demo
    uv run score.py --preset 16gb --tasks core
        one group of tasks: bpb, world, core, chat
    uv run score.py --name mine --tasks battery
        short prompts in many categories for a chat model, each checked by rule
    uv run score.py --preset 16gb --tasks piqa arc_easy --limit 500
        some tasks, the first items of each
    uv run score.py --preset 16gb --compare base sft1 sft2
        stages side by side
    uv run score.py --compare runs/a runs/b
        runs side by side, with a page of both
    uv run score.py --preset 16gb --lm-eval arc_easy hellaswag
        any task of lm-eval (uv sync --extra lm-eval)
    uv run torchrun --nproc-per-node 2 score.py --preset 16gb
        on two cards
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from config import Config, UserError
from hearth import cli, hardware, log, run
from hearth.evaluation import battery, chat_tasks, scores, tasks
from hearth.evaluation.scores import NAMES, Bench, Score, ScoreBook
from hearth.reporting import report
from hearth.training import checkpoint, distributed
from hearth.training.checkpoint import Loaded


@dataclass(frozen=True)
class Options:
    """What only this script knows."""

    # checkpoints, stages (base sft1 sft2) or runs; none is the run's furthest stage
    checkpoint: tuple[str, ...] = ()
    # the same, side by side: takes scores that are there already, draws a page of runs
    compare: tuple[str, ...] = ()
    # groups (bpb world core chat battery) or single tasks; none is what suits the checkpoint
    tasks: tuple[str, ...] = ()
    files: str | None = None  # folder with the tasks' files; None is $HEARTH_DATA, or fetches them
    limit: int | None = None  # score only the first items of each task
    n_questions: int = 200  # held-out questions asked about the demo world
    show_wrong: int = 5  # wrong answers about the demo world that are printed
    lm_eval: tuple[str, ...] = ()  # tasks of lm-eval to run as well
    lm_eval_files: str | None = None  # folder with your own task files for lm-eval


SCRIPT = cli.Script(__doc__, Options(), ("device", "report"))


def main(config: Config, options: Options) -> None:
    """Score every checkpoint asked for, print them side by side, keep them, draw the report."""
    with distributed.group(config.device):
        score_all(config, options)


def score_all(config: Config, options: Options) -> None:
    """The same, of several processes in each of them: they share the items of a task, the first one
    alone keeps and draws.
    """
    check(options)
    wanted = options.compare or options.checkpoint
    folders = [run.find_checkpoint(name, config).resolve() for name in wanted or (None,)]
    columns = [score_checkpoint(folder, config, options) for folder in folders]
    print_table(heads_of(folders, config), columns)
    if not log.is_first():
        return
    runs = list(dict.fromkeys(run_folder(folder, config) for folder in folders))
    for folder in runs:
        page = report.write(of_run(folder, config)) if config.report.draw else None
    if options.compare and len(runs) > 1:
        page = report.compare(runs, config)
    if page:
        log.say(f"report: {near(page)}")


def check(options: Options) -> None:
    """Raises `UserError` for a number of items that cannot be scored."""
    for name in ("limit", "n_questions"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; give at least 1.")


def of_run(folder: Path, config: Config) -> Config:
    """The config with another run's folder."""
    return replace(config, runs=str(folder.parent), name=folder.name)


def run_folder(folder: Path, config: Config) -> Path:
    """The run that a checkpoint belongs to; one that lies elsewhere counts to the run at hand."""
    mine = folder.parent.name not in run.TRAINED or folder.parent.parent == config.run_dir.resolve()
    return config.run_dir if mine else folder.parent.parent


def near(path: Path) -> Path:
    """A path as it is written from the current folder, where it lies below that."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def score_checkpoint(folder: Path, config: Config, options: Options) -> list[Score]:
    """All scores asked for of one checkpoint; they join the score.json of its run."""
    loaded = checkpoint.load_for_inference(folder, hardware.pick_device(config.device))
    run_dir, files = run_folder(folder, config), options.files or os.environ.get("HEARTH_DATA")
    book = ScoreBook(run_dir / "report" / "score.json", folder, loaded.state, options.limit)
    store = Path(config.runs) / "tasks"
    bench = Bench(loaded, run_dir, Path(files) if files else None, store, options.limit)
    log.say(f"score of {near(folder)}")
    found: list[Score] = []
    left_out: dict[str, list[str]] = {}  # reason → tasks
    for name in tasks_wanted(loaded, options):
        known = noted(name, book, options) if options.compare else None
        try:
            found += scored(name, bench, book, options) if known is None else known
        except UserError as error:
            if name in options.tasks:
                raise
            left_out.setdefault(str(error), []).append(name)
    for reason, names in left_out.items():
        log.say(f"left out: {', '.join(names)}. {reason}")
    core = kept("core", scores.core_score(found), book)
    return [*core, *found, *(scored("lm-eval", bench, book, options) if options.lm_eval else [])]


def tasks_wanted(loaded: Loaded, options: Options) -> list[str]:
    """The names of single tasks: those asked for, or what suits the checkpoint."""
    chats = loaded.state["stage"] != "base"
    if options.tasks:
        names = options.tasks
    elif any(source.demo for source in loaded.config.data.corpora()):
        names = ("bpb", "world")
    else:
        names = ("bpb", "core", "mmlu", *(("chat",) if chats else ()))
    groups = {"core": [task.name for task in tasks.CORE], "chat": list(chat_tasks.CHAT)}
    singles = list(dict.fromkeys(single for name in names for single in groups.get(name, [name])))
    talks = ["battery", *chat_tasks.CHAT]
    known = ["bpb", "world", *tasks.TASKS, *talks]
    if unknown := [name for name in singles if name not in known]:
        raise UserError(
            f"There is no task {', '.join(unknown)}. Groups: bpb, world, core, chat, battery. "
            f"Tasks: {', '.join(known)}."
        )
    # beside chat models its places in the table stay empty
    alone = chats or len(options.compare) < 2
    return [name for name in singles if alone or name not in talks]


def noted(name: str, book: ScoreBook, options: Options) -> list[Score] | None:
    """One task's scores in the run's book, None where there are none of as many items."""
    n_questions = chat_tasks.n_world_questions(options.limit, options.n_questions)
    return book.known(name, n_questions if name == "world" else None)


def scored(name: str, bench: Bench, book: ScoreBook, options: Options) -> list[Score]:
    """One task's scores, printed and kept. Raises `UserError` where its files are missing."""
    started = time.monotonic()
    if name == "bpb":
        found = scores.bits_per_byte_scores(bench)
    elif name == "world":
        found, book.book["asked"] = chat_tasks.world_scores(bench, options.n_questions)
        wrong = [answer for answer in book.book["asked"] if not answer["right"]]
        for answer in wrong[: options.show_wrong]:
            log.say(chat_tasks.wrong_line(answer))
    elif name == "battery":
        found, book.book["battery"] = battery.battery_scores(bench)
    elif name == "lm-eval":
        found = lm_eval_scores(bench, options)
    elif name in chat_tasks.CHAT:
        found = chat_tasks.chat_scores(name, bench)
    else:
        found = [scores.task_score(tasks.TASKS[name], bench)]
    seconds = time.monotonic() - started
    return kept(name, [replace(score, seconds=seconds) for score in found], book)


def kept(source: str, found: list[Score], book: ScoreBook) -> list[Score]:
    """Scores printed and noted in the run's book."""
    for score in found:
        log.say(score.line())
    book.keep(source, found)
    return found


def lm_eval_scores(bench: Bench, options: Options) -> list[Score]:
    """Tasks of lm-eval; `UserError` where it is not installed."""
    try:
        from hearth.evaluation import lm_eval_adapter
    except ImportError as error:
        raise UserError("lm-eval is not installed: `uv sync --extra lm-eval` gets it.") from error
    looks = {"limit": options.limit, "own_tasks": options.lm_eval_files}
    return lm_eval_adapter.lm_eval_scores(bench.loaded, options.lm_eval, **looks)


def heads_of(folders: Sequence[Path], config: Config) -> list[str]:
    """What checkpoints are called in the table, as on the page: by their stage, of several runs by
    run and stage, of several steps of a stage by the step too; one that lies elsewhere by its
    folder.
    """
    places = [run_folder(folder, config) for folder in folders]
    runs = list(dict.fromkeys(places))
    names = dict(zip(runs, report.run_names(runs), strict=True)) if len(runs) > 1 else {}
    heads = []
    for folder, place in zip(folders, places, strict=True):
        facts = {"run": names.get(place), "stage": folder.parent.name}
        is_of_run = folder.parent.name in run.TRAINED
        heads.append(report.checkpoint_name(facts) if is_of_run else str(near(folder)))
    return [
        head if heads.count(head) == 1 else f"{head} {folder.name}"
        for head, folder in zip(heads, folders, strict=True)
    ]


def print_table(heads: Sequence[str], columns: Sequence[Sequence[Score]]) -> None:
    """Several checkpoints' scores side by side."""
    if len(heads) < 2:
        return
    width = max(18, *(len(head) + 2 for head in heads))
    cells = [{score.task: str(score) for score in column} for column in columns]
    log.say()
    log.say(f"{'':<{NAMES}}" + "".join(f"{head:>{width}}" for head in heads))
    for name in dict.fromkeys(score.task for column in columns for score in column):
        log.say(f"{name:<{NAMES}}" + "".join(f"{c.get(name, '–'):>{width}}" for c in cells))


if __name__ == "__main__":
    cli.run_script(lambda: main(*run.parse(SCRIPT)), "stopped.")

"""The demo's bars: what a model made on two cores in minutes has to know, and the minutes.

In: runs of the demo preset, or seeds whose road is walked here. Out: a table, a column for each
run: the share of held-out questions answered right, by bar. No question occurs in training.

    uv run benchmarks/demo.py runs/demo                           a run that is there
    uv run benchmarks/demo.py --seeds 0 1 2 --runs runs/bars      walk the roads, then measure
    uv run benchmarks/demo.py runs/demo --stage mid               after another stage than the last
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import UserError  # noqa: E402
from hearth import log, run  # noqa: E402
from hearth.cli import run_script  # noqa: E402
from hearth.data import demo_world  # noqa: E402
from hearth.data.demo_world import HELD_OUT_SEED, Question, questions_of  # noqa: E402
from hearth.evaluation.chat_tasks import Reply, ask, converse, messages  # noqa: E402
from hearth.storage import read_json, write_json  # noqa: E402
from hearth.training.checkpoint import Loaded, load_for_inference  # noqa: E402

OLD = ("facts", "comparison", "counting", "arithmetic", "spelling")  # what the demo always taught
FRESH = "in words near to none in training"
LATE = "asked as a third turn, every kind"
ROAD = "road.json"  # of a run walked here: its seconds
LONGEST = 160  # tokens of an answer


@dataclass(frozen=True)
class Bar:
    """What is measured, and what it has to reach."""

    name: str
    bar: str
    figure: float
    holds: bool

    def cell(self) -> str:
        return f"{self.figure:6.1%} {'ok' if self.holds else 'NO'}"


def main() -> None:
    """Walk the roads that are asked for, measure every run, print the table."""
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("run", nargs="*", type=Path, help="folders of runs")
    words.add_argument("--seeds", nargs="*", type=int, default=[], help="roads to walk first")
    words.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of their runs")
    words.add_argument("--stage", choices=run.TRAINED, help="measured stage; else the last one")
    words.add_argument("--n", type=int, default=200, help="questions a kind")
    words.add_argument("--wrong", type=int, default=0, help="wrong answers shown a kind")
    options = words.parse_args()
    folders = [*options.run, *(walked(seed, options.runs) for seed in options.seeds)]
    columns = {folder: measured(folder, options) for folder in folders}
    print_table(columns)


def walked(seed: int, runs: Path) -> Path:
    """The run of a seed, its road walked from its beginning unless that is done."""
    folder = runs / f"demo-{seed}"
    if not (folder / ROAD).is_file():
        words = ["--preset", "demo", "--name", folder.name, "--runs", str(runs)]
        command = [sys.executable, str(ROOT / "run_pipeline.py"), *words, "--seed", str(seed)]
        started = time.monotonic()
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        write_json(folder / ROAD, {"seconds": time.monotonic() - started})
    return folder


def measured(folder: Path, options: argparse.Namespace) -> list[Bar]:
    """The bars of one run."""
    there = [stage for stage in run.TRAINED[1:] if run.newest(folder / stage)]
    if not there or options.stage not in (None, *there):
        raise UserError(f"{folder} has no checkpoint of {options.stage or 'a chat'}.")
    loaded = load_for_inference(run.newest(folder / (options.stage or there[-1])))
    log.say(f"{folder}, {options.stage or there[-1]}")
    shares: dict[str, float] = {}
    called: list[bool] = []  # whether the calculator was called exactly where it is needed
    for kind in demo_world.ASKED:
        questions = questions_of(kind, options.n)
        replies = put(loaded, questions, kind)
        shares[kind] = share_right(questions, replies, options.wrong)
        if kind != "calculator":  # asked without reasoning, as sums for the calculator are
            few = questions[: options.n // (len(demo_world.ASKED) - 1)]
            replies = ask(loaded, [(q.prompt, False) for q in few], LONGEST)
        called += [calls(reply) == (kind == "calculator") for reply in replies]
    for name, questions in further(options.n).items():
        replies = put(loaded, questions, name, late=name == LATE)
        shares[name] = share_right(questions, replies, options.wrong)
    bars = bars_of(shares, mean(called))
    if (folder / ROAD).is_file():
        seconds = read_json(folder / ROAD)["seconds"]
        log.say(
            f"the road took {log.duration(seconds)}, bar 10m: {'ok' if seconds < 600 else 'NO'}"
        )
    return bars


def further(n: int) -> dict[str, list[Question]]:
    """What is asked beside the kinds: wordings that are near to none in training, and other
    questions of every kind as third turns.
    """
    fresh = questions_of("identity", n, fresh=True)
    return {FRESH: fresh, LATE: demo_world.held_out_questions(n, HELD_OUT_SEED + 1)}


def put(
    loaded: Loaded, questions: Sequence[Question], title: str, *, late: bool = False
) -> list[Reply]:
    """The answers to held-out questions; `late`: as the third turns of conversations."""
    conversations = []
    for question in questions:
        *system, asked = messages(question.prompt, question.thinking)
        before = demo_world.earlier_turns(question) if late else []
        conversations.append([*system, *before, asked])
    return converse(loaded, conversations, LONGEST, title)


def share_right(questions: Sequence[Question], replies: Sequence[Reply], n_shown: int) -> float:
    """The share of right answers; the first wrong ones are shown."""
    show_wrong(questions, replies, n_shown)
    return mean([is_right(q, r) for q, r in zip(questions, replies, strict=True)])


def is_right(question: Question, reply: Reply) -> bool:
    return reply.answer.content.strip() == question.answer


def calls(reply: Reply) -> bool:
    return any("tool" in part for part in reply.answer.parts)


def show_wrong(questions: Sequence[Question], replies: Sequence[Reply], n: int) -> None:
    """The first wrong answers."""
    wrong = [p for p in zip(questions, replies, strict=True) if not is_right(*p)]
    for question, reply in wrong[:n]:
        said = list(reply.answer.parts) or reply.answer.content
        log.say(f"  {question.prompt} → {said!r}, not {question.answer!r}")
        log.say(f"      thought {reply.answer.thinking!r}")


def bars_of(kinds: dict[str, float], called: float) -> list[Bar]:
    """The bars from the share right of each kind, and the share called exactly where needed."""
    old = [kinds[kind] for kind in OLD]

    def at_least(name: str, bar: float, figure: float) -> Bar:
        return Bar(name, f"≥ {bar:.0%}", figure, figure >= bar)

    return [
        at_least("the five old kinds, mean", 0.95, mean(old)),
        at_least("the worst of them", 0.88, min(old)),
        *(Bar(f"    {kind}", "", kinds[kind], kinds[kind] >= 0.88) for kind in OLD),
        at_least("counting one kind among others", 0.85, kinds["one kind"]),
        at_least("words never spelt in training", 0.90, kinds["spelling"]),
        at_least("letters in a word", 0.90, kinds["letters"]),
        at_least("sums of 3 and 4 digits, calculator", 0.95, kinds["calculator"]),
        at_least("calls where needed, and only there", 0.95, called),
        at_least("who are you, who made you", 0.95, kinds["identity"]),
        at_least(f"    {FRESH}", 0.95, kinds[FRESH]),
        at_least(LATE, 0.95, kinds[LATE]),
    ]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def print_table(columns: dict[Path, list[Bar]]) -> None:
    """A row for each bar, a column for each run."""
    log.say("".join([f"{'what':<38}{'bar':>8}", *(f"{folder.name:>14}" for folder in columns)]))
    for bars in zip(*columns.values(), strict=True):
        cells = "".join(f"{bar.cell():>14}" for bar in bars)
        log.say(f"{bars[0].name:<38}{bars[0].bar:>8}{cells}")


if __name__ == "__main__":
    run_script(main, "stopped.")

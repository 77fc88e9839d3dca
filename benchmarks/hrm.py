"""Measure the HRM head against dense and looped models: bits per byte on real text, six reasoning
tasks.

A row is an arm on a task with a seed; its result is a line of OUT/results.jsonl. Rows that are
there are skipped, so a study that was killed continues where it was, and several processes may
share one OUT. Each arm's learning rate is tuned first, by rows of their own; on real text the best
of them is seed 0's result too. On the automaton, where the rate that did best with one seed may do
so by luck, two seeds tune and three others are the result; and as a rate that is too high fails
altogether with some seeds, the lower of two that come close is taken.

    uv run benchmarks/hrm.py OUT --data FOLDER
        every row that is missing; FOLDER holds .parquet files of text
    uv run benchmarks/hrm.py OUT --plan
        the rows, with estimated minutes on one core
    uv run benchmarks/hrm.py OUT --table
        the tables, from what is there

One thread a process (OMP_NUM_THREADS=1); seconds are CPU seconds of that thread, so neighbours
hardly count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import reasoning_tasks
from reasoning_tasks import TASKS, lay

from config import HRMConfig, LoopConfig, ModelConfig, OptimConfig, UserError
from hearth import log
from hearth.cli import run_script
from hearth.data.tokenizer import Tokenizer
from hearth.training.batches import Batch
from hearth.training.gradients import accumulate
from hearth.training.optim import build_optimizers
from model import Model, PackedSequences, build_model

# ----------------------------------------------------------------------------------- what is varied


@dataclass(frozen=True)
class Arm:
    label: str
    n_layer: int  # of the trunk
    hrm: HRMConfig | None = None

    def shape(self, base: ModelConfig) -> ModelConfig:
        return replace(base, n_layer=self.n_layer, hrm=self.hrm)


# 6 module calls, so 8 block passes with the trunk's 2
HRM = HRMConfig(l_layer=1, h_layer=1, h_cycles=2, l_cycles=2)
ARMS = {
    "dense": Arm("dense, equal parameters", 4),
    "deep": Arm("dense, equal FLOPs (deeper)", 8),
    "looped": Arm("looped block", 2, HRMConfig(h_layer=2, h_cycles=3, l_cycles=0)),
    "full": Arm("HRM, full gradient", 2, HRM),
    "full_ds": Arm("HRM, full + deep supervision", 2, replace(HRM, deep_supervision=True)),
    "h1_l1": Arm("HRM, 1 × (1 L + H)", 2, replace(HRM, h_cycles=1, l_cycles=1)),
    "h1_l3": Arm("HRM, 1 × (3 L + H)", 2, replace(HRM, h_cycles=1, l_cycles=3)),
    "h2_l1": Arm("HRM, 2 × (1 L + H)", 2, replace(HRM, h_cycles=2, l_cycles=1)),
    "h3_l2": Arm("HRM, 3 × (2 L + H)", 2, replace(HRM, h_cycles=3, l_cycles=2)),
}
CYCLED = ["h1_l1", "h1_l3", "h2_l1", "h3_l2"]  # other numbers of cycles than `full`'s, at its FLOPs
# with a learning rate of their own
COMPARED = [name for name in ARMS if name not in CYCLED[1:]]
# unlike `full`'s: run at its FLOPs too
OTHER_COST = ("dense", "full_ds", "h1_l1")

REASONING = ModelConfig(
    vocab_size=reasoning_tasks.VOCAB_SIZE,
    d_model=64,
    n_head=4,
    n_kv_head=2,
    d_ff=176,
    context=64,
    window=None,
    pattern="L",
    token_shift=False,  # came after most rows had been run; `shifted` and `larger` have it
    hrm=None,
)
TEXT = replace(
    REASONING, vocab_size=2048, d_model=128, d_ff=352, context=256, window=64, pattern="SL"
)
TEXTS = {
    "text": TEXT,
    "shifted": replace(TEXT, token_shift=True),
    "larger": replace(TEXT, d_model=256, n_head=8, n_kv_head=4, d_ff=704, token_shift=True),
}
LOOP = LoopConfig(warmup_share=0.05, decay_share=0.3)
OPTIM = OptimConfig(momentum_warmup_steps=50)


@dataclass(frozen=True)
class Tuning:
    """How the learning rates of a task's arms are chosen."""

    rates: tuple[float, ...]  # peaks tried, over all steps: a shorter row flatters high ones
    seeds: tuple[int, ...] = (0,)
    # losses up to this many times the best tie, and the lowest of their rates is taken
    tie: float = 1.0


TUNINGS = {
    "automaton": Tuning((5e-3, 1e-2, 2e-2), (0, 4), 1.05),  # serves the other reasoning tasks too
    "text": Tuning((5e-3, 1e-2, 2e-2)),
    "shifted": Tuning((1e-2,)),  # the best of both of its arms on `text`
    "larger": Tuning((1e-2,)),
}
N_POINTS = 4  # of a learning curve
CYCLES = 8  # most H cycles tried at inference
SEEDS = {"automaton": (1, 2, 3), "permutation": (0, 1, 2)}  # seed 0 alone for the other tasks


@dataclass(frozen=True)
class Size:
    """How long a row is."""

    steps: int
    rows: int  # of a batch
    # reached on one core of the machine in EXPERIMENTS.md; for the plan's estimates alone
    gflops: float


SIZES = {
    "text": Size(240, 4, 32),
    # the preset's head against the plain model once more: with the token before,
    "shifted": Size(240, 4, 32),
    "larger": Size(560, 4, 40),  # and with 3.5 times the parameters as well
    "automaton": Size(450, 32, 24),
    "permutation": Size(450, 32, 24),
    "arithmetic": Size(450, 32, 24),
    "hops": Size(450, 32, 24),
    "sudoku": Size(400, 32, 24),
    "addition": Size(400, 32, 24),
}


@dataclass(frozen=True)
class Row:
    """kind: `tune` tries a learning rate; `main` takes the best; `flops` too, but trains for the
    FLOPs of `full`.
    """

    kind: str
    task: str
    arm: str
    seed: int
    lr: float | None = None  # of a tuning row; the others take the best of those

    @property
    def key(self) -> str:
        return "-".join(
            [
                self.task,
                self.arm,
                self.kind,
                f"s{self.seed}",
                *([f"lr{self.lr:g}"] if self.lr else []),
            ]
        )

    def steps(self, context: int) -> int:
        steps = SIZES[self.task].steps
        if self.kind == "flops":
            full, own = (flops_a_token(arm, self.task, context) for arm in ("full", self.arm))
            return round(steps * full / own)
        return steps


def plan() -> list[Row]:
    """All rows, the most telling first."""

    def tuning(task: str, arms: list[str]) -> list[Row]:
        return [row for arm in arms for row in tuned_on(Row("main", task, arm, 0))]

    def main(task: str, arms: list[str], *seeds: int) -> list[Row]:
        return [Row("main", task, arm, seed) for seed in seeds for arm in arms]

    def equal_flops(task: str, arms: tuple[str, ...], *seeds: int) -> list[Row]:
        return [Row("flops", task, arm, seed) for seed in seeds for arm in arms]

    others = [task for task in TASKS if task != "automaton"]
    return [
        *tuning("automaton", COMPARED),
        *main("automaton", COMPARED, *SEEDS["automaton"]),
        *equal_flops("automaton", ("dense",), *SEEDS["automaton"]),
        *tuning("text", COMPARED),
        *main("text", COMPARED, 0, 1, 2),
        *equal_flops("text", OTHER_COST, 0, 1, 2),
        *[row for task in others for row in main(task, COMPARED, 0)],
        *[row for task in others for row in main(task, COMPARED, *SEEDS.get(task, (0,))[1:])],
        *equal_flops("automaton", tuple(CYCLED), 1),
        *equal_flops("text", tuple(CYCLED[1:]), 0),
        *[row for task in ("shifted", "larger") for row in tuning(task, ["dense", "h1_l1"])],
        *[row for task in ("shifted", "larger") for row in main(task, ["dense", "h1_l1"], 0, 1)],
    ]


def tuned_on(row: Row) -> list[Row]:
    """The tuning rows that this row's learning rate comes from; the reasoning tasks share the
    automaton's.
    """
    arm = row.arm if row.arm in COMPARED else "full"
    task = row.task if row.task in TEXTS else "automaton"
    return [
        Row("tune", task, arm, seed, lr)
        for lr in TUNINGS[task].rates
        for seed in TUNINGS[task].seeds
    ]


# ------------------------------------------------------------------------------------- the subjects


class Reasoning:
    """Batches of a reasoning task, and its held-out problems by size."""

    base = REASONING

    def __init__(self, task: str, seed: int) -> None:
        self.task = TASKS[task]
        self.context = self.task.row_length
        self.rows = SIZES[task].rows
        self._stream = reasoning_tasks.rows(self.task, str(seed), held_out=False)
        self.exam = {str(size): self._held_out(size) for size in self.task.sizes}
        self.beyond = {f"{self.task.beyond} (untrained)": self._held_out(self.task.beyond)}

    def _held_out(self, size: int) -> list[Batch]:
        given = list(
            islice(reasoning_tasks.rows(self.task, "held out", held_out=True, size=size), 384)
        )
        return [lay(given, max(self.context, len(given[0][0]) - 1))]

    def batch(self, step: int) -> Batch:
        return lay(list(islice(self._stream, self.rows)), self.context)


class Text:
    """Rows of real text at random places, and held-out text whose bytes are counted."""

    def __init__(self, out: Path, data: Path | None, task: str, seed: int) -> None:
        held = text_tokens(out, data)
        self.tokens, self.seed, self.base = held["train"].astype(np.int64), seed, TEXTS[task]
        self.context, self.rows = self.base.context, SIZES[task].rows
        n = 64 * self.context
        self.exam = {"text": list(self._batches(held["held_out"][: n + 1].astype(np.int64), 8))}
        self.bytes_a_token = float(held["token_bytes"][held["held_out"][1 : n + 1]].sum()) / n
        self.beyond: dict[str, list[Batch]] = {}

    def _batches(self, tokens: np.ndarray, rows: int) -> Iterator[Batch]:
        n = rows * self.context
        for first in range(0, len(tokens) - 1, n):
            yield self._batch(tokens[first : first + n], tokens[first + 1 : first + n + 1])

    def _batch(self, ids: np.ndarray, targets: np.ndarray) -> Batch:
        ids, targets = torch.from_numpy(ids), torch.from_numpy(targets)
        return Batch(
            ids,
            targets,
            torch.ones(len(ids)),
            torch.zeros(len(ids), dtype=torch.bool),
            self.context,
        )

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        first = rng.integers(0, len(self.tokens) - self.context - 1, self.rows)
        at = (first[:, None] + np.arange(self.context)).flatten()
        return self._batch(self.tokens[at], self.tokens[at + 1])


def text_tokens(out: Path, data: Path | None) -> dict[str, np.ndarray]:
    """Token ids of text from each .parquet file of `data`, made once: train, held_out, and the
    bytes of each id.
    """
    path = out / "text.npz"
    if not path.exists():
        files = sorted(data.glob("*.parquet")) if data else []
        if not files:
            where = f"{data} holds no .parquet file" if data else "no folder is named"
            raise UserError(
                f"The rows on real text have no text: {where}. Name a folder of .parquet files "
                "with --data."
            )
        train, held_out = [], []
        for file in files:
            texts = some_texts(file, 2_200_000)
            train += [text for i, text in enumerate(texts) if i % 10]
            held_out += [text[:3000] for i, text in enumerate(texts) if i % 10 == 0][:16]
        tokenizer = Tokenizer.train(train, TEXT.vocab_size)

        def encode(texts: list[str]) -> np.ndarray:
            order = np.random.default_rng(0).permutation(len(texts))  # the files mixed
            ids = tokenizer.encode_batch([texts[i] for i in order])
            return np.concatenate(
                [np.array([tokenizer.bos, *document], dtype=np.uint16) for document in ids]
            )

        part = out / f"text-{os.getpid()}.npz"
        np.savez(
            part, train=encode(train), held_out=encode(held_out), token_bytes=tokenizer.token_bytes
        )
        part.replace(path)
    return dict(np.load(path))


def some_texts(file: Path, n_chars: int) -> list[str]:
    """Documents from all over the file, each cut to 10,000 characters, `n_chars` in all."""
    import pyarrow.parquet as parquet

    texts = parquet.read_table(file, columns=["text"])["text"]
    chosen, held = [], 0
    for i in np.random.default_rng(0).permutation(len(texts)).tolist():
        if held >= n_chars:
            break
        chosen.append(texts[i].as_py()[:10_000])
        held += len(chosen[-1])
    return chosen


# ------------------------------------------------------------------------------------ one row's run


def run(row: Row, lr: float, subject: Reasoning | Text) -> dict[str, Any]:
    """Train the row's arm and examine it; everything the tables need."""
    config = ARMS[row.arm].shape(subject.base)
    model = build_model(config, seed=row.seed)
    model.dtype = torch.float32
    optimizers = build_optimizers(model, OPTIM, lr)
    steps = row.steps(subject.context)
    points = {round(steps * (i + 1) / N_POINTS) for i in range(N_POINTS)}
    curve, seconds = [], 0.0
    for step in range(steps):
        batch = subject.batch(step)
        started = time.process_time()
        train_step(model, optimizers, batch, step, steps)
        seconds += time.process_time() - started
        if step + 1 in points:
            curve.append(
                {"step": step + 1, "cpu_seconds": seconds, **score(model, subject, subject.exam)}
            )
    flops = flops_a_token(row.arm, row.task, subject.context)
    result = {
        "key": row.key,
        **asdict(row),
        "lr": lr,
        "steps": steps,
        "tokens": steps * subject.rows * subject.context,
        "parameters": model.n_parameters(),
        "flops_per_token": flops,
        "cpu_seconds": seconds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "curve": curve,
        "final": curve[-1],
    }
    if row.kind != "flops":
        result["sizes"] = {
            name: score(model, subject, {name: exam}) for name, exam in subject.exam.items()
        }
        result["sizes"] |= {
            name: score(model, subject, {name: exam}) for name, exam in subject.beyond.items()
        }
        if row.arm.startswith(("full", "h1_l1")):
            result["by_cycle"] = by_cycle(model, subject)
    return result


def train_step(model: Model, optimizers: Any, batch: Batch, step: int, steps: int) -> None:
    optimizers.schedule(step, steps, LOOP)
    accumulate(model, batch, len(batch.ids))
    torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
    optimizers.step()
    optimizers.zero_grad()


def flops_a_token(arm: str, task: str, context: int) -> float:
    """Training FLOPs per token."""
    with torch.device("meta"):
        model = Model(ARMS[arm].shape(TEXTS.get(task, REASONING)))
    return model.flops_per_token(context)


# -------------------------------------------------------------------------------------- examination


@torch.no_grad()
def hidden_states(model: Model, batch: Batch, h_cycles: int | None = None) -> list[Tensor]:
    """What the output reads at the targets that count, (K, D): after the trunk and after each
    cycle.
    """
    where, counts = PackedSequences(batch.starts, batch.row_length), batch.weights > 0
    x = model.run_trunk(batch.ids, where)
    after = model.run_head(x, batch.ids, where, h_cycles=h_cycles) if model.head else ()
    return [y[counts] for y in (x, *after)]


class Tally:
    """Loss in nats, accuracy a token, and the share of rows whose every answer is right."""

    def __init__(self) -> None:
        self.nats, self.right, self.tokens, self.whole, self.rows = 0.0, 0, 0, 0, 0

    @torch.no_grad()
    def add(self, batch: Batch, logits: Tensor) -> None:
        """logits (K, V) at the targets that count."""
        counts = batch.weights > 0
        targets = batch.targets[counts]
        wrong = logits.argmax(dim=-1) != targets
        row = counts.nonzero().flatten() // batch.row_length
        self.nats += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        self.right += int((~wrong).sum())
        self.tokens += len(targets)
        self.whole += len(row.unique()) - len(row[wrong].unique())
        self.rows += len(row.unique())

    def figures(self, subject: Reasoning | Text) -> dict[str, float]:
        loss = self.nats / self.tokens
        if isinstance(subject, Text):
            return {"bpb": loss / math.log(2) / subject.bytes_a_token}
        return {"loss": loss, "accuracy": self.right / self.tokens, "exact": self.whole / self.rows}


def score(
    model: Model, subject: Reasoning | Text, exam: dict[str, list[Batch]]
) -> dict[str, float]:
    tally = Tally()
    for batch in (batch for part in exam.values() for batch in part):
        tally.add(batch, model.logits(hidden_states(model, batch)[-1]))
    return tally.figures(subject)


def by_cycle(model: Model, subject: Reasoning | Text) -> list[dict[str, float]]:
    """The trained model with other numbers of cycles on the held-out problems; 0 is the trunk."""
    tallies = [Tally() for _ in range(CYCLES + 1)]
    for batch in (batch for part in subject.exam.values() for batch in part):
        for tally, y in zip(tallies, hidden_states(model, batch, CYCLES), strict=True):
            tally.add(batch, model.logits(y))
    return [tally.figures(subject) for tally in tallies]


# ---------------------------------------------------------------------------------------- the study


class Study:
    """The folder of results: what is there, who works on what."""

    def __init__(self, out: Path) -> None:
        self.out = out
        (out / "locks").mkdir(parents=True, exist_ok=True)

    def results(self) -> dict[str, dict[str, Any]]:
        """Finished rows by key; a line that a kill cut short is not there."""
        path, found = self.out / "results.jsonl", {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                found.setdefault((result := json.loads(line))["key"], result)
            except json.JSONDecodeError:
                continue
        return found

    def add(self, result: dict[str, Any]) -> None:
        """One write, so that lines of several processes do not mix; a torn line before it stays a
        line of its own.
        """
        with (self.out / "results.jsonl").open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = size > 0 and file.read(1) != b"\n"
            file.write(b"\n" * torn + json.dumps(result).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def claim(self, key: str) -> bool:
        """Whether this process may run the row: nobody else that is alive does."""
        lock = self.out / "locks" / key
        if lock.exists() and not self._is_held(lock):
            stale = lock.with_name(f"{key}.stale-{os.getpid()}")
            try:
                lock.rename(stale)  # of several that find it stale, one can
            except FileNotFoundError:
                return False
            stale.unlink()
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        me = psutil.Process()
        os.write(handle, f"{me.pid} {me.create_time()}".encode())
        os.close(handle)
        return True

    def _is_held(self, lock: Path) -> bool:
        try:
            pid, born = lock.read_text().split()
            return abs(psutil.Process(int(pid)).create_time() - float(born)) < 2
        except FileNotFoundError:
            return True  # somebody is taking it over
        except ValueError:
            # its owner has not written its name yet, or never will
            return time.time() - lock.stat().st_mtime < 60
        except psutil.NoSuchProcess:
            return False

    def release(self, key: str) -> None:
        (self.out / "locks" / key).unlink(missing_ok=True)

    def rate(self, row: Row, results: dict[str, dict[str, Any]]) -> float | None:
        """The learning rate of a row: its own, or the best of its arm's tuning rows; None while
        those are not done.
        """
        if row.lr:
            return row.lr
        tuned = [results.get(other.key) for other in tuned_on(row)]
        if None in tuned:
            return None
        losses = {
            lr: tuning_loss(select(tuned, lr=lr))
            for lr in sorted({result["lr"] for result in tuned})
        }
        return next(
            lr
            for lr, loss in losses.items()
            if loss <= TUNINGS[tuned[0]["task"]].tie * min(losses.values())
        )

    def tuned(self, row: Row, lr: float) -> dict[str, Any] | None:
        """The result of the tuning row that did what this row would do, under this row's name."""
        done = (
            self.results().get(replace(row, kind="tune", lr=lr).key) if row.kind == "main" else None
        )
        return done and {**done, "key": row.key, "kind": row.kind}

    def work(self, rows: list[Row], subject_of: Callable[[Row], Reasoning | Text]) -> None:
        """Run what is missing, in order, until nothing is."""
        while missing := [row for row in rows if row.key not in self.results()]:
            if not any(self._try(row, subject_of) for row in missing):
                time.sleep(2)  # others are at work on what is left

    def _try(self, row: Row, subject_of: Callable[[Row], Reasoning | Text]) -> bool:
        lr = self.rate(row, self.results())
        if lr is None or not self.claim(row.key):
            return False
        try:
            if row.key in self.results():  # finished between the look and the claim
                return True
            started = time.perf_counter()
            result = self.tuned(row, lr) or run(row, lr, subject_of(row))
            self.add(result)
            figures = {k: v for k, v in result["final"].items() if k not in ("step", "cpu_seconds")}
            told = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
            log.say(
                f"{row.key:38} lr {lr:g} | {told} | {log.duration(time.perf_counter() - started)}"
            )
        finally:
            self.release(row.key)
        return True


# ------------------------------------------------------------------------------------------- tables


def estimated_seconds(row: Row) -> float:
    """CPU seconds that the row should take on one core, examinations included; 0 for what a tuning
    row has done.
    """
    if row in [replace(other, kind="main", lr=None) for other in tuned_on(row)]:
        return 0.0
    size = SIZES[row.task]
    context = TEXT.context if row.task in TEXTS else TASKS[row.task].row_length
    flops = flops_a_token(row.arm, row.task, context)
    examined = N_POINTS * 64 * 256 if row.task in TEXTS else N_POINTS * 384 * 2 * context
    tokens = row.steps(context) * size.rows * context + examined / 3
    return tokens * flops / size.gflops / 1e9


def print_plan(study: Study) -> None:
    there, total, left = study.results(), 0.0, 0.0
    for row in plan():
        seconds = estimated_seconds(row)
        total += seconds
        left += seconds * (row.key not in there)
        mark = "done" if row.key in there else "    "
        print(f"{mark} {row.key:38} {seconds / 60:5.1f} min, together {total / 60:5.1f}")
    print(
        f"{len(plan())} rows, about {total / 60:.0f} minutes on one core, {left / 60:.0f} of them "
        "to go"
    )


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation, and how many seeds."""
    if not values:
        return "missing"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation} ({len(values)})"


def print_tables(study: Study) -> None:
    results = list(study.results().values())
    missing = [row.key for row in plan() if row.key not in study.results()]
    print(f"{len(results)} rows are there, {len(missing)} of the plan are missing.")
    print("Means ± standard deviations; behind them the number of seeds.\n")
    print_text(results)
    print_again(results)
    print_reasoning(results)
    print_cycles(results)
    print_curves(results)
    print_by_cycle(results)
    print_rates(results)
    if missing:
        print(
            "missing: "
            + ", ".join(missing[:6])
            + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        )


def select(results: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [
        result for result in results if all(result[name] == value for name, value in wanted.items())
    ]


def line(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def head(*cells: str) -> None:
    line(*cells)
    line(*["---"] * len(cells))


def print_text(results: list[dict[str, Any]]) -> None:
    """Bits per byte at equal tokens, FLOPs and seconds."""
    full = select(results, task="text", arm="full", kind="main")
    budget = statistics.fmean(r["cpu_seconds"] for r in full) if full else None
    dense = {
        r["seed"]: r["final"]["bpb"] for r in select(results, task="text", arm="dense", kind="main")
    }
    print("Held-out bits per byte of real text\n")
    columns = (
        "equal tokens",
        "less dense, by seed",
        "its CPU s",
        "equal FLOPs",
        "its CPU s",
        "at full's CPU s",
    )
    head("arm", "parameters", "MFLOPs/token", *columns)
    for arm in COMPARED:
        main, longer = (
            select(results, task="text", arm=arm, kind=kind) for kind in ("main", "flops")
        )
        if not main:
            continue
        shown = longer if arm in OTHER_COST else main
        line(
            ARMS[arm].label,
            f"{main[0]['parameters']:,}",
            f"{main[0]['flops_per_token'] / 1e6:.1f}",
            spread([r["final"]["bpb"] for r in main]),
            spread([r["final"]["bpb"] - dense[r["seed"]] for r in main if r["seed"] in dense]),
            f"{statistics.fmean(r['cpu_seconds'] for r in main):.0f}",
            spread([r["final"]["bpb"] for r in shown]),
            f"{statistics.fmean(r['cpu_seconds'] for r in shown):.0f}" if shown else "missing",
            f"{value:.3f}" if budget and (value := at_seconds(results, arm, budget)) else "missing",
        )
    print(
        "\nEqual seconds are read off a line through the arm's two lengths of training (the dense "
        "arm's slope where it"
    )
    print("has one length), in the logarithm of the CPU seconds.\n")


def at_seconds(results: list[dict[str, Any]], arm: str, seconds: float) -> float | None:
    """Bits per byte of an arm's complete schedule of `seconds`, by its slope in log seconds."""

    def point(arm: str, kind: str) -> tuple[float, float] | None:
        found = select(results, task="text", arm=arm, kind=kind)
        if not found:
            return None
        return math.log(statistics.fmean(r["cpu_seconds"] for r in found)), statistics.fmean(
            r["final"]["bpb"] for r in found
        )

    own, longer = point(arm, "main"), point(arm, "flops")
    pair = (own, longer) if longer else (point("dense", "main"), point("dense", "flops"))
    if own is None or None in pair:
        return None
    (x0, y0), (x1, y1) = pair
    return own[1] + (math.log(seconds) - own[0]) * (y1 - y0) / (x1 - x0)


def print_again(results: list[dict[str, Any]]) -> None:
    """Equal tokens, parameters and, all but, FLOPs."""
    print(
        "The same text with the token before mixed in, and with more parameters: held-out bits per "
        "byte\n"
    )
    head("arm", "parameters", "MFLOPs/token", "steps", "bits per byte", "by seed", "CPU s")
    for task, arm in ((task, arm) for task in ("shifted", "larger") for arm in COMPARED):
        if rows := select(results, task=task, arm=arm, kind="main"):
            line(
                ARMS[arm].label,
                f"{rows[0]['parameters']:,}",
                f"{rows[0]['flops_per_token'] / 1e6:.1f}",
                rows[0]["steps"],
                spread([r["final"]["bpb"] for r in rows]),
                ", ".join(f"{r['final']['bpb']:.3f}" for r in rows),
                f"{statistics.fmean(r['cpu_seconds'] for r in rows):.0f}",
            )
    print()


def print_reasoning(results: list[dict[str, Any]]) -> None:
    for task in TASKS:
        if not select(results, task=task, kind="main"):
            continue
        sizes = ", ".join(map(str, TASKS[task].sizes))
        print(
            f"{task}: {TASKS[task].what} {sizes} in training; accuracy a token, and exact answers\n"
        )
        names = list(select(results, task=task, kind="main")[0]["sizes"])
        head("arm", "steps", "CPU s", "accuracy", "exact", *[f"exact at {name}" for name in names])
        for arm in COMPARED:
            for kind in ("main", "flops"):
                rows = select(results, task=task, arm=arm, kind=kind)
                if not rows:
                    continue
                by_size = [
                    spread([r["sizes"][name]["exact"] for r in rows], 2)
                    if "sizes" in rows[0]
                    else ""
                    for name in names
                ]
                line(
                    ARMS[arm].label + (", equal FLOPs" if kind == "flops" else ""),
                    rows[0]["steps"],
                    f"{statistics.fmean(r['cpu_seconds'] for r in rows):.0f}",
                    spread([r["final"]["accuracy"] for r in rows]),
                    spread([r["final"]["exact"] for r in rows]),
                    *by_size,
                )
        print()


def print_cycles(results: list[dict[str, Any]]) -> None:
    """Heads of other numbers of cycles, each trained for the FLOPs of `full`."""
    print(
        "Other numbers of cycles at the FLOPs of HRM, full (2 × (2 L + H)); the automaton with one "
        "seed\n"
    )
    head("head", "text steps", "bits per byte", "automaton steps", "accuracy", "exact")
    for arm in ("full", *CYCLED):
        kind = "main" if arm == "full" else "flops"
        text, cells = (
            select(results, task=task, arm=arm, kind=kind) for task in ("text", "automaton")
        )
        cells = [r for r in cells if r["seed"] == 1]
        line(
            ARMS[arm].label,
            *(
                [text[0]["steps"], spread([r["final"]["bpb"] for r in text])]
                if text
                else ["missing"] * 2
            ),
            *([cells[0]["steps"]] if cells else ["missing"]),
            *(
                [f"{cells[0]['final'][name]:.3f}" for name in ("accuracy", "exact")]
                if cells
                else ["missing"] * 2
            ),
        )
    print()


def print_curves(results: list[dict[str, Any]]) -> None:
    """What each arm had learnt along the way, means over the seeds."""
    for task in SIZES:
        rows = select(results, task=task, kind="main")
        if not rows:
            continue
        figure = "bpb" if task in TEXTS else "accuracy"
        print(f"{task}: {figure} along the way\n")
        head("arm", *[f"step {point['step']}" for point in rows[0]["curve"]])
        for arm in ARMS:
            curves = [r["curve"] for r in select(rows, arm=arm)]
            if curves:
                points = zip(*curves, strict=True)
                line(
                    ARMS[arm].label,
                    *[f"{statistics.fmean(p[figure] for p in point):.3f}" for point in points],
                )
        print()


def print_by_cycle(results: list[dict[str, Any]]) -> None:
    rows = [r for r in results if "by_cycle" in r and r["kind"] == "main"]
    for task in dict.fromkeys(r["task"] for r in rows):
        figure = "bpb" if task in TEXTS else "accuracy"
        print(f"{task}: {figure} by the number of cycles at inference (0 is the trunk alone)\n")
        head("arm", *map(str, range(CYCLES + 1)))
        for arm in ARMS:
            if found := [r["by_cycle"] for r in select(rows, task=task, arm=arm)]:
                means = [
                    statistics.fmean(f[figure] for f in cycle) for cycle in zip(*found, strict=True)
                ]
                line(ARMS[arm].label, *[f"{mean:.3f}" for mean in means])
        print()


def tuning_loss(results: list[dict[str, Any]]) -> float:
    """Held-out loss, the mean over the seeds."""
    return statistics.fmean(
        result["final"]["bpb" if result["task"] in TEXTS else "loss"] for result in results
    )


def print_rates(results: list[dict[str, Any]]) -> None:
    print(
        "Tuning: held-out loss by peak learning rate, mean over the seeds that tune; the best is "
        "taken\n"
    )
    tried = [(task, lr) for task, tuning in TUNINGS.items() for lr in tuning.rates]
    head("arm", *[f"{task} {lr:g}" for task, lr in tried])
    for arm in COMPARED:
        tuned = [select(results, task=task, arm=arm, kind="tune", lr=lr) for task, lr in tried]
        cells = [f"{tuning_loss(found):.3f}" if found else "" for found in tuned]
        line(ARMS[arm].label, *cells)
    print()


# --------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, help="folder of the results; what is there is not run again"
    )
    parser.add_argument(
        "--data", type=Path, help="folder of .parquet files with a column `text`; needed once"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print the rows and their estimated minutes"
    )
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        default=[""],
        help="rows whose key holds one of the words",
    )
    options = parser.parse_args()
    study = Study(options.out)
    if options.plan:
        print_plan(study)
        return
    if not options.table:
        torch.set_num_threads(1)

        def subject_of(row: Row) -> Reasoning | Text:
            if row.task in TEXTS:
                return Text(options.out, options.data, row.task, row.seed)
            return Reasoning(row.task, row.seed)

        rows = [row for row in plan() if any(word in row.key for word in options.only)]
        if any(row.task in TEXTS and row.key not in study.results() for row in rows):
            text_tokens(options.out, options.data)  # now, not an hour in: the folder may be wrong
        study.work(rows, subject_of)
    print_tables(study)


if __name__ == "__main__":
    run_script(main)

"""Which recipe ships: runs of the presets' family at small sizes, beside nanochat and nanoGPT.

In: a folder with .parquet files (a column `text`); rivals by path. One file is for tuning, the
others are text that no tuning has seen. Every run is a process of its own on one core, with the
same tokenizer, the same rows of the same tokens in the same order and the same held-out rows.
Out: a line of JSON a run in OUT/runs.jsonl. Rows that are there already are not run again, and
several workers may share a folder.

    uv run benchmarks/recipe.py work OUT --data FOLDER --nanochat PATH --nanogpt PATH
        all parts of the plan, in order, about eleven hours of one core; --only names some of them
    uv run benchmarks/recipe.py table OUT
        what they gave
    uv run benchmarks/recipe.py races benchmarks/results/recipe.jsonl
        what the recipe that ships gave beside all that ran on the same text
    uv run benchmarks/recipe.py pace OUT --nanochat PATH --nanogpt PATH
        tokens a second of all sides, whose steps take turns on one core: on a machine that others
        use too, two runs' clocks an hour apart do not compare
    uv run benchmarks/recipe.py law benchmarks/results/recipe.jsonl
        loss against weights and tokens, fitted to the rule's runs on unseen text; what it predicts

Seconds are those of the process' own clock in training steps, compilation left out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from racing import SKIPPED, Nanochat, NanoGPT, training_seconds

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, CONTEXT = 4096, 1024  # entries, tokens of a row
HELD_OUT_ROWS, EVALUATIONS = 32, 6  # of an evaluation; of a run
TUNING = "openstax.parquet"  # the file that all tuning reads
BATCH_OF_RIVALS = 2048  # tokens of their steps: small steps suit short runs on every side
RUNS: dict[str, dict[str, Any]] = {}  # those that are done, by key


@dataclass(frozen=True)
class Row:
    """One run of the plan: who trains what, on which text, until when."""

    part: str  # of the plan
    side: str = "hearth"  # or nanochat, nanogpt
    depth: int = 6  # blocks; the shape follows
    lr: float = 1.0  # times the rule's; nanochat: times all its rates; nanogpt: its rate
    tokens: int | None = None  # train on so many …
    seconds: float | None = None  # … or for so long
    batch: int | None = None  # tokens of a step; None: the rule's
    seed: int = 0
    text: str = "tuning"  # or unseen
    change: str = ""  # settings that differ, as JSON: {"model": {…}, "optim": {…}, "loop": {…}}
    copy: str = ""  # a changed copy of this project

    @property
    def key(self) -> str:
        return json.dumps({k: v for k, v in asdict(self).items() if k != "part"}, sort_keys=True)


# --------------------------------------------------------------------------------------------- data


def tokens(out: Path, data: Path | None, text: str) -> Any:
    """Training ids, held-out ids, bytes of each entry; made once, kept under OUT."""
    kept = out / f"{text}.npz"
    if not kept.exists():
        import pyarrow.parquet as parquet

        from hearth.data.tokenizer import Tokenizer

        if data is None:
            raise SystemExit("No text yet: give --data FOLDER")
        texts: list[str] = []
        for file in sorted(data.glob("*.parquet")):
            if (file.name == TUNING) == (text == "tuning"):
                column = parquet.read_table(file, columns=["text"]).column(0)
                texts += column.to_pylist()[:3000]
        np.random.default_rng(0).shuffle(texts)
        tokenizer = Tokenizer.train(texts[:1200], VOCABULARY)
        ids = [np.array([tokenizer.bos, *x], np.uint16) for x in tokenizer.encode_batch(texts)]
        out.mkdir(parents=True, exist_ok=True)
        part = out / f"{text}.{os.getpid()}.part"
        with part.open("wb") as file:
            np.savez(
                file,
                train=np.concatenate(ids[150:]),
                held_out=np.concatenate(ids[:150]),
                n_bytes=tokenizer.token_bytes,
                bos=tokenizer.bos,
            )
        part.replace(kept)
    return np.load(kept)


def rows_of(ids: np.ndarray, which: np.ndarray) -> Any:
    """Rows (n, CONTEXT + 1) of neighbouring ids, those at `which`."""
    import torch

    starts = which[:, None] * CONTEXT + np.arange(CONTEXT + 1)
    return torch.from_numpy(ids[starts].astype(np.int64))


def far_apart(held_out: np.ndarray) -> Any:
    """The rows that measure: those of a few documents would tell two runs of one recipe apart."""
    return rows_of(held_out, np.linspace(0, len(held_out) // CONTEXT - 2, HELD_OUT_ROWS, dtype=int))


# -------------------------------------------------------------------------------------------- sides


def ours(depth: int) -> Any:
    """The presets' shape at a depth, on this vocabulary and these rows."""
    from config import PRESETS, bigram_rows_for, shaped

    card = PRESETS["16gb"].model
    shape = replace(card, context=CONTEXT, window=CONTEXT * card.window // card.context)
    rows = bigram_rows_for(VOCABULARY)
    return replace(shaped(shape, depth), vocab_size=VOCABULARY, bigram_rows=rows)


def by_the_rule(row: Row, options: argparse.Namespace) -> Row:
    """The row with the batch and, for us, the learning rate that the rule gives for its tokens;
    how many the clock will let it have is measured first. Rivals take the same batch.
    """
    from config import batch_for, lr_for

    tokens = row.tokens
    if tokens is None:
        guess = replace(row, batch=row.batch or 2 * CONTEXT)
        tokens = int(guess.batch / step_seconds(guess, options) * row.seconds)
    batch = row.batch or batch_for(tokens, CONTEXT)
    rule = lr_for(ours(row.depth), tokens // batch) if row.side == "hearth" else 1.0
    return replace(row, batch=batch, lr=row.lr * rule)


class Hearth:
    """This project: its model and optimizer; documents of a row see themselves alone."""

    def __init__(self, row: Row, bos: int, options: argparse.Namespace) -> None:
        import torch

        from config import HRMConfig, LoopConfig, OptimConfig
        from hearth.cli import portable
        from hearth.training import gradients
        from hearth.training.batches import Batch
        from hearth.training.optim import build_optimizers
        from model import build_model

        change = json.loads(row.change) if row.change else {}
        shape = replace(ours(row.depth), **change.get("model", {}))
        if isinstance(shape.hrm, dict):
            shape = replace(shape, hrm=HRMConfig(**shape.hrm))
        if change.get("plain"):
            shape = replace(shape, hrm=None, n_layer=row.depth)
        if change.get("portable"):
            shape = portable(shape)
        self.model = build_model(shape, seed=row.seed)
        self.model.dtype = torch.float32  # as the rivals compute on a processor
        self.model.compile_blocks()
        optim = OptimConfig(**{"momentum_warmup_steps": 100} | change.get("optim", {}))
        self.optimizers, self.lr = build_optimizers(self.model, optim, row.lr), row.lr
        self.loop = replace(LoopConfig(), **change.get("loop", {}))
        self.bos, self.Batch, self.gradients = bos, Batch, gradients

    def batch(self, block: Any) -> Any:
        import torch

        ids, targets = block[:, :-1].flatten(), block[:, 1:].flatten()
        return self.Batch(ids, targets, torch.ones(len(ids)), ids == self.bos, CONTEXT)

    def set_peak(self, lr: float) -> None:
        """Train at this peak rate from here on."""
        for group in (g for part in self.optimizers.parts for g in part.param_groups):
            group["peak_lr"] *= lr / self.lr
        self.lr = lr

    def step(self, block: Any, n: int, n_steps: int) -> None:
        import torch

        self.optimizers.schedule(n, n_steps, self.loop)
        self.gradients.accumulate(self.model, self.batch(block), 4 * CONTEXT)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizers.config.clip)
        self.optimizers.step()
        self.optimizers.zero_grad()

    def nats(self, block: Any) -> float:
        from model import PackedSequences

        batch = self.batch(block)
        hidden = self.model(batch.ids, PackedSequences(batch.starts, batch.row_length))
        return float(self.model.loss(hidden, batch.targets, batch.weights))


def nanogpt(row: Row, bos: int, options: argparse.Namespace) -> Any:
    """As deep and wide as ours."""
    ours_too = ours(row.depth)
    shape = {"n_layer": row.depth, "n_head": ours_too.n_head, "n_embd": ours_too.d_model}
    shape |= {"block_size": CONTEXT, "vocab_size": VOCABULARY}
    return NanoGPT(options.nanogpt, shape, lr=row.lr, seed=row.seed)


def nanochat(row: Row, bos: int, options: argparse.Namespace) -> Any:
    """As deep and wide as ours, in heads of its own size."""
    width = ours(row.depth).d_model
    n_head = max(1, width // 128)
    shape = {"n_layer": row.depth, "n_head": n_head, "n_kv_head": n_head, "n_embd": width}
    shape |= {"sequence_len": CONTEXT, "vocab_size": VOCABULARY}
    return Nanochat(options.nanochat, shape, lr=row.lr, seed=row.seed)


SIDES: dict[str, Callable[..., Any]] = {
    "hearth": Hearth,
    "nanogpt": nanogpt,
    "nanochat": nanochat,
}


# ---------------------------------------------------------------------------------------------- run


def run(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Train one row of the plan; the curve of its held-out bits per byte."""
    import torch

    from config import lr_for

    torch.set_num_threads(1)
    clock = time.process_time
    arrays = tokens(options.out, options.data, row.text)
    train, n_bytes = arrays["train"], arrays["n_bytes"]
    order = np.random.default_rng(row.seed).permutation((len(train) - 1) // CONTEXT)
    measure = far_apart(arrays["held_out"])
    asked, row = row, by_the_rule(row, options)
    a_step = row.batch // CONTEXT
    most = len(order) // a_step
    side = SIDES[row.side](row, int(arrays["bos"]), options)

    def bits_per_byte() -> float:
        with torch.no_grad():
            nats = sum(side.nats(part) for part in measure.split(8))
        return nats / math.log(2) / int(n_bytes[measure[:, 1:].numpy()].sum())

    def steps_left(taken: list[float]) -> int:
        left = row.seconds - training_seconds(taken)
        return max(0, round(left / statistics.median(taken[SKIPPED:][-50:])))

    n_steps = (
        row.tokens // row.batch if row.tokens else round(row.seconds / step_seconds(row, options))
    )
    taken: list[float] = []
    curve: list[tuple[int, float, float]] = []
    n = 0
    while n < min(n_steps, most):
        block = rows_of(train, order[n * a_step : (n + 1) * a_step])
        start = clock()
        side.step(block, n, n_steps)
        taken.append(clock() - start)
        n += 1
        # a machine that slows down shortens the schedule, and not the time left
        if row.seconds and n > SKIPPED:
            n_steps = n + steps_left(taken)
            if row.side == "hearth":  # … and has the rate of the steps that it will have
                side.set_peak(asked.lr * lr_for(ours(row.depth), n_steps))
        if n == min(n_steps, most) or (
            n_steps >= 10 * EVALUATIONS and n / n_steps >= (len(curve) + 1) / EVALUATIONS
        ):
            curve.append((n * row.batch, training_seconds(taken), bits_per_byte()))
    return {
        **asdict(asked),
        "peak_lr": side.lr if row.side == "hearth" else row.lr,
        "step": row.batch,
        "parameters": sum(p.numel() for p in side.model.parameters()),
        "trained": n * row.batch,
        "rate": row.batch / statistics.median(taken[SKIPPED:]),
        "took": training_seconds(taken),
        "bpb": curve[-1][2],
        "curve": curve,
    }


def step_seconds(row: Row, options: argparse.Namespace) -> float:
    """The least time of a step, which other processes slow down least, of a model that is thrown
    away afterwards.
    """
    arrays = tokens(options.out, options.data, row.text)
    side, taken = SIDES[row.side](row, int(arrays["bos"]), options), []
    for n in range(SKIPPED + 7):
        block = rows_of(arrays["train"], np.arange(row.batch // CONTEXT))
        start = time.process_time()
        side.step(block, n, 1000)
        taken.append(time.process_time() - start)
    return min(taken[SKIPPED:])


# --------------------------------------------------------------------------------------------- plan


PLAIN = json.dumps({"plain": True})
LEFT_OUT = [
    PLAIN,
    json.dumps({"model": {"bigram_rows": 0}}),
    json.dumps({"model": {"n_value_embeddings": 0}}),
    json.dumps({"optim": {"embedding_beta2": 0.95}}),
]
MINUTES = {4: 5, 6: 10, 9: 20}  # of a race, by depth
SEEDS = {4: (0, 1, 2), 6: (0, 1), 9: (0, 1)}
THEIRS = {"side": "nanochat", "batch": BATCH_OF_RIVALS}


def plan(copies: list[str]) -> Iterator[Row]:
    """The rows in the order in which they are run."""
    for depth in MINUTES:
        yield from race(depth)
    same = {"tokens": 2**19}
    for depth in MINUTES:
        for factor in (1.0, 0.5, 2.0):
            yield Row("rate", depth=depth, lr=factor, **same)
        yield Row("tokens", depth=depth, lr=0.6, **THEIRS, **same)
    for depth in (4, 6):
        for change in LEFT_OUT:
            yield Row("shape", depth=depth, change=change, **same)
        for copy in copies:
            yield Row("idea", depth=depth, copy=copy, **same)
    for factor in (0.5, 2.0):  # is the rule's rate the plain one's too?
        yield Row("head", lr=factor, change=PLAIN, **same)
    # races at twice the rate, each with as many tokens as take equal time by `pace`
    for depth, steps in ((6, (340, 347)), (9, (196, 200))):
        for seed in (0, 1):
            for n, change in zip(steps, ("", PLAIN), strict=True):
                here = {"depth": depth, "tokens": 4 * CONTEXT * n, "text": "unseen"}
                yield Row("head", lr=2.0, seed=seed, change=change, **here)
    # no more tokens than ours trains in nanochat's time by `pace`; then in 0.6 of it
    paced = {(4, 0): (600, 350), (4, 1): (584, 385), (4, 2): (584,), (6, 0): (221,), (6, 1): (221,)}
    paced |= {(9, 0): (153, 113), (9, 1): (185, 113)}
    for (depth, seed), lengths in paced.items():
        for steps in lengths:
            here = {"depth": depth, "tokens": 4 * CONTEXT * steps, "text": "unseen"}
            yield Row("race", seed=seed, **here)
    nanogpt = {"side": "nanogpt", "lr": 1e-3, "batch": BATCH_OF_RIVALS}
    for row in ({"seconds": 60.0}, {"seconds": 90.0}, {"seconds": 600.0} | nanogpt):
        yield Row("race", depth=6, text="unseen", **row)
    for depth, seconds in ((4, 75.0), (5, 300.0), (6, 300.0)):  # beside those of the races
        yield Row("law", depth=depth, seconds=seconds, text="unseen")
    for depth in (4, 5):  # beside 6 blocks of the race
        yield Row("hours", depth=depth, seconds=600.0, text="unseen")
    yield Row("batch", depth=4, batch=2048, **same)
    for batch in (1024, 2048, 4096):
        yield Row("batch", seconds=90.0, batch=batch)
    halved = json.dumps({"optim": {"momentum_dtype": "bfloat16"}})
    yield Row("momentum", change=halved, **same)  # beside part `rate`
    for seed in (0, 1):  # what the way to llama.cpp costs
        for change in ("", json.dumps({"portable": True})):
            here = {"tokens": 221 * 4 * CONTEXT, "text": "unseen"}
            yield Row("portable", seed=seed, change=change, **here)


def race(depth: int) -> Iterator[Row]:
    """Both sides on text that no tuning saw, nanochat with each of its rates with the first seed
    and with the best of these with the others.
    """
    seconds = 60.0 * MINUTES[depth]
    here = {"depth": depth, "seconds": seconds, "text": "unseen"}
    first, *others = SEEDS[depth]
    tuned = [
        Row("race", lr=factor, seed=first, **THEIRS, **here) for factor in (0.6, 0.3, 1.2, 2.4)
    ]
    yield Row("race", seed=first, **here)
    yield from tuned
    ran = [row for row in tuned if row.key in RUNS]
    best = min(ran, key=lambda row: RUNS[row.key]["bpb"], default=tuned[0])
    for seed in others:
        yield Row("race", seed=seed, **here)
        yield Row("race", lr=best.lr, seed=seed, **THEIRS, **here)
    for seed in SEEDS[depth][:2]:
        yield Row("race", seed=seed, change=PLAIN, **here)


# ------------------------------------------------------------------------------------------- worker


def work(options: argparse.Namespace) -> None:
    """Run the rows of the plan that nobody has run or is running."""
    (options.out / "claims").mkdir(parents=True, exist_ok=True)
    for text in ("tuning", "unseen"):
        tokens(options.out, options.data, text)
    RUNS.update(done(options.out))
    for row in plan(options.copies):
        if (options.only and row.part not in options.only) or row.key in done(options.out):
            continue
        claim = options.out / "claims" / hashlib.sha256(row.key.encode()).hexdigest()[:16]
        if claimed(claim):
            continue
        claim.write_text(str(os.getpid()))
        try:
            found = run_apart(row, options)
        finally:
            claim.unlink(missing_ok=True)
        RUNS[row.key] = found
        with (options.out / "runs.jsonl").open("a") as file:
            file.write(json.dumps({"key": row.key, **found}) + "\n")
        print(line_of(found), flush=True)
        if options.one:
            return
    if options.one:
        raise SystemExit(3)


def claimed(claim: Path) -> bool:
    """Whether a process that lives has taken the row."""
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        os.kill(int(claim.read_text()), 0)
        return True
    return False


def done(out: Path) -> dict[str, dict[str, Any]]:
    book = out / "runs.jsonl"
    found = [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []
    return {r["key"]: r for r in found}


def run_apart(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """`run` in a process of its own, with one thread."""
    words = words_for("run", row, options)
    made = subprocess.run(words, stdout=subprocess.PIPE, env=one_thread(), check=True, text=True)
    return json.loads(made.stdout.splitlines()[-1])


def words_for(command: str, row: Row, options: argparse.Namespace) -> list[str]:
    """The command line that does this with one row."""
    words = [sys.executable, __file__, command, str(options.out), "--row", json.dumps(asdict(row))]
    for name in ("nanogpt", "nanochat"):
        words += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    return words


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def line_of(r: dict[str, Any]) -> str:
    until = f"{r['tokens'] / 1e6:.2f}M tokens" if r["tokens"] else f"{r['seconds']:.0f} s"
    return (
        f"{r['part']:6} {r['side']:8} depth {r['depth']} lr × {r['lr']:<4g} = {r['peak_lr']:.4f} "
        f"batch {r['step']:5} "
        f"{until:13} seed {r['seed']} {r['text']:6} {r['change']} {r['copy'].rsplit('/', 1)[-1]} | "
        f"{r['trained'] / 1e6:.2f}M in {r['took']:.0f} s, {r['rate']:,.0f}/s | {r['bpb']:.4f}"
    )


def table(options: argparse.Namespace) -> None:
    for found in done(options.out).values():
        print(line_of(found))


# --------------------------------------------------------------------------------------------- pace

ROUNDS = 24  # in which every side takes one step


def pace(options: argparse.Namespace) -> None:
    """How fast the sides are beside each other, at each depth of the races."""
    for depth in options.depths:
        rivals = [name for name in ("nanochat", "nanogpt") if getattr(options, name)]
        rows = {"ours": Row("pace", depth=depth, batch=4 * CONTEXT)}
        rows |= {"plain": replace(rows["ours"], change=PLAIN)}
        rows |= {n: Row("pace", n, depth, batch=BATCH_OF_RIVALS) for n in rivals}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        sides = {
            name: subprocess.Popen(words_for("steps", row, options), env=one_thread(), **pipes)
            for name, row in rows.items()
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(SKIPPED + ROUNDS):
            for name, side in sides.items():
                side.stdin.write("\n")
                side.stdin.flush()
                rates[name].append(rows[name].batch / float(side.stdout.readline()))
        for side in sides.values():
            side.communicate()
        for name, found in rates.items():
            beside = [a / b for a, b in zip(rates["ours"][SKIPPED:], found[SKIPPED:], strict=True)]
            low, ratio, high = statistics.quantiles(beside, n=4)
            said = f"{depth} blocks {name:9} {statistics.median(found[SKIPPED:]):7,.0f} tokens/s"
            if name != "ours":
                said += f"; ours {ratio:.3f} times that, half of the rounds {low:.3f} to {high:.3f}"
            print(said, flush=True)


def steps(row: Row, options: argparse.Namespace) -> None:
    """A step for each line of the input, answered with its seconds."""
    import torch

    torch.set_num_threads(1)
    arrays = tokens(options.out, options.data, row.text)
    with contextlib.redirect_stdout(sys.stderr):  # a rival says what it builds
        side = SIDES[row.side](replace(row, lr=1e-3), int(arrays["bos"]), options)
    block = rows_of(arrays["train"], np.arange(row.batch // CONTEXT))
    for n, _ in enumerate(sys.stdin):
        start = time.process_time()
        side.step(block, n, 1000)
        print(time.process_time() - start, flush=True)


# -------------------------------------------------------------------------------------------- races


def races(options: argparse.Namespace) -> None:
    """Rows of the recipe that ships by text and depth; beside each of another arm what the shipped
    model ended at with the same seed, in up to twice its tokens.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in options.out.read_text().splitlines():
        if (r := json.loads(line))["code"] == "as shipped":
            groups.setdefault((r["text"], r["depth"]), []).append(r)
    for (text, depth), rows in sorted(groups.items()):
        print(f"{text} text, {depth} blocks")
        shipped = [r for r in rows if arm_of(r) == "ours"]
        for r in sorted(rows, key=lambda r: (arm_of(r) != "ours", arm_of(r), r["seed"])):
            said = f"    {arm_of(r):24} seed {r['seed']}  {r['trained'] / 1e6:.2f}M tokens "
            said += f"{r['cpu_seconds']:6.0f} s  {r['bpb']:.4f}"
            beside = [] if r in shipped else [s for s in shipped if s["seed"] == r["seed"]]
            for s in sorted(beside, key=lambda s: s["trained"]):
                if s["trained"] <= 2 * r["trained"]:
                    times, lead = s["trained"] / r["trained"], s["bpb"] / r["bpb"] - 1
                    said += f"  {times:.2f} × its tokens: {lead:+.1%}"
            print(said)


def arm_of(r: dict[str, Any]) -> str:
    """Who ran, and what was not as it ships."""
    name = "ours" if r["side"] == "hearth" else r["side"]
    rate = r.get("times", r["lr"])
    if name == "ours" and r["change"]:
        name = "plain" if r["change"] == PLAIN else r["change"]
    if r["side"] == "hearth" and rate == 1.0:
        return name
    return f"{name}, rate × {rate:.3g}"


# ---------------------------------------------------------------------------------------------- law

EXPONENTS = np.linspace(0.05, 1.0, 39)  # tried for the weights and for the tokens
RESAMPLED = 200  # times the runs are drawn again, for the range of a prediction


def law(options: argparse.Namespace) -> None:
    """Bits per byte = E + A N^-a + B D^-b (arXiv 2203.15556, section 3.3): N weights of products, D
    tokens. What it gives for each preset lies far outside of what was run.
    """
    from config import PRESETS, predicted_bits_per_byte, settled

    seen = of_the_rule(options.out)
    found = fitted(seen)
    rng = np.random.default_rng(0)
    drawn = [fitted(seen[rng.integers(0, len(seen), len(seen))]) for _ in range(RESAMPLED)]
    print(f"{len(seen)} runs, bits per byte = {written(found)}")
    for n, d, bpb in sorted(map(tuple, seen)):
        said = predicted_bits_per_byte(n, d, found)
        print(f"{n / 1e6:8.1f}M weights {d / 1e6:10.2f}M tokens  {bpb:.4f}  fitted {said:.4f}")
    for name, preset in PRESETS.items():
        if name == "demo":
            continue
        n, loop = preset.model.n_weights, settled(preset).pretrain
        d = loop.steps * loop.tokens_per_step
        said = predicted_bits_per_byte(n, d, found)
        low, high = np.quantile([predicted_bits_per_byte(n, d, one) for one in drawn], (0.1, 0.9))
        print(
            f"{n / 1e6:8.1f}M weights {d / 1e6:10,.0f}M tokens  predicted {said:.3f}, 80% of the "
            f"resampled fits {low:.3f} to {high:.3f}  ({name})"
        )


def of_the_rule(results: Path) -> np.ndarray:
    """Weights, tokens and bits per byte (runs, 3) of the runs on unseen text that have the rule's
    shape, learning rate and batch.
    """
    from config import batch_for

    rows = [json.loads(line) for line in results.read_text().splitlines()]
    rows = [
        row
        for row in rows
        if (row["code"], row["side"], row["text"]) == ("as shipped", "hearth", "unseen")
        and (row["change"], row.get("times", 1.0)) == ("", 1.0)
        and row["batch"] == batch_for(row["trained"], CONTEXT)
    ]
    return np.array([[ours(r["depth"]).n_weights, r["trained"], r["bpb"]] for r in rows])


def fitted(seen: np.ndarray) -> tuple[float, ...]:
    """E, A, a, B, b of least relative error, E, A and B not negative: `seen` (runs, 3) holds
    weights, tokens and bits per byte.
    """
    n, d, bpb = seen.T / [[1e6], [1e6], [1.0]]
    best: tuple[float, tuple[float, ...]] = (math.inf, ())
    for a in EXPONENTS:
        for b in EXPONENTS:
            terms = np.stack([np.ones_like(n), n**-a, d**-b], axis=1) / bpb[:, None]
            for used in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
                factors, *_ = np.linalg.lstsq(terms[:, used], np.ones_like(n), rcond=None)
                error = float(np.square(terms[:, used] @ factors - 1).sum())
                if error < best[0] and factors.min() >= 0:
                    e, big_a, big_b = np.bincount(used, factors, minlength=3)
                    best = error, (e, big_a, a, big_b, b)
    return best[1]


def written(fit: tuple[float, ...]) -> str:
    e, big_a, a, big_b, b = fit
    return f"{e:.3f} + {big_a:.3f} N^-{a:.3f} + {big_b:.3f} D^-{b:.3f}, N and D in millions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "command", choices=["work", "table", "pace", "races", "law", "run", "steps"]
    )
    parser.add_argument("out", type=Path)
    data = os.environ.get("HEARTH_DATA")
    parser.add_argument("--data", type=Path, default=Path(data) / "pretrain" if data else None)
    parser.add_argument("--nanogpt", help="a clone of nanoGPT")
    parser.add_argument("--nanochat", help="a clone of nanochat")
    parser.add_argument("--copies", nargs="*", default=[], help="changed copies of this project")
    parser.add_argument("--only", nargs="+", help="parts of the plan")
    parser.add_argument("--one", action="store_true", help="run one row; exit 3 if none is left")
    parser.add_argument("--depths", type=int, nargs="+", default=list(MINUTES), help="of pace")
    parser.add_argument("--row", type=json.loads, help="one row, as JSON")
    options = parser.parse_args()
    if options.row:
        row = Row(**options.row)
        sys.path.insert(0, row.copy or str(ROOT))
        if options.command == "steps":
            steps(row, options)
        else:
            print(json.dumps(run(row, options)))
        return
    sys.path.insert(0, str(ROOT))
    commands = {"work": work, "table": table, "pace": pace, "races": races, "law": law}
    commands[options.command](options)


if __name__ == "__main__":
    main()

"""Races on the same text: what this project learns an hour, beside nanoGPT and nanochat, and how
fast it trains.

In: a folder of .parquet files with a column `text`, and a rival's repository, by path. Every run is
a process of its own, with the same tokenizer (made here), the same rows of the same tokens in the
same order and the same held-out rows.
Out: a line of JSON a run in OUT/runs.jsonl; a run that is there already is not run again.

    uv run benchmarks/train.py race OUT --data FOLDER --nanogpt PATH --nanochat PATH
        tune, then race over 3 seeds
    uv run benchmarks/train.py table OUT
        what the races gave
    uv run benchmarks/train.py speed OUT --data FOLDER --nanogpt PATH --nanochat PATH
        tokens per second, in turns
    uv run benchmarks/train.py contexts
        the same at 1k, 2k, 4k, 8k

A rival's code is imported, its own optimizer and schedule drive it; its learning rates are tuned
like ours, by a factor on all of them, and its shape is the best that was found for so short a run,
like ours. Seconds are those of training steps alone, compilation left out; with one thread the
processor's own clock counts them, so that a busy machine does not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from racing import SKIPPED, Nanochat, NanoGPT, training_seconds

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, ROW, ROWS = 4096, 1024, 2  # entries, tokens of a row, rows of a step
# rows read by an evaluation, evaluations a run
HELD_OUT_ROWS, EVALUATIONS = 32, 6
RATES = {"hearth": (1.2e-2, 2.4e-2, 4.8e-2), "nanogpt": (1e-3, 2e-3), "nanochat": (0.2, 0.4, 0.8)}


def main() -> None:
    options = parse()
    if options.command == "run":
        print(json.dumps(run(options)))
    else:
        {"race": race, "table": table, "speed": speed, "contexts": contexts}[options.command](
            options
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["race", "table", "speed", "contexts", "run"])
    parser.add_argument("out", nargs="?", type=Path, default=Path("train-race"))
    parser.add_argument(
        "--data",
        default=os.environ.get("HEARTH_DATA", "") and os.environ["HEARTH_DATA"] + "/pretrain",
    )
    parser.add_argument("--hearth", default=str(ROOT), help="this project, or a changed copy of it")
    parser.add_argument("--nanogpt", help="a clone of nanoGPT")
    parser.add_argument("--nanochat", help="a clone of nanochat")
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="training time of a run, on every side"
    )
    parser.add_argument(
        "--tuning-seconds", type=float, help="the same of a run that tunes, if another"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--side", choices=list(SIDES))
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="train this many steps instead of --seconds")
    parser.add_argument(
        "--label", default="", help="kept with the run, to tell a changed copy apart"
    )
    parser.add_argument("--row", type=int, default=ROW)
    return parser.parse_args()


# --------------------------------------------------------------------------------------------- data


def tokens(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training ids, held-out ids, and the bytes of each entry of the vocabulary; made once, kept
    under OUT.
    """
    kept = options.out / "tokens.npz"
    if not kept.exists():
        sys.path.insert(0, str(ROOT))
        import pyarrow.parquet as parquet

        from hearth.data.tokenizer import Tokenizer

        texts = []
        for file in sorted(Path(options.data).glob("*.parquet")):
            texts += parquet.read_table(file, columns=["text"]).column(0).to_pylist()[:2500]
        np.random.default_rng(0).shuffle(texts)
        tokenizer = Tokenizer.train(texts[:1500], VOCABULARY)
        ids = [
            np.array([tokenizer.bos, *x], dtype=np.uint16) for x in tokenizer.encode_batch(texts)
        ]
        options.out.mkdir(parents=True, exist_ok=True)
        with open(str(kept) + ".part", "wb") as file:
            held_out, train = np.concatenate(ids[:150]), np.concatenate(ids[150:])
            np.savez(
                file,
                train=train,
                held_out=held_out,
                n_bytes=tokenizer.token_bytes,
                bos=tokenizer.bos,
            )
        os.replace(str(kept) + ".part", kept)
    arrays = np.load(kept)
    options.bos = int(arrays["bos"])
    return arrays["train"], arrays["held_out"], arrays["n_bytes"]


def rows(ids: np.ndarray, n: int, length: int, order: np.ndarray) -> Any:
    """n rows (n, length + 1) of neighbouring ids, the row at each place of `order`."""
    import torch

    return torch.stack(
        [
            torch.from_numpy(ids[i * length : i * length + length + 1].astype(np.int64))
            for i in order[:n]
        ]
    )


# -------------------------------------------------------------------------------------------- sides


class Hearth:
    """This project: its model and optimizer; documents of a row see themselves alone."""

    def __init__(self, options: argparse.Namespace) -> None:
        sys.path.insert(0, options.hearth)
        from config import LoopConfig, ModelConfig, OptimConfig
        from hearth.training import gradients
        from hearth.training.batches import Batch
        from hearth.training.optim import build_optimizers
        from model import build_model

        shape = {
            "n_layer": 2,
            "d_model": 192,
            "n_head": 3,
            "n_kv_head": 3,
            "d_ff": 864,
            "gated_mlp": False,
        }
        shape |= {"window": 128, "n_value_embeddings": 2, "hrm": None}
        config = ModelConfig(vocab_size=VOCABULARY, context=options.row, **shape)
        self.model = build_model(config, seed=options.seed)
        self.model.compile_blocks()
        self.optimizers = build_optimizers(
            self.model, OptimConfig(momentum_warmup_steps=100), options.lr
        )
        self.loop, self.bos, self.Batch, self.gradients = (
            LoopConfig(),
            options.bos,
            Batch,
            gradients,
        )

    def batch(self, block: Any) -> Any:
        import torch

        ids, targets = block[:, :-1].flatten(), block[:, 1:].flatten()
        return self.Batch(ids, targets, torch.ones(len(ids)), ids == self.bos, block.shape[1] - 1)

    def step(self, block: Any, n: int, n_steps: int) -> None:
        import torch

        self.optimizers.schedule(n, n_steps, self.loop)
        self.gradients.accumulate(self.model, self.batch(block), 1 << 30)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizers.config.clip)
        self.optimizers.step()
        self.optimizers.zero_grad()

    def nats(self, block: Any) -> float:
        from model import PackedSequences

        batch = self.batch(block)
        hidden = self.model(batch.ids, PackedSequences(batch.starts, batch.row_length))
        return float(self.model.loss(hidden, batch.targets, batch.weights))


def nanogpt(options: argparse.Namespace) -> Any:
    shape = {"n_layer": 2, "n_head": 3, "n_embd": 276}
    shape |= {"block_size": options.row, "vocab_size": VOCABULARY}
    return NanoGPT(options.nanogpt, shape, lr=options.lr, seed=options.seed)


def nanochat(options: argparse.Namespace) -> Any:
    shape = {"n_layer": 2, "n_head": 3, "n_kv_head": 3, "n_embd": 192}
    shape |= {"sequence_len": options.row, "vocab_size": VOCABULARY}
    return Nanochat(options.nanochat, shape, lr=options.lr, seed=options.seed)


SIDES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "hearth": Hearth,
    "nanogpt": nanogpt,
    "nanochat": nanochat,
}


# ---------------------------------------------------------------------------------------------- run


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train one side for --seconds, or for --steps; the curve of its held-out bits per byte."""
    import torch

    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    train, held_out, n_bytes = tokens(options)
    order = np.random.default_rng(options.seed).permutation((len(train) - 1) // options.row)
    measure = rows(
        held_out, HELD_OUT_ROWS * ROW // options.row, options.row, np.arange(len(held_out))
    )
    side = SIDES[options.side](options)

    def bits_per_byte() -> float:
        with torch.no_grad():
            nats = sum(side.nats(part) for part in measure.split(8))
        return nats / math.log(2) / int(n_bytes[measure[:, 1:].numpy()].sum())

    n_rows = ROWS * ROW // options.row
    taken: list[float] = []
    curve = []
    n, n_steps, most = (
        0,
        options.steps or round(options.seconds / step_seconds(options, clock)),
        len(order) // n_rows,
    )
    while n < min(n_steps, most):
        block = rows(train, n_rows, options.row, order[n * n_rows :])
        start = clock()
        side.step(block, n, n_steps)
        taken.append(clock() - start)
        n += 1
        # a machine that slows down shortens the schedule, and not the time left
        if not options.steps and n > SKIPPED:
            left = options.seconds - training_seconds(taken)
            n_steps = n + max(0, round(left / statistics.median(taken[SKIPPED:][-50:])))
        if n == min(n_steps, most) or (
            n_steps >= 10 * EVALUATIONS and n / n_steps >= (len(curve) + 1) / EVALUATIONS
        ):
            curve.append((n, training_seconds(taken), bits_per_byte()))
    return {
        "side": options.side,
        "label": options.label,
        "lr": options.lr,
        "seed": options.seed,
        "threads": options.threads,
        "parameters": sum(p.numel() for p in side.model.parameters()),
        "row": options.row,
        "tokens": n * ROWS * ROW,
        "tokens_per_second": ROWS * ROW / statistics.median(taken[SKIPPED:]),
        "seconds": training_seconds(taken),
        "bpb": curve[-1][2],
        "curve": curve,
    }


def step_seconds(options: argparse.Namespace, clock: Callable[[], float]) -> float:
    """The median time of a step, of a model that is thrown away afterwards."""
    train, _, _ = tokens(options)
    side, taken = SIDES[options.side](options), []
    for n in range(SKIPPED + 9):
        block = rows(
            train, ROWS * ROW // options.row, options.row, np.arange(n * ROWS, (n + 1) * ROWS)
        )
        start = clock()
        side.step(block, n, 1000)
        taken.append(clock() - start)
    return statistics.median(taken[SKIPPED:])


def run_apart(options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """`run` in a process of its own, unless OUT/runs.jsonl has it already."""
    asked = {
        "side": options.side,
        "lr": 1.0,
        "seed": 0,
        "label": options.label,
        "row": options.row,
        **changes,
    }
    asked["threads"] = options.threads
    book = options.out / "runs.jsonl"
    key = json.dumps(asked, sort_keys=True)
    for line in book.read_text().splitlines() if book.exists() else []:
        if json.loads(line)["asked"] == key:
            return json.loads(line)
    words = [sys.executable, __file__, "run", str(options.out), "--hearth", options.hearth]
    for name in ("nanogpt", "nanochat"):
        words += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    for name, value in asked.items():
        words += [f"--{name}", str(value)] if value != "" else []
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    done = subprocess.run(words, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    found = {"asked": key, **json.loads(done.stdout.splitlines()[-1])}
    with book.open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(
        f"{found['side']:9} {asked} {found['tokens_per_second']:,.0f} tokens/s, {found['bpb']:.4f} "
        "bpb",
        flush=True,
    )
    return found


# ------------------------------------------------------------------------------------------- tables


def present(options: argparse.Namespace) -> list[str]:
    return ["hearth", *(name for name in ("nanogpt", "nanochat") if getattr(options, name))]


def race(options: argparse.Namespace) -> None:
    """Tune each side's learning rate on seed 0, then train it over the seeds, all for the same time
    (a shorter run that tunes likes other rates).
    """
    tokens(options)
    tuning, best = options.tuning_seconds or options.seconds, {}
    for side in present(options):
        tuned = [run_apart(options, side=side, lr=lr, seconds=tuning) for lr in RATES[side]]
        best[side] = min(tuned, key=lambda r: r["bpb"])["lr"]
    for seed in options.seeds:
        for side in present(options):
            run_apart(options, side=side, lr=best[side], seed=seed, seconds=options.seconds)
        if options.nanogpt:  # as many tokens as nanoGPT, for its row of the table
            theirs = run_apart(
                options, side="nanogpt", lr=best["nanogpt"], seed=seed, seconds=options.seconds
            )
            steps = theirs["tokens"] // (ROWS * ROW)
            run_apart(options, side="hearth", lr=best["hearth"], seed=seed, steps=steps)
    table(options)


def table(options: argparse.Namespace) -> None:
    """The tuning, the races, and their bars."""
    found = [json.loads(line) for line in (options.out / "runs.jsonl").read_text().splitlines()]
    for r in found:
        r["asked"] = json.loads(r["asked"])
    final = [r for r in found if r["asked"].get("seconds") == options.seconds]
    best = {
        r["side"]: r["lr"]
        for r in sorted(final, key=lambda r: -r["bpb"])
        if r["seed"] == options.seeds[0]
    }
    # a run that tuned may be as long as those that race
    final = [r for r in final if r["lr"] == best[r["side"]]]
    print(
        f"{'side':10}{'parameters':>12}{'lr':>9}{'tokens/s':>10}{'tokens':>11}"
        f"{'seconds':>9}{'bits per byte':>22}"
    )
    for side in dict.fromkeys(r["side"] for r in final):
        runs = [r for r in final if r["side"] == side]
        bpb = [r["bpb"] for r in runs]
        spread = f"± {statistics.stdev(bpb):.4f}" if len(bpb) > 1 else ""
        rate = statistics.median(r["tokens_per_second"] for r in runs)
        print(
            f"{side:10}{runs[0]['parameters'] / 1e6:11.2f}M{runs[0]['lr']:9.3g}{rate:10,.0f}"
            f"{runs[0]['tokens'] / 1e6:10.2f}M{runs[0]['seconds']:9.0f}"
            f"{statistics.mean(bpb):12.4f} {spread} "
            f"({len(bpb)} seeds)"
        )
    same = [r for r in found if "steps" in r["asked"]]
    for ours in same:
        theirs = next(r for r in final if r["side"] == "nanogpt" and r["seed"] == ours["seed"])
        reached = seconds_until(ours["curve"], theirs["bpb"])
        told = f"after {reached / theirs['seconds']:.2f} of its time" if reached else "never"
        print(
            f"seed {ours['seed']}, the same {ours['tokens'] / 1e6:.2f}M tokens: {ours['bpb']:.4f} "
            "bpb in "
            f"{ours['seconds']:.0f} s; nanoGPT's final {theirs['bpb']:.4f} reached {told} (bar 0.5)"
        )


def seconds_until(curve: list[list[float]], bpb: float) -> float | None:
    """When a curve first is as low as `bpb`, between two evaluations in a line."""
    before = None
    for _, seconds, now in curve:
        if now <= bpb:
            if before is None:
                return seconds
            share = (before[1] - bpb) / (before[1] - now)
            return before[0] + share * (seconds - before[0])
        before = (seconds, now)
    return None


def speed(options: argparse.Namespace) -> None:
    """Tokens a second of every side, in turns, at rows of 1,024 and of 2,048 tokens."""
    tokens(options)
    for row in (1024, 2048):
        options.row = row
        sides = present(options)
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(3):
            for side in sides:
                found = run_apart(
                    options, side=side, lr=RATES[side][0], seed=turn, steps=16, label="speed"
                )
                rates[side].append(found["tokens_per_second"])
        ours = rates["hearth"]
        for side in sides:
            ratio = statistics.median(a / b for a, b in zip(ours, rates[side], strict=True))
            print(
                f"rows of {row}: {side:9} {statistics.median(rates[side]):8,.0f} tokens/s   hearth "
                f"/ it {ratio:.2f} ×"
            )


# ------------------------------------------------------------------------------------- cost growth


def contexts(options: argparse.Namespace) -> None:
    """Training tokens per second of the 16gb preset's layers at 1k to 8k context; on a CPU four of
    them, narrower.
    """
    sys.path.insert(0, options.hearth)
    import torch

    from config import PRESETS

    card = torch.cuda.is_available()
    base = PRESETS["16gb"].model
    shape = (
        base
        if card
        else replace(
            base,
            **{"n_layer": 4, "d_model": 256, "n_head": 4, "n_kv_head": 2, "d_ff": 704},
            **{"hrm": None, "n_value_embeddings": 0, "bigram_rows": 0},
        )
    )
    rates = {}
    for context in (1024, 2048, 4096, 8192):
        rates[context] = statistics.median(
            micro_step_rates(replace(shape, context=context), 8192, 5)
        )
        print(
            f"{context:6} tokens of context {rates[context]:10,.0f} tokens/s  "
            f"{rates[context] / rates[1024]:.0%} of 1k"
        )
    print("bar: 8k no less than 60% of 1k")


def micro_step_rates(config: Any, n_tokens: int, n_steps: int) -> Iterator[float]:
    """Tokens a second of forward and backward over one micro-batch of whole documents."""
    import torch

    from hearth.training import attention, gradients
    from hearth.training.batches import Batch
    from model import build_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, seed=0, device=device)
    attention.pick(model)
    ids = torch.randint(
        0, config.vocab_size, (n_tokens + 1,), generator=torch.Generator().manual_seed(0)
    )
    starts = torch.arange(n_tokens) % config.context == 0
    batch = Batch(ids[:-1], ids[1:], torch.ones(n_tokens), starts, config.context)
    if device.type == "cuda":
        model.compile_blocks()
    for n in range(n_steps + 2):
        begin = time.perf_counter()
        gradients.accumulate(model, batch, n_tokens)  # ends in a float: the card has finished
        model.zero_grad()
        if n >= 2:
            yield n_tokens / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()

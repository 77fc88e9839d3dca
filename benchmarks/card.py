"""Measure this project on a card, one part a call: what is right, fast, small, learnt and said.

In: a card (or, with --tiny, any machine: sizes that show only that the parts run), for `train` a
folder of text. Out: OUT/<device>-<part>.json, and the same as a table.

    uv run benchmarks/card.py --part check
        every test that needs a card
    uv run benchmarks/card.py --part speed
        tokens per second and MFU, plain and with the HRM head
    uv run benchmarks/card.py --part memory
        estimated against measured
    uv run benchmarks/card.py --part train --text FOLDER
        the 16gb preset on your text for eight minutes; again: it continues
    uv run benchmarks/card.py --part decode
        tokens per second at batch 1 to 256

No part takes longer than nine minutes on a card. Rivals run in `benchmarks/train.py`.
"""

from __future__ import annotations

import argparse
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train import micro_step_rates

from config import PRESETS, Config, UserError, settled
from hearth import hardware, log, storage
from hearth.cli import run_script
from hearth.decoding.engine import Engine
from hearth.training import attention
from hearth.training.optim import build_optimizers
from hearth.training.planning import GIB, in_words, make_plan, measure, time_update
from model import Model, build_model, compute_dtype

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured, and on what."""

    preset: str
    contexts: tuple[int, ...]
    micro_batch_tokens: int  # four times as many where there is room
    repeats: int  # timed micro-batches
    batches: tuple[int, ...]  # rows decoded together
    prompt: int  # tokens of each
    new_tokens: int
    tests: str

    @property
    def config(self) -> Config:
        return PRESETS[self.preset]


CARD = Sizes("16gb", (2048, 4096), 8192, 10, (1, 16, 64, 256), 128, 128, "tests")
TINY = Sizes("demo", (128, 256), 512, 2, (1, 3), 8, 4, "tests/training/test_attention.py")
TRAIN_SECONDS = 480  # of one call
# MFU to reach, plain and with the head: on a consumer's card, and on one for a data centre, whose
# peak a model this small cannot fill
MFU_BARS = {True: (0.55, 0.48), False: (0.42, 0.38)}


def main(argv: list[str] | None = None) -> None:
    """Measure one part; write and print what was found."""
    options = parse(argv)
    device = hardware.pick_device("cpu" if options.tiny else "cuda")
    sizes = TINY if options.tiny else CARD
    name = hardware.describe(device)
    print(f"device      {name}, torch {torch.__version__}", flush=True)
    rows = PARTS[options.part](device, sizes, options)
    for line in table(rows):
        print(line)
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.split(",")[0].lower()).strip("-")
    path = options.out / f"{slug}-{options.part}.json"
    storage.write_json(
        path, {"part": options.part, "device": name, "torch": torch.__version__, "rows": rows}
    )
    print(f"written to  {path}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--text", type=Path, help="of train: a folder, file or glob of text")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="of train: where it is")
    parser.add_argument("--seconds", type=float, default=TRAIN_SECONDS, help="of train: of a call")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, in seconds: does it run")
    parser.add_argument("words", nargs="*", help="of train, after --: settings of the run")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------- parts


def check(device: torch.device, sizes: Sizes, options: argparse.Namespace) -> list[Row]:
    """The tests that need a card, in a process of their own."""
    words = ["-m", "pytest", "-q", "-n", "0", "-m", "gpu", sizes.tests]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    last = (done.stdout.splitlines() or [""])[-1]
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped)", last)}
    return [{"exit code": done.returncode, "passed": 0, "failed": 0, "skipped": 0} | counts]


def speed(device: torch.device, sizes: Sizes, options: argparse.Namespace) -> list[Row]:
    """Forward and backward of a micro-batch: the preset's model, and as many plain blocks."""
    head = sizes.config.model
    plain = replace(head, n_layer=n_block_passes(head), hrm=None)
    bars = MFU_BARS["RTX" in hardware.describe(device)]
    roomy = hardware.memory_limit(device) > 40 * GIB
    n_tokens, rows = sizes.micro_batch_tokens * (4 if roomy else 1), []
    for (name, shape), bar in zip((("plain", plain), ("HRM head", head)), bars, strict=True):
        for context in sizes.contexts:
            config = replace(shape, context=context)
            rates = micro_step_rates(config, n_tokens, sizes.repeats)
            rate = statistics.median(rates)
            with torch.device("meta"):
                flops = Model(config).flops_per_token(context)
            mfu = rate * flops / hardware.peak_flops(device, compute_dtype(device))
            rows.append({"model": name, "context": context, "tokens/s": rate, "MFU": mfu})
            rows[-1]["bar"] = bar
    return rows


def memory(device: torch.device, sizes: Sizes, options: argparse.Namespace) -> list[Row]:
    """Every micro-batch of the plan: estimated, measured, and the one over the other."""
    config, rows = settled(sizes.config), []
    loop = config.pretrain
    for compiled in sorted({False, hardware.compiles(None, device)}):
        model = build_model(config.model, seed=0, device=device)
        attention.pick(model)
        if compiled:
            model.compile_blocks()
        optimizers = build_optimizers(model, config.optim, loop.lr)
        stages = ((config.model.context, 1.0),)
        plan = make_plan(model, optimizers, loop, stages=stages, n_steps=1)
        time_update(plan, model, optimizers)
        measure(plan, plan.rows, model, optimizers, seconds=200)
        for row in plan.rows:
            if row.peak is not None:
                found = {"compiled": compiled, "rows": row.n_rows, "context": row.context}
                found |= {"recompute": in_words(row.activation_checkpointing, model)}
                found |= {"estimated GiB": row.memory.peak / GIB, "measured GiB": row.peak / GIB}
                rows.append(found | {"estimated/measured": row.memory.peak / row.peak})
    return rows


def train(device: torch.device, sizes: Sizes, options: argparse.Namespace) -> list[Row]:
    """The preset on packed real text until the time is up, from where the last call stopped."""
    if options.text is None:
        raise UserError("--part train needs --text: a folder, file or glob of text to learn from.")
    words = ["--preset", sizes.preset, "--name", "card", "--runs", str(options.runs)]
    words += ["--data.text_files", str(options.text), *options.words]
    deadline = time.monotonic() + options.seconds
    for script in ("create_shard.py", "train_tokenizer.py", "pretrain.py"):
        if not run_until(deadline, [script, *words]):
            break
    metrics = options.runs / "card" / "base" / "metrics.jsonl"
    records = log.read_metrics(metrics) if metrics.exists() else []
    kept = ("step", "loss", "tokens_per_second", "mfu")
    return [
        {key: value for key, value in record.items() if key in kept or key.startswith("bpb")}
        for record in records
        if any(key.startswith("bpb") for key in record)
    ]


def run_until(deadline: float, words: list[str]) -> bool:
    """Whether a script of this project ended by itself; at the deadline it is asked to save and
    leave. Raises UserError where it fails.
    """
    # Windows asks only a group of processes to stop, by Ctrl-Break
    own = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, **own)
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))
        process.wait()
        return False
    if code:
        raise UserError(f"{words[0]} ended with exit code {code}: what it said stands above.")
    return True


def decode(device: torch.device, sizes: Sizes, options: argparse.Namespace) -> list[Row]:
    """Tokens per second of all rows together after the prompts, by rows."""
    model = build_model(sizes.config.model, seed=0, device=device)
    rng = torch.Generator().manual_seed(0)
    shape, rows = (max(sizes.batches), sizes.prompt), []
    prompts = torch.randint(0, model.config.vocab_size, shape, generator=rng).tolist()
    engine = Engine(model, max_rows=max(sizes.batches))

    def seconds(n_rows: int, n_tokens: int) -> float:
        start = time.perf_counter()
        engine.generate(prompts[:n_rows], max_tokens=n_tokens)
        return time.perf_counter() - start

    for n_rows in sizes.batches:
        seconds(n_rows, sizes.new_tokens + 1)  # warms up
        taken = seconds(n_rows, sizes.new_tokens + 1) - seconds(n_rows, 1)
        rate = n_rows * sizes.new_tokens / max(taken, 1e-9)
        rows.append({"rows": n_rows, "tokens/s": rate, "ms a pass": 1e3 * n_rows / rate})
    return rows


PARTS: dict[str, Callable[[torch.device, Sizes, argparse.Namespace], list[Row]]] = {
    part.__name__: part for part in (check, speed, memory, train, decode)
}


def n_block_passes(config: Any) -> int:
    with torch.device("meta"):
        return len(Model(config).block_passes())


def table(rows: list[Row]) -> list[str]:
    """The rows as a table in Markdown."""
    if not rows:
        return ["nothing was measured"]

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([cell(row.get(h, "")) for h in heads] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    run_script(main)

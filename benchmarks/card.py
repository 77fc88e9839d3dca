"""Measure this project on a card, one part a call: what is right, fast, small, learnt and said.

In: a card (or, with --tiny, any machine: sizes that show only that the parts run), for `train` a
folder of text. Out: OUT/<device>-<part>.json, written again after each row, and the same as a
table. A row that fails says why and keeps none of the others.

    uv run benchmarks/card.py --part check
        every test that needs a card
    uv run benchmarks/card.py --part speed
        tokens per second and MFU, plain and with the HRM head; --nanogpt PATH and
        --nanochat PATH put those beside it
    uv run benchmarks/card.py --part memory
        estimated against measured
    uv run benchmarks/card.py --part train --text FOLDER
        the 16gb preset on your text for eight minutes; again: it continues
    uv run benchmarks/card.py --part decode
        tokens per second at batch 1 to 256, with CUDA graphs and without

No part takes longer than nine minutes on a card. Needs torch,
numpy, tokenizers, tqdm, safetensors and pyarrow alone; `check` pytest too.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contexts import micro_step_rates
from racing import Nanochat, NanoGPT

from config import FINE_TUNING, PRESETS, Config, ModelConfig, UserError, settled
from hearth import hardware, log, run, storage
from hearth.cli import run_script
from hearth.decoding.engine import Engine
from hearth.training import attention
from hearth.training.optim import build_optimizers
from hearth.training.planning import GIB, Row, in_words, make_plan, measure, time_update
from model import Model, build_model, compute_dtype

ROOT = Path(__file__).resolve().parents[1]
Found = dict[str, Any]  # a row of a table


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
    tests: tuple[str, ...]  # files, folders

    @property
    def config(self) -> Config:
        return PRESETS[self.preset]


CARD = Sizes("16gb", (2048, 4096), 8192, 10, (1, 16, 64, 256), 128, 128, ("tests",))
TINY = Sizes("demo", (128, 256), 512, 2, (1, 3), 8, 4, ("tests/decoding/test_graphs.py",))
SECONDS = 480  # of one call: no row begins later
SAVING = 40  # that a run which was asked to stop has to save
# MFU to reach, plain and with the head: on a consumer's card, and on one for a data centre, whose
# peak a model this small cannot fill
MFU_BARS = {True: (0.55, 0.48), False: (0.42, 0.38)}


def main(argv: list[str] | None = None) -> None:
    """Measure one part; write what was found after each row, and print it."""
    options = parse(argv)
    if options.script:
        run_stage(options)
        return
    device = hardware.pick_device("cpu" if options.tiny else "cuda")
    sizes = TINY if options.tiny else CARD
    name = hardware.describe(device)
    print(f"device      {name}, torch {torch.__version__}", flush=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.split(",")[0].lower()).strip("-")
    path, found = options.out / f"{slug}-{options.part}.json", []
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {"part": options.part, "device": name, "torch": torch.__version__}
    options.deadline = time.monotonic() + options.seconds
    for row in PARTS[options.part](device, sizes, options):
        found.append(row)
        print(row, flush=True)
        storage.write_json(path, {**facts, "rows": found})
    storage.write_json(path, {**facts, "rows": found})
    for line in table(found):
        print(line)
    print(f"written to  {path}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--text", type=Path, help="of train: a folder, file or glob of text")
    parser.add_argument("--tokens", type=float, help="of train: of the whole run; the preset's")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="of train: where it is")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a call")
    parser.add_argument("--nanogpt", help="of speed: a clone of nanoGPT")
    parser.add_argument("--nanochat", help="of speed: a clone of nanochat")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, in seconds: does it run")
    parser.add_argument("--script", help=argparse.SUPPRESS)  # of train: its own processes
    parser.add_argument("words", nargs="*", help="of train, after --: settings of the run")
    return parser.parse_args(argv)


Attempt = tuple[Found, Callable[[], Found]]  # what is known of a row, and what finds the rest


def attempts(rows: list[Attempt], options: argparse.Namespace) -> Iterator[Found]:
    """Each row with what its function finds, or with why it did not; none begins after the time."""
    for known, look in rows:
        if time.monotonic() > options.deadline:
            yield {**known, "error": "not measured: the time was up"}
            continue
        try:
            yield known | look()
        except Exception as error:  # a kernel, a compiler, memory: each with errors of its own
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            yield {**known, "error": said}
        hardware.free_memory(hardware.pick_device("cpu" if options.tiny else "cuda"))


# -------------------------------------------------------------------------------------------- parts


def check(device: torch.device, sizes: Sizes, options: argparse.Namespace) -> Iterator[Found]:
    """The tests that need a card, in a process of their own: each that failed, then the counts."""
    files = sorted(
        (path for place in sizes.tests for path in test_files(ROOT / place)),
        key=lambda path: (len(path.parts), "attention" in path.name),  # what compiles comes last
    )
    # not with what pyproject.toml asks for: plugins that may not be here
    words = ["-m", "pytest", "-v", "-m", "gpu", "-o", "addopts=", "-o", "filterwarnings="]
    words += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *map(str, files)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    counts = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, **how) as process:
        timer = threading.Timer(max(0.0, options.deadline - time.monotonic()), process.kill)
        timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            if told := re.match(r"(\S+) (PASSED|FAILED|ERROR|SKIPPED)\b", line):
                counts[told[2].lower()] += 1
                if told[2] in ("FAILED", "ERROR"):
                    yield {"test": told[1].rpartition("::")[2], "result": told[2].lower()}
        timer.cancel()
    told = ", ".join(f"{n} {what}" for what, n in counts.items())
    yield {"test": "all", "result": told, "exit code": process.returncode, **counts}


def test_files(place: Path) -> list[Path]:
    """The files of tests that hold one for a card."""
    files = [place] if place.is_file() else place.rglob("test_*.py")
    return [path for path in files if "mark" + ".gpu" in path.read_text(encoding="utf-8")]


def speed(device: torch.device, sizes: Sizes, options: argparse.Namespace) -> Iterator[Found]:
    """Forward and backward of a micro-batch: as many plain blocks as the preset has, rivals as deep
    and as wide where their paths are given, the preset's model.
    """
    head = sizes.config.model
    plain = replace(head, n_layer=n_block_passes(head), hrm=None)
    bars = MFU_BARS["RTX" in hardware.describe(device)]
    roomy = hardware.memory_limit(device) > 40 * GIB
    n_tokens, ours = sizes.micro_batch_tokens * (4 if roomy else 1), {}

    def rate_of(shape: ModelConfig, context: int) -> Found:
        config = replace(shape, context=context)
        rate = statistics.median(micro_step_rates(config, n_tokens, sizes.repeats))
        with torch.device("meta"):
            flops = Model(config).flops_per_token(context)
        ours.setdefault(context, rate)
        peak = hardware.peak_flops(device, compute_dtype(device, config.d_model))
        return {"tokens/s": rate, "MFU": rate * flops / peak}

    def rate_of_rival(name: str, path: str, context: int) -> Found:
        rates = rival_rates(name, path, plain, context, n_tokens, sizes.repeats, device)
        rate = statistics.median(rates)
        return {"tokens/s": rate, "hearth / it": ours[context] / rate}

    def of_us(name: str, shape: ModelConfig, bar: float) -> list[Attempt]:
        known = {"model": name, "bar": bar}
        return [(known | {"context": c}, partial(rate_of, shape, c)) for c in sizes.contexts]

    rivals = ((name, getattr(options, name), bar) for name, bar in RIVALS.items())
    rows = of_us("plain", plain, bars[0])
    rows += [
        ({"model": name, "bar": bar, "context": c}, partial(rate_of_rival, name, path, c))
        for name, path, bar in rivals
        if path
        for c in sizes.contexts
    ]
    yield from attempts([*rows, *of_us("HRM head", head, bars[1])], options)


# a rival → how many times its tokens per second the plain model must train
RIVALS = {"nanogpt": 1.3, "nanochat": 1.0}


def rival_rates(
    name: str,
    path: str,
    shape: ModelConfig,
    context: int,
    n_tokens: int,
    repeats: int,
    device: torch.device,
) -> Iterator[float]:
    """Tokens a second of forward and backward of a rival's model, compiled, in bfloat16 as its own
    training has it on a card.
    """
    fields = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.d_model}
    fields["vocab_size"] = shape.vocab_size
    if name == "nanogpt":
        side = NanoGPT(path, fields | {"block_size": context}, lr=1e-3, seed=0)
    else:
        fields |= {"n_kv_head": shape.n_head, "sequence_len": context}
        side = Nanochat(path, fields, lr=1.0, seed=0)
    side.model.to(device)
    rng = torch.Generator().manual_seed(0)
    n_rows = max(1, n_tokens // context)
    ids = torch.randint(0, shape.vocab_size, (n_rows, context + 1), generator=rng).to(device)
    casts = name == "nanogpt" and device.type == "cuda"  # nanochat casts by itself
    for n in range(repeats + 2):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=casts):
            loss = side.compiled(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss = loss[1] if isinstance(loss, tuple) else loss
        loss.backward()
        float(loss.detach())  # waits for the card
        side.model.zero_grad(set_to_none=True)
        if n >= 2:
            yield n_rows * context / (time.perf_counter() - begin)


def memory(device: torch.device, sizes: Sizes, options: argparse.Namespace) -> Iterator[Found]:
    """Every micro-batch of the plan: estimated, measured, and the one over the other. Four rows
    come first, those that 12 GB must hold; then the compiled ones.
    """
    config = settled(sizes.config)
    loop, context = config.pretrain, config.model.context
    for compiled in sorted({False, hardware.compiles(None, device)}):
        model = build_model(config.model, seed=0, device=device)
        attention.pick(model)
        if compiled:
            model.compile_blocks()
        optimizers = build_optimizers(model, config.optim, loop.lr)
        plan = make_plan(model, optimizers, loop, stages=((context, 1.0),), n_steps=1)
        time_update(plan, model, optimizers)

        def measured(row: Row, plan=plan, model=model, optimizers=optimizers) -> Found:
            measure(plan, [row], model, optimizers, seconds=30, until_no_gain=True)
            if row.peak is None:
                return {"error": "memory ran out" if row.too_large else "not measured: too large"}
            found = {"measured GiB": row.peak / GIB, "seconds": row.seconds[context]}
            return found | {"estimated/measured": row.memory.peak / row.peak}

        rows = []
        for row in sorted(plan.rows, key=lambda row: (row.n_rows != 4, row.n_rows)):
            known = {"compiled": compiled, "rows": row.n_rows, "context": row.context}
            known |= {"recompute": in_words(row.recomputed, model)}
            known["estimated GiB"] = row.memory.peak / GIB
            rows.append((known, partial(measured, row)))
        yield from attempts(rows, options)


def train(device: torch.device, sizes: Sizes, options: argparse.Namespace) -> Iterator[Found]:
    """The preset on packed real text until the time is up, from where the last call stopped: what
    it evaluated, its last step, what it wrote.
    """
    if options.text is None:
        raise UserError("--part train needs --text: a folder, file or glob of text to learn from.")
    words = ["--part", "train", "--runs", str(options.runs), "--text", str(options.text)]
    words += ["--tiny"] * options.tiny
    words += ["--tokens", str(options.tokens)] if options.tokens else []
    for script in STAGES:
        command = [__file__, *words, "--script", script, "--", *options.words]
        if not run_until(options.deadline, command):
            break
    metrics = options.runs / "card" / "base" / "metrics.jsonl"
    records = log.read_metrics(metrics) if metrics.exists() else []
    kept = ("step", "loss", "tokens_per_second", "mfu", "memory_gb", "tokens", "prompt", "text")
    steps = [record for record in records if record["kind"] == "step"][-1:]
    for record in [r for r in records if r["kind"] in ("eval", "sample")] + steps:
        yield {k: v for k, v in record.items() if k in kept or k.startswith("bpb")}


STAGES = ("create_shard", "train_tokenizer", "pretrain")


def run_stage(options: argparse.Namespace) -> None:
    """One script of the road, in the process that `train` started for it. Settings in words need
    tyro; without any it is not asked for.
    """
    sizes = TINY if options.tiny else CARD
    script = importlib.import_module(options.script)
    own = ["--preset", sizes.preset, "--name", "card", "--runs", str(options.runs)]
    if options.words:
        words = [*own, "--data.text_files", str(options.text), *options.words]
        config, _ = run.parse(script.SCRIPT, words)
    else:
        config = run.load_settings(options.runs / "card") or sizes.config
        config = replace(config, name="card", runs=str(options.runs))
        config = replace(config, data=replace(config.data, text_files=(str(options.text),)))
        loop = replace(config.pretrain, eval_every_steps=250, sample_every_steps=1000)
        if options.tokens:
            loop = replace(loop, tokens=int(options.tokens), steps=None)
        config = replace(config, pretrain=loop, report=replace(config.report, draw=False))
    # no conversations: they would be fetched
    none = {name: replace(getattr(config, name), epochs=0.0, files=()) for name in FINE_TUNING}
    config = replace(config, **none)
    run_script(lambda: script.main(config, script.Options()))


def run_until(deadline: float, words: list[str]) -> bool:
    """Whether a script of this project ended by itself; at the deadline it is asked to save and
    leave, and ended where it does not. Raises UserError where it fails.
    """
    # Windows asks only a group of processes to stop, by Ctrl-Break
    own = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, **own)
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))
        try:
            process.wait(SAVING)
        except subprocess.TimeoutExpired:  # its last checkpoint stays
            process.kill()
            process.wait()
        return False
    if code:
        raise UserError(f"{words[0]} ended with exit code {code}: what it said stands above.")
    return True


def decode(device: torch.device, sizes: Sizes, options: argparse.Namespace) -> Iterator[Found]:
    """Tokens per second of all rows together after the prompts, by rows, with recorded passes and
    without; and how much of that time the card computed.
    """
    model = build_model(sizes.config.model, seed=0, device=device).requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    shape = (max(sizes.batches), sizes.prompt)
    prompts = torch.randint(0, model.config.vocab_size, shape, generator=rng).tolist()

    def rate_of(graphs: bool, n_rows: int) -> Found:
        engine = Engine(model, max_rows=n_rows)
        engine.record = engine.record if graphs else None

        def seconds(n_tokens: int) -> float:
            start = time.perf_counter()
            engine.generate(prompts[:n_rows], max_tokens=n_tokens)
            return time.perf_counter() - start

        seconds(sizes.new_tokens + 1)  # warms up
        # the first two tokens are the prompt's and that of the recording
        taken = seconds(sizes.new_tokens + 2) - seconds(2)
        rate = n_rows * sizes.new_tokens / max(taken, 1e-9)
        if graphs and engine.record is None:
            return {"error": "passes cannot be recorded here: what the log said stands above"}
        busy = computing(device, lambda: seconds(sizes.new_tokens + 2))
        return {"tokens/s": rate, "ms a pass": 1e3 * n_rows / rate, "card computes": busy}

    kinds = (True, False) if device.type == "cuda" else (False,)
    rows = [
        ({"graphs": graphs, "rows": n_rows}, partial(rate_of, graphs, n_rows))
        for n_rows, graphs in itertools.product(sizes.batches, kinds)
    ]
    yield from attempts(rows, options)


def computing(device: torch.device, work: Callable[[], float]) -> float | None:
    """Share of the time of `work`, which gives its seconds, that kernels ran; None without a card.
    The profiler slows what starts kernels, so it is a lower bound.
    """
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        taken = work()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / taken


PARTS: dict[str, Callable[[torch.device, Sizes, argparse.Namespace], Iterator[Found]]] = {
    part.__name__: part for part in (check, speed, memory, train, decode)
}


def n_block_passes(config: Any) -> int:
    with torch.device("meta"):
        return len(Model(config).block_passes())


def table(rows: list[Found]) -> list[str]:
    """The rows as a table in Markdown."""
    if not rows:
        return ["nothing was measured"]

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    heads = list(dict.fromkeys(name for row in rows for name in row))
    lines = [heads, ["---"] * len(heads), *([cell(row.get(h, "")) for h in heads] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    run_script(main)

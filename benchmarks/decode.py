"""Measure decoding against its bars: transformers, llama.cpp, the memory's speed, the cache between
turns.

Out: a table of medians with the bars of the project, and with --json the same for a program. Random
weights of one shape everywhere; the contenders take turns within each round, so that all see the
same machine.

    uv venv rivals  once, in any folder; builds llama.cpp with cmake
    uv pip install --python rivals torch transformers gguf llama-cpp-python
    uv run benchmarks/decode.py --python rivals/bin/python
        every figure
    uv run benchmarks/decode.py --without transformers llamacpp
        only what needs no other package
    uv run benchmarks/decode.py --model hrm
        the preset's own model, with its reasoning head
    uv run benchmarks/decode.py --quality runs/16gb/base text.txt
        what storing weights in fewer bits costs

On a machine that others use too, `--threads 1 --clock cpu` counts the seconds that this program was
given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PRESETS, ModelConfig
from hearth import hardware
from hearth.cli import run_script
from hearth.decoding.engine import Engine, compress
from hearth.decoding.matrices import STORES, Matrix, compiled_kernels
from hearth.training import checkpoint
from model import Model, PackedSequences, build_model

DENSE_LAYERS = 19  # of the dense model with as many parameters as the 16gb preset
BARS = {
    "transformers": 2.5,  # times its tokens per second
    "bandwidth bfloat16": 0.6,  # share of the memory's read bandwidth
    "bandwidth int8": 0.5,
    "llamacpp": 0.8,  # times its tokens per second
    "int4": 1.3,  # times the tokens per second of int8
    "second turn": 0.15,  # of the time that reading everything again takes, at most
    "long context": 0.8,  # speed at 4,000 tokens against 200
    "cache": 0.5,  # of the memory that whole layers would take, at most
    "batch": 4.0,  # times the tokens per second of one row
}

# and how they store weights
RIVALS = {"transformers": ("float32", "bfloat16"), "llamacpp": ("F16", "Q8_0")}
AS_MANY_BITS = {"bfloat16": "F16", "int8": "Q8_0"}  # ours, and llama.cpp's
PARTS = ("speed", "second_turn", "long_context", "cache", "batch")


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    if options.quality:
        report_quality(*options.quality)
        return
    bench = Bench(options)
    print(f"machine     {hardware.describe(torch.device('cpu'))}")
    print(f"kernels     {'compiled' if compiled_kernels() else 'none: no C compiler'}")
    print(
        f"model       {bench.model.n_parameters() / 1e6:.1f}M parameters, context "
        f"{bench.config.context}"
    )
    print(f"measured    medians of {options.rounds} rounds, {options.clock} clock\n")
    for name in options.only or PARTS:
        getattr(bench, name)()
    if options.json:
        Path(options.json).write_text(json.dumps(bench.results, indent=1))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of every contender"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="measurements of each figure; the median counts"
    )
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in a measurement")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prompt before it")
    parser.add_argument(
        "--model", choices=("dense", "hrm", "tiny"), default="dense", help="dense: 19 plain blocks"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of this thread alone"
    )
    parser.add_argument(
        "--without", nargs="*", default=[], choices=RIVALS, help="contenders to leave out"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="the Python that has the contenders' packages"
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, help="parts to measure; default: all")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument(
        "--quality", nargs=2, metavar=("CHECKPOINT", "TEXT"), help="bits per byte of each store"
    )
    options = parser.parse_args()
    if shutil.which(options.python) is None:
        parser.error(f"--python {options.python}: there is no such program")
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu needs --threads 1")
    return options


def model_config(name: str) -> ModelConfig:
    shape = PRESETS["16gb"].model
    if name == "dense":
        return replace(shape, n_layer=DENSE_LAYERS, hrm=None, n_value_embeddings=0, bigram_rows=0)
    if name == "tiny":  # to try this program
        return replace(
            shape,
            n_layer=2,
            hrm=None,
            n_value_embeddings=0,
            bigram_rows=0,
            vocab_size=1024,
            d_model=128,
            n_head=4,
            n_kv_head=2,
            d_ff=256,
        )
    return shape


class Bench:
    """The model under test, its engines, and what was measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.config = options, model_config(options.model)
        self.clock = time.thread_time if options.clock == "cpu" else time.perf_counter
        self.model = build_model(self.config, seed=0)
        self.model.dtype = torch.float32
        self.results: list[dict[str, Any]] = []
        self.rng = torch.Generator().manual_seed(0)

    def ids(self, n: int) -> list[int]:
        return torch.randint(0, self.config.vocab_size, (n,), generator=self.rng).tolist()

    def seconds(self, work: Callable[[], Any]) -> float:
        start = self.clock()
        work()
        return self.clock() - start

    def rounds(self, measures: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
        """Each measure once a round, in turn, after a round to warm up."""
        found: dict[str, list[float]] = {name: [] for name in measures}
        for number in range(self.options.rounds + 1):
            for name, measure in measures.items():
                value = measure()
                if number:
                    found[name].append(value)
        return found

    def note(
        self, name: str, value: float, what: str, *, bar: str | None = None, at_most: bool = False
    ) -> None:
        verdict = ""
        if bar:
            holds = value <= BARS[bar] if at_most else value >= BARS[bar]
            verdict = (
                f"   bar {'≤' if at_most else '≥'} {BARS[bar]:g}: {'holds' if holds else 'MISSED'}"
            )
        print(f"{name:<44} {value:10.3f} {what}{verdict}", flush=True)
        self.results.append(
            {"name": name, "value": value, "unit": what, "bar": BARS.get(bar or "")}
        )

    # -------------------------------------------------------------------------------------- figures

    def speed(self) -> None:
        """Tokens a second at batch 1 after the prompt, beside the other programs and the memory."""
        engines = {store: Engine(self.model, weights=store) for store in STORES}
        prompt = self.ids(self.options.prompt)
        measures: dict[str, Callable[[], float]] = {"memory": self.read_bandwidth}
        for store, engine in engines.items():
            measures[f"ours {store}"] = self.stream_speed(engine, prompt)
        measures |= self.rivals(prompt)
        found = self.rounds(measures)
        for name, values in found.items():
            unit = "GB/s read" if name == "memory" else f"tokens/s after {len(prompt)}"
            self.note(name, statistics.median(values), unit)
        for store, engine in engines.items():
            n_bytes = bytes_per_token(engine.model)
            shares = [
                n_bytes * s / (m * 1e9)
                for s, m in zip(found[f"ours {store}"], found["memory"], strict=True)
            ]
            bar = f"bandwidth {store}"
            self.note(
                f"{bar}, of the memory's",
                statistics.median(shares),
                "",
                bar=bar if bar in BARS else None,
            )
        theirs = [name for name in found if name.startswith("transformers")]
        best = max(theirs, default=None, key=lambda name: statistics.median(found[name]))
        pairs = [("ours bfloat16", best, "transformers")] if best else []
        pairs.append(("ours int4", "ours int8", "int4"))
        pairs += [
            (f"ours {ours}", f"llamacpp {theirs}", "llamacpp")
            for ours, theirs in AS_MANY_BITS.items()
        ]
        for ours, theirs, bar in pairs:
            if theirs in found:
                ratios = [a / b for a, b in zip(found[ours], found[theirs], strict=True)]
                self.note(f"{ours} / {theirs}", statistics.median(ratios), "times", bar=bar)

    def stream_speed(self, engine: Engine, prompt: list[int]) -> Callable[[], float]:
        def measure() -> float:
            stream = engine.stream(prompt, max_tokens=self.options.tokens + 1)
            next(stream)
            return self.options.tokens / self.seconds(lambda: list(stream))

        return measure

    def second_turn(self) -> None:
        """Time to the first token of a second turn, beside reading the whole conversation."""
        total, question = min(2000, self.config.context - 100), 40
        engine, fresh = (
            Engine(self.model, weights="bfloat16"),
            Engine(self.model, weights="bfloat16"),
        )
        prompt = self.ids(total - question - 8)
        answer = list(engine.stream(prompt, max_tokens=8))
        conversation = [*prompt, *answer, *self.ids(question)]

        def again(engine: Engine, forget: bool) -> float:
            if forget:
                engine.cache, engine.held = None, []
            else:
                # back to the end of the first turn
                list(engine.stream([*prompt, *answer, 0], max_tokens=1))
            stream = engine.stream(conversation, max_tokens=1)
            return self.seconds(lambda: next(stream))

        found = self.rounds(
            {"reused": lambda: again(engine, False), "all": lambda: again(fresh, True)}
        )
        all_seconds = statistics.median(found["all"])
        self.note("a prompt read again", len(conversation) / all_seconds, "tokens/s")
        self.note(f"first token after {total} tokens, all read", all_seconds, "s")
        ratios = [a / b for a, b in zip(found["reused"], found["all"], strict=True)]
        self.note(
            "the same in a second turn",
            statistics.median(ratios),
            "of it",
            bar="second turn",
            at_most=True,
        )

    def long_context(self) -> None:
        """Speed at the end of a long context against the beginning."""
        length = min(4000, self.config.context - self.options.tokens - 1)
        for store in ("bfloat16", "int8"):
            near, far = Engine(self.model, weights=store), Engine(self.model, weights=store)
            speeds = {
                "near": self.stream_speed(near, self.ids(200)),
                "far": self.stream_speed(far, self.ids(length)),
            }
            found = self.rounds(speeds)
            ratio = statistics.median(
                a / b for a, b in zip(found["far"], found["near"], strict=True)
            )
            self.note(
                f"speed at {length} tokens against 200, {store}", ratio, "times", bar="long context"
            )

    def cache(self) -> None:
        """Memory of the cache at the whole context against keeping every layer whole."""
        engine = Engine(self.model)
        n_passes, c = len(self.model.block_passes()), self.config
        whole = n_passes * c.context * 2 * c.n_kv_head * c.head_dim * self.model.dtype.itemsize
        self.note(f"cache at {c.context} tokens", engine.cache_bytes() / 1e6, "MB")
        self.note(
            "the same against whole layers",
            engine.cache_bytes() / whole,
            "of it",
            bar="cache",
            at_most=True,
        )

    def batch(self) -> None:
        """Tokens a second of sixteen rows together against one."""
        for store in STORES:
            engine, prompts = Engine(self.model, weights=store), [self.ids(32) for _ in range(16)]

            def speed(
                rows: int, engine: Engine = engine, prompts: list[list[int]] = prompts
            ) -> float:
                def run(n: int) -> float:
                    return self.seconds(lambda: engine.generate(prompts[:rows], max_tokens=n))

                return rows * self.options.tokens / (run(self.options.tokens + 1) - run(1))

            found = self.rounds({"one": lambda: speed(1), "sixteen": lambda: speed(16)})
            self.note(
                f"sixteen rows, {store}", statistics.median(found["sixteen"]), "tokens/s in total"
            )
            ratio = statistics.median(
                a / b for a, b in zip(found["sixteen"], found["one"], strict=True)
            )
            self.note(f"sixteen rows against one, {store}", ratio, "times", bar="batch")

    def read_bandwidth(self) -> float:
        """Bytes a second that all threads read from memory, in 10^9: the best of several sums over
        512 MiB.
        """
        if not hasattr(self, "_buffer"):
            self._buffer = torch.ones(2**27)
        ways = (
            self._buffer.sum,
            self._buffer.view(torch.int64).sum,
            lambda: torch.dot(self._buffer, self._buffer),
        )
        return max(
            4 * len(self._buffer) / self.seconds(way) / 1e9 for way in ways for _ in range(2)
        )

    # ----------------------------------------------------------------------------------- contenders

    def rivals(self, prompt: list[int]) -> dict[str, Callable[[], float]]:
        """The other programs that can be had, ready to be measured; says of the others why not."""
        found = {}
        for program, stores in RIVALS.items():
            for store in stores:
                name = f"{program} {store}"
                reason = "asked for" if program in self.options.without else ""
                if self.config.hrm:
                    reason = "it has no network like this one; --model dense compares plain blocks"
                rival = Rival(program, store, self, prompt) if not reason else None
                if rival and not rival.missing:
                    found[name] = rival.measure
                else:
                    print(f"{name:<44} left out: {reason or rival.missing}", flush=True)
        return found


class Rival:
    """Another program in a process of its own, run by the Python that has its packages
    (decode_rivals.py).
    """

    def __init__(self, program: str, store: str, bench: Bench, prompt: list[int]) -> None:
        options, c = bench.options, bench.config
        wanted = {"program": program, "store": store, "prompt": prompt, "tokens": options.tokens}
        wanted |= {"threads": options.threads, "clock": options.clock}
        wanted["shape"] = {**asdict(c), "head_dim": c.head_dim}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [options.python, Path(__file__).with_name("decode_rivals.py"), json.dumps(wanted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        )
        weakref.finalize(self, self._process.kill)
        self.missing = self._answer().get("missing")

    def measure(self) -> float:
        """Tokens a second."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "missing" in answer:
            raise SystemExit(answer["missing"])
        return answer["tokens_per_second"]

    def _answer(self) -> dict[str, Any]:
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._errors.seek(0)
        last = (self._errors.read().strip() or "no word").splitlines()[-1]
        return {"missing": f"{self._process.args[0]} ended with {last}"}


def bytes_per_token(model: Model) -> int:
    """Bytes of weights that one token needs from memory: those of each block pass, the output."""

    def matrices(module: Any) -> Iterator[Matrix]:
        return (
            value
            for part in module.modules()
            for value in vars(part).values()
            if isinstance(value, Matrix)
        )

    blocks = sum(matrix.n_bytes() for block in model.block_passes() for matrix in matrices(block))
    return blocks + model.embedding.n_bytes()


# ------------------------------------------------------------------------------------------ quality


@torch.no_grad()
def report_quality(folder: str, text_file: str) -> None:
    """Bits per byte of a text under a checkpoint, for each way to store its weights."""
    loaded = checkpoint.load_for_inference(Path(folder))
    loaded.model.dtype = torch.float32
    text = Path(text_file).read_text(encoding="utf-8")[:400_000]
    ids = [loaded.tokenizer.bos, *loaded.tokenizer.encode(text)]
    row = loaded.config.model.context
    n_rows = (len(ids) - 1) // row
    rows = torch.tensor(ids[: n_rows * row + 1])
    n_bytes = len(loaded.tokenizer.decode_bytes(rows[1:].tolist()))
    reference = 0.0
    for store in STORES:
        model, nats = compress(loaded.model, store), 0.0
        for start in range(0, n_rows * row, row):
            hidden = model(rows[start : start + row], PackedSequences(torch.arange(row) == 0, row))
            for part, target in zip(
                hidden.split(512), rows[start + 1 : start + row + 1].split(512), strict=True
            ):
                nats += torch.nn.functional.cross_entropy(
                    model.logits(part), target, reduction="sum"
                ).item()
        bits = nats / math.log(2) / n_bytes
        reference = reference or bits
        more = bits / reference - 1
        print(f"{store:<9} {bits:.5f} bits per byte over {n_bytes} bytes   {more:+.2%}")


if __name__ == "__main__":
    run_script(main, "stopped.")

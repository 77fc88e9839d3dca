"""Measure the server against its bars: many clients against one, HTTP against the engine alone, the
first token beside others, a second turn, the start, and memory after many requests.

Out: a table with the bars of the project, and with --json the same for a program. The server is a
process of its own, as a person starts it; its clients are threads of this one. Random weights of
the 16gb preset's shape, stored in bfloat16; tokens are drawn at temperature 1.

    uv run benchmarks/serve.py                        every figure, some minutes
    uv run benchmarks/serve.py --only clients first   some of them
    uv run benchmarks/serve.py --model tiny           to try this program
    uv run benchmarks/serve.py --only rival --llama PATH
        beside llama.cpp's server, whose program lies at PATH; both serve one model of the
        portable shape, as large, in 16 bits
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import random
import re
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.request import urlopen

import psutil
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PORTABLE, PRESETS, Config
from hearth import hardware
from hearth.cli import run_script, to_json
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Engine, Sampling
from hearth.export import gguf
from hearth.training import checkpoint
from model import build_model

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("clients", "first", "second", "start", "memory", "rival")
BARS = {  # (bar, at most?)
    "8 clients against one, tokens/s": (3.0, False),
    "one client through HTTP against the engine alone, tokens/s": (0.95, False),
    "first token of 200 while 7 others decode, against alone": (3.0, True),
    "first token of a second turn after 2,000, against reading all": (0.15, True),
    "start until the first answer, demo, after imports, s": (5.0, True),
    "memory after 500 requests against after 50": (1.02, True),
    "1 client against llama.cpp's server, tokens/s": (1.0, False),
    "8 clients against llama.cpp's server, tokens/s": (1.0, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--llama", help="llama.cpp's llama-server, built here")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp's server")
    parser.add_argument("--model", choices=("16gb", "tiny"), default="16gb")
    parser.add_argument("--rounds", type=int, default=5, help="the median counts")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    print(f"machine     {hardware.describe(torch.device('cpu'))}")
    print(f"load        {os.getloadavg()[0]:.1f} before it begins")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name in options.only:
            if name == "rival" and not options.llama:
                print("llama.cpp's server: not measured, give --llama PATH")
                continue
            getattr(bench, name)()
    if options.json:
        Path(options.json).write_text(json.dumps(bench.results, indent=1))


def shape(name: str) -> Config:
    base = PRESETS["16gb"]
    if name == "16gb":
        return base
    small = {"n_layer": 2, "d_model": 128, "n_head": 4, "n_kv_head": 2, "d_ff": 256}
    small |= {"n_value_embeddings": 3, "bigram_rows": 4096}
    return replace(base, model=replace(base.model, vocab_size=2048, **small))


def write_checkpoint(runs: Path, config: Config) -> Path:
    """Random weights, and a tokenizer whose every id is a text: an answer is something to send."""
    rng = random.Random(0)
    words = [
        "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9))) for _ in range(60000)
    ]
    place = runs / (config.name or config.preset) / "sft1" / "step-00000001"
    place.mkdir(parents=True)
    Tokenizer.train([" ".join(words)] * 2, config.model.vocab_size).save(place / "tokenizer")
    model = build_model(config.model, seed=0)
    save_file(dict(model.named_parameters()), place / "model.safetensors")
    (place / "config.json").write_text(to_json(config))
    state = {"stage": "sft1", "step": 1, "steps": 1, "tokens": 0}
    (place / "state.json").write_text(json.dumps(state))
    return place


class Client:
    """What asks a server that runs as a process."""

    process: subprocess.Popen[str]
    port: int
    more: Mapping[str, Any] = MappingProxyType({})  # what its requests say besides

    def ask(self, prompt: list[int], n_tokens: int, seed: int = 0) -> Asked:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        body = {
            "prompt": prompt,
            "max_tokens": n_tokens,
            "temperature": 1,
            "top_p": 1,
            "seed": seed,
        }
        body |= {"stream": True, "stream_options": {"include_usage": True}} | dict(self.more)
        began = time.perf_counter()
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        return Asked(connection, began)

    def together(self, prompts: list[list[int]], n_tokens: int) -> float:
        """Tokens per second of whole answers, asked for at once."""
        began = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            asked = [
                pool.submit(lambda p=prompt, s=seed: self.ask(p, n_tokens, s).finish())
                for seed, prompt in enumerate(prompts)
            ]
        return sum(one.result().n_tokens for one in asked) / (time.perf_counter() - began)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


class Server(Client):
    """`serve_chat.py`."""

    def __init__(self, runs: Path, preset: str, *words: str) -> None:
        command = [sys.executable, str(ROOT / "serve_chat.py"), "--preset", preset]
        command += ["--runs", str(runs), "--port", "0", "--device", "cpu", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        found = re.search(r"localhost:(\d+)", self.process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start")
        self.port = int(found[1])


class LlamaServer(Client):
    """llama.cpp's own server, with room for eight answers at once."""

    more = MappingProxyType({"ignore_eos": True, "cache_prompt": False, "top_k": 0, "min_p": 0})

    def __init__(self, program: str, model: Path, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [program, "-m", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["-np", "8", "-c", "8192", "-t", str(threads), "--log-disable"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True)
        for _ in range(240):
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{self.port}/health"):
                return
            time.sleep(0.5)
        raise SystemExit("llama.cpp's server did not start")


class Asked:
    """A request under way."""

    def __init__(self, connection: http.client.HTTPConnection, began: float) -> None:
        self.connection, self.began = connection, began
        self.first = self.last = 0.0  # when the first and the last text came
        self.n_tokens = 0

    def chunks(self) -> Iterator[dict[str, Any]]:
        reply = self.connection.getresponse()
        assert reply.status == 200, reply.read()
        for line in reply:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
        self.connection.close()

    def finish(self) -> Asked:
        for chunk in self.chunks():
            if chunk.get("usage"):
                self.n_tokens = chunk["usage"]["completion_tokens"]
            if chunk["choices"] and chunk["choices"][0]["text"]:
                self.last = time.perf_counter()
                self.first = self.first or self.last
        return self

    @property
    def first_seconds(self) -> float:
        return self.first - self.began


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.runs = options, folder
        self.config = shape(options.model)
        self.results: dict[str, dict[str, Any]] = {}
        self.rng = random.Random(1)
        if set(options.only) - {"start"}:
            self.place = write_checkpoint(folder, self.config)

    def ids(self, n: int) -> list[int]:
        return [self.rng.randrange(300, self.config.model.vocab_size) for _ in range(n)]

    @contextmanager
    def server(self) -> Iterator[Server]:
        running = Server(self.runs, "16gb", "--weights", "bfloat16")
        try:
            running.ask(self.ids(20), 4).finish()
            yield running
        finally:
            running.stop()

    def note(self, name: str, value: float, how: str) -> None:
        bar, at_most = BARS[name]
        holds = value <= bar if at_most else value >= bar
        self.results[name] = {"value": value, "bar": bar, "holds": holds, "how": how}
        sign, verdict = "≤" if at_most else "≥", "holds" if holds else "MISSED"
        print(f"{name:<64} {value:6.2f}  bar {sign} {bar:g}: {verdict}   ({how})", flush=True)

    def rounds(self, *measures: Callable[[], float]) -> list[float]:
        """The median of each, taken in turn."""
        found = [[measure() for measure in measures] for _ in range(self.options.rounds)]
        return [statistics.median(values) for values in zip(*found, strict=True)]

    # ------------------------------------------------------------------------------------ the parts

    def clients(self) -> None:
        """Tokens per second of whole answers: the engine alone, one client, eight at once."""
        n = self.options.tokens
        model = checkpoint.load_for_inference(self.place).model
        engine = Engine(model, weights="bfloat16")
        del model

        def alone() -> float:
            began = time.perf_counter()
            stream = engine.stream(self.ids(16), max_tokens=n, sampling=Sampling(1.0), seed=0)
            said = sum(1 for _ in stream)
            return said / (time.perf_counter() - began)

        with self.server() as server:

            def together(clients: int) -> float:
                return server.together([self.ids(16) for _ in range(clients)], n)

            alone()
            engine_rate, one, eight = self.rounds(alone, lambda: together(1), lambda: together(8))
        how = f"{eight:.0f} against {one:.0f}"
        self.note("8 clients against one, tokens/s", eight / one, how)
        how = f"{one:.1f} against {engine_rate:.1f}"
        name = "one client through HTTP against the engine alone, tokens/s"
        self.note(name, one / engine_rate, how)

    def first(self) -> None:
        """The first token of a 200-token prompt, alone and while seven others decode."""
        with self.server() as server:

            def alone() -> float:
                return server.ask(self.ids(200), 1).finish().first_seconds

            def beside() -> float:
                others = [server.ask(self.ids(16), 4000, seed) for seed in range(7)]
                streams = [other.chunks() for other in others]
                for stream in streams:
                    next(stream)
                found = alone()
                for other in others:
                    other.connection.sock and other.connection.sock.close()
                    other.connection.close()
                for stream in streams:
                    stream.close()
                time.sleep(0.5)
                return found

            quiet, busy = self.rounds(alone, beside)
        name = "first token of 200 while 7 others decode, against alone"
        self.note(name, busy / quiet, f"{busy:.2f} s against {quiet:.2f} s")

    def second(self) -> None:
        """The first token of a second turn after 2,000 tokens."""
        with self.server() as server:
            found: dict[str, list[float]] = {"all": [], "second": []}
            for _ in range(self.options.rounds):
                text = self.ids(2000)
                found["all"].append(server.ask(text, 1).finish().first_seconds)
                more = text + self.ids(30)
                found["second"].append(server.ask(more, 1).finish().first_seconds)
        whole, second = (statistics.median(found[name]) for name in ("all", "second"))
        name = "first token of a second turn after 2,000, against reading all"
        self.note(name, second / whole, f"{second:.2f} s against {whole:.2f} s")

    def start(self) -> None:
        """From the command to the first answer, less the time that its imports take."""
        runs = self.runs / "demo"
        write_checkpoint(runs, PRESETS["demo"])
        imports = [sys.executable, "-c", "import serve_chat, uvicorn"]

        def import_seconds() -> float:
            began = time.perf_counter()
            subprocess.run(imports, cwd=ROOT, check=True)
            return time.perf_counter() - began

        def start_seconds() -> float:
            began = time.perf_counter()
            server = Server(runs, "demo")
            server.ask([300, 301], 1).finish()
            took = time.perf_counter() - began
            server.stop()
            return took

        importing, starting = self.rounds(import_seconds, start_seconds)
        name = "start until the first answer, demo, after imports, s"
        self.note(name, starting - importing, f"{starting:.1f} s, of which imports {importing:.1f}")

    def memory(self) -> None:
        """Resident memory of the server after 50 and after 500 requests, eight at a time."""
        with self.server() as server:
            process = psutil.Process(server.process.pid)

            def work(n: int) -> float:
                prompts = [self.ids(self.rng.randint(5, 60)) for _ in range(n)]
                with ThreadPoolExecutor(8) as pool:
                    list(pool.map(lambda prompt: server.ask(prompt, 8).finish(), prompts))
                return process.memory_info().rss

            after_50 = work(50)
            after_500 = work(450)
        name = "memory after 500 requests against after 50"
        self.note(name, after_500 / after_50, f"{after_500 / 1e6:.0f} MB, {after_50 / 1e6:.0f} MB")

    def rival(self) -> None:
        """Whole answers of one and of eight clients, beside llama.cpp's server: one model, ours
        with weights in bfloat16, theirs in F16.
        """
        depth = self.config.model.n_layer + 4
        shape = replace(self.config.model, shape="portable", n_layer=depth, **PORTABLE)
        shape = replace(shape, d_ff=64 * math.ceil(shape.d_model / 24))
        runs = self.runs / "portable"
        place = write_checkpoint(runs, replace(self.config, model=shape))
        gguf.write(place, checkpoint.load_for_inference(place), runs / "exported")
        model = runs / "exported" / "model-F16.gguf"
        ours = Server(runs, "16gb", "--weights", "bfloat16")
        theirs = LlamaServer(self.options.llama, model, self.options.threads)
        try:
            for server in (ours, theirs):
                server.ask(self.ids(20), 4).finish()
            for clients in (1, 8):
                prompts = [self.ids(16) for _ in range(clients)]
                here, there = self.rounds(
                    partial(ours.together, prompts, self.options.tokens),
                    partial(theirs.together, prompts, self.options.tokens),
                )
                name = f"{clients} client{'s' * (clients > 1)} against llama.cpp's server, tokens/s"
                self.note(name, here / there, f"{here:.1f} against {there:.1f}")
        finally:
            ours.stop()
            theirs.stop()


if __name__ == "__main__":
    run_script(main, "stopped.")

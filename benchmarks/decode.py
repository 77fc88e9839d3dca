"""Measure decoding against its bars: transformers, llama.cpp, the memory's speed, the cache between turns.

Out: a table of medians with the bars of the project, and with --json the same for a program. Random weights of one
shape everywhere; the contenders take turns within each round, so that all see the same machine.

    uv run --with transformers --with gguf --with llama-cpp-python benchmarks/decode.py
    uv run benchmarks/decode.py --without transformers llamacpp       only what needs no other package
    uv run benchmarks/decode.py --quality runs/16gb/base text.txt     what storing weights in fewer bits costs

On a machine that others use too, `--threads 1 --clock cpu` counts the seconds that this program was given.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoint
import hardware
from config import PRESETS, ModelConfig
from engine import Engine, compress
from matrices import Matrix, compiled_kernels
from model import Model, Packed, build_model

DENSE_LAYERS = 19  # of the dense model with as many parameters as the 16gb preset
BARS = {
    "transformers": 2.5,  # times its tokens a second
    "bandwidth bfloat16": 0.6,  # share of the memory's read bandwidth
    "bandwidth int8": 0.5,
    "llamacpp": 0.8,  # times its tokens a second
    "second turn": 0.15,  # of the time that reading everything again takes, at most
    "long context": 0.8,  # speed at 4,000 tokens against 200
    "cache": 0.5,  # of the memory that whole layers would take, at most
    "batch": 4.0,  # times the tokens a second of one row
}


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
    print(f"model       {bench.model.n_parameters() / 1e6:.1f}M parameters, context {bench.config.context}")
    print(f"measured    medians of {options.rounds} rounds, {options.clock} clock\n")
    for name in options.only or PARTS:
        getattr(bench, name)()
    if options.json:
        Path(options.json).write_text(json.dumps(bench.results, indent=1))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every contender")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure; the median counts")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in a measurement")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prompt before it")
    parser.add_argument("--model", choices=("dense", "hrm", "tiny"), default="dense", help="dense: 19 plain blocks")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of this thread alone")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out: transformers, llamacpp")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="parts to measure; default: all")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--quality", nargs=2, metavar=("CHECKPOINT", "TEXT"), help="bits per byte of each store")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu needs --threads 1")
    return options


def model_config(name: str) -> ModelConfig:
    shape = PRESETS["16gb"].model
    if name == "dense":
        return replace(shape, n_layer=DENSE_LAYERS, hrm=None)
    if name == "tiny":  # to try this program
        return replace(shape, n_layer=2, hrm=None, vocab_size=1024, d_model=128, n_head=4, n_kv_head=2, d_ff=256)
    return shape


class Bench:
    """The model under test, its engines, and what was measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.config = options, model_config(options.model)
        self.clock = time.thread_time if options.clock == "cpu" else time.perf_counter
        self.model = build_model(self.config, seed=0)
        self.model.dtype = torch.float32
        self.stores = ("float32", "bfloat16", "int8")
        self.results: list[dict[str, Any]] = []
        self.dice = torch.Generator().manual_seed(0)

    def ids(self, n: int) -> list[int]:
        return torch.randint(0, self.config.vocab_size, (n,), generator=self.dice).tolist()

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

    def note(self, name: str, value: float, what: str, *, bar: str | None = None, at_most: bool = False) -> None:
        verdict = ""
        if bar:
            holds = value <= BARS[bar] if at_most else value >= BARS[bar]
            verdict = f"   bar {'≤' if at_most else '≥'} {BARS[bar]:g}: {'holds' if holds else 'MISSED'}"
        print(f"{name:<44} {value:10.3f} {what}{verdict}", flush=True)
        self.results.append({"name": name, "value": value, "unit": what, "bar": BARS.get(bar or "")})

    # ------------------------------------------------------------------------------------------- figures

    def speed(self) -> None:
        """Tokens a second at batch 1 after the prompt, beside the other programs and the memory."""
        engines = {store: Engine(self.model, weights=store) for store in self.stores}
        prompt = self.ids(self.options.prompt)
        measures: dict[str, Callable[[], float]] = {"memory": self.read_bandwidth}
        for store, engine in engines.items():
            measures[f"ours {store}"] = self.stream_speed(engine, prompt)
        measures |= self.transformers_speeds(prompt) | self.llamacpp_speeds(prompt)
        found = self.rounds(measures)
        for name, values in found.items():
            unit = "GB/s read" if name == "memory" else f"tokens/s after {len(prompt)}"
            self.note(name, statistics.median(values), unit)
        for store, engine in engines.items():
            n_bytes = bytes_per_token(engine.model)
            shares = [n_bytes * s / (m * 1e9) for s, m in zip(found[f"ours {store}"], found["memory"], strict=True)]
            bar = f"bandwidth {store}"
            self.note(f"{bar}, of the memory's", statistics.median(shares), "", bar=bar if bar in BARS else None)
        theirs = [name for name in found if name.startswith("transformers")]
        best = max(theirs, default=None, key=lambda name: statistics.median(found[name]))
        pairs = [("ours bfloat16", best, "transformers")] if best else []
        pairs += [(f"ours {ours}", f"llamacpp {theirs}", "llamacpp") for ours, theirs in LLAMACPP_STORES.items()]
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
        engine, fresh = Engine(self.model, weights="bfloat16"), Engine(self.model, weights="bfloat16")
        prompt = self.ids(total - question - 8)
        answer = list(engine.stream(prompt, max_tokens=8))
        conversation = [*prompt, *answer, *self.ids(question)]

        def again(engine: Engine, forget: bool) -> float:
            if forget:
                engine.cache, engine.held = None, []
            else:
                list(engine.stream([*prompt, *answer, 0], max_tokens=1))  # back to the end of the first turn
            stream = engine.stream(conversation, max_tokens=1)
            return self.seconds(lambda: next(stream))

        found = self.rounds({"reused": lambda: again(engine, False), "anew": lambda: again(fresh, True)})
        anew = statistics.median(found["anew"])
        self.note("a prompt read anew", len(conversation) / anew, "tokens/s")
        self.note(f"first token after {total} tokens, all read", anew, "s")
        ratios = [a / b for a, b in zip(found["reused"], found["anew"], strict=True)]
        self.note("the same in a second turn", statistics.median(ratios), "of it", bar="second turn", at_most=True)

    def long_context(self) -> None:
        """Speed at the end of a long context against the beginning."""
        length = min(4000, self.config.context - self.options.tokens - 1)
        for store in ("bfloat16", "int8"):
            near, far = Engine(self.model, weights=store), Engine(self.model, weights=store)
            speeds = {"near": self.stream_speed(near, self.ids(200)), "far": self.stream_speed(far, self.ids(length))}
            found = self.rounds(speeds)
            ratio = statistics.median(a / b for a, b in zip(found["far"], found["near"], strict=True))
            self.note(f"speed at {length} tokens against 200, {store}", ratio, "times", bar="long context")

    def cache(self) -> None:
        """Memory of the cache at the whole context against keeping every layer whole."""
        engine = Engine(self.model)
        n_passes, c = len(self.model.block_passes()), self.config
        whole = n_passes * c.context * 2 * c.n_kv_head * c.head_dim * self.model.dtype.itemsize
        self.note(f"cache at {c.context} tokens", engine.cache_bytes() / 1e6, "MB")
        self.note("the same against whole layers", engine.cache_bytes() / whole, "of it", bar="cache", at_most=True)

    def batch(self) -> None:
        """Tokens a second of sixteen rows together against one."""
        for store in ("float32", "bfloat16", "int8"):
            engine, prompts = Engine(self.model, weights=store), [self.ids(32) for _ in range(16)]

            def speed(rows: int, engine: Engine = engine, prompts: list[list[int]] = prompts) -> float:
                def run(n: int) -> float:
                    return self.seconds(lambda: engine.generate(prompts[:rows], max_tokens=n))

                return rows * self.options.tokens / (run(self.options.tokens + 1) - run(1))

            found = self.rounds({"one": lambda: speed(1), "sixteen": lambda: speed(16)})
            self.note(f"sixteen rows, {store}", statistics.median(found["sixteen"]), "tokens/s in total")
            ratio = statistics.median(a / b for a, b in zip(found["sixteen"], found["one"], strict=True))
            self.note(f"sixteen rows against one, {store}", ratio, "times", bar="batch")

    def read_bandwidth(self) -> float:
        """Bytes a second that all threads read from memory, in 10^9: the best of several sums over 512 MiB."""
        if not hasattr(self, "_buffer"):
            self._buffer = torch.ones(2**27)
        ways = (self._buffer.sum, self._buffer.view(torch.int64).sum, lambda: torch.dot(self._buffer, self._buffer))
        return max(4 * len(self._buffer) / self.seconds(way) / 1e9 for way in ways for _ in range(2))

    # ---------------------------------------------------------------------------------------- contenders

    def transformers_speeds(self, prompt: list[int]) -> dict[str, Callable[[], float]]:
        """Qwen3 of the same shape, with transformers' own `generate`."""
        if "transformers" in self.options.without or self.config.hrm or not importlib.util.find_spec("transformers"):
            print("(transformers is left out)")
            return {}
        from transformers import Qwen3Config, Qwen3ForCausalLM

        c = self.config
        shape = Qwen3Config(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            head_dim=c.head_dim,
            max_position_embeddings=c.context,
            tie_word_embeddings=True,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=None,
        )
        return {
            f"transformers {str(dtype).removeprefix('torch.')}": self.transformers_speed(
                Qwen3ForCausalLM(shape).to(dtype).eval(), prompt
            )
            for dtype in (torch.float32, torch.bfloat16)
        }

    def transformers_speed(self, model: Any, prompt: list[int]) -> Callable[[], float]:
        ids, n = torch.tensor([prompt]), self.options.tokens

        def measure() -> float:
            times = []

            def note_time(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                times.append(self.clock())
                return torch.zeros(len(input_ids), dtype=torch.bool)

            with torch.no_grad():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=n + 1,
                    do_sample=False,
                    stopping_criteria=[note_time],
                )
            return n / (times[-1] - times[0])

        return measure

    def llamacpp_speeds(self, prompt: list[int]) -> dict[str, Callable[[], float]]:
        """llama.cpp with a model file of the same shape, in f16 and Q8_0."""
        packages = ("llama_cpp", "gguf")
        if "llamacpp" in self.options.without or self.config.hrm or not all(map(importlib.util.find_spec, packages)):
            print("(llama.cpp is left out)")
            return {}
        self._folder = tempfile.TemporaryDirectory()
        speeds = {}
        for store in LLAMACPP_STORES.values():
            path = Path(self._folder.name) / f"{store}.gguf"
            write_gguf(path, self.config, store)
            speeds[f"llamacpp {store}"] = self.llamacpp_speed(path, prompt)
        return speeds

    def llamacpp_speed(self, path: Path, prompt: list[int]) -> Callable[[], float]:
        import llama_cpp as cpp

        quiet = cpp.llama_log_callback(lambda *_: None)
        cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        self._keep = [*getattr(self, "_keep", []), quiet]
        model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
        settings = cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = self.options.prompt + self.options.tokens + 8, 512
        settings.n_threads = settings.n_threads_batch = self.options.threads

        def decode(context: Any, ids: list[int]) -> int:
            batch = cpp.llama_batch_get_one((cpp.llama_token * len(ids))(*ids), len(ids))
            if cpp.llama_decode(context, batch):
                raise RuntimeError("llama.cpp could not decode")
            logits = cpp.llama_get_logits_ith(context, -1)
            address = ctypes.addressof(logits.contents)
            return int(torch.frombuffer((ctypes.c_float * self.config.vocab_size).from_address(address)).argmax())

        def measure() -> float:
            context = cpp.llama_init_from_model(model, settings)
            token = decode(context, prompt)

            def run() -> None:
                nonlocal token
                for _ in range(self.options.tokens):
                    token = decode(context, [token])

            seconds = self.seconds(run)
            cpp.llama_free(context)
            return self.options.tokens / seconds

        return measure


LLAMACPP_STORES = {"bfloat16": "F16", "int8": "Q8_0"}  # ours, and theirs of as many bits


def bytes_per_token(model: Model) -> int:
    """Bytes of weights that one token needs from memory: those of each block pass, the output, the head's vectors."""

    def matrices(module: Any) -> Iterator[Matrix]:
        return (value for part in module.modules() for value in vars(part).values() if isinstance(value, Matrix))

    blocks = sum(matrix.n_bytes() for block in model.block_passes() for matrix in matrices(block))
    return blocks + model.embedding.n_bytes() + (model.head.out.n_bytes() if model.head else 0)


def write_gguf(path: Path, c: ModelConfig, store: str) -> None:
    """A model file for llama.cpp: the Llama of the same shape, random weights, no vocabulary."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[store]
    dice = torch.Generator().manual_seed(0)

    def matrix(name: str, n: int, d: int) -> None:
        weight = (torch.randn(n, d, generator=dice) / math.sqrt(d)).numpy()
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    def vector(name: str) -> None:
        writer.add_tensor(name, torch.ones(c.d_model).numpy())

    matrix("token_embd.weight", c.vocab_size, c.d_model)
    vector("output_norm.weight")
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    shapes = {"attn_q": (q, c.d_model), "attn_k": (kv, c.d_model), "attn_v": (kv, c.d_model)}
    shapes |= {"attn_output": (c.d_model, q), "ffn_gate": (c.d_ff, c.d_model), "ffn_up": (c.d_ff, c.d_model)}
    shapes["ffn_down"] = (c.d_model, c.d_ff)
    for layer in range(c.n_layer):
        for name, shape in shapes.items():
            matrix(f"blk.{layer}.{name}.weight", *shape)
        vector(f"blk.{layer}.attn_norm.weight")
        vector(f"blk.{layer}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ----------------------------------------------------------------------------------------------- quality


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
    for store in ("float32", "bfloat16", "int8"):
        model, nats = compress(loaded.model, store), 0.0
        for start in range(0, n_rows * row, row):
            hidden = model(rows[start : start + row], Packed(torch.arange(row) == 0, row))
            for part, target in zip(hidden.split(512), rows[start + 1 : start + row + 1].split(512), strict=True):
                nats += torch.nn.functional.cross_entropy(model.logits(part), target, reduction="sum").item()
        bits = nats / math.log(2) / n_bytes
        reference = reference or bits
        print(f"{store:<9} {bits:.5f} bits per byte over {n_bytes} bytes   {bits - reference:+.5f}")


if __name__ == "__main__":
    main()

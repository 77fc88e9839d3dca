"""Does an exported model say what ours says? In transformers, lm-eval, llama.cpp, onnxruntime.

In: nothing; two small models are trained here for some minutes, one of our shape and one portable,
so that their choices are as clear as a trained model's. Out: a row for each claim, with its bar.
Rows whose program is missing say so.

    uv run benchmarks/export.py
    uv run --group llama --extra lm-eval benchmarks/export.py --files local_data --speed 16gb
        with llama.cpp, with lm-eval on llm-foundry's local_data, with speed at a preset's size
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from exported import (  # noqa: E402
    OnnxSession,
    awkward_strings,
    load,
    load_tokenizer,
    long_text,
    our_logits,
    padded,
)

from config import PRESETS, Config, settled  # noqa: E402
from hearth.cli import portable, run_script  # noqa: E402
from hearth.data import demo_world  # noqa: E402
from hearth.data.chat_format import parse_answer, render, stop_ids  # noqa: E402
from hearth.data.layouts import conversation  # noqa: E402
from hearth.data.tokenizer import Tokenizer  # noqa: E402
from hearth.decoding.engine import Engine  # noqa: E402
from hearth.export import gguf, huggingface, onnx  # noqa: E402
from hearth.training import checkpoint  # noqa: E402
from hearth.training.checkpoint import Loaded  # noqa: E402
from hearth.training.optim import build_optimizers  # noqa: E402
from model import PackedSequences, build_model  # noqa: E402

QUESTION = "What is 12 + 7?"
TASKS = ("copa", "piqa", "arc_easy")
ROW_TOKENS = 512


class Exported(NamedTuple):
    """A trained model, its checkpoint's folder, and where it was exported to."""

    name: str
    loaded: Loaded
    checkpoint: Path
    folder: Path  # for transformers


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--steps", type=int, default=600, help="training steps of 1,024 tokens")
    words.add_argument("--files", type=Path, help="folder with the tasks' files, for lm-eval")
    words.add_argument("--speed", choices=PRESETS, help="preset whose size decoding is timed at")
    words.add_argument("--threads", type=int, default=1)
    options = words.parse_args()
    torch.set_num_threads(options.threads)
    names = ("torch", "transformers", "gguf", "llama-cpp-python", "lm-eval", "onnxruntime")
    print(", ".join(f"{name} {installed(name) or 'missing'}" for name in names))
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about themselves
        tokenizer = Tokenizer.train(itertools.islice(demo_world.text_documents(), 3000), 1024)
        shape = replace(PRESETS["demo"].model, context=2048, n_value_embeddings=1, bigram_rows=4096)
        models = [
            export(Path(place), name, config, tokenizer, options.steps)
            for name, config in (("ours", shape), ("portable", portable(shape)))
        ]
        for exported in models:
            in_transformers(exported)
        tokens_in_transformers(models[0])
        if options.files and installed("lm-eval"):
            for exported in models:
                in_lm_eval(exported, options.files)
        if installed("onnx") and installed("onnxruntime"):
            in_onnxruntime(models[1], Path(place))
        if installed("llama-cpp-python"):
            in_llama_cpp(models[1], Path(place))
            if options.speed:
                speed(options.speed, tokenizer, Path(place), options.threads)


def row(claim: str, figure: str, bar: str = "", holds: bool | None = None) -> None:
    verdict = "" if holds is None else "holds" if holds else "MISSED"
    print(f"{claim:<62}{figure:>24}   {bar:<10} {verdict}", flush=True)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------- small models


def export(place: Path, name: str, shape: Any, tokenizer: Tokenizer, steps: int) -> Exported:
    demo = PRESETS["demo"]
    config = replace(
        demo,
        runs=str(place / name),
        model=shape,
        pretrain=replace(demo.pretrain, tokens_per_step=2048, micro_batch_tokens=2048),
    )
    config = settled(config)
    model, started = build_model(shape, seed=0), time.perf_counter()
    model.dtype = torch.float32
    optimizers = build_optimizers(model, config.optim, config.pretrain.lr)
    for step, rows in enumerate(itertools.islice(training_rows(tokenizer), steps)):
        ids = rows.flatten()
        hidden = model(ids[:-1], PackedSequences(ids[:-1] == tokenizer.bos, len(ids) - 1))
        loss = model.loss(hidden, ids[1:], torch.full((len(ids) - 1,), 1 / (len(ids) - 1)))
        loss.backward()
        optimizers.schedule(step, steps, config.pretrain)
        optimizers.step()
        optimizers.zero_grad()
    folder = save(config, model, tokenizer)
    loaded = checkpoint.load_for_inference(folder)
    loaded.model.dtype = torch.float32
    huggingface.write(folder, loaded, place / f"{name}-hf")
    print(
        f"{name}: {model.n_parameters():,} parameters, {steps} steps in "
        f"{time.perf_counter() - started:.0f} s, loss {float(loss.detach()):.2f} nats"
    )
    return Exported(name, loaded, folder, place / f"{name}-hf")


def training_rows(tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """Rows (2, 512 + 1): documents of the demo world, and conversations that reason, in turn."""
    texts = ([tokenizer.bos, *tokenizer.encode(text)] for text in demo_world.text_documents())
    chats = (render(conversation(row), tokenizer).ids for row in demo_world.conversations("math"))
    held: list[int] = []
    for text, chat in zip(
        itertools.cycle(list(itertools.islice(texts, 4000))),
        itertools.cycle(list(itertools.islice(chats, 4000))),
    ):
        held += text + chat
        while len(held) > 2 * ROW_TOKENS:
            yield torch.tensor(held[: 2 * ROW_TOKENS + 1])[None]
            held = held[2 * ROW_TOKENS :]


def save(config: Config, model: Any, tokenizer: Tokenizer) -> Path:
    state = {"stage": "sft2", "step": 1, "steps": 1, "tokens": 0}
    optimizers = build_optimizers(model, config.optim, 1e-3)
    return checkpoint.save(
        config.run_dir / "sft2", model, optimizers, config, tokenizer, state, keep=1
    )


def prompts(exported: Exported, n: int, longest: int) -> list[list[int]]:
    """Beginnings of documents and questions, one of them of the longest length."""
    rng, tokenizer = random.Random(0), exported.loaded.tokenizer
    documents = itertools.islice(demo_world.text_documents(), 5000, 6000)
    ids = [i for text in documents for i in (tokenizer.bos, *tokenizer.encode(text))]
    starts = [i for i, token in enumerate(ids[: -longest - 1]) if token == tokenizer.bos]
    lengths = [longest, *(rng.randint(8, longest) for _ in range(n - 1))]
    return [ids[(start := rng.choice(starts)) : start + length] for length in lengths]


# ------------------------------------------------------------------------------------- transformers


def in_transformers(exported: Exported) -> None:
    model, name = load(exported.folder), exported.name
    worst = 0.0
    asked = prompts(exported, 50, 2000)
    for part in range(0, 50, 5):
        ids, real = padded(asked[part : part + 5])
        with torch.no_grad():
            theirs = model(ids, attention_mask=real).logits
        for prompt, logits in zip(asked[part : part + 5], theirs, strict=True):
            worst = max(worst, error(our_logits(exported.loaded, prompt), logits[-len(prompt) :]))
    row(
        f"{name}: logits, 50 prompts up to 2,000 tokens, left padding",
        f"{worst:.1e}",
        "≤ 1e-4",
        worst <= 1e-4,
    )
    asked = prompts(exported, 20, 200)
    ids, real = padded(asked)
    wishes = {"max_new_tokens": 128, "do_sample": False, "eos_token_id": []}
    answers = [
        model.generate(ids, attention_mask=real, use_cache=cached, **wishes)[:, ids.shape[1] :]
        for cached in (True, False)
    ]
    ours = Engine(exported.loaded.model).generate(asked, max_tokens=128)
    same = sum(a == b for a, b in zip(answers[0].tolist(), ours, strict=True))
    row(f"{name}: 128 greedy tokens the same", f"{same} of 20 prompts", "all", same == 20)
    same = sum(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    row(f"{name}: cached as uncached", f"{same} of 20 prompts", "all", same == 20)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / ours.norm())


def texts_to_cut() -> list[str]:
    return [*awkward_strings(2000), *long_text(1_000_000).split("\n\n")]


def tokens_in_transformers(exported: Exported) -> None:
    theirs, ours = load_tokenizer(exported.folder), exported.loaded.tokenizer
    texts = texts_to_cut()
    wishes = {"add_special_tokens": False, "split_special_tokens": True}
    same = sum(theirs(text, **wishes).input_ids == ours.encode(text) for text in texts)
    row("tokens of transformers", f"{same} of {len(texts)} texts", "all", same == len(texts))


def in_lm_eval(exported: Exported, files: Path) -> None:
    """The same choices, item by item, through lm-eval's own model class `hf`."""
    import agreement
    from lm_eval.models.huggingface import HFLM

    from hearth.evaluation import tasks

    model = HFLM(
        str(exported.folder),
        trust_remote_code=(exported.folder / huggingface.CODE.name).exists(),
        add_bos_token=True,
        device="cpu",
        batch_size=8,
    )
    for name in TASKS:
        file = tasks.find_file(tasks.TASKS[name].file, files, files)
        theirs, _ = agreement.by_lm_eval(model, name, file, 100)
        ours = agreement.by_us(exported.loaded, name, file, 100)
        same = sum(
            agreement.choice(a) == agreement.choice(b) for a, b in zip(ours, theirs, strict=True)
        )
        claim = f"{exported.name}: lm-eval --model hf on {name}, the same choices"
        row(claim, f"{same} of {len(ours)}", "all", same == len(ours))


def in_onnxruntime(exported: Exported, place: Path) -> None:
    onnx.write(exported.checkpoint, exported.loaded, place / "onnx")
    file = place / "onnx" / "model" / "onnx" / "model.onnx"
    session, worst = OnnxSession(file, exported.loaded.config.model), 0.0
    for prompt in prompts(exported, 50, 2000):
        theirs, _ = session(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.int64))
        worst = max(worst, error(our_logits(exported.loaded, prompt), theirs[0]))
    row("logits of onnxruntime, 50 prompts", f"{worst:.1e}", "≤ 1e-4", worst <= 1e-4)
    asked = prompts(exported, 20, 200)
    ours = Engine(exported.loaded.model).generate(asked, max_tokens=128)
    same = sum(session.greedy(a, 128) == b for a, b in zip(asked, ours, strict=True))
    row("128 greedy tokens of onnxruntime", f"{same} of 20 prompts", "all", same == 20)


# ---------------------------------------------------------------------------------------- llama.cpp


def in_llama_cpp(exported: Exported, place: Path) -> None:
    folder, loaded = place / "gguf", exported.loaded
    gguf.write(exported.checkpoint, loaded, folder)
    model = llama(folder / "model-F16.gguf")
    texts = [t for t in texts_to_cut() if not any(name in t for name in huggingface.SHOWN)]
    same = sum(
        model.tokenize(text.encode(), add_bos=False, special=False) == loaded.tokenizer.encode(text)
        for text in texts
    )
    row("tokens of llama.cpp", f"{same} of {len(texts)} texts", "all", same == len(texts))
    for store, bar in (("F16", 2e-2), ("Q8_0", None)):
        model = llama(folder / f"model-{store}.gguf")
        worst = 0.0
        for prompt in prompts(exported, 10, 1000):
            model.reset()
            model.eval(prompt)
            theirs = torch.tensor(np.array(model.scores[: len(prompt)]))
            worst = max(worst, error(our_logits(loaded, prompt), theirs))
        holds = None if bar is None else worst <= bar
        row(f"logits of llama.cpp, {store}", f"{worst:.1e}", f"≤ {bar}" if bar else "", holds)
        asked = prompts(exported, 20, 200)
        ours = Engine(loaded.model).generate(asked, max_tokens=64)
        pairs = [(greedy(model, a, 64), b) for a, b in zip(asked, ours, strict=True)]
        tokens = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True))
        whole = sum(a == b for a, b in pairs)
        claim = f"64 greedy tokens of llama.cpp, {store} ({whole} of 20 answers whole)"
        share = tokens / (64 * 20)
        holds = None if bar is None else share >= 0.95
        row(claim, f"{share:.1%} of tokens", "≥ 95%" if bar else "", holds)
    chat(exported, folder)


def llama(path: Path, **given: Any) -> Any:
    from llama_cpp import Llama

    wishes = {"n_ctx": 2048, "verbose": False, "logits_all": True}
    return Llama(str(path), **wishes | given, n_threads=torch.get_num_threads())


def greedy(model: Any, prompt: list[int], n: int) -> list[int]:
    model.reset()
    return list(itertools.islice(model.generate(prompt, temp=0, repeat_penalty=1.0), n))


def chat(exported: Exported, folder: Path) -> None:
    """A question through the template inside the file, beside our own answer."""
    from config import REASONING_PROMPT

    tokenizer = exported.loaded.tokenizer
    messages = [
        {"role": "system", "content": REASONING_PROMPT},
        {"role": "user", "content": QUESTION},
    ]
    told = llama(folder / "model-Q8_0.gguf").create_chat_completion(
        messages, temperature=0, max_tokens=200
    )["choices"][0]
    text, finish = told["message"]["content"], told["finish_reason"]
    (ids,) = Engine(exported.loaded.model).generate(
        [render(messages, tokenizer, answer=True).ids],
        max_tokens=200,
        stop_ids=stop_ids(tokenizer),
    )
    ours = parse_answer(ids, tokenizer)
    good = finish == "stop" and text.startswith("<think>") and "</think>" in text
    row("a chat in llama.cpp: thinks in sight, stops by itself", finish, "yes", good)
    print(f"    llama.cpp: {text}\n    ours:      <think>{ours.thinking}</think>{ours.content}")


def speed(preset: str, tokenizer: Tokenizer, place: Path, threads: int) -> None:
    """Tokens per second after a prompt of 128, in turn, the median of three; random weights."""
    shape = portable(PRESETS[preset].model)
    texts = itertools.islice(demo_world.text_documents(), 200)
    config = replace(PRESETS[preset], runs=str(place / "speed"), model=shape)
    model = build_model(shape, seed=0)
    model.dtype = torch.float32
    folder = save(config, model, Tokenizer.train(texts, shape.vocab_size))
    gguf.write(folder, checkpoint.load_for_inference(folder), place / "speed-gguf")
    prompt = [0, *random.Random(0).choices(range(20, 300), k=127)]
    for ours, theirs in (("bfloat16", "F16"), ("int8", "Q8_0")):
        engine = Engine(model, weights=ours)
        other = llama(place / "speed-gguf" / f"model-{theirs}.gguf", logits_all=False)
        streams: dict[str, Callable[[], Iterator[int]]] = {
            "ours": lambda engine=engine: iter(engine.stream(prompt, max_tokens=49)),
            "theirs": lambda other=other: other.generate(prompt, temp=0, repeat_penalty=1.0),
        }
        found: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range(3):
            for name, stream in streams.items():
                other.reset()
                found[name].append(tokens_per_second(stream(), 48))
        a, b = (statistics.median(found[name]) for name in ("ours", "theirs"))
        claim = f"{preset} portable, {threads} thread: our {ours}, llama.cpp's {theirs}"
        row(claim, f"{a:.1f} and {b:.1f} tok/s", "stated", None)


def tokens_per_second(stream: Iterator[int], n: int) -> float:
    next(stream)  # the prompt's time is not counted
    started = time.perf_counter()
    for _ in itertools.islice(stream, n):
        pass
    return n / (time.perf_counter() - started)


if __name__ == "__main__":
    run_script(main, "stopped.")

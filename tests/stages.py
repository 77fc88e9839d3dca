"""Run a script of this project as a process of its own, without paying for torch's import each
time.

A fork server has imported torch; every stage is a fork of it that runs the script as `uv run`
would.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import runpy
import shutil
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from config import FINE_TUNING

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("create_shard.py", "train_tokenizer.py", "pretrain.py", "sft.py")


def compute_in_float32() -> None:
    """For this process: what is compared to five digits wants it, also on a processor that
    multiplies bfloat16.
    """
    import torch

    torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False


def _run(script: str, words: list[str], output: str, environment: dict[str, Any]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = [script, *words]
    sys.path.insert(0, str(ROOT))
    compute_in_float32()
    runpy.run_path(str(ROOT / script), run_name="__main__")


def start(
    script: str, words: list[str], output: Path, environment: dict[str, Any] | None = None
) -> BaseProcess:
    """The script begun, with these further environment variables; its output is appended to the
    file `output`.
    """
    # for the fork server: models this small only wait for more threads
    os.environ["OMP_NUM_THREADS"] = "1"
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "safetensors.torch", "tyro", "datasets", "tokenizers", "psutil", "tqdm"]
        )
    else:  # Windows
        context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run, args=(script, words, str(output), environment or {}))
    process.start()
    return process


def run(script: str, words: list[str], output: Path) -> int:
    """The script's exit code."""
    process = start(script, words, output)
    process.join()
    return process.exitcode


def write_inputs(folder: Path) -> list[str]:
    """A few kilobytes of text and conversations; the options that make a whole road of them in
    seconds.
    """
    rng = random.Random(0)
    words = [
        a + b for a in ("ba", "ke", "li", "mo", "nu") for b in ("ra", "se", "ti", "vo", "xu", "zy")
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(300):
            file.write(
                json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(20, 120)))}) + "\n"
            )
    with (folder / "chat.jsonl").open("w") as file:
        for _ in range(80):
            question = " ".join(rng.choices(words, k=5))
            file.write(
                json.dumps({"instruction": question, "input": "", "output": question.split()[0]})
                + "\n"
            )
    small = {
        "data.text_files": folder / "text.jsonl",
        **{f"{name}.files": folder / "chat.jsonl" for name in FINE_TUNING},
        "device": "cpu",
        "model.vocab_size": 384,
        "model.n_layer": 2,
        "model.d_model": 32,
        "model.d_ff": 48,
        "model.context": 64,
        "model.window": 16,
        "pretrain.stages.0.context": 16,
        "pretrain.stages.1.context": 32,
        "pretrain.stages.2.context": 64,
        "pretrain.steps": 30,
        "pretrain.eval_every_steps": 10,
        "pretrain.sample_every_steps": 1000,
        **{f"{name}.context": 64 for name in FINE_TUNING},
    }
    for stage in ("pretrain", *FINE_TUNING):
        small |= {
            f"{stage}.tokens_per_step": 256,
            f"{stage}.micro_batch_tokens": 128,
            f"{stage}.eval_tokens": 512,
            f"{stage}.save_every_minutes": 0,
        }
    return [
        "--preset",
        "demo",
        "--report.no_draw",
        *(str(word) for name, value in small.items() for word in (f"--{name}", value)),
    ]


def copy_run(source: Path, target: Path, *parts: str) -> None:
    """These parts of a run, and what it remembers, as a run of their own."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", target / "config.json")
    for part in parts:
        shutil.copytree(source / part, target / part)


def weights(run: Path, stage: str) -> bytes:
    """The newest checkpoint's weights of a stage, as bytes."""
    newest = sorted((run / stage).glob("step-*/model.safetensors"))[-1]
    return newest.read_bytes()

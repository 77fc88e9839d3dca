"""A run to score: held-out tokens, two checkpoints of a tiny model, files of some tasks."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import config as settings
from config import Config, ModelConfig, ReportConfig
from hearth.data.token_shards import TokenShards, TokenShardWriter
from hearth.data.tokenizer import Tokenizer
from hearth.training import checkpoint
from hearth.training.optim import build_optimizers
from model import Model, initialise

WORDS = [
    *("the", "cat", "sat", "on", "a", "mat", "saw"),
    *("two", "red", "birds", "over", "there", "by", "water"),
]


def some_text(rng: random.Random, low: int = 3, high: int = 40) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def make_run(folder: Path) -> Config:
    """A run with held-out tokens, a base checkpoint and a chat checkpoint of a tiny, loud,
    untrained model.
    """
    rng = random.Random(0)
    tokenizer = Tokenizer.train([some_text(rng) for _ in range(100)], 384)
    shape = ModelConfig(
        vocab_size=384, n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=48, context=64, window=8
    )
    demo = settings.PRESETS["demo"]
    stages = tuple(replace(stage, context=32) for stage in demo.pretrain.stages)
    pretrain = replace(demo.pretrain, stages=stages, eval_tokens=2000)
    stages = {n: replace(getattr(demo, n), context=64) for n in settings.FINE_TUNING}
    config = replace(
        demo,
        runs=str(folder),
        model=shape,
        pretrain=pretrain,
        report=ReportConfig(draw=False),
        **stages,
    )
    writer = TokenShardWriter(
        config.run_dir / "tokens" / "world",
        {},
        vocab_size=384,
        tokenizer_hash=tokenizer.hash,
        shard_tokens=10**6,
    )
    for split, n in (("train", 2), ("validation", 60)):
        for text in (some_text(rng) for _ in range(n)):
            writer.add(
                split, np.array([tokenizer.bos, *tokenizer.encode(text)]), len(text.encode())
            )
    writer.finish()
    model = initialise(Model(shape), seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    optimizers = build_optimizers(model, config.optim, 1e-3)
    for stage in ("base", "sft2"):
        state = {"stage": stage, "step": 7, "steps": 7, "tokens": 7000, "seconds": 1.0}
        checkpoint.save(config.run_dir / stage, model, optimizers, config, tokenizer, state, 1)
    return config


def write_files(folder: Path) -> Path:
    """Some tasks' files, in CORE's layout."""
    rng = random.Random(1)
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("copa", "arc_easy", "lambada_openai", "winograd_wsc")
    }
    for _ in range(20):
        for name in ("copa", "arc_easy"):
            choices = [some_text(rng, 1, 5) for _ in range(2 if name == "copa" else 4)]
            rows[name].append(
                {"query": some_text(rng, 2, 8), "choices": choices, "gold": rng.randrange(2)}
            )
        rows["lambada_openai"].append(
            {"context": some_text(rng, 4, 12), "continuation": rng.choice(WORDS)}
        )
        options = [some_text(rng, 2, 5) for _ in range(2)]
        rows["winograd_wsc"].append(
            {"context_options": options, "continuation": some_text(rng, 1, 4), "gold": 0}
        )
    folder.mkdir()
    for name, items in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def held_out(config: Config) -> TokenShards:
    return TokenShards(config.run_dir / "tokens" / "world", "validation")

"""How fast training is at longer rows: tokens a second of forward and backward at 1k to 8k context.

In: nothing. Out: a line a context, with its share of the speed at 1k.

    uv run benchmarks/contexts.py
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PRESETS, shaped
from hearth.training import attention, gradients
from hearth.training.batches import Batch
from model import build_model


def main() -> None:
    """The 16gb preset on a card; on a CPU its shape at depth 4, without tables of rows."""
    card = torch.cuda.is_available()
    base = PRESETS["16gb"].model
    tables = {"n_value_embeddings": 0, "bigram_rows": 0}
    shape = base if card else replace(shaped(base, 4), **tables)
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

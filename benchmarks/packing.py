"""Packed conversations against conversations padded to the longest: trained tokens per second at
equal memory.

In: a folder of conversations. Out: a table and JSON; both sides train the same model with
micro-batches of the same number of token slots, so the same activation memory, over the same
conversations in the same shuffled order.

    uv run benchmarks/packing.py --data PATH/TO/chat
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import ChatSource, ModelConfig
from hearth import hardware
from hearth.cli import run_script
from hearth.data import sources
from hearth.data.chat_format import Rendered, render
from hearth.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from hearth.training import gradients
from hearth.training.batches import Batch, pack_rows
from model import build_model

CONTEXT = 1024  # longest conversation kept, in tokens
PAD = SPECIAL_TOKENS.index("<|pad|>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default=os.environ.get("HEARTH_DATA", "") and os.environ["HEARTH_DATA"] + "/chat"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="measured on each side")
    parser.add_argument(
        "--slots", type=int, default=8192, help="tokens of a micro-batch, padding included"
    )
    options = parser.parse_args()
    if not options.data:
        parser.error("give --data, a folder of conversations, or set HEARTH_DATA")
    conversations = load(Path(options.data))
    order = np.random.default_rng(0).permutation(len(conversations))
    sides = {
        "packed": packed(conversations, order, options.slots),
        "padded": padded(conversations, order, options.slots),
    }
    rows = {name: measure(batches, options.seconds) for name, batches in sides.items()}
    ratio = rows["packed"]["trained_per_second"] / rows["padded"]["trained_per_second"]
    print(f"{len(conversations)} conversations, {hardware.describe(torch.device('cpu'))}")
    print(f"{'':8} {'trained tokens/s':>18} {'slots/s':>10} {'padding':>9} {'carry loss':>11}")
    for name, row in rows.items():
        print(
            f"{name:8} {row['trained_per_second']:18,.0f} {row['slots_per_second']:10,.0f} "
            f"{row['padding']:9.1%} {row['carry_loss']:11.1%}"
        )
    print(f"packed / padded: {ratio:.2f} ×")
    print(json.dumps({"ratio": ratio, **rows}))


def load(folder: Path) -> list[Rendered]:
    """Every conversation of the folder's files that fits the context, rendered with a tokenizer
    trained on them.
    """
    files = sorted(str(p) for p in folder.iterdir() if p.suffix in (".json", ".jsonl", ".parquet"))
    talks = list(sources.conversations(ChatSource(name="bench", files=tuple(files))))
    tokenizer = Tokenizer.train((m["content"] for talk in talks for m in talk), 4096)
    rendered = (render(talk, tokenizer) for talk in talks)
    return [r for r in rendered if len(r.ids) <= CONTEXT and any(r.loss)]


def lay(conversations: list[Rendered], rows: list[list[int]], length: int) -> Batch:
    """Rows of conversations as one batch; what is left of a row is padding without loss."""
    shape = (len(rows), length)
    ids, targets = np.full(shape, PAD), np.full(shape, PAD)
    weights, starts = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
    for r, row in enumerate(rows):
        at = 0
        for index in row:
            tokens, mask = conversations[index].ids, conversations[index].loss
            n = len(tokens)
            ids[r, at : at + n], targets[r, at : at + n - 1] = tokens, tokens[1:]
            weights[r, at : at + n - 1], starts[r, at] = mask[1:], True
            at += n
        starts[r, at : at + 1] = True
    return Batch(*(torch.from_numpy(x).flatten() for x in (ids, targets, weights, starts)), length)


def packed(conversations: list[Rendered], order: np.ndarray, slots: int) -> Iterator[Batch]:
    rows = pack_rows(np.array([len(conversations[i].ids) for i in order]), CONTEXT)
    at_once = slots // CONTEXT
    for first in range(0, len(rows) - at_once + 1, at_once):
        yield lay(
            conversations,
            [[order[i] for i in row] for row in rows[first : first + at_once]],
            CONTEXT,
        )


def padded(conversations: list[Rendered], order: np.ndarray, slots: int) -> Iterator[Batch]:
    """As many conversations as fit `slots` when each is padded to the longest of them."""
    rows: list[list[int]] = []
    longest = 0
    for index in order:
        n = len(conversations[index].ids)
        if max(longest, n) * (len(rows) + 1) > slots:
            yield lay(conversations, rows, longest)
            rows, longest = [], 0
        rows.append([index])
        longest = max(longest, n)


def measure(batches: Iterator[Batch], seconds: float) -> dict[str, float]:
    """Forward and backward over the batches for about `seconds`, after one to warm up."""
    shape = ModelConfig(
        vocab_size=4096,
        n_layer=4,
        d_model=192,
        n_head=6,
        n_kv_head=2,
        d_ff=512,
        context=CONTEXT,
        hrm=None,
    )
    model = build_model(shape, seed=0)
    trained = slots = filled = 0
    gradients.accumulate(model, next(batches), 1 << 30)
    started = time.perf_counter()
    for batch in batches:
        gradients.accumulate(model, batch, 1 << 30)
        model.zero_grad()
        trained += int(batch.weights.sum())
        slots += len(batch.ids)
        filled += int((batch.ids != PAD).sum())
        if time.perf_counter() - started > seconds:
            break
    spent = time.perf_counter() - started
    return {
        "trained_per_second": trained / spent,
        "slots_per_second": slots / spent,
        "padding": 1 - filled / slots,
        "carry_loss": trained / slots,
    }


if __name__ == "__main__":
    run_script(main, "stopped.")

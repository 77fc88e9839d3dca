"""The largest model that each card trains, estimated: card × context → parameters.

In: nothing but the rule of shapes (`shaped` in config.py) and `estimate_memory`. Out: a table in
Markdown. Needs no card, and measures none: tests hold the estimate against a traced step.

    uv run benchmarks/largest.py
        plain models of the presets' shape, one row at once, everything recomputed
    uv run benchmarks/largest.py --head
        with the HRM head
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import HRMConfig, ModelConfig, OptimConfig, shaped
from hearth.cli import run_script
from hearth.training.optim import build_optimizers
from hearth.training.planning import FILLED, GIB, Memory, estimate_memory
from model import Model

CARDS = (8, 10, 12, 16, 24, 32)  # GiB; a display attached takes its part of the share left free
CONTEXTS = (1024, 2048, 4096)
MOMENTUM = ("float32", "bfloat16")
DEEPEST = 96  # blocks looked at


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", action="store_true", help="with the HRM head")
    head = HRMConfig() if parser.parse_args(argv).head else None
    columns = [(context, momentum) for momentum in MOMENTUM for context in CONTEXTS]
    titles = [f"{context:,}, momentum in {momentum}" for context, momentum in columns]
    print("| memory | " + " | ".join(titles) + " |")
    print("|" + "---|" * (len(columns) + 1))
    for gib in CARDS:
        cells = [in_words(largest(gib, context, momentum, head)) for context, momentum in columns]
        print(f"| {gib} GiB | " + " | ".join(cells) + " |", flush=True)


def in_words(model: ModelConfig | None) -> str:
    """Parameters, and depth × width; a dash where not even the smallest fits."""
    if model is None:
        return "–"
    with torch.device("meta"):
        n = Model(model).n_parameters()
    return f"{n / 1e6:,.0f}M ({model.n_layer} × {model.d_model})"


def largest(
    gib: float, context: int, momentum: str, head: HRMConfig | None = None
) -> ModelConfig | None:
    """The deepest model of the rule whose step fits into the share of a card that a run may fill:
    memory grows with depth, so it is found by halving.
    """
    room, low, high = FILLED["cuda"] * gib * GIB, 0, DEEPEST
    while low < high:
        depth = (low + high + 1) // 2
        fits = memory_of(depth, context, momentum, head).peak <= room
        low, high = (depth, high) if fits else (low, depth - 1)
    return config_of(low, context, head) if low else None


def config_of(depth: int, context: int, head: HRMConfig | None) -> ModelConfig:
    return shaped(replace(ModelConfig(), context=context, hrm=head), depth)


@cache
def memory_of(depth: int, context: int, momentum: str, head: HRMConfig | None) -> Memory:
    """A step that accumulates micro-batches of one row, in bfloat16 on a card."""
    with torch.device("meta"):
        model = Model(config_of(depth, context, head))
    model.dtype = torch.bfloat16
    return estimate_memory(
        model,
        build_optimizers(model, OptimConfig(momentum_dtype=momentum), 1e-3),
        n_rows=1,
        context=context,
        recomputed=len(model.blocks),
        accumulates=True,
        on_card=True,
    )


if __name__ == "__main__":
    run_script(main)

"""The study of the recipe: the law that is fitted to its runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import recipe

from config import LAW, predicted_bits_per_byte


def test_the_fit_finds_the_law_that_the_losses_follow() -> None:
    weights, tokens = (np.array(x) * 1e6 for x in ((1.3, 1.3, 1.3, 5, 5, 15), (0.5, 1, 2, 1, 2, 1)))
    law = (1.0, 0.3, 0.3, 0.6, 0.4)  # E, A, a, B, b
    bpb = np.array(
        [predicted_bits_per_byte(n, d, law) for n, d in zip(weights, tokens, strict=True)]
    )
    assert recipe.fitted(np.stack([weights, tokens, bpb], axis=1)) == pytest.approx(law)


def test_the_law_in_the_config_is_that_of_the_runs_in_the_repository() -> None:
    found = recipe.fitted(recipe.of_the_rule(recipe.ROOT / "benchmarks/results/recipe.jsonl"))
    assert found == pytest.approx(LAW, abs=5e-4)


def test_races_are_compared_seed_by_seed_with_the_tokens_of_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"code": "as shipped", "text": "unseen", "depth": 4, "cpu_seconds": 300.0}
    own = common | {"side": "hearth", "change": "", "lr": 0.01, "times": 1.0, "trained": 3_000_000}
    rival = common | {"side": "nanochat", "change": "", "lr": 1.2, "trained": 2_000_000}
    rows = [
        own | {"seed": 0, "bpb": 1.6},
        own | {"seed": 0, "bpb": 1.5, "trained": 5_000_000},
        own | {"seed": 1, "bpb": 1.2, "code": "another"},
        own | {"seed": 0, "bpb": 1.25, "change": recipe.PLAIN},
        rival | {"seed": 0, "bpb": 2.0},
        rival | {"seed": 1, "bpb": 9.0},
    ]
    book = tmp_path / "runs.jsonl"
    book.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.races(argparse.Namespace(out=book))
    title, *lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert title == "unseen text, 4 blocks"
    assert lines == [
        "ours seed 0 3.00M tokens 300 s 1.6000",
        "ours seed 0 5.00M tokens 300 s 1.5000",
        "nanochat, rate × 1.2 seed 0 2.00M tokens 300 s 2.0000 1.50 × its tokens: -20.0%",
        "nanochat, rate × 1.2 seed 1 2.00M tokens 300 s 9.0000",
        "plain seed 0 3.00M tokens 300 s 1.2500 1.00 × its tokens: +28.0% "
        "1.67 × its tokens: +20.0%",
    ]

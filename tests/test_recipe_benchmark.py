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


def test_races_are_compared_over_the_seeds_that_both_sides_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"code": "as shipped", "text": "unseen", "depth": 4, "asked_tokens": None}
    common |= {"asked_seconds": 300.0, "trained": 2_000_000}
    own = common | {"side": "hearth", "change": "", "lr": 0.01, "times": 1.0}
    rival = common | {"side": "nanochat", "change": "", "lr": 1.2, "times": 1.2}
    rows = [
        own | {"seed": 0, "bpb": 1.6},
        own | {"seed": 1, "bpb": 1.2},
        own | {"seed": 1, "bpb": 1.4},
        own | {"code": "another", "seed": 2, "bpb": 0.1},
        own | {"seed": 1, "bpb": 1.25, "change": recipe.PLAIN},
        rival | {"seed": 0, "bpb": 2.0},
        rival | {"seed": 2, "bpb": 9.0},
    ]
    book = tmp_path / "runs.jsonl"
    book.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.races(argparse.Namespace(out=book))
    title, ours, *others = capsys.readouterr().out.splitlines()
    assert title == "unseen text, 4 blocks, 300 s"
    ours = " ".join(ours.split())
    assert ours == "ours 0: 1.6000 (2.00M) 1: 1.2000 (2.00M) 1: 1.4000 (2.00M)"
    assert {line.split()[0]: line.split()[-1] for line in others} == {
        "plain": "+4.0%",
        "nanochat,": "-20.0%",
    }

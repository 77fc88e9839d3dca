"""The study of the recipe: the law that is fitted to its runs."""

from __future__ import annotations

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

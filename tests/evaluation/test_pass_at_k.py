"""pass@k is unbiased, and its interval covers the truth."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from hearth.evaluation.pass_at_k import Estimate, pass_at_k


@pytest.mark.parametrize("c", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_it_is_the_share_of_all_choices_of_k_that_hold_a_right_answer(c: int, k: int) -> None:
    marks = [1] * c + [0] * (5 - c)
    choices = list(combinations(marks, k))
    assert pass_at_k(5, c, k) == pytest.approx(sum(map(max, choices)) / len(choices))


def test_it_is_unbiased() -> None:
    rng, p, k = Random(0), 0.2, 4
    found = [pass_at_k(16, sum(rng.random() < p for _ in range(16)), k) for _ in range(20_000)]
    assert sum(found) / len(found) == pytest.approx(1 - (1 - p) ** k, abs=0.01)


def test_more_answers_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="k is 17"):
        pass_at_k(16, 3, 17)


def test_nineteen_intervals_of_twenty_hold_the_truth() -> None:
    rng, inside = Random(1), 0
    for _ in range(500):
        estimate = Estimate.of([rng.random() for _ in range(60)])
        inside += abs(estimate.value - 0.5) <= estimate.margin
    assert 0.92 < inside / 500 < 0.98

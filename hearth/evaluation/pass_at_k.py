"""pass@k: how often one of k sampled answers is right, with intervals.

In: a model, problems of an environment. Out: figures. Knows no file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hearth.training.rewards import Environment, Problem
from hearth.training.rollouts import Group, Player


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k answers is right, unbiased, from n samples of which c are right
    (arXiv 2107.03374, section 2.1).
    """
    if not 0 < k <= n:
        raise ValueError(f"k is {k}, must lie between 1 and n = {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with the half of its 95% interval."""

    value: float
    margin: float

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Estimate(statistics.fmean(values), 1.96 * spread)


@dataclass(frozen=True)
class Result:
    """What a model made of an environment's problems, several samples each."""

    groups: list[Group]

    def pass_at(self, k: int) -> Estimate:
        """Over the problems; raises ValueError where k is more than there are samples."""
        counts = [(len(g.samples), sum(s.right for s in g.samples)) for g in self.groups]
        return Estimate.of([pass_at_k(n, c, k) for n, c in counts])

    @property
    def stops(self) -> float:
        return statistics.fmean(float(s.stopped) for g in self.groups for s in g.samples)

    @property
    def length(self) -> float:
        return statistics.fmean(len(s.rollout.ids) for g in self.groups for s in g.samples)

    def tool_calls(self) -> dict[str, float]:
        """Calls an answer, by kind of problem."""
        kinds: dict[str, list[int]] = {}
        for group in self.groups:
            kinds.setdefault(group.problem.kind, []).extend(s.n_calls for s in group.samples)
        return {kind: statistics.fmean(calls) for kind, calls in kinds.items()}


def measure(
    player: Player, environment: Environment, problems: Sequence[Problem], n: int, seed: int = 0
) -> Result:
    """`n` sampled answers to each problem."""
    seeds = [seed * 1_000_003 + i for i in range(len(problems) * n)]
    return Result(player.play([(environment, problem) for problem in problems], n, seeds))

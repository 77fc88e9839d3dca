"""Rollouts: problems drawn, answers sampled from the model being trained, the batch they teach.

In: a model, environments, the settings. Out: a `Batch` a step, whose weights are advantages, and
the figures of its rollout. What a step draws follows from the seed, the step, the weights and the
curriculum's estimates: those are all there is to save. Knows no optimizer and no file.

REINFORCE with the group's mean as baseline (GRPO, arXiv 2402.03300, without its division by the
deviation, as arXiv 2503.20783 has it; one update a rollout, so there is no ratio to clip).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

from config import REASONING_PROMPT, RLConfig, UserError
from hearth.data.chat_format import Answer, parse_answer, render
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Completion, Engine, Sampling
from hearth.decoding.tools import Tools
from hearth.training import attention, distributed
from hearth.training.batches import Batch, pack_rows
from hearth.training.rewards import Environment, Problem
from model import Model

MOST_DRAWN = 3  # times `prompts_per_step`, after which a step makes do with what it has
FEWEST = 0.25  # of `prompts_per_step`: with fewer groups to learn from no update is made
ROWS = 128  # answers decoded together
EASY, HARD = 0.9, 0.1  # success beyond which a kind of problem is practised little
LITTLE = 0.1  # how often, relative to the others
MEMORY = 0.9  # of the estimate of a kind's success, a prompt


class Sample(NamedTuple):
    """An answer and what it earned."""

    rollout: Completion
    text: str  # all of it, its thinking in brackets
    reward: float
    right: bool  # by its reward alone, without costs
    stopped: bool  # by itself, with <|end|>
    n_calls: int  # of tools


@dataclass
class Group:
    """A problem and the answers sampled to it."""

    environment: str
    problem: Problem
    prompt: list[int]
    samples: list[Sample]

    @property
    def rewards(self) -> list[float]:
        return [sample.reward for sample in self.samples]

    @property
    def dead(self) -> bool:
        """Whether all answers earned the same, so that there is nothing to learn from."""
        return max(self.rewards) == min(self.rewards)


def as_text(answer: Answer) -> str:
    """An answer with its thinking in round brackets, its calls and their results in square ones."""
    thought = f"({answer.thinking}) " if answer.thinking is not None else ""
    said = [
        part["text"]
        if "text" in part
        else f"[{part['tool']} {part['arguments']}: {part['result']}]"
        for part in answer.parts
    ]
    return thought + ("".join(said) if said else answer.content)


Teach = Callable[[list[float]], list[float]]  # a group's rewards → the weight of each answer


def advantages(rewards: list[float]) -> list[float]:
    """How much better each answer of a group is than their mean."""
    mean = statistics.fmean(rewards)
    return [reward - mean for reward in rewards]


# -------------------------------------------------------------------------------------- answering


@dataclass(frozen=True)
class Player:
    """Answers problems and judges the answers."""

    model: Model
    tokenizer: Tokenizer
    max_tokens: int
    tool_cost: float = 0.0

    def prompt(self, problem: Problem) -> list[int]:
        system = [{"role": "system", "content": REASONING_PROMPT}] if problem.reasons else []
        messages = [*system, {"role": "user", "content": problem.prompt}]
        ids, context = render(messages, self.tokenizer, answer=True).ids, self.model.config.context
        if len(ids) >= context:
            raise UserError(
                f"A problem of the kind {problem.kind!r} has {len(ids)} tokens, the model's "
                f"context is {context}: leave out {problem.prompt[:60]!r} …"
            )
        return ids

    def play(
        self,
        asked: Sequence[tuple[Environment, Problem]],
        n_samples: int,
        seeds: Sequence[int],
        *,
        temperature: float = 1.0,
    ) -> list[Group]:
        """`n_samples` answers to each problem, judged by its environment; `seeds` has one of each
        answer. The engine reads the weights as they are, without a copy.
        """
        prompts = [self.prompt(problem) for _, problem in asked]
        found = Engine(self.model, tokenizer=self.tokenizer, max_rows=ROWS).complete(
            prompts,
            max_tokens=self.max_tokens,
            stop_ids=[self.tokenizer.end],
            sampling=Sampling(temperature=temperature),
            seeds=seeds,
            n_samples=n_samples,
            tools=Tools(),
            logprobs=True,
        )
        groups = []
        for i, (judge, problem) in enumerate(asked):
            mine = found[i * n_samples : (i + 1) * n_samples]
            samples = [self._judged(problem, judge, rollout) for rollout in mine]
            groups.append(Group(judge.name, problem, prompts[i], samples))
        return groups

    def _judged(self, problem: Problem, judge: Environment, rollout: Completion) -> Sample:
        """An answer that was cut off earns nothing."""
        stopped = rollout.ids[-1] == self.tokenizer.end
        n_calls = rollout.ids.count(self.tokenizer.tool_call)
        answer = parse_answer(rollout.ids, self.tokenizer)
        earned = float(judge.reward(problem, answer.content)) if stopped else 0.0
        reward = earned - self.tool_cost * n_calls
        return Sample(rollout, as_text(answer), reward, earned >= 1.0, stopped, n_calls)


# ------------------------------------------------------------------------------------- curriculum


@dataclass
class Curriculum:
    """The success of each kind of problem so far, and which one comes next: mostly those that are
    neither too easy nor too hard to learn from.
    """

    kinds: list[tuple[str, str]]  # environment, kind
    success: dict[str, float] = field(default_factory=dict)  # "environment: kind" → share right

    def weights(self) -> list[float]:
        estimates = [self.success.get(": ".join(kind), 0.5) for kind in self.kinds]
        return [1.0 if HARD <= p <= EASY else LITTLE for p in estimates]

    def draw(self, rng: Random) -> tuple[str, str]:
        return rng.choices(self.kinds, self.weights())[0]

    def note(self, environment: str, kind: str, right: float) -> None:
        """Another prompt of this kind, of whose answers the share `right` was right."""
        name = f"{environment}: {kind}"
        before = self.success.get(name, 0.5)
        self.success[name] = MEMORY * before + (1 - MEMORY) * right


# ---------------------------------------------------------------------------------------- batches


class Rollouts:
    """Batches of answers that the model gives now, like those of `hearth.training.batches`.

    teach: what weight each answer of a group gets; others than `advantages` are for comparison.
    """

    live = True  # each of the weights of its own step: see `loop.fit`

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        environments: Sequence[Environment],
        config: RLConfig,
        *,
        seed: int,
        teach: Teach = advantages,
    ) -> None:
        self.model, self.pad, self.config, self.seed = model, tokenizer.pad, config, seed
        self.player = Player(model, tokenizer, config.max_tokens, config.tool_cost)
        self.judges = {environment.name: environment for environment in environments}
        self.curriculum = Curriculum([(e.name, kind) for e in environments for kind in e.kinds])
        self.teach = teach
        self.n_steps, self.context = config.steps, model.config.context
        self.groups: list[Group] = []  # of the latest step, all that were drawn
        self._figures: dict[str, float] = {}

    def stage(self, step: int) -> int:
        return 0

    def context_of(self, stage: int) -> int:
        return self.context

    def state(self) -> dict[str, Any]:
        """What the rollouts to come depend on besides seed, step and weights."""
        return {"success": dict(self.curriculum.success)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.curriculum.success = dict(state["success"])

    def figures(self) -> dict[str, float | None]:
        """Of the latest rollout, and how fast the whole step was in tokens of its rows; what share
        of the peak that is says nothing, for most of a step is decoding.
        """
        seconds = time.perf_counter() - self._began
        return {
            **self._figures,
            "rollout_share": self._rollout_seconds / max(1e-9, seconds),
            "tokens_per_second": self._n_tokens / max(1e-9, seconds),
            "mfu": None,
        }

    def batch(self, step: int) -> Batch:
        """Sample a rollout with the weights as they are; every process makes its share of it."""
        self._began = time.perf_counter()
        P = self.config.prompts_per_step
        self.groups = self._collect(step)
        told = [group for group in self.groups if not group.dead][:P]
        if len(told) < max(1, FEWEST * P):
            told = []
        batch = self._lay(told)
        self._n_tokens = len(batch.ids)
        self._rollout_seconds = time.perf_counter() - self._began
        self._figures = self._summary(told, batch)
        return batch

    def _collect(self, step: int) -> list[Group]:
        """Groups drawn until `prompts_per_step` of them are alive, or too many were drawn."""
        P, found = self.config.prompts_per_step, []
        alive = 0
        while alive < P and len(found) < MOST_DRAWN * P:
            rate = alive / len(found) if found else 1.0
            wanted = math.ceil((P - alive) / max(rate, 1 / MOST_DRAWN))
            found += self._round(step, len(found), min(wanted, MOST_DRAWN * P - len(found)))
            alive = sum(not group.dead for group in found)
        for group in found:
            right = statistics.fmean(float(sample.right) for sample in group.samples)
            self.curriculum.note(group.environment, group.problem.kind, right)
        return found

    def _round(self, step: int, first: int, n: int) -> list[Group]:
        """`n` more groups of this step, the processes taking turns."""
        G = self.config.samples_per_prompt
        asked = []
        for place in range(first, first + n):
            rng = Random(f"{self.seed} {step} {place}")
            name, kind = self.curriculum.draw(rng)
            asked.append((place, self.judges[name], self.judges[name].draw(kind, "train", rng)))
        mine = asked[distributed.rank() :: distributed.n_ranks()]
        base = Random(f"{self.seed} {step} samples").randrange(2**40)
        groups = self.player.play(
            [(judge, problem) for _, judge, problem in mine],
            G,
            [base + place * G + i for place, _, _ in mine for i in range(G)],
        )
        places = [place for place, _, _ in mine]
        found = distributed.gather(list(zip(places, groups, strict=True)))
        return [group for _, group in sorted(found, key=lambda item: item[0])]

    def _lay(self, groups: list[Group]) -> Batch:
        """The answers packed into rows, each seeing itself alone; weights are advantages at every
        id that the model chose.
        """
        c, texts = self.config, [text for group in groups for text in self._taught(group)]
        lengths = np.array([len(prompt) + len(rollout.ids) for prompt, rollout, _ in texts])
        rows = pack_rows(lengths, self.context) or [[]]
        shape = (len(rows), self.context)
        ids, targets = np.full(shape, self.pad), np.full(shape, self.pad)
        weights, logprobs = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        starts = np.zeros(shape, bool)
        for r, row in enumerate(rows):
            at = 0
            for prompt, rollout, weight in (texts[i] for i in row):
                tokens, n = [*prompt, *rollout.ids], len(prompt) + len(rollout.ids)
                first = at + len(prompt) - 1  # what predicts the answer's first id
                ids[r, at : at + n] = tokens
                targets[r, at : at + n - 1] = tokens[1:]
                weights[r, first : at + n - 1] = weight * ~np.array(rollout.forced)
                logprobs[r, first : at + n - 1] = rollout.logprobs
                starts[r, at] = True
                at += n
            if at < shape[1]:
                starts[r, at] = True
        self._logprobs = torch.from_numpy(logprobs).flatten()
        flat = (torch.from_numpy(x).flatten() for x in (ids, targets, weights, starts))
        normaliser = float(c.prompts_per_step * c.samples_per_prompt * c.max_tokens)
        return Batch(*flat, self.context, normaliser)

    def _taught(self, group: Group) -> list[tuple[list[int], Completion, float]]:
        """Prompt, answer and weight of what there is to learn from; an answer that was given
        several times counts once, with all their weights.
        """
        told: dict[tuple[int, ...], tuple[Completion, float]] = {}
        for sample, weight in zip(group.samples, self.teach(group.rewards), strict=True):
            key = tuple(sample.rollout.ids)
            told[key] = (sample.rollout, weight + told.get(key, (None, 0.0))[1])
        return [(group.prompt, rollout, weight) for rollout, weight in told.values() if weight]

    def _summary(self, told: list[Group], batch: Batch) -> dict[str, float]:
        samples = [sample for group in self.groups for sample in group.samples]
        chosen = [
            logprob
            for sample in samples
            for logprob, forced in zip(sample.rollout.logprobs, sample.rollout.forced, strict=True)
            if not forced
        ]
        return {
            "reward": statistics.fmean(sample.reward for sample in samples),
            "right": statistics.fmean(float(sample.right) for sample in samples),
            "stops": statistics.fmean(float(sample.stopped) for sample in samples),
            "length": statistics.fmean(len(sample.rollout.ids) for sample in samples),
            "entropy": -statistics.fmean(chosen),  # estimated by what was drawn
            "dead_groups": statistics.fmean(float(group.dead) for group in self.groups),
            "told_groups": len(told),
            "tool_calls": statistics.fmean(sample.n_calls for sample in samples),
            "mismatch": self._mismatch(batch),
        }

    def _mismatch(self, batch: Batch) -> float:
        """The largest difference between the log-probabilities that the engine drew the first row's
        ids from and those that the training pass gives them.
        """
        row = batch.part(slice(0, batch.row_length))
        counted = row.weights != 0
        if not counted.any():
            return 0.0
        found = training_logprobs(self.model, row)
        return float((found - self._logprobs[: batch.row_length])[counted].abs().max())


@torch.no_grad()
def training_logprobs(model: Model, batch: Batch) -> torch.Tensor:
    """Log-probability (N,) of each target, as the training pass sees it."""
    moved = batch.to(model.device)
    packed = attention.packed(model, moved.starts, moved.row_length)
    logprobs = model.logits(model(moved.ids, packed)).log_softmax(dim=-1)
    return logprobs.gather(1, moved.targets[:, None]).squeeze(1).cpu()

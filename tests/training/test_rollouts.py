"""Rollouts: the engine and the training pass agree; the gradient is REINFORCE's; what is drawn."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from random import Random

import pytest
import torch

from config import ModelConfig, RLConfig, UserError
from hearth.data.chat_format import render
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Budget, Completion, Engine, Sampling
from hearth.training.gradients import accumulate
from hearth.training.rewards import Environment, Problem
from hearth.training.rollouts import (
    Curriculum,
    Group,
    Rollouts,
    Sample,
    advantages,
    training_logprobs,
)
from model import Model, PackedSequences, build_model


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train(["one two three four five six seven eight nine ten"] * 3, 384)


@pytest.fixture
def model(tiny: ModelConfig) -> Model:
    """All the parts: rings of 6 columns under prompts far longer, the head, value embeddings."""
    made = build_model(replace(tiny, vocab_size=384, context=96), seed=0)
    made.dtype = torch.float32
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape, generator=rng)
    return made


def chance(problem: Problem, answer: str) -> float:
    """A reward that groups disagree about, whatever the model says."""
    return float(zlib.crc32((problem.prompt + answer).encode()) % 3 == 0) if answer else 0.5


def number(kind: str, rng: Random) -> Problem:
    told = f"{kind} " + " ".join(rng.choices(["one", "two", "three", "four"], k=rng.randint(1, 9)))
    return Problem(kind, told, "five", told, reasons=False)


WARM = Sampling(temperature=1.0)
ANY = Environment("any", ("a", "b"), number, chance)
SETTINGS = RLConfig(
    environments=("any",), steps=4, prompts_per_step=4, samples_per_prompt=4, max_tokens=20
)


def rollouts_of(model: Model, words: Tokenizer, **changes) -> Rollouts:
    environment = changes.pop("environment", ANY)
    return Rollouts(model, words, [environment], replace(SETTINGS, **changes), seed=0)


class Scored(Rollouts):
    """Rewards that no model's answers decide: every answer earns another one."""

    def _collect(self, step: int) -> list[Group]:
        groups = super()._collect(step)
        rng = Random(step)
        return [
            replace_samples(group, [s._replace(reward=rng.random()) for s in group.samples])
            for group in groups
        ]


def replace_samples(group: Group, samples: list[Sample]) -> Group:
    return Group(group.environment, group.problem, group.prompt, samples)


def scored(model: Model, words: Tokenizer, **changes) -> Scored:
    return Scored(model, words, [ANY], replace(SETTINGS, **changes), seed=0)


# ----------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("chunk_tokens", [512, 5])
@pytest.mark.parametrize("n_samples", [1, 5])
def test_the_engines_logprobs_are_those_of_the_training_pass(
    model: Model, chunk_tokens: int, n_samples: int
) -> None:
    """Prompts of many lengths, longer than the rings, read in chunks, several samples of each."""
    rng = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, 384, (n,), generator=rng).tolist() for n in (1, 3, 7, 20, 33, 60, 61)
    ]
    engine = Engine(model, max_rows=16, chunk_tokens=chunk_tokens)
    looks = {"max_tokens": 30, "stop_ids": [7], "sampling": WARM, "logprobs": True}
    found = engine.complete(prompts, n_samples=n_samples, **looks)
    for i, rollout in enumerate(found):
        prompt = prompts[i // n_samples]
        assert len(rollout.logprobs) == len(rollout.ids) == len(rollout.forced)
        ids = torch.tensor([*prompt, *rollout.ids])
        packed = PackedSequences(torch.zeros(len(ids) - 1, dtype=torch.bool), len(ids) - 1)
        with torch.no_grad():
            logits = model.logits(model(ids[:-1], packed))
        want = logits.log_softmax(-1).gather(1, ids[1:, None])[len(prompt) - 1 :, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), want, atol=1e-4, rtol=0)


def test_packed_rows_give_the_logprobs_that_the_engine_drew_from(
    model: Model, words: Tokenizer
) -> None:
    rollouts = scored(model, words)
    batch = rollouts.batch(0)
    counted = batch.weights != 0
    assert int(counted.sum()) > 100
    assert int(batch.starts.sum()) > 16  # several answers a row
    off = (training_logprobs(model, batch) - rollouts._logprobs)[counted].abs()
    assert float(off.max()) < 1e-4
    assert rollouts.figures()["mismatch"] < 1e-4


def test_the_gradient_is_that_of_plain_reinforce(model: Model, words: Tokenizer) -> None:
    """Each answer alone, log-probabilities by autograd, against packed rows in micro-batches."""
    rollouts = scored(model, words)
    batch = rollouts.batch(0)
    accumulate(model, batch, 96)
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alive = [group for group in rollouts.groups if not group.dead][:4]
    loss = torch.zeros(())
    for group in alive:
        mean = sum(group.rewards) / len(group.rewards)
        for sample in group.samples:
            ids = torch.tensor([*group.prompt, *sample.rollout.ids])
            packed = PackedSequences(torch.zeros(len(ids) - 1, dtype=torch.bool), len(ids) - 1)
            logprobs = model.logits(model(ids[:-1], packed)).log_softmax(-1)
            own = logprobs.gather(1, ids[1:, None])[len(group.prompt) - 1 :].sum()
            loss = loss - (sample.reward - mean) * own
    (loss / (4 * 4 * 20)).backward()
    want = [p.grad for p in model.parameters()]
    assert max(float(p.abs().max()) for p in want) > 1e-4
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_forced_ids_carry_no_loss(model: Model, words: Tokenizer) -> None:
    prompt = render([{"role": "user", "content": "one"}], words, answer=True).ids
    found = Engine(model).complete(
        [prompt],
        max_tokens=20,
        stop_ids=[words.end],
        sampling=WARM,
        budget=Budget(4, words.think, words.end_think),
        begin=(words.think, 300),
        n_samples=8,
        logprobs=True,
    )
    assert all(rollout.forced[:2] == [True, True] for rollout in found)
    closes = [r.ids.index(words.end_think) for r in found if words.end_think in r.ids]
    assert closes
    assert any(r.forced[r.ids.index(words.end_think)] for r in found if words.end_think in r.ids)
    rollouts = rollouts_of(model, words)
    samples = [Sample(r, "", float(i), False, True, 0) for i, r in enumerate(found)]
    batch = rollouts._lay([Group("any", number("a", Random(0)), prompt, samples)])
    n_free = sum(
        not forced for r in {tuple(r.ids): r for r in found}.values() for forced in r.forced
    )
    assert int((batch.weights != 0).sum()) == n_free


def test_a_tools_result_is_read_but_not_learnt(model: Model, words: Tokenizer) -> None:
    """A call that the answer is made to begin with: its result and itself are masked, what follows
    has the log-probabilities of the training pass.
    """
    call = (words.tool_call, *words.encode("calculate 1+2"), words.end_tool_call)
    prompt = render([{"role": "user", "content": "one"}], words, answer=True).ids
    found = Engine(model, tokenizer=words).complete(
        [prompt],
        max_tokens=40,
        stop_ids=[words.end],
        sampling=WARM,
        begin=call,
        tools={"calculate": lambda text: "3"},
        n_samples=4,
        logprobs=True,
    )
    result = [words.tool_result, *words.encode("3"), words.end_tool_call]
    n = len(call) + len(result)
    assert all(answer.ids[len(call) : n] == result for answer in found)
    rollouts = rollouts_of(model, words)
    samples = [Sample(answer, "", float(i), False, True, 1) for i, answer in enumerate(found)]
    batch = rollouts._lay([Group("any", number("a", Random(0)), prompt, samples)])
    counted = batch.weights != 0
    assert int(counted.sum()) == sum(len(answer.ids) - n for answer in found)
    off = (training_logprobs(model, batch) - rollouts._logprobs)[counted].abs()
    assert float(off.max()) < 1e-4


def test_the_whole_softmax_is_drawn_from(model: Model, words: Tokenizer) -> None:
    prompt = render([{"role": "user", "content": "two"}], words, answer=True).ids
    looks = {"max_tokens": 1, "sampling": WARM, "logprobs": True}
    found = Engine(model).complete([prompt], n_samples=2000, **looks)
    mean = sum(math.exp(rollout.logprobs[0]) for rollout in found) / len(found)
    packed = PackedSequences(torch.zeros(len(prompt), dtype=torch.bool), len(prompt))
    with torch.no_grad():
        p = model.logits(model(torch.tensor(prompt), packed))[-1].softmax(-1)
    assert mean == pytest.approx(float(p.square().sum()), rel=0.15)  # E[p] where draws follow p


# ------------------------------------------------------------------------------ what a step draws


def test_advantages_add_up_to_nothing() -> None:
    assert advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]


def test_an_answer_given_twice_is_laid_once_with_both_weights(
    model: Model, words: Tokenizer
) -> None:
    rollouts = rollouts_of(model, words)
    same, other = Completion([5, 6], [False] * 2, [-1.0, -2.0]), Completion([9], [False], [-1.0])
    samples = [Sample(r, "", w, False, True, 0) for r, w in ((same, 1.0), (same, 1.0), (other, 0))]
    batch = rollouts._lay([Group("any", number("a", Random(0)), [1, 2], samples)])
    assert batch.weights[batch.weights != 0].tolist() == pytest.approx([2 / 3, 2 / 3, -2 / 3])


class HalfDead(Scored):
    """Of one kind of problem all answers earn the same."""

    def _round(self, step: int, first: int, n: int) -> list[Group]:
        rewards = {"a": [0.0, 1.0, 0.0, 0.0], "b": [1.0] * 4}
        return [
            replace_samples(
                group,
                [
                    s._replace(reward=reward)
                    for s, reward in zip(group.samples, rewards[group.problem.kind], strict=True)
                ],
            )
            for group in super()._round(step, first, n)
        ]

    def _collect(self, step: int) -> list[Group]:
        return Rollouts._collect(self, step)


def test_dead_groups_teach_nothing_and_more_are_drawn(model: Model, words: Tokenizer) -> None:
    rollouts = HalfDead(model, words, [ANY], SETTINGS, seed=0)
    batch = rollouts.batch(0)
    drawn = [group.problem.kind for group in rollouts.groups]
    assert 4 < len(drawn) <= 12
    assert drawn.count("a") >= 4
    assert rollouts.figures()["told_groups"] == 4
    assert rollouts.figures()["dead_groups"] == drawn.count("b") / len(drawn)
    assert float(batch.weights.max()) == 0.75  # of the first four that are alive
    assert int((batch.weights == 0.75).sum()) == sum(
        len(group.samples[1].rollout.ids)
        for group in [g for g in rollouts.groups if g.problem.kind == "a"][:4]
    )


def test_where_nothing_can_be_learnt_no_more_than_three_times_as_many_are_drawn(
    model: Model, words: Tokenizer
) -> None:
    never = replace(ANY, reward=lambda problem, answer: 0.0)
    rollouts = rollouts_of(model, words, environment=never)
    batch = rollouts.batch(0)
    assert len(rollouts.groups) == 12
    assert not batch.weights.any()
    assert accumulate(model, batch, 96) == 0.0
    assert all(p.grad is None for p in model.parameters())


def test_an_answer_that_is_cut_off_earns_nothing(model: Model, words: Tokenizer) -> None:
    always = replace(ANY, reward=lambda problem, answer: 1.0)
    rollouts = rollouts_of(model, words, environment=always)
    rollouts.batch(0)
    samples = [sample for group in rollouts.groups for sample in group.samples]
    assert {s.stopped for s in samples} == {True, False}
    assert all(s.reward == s.stopped == (s.rollout.ids[-1] == words.end) for s in samples)


def test_a_batch_follows_from_step_weights_and_curriculum(model: Model, words: Tokenizer) -> None:
    first, again = scored(model, words), scored(model, words)
    first.batch(0)
    first.curriculum.success["any: a"] = 0.01  # so hard that it is hardly drawn any more
    state = first.state()
    want = first.batch(1)
    again.load_state(state)  # as after a kill: step 0 was never made here
    got = again.batch(1)
    for name in ("ids", "targets", "weights", "starts"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert not torch.equal(first.batch(2).ids[:96], want.ids[:96])


def test_kinds_that_are_too_easy_or_too_hard_are_drawn_little() -> None:
    curriculum = Curriculum([("x", "easy"), ("x", "middle"), ("x", "hard")])
    for _ in range(60):
        for kind, right in (("easy", 1.0), ("middle", 0.5), ("hard", 0.0)):
            curriculum.note("x", kind, right)
    rng = Random(0)
    drawn = [curriculum.draw(rng)[1] for _ in range(1200)]
    assert drawn.count("middle") == pytest.approx(1000, abs=60)
    assert min(drawn.count("easy"), drawn.count("hard")) > 50


def test_a_problem_longer_than_the_context_is_a_users_error(model: Model, words: Tokenizer) -> None:
    def long(kind: str, rng: Random) -> Problem:
        return replace(number(kind, rng), prompt="one two three " * 200)

    drawn = rollouts_of(model, words, environment=Environment("long", ("a",), long, chance))
    with pytest.raises(UserError, match="context is 96: leave out 'one two three"):
        drawn.batch(0)

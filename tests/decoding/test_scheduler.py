"""Continuous batching: whoever else is there, whenever they come and go, an answer is the same."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch

from config import HRMConfig, ModelConfig, UserError
from hearth.decoding import scheduler as module
from hearth.decoding.engine import Budget, Engine, Rules, Sampling
from hearth.decoding.matrices import compiled_kernels
from hearth.decoding.scheduler import (
    EngineThread,
    Event,
    Failed,
    Finished,
    Full,
    Job,
    PromptScores,
    Read,
    Request,
    Scheduler,
    Token,
)
from model import Model, PackedSequences, build_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 7)


HEAD = HRMConfig(l_layer=1, h_layer=2, h_cycles=2, l_cycles=1)
SHAPES = {
    "windows and head": {},
    "tables": {"n_value_embeddings": 1, "bigram_rows": 77},
    "no shift, no head": {"token_shift": False, "hrm": None},
    "window of one": {"window": 1},
    "whole context": {"window": None},
}


def awake(**changes) -> Model:
    """A model of all the parts with nothing hidden behind zeros."""
    shape = {"vocab_size": 128, "n_layer": 3, "d_model": 32, "n_head": 4, "n_kv_head": 2}
    shape |= {"d_ff": 48, "context": 64, "window": 6, "pattern": "SL", "hrm": HEAD, **changes}
    model = build_model(ModelConfig(**shape), seed=0)
    model.dtype = torch.float64  # so that a random head makes no token of a rounding
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += (0.4 if p.dim() == 2 and p is not model.embedding else 0.1) * torch.randn(
                p.shape, generator=rng
            )
    return model


@pytest.fixture(scope="module")
def model() -> Model:
    return awake()


def some_ids(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(128), k=n)


SAMPLING = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1)


def wanted(n: int, *, seed: int, tokens: int = 20, **settings) -> Request:
    rules = settings.pop("rules", Rules(tokens, sampling=SAMPLING))
    return Request(tuple(some_ids(n, seed)), rules, seed, **settings)


class Asked:
    """A request put to a scheduler, and what came of it."""

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        self.events: list[Event] = []
        self.job = Job(request, self.events.append)
        scheduler.add(self.job)

    @property
    def ids(self) -> list[int]:
        return [event.id for event in self.events if isinstance(event, Token)]

    @property
    def finish(self) -> str:
        return self.events[-1].reason

    @property
    def reused(self) -> int:
        return next(event.n_reused for event in self.events if isinstance(event, Read))


def run(scheduler: Scheduler, *requests: Request) -> list[Asked]:
    asked = [Asked(scheduler, request) for request in requests]
    while scheduler.busy:
        scheduler.step()
    return asked


def alone(engine: Engine, request: Request) -> list[int]:
    """The answer of the engine's own stream, without a scheduler."""
    rules = request.rules
    return list(
        engine.stream(
            list(request.prompt),
            max_tokens=rules.max_tokens,
            stop_ids=tuple(rules.stop_ids),
            sampling=rules.sampling,
            seed=request.seed,
            budget=rules.budget,
            begin=rules.begin,
        )
    )


# ---------------------------------------------------------------------------------- the same answer


@pytest.mark.parametrize(
    ("shape", "weights"),
    [(shape, None) for shape in SHAPES]
    + [("windows and head", "float32"), ("no shift, no head", "float32")],
)
def test_a_seeded_answer_is_the_same_alone_and_among_seven_others(
    shape: str, weights: str | None
) -> None:
    """In float32 the compiled kernels make it so to the bit."""
    if weights and compiled_kernels() is None:
        pytest.skip("no C compiler: rows differ by a rounding")
    engine = Engine(awake(**SHAPES[shape]), weights=weights, chunk_tokens=7)
    requests = [wanted(n, seed=n, n_top=2) for n in (1, 5, 9, 17, 23, 30, 33, 41)]
    scheduler, asked = Scheduler(engine), []
    for n, request in enumerate(requests):  # they join at different times
        asked.append(Asked(scheduler, request))
        for _ in range(3 * (n % 2)):
            scheduler.step()
    while scheduler.busy:
        scheduler.step()
    for request, answer in zip(requests, asked, strict=True):
        assert answer.ids == alone(engine, request)
        by_itself = run(Scheduler(engine), request)[0]
        assert by_itself.ids == answer.ids
        assert not weights or by_itself.events[-21:] == answer.events[-21:]


def test_more_requests_than_rows_are_answered_like_few(model: Model) -> None:
    engine = Engine(model)
    requests = [wanted(3 + n, seed=n) for n in range(11)]
    expected = [alone(engine, request) for request in requests]
    for n_rows in (1, 3):
        assert [a.ids for a in run(Scheduler(engine, n_rows=n_rows), *requests)] == expected


def test_cycles_left_early_are_the_same_among_others(model: Model) -> None:
    engine = Engine(model, h_cycles=4, exit_kl_threshold=0.05)
    requests = [wanted(n, seed=n) for n in (4, 9, 15, 22)]
    asked = run(Scheduler(engine), *requests)
    assert [a.ids for a in asked] == [alone(engine, request) for request in requests]
    cycles = [e.n_cycles for a in asked for e in a.events if isinstance(e, Token)]
    assert min(cycles) < max(cycles) == 4


def test_each_answer_has_rules_of_its_own(model: Model) -> None:
    engine = Engine(model)
    stop = alone(engine, wanted(8, seed=3))[4]
    rules = [
        Rules(5),
        Rules(20, frozenset([stop]), SAMPLING),
        Rules(20, budget=Budget(2, 40, 41), begin=(40,)),
        Rules(9, sampling=Sampling(temperature=2.0, top_k=3)),
    ]
    requests = [wanted(8, seed=3, rules=rule) for rule in rules]
    asked = run(Scheduler(engine), *requests)
    assert [a.ids for a in asked] == [alone(engine, request) for request in requests]
    assert [a.finish for a in asked] == ["length", "stop", "length", "length"]
    assert asked[2].ids[:4] == [40, *asked[2].ids[1:3], 41]


def test_an_answer_ends_where_the_context_is_full(model: Model) -> None:
    (asked,) = run(Scheduler(Engine(model)), wanted(60, seed=1, tokens=50))
    assert asked.finish == "context"
    assert asked.ids == alone(Engine(model), wanted(60, seed=1, tokens=50))
    (whole,) = run(Scheduler(Engine(model)), wanted(64, seed=1, tokens=50))
    assert len(whole.ids) == 1


def test_a_prompt_beyond_the_context_fails_alone(model: Model) -> None:
    long, good = run(Scheduler(Engine(model)), wanted(65, seed=1), wanted(5, seed=2))
    assert isinstance(long.events[-1], Failed)
    assert len(good.ids) == 20


# ------------------------------------------------------------------------------ joining and leaving


def test_others_go_on_while_a_long_prompt_is_read(model: Model) -> None:
    scheduler = Scheduler(Engine(model))
    short = Asked(scheduler, wanted(3, seed=1, tokens=40))
    while not short.ids:
        scheduler.step()
    long = Asked(scheduler, wanted(50, seed=2))
    said = len(short.ids)
    while not long.ids:
        scheduler.step()
    reads = [event.n_read for event in long.events if isinstance(event, Read)]
    assert reads == [7, 14, 21, 28, 35, 42, 49, 50]
    assert len(short.ids) - said == len(reads)


def test_a_short_prompt_overtakes_a_long_one_that_is_being_read(model: Model) -> None:
    scheduler = Scheduler(Engine(model))
    long, short = (Asked(scheduler, wanted(n, seed=n)) for n in (60, 5))
    while not short.ids:
        scheduler.step()
    assert not long.ids


def test_one_who_goes_away_frees_the_row(model: Model) -> None:
    engine = Engine(model)
    scheduler = Scheduler(engine, n_rows=2)
    asked = [Asked(scheduler, wanted(6, seed=n)) for n in range(5)]
    for _ in range(5):
        scheduler.step()
    for gone in (asked[0], asked[3]):  # one that answers, one that waits
        gone.job.cancel()
    heard = len(asked[0].ids)
    while scheduler.busy:
        scheduler.step()
    assert len(asked[0].ids) == heard
    assert asked[3].events == []
    assert all(a.job.ended for a in asked)
    for n in (1, 2, 4):
        assert asked[n].ids == alone(engine, wanted(6, seed=n))


def test_an_error_in_a_pass_ends_what_is_under_way_and_nothing_else(
    model: Model, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    engine = Engine(model)
    scheduler = Scheduler(engine)
    asked = [Asked(scheduler, wanted(6, seed=n)) for n in range(2)]
    for _ in range(4):
        scheduler.step()

    def broken(*_, **__):
        raise RuntimeError(" ".join(["what", "was", "asked"]))

    with monkeypatch.context() as patch:
        patch.setattr(module, "decode", broken)
        scheduler.step()
    assert [type(a.events[-1]) for a in asked] == [Failed, Failed]
    assert "was asked" not in str([a.events[-1] for a in asked]) + capfd.readouterr().err
    assert not scheduler.busy
    assert run(scheduler, wanted(6, seed=0))[0].ids == alone(engine, wanted(6, seed=0))


# ---------------------------------------------------------------------------------- what is reused


@pytest.mark.parametrize("shape", SHAPES)
def test_a_conversation_that_continues_reads_only_what_is_new(shape: str) -> None:
    engine = Engine(awake(**SHAPES[shape]))
    scheduler = Scheduler(engine)
    first = run(scheduler, wanted(20, seed=1, tokens=9))[0]
    text = some_ids(20, 1) + first.ids
    run(scheduler, wanted(9, seed=5))  # somebody else between the turns
    second = Request(tuple(text + some_ids(6, 8)), Rules(12, sampling=SAMPLING), 2)
    (asked,) = run(scheduler, second)
    assert asked.reused == len(text) - 1  # the last token was never read
    assert asked.ids == alone(engine, second)


def test_another_answer_to_the_same_prompt_comes_back_to_its_last_chunk(model: Model) -> None:
    engine = Engine(model)
    scheduler = Scheduler(engine)
    request = wanted(30, seed=1)
    first, again = run(scheduler, request)[0], run(scheduler, request)[0]
    assert again.ids == first.ids == alone(engine, request)
    assert again.reused == 28


def test_the_least_recently_used_text_is_given_up_first(model: Model) -> None:
    scheduler = Scheduler(Engine(model), n_rows=3)
    prompts = [wanted(20, seed=n, tokens=3) for n in range(5)]
    for n in (0, 1, 2, 0, 3):  # 3 takes the place of 1
        run(scheduler, prompts[n])
    assert run(scheduler, prompts[0])[0].reused > 0
    assert run(scheduler, prompts[2])[0].reused > 0
    assert run(scheduler, prompts[1])[0].reused == 0


def test_a_conversation_that_only_begins_alike_gives_up_no_text(model: Model) -> None:
    scheduler = Scheduler(Engine(model), n_rows=2)
    run(scheduler, wanted(40, seed=1, tokens=3))
    alike = Request((*some_ids(5, 1), *some_ids(9, 7)), Rules(3), 0)
    assert run(scheduler, alike)[0].reused == 0
    assert run(scheduler, wanted(40, seed=1, tokens=3))[0].reused > 30


# --------------------------------------------------------------------------------------- the scores


@torch.no_grad()
def reference_logprobs(model: Model, ids: list[int]) -> torch.Tensor:
    hidden = model(torch.tensor(ids), PackedSequences(torch.arange(len(ids)) == 0, len(ids)))
    return model.logits(hidden).log_softmax(dim=-1)


def test_scores_are_those_of_a_full_forward_pass(model: Model) -> None:
    request = wanted(23, seed=1, n_top=4, score_prompt=True)
    scheduler = Scheduler(Engine(model))
    run(scheduler, wanted(23, seed=1))  # what is scored must be read, not reused
    (asked,) = run(scheduler, request)
    ids = [*request.prompt, *asked.ids]
    expected = reference_logprobs(model, ids)
    (prompt,) = [e.scores for e in asked.events if isinstance(e, PromptScores)]
    scores = [*prompt, *(e.scored for e in asked.events if isinstance(e, Token))]
    assert len(scores) == len(ids) - 1
    for n, score in enumerate(scores):
        assert score.logprob == pytest.approx(float(expected[n, ids[n + 1]]), abs=1e-3)
        top, tokens = expected[n].topk(4)
        assert [t for t, _ in score.top] == tokens.tolist()
        assert [p for _, p in score.top] == pytest.approx(top.tolist(), abs=1e-3)


def test_a_prompt_can_be_scored_without_an_answer(model: Model) -> None:
    (asked,) = run(
        Scheduler(Engine(model)), wanted(9, seed=1, tokens=0, n_top=0, score_prompt=True)
    )
    assert asked.ids == []
    assert asked.finish == "length"
    assert len(asked.events[-2].scores) == 8


# ----------------------------------------------------------------------------------- the one thread


@pytest.fixture
def thread(model: Model):
    running: list[EngineThread] = []

    def start(load: Callable[[str], Scheduler] | None = None, **settings) -> EngineThread:
        engine = Engine(model)
        running.append(EngineThread(load or (lambda name: Scheduler(engine)), **settings))
        return running[-1]

    yield start
    for one in running:
        one.stop()


class Heard:
    """The events of one answer, from another thread."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.done = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.done.set()


def test_models_share_one_thread_and_are_loaded_when_asked_for(model: Model, thread) -> None:
    loaded, engine = [], Engine(model)

    def load(name: str) -> Scheduler:
        loaded.append((name, threading.current_thread().name))
        return Scheduler(engine)

    engines, heard = thread(load), [Heard() for _ in range(4)]
    for name, one in zip(("a", "b", "a", "b"), heard, strict=True):
        engines.submit(name, [wanted(9, seed=1)], [one])
    for one in heard:
        assert one.done.wait(60)
        assert [e.id for e in one.events if isinstance(e, Token)] == alone(
            engine, wanted(9, seed=1)
        )
    assert sorted(loaded) == [("a", "engine"), ("b", "engine")]
    assert engines.under_way == 0


def test_what_is_loaded_at_once_is_loaded_in_the_one_thread_and_its_fault_reaches_the_caller(
    model: Model, thread
) -> None:
    loaded = []

    def load(name: str) -> Scheduler:
        loaded.append((name, threading.current_thread().name))
        return Scheduler(Engine(model))

    assert list(thread(load, preload="a").schedulers) == ["a"]
    assert loaded == [("a", "engine")]

    def fail(name: str) -> Scheduler:
        raise UserError(f"{name} is damaged")

    with pytest.raises(UserError, match="a is damaged"):
        EngineThread(fail, preload="a")


def test_no_more_than_the_limit_are_taken_and_all_or_none(thread) -> None:
    engines, heard = thread(limit=3), [Heard() for _ in range(5)]
    long = wanted(4, seed=1, tokens=60)
    engines.submit("a", [long, long], heard[:2])
    with pytest.raises(Full):
        engines.submit("a", [long, long], heard[2:4])
    assert engines.under_way == 2
    (job,) = engines.submit("a", [long], heard[4:])
    job.cancel()
    assert all(one.done.wait(60) for one in heard[:2])


def test_a_model_that_cannot_be_loaded_fails_its_requests_only(thread, model: Model) -> None:
    def load(name: str) -> Scheduler:
        if name == "bad":
            raise OSError("no such file")
        return Scheduler(Engine(model))

    engines, bad, good = thread(load), Heard(), Heard()
    engines.submit("bad", [wanted(4, seed=1)], [bad])
    engines.submit("good", [wanted(4, seed=1)], [good])
    assert bad.done.wait(60)
    assert good.done.wait(60)
    assert bad.events == [Failed("bad cannot be loaded: no such file")]
    assert isinstance(good.events[-1], Finished)


def test_stopping_says_so_to_those_under_way(thread) -> None:
    engines, heard = thread(), [Heard() for _ in range(3)]
    engines.submit("a", [wanted(4, seed=1, tokens=60)] * 3, heard)
    engines.stop()
    assert all(isinstance(one.events[-1], Failed | Finished) for one in heard)

"""A pass that is recorded once and replayed says what ordinary passes say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from config import HRMConfig, ModelConfig
from hearth.decoding import scheduler as module
from hearth.decoding.engine import Engine, Rules
from hearth.decoding.graphs import cuda_graph
from hearth.decoding.scheduler import Event, Finished, Job, Request, Scheduler, Token
from hearth.decoding.slots import NextTokens, Slots
from model import Model, build_model

SHAPES = {
    "head": {},
    "dense": {"hrm": None, "pattern": "SSL"},
    "whole": {"window": None, "token_shift": False, "n_value_embeddings": 0, "bigram_rows": 70},
    "gated": {"gated_mlp": True, "exclusive_attention": False, "window": 5},
}


def awake(shape: str) -> Model:
    """A model with nothing hidden behind zeros."""
    config = ModelConfig(
        **{"vocab_size": 128, "n_layer": 3, "d_model": 32, "n_head": 4, "n_kv_head": 2},
        **{"d_ff": 48, "context": 48},
        **{
            **{"window": 6, "pattern": "SL", "n_value_embeddings": 1, "bigram_rows": 90},
            **{"hrm": HRMConfig(1, 2, 2, 1), **SHAPES[shape]},
        },
    )
    model = build_model(config, seed=0).requires_grad_(False)
    model.dtype = torch.float32
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p += (0.4 if p.dim() == 2 and p is not model.embedding else 0.1) * torch.randn(
            p.shape, generator=rng
        )
    return model


def traced(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """As a CUDA graph: the operations of one run on the tensors that it met, every number that the
    processor knew then part of them; the result is written where the first one lay.
    """
    run()  # warms up
    graph = make_fx(run)()
    result = graph()
    return lambda: result.copy_(graph()), result


def rerun(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Like `traced`, where what the processor knew does not matter."""
    result = run()
    return lambda: result.copy_(run()), result


def some_ids(n: int, seed: int) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 128, (n,), generator=rng).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_replayed_passes_say_what_ordinary_ones_do(shape: str) -> None:
    """Prompts of unlike length, beyond the windows, rows that end early and are dropped."""
    model, found = awake(shape), []
    prompts = [some_ids(n, n) for n in (3, 9, 17, 5)]
    said = Engine(model).generate(prompts, max_tokens=28)
    stops = [said[0][4], said[2][11]]
    for record in (None, traced):
        engine = Engine(model, record=record)
        answers = engine.complete(prompts, max_tokens=28, stop_ids=stops, logprobs=True)
        found.append(answers)
        assert engine._recorded is None  # the cache's memory is free again
    assert [a.ids for a in found[0]] == [a.ids for a in found[1]]
    assert len({len(a.ids) for a in found[0]}) > 1
    for ours, theirs in zip(*found, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_a_stream_records_once_and_goes_on_over_turns() -> None:
    """Also after the cache was brought back to an earlier column."""
    model, times = awake("head"), []

    def counted(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        times.append(1)
        return traced(run)

    plain, ours = Engine(model), Engine(model, record=counted)
    prompt = some_ids(6, 0)
    for turn in range(3):
        said = [list(e.stream(prompt, max_tokens=7)) for e in (plain, ours)]
        assert said[0] == said[1]
        prompt = [*prompt, *said[0][: 5 - turn], *some_ids(3, turn)]
    assert len(times) == 1


def test_weights_that_change_in_place_are_read_again() -> None:
    model = awake("dense")
    engine = Engine(model, record=traced)
    before = list(engine.stream(some_ids(6, 0), max_tokens=8))
    model.trunk[0].up.mul_(-2)
    engine.held = []  # the cache holds what the old weights made
    engine.cache.length = 0
    after = list(engine.stream(some_ids(6, 0), max_tokens=8))
    assert after == list(Engine(model).stream(some_ids(6, 0), max_tokens=8))
    assert after != before


def test_a_device_that_cannot_record_decodes_without_and_says_so(capsys) -> None:
    def fails(run: Callable[[], Tensor]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    model, prompts = awake("head"), [some_ids(4, 0), some_ids(7, 1)]
    answers = Engine(model, record=fails).generate(prompts, max_tokens=9)
    assert answers == Engine(model).generate(prompts, max_tokens=9)
    said = capsys.readouterr().out
    assert said.count("decoding    without CUDA graphs: operation not permitted") == 1


def test_a_full_cache_is_an_error_not_a_wrong_column() -> None:
    engine = Engine(awake("dense"), record=traced)
    list(engine.stream(some_ids(5, 0), max_tokens=3))
    engine.cache.length = engine.cache.capacity
    with pytest.raises(ValueError, match="48 columns are full"):
        engine.extend([1], mark=False)


# --------------------------------------------------------------------- a batch joined and left


def asked(scheduler: Scheduler, prompt: list[int], tokens: int) -> tuple[Job, list[Event]]:
    events: list[Event] = []
    job = Job(Request(tuple(prompt), Rules(tokens), seed=0, n_top=3), events.append)
    scheduler.add(job)
    return job, events


def said(events: list[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


def coming_and_going(engine: Engine) -> tuple[Scheduler, list[list[Event]]]:
    """Answers that join at different times, end, are cancelled, wait for a slot, take one that held
    a longer text, continue one that is held; and what was heard of each.
    """
    scheduler, heard = Scheduler(engine, n_rows=4), []

    def joins(prompt: list[int], tokens: int, steps: int) -> Job:
        job, events = asked(scheduler, prompt, tokens)
        heard.append(events)
        for _ in range(steps):
            scheduler.step()
        return job

    joins(some_ids(30, 1), 30, 8)  # alone, until its context is full
    joins(some_ids(3, 2), 25, 3)
    cancelled = joins(some_ids(9, 3), 30, 4)
    joins(some_ids(17, 4), 5, 4)
    joins(some_ids(5, 5), 20, 3)  # waits for a slot
    cancelled.cancel()
    joins(some_ids(4, 6), 9, 0)
    while scheduler.busy:
        scheduler.step()
    joins([*some_ids(5, 5), *said(heard[4])[:12], *some_ids(4, 9)], 12, 3)
    joins(some_ids(7, 10), 12, 0)
    while scheduler.busy:
        scheduler.step()
    return scheduler, heard


@pytest.mark.parametrize("shape", ["head", "whole"])
def test_a_running_batch_says_what_it_says_without_recording(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shape is recorded once, whoever joins or leaves afterwards."""
    monkeypatch.setattr(module, "RECORD_AFTER", 2)
    monkeypatch.setattr(module, "LEAST_READ", 32)
    model, replayed = awake(shape), []

    def counted(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        replay, result = traced(run)
        replayed.append(0)

        def again(which: int = len(replayed) - 1) -> None:
            replayed[which] += 1
            replay()

        return again, result

    _, expected = coming_and_going(Engine(model))
    scheduler, found = coming_and_going(Engine(model, record=counted))
    for ours, theirs in zip(found, expected, strict=True):
        assert said(ours) == said(theirs)
        scores = [
            [dict(e.scored.top) for e in events if isinstance(e, Token)]
            for events in (ours, theirs)
        ]
        for one, other in zip(*scores, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    assert isinstance(found[0][-1], Finished)
    n_passes = scheduler._n_passes
    assert set(scheduler._recorded) == {shape for shape, n in n_passes.items() if n > 2}
    assert sorted(replayed) == sorted(n - 2 for n in n_passes.values() if n > 2)
    # three answers are four rows; two shapes of one number of rows
    assert {(4, 48), (4, 32), (2, 32), (1, 48)} <= set(scheduler._recorded)
    assert {n_rows for n_rows, _ in n_passes} == {1, 2, 4}


def test_a_batch_that_soon_ends_is_not_recorded() -> None:
    times = []

    def counted(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        times.append(1)
        return rerun(run)

    scheduler = Scheduler(Engine(awake("dense"), record=counted))
    for tokens, wanted in ((module.RECORD_AFTER + 1, 0), (2, 1), (9, 1)):
        asked(scheduler, some_ids(5, tokens), tokens)
        while scheduler.busy:
            scheduler.step()
        assert len(times) == wanted


def test_a_batch_whose_cycles_may_end_early_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RECORD_AFTER", 0)
    scheduler = Scheduler(Engine(awake("head"), exit_kl_threshold=0.05, record=rerun))
    asked(scheduler, some_ids(5, 0), 5)
    while scheduler.busy:
        scheduler.step()
    assert scheduler._recorded == {}


def test_a_running_batch_that_cannot_be_recorded_continues_without_and_says_so_once(
    capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it fails half way, with the pass's keys and values written."""
    monkeypatch.setattr(module, "RECORD_AFTER", 2)

    def fails(run: Callable[[], Tensor]) -> None:
        run()
        if len(scheduler._recorded) == 1:
            raise RuntimeError("CUDA out of memory")
        return rerun(run)

    model, found = awake("head"), []
    for record in (None, fails):
        scheduler = Scheduler(Engine(model, record=record))
        jobs = [asked(scheduler, some_ids(n, n), 9 + n)[1] for n in (4, 7)]
        while scheduler.busy:
            scheduler.step()
        found.append([said(events) for events in jobs])
    assert found[0] == found[1]
    assert scheduler._recorded == {}  # and their memory is free
    assert capsys.readouterr().out.count("without CUDA graphs: CUDA out of memory") == 1


def test_a_token_counts_once_in_the_slots_that_a_pass_has_moved_to() -> None:
    slots = Slots(awake("dense"), 4)
    tokens = NextTokens(slots, [0, 0], n_read=16)
    tokens.advance()
    for rows in ([1, 3], [3, 3]):
        tokens.move(rows)
        tokens.advance()
    assert [cache.length for cache in slots.caches] == [1, 1, 0, 2]


def test_a_text_beyond_what_a_recorded_pass_reads_is_an_error() -> None:
    slots = Slots(awake("dense"), 2)
    tokens = NextTokens(slots, [0], n_read=16)
    slots.caches[1].length = 16
    with pytest.raises(ValueError, match="column 17 is beyond the 16 that are read"):
        tokens.move([1])


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
def test_on_a_card_a_running_batch_says_what_it_says_without_recording(
    weights: str | None, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 where the weights are; in 16 or 8 bits a near tie may fall to either side."""
    monkeypatch.setattr(module, "RECORD_AFTER", 2)
    monkeypatch.setattr(module, "LEAST_READ", 32)
    model, found = awake("head").to("cuda"), []
    for record in (True, False):
        engine = Engine(model, weights=weights)
        assert engine.record is cuda_graph
        engine.record = engine.record if record else None
        scheduler, heard = coming_and_going(engine)
        assert bool(scheduler._recorded) == record
        found.append([said(events) for events in heard])
    assert "without CUDA graphs" not in capsys.readouterr().out
    same = sum(a == b for a, b in zip(*found, strict=True))
    assert same == len(heard) if weights is None else same >= len(heard) / 2


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
def test_on_a_card_recorded_passes_say_what_ordinary_ones_do(weights: str | None, capsys) -> None:
    """In float32 where the weights are; in 16 or 8 bits a near tie may fall to either side."""
    model = awake("head").to("cuda")
    prompts, found = [some_ids(n, n) for n in (3, 9, 17, 5)], []
    for record in (True, False):
        engine = Engine(model, weights=weights)
        assert engine.record is cuda_graph
        engine.record = engine.record if record else None
        found.append(engine.generate(prompts, max_tokens=28))
    assert "without CUDA graphs" not in capsys.readouterr().out
    same = sum(a == b for a, b in zip(*found, strict=True))
    assert same == 4 if weights is None else same >= 2

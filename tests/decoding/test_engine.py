"""The engine: however the tokens are cut, cached and batched, the model says the same."""

from __future__ import annotations

import math
import random

import pytest
import torch

from config import PRESETS, HRMConfig, ModelConfig
from hearth.decoding.engine import Budget, Engine, Sampling, penalise, pick, probabilities
from hearth.decoding.kv_cache import KVCache, decode
from model import Model, PackedSequences, build_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose by sharing their work between cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Model:
    return awake()


def test_the_model_of_these_tests_has_something_to_say(model: Model) -> None:
    assert len(set(reference_answer(model, some_ids(10), 30))) > 12


HEAD = HRMConfig(l_layer=1, h_layer=2, h_cycles=2, l_cycles=1)


def awake(**changes) -> Model:
    """A model of all the parts with nothing hidden behind zeros: windows shorter than the context,
    GQA, the head.
    """
    shape = {
        "vocab_size": 128,
        "n_layer": 3,
        "d_model": 32,
        "n_head": 4,
        "n_kv_head": 2,
        "d_ff": 48,
        "gated_mlp": True,  # says more different tokens at random
        "context": 48,
    }
    config = ModelConfig(
        **{**shape, "window": 6, "pattern": "SL", "n_value_embeddings": 1, "bigram_rows": 49}
        | {"hrm": HEAD, **changes}
    )
    model = build_model(config, seed=0)
    model.dtype = torch.float32
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += (0.4 if p.dim() == 2 and p is not model.embedding else 0.1) * torch.randn(
                p.shape, generator=rng
            )
    return model


def some_ids(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(128), k=n)


@torch.no_grad()
def reference_logits(model: Model, ids: list[int], h_cycles: int | None = None) -> torch.Tensor:
    """Logits (T, V) of a full forward pass, nothing cached."""
    hidden = model(
        torch.tensor(ids), PackedSequences(torch.arange(len(ids)) == 0, len(ids)), h_cycles=h_cycles
    )
    return model.logits(hidden)


def reference_answer(
    model: Model, prompt: list[int], n: int, stop: int | None = None, **settings
) -> list[int]:
    """Greedy decoding the slow way: the whole text read again for each token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n and (len(ids) == len(prompt) or ids[-1] != stop):
        ids.append(int(reference_logits(model, ids, **settings)[-1].argmax()))
    return ids[len(prompt) :]


# -------------------------------------------------------------------------------------- same tokens


@pytest.mark.parametrize("chunk", [1, 2, 5, 6, 7, 13, 40])
def test_cached_decode_equals_full_forward_over_the_window_edge(model: Model, chunk: int) -> None:
    ids = some_ids(40)
    cache = KVCache(1, 48)
    parts = torch.tensor([ids]).split(chunk, dim=1)
    logits = torch.cat([model.logits(decode(model, part, cache)[0]) for part in parts])
    torch.testing.assert_close(logits, reference_logits(model, ids), atol=1e-3, rtol=1e-3)


def test_any_cut_into_chunks_gives_the_same_logits(model: Model) -> None:
    rng, ids = random.Random(0), some_ids(40)
    for _ in range(10):
        cache, at, logits = KVCache(1, 40), 0, []
        while at < len(ids):
            n = min(rng.choice([1, 1, 2, 3, 7, 11]), len(ids) - at)
            logits.append(model.logits(decode(model, torch.tensor([ids[at : at + n]]), cache)[0]))
            at += n
        torch.testing.assert_close(
            torch.cat(logits), reference_logits(model, ids), atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("capacity", [40, 48])
@pytest.mark.parametrize("window", [1, 6, 40, 45, None])
def test_every_window_and_capacity_agrees_with_the_full_forward(
    window: int | None, capacity: int
) -> None:
    model, ids = awake(window=window), some_ids(40)
    cache = KVCache(1, capacity)
    parts = torch.tensor([ids]).split([9, 1, 1, 14, 15], dim=1)
    logits = torch.cat([model.logits(decode(model, part, cache)[0]) for part in parts])
    torch.testing.assert_close(logits, reference_logits(model, ids), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("chunk_tokens", [4, 9, 512])
def test_ragged_batch_equals_each_prompt_alone(model: Model, chunk_tokens: int) -> None:
    prompts = [some_ids(n, seed=n) for n in (1, 17, 3, 30, 8, 8)]
    answers = Engine(model, chunk_tokens=chunk_tokens).generate(prompts, max_tokens=18)
    assert answers == [reference_answer(model, prompt, 18) for prompt in prompts]


def test_streamed_batched_and_uncached_answers_are_the_same(model: Model) -> None:
    prompts = [some_ids(n, seed=n) for n in (3, 11, 20)]
    engine = Engine(model, chunk_tokens=4)
    streamed = [list(engine.stream(prompt, max_tokens=25)) for prompt in prompts]
    assert streamed == engine.generate(prompts, max_tokens=25)
    assert streamed == [reference_answer(model, prompt, 25) for prompt in prompts]


def test_small_batches_answer_like_one_large_one(model: Model) -> None:
    prompts = [some_ids(1 + n % 7, seed=n) for n in range(20)]
    stop = reference_answer(model, prompts[0], 4)[-1]
    large = Engine(model).generate(prompts, max_tokens=12, stop_ids=[stop])
    assert large == Engine(model, max_rows=3).generate(prompts, max_tokens=12, stop_ids=[stop])


@pytest.mark.parametrize("h_cycles", [1, 3])
def test_the_number_of_cycles_reaches_the_head(model: Model, h_cycles: int) -> None:
    prompt = some_ids(9)
    engine = Engine(model, h_cycles=h_cycles)
    expected = reference_answer(model, prompt, 12, h_cycles=h_cycles)
    assert engine.generate([prompt], max_tokens=12) == [expected]
    assert list(engine.stream(prompt, max_tokens=12)) == expected
    engine.h_cycles = 2  # the cache of other cycles must not be reused
    assert list(engine.stream(prompt, max_tokens=12)) == reference_answer(
        model, prompt, 12, h_cycles=2
    )


SETTLED = 0.05  # nats: some tokens leave the cycles, others do not


@pytest.mark.parametrize("h_cycles", [None, 4])
def test_cycles_that_are_never_left_give_the_full_computation(
    model: Model, h_cycles: int | None
) -> None:
    prompt = some_ids(10)
    expected = reference_answer(model, prompt, 20, h_cycles=h_cycles)
    engine = Engine(model, h_cycles=h_cycles, exit_kl_threshold=0.0)
    assert engine.generate([prompt, prompt[2:]], max_tokens=20)[0] == expected
    stream = engine.stream(prompt, max_tokens=20)
    assert list(stream) == expected
    assert stream.n_cycles == 20 * engine.n_cycles == 20 * (h_cycles or HEAD.h_cycles)


def test_cycles_left_early_are_counted_and_rows_do_not_see_each_other(model: Model) -> None:
    prompts, settings = (
        [some_ids(n, seed=n) for n in (5, 9, 12)],
        {"h_cycles": 4, "exit_kl_threshold": SETTLED},
    )
    alone = [Engine(model, **settings).stream(prompt, max_tokens=20) for prompt in prompts]
    said = [list(stream) for stream in alone]
    assert Engine(model, **settings).generate(prompts, max_tokens=20) == said
    assert all(4 + 19 <= stream.n_cycles <= 4 * 20 for stream in alone)
    assert 4 + 19 * 3 < sum(stream.n_cycles for stream in alone) < 3 * 4 * 20
    hasty = Engine(model, h_cycles=4, exit_kl_threshold=math.inf).stream(prompts[0], max_tokens=20)
    assert len(list(hasty)) == 20
    assert hasty.n_cycles == 4 + 19  # the prompt runs all cycles


def test_another_way_to_leave_cycles_reads_the_conversation_again(model: Model) -> None:
    engine, prompt = Engine(model, exit_kl_threshold=math.inf), some_ids(10)
    answer = list(engine.stream(prompt, max_tokens=8))
    engine.exit_kl_threshold = None
    stream = engine.stream([*prompt, *answer], max_tokens=8)
    assert stream.reused == 0
    assert list(stream) == reference_answer(model, [*prompt, *answer], 8)


def test_generation_leaves_the_model_untouched(model: Model) -> None:
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.requires_grad_(True)
    Engine(model).generate([some_ids(5)], max_tokens=5)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------ rows and their ends


def test_rows_finish_apart_and_end_in_their_stop_id(model: Model) -> None:
    prompts = [some_ids(n, seed=n) for n in range(1, 13)]
    whole = [reference_answer(model, prompt, 14) for prompt in prompts]
    stop = max(range(128), key=lambda token: sum(token in answer[1:] for answer in whole))
    cut = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in whole]
    assert len({len(answer) for answer in cut}) > 2
    assert Engine(model).generate(prompts, max_tokens=14, stop_ids=[stop]) == cut


def test_samples_of_one_prompt_come_from_one_prefill(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, sampling = [some_ids(30), some_ids(20, seed=1)], Sampling(temperature=1.0)
    apart = Engine(model).generate(
        [p for p in prompts for _ in range(4)],
        max_tokens=8,
        sampling=sampling,
        seeds=range(8),
        n_samples=1,
    )
    read = []
    monkeypatch.setattr(
        "hearth.decoding.engine.decode",
        lambda m, ids, *a: read.append(ids.numel()) or decode(m, ids, *a),
    )
    together = Engine(model).generate(
        prompts, max_tokens=8, sampling=sampling, seeds=range(8), n_samples=4
    )
    assert together == apart
    assert read[0] == 2 * 30  # two rows, not eight
    assert len({tuple(answer) for answer in together}) > 4


def test_a_row_says_the_same_whatever_its_neighbours(model: Model) -> None:
    prompts, sampling = (
        [some_ids(n, seed=n) for n in (4, 9, 15)],
        Sampling(temperature=1.0, top_p=0.9),
    )
    engine = Engine(model)
    together = engine.generate(prompts, max_tokens=15, sampling=sampling, seeds=[7, 8, 9])
    shuffled = engine.generate(prompts[::-1], max_tokens=15, sampling=sampling, seeds=[9, 8, 7])
    assert shuffled == together[::-1]
    for prompt, seed, answer in zip(prompts, [7, 8, 9], together, strict=True):
        assert engine.generate([prompt], max_tokens=15, sampling=sampling, seeds=[seed]) == [answer]
        assert list(engine.stream(prompt, max_tokens=15, sampling=sampling, seed=seed)) == answer
    assert engine.generate(prompts, max_tokens=15, sampling=sampling, seeds=[1, 2, 3]) != together


def test_stop_when_is_asked_after_each_token(model: Model) -> None:
    prompt = some_ids(5)
    whole = reference_answer(model, prompt, 20)
    ends = whole[6:8]
    first = next(i for i in range(20) if whole[i : i + 2] == ends)
    stop_when = lambda answer: answer[-2:] == ends  # noqa: E731
    assert Engine(model).generate([prompt], max_tokens=20, stop_when=stop_when) == [
        whole[: first + 2]
    ]
    stream = Engine(model).stream(prompt, max_tokens=20, stop_when=stop_when)
    assert list(stream) == whole[: first + 2]
    assert stream.finish == "stop"


def test_answers_end_where_the_context_is_full(model: Model) -> None:
    prompts = [some_ids(n, seed=n) for n in (46, 48, 10)]
    answers = Engine(model).generate(prompts, max_tokens=20)
    assert [len(answer) for answer in answers] == [3, 1, 20]
    stream = Engine(model).stream(prompts[0], max_tokens=20)
    assert list(stream) == answers[0] == reference_answer(model, prompts[0], 3)
    assert stream.finish == "context"


def test_no_prompts_and_no_tokens_give_empty_answers(model: Model) -> None:
    assert Engine(model).generate([], max_tokens=5) == []
    assert Engine(model).generate([some_ids(3)], max_tokens=0) == [[]]
    assert list(Engine(model).stream(some_ids(3), max_tokens=0)) == []


@pytest.mark.parametrize("n", [0, 49])
def test_a_prompt_that_cannot_fit_is_refused(model: Model, n: int) -> None:
    with pytest.raises(ValueError, match=f"prompt of {n} tokens"):
        Engine(model).generate([some_ids(n)], max_tokens=5)
    with pytest.raises(ValueError, match=f"prompt of {n} tokens"):
        Engine(model).stream(some_ids(n), max_tokens=5)


# --------------------------------------------------------------------------------------- next turns


@pytest.mark.parametrize("chunk_tokens", [3, 512])
def test_a_longer_prompt_reads_only_what_is_new(model: Model, chunk_tokens: int) -> None:
    engine, prompt = Engine(model, chunk_tokens=chunk_tokens), some_ids(10)
    for turn in range(3):
        stream = engine.stream(prompt, max_tokens=5)
        answer = list(stream)
        assert answer == reference_answer(model, prompt, 5)
        # the last answer's last token and four new ones
        assert stream.read == (10 if turn == 0 else 5)
        prompt = [*prompt, *answer, *some_ids(4, seed=turn)]


@pytest.mark.parametrize("common", [0, 1, 8, 19, 20, 24, 27])
def test_a_prompt_that_turns_off_earlier_is_answered_as_if_fresh(model: Model, common: int) -> None:
    engine = Engine(model, chunk_tokens=8)
    prompt = some_ids(20)
    said = [*prompt, *engine.stream(prompt, max_tokens=10)]
    other = [*said[:common], *some_ids(6, seed=5)]
    assert list(engine.stream(other, max_tokens=12)) == reference_answer(model, other, 12)
    assert list(engine.stream(prompt, max_tokens=10)) == said[20:]


def test_answering_again_reads_at_most_one_chunk(model: Model) -> None:
    engine, prompt = Engine(model, chunk_tokens=8), some_ids(20)
    first = list(engine.stream(prompt, max_tokens=20))
    again = engine.stream(prompt, max_tokens=20)
    assert list(again) == first
    assert again.read <= 8


def test_random_walks_through_a_conversation_match_fresh_engines(model: Model) -> None:
    rng, engine, prompt = random.Random(3), Engine(model, chunk_tokens=5), some_ids(6)
    for step in range(30):
        n = rng.randrange(1, 8)
        if len(prompt) + n > 40 or rng.random() < 0.3:
            prompt = prompt[: rng.randrange(1, len(prompt) + 1)]
        elif rng.random() < 0.5:
            prompt = prompt + some_ids(rng.randrange(1, 6), seed=step)
        stream = engine.stream(prompt, max_tokens=n)
        said = [next(stream) for _ in range(rng.randrange(1, n + 1))]  # often left unfinished
        assert said == list(Engine(model).stream(prompt, max_tokens=len(said)))
        prompt = prompt + said


@pytest.mark.parametrize("at", [3, 12, 22, 32, 40])
@pytest.mark.parametrize("weights", [None, "float32"])
def test_an_interrupted_pass_leaves_no_trace(
    model: Model, monkeypatch: pytest.MonkeyPatch, at: int, weights: str | None
) -> None:
    """Ctrl-C in the middle of reading a prompt (the third attention call) or of a token."""
    engine, prompt, calls = Engine(model, weights=weights, chunk_tokens=8), some_ids(20), []
    slot = KVCache.slot

    def failing(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return slot(*arguments)

    monkeypatch.setattr(KVCache, "slot", failing)
    stream, said = engine.stream(prompt, max_tokens=12), []
    with pytest.raises(KeyboardInterrupt):
        list(map(said.append, stream))
    monkeypatch.undo()
    prompt += said
    again = engine.stream(prompt, max_tokens=8)
    assert list(again) == reference_answer(model, prompt, 8)


def test_an_interrupted_token_keeps_the_conversation_in_the_cache(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, prompt = Engine(model), some_ids(20)
    stream = engine.stream(prompt, max_tokens=12)
    said = [next(stream) for _ in range(4)]
    slot, calls = KVCache.slot, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return slot(*arguments)

    monkeypatch.setattr(KVCache, "slot", failing)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.undo()
    prompt = [*prompt, *said, *some_ids(3, seed=9)]
    again = engine.stream(prompt, max_tokens=10)
    assert list(again) == reference_answer(model, prompt, 10)
    assert again.read == 4  # the last token said, and the three new ones


# ------------------------------------------------------------------------------ the context is full


def test_a_full_context_drops_the_middle_and_goes_on(model: Model) -> None:
    prompt = some_ids(30)
    stream = Engine(model, chunk_tokens=7).stream(prompt, max_tokens=60, keep=4)
    answer = list(stream)
    assert len(answer) == 60
    ids, dropped = list(prompt), 0  # the same, uncached: 48 fit, the first 4 and the newest 32 stay
    for token in answer:
        if len(ids) > 48:
            dropped += len(ids) - 36
            ids = ids[:4] + ids[-32:]
        assert token == int(reference_logits(model, ids)[-1].argmax())
        ids.append(token)
    assert stream.dropped == dropped > 0
    assert stream.finish == "length"


def test_a_prompt_over_the_context_keeps_its_start_and_its_end(model: Model) -> None:
    prompt = some_ids(200)
    stream = Engine(model).stream(prompt, max_tokens=6, keep=10)
    assert list(stream) == reference_answer(model, prompt[:10] + prompt[-26:], 6)
    assert stream.dropped == 164


# --------------------------------------------------------------------------------------- the budget


def test_thinking_over_budget_is_closed(model: Model) -> None:
    prompt = some_ids(6, seed=2)
    whole = reference_answer(model, prompt, 20)
    opened, close = whole[0], 101
    assert close not in whole
    expected = [*whole[:4], close]  # the opening id and three more
    while len(expected) < 20:
        expected += reference_answer(model, prompt + expected, 1)
        if expected[-1] == opened:
            expected.append(close)  # nothing is left for a second part
    budget = Budget(tokens=3, open=opened, close=close)
    assert Engine(model).generate([prompt], max_tokens=20, budget=budget) == [expected[:20]]
    assert list(Engine(model).stream(prompt, max_tokens=20, budget=budget)) == expected[:20]


def test_an_answer_within_its_budget_is_left_alone(model: Model) -> None:
    answers = ((p, reference_answer(model, p, 8)) for p in (some_ids(6, seed=n) for n in range(99)))
    prompt, whole = next((prompt, answer) for prompt, answer in answers if len(set(answer)) == 8)
    closed_in_time = Budget(tokens=2, open=whole[1], close=whole[4])
    never_opened = Budget(tokens=0, open=next(i for i in range(128) if i not in whole), close=101)
    for budget in (closed_in_time, never_opened):
        assert Engine(model).generate([prompt], max_tokens=8, budget=budget) == [whole]
    too_late = Budget(tokens=1, open=whole[1], close=whole[4])
    assert Engine(model).generate([prompt], max_tokens=8, budget=too_late)[0][:4] == [
        *whole[:3],
        whole[4],
    ]


def test_an_answer_begins_as_it_is_told_and_goes_on_from_there(model: Model) -> None:
    prompt = some_ids(6, seed=2)
    expected = [7, 9, *reference_answer(model, [*prompt, 7, 9], 6)]
    assert Engine(model).generate([prompt], max_tokens=8, begin=[7, 9]) == [expected]
    assert list(Engine(model).stream(prompt, max_tokens=8, begin=[7, 9])) == expected
    budget = Budget(tokens=2, open=7, close=101)  # counts from a beginning that was given
    assert Engine(model).generate([prompt], max_tokens=4, begin=[7], budget=budget)[0][3] == 101


# ----------------------------------------------------------------------------------------- sampling


def test_repetition_penalty_lowers_what_was_said_whatever_its_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0, 3.0]])
    out = penalise(logits, [[0, 1, 1, 4]], 2.0, frozenset([4]))
    assert out.tolist() == [[1.0, -4.0, 1.0, -1.0, 3.0]]
    assert logits.tolist() == [[2.0, -2.0, 1.0, -1.0, 3.0]]


def test_repetition_penalty_never_touches_the_stop_id(model: Model) -> None:
    prompt = some_ids(5)
    stop = reference_answer(model, prompt, 1)[0]
    sampling = Sampling(repetition_penalty=1e6)
    assert Engine(model).generate([[stop, *prompt]], max_tokens=1, sampling=sampling) != [[stop]]
    prompt = [stop, *prompt]
    expected = reference_answer(model, prompt, 1)
    answer = Engine(model).generate(
        [prompt], max_tokens=1, sampling=sampling, stop_ids=[expected[0], stop]
    )
    assert answer[0] in ([stop], expected)


def plain_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The definition, one token after another, for logits (V,)."""
    p = (logits / sampling.temperature).softmax(dim=-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[: sampling.top_k]
    if sampling.min_p is not None:
        kept = [i for i in kept if p[i] >= sampling.min_p * p[order[0]]]
    if sampling.top_p is not None:
        total, sum_before, chosen = sum(p[i] for i in kept), 0.0, []
        for i in kept:
            if chosen and sum_before >= sampling.top_p * total:
                break
            chosen.append(i)
            sum_before += p[i]
        kept = chosen
    out = torch.zeros(len(p))
    out[kept] = torch.tensor([p[i] for i in kept])
    return out / out.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 50.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 5000])
@pytest.mark.parametrize("top_p", [None, 0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.05, 1.0])
def test_probabilities_follow_their_definition(temperature, top_k, top_p, min_p) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p)
    logits = 3 * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    p, token = probabilities(logits, sampling)
    spread = torch.zeros_like(logits).scatter(1, token, p)
    expected = torch.stack([plain_probabilities(row, sampling) for row in logits])
    torch.testing.assert_close(spread, expected, atol=1e-5, rtol=1e-3)


def test_what_excludes_no_token_is_as_if_it_were_not_said() -> None:
    """And costs as little: a vocabulary is not sorted for it."""
    assert Sampling(1.0, top_p=1.0, min_p=0.0) == Sampling(1.0)
    assert Sampling(1.0, top_p=1, min_p=0).top_p is None


def test_dice_pick_tokens_by_their_probability() -> None:
    p = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).expand(4001, 4)
    rng = torch.linspace(0, 1 - 1e-12, 4001, dtype=torch.float64)
    share = torch.bincount(pick(p, rng), minlength=4) / 4001
    torch.testing.assert_close(share, p[0], atol=1e-3, rtol=0)


def test_temperature_zero_takes_the_likeliest(model: Model) -> None:
    prompt = some_ids(7)
    cold = Engine(model).generate(
        [prompt], max_tokens=10, sampling=Sampling(temperature=1e-4, top_p=0.9)
    )
    assert cold == Engine(model).generate([prompt], max_tokens=10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
    ],
)
def test_impossible_sampling_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


# ------------------------------------------------------------------------------------------- memory


def test_cache_memory_is_what_the_engine_states(model: Model) -> None:
    engine = Engine(model)
    list(engine.stream(some_ids(20), max_tokens=2))
    assert engine.cache_bytes() == engine.cache.n_bytes()


def test_rings_halve_the_cache_of_the_full_size_model() -> None:
    config = PRESETS["16gb"].model
    with torch.device("meta"):
        model = Model(config)
    per_column = 2 * config.n_kv_head * config.head_dim * model.dtype.itemsize
    assert (
        Engine(model).cache_bytes() < 0.5 * len(model.block_passes()) * config.context * per_column
    )

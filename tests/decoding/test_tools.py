"""Tools: each call gets its result, in `stream`, in `generate` and in the scheduler."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence

import pytest
import torch

from config import HRMConfig, ModelConfig
from hearth.data.chat_format import Call, last_call, parse_answer, result_ids
from hearth.data.tokenizer import Tokenizer
from hearth.decoding import scheduler as scheduler_module
from hearth.decoding.engine import Completion, Engine, Rules, Sampling, pick, probabilities
from hearth.decoding.scheduler import Event, Finished, Job, Request, Scheduler, Token
from hearth.decoding.tools import Tools
from model import Model, PackedSequences, build_model

SAMPLING = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.05)
CHUNK = 7


class AnyTool(dict):
    """Functions of whatever name: each says its arguments backwards."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str):
        return lambda text: text[::-1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "CHUNK_TOKENS", CHUNK)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on 12 mats: calculate"] * 20, 384)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    return Engine(caller(tokenizer), tokenizer=tokenizer, chunk_tokens=CHUNK)


def caller(tokenizer: Tokenizer) -> Model:
    """A random model that often begins a call and often closes it."""
    head = HRMConfig(l_layer=1, h_layer=1, h_cycles=2, l_cycles=1)
    shape = {"vocab_size": 384, "n_layer": 2, "d_model": 32, "n_head": 4, "n_kv_head": 2}
    shape |= {"d_ff": 48, "context": 128, "window": 6, "pattern": "SL", "hrm": head}
    model = build_model(ModelConfig(**shape), seed=0)
    model.dtype = torch.float64  # so that no draw hangs on a rounding
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=rng)
    logits = model.logits

    def pushed(hidden: torch.Tensor) -> torch.Tensor:
        found = logits(hidden)
        found[:, [tokenizer.tool_call, tokenizer.end_tool_call]] += (
            found.amax(dim=-1, keepdim=True) + 2
        )
        return found

    model.logits = pushed
    return model


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    texts = ["the cat", "sat on 12 mats", "the " * 12, "12", "cat: " * 5, "on", "mats", "calculate"]
    return [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]


@torch.no_grad()
def reference(engine: Engine, prompt: Sequence[int], seed: int, tools: Tools, n: int) -> Completion:
    """The slow way: the whole text is read again for each token that is drawn."""
    rng = torch.rand(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rolls = iter(rng.tolist())
    ids, forced, logprobs, due, n_calls = [], [], [], [], 0
    while len(ids) < n:
        text = [*prompt, *ids]
        edges = PackedSequences(torch.arange(len(text)) == 0, len(text))
        logits = engine.model.logits(engine.model(torch.tensor(text), edges))[-1:]
        if due:
            ids.append(due.pop(0))
            forced.append(True)
            logprobs.append(0.0)
            continue
        p, token = probabilities(penalised(logits, text), SAMPLING)
        place = pick(p, torch.tensor([next(rolls)], dtype=torch.float64))
        ids.append(int(token[0, place]))
        forced.append(False)
        logprobs.append(float(logits.log_softmax(dim=-1)[0, ids[-1]]))
        if (call := last_call(ids, engine.tokenizer)) is not None:
            n_calls += 1
            due = result_ids(tools.result(call, n_calls), engine.tokenizer)
    return Completion(ids, forced, logprobs)


def penalised(logits: torch.Tensor, text: list[int]) -> torch.Tensor:
    logits = logits.clone()
    for token in set(text):
        value = logits[0, token]
        penalty = SAMPLING.repetition_penalty
        logits[0, token] = value / penalty if value > 0 else value * penalty
    return logits


def run(scheduler: Scheduler, *requests: Request, stagger: int = 0) -> list[list[Event]]:
    heard: list[list[Event]] = []
    for request in requests:
        heard.append([])
        scheduler.add(Job(request, heard[-1].append))
        for _ in range(stagger):
            scheduler.step()
    while scheduler.busy:
        scheduler.step()
    return heard


def tokens(events: Sequence[Event]) -> list[Token]:
    return [event for event in events if isinstance(event, Token)]


# ------------------------------------------------------------------------------------- the same ids


def test_stream_generate_and_scheduler_answer_as_the_reference(engine: Engine) -> None:
    asked, n = prompts(engine.tokenizer), 60
    tools = Tools(AnyTool(), most=2)
    settings = {"max_tokens": n, "sampling": SAMPLING, "tools": tools}
    expected = [reference(engine, prompt, seed, tools, n) for seed, prompt in enumerate(asked)]
    calls = [engine.tokenizer.decode(answer.ids).count("<|tool_result|>") for answer in expected]
    assert sum(calls) > 7
    assert max(calls) > 2  # too many too

    completions = engine.complete(asked, logprobs=True, **settings)
    for ours, theirs in zip(completions, expected, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-6)

    for seed, prompt in enumerate(asked):
        stream = engine.stream(prompt, seed=seed, **settings)
        assert list(stream) == expected[seed].ids
        assert stream.forced == expected[seed].forced

    rules = Rules(n, sampling=SAMPLING, tools=tools)
    requests = [Request(tuple(ids), rules, seed, n_top=2) for seed, ids in enumerate(asked)]
    for stagger in (0, 3):
        heard = run(Scheduler(engine), *requests, stagger=stagger)
        for request, events, theirs in zip(requests, heard, expected, strict=True):
            said = tokens(events)
            assert [token.id for token in said] == theirs.ids
            assert [token.forced for token in said] == theirs.forced
            assert [token.scored.logprob for token in said] == pytest.approx(
                theirs.logprobs, abs=1e-6
            )
            (alone,) = run(Scheduler(engine), request)
            assert [token.id for token in tokens(alone)] == theirs.ids


def test_a_results_ids_are_those_that_are_marked(engine: Engine) -> None:
    answers = engine.complete(
        prompts(engine.tokenizer), max_tokens=100, sampling=SAMPLING, tools=AnyTool()
    )
    for answer in answers:
        t, inside = engine.tokenizer, False
        for n, (token, forced) in enumerate(zip(answer.ids, answer.forced, strict=True)):
            closes_call = n and last_call(answer.ids[:n], t) is not None
            inside = inside or closes_call
            assert forced == inside
            assert not closes_call or token == t.tool_result
            inside = inside and token != t.end_tool_call
        for part in parse_answer(answer.ids, t).parts[:-1]:
            if "tool" in part:
                assert part["result"] in (part["arguments"][::-1], "error: no more calls")


# ------------------------------------------------------------------- what a call's result is


def begun(tokenizer: Tokenizer, text: str) -> list[int]:
    """A call as a model writes it."""
    return [tokenizer.tool_call, *tokenizer.encode(text), tokenizer.end_tool_call]


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("calculate 12*(3+4)", "84"),
        ("calculate 1/0", "error: division by zero"),
        ("calculate x", "error: not an expression"),
        ("calculate", "error: not an expression"),
        ('calculate count("t", "cat")', "1"),
        ("search cats", "error: no such tool"),
        ("", "error: no such tool"),
    ],
)
def test_a_call_gets_its_result_or_a_short_error(engine: Engine, call: str, result: str) -> None:
    t = engine.tokenizer
    ids = begun(t, call)
    expected = [*ids, *result_ids(result, t)]
    settings = {"max_tokens": len(expected) + 3, "begin": ids, "tools": Tools()}
    (answer,) = engine.generate([[t.bos]], **settings)
    assert answer[: len(expected)] == expected
    assert list(engine.stream([t.bos], **settings)) == answer


def test_a_call_while_thinking_is_none(engine: Engine) -> None:
    t = engine.tokenizer
    ids = [t.think, *begun(t, "calculate 1+1")]
    answer = engine.complete([[t.bos]], max_tokens=len(ids) + 4, begin=ids, tools=Tools())[0]
    assert answer.forced == [True] * len(ids) + [False] * 4


def test_without_tools_a_call_stays_without_result(engine: Engine) -> None:
    t = engine.tokenizer
    ids = begun(t, "calculate 1+1")
    answer = engine.complete([[t.bos]], max_tokens=len(ids) + 4, begin=ids)[0]
    assert answer.forced == [True] * len(ids) + [False] * 4


def test_a_call_of_another_ones_function_ends_the_answer(engine: Engine) -> None:
    t = engine.tokenizer
    tools = Tools(handed_back=frozenset(["weather"]))
    ids = begun(t, 'weather {"in": "Rome"}')
    for n in (len(ids), 50):  # also where it is the last that the answer may have
        stream = engine.stream([t.bos], max_tokens=n, begin=ids, tools=tools)
        assert list(stream) == ids
        assert stream.finish == "call"
        rules = Rules(n, begin=tuple(ids), tools=tools)
        (events,) = run(Scheduler(engine), Request((t.bos,), rules, 0))
        assert [token.id for token in tokens(events)] == ids
        assert events[-1] == Finished("call")


def test_forced_ids_count_towards_the_longest_answer(engine: Engine) -> None:
    t = engine.tokenizer
    ids = begun(t, "calculate 123456*1000")
    whole = [*ids, *result_ids("123456000", t)]
    for n in range(len(ids), len(whole) + 1):
        settings = {"max_tokens": n, "begin": ids, "tools": Tools()}
        assert engine.generate([[t.bos]], **settings) == [whole[:n]]
        stream = engine.stream([t.bos], **settings)
        assert list(stream) == whole[:n]
        assert stream.finish == "length"


@pytest.mark.parametrize("n_result", [1, 4, 5, 6, 7, 12, 13])
def test_a_result_of_any_length_is_read_whole(engine: Engine, n_result: int) -> None:
    """In the scheduler it is read in chunks, the last of which may be a single token."""
    t = engine.tokenizer
    tools = {"f": lambda _: "x" * (n_result - 1)}
    ids = begun(t, "f")
    settings = {"max_tokens": 45, "begin": ids, "tools": tools, "sampling": SAMPLING, "seed": 3}
    expected = list(engine.stream([t.bos], **settings))
    rules = Rules(45, sampling=SAMPLING, begin=tuple(ids), tools=Tools(tools))
    other = Request(tuple(prompts(t)[2]), Rules(45, sampling=SAMPLING), 1)
    heard = run(Scheduler(engine), Request((t.bos,), rules, 3), other)
    assert [token.id for token in tokens(heard[0])] == expected
    assert [token.id for token in tokens(heard[1])] == list(
        engine.stream(other.prompt, max_tokens=45, sampling=SAMPLING, seed=1)
    )


def test_an_answer_with_calls_ends_where_the_context_is_full(engine: Engine) -> None:
    t = engine.tokenizer
    ids = begun(t, "calculate 1+1")
    whole = [*ids, *result_ids("2", t)]
    for n_prompt in (128 - len(whole), 128 - len(ids) - 1, 128 - len(ids)):
        prompt = [t.bos] * n_prompt
        settings = {"max_tokens": 99, "begin": ids, "tools": Tools()}
        stream = engine.stream(prompt, **settings)
        said = list(stream)
        assert stream.finish == "context"
        assert len(prompt) + len(said) == 129
        assert engine.generate([prompt], **settings) == [said]
        rules = Rules(99, begin=tuple(ids), tools=Tools())
        (events,) = run(Scheduler(engine), Request(tuple(prompt), rules, 0))
        assert [token.id for token in tokens(events)] == said


def test_a_conversation_with_calls_reuses_its_cache(engine: Engine) -> None:
    """The window's ring has wrapped by then: only a text that goes on is held."""
    t = engine.tokenizer
    ids, prompt = begun(t, "calculate 1+1"), prompts(t)[2]
    settings = {"max_tokens": 30, "begin": ids, "tools": Tools(), "sampling": SAMPLING}
    said = list(engine.stream(prompt, **settings))
    second = [*prompt, *said, t.user, t.assistant]
    assert engine.stream(second, **settings).reused == len(prompt) + len(said) - 1

    scheduler = Scheduler(engine)
    rules = Rules(30, sampling=SAMPLING, begin=tuple(ids), tools=Tools())
    run(scheduler, Request(tuple(prompt), rules, 0))
    (events,) = run(scheduler, Request(tuple(second), rules, 0))
    assert events[0].n_reused == len(prompt) + len(said) - 1


def test_where_the_window_moves_results_still_come(engine: Engine) -> None:
    t = engine.tokenizer
    ids = begun(t, "calculate 1+1")
    stream = engine.stream([t.bos] * 120, max_tokens=60, begin=ids, tools=Tools(), keep=4)
    said = list(stream)
    assert said[: len(ids) + 3] == [*ids, *result_ids("2", t)]
    assert len(said) == 60
    assert stream.dropped > 0


def test_tools_need_a_tokenizer_that_reads_calls(engine: Engine) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(engine.model).generate([[0]], max_tokens=3, tools=Tools())


def test_rules_with_tools_can_be_sent_to_another_process() -> None:
    rules = Rules(3, tools=Tools(most=2, handed_back=frozenset("f")))
    assert pickle.loads(pickle.dumps(rules)) == rules
    assert rules.tools.result(Call("calculate", "1+1"), 2) == "2"
    assert rules.tools.result(Call("calculate", "1+1"), 3) == "error: no more calls"

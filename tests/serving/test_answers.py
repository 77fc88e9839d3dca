"""Answers with tools: the calculator marked in the content, a client's functions handed over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import chat_server
import openai
import pytest
import torch
from chat_server import real_engines, serve, write_checkpoint

from hearth.data.chat_format import Part, last_call, render, render_turn, tools_prompt
from hearth.data.tokenizer import Tokenizer
from hearth.decoding import scheduler as scheduler_module
from hearth.decoding.scheduler import Scored, Token
from hearth.serving.answers import AnswerText
from hearth.serving.requests import ChatRequest, Refused, Served, chat_prompt, chat_rules, read

CONFIG = replace(
    chat_server.CONFIG,
    model=replace(chat_server.CONFIG.model, context=1024),
    chat=replace(chat_server.CONFIG.chat, max_tokens=80),
)
HELLO = [{"role": "user", "content": "what is 12*7?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "how it is outside",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SUM = {"tool": "calculate", "arguments": "12*7", "result": "84"}
RAIN = {"tool": "weather", "arguments": '{"city": "Oslo"}'}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_checkpoint(tmp_path_factory.mktemp("run"), "sft2", CONFIG)


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    return chat_server.describe("demo", folder, CONFIG)


@pytest.fixture(scope="module")
def client(folder: Path, served: Served) -> Iterator[openai.OpenAI]:
    engines = real_engines({"demo": folder})
    with (
        serve(engines, [served]) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made
    engines.stop()


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, served: Served) -> Callable[..., None]:
    """Let the model, whose weights are random, draw the tokens of this turn; where a result has to
    be forced it would end its answer.
    """

    def script(*parts: Part) -> None:
        t = served.tokenizer
        ids = render_turn({"role": "assistant", "content": list(parts)}, t).ids[1:]
        drawn, forced = [], False
        for n, token in enumerate(ids):
            forced = forced or (token == t.tool_result and last_call(ids[:n], t) is not None)
            drawn.append(t.end if forced else token)
            forced = forced and token != t.end_tool_call
        monkeypatch.setattr(
            scheduler_module,
            "draw",
            lambda logits, rows, rules: [drawn[len(row.answer)] for row in rows],
        )

    return script


def ask(client: openai.OpenAI, messages: Sequence[Any] = HELLO, **settings: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=list(messages), **settings)


# -------------------------------------------------------------------------------- the calculator


def test_the_calculators_call_is_marked_in_the_content(client: openai.OpenAI, says) -> None:
    says({"text": "It is "}, SUM, {"text": " cats."})
    answer = ask(client, logprobs=True, top_logprobs=2).choices[0]
    assert answer.message.content == "It is ⟦calculate 12*7 → 84⟧ cats."
    assert answer.finish_reason == "stop"
    assert not answer.message.tool_calls
    tokens = answer.logprobs.content
    assert "".join(token.token for token in tokens) == answer.message.content
    assert bytes(b for token in tokens for b in token.bytes).decode() == answer.message.content
    assert tokens[-len(" cats.") - 1].logprob == 0  # forced: it was certain

    chunks = list(ask(client, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.message.content


def test_a_second_turn_finds_the_call_in_the_cache(
    client: openai.OpenAI, says, served: Served
) -> None:
    says({"text": "It is "}, SUM, {"text": " cats."})
    first = ask(client, [{"role": "user", "content": "the second turn"}])
    said = {"role": "assistant", "content": first.choices[0].message.content}
    says({"text": "yes"})
    messages = [{"role": "user", "content": "the second turn"}, said, *HELLO]
    second = ask(client, messages)
    held = first.usage.prompt_tokens + first.usage.completion_tokens - 1  # the last was not read
    assert second.usage.prompt_tokens_details.cached_tokens == held
    ids = chat_prompt(read(ChatRequest, {"messages": messages}), served)
    content = [{"text": "It is "}, SUM, {"text": " cats."}]
    assert (
        ids
        == render(
            [messages[0], {"role": "assistant", "content": content}, *HELLO],
            served.tokenizer,
            answer=True,
        ).ids
    )


def test_a_chat_without_calculator_leaves_calls_alone(served: Served) -> None:
    off = replace(served, chat=replace(served.chat, tool_calls=0))
    request = read(ChatRequest, {"messages": HELLO})
    assert chat_rules(request, off, 9).tools is None
    assert chat_rules(request, served, 9).tools.most == 8
    assert chat_rules(request, replace(served, stage="base"), 9).tools is None
    offered = read(ChatRequest, {"messages": HELLO, "tools": [WEATHER]})
    assert chat_rules(offered, off, 9).tools.functions == {}


# ------------------------------------------------------------------------- functions of a client


def test_a_clients_function_is_called_and_its_result_read(
    client: openai.OpenAI, says, served: Served
) -> None:
    says({"text": "I look."}, RAIN)
    first = ask(client, tools=[WEATHER], tool_choice="auto")
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}

    says({"text": " It rains."})
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    messages = [*HELLO, choice.message, result]
    second = ask(client, messages, tools=[WEATHER])
    assert second.choices[0].message.content == " It rains."
    assert second.choices[0].finish_reason == "stop"
    held = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens == held

    body = {"messages": [*HELLO, choice.message.model_dump(), result], "tools": [WEATHER]}
    told = {"role": "system", "content": tools_prompt([WEATHER])}
    turn = {"role": "assistant", "content": [{"text": "I look."}, RAIN | {"result": "rain"}]}
    ids = chat_prompt(read(ChatRequest, body), served)
    assert ids == render([told, *HELLO, turn], served.tokenizer).ids[:-1]


def test_a_call_is_streamed_as_the_official_client_expects(client: openai.OpenAI, says) -> None:
    says(RAIN)
    whole = ask(client, tools=[WEATHER]).choices[0].message
    assert whole.content is None
    with client.chat.completions.stream(model="demo", messages=HELLO, tools=[WEATHER]) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    (call,) = final.message.tool_calls
    assert call.function.name == "weather"
    assert call.function.arguments == RAIN["arguments"]
    chunks = [chunk.choices[0] for chunk in ask(client, tools=[WEATHER], stream=True)]
    (delta,) = [choice.delta.tool_calls for choice in chunks if choice.delta.tool_calls]
    assert (delta[0].index, delta[0].function.name) == (0, "weather")
    assert [choice.finish_reason for choice in chunks][-1] == "tool_calls"


def test_a_client_may_hold_results_of_several_calls(served: Served) -> None:
    calls = [
        {"id": name, "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        for name in "ab"
    ]
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in "ba"]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    ids = chat_prompt(read(ChatRequest, {"messages": [*HELLO, asked, *results]}), served)
    parts = [{"tool": "weather", "arguments": "{}", "result": name} for name in "ab"]
    turn = {"role": "assistant", "content": parts}
    assert ids == render([*HELLO, turn], served.tokenizer).ids[:-1]


def test_the_calculator_works_beside_a_clients_functions(client: openai.OpenAI, says) -> None:
    says(SUM, RAIN)
    message = ask(client, tools=[WEATHER]).choices[0].message
    assert message.content == "⟦calculate 12*7 → 84⟧"
    assert message.tool_calls[0].function.name == "weather"


def test_a_choice_of_tool_is_obeyed(served: Served) -> None:
    t = served.tokenizer

    def asked(choice: Any) -> tuple[list[int], tuple[int, ...], frozenset[str]]:
        body = {"messages": HELLO, "tools": [WEATHER], "tool_choice": choice}
        request = read(ChatRequest, body)
        rules = chat_rules(request, served, 9)
        return chat_prompt(request, served), rules.begin, rules.tools.handed_back

    plain = render(HELLO, t, answer=True).ids
    told = render(HELLO, t, answer=True, tools=[WEATHER]).ids
    assert asked("none") == (plain, (), frozenset())
    assert asked("auto") == (told, (), {"weather"})
    assert asked("required") == (told, (t.tool_call,), {"weather"})
    named = {"type": "function", "function": {"name": "weather"}}
    assert asked(named) == (told, (t.tool_call, *t.encode("weather")), {"weather"})


def test_a_base_model_calls_no_functions(served: Served) -> None:
    request = read(ChatRequest, {"messages": HELLO, "tools": [WEATHER]})
    with pytest.raises(Refused, match="base model"):
        chat_prompt(request, replace(served, stage="base"))


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": "a"}, "messages"),
        ({"role": "tool", "content": None, "tool_call_id": "a"}, "messages[0].content"),
        ({"role": "user", "content": "", "tool_calls": [{"id": "a"}]}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": {"id": "a"}}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": ["a"]}, "messages[0].tool_calls"),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
            "messages[0].tool_calls.function.arguments",
        ),
    ],
)
def test_a_bad_message_is_refused_by_name(served: Served, message: dict, param: str) -> None:
    with pytest.raises(Refused) as refused:
        chat_prompt(read(ChatRequest, {"messages": [message, *HELLO]}), served)
    assert refused.value.param.startswith(param)


# ---------------------------------------------------------------------- the text out of the tokens


def spoken(t: Tokenizer, ids: list[int], **settings: Any) -> tuple[str, list[str]]:
    """Content, and the functions called, however the answer ends."""
    answer = AnswerText(t, **settings)
    pieces = [p for i in ids for p in answer.add(Token(i, 1, Scored(-1.0, ())))] + answer.end()
    parts = [part for piece in pieces if piece.call is None for part in piece.parts]
    text = "".join(part.text for part in parts)
    assert b"".join(part.data for part in parts).decode(errors="replace") == text
    return text, [piece.call.tool for piece in pieces if piece.call is not None]


def test_a_call_cut_off_anywhere_is_marked_as_far_as_it_came(served: Served) -> None:
    t = served.tokenizer
    turn = {"role": "assistant", "content": [{"text": "a"}, SUM, {"text": "b"}]}
    ids = render_turn(turn, t).ids[1:-1]
    whole = "a⟦calculate 12*7 → 84⟧b"
    for n in range(len(ids) + 1):
        text, _ = spoken(t, ids[:n])
        assert whole.startswith(text.removesuffix("⟧"))
        assert text.count("⟦") == text.count("⟧")


def test_a_call_without_result_ends_where_something_else_begins(served: Served) -> None:
    t = served.tokenizer
    call = [t.tool_call, *t.encode("calculate 1+1"), t.end_tool_call]
    assert spoken(t, [*call, *t.encode("so")])[0] == "⟦calculate 1+1⟧so"
    assert spoken(t, [*call, *call])[0] == "⟦calculate 1+1⟧⟦calculate 1+1⟧"
    broken = [t.tool_call, t.byte_id(0xF0), t.end_tool_call]
    assert spoken(t, [*broken, t.tool_result, t.end_tool_call])[0] == "⟦\ufffd → ⟧"


def test_a_stop_is_looked_for_in_text_alone(served: Served) -> None:
    t = served.tokenizer
    turn = {"role": "assistant", "content": [{"text": "a12"}, SUM, {"text": "cat sat"}]}
    ids = render_turn(turn, t).ids[1:-1]
    text, _ = spoken(t, ids, stops=("12⟦", "12*7", "84", " sat"))
    assert text == "a12⟦calculate 12*7 → 84⟧cat"


def test_only_a_clients_own_function_is_handed_back(served: Served) -> None:
    t = served.tokenizer
    ids = render_turn({"role": "assistant", "content": [SUM, RAIN]}, t).ids[1:-1]
    assert spoken(t, ids, functions=frozenset(["weather"])) == (
        "⟦calculate 12*7 → 84⟧",
        ["weather"],
    )

"""What a client asks for: JSON of the OpenAI API → checked dataclasses → prompts as ids.

In: a request's parsed body. Out: `ChatRequest` or `CompletionRequest`, or `Refused` with the reason
in the client's words. Unknown fields are ignored; what cannot be done is refused, not ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

from config import REASONING_PROMPT, ChatConfig
from hearth.data.chat_format import Message, render, render_turn, stop_ids
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Budget, Rules, Sampling
from hearth.decoding.tools import chat_tools
from hearth.run import THINKING
from hearth.serving.marks import marked, unmarked

CHOICES = 8  # answers to one prompt
STOPS, STOP_CHARS = 4, 1000  # texts that end an answer, and how long each may be
TOP = 20  # alternatives reported a token
FUNCTIONS = 128  # of a client's, in one request
PROMPTS = 64  # prompts times answers of one completion request
# tokens of reasoning; None is as long as it likes
EFFORTS: dict[str, int | None] = {"low": 256, "medium": 1024, "high": None}
NO_EFFORT = ("none", "minimal")


class Refused(Exception):
    """A request that is answered with an error in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Served:
    """A checkpoint as clients see it."""

    name: str  # as in /v1/models
    stage: str  # of run.TRAINED
    step: int
    tokenizer: Tokenizer
    context: int  # tokens
    chat: ChatConfig  # what holds where a request says nothing

    @property
    def is_base(self) -> bool:
        return self.stage == "base"


# -------------------------------------------------------------------------------- reading one field


def _refuse(name: str, found: Any, must: str) -> Refused:
    shown = found if isinstance(found, bool | int | float) else type(found).__name__
    return Refused(400, f"{name} is {str(shown)[:40]}, must be {must}", param=name)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _refuse(name, value, "text")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "true or false")
    return value


def _whole(low: int, high: int, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _refuse(name, value, f"a whole number from {low} to {high}")
    return value


def _number(low: float, high: float, name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise _refuse(name, value, f"a number from {low:g} to {high:g}")
    return float(value)


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refuse(name, value, "an object")
    return value


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > STOPS:
        raise _refuse(name, value, f"a text or a list of up to {STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= STOP_CHARS:
            raise _refuse(name, stop, f"texts of 1 to {STOP_CHARS} characters")
    return tuple(stops)


def _nothing(name: str, value: Any) -> None:
    """For what this server cannot do: only values that ask for nothing pass."""
    if value not in (0, False, "", [], {}):
        raise Refused(400, f"{name} is not supported here", param=name, code="unsupported")


def _one_answer(name: str, value: Any) -> None:
    if value != 1 or isinstance(value, bool):
        raise Refused(400, f"{name} is not supported here", param=name, code="unsupported")


def _plain_text(name: str, value: Any) -> None:
    if _object(name, value).get("type", "text") != "text":
        raise Refused(
            400, f"{name}: only the type text is supported here", param=name, code="unsupported"
        )


def _effort(name: str, value: Any) -> str:
    known = [*NO_EFFORT, *EFFORTS]
    if value not in known:
        raise _refuse(name, value, f"one of {', '.join(known)}")
    return value


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _refuse(name, value, "a list of at least one message")
    return tuple(_message(f"{name}[{n}]", message) for n, message in enumerate(value))


def _message(name: str, value: Any) -> Message:
    """A message as `chat_format` has it; of both spellings of reasoning, and of <think> in a
    content, the first that is there counts.
    """
    message = _object(name, value)
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant", "tool"):
        raise _refuse(f"{name}.role", role, "system, developer, user, assistant or tool")
    content = _content(f"{name}.content", message.get("content"), role)
    if role == "tool":
        answers = _text(f"{name}.tool_call_id", message.get("tool_call_id"))
        return {"role": role, "content": content, "tool_call_id": answers}
    calls = _calls(f"{name}.tool_calls", message.get("tool_calls") or [])
    if calls and role != "assistant":
        raise Refused(400, f"{name}: only the assistant has tool_calls", param=name)
    thinking = None
    if role == "assistant":
        given = (message.get(key) for key in ("reasoning", "reasoning_content"))
        thinking = next((_text(f"{name}.reasoning", text) for text in given if text), None)
        before, opened, rest = content.partition("<think>")
        inside, closed, after = rest.partition("</think>")
        if opened and closed and not before.strip():
            thinking, content = thinking or inside.strip(), after.lstrip("\n")
        content = unmarked(content)
    return {"role": role, "content": content, "thinking": thinking, "tool_calls": calls}


def _calls(name: str, value: Any) -> list[dict[str, Any]]:
    """The calls of an assistant's message, each with its id."""
    if not isinstance(value, list):
        raise _refuse(name, value, "a list of calls")
    calls = []
    for call in value:
        function = _object(f"{name}.function", _object(name, call).get("function"))
        said = {
            "name": _name(f"{name}.function.name", function.get("name")),
            "arguments": _text(f"{name}.function.arguments", function.get("arguments")),
        }
        calls.append({"id": _text(f"{name}.id", call.get("id")), "function": said})
    return calls


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.-]{1,64}", value, re.ASCII):
        raise _refuse(name, value, "1 to 64 letters, digits, dots, underscores and dashes")
    return value


def _functions(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    """The functions that a client offers."""
    if not isinstance(value, list) or len(value) > FUNCTIONS:
        raise _refuse(name, value, f"a list of at most {FUNCTIONS} functions")
    for tool in value:
        if _object(name, tool).get("type") != "function":
            raise Refused(400, f"{name}: only the type function is supported here", param=name)
        function = _object(f"{name}.function", tool.get("function"))
        _name(f"{name}.function.name", function.get("name"))
    return tuple(value)


def _choice(name: str, value: Any) -> str | dict[str, Any]:
    """none, auto, required, or the name of a function, in OpenAI's shape."""
    if isinstance(value, dict):
        function = _object(f"{name}.function", value.get("function"))
        return {"name": _name(f"{name}.function.name", function.get("name"))}
    if value not in ("none", "auto", "required"):
        raise _refuse(name, value, "none, auto, required or a function")
    return value


def _content(name: str, value: Any, role: str) -> str:
    if value is None and role == "assistant":
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _refuse(name, value, "text or a list of text parts")
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise Refused(400, f"{name}: only parts of type text can be read", param=name)
        parts.append(_text(f"{name}.text", part.get("text")))
    return "".join(parts)


def _prompts(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Text, ids, or a list of either."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise _refuse(name, value, "text, ids, or a list of either, and not empty")
    if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return (tuple(value),)
    for item in value:
        ids = isinstance(item, list) and item and all(type(i) is int for i in item)
        if not isinstance(item, str) and not ids:
            raise _refuse(name, value, "text, ids, or a list of either, and not empty")
    return tuple(item if isinstance(item, str) else tuple(item) for item in value)


# ----------------------------------------------------------------------------------------- requests


def by(check: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Of a field that `check` reads; absent or null is the default."""
    return {"check": check}


@dataclass(frozen=True)
class Wishes:
    """What both kinds of request hold."""

    model: str | None = field(default=None, metadata=by(_text))
    stream: bool = field(default=False, metadata=by(_flag))
    stream_options: dict[str, Any] | None = field(default=None, metadata=by(_object))
    temperature: float | None = field(default=None, metadata=by(partial(_number, 0, 2)))
    top_p: float | None = field(default=None, metadata=by(partial(_number, 0, 1)))
    # -1 and 0 are all
    top_k: int | None = field(default=None, metadata=by(partial(_whole, -1, 2**31)))
    min_p: float | None = field(default=None, metadata=by(partial(_number, 0, 1)))
    repetition_penalty: float | None = field(default=None, metadata=by(partial(_number, 0.1, 10)))
    max_tokens: int | None = field(default=None, metadata=by(partial(_whole, 0, 2**31)))
    stop: tuple[str, ...] = field(default=(), metadata=by(_stops))
    seed: int | None = field(default=None, metadata=by(partial(_whole, -(2**63), 2**63 - 1)))
    n: int = field(default=1, metadata=by(partial(_whole, 1, CHOICES)))
    frequency_penalty: None = field(default=None, metadata=by(_nothing))
    presence_penalty: None = field(default=None, metadata=by(_nothing))
    logit_bias: None = field(default=None, metadata=by(_nothing))

    @property
    def wants_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage", False))

    def sampling(self, chat: ChatConfig) -> Sampling:
        """How tokens are drawn; what was not asked for is as the run's settings say."""

        def given(name: str) -> Any:
            value = getattr(self, name)
            return getattr(chat, name) if value is None else value

        top_k, top_p, min_p = given("top_k"), given("top_p"), given("min_p")
        return Sampling(
            given("temperature"),
            # what leaves everything in is not looked at: that spares a sort a token
            top_k if top_k and top_k > 0 else None,
            top_p if top_p is not None and top_p < 1 else None,
            min_p or None,
            given("repetition_penalty"),
        )


@dataclass(frozen=True)
class ChatRequest(Wishes):
    """The body of /v1/chat/completions."""

    messages: tuple[Message, ...] = field(default=(), metadata=by(_messages))
    max_completion_tokens: int | None = field(default=None, metadata=by(partial(_whole, 1, 2**31)))
    logprobs: bool = field(default=False, metadata=by(_flag))
    top_logprobs: int = field(default=0, metadata=by(partial(_whole, 0, TOP)))
    reasoning_effort: str | None = field(default=None, metadata=by(_effort))
    chat_template_kwargs: dict[str, Any] | None = field(default=None, metadata=by(_object))
    continue_final_message: bool = field(default=False, metadata=by(_flag))
    response_format: None = field(default=None, metadata=by(_plain_text))
    tools: tuple[dict[str, Any], ...] = field(default=(), metadata=by(_functions))
    tool_choice: str | dict[str, Any] = field(default="auto", metadata=by(_choice))
    functions: None = field(default=None, metadata=by(_nothing))

    @property
    def n_top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def offered(self) -> tuple[dict[str, Any], ...]:
        """The client's functions that may be called; `Refused` where one is chosen that is not
        there.
        """
        names = [tool["function"]["name"] for tool in self.tools]
        missing = not names and self.tool_choice == "required"
        if isinstance(self.tool_choice, dict):
            missing = self.tool_choice["name"] not in names
        if missing:
            raise Refused(400, "tool_choice needs that function in tools", param="tool_choice")
        return () if self.tool_choice == "none" else self.tools

    def begun_call(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """What an answer begins with that has to be a call; nothing where it need not be one."""
        if not self.offered() or self.tool_choice == "auto":
            return ()
        name = self.tool_choice["name"] if isinstance(self.tool_choice, dict) else ""
        return (tokenizer.tool_call, *tokenizer.encode(name))

    def thinks(self) -> bool:
        """Whether reasoning before the answer is asked for."""
        asked = (self.chat_template_kwargs or {}).get("enable_thinking")
        if asked is not None:
            return _flag("chat_template_kwargs.enable_thinking", asked)
        return self.reasoning_effort in EFFORTS


@dataclass(frozen=True)
class CompletionRequest(Wishes):
    """The body of /v1/completions."""

    prompt: tuple[str | tuple[int, ...], ...] = field(default=(), metadata=by(_prompts))
    echo: bool = field(default=False, metadata=by(_flag))
    logprobs: int | None = field(default=None, metadata=by(partial(_whole, 0, TOP)))
    best_of: None = field(default=None, metadata=by(_one_answer))
    suffix: None = field(default=None, metadata=by(_nothing))

    @property
    def n_top(self) -> int | None:
        return self.logprobs


Kind = TypeVar("Kind", bound=Wishes)


def read(kind: type[Kind], body: Any) -> Kind:
    """The request in a parsed body; `Refused` names the first field that is wrong."""
    if not isinstance(body, dict):
        raise Refused(400, "The body must be a JSON object.")
    given = {}
    for f in fields(kind):
        if body.get(f.name) is not None:
            given[f.name] = f.metadata["check"](f.name, body[f.name])
    request = kind(**given)
    for name in ("messages", "prompt"):
        if getattr(request, name, None) == ():
            raise Refused(400, f"{name} is missing", param=name)
    if isinstance(request, CompletionRequest) and len(request.prompt) * request.n > PROMPTS:
        raise Refused(400, f"At most {PROMPTS} answers to a request.", param="prompt")
    return request


# ------------------------------------------------------------------------------------------ prompts


def chat_prompt(request: ChatRequest, served: Served) -> list[int]:
    """The ids that the model reads. A base model, which knows no turns, continues the last one."""
    tokenizer, messages = served.tokenizer, list(request.messages)
    functions = request.offered()
    if served.is_base:
        if functions:
            raise Refused(400, f"{served.name} is a base model: it calls no tools", param="tools")
        ids = [tokenizer.bos, *tokenizer.encode(marked(messages[-1]["content"]))]
        return _checked(ids, served, "messages")
    if served.chat.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": served.chat.system})
    if request.thinks():
        n = next((n for n, m in enumerate(messages) if m["role"] != "system"), len(messages))
        messages.insert(n, {"role": "system", "content": REASONING_PROMPT})
    begun = None
    if request.continue_final_message:
        begun = messages.pop()
        if begun["role"] != "assistant" or begun["tool_calls"] or not messages:
            raise Refused(400, "continue_final_message needs an assistant's message to continue.")
    try:
        ids = render(messages, tokenizer, answer=True, tools=functions).ids
    except ValueError as error:
        raise Refused(400, str(error), param="messages") from None
    if begun:
        ids += render_turn(begun, tokenizer).ids[1:-1]
    return _checked(ids, served, "messages")


def chat_rules(request: ChatRequest, served: Served, n_prompt: int) -> Rules:
    tokenizer = served.tokenizer
    think = request.thinks() and not served.is_base
    tokens = EFFORTS.get(request.reasoning_effort or "high")
    budget = None
    if think and tokens is not None:
        budget = Budget(tokens, tokenizer.think, tokenizer.end_think)
    called = request.begun_call(tokenizer)
    begun = request.continue_final_message or request.messages[-1]["role"] == "tool"
    begins = think and served.stage in THINKING and not begun
    names = frozenset(tool["function"]["name"] for tool in request.offered())
    return Rules(
        _room(request.max_completion_tokens or request.max_tokens, served, n_prompt),
        frozenset(stop_ids(tokenizer)),
        request.sampling(served.chat),
        budget,
        begin=called or ((tokenizer.think,) if begins else ()),
        tools=None if served.is_base else chat_tools(served.chat, names),
    )


def completion_prompts(request: CompletionRequest, served: Served) -> list[list[int]]:
    """The ids of each prompt: a text is opened by `<|bos|>`, ids are taken as they are."""
    found, tokenizer = [], served.tokenizer
    for prompt in request.prompt:
        ids = (
            [tokenizer.bos, *tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
        )
        if any(not 0 <= i < tokenizer.vocab_size for i in ids):
            raise Refused(400, f"prompt: ids must lie below {tokenizer.vocab_size}", param="prompt")
        found.append(_checked(ids, served, "prompt"))
    return found


def completion_rules(request: CompletionRequest, served: Served, n_prompt: int) -> Rules:
    stops = frozenset(stop_ids(served.tokenizer))
    n_tokens = _room(request.max_tokens, served, n_prompt)
    return Rules(n_tokens, stops, request.sampling(served.chat))


def _checked(ids: list[int], served: Served, name: str) -> list[int]:
    if len(ids) > served.context:
        raise Refused(
            400,
            f"The prompt is {len(ids)} tokens; {served.name} has a context of {served.context}.",
            param=name,
            code="context_length_exceeded",
        )
    return ids


def _room(wanted: int | None, served: Served, n_prompt: int) -> int:
    """Tokens an answer may have: the last one need not fit, as nothing follows it."""
    wanted = served.chat.max_tokens if wanted is None else wanted
    return min(wanted, served.context - n_prompt + 1)

"""Messages ⇄ token ids and loss mask: the only place that knows the chat format.

In: messages, `{"role": …, "content": …, "thinking": …}`. Out: ids with a loss mask, chat prompts;
back: an answer's thinking, content and tool calls. Knows nothing of the model.

    <|bos|>
        <|user|> question <|end|>  <|assistant|> <think> reasoning </think> answer <|end|>  <|user|>
        …
                                                      └──────────── carries loss ─────────────┘

The content of an assistant that calls tools is a list of parts in their order, `{"text": …}` and
`{"tool": "calculate", "arguments": "12*7", "result": "84"}`; without a result the call awaits it.
A call is written, inside of the turn, as

    <|tool_call|> calculate 12*7 <|end_tool_call|>  <|tool_result|> 84 <|end_tool_call|>
    └──────────────── carries loss ──────────────┘

The messages of the OpenAI API mean the same: an assistant's `tool_calls`, a message of the role
`tool` for each result, and the assistant's next message, which continues the turn.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from hearth.data.tokenizer import ASSISTANT, SYSTEM, USER, Tokenizer

ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
PART = ("text", "tool", "arguments", "result")  # the fields of a part of an assistant's content
TOOLS_PROMPT = "You can call these functions, each with a JSON object of its arguments:"

Message = dict[str, Any]
Part = dict[str, Any]
# what a piece of an answer is; a call and a result come whole
Kind = Literal["thinking", "content", "call", "result"]


class Rendered(NamedTuple):
    """A conversation as the model sees it; `loss[i]` says whether `ids[i]` is to be learnt."""

    ids: list[int]
    loss: list[bool]


class Answer(NamedTuple):
    """What an assistant said; `thinking` is None where it did not think.

    content: its text. parts: text and calls in their order; empty where nothing was called.
    """

    thinking: str | None
    content: str
    parts: tuple[Part, ...] = ()

    def message(self) -> Message:
        content = list(self.parts) or self.content
        return {"role": "assistant", "content": content, "thinking": self.thinking}


class Call(NamedTuple):
    """A tool and what it is asked."""

    tool: str
    arguments: str


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    answer: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Rendered:
    """The ids of a conversation and which of them carry loss; with `answer` it is a prompt: it ends
    in the assistant's turn begun, behind a tool's result if that came last. `tools` are the
    functions of an OpenAI request. Raises ValueError for a turn that cannot be rendered, naming it.
    """
    if not messages:
        raise ValueError("A conversation needs at least one turn.")
    if answer and messages[-1].get("role") == "assistant":
        raise ValueError(
            "The assistant has just spoken: a prompt must end in a turn of the user or the system."
        )
    ids, loss = [tokenizer.bos], [False]
    for number, message in _turns(messages, tools):
        try:
            turn = render_turn(message, tokenizer)
        except ValueError as error:
            raise ValueError(f"Turn {number}: {error}") from None
        ids += turn.ids
        loss += turn.loss
    if answer and messages[-1].get("role") == "tool":
        return Rendered(ids[:-1], loss[:-1])  # the turn continues
    if answer:
        ids.append(tokenizer.assistant)
        loss.append(False)
    return Rendered(ids, loss)


def render_turn(message: Message, tokenizer: Tokenizer) -> Rendered:
    """One turn, from its role token to its `<|end|>`: a conversation is `<|bos|>` and its turns end
    to end.
    """
    role, parts, thinking = checked(message)
    ids, loss = [tokenizer.special[ROLES[role]]], [False]

    def say(*said: int, learnt: bool = True) -> None:
        ids.extend(said)
        loss.extend([learnt and role == "assistant"] * len(said))

    if thinking is not None:
        say(tokenizer.think, *tokenizer.encode(thinking), tokenizer.end_think)
    for part in parts:
        if isinstance(part, str):
            say(*tokenizer.encode(part))
            continue
        say(tokenizer.tool_call, *tokenizer.encode(_call_text(part)), tokenizer.end_tool_call)
        if part.get("result") is not None:
            say(*result_ids(part["result"], tokenizer), learnt=False)
    say(tokenizer.end)
    return Rendered(ids, loss)


def loss_everywhere(ids: Sequence[int], tokenizer: Tokenizer) -> list[bool]:
    """The mask that learns all of a rendered conversation but `<|bos|>` and the tools' results."""
    loss, in_result = [], False
    for token in ids:
        in_result = in_result or token == tokenizer.tool_result
        loss.append(not in_result and token != tokenizer.bos)
        in_result = in_result and token != tokenizer.end_tool_call
    return loss


def result_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids that follow a call: its result."""
    return [tokenizer.tool_result, *tokenizer.encode(text), tokenizer.end_tool_call]


def last_call(ids: Sequence[int], tokenizer: Tokenizer) -> Call | None:
    """The call that the last of an answer's ids closes; None where it closes none."""
    if not ids or ids[-1] != tokenizer.end_tool_call:
        return None
    reader, said = AnswerReader(tokenizer), []
    for token in ids:
        said = list(reader.read(token))
    return next((read_call(text) for kind, text in said if kind == "call"), None)


def read_call(text: str) -> Call:
    """A call from the text of a piece of the kind `call`."""
    name, _, arguments = text.partition(" ")
    return Call(name, arguments)


def tools_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    """How the functions of an OpenAI request are told to the model, in the system's turn."""
    told = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    return "\n".join([TOOLS_PROMPT, *told])


def close_turn(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The assistant's turn, from `<|assistant|>` to `<|end|>`, of an answer's ids; one that was cut
    off is closed.
    """
    ids = list(ids)
    if ids and ids[-1] in stop_ids(tokenizer):
        ids.pop()
    reader = AnswerReader(tokenizer)
    for token in ids:
        for _ in reader.read(token):
            pass
    if (open_end := reader.open_end) is not None:
        ids.append(open_end)
    return [tokenizer.assistant, *ids, tokenizer.end]


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer: `<|end|>`, and those with which somebody else's turn or another text
    would begin.
    """
    return [tokenizer.end, tokenizer.bos, tokenizer.system, tokenizer.user, tokenizer.assistant]


def parse_answer(ids: Sequence[int], tokenizer: Tokenizer) -> Answer:
    """The inverse of an assistant's turn: what was thought, said and called in ids that follow
    `<|assistant|>`.

    Reads up to the first `<|end|>`. Thinking that was never closed leaves the content empty; a call
    or a result that was cut off ends there; other special tokens, which only a confused model
    writes, are left out.
    """
    reader = AnswerReader(tokenizer)
    pieces: list[tuple[Kind, str]] = []
    for token in ids:
        if token == tokenizer.end:
            break
        pieces += reader.read(token)
    return answer_of([*pieces, *reader.rest()], thought=reader.thought)


def answer_of(pieces: Sequence[tuple[Kind, str]], *, thought: bool) -> Answer:
    """An answer from its pieces in their order."""
    text = {
        kind: "".join(text for k, text in pieces if k == kind) for kind in ("thinking", "content")
    }
    parts: list[Part] = []
    for kind, said in pieces:
        if kind == "call":
            parts.append({**read_call(said)._asdict(), "result": None})
        elif kind == "result":
            parts[-1]["result"] = said
        elif kind == "content" and said:
            if parts and "text" in parts[-1]:
                parts[-1]["text"] += said
            else:
                parts.append({"text": said})
    called = any("tool" in part for part in parts)
    return Answer(
        text["thinking"] if thought else None, text["content"], tuple(parts) if called else ()
    )


class AnswerReader:
    """Text of an answer whose ids come one by one: pieces, each its kind and its text. Thinking and
    content come in whole characters; a call and its result each come whole, once they are closed.

    span: the kind of what comes next, as far as it is known. thought: whether there was thinking.
    Tools are not called while thinking.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.special.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._last: int | None = None
        self.span: Kind = "content"
        self._called = False  # the call before the next token awaits its result
        self._whole: list[int] = []  # of a call or a result
        self.thought = False

    @property
    def open_end(self) -> int | None:
        """The id that would end the part of the answer that the reader stands in."""
        t = self._tokenizer
        ends = {"thinking": t.end_think, "call": t.end_tool_call, "result": t.end_tool_call}
        return ends.get(self.span)

    def read(self, token: int) -> Iterator[tuple[Kind, str]]:
        """What a token adds, as (kind, text)."""
        t, called = self._tokenizer, self._called
        first, self._last, self._called = self._last is None, token, False
        if self.open_end is not None and token == self.open_end:
            self._called = self.span == "call"
            yield from self.rest()
            self.span = "content"
        elif self.span == "content" and token in (t.think, t.tool_call, t.tool_result):
            if token == t.think and first:
                self.span, self.thought = "thinking", True
            elif token == t.tool_call:
                yield from self.rest()
                self.span = "call"
            elif token == t.tool_result and called:
                self.span = "result"
        elif token not in self._special:
            if self.span in ("call", "result"):
                self._whole.append(token)
            else:
                yield self.span, self._utf8.decode(t.decode_bytes([token]))

    def rest(self) -> Iterator[tuple[Kind, str]]:
        """What is left where the answer is cut off: of a character that was never finished, U+FFFD;
        a call or a result as far as it came.
        """
        if self.span in ("call", "result"):
            whole, self._whole = self._whole, []
            yield self.span, self._tokenizer.decode(whole)
            return
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        yield self.span, rest


def _turns(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int, Message]]:
    """The turns, each with the number of its message: tool calls and their results are parts of
    the one turn that they belong to. Thinking is a turn's beginning; elsewhere it is left out.
    """
    turns: list[tuple[int, Message]] = []
    awaiting: dict[Any, Part] = {}  # calls without a result, by their ids
    after_result = False
    for number, message in enumerate(messages, start=1):
        try:
            if message.get("role") == "tool":
                _take(awaiting, message)["result"] = _text_of(message.get("content"))
                after_result = True
                continue
            calls = _calls(message)
        except ValueError as error:
            raise ValueError(f"Turn {number}: {error}") from None
        if calls or after_result:
            content = message.get("content")
            parts = list(content) if isinstance(content, list | tuple) else [{"text": content}]
            parts = [*([] if content is None else parts), *calls.values()]
        if after_result and message.get("role") == "assistant":
            turns[-1][1]["content"] += parts
        else:
            turns.append((number, {**message, "content": parts} if calls else message))
        awaiting, after_result = calls, False
    if tools:
        turns = _with_tools(turns, tools_prompt(tools))
    yield from turns


def _with_tools(turns: list[tuple[int, Message]], told: str) -> list[tuple[int, Message]]:
    """The turns with the tools told at the end of the first one, if that is the system's."""
    number, first = turns[0]
    if first.get("role") == "system" and isinstance(first.get("content"), str):
        return [(number, {**first, "content": f"{first['content']}\n\n{told}"}), *turns[1:]]
    return [(1, {"role": "system", "content": told}), *turns]


def _calls(message: Message) -> dict[Any, Part]:
    """The `tool_calls` of a message as parts, by their ids."""
    calls: dict[Any, Part] = {}
    for n, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise ValueError("one of its tool_calls has no function")
        arguments = function.get("arguments", "")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls[call.get("id") or n] = {
            "tool": function.get("name"),
            "arguments": arguments,
            "result": None,
        }
    if calls and message.get("role") != "assistant":
        raise ValueError(f"the {message.get('role')} has tool_calls, only the assistant calls")
    return calls


def _take(awaiting: dict[Any, Part], message: Message) -> Part:
    """The call that a message of the role tool answers: by its id, else the next."""
    name = message.get("tool_call_id")
    if not awaiting or (name is not None and name not in awaiting):
        raise ValueError("a tool's result answers no call before it")
    return awaiting.pop(next(iter(awaiting)) if name is None else name)


def _text_of(content: Any) -> str:
    """Text, also where it comes as a list of parts of the type text."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"its content is {type(content).__name__}, must be text")
    return content


def _call_text(part: Part) -> str:
    return f"{part['tool']} {part['arguments']}" if part["arguments"] else part["tool"]


def checked(message: Message) -> tuple[str, list[str | Part], str | None]:
    """Role, parts of the content (texts and calls) and thinking of a message; ValueError says what
    is wrong with it.
    """
    role, content, thinking = message.get("role"), message.get("content"), message.get("thinking")
    if role not in ROLES:
        raise ValueError(f"the role is {role!r}, must be one of {', '.join(ROLES)}")
    if thinking is not None and role != "assistant":
        raise ValueError(f"the {role} has thinking, only the assistant thinks")
    if role == "assistant" and isinstance(content, list | tuple):
        parts = _checked_parts(content)
    else:
        parts = [content]
        if not isinstance(content, str):
            raise ValueError(f"its content is {type(content).__name__}, must be text")
    if thinking is not None and not isinstance(thinking, str):
        raise ValueError(f"its thinking is {type(thinking).__name__}, must be text")
    return role, parts, thinking


def _checked_parts(content: Sequence[Any]) -> list[str | Part]:
    """Texts, those beside each other joined, and calls."""
    parts: list[str | Part] = []
    for part in content:
        found = dict(part) if isinstance(part, dict) else {}
        given = {name for name in PART if found.get(name) is not None}
        is_call = {"tool", "arguments"} <= given <= {"tool", "arguments", "result"}
        if (
            not (is_call or given == {"text"})
            or not all(isinstance(found[name], str) for name in given)
            or (is_call and " " in found["tool"])
        ):
            raise ValueError(
                f"a part of its content is {json.dumps(part, default=str)[:80]}, must be a text "
                "or a call: tool (a name without spaces), arguments and result as texts"
            )
        if is_call:
            parts.append(found)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += found["text"]
        else:
            parts.append(found["text"])
    return parts


# The same format as a Jinja template, for programs that read one from beside a tokenizer. A
# template writes text, so it cannot tell a special token from its spelling in a message: for such
# messages only `render` is safe.
CHAT_TEMPLATE = (
    "{%- macro call(name, arguments) -%}"
    "{{- '<|tool_call|>' + name -}}"
    "{%- if arguments is not string -%}{{- ' ' + (arguments | tojson) -}}"
    "{%- elif arguments -%}{{- ' ' + arguments -}}{%- endif -%}"
    "{{- '<|end_tool_call|>' -}}"
    "{%- endmacro -%}"
    "{%- macro result(text) -%}"
    "{{- '<|tool_result|>' -}}"
    "{%- if text is string -%}{{- text -}}{%- else -%}"
    "{%- for part in text -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}"
    "{{- '<|end_tool_call|>' -}}"
    "{%- endmacro -%}"
    "{%- set told = namespace(text='') -%}"
    "{%- if tools is defined and tools -%}"
    f"{{%- set told.text = '{TOOLS_PROMPT}' -%}}"
    "{%- for tool in tools -%}"
    "{%- set told.text = told.text + '\\n' + (tool['function'] | tojson) -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|bos|>' -}}"
    "{%- if told.text and messages[0]['role'] != 'system' -%}"
    "{{- '<|system|>' + told.text + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- set turn = namespace(results=false, next='') -%}"
    "{%- for message in messages -%}"
    "{%- set turn.next = '' if loop.last else messages[loop.index]['role'] -%}"
    # a tool's results are written with the call that they answer, in the same order
    "{%- if message['role'] != 'tool' -%}"
    "{%- if not (turn.results and message['role'] == 'assistant') -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- set thinking = message['thinking'] if message['thinking'] is string "
    "else message['reasoning_content'] -%}"
    "{%- if thinking is string -%}{{- '<think>' + thinking + '</think>' -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- elif message['content'] is defined and message['content'] -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['text'] is string -%}{{- part['text'] -}}{%- else -%}"
    "{{- call(part['tool'], part['arguments']) -}}"
    "{%- if part['result'] is string -%}{{- result(part['result']) -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if told.text and loop.first and message['role'] == 'system' -%}"
    "{{- '\\n\\n' + told.text -}}"
    "{%- endif -%}"
    "{%- if message['tool_calls'] is defined and message['tool_calls'] -%}"
    "{%- set n = loop.index0 -%}"
    "{%- for one in message['tool_calls'] -%}"
    "{{- call(one['function']['name'], one['function']['arguments']) -}}"
    "{%- set at = n + loop.index -%}"
    "{%- if at < messages | length and messages[at]['role'] == 'tool' -%}"
    "{{- result(messages[at]['content']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{%- set turn.results = message['role'] == 'tool' -%}"
    "{%- if turn.next != 'tool' and not (turn.results and (turn.next == 'assistant' "
    "or (loop.last and add_generation_prompt))) -%}"
    "{{- '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and not turn.results -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

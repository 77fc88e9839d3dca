"""Messages ⇄ token ids and loss mask: the only place that knows the chat format.

In: messages, `{"role": …, "content": …, "thinking": …}`. Out: ids with a loss mask, chat prompts;
back: an answer's thinking and content. Knows nothing of the model.

    <|bos|>
        <|user|> question <|end|>  <|assistant|> <think> reasoning </think> answer <|end|>  <|user|>
        …
                                                      └──────────── carries loss ─────────────┘
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hearth.data.tokenizer import ASSISTANT, SYSTEM, USER, Tokenizer

ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}

Message = dict[str, Any]


class Rendered(NamedTuple):
    """A conversation as the model sees it; `loss[i]` says whether `ids[i]` is to be learnt."""

    ids: list[int]
    loss: list[bool]


class Answer(NamedTuple):
    """What an assistant said; `thinking` is None where it did not think."""

    thinking: str | None
    content: str


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, answer: bool = False) -> Rendered:
    """The ids of a conversation and which of them carry loss; with `answer` it is a prompt: it ends
    in the assistant's turn begun. Raises ValueError for a turn that cannot be rendered, naming it.
    """
    if not messages:
        raise ValueError("A conversation needs at least one turn.")
    if answer and messages[-1].get("role") == "assistant":
        raise ValueError(
            "The assistant has just spoken: a prompt must end in a turn of the user or the system."
        )
    ids, loss = [tokenizer.bos], [False]
    for number, message in enumerate(messages, start=1):
        try:
            turn = render_turn(message, tokenizer)
        except ValueError as error:
            raise ValueError(f"Turn {number}: {error}") from None
        ids += turn.ids
        loss += turn.loss
    if answer:
        ids.append(tokenizer.assistant)
        loss.append(False)
    return Rendered(ids, loss)


def render_turn(message: Message, tokenizer: Tokenizer) -> Rendered:
    """One turn, from its role token to its `<|end|>`: a conversation is `<|bos|>` and its turns end
    to end.
    """
    role, content, thinking = _checked(message)
    said = []
    if thinking is not None:
        said = [tokenizer.think, *tokenizer.encode(thinking), tokenizer.end_think]
    said += [*tokenizer.encode(content), tokenizer.end]
    return Rendered(
        [tokenizer.special[ROLES[role]], *said], [False] + [role == "assistant"] * len(said)
    )


def close_turn(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The assistant's turn, from `<|assistant|>` to `<|end|>`, of an answer's ids; one that was cut
    off is closed.
    """
    ids = list(ids)
    if ids and ids[-1] in stop_ids(tokenizer):
        ids.pop()
    if ids[:1] == [tokenizer.think] and tokenizer.end_think not in ids:
        ids.append(tokenizer.end_think)
    return [tokenizer.assistant, *ids, tokenizer.end]


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer: `<|end|>`, and those with which somebody else's turn or another text
    would begin.
    """
    return [tokenizer.end, tokenizer.bos, tokenizer.system, tokenizer.user, tokenizer.assistant]


def parse_answer(ids: Sequence[int], tokenizer: Tokenizer) -> Answer:
    """The inverse of an assistant's turn: what was thought and what was said in ids that follow
    `<|assistant|>`.

    Reads up to the first `<|end|>`. Thinking that was never closed leaves the content empty; other
    special tokens, which only a confused model writes, are left out.
    """
    reader = AnswerReader(tokenizer)
    parts: tuple[list[str], list[str]] = ([], [])
    for token in [*ids, tokenizer.end]:
        if token == tokenizer.end:
            parts[reader.thinking].append(reader.rest())
            break
        for thinking, text in reader.read(token):
            parts[thinking].append(text)
    return Answer("".join(parts[True]) if reader.thought else None, "".join(parts[False]))


class AnswerReader:
    """Text of an answer whose ids come one by one, in whole characters.

    thinking: whether the reader stands inside `<think>`. thought: whether it ever did.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.special.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self.thinking = self.thought = False

    def read(self, token: int) -> Iterator[tuple[bool, str]]:
        """What a token adds, as (is it thinking?, text)."""
        closes = self.thinking and token == self._tokenizer.end_think
        if closes:
            yield True, self.rest()
            self.thinking = False
        elif not self._begun and token == self._tokenizer.think:
            self.thinking = self.thought = True
        elif token not in self._special:
            yield self.thinking, self._utf8.decode(self._tokenizer.decode_bytes([token]))
        self._begun = True

    def rest(self) -> str:
        """What is left of a character that was never finished: U+FFFD, or nothing."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _checked(message: Message) -> tuple[str, str, str | None]:
    """Role, content and thinking of a message; ValueError says what is wrong with it."""
    role, content, thinking = message.get("role"), message.get("content"), message.get("thinking")
    if role not in ROLES:
        raise ValueError(f"the role is {role!r}, must be one of {', '.join(ROLES)}")
    if thinking is not None and role != "assistant":
        raise ValueError(f"the {role} has thinking, only the assistant thinks")
    for name, text in (("content", content), ("thinking", thinking)):
        if text is None and name == "thinking":
            continue
        if not isinstance(text, str):
            raise ValueError(f"its {name} is {type(text).__name__}, must be text")
    return role, content, thinking


# The same format as a Jinja template, for programs that read one from beside a tokenizer. A
# template writes text, so it cannot tell a special token from its spelling in a message: for such
# messages only `render` is safe.
CHAT_TEMPLATE = (
    "{{- '<|bos|>' -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- set thinking = message['thinking'] if message['thinking'] is string "
    "else message['reasoning_content'] -%}"
    "{%- if thinking is string -%}{{- '<think>' + thinking + '</think>' -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

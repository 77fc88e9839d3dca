"""Messages ⇄ token ids and loss mask: the only place that knows the chat format.

In: messages, `{"role": …, "content": …, "thinking": …}`. Out: ids with a loss mask, chat prompts; back: an answer's
thinking and content. Knows nothing of the model.

    <|bos|>  <|user|> question <|end|>  <|assistant|> <think> reasoning </think> answer <|end|>  <|user|> …
                                                      └──────────── carries loss ─────────────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizer import ASSISTANT, SYSTEM, USER, Tokenizer

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
    """The ids of a conversation and which of them carry loss; with `answer` it is a prompt: it ends in the
    assistant's turn begun. Raises ValueError for a turn that cannot be rendered, naming it.
    """
    if not messages:
        raise ValueError("A conversation needs at least one turn.")
    if answer and messages[-1].get("role") == "assistant":
        raise ValueError("The assistant has just spoken: a prompt must end in a turn of the user or the system.")
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
    """One turn, from its role token to its `<|end|>`: a conversation is `<|bos|>` and its turns end to end."""
    role, content, thinking = _checked(message)
    said = []
    if thinking is not None:
        said = [tokenizer.think, *tokenizer.encode(thinking), tokenizer.end_think]
    said += [*tokenizer.encode(content), tokenizer.end]
    return Rendered([tokenizer.special[ROLES[role]], *said], [False] + [role == "assistant"] * len(said))


def parse_answer(ids: Sequence[int], tokenizer: Tokenizer) -> Answer:
    """The inverse of an assistant's turn: what was thought and what was said in ids that follow `<|assistant|>`.

    Reads up to the first `<|end|>`. Thinking that was never closed leaves the content empty; other special tokens,
    which only a confused model writes, are left out.
    """
    ids = list(ids)
    if tokenizer.end in ids:
        ids = ids[: ids.index(tokenizer.end)]
    thought: list[int] | None = None
    if ids[:1] == [tokenizer.think]:
        close = ids.index(tokenizer.end_think) if tokenizer.end_think in ids else len(ids)
        thought, ids = ids[1:close], ids[close + 1 :]
    return Answer(None if thought is None else _text(thought, tokenizer), _text(ids, tokenizer))


def _text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    special = set(tokenizer.special.values())
    return tokenizer.decode([token for token in ids if token not in special])


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


# The same format as a Jinja template, for programs that read one from beside a tokenizer. A template writes text, so
# it cannot tell a special token from its spelling in a message: for such messages only `render` is safe.
CHAT_TEMPLATE = (
    "{{- '<|bos|>' -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['thinking'] is string -%}{{- '<think>' + message['thinking'] + '</think>' -}}{%- endif -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

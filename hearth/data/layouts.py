"""Rows of conversations in any of the usual layouts, recognised by their columns, as messages.

In: a row as a dict. Out: a list of `Message`s, or a `Rejected` with its reason.
Knows nothing of token ids: everything here is plain text. What a turn may hold, `chat_format` says.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from config import REASONING_PROMPT
from hearth.data.chat_format import checked
from hearth.data.cleaning import Rejected, text_hash


class Message(TypedDict):
    """One turn. role: system, user or assistant; content: text, or an assistant's texts and tool
    calls in their order; thinking: what an assistant thought before `content`, or None.
    """

    role: str
    content: str | list[dict[str, str]]
    thinking: str | None


def conversation(
    row: dict[str, Any], max_chars: int | None = None, *, calls: bool = False
) -> list[Message] | Rejected:
    """One row in any of the usual layouts, recognised by its columns, as messages.

    calls: whether calculations in <<…>> become calls of the calculator in the answer.

    max_chars: longest reasoning taken. Of several the first right one that is short enough is
    taken, else the worked solution; where that is too long as well the row is dropped, for a
    thought is never cut. None is any length.
    """
    try:
        messages = converted(row, max_chars, calls=calls)
        return messages if isinstance(messages, Rejected) else finished(messages, max_chars)
    except MALFORMED as error:
        return Rejected("malformed row", f"{type(error).__name__}: {error}")


# what a row raises whose columns hold something else than their layout has there
MALFORMED = (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError)


def converted(
    row: Any, max_chars: int | None = None, *, calls: bool = False
) -> list[Message] | Rejected:
    """The turns of a row as its layout has them, before they are `finished`. Raises `MALFORMED`."""
    if not isinstance(row, dict):
        return Rejected("unknown layout", "a text without ### Human: and ### Assistant:")
    columns = layout(row)
    if columns is None:
        return Rejected("unknown layout", "columns " + ", ".join(map(str, row)))
    convert = LAYOUTS[columns]
    settings = {_problem: (max_chars,), _question: (calls,)}.get(convert, ())
    return convert(row, *settings)


def layout(row: dict[str, Any]) -> tuple[str, ...] | None:
    """The columns by which `conversation` recognises a row, None where it does not."""
    return next((c for c in LAYOUTS if all(row.get(name) is not None for name in c)), None)


def finished(messages: list[Message], max_chars: int | None = None) -> list[Message] | Rejected:
    """Messages with their thoughts split off, checked, and with a system turn where they reason.
    Raises ValueError for a turn that cannot be rendered.
    """
    for message in messages:
        if message["role"] not in ROLES:
            return Rejected("tool use", message["role"])
        checked(message)
        if (
            message["role"] == "assistant"
            and message["thinking"] is None
            and "<think>" in text_of(message)
        ):
            match = THOUGHT.match(text_of(message))
            if not match:
                return Rejected("unfinished thought")
            message["thinking"], message["content"] = match[1].strip(), match[2].strip()
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        return Rejected("no question with an answer")
    if any(not text_of(m).strip() for m in messages if m["role"] != "system"):
        return Rejected("empty turn")
    longest = max(len(m["thinking"] or "") for m in messages)
    if max_chars is not None and longest > max_chars:
        return Rejected("reasoning too long", f"{longest} characters")
    if any(m["thinking"] for m in messages) and messages[0]["role"] != "system":
        messages.insert(0, turn("system", REASONING_PROMPT))
    return messages


def text_of(message: Message) -> str:
    """What is said in a turn, without its calls."""
    content = message["content"]
    return content if isinstance(content, str) else joined(content)


def joined(parts: list[dict[str, str]]) -> str:
    """The texts among the parts of a content, one behind another."""
    return "".join(part.get("text") or "" for part in parts)


FOUND_RIGHT = ("correctness_math_verify", "correctness_llama")  # either one's word is enough
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def turn(role: str, content: Any, thinking: Any = None) -> Message:
    """A message by any name of its role. Raises TypeError for a content that is none."""
    if not isinstance(content, str) and not is_parts(content):
        raise TypeError(f"a turn holds {type(content).__name__}, not text")
    role = ROLES.get(role, role)
    if role != "assistant" and is_texts(content):
        content = joined(content)
    return {"role": role, "content": content, "thinking": thinking}


def is_parts(content: Any) -> bool:
    """Whether it is texts and calls of tools, as `chat_format` says them."""
    return isinstance(content, list) and all(
        isinstance(part, dict) and ("tool" in part or set(part) == {"text"}) for part in content
    )


def is_texts(content: Any) -> bool:
    """Whether it is parts without calls."""
    return isinstance(content, list) and all(isinstance(p.get("text"), str) for p in content)


def _pair(
    question: str, *, context: str | None, answer: str | list, thinking: str | None = None
) -> list[Message]:
    asked = f"{question}\n\n{context}" if context and context.strip() else question
    return [turn("user", asked), turn("assistant", answer, thinking)]


def _instruction(row: dict[str, Any]) -> list[Message]:
    context = row.get("input") or row.get("context")
    answer = next(row[name] for name in ("output", "response") if row.get(name) is not None)
    return _pair(row["instruction"], context=context, answer=answer)


ALPACA_FRAME = re.compile(
    r"### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:\s*$", re.DOTALL
)


def _prompt(row: dict[str, Any]) -> list[Message]:
    """A prompt and its answer; the frame that Alpaca put around its prompts is taken off."""
    answer = row["completion"] if row.get("completion") is not None else row["response"]
    match = ALPACA_FRAME.search(row["prompt"])
    if match:
        return _pair(match[1], context=match[2], answer=answer)
    return _pair(row["prompt"], context=None, answer=answer)


def _messages(row: dict[str, Any]) -> list[Message]:
    """Turns as role and content or from and value; content is text or a list of parts, some of them
    thoughts.
    """
    found = []
    for item in row["messages"] if row.get("messages") is not None else row["conversations"]:
        role = item.get("role") or item["from"]
        if not isinstance(role, str):
            raise TypeError(f"a role is {type(role).__name__}, not a name")
        content = item["content"] if "content" in item else item["value"]
        thinking = item.get("thinking")
        if isinstance(content, list) and not is_parts(content):
            parts = [
                (part.get("type", "text"), part.get("value", part.get("text"))) for part in content
            ]
            if any(kind not in ("text", "reasoning") for kind, _ in parts):
                role = "tool"
            thinking = "\n\n".join(text for kind, text in parts if kind == "reasoning") or None
            content = "\n\n".join(text for kind, text in parts if kind == "text")
        found.append(turn(role, content if role in ROLES else "", thinking))
    return found


def _problem(row: dict[str, Any], max_chars: int | None) -> list[Message] | Rejected:
    """Mathematics: the first verified generation that is short enough, else the worked solution and
    the answer.
    """
    match = verified_generation(row, max_chars)
    if match:
        return _pair(
            row["problem"], context=None, answer=match[2].strip(), thinking=match[1].strip()
        )
    solution, answer = row["solution"], row.get("answer")
    if not answer:
        return _pair(row["problem"], context=None, answer=solution)
    return _pair(row["problem"], context=None, answer=answer, thinking=solution)


def verified_generation(row: dict[str, Any], max_chars: int | None) -> re.Match[str] | None:
    """Thought and answer of the first generation that was found right, is complete and is short
    enough.
    """
    marks = {name: row.get(name) or [] for name in (*FOUND_RIGHT, "is_reasoning_complete")}
    for i, text in enumerate(row.get("generations") or []):
        mark = {name: values[i] for name, values in marks.items() if i < len(values)}
        right = (
            any(mark.get(name) for name in FOUND_RIGHT)
            and mark.get("is_reasoning_complete") is not False
        )
        match = THOUGHT.match(text or "") if right else None
        if match and match[2].strip() and len(text) <= (max_chars or len(text)):
            return match
    return None


def reasoning_taken(row: Any, max_chars: int | None) -> str | None:
    """Which reasoning `conversation` takes of a row with generations, for the count; None for any
    other row.
    """
    if not isinstance(row, dict) or LAYOUTS.get(layout(row)) is not _problem:
        return None
    if not row.get("generations"):
        return None
    if verified_generation(row, max_chars):
        return "a verified generation"
    too_long = verified_generation(row, None) is not None
    return "the worked solution: " + (
        "no verified generation is short enough" if too_long else "none is verified"
    )


CALCULATION = re.compile(r"<<[^<>]*>>")


def _question(row: dict[str, Any], calls: bool) -> list[Message]:
    """GSM8K: the worked solution, without its calculation marks, is the thinking; what follows
    `####` the answer. With `calls` the solution is the answer, its marks calls of the calculator.
    """
    if calls and CALCULATION.search(row["answer"]):
        return _pair(row["question"], context=None, answer=with_calls(row["answer"]))
    worked, mark, answer = CALCULATION.sub("", row["answer"]).rpartition("####")
    if not mark:
        return _pair(row["question"], context=row.get("context"), answer=answer)
    return _pair(row["question"], context=None, answer=answer.strip(), thinking=worked.strip())


def with_calls(solution: str) -> list[dict[str, str]]:
    """A worked solution of GSM8K as texts and calls: `48/2 = <<48/2=24>>24 clips` calls for `48/2`
    and continues with what the text makes of the result.
    """
    worked, _, answer = solution.rpartition("####")
    parts, at = [], 0
    for mark in CALCULATION.finditer(worked):
        expression, _, result = BARE_POINT.sub("0.", mark[0][2:-2]).rpartition("=")
        if expression.strip():
            call = {"tool": "calculate", "arguments": expression.strip(), "result": result.strip()}
            parts += [{"text": worked[at : mark.start()]}, call]
            at = mark.end()
    rest = CALCULATION.sub("", worked[at:]).rstrip()
    return [*parts, {"text": f"{rest}\nThe answer is {answer.strip()}."}]


BARE_POINT = re.compile(r"(?<!\d)\.(?=\d)")  # of `.5`
LETTERS = "ABCDEFGHIJ"
BY_LETTER = "Answer with the letter of the right choice."


def lettered(question: str, choices: Sequence[str]) -> str:
    """A question with its choices, that asks for a letter."""
    listed = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *listed, BY_LETTER])


def _choice(row: dict[str, Any]) -> list[Message] | Rejected:
    """Multiple choice, answered by letter: MMLU's columns (choices, and which is right as a number
    or a letter), and those of ARC and OpenBookQA (choices with labels, and the right label).
    """
    choices = row["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
        right = labels.index(row["answerKey"])
    else:
        texts, right = choices, row.get("answer", row.get("gold"))
        right = LETTERS.index(right) if isinstance(right, str) else int(right)
    if not 0 <= right < len(texts) <= len(LETTERS):
        return Rejected("malformed row", f"answer {right} of {len(texts)} choices")
    asked = next(row[name] for name in ("question_stem", "question") if row.get(name) is not None)
    return _pair(lettered(asked, texts), context=None, answer=LETTERS[right])


SPEAKER = re.compile(r"### (Human|Assistant|System):\s*")


def _transcript(row: dict[str, Any]) -> list[Message] | Rejected:
    """One text with `### Human:` and `### Assistant:` in it."""
    pieces = SPEAKER.split(row["text"])
    if len(pieces) < 3 or pieces[0].strip():
        return Rejected("unknown layout", "a text without ### Human: and ### Assistant:")
    return [
        turn(role.lower(), text.strip())
        for role, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


# The first whose columns are all there is taken.
LAYOUTS: dict[tuple[str, ...], Callable[..., list[Message] | Rejected]] = {
    ("problem", "solution"): _problem,
    ("messages",): _messages,
    ("conversations",): _messages,
    ("instruction", "output"): _instruction,
    ("instruction", "response"): _instruction,
    ("question", "choices"): _choice,
    ("question_stem", "choices"): _choice,
    ("question", "answer"): _question,
    ("prompt", "completion"): _prompt,
    ("prompt", "response"): _prompt,
    ("text",): _transcript,
}


# ---------------------------------------------------------------------------------- test questions

QUESTION_COLUMNS = (  # where a row's question may stand
    *("question_stem", "question", "query", "problem", "instruction", "prompt", "context"),
)
# Layouts whose user may ask more than these columns hold. The turns of the others do not, and those
# with choices hold the same request in every row.
ASKED_IN_TURNS = (_messages, _instruction, _prompt, _transcript)
WORD = re.compile(r"[^\W_]+")
AROUND = re.compile(r"^question | answer$")  # what a test writes around its question
LEAST_WORDS = 8  # of a paragraph that is looked for by itself


def question_keys(row: Any) -> set[int]:
    """Hashes of what a row asks, as its words alone: of each question and each longer line and
    paragraph of one; none of a row that cannot be read. Two rows that ask the same share one,
    whatever their layout, case and punctuation.
    """
    texts = questions(row) if isinstance(row, dict) else []
    words = [normalised(text) for text in texts]
    parts = [part for text in texts for part in (*text.splitlines(), *text.split("\n\n"))]
    longer = [part for part in map(normalised, parts) if part.count(" ") + 1 >= LEAST_WORDS]
    return {text_hash(text.encode()) for text in (*words, *longer) if text}


def questions(row: dict[str, Any]) -> list[str]:
    """The texts of a row that ask something: its question columns, and what its user says."""
    texts = [row[name] for name in QUESTION_COLUMNS if isinstance(row.get(name), str)]
    if LAYOUTS.get(layout(row)) not in ASKED_IN_TURNS:
        return texts
    with contextlib.suppress(*MALFORMED):
        messages = converted(row)
        if not isinstance(messages, Rejected):
            texts += [text_of(message) for message in messages if message["role"] == "user"]
    return texts


def normalised(text: str) -> str:
    """The words of a question in small letters, one space between two."""
    return AROUND.sub("", " ".join(WORD.findall(text.lower())))

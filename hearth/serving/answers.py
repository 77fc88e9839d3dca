"""What a client gets: the tokens of an answer → text that is safe to send → JSON of the OpenAI API.

In: `Token`s as the scheduler makes them. Out: pieces of text with the tokens that they add up to;
chunks, choices and usage. A text that ends an answer is found across tokens: what may yet become
one is held back.
"""

from __future__ import annotations

import codecs
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hearth.data.chat_format import AnswerReader, Call, Kind, read_call
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.scheduler import Scored, Token
from hearth.serving.marks import ARROW, CLOSE, OPEN

LOWEST = -9999.0  # for probabilities that are 0: JSON has no infinity

Json = dict[str, Any]


@dataclass
class Part:
    """The text that one token added; "" while a character is unfinished."""

    text: str
    data: bytes
    scored: Scored | None
    n_cycles: int = 0


@dataclass
class Piece:
    """Text to send, and the tokens it is made of; or a call of a client's function."""

    thinking: bool
    parts: list[Part]
    call: Call | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


class _PlainReader:
    """Text of ids that follow no chat format; special tokens have none."""

    span: Kind = "content"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._special = tokenizer, set(tokenizer.special.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, token: int) -> Iterator[tuple[Kind, str]]:
        if token not in self._special:
            yield "content", self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def rest(self) -> Iterator[tuple[Kind, str]]:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        yield "content", rest


@dataclass
class AnswerText:
    """One answer on its way out.

    functions: names of the client's functions: a call of one is a piece of its own, every other
    call is marked in the content, once its result is there.
    stopped: whether one of the texts in `stops` was found; nothing comes after it.
    """

    tokenizer: Tokenizer
    stops: Sequence[str] = ()
    chat: bool = True
    functions: frozenset[str] = frozenset()
    stopped: bool = False
    n_tokens: int = 0
    n_thinking: int = 0  # tokens said while thinking
    n_cycles: int = 0
    _unfinished: list[Part] = field(default_factory=list)  # of a character
    _held: list[Part] = field(default_factory=list)  # whole, but they may become a stop
    _tool: list[Part] = field(default_factory=list)  # of a call, as it is marked

    def __post_init__(self) -> None:
        self._reader = (AnswerReader if self.chat else _PlainReader)(self.tokenizer)
        self._tool_text = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: Token) -> list[Piece]:
        """What the token lets go."""
        if self.stopped:
            return []
        self.n_tokens += 1
        self.n_cycles += token.n_cycles
        before = self._reader.span
        said = list(self._reader.read(token.id))
        spans = (before, self._reader.span)
        self.n_thinking += "thinking" in spans
        special = token.id in self.tokenizer.special.values()
        data = b"" if special else self.tokenizer.decode_bytes([token.id])
        pieces = []
        if before == "content" and self._tool and spans[1] != "result":
            pieces += self._end_tool()  # a call without a result
        self._add_tool(token, data, spans)
        for kind, text in said:
            if kind == "result":
                pieces += self._end_tool()
                continue
            if kind == "call":
                if (call := read_call(text)).tool in self.functions:
                    pieces += self._end_tool(call)
                continue
            if data:
                self._unfinished.append(Part(text, data, token.scored, token.n_cycles))
            elif text and self._unfinished:
                self._unfinished[-1].text += text  # a character that this token cuts off
            if text:
                pieces += self._say(kind == "thinking")
        if not self.chat and not data:  # a text's tokens are all counted, also those without text
            self._unfinished.append(Part("", b"", token.scored, token.n_cycles))
        return pieces

    def end(self) -> list[Piece]:
        """What is left once no token follows."""
        if self.stopped:
            return []
        pieces = []
        if self._unfinished:
            self._unfinished[-1].text += "".join(text for _, text in self._reader.rest())
            pieces = self._say(self._reader.span == "thinking")
        if self._tool:
            pieces += self._end_tool()
        held, self._held = self._held, []
        return [*pieces, Piece(False, held)] if held else pieces

    def _add_tool(self, token: Token, data: bytes, spans: tuple[Kind, Kind]) -> None:
        """Keep a token of a call or a result, `spans` being where the reader was and is."""
        before, now = spans
        if not {"call", "result"} & set(spans):
            return
        mark = "" if before == now else {"call": OPEN, "result": ARROW}.get(now, "")
        text = self._tool_text.decode(data, final=not data) + mark
        self._tool.append(Part(text, data or mark.encode(), token.scored, token.n_cycles))

    def _end_tool(self, call: Call | None = None) -> list[Piece]:
        """Let go of a call: one of the client's function as such, any other as marked text."""
        parts, self._tool = self._tool, []
        held, self._held = self._held, []
        pieces = [Piece(False, held)] if held else []
        if call is None:
            parts[-1].text += self._tool_text.decode(b"", final=True) + CLOSE
            parts[-1].data += CLOSE.encode()
        return [*pieces, Piece(False, parts, call)]

    def _say(self, thinking: bool) -> list[Piece]:
        """Let go of the parts that make up whole characters, but for what may become a stop."""
        parts, self._unfinished = self._unfinished, []
        if thinking or not self.stops:
            return [Piece(thinking, parts)]
        self._held += parts
        text = "".join(part.text for part in self._held)
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:  # the one that is complete first
            self.stopped, safe = True, min(found)[1]
        else:
            safe = len(text) - self._overlap(text)
        gone: list[Part] = []
        while self._held and len(self._held[0].text) <= safe:
            safe -= len(self._held[0].text)
            gone.append(self._held.pop(0))
        if self.stopped and safe:  # the stop begins inside a token
            first = self._held[0]
            kept = first.text[:safe]
            gone.append(Part(kept, kept.encode(), first.scored, first.n_cycles))
        return [Piece(False, gone)] if gone else []

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` with which one of the stops may begin."""
        longest = min(len(text), max(map(len, self.stops)) - 1)
        for n in range(longest, 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self.stops):
                return n
        return 0


def prompt_parts(
    ids: Sequence[int], tokenizer: Tokenizer, scores: Sequence[Scored] | None
) -> list[Part]:
    """A prompt that is echoed, a part for each id; the first has no score."""
    reader, special = _PlainReader(tokenizer), set(tokenizer.special.values())
    found = [None, *scores] if scores is not None else [None] * len(ids)
    parts = []
    for token, scored in zip(ids, found, strict=True):
        text = "".join(text for _, text in reader.read(token))
        data = b"" if token in special else tokenizer.decode_bytes([token])
        parts.append(Part(text, data, scored))
    parts[-1].text += "".join(text for _, text in reader.rest())
    return parts


# --------------------------------------------------------------------------------------------- JSON


def chat_scores(parts: Sequence[Part], tokenizer: Tokenizer) -> list[Json]:
    """`logprobs.content` of these tokens; `cycles` is ours."""
    return [
        {
            "token": part.text,
            "logprob": max(LOWEST, part.scored.logprob),
            "bytes": list(part.data),
            "top_logprobs": [
                {
                    "token": tokenizer.decode([i]),
                    "logprob": max(LOWEST, p),
                    "bytes": list(tokenizer.decode_bytes([i])),
                }
                for i, p in part.scored.top
            ],
            "cycles": part.n_cycles,
        }
        for part in parts
        if part.scored is not None
    ]


def completion_scores(parts: Sequence[Part], tokenizer: Tokenizer, offset: int) -> Json:
    """`logprobs` of a completion; `offset` is where its first token stands in the text."""
    offsets = []
    for part in parts:
        offsets.append(offset)
        offset += len(part.text)
    top = []
    for part in parts:
        if part.scored is None:
            top.append(None)
            continue
        best = {part.text: max(LOWEST, part.scored.logprob)}
        for i, p in part.scored.top:
            text = tokenizer.decode([i])  # of two tokens with one text, the likelier
            best[text] = max(LOWEST, p, best.get(text, LOWEST))
        top.append(best)
    return {
        "tokens": [part.text for part in parts],
        "token_logprobs": [
            None if part.scored is None else max(LOWEST, part.scored.logprob) for part in parts
        ],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def delta(piece: Piece, tokenizer: Tokenizer, *, scores: bool) -> Json:
    """The fields of a chat chunk's choice that a piece fills."""
    if piece.call is not None:
        return {"delta": {"tool_calls": [{"index": 0, **tool_call(piece.call)}]}}
    names = ("reasoning", "reasoning_content") if piece.thinking else ("content",)
    found: Json = {"delta": dict.fromkeys(names, piece.text)}
    if scores:
        said = chat_scores(piece.parts, tokenizer)
        found["logprobs"] = (
            {"content": [], "reasoning": said} if piece.thinking else {"content": said}
        )
    return found


def tool_call(call: Call) -> Json:
    """A call of a client's function, which ends an answer."""
    function = {"name": call.tool, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def message(pieces: Sequence[Piece], tokenizer: Tokenizer, *, scores: bool) -> Json:
    """The fields of a whole chat choice."""
    calls = [tool_call(piece.call) for piece in pieces if piece.call is not None]
    pieces = [piece for piece in pieces if piece.call is None]
    said = {
        thinking: [part for piece in pieces if piece.thinking is thinking for part in piece.parts]
        for thinking in (False, True)
    }
    answer: Json = {"role": "assistant", "content": Piece(False, said[False]).text, "refusal": None}
    if calls:
        answer |= {"content": answer["content"] or None, "tool_calls": calls}
    if said[True]:
        answer |= dict.fromkeys(("reasoning", "reasoning_content"), Piece(True, said[True]).text)
    logprobs: Json | None = None
    if scores:
        logprobs = {"content": chat_scores(said[False], tokenizer)}
        if said[True]:
            logprobs["reasoning"] = chat_scores(said[True], tokenizer)
    return {"message": answer, "logprobs": logprobs}


def usage(n_prompt: int, n_cached: int, answers: Sequence[AnswerText]) -> Json:
    """Tokens read and said; `cycles` of the reasoning head over all of them are ours."""
    said = sum(answer.n_tokens for answer in answers)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": said,
        "total_tokens": n_prompt + said,
        "prompt_tokens_details": {"cached_tokens": n_cached},
        "completion_tokens_details": {"reasoning_tokens": sum(a.n_thinking for a in answers)},
        "cycles": sum(answer.n_cycles for answer in answers),
    }

"""A conversation with a checkpoint: its turns, how answers are drawn, what the last one took.

In: a loaded checkpoint and questions. Out: answers, piece by piece. Prints nothing, and knows no
terminal: a chat and a server alike hold one `Chat` per conversation.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from config import PRESETS, REASONING_PROMPT, ChatConfig, Config, UserError
from hearth.data.chat_format import (
    Answer,
    AnswerReader,
    Kind,
    Message,
    close_turn,
    parse_answer,
    render,
    render_turn,
    stop_ids,
)
from hearth.decoding.engine import Budget, Engine, Sampling, store_for
from hearth.decoding.matrices import compiler_missing
from hearth.decoding.tools import chat_tools
from hearth.log import count, size
from hearth.run import STAGES, THINKING
from hearth.training.checkpoint import Loaded

MAX_SEED = 2**60

Piece = tuple[Kind, str]  # what it is; its text, in whole characters


@dataclass
class Turn:
    """One turn as it was said, and as the model sees it."""

    message: Message
    ids: list[int]


@dataclass
class Timing:
    """What the last answer took."""

    reused: int = 0  # tokens of the prompt that the cache held
    read: int = 0  # tokens of the prompt that were new
    ids: list[int] = field(default_factory=list)  # the answer
    first_seconds: float = 0.0  # until the first token
    seconds: float = 0.0  # until the last
    n_cycles: int = 0  # of the reasoning head, over all tokens of the answer
    finish: str = ""  # stop, length, context, or interrupted

    @property
    def tokens_per_second(self) -> float:
        n, seconds = len(self.ids) - 1, self.seconds - self.first_seconds
        return n / seconds if n > 0 else 0.0

    @property
    def cycles_per_token(self) -> float:
        return self.n_cycles / max(1, len(self.ids))


def chat_settings(config: Config, named: Config | None) -> ChatConfig:
    """How answers are drawn: as this run says, or where it says nothing of its own, as the run of a
    checkpoint `named` by hand did.
    """
    untouched = config.chat == PRESETS[config.preset].chat
    return named.chat if named and untouched else config.chat


def before_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the texts that end an answer."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]


class Chat:
    """A conversation with a checkpoint.

    weights: how its matrices are stored: a name of STORES; auto is bfloat16 if many.
    """

    def __init__(
        self, loaded: Loaded, folder: Path, config: ChatConfig, *, weights: str = "auto"
    ) -> None:
        self.folder, self.tokenizer = folder, loaded.tokenizer
        self.stage, self.state = loaded.state.get("stage", "base"), loaded.state
        self.n_parameters = loaded.model.n_parameters()
        if weights == "auto":
            weights = store_for(self.n_parameters)
        self.store = weights
        self.engine = Engine(loaded.model, weights=weights, tokenizer=self.tokenizer)
        self.config = config
        self.set_sampling()
        self.system = config.system
        self.think = False  # ask for reasoning before the answer
        self.think_tokens: int | None = None  # longest reasoning; None is no limit
        self.stop: tuple[str, ...] = ()  # texts that end an answer
        self.notes: list[str] = []  # what the person should know
        self.clear()

    @property
    def is_base(self) -> bool:
        return self.stage == "base"

    @property
    def trained_cycles(self) -> int:
        """Cycles of the reasoning head in training; 0 without a head."""
        hrm = self.engine.model.config.hrm
        return hrm.h_cycles if hrm else 0

    def set_sampling(self, **changes: Any) -> None:
        """Change how answers are drawn; `UserError` for what cannot be."""
        chat = replace(self.config, **changes)
        try:
            sampling = Sampling(
                chat.temperature, chat.top_k, chat.top_p, chat.min_p, chat.repetition_penalty
            )
            if chat.max_tokens < 1:
                raise ValueError(f"max_tokens is {chat.max_tokens}, must be at least 1")
            if not 0 <= (chat.seed or 0) < MAX_SEED:
                raise ValueError(f"seed is {chat.seed}, must lie between 0 and {MAX_SEED}")
        except ValueError as error:
            raise UserError(f"chat.{error}.") from None
        self.config, self.sampling = chat, sampling

    def set_cycles(self, cycles: int | None) -> None:
        """How often the reasoning head cycles, None as trained; `UserError` for what cannot be."""
        self._check_head(cycles)
        if cycles is not None and not 1 <= cycles <= 64:
            raise UserError(f"{cycles} cycles; give 1 to 64.")
        self.engine.h_cycles = cycles
        trained, hrm = self.trained_cycles, self.engine.model.config.hrm
        if cycles and (cycles > trained or (cycles < trained and not hrm.deep_supervision)):
            self.notes.append(
                f"this model was trained with {_cycles(trained)}: with {cycles} its answers may be "
                "nonsense"
            )

    def set_early_exit(self, nats: float | None) -> None:
        """Below which change of the prediction, in nats, a token leaves the cycles; `UserError` for
        what cannot be.
        """
        self._check_head(nats)
        if nats is not None and not nats >= 0:
            raise UserError(f"Cycles are left early at {nats:g} nats; give at least 0.")
        self.engine.exit_kl_threshold = nats

    def _check_head(self, wanted: float | None) -> None:
        if wanted is not None and self.engine.model.head is None:
            raise UserError("This model has no reasoning head: it has no cycles to set.")

    def set_like(self, other: Chat, messages: list[Message]) -> None:
        """Answer as another chat would after these messages, as far as this model can."""
        self.system, self.think, self.think_tokens = other.system, other.think, other.think_tokens
        self.config, self.sampling, self.stop = other.config, other.sampling, other.stop
        ours, theirs = self.engine, other.engine
        if ours.model.head is not None:
            ours.h_cycles, ours.exit_kl_threshold = theirs.h_cycles, theirs.exit_kl_threshold
        self._set_turns(messages)

    # --------------------------------------------------------------------------------------- asking

    def ask(self, question: str) -> Iterator[Piece]:
        """The answer, piece by piece. The turn joins the conversation, also when it is broken off;
        a question that got no token is taken back.
        """
        message = {"role": "user", "content": question}
        if self.is_base:
            ids = [self.tokenizer.bos, *self.tokenizer.encode(question)]
            yield from self._until_stop(self._stream(ids, keep=1))
            self.turns = [Turn(message, []), self._answer_turn()]
            return
        self.turns.append(Turn(message, render_turn(message, self.tokenizer).ids))
        try:
            keep = len(self._head())
            yield from self._until_stop(self._stream(self._prompt(), keep=keep))
        finally:
            if self.timing.ids:
                self.turns.append(self._answer_turn())
            else:
                self.turns.pop()

    def asked(self) -> list[Message]:
        """The messages up to the last question; `UserError` where there is none."""
        messages = self.messages()
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if not messages:
            raise UserError("There is no question yet.")
        return messages

    def ask_again(self) -> Iterator[Piece]:
        """Another answer to the last question; `UserError` where there is none."""
        question = self.asked()[-1]["content"]
        self.undo()
        return self.ask(question)

    def undo(self) -> str | None:
        """Take back the last question and its answer; the question."""
        while self.turns:
            turn = self.turns.pop()
            self.first = min(self.first, len(self.turns))
            if turn.message["role"] == "user":
                return turn.message["content"]
        return None

    def clear(self) -> None:
        """Forget the conversation; how answers are drawn stays."""
        self._set_turns([])
        self.timing = Timing()

    def _set_turns(self, messages: list[Message]) -> None:
        self.turns = [Turn(m, render_turn(m, self.tokenizer).ids) for m in messages]
        self.first = 0  # the oldest turn that the model still sees

    def _system_turns(self) -> list[Message]:
        texts = (self.system, REASONING_PROMPT if self.think else None)
        return [{"role": "system", "content": text} for text in texts if text]

    def _head(self) -> list[int]:
        """What every prompt of this conversation begins with."""
        turns = (render_turn(message, self.tokenizer).ids for message in self._system_turns())
        return [self.tokenizer.bos, *(token for ids in turns for token in ids)]

    def _length(self) -> int:
        return len(self._head()) + sum(len(turn.ids) for turn in self.turns[self.first :])

    def _prompt(self) -> list[int]:
        """The ids that the model reads; once they leave no room to answer, the oldest turns are
        left out for good.
        """
        before, context = self.first, self.engine.context
        if self._length() + min(self.config.max_tokens, context // 4) >= context:
            while self._length() >= context // 2 and self.first < len(self.turns) - 1:
                self.first += 1
                while self.turns[self.first].message["role"] != "user":
                    self.first += 1
        if self.first > before:
            self._note_full(f"{self.first - before} oldest turns dropped")
        turns = [token for turn in self.turns[self.first :] for token in turn.ids]
        return [*self._head(), *turns, self.tokenizer.assistant]

    def _note_full(self, what: str) -> None:
        self.notes.append(f"the context of {self.engine.context} tokens is full: {what}")

    def _stream(self, prompt: list[int], *, keep: int) -> Iterator[Piece]:
        """Decode an answer and time it."""
        self.timing = timing = Timing(finish="interrupted")
        started = time.monotonic()
        stops, tokenizer, seed = stop_ids(self.tokenizer), self.tokenizer, self.config.seed
        budget = None
        if self.think_tokens is not None:
            budget = Budget(self.think_tokens, tokenizer.think, tokenizer.end_think)
        # a model that has learnt to reason may still forget to begin, above all late in a
        # conversation
        begin = [tokenizer.think] if self.think and self.stage in THINKING else []
        stream = self.engine.stream(
            prompt,
            max_tokens=self.config.max_tokens,
            stop_ids=stops,
            sampling=self.sampling,
            seed=random.randrange(MAX_SEED) if seed is None else seed + len(self.turns),
            budget=budget,
            begin=begin,
            tools=None if self.is_base else chat_tools(self.config),
            keep=keep,
        )
        timing.reused, timing.read = stream.reused, stream.read
        reader = AnswerReader(tokenizer)
        for token in stream:
            timing.ids.append(token)
            timing.seconds, timing.n_cycles = time.monotonic() - started, stream.n_cycles
            timing.first_seconds = timing.first_seconds or timing.seconds
            if token not in stops:
                yield from reader.read(token)
        yield from reader.rest()
        timing.finish = stream.finish
        if stream.dropped:
            self._note_full(f"{stream.dropped} tokens left out")
        if stream.finish == "length":
            self.notes.append(
                f"the answer was cut at {self.config.max_tokens} tokens (chat.max_tokens)"
            )

    def _until_stop(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """The pieces up to the first of the texts that end an answer; what may yet become one is
        held back.
        """
        held = ""
        for kind, text in pieces:
            if kind != "content":
                if held:
                    yield "content", held
                held = ""
                yield kind, text
                continue
            held += text
            if (kept := before_stop(held, self.stop)) != held:
                yield "content", kept
                self.timing.finish = "stop"
                return
            safe = next(
                at
                for at in range(len(held) + 1)
                if at == len(held) or any(stop.startswith(held[at:]) for stop in self.stop)
            )
            yield "content", held[:safe]
            held = held[safe:]
        yield "content", held

    def _answer_turn(self) -> Turn:
        return Turn(self._answer().message(), close_turn(self.timing.ids, self.tokenizer))

    def _answer(self) -> Answer:
        stops = stop_ids(self.tokenizer)
        spoken = [token for token in self.timing.ids if token not in stops]
        return parse_answer(spoken, self.tokenizer)

    # ------------------------------------------------------------------- saving, speaking of itself

    def messages(self) -> list[Message]:
        return [turn.message for turn in self.turns]

    def saved(self) -> dict[str, Any]:
        """The whole conversation as JSON holds it; its `messages` are what `set_messages` takes."""
        return {
            "checkpoint": str(self.folder),
            "chat": asdict(self.config),
            "messages": [*self._system_turns(), *self.messages()],
        }

    def set_messages(self, messages: list[Message]) -> None:
        """Put another conversation in the place of this one; ValueError for what is none."""
        render(messages, self.tokenizer)
        system = [m["content"] for m in messages if m["role"] == "system"]
        self.system = "\n".join(text for text in system if text != REASONING_PROMPT) or None
        self.think = REASONING_PROMPT in system
        self._set_turns([m for m in messages if m["role"] != "system"])

    def report(self) -> dict[str, Any]:
        """The last answer for a program."""
        t, answer = self.timing, self._answer()
        return {
            "checkpoint": str(self.folder),
            "text": before_stop(answer.content, self.stop),
            "thinking": answer.thinking,
            "calls": [part for part in answer.parts if "tool" in part],
            "ids": t.ids,
            "finish": t.finish,
            "prompt_tokens": t.reused + t.read,
            "reused_tokens": t.reused,
            "first_token_seconds": round(t.first_seconds, 4),
            "seconds": round(t.seconds, 4),
            "tokens_per_second": round(t.tokens_per_second, 1),
            "cycles_per_token": round(t.cycles_per_token, 3),
            "notes": self.take_notes(),
        }

    def take_notes(self) -> list[str]:
        notes, self.notes = self.notes, []
        return notes

    def introduction(self) -> str:
        """Which checkpoint this is, and what it costs."""
        engine, trained = self.engine, self.trained_cycles
        device = engine.model.device.type
        lines = [
            f"{self.folder}: {STAGES[self.stage].title}",
            f"{count(self.n_parameters)} parameters, {size(engine.weight_bytes())} in {self.store} "
            f"on {device}; {size(engine.cache_bytes())} for a context of {engine.context}",
        ]
        if trained:
            lines.append(f"reasoning head: trained with {_cycles(trained)}")
        return "\n".join(lines)

    def slow(self) -> str | None:
        """Why decoding is slower here than it could be, with the remedy; None where it is not."""
        if self.engine.model.device.type != "cpu" or not compiler_missing():
            return None
        return (
            "no C compiler works here: decoding is about 40% slower than it could be. Install gcc "
            "or clang (on Debian and Ubuntu: apt install gcc)."
        )

    def used(self) -> int:
        """Tokens of the context in use."""
        return min(self._length(), self.engine.context)

    def status(self) -> list[str]:
        """What the line below the prompt says, most important first."""
        speed = [f"{self.timing.tokens_per_second:.0f} tok/s"] if self.timing.ids else []
        thinks = ["thinking"] if self.think else []
        context = f"context {self.used()}/{self.engine.context}"
        early = self.engine.exit_kl_threshold is not None and self.timing.ids
        cycles = [f"{self.timing.cycles_per_token:.2f} cycles"] if early else []
        return [*speed, context, *cycles, self.stage, *thinks, f"temp {self.config.temperature:g}"]

    def drawing(self) -> str:
        """How tokens are drawn, in words."""
        c = self.config
        if c.temperature == 0:
            how = ["the likeliest token each time"]
        else:
            limits = {"top-k": c.top_k, "top-p": c.top_p, "min-p": c.min_p, "seed": c.seed}
            how = [
                f"temperature {c.temperature:g}",
                *(f"{name} {x}" for name, x in limits.items() if x is not None),
            ]
        if c.repetition_penalty != 1:
            how.append(f"repetition penalty {c.repetition_penalty:g}")
        return ", ".join(how)


def _cycles(number: int) -> str:
    return "1 cycle" if number == 1 else f"{number} cycles"

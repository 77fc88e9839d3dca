"""Talk with a checkpoint: in the terminal, in a pipe, or one question at a time.

In: a run's newest checkpoint of its furthest stage, or any checkpoint folder; your words. Out:
answers, streamed. A base model continues your text instead. Exit codes: 0 answered, 2 a mistake
of yours, 130 stopped by Ctrl-C.

    uv run chat_inference.py --preset demo                          a chat; /help lists its commands
    uv run chat_inference.py --preset demo -p "Who are you?"        one answer; --json for a program
    echo "Who are you?" | uv run chat_inference.py --preset demo    an answer to each line
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from config import PRESETS, REASONING_PROMPT, ChatConfig, Config, UserError
from hearth import cli, hardware
from hearth.data.chat_format import (
    AnswerReader,
    Message,
    close_turn,
    parse_answer,
    render,
    render_turn,
    stop_ids,
)
from hearth.decoding.engine import Budget, Engine, Sampling
from hearth.log import count, size
from hearth.serving.terminal import (
    Keyboard,
    PlainScreen,
    RichScreen,
    Screen,
    is_dumb,
    lines_of,
    neutral,
    say,
    tolerate_any_text,
)
from hearth.training import checkpoint

# furthest first
STAGES = {"sft2": "stage 2 of fine-tuning", "sft1": "stage 1 of fine-tuning", "base": "base model"}
SMALL = 20_000_000  # parameters up to which float32 is fast enough


@dataclass(frozen=True)
class Options:
    """What this script alone can be told."""

    # answer this once, then end
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    # any checkpoint folder; None takes the newest of the furthest stage
    checkpoint: str | None = None
    # how they are stored; auto: bfloat16 if many
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    # of the head; None: as trained
    cycles: Annotated[int | None, tyro.conf.arg(aliases=["--think_cycles"])] = None
    # leave the head's cycles once the prediction moves by less, in nats (KL)
    early_exit: float | None = None
    think: bool = False  # ask for reasoning before the answer
    think_tokens: int | None = None  # longest reasoning, in tokens; None is as long as it likes
    stop: tuple[str, ...] = ()  # texts that end an answer
    json: bool = False  # one JSON object an answer: ids, text, timings


def main(config: Config, options: Options) -> None:
    """Open the chat; or answer the prompt given, the lines of the pipe, or the preset's sample
    questions.
    """
    tolerate_any_text()
    folder = Path(options.checkpoint) if options.checkpoint else find_checkpoint(config)
    chat = Chat.load(folder, config, options)
    if options.prompt is not None:
        answer_each([options.prompt], chat, options, alone=True)
    elif sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()) or options.json:
        questions = lines_of(sys.stdin) or chat.samples(config)
        print(chat.introduction(), file=sys.stderr)
        answer_each(questions, chat, options, alone=False)
    else:
        Terminal(chat, config, options).run()


def find_checkpoint(config: Config) -> Path:
    """The newest checkpoint of the furthest stage of this run; `UserError` says how to make one."""
    for stage in STAGES:
        if (found := checkpoint.newest(config.run_dir / stage)) is not None:
            return found
    raise UserError(
        f"No checkpoint in {config.run_dir}: looked for {', '.join(STAGES)}. "
        f"Make one with `{config.command('run_pipeline.py')}`."
    )


def answer_each(questions: Iterable[str], chat: Chat, options: Options, *, alone: bool) -> None:
    """Print the answer to each question, as text or as a JSON object a line; `alone` leaves out all
    else.
    """
    for question in questions:
        if not question.strip():
            raise UserError("The prompt is empty. Give -p some text.")
        if options.json:
            for _ in chat.ask(question):
                pass
            print(json.dumps(chat.report()), flush=True)
            continue
        if not alone:
            print(f"\n> {neutral(question[:2000])}")
        screen = new_screen(thoughts=not alone or sys.stdout.isatty())
        show(chat.ask(question), screen)
        for note in chat.take_notes():
            print(f"note: {note}", file=sys.stderr)


def new_screen(*, thoughts: bool) -> Screen:
    """The best that standard output can do."""
    if not sys.stdout.isatty() or is_dumb():
        return PlainScreen(sys.stdout, thoughts=thoughts)
    from rich.console import Console

    return RichScreen(Console(highlight=False), thoughts=thoughts)


def show(answer: Iterator[tuple[bool, str]], screen: Screen) -> None:
    """Draw an answer as it comes; whatever ends it, what was said stays on the screen."""
    try:
        for thinking, text in answer:
            screen.add(thinking, text)
    finally:
        screen.end()


# --------------------------------------------------------------------------------- the conversation


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
        return (
            (len(self.ids) - 1) / (self.seconds - self.first_seconds) if len(self.ids) > 1 else 0.0
        )

    @property
    def cycles_per_token(self) -> float:
        return self.n_cycles / max(1, len(self.ids))


class Chat:
    """A conversation with a checkpoint: its turns, how answers are drawn, and what the last one
    took.
    """

    def __init__(
        self, loaded: checkpoint.Loaded, folder: Path, chat: ChatConfig, options: Options
    ) -> None:
        self.folder, self.tokenizer, self.options = folder, loaded.tokenizer, options
        self.stage, self.state = loaded.state.get("stage", "base"), loaded.state
        self.n_parameters = loaded.model.n_parameters()
        store = options.weights
        if store == "auto":
            store = "float32" if self.n_parameters < SMALL else "bfloat16"
        self.store = store
        self.engine = Engine(loaded.model, weights=store)
        self.set_cycles(options.cycles)
        self.set_early_exit(options.early_exit)
        self.config = chat
        self.set_sampling()
        if chat.max_tokens < 1:
            raise UserError(f"chat.max_tokens is {chat.max_tokens}, must be at least 1.")
        self.system, self.think, self.think_tokens = (
            chat.system,
            options.think,
            options.think_tokens,
        )
        self.turns: list[Turn] = []
        self.first = 0  # the oldest turn that the model still sees
        self.notes: list[str] = []  # what the person should know
        self.timing = Timing()

    @classmethod
    def load(cls, folder: Path, config: Config, options: Options) -> Chat:
        loaded = checkpoint.load_for_inference(folder, hardware.pick_device(config.device))
        last = checkpoint.newest(folder) or folder
        untouched = config.chat == PRESETS[config.preset].chat
        chat = loaded.config.chat if options.checkpoint and untouched else config.chat
        return cls(loaded, last, chat, options)

    @property
    def is_base(self) -> bool:
        return self.stage == "base"

    def samples(self, config: Config) -> tuple[str, ...]:
        return config.pretrain.prompts if self.is_base else config.sft2.prompts

    def set_sampling(self, **changes: Any) -> None:
        """Change how answers are drawn; ValueError for what cannot be."""
        chat = replace(self.config, **changes)
        try:
            sampling = Sampling(
                chat.temperature, chat.top_k, chat.top_p, chat.min_p, chat.repetition_penalty
            )
        except ValueError as error:
            raise UserError(f"chat.{error}.") from None
        self.config, self.sampling = chat, sampling

    def set_cycles(self, cycles: int | None) -> None:
        """How often the reasoning head cycles; UserError for what cannot be."""
        self._check_head(cycles)
        if cycles is not None and not 1 <= cycles <= 64:
            raise UserError(f"{cycles} cycles; give 1 to 64.")
        self.engine.h_cycles = cycles

    def set_early_exit(self, nats: float | None) -> None:
        """Below which change of the prediction, in nats, a token leaves the cycles; UserError for
        what cannot be.
        """
        self._check_head(nats)
        if nats is not None and not nats >= 0:
            raise UserError(f"Cycles are left early at {nats:g} nats; give at least 0.")
        self.engine.exit_kl_threshold = nats

    def _check_head(self, wanted: float | None) -> None:
        if wanted is not None and self.engine.model.head is None:
            raise UserError("This model has no reasoning head: it has no cycles to set.")

    def set_like(self, other: Chat) -> None:
        """Answer as another chat would, as far as this model can."""
        self.system, self.think, self.think_tokens = other.system, other.think, other.think_tokens
        self.config, self.sampling = other.config, other.sampling
        if self.engine.model.head is not None:
            theirs = other.engine
            self.engine.h_cycles, self.engine.exit_kl_threshold = (
                theirs.h_cycles,
                theirs.exit_kl_threshold,
            )

    # --------------------------------------------------------------------------------------- asking

    def ask(self, question: str) -> Iterator[tuple[bool, str]]:
        """The answer as (is it thinking?, text) in whole characters. The turn joins the
        conversation, also when it is broken off; a question that got no token is taken back.
        """
        if self.is_base:
            yield from self._until_stop(
                self._stream([self.tokenizer.bos, *self.tokenizer.encode(question)], keep=1)
            )
            self.turns = [Turn({"role": "user", "content": question}, []), self._answer_turn()]
            return
        message = {"role": "user", "content": question}
        self.turns.append(Turn(message, render_turn(message, self.tokenizer).ids))
        try:
            head = self._head()
            yield from self._until_stop(self._stream(self._prompt(head), keep=len(head)))
        finally:
            if self.timing.ids:
                self.turns.append(self._answer_turn())
            else:
                self.turns.pop()

    def ask_again(self) -> Iterator[tuple[bool, str]]:
        """Another answer to the last question; UserError where there is none."""
        question = self.undo()
        if question is None:
            raise UserError("There is no question yet.")
        return self.ask(question)

    def undo(self) -> str | None:
        """Take back the last question and its answer; the question."""
        while self.turns:
            turn = self.turns.pop()
            self.first = min(self.first, len(self.turns))
            if turn.message["role"] == "user":
                return turn.message["content"]
        return None

    def _head(self) -> list[int]:
        """What every prompt of this conversation begins with."""
        ids = [self.tokenizer.bos]
        for text in (self.system, REASONING_PROMPT if self.think else None):
            if text:
                ids += render_turn({"role": "system", "content": text}, self.tokenizer).ids
        return ids

    def _prompt(self, head: list[int]) -> list[int]:
        """The ids that the model reads; once they leave no room to answer, the oldest turns are
        left out for good.
        """
        room = min(self.config.max_tokens, self.engine.context // 4)

        def length() -> int:
            return len(head) + sum(len(turn.ids) for turn in self.turns[self.first :]) + 1

        if length() + room > self.engine.context:
            before = self.first
            while length() > self.engine.context // 2 and self.first < len(self.turns) - 1:
                self.first += 1
                while self.turns[self.first].message["role"] != "user":
                    self.first += 1
            if self.first > before:
                self._note_full(f"{self.first - before} oldest turns dropped")
        turns = [token for turn in self.turns[self.first :] for token in turn.ids]
        return [*head, *turns, self.tokenizer.assistant]

    def _note_full(self, what: str) -> None:
        self.notes.append(f"the context of {self.engine.context} tokens is full: {what}")

    def _stream(self, prompt: list[int], *, keep: int) -> Iterator[tuple[bool, str]]:
        """Decode an answer and time it."""
        self.timing = timing = Timing(finish="interrupted")
        started = time.monotonic()
        stops = stop_ids(self.tokenizer)
        budget = None
        if self.think_tokens is not None:
            budget = Budget(self.think_tokens, self.tokenizer.think, self.tokenizer.end_think)
        # a model that has learnt to reason may still forget to begin, above all late in a
        # conversation
        begin = [self.tokenizer.think] if self.think and self.stage == "sft2" else []
        seed = (
            random.randrange(2**60)
            if self.config.seed is None
            else self.config.seed + len(self.turns)
        )
        stream = self.engine.stream(
            prompt,
            max_tokens=self.config.max_tokens,
            stop_ids=stops,
            sampling=self.sampling,
            seed=seed,
            budget=budget,
            begin=begin,
            keep=keep,
        )
        timing.reused, timing.read = stream.reused, stream.read
        reader = AnswerReader(self.tokenizer)
        for token in stream:
            timing.ids.append(token)
            timing.seconds, timing.n_cycles = time.monotonic() - started, stream.n_cycles
            timing.first_seconds = timing.first_seconds or timing.seconds
            if token not in stops:
                yield from reader.read(token)
        yield reader.thinking, reader.rest()
        timing.finish = stream.finish
        if stream.dropped:
            self._note_full(f"{stream.dropped} tokens left out")
        if stream.finish == "length":
            self.notes.append(
                f"the answer was cut at {self.config.max_tokens} tokens (chat.max_tokens)"
            )

    def _until_stop(self, parts: Iterator[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
        """The parts up to the first of the texts that end an answer; what may yet become one is
        held back.
        """
        held = ""
        for thinking, text in parts:
            if thinking or not self.options.stop:
                yield thinking, text
                continue
            held += text
            found = [at for stop in self.options.stop if (at := held.find(stop)) >= 0]
            if found:
                yield False, held[: min(found)]
                self.timing.finish = "stop"
                return
            longest = max(map(len, self.options.stop)) - 1
            overlaps = (
                n
                for n in range(min(longest, len(held)), 0, -1)
                if _may_become(held[-n:], self.options.stop)
            )
            safe = len(held) - next(overlaps, 0)
            yield False, held[:safe]
            held = held[safe:]
        yield False, held

    def _answer_turn(self) -> Turn:
        answer = parse_answer(self._spoken(), self.tokenizer)
        message = {"role": "assistant", "content": answer.content, "thinking": answer.thinking}
        return Turn(message, close_turn(self.timing.ids, self.tokenizer))

    def _spoken(self) -> list[int]:
        stops = stop_ids(self.tokenizer)
        return [token for token in self.timing.ids if token not in stops]

    # ------------------------------------------------------------------- saving, speaking of itself

    def messages(self) -> list[Message]:
        return [turn.message for turn in self.turns]

    def set_messages(self, messages: list[Message]) -> None:
        """Put another conversation in the place of this one; ValueError for what is none."""
        render(messages, self.tokenizer)
        first_turns = [
            m["content"]
            for m in messages
            if m["role"] == "system" and m["content"] != REASONING_PROMPT
        ]
        self.system = "\n".join(first_turns) or None
        self.think = any(
            m["content"] == REASONING_PROMPT for m in messages if m["role"] == "system"
        )
        rest = [m for m in messages if m["role"] != "system"]
        self.turns, self.first = [Turn(m, render_turn(m, self.tokenizer).ids) for m in rest], 0

    def report(self) -> dict[str, Any]:
        """The last answer for a program."""
        t, answer = self.timing, parse_answer(self._spoken(), self.tokenizer)
        return {
            "checkpoint": str(self.folder),
            "text": answer.content,
            "thinking": answer.thinking,
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
        return (
            f"{self.folder}: {STAGES.get(self.stage, self.stage)}\n"
            f"{count(self.n_parameters)} parameters, {size(self.engine.weight_bytes())} in "
            f"{self.store} on "
            f"{self.engine.model.device.type}; {size(self.engine.cache_bytes())} for a context of "
            f"{self.engine.context}"
        )

    def used(self) -> int:
        """Tokens of the context in use."""
        turns = sum(len(turn.ids) for turn in self.turns[self.first :])
        return min(len(self._head()) + turns, self.engine.context)

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
            limits = {"top-k": c.top_k, "top-p": c.top_p, "min-p": c.min_p}
            how = [
                f"temperature {c.temperature:g}",
                *(f"{name} {x:g}" for name, x in limits.items() if x is not None),
            ]
        if c.repetition_penalty != 1:
            how.append(f"repetition penalty {c.repetition_penalty:g}")
        return ", ".join(how)


def _may_become(text: str, stops: tuple[str, ...]) -> bool:
    return any(stop.startswith(text) for stop in stops)


# ------------------------------------------------------------------------------------- the terminal


class Terminal:
    """The chat of a person: reads lines, answers them, obeys commands. Each `do_NAME` is the
    command /NAME.
    """

    def __init__(self, chat: Chat, config: Config, options: Options) -> None:
        self.chat, self.run_config, self.options = chat, config, options
        self.thoughts = True  # shown, not folded
        self.commands: dict[str, Callable[[str], None]] = {
            name.removeprefix("do_").replace("_", "-"): getattr(self, name)
            for name in dir(self)
            if name[:3] == "do_"
        }
        self.others: dict[Path, Chat] = {}  # checkpoints loaded for /compare
        words = [f"/{name}" for name in self.commands]
        history = config.run_dir / "chat_history" if config.run_dir.is_dir() else None
        self.keyboard = Keyboard(words, history, chat.status)

    def run(self) -> None:
        """Until the person ends it."""
        say(self.chat.introduction(), 2)
        what = "Type the beginning of a text." if self.chat.is_base else "Type a message."
        say(f"{what} /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
        print()
        while True:
            try:
                line = self.keyboard.read().rstrip()
                if not line.strip():
                    continue
                if line.startswith("/"):
                    self.obey(line)
                else:
                    self.answer(self.chat.ask(line.lstrip()))
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("(Ctrl-D ends the chat)")
            except UserError as error:
                say(f"error: {error}", 2)

    def obey(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        if name not in self.commands:
            raise UserError(
                f"there is no command /{name[:40]}; /help lists them. A message may begin with a "
                "space."
            )
        self.commands[name](argument.strip())

    def answer(self, parts: Iterator[tuple[bool, str]]) -> None:
        """Draw an answer; Ctrl-C ends it and keeps what was said."""
        try:
            show(parts, new_screen(thoughts=self.thoughts))
        except KeyboardInterrupt:
            print("(stopped)")
        finally:
            parts.close()
        for note in self.chat.take_notes():
            say(f"({note})", 1)

    def do_help(self, argument: str) -> None:
        """this list"""
        for name, command in self.commands.items():
            say(f"  /{name:<9} {' '.join(command.__doc__.split())}", 13)
        say("  Alt-Enter begins a new line, the arrow keys bring back what was typed.", 2)

    def do_system(self, argument: str) -> None:
        """TEXT: set the system prompt; without text, show it; `none` removes it"""
        if argument:
            self.chat.system = None if argument.lower() == "none" else argument
        say(f"system prompt: {self.chat.system or 'none'}", 2)

    def do_think(self, argument: str) -> None:
        """on, off: ask for reasoning or not; fold, show: hide it or not; N: at most N tokens; none:
        no limit
        """
        if argument in ("", "on", "off"):
            self.chat.think = not self.chat.think if not argument else argument == "on"
        elif argument in ("fold", "show"):
            self.thoughts = argument == "show"
        elif argument == "none":
            self.chat.think_tokens = None
        else:
            self.chat.think_tokens = _whole_number(
                argument, "/think on, off, fold, show, none or a number of tokens"
            )
        limit = (
            "no limit"
            if self.chat.think_tokens is None
            else f"at most {self.chat.think_tokens} tokens"
        )
        asked = "asked for" if self.chat.think else "not asked for"
        say(f"reasoning: {asked}, {'shown' if self.thoughts else 'folded'}, {limit}")

    def do_cycles(self, argument: str) -> None:
        """N: let the reasoning head cycle N times; without a number, as trained; early X: leave the
        cycles once the prediction moves by less than X nats; `early none` runs them all
        """
        usage, engine = "/cycles N, or /cycles early X", self.chat.engine
        name, _, value = argument.partition(" ")
        if name == "early":
            self.chat.set_early_exit(
                None if value.strip() == "none" else _number(value.strip(), usage)
            )
        else:
            self.chat.set_cycles(_whole_number(argument, usage) if argument else None)
        early = (
            ""
            if engine.exit_kl_threshold is None
            else f", left early below {engine.exit_kl_threshold:g} nats"
        )
        print(f"cycles: {'as trained' if engine.h_cycles is None else engine.h_cycles}{early}")

    def do_temp(self, argument: str) -> None:
        """X: set the temperature; 0 takes the likeliest token each time"""
        if argument:
            self.chat.set_sampling(temperature=_number(argument, "/temp X"))
        print(f"temperature: {self.chat.config.temperature:g}")

    def do_top_p(self, argument: str) -> None:
        """X: draw from the likeliest tokens that make up this probability; `none` draws from all"""
        if argument:
            self.chat.set_sampling(
                top_p=None if argument == "none" else _number(argument, "/top-p X")
            )
        print(f"top-p: {'none' if self.chat.config.top_p is None else self.chat.config.top_p}")

    def do_regen(self, argument: str) -> None:
        """answer the last question again"""
        self.answer(self.chat.ask_again())

    def do_undo(self, argument: str) -> None:
        """take back the last question and its answer"""
        question = self.chat.undo()
        say("nothing to take back" if question is None else f"taken back: {question[:200]}", 2)

    def do_save(self, argument: str) -> None:
        """FILE: write the conversation as JSON"""
        path = _path(argument, "/save FILE")
        heads = [(self.chat.system), REASONING_PROMPT if self.chat.think else None]
        messages = [
            {"role": "system", "content": text} for text in heads if text
        ] + self.chat.messages()
        content = {
            "checkpoint": str(self.chat.folder),
            "chat": asdict(self.chat.config),
            "messages": messages,
        }
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
        except FileExistsError:
            raise UserError(f"{path} exists; give another name") from None
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        say(f"saved {len(messages)} turns to {path}")

    def do_load(self, argument: str) -> None:
        """FILE: go on with a conversation that was saved"""
        path = _path(argument, "/load FILE")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            messages = content["messages"] if isinstance(content, dict) else content
            self.chat.set_messages([dict(message) for message in messages])
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} holds no conversation: {error}") from None
        for message in self.chat.messages():
            say(f"{message['role']}: {message['content']}", 2)

    def do_stats(self, argument: str) -> None:
        """what the model is, what it takes, how fast it was"""
        chat, t = self.chat, self.chat.timing
        held = chat.engine.cache.n_bytes() if chat.engine.cache else 0
        say(chat.introduction(), 2)
        say(
            f"  trained  step {chat.state.get('step')}, {count(chat.state.get('tokens') or 0)} "
            "tokens"
        )
        say(
            f"  cache    {size(held)} set aside; {chat.used()} of {chat.engine.context} tokens in "
            "use",
            11,
        )
        prompt = f"{t.read} tokens read, {t.reused} held by the cache"
        say(f"  prompt   {prompt}; {t.first_seconds:.2f} s to the first token", 11)
        say(
            f"  answer   {len(t.ids)} tokens, {t.tokens_per_second:.1f} a second; finish: "
            f"{t.finish or 'none yet'}",
            11,
        )
        if chat.engine.n_cycles:
            say(
                f"  head     {t.cycles_per_token:.2f} of {chat.engine.n_cycles} cycles per token",
                11,
            )
        say(f"  drawing  {chat.drawing()}", 11)

    def do_compare(self, argument: str) -> None:
        """CHECKPOINT: let another checkpoint answer the last question: a folder, or base, sft1,
        sft2 of this run
        """
        path = _path(argument, "/compare CHECKPOINT")
        path = self.run_config.run_dir / argument if argument in STAGES else path
        questions = [
            n for n, message in enumerate(self.chat.messages()) if message["role"] == "user"
        ]
        if not questions:
            raise UserError("There is no question yet.")
        if path not in self.others:
            plain = replace(self.options, checkpoint=str(path), cycles=None, early_exit=None)
            self.others[path] = Chat.load(path, self.run_config, plain)
        other, messages = self.others[path], self.chat.messages()[: questions[-1] + 1]
        other.set_like(self.chat)
        other.turns = [Turn(m, render_turn(m, other.tokenizer).ids) for m in messages[:-1]]
        other.first = 0
        say(other.introduction(), 2)
        self.answer(other.ask(messages[-1]["content"]))

    def do_quit(self, argument: str) -> None:
        """end the chat (also Ctrl-D)"""
        raise EOFError


def _number(text: str, usage: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{text[:40]!r} is no number: {usage}") from None


def _whole_number(text: str, usage: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise UserError(f"{text[:40]!r} is no whole number: {usage}") from None
    if number < 0:
        raise UserError(f"{number} is negative: {usage}")
    return number


def _path(text: str, usage: str) -> Path:
    if not text or "\0" in text:
        raise UserError(f"a file is missing: {usage}")
    return Path(text).expanduser()


def run() -> None:
    """`main`, for a person or a pipe."""
    try:
        main(*cli.parse_cli_with(Options(), __doc__))
    except UserError as error:
        raise UserError(neutral(str(error))) from error
    except BrokenPipeError:  # the reader of the pipe has gone: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    cli.run_script(run, "stopped.")

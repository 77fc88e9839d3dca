"""The chat of a person: reads lines, answers them, obeys commands.

In: a `Chat`, and what is typed. Out: the terminal. To add a command, write a method `do_NAME`: its
docstring is its help.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from config import UserError
from hearth.log import count, size
from hearth.serving.conversation import Chat, Piece
from hearth.serving.marks import marked
from hearth.serving.terminal import Keyboard, new_screen, say, show


class Terminal:
    """A chat in the terminal. `load` gives the chat with the checkpoint that a word names."""

    def __init__(self, chat: Chat, load: Callable[[str], Chat], history: Path | None) -> None:
        self.chat, self.load = chat, load
        self.thoughts = True  # shown, not folded
        self.commands: dict[str, Callable[[str], None]] = {
            name.removeprefix("do_").replace("_", "-"): getattr(self, name)
            for name in dir(self)
            if name.startswith("do_")
        }
        self.others: dict[str, Chat] = {}  # checkpoints loaded for /compare
        words = [f"/{name}" for name in self.commands]
        self.keyboard = Keyboard(words, history, chat.status)

    def run(self) -> None:
        """Until the person ends it."""
        self._introduce()
        what = "Type the beginning of a text." if self.chat.is_base else "Type a message."
        say(f"{what} /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
        while True:
            try:
                for note in self.chat.take_notes():
                    say(f"({note})", 1)
                self._take(self.keyboard.read().rstrip())
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("(Ctrl-D ends the chat)")
            except UserError as error:
                say(f"error: {error}", 2)

    def _introduce(self) -> None:
        say(self.chat.introduction(), 2)
        if reason := self.chat.slow():
            say(reason, 2)

    def _take(self, line: str) -> None:
        """Obey or answer a line."""
        if not line.startswith("/"):
            if line.strip():
                self._answer(self.chat.ask(line.lstrip()))
            return
        name, _, argument = line[1:].partition(" ")
        if name not in self.commands:
            near = difflib.get_close_matches(name[:40], self.commands, 1)
            guess = f"did you mean /{near[0]}?" if near else "/help lists them."
            raise UserError(
                f"there is no command /{name[:40]}; {guess} A message may begin with a space."
            )
        self.commands[name](argument.strip())

    def _answer(self, pieces: Iterator[Piece]) -> None:
        """Draw an answer; Ctrl-C ends it and keeps what was said."""
        try:
            show(pieces, new_screen(thoughts=self.thoughts))
        except KeyboardInterrupt:
            print("(stopped)")
        finally:
            pieces.close()

    def _set(self, name: str, argument: str, kind: type = float) -> None:
        """Show a setting of `ChatConfig`, after setting it to the argument if there is one."""
        label = name.replace("_", "-")
        if argument == "none" and name != "temperature":
            self.chat.set_sampling(**{name: None})
        elif argument:
            self.chat.set_sampling(**{name: _number(argument, f"/{label} N", kind)})
        value = getattr(self.chat.config, name)
        print(f"{label}: {'none' if value is None else value}")

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
        chat = self.chat
        if argument in ("", "on", "off"):
            chat.think = argument == "on" or (not argument and not chat.think)
        elif argument in ("fold", "show"):
            self.thoughts = argument == "show"
        elif argument == "none":
            chat.think_tokens = None
        else:
            usage = "/think on, off, fold, show, none or a number of tokens"
            tokens = _number(argument, usage, int)
            if tokens < 0:
                raise UserError(f"{tokens} is negative: {usage}")
            chat.think_tokens = tokens
        limit = "no limit" if chat.think_tokens is None else f"at most {chat.think_tokens} tokens"
        asked = "asked for" if chat.think else "not asked for"
        say(f"reasoning: {asked}, {'shown' if self.thoughts else 'folded'}, {limit}")

    def do_cycles(self, argument: str) -> None:
        """N: let the reasoning head cycle N times; without a number, as trained; early X: leave the
        cycles once the prediction moves by less than X nats; `early none` runs them all
        """
        usage, engine = "/cycles N, or /cycles early X", self.chat.engine
        name, _, value = argument.partition(" ")
        if name == "early":
            value = value.strip()
            self.chat.set_early_exit(None if value == "none" else _number(value, usage))
        else:
            self.chat.set_cycles(_number(argument, usage, int) if argument else None)
        cycles = engine.h_cycles or f"{self.chat.trained_cycles}, as trained"
        nats = engine.exit_kl_threshold
        print(f"cycles: {cycles}{'' if nats is None else f', left early below {nats:g} nats'}")

    def do_temp(self, argument: str) -> None:
        """X: set the temperature; 0 takes the likeliest token each time"""
        self._set("temperature", argument)

    def do_top_k(self, argument: str) -> None:
        """N: draw from the N likeliest tokens; `none` draws from all"""
        self._set("top_k", argument, int)

    def do_top_p(self, argument: str) -> None:
        """X: draw from the likeliest tokens that make up this probability; `none` draws from all"""
        self._set("top_p", argument)

    def do_seed(self, argument: str) -> None:
        """N: draw the same answers each time; `none` draws others"""
        self._set("seed", argument, int)

    def do_regen(self, argument: str) -> None:
        """answer the last question again"""
        self._answer(self.chat.ask_again())

    def do_undo(self, argument: str) -> None:
        """take back the last question and its answer"""
        question = self.chat.undo()
        say("nothing to take back" if question is None else f"taken back: {question[:200]}", 2)

    def do_clear(self, argument: str) -> None:
        """forget the conversation; the settings stay"""
        self.chat.clear()
        print("cleared")

    def do_save(self, argument: str) -> None:
        """FILE: write the conversation as JSON"""
        path, content = _path(argument, "/save FILE"), self.chat.saved()
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
        except FileExistsError:
            raise UserError(f"{path} exists; give another name") from None
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        say(f"saved {len(content['messages'])} turns to {path}")

    def do_load(self, argument: str) -> None:
        """FILE: continue a conversation that was saved"""
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
            say(f"{message['role']}: {marked(message['content'])}", 2)

    def do_stats(self, argument: str) -> None:
        """what the model is, what it takes, how fast it was"""
        self._introduce()
        chat, t = self.chat, self.chat.timing
        held = chat.engine.cache.n_bytes() if chat.engine.cache else 0
        tokens = count(chat.state.get("tokens") or 0)
        lines = {
            "trained": f"step {chat.state.get('step')}, {tokens} tokens",
            "cache": f"{size(held)} set aside; {chat.used()} of {chat.engine.context} tokens in "
            "use",
            "prompt": f"{t.read} tokens read, {t.reused} held by the cache; {t.first_seconds:.2f} "
            "s to the first token",
            "answer": f"{len(t.ids)} tokens, {t.tokens_per_second:.1f} a second; finish: "
            f"{t.finish or 'none yet'}",
        }
        if chat.engine.n_cycles:
            lines["head"] = f"{t.cycles_per_token:.2f} of {chat.engine.n_cycles} cycles per token"
        lines["drawing"] = chat.drawing()
        for name, line in lines.items():
            say(f"  {name:<8} {line}", 11)

    def do_compare(self, argument: str) -> None:
        """CHECKPOINT: let another checkpoint answer the last question: a folder, or a stage of
        this run such as base
        """
        name, messages = str(_path(argument, "/compare CHECKPOINT")), self.chat.asked()
        if name not in self.others:
            self.others[name] = self.load(name)
        other = self.others[name]
        other.set_like(self.chat, messages[:-1])
        say(other.introduction(), 2)
        self._answer(other.ask(messages[-1]["content"]))
        self.chat.notes += other.take_notes()

    def do_quit(self, argument: str) -> None:
        """end the chat (also Ctrl-D)"""
        raise EOFError


def _number(text: str, usage: str, kind: type = float) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise UserError(f"{text[:40]!r} is no {what}: {usage}") from None


def _path(text: str, usage: str) -> Path:
    if not text or "\0" in text:
        raise UserError(f"a file is missing: {usage}")
    return Path(text).expanduser()

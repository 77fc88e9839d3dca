"""Talk with a checkpoint in the terminal.

In: a run's newest checkpoint (stage 2, stage 1 or base), your words. Out: answers, streamed.

    uv run chat_inference.py --preset demo
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import config as settings
from config import Config, UserError
from conversation import parse_answer, render
from engine import Engine, Sampling
from tokenizer import Tokenizer

STAGES = ("sft2", "sft1", "base")  # the furthest first


@dataclass(frozen=True)
class Options:
    """What this script alone can be told."""

    checkpoint: str | None = None  # any checkpoint folder; None takes the newest of the furthest stage


def main(config: Config, options: Options) -> None:
    """Open the chat, or answer what stands in the pipe, or a few sample questions."""
    folder = Path(options.checkpoint) if options.checkpoint else find_checkpoint(config)
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    loaded = checkpoint.load_for_inference(folder, device)
    print(f"{folder}: {loaded.model.n_parameters() / 1e6:.1f}M parameters, {loaded.state['stage']}")
    chat = Chat(Engine(loaded.model), loaded.tokenizer, config)
    for question in questions(config):
        for text in chat.ask(question):
            print(neutral(text), end="", flush=True)
        print()


def find_checkpoint(config: Config) -> Path:
    """The newest checkpoint of the furthest stage of this run; `UserError` says how to make one."""
    for stage in STAGES:
        if (found := checkpoint.newest(config.run_dir / stage)) is not None:
            return found
    raise UserError(
        f"No checkpoint in {config.run_dir}: looked for {', '.join(STAGES)}. "
        f"Make one with `{config.command('run_pipeline.py')}`."
    )


def questions(config: Config) -> Iterator[str]:
    """What the user types; or the lines of a pipe; or, where there are none, the preset's sample questions."""
    if sys.stdin is None or not sys.stdin.isatty():
        lines = [line.strip() for line in (sys.stdin or ()) if line.strip()]
        for line in lines or config.sft2.prompts:
            print(f"\n> {neutral(line)}")
            yield line
        return
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line:
            yield line


class Chat:
    """A conversation: its turns, and what answers them."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: Config) -> None:
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        chat = config.chat
        self.sampling = Sampling(chat.temperature, chat.top_k, chat.top_p, chat.min_p, chat.repetition_penalty)
        self.messages = [{"role": "system", "content": chat.system}] if chat.system else []

    def ask(self, question: str) -> Iterator[str]:
        """The answer's text as it is decoded, in whole characters; the turn joins the conversation."""
        self.messages.append({"role": "user", "content": question})
        prompt = render(self.messages, self.tokenizer, answer=True).ids
        stream = self.engine.stream(
            prompt,
            max_tokens=self.config.chat.max_tokens,
            stop_ids=[self.tokenizer.end, self.tokenizer.bos],
            sampling=self.sampling,
            seed=self.config.chat.seed if self.config.chat.seed is not None else torch.seed() % 2**63,
        )
        ids, utf8 = [], codecs.getincrementaldecoder("utf-8")("replace")
        for token in stream:
            ids.append(token)
            if token not in (self.tokenizer.end, self.tokenizer.bos):
                yield utf8.decode(self.tokenizer.decode_bytes([token]))
        yield utf8.decode(b"", final=True)
        answer = parse_answer(ids, self.tokenizer)
        self.messages.append({"role": "assistant", "content": answer.content, "thinking": answer.thinking})


def neutral(text: str) -> str:
    """`text` with nothing in it that a terminal would obey: control characters but line end and tab become �."""
    return "".join(c if c in "\n\t" or (c.isprintable() or c == " ") else "\N{REPLACEMENT CHARACTER}" for c in text)


if __name__ == "__main__":
    try:
        main(*settings.parse_cli_with(Options(), __doc__))
    except UserError as error:
        settings.fail(str(error))

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
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import PRESETS, Config, UserError
from hearth import cli, hardware
from hearth.serving.commands import Terminal
from hearth.serving.conversation import STAGES, Chat
from hearth.serving.terminal import lines_of, neutral, new_screen, show, tolerate_any_text
from hearth.training import checkpoint


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
    chat = load(folder, config, options)
    chat.think, chat.think_tokens, chat.stop = options.think, options.think_tokens, options.stop
    chat.set_cycles(options.cycles)
    chat.set_early_exit(options.early_exit)
    if options.prompt is None and not options.json and _is_terminal(sys.stdin, sys.stdout):
        history = config.run_dir / "chat_history" if config.run_dir.is_dir() else None
        Terminal(chat, lambda name: compared(name, config, options), history).run()
        return
    if reason := chat.slow():
        print(reason, file=sys.stderr)
    if options.prompt is None:
        print(chat.introduction(), file=sys.stderr)
        samples = config.pretrain.prompts if chat.is_base else config.sft2.prompts
        answer_each(lines_of(sys.stdin) or samples, chat, options)
    else:
        answer_each([options.prompt], chat, options)


def _is_terminal(*streams: object) -> bool:
    return all(stream is not None and stream.isatty() for stream in streams)


def find_checkpoint(config: Config) -> Path:
    """The newest checkpoint of the furthest stage of this run; `UserError` says how to make one."""
    for stage in STAGES:
        if (found := checkpoint.newest(config.run_dir / stage)) is not None:
            return found
    raise UserError(
        f"No checkpoint in {config.run_dir}: looked for {', '.join(STAGES)}. "
        f"Make one with `{config.command('run_pipeline.py')}`."
    )


def compared(name: str, config: Config, options: Options) -> Chat:
    """The chat for /compare: `name` is a stage of this run, or a checkpoint folder."""
    return load(config.run_dir / name if name in STAGES else Path(name), config, options)


def load(folder: Path, config: Config, options: Options) -> Chat:
    """A chat with a checkpoint; it draws as the checkpoint's own config says where that was named
    and the command line says nothing.
    """
    loaded = checkpoint.load_for_inference(folder, hardware.pick_device(config.device))
    untouched = config.chat == PRESETS[config.preset].chat
    drawing = loaded.config.chat if options.checkpoint and untouched else config.chat
    return Chat(loaded, checkpoint.newest(folder) or folder, drawing, weights=options.weights)


def answer_each(questions: Iterable[str], chat: Chat, options: Options) -> None:
    """Print the answer to each question, as text or as a JSON object a line; to the one of the
    command line it is the answer alone.
    """
    alone = options.prompt is not None
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
        show(chat.ask(question), new_screen(thoughts=not alone or sys.stdout.isatty()))
        for note in chat.take_notes():
            print(f"note: {note}", file=sys.stderr)


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

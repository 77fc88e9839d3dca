"""Talk with a checkpoint: in the terminal, in a pipe, or one question at a time.

In: the checkpoint of a run's furthest stage, or any other; your words. Out:
answers, streamed. A base model continues your text instead. Exit codes: 0 answered, 2 a mistake
of yours, 130 stopped by Ctrl-C.

    uv run chat_inference.py --preset demo                          a chat; /help lists its commands
    uv run chat_inference.py --preset demo -p "Who are you?"        one answer; --json for a program
    echo "Who are you?" | uv run chat_inference.py --preset demo    an answer to each line
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import tyro

from config import FINE_TUNING, Config, UserError
from hearth import cli, hardware, run
from hearth.decoding.engine import Weights
from hearth.serving.commands import Terminal
from hearth.serving.conversation import Chat, chat_settings
from hearth.serving.terminal import lines_of, neutral, new_screen, show
from hearth.training import checkpoint


@dataclass(frozen=True)
class Options:
    """What this script alone can be told."""

    # answer this once, then end
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    # a stage, a run, or the folder of a run, a stage or a checkpoint; None is the furthest stage
    checkpoint: str | None = None
    weights: Weights = "auto"  # how they are stored; auto: bfloat16 if many
    # of the head; None: as trained
    cycles: Annotated[int | None, tyro.conf.arg(aliases=["--think_cycles"])] = None
    # leave the head's cycles once the prediction moves by less, in nats (KL)
    early_exit: float | None = None
    think: bool = False  # ask for reasoning before the answer
    think_tokens: int | None = None  # longest reasoning, in tokens; None is as long as it likes
    stop: tuple[str, ...] = ()  # texts that end an answer
    json: bool = False  # one JSON object an answer: ids, text, timings


SCRIPT = cli.Script(__doc__, Options(), ("device", "chat"))


def main(config: Config, options: Options) -> None:
    """Open the chat; or answer the prompt given, the lines of the pipe, or the preset's sample
    questions.
    """
    if "" in options.stop:
        raise UserError("--stop holds an empty text, which every answer begins with.")
    chat = load(options.checkpoint, config, options)
    chat.think, chat.think_tokens, chat.stop = options.think, options.think_tokens, options.stop
    chat.set_cycles(options.cycles)
    chat.set_early_exit(options.early_exit)
    if options.prompt is None and not options.json and _is_terminal(sys.stdin, sys.stdout):
        history = config.run_dir / "chat_history" if config.run_dir.is_dir() else None
        Terminal(chat, lambda name: load(name, config, options), history).run()
        return
    if reason := chat.slow():
        print(reason, file=sys.stderr)
    if options.prompt is None:
        print(chat.introduction(), file=sys.stderr)
        samples = (
            config.pretrain.prompts
            if chat.is_base
            else getattr(config, list(FINE_TUNING)[-1]).prompts
        )
        answer_each(lines_of(sys.stdin) or samples, chat, options)
    else:
        answer_each([options.prompt], chat, options)


def _is_terminal(*streams: object) -> bool:
    return all(stream is not None and stream.isatty() for stream in streams)


def load(name: str | None, config: Config, options: Options) -> Chat:
    """A chat with the checkpoint that `name` means; it draws as that one's own config says where
    --checkpoint names one and the command line says nothing.
    """
    folder = run.find_checkpoint(name, config)
    loaded = checkpoint.load_for_inference(folder, hardware.pick_device(config.device))
    drawing = chat_settings(config, loaded.config if options.checkpoint else None)
    return Chat(loaded, folder, drawing, weights=options.weights)


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


def run_chat() -> None:
    """`main`, for a person or a pipe."""
    try:
        main(*run.parse(SCRIPT))
    except UserError as error:
        raise UserError(neutral(str(error))) from error


if __name__ == "__main__":
    cli.run_script(run_chat, "stopped.")

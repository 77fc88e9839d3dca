"""Walk the whole road of one preset: corpus, tokenizer, pretraining, the stages of fine-tuning, a
chat.

Each stage is the script of its own, with the same options; a stage that is done says so and ends at
once.
In: what the preset names. Out: runs/<preset>/, and a chat (a few sample answers where there is no
terminal).

    uv run run_pipeline.py --preset demo
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config import (
    FINE_TUNING,
    PRESETS,
    TOKENS_PER_WEIGHT,
    Config,
    UserError,
    predicted_bits_per_byte,
)
from hearth import cli, log, run

HERE = Path(__file__).resolve().parent
ROAD = ("create_shard.py", "train_tokenizer.py", "pretrain.py", "sft.py")


@dataclass(frozen=True)
class Options:
    """What this script alone can be told."""

    # remove this stage and all that follow, and make them again
    redo: Literal[tuple(run.STAGES)] | None = None
    # hours that pretraining may take on this machine: picks the model's size and the tokens
    hours: float | None = None
    practise: bool = False  # go on to reinforcement learning (rl.py) after fine-tuning


SCRIPT = cli.Script(
    __doc__,
    Options(),
    reads=(
        *("seed", "device", "data.text_files", "model", "pretrain.lr", "pretrain.steps"),
        *(f"{stage}.files" for stage in FINE_TUNING),
        "chat",
    ),
)


def main(config: Config, options: Options) -> None:
    """Run every stage in order; stop at the first that fails, with its exit code, or when asked to
    stop.
    """
    started = time.monotonic()
    if options.hours is not None:
        config = sized(config, options.hours)
    asks_world = any(source.demo for source in config.data.corpora())
    practise = options.practise or (config.run_dir / "rl").is_dir()
    if options.redo == "text":
        from hearth.data.sources import require_files

        require_files(config)
    if options.redo:
        with run.working_on(config, makes=list(run.STAGES), redo=options.redo):
            pass
    road = (*ROAD, *(("rl.py",) if practise else ()))
    for number, script in enumerate((*road, *(("score.py",) if asks_world else ())), start=1):
        log.say(f"── {number}. {script} ".ljust(100, "─"))
        code, stopped = run_stage(script, config)
        if stopped:
            words = ("--practise",) if practise else ()
            log.say(f"Stopped. Continue with: {run.command(config, 'run_pipeline.py', *words)}")
        if code or stopped:
            raise SystemExit(code)
    log.say(f"the whole road took {log.duration(time.monotonic() - started)}")
    log.say("── chat_inference.py ".ljust(100, "─"))
    raise SystemExit(run_stage("chat_inference.py", config)[0])


def sized(config: Config, hours: float) -> Config:
    """The config with the size and tokens that this machine trains best in `hours`; as it is where
    the run has begun to read its text with a size of its own.
    """
    if not 0 < hours < 10_000:
        raise UserError(f"--hours is {hours:g}, must be above 0.")
    if run.load_settings(config.run_dir) is not None:
        log.say("--hours: this run has its size already, and keeps it")
        return config
    preset = PRESETS[config.preset]
    if config.model.n_blocks != preset.model.n_blocks:
        raise UserError("--hours picks the depth: leave --depth and the numbers of blocks away.")
    for name in ("steps", "tokens"):
        if getattr(config.pretrain, name) != getattr(preset.pretrain, name):
            raise UserError(f"--hours picks the tokens: leave --pretrain.{name} away.")
    from hearth import hardware
    from hearth.training import sizing

    device = hardware.pick_device(config.device)
    log.say(f"── sizes for {hours:g} hours of pretraining on {hardware.describe(device)}")
    found, timed = sizing.choose(config, hours, device)
    for size in timed:
        chosen = ">" if size.tokens == found.pretrain.tokens else " "
        log.say(
            f"{chosen} depth {size.depth:2}  {size.n_weights / 1e6:7.1f}M weights  "
            f"{log.count(size.tokens):>6} tokens at {log.count(size.tokens_per_second)}/s, "
            f"{size.tokens / size.n_weights:.1f} a weight, "
            f"{predicted_bits_per_byte(size.n_weights, size.tokens):.2f} bits per byte predicted"
        )
    log.say(
        f"> is the largest that reads {TOKENS_PER_WEIGHT} tokens a weight, else the smallest. The "
        "prediction is for English text, by a law of runs of 1M to 16M weights."
    )
    return found


def run_stage(script: str, config: Config) -> tuple[int, bool]:
    """One stage in a process of its own, which gives back its memory; its exit code, and whether a
    signal came.

    The stage answers Ctrl-C itself (the terminal sends it to both); SIGTERM and SIGHUP are handed
    on to it.
    """
    came: list[int] = []
    command = [sys.executable, str(HERE / script), *run.words_for(config)]
    with subprocess.Popen(command) as stage:

        def note(number: int, frame: object) -> None:
            came.append(number)
            if number != signal.SIGINT:
                stage.send_signal(number)

        # SIGHUP: not on Windows, and not where nohup has it ignored
        asking = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
        asking = {number for number in asking if signal.getsignal(number) != signal.SIG_IGN}
        before = {number: signal.signal(number, note) for number in asking}
        code = stage.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return (code if code >= 0 else 128 - code), bool(came)


if __name__ == "__main__":
    cli.run_script(lambda: main(*run.parse(SCRIPT)))

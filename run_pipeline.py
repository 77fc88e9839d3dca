"""Walk the whole road of one preset: corpus, tokenizer, pretraining, two stages of fine-tuning, a
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
from pathlib import Path

from config import Config
from hearth import cli, log

HERE = Path(__file__).resolve().parent
ROAD = ("create_shard.py", "train_tokenizer.py", "pretrain.py", "sft.py")


def main(config: Config, words: list[str]) -> None:
    """Run every stage in order; stop at the first that fails, with its exit code, or when asked to
    stop.
    """
    started = time.monotonic()
    asks_world = any(source.demo for source in config.data.corpora())
    for number, script in enumerate((*ROAD, *(("score.py",) if asks_world else ())), start=1):
        log.say(f"── {number}. {script} ".ljust(100, "─"))
        code, stopped = run(script, words)
        if stopped:
            log.say(f"Stopped. Continue with: {config.command('run_pipeline.py')}")
        if code or stopped:
            raise SystemExit(code)
    log.say(f"the whole road took {log.duration(time.monotonic() - started)}")
    log.say("── chat_inference.py ".ljust(100, "─"))
    raise SystemExit(run("chat_inference.py", words)[0])


def run(script: str, words: list[str]) -> tuple[int, bool]:
    """One stage in a process of its own, which gives back its memory; its exit code, and whether a
    signal came.

    The stage answers Ctrl-C itself (the terminal sends it to both); SIGTERM and SIGHUP are handed
    on to it.
    """
    came: list[int] = []
    with subprocess.Popen([sys.executable, str(HERE / script), *words]) as stage:

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
    cli.run_script(lambda: main(cli.parse_cli(__doc__), sys.argv[1:]))

"""Bring the corpora and the conversations of a preset into text shards: the first stage.

In: the hub, your own files, or the built-in demo world. Out: Arrow shards under
runs/<preset>/text/. Continues what was interrupted, skips what is finished, makes damaged shards
again.

    uv run create_shard.py --preset 16gb
    uv run create_shard.py --preset 16gb --plan  sizes, disk and hours, before anything is made
    uv run create_shard.py --name mine --data.text_files books/ notes.jsonl
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

from config import FINE_TUNING, ChatSource, Config, SFTConfig, TextSource, UserError
from hearth import cli, log, run
from hearth.data.ingest import (
    CHAT_UNIT_BYTES,
    PROBE_BYTES,
    Estimate,
    estimate,
    write_chat_shards,
    write_text_shards,
)
from hearth.data.shard_folder import is_finished
from hearth.data.sources import require_files
from hearth.reporting.report import refresh
from hearth.storage import disk_free

BYTES_PER_TOKEN = 4.3  # of English text, before a tokenizer is there to ask


@dataclass(frozen=True)
class Options:
    """What this script alone can be told."""

    plan: bool = False  # print sizes, disk and hours of what would be made, and make nothing
    verify: bool = False  # look for damaged shards by their checksum, not by their size alone
    # remove the text shards and all that follows, make them again
    redo: Literal["text"] | None = None


CHAT_SETTINGS = ("files", "calls", "exclude_files", "validation_share")  # read of a stage
SCRIPT = cli.Script(
    __doc__,
    Options(),
    ("data", *(f"{s}.{n}" for s in FINE_TUNING for n in CHAT_SETTINGS)),
)


def main(config: Config, options: Options) -> None:
    """Make the text shards of every corpus and every set of conversations."""
    if options.plan:
        print_plan(config)
        return
    require_card(config)
    if options.redo:
        require_files(config)
    text = config.run_dir / "text"
    with run.working_on(config, makes=("text",), redo=options.redo, creates=True) as work:
        work.begin("text", {})
        with work.stage("text"):
            try:
                make_text(config, text, verify=options.verify)
            except UserError:
                if not any(text.rglob("*.arrow")):  # what the error advises may be done at once
                    work.remove("text")
                raise
        for stage, sources in chat_sets(config).items():
            with work.stage(stage):
                make_conversations(config, stage, sources, work, verify=options.verify)
    refresh(config)
    log.say(f"Text shards are in {text}. Next: {run.command(config, 'train_tokenizer.py')}")


def require_card(config: Config) -> None:
    """`planning.require_able_machine`, without loading torch for the demo."""
    if config.preset != "demo" and config.device != "cpu":
        from hearth.training.planning import require_able_machine

        require_able_machine(config)


def make_text(config: Config, text: Path, *, verify: bool) -> None:
    """The text shards of every corpus."""
    before: list[Path] = []
    for source in config.data.corpora():
        folder = text / source.name
        title = f"{source.name}, done before" if is_finished(folder) else source.name
        report(title, write_text_shards(source, folder, config.data, before, verify=verify))
        before.append(folder)


def make_conversations(
    config: Config, stage: str, sources: list[ChatSource], work: run.Run, *, verify: bool
) -> None:
    """The text shards of a stage's conversations; made again where their source has changed and the
    stage has not begun.
    """
    loop: SFTConfig = getattr(config, stage)
    for source in sources:
        folder = run.chat_text(config, stage, source)
        title = f"{source.name}, done before" if is_finished(folder) else source.name
        manifest = write_chat_shards(
            source,
            folder,
            loop.validation_share,
            exclude=loop.test_sets(),
            retry_minutes=config.data.retry_minutes,
            verify=verify,
            remake=work.begun(stage) is None,
        )
        report(title, manifest)


def chat_sets(config: Config) -> dict[str, list[ChatSource]]:
    """The sets of conversations of each stage; one that two stages share counts to the first."""
    seen: set[Path] = set()
    found: dict[str, list[ChatSource]] = {}
    for stage in FINE_TUNING:
        folders = {run.chat_text(config, stage, s): s for s in config.sets(stage)}
        found[stage] = [source for folder, source in folders.items() if folder not in seen]
        seen |= folders.keys()
    return found


def report(title: str, manifest: dict[str, Any]) -> None:
    """One line on what a folder holds."""
    train, held_out = manifest["splits"]["train"], manifest["splits"]["validation"]
    dropped = ", ".join(f"{n} × {reason}" for reason, n in manifest["dropped"].items()) or "nothing"
    log.say(
        f"{title}: {train['documents']} documents, {log.size(train['text_bytes'])}; "
        f"held out {held_out['documents']}, {log.size(held_out['text_bytes'])}; dropped {dropped}"
    )


# --------------------------------------------------------------------------------------------- plan


def print_plan(config: Config) -> None:
    """Each corpus with its text, documents, shards, disk, tokens and hours, from a look at its
    beginning.
    """
    log.say(
        f"{'':<20}{'text':>10}{'documents':>11}{'shards':>8}{'tokens':>8}{'disk':>10}{'time':>8}"
    )
    total = Estimate(0, 0, 0)
    chats = [source for sources in chat_sets(config).values() for source in sources]
    for source in (*config.data.corpora(), *chats):
        found = estimate(source, config.data)
        unit = config.data.shard_mb * 10**6 if isinstance(source, TextSource) else CHAT_UNIT_BYTES
        plan_line(source.name, found, math.ceil(found.text_bytes / unit))
        total = Estimate(*(a + b for a, b in zip(astuple(total), astuple(found), strict=True)))
    plan_line("together", total, None)
    free = disk_free(config.run_dir)
    verdict = (
        "enough"
        if free > 1.1 * disk_needed(total)
        else "NOT ENOUGH: make room, or choose a disk with --runs"
    )
    log.say(f"{log.size(free)} free at {config.run_dir.absolute()}: {verdict}")
    log.say(
        f"Estimated from the first {log.size(PROBE_BYTES)} of each source, at {BYTES_PER_TOKEN} "
        "bytes per token."
    )


def plan_line(name: str, found: Estimate, shards: int | None) -> None:
    """One row of the plan."""
    tokens, disk = log.count(found.text_bytes / BYTES_PER_TOKEN), log.size(disk_needed(found))
    cells = f"{log.size(found.text_bytes):>10}{log.count(found.documents):>11}"
    cells += f"{shards or '':>8}{tokens:>8}{disk:>10}"
    log.say(f"{name:<20}{cells}{log.duration(found.seconds):>8}")


def disk_needed(found: Estimate) -> float:
    """Bytes of the text shards and of the token shards made from them, two bytes per token."""
    return found.text_bytes * (1 + 2 / BYTES_PER_TOKEN)


if __name__ == "__main__":
    cli.run_script(lambda: main(*run.parse(SCRIPT)))

"""Bring the corpora and the conversations of a preset into text shards: the first stage.

In: the hub, your own files, or the built-in demo world. Out: Arrow shards under runs/<preset>/text/.
Continues what was interrupted, skips what is finished, makes damaged shards again.

    uv run create_shard.py --preset 16gb
    uv run create_shard.py --name mine --data.text_files books/ notes.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import config as settings
import corpora
import log
from config import ChatSource, Config, UserError


def main(config: Config) -> None:
    """Make the text shards of every corpus and every set of conversations."""
    text = config.run_dir / "text"
    before: list[Path] = []
    for source in config.data.corpora():
        report(source.name, corpora.write_text_shards(source, text / source.name, config.data, before))
        before.append(text / source.name)
    for source, share in chat_sets(config):
        report(source.name, corpora.write_chat_shards(source, text / "chat" / source.name, share))
    log.say(f"Text shards are in {text}. Next: {config.command('train_tokenizer.py')}")


def chat_sets(config: Config) -> list[tuple[ChatSource, float]]:
    """Every set of conversations of both stages, each once, with the share that is held out."""
    sets = {
        source.name: (source, stage.validation_share) for stage in (config.sft1, config.sft2) for source in stage.sets()
    }
    return list(sets.values())


def report(name: str, manifest: dict[str, Any]) -> None:
    """One line on what a folder holds."""
    train, held_out = manifest["splits"]["train"], manifest["splits"]["validation"]
    dropped = ", ".join(f"{n} {reason}" for reason, n in manifest["dropped"].items()) or "none"
    log.say(
        f"{name}: {train['documents']} documents, {log.size(train['text_bytes'])}; "
        f"held out {held_out['documents']}; dropped: {dropped}"
    )


if __name__ == "__main__":
    try:
        main(settings.parse_cli(__doc__))
    except UserError as error:
        settings.fail(str(error))

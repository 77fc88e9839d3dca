"""Train the tokenizer on the text shards and encode every corpus with it: the second stage.

In: runs/<preset>/text/. Out: runs/<preset>/tokenizer/ and token shards under runs/<preset>/tokens/.
Continues what was interrupted, skips what is finished.

    uv run train_tokenizer.py --preset 16gb
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

import config as settings
import log
import shards
from config import Config, TextSource, UserError
from shards import SPLITS, TokenShardWriter
from tokenizer import FILE, Tokenizer


def main(config: Config) -> None:
    """Train the tokenizer where there is none, then encode what is not encoded yet."""
    command = config.command("create_shard.py")
    corpora = {source.name: config.run_dir / "text" / source.name for source in config.data.corpora()}
    manifests = {name: shards.read_manifest(folder, command) for name, folder in corpora.items()}
    tokenizer = get_tokenizer(config, corpora, manifests, command)
    for name, folder in corpora.items():
        encode_corpus(tokenizer, name, folder, config.run_dir / "tokens" / name, config, command)
    log.say(f"Token shards are in {config.run_dir / 'tokens'}. Next: {config.command('pretrain.py')}")


def get_tokenizer(config: Config, corpora: dict[str, Path], manifests: dict, command: str) -> Tokenizer:
    """The tokenizer of this run: loaded where it exists, trained on a weighted sample of the corpora otherwise."""
    folder = config.run_dir / "tokenizer"
    if (folder / FILE).exists():
        return Tokenizer.load(folder)
    log.say(f"training a tokenizer of {config.model.vocab_size} entries")
    texts = sample_texts(config, corpora, manifests, command)
    tokenizer = Tokenizer.train(texts, config.model.vocab_size)
    tokenizer.save(folder)
    log.say(f"tokenizer: {tokenizer.n_entries} entries, in {folder}")
    return tokenizer


def sample_texts(config: Config, corpora: dict[str, Path], manifests: dict, command: str) -> Iterator[list[str]]:
    """Training text of all corpora by weight, `tokenizer.sample_mb` in all, spread evenly over each corpus."""
    for source in config.data.corpora():
        share = sample_share(source, config, manifests)
        draw = np.random.default_rng(config.seed)
        for batch in shards.read_text_batches(corpora[source.name], "train", command):
            texts = batch.column(0).to_pylist()
            yield [text for text, u in zip(texts, draw.random(len(texts)), strict=True) if u < share]


def sample_share(source: TextSource, config: Config, manifests: dict) -> float:
    """The share of a corpus' documents that is drawn for the sample."""
    total = sum(other.weight for other in config.data.corpora())
    wanted = config.tokenizer.sample_mb * 1e6 * (source.weight / total if total else 0)
    return min(1.0, wanted / max(1, manifests[source.name]["splits"]["train"]["text_bytes"]))


def encode_corpus(tokenizer: Tokenizer, name: str, text: Path, tokens: Path, config: Config, command: str) -> None:
    """Encode one corpus into token shards, every document opened by the token `<|bos|>`."""
    manifest = shards.read_manifest(text, command)
    writer = TokenShardWriter(
        tokens,
        {"text": shards.fingerprint([unit["files"] for unit in manifest["units"]])},
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        shard_tokens=config.tokenizer.shard_tokens,
    )
    if not writer.finished:
        for split in reversed(SPLITS):
            total = manifest["splits"][split]["text_bytes"]
            with log.progress(total, "B", f"{name} {split}", start=writer.folder.totals(split)["text_bytes"]) as bar:
                for batch in shards.read_text_batches(text, split, command, start=writer.n_done(split)):
                    texts = batch.column(0).to_pylist()
                    for document, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                        n_bytes = len(document.encode())
                        writer.add(split, np.array([tokenizer.bos, *ids], writer.dtype), n_bytes)
                        bar.update(n_bytes)
            writer.close_split(split)
        facts = {key: manifest.get(key) for key in ("name", "source", "revision")}
        writer.finish(**facts)
    splits = shards.read_manifest(tokens, command)["splits"]
    log.say(
        f"{name}: {log.count(splits['train']['tokens'])} tokens to train on, "
        f"{log.count(splits['validation']['tokens'])} held out"
    )


if __name__ == "__main__":
    try:
        main(settings.parse_cli(__doc__))
    except UserError as error:
        settings.fail(str(error))

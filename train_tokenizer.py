"""Train the tokenizer on the text shards and encode every corpus with it: the second stage.

In: runs/<preset>/text/. Out: runs/<preset>/tokenizer/ and token shards under runs/<preset>/tokens/.
Continues what was interrupted, skips what is finished, makes damaged shards again.

    uv run train_tokenizer.py --preset 16gb
    uv run train_tokenizer.py --preset 16gb --gpt2 FOLDER
        compare with GPT-2's vocab.json and merges.txt
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from config import Config, TextSource, UserError
from hearth import cli, log, run
from hearth.data import shard_folder, text_shards
from hearth.data.shard_folder import SPLITS, content_fingerprint, inputs_of_tokens
from hearth.data.token_shards import TokenShardWriter
from hearth.data.tokenizer import FILE, Tokenizer
from hearth.reporting.report import refresh
from hearth.storage import machine_memory, write_text, writing

BATCH_CHARS = 1 << 20  # text encoded in one call
REPORT_BYTES = 2_000_000  # held-out text of each corpus that the report measures
# bytes that training takes: at least, and for each byte of the sample
TRAINING_MEMORY = (500e6, 3.0)
PIECE = 100_000  # characters of a long document that the tokenizer's sample takes or leaves


@dataclass(frozen=True)
class Options:
    """What this script alone can be told."""

    verify: bool = False  # look for damaged shards by their checksum, not by their size alone
    # folder with GPT-2's vocab.json and merges.txt, to compare with; None leaves it out
    gpt2: str | None = None
    # remove tokenizer, token shards and all that follows, and make them again
    redo: Literal["tokenizer"] | None = None


SCRIPT = cli.Script(
    __doc__, Options(), ("seed", "tokenizer", "model.vocab_size", "data.text_weights")
)


@dataclass(frozen=True)
class Corpus:
    """One corpus of the run: its text shards, and where its token shards go."""

    source: TextSource
    text: Path
    tokens: Path
    manifest: dict[str, Any]  # of its text shards
    command: str  # that makes its text shards

    def batches(self, split: str, start: int = 0) -> Iterator[list[str]]:
        """Its documents from document `start` on, some at a time."""
        for batch in text_shards.read_text_batches(self.text, split, self.command, start=start):
            yield batch.column(0).to_pylist()

    def text_bytes(self, split: str) -> int:
        return self.manifest["splits"][split]["text_bytes"]


def main(config: Config, options: Options) -> None:
    """Train the tokenizer where there is none, then encode what is not encoded yet."""
    with run.working_on(config, makes=("tokenizer",), redo=options.redo) as work:
        corpora = [
            open_corpus(source, config, verify=options.verify) for source in config.data.corpora()
        ]
        work.begin("tokenizer", inputs_of_tokens({c.source.name: c.manifest for c in corpora}))
        with work.stage("tokenizer"):
            tokenizer = get_tokenizer(config, corpora)
            report(tokenizer, corpora, config.run_dir / "tokenizer", options.gpt2)
            for corpus in corpora:
                n = config.tokenizer.shard_tokens
                encode_corpus(tokenizer, corpus, n, verify=options.verify)
    refresh(config)
    following = run.command(config, "pretrain.py")
    log.say(f"Token shards are in {config.run_dir / 'tokens'}. Next: {following}")


def open_corpus(source: TextSource, config: Config, *, verify: bool) -> Corpus:
    """The text shards of one corpus, checked."""
    folder, command = config.run_dir / "text" / source.name, run.command(config, "create_shard.py")
    manifest = shard_folder.read_manifest(folder, command)
    shard_folder.require_whole(
        folder, manifest, command + (" --verify" if verify else ""), full=verify
    )
    return Corpus(source, folder, config.run_dir / "tokens" / source.name, manifest, command)


# ----------------------------------------------------------------------------------------- training


def get_tokenizer(config: Config, corpora: list[Corpus]) -> Tokenizer:
    """The tokenizer of this run: loaded where it exists, trained on a weighted sample of the
    corpora otherwise.
    """
    folder = shard_folder.ShardFolder(
        config.run_dir / "tokenizer", "tokenizer", tokenizer_settings(config, corpora)
    )
    if folder.finished and (folder.folder / FILE).exists():
        try:
            return Tokenizer.load(folder.folder)
        except UserError:  # the same text gives the same entries
            log.say(f"{folder.folder / FILE} is damaged, so the tokenizer is trained again")
    shares = sample_shares(config, corpora)
    n_bytes = sum(
        share * corpus.text_bytes("train") for share, corpus in zip(shares, corpora, strict=True)
    )
    require_memory(n_bytes)
    log.say(
        f"training a tokenizer of {config.model.vocab_size} entries on {log.size(n_bytes)} of text"
    )
    texts = sample_texts(corpora, shares, config.seed)
    tokenizer = Tokenizer.train(texts, config.model.vocab_size, progress=sys.stderr.isatty())
    with writing(folder.folder):
        tokenizer.save(folder.folder)
    folder.finish(hash=tokenizer.hash, entries=tokenizer.n_entries, sample_bytes=round(n_bytes))
    return tokenizer


def tokenizer_settings(config: Config, corpora: list[Corpus]) -> dict[str, Any]:
    """What decides every entry of the tokenizer."""
    texts = {c.source.name: [c.source.weight, content_fingerprint(c.manifest)] for c in corpora}
    return {
        "vocab_size": config.model.vocab_size,
        "sample_mb": config.tokenizer.sample_mb,
        "seed": config.seed,
        "corpora": texts,
    }


def sample_shares(config: Config, corpora: list[Corpus]) -> list[float]:
    """The share of each corpus' documents that is drawn: by weight, `tokenizer.sample_mb` in all.

    What a corpus is too small to give is asked of the others.
    """
    wanted = dict.fromkeys(range(len(corpora)), 0.0)
    left, open_ones = (
        config.tokenizer.sample_mb * 1e6,
        {i for i, c in enumerate(corpora) if c.source.weight > 0},
    )
    while left > 1 and open_ones:
        total = sum(corpora[i].source.weight for i in open_ones)
        for i in sorted(open_ones):
            wanted[i] += left * corpora[i].source.weight / total
        full = {i for i in open_ones if wanted[i] >= corpora[i].text_bytes("train")}
        left = sum(wanted[i] - corpora[i].text_bytes("train") for i in full)
        wanted |= {i: float(corpora[i].text_bytes("train")) for i in full}
        open_ones -= full
        if not full:
            break
    return [wanted[i] / max(1, corpus.text_bytes("train")) for i, corpus in enumerate(corpora)]


def sample_texts(corpora: list[Corpus], shares: list[float], seed: int) -> Iterator[list[str]]:
    """Training text of all corpora, spread evenly over each; of a long document, pieces."""
    for corpus, share in zip(corpora, shares, strict=True):
        if share <= 0:
            continue
        draw = np.random.default_rng(seed)
        with log.progress(corpus.text_bytes("train"), "B", f"reading {corpus.source.name}") as bar:
            for texts in corpus.batches("train"):
                pieces = [
                    text[start : start + PIECE]
                    for text in texts
                    for start in range(0, len(text), PIECE)
                ]
                chances = draw.random(len(pieces))
                yield [piece for piece, u in zip(pieces, chances, strict=True) if u < share]
                bar.update(sum(map(len, texts)))


def require_memory(sample_bytes: float) -> None:
    """Refuse to start what this machine's memory cannot hold, and say what it can."""
    least, per_byte = TRAINING_MEMORY
    free = free_memory()
    if least + per_byte * sample_bytes > free:
        fits = max(1, int((free - least) / per_byte / 1e6))
        raise UserError(
            f"Training the tokenizer on {log.size(sample_bytes)} of text takes about "
            f"{log.size(least + per_byte * sample_bytes)} of memory, and {log.size(free)} are "
            "free. "
            f"Close other programs, or draw a smaller sample: --tokenizer.sample_mb {fits}."
        )


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of memory that this process may still take, by the system and by the limit of its
    control group.
    """
    free = float(machine_memory()[1])
    try:
        limit, used = (
            float((group / name).read_text()) for name in ("memory.max", "memory.current")
        )
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # given back as soon as it is wanted
        cached = float(facts["active_file"]) + float(facts["inactive_file"])
    except (OSError, ValueError, KeyError):  # no such group, or no limit in it
        return free
    return min(free, limit - used + cached)


# ----------------------------------------------------------------------------------------- encoding


def encode_corpus(tokenizer: Tokenizer, corpus: Corpus, shard_tokens: int, *, verify: bool) -> None:
    """Encode one corpus into token shards, every document opened by the token `<|bos|>`."""
    with TokenShardWriter(
        corpus.tokens,
        {"text": content_fingerprint(corpus.manifest)},
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        shard_tokens=shard_tokens,
        verify=verify,
    ) as writer:
        if not writer.finished:
            for split in reversed(SPLITS):
                encode_split(tokenizer, corpus, split, writer)
                writer.close_split(split)
            writer.finish(
                **{
                    key: corpus.manifest.get(key)
                    for key in ("name", "source", "revision", "licence")
                }
            )
        splits = writer.folder.manifest["splits"]
    sheet = text_shards.data_sheet({**corpus.manifest, "splits": splits})
    for folder in (corpus.text, corpus.tokens):
        write_text(folder / "README.md", sheet)
    held_out = log.count(splits["validation"]["tokens"])
    log.say(
        f"{corpus.source.name}: {log.count(splits['train']['tokens'])} tokens to train on, "
        f"{held_out} held out"
    )


def encode_split(
    tokenizer: Tokenizer, corpus: Corpus, split: str, writer: TokenShardWriter
) -> None:
    """Encode what `writer` still wants of one split."""
    first = writer.n_done(split)
    title = f"encoding {corpus.source.name}, {split}"
    with log.progress(
        corpus.text_bytes(split), "B", title, start=writer.folder.totals(split)["text_bytes"]
    ) as bar:
        wanted = wanted_texts(corpus.batches(split, first), split, first, writer)
        for n_skipped, n_bytes, encoded in encode_ahead(tokenizer, wanted, writer.dtype):
            writer.skip(split, n_skipped)
            for ids, n in zip(encoded, n_bytes, strict=True):
                writer.add(split, ids, n)
            bar.update(sum(n_bytes))


def wanted_texts(
    batches: Iterator[list[str]], split: str, document: int, writer: TokenShardWriter
) -> Iterator[tuple[int, list[str]]]:
    """(how many documents to skip, the next texts to encode): about `BATCH_CHARS` at a time."""
    for texts in batches:
        skipped, batch, n_chars = 0, [], 0
        for text in texts:
            if writer.wants(split, document):
                batch.append(text)
                n_chars += len(text)
            elif batch:
                yield skipped, batch
                skipped, batch, n_chars = 1, [], 0
            else:
                skipped += 1
            document += 1
            if n_chars >= BATCH_CHARS:
                yield skipped, batch
                skipped, batch, n_chars = 0, [], 0
        yield skipped, batch


def encode_ahead(
    tokenizer: Tokenizer, batches: Iterator[tuple[int, list[str]]], dtype: Any
) -> Iterator[tuple[int, list[int], list[np.ndarray]]]:
    """Encode batches in order, several under way at once so that no core waits for the end of a
    batch.
    """

    def encode(skipped: int, texts: list[str]) -> tuple[int, list[int], list[np.ndarray]]:
        ids = [np.array([tokenizer.bos, *ids], dtype) for ids in tokenizer.encode_batch(texts)]
        return skipped, [len(text) if text.isascii() else len(text.encode()) for text in texts], ids

    n_ahead = 2 + (os.cpu_count() or 1) // 2
    under_way: deque[Future] = deque()
    with ThreadPoolExecutor(n_ahead) as pool:
        for skipped, texts in batches:
            under_way.append(pool.submit(encode, skipped, texts))
            if len(under_way) > n_ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


# ------------------------------------------------------------------------------------------- report


def report(tokenizer: Tokenizer, corpora: list[Corpus], folder: Path, gpt2: str | None) -> None:
    """Bytes per token on held-out text of each corpus, on the console and in the tokenizer's
    README.md.
    """
    other = load_gpt2(Path(gpt2)) if gpt2 else None
    head = ["held-out text", "bytes per token", "lone bytes", *(["GPT-2"] if other else [])]
    rows = [head]
    for corpus in corpora:
        text = held_out_text(corpus)
        ids = np.array([i for ids in tokenizer.encode_batch(text) for i in ids])
        n_bytes = sum(len(t.encode()) for t in text)
        row = [
            corpus.source.name,
            f"{n_bytes / max(1, len(ids)):.3f}",
            f"{lone_bytes(tokenizer, ids):.3%}",
        ]
        if other:
            row.append(f"{n_bytes / max(1, sum(len(e.ids) for e in other.encode_batch(text))):.3f}")
        rows.append(row)
    log.say(f"tokenizer: {tokenizer.n_entries} entries of {tokenizer.vocab_size}, in {folder}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        log.say(
            "  "
            + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    table = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows[1:]]]
    notes = "Lone bytes: the share of tokens that stand for one byte of a longer character."
    size = f"{tokenizer.n_entries} entries of {tokenizer.vocab_size}"
    title = f"# Tokenizer {tokenizer.hash}\n\n{size}.\n\n"
    write_text(folder / "README.md", title + "\n".join(table) + f"\n\n{notes}\n")


def held_out_text(corpus: Corpus) -> list[str]:
    """The first `REPORT_BYTES` of a corpus' held-out documents, about."""
    found, n_chars = [], 0
    for texts in corpus.batches("validation"):
        for text in texts:
            if n_chars < REPORT_BYTES:
                found.append(text)
                n_chars += len(text)
    return found


def lone_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> float:
    """The share of `ids` that stand for one byte of a longer character."""
    lone = [tokenizer.byte_id(byte) for byte in range(128, 256)]
    return float(np.isin(ids, lone).mean()) if len(ids) else 0.0


def load_gpt2(folder: Path) -> Any:
    """GPT-2's tokenizer from its vocab.json and merges.txt."""
    from tokenizers import ByteLevelBPETokenizer

    # as the hub, as OpenAI names them
    for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        files = [folder / name for name in names]
        if all(path.is_file() for path in files):
            return ByteLevelBPETokenizer(*map(str, files))
    raise UserError(f"No GPT-2 vocabulary: {folder} holds no vocab.json with merges.txt.")


if __name__ == "__main__":
    cli.run_script(lambda: main(*run.parse(SCRIPT)))

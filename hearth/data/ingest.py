"""Bring a source into a folder of text shards: clean, drop duplicates, split, count, commit unit by
unit.

In: a `TextSource` or `ChatSource`. Out: a folder of text shards with manifest, data sheet and log
of what was dropped.

    source ── read, row by row ── clean ── drop duplicates ── validation or train, by hash ── text
    shard

Every row has a place, a `Cursor`: what is interrupted or damaged is read again from where its shard
began. What is dropped is counted by reason, with the file and row of some examples.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from config import ChatSource, DataConfig, TextSource, UserError
from hearth import log
from hearth.data.cleaning import NearDuplicates, Rejected, Seen, as_bytes, text_hash, unfit
from hearth.data.layouts import conversation, reasoning_taken
from hearth.data.readers import START, Cursor, Pick, Rows
from hearth.data.shard_folder import SPLITS, ShardFolder
from hearth.data.sources import Source, ahead, column_picker, whole_rows
from hearth.data.text_shards import TextShardWriter, data_sheet, unit_batches
from hearth.storage import write_text

CHAT_UNIT_BYTES = 64_000_000  # size of a shard of conversations
EXAMPLES = 20  # dropped documents shown a reason
SAMPLES = 10  # documents whose beginning the data sheet shows
PROBE_BYTES = 8_000_000  # text read to estimate the size of a source
PROBE_MINUTES = 0.5  # a network that fails is given to answer for that


@dataclass(frozen=True)
class Document:
    """What is written: `row` as the shard holds it, its size, the hash that decides its split, what
    to count it as.
    """

    row: Any
    n_bytes: int
    key: int
    text: bytes
    counted_as: str | None = None


DocumentFilter = Callable[[Any], Document | Rejected]


def text_filter(config: DataConfig) -> DocumentFilter:
    """What makes a document of a value, or says why it is none."""

    def accept(item: Any) -> Document | Rejected:
        data = as_bytes(item)
        if isinstance(data, Rejected):
            return data
        return unfit(data, config) or Document(data, len(data), text_hash(data), data)

    return accept


def chat_filter(source: ChatSource) -> DocumentFilter:
    """What makes a conversation of a row, or says why it is none."""

    def accept(item: Any) -> Document | Rejected:
        messages = item if isinstance(item, Rejected) else conversation(item, source.max_chars)
        if isinstance(messages, Rejected):
            return messages
        try:
            text = json.dumps(messages, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return Rejected("invalid UTF-8", str(error))
        return Document(
            messages, len(text), text_hash(text), text, reasoning_taken(item, source.max_chars)
        )

    return accept


def write_text_shards(
    source: TextSource,
    folder: Path,
    config: DataConfig,
    before: Sequence[Path] = (),
    *,
    verify: bool = False,
) -> dict[str, Any]:
    """Bring the text shards of one corpus into `folder`, go on with them, or mend them; returns the
    manifest.

    before: finished folders of other corpora, whose documents are dropped here as duplicates.
    verify: look for damage by checksum, not by size alone.
    """
    opened = Source(source, config.retry_minutes)
    settings = {
        **opened.origin,
        "column": source.column,
        "max_bytes": source.max_bytes,
        "shard_mb": config.shard_mb,
        "validation_share": config.validation_share,
        "min_chars": config.min_chars,
        "max_repeated_line_share": config.max_repeated_line_share,
        "deduplicate": config.deduplicate,
        "near_duplicates": config.near_duplicates,
        "duplicates_of": [path.name for path in before]
        if config.deduplicate or config.near_duplicates
        else [],
    }
    return Ingest(
        opened,
        ShardFolder(folder, "text", settings, verify=verify),
        column_picker(source),
        text_filter(config),
        share=config.validation_share,
        unit_bytes=config.shard_mb * 10**6,
        max_bytes=source.max_bytes,
        deduplicate=config.deduplicate,
        near_duplicates=config.near_duplicates,
        before=before,
    ).run()


def write_chat_shards(
    source: ChatSource,
    folder: Path,
    validation_share: float,
    *,
    retry_minutes: float = 30.0,
    verify: bool = False,
    remake: bool = False,
) -> dict[str, Any]:
    """Bring one set of conversations into `folder`, continue it, or mend it; returns the manifest.

    remake: make it again, instead of raising `InputsChanged`, where its source has changed.
    """
    opened = Source(source, retry_minutes)
    settings = {
        **opened.origin,
        "max_rows": source.max_rows,
        "max_chars": source.max_chars,
        "validation_share": validation_share,
    }
    return Ingest(
        opened,
        ShardFolder(folder, "chat", settings, verify=verify, remake=remake),
        whole_rows,
        chat_filter(source),
        share=validation_share,
        unit_bytes=CHAT_UNIT_BYTES,
        max_rows=source.max_rows,
    ).run()


@dataclass(frozen=True)
class Estimate:
    """What a source would give, judged by its beginning."""

    text_bytes: float
    documents: float
    seconds: float


def estimate(source: TextSource | ChatSource, config: DataConfig) -> Estimate:
    """Read the first `PROBE_BYTES` of text of a source, and extend that to the whole of it or to
    its budget.
    """
    chat = isinstance(source, ChatSource)
    accept, pick = (
        (chat_filter(source), whole_rows) if chat else (text_filter(config), column_picker(source))
    )
    n_bytes = n_documents = 0
    share, started = 1.0, time.monotonic()
    for rows in Source(source, min(PROBE_MINUTES, config.retry_minutes)).rows(START, pick):
        kept = [
            document for document in map(accept, rows.items) if not isinstance(document, Rejected)
        ]
        n_documents += len(kept)
        n_bytes += sum(document.n_bytes for document in kept)
        if n_bytes >= PROBE_BYTES and 0 < rows.share < 1:
            share = rows.share
            break
    seconds = time.monotonic() - started
    limits = [1 / share]
    if not chat and source.max_bytes is not None and n_bytes:
        limits.append(source.max_bytes / n_bytes)
    if chat and source.max_rows is not None and n_documents:
        limits.append(source.max_rows / n_documents)
    times = min(limits)
    return Estimate(n_bytes * times, n_documents * times, seconds * times)


class Ingest:
    """Read a source to its end into units of `unit_bytes`, each committed with its place in the
    source.

    share: of the documents held out. max_bytes, max_rows: stop there. before: folders whose
    documents are duplicates.
    """

    def __init__(
        self,
        source: Source,
        target: ShardFolder,
        pick: Pick,
        accept: DocumentFilter,
        *,
        share: float,
        unit_bytes: int,
        max_bytes: int | None = None,
        max_rows: int | None = None,
        deduplicate: bool = False,
        near_duplicates: float | None = None,
        before: Sequence[Path] = (),
    ) -> None:
        self.source, self.target, self.pick, self.accept = source, target, pick, accept
        self.share, self.unit_bytes, self.max_bytes, self.max_rows = (
            share,
            unit_bytes,
            max_bytes,
            max_rows,
        )
        self.deduplicate, self.near_duplicates, self.before = deduplicate, near_duplicates, before
        self.name = source.source.name

    def run(self) -> dict[str, Any]:
        """Mend what is damaged, go on where it stopped, finish; returns the manifest."""
        target = self.target
        if target.finished and not target.damaged:
            return target.manifest
        self._settle_revision()
        log.say(f"{self.name}: reading {self.source.describe()}")
        for number, unit in enumerate(target.units):
            if target.is_damaged(unit):
                self._mend(number, unit)
        target.require_mended()
        while not target.finished:
            self._continue()
            self._finish()
        return target.manifest

    def _settle_revision(self) -> None:
        """Stick to the commit that the folder was begun with; write down the newest where it is
        new.
        """
        manifest = self.target.manifest
        self.source.revision = manifest.get("revision")
        if "licence" not in manifest:
            manifest |= {"name": self.name, "source": self.source.origin, **self.source.facts()}
            self.target.save_draft()

    # ------------------------------------------------------------------------------------ one unit

    def _continue(self) -> None:
        units = self.target.units
        cursor: Cursor = tuple(units[-1]["to"]) if units else START
        totals = [self.target.totals(split) for split in SPLITS]
        self.n_bytes = sum(total["text_bytes"] for total in totals)
        self.n_documents = sum(total["documents"] for total in totals)
        if units:
            log.say(
                f"{self.name}: continuing after {self.n_documents} documents, "
                f"{log.size(self.n_bytes)} of text"
            )
        self._recall(len(units))
        writer = TextShardWriter(self.target)
        documents = self._documents(cursor)
        with (
            contextlib.closing(documents),
            contextlib.closing(writer),
            log.progress(self.max_bytes, "B", self.name, start=self.n_bytes) as self.bar,
        ):
            more = not (units and units[-1]["last"])
            while more:
                more = self._fill(writer, documents, cursor)
                cursor = tuple(self.target.units[-1]["to"])

    def _fill(self, writer: TextShardWriter, documents: Iterator[Document], begin: Cursor) -> bool:
        """Write and commit one unit; False where the source or the budget is at its end."""
        self.tally = Tally()
        more = False
        for document in documents:
            self._write(writer, document)
            more = not self._enough()
            if writer.n_bytes >= self.unit_bytes or not more:
                break
        else:
            more = False
        unit = {"files": writer.finish_unit(), "from": begin, "to": self.place, "last": not more}
        self.target.commit(unit | self.tally.facts())
        return more

    def _write(self, writer: TextShardWriter, document: Document) -> None:
        writer.add(
            "validation" if document.key < self.threshold else "train",
            document.row,
            document.n_bytes,
        )
        self.tally.keep(document)
        self.n_documents += 1
        self.n_bytes += document.n_bytes
        self.bar.update(document.n_bytes)

    def _enough(self) -> bool:
        by_bytes = self.max_bytes is not None and self.n_bytes >= self.max_bytes
        return by_bytes or (self.max_rows is not None and self.n_documents >= self.max_rows)

    def _mend(self, number: int, unit: dict[str, Any]) -> None:
        """Make one unit again from its place in the source."""
        self._recall(number)
        writer = TextShardWriter(self.target, number)
        documents = self._documents(tuple(unit["from"]))
        self.tally, self.n_bytes, self.n_documents = Tally(), 0, 0
        n_wanted = sum(facts["documents"] for facts in unit["files"].values())
        with (
            contextlib.closing(documents),
            contextlib.closing(writer),
            log.progress(None, "B", self.name) as self.bar,
        ):
            for document in islice(documents, n_wanted):
                self._write(writer, document)
            self.target.replace(unit, writer.finish_unit())

    # ---------------------------------------------------------------------------------- documents

    def _documents(self, cursor: Cursor) -> Iterator[Document]:
        """Documents that are kept, from `cursor` on; `self.place` is the cursor behind the row
        looked at last.
        """
        self.place = cursor
        with contextlib.closing(ahead(self.source.rows(cursor, self.pick))) as batches:
            for rows in batches:
                if rows.share and self.max_bytes is None:
                    self.bar.total = round(self.n_bytes / rows.share)
                for i, item in enumerate(rows.items):
                    document = self.accept(item)
                    self.place = (rows.file, rows.first + i + 1)
                    if not isinstance(document, Rejected):
                        document = self._known(document) or document
                    if isinstance(document, Rejected):
                        self.tally.drop(rows, i, document, item)
                    else:
                        yield document

    def _known(self, document: Document) -> Rejected | None:
        if self.deduplicate and document.key in self.seen:
            return Rejected("duplicate")
        if self.near is not None and self.near.add(document.text):
            return Rejected("near-duplicate")
        if self.deduplicate:
            self.seen.add(document.key)
        return None

    def _recall(self, n_units: int) -> None:
        """Know the documents of the folders before this one, and of this one's first `n_units`
        units.
        """
        import pyarrow as pa

        self.threshold = max(self.share * 2**64, self.target.manifest.get("hold_out_below", 0))
        self.seen = Seen()
        self.near = NearDuplicates(self.near_duplicates) if self.near_duplicates else None
        if not self.deduplicate and self.near is None:
            return
        for folder, n in [
            *((folder, None) for folder in self.before),
            (self.target.folder, n_units),
        ]:
            for batch in unit_batches(folder, n):
                for data in batch.column(0).cast(pa.large_binary()).to_pylist():
                    self.seen.add(text_hash(data))
                    if self.near is not None:
                        self.near.add(data)

    # ------------------------------------------------------------------------------------- the end

    def _finish(self) -> None:
        """Write the manifest; a corpus of which nothing was held out is made again, with its lowest
        hash held out.
        """
        target, units = self.target, self.target.units
        dropped: Counter[str] = Counter()
        lengths: Counter[str] = Counter()
        reasoning: Counter[str] = Counter()
        for unit in units:
            reasoning.update(unit["reasoning"])
            dropped.update(unit["dropped"])
            lengths.update(unit["lengths"])
        if self.n_documents < 2:
            raise self._too_little(dropped)
        if not target.totals("validation")["documents"]:
            target.start_again(hold_out_below=min(unit["lowest"] for unit in units) + 1)
            return
        facts = {"dropped": dict(dropped.most_common())}
        if reasoning:
            facts["reasoning"] = dict(reasoning.most_common())
        facts["lengths"] = {bits: lengths[bits] for bits in sorted(lengths, key=int)}
        if self.deduplicate and self.seen.n_forgotten:
            facts["not_remembered"] = self.seen.n_forgotten
        facts["samples"] = sorted(sample for unit in units for sample in unit["samples"])[:SAMPLES]
        examples = first_of_each(
            (e for unit in units for e in unit["examples"]), "reason", EXAMPLES
        )
        for unit in units:
            for name in ("examples", "samples", "lengths", "reasoning", "lowest"):
                del unit[name]
        lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        write_text(target.folder / "dropped.jsonl", lines)
        manifest = {
            **target.manifest,
            **facts,
            "splits": {split: target.totals(split) for split in SPLITS},
        }
        write_text(target.folder / "README.md", data_sheet(manifest))
        target.finish(**facts)

    def _too_little(self, dropped: Counter[str]) -> UserError:
        examples = [example for unit in self.target.units for example in unit["examples"]]
        self.target.start_again()
        reasons = ", ".join(f"{n} × {reason}" for reason, n in dropped.most_common()) or "nothing"
        shown = "".join(
            f"\n  {e['file']}, row {e['row']}: {e['reason']} {e['detail']}" for e in examples[:3]
        )
        have = "a single document that can" if self.n_documents else "nothing that can"
        return UserError(
            f"{self.name} holds {have} be used, and two are needed (one is held out). Dropped: "
            f"{reasons}.{shown}"
        )


class Tally:
    """The rows of one unit: reasons and examples of what was dropped, lengths and samples of what
    was kept.
    """

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []
        self.lengths: Counter[str] = Counter()
        self.reasoning: Counter[str] = Counter()
        self.samples: list[list[Any]] = []  # rank and beginning
        self.lowest = 2**64

    def drop(self, rows: Rows, i: int, bad: Rejected, item: Any) -> None:
        self.dropped[bad.reason] += 1
        if self.dropped[bad.reason] <= EXAMPLES:
            begin = item.decode(errors="replace") if isinstance(item, bytes) else str(item)
            facts = {
                "reason": bad.reason,
                "file": rows.name,
                "row": rows.first + i,
                "detail": bad.detail[:200],
            }
            text = (
                "" if isinstance(item, Rejected) else begin[:200].encode(errors="replace").decode()
            )
            self.examples.append(facts | {"text": text})

    def keep(self, document: Document) -> None:
        self.lengths[str(document.n_bytes.bit_length())] += 1
        if document.counted_as:
            self.reasoning[document.counted_as] += 1
        self.lowest = min(self.lowest, document.key)
        # another order than that which decides the split
        rank = document.key * 0x9E3779B97F4A7C15 % 2**64
        if len(self.samples) < SAMPLES or rank < self.samples[-1][0]:
            begin = document.text[:600].decode(errors="ignore")
            self.samples = sorted([*self.samples, [rank, begin]])[:SAMPLES]

    def facts(self) -> dict[str, Any]:
        return {
            "dropped": dict(self.dropped),
            "examples": self.examples,
            "lengths": dict(self.lengths),
            "reasoning": dict(self.reasoning),
            "samples": self.samples,
            "lowest": self.lowest,
        }


def first_of_each(items: Iterable[dict[str, Any]], name: str, n: int) -> list[dict[str, Any]]:
    """The first `n` items of each value of `name`, in order."""
    counts: Counter[Any] = Counter()
    kept = []
    for item in items:
        counts[item[name]] += 1
        if counts[item[name]] <= n:
            kept.append(item)
    return kept

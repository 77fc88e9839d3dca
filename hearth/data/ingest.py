"""Bring a source into a folder of text shards: clean, drop duplicates, split, count, commit unit by
unit.

In: a `TextSource` or `ChatSource`. Out: a folder of text shards with manifest, data sheet and log
of what was dropped.

    source ── read, row by row ── clean ── drop duplicates ── validation or train, by hash ── text
    shard

Every row has a place, a `Cursor`: what is interrupted or damaged is read again from where its shard
began. The pieces of one document all go to one side. What is dropped is counted by reason, with the
file and row of some examples.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from config import ChatSource, DataConfig, TextSource, UserError
from hearth import log
from hearth.data.cleaning import NearDuplicates, Rejected, Seen, as_bytes, text_hash, unfit
from hearth.data.layouts import QUESTION_COLUMNS, layout, question_keys, reasoning_taken
from hearth.data.readers import START, Cursor, Pick, Rows
from hearth.data.shard_folder import DRAFT, SPLITS, ShardFolder
from hearth.data.sources import (
    Source,
    ahead,
    as_conversation,
    column_picker,
    identity,
    whole_rows,
)
from hearth.data.text_shards import TextShardWriter, data_sheet, unit_batches
from hearth.storage import field, write_text, writing

CHAT_UNIT_BYTES = 64_000_000  # size of a shard of conversations
EXAMPLES = 20  # dropped documents listed a reason,
LOST_SHOWN = (3, 8)  # and of these on the console: a reason, and in all
FILES_SHOWN = 40  # files that have a line of their own on the console
SAMPLES = 10  # documents whose beginning the data sheet shows
PROBE_BYTES = 8_000_000  # text read to estimate the size of a source
PROBE_MINUTES = 0.5  # a network that fails is given to answer for that


@dataclass(frozen=True)
class Document:
    """What is written: `row` as the shard holds it, its size and its hash.

    layout: the columns of a conversation. reasoning: what to count it as.
    """

    row: Any
    n_bytes: int
    key: int
    text: bytes
    layout: str = ""
    reasoning: str | None = None


Documents = Iterator[tuple[Rows, Document]]
DocumentFilter = Callable[[Any], Document | Rejected]


def text_filter(config: DataConfig) -> DocumentFilter:
    """What makes a document of a value, or says why it is none."""

    def accept(item: Any) -> Document | Rejected:
        data = as_bytes(item)
        if isinstance(data, Rejected):
            return data
        return unfit(data, config) or Document(data, len(data), text_hash(data), data)

    return accept


def chat_filter(source: ChatSource, exclude: Sequence[ChatSource] = ()) -> DocumentFilter:
    """What makes a conversation of a row, or says why it is none; `exclude` are the test sets whose
    questions it may not hold.
    """
    kept_out: set[int] | None = None

    def accept(item: Any) -> Document | Rejected:
        nonlocal kept_out
        messages = as_conversation(item, source)
        if isinstance(messages, Rejected):
            return messages
        if kept_out is None:  # read once they are needed
            kept_out = set().union(*map(question_keys_of, exclude))
        if kept_out and not kept_out.isdisjoint(question_keys(item)):
            return Rejected("question of a test set")
        try:
            text = json.dumps(messages, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return Rejected("invalid UTF-8", str(error))
        columns = " + ".join(layout(item) or ())
        taken = reasoning_taken(item, source.max_chars)
        return Document(messages, len(text), text_hash(text), text, columns, taken)

    return accept


def question_keys_of(source: ChatSource) -> set[int]:
    """The keys of all questions in a test set; says which rows hold none. Raises `UserError` where
    none does.
    """
    keys: set[int] = set()
    unread: list[str] = []
    for rows in Source(source).rows(START, whole_rows):
        for number, item in enumerate(rows.items, rows.first):
            found = question_keys(item)
            keys |= found
            if not found:
                unread.append(f"{readable(rows.name)}, row {number}")
    if not keys:
        raise UserError(
            f"{source.name}: no question was found in this test set, so none can be kept out. A "
            f"row needs one of the columns {', '.join(QUESTION_COLUMNS)}, or messages."
        )
    if unread:
        shown = "; ".join(unread[: LOST_SHOWN[0]])
        log.say(f"{source.name}: no question in {len(unread)} rows of this test set: {shown}")
    return keys


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
    opened = open_source(source, folder, config.retry_minutes)
    settings = {
        **opened.origin(folder),
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
    exclude: Sequence[ChatSource] = (),
    retry_minutes: float = 30.0,
    verify: bool = False,
    remake: bool = False,
) -> dict[str, Any]:
    """Bring one set of conversations into `folder`, continue it, or mend it; returns the manifest.

    exclude: test sets; a conversation that holds one of their questions is dropped. remake: make it
    again, instead of raising `InputsChanged`, where its source has changed.
    """
    opened = open_source(source, folder, retry_minutes)
    settings = {
        **opened.origin(folder),
        "max_rows": source.max_rows,
        "max_chars": source.max_chars,
        "validation_share": validation_share,
    }
    settings |= {"calls": True} if source.calls else {}
    if exclude:
        settings["exclude"] = [identity(test_set, folder) for test_set in exclude]
    return Ingest(
        opened,
        ShardFolder(folder, "chat", settings, verify=verify, remake=remake),
        whole_rows,
        chat_filter(source, exclude),
        share=validation_share,
        unit_bytes=CHAT_UNIT_BYTES,
        max_rows=source.max_rows,
    ).run()


def open_source(source: TextSource | ChatSource, folder: Path, retry_minutes: float) -> Source:
    """The source, with a folder where the hashes of its files can be remembered."""
    opened = Source(source, retry_minutes)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return opened


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
        self.source.revision = field(manifest, "revision", str | None, self.target.folder / DRAFT)
        manifest |= {"name": self.name, "source": self.source.origin(self.target.folder)}
        if "licence" not in manifest:
            manifest |= self.source.facts()
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

    def _fill(self, writer: TextShardWriter, documents: Documents, begin: Cursor) -> bool:
        """Write and commit one unit; False where the source or the budget is at its end."""
        self.tally = Tally(self._tally().dropped)
        more = False
        for rows, document in documents:
            self._write(writer, rows, document)
            more = not self._enough()
            if writer.n_bytes >= self.unit_bytes or not more:
                break
        else:
            more = False
        unit = {"files": writer.finish_unit(), "from": begin, "to": self.place, "last": not more}
        self.target.commit(unit | {"tally": self.tally.facts()})
        return more

    def _write(self, writer: TextShardWriter, rows: Rows, document: Document) -> None:
        key = document.key if rows.document is None else rows.document
        if self.hold_out_from is None:
            held_out = key < self.threshold
        else:
            held_out = self.n_documents >= self.hold_out_from
        writer.add("validation" if held_out else "train", document.row, document.n_bytes)
        self.tally.keep(rows, document, key)
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
        self.tally, self.n_bytes = Tally(), 0
        self.n_documents = sum(map(n_documents, self.target.units[:number]))
        with (
            contextlib.closing(documents),
            contextlib.closing(writer),
            log.progress(None, "B", self.name) as self.bar,
        ):
            for rows, document in islice(documents, n_documents(unit)):
                self._write(writer, rows, document)
            self.target.replace(unit, writer.finish_unit())

    # ---------------------------------------------------------------------------------- documents

    def _documents(self, cursor: Cursor) -> Documents:
        """Documents that are kept, from `cursor` on, each with the rows it is of; `self.place` is
        the cursor behind the row looked at last.
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
                        yield rows, document

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

        draft = partial(field, self.target.manifest, path=self.target.folder / DRAFT)
        below = draft("hold_out_below", int | None)
        self.threshold = self.share * 2**64 if below is None else below
        self.hold_out_from = draft("hold_out_from", int | None)
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

    def _tally(self) -> Tally:
        """What was dropped and kept in all units together."""
        tally = Tally()
        for number, unit in enumerate(self.target.units):
            try:
                tally.merge(unit["tally"])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"{self.target.folder / DRAFT}: units[{number}].tally is malformed. "
                    f"Remove the folder {self.target.folder} to make it again."
                ) from error
        return tally

    def _finish(self) -> None:
        """Write the manifest; a corpus with nothing in one of the splits is made again."""
        target, tally = self.target, self._tally()
        if self.n_documents < 2:
            raise self._too_little(tally)
        if not all(target.totals(split)["documents"] for split in SPLITS):
            target.start_again(**self._held_out_otherwise(tally))
            return
        facts: dict[str, Any] = {"dropped": dict(tally.dropped.most_common())}
        if tally.reasoning:
            facts["reasoning"] = dict(tally.reasoning.most_common())
        facts["lengths"] = {bits: tally.lengths[bits] for bits in sorted(tally.lengths, key=int)}
        facts["samples"] = tally.samples
        for unit in target.units:
            del unit["tally"]
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in tally.examples]
        write_text(target.folder / "dropped.jsonl", "".join(lines))
        manifest = {
            **target.manifest,
            **facts,
            "splits": {split: target.totals(split) for split in SPLITS},
        }
        write_text(target.folder / "README.md", data_sheet(manifest))
        target.finish(**facts)
        self._say_what_was_read(tally)

    def _held_out_otherwise(self, tally: Tally) -> dict[str, int]:
        """What to hold out where hashes put every document on one side: the document with the
        lowest one, or the last pieces where one document is all or most of the text.
        """
        n = self.n_documents
        alone = tally.lowest == tally.highest
        if not alone and 2 * tally.n_lowest <= n:
            log.say(
                f"{self.name}: all documents fell on one side by their hashes, so the one with "
                "the lowest hash is held out, whole. Reading again."
            )
            return {"hold_out_below": tally.lowest + 1}
        held_out = min(n - 1, max(1, round(self.share * n)))
        log.say(
            f"{self.name}: one document is {'all' if alone else 'most'} of this, so the last "
            f"{held_out} of {n} pieces are held out: they measure how it continues, not how "
            "another text is predicted. Reading again."
        )
        return {"hold_out_from": n - held_out}

    def _say_what_was_read(self, tally: Tally) -> None:
        """A line for each file, then what was lost: the first few, and where to look for more."""
        if self.source.source.demo:
            return
        for number in sorted(tally.files, key=int):
            name, kept, lost, read_as = tally.files[number]
            if int(number) == FILES_SHOWN:
                name = "all other files"
            ways = "; ".join(read_as) if len(read_as) < 2 else counted(read_as)
            log.say(f"{self.name}: {name}: {ways or 'nothing of use'}; {kept} kept, {lost} lost")
        if self.seen.n_forgotten:
            log.say(f"{self.name}: duplicates of {self.seen.n_forgotten} documents were not sought")
        n_lost = tally.dropped.total()
        for example in worst_first(tally.examples):
            log.say(f"{self.name}: lost {told(example)}")
        if n_lost:
            path = self.target.folder / "dropped.jsonl"
            log.say(f"{self.name}: {n_lost} lost in all, {EXAMPLES} of each reason: {path}")

    def _too_little(self, tally: Tally) -> UserError:
        self.target.start_again()
        reasons = counted(tally.dropped) or "nothing"
        shown = "; ".join(map(told, worst_first(tally.examples)[:3]))
        have = "a single document that can" if self.n_documents else "nothing that can"
        return UserError(
            f"{self.name} holds {have} be used, and two are needed (one is held out). "
            f"Dropped: {reasons}.{' First: ' if shown else ''}{shown}"
        )


def n_documents(unit: dict[str, Any]) -> int:
    return sum(facts["documents"] for facts in unit["files"].values())


def counted(counts: dict[str, int]) -> str:
    """2 × this, 1 × that."""
    return ", ".join(f"{n} × {what}" for what, n in counts.items())


def worst_first(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The few examples for the console: whole files before rows, and something of each reason."""
    each, in_all = LOST_SHOWN
    taken: Counter[str] = Counter()
    found = []
    for example in sorted(examples, key=lambda e: not e["reason"].endswith(" file")):
        taken[example["reason"]] += 1
        if taken[example["reason"]] <= each:
            found.append(example)
    return found[:in_all]


def told(example: dict[str, Any]) -> str:
    """One dropped row in one line."""
    detail = " ".join(example["detail"].split())
    place = example["file"]
    if not example["reason"].endswith(" file"):
        place += f", row {example['row']}"
    return f"{place}: {example['reason']}{f' ({detail})' if detail else ''}"


class Tally:
    """The rows of one unit: reasons and examples of what was dropped, lengths and samples of what
    was kept, and both by file.

    before: what was dropped in the units before, whose examples need not be given again.
    """

    def __init__(self, before: Counter[str] | None = None) -> None:
        self.before: Counter[str] = before or Counter()
        self.dropped: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []
        self.lengths: Counter[str] = Counter()
        self.reasoning: Counter[str] = Counter()
        self.samples: list[list[Any]] = []  # rank and beginning
        self.lowest, self.highest = 2**64, -1  # of the hashes that decide the split
        self.n_lowest = 0  # pieces of the document with the lowest one
        # by number: name, kept, lost, and how often it was read in which way
        self.files: dict[str, list[Any]] = {}

    def drop(self, rows: Rows, i: int, bad: Rejected, item: Any) -> None:
        self.dropped[bad.reason] += 1
        self._file(rows)[2] += 1
        if self.before[bad.reason] + self.dropped[bad.reason] <= EXAMPLES:
            begin = item.decode(errors="replace") if isinstance(item, bytes) else str(item)
            facts = {
                "reason": bad.reason,
                "file": readable(rows.name),
                "row": rows.first + i,
                "detail": readable(str(bad.detail)[:200]),
            }
            text = "" if isinstance(item, Rejected) else readable(begin[:200])
            self.examples.append(facts | {"text": text})

    def keep(self, rows: Rows, document: Document, key: int) -> None:
        """key: what decides the split of the document."""
        self.lengths[str(document.n_bytes.bit_length())] += 1
        if document.reasoning:
            self.reasoning[document.reasoning] += 1
        self._range(key, key, 1)
        file = self._file(rows)
        file[1] += 1
        read_as = ", ".join(filter(None, (document.layout, rows.read_as)))
        file[3][read_as] = file[3].get(read_as, 0) + 1
        # another order than that which decides the split
        rank = document.key * 0x9E3779B97F4A7C15 % 2**64
        if len(self.samples) < SAMPLES or rank < self.samples[-1][0]:
            begin = document.text[:600].decode(errors="ignore")
            self.samples = sorted([*self.samples, [rank, begin]])[:SAMPLES]

    def _range(self, lowest: int, highest: int, n_lowest: int) -> None:
        """Take in hashes from `lowest`, of so many pieces, to `highest`."""
        if lowest < self.lowest:
            self.lowest, self.n_lowest = lowest, 0
        self.n_lowest += n_lowest if lowest == self.lowest else 0
        self.highest = max(self.highest, highest)

    def _file(self, rows: Rows) -> list[Any]:
        number = str(min(rows.file, FILES_SHOWN))
        return self.files.setdefault(number, [readable(rows.name), 0, 0, {}])

    def facts(self) -> dict[str, Any]:
        """As JSON, for `merge`."""
        return {name: value for name, value in vars(self).items() if name != "before"}

    def merge(self, facts: dict[str, Any]) -> None:
        """Add those of the next unit."""
        for counts in ("dropped", "lengths", "reasoning"):
            getattr(self, counts).update({k: int(n) for k, n in facts[counts].items()})
        for example in facts["examples"]:
            self.examples.append({**example, "row": int(example["row"])})
            told(example)
        samples = [[int(rank), str(begin)] for rank, begin in facts["samples"]]
        self.samples = sorted(self.samples + samples)[:SAMPLES]
        self._range(int(facts["lowest"]), int(facts["highest"]), int(facts["n_lowest"]))
        for number, (name, kept, lost, read_as) in facts["files"].items():
            file = self.files.setdefault(str(int(number)), [str(name), 0, 0, {}])
            file[1], file[2] = file[1] + int(kept), file[2] + int(lost)
            file[3] = dict(Counter(file[3]) + Counter(read_as))


def readable(text: str) -> str:
    """`text` as a terminal can show it: without what is no character."""
    return text.encode(errors="replace").decode()

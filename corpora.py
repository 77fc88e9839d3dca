"""Where text and conversations come from: the hub, local files, the built-in demo world.

In: a `TextSource` or `ChatSource` of the config. Out: documents or conversations, and folders of text shards.
Knows nothing of token ids and chat formats: a conversation is a list of messages, in plain text.

    source ── read, row by row ── clean ── drop duplicates ── validation or train, by hash ── text shard
    What is dropped is counted by reason, with the file and row of some examples.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np

import log
from config import REASONING_PROMPT, ChatSource, DataConfig, TextSource, UserError
from shards import ShardFolder, TextShardWriter, fingerprint, read_text_batches, unit_batches

SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".json", ".csv", ".txt", ".md")
TEXT_COLUMNS = ("text", "content", "document", "body", "article", "raw_content", "markdown")  # guessed in this order
PIECE_CHARS = 16_384  # a .txt or .md file longer than this is cut at blank lines into documents of about this size
BATCH_ROWS = 256  # rows read at once
READ_BYTES = 8 << 20  # bytes of text read at once, about
EXAMPLES = 3  # dropped documents shown a reason


class Message(TypedDict):
    """One turn. role: system, user or assistant; thinking: what an assistant thought before `content`, or None."""

    role: str
    content: str
    thinking: str | None


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used: `reason` is what is counted, `detail` what is shown."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one file: dicts, or the values of one column; `first` is the row number of the first."""

    file: int
    name: str
    first: int
    items: list[Any]


Cursor = tuple[int, int]  # file and row to read next
START: Cursor = (0, 0)

# ------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class SourceFile:
    """A file to read, here or on the hub."""

    path: str
    size: int

    @property
    def suffix(self) -> str:
        found = [suffix for suffix in SUFFIXES if self.path.lower().endswith(suffix)]
        return max(found, key=len, default="")

    def open(self) -> BinaryIO:
        """The bytes of the file, decompressed."""
        file: Any = Path(self.path).open("rb")  # noqa: SIM115, closed by who reads
        if self.suffix.endswith(".gz"):
            return gzip.open(file)  # type: ignore[return-value]
        if self.suffix.endswith(".zst"):
            import zstandard

            return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)  # type: ignore
        return file


def local_files(patterns: Iterable[str]) -> list[SourceFile]:
    """The files that names, folders and globs stand for, each once, folders in alphabetical order.

    Raises `UserError` where a pattern finds nothing, or a file has a format that cannot be read.
    """
    found: dict[str, SourceFile] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            paths = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
            usable = [p for p in paths if SourceFile(str(p), 0).suffix]
            if not usable:
                raise UserError(f"{path} holds no file that can be read ({_formats()}); it holds {_listing(paths)}.")
        elif path.is_file():
            usable = [path]
        else:
            usable = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
            if not usable:
                around = path.parent if path.parent.is_dir() else Path()
                raise UserError(f"There is no file {pattern}; {around.absolute()} holds {_listing(around.iterdir())}.")
        for p in usable:
            file = SourceFile(str(p), p.stat().st_size)
            if not file.suffix:
                raise UserError(f"{p} has a format that cannot be read: give {_formats()}.")
            found.setdefault(str(p.resolve()), file)
    return list(found.values())


def _formats() -> str:
    return ", ".join(SUFFIXES)


def _listing(paths: Iterable[Path]) -> str:
    names = sorted(path.name for path in paths)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) + more) or "nothing"


# ---------------------------------------------------------------------------------------------- readers


def read_rows(files: list[SourceFile], cursor: Cursor, column: Callable[[Any], str | None]) -> Iterator[Rows]:
    """The rows of `files` from `cursor` on. `column(names)` picks the column to read, None for whole rows as dicts.

    What cannot be read comes as a `Bad` item in its place; the rest is kept.
    """
    for number in range(cursor[0], len(files)):
        file = files[number]
        row = cursor[1] if number == cursor[0] else 0
        read = READERS[file.suffix]
        try:
            if file.size == 0:
                yield Rows(number, file.path, row, [Bad("empty file")] if row == 0 else [])
            for items in read(file, row, column):
                yield Rows(number, file.path, row, items)
                row += len(items)
        except (OSError, EOFError, ValueError, *_format_errors()) as error:
            yield Rows(number, file.path, row, [Bad("unreadable file", f"{type(error).__name__}: {error}")])


def _format_errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa
    import zstandard

    return pa.ArrowException, zstandard.ZstdError, csv.Error


def _parquet(file: SourceFile, row: int, column: Callable[[Any], str | None]) -> Iterator[list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file.open(), buffer_size=1 << 20, pre_buffer=False) as table:
        kinds = {f.name: f.type for f in table.schema_arrow}
        name = column(kinds)
        textual = name is None or _is_text(kinds[name])
        for group in range(table.num_row_groups):
            facts = table.metadata.row_group(group)
            if row >= facts.num_rows:
                row -= facts.num_rows
                continue
            at_once = max(1, min(BATCH_ROWS, READ_BYTES * facts.num_rows // max(1, facts.total_byte_size)))
            batches = table.iter_batches(at_once, row_groups=[group], columns=[name] if name else None)
            for batch in batches:
                if row >= batch.num_rows:
                    row -= batch.num_rows
                    continue
                batch, row = batch.slice(row), 0
                if name is None:
                    yield batch.to_pylist()
                elif textual:
                    yield batch.column(0).cast(pa.large_binary()).to_pylist()
                else:
                    yield [Bad("wrong type in column", f"{name} is {kinds[name]}")] * batch.num_rows


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary)
    ) or types.is_large_binary(kind)


def _jsonl(file: SourceFile, row: int, column: Callable[[Any], str | None]) -> Iterator[list[Any]]:
    def parsed(line: bytes) -> Any:
        try:
            return json.loads(line)
        except UnicodeDecodeError as error:
            return Bad("invalid UTF-8", str(error))
        except ValueError as error:
            return Bad("not JSON", str(error))

    with io.BufferedReader(file.open(), 1 << 20) as lines:  # type: ignore[arg-type]
        full = (line for line in lines)
        yield from _picked(
            (parsed(line) if line.strip() else Bad("empty line") for line in islice(full, row, None)), column
        )


def _json(file: SourceFile, row: int, column: Callable[[Any], str | None]) -> Iterator[list[Any]]:
    yield from _picked(islice(_json_items(file), row, None), column)


def _json_items(file: SourceFile) -> Iterator[Any]:
    """The objects of a JSON array, or of JSON values one after another, without holding the whole file."""
    decoder = json.JSONDecoder()
    with io.TextIOWrapper(file.open(), encoding="utf-8", errors="surrogateescape") as stream:
        text, at, ended = "", 0, False
        while True:
            at = _skip(text, at)
            try:
                if at < len(text):
                    value, stop = decoder.raw_decode(text, at)
                    if stop < len(text) or ended:
                        yield value
                        at = stop
                        continue
            except ValueError:
                if ended:
                    yield Bad("not JSON", text[at : at + 60])
                    return
            if ended:
                return
            more = stream.read(max(1 << 20, len(text) - at))
            text, at, ended = text[at:] + more, 0, not more


def _skip(text: str, at: int) -> int:
    """Past what stands between the objects of an array."""
    while at < len(text) and text[at] in " \t\r\n,[]\ufeff":
        at += 1
    return at


def _csv(file: SourceFile, row: int, column: Callable[[Any], str | None]) -> Iterator[list[Any]]:
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(file.open(), encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        yield from _picked(islice(csv.DictReader(stream), row, None), column)


def _plain(file: SourceFile, row: int, column: Callable[[Any], str | None]) -> Iterator[list[Any]]:
    name = column({"text": str})
    for piece in islice(_pieces(file), row, None):
        yield [piece if name else {"text": piece}]


def _pieces(file: SourceFile) -> Iterator[str]:
    """A text file as documents: cut at the first blank line after `PIECE_CHARS`, or at a line end."""
    with io.TextIOWrapper(file.open(), encoding="utf-8-sig", errors="surrogateescape") as stream:
        lines: list[str] = []
        length = 0
        for line in iter(lambda: stream.readline(4 * PIECE_CHARS), ""):
            lines.append(line)
            length += len(line)
            if length >= (PIECE_CHARS if not line.strip() else 4 * PIECE_CHARS):
                yield "".join(lines).strip("\n")
                lines, length = [], 0
        if lines:
            yield "".join(lines).strip("\n")


READERS: dict[str, Callable[..., Iterator[list[Any]]]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".jsonl.zst": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _plain,
    ".md": _plain,
}


def _picked(items: Iterable[Any], column: Callable[[Any], str | None]) -> Iterator[list[Any]]:
    """Batches of dict rows, or of the one column that `column` picks when it sees the first row."""
    iterator = iter(items)
    name, asked = None, False
    while batch := list(islice(iterator, BATCH_ROWS)):
        if not asked:
            first = next((item for item in batch if isinstance(item, dict)), None)
            if first is not None:
                name, asked = column({key: type(value) for key, value in first.items()}), True
        yield [_value(item, name) for item in batch]


def _value(item: Any, name: str | None) -> Any:
    if isinstance(item, Bad):
        return item
    if not isinstance(item, dict):
        return Bad("not an object with columns", str(item)[:60])
    if name is None:
        return item
    return item[name] if name in item else Bad("column is missing", name)


# --------------------------------------------------------------------------------------------- cleaning


def as_bytes(value: Any) -> bytes | Bad:
    """The UTF-8 bytes of a value that should be text."""
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            return Bad("invalid UTF-8", str(error))
    if isinstance(value, bytes):
        try:
            value.isascii() or value.decode()
        except UnicodeDecodeError as error:
            return Bad("invalid UTF-8", str(error))
        return value
    if value is None:
        return Bad("null")
    return value if isinstance(value, Bad) else Bad("wrong type in column", type(value).__name__)


def unfit(data: bytes, config: DataConfig) -> Bad | None:
    """Why a document is no use for training, None where it is."""
    if b"\0" in data:
        return Bad("NUL bytes")
    if len(data) < 4 * config.min_chars and len(data.decode().strip()) < config.min_chars:
        return Bad("too short")
    if repeated_line_share(data) > config.max_repeated_line_share:
        return Bad("mostly one repeated line")
    return None


def repeated_line_share(data: bytes) -> float:
    """The share of the bytes that the repeated line with most bytes makes up; 0 where no line is repeated."""
    lines = data.split(b"\n")
    distinct = set(lines)
    redundant = len(data) - sum(map(len, distinct))
    if len(distinct) == len(lines) or not redundant:
        return 0.0
    times = Counter(line for line in lines if line)
    return max((len(line) * n for line, n in times.items() if n > 1), default=0) / len(data)


class Seen:
    """The 64-bit hashes of all documents so far, 8 bytes each: sorted runs, merged as they grow."""

    def __init__(self) -> None:
        self._fresh: set[int] = set()
        self._runs: list[np.ndarray] = []

    def add(self, key: int) -> bool:
        """Remember `key`; True where it was known."""
        if key in self._fresh:
            return True
        for run in self._runs:
            at = int(np.searchsorted(run, np.uint64(key)))
            if at < len(run) and run[at] == key:
                return True
        self._fresh.add(key)
        if len(self._fresh) >= 100_000:
            self._runs.append(np.sort(np.fromiter(self._fresh, np.uint64)))
            self._fresh.clear()
            while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
                last, before = self._runs.pop(), self._runs.pop()
                self._runs.append(np.sort(np.concatenate([before, last])))
        return False


def text_hash(data: bytes) -> int:
    """64 bits that decide what a document's duplicate is and whether it is held out."""
    import xxhash

    return xxhash.xxh3_64_intdigest(data)


# --------------------------------------------------------------------------------------- text documents


def source_rows(source: TextSource | ChatSource, column: Callable[[Any], str | None], cursor: Cursor) -> Iterator[Rows]:
    """The rows of any source from `cursor` on."""
    if source.demo:
        yield from _demo_rows(source, cursor)
    elif source.hub:
        raise UserError("hub")
    else:
        yield from read_rows(local_files(source.files), cursor, column)


def _demo_rows(source: TextSource | ChatSource, cursor: Cursor) -> Iterator[Rows]:
    import demo_world

    rows = demo_world.text_documents() if source.demo == "text" else demo_world.conversations(source.demo)
    rows = islice(rows, cursor[1], None)
    first = cursor[1]
    while batch := list(islice(rows, BATCH_ROWS)):
        yield Rows(0, "demo_world", first, batch)
        first += len(batch)


def column_picker(source: TextSource) -> Callable[[Any], str]:
    """What picks the text column of a file from its columns, and says so when it had to guess."""
    said: set[str] = set()

    def pick(kinds: dict[str, Any]) -> str:
        if source.column:
            if source.column not in kinds:
                raise UserError(
                    f"{source.name}: there is no column {source.column!r}; the columns are {', '.join(kinds)}."
                )
            return source.column
        name = next((name for name in TEXT_COLUMNS if name in kinds), None)
        if name is None:
            textual = [n for n, kind in kinds.items() if kind is str or (not isinstance(kind, type) and _is_text(kind))]
            if len(textual) != 1:
                option = "--data.text_column" if source.name == "own" else "the column of its source in config.py"
                raise UserError(
                    f"{source.name}: cannot tell which column holds the text; the columns are {', '.join(kinds)}. "
                    f"Name it with {option}."
                )
            name = textual[0]
        if name not in said and len(kinds) > 1:
            said.add(name)
            log.say(f"{source.name}: text is taken from the column {name!r}")
        return name

    return pick


def text_documents(source: TextSource) -> Iterator[str]:
    """Every document of `source` that is text, uncleaned, in order."""
    for rows in source_rows(source, column_picker(source), START):
        for item in rows.items:
            data = as_bytes(item)
            if isinstance(data, bytes):
                yield data.decode()


# ---------------------------------------------------------------------------------------- text folders


@dataclass
class Tally:
    """What happened to the rows of one unit."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, rows: Rows, i: int, bad: Bad, text: str = "") -> None:
        self.dropped[bad.reason] += 1
        shown = self.examples.setdefault(bad.reason, [])
        if len(shown) < EXAMPLES:
            shown.append(" ".join(f"{rows.name}, row {rows.first + i}: {bad.detail} {text[:80]!r}".split()))


def write_text_shards(
    source: TextSource, folder: Path, config: DataConfig, before: Sequence[Path] = ()
) -> dict[str, Any]:
    """Bring the text shards of one corpus into `folder`, or go on with them; returns the manifest.

    before: finished folders of other corpora, whose documents are dropped here as duplicates.
    """
    settings = {
        **_origin(source),
        "column": source.column,
        "max_bytes": source.max_bytes,
        "shard_mb": config.shard_mb,
        "validation_share": config.validation_share,
        "min_chars": config.min_chars,
        "max_repeated_line_share": config.max_repeated_line_share,
        "deduplicate": config.deduplicate and [path.name for path in before],
    }
    target = ShardFolder(folder, "text", settings)
    if target.finished:
        return target.manifest
    seen = Seen()
    if config.deduplicate:
        for path in (*before, folder):
            _remember(path, seen)

    def use(item: Any) -> tuple[bytes, int, int] | Bad:
        data = as_bytes(item)
        if isinstance(data, Bad):
            return data
        found = unfit(data, config)
        if found:
            return found
        key = text_hash(data)
        if config.deduplicate and seen.add(key):
            return Bad("duplicate")
        return data, len(data), key

    finished = _ingest(
        source,
        target,
        column_picker(source),
        use,
        share=config.validation_share,
        unit_bytes=config.shard_mb * 10**6,
        max_bytes=source.max_bytes,
        max_rows=None,
    )
    return finished or write_text_shards(source, folder, config, before)


def _remember(folder: Path, seen: Seen) -> None:
    """Put the documents that `folder` holds into `seen`."""
    import pyarrow as pa

    for batch in unit_batches(folder):
        for data in batch.column(0).cast(pa.large_binary()).to_pylist():
            seen.add(text_hash(data))


def write_chat_shards(source: ChatSource, folder: Path, validation_share: float) -> dict[str, Any]:
    """Bring one set of conversations into `folder`, or go on with it; returns the manifest."""
    settings = {**_origin(source), "max_rows": source.max_rows, "validation_share": validation_share}

    def use(item: Any) -> tuple[list[Message], int, int] | Bad:
        if isinstance(item, Bad):
            return item
        messages = conversation(item)
        if isinstance(messages, Bad):
            return messages
        text = json.dumps(messages, ensure_ascii=False).encode(errors="replace")
        return messages, len(text), text_hash(text)

    target = ShardFolder(folder, "chat", settings)
    if target.finished:
        return target.manifest
    finished = _ingest(
        source,
        target,
        lambda kinds: None,
        use,
        share=validation_share,
        unit_bytes=CHAT_UNIT_BYTES,
        max_bytes=None,
        max_rows=source.max_rows,
    )
    return finished or write_chat_shards(source, folder, validation_share)


CHAT_UNIT_BYTES = 64 * 10**6


def _origin(source: TextSource | ChatSource) -> dict[str, Any]:
    """What identifies the input, for the settings in the manifest."""
    if source.demo:
        return {"demo": source.demo}
    if source.hub:
        return {"hub": source.hub, "hub_config": source.hub_config, "split": source.split}
    files = local_files(source.files)
    return {
        "files": f"{len(files)} files, {sum(f.size for f in files)} bytes",
        "files_hash": fingerprint([(f.path, f.size) for f in files]),
    }


def _ingest(
    source: TextSource | ChatSource,
    target: ShardFolder,
    column: Callable[[Any], str | None],
    use: Callable[[Any], tuple[Any, int, int] | Bad],
    *,
    share: float,
    unit_bytes: int,
    max_bytes: int | None,
    max_rows: int | None,
) -> dict[str, Any] | None:
    """Read `source` to its end into units of `unit_bytes`, each committed with the cursor where the next begins.

    A small corpus may have no document below the held-out share: then None, and the next call holds out the lowest.
    """
    threshold = max(share * 2**64, target.manifest.get("hold_out_below", 0))
    lowest = 2**64
    units = target.units
    cursor: Cursor = tuple(units[-1]["to"]) if units else START
    done = {
        key: sum(target.totals(split)[key] for split in ("train", "validation")) for key in ("documents", "text_bytes")
    }
    if units:
        log.say(
            f"{source.name}: going on after {log.count(done['documents'])} documents, {log.size(done['text_bytes'])}"
        )
    writer = TextShardWriter(target)
    tally, begin = Tally(), cursor
    bar = log.progress(max_bytes, "B", source.name, start=done["text_bytes"])

    def close_unit(stop: Cursor) -> None:
        nonlocal tally, begin
        facts = {"from": begin, "to": stop, "dropped": dict(tally.dropped), "examples": tally.examples}
        facts["lowest"] = lowest
        target.commit({"files": writer.close(), **facts})
        tally, begin = Tally(), stop

    for rows in source_rows(source, column, cursor):
        for i, item in enumerate(rows.items):
            used = use(item)
            cursor = (rows.file, rows.first + i + 1)
            if isinstance(used, Bad):
                tally.drop(rows, i, used, str(item)[:80] if not isinstance(item, Bad) else "")
                continue
            row, n_bytes, key = used
            writer.add("validation" if key < threshold else "train", row, n_bytes)
            lowest = min(lowest, key)
            done["documents"] += 1
            done["text_bytes"] += n_bytes
            bar.update(n_bytes)
            if writer.n_bytes >= unit_bytes:
                close_unit(cursor)
            if _enough(done, max_bytes, max_rows):
                break
        if _enough(done, max_bytes, max_rows):
            break
    close_unit(cursor)
    bar.close()
    dropped: Counter[str] = Counter()
    for unit in target.units:
        dropped.update(unit["dropped"])
    if not done["documents"]:
        raise _nothing(source, target, dropped)
    if done["documents"] == 1:
        raise UserError(f"{source.name} holds a single document: at least two are needed, one is held out.")
    if not target.totals("validation")["documents"]:
        target.start_again(hold_out_below=min(unit["lowest"] for unit in target.units) + 1)
        return None
    return target.finish(name=source.name, source=_origin(source), dropped=dict(dropped))


def _enough(done: dict[str, int], max_bytes: int | None, max_rows: int | None) -> bool:
    return bool(max_bytes and done["text_bytes"] >= max_bytes) or bool(max_rows and done["documents"] >= max_rows)


def _nothing(source: TextSource | ChatSource, target: ShardFolder, dropped: Counter[str]) -> UserError:
    examples = [text for unit in target.units for texts in unit["examples"].values() for text in texts]
    target.start_again()
    reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "it is empty"
    shown = "".join(f"\n  {text}" for text in examples[:EXAMPLES])
    return UserError(f"{source.name} holds nothing that can be used: {reasons}.{shown}")


# ---------------------------------------------------------------------------------------- conversations


def conversations(source: ChatSource) -> Iterator[list[Message]]:
    """Every conversation of `source` that can be used, in order."""
    for rows in source_rows(source, lambda kinds: None, START):
        for item in rows.items:
            messages = item if isinstance(item, Bad) else conversation(item)
            if not isinstance(messages, Bad):
                yield messages


def read_conversations(folder: Path, split: str, command: str = "uv run create_shard.py") -> Iterator[list[Message]]:
    """The conversations of a finished folder, in order."""
    for batch in read_text_batches(folder, split, command):
        yield from batch.column(0).to_pylist()


def conversation(row: dict[str, Any]) -> list[Message] | Bad:
    """One row in any of the usual layouts, recognised by its columns, as messages."""
    for columns, convert in LAYOUTS:
        if all(row.get(name) is not None for name in columns):
            try:
                messages = convert(row)
            except (TypeError, KeyError, AttributeError, IndexError) as error:
                return Bad("malformed row", f"{type(error).__name__}: {error}")
            return messages if isinstance(messages, Bad) else finished(messages)
    return Bad("unknown layout", "columns " + ", ".join(map(str, row)))


def finished(messages: list[Message]) -> list[Message] | Bad:
    """Messages with their thoughts split off, checked, and with a system turn where they reason."""
    for message in messages:
        if message["role"] not in ROLES:
            return Bad("tool use", message["role"])
        if message["role"] == "assistant" and message["thinking"] is None and "<think>" in message["content"]:
            match = THOUGHT.match(message["content"])
            if not match:
                return Bad("unfinished thought")
            message["thinking"], message["content"] = match[1].strip(), match[2].strip()
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        return Bad("no question with an answer")
    if any(not m["content"].strip() for m in messages if m["role"] != "system"):
        return Bad("empty turn")
    if any(m["thinking"] for m in messages) and messages[0]["role"] != "system":
        messages.insert(0, turn("system", REASONING_PROMPT))
    return messages


THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def turn(role: str, content: Any, thinking: str | None = None) -> Message:
    if not isinstance(content, str):
        raise TypeError(f"a turn holds {type(content).__name__}, not text")
    return {"role": ROLES.get(role, role), "content": content, "thinking": thinking}


def _pair(question: str, *, context: str | None, answer: str, thinking: str | None = None) -> list[Message]:
    asked = f"{question}\n\n{context}" if context and context.strip() else question
    return [turn("user", asked), turn("assistant", answer, thinking)]


def _instruction(row: dict[str, Any]) -> list[Message]:
    context = row.get("input") or row.get("context")
    answer = next(row[name] for name in ("output", "response") if row.get(name) is not None)
    return _pair(row["instruction"], context=context, answer=answer)


ALPACA_FRAME = re.compile(r"### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:\s*$", re.DOTALL)


def _prompt(row: dict[str, Any]) -> list[Message]:
    """A prompt and its answer; the frame that Alpaca put around its prompts is taken off."""
    answer = row["completion"] if row.get("completion") is not None else row["response"]
    match = ALPACA_FRAME.search(row["prompt"])
    if match:
        return _pair(match[1], context=match[2], answer=answer)
    return _pair(row["prompt"], context=None, answer=answer)


def _messages(row: dict[str, Any]) -> list[Message]:
    """Turns as role and content or from and value; content is text or a list of parts, some of them thoughts."""
    found = []
    for item in row["messages"] if row.get("messages") is not None else row["conversations"]:
        role = item.get("role") or item["from"]
        content = item["content"] if "content" in item else item["value"]
        thinking = item.get("thinking")
        if isinstance(content, list):
            parts = [(part.get("type", "text"), part.get("value", part.get("text"))) for part in content]
            if any(kind not in ("text", "reasoning") for kind, _ in parts):
                role = "tool"
            thinking = "\n\n".join(text for kind, text in parts if kind == "reasoning") or None
            content = "\n\n".join(text for kind, text in parts if kind == "text")
        found.append(turn(role, content if role in ROLES else "", thinking))
    return found


def _problem(row: dict[str, Any]) -> list[Message] | Bad:
    """Mathematics: the first verified generation where there is one, else the worked solution and the answer."""
    verified = row.get("correctness_math_verify") or []
    for text, right in zip(row.get("generations") or [], verified, strict=False):
        match = THOUGHT.match(text or "")
        if right and match and match[2].strip():
            return _pair(row["problem"], context=None, answer=match[2].strip(), thinking=match[1].strip())
    solution, answer = row["solution"], row.get("answer")
    if not answer:
        return _pair(row["problem"], context=None, answer=solution)
    return _pair(row["problem"], context=None, answer=answer, thinking=solution)


CALCULATION = re.compile(r"<<[^<>]*>>")


def _question(row: dict[str, Any]) -> list[Message]:
    """GSM8K: the worked solution, without its calculation marks, is the thinking; what follows `####` the answer."""
    worked, mark, answer = CALCULATION.sub("", row["answer"]).rpartition("####")
    if not mark:
        return _pair(row["question"], context=row.get("context"), answer=answer)
    return _pair(row["question"], context=None, answer=answer.strip(), thinking=worked.strip())


SPEAKER = re.compile(r"### (Human|Assistant|System):\s*")


def _transcript(row: dict[str, Any]) -> list[Message] | Bad:
    """One text with `### Human:` and `### Assistant:` in it."""
    pieces = SPEAKER.split(row["text"])
    if len(pieces) < 3 or pieces[0].strip():
        return Bad("unknown layout", "a text without ### Human: and ### Assistant:")
    return [turn(role.lower(), text.strip()) for role, text in zip(pieces[1::2], pieces[2::2], strict=True)]


# The first whose columns are all there is taken.
LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], list[Message] | Bad]], ...] = (
    (("problem", "solution"), _problem),
    (("messages",), _messages),
    (("conversations",), _messages),
    (("instruction", "output"), _instruction),
    (("instruction", "response"), _instruction),
    (("question", "answer"), _question),
    (("prompt", "completion"), _prompt),
    (("prompt", "response"), _prompt),
    (("text",), _transcript),
)

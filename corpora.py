"""Where text and conversations come from: the hub, local files, the built-in demo world.

In: a `TextSource` or `ChatSource` of the config. Out: documents or conversations, and folders of text shards.
Knows nothing of token ids and chat formats: a conversation is a list of messages, in plain text.

    source ── read, row by row ── clean ── drop duplicates ── validation or train, by hash ── text shard

Every row has a place, a `Cursor`: what is interrupted or damaged is read again from where its shard began.
What is dropped is counted by reason, with the file and row of some examples.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import importlib.util
import io
import json
import queue
import re
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import log
from config import REASONING_PROMPT, ChatSource, DataConfig, TextSource, UserError
from shards import (
    SPLITS,
    ShardFolder,
    TextShardWriter,
    checksum,
    data_sheet,
    fingerprint,
    read_text_batches,
    unit_batches,
    write_text,
)

SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".json", ".csv", ".txt", ".md")
TEXT_COLUMNS = ("text", "content", "document", "body", "article", "raw_content", "markdown")  # guessed in this order
PIECE_CHARS = 16_384  # a .txt or .md file longer than this is cut at blank lines into documents of about this size
READ_ROWS = 256  # rows read at once,
READ_BYTES = 4 << 20  # or about this many bytes of text
BATCHES_AHEAD = 2  # of these, read before they are needed
CHAT_UNIT_BYTES = 64_000_000  # size of a shard of conversations
MAX_BYTES = 1 << 30  # of a document
EXAMPLES = 20  # dropped documents shown a reason
SAMPLES = 10  # documents whose beginning the data sheet shows
SEEN_LIMIT = 24_000_000  # document hashes held in memory, 8 bytes each in a table at most 3/4 full
PROBE_BYTES = 8_000_000  # text read to estimate the size of a source
PROBE_MINUTES = 0.5  # a network that fails is given to answer for that
HUB_BLOCK = 8 << 20  # bytes asked of the hub at once

Pick = Callable[[dict[str, Any]], str | None]  # columns with their types → the column to read, None for all as a dict
Cursor = tuple[int, int]  # file and row to read next
START: Cursor = (0, 0)


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
    share: float = 0.0  # of the whole source that was read up to here, by size


class NetworkFailure(Exception):
    """What a network does at times; worth another try."""


# ------------------------------------------------------------------------------------------------ files


@dataclass
class SourceFile:
    """A file to read, here or on the hub (hf://…)."""

    path: str
    size: int
    share: float = field(default=0.0, compare=False)  # of it that was read
    raw: Any = field(default=None, compare=False)  # its bytes as they lie there, while it is open

    @property
    def suffix(self) -> str:
        found = [suffix for suffix in SUFFIXES if self.path.lower().endswith(suffix)]
        return max(found, key=len, default="")

    def open(self) -> BinaryIO:
        """The bytes of the file, decompressed."""
        self.raw = _HubFile(self) if self.path.startswith("hf://") else Path(self.path).open("rb")  # noqa: SIM115
        if self.suffix.endswith(".gz"):
            return gzip.open(self.raw)  # type: ignore[return-value]
        if self.suffix.endswith(".zst"):
            return io.BufferedReader(_ZstdFile(self.raw), 1 << 20)  # type: ignore[return-value]
        return self.raw

    def close(self) -> None:
        if self.raw is not None:
            self.raw.close()

    def measure(self) -> float:
        """The share of the file that was read, by bytes, where the reader did not say it by rows."""
        if self.share or self.raw is None:
            return self.share
        return 1.0 if self.raw.closed else min(1.0, self.raw.tell() / self.size)

    def network_failure(self) -> Exception | None:
        return getattr(self.raw, "failure", None)


class _ZstdFile(io.RawIOBase):
    """A .zst file decompressed, that raises `EOFError` where the file ends in mid-frame (the library keeps silent)."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self.raw, self.library = raw, zstandard.ZstdDecompressor()
        self.frame: Any = None
        self.compressed, self.plain = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.plain:
            if not self.compressed:
                self.compressed = self.raw.read(1 << 17)
            if not self.compressed:
                if self.frame is not None:
                    raise EOFError("the compressed file ends in its middle")
                return 0
            self.frame = self.frame or self.library.decompressobj()
            self.plain = self.frame.decompress(self.compressed)
            self.compressed = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = None
        n = min(len(buffer), len(self.plain))
        buffer[:n] = self.plain[:n]
        self.plain = self.plain[n:]
        return n

    def close(self) -> None:
        self.raw.close()
        super().close()


def local_files(patterns: Iterable[str]) -> list[SourceFile]:
    """The files that names, folders and globs stand for, each once, folders in alphabetical order.

    Raises `UserError` where a pattern finds nothing, or a file has a format that cannot be read.
    """
    found: dict[str, SourceFile] = {}
    for pattern in patterns:
        for path in _paths(pattern):
            try:
                file = SourceFile(str(path), path.stat().st_size)
                path.open("rb").close()
            except OSError as error:
                raise UserError(f"Cannot read {path}: {error.strerror}.") from error
            if not file.suffix:
                raise UserError(f"{path} has a format that cannot be read: give {', '.join(SUFFIXES)}.")
            found.setdefault(str(path.resolve()), file)
    return list(found.values())


def _paths(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        usable = [p for p in inside if SourceFile(str(p), 0).suffix]
        if not usable:
            formats = ", ".join(SUFFIXES)
            raise UserError(f"{path} holds no file that can be read ({formats}); it holds {_listing(inside)}.")
        return usable
    if path.is_file():
        return [path]
    usable = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    if not usable:
        around = path.parent if path.parent.is_dir() else Path()
        raise UserError(f"There is no file {pattern}; {around.absolute()} holds {_listing(around.iterdir())}.")
    return usable


def _listing(paths: Iterable[Path]) -> str:
    names = sorted(path.name for path in paths)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) + more) or "nothing"


# ---------------------------------------------------------------------------------------------- readers


def read_rows(files: list[SourceFile], cursor: Cursor, pick: Pick) -> Iterator[Rows]:
    """The rows of `files` from `cursor` on; what cannot be read comes as a `Bad` item in its place, the rest is kept.

    Raises `NetworkFailure` where a file of the hub breaks off.
    """
    total = sum(file.size for file in files) or 1
    before = sum(file.size for file in files[: cursor[0]])
    for number in range(cursor[0], len(files)):
        file = files[number]
        row = cursor[1] if number == cursor[0] else 0
        file.share = 0.0
        try:
            if file.size == 0 and row == 0:
                yield Rows(number, file.path, 0, [Bad("empty file")])
            for items in READERS[file.suffix](file, row, pick) if file.size else ():
                yield Rows(number, file.path, row, items, (before + file.size * file.measure()) / total)
                row += len(items)
        except (OSError, EOFError, ValueError, *_format_errors()) as error:
            if file.network_failure():
                raise NetworkFailure(str(file.network_failure())) from error
            yield Rows(number, file.path, row, [Bad("unreadable file", f"{type(error).__name__}: {error}")])
        finally:
            file.close()
        before += file.size


def _format_errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa
    import zstandard

    return pa.ArrowException, zstandard.ZstdError, csv.Error


def _parquet(file: SourceFile, row: int, pick: Pick) -> Iterator[list[Any]]:
    """Row groups one after another; in a damaged one the rows from the damage on are lost, and counted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file.open(), buffer_size=1 << 20, pre_buffer=False) as table:
        kinds = {f.name: f.type for f in table.schema_arrow}
        name = pick(kinds)
        n_rows = max(1, table.metadata.num_rows)
        start = 0
        for group in range(table.num_row_groups):
            facts = table.metadata.row_group(group)
            stop = start + facts.num_rows
            at_once = max(1, min(READ_ROWS, READ_BYTES * facts.num_rows // max(1, facts.total_byte_size)))
            at = start
            try:
                batches = table.iter_batches(at_once, row_groups=[group], columns=[name] if name else None)
                for batch in batches if row < stop else ():
                    if row < at + batch.num_rows:
                        file.share = (at + batch.num_rows) / n_rows
                        yield _values(batch.slice(max(0, row - at)), name)
                    at += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                if file.network_failure():
                    raise
                lost = Bad("unreadable rows", f"row group {group}: {error}")
                yield [lost] * (stop - max(at, row))
            start = stop


def _values(batch: Any, name: str | None) -> list[Any]:
    import pyarrow as pa

    if name is None:
        try:
            return batch.to_pylist()
        except UnicodeDecodeError:
            return [_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
    column = batch.column(0)
    if not _is_text(column.type):
        return [Bad("wrong type in column", f"{name} is {column.type}")] * batch.num_rows
    values = column.cast(pa.large_binary())
    try:
        values.view(pa.large_string()).validate(full=True)
    except pa.ArrowInvalid:
        return [value if value is None else _utf8(value) for value in values.to_pylist()]
    return values.to_pylist()


def _utf8(data: bytes) -> bytes | Bad:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return Bad("invalid UTF-8", str(error))
    return data


def _row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Bad("invalid UTF-8", str(error))


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(getattr(types, f"is_{name}")(kind) for name in ("string", "large_string", "binary", "large_binary"))


def _jsonl(file: SourceFile, row: int, pick: Pick) -> Iterator[list[Any]]:
    lines = file.open()
    if not isinstance(lines, io.BufferedIOBase):
        lines = io.BufferedReader(lines, 1 << 20)  # type: ignore[arg-type]
    with lines:
        yield from _picked((_parsed(line) for line in islice(lines, row, None)), pick)


def _parsed(line: bytes) -> Any:
    if not line.strip():
        return Bad("empty line")
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return Bad("invalid UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return Bad("not JSON", str(error))


def _json(file: SourceFile, row: int, pick: Pick) -> Iterator[list[Any]]:
    yield from _picked(islice(_json_items(file), row, None), pick)


def _json_items(file: SourceFile) -> Iterator[Any]:
    """The objects of a JSON array, or of JSON values one after another, without holding the whole file."""
    decoder = json.JSONDecoder()
    with io.TextIOWrapper(file.open(), encoding="utf-8-sig", errors="surrogateescape") as stream:
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
            except (ValueError, RecursionError) as error:
                if ended:
                    yield Bad("not JSON", str(error))
                    return
            if ended:
                return
            more = stream.read(max(1 << 20, len(text) - at))
            text, at, ended = text[at:] + more, 0, not more


def _skip(text: str, at: int) -> int:
    """Past what stands between the objects of an array."""
    while at < len(text) and text[at] in " \t\r\n,[]":
        at += 1
    return at


def _csv(file: SourceFile, row: int, pick: Pick) -> Iterator[list[Any]]:
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(file.open(), encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        yield from _picked(islice(csv.DictReader(stream), row, None), pick)


def _plain(file: SourceFile, row: int, pick: Pick) -> Iterator[list[Any]]:
    pick({"text": str})
    for piece in islice(_pieces(file), row, None):
        yield [piece]


def _pieces(file: SourceFile) -> Iterator[str]:
    """A text file as documents: cut at the first blank line after `PIECE_CHARS`, or at a line end without one."""
    with io.TextIOWrapper(file.open(), encoding="utf-8-sig", errors="surrogateescape") as stream:
        lines: list[str] = []
        length = 0
        for line in iter(lambda: stream.readline(4 * PIECE_CHARS), ""):
            lines.append(line)
            length += len(line)
            if length >= (4 * PIECE_CHARS if line.strip() else PIECE_CHARS):
                yield "".join(lines).strip("\n")
                lines, length = [], 0
        if lines:
            yield "".join(lines).strip("\n")


READERS: dict[str, Callable[[SourceFile, int, Pick], Iterator[list[Any]]]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".jsonl.zst": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _plain,
    ".md": _plain,
}


def _picked(items: Iterable[Any], pick: Pick) -> Iterator[list[Any]]:
    """Batches of dict rows, or of the one column that `pick` names when it sees the first row."""
    name, asked, batch, n_chars = None, False, [], 0
    for item in items:
        if not asked and isinstance(item, dict):
            name, asked = pick({key: type(value) for key, value in item.items()}), True
        value = _value(item, name)
        batch.append(value)
        n_chars += len(value) if isinstance(value, str) else 1000
        if len(batch) >= READ_ROWS or n_chars >= READ_BYTES:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _value(item: Any, name: str | None) -> Any:
    if isinstance(item, Bad):
        return item
    if not isinstance(item, dict):
        return Bad("not an object with columns", str(item)[:60])
    if name is None:
        return item
    return item[name] if name in item else Bad("column is missing", name)


# ---------------------------------------------------------------------------------------------- the hub


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub at one commit."""

    files: list[SourceFile]
    revision: str
    licence: str


def hub_set(source: TextSource | ChatSource, revision: str | None) -> HubSet:
    """Ask the hub for the files of `source` at `revision`, None for its newest commit.

    Raises `NetworkFailure` for what may pass, `UserError` for what will not.
    """
    from datasets import disable_progress_bars, exceptions, load_dataset_builder
    from huggingface_hub import HfApi, errors

    disable_progress_bars()
    final = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
        exceptions.DatasetNotFoundError,
        exceptions.DataFilesNotFoundError,
    )
    try:
        info = HfApi().dataset_info(source.hub, revision=revision, files_metadata=True)
        builder = load_dataset_builder(source.hub, source.hub_config, revision=info.sha)
    except final as error:
        raise UserError(f"{source.name}: the hub has no data set {source.hub} that can be read: {error}") from error
    except ValueError as error:  # no such configuration; the message lists those there are
        raise UserError(f"{source.name}: {error}") from error
    except Exception as error:  # whatever the layers below make of a network that fails
        raise NetworkFailure(f"{type(error).__name__}: {error}") from error
    splits = builder.config.data_files or {}
    if source.split not in splits:
        raise UserError(f"{source.name}: {source.hub} has no split {source.split!r}; it has {', '.join(splits)}.")
    sizes = {f"hf://datasets/{source.hub}@{info.sha}/{f.rfilename}": f.size or 0 for f in info.siblings or []}
    files = [SourceFile(url, sizes[url]) for url in splits[source.split] if SourceFile(url, 0).suffix]
    if not files:
        raise UserError(f"{source.name}: {source.hub} holds no file that can be read ({', '.join(SUFFIXES)}).")
    licence = (info.card_data or {}).get("license") or "not stated"
    return HubSet(files, info.sha or "", ", ".join(licence) if isinstance(licence, list) else str(licence))


class _HubFile(io.RawIOBase):
    """A file of the hub, read by ranges. `failure` is what the network did, whatever becomes of the exception."""

    def __init__(self, file: SourceFile) -> None:
        from huggingface_hub import HfFileSystem

        self.size, self.failure = file.size, None
        self._file: Any = None
        self._file = self._try(lambda: HfFileSystem().open(file.path, "rb", block_size=HUB_BLOCK))

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            self.failure = error
            raise OSError(f"{type(error).__name__}: {error}") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.size - self.tell())
        data = self._try(lambda: self._file.read(wanted)) if wanted > 0 else b""
        if len(data) < wanted:
            self.failure = NetworkFailure(f"{len(data)} bytes came instead of {wanted}")
            raise OSError(str(self.failure))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


class Patience:
    """Back-off: waits 1, 2, 4 … 60 seconds between failures; gives up `minutes` after the last success."""

    def __init__(self, name: str, minutes: float) -> None:
        self.name, self.minutes = name, minutes
        self.success()

    def success(self) -> None:
        self.since, self.wait = time.monotonic(), 1.0

    def failed(self, error: Exception) -> None:
        """Wait after a failure; raises `UserError` where patience is at its end."""
        text = " ".join(str(error).split())[:200]
        if self.wait > 1 and time.monotonic() + self.wait - self.since > 60 * self.minutes:
            raise UserError(
                f"{self.name}: the network failed for {self.minutes:g} minutes: {text}. "
                "What is done is kept: start the same command again to go on."
            ) from error
        log.say(f"{self.name}: the network failed, trying again in {self.wait:.0f}s, Ctrl-C stops: {text}")
        time.sleep(self.wait)
        self.wait = min(60.0, 2 * self.wait)


# --------------------------------------------------------------------------------------------- cleaning


def as_bytes(value: Any) -> bytes | Bad:
    """The UTF-8 bytes of a value that should be text; of `bytes` the reader has made sure."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            return Bad("invalid UTF-8", str(error))
    if value is None:
        return Bad("null")
    return value if isinstance(value, Bad) else Bad("wrong type in column", type(value).__name__)


CONTROL = bytes(byte for byte in range(32) if byte not in b"\t\n\r\f\v\x1b") + b"\x7f"


def unfit(data: bytes, config: DataConfig) -> Bad | None:
    """Why a document is no use for training, None where it is."""
    if len(data) > MAX_BYTES:
        return Bad("too long", f"more than {log.size(MAX_BYTES)}")
    if b"\0" in data:
        return Bad("NUL bytes")
    if len(data.strip()) < 4 * config.min_chars and len(data.decode().strip()) < config.min_chars:
        return Bad("too short")
    head = data[:4096]
    odd = len(head) - len(head.translate(None, CONTROL))
    if not head.isascii():
        odd += 3 * head.count(b"\xef\xbf\xbd")
    if odd > len(head) / 10:
        return Bad("not text", "control characters or U+FFFD")
    if repeated_line_share(data, config.max_repeated_line_share) > config.max_repeated_line_share:
        return Bad("mostly one repeated line")
    return None


def repeated_line_share(data: bytes, matters_above: float = 0.0) -> float:
    """The share of the bytes that the repeated line with most bytes makes up; 0 where it is not above `matters_above`.

    Of a line that stands there m ≥ 2 times, m - 1 are redundant: it has at most twice the bytes of what is redundant.
    """
    lines = data.split(b"\n")
    distinct = set(lines)
    redundant = len(data) - len(lines) + 1 - sum(map(len, distinct))
    if 2 * redundant <= matters_above * len(data):
        return 0.0
    times = Counter(line for line in lines if line)
    return max((len(line) * n for line, n in times.items() if n > 1), default=0) / len(data)


def text_hash(data: bytes) -> int:
    """64 bits of a document's text: equal for duplicates, and below the held-out share for validation."""
    import xxhash

    return xxhash.xxh3_64_intdigest(data)


class Seen:
    """A set of 64-bit hashes in a table with linear probing: at most 12 bytes each, `limit` of them.

    Beyond the limit no more are remembered: `n_forgotten` counts them.
    """

    def __init__(self, limit: int = SEEN_LIMIT) -> None:
        self.limit, self.n, self.n_forgotten = limit, 0, 0
        self._table = array("Q", bytes(8 << 16))

    def __contains__(self, key: int) -> bool:
        return self._table[self._slot(key)] != 0

    def add(self, key: int) -> bool:
        """Remember `key`; True where it was known."""
        slot = self._slot(key)
        if self._table[slot]:
            return True
        if self.n >= self.limit:
            self.n_forgotten += 1
            return False
        self._table[slot] = key or 1
        self.n += 1
        if 4 * self.n > 3 * len(self._table):
            old, self._table = self._table, array("Q", bytes(16 * len(self._table)))
            for known in old:
                if known:
                    self._table[self._slot(known)] = known
        return False

    def _slot(self, key: int) -> int:
        """Where `key` lies, or the empty slot where it would."""
        table, key = self._table, key or 1
        mask = len(table) - 1
        slot = key & mask
        while (found := table[slot]) and found != key:
            slot = (slot + 1) & mask
        return slot


class NearDuplicates:
    """MinHash with locality-sensitive hashing (`datasketch`): a document is near one that shares a band of its sketch.

    Only the 64-bit hash of each band is kept, so memory stays bounded; that two sketches truly agree is not checked.
    """

    PERMUTATIONS = 64
    WORDS = 5  # in a shingle

    def __init__(self, threshold: float) -> None:
        if importlib.util.find_spec("datasketch") is None:
            raise UserError(
                "data.near_duplicates needs the package datasketch: run with `uv run --extra near-duplicates ...`."
            )
        from datasketch import MinHashLSH

        lsh = MinHashLSH(threshold=threshold, num_perm=self.PERMUTATIONS)
        self.bands, self.rows = lsh.b, lsh.r
        self.seen = Seen()

    def add(self, data: bytes) -> bool:
        """Remember a document's bands; True where one was known, and then nothing is remembered."""
        keys = self._keys(data)
        if any(key in self.seen for key in keys):
            return True
        for key in keys:
            self.seen.add(key)
        return False

    def _keys(self, data: bytes) -> list[int]:
        import xxhash
        from datasketch import MinHash

        words = data.lower().split()
        shingles = {b" ".join(words[i : i + self.WORDS]) for i in range(max(1, len(words) - self.WORDS + 1))}
        sketch = MinHash(self.PERMUTATIONS, seed=1, hashfunc=xxhash.xxh32_intdigest)
        sketch.update_batch(sorted(shingles))
        values = sketch.hashvalues[: self.bands * self.rows].reshape(self.bands, self.rows)
        return [xxhash.xxh3_64_intdigest(band.tobytes(), seed=i) for i, band in enumerate(values)]


# ---------------------------------------------------------------------------------------------- sources


class Source:
    """A `TextSource` or `ChatSource` as rows with a place, whatever it comes from.

    origin: what identifies the input, for the settings of a manifest. facts: revision, licence and the like.
    """

    def __init__(self, source: TextSource | ChatSource, retry_minutes: float = 30.0) -> None:
        self.source, self.patience = source, Patience(source.name, retry_minutes)
        self.revision: str | None = None
        self._hub: HubSet | None = None
        self.local = local_files(source.files) if source.files else []

    @property
    def origin(self) -> dict[str, Any]:
        source = self.source
        if source.demo:
            return {"demo": source.demo, "generator": checksum(Path(_demo_world().__file__))[:16]}
        if source.hub:
            return {
                "hub": source.hub,
                "hub_config": source.hub_config,
                "split": source.split,
                "revision_asked": source.revision,
            }
        sizes = sum(file.size for file in self.local)
        listed = fingerprint([(Path(file.path).name, file.size) for file in self.local])
        return {"files": f"{len(self.local)} files, {sizes} bytes", "files_hash": listed}

    def facts(self) -> dict[str, Any]:
        """Revision and licence; asks the hub."""
        if self.source.hub:
            return {"revision": self.hub.revision, "licence": self.hub.licence}
        return {"revision": None, "licence": "made by this program" if self.source.demo else "that of your own files"}

    def describe(self) -> str:
        """What is read, for a person."""
        if self.source.demo:
            return "the built-in demo world"
        if self.source.hub:
            part = f" {self.source.hub_config}" if self.source.hub_config else ""
            return f"{self.source.hub}{part} on the hub, revision {self.hub.revision[:12]}"
        return f"{len(self.local)} files, {log.size(sum(file.size for file in self.local))}"

    @property
    def hub(self) -> HubSet:
        while self._hub is None:
            try:
                self._hub = hub_set(self.source, self.revision or self.source.revision)
            except NetworkFailure as error:
                self.patience.failed(error)
        return self._hub

    @property
    def files(self) -> list[SourceFile]:
        return self.hub.files if self.source.hub else self.local

    def rows(self, cursor: Cursor, pick: Pick) -> Iterator[Rows]:
        """The rows from `cursor` on; the network is given time to recover, and nothing comes twice."""
        if self.source.demo:
            yield from _demo_rows(self.source.demo, cursor)
        elif not self.source.hub:
            yield from read_rows(self.local, cursor, pick)
        else:
            while True:
                try:
                    for rows in read_rows(self.files, cursor, pick):
                        cursor = (rows.file, rows.first + len(rows.items))
                        yield rows
                        self.patience.success()  # only now, after who reads has taken its time
                    return
                except NetworkFailure as error:
                    self.patience.failed(error)


def _demo_world() -> Any:
    import demo_world

    return demo_world


def _demo_rows(part: str, cursor: Cursor) -> Iterator[Rows]:
    world = _demo_world()
    rows = islice(world.text_documents() if part == "text" else world.conversations(part), cursor[1], None)
    first = cursor[1]
    while batch := list(islice(rows, READ_ROWS)):
        yield Rows(0, "demo_world", first, batch)
        first += len(batch)


def whole_rows(kinds: dict[str, Any]) -> None:
    """The `Pick` for conversations: every column, as a dict."""


def column_picker(source: TextSource) -> Pick:
    """What picks the text column of a file from its columns, and says so when it had to guess."""
    said: set[str] = set()

    def pick(kinds: dict[str, Any]) -> str:
        if source.column:
            if source.column not in kinds:
                columns = ", ".join(kinds)
                raise UserError(f"{source.name}: there is no column {source.column!r}; the columns are {columns}.")
            return source.column
        name = next((name for name in TEXT_COLUMNS if name in kinds), None) or only_text_column(kinds)
        if name not in said and len(kinds) > 1:
            said.add(name)
            log.say(f"{source.name}: text is taken from the column {name!r}")
        return name

    def only_text_column(kinds: dict[str, Any]) -> str:
        textual = [n for n, kind in kinds.items() if kind is str or (not isinstance(kind, type) and _is_text(kind))]
        if len(textual) != 1:
            raise UserError(
                f"{source.name}: cannot tell which column holds the text; the columns are {', '.join(kinds)}. "
                "Name it with --data.text_column, or as the `column` of its source in config.py."
            )
        return textual[0]

    return pick


def text_documents(source: TextSource) -> Iterator[str]:
    """Every document of `source` that is text, uncleaned, in order."""
    for rows in Source(source).rows(START, column_picker(source)):
        for item in rows.items:
            data = as_bytes(item)
            if isinstance(data, bytes):
                yield data.decode()


def ahead(batches: Iterator[Rows], n: int = BATCHES_AHEAD) -> Iterator[Rows]:
    """The same batches, up to `n` of them made in a thread before they are asked for."""
    ready: queue.Queue[Any] = queue.Queue(n)
    stop = threading.Event()

    def put(item: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                break

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    break
            put(None)
        except BaseException as error:
            put(error)
        finally:
            batches.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


# ---------------------------------------------------------------------------------------- text folders


@dataclass(frozen=True)
class Document:
    """What is written: `row` as the shard holds it, its size, and the hash that decides its split."""

    row: Any
    n_bytes: int
    key: int
    text: bytes


Judge = Callable[[Any], Document | Bad]


def text_judge(config: DataConfig) -> Judge:
    """What makes a document of a value, or says why it is none."""

    def judge(item: Any) -> Document | Bad:
        data = as_bytes(item)
        if isinstance(data, Bad):
            return data
        return unfit(data, config) or Document(data, len(data), text_hash(data), data)

    return judge


def chat_judge(source: ChatSource) -> Judge:
    """What makes a conversation of a row, or says why it is none."""

    def judge(item: Any) -> Document | Bad:
        messages = item if isinstance(item, Bad) else conversation(item, source.max_chars)
        if isinstance(messages, Bad):
            return messages
        try:
            text = json.dumps(messages, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return Bad("invalid UTF-8", str(error))
        return Document(messages, len(text), text_hash(text), text)

    return judge


def write_text_shards(
    source: TextSource, folder: Path, config: DataConfig, before: Sequence[Path] = (), *, verify: bool = False
) -> dict[str, Any]:
    """Bring the text shards of one corpus into `folder`, go on with them, or mend them; returns the manifest.

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
        "duplicates_of": [path.name for path in before] if config.deduplicate or config.near_duplicates else [],
    }
    return Ingest(
        opened,
        ShardFolder(folder, "text", settings, verify=verify),
        column_picker(source),
        text_judge(config),
        share=config.validation_share,
        unit_bytes=config.shard_mb * 10**6,
        max_bytes=source.max_bytes,
        deduplicate=config.deduplicate,
        near_duplicates=config.near_duplicates,
        before=before,
    ).run()


def write_chat_shards(
    source: ChatSource, folder: Path, validation_share: float, *, retry_minutes: float = 30.0, verify: bool = False
) -> dict[str, Any]:
    """Bring one set of conversations into `folder`, go on with it, or mend it; returns the manifest."""
    opened = Source(source, retry_minutes)
    settings = {
        **opened.origin,
        "max_rows": source.max_rows,
        "max_chars": source.max_chars,
        "validation_share": validation_share,
    }
    return Ingest(
        opened,
        ShardFolder(folder, "chat", settings, verify=verify),
        whole_rows,
        chat_judge(source),
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
    """Read the first `PROBE_BYTES` of text of a source, and extend that to the whole of it or to its budget."""
    chat = isinstance(source, ChatSource)
    judge, pick = (chat_judge(source), whole_rows) if chat else (text_judge(config), column_picker(source))
    n_bytes = n_documents = 0
    share, started = 1.0, time.monotonic()
    for rows in Source(source, min(PROBE_MINUTES, config.retry_minutes)).rows(START, pick):
        kept = [document for document in map(judge, rows.items) if not isinstance(document, Bad)]
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
    """Read a source to its end into units of `unit_bytes`, each committed with its place in the source.

    share: of the documents held out. max_bytes, max_rows: stop there. before: folders whose documents are duplicates.
    """

    def __init__(
        self,
        source: Source,
        target: ShardFolder,
        pick: Pick,
        judge: Judge,
        *,
        share: float,
        unit_bytes: int,
        max_bytes: int | None = None,
        max_rows: int | None = None,
        deduplicate: bool = False,
        near_duplicates: float | None = None,
        before: Sequence[Path] = (),
    ) -> None:
        self.source, self.target, self.pick, self.judge = source, target, pick, judge
        self.share, self.unit_bytes, self.max_bytes, self.max_rows = share, unit_bytes, max_bytes, max_rows
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
        """Stick to the commit that the folder was begun with; write down the newest where it is new."""
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
            log.say(f"{self.name}: going on after {self.n_documents} documents, {log.size(self.n_bytes)} of text")
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
        writer.add("validation" if document.key < self.threshold else "train", document.row, document.n_bytes)
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
        with contextlib.closing(documents), contextlib.closing(writer), log.progress(None, "B", self.name) as self.bar:
            for document in islice(documents, n_wanted):
                self._write(writer, document)
            self.target.replace(unit, writer.finish_unit())

    # ---------------------------------------------------------------------------------- documents

    def _documents(self, cursor: Cursor) -> Iterator[Document]:
        """Documents that are kept, from `cursor` on; `self.place` is the cursor behind the row looked at last."""
        self.place = cursor
        with contextlib.closing(ahead(self.source.rows(cursor, self.pick))) as batches:
            for rows in batches:
                if rows.share and self.max_bytes is None:
                    self.bar.total = round(self.n_bytes / rows.share)
                for i, item in enumerate(rows.items):
                    document = self.judge(item)
                    self.place = (rows.file, rows.first + i + 1)
                    if not isinstance(document, Bad):
                        document = self._known(document) or document
                    if isinstance(document, Bad):
                        self.tally.drop(rows, i, document, item)
                    else:
                        yield document

    def _known(self, document: Document) -> Bad | None:
        if self.deduplicate and document.key in self.seen:
            return Bad("duplicate")
        if self.near is not None and self.near.add(document.text):
            return Bad("near-duplicate")
        if self.deduplicate:
            self.seen.add(document.key)
        return None

    def _recall(self, n_units: int) -> None:
        """Know the documents of the folders before this one, and of this one's first `n_units` units."""
        import pyarrow as pa

        self.threshold = max(self.share * 2**64, self.target.manifest.get("hold_out_below", 0))
        self.seen = Seen()
        self.near = NearDuplicates(self.near_duplicates) if self.near_duplicates else None
        if not self.deduplicate and self.near is None:
            return
        for folder, n in [*((folder, None) for folder in self.before), (self.target.folder, n_units)]:
            for batch in unit_batches(folder, n):
                for data in batch.column(0).cast(pa.large_binary()).to_pylist():
                    self.seen.add(text_hash(data))
                    if self.near is not None:
                        self.near.add(data)

    # ------------------------------------------------------------------------------------- the end

    def _finish(self) -> None:
        """Write the manifest; a corpus of which nothing was held out is made again, with its lowest hash held out."""
        target, units = self.target, self.target.units
        dropped: Counter[str] = Counter()
        lengths: Counter[str] = Counter()
        for unit in units:
            dropped.update(unit["dropped"])
            lengths.update(unit["lengths"])
        if self.n_documents < 2:
            raise self._too_little(dropped)
        if not target.totals("validation")["documents"]:
            target.start_again(hold_out_below=min(unit["lowest"] for unit in units) + 1)
            return
        facts = {"dropped": dict(dropped.most_common())}
        facts["lengths"] = {bits: lengths[bits] for bits in sorted(lengths, key=int)}
        if self.deduplicate and self.seen.n_forgotten:
            facts["not_remembered"] = self.seen.n_forgotten
        facts["samples"] = sorted(sample for unit in units for sample in unit["samples"])[:SAMPLES]
        examples = first_of_each((e for unit in units for e in unit["examples"]), "reason", EXAMPLES)
        for unit in units:
            for name in ("examples", "samples", "lengths", "lowest"):
                del unit[name]
        lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        write_text(target.folder / "dropped.jsonl", lines)
        manifest = {**target.manifest, **facts, "splits": {split: target.totals(split) for split in SPLITS}}
        write_text(target.folder / "README.md", data_sheet(manifest))
        target.finish(**facts)

    def _too_little(self, dropped: Counter[str]) -> UserError:
        examples = [example for unit in self.target.units for example in unit["examples"]]
        self.target.start_again()
        reasons = ", ".join(f"{n} × {reason}" for reason, n in dropped.most_common()) or "nothing"
        shown = "".join(f"\n  {e['file']}, row {e['row']}: {e['reason']} {e['detail']}" for e in examples[:3])
        have = "a single document that can" if self.n_documents else "nothing that can"
        return UserError(
            f"{self.name} holds {have} be used, and two are needed (one is held out). Dropped: {reasons}.{shown}"
        )


class Tally:
    """The rows of one unit: reasons and examples of what was dropped, lengths and samples of what was kept."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []
        self.lengths: Counter[str] = Counter()
        self.samples: list[list[Any]] = []  # rank and beginning
        self.lowest = 2**64

    def drop(self, rows: Rows, i: int, bad: Bad, item: Any) -> None:
        self.dropped[bad.reason] += 1
        if self.dropped[bad.reason] <= EXAMPLES:
            begin = item.decode(errors="replace") if isinstance(item, bytes) else str(item)
            facts = {"reason": bad.reason, "file": rows.name, "row": rows.first + i, "detail": bad.detail[:200]}
            text = "" if isinstance(item, Bad) else begin[:200].encode(errors="replace").decode()
            self.examples.append(facts | {"text": text})

    def keep(self, document: Document) -> None:
        self.lengths[str(document.n_bytes.bit_length())] += 1
        self.lowest = min(self.lowest, document.key)
        rank = document.key * 0x9E3779B97F4A7C15 % 2**64  # another order than that which decides the split
        if len(self.samples) < SAMPLES or rank < self.samples[-1][0]:
            begin = document.text[:600].decode(errors="ignore")
            self.samples = sorted([*self.samples, [rank, begin]])[:SAMPLES]

    def facts(self) -> dict[str, Any]:
        return {
            "dropped": dict(self.dropped),
            "examples": self.examples,
            "lengths": dict(self.lengths),
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


# ---------------------------------------------------------------------------------------- conversations


def conversations(source: ChatSource) -> Iterator[list[Message]]:
    """Every conversation of `source` that can be used, in order."""
    for rows in Source(source).rows(START, whole_rows):
        for item in rows.items:
            messages = item if isinstance(item, Bad) else conversation(item, source.max_chars)
            if not isinstance(messages, Bad):
                yield messages


def read_conversations(folder: Path, split: str, command: str = "uv run create_shard.py") -> Iterator[list[Message]]:
    """The conversations of a finished folder, in order."""
    for batch in read_text_batches(folder, split, command):
        yield from batch.column(0).to_pylist()


def conversation(row: dict[str, Any], max_chars: int | None = None) -> list[Message] | Bad:
    """One row in any of the usual layouts, recognised by its columns, as messages.

    max_chars: longest reasoning taken where a row offers several; None takes the first that is right.
    """
    if not isinstance(row, dict):
        return Bad("unknown layout", "a text without ### Human: and ### Assistant:")
    for columns, convert in LAYOUTS:
        if all(row.get(name) is not None for name in columns):
            try:
                messages = convert(row, max_chars) if convert is _problem else convert(row)
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


def _problem(row: dict[str, Any], max_chars: int | None) -> list[Message] | Bad:
    """Mathematics: the first verified generation that is short enough, else the worked solution and the answer."""
    verified = row.get("correctness_math_verify") or []
    for text, right in zip(row.get("generations") or [], verified, strict=False):
        match = THOUGHT.match(text or "")
        if right and match and match[2].strip() and len(text) <= (max_chars or len(text)):
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
LAYOUTS: tuple[tuple[tuple[str, ...], Callable[..., list[Message] | Bad]], ...] = (
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

"""Files of every format as rows, each with its place and the document it belongs to.

In: names, folders and globs, or addresses on the hub. Out: `Rows`; what cannot be read is a
`Rejected` row in its place. Knows nothing of cleaning and of shards.
"""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from config import UserError
from hearth.data.cleaning import Rejected
from hearth.data.hub import HubFile, NetworkFailure
from hearth.run import LOCK, SETTINGS
from hearth.storage import checksum

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".json", ".csv", ".txt", ".md")
# a .txt or .md file of more bytes is one document, cut at blank lines into rows of about this size
PIECE_CHARS = 16_384
READ_ROWS = 256  # rows read at once,
READ_BYTES = 4 << 20  # or about this many bytes of text
JSON_CHARS = 1 << 20  # of a .json file read at once, more where one object is longer
CUT_CHARS = 16  # so near the end of a text, a number or an error of JSON may be due to its cut
MAX_FIELD = 2**31 - 1  # characters of a field of CSV: the largest long of C on Windows
BEYOND = "beyond the header"  # the key of the fields of CSV that have no column

# columns with their types → the column to read, None for all as a dict
Pick = Callable[[dict[str, Any]], str | None]
Cursor = tuple[int, int]  # file and row to read next
START: Cursor = (0, 0)
# what is said of a file's encoding, by its name in Python
ENCODINGS = {"utf-8-sig": "", "utf-16": "UTF-16", "cp1252": "read as Latin-1, for it is not UTF-8"}


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one file: dicts, or the values of one column; `first` is the row number
    of the first.

    document: 64 bits of the hash of the file where its rows are pieces of one document, None where
    each row is a document.
    """

    file: int
    name: str
    first: int
    items: list[Any]
    share: float = 0.0  # of the whole source that was read up to here, by size
    document: int | None = None
    read_as: str = ""  # what of the file was read: its column, its encoding where that is not UTF-8


# -------------------------------------------------------------------------------------------- files


@dataclass
class SourceFile:
    """A file to read, here or on the hub (hf://…)."""

    path: str
    size: int
    content: str = ""  # hash of its bytes as hex, where it is known already
    read_as: str = field(default="", compare=False)
    share: float = field(default=0.0, compare=False)  # of it that was read
    raw: Any = field(default=None, compare=False)  # its bytes as they lie there, while it is open

    @property
    def suffix(self) -> str:
        found = [suffix for suffix in SUFFIXES if self.path.lower().endswith(suffix)]
        return max(found, key=len, default="")

    @property
    def document(self) -> int | None:
        """What `Rows.document` is for this file; reads a local file once, unless its `content` is
        known.
        """
        if self.suffix not in PLAIN or self.size <= PIECE_CHARS:
            return None
        self.content = self.content or checksum(Path(self.path))
        return int(self.content[:16], 16)

    def open(self) -> BinaryIO:
        """The bytes of the file, decompressed."""
        self.raw = (
            HubFile(self.path, self.size)
            if self.path.startswith("hf://")
            else Path(self.path).open("rb")  # noqa: SIM115
        )
        codec = COMPRESSED.get(Path(self.path).suffix.lower())
        if codec is None:
            return self.raw
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(self.raw, "r"), codec))

    def close(self) -> None:
        if self.raw is not None:
            self.raw.close()

    def measure(self) -> float:
        """The share of the file that was read, by bytes, where the reader did not say
        it by rows.
        """
        if self.share or self.raw is None:
            return self.share
        return 1.0 if self.raw.closed else min(1.0, self.raw.tell() / self.size)

    def network_failure(self) -> Exception | None:
        return getattr(self.raw, "failure", None)


def local_files(patterns: Iterable[str], skipped: list[Path] | None = None) -> list[SourceFile]:
    """The files that names, folders and globs stand for, each once, folders in alphabetical order.

    skipped: gets what folders hold besides, of a format that cannot be read; hidden files are left
    out, and folders of runs, which hold settings, logs and test sets.

    Raises `UserError` where a pattern finds nothing, or names a file of such a format.
    """
    found: dict[str, SourceFile] = {}
    for pattern in patterns:
        for path in _paths(pattern, [] if skipped is None else skipped):
            try:
                file = SourceFile(str(path), path.stat().st_size)
                path.open("rb").close()
            except OSError as error:
                raise UserError(f"Cannot read {path}: {error.strerror}.") from error
            if not file.suffix:
                raise UserError(
                    f"{path} has a format that cannot be read: give {', '.join(SUFFIXES)}."
                )
            found.setdefault(str(path.resolve()), file)
    return list(found.values())


def _paths(pattern: str, skipped: list[Path]) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _is_hidden(p, path)]
        runs = {p.parent for p in files if p.name == LOCK and p.with_name(SETTINGS).is_file()}
        ours = runs | {run.parent / "tasks" for run in runs}  # test sets
        inside = [p for p in files if ours.isdisjoint(p.parents)]
        usable = [p for p in inside if SourceFile(str(p), 0).suffix]
        if not usable:
            formats = ", ".join(SUFFIXES)
            raise UserError(
                f"{path} holds no file that can be read ({formats}); it holds {listing(inside)}."
            )
        skipped += [p for p in inside if p not in usable]
        return usable
    if path.is_file():
        return [path]
    usable = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    if not usable:
        around = path.parent if path.parent.is_dir() else Path()
        raise UserError(
            f"There is no file {pattern}; {around.absolute()} holds {listing(around.iterdir())}."
        )
    return usable


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def listing(paths: Iterable[Path]) -> str:
    """The names of the first few of `paths`, and how many more there are."""
    names = sorted(path.name for path in paths)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) + more) or "nothing"


# ------------------------------------------------------------------------------------------ readers


def read_rows(files: list[SourceFile], cursor: Cursor, pick: Pick) -> Iterator[Rows]:
    """The rows of `files` from `cursor` on; what cannot be read comes as a `Rejected` item in its
    place, the rest is kept.

    Raises `NetworkFailure` where a file of the hub breaks off.
    """
    total = sum(file.size for file in files) or 1
    before = sum(file.size for file in files[: cursor[0]])
    for number in range(cursor[0], len(files)):
        file = files[number]
        row = cursor[1] if number == cursor[0] else 0
        file.share, file.read_as = 0.0, ""
        try:
            document = file.document
            for items in READERS[file.suffix](file, row, pick) if file.size else ():
                share = (before + file.size * file.measure()) / total
                yield Rows(number, file.path, row, items, share, document, file.read_as)
                row += len(items)
            if row == 0:
                yield Rows(number, file.path, 0, [Rejected("empty file")])
        except (OSError, ValueError, *_format_errors()) as error:
            if file.network_failure():
                raise NetworkFailure(str(file.network_failure())) from error
            yield Rows(
                number,
                file.path,
                row,
                [Rejected("unreadable file", f"{type(error).__name__}: {error}")],
            )
        finally:
            file.close()
        before += file.size


def _format_errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return pa.ArrowException, csv.Error


def _parquet(file: SourceFile, row: int, pick: Pick) -> Iterator[list[Any]]:
    """Row groups one after another; in a damaged one the rows from the damage on are lost, and
    counted.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file.open(), buffer_size=1 << 20, pre_buffer=False) as table:
        name = _pick(file, pick, {f.name: f.type for f in table.schema_arrow})
        n_rows = max(1, table.metadata.num_rows)
        start = 0
        for group in range(table.num_row_groups):
            facts = table.metadata.row_group(group)
            stop = start + facts.num_rows
            at_once = max(
                1, min(READ_ROWS, READ_BYTES * facts.num_rows // max(1, facts.total_byte_size))
            )
            at = start
            try:
                batches = table.iter_batches(
                    at_once, row_groups=[group], columns=[name] if name else None
                )
                for batch in batches if row < stop else ():
                    if row < at + batch.num_rows:
                        file.share = (at + batch.num_rows) / n_rows
                        yield _values(batch.slice(max(0, row - at)), name)
                    at += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                if file.network_failure():
                    raise
                lost = Rejected("unreadable rows", f"row group {group}: {error}")
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
    if not is_text(column.type):
        return [Rejected("wrong type in column", f"{name} is {column.type}")] * batch.num_rows
    values = column.cast(pa.large_binary())
    try:
        values.view(pa.large_string()).validate(full=True)
    except pa.ArrowInvalid:
        return [value if value is None else _utf8(value) for value in values.to_pylist()]
    return values.to_pylist()


def _utf8(data: bytes) -> bytes | Rejected:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return Rejected("invalid UTF-8", str(error))
    return data


def _row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Rejected("invalid UTF-8", str(error))


def is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        getattr(types, f"is_{name}")(kind)
        for name in ("string", "large_string", "binary", "large_binary")
    )


def _jsonl(file: SourceFile, row: int, pick: Pick) -> Iterator[list[Any]]:
    lines = file.open()
    if not isinstance(lines, io.BufferedIOBase):
        lines = io.BufferedReader(lines, 1 << 20)  # type: ignore[arg-type]
    with lines:
        yield from _picked(file, lines, row, pick, _parsed)


def _parsed(line: bytes) -> Any:
    if not line.strip():
        return Rejected("empty line")
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return Rejected("invalid UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return Rejected("not JSON", str(error))


def _json(file: SourceFile, row: int, pick: Pick) -> Iterator[list[Any]]:
    yield from _picked(file, _json_items(file), row, pick)


def _json_items(file: SourceFile) -> Iterator[Any]:
    """The objects of a JSON array, or of JSON values one after another, without holding the whole
    file. One that is broken is a `Rejected`; behind it the next line that begins an object is read.
    """
    decoder = json.JSONDecoder()
    with io.TextIOWrapper(file.open(), encoding="utf-8-sig", errors="surrogateescape") as stream:
        text, row = _Window(stream), 0
        while text.skip_separators():
            try:
                value, stop = decoder.raw_decode(text.text, text.at)
                is_cut = stop > len(text.text) - CUT_CHARS  # of a number
            except (ValueError, RecursionError) as error:
                value, stop = Rejected("not JSON", getattr(error, "msg", str(error))), None
                is_cut = _may_be_cut(error, len(text.text))
            if is_cut and not text.ended:
                text.read_more()
                continue
            if stop is not None:
                text.at = stop
            elif not text.go_to_next_object():
                value = Rejected("unreadable rest of file", f"from row {row} on: {value.detail}")
            yield value
            row += 1


def _may_be_cut(error: Exception, n_chars: int) -> bool:
    """Whether an error of JSON may be gone once more than `n_chars` characters are read."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > n_chars - CUT_CHARS


class _Window:
    """A part of a text that is read block by block; what lies before `at` is forgotten."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.stream, self.text, self.at, self.ended = stream, "", 0, False
        self._first_column = 0  # in its line, of the first character of `text`

    def read_more(self) -> None:
        """At least as much again as is not used yet."""
        more = self.stream.read(max(JSON_CHARS, len(self.text) - self.at))
        self._first_column = self._column()
        self.text, self.at, self.ended = self.text[self.at :] + more, 0, not more

    def _column(self) -> int:
        newline = self.text.rfind("\n", 0, self.at)
        return self.at - newline - 1 if newline >= 0 else self._first_column + self.at

    def skip_separators(self) -> bool:
        """Past what stands between the objects of an array; False at the end of the text."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n,[]":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.at < len(self.text)
            self.read_more()

    def go_to_next_object(self) -> bool:
        """To the next line that begins an object; False where there is none. A line that is
        indented more than the broken object at `at` begins a part of that.
        """
        column = min(self._column(), JSON_CHARS)
        indent = f"0,{column}" if self.text[self.at] == "{" else "0,"
        line = re.compile(rf"\n[ \t]{{{indent}}}(?=\{{)")
        self.at += 1
        while not (found := line.search(self.text, self.at)):
            newline = self.text.rfind("\n", self.at)
            self.at = len(self.text) if newline < 0 or self.ended else newline
            if self.ended:
                return False
            self.read_more()
        self.at = found.end()
        return True


def _csv(file: SourceFile, row: int, pick: Pick) -> Iterator[list[Any]]:
    """Rows by the columns of the first line, which also tells what separates two fields."""
    csv.field_size_limit(MAX_FIELD)
    with _text(file, newline="") as stream:
        header = next((line for line in stream if line.strip()), "")
        lines = chain([header], stream)
        rows = csv.DictReader(lines, restkey=BEYOND, delimiter=_separator(header))
        yield from _picked(file, rows, row, pick, _within_header)


def _separator(header: str) -> str:
    """The one of comma, semicolon and tab that makes most columns."""
    return max(",;\t", key=lambda separator: len(next(csv.reader([header], delimiter=separator))))


def _within_header(row: dict[str, Any]) -> dict[str, Any] | Rejected:
    beyond = row.pop(BEYOND, [])
    if any(beyond):
        return Rejected("more fields than the header", f"{len(beyond)} more: {', '.join(beyond)}")
    return row


def _plain(file: SourceFile, row: int, pick: Pick) -> Iterator[list[Any]]:
    pick({"text": str})
    for piece in islice(_pieces(file), row, None):
        yield [piece]


def _text(file: SourceFile, newline: str | None = None) -> io.TextIOWrapper:
    """A text file, decoded by what it begins with and holds; what it cannot be is left as
    surrogates.
    """
    stream = file.open()
    if file.path.startswith("hf://"):  # to read it twice would take twice as long
        stream = io.BufferedReader(stream, 1 << 20)  # type: ignore[type-var]
        encoding = encoding_of([stream.peek()])
    else:
        encoding = encoding_of(iter(lambda: stream.read(1 << 20), b""))
        stream.seek(0)
    file.read_as = ENCODINGS[encoding]
    return io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline=newline)


def encoding_of(blocks: Iterable[bytes]) -> str:
    """The encoding of a text: UTF-16 by its mark, else UTF-8, or Latin-1 as Windows extends it.

    Latin-1 where more of what is not ASCII is no UTF-8 than is: in a UTF-8 text that was damaged a
    few bytes are wrong, in Latin-1 nearly every accented letter. The five bytes that Windows leaves
    undefined stay undecodable, so what is not text at all is not taken for text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    good = bad = 0
    for number, block in enumerate(blocks):
        if number == 0 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        if not block.isascii():
            text = decoder.decode(block)
            whole = text.encode("utf-8", "ignore").decode()  # without what is no UTF-8
            bad += len(text) - len(whole)
            good += len(whole) - len(whole.encode("ascii", "ignore"))
    return "cp1252" if bad > good else "utf-8-sig"


def _pieces(file: SourceFile) -> Iterator[str]:
    """A text file as documents: cut at the first blank line after `PIECE_CHARS`, or at a line end
    without one.
    """
    with _text(file) as stream:
        kind = "text" if file.document is None else "text in pieces"
        file.read_as = f"{kind}, {file.read_as}" if file.read_as else kind
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


PLAIN = (".txt", ".md")
READERS: dict[str, Callable[[SourceFile, int, Pick], Iterator[list[Any]]]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".jsonl.zst": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".csv": _csv,
    **dict.fromkeys(PLAIN, _plain),
}


def _pick(file: SourceFile, pick: Pick, kinds: dict[str, Any]) -> str | None:
    try:
        name = pick(kinds)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    if name is not None:
        column = f"column {name!r}"
        file.read_as = f"{column}, {file.read_as}" if file.read_as else column
    return name


def _picked(
    file: SourceFile,
    items: Iterable[Any],
    row: int,
    pick: Pick,
    parse: Callable[[Any], Any] = lambda item: item,
) -> Iterator[list[Any]]:
    """Batches of dict rows from `row` on, or of the one column that `pick` names when it sees the
    first dict of the file, so that reading from any place on takes the same.

    parse: makes rows of items; those before `row` that need not be seen are left as they are.
    """
    name, asked, batch, n_chars = None, False, [], 0
    try:
        for number, raw in enumerate(items):
            if asked and number < row:
                continue
            item = parse(raw)
            if not asked and isinstance(item, dict):
                kinds = {key: type(value) for key, value in item.items()}
                name, asked = _pick(file, pick, kinds), True
            if number < row:
                continue
            value = _value(item, name)
            batch.append(value)
            n_chars += len(value) if isinstance(value, str) else 1000
            if len(batch) >= READ_ROWS or n_chars >= READ_BYTES:
                yield batch
                batch, n_chars = [], 0
    except Exception:  # what was read before the file broke off is whole
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _value(item: Any, name: str | None) -> Any:
    if isinstance(item, Rejected):
        return item
    if not isinstance(item, dict):
        return Rejected("not an object with columns", str(item)[:60])
    if name is None:
        return item
    return item[name] if name in item else Rejected("column is missing", name)

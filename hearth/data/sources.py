"""Where text and conversations come from: the hub, local files, the demo world, made problems.

In: a `TextSource` or `ChatSource` of the config. Out: rows with a place, documents, conversations.
Knows nothing of formats, of cleaning and of shards.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from config import FINE_TUNING, ChatSource, Config, TextSource, UserError
from hearth import log
from hearth.data import problems
from hearth.data.cleaning import Rejected, as_bytes
from hearth.data.hub import HubSet, NetworkFailure, RetryPolicy, hub_set
from hearth.data.layouts import Message, conversation
from hearth.data.readers import (
    READ_ROWS,
    START,
    SUFFIXES,
    Cursor,
    Pick,
    Rows,
    SourceFile,
    is_text,
    listing,
    local_files,
    read_rows,
)
from hearth.data.shard_folder import fingerprint
from hearth.data.text_shards import read_text_batches, unpacked
from hearth.storage import checksum, read_json, write_json

# guessed in this order
TEXT_COLUMNS = ("text", "content", "document", "body", "article", "raw_content", "markdown")
HASHES = "hashes.json"  # of a folder of text shards: the hash of each input file, and its state
MAX_HASHES_BYTES = 64 << 20
SHA256 = "[0-9a-f]{64}"
BATCHES_AHEAD = 2  # batches of rows read before they are needed
PATIENCE = 1.0  # seconds that the reader is given to end when nobody reads on


class Source:
    """A `TextSource` or `ChatSource` as rows with a place, whatever it comes from.

    facts: revision, licence and the like. skipped: files of a kind that cannot be read, beside
    those that are.
    """

    def __init__(self, source: TextSource | ChatSource, retry_minutes: float = 30.0) -> None:
        self.source, self.retry_policy = source, RetryPolicy(source.name, retry_minutes)
        self.revision: str | None = None
        self._hub: HubSet | None = None
        self.skipped: list[Path] = []
        self.local = local_files(source.files, self.skipped) if source.files else []

    def origin(self, folder: Path) -> dict[str, Any]:
        """What identifies the input, for the manifest of the shards in `folder`: see `identity`."""
        source = self.source
        if source.demo:
            makers = [checksum(Path(module.__file__)) for module in (_demo_world(), problems)]
            return {"demo": source.demo, "generator": fingerprint(makers)}
        if source.made:
            persona = {"persona": list(source.persona)} if source.persona else {}
            maker = checksum(Path(problems.__file__))[:16]
            return {"made": source.made, "generator": maker, **persona}
        if source.hub:
            return {
                "hub": source.hub,
                "hub_config": source.hub_config,
                "split": source.split,
                "revision_asked": source.revision,
            }
        remember_contents(self.local, folder, source.name)
        sizes = sum(file.size for file in self.local)
        content = fingerprint([(file.suffix, file.content) for file in self.local])
        return {"files": f"{len(self.local)} files, {sizes} bytes", "content of the files": content}

    def facts(self) -> dict[str, Any]:
        """Revision and licence; asks the hub."""
        if self.source.hub:
            return {"revision": self.hub.revision, "licence": self.hub.licence}
        return {
            "revision": None,
            "licence": "that of your own files" if self.source.files else "made by this program",
        }

    def describe(self) -> str:
        """What is read, for a person."""
        if self.source.demo:
            return "the built-in demo world"
        if self.source.made:
            return f"problems of the kind {self.source.made}, made by this program"
        if self.source.hub:
            part = f" {self.source.hub_config}" if self.source.hub_config else ""
            return f"{self.source.hub}{part} on the hub, revision {self.hub.revision[:12]}"
        skipped = f"; skipped, not of a kind that can be read: {listing(self.skipped)}"
        sizes = log.size(sum(file.size for file in self.local))
        return f"{len(self.local)} files, {sizes}{skipped if self.skipped else ''}"

    @property
    def hub(self) -> HubSet:
        while self._hub is None:
            try:
                self._hub = hub_set(self.source, self.revision or self.source.revision)
            except NetworkFailure as error:
                self.retry_policy.failed(error)
        return self._hub

    @property
    def files(self) -> list[SourceFile]:
        if not self.source.hub:
            return self.local
        found = [SourceFile(address, *facts) for address, facts in self.hub.files.items()]
        if not (usable := [file for file in found if file.suffix]):
            name, formats = self.source.name, ", ".join(SUFFIXES)
            raise UserError(
                f"{name}: {self.source.hub} holds no file that can be read ({formats})."
            )
        return usable

    def rows(self, cursor: Cursor, pick: Pick) -> Iterator[Rows]:
        """The rows from `cursor` on; the network is given time to recover, and nothing
        comes twice.
        """
        if self.source.demo:
            world, part = _demo_world(), self.source.demo
            rows = world.text_documents() if part == "text" else world.conversations(part)
            yield from _made_rows("demo_world", rows, cursor)
        elif self.source.made:
            source = self.source
            rows = problems.conversations(source.made, source.max_rows, source.persona)
            yield from _made_rows(source.made, rows, cursor)
        elif not self.source.hub:
            yield from read_rows(self.local, cursor, pick)
        else:
            while True:
                try:
                    for rows in read_rows(self.files, cursor, pick):
                        cursor = (rows.file, rows.first + len(rows.items))
                        yield rows
                        self.retry_policy.success()  # only now, after who reads has taken its time
                    return
                except NetworkFailure as error:
                    self.retry_policy.failed(error)


def identity(source: TextSource | ChatSource, folder: Path) -> dict[str, Any]:
    """What `source` is now, as JSON; equal to the "source" of the manifest in `folder` (the
    source's text shards) while nothing of it has changed.

    Of local files only content, kind and order count: a file that was moved or renamed in its place
    is the same, one that was edited at the same size is another. Of the hub it is what was asked
    for, of the demo world the program that makes it. Asks no network; raises `UserError` where a
    file is missing. `folder` need not exist; where it does, hashes are remembered there.
    """
    return Source(source).origin(folder)


def require_files(config: Config) -> None:
    """Raises UserError where a file of yours is missing, before `--redo` removes anything."""
    for source in config.data.corpora():
        Source(source)
    for stage in FINE_TUNING:
        if sets := config.sets(stage):
            for source in (*sets, *getattr(config, stage).test_sets()):
                Source(source)


def remember_contents(files: list[SourceFile], folder: Path, name: str) -> None:
    """Set `content` of local files: their SHA-256, computed again only of a file whose size or
    times differ from those in `HASHES` of `folder`.
    """
    path = folder / HASHES
    try:
        known = read_json(path, max_bytes=MAX_HASHES_BYTES) if path.is_file() else {}
    except UserError:  # all it saves is time
        known = {}
    now: dict[str, list[Any]] = {}
    with log.progress(sum(file.size for file in files), "B", f"{name}: checking files") as bar:
        for file in files:
            here = Path(file.path).absolute()
            facts = here.stat()
            # the time of the last change of any kind, for who sets the time of modification
            state = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
            old = known.get(str(here))
            same = isinstance(old, list) and old[:-1] == state
            file.content = str(old[-1]) if same else ""
            if not re.fullmatch(SHA256, file.content):
                file.content = checksum(here)
            now[str(here)] = [*state, file.content]
            bar.update(file.size)
    if known | now != known and folder.is_dir():  # others of this folder were read beside these
        write_json(path, known | now)


def _demo_world() -> Any:
    from hearth.data import demo_world

    return demo_world


def _made_rows(name: str, made: Iterator[Any], cursor: Cursor) -> Iterator[Rows]:
    first = cursor[1]
    rows = islice(made, first, None)
    while batch := list(islice(rows, READ_ROWS)):
        yield Rows(0, name, first, batch)
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
                raise UserError(
                    f"{source.name}: there is no column {source.column!r}; the columns are "
                    f"{columns}."
                )
            return source.column
        name = next((name for name in TEXT_COLUMNS if name in kinds), None) or only_text_column(
            kinds
        )
        if name not in said and len(kinds) > 1:
            said.add(name)
            log.say(f"{source.name}: text is taken from the column {name!r}")
        return name

    def only_text_column(kinds: dict[str, Any]) -> str:
        textual = [
            n
            for n, kind in kinds.items()
            if kind is str or (not isinstance(kind, type) and is_text(kind))
        ]
        if len(textual) != 1:
            raise UserError(
                f"{source.name}: cannot tell which column holds the text; the columns are "
                f"{', '.join(kinds)}. "
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
        thread.join(PATIENCE)  # it may be waiting for the network


def as_conversation(item: Any, source: ChatSource) -> list[Message] | Rejected:
    """A row of `source` as messages."""
    if isinstance(item, Rejected):
        return item
    return conversation(item, source.max_chars, calls=source.calls)


def conversations(source: ChatSource) -> Iterator[list[Message]]:
    """Every conversation of `source` that can be used, in order."""
    for rows in Source(source).rows(START, whole_rows):
        for item in rows.items:
            messages = as_conversation(item, source)
            if not isinstance(messages, Rejected):
                yield messages


def read_conversations(
    folder: Path, split: str, command: str = "uv run create_shard.py"
) -> Iterator[list[Message]]:
    """The conversations of a finished folder, in order."""
    for batch in read_text_batches(folder, split, command):
        yield from map(unpacked, batch.column(0).to_pylist())

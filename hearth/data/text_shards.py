"""Text shards: documents and conversations as Arrow files, and the data sheet of their folder.

In: documents one at a time, or a folder. Out: the files of a unit with their facts, or record
batches. Knows nothing of where text comes from.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hearth import log
from hearth.data.shard_folder import ShardFolder, load_manifest, read_manifest, require_whole
from hearth.storage import finish_file, writing

BATCH_BYTES = 4 << 20  # a record batch of a text shard is cut at this many bytes of text,
BATCH_ROWS = 1024  # or at this many documents
BATCHES_AHEAD = 2  # record batches that may wait to be written


def schema(kind: str) -> Any:
    """The column of a text shard: texts, or conversations as lists of messages."""
    import pyarrow as pa

    if kind == "text":
        return pa.schema([("text", pa.string())])
    text = pa.string()
    part = pa.struct([(name, text) for name in ("text", "tool", "arguments", "result")])
    turn = [*((name, text) for name in ("role", "content", "thinking")), ("parts", pa.list_(part))]
    return pa.schema([("messages", pa.list_(pa.struct(turn)))])


def packed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a shard holds them: a content of parts in a column of its own."""
    return [
        {**m, "content": "", "parts": m["content"]} if isinstance(m["content"], list) else m
        for m in messages
    ]


def unpacked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The inverse of `packed`."""
    found = []
    for message in messages:
        parts = message.pop("parts", None)
        if parts is not None:
            kept = [{name: v for name, v in part.items() if v is not None} for part in parts]
            message["content"] = kept
        found.append(message)
    return found


class TextShardWriter:
    """Write documents as Arrow shards, one file a split and unit; the caller says where a unit
    ends.

    Record batches are cut where their documents say, never where time does, so the bytes repeat.
    They are written and hashed in a thread of their own, at most `BATCHES_AHEAD` behind.
    """

    def __init__(self, folder: ShardFolder, number: int | None = None) -> None:
        self.folder = folder
        self.number = len(folder.units) if number is None else number
        self.n_bytes = 0
        self._files: dict[str, _TextFile] = {}
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future] = deque()

    def add(self, split: str, row: Any, n_bytes: int) -> None:
        """Append one document: UTF-8 `bytes` of text, or the messages of a conversation."""
        file = self._files.get(split)
        if file is None:
            name = f"{split}-{self.number:05}.arrow"
            with writing(self.folder.folder):
                file = self._files[split] = _TextFile(
                    self.folder.part(name), self.folder.kind, name, split
                )
        file.pending.append(row)
        file.pending_bytes += n_bytes
        self.n_bytes += n_bytes
        if file.pending_bytes >= BATCH_BYTES or len(file.pending) >= BATCH_ROWS:
            self._submit(file.write, file.take())

    def _submit(
        self, job: Callable[..., None], *arguments: Any, ahead: int = BATCHES_AHEAD
    ) -> None:
        self._waiting.append(self._thread.submit(job, *arguments))
        with writing(self.folder.folder):
            while len(self._waiting) > ahead:
                self._waiting.popleft().result()

    def finish_unit(self) -> dict[str, dict[str, Any]]:
        """Finish the files of this unit and start the next; returns name → facts, for the unit's
        record.
        """
        for file in self._files.values():
            self._submit(file.write, file.take())
            self._submit(file.finish, ahead=0)
        facts = {name: file.facts() for file in self._files.values() for name in [file.name]}
        self._files = {}
        self.number += 1
        self.n_bytes = 0
        return dict(sorted(facts.items()))

    def close(self) -> None:
        """Give up what is unfinished and remove it."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.abandon()
        self._files = {}


class _TextFile:
    """One Arrow file while it grows: size and checksum are taken of the bytes as they pass."""

    def __init__(self, path: Path, kind: str, name: str, split: str) -> None:
        import pyarrow as pa

        self.path, self.name, self.split, self.schema = path, name, split, schema(kind)
        self.pending: list[Any] = []
        self.pending_bytes = self.documents = self.text_bytes = 0
        self.sink = _HashingFile(path)
        self.writer = pa.ipc.new_stream(self.sink, self.schema)

    def take(self) -> tuple[list[Any], int]:
        """The documents that wait to be written, and their bytes."""
        taken = self.pending, self.pending_bytes
        self.pending, self.pending_bytes = [], 0
        return taken

    def write(self, taken: tuple[list[Any], int]) -> None:
        import pyarrow as pa

        rows, n_bytes = taken
        if not rows:
            return
        if self.schema.names == ["text"]:
            offsets = np.zeros(len(rows) + 1, np.int32)
            np.cumsum([len(row) for row in rows], out=offsets[1:])
            buffers = pa.py_buffer(offsets), pa.py_buffer(b"".join(rows))
            table = pa.table({"text": pa.StringArray.from_buffers(len(rows), *buffers)})
        else:
            table = pa.Table.from_pydict({"messages": list(map(packed, rows))}, self.schema)
        self.writer.write_table(table)
        self.documents += len(rows)
        self.text_bytes += n_bytes

    def finish(self) -> None:
        self.writer.close()
        finish_file(self.sink.file)

    def facts(self) -> dict[str, Any]:
        counts = {"split": self.split, "documents": self.documents, "text_bytes": self.text_bytes}
        return counts | {"size": self.sink.size, "sha256": self.sink.sha256.hexdigest()}

    def abandon(self) -> None:
        for close in (self.writer.close, self.sink.file.close):
            if not self.sink.file.closed:  # finished, but stopped before anyone was told
                with contextlib.suppress(OSError):  # a full disk says so once more
                    close()
        self.path.unlink(missing_ok=True)


class _HashingFile(io.RawIOBase):
    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=1 << 20)
        self.sha256 = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes


def unit_batches(folder: Path, n_units: int | None = None) -> Iterator[Any]:
    """The record batches of both splits in the first units of a folder, finished or not."""
    manifest = load_manifest(folder) or {"units": []}
    for unit in manifest["units"][:n_units]:
        for name in unit["files"]:
            yield from _arrow_batches(folder / name)


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


def read_text_batches(folder: Path, split: str, command: str, *, start: int = 0) -> Iterator[Any]:
    """The record batches of a finished folder from document `start` on, in order, in constant
    memory.
    """
    manifest = read_manifest(folder, command)
    require_whole(folder, manifest, command)
    for unit in manifest["units"]:
        for name, facts in unit["files"].items():
            if facts["split"] != split:
                continue
            if start >= facts["documents"]:
                start -= facts["documents"]
                continue
            for batch in _arrow_batches(Path(folder) / name):
                if start < batch.num_rows:
                    yield batch.slice(start)
                start = max(0, start - batch.num_rows)


def data_sheet(manifest: dict[str, Any]) -> str:
    """What a corpus is, for a person: the README.md of its folder."""
    splits, source = manifest["splits"], manifest["source"]
    documents = sum(split["documents"] for split in splits.values())
    n_bytes = sum(split["text_bytes"] for split in splits.values())
    tokens = sum(split["tokens"] for split in splits.values())
    facts = {
        "source": ", ".join(
            f"{name} {value}" for name, value in source.items() if value is not None
        ),
        "revision": manifest.get("revision") or "none",
        "licence": manifest["licence"],
        "documents": f"{documents:,}, of which {splits['validation']['documents']:,} held out",
        "text": f"{n_bytes:,} bytes, {n_bytes / max(1, documents):,.0f} a document",
        "tokens": f"{tokens:,}, {n_bytes / tokens:.2f} bytes each" if tokens else "not encoded yet",
    }
    lines = [
        f"# {manifest['name']}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {v} |" for name, v in facts.items()),
    ]
    lines += ["", "## Length of the documents", "", "```"]
    most = max(manifest["lengths"].values(), default=1)
    for bits, n in manifest["lengths"].items():
        up_to = log.size(2 ** int(bits))
        lines.append(f"below {up_to:>9}  {n:>9,}  {'#' * -(-40 * n // most)}")
    lines += ["```", ""]
    if manifest.get("reasoning"):
        taken = [f"- {n:,} × {what}" for what, n in manifest["reasoning"].items()]
        lines += ["## Reasoning taken", "", *taken, ""]
    lines += ["## What was dropped", ""]
    lines += [f"- {n:,} × {reason}" for reason, n in manifest["dropped"].items()] or ["Nothing."]
    lines += [
        "",
        "Examples with file and row are in `dropped.jsonl`.",
        "",
        "## Ten documents, drawn by hash",
        "",
    ]
    for _, begin in manifest["samples"]:
        lines.append("- " + " ".join(begin.split())[:240].replace("|", "\\|"))
    return "\n".join(lines) + "\n"

"""Folders of shards on disk: manifests and checks; and token shards (.npy).

In: documents as token ids, one at a time, or a finished folder. Out: shards and a manifest, or an array of token ids.
Knows nothing of where text comes from, of the tokenizer or of the network.

    manifest.json         written last and atomically; without it the folder is unfinished and is continued, not trusted
    manifest.part.json    the same while the folder is unfinished: the units done so far and where to go on
    *.part                a file being written; worthless after a kill, removed at the next start

A unit is what is committed at once: one text shard of each split, or one token shard. It notes where in the source it
began, so that a lost unit can be made again alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from hearth import log
from hearth.disk import checksum, finish_file, sync_folder, write_json, writing

SCHEMA = 1  # version of the manifest
MANIFEST = "manifest.json"
DRAFT = "manifest.part.json"
SPLITS = ("train", "validation")


def fingerprint(value: Any) -> str:
    """A short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------- a folder of shards


class ShardFolder:
    """A folder of shards in the making: what is done, whether it is finished, and how to commit more.

    damaged: what is wrong with which file, by size, and with `verify` by checksum.
    Raises `UserError` where the folder was made with other settings than `settings`, or cannot be written.
    """

    def __init__(self, folder: Path, kind: str, settings: dict[str, Any], *, verify: bool = False) -> None:
        self.folder, self.kind = Path(folder), kind
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.finished = is_finished(self.folder)
        self.manifest = load_json(self.folder / (MANIFEST if self.finished else DRAFT)) or self._fresh(settings)
        self._require(settings)
        self.damaged = damaged_files(self.folder, self.manifest, full=verify)
        for name, what in self.damaged.items():
            log.say(f"{self.folder / name} {what}: making it again")
        with writing(self.folder):
            for leftover in self.folder.glob("*.part"):
                leftover.unlink()

    def _fresh(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"schema": SCHEMA, "kind": self.kind, "settings": settings, "units": []}

    def _require(self, settings: dict[str, Any]) -> None:
        if self.manifest.get("schema") != SCHEMA or self.manifest.get("kind") != self.kind:
            raise UserError(f"{self.folder} was made by another version of this program: remove it and start again.")
        old = self.manifest["settings"]
        differing = [
            f"  {name}: made with {_short(old.get(name))}, asked for {_short(settings.get(name))}"
            for name in {**old, **settings}
            if old.get(name) != settings.get(name)
        ]
        if differing:
            raise UserError(
                f"{self.folder} was made with other settings:\n"
                + "\n".join(differing)
                + "\nRemove that folder to make it anew, or choose another --name to keep both."
            )

    @property
    def units(self) -> list[dict[str, Any]]:
        return self.manifest["units"]

    def part(self, name: str) -> Path:
        """Where to write file `name` until its unit is committed."""
        return self.folder / (name + ".part")

    def commit(self, unit: dict[str, Any]) -> None:
        """Put the finished `.part` files of `unit["files"]` in place, then note the unit in the draft.

        Each file's facts hold its `size` and `sha256`, and it is on the disk already: see `finish_file`.
        """
        self._place(unit, unit["files"])
        self.units.append(unit)
        self.save_draft()

    def is_damaged(self, unit: dict[str, Any]) -> bool:
        return any(name in self.damaged for name in unit["files"])

    def replace(self, unit: dict[str, Any], made: dict[str, dict[str, Any]]) -> None:
        """Put what was made again in place of the damaged files of a unit; it must be the same byte for byte."""
        names = [name for name in unit["files"] if name in self.damaged]
        for name in names:
            if made.get(name, {}).get("sha256") != unit["files"][name]["sha256"]:
                raise UserError(
                    f"{self.folder / name} was damaged, and making it again gave another content: its source has "
                    f"changed since. Remove {self.folder} and make it anew."
                )
        self._place(unit, names)
        for name in names:
            del self.damaged[name]
        for name in set(made) - set(names):
            self.part(name).unlink()

    def require_mended(self) -> None:
        if self.damaged:
            raise UserError(
                f"{', '.join(self.damaged)} in {self.folder} could not be made again: its source has changed since. "
                f"Remove {self.folder} and make it anew."
            )

    def _place(self, unit: dict[str, Any], names: Iterable[str]) -> None:
        with writing(self.folder):
            for name in names:
                os.replace(self.part(name), self.folder / name)
            sync_folder(self.folder)

    def save_draft(self) -> None:
        write_json(self.folder / DRAFT, self.manifest)

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest with `facts` and each split's totals; the folder is finished from here on."""
        self.manifest = {**self.manifest, **facts, "splits": {split: self.totals(split) for split in SPLITS}}
        self.manifest["units"] = self.manifest.pop("units")  # the long list last, for those who read the file
        write_json(self.folder / MANIFEST, self.manifest)
        (self.folder / DRAFT).unlink(missing_ok=True)
        self.finished = True
        return self.manifest

    def totals(self, split: str) -> dict[str, int]:
        """Documents, text bytes and tokens of one split so far."""
        files = [f for unit in self.units for f in unit["files"].values() if f["split"] == split]
        return {name: sum(f.get(name, 0) for f in files) for name in ("documents", "text_bytes", "tokens")}

    def start_again(self, **facts: Any) -> None:
        """Forget every unit, and keep `facts` in the draft for the next attempt."""
        self.manifest = {**self.manifest, **facts, "units": []}
        self.save_draft()


def is_finished(folder: Path) -> bool:
    """Whether `folder` has its manifest."""
    return (Path(folder) / MANIFEST).is_file()


def load_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Remove the folder {path.parent} and make it anew.") from error


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def read_manifest(folder: Path, command: str) -> dict[str, Any]:
    """The manifest of a finished folder; `command` is what makes it, for the error where it is missing."""
    folder = Path(folder)
    manifest = load_json(folder / MANIFEST)
    if manifest is None:
        found = "is unfinished" if (folder / DRAFT).exists() else "holds no manifest.json"
        if not folder.exists():
            found = "does not exist"
        raise UserError(f"No shards: {folder} {found}. Make them with `{command}`.")
    if manifest.get("schema") != SCHEMA:
        raise UserError(f"{folder} was made by another version of this program: remove it and run `{command}`.")
    return manifest


def damaged_files(folder: Path, manifest: dict[str, Any], *, full: bool = False) -> dict[str, str]:
    """What is wrong with which shard: missing, another size, and with `full` another checksum."""
    found = {}
    for unit in manifest["units"]:
        for name, facts in unit["files"].items():
            path = Path(folder) / name
            if not path.is_file():
                found[name] = "is missing"
            elif path.stat().st_size != facts["size"]:
                found[name] = f"has {path.stat().st_size} bytes instead of {facts['size']}"
            elif full and checksum(path) != facts["sha256"]:
                found[name] = "has another checksum than when it was written"
    return found


def require_whole(folder: Path, manifest: dict[str, Any], command: str, *, full: bool = False) -> None:
    """Raise a `UserError` that names every damaged shard of `folder`; `command` makes them again."""
    found = damaged_files(folder, manifest, full=full)
    if found:
        lines = [f"  {Path(folder) / name} {what}" for name, what in found.items()]
        raise UserError(
            "Damaged shards:\n" + "\n".join(lines) + f"\n`{command}` makes these again and leaves the others alone."
        )


def file_names(manifest: dict[str, Any], split: str, ending: str) -> list[str]:
    """Names of the shards of `split` that end in `ending`, in order."""
    names = [n for unit in manifest["units"] for n, facts in unit["files"].items() if facts["split"] == split]
    return sorted(name for name in names if name.endswith(ending))


# ------------------------------------------------------------------------------------- token shards


def token_dtype(vocab_size: int) -> Any:
    """The smallest type that holds every id: `uint16` while the vocabulary fits."""
    return np.uint16 if vocab_size <= 65_536 else np.uint32


class TokenShardWriter:
    """Write documents as token shards; after a kill each split goes on by itself, from document `n_done(split)`.

    shard_tokens: a shard closes before the document that would pass it; a longer document has a shard of its own.
    masked: `add` takes a loss mask for every document.
    verify: look for damage by checksum, not by size alone. Damaged shards are made again from the documents added
    from `n_done(split)` on; those that lie in whole shards are passed over (`wants` says which).
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        vocab_size: int,
        tokenizer_hash: str,
        shard_tokens: int,
        masked: bool = False,
        verify: bool = False,
    ) -> None:
        self._open: dict[str, _TokenFile] = {}
        settings = {**settings, "tokenizer": tokenizer_hash, "shard_tokens": shard_tokens}
        self.folder = ShardFolder(folder, "tokens", settings, verify=verify)
        self.dtype, self.masked, self.shard_tokens = token_dtype(vocab_size), masked, shard_tokens
        self.tokenizer_hash = tokenizer_hash
        self._next = {split: self.n_done(split) for split in SPLITS}
        self._n_in_units = {split: self.folder.totals(split)["documents"] for split in SPLITS}

    @property
    def finished(self) -> bool:
        """Whether the folder is complete and whole: nothing to add, nothing to finish."""
        return self.folder.finished and not self.folder.damaged

    def n_done(self, split: str) -> int:
        """Documents of `split` that are safely written: go on with this one."""
        broken = [unit["first_document"] for unit in self._units(split) if self.folder.is_damaged(unit)]
        return min(broken, default=self.folder.totals(split)["documents"])

    def wants(self, split: str, document: int) -> bool:
        """False for a document that lies in a whole shard: `add` would pass over it."""
        unit = self._unit_of(split, document)
        return unit is None or self.folder.is_damaged(unit)

    def _units(self, split: str) -> list[dict[str, Any]]:
        return [unit for unit in self.folder.units if unit["split"] == split]

    def _unit_of(self, split: str, document: int) -> dict[str, Any] | None:
        if document >= self._n_in_units[split]:
            return None
        for unit in self._units(split):
            if unit["first_document"] <= document < unit["first_document"] + unit["documents"]:
                return unit
        return None

    def skip(self, split: str, documents: int) -> None:
        """Pass over that many documents, none of which the writer `wants`."""
        self._next[split] += documents

    def add(self, split: str, ids: Any, text_bytes: int, mask: Any = None) -> None:
        """Append one document: its ids, the bytes of text it stands for, and with `masked` 1 where loss counts."""
        if self.masked != (mask is not None):
            raise ValueError("a masked writer takes a mask for every document, another one takes none")
        document = self._next[split]
        self._next[split] += 1
        remade = self._unit_of(split, document)
        if remade is not None and not self.folder.is_damaged(remade):
            return
        file = self._open.get(split)
        if file is not None and remade is None and file.n_tokens + len(ids) > self.shard_tokens and file.ends:
            self._commit(split)
            file = None
        with writing(self.folder.folder):
            if file is None:
                number = self._units(split).index(remade) if remade else len(self._units(split))
                file = self._open[split] = _TokenFile(self.folder, split, number, self.dtype, masked=self.masked)
            file.add(ids, text_bytes, mask)
        if remade is not None and document + 1 == remade["first_document"] + remade["documents"]:
            with writing(self.folder.folder):
                self.folder.replace(remade, file.finish())
            del self._open[split]

    def _commit(self, split: str) -> None:
        file, first = self._open[split], self.folder.totals(split)["documents"]
        with writing(self.folder.folder):
            files = file.finish()
        del self._open[split]
        self.folder.commit({"split": split, "first_document": first, "documents": len(file.ends), "files": files})
        self._n_in_units[split] += len(file.ends)

    def close_split(self, split: str) -> None:
        """Commit what is open of `split`."""
        if split in self._open:
            self._commit(split)

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Commit what is open and write the manifest; `facts` such as source and revision go into it."""
        for split in SPLITS:
            self.close_split(split)
        self.folder.require_mended()
        return self.folder.finish(**facts, tokenizer=self.tokenizer_hash, masked=self.masked)

    def close(self) -> None:
        """Give up what is open and remove it; the next writer of this folder goes on at `n_done`."""
        for file in self._open.values():
            file.abandon()
        self._open = {}

    def __enter__(self) -> TokenShardWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        for file in self._open.values():  # without removing: another writer may have the folder by now
            file.close()


class _TokenFile:
    """The .npy files of one shard while they grow; the header, of fixed size, is written again at the end."""

    def __init__(self, folder: ShardFolder, split: str, number: int, dtype: Any, *, masked: bool) -> None:
        self.folder, self.split, self.stem, self.dtype = folder, split, f"{split}-{number:05}", np.dtype(dtype)
        self.n_tokens = self.text_bytes = 0
        self.ends: list[int] = []
        self.names = {"ids": f"{self.stem}.npy", "ends": f"{self.stem}.ends.npy"}
        if masked:
            self.names["mask"] = f"{self.stem}.mask.npy"
        self.files = {part: folder.part(name).open("wb+", 1 << 20) for part, name in self.names.items()}
        self.dtypes = {"ids": self.dtype, "ends": np.dtype(np.int64), "mask": np.dtype(np.uint8)}
        for part in self.files:
            self._write_header(part, 0)

    def _write_header(self, part: str, length: int) -> None:
        file = self.files[part]
        file.seek(0)
        header = {"descr": self.dtypes[part].str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        if file.tell() != 128:
            raise AssertionError("a .npy header of another length would overwrite tokens")

    def add(self, ids: Any, text_bytes: int, mask: Any) -> None:
        self.files["ids"].write(np.ascontiguousarray(ids, self.dtype).data)
        if mask is not None:
            if len(mask) != len(ids):
                raise ValueError(f"{len(ids)} tokens, but a mask of {len(mask)}")
            self.files["mask"].write(np.ascontiguousarray(mask, np.uint8).data)
        self.n_tokens += len(ids)
        self.text_bytes += text_bytes
        self.ends.append(self.n_tokens)

    def finish(self) -> dict[str, dict[str, Any]]:
        self.files["ends"].write(np.array(self.ends, np.int64).data)
        lengths = {"ids": self.n_tokens, "ends": len(self.ends), "mask": self.n_tokens}
        facts = {}
        for part, file in self.files.items():
            self._write_header(part, lengths[part])
            finish_file(file)
            path = self.folder.part(self.names[part])
            facts[self.names[part]] = {"split": self.split, "size": path.stat().st_size, "sha256": checksum(path)}
        counts = {"documents": len(self.ends), "text_bytes": self.text_bytes, "tokens": self.n_tokens}
        facts[self.names["ids"]] |= counts
        return facts

    def close(self) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()

    def abandon(self) -> None:
        self.close()
        for name in self.names.values():
            self.folder.part(name).unlink(missing_ok=True)


class TokenShards:
    """One split of a folder of token shards, memory-mapped, read as one long row of ids.

    n_tokens, n_documents, text_bytes: totals of the split. ends: exclusive end of every document, int64.
    fingerprint: a hash of what determines the ids; tokenizer_hash: of the tokenizer that made them.
    """

    def __init__(self, folder: Path, split: str, command: str = "uv run train_tokenizer.py") -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder, command)
        require_whole(self.folder, self.manifest, command)
        totals = self.manifest["splits"][split]
        self.n_tokens, self.n_documents = totals["tokens"], totals["documents"]
        self.text_bytes = totals["text_bytes"]
        self.tokenizer_hash = self.manifest["tokenizer"]
        side_files = (".ends.npy", ".mask.npy")
        names = [n for n in file_names(self.manifest, split, ".npy") if not n.endswith(side_files)]
        facts = {name: f for unit in self.manifest["units"] for name, f in unit["files"].items()}
        self.fingerprint = fingerprint([split, self.tokenizer_hash, [facts[name]["sha256"] for name in names]])
        self._names = names
        self._starts = np.cumsum([0] + [facts[name]["tokens"] for name in names])
        self._ids = [self._map(name) for name in names]
        self._masks: list[np.ndarray] | None = None
        self._ends: np.ndarray | None = None

    def _map(self, name: str) -> np.ndarray:
        return np.load(self.folder / name, mmap_mode="r")

    @property
    def ends(self) -> np.ndarray:
        """Exclusive end of every document in the split, counted from its first token; int64, ascending."""
        if self._ends is None:
            parts = [np.load(self.folder / n.replace(".npy", ".ends.npy")) for n in self._names]
            shifted = [part + start for part, start in zip(parts, self._starts, strict=False)]
            self._ends = np.concatenate(shifted) if shifted else np.zeros(0, np.int64)
        return self._ends

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) as a new int64 array, over the borders of shards."""
        return self._gather(self._ids, start, stop, np.int64)

    def read_mask(self, start: int, stop: int) -> np.ndarray:
        """1 where the token carries loss, else 0, as a new uint8 array; raises `ValueError` where there is no mask."""
        if self._masks is None:
            if not self.manifest["masked"]:
                raise ValueError(f"{self.folder} holds no loss masks: it was not made from conversations")
            self._masks = [self._map(name.replace(".npy", ".mask.npy")) for name in self._names]
        return self._gather(self._masks, start, stop, np.uint8)

    def _gather(self, arrays: list[np.ndarray], start: int, stop: int, dtype: Any) -> np.ndarray:
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens}")
        out = np.empty(stop - start, dtype)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        filled = 0
        while filled < len(out):
            offset = start + filled - self._starts[shard]
            piece = arrays[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1
        return out

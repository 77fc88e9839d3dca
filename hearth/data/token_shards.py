"""Token shards: documents as ids in plain `.npy` files, written one after another, read as one long
row.

In: documents as token ids, one at a time, or a finished folder. Out: shards and a manifest, or an
array of token ids. Knows nothing of where text comes from, of the tokenizer or of the network.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from hearth.data.shard_folder import (
    SPLITS,
    ShardFolder,
    file_names,
    fingerprint,
    read_manifest,
    require_whole,
)
from hearth.storage import checksum, finish_file, writing

ID_TYPES = (np.uint16, np.uint32)


def token_dtype(vocab_size: int) -> Any:
    """The smallest type that holds every id: `uint16` while the vocabulary fits."""
    return np.uint16 if vocab_size <= 65_536 else np.uint32


class TokenShardWriter:
    """Write documents as token shards; after a kill each split continues by itself, from document
    `n_done(split)`.

    shard_tokens: a shard closes before the document that would pass it; a longer document has a
    shard of its own.
    masked: `add` takes a loss mask for every document.
    verify: look for damage by checksum, not by size alone. Damaged shards are made again from the
    documents added from `n_done(split)` on; those that lie in whole shards are passed over (`wants`
    says which).
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
        broken = [
            unit["first_document"] for unit in self._units(split) if self.folder.is_damaged(unit)
        ]
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
        """Append one document: its ids, the bytes of text it stands for, and with `masked` 1 where
        loss counts.
        """
        if self.masked != (mask is not None):
            raise ValueError(
                "a masked writer takes a mask for every document, another one takes none"
            )
        document = self._next[split]
        self._next[split] += 1
        remade = self._unit_of(split, document)
        if remade is not None and not self.folder.is_damaged(remade):
            return
        file = self._open.get(split)
        if (
            file is not None
            and remade is None
            and file.n_tokens + len(ids) > self.shard_tokens
            and file.ends
        ):
            self._commit(split)
            file = None
        with writing(self.folder.folder):
            if file is None:
                number = self._units(split).index(remade) if remade else len(self._units(split))
                file = self._open[split] = _TokenFile(
                    self.folder, split, number, self.dtype, masked=self.masked
                )
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
        self.folder.commit(
            {"split": split, "first_document": first, "documents": len(file.ends), "files": files}
        )
        self._n_in_units[split] += len(file.ends)

    def close_split(self, split: str) -> None:
        """Commit what is open of `split`."""
        if split in self._open:
            self._commit(split)

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Commit what is open and write the manifest; `facts` such as source and revision go into
        it.
        """
        for split in SPLITS:
            self.close_split(split)
        self.folder.require_mended()
        return self.folder.finish(**facts, tokenizer=self.tokenizer_hash, masked=self.masked)

    def close(self) -> None:
        """Give up what is open and remove it; the next writer of this folder continues at
        `n_done`.
        """
        for file in self._open.values():
            file.abandon()
        self._open = {}

    def __enter__(self) -> TokenShardWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        # without removing: another writer may have the folder by now
        for file in self._open.values():
            file.close()


class _TokenFile:
    """The .npy files of one shard while they grow; the header, of fixed size, is written again at
    the end.
    """

    def __init__(
        self, folder: ShardFolder, split: str, number: int, dtype: Any, *, masked: bool
    ) -> None:
        self.folder, self.split, self.stem, self.dtype = (
            folder,
            split,
            f"{split}-{number:05}",
            np.dtype(dtype),
        )
        self.n_tokens = self.text_bytes = 0
        self.ends: list[int] = []
        self.names = {"ids": f"{self.stem}.npy", "ends": f"{self.stem}.ends.npy"}
        if masked:
            self.names["mask"] = f"{self.stem}.mask.npy"
        self.files = {
            part: folder.part(name).open("wb+", 1 << 20) for part, name in self.names.items()
        }
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
            facts[self.names[part]] = {
                "split": self.split,
                "size": path.stat().st_size,
                "sha256": checksum(path),
            }
        counts = {
            "documents": len(self.ends),
            "text_bytes": self.text_bytes,
            "tokens": self.n_tokens,
        }
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

    n_tokens, n_documents, text_bytes: totals of the split. ends: exclusive end of every document,
    int64.
    fingerprint: a hash of what determines the ids; tokenizer_hash: of the tokenizer that made them.
    """

    def __init__(
        self, folder: Path, split: str, command: str = "uv run train_tokenizer.py"
    ) -> None:
        self.folder, self.split = Path(folder), split
        self.command = command
        self.manifest = read_manifest(self.folder, command)
        if self.manifest["kind"] != "tokens":
            raise UserError(f"{self.folder} holds no token shards. Make them with `{command}`.")
        require_whole(self.folder, self.manifest, command)
        totals = self.manifest["splits"][split]
        self.n_tokens, self.n_documents = totals["tokens"], totals["documents"]
        self.text_bytes = totals["text_bytes"]
        self.tokenizer_hash = self.manifest["tokenizer"]
        side_files = (".ends.npy", ".mask.npy")
        names = [n for n in file_names(self.manifest, split, ".npy") if not n.endswith(side_files)]
        facts = {name: f for unit in self.manifest["units"] for name, f in unit["files"].items()}
        self.fingerprint = fingerprint(
            [split, self.tokenizer_hash, [facts[name]["sha256"] for name in names]]
        )
        self._facts = {name: facts[name] for name in names}
        self._starts = np.cumsum([0] + [facts[name].get("tokens", 0) for name in names])
        self._ids = [self._map(name, "tokens", ID_TYPES) for name in names]
        self._masks: list[np.ndarray] | None = None
        self._ends: np.ndarray | None = None

    def _map(
        self, name: str, count: str, dtypes: tuple[Any, ...], ending: str = ".npy"
    ) -> np.ndarray:
        """The array that goes with shard `name`, memory-mapped, so that no header can make it take
        memory; as long as the manifest says in `count`.
        """
        path = self.folder / name.replace(".npy", ending)
        length = self._facts[name].get(count, 0)
        try:
            array = np.load(path, mmap_mode="r")
        except Exception as error:  # a header that was harmed can raise nearly anything
            raise self._damaged(path, f"cannot be read ({error})") from error
        if array.dtype not in dtypes or array.shape != (length,):
            found = f"holds {array.dtype} of shape {array.shape}"
            raise self._damaged(path, f"{found}, and the manifest says {length} {count}")
        return array

    def _damaged(self, path: Path, what: str) -> UserError:
        what = " ".join(what.split())[:200]
        return UserError(
            f"{path} {what}. Remove the folder {self.folder} and run `{self.command}`."
        )

    @property
    def ends(self) -> np.ndarray:
        """Exclusive end of every document in the split, counted from its first token; int64,
        ascending.
        """
        if self._ends is None:
            shifted = [np.zeros(0, np.int64)]
            for name, start in zip(self._facts, self._starts, strict=False):
                part = self._map(name, "documents", (np.int64,), ".ends.npy")
                n_tokens = self._facts[name]["tokens"]
                whole = len(part) and part[0] >= 0 and part[-1] == n_tokens
                if not whole or (np.diff(part) < 0).any():
                    path = self.folder / name.replace(".npy", ".ends.npy")
                    raise self._damaged(path, f"does not rise from 0 to {n_tokens}")
                shifted.append(part + start)
            self._ends = np.concatenate(shifted)
        return self._ends

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) as a new int64 array, over the borders of shards."""
        return self._gather(self._ids, start, stop, np.int64)

    def read_mask(self, start: int, stop: int) -> np.ndarray:
        """1 where the token carries loss, else 0, as a new uint8 array; raises `ValueError` where
        there is no mask.
        """
        if self._masks is None:
            if not self.manifest["masked"]:
                raise ValueError(
                    f"{self.folder} holds no loss masks: it was not made from conversations"
                )
            self._masks = [
                self._map(name, "tokens", (np.uint8,), ".mask.npy") for name in self._facts
            ]
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

"""The hub: which files a data set has, and their bytes by ranges, from a network that may fail.

In: a data set's name and commit. Out: addresses with sizes, and open files.
Knows nothing of formats and of what is done with the bytes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from config import ChatSource, TextSource, UserError
from hearth import log

HUB_BLOCK = 8 << 20  # bytes asked of the hub at once


class NetworkFailure(Exception):
    """What a network does at times; worth another try."""


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub at one commit."""

    files: dict[str, tuple[int, str]]  # address, size and hash of each file of its split
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
        raise UserError(
            f"{source.name}: the hub has no data set {source.hub} that can be read: {error}"
        ) from error
    except ValueError as error:  # no such configuration; the message lists those there are
        raise UserError(f"{source.name}: {error}") from error
    except Exception as error:  # whatever the layers below make of a network that fails
        raise NetworkFailure(f"{type(error).__name__}: {error}") from error
    splits = builder.config.data_files or {}
    if source.split not in splits:
        raise UserError(
            f"{source.name}: {source.hub} has no split {source.split!r}; it has "
            f"{', '.join(splits)}."
        )
    known = {
        f"hf://datasets/{source.hub}@{info.sha}/{f.rfilename}": (f.size or 0, f.blob_id or "0")
        for f in info.siblings or []
    }
    files = {address: known[address] for address in splits[source.split]}
    licence = (info.card_data or {}).get("license") or "not stated"
    return HubSet(
        files, info.sha or "", ", ".join(licence) if isinstance(licence, list) else str(licence)
    )


class HubFile(io.RawIOBase):
    """A file of the hub, read by ranges. `failure` is what the network did, whatever becomes of the
    exception.
    """

    def __init__(self, address: str, size: int) -> None:
        from huggingface_hub import HfFileSystem

        self.size, self.failure = size, None
        self._file: Any = None
        self._file = self._try(lambda: HfFileSystem().open(address, "rb", block_size=HUB_BLOCK))

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


class RetryPolicy:
    """Back-off: waits 1, 2, 4 … 60 seconds between failures; gives up `minutes` after the last
    success.
    """

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
        log.say(
            f"{self.name}: the network failed, trying again in {self.wait:.0f}s, Ctrl-C stops: "
            f"{text}"
        )
        time.sleep(self.wait)
        self.wait = min(60.0, 2 * self.wait)

"""Writing files that a kill or a power cut leaves whole, and what to say when the disk refuses.

In: a path and its content. Out: the file, or a `UserError`.
Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from config import UserError

DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.EROFS: "it is mounted read-only",
    errno.ENOTDIR: "a file stands where a folder should be",
    errno.EEXIST: "a file stands where a folder should be",
}


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses inside the block into a `UserError` that says what and
    what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Make room and start the same command again: it continues where it stopped."
        else:
            remedy = "Choose another folder with --runs, or mend its permissions."
        raise UserError(
            f"Cannot write to {folder}: {DISK_ERRORS[error.errno]}. {remedy}"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file so that after a kill or a power cut it is the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".part")
    with writing(path.parent):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finish_file(file: BinaryIO) -> None:
    """Close a file so that its content survives a power cut."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def disk_free(folder: Path) -> int:
    """Bytes free where `folder` is, or would be."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free

"""Files written so that a kill or a power cut leaves them whole, and JSON read with checks.

In: a path and its content. Out: the file, or its content, or a `UserError` that says what is wrong.
Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import reprlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, get_args

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
MAX_JSON_BYTES = 16 << 20  # of a JSON file that is read, unless its reader allows more
KIND_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors writes the errno
# what torch says where a write failed, for whatever reason; a full disk is by far the commonest
TORCH_WRITE = (
    "unexpected pos ",
    "file write failed",
    "PytorchStreamWriter failed writing",
    "iostream error",
)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses inside the block into a `UserError` that says what and
    what to do.

    Recognises `OSError`, and the errors of safetensors and torch, which are none. Removing what the
    block left half written is the caller's.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number not in DISK_ERRORS:
            raise
        if number in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Make room and start the same command again: it continues where it stopped."
        else:
            remedy = "Choose another folder with --runs, or mend its permissions."
        raise UserError(f"Cannot write to {folder}: {DISK_ERRORS[number]}. {remedy}") from error


def _errno(error: Exception) -> int | None:
    """The error number behind what a disk made a library raise."""
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (found := OS_ERROR.search(text)):
        return int(found[1])
    if isinstance(error, RuntimeError) and any(words in text for words in TORCH_WRITE):
        return errno.ENOSPC
    return None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that after a kill or a power cut it is the old one or the new one, whole.

    A write that fails leaves nothing behind.
    """
    part = path.with_name(path.name + ".part")
    with writing(path.parent):
        try:
            with part.open("wb") as file:
                file.write(data)
                finish_file(file)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text in UTF-8, with the line ends that it has.

    What UTF-8 cannot hold (half of a surrogate pair, as in a file name that is not UTF-8) is
    written as \\udXXX, which JSON reads back.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


# ---------------------------------------------------------------------------- JSON read with checks


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES, kind: type = dict) -> Any:
    """The JSON value in a file, which must be of `kind` at its top: dict or list.

    Raises `UserError`, in one line that names the file, where it is missing, longer than
    `max_bytes` (looked up before it is read), not JSON, nested too deeply, or of another kind.
    """
    try:
        with Path(path).open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes > max_bytes:
                raise UserError(f"{path} has {n_bytes} bytes, and at most {max_bytes} are read.")
            value = json.loads(file.read(max_bytes).decode("utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} should hold {KIND_NAMES[kind]}, but holds {shown(value)}.")
    return value


def field(record: dict[str, Any], name: str, kind: Any, path: Path, *, at: str = "") -> Any:
    """`record[name]` where it is of `kind`; raises a `UserError` that names file and field.

    kind: str, int, float, bool, list, dict, or one of them `| None`, and then it may be missing. A
    whole number does for float, true and false are no numbers, and a number is finite and fits into
    64 bits. at: where in the file `record` stands, such as "units[3]".
    """
    value = record.get(name)
    kinds = get_args(kind) or (kind,)
    wanted = (*kinds, int) if float in kinds else kinds
    good = isinstance(value, wanted) and (not isinstance(value, bool) or bool in kinds)
    if good and isinstance(value, int | float):
        good = -(2**63) <= value < 2**64  # NaN is in no order
    if not good:
        names = " or ".join(KIND_NAMES[k] for k in kinds)
        found = f"is {shown(value)}" if name in record else "is missing"
        raise UserError(f"{path}: {f'{at}.' if at else ''}{name} should be {names}, but {found}.")
    return value


def shown(value: Any) -> str:
    """A value of a file for an error: one short line, however long or deep it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    text = short.repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


# --------------------------------------------------------------------------------------- the disk


def replace_file(source: Path, target: Path) -> None:
    """Make `target` a copy of `source`, whole at any moment."""
    part = target.with_name(f".part-{target.name}")
    with writing(target.parent):
        shutil.copyfile(source, part)
        sync_file(part)
        os.replace(part, target)
        sync_folder(target.parent)


def replace_folder(source: Path, target: Path) -> None:
    """Make `target` a copy of the folder `source`; a kill may leave it missing, never half."""
    part = target.with_name(f".part-{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    with writing(target.parent):
        shutil.copytree(source, part)
        for file in part.rglob("*"):
            if file.is_file():
                sync_file(file)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
        sync_folder(target.parent)


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
    """Close a file that was written so that its content survives a power cut."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def sync_file(path: Path) -> None:
    """Make a file that another library wrote survive a power cut.

    Opened for writing, because Windows syncs no other handle.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def machine_memory() -> tuple[int, int]:
    """Bytes of the machine's memory, and those of them that are free or given back when asked for;
    as Linux says it where psutil is not here, as on a machine lent for an hour.
    """
    if importlib.util.find_spec("psutil"):
        import psutil

        memory = psutil.virtual_memory()
        return memory.total, memory.available
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
    return 1024 * kib["MemTotal"], 1024 * kib["MemAvailable"]


def disk_free(folder: Path) -> int:
    """Bytes free where `folder` is, or would be."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free

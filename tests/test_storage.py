"""Storage: a file is the old one or the new one, JSON that cannot be used is one line, a disk that
refuses is one line.
"""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from config import UserError
from hearth import storage
from hearth.storage import field, read_json


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.json"
    storage.write_json(path, {"x": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full.*it continues"):
        storage.write_json(path, {"x": 2})
    assert read_json(path) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_with_its_own_line_ends_and_what_utf8_cannot_hold(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "a", "one\ntwo\r\n")
    assert (tmp_path / "a").read_bytes() == b"one\ntwo\r\n"
    name = os.fsdecode(b"caf\xe9.txt")
    storage.write_json(tmp_path / "b", {"file": name})
    assert read_json(tmp_path / "b") == {"file": name}


def test_sync_opens_no_file_for_reading_alone(tmp_path: Path) -> None:
    """Windows refuses to sync such a handle."""
    fcntl = pytest.importorskip("fcntl", reason="asks POSIX how a handle was opened")
    synced = []
    sync = os.fsync

    def watched(handle: int) -> None:
        synced.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)
        sync(handle)

    (tmp_path / "a").write_bytes(b"content")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", watched)
        storage.sync_file(tmp_path / "a")
        with (tmp_path / "b").open("wb") as file:
            storage.finish_file(file)
    assert len(synced) == 2
    assert os.O_RDONLY not in synced
    assert (tmp_path / "a").read_bytes() == b"content"


def test_a_folder_that_cannot_be_opened_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows opens no folder; its renames are written through by the file system."""

    def refuses(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuses)
    storage.sync_folder(tmp_path)
    storage.write_json(tmp_path / "a", {"x": 1})
    assert read_json(tmp_path / "a") == {"x": 1}


# ------------------------------------------------------------------------------- disks that refuse


def write_with_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"a": torch.zeros(2_000_000)}, file)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"a": torch.zeros(2_000_000)}, path),
        lambda path: torch.save({"a": torch.zeros(2_000_000)}, path),
        write_with_torch,
        lambda path: path.write_bytes(bytes(8_000_000)),
    ],
    ids=["safetensors", "torch", "torch to a file", "plain"],
)
def test_a_full_disk_is_one_line_whichever_library_writes(
    small_disk: Path, write: Callable[[Path], object]
) -> None:
    with pytest.raises(UserError, match=r"disk is full. Make room"), storage.writing(small_disk):
        write(small_disk / "a")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        ValueError("unexpected pos 1 vs 2"),
        OSError(errno.EIO, "I/O error"),
    ],
)
def test_what_no_disk_raised_passes_through(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as found, storage.writing(tmp_path):
        raise error
    assert found.value is error


# ------------------------------------------------------------------------------------- JSON checked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"a": ', "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"a":' * 200_000, "is nested too deeply"),
        (b"[1, 2]", "should hold an object, but holds \\[1, 2\\]"),
        (b'"' + b"x" * 500 + b'"', "should hold an object, but holds"),
        (b"null", "should hold an object, but holds None"),
    ],
)
def test_json_that_cannot_be_used_is_one_short_line_with_the_file(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as found:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(found.value)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < len(str(tmp_path)) + 200


def test_json_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it would take all memory
    with pytest.raises(UserError, match=r"a\.json has 1099511627776 bytes, and at most"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[1]")
    assert read_json(tmp_path / "b.json", max_bytes=3, kind=list) == [1]
    with pytest.raises(UserError, match="at most 2"):
        read_json(tmp_path / "b.json", max_bytes=2, kind=list)


def test_json_file_that_is_missing_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read .*a\.json: No such file"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("7", int),
        (7.0, int),
        (True, int),
        (1, bool),
        (2**64, int),
        (True, float),
        (float("nan"), float),
        (float("inf"), float),
        (None, dict),
        ([], dict),
        (7, str | None),
        ("x" * 500, int | None),
    ],
)
def test_field_of_another_type_names_file_and_field(value: Any, kind: Any) -> None:
    with pytest.raises(UserError, match=r"a\.json: units\[3\]\.size should be .*, but is ") as e:
        field({"size": value}, "size", kind, Path("a.json"), at="units[3]")
    assert len(str(e.value)) < 200


@pytest.mark.parametrize(
    ("value", "kind"),
    [(7, int), (7, float), (7.5, float), (None, int | None), ("", str), ({}, dict), (False, bool)],
)
def test_field_of_the_right_type_is_given_back(value: Any, kind: Any) -> None:
    assert field(json.loads(json.dumps({"x": value})), "x", kind, Path("a")) == value


def test_field_that_is_missing_is_said_unless_it_may_be() -> None:
    with pytest.raises(UserError, match=r"a\.json: size should be a whole number, but is missing"):
        field({}, "size", int, Path("a.json"))
    assert field({}, "size", int | None, Path("a.json")) is None

"""The formats on disk: what is written is read back, and a folder that cannot be trusted is never
trusted.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from config import UserError
from hearth import storage
from hearth.data import shard_folder
from hearth.data.token_shards import TokenShards, TokenShardWriter


def write(
    folder: Path,
    documents: list[list[int]],
    *,
    masked: bool = False,
    vocab_size: int = 1000,
    cap: int = 10,
):
    writer = TokenShardWriter(
        folder, {"x": 1}, vocab_size=vocab_size, tokenizer_hash="t", shard_tokens=cap, masked=masked
    )
    for ids in documents[writer.n_done("train") :]:
        writer.add("train", ids, 2 * len(ids), [i % 2 for i in ids] if masked else None)
    return writer


DOCUMENTS = [[1, 2, 3], [4] * 6, [5], [6] * 15, [], [7, 8]]


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_tokens_read_back_over_the_borders_of_shards(tmp_path: Path, vocab_size: int) -> None:
    write(tmp_path, DOCUMENTS, vocab_size=vocab_size).finish()
    reader = TokenShards(tmp_path, "train")
    flat = [i for ids in DOCUMENTS for i in ids]
    assert (reader.n_tokens, reader.n_documents, reader.text_bytes) == (
        len(flat),
        len(DOCUMENTS),
        2 * len(flat),
    )
    assert reader.ends.tolist() == np.cumsum([len(ids) for ids in DOCUMENTS]).tolist()
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            assert reader.read(start, stop).tolist() == flat[start:stop]
    assert reader.read(0, 3).dtype == np.int64
    on_disk = np.load(tmp_path / "train-00000.npy", mmap_mode="r")
    assert on_disk.dtype == (np.uint16 if vocab_size == 1000 else np.uint32)


def test_no_document_straddles_two_shards(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS).finish()
    sizes = [np.load(p).tolist()[-1] for p in sorted(tmp_path.glob("*.ends.npy"))]
    assert sizes == [10, 15, 2]


def test_masks_read_back_and_are_refused_where_there_are_none(tmp_path: Path) -> None:
    write(tmp_path / "with", DOCUMENTS, masked=True).finish()
    reader = TokenShards(tmp_path / "with", "train")
    assert (reader.read_mask(0, reader.n_tokens) == reader.read(0, reader.n_tokens) % 2).all()
    write(tmp_path / "without", DOCUMENTS).finish()
    with pytest.raises(ValueError, match="no loss masks"):
        TokenShards(tmp_path / "without", "train").read_mask(0, 1)


def test_a_split_without_documents_is_empty(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS).finish()
    reader = TokenShards(tmp_path, "validation")
    assert (reader.n_tokens, len(reader.ends), len(reader.read(0, 0))) == (0, 0, 0)


def test_interrupted_writing_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "whole", DOCUMENTS).finish()
    for n in range(len(DOCUMENTS)):
        folder = tmp_path / f"cut{n}"
        write(folder, DOCUMENTS[:n])  # never finished: what is open is lost
        write(folder, DOCUMENTS).finish()
        for path in sorted((tmp_path / "whole").iterdir()):
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
        assert not list(folder.glob("*.part*"))


def test_unfinished_and_missing_folders_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist.*`make it`"):
        TokenShards(tmp_path / "none", "train", "make it")
    write(tmp_path, DOCUMENTS)
    with pytest.raises(UserError, match=r"is unfinished.*`make it`"):
        TokenShards(tmp_path, "train", "make it")


@pytest.mark.parametrize("harm", ["cut", "remove"])
def test_damaged_shard_is_named(tmp_path: Path, harm: str) -> None:
    write(tmp_path, DOCUMENTS).finish()
    path = tmp_path / "train-00001.npy"
    path.write_bytes(path.read_bytes()[:-2]) if harm == "cut" else path.unlink()
    with pytest.raises(UserError, match=r"train-00001\.npy"):
        TokenShards(tmp_path, "train")


def test_changed_byte_is_found_by_the_full_check_only(tmp_path: Path) -> None:
    manifest = write(tmp_path, DOCUMENTS).finish()
    path = tmp_path / "train-00000.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert shard_folder.damaged_files(tmp_path, manifest) == {}
    assert list(shard_folder.damaged_files(tmp_path, manifest, full=True)) == ["train-00000.npy"]


def test_fingerprint_changes_with_the_tokens_and_not_with_the_folder(tmp_path: Path) -> None:
    for name, documents in {"a": DOCUMENTS, "b": DOCUMENTS, "c": [[9], *DOCUMENTS]}.items():
        write(tmp_path / name, documents).finish()
    a, b, c = (TokenShards(tmp_path / name, "train").fingerprint for name in "abc")
    assert a == b != c


def test_other_settings_are_listed_old_and_new(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS, cap=10).finish()
    with pytest.raises(UserError, match=r"made from something else: shard_tokens was 10, is 11"):
        write(tmp_path, DOCUMENTS, cap=11)


def test_folder_that_cannot_be_written_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        write(tmp_path / "file" / "tokens", DOCUMENTS)


def test_manifest_is_readable_json_with_a_checksum_for_every_file(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS).finish(source={"demo": "text"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    files = {name: facts for unit in manifest["units"] for name, facts in unit["files"].items()}
    assert set(files) == {path.name for path in tmp_path.iterdir()} - {"manifest.json"}
    for name, facts in files.items():
        assert facts["sha256"] == storage.checksum(tmp_path / name)
        assert facts["size"] == (tmp_path / name).stat().st_size

"""Folders of shards: a manifest or a shard that cannot be right is one line, whatever is in it."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import ChatSource, DataConfig, TextSource, UserError
from hearth.data import ingest, shard_folder, text_shards
from hearth.data.shard_folder import DRAFT, MANIFEST, SPLITS, read_manifest
from hearth.data.token_shards import TokenShards, TokenShardWriter

DATA = DataConfig(text_files=("x",), min_chars=1, validation_share=0.3)


def make_text(folder: Path, file: Path) -> None:
    ingest.write_text_shards(TextSource(name="own", files=(str(file),)), folder, DATA)
    for split in SPLITS:
        for batch in text_shards.read_text_batches(folder, split, "make it"):
            assert batch.num_rows
    assert text_shards.data_sheet(read_manifest(folder, "make it"))


def make_chat(folder: Path, file: Path) -> None:
    ingest.write_chat_shards(ChatSource(name="own", files=(str(file),)), folder, 0.3)
    assert text_shards.data_sheet(read_manifest(folder, "make it"))


def make_tokens(folder: Path, file: Path) -> None:
    with TokenShardWriter(
        folder, {}, vocab_size=1000, tokenizer_hash="t", shard_tokens=10, masked=True
    ) as writer:
        if not writer.finished:
            for i in range(writer.n_done("train"), 6):
                writer.add("train", [i, 2, 3, 4], 8, [0, 1, 1, 1])
            for _ in range(writer.n_done("validation"), 1):
                writer.add("validation", [1, 2], 4, [0, 1])
            writer.finish()
    for split in SPLITS:
        read_tokens(folder, split)


def read_tokens(folder: Path, split: str) -> None:
    reader = TokenShards(folder, split, "make it")
    assert len(reader.ends) == reader.n_documents
    assert len(reader.read(0, reader.n_tokens)) == len(reader.read_mask(0, reader.n_tokens))


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "text": make_text,
    "chat": make_chat,
    "tokens": make_tokens,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and conversations in the same rows, and a row that is neither."""
    path = tmp_path_factory.mktemp("input") / "a.jsonl"
    rows = [{"text": f"text {i}", "question": f"{i}?", "answer": f"{i}"} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, [*rows, None])))
    return path


@pytest.fixture(scope="module")
def made(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, and one of each that was stopped before its manifest was written."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("made")
    for kind, make in KINDS.items():
        make(folder / kind, file)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shard_folder.ShardFolder, "finish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                make(folder / f"{kind} unfinished", file)
    return folder


def nodes(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of everything in a JSON value."""
    if place:
        yield place
    items: Any = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield from nodes(item, (*place, key))


def outcome(make: Callable[[Path, Path], None], folder: Path, file: Path) -> str | None:
    """What is said, None where all goes well; "traceback" where a user would see one."""
    try:
        make(folder, file)
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"traceback\n{error!r}"
    return None


HOSTILE = (None, "x", "../../x", -1, 0, 1.5, True, 2**63, 2**70, [], [[]], {}, {"a": {"b": 1}})


@pytest.mark.parametrize("state", ["", " unfinished"])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_stands_in_a_manifest_is_used_or_refused_in_one_line(
    file: Path, made: Path, tmp_path: Path, kind: str, state: str
) -> None:
    rng = random.Random(0)
    name = DRAFT if state else MANIFEST
    content = (made / f"{kind}{state}" / name).read_text()
    said = {}
    for number, place in enumerate(nodes(json.loads(content))):
        for value in ("gone", *rng.sample(HOSTILE, 2)):
            manifest = json.loads(content)
            inner = manifest
            for key in place[:-1]:
                inner = inner[key]
            if value == "gone":
                del inner[place[-1]]
            else:
                inner[place[-1]] = value
            folder = tmp_path / str(number)
            shutil.copytree(made / f"{kind}{state}", folder)
            (folder / name).write_text(json.dumps(manifest))
            if message := outcome(KINDS[kind], folder, file):
                said[place, str(value)] = message.replace(str(folder), "F").replace(str(file), "F")
            shutil.rmtree(folder)
    assert len(said) > number
    assert {at: text for at, text in said.items() if "\n" in text or "F" not in text} == {}


@pytest.mark.parametrize("name", [MANIFEST, DRAFT])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": ' + "[" * 10**5, "\x00" * 100])
def test_a_manifest_that_is_no_json_object_names_the_file(
    file: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name} .*Remove the folder") as found:
        make_text(tmp_path, file)
    assert "\n" not in str(found.value)


def test_a_manifest_that_is_absurdly_large_is_not_read(file: Path, tmp_path: Path) -> None:
    with (tmp_path / MANIFEST).open("wb") as hole:
        hole.truncate(1 << 40)
    with pytest.raises(UserError, match=r"manifest\.json has 1099511627776 bytes"):
        read_manifest(tmp_path, "make it")


def npy(descr: str, shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        npy("'<u2'", "(1000000000000,)"),
        npy("'<u2'", "(99999999999999999999999999,)"),
        npy("'<u2'", "(-5,)"),
        npy("'<u2'", "(2, 4)", bytes(16)),
        npy("'<u2'", "(7,)", bytes(14)),
        npy("'<f8'", "(8,)", bytes(64)),
        npy("'<M8[s]'", "(8,)", bytes(64)),
        npy("'|O'", "(8,)", bytes(64)),
        npy("'|V999999999'", "(8,)"),
        npy("(" * 200, "(8,)"),
        npy("'nonsense'", "(8,)"),
    ],
)
@pytest.mark.parametrize("ending", [".npy", ".ends.npy", ".mask.npy"])
def test_a_header_that_does_not_fit_is_one_line_and_takes_no_memory(
    made: Path, tmp_path: Path, ending: str, content: bytes
) -> None:
    folder = tmp_path / "tokens"
    shutil.copytree(made / "tokens", folder)
    name = f"train-00000{ending}"
    (folder / name).write_bytes(content)
    trust_sizes(folder)
    with pytest.raises(UserError, match=rf"{name} .*`make it`") as found:
        read_tokens(folder, "train")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("ends", [[4, 9], [9, 8], [-4, 8], [8, 4], [2**62, 8]])
def test_document_ends_that_do_not_fit_the_tokens_are_one_line(
    made: Path, tmp_path: Path, ends: list[int]
) -> None:
    folder = tmp_path / "tokens"
    shutil.copytree(made / "tokens", folder)
    np.save(folder / "train-00000.ends.npy", np.array(ends, np.int64))
    trust_sizes(folder)
    with pytest.raises(UserError, match=r"train-00000\.ends\.npy does not rise from 0 to 8"):
        read_tokens(folder, "train")


def trust_sizes(folder: Path) -> None:
    """Write the sizes that the files have now into the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for unit in manifest["units"]:
        for name, facts in unit["files"].items():
            facts["size"] = (folder / name).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))

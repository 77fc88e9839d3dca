"""Sources: the text column, reading ahead, the real sets."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_readers import own

from config import ChatSource, UserError
from hearth.data import sources
from hearth.data.layouts import conversation
from hearth.data.readers import Rows, local_files, read_rows
from hearth.data.sources import identity, text_documents
from hearth.storage import checksum


def test_text_column_is_guessed_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "content": "hello", "url": "x"}\n')
    assert list(text_documents(own(tmp_path))) == ["hello"]
    assert "'content'" in capsys.readouterr().out
    assert list(text_documents(own(tmp_path, column="url"))) == ["x"]


@pytest.mark.parametrize(
    ("column", "message"), [("nope", "no column 'nope'"), (None, "cannot tell which column")]
)
def test_unclear_text_column_lists_the_columns(
    tmp_path: Path, column: str | None, message: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "a", "story": "b"}\n')
    with pytest.raises(UserError, match=rf"a.jsonl: .*{message}.*title, story"):
        list(text_documents(own(tmp_path, column=column)))


# ----------------------------------------------------------------------------- what a source is now


def test_a_file_edited_in_place_at_the_same_size_is_another_source(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one text")
    before, times = identity(own(path), tmp_path), path.stat()
    assert identity(own(path), tmp_path) == before
    path.write_text("two text")
    assert identity(own(path), tmp_path) != before
    path.write_text("six text")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps the time does
    assert identity(own(path), tmp_path) not in (before, None)
    path.write_text("one text")
    assert identity(own(path), tmp_path) == before


def test_content_and_order_decide_what_a_source_is_not_names(tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("a.txt", "b.txt", "other/c.txt", "other/d.txt")]
    (tmp_path / "other").mkdir()
    for path in names:
        path.write_text("first" if path.name in ("a.txt", "c.txt") else "second")
    a, b, c, d = names
    assert identity(own(a, b), tmp_path) == identity(own(c, d), tmp_path)
    assert identity(own(a, b), tmp_path) != identity(own(b, a), tmp_path)
    (tmp_path / "a.md").write_text("first")
    assert identity(own(a), tmp_path) != identity(own(tmp_path / "a.md"), tmp_path)


def test_a_file_is_hashed_again_only_where_its_state_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return checksum(path)

    monkeypatch.setattr(sources, "checksum", counting)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    source = own(tmp_path / "*.txt")
    first = identity(source, tmp_path)
    assert hashed == ["a.txt", "b.txt", "c.txt"]
    assert identity(source, tmp_path) == first
    (tmp_path / "b.txt").write_text("text of B")
    identity(source, tmp_path)
    assert hashed == ["a.txt", "b.txt", "c.txt", "b.txt"]
    identity(source, tmp_path / "not there")
    assert hashed[4:] == ["a.txt", "b.txt", "c.txt"]
    assert not (tmp_path / "not there").exists()


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"PATH": 7}', '{"PATH": [9, "x"]}'])
def test_a_harmed_memory_of_hashes_costs_time_only(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    first = identity(own(path), tmp_path)
    (tmp_path / sources.HASHES).write_text(content.replace("PATH", str(path)))
    assert identity(own(path), tmp_path) == first


# ------------------------------------------------------------------------------------ reading ahead


def test_reading_ahead_keeps_the_order_and_passes_errors_on() -> None:
    def batches() -> Iterator[Rows]:
        for i in range(10):
            yield Rows(0, "x", i, [i])
        raise UserError("broken")

    seen = []
    with pytest.raises(UserError, match="broken"):
        seen.extend(rows.first for rows in sources.ahead(batches()))
    assert seen == list(range(10))


def test_reading_ahead_closes_its_source_when_nobody_reads_on() -> None:
    closed = []

    def batches() -> Iterator[Rows]:
        try:
            for i in range(10**9):
                yield Rows(0, "x", i, [i])
        finally:
            closed.append(True)

    stream = sources.ahead(batches())
    assert next(stream).first == 0
    stream.close()
    assert closed == [True]


def test_reading_ahead_does_not_wait_for_a_network_that_stalls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stalled, over = threading.Event(), threading.Event()
    monkeypatch.setattr(sources, "PATIENCE", 0.01)

    def batches() -> Iterator[Rows]:
        yield Rows(0, "x", 0, [0])
        stalled.set()
        over.wait(60)

    stream = sources.ahead(batches())
    next(stream)
    stalled.wait()
    stream.close()
    assert not over.is_set()
    over.set()


# ------------------------------------------------------------------------------------ the real sets

REAL_CHAT = {
    "chat/alpaca_999.json": 0.99,
    "chat/alpaca_style_codegen.json": 0.99,
    "chat/alpaca_style_rasbt_1100.json": 0.99,
    "chat/dolly_hhrlhf_1000.jsonl": 0.99,
    "chat/messages_oasst_en.jsonl": 0.99,
    "chat/text_dolly_open_qa.jsonl": 0.99,
    "chat/gsm8k_train.jsonl": 0.99,
    "schemas/openr1_math_220k_default_schema.parquet": 0.99,
    "schemas/ultrachat_200k_train_sft_schema.parquet": 0.99,
    "schemas/alpaca_schema.parquet": 0.99,
    "schemas/databricks-dolly-15k_schema.jsonl": 0.99,
    "schemas/smol_smoltalk_schema.parquet": 0.99,
}


@pytest.mark.parametrize("name", REAL_CHAT)
def test_real_sets_are_recognised(data_folder: Path, name: str) -> None:
    files = local_files([str(data_folder / name)])
    rows = [item for rows in read_rows(files, (0, 0), sources.whole_rows) for item in rows.items]
    found = list(sources.conversations(ChatSource(files=(str(data_folder / name),))))
    assert len(found) >= REAL_CHAT[name] * len(rows)
    assert not any(
        "####" in m["content"] or "<<" in m["content"]
        for talk in found
        for m in talk
        if "gsm8k" in name
    )


@pytest.mark.parametrize("max_chars", [None, 600, 200])
def test_real_mathematics_takes_verified_generations_or_the_solution(
    data_folder: Path, max_chars: int | None
) -> None:
    path = data_folder / "schemas/openr1_math_220k_default_schema.parquet"
    for row in pq.read_table(path).to_pylist():
        limit = max_chars or 10**9
        marks = zip(
            row["generations"],
            row["correctness_math_verify"],
            row["is_reasoning_complete"],
            strict=True,
        )
        right = [
            text
            for text, verified, complete in marks
            if verified and complete and len(text) <= limit
        ]
        talk = conversation(row, max_chars)
        if right:
            assert (
                talk[-1]["thinking"]
                == right[0].split("</think>")[0].removeprefix("<think>").strip()
            )
            assert talk[-1]["content"] == right[0].split("</think>")[1].strip()
        elif len(row["solution"]) <= limit:
            assert (talk[-1]["thinking"], talk[-1]["content"]) == (row["solution"], row["answer"])
        else:
            assert talk.reason == "reasoning too long"


def test_hub_columns_hold_the_text_of_the_real_schemas(data_folder: Path) -> None:
    for name in ("fineweb_edu_sample10BT_schema", "open_web_math_schema"):
        source = own(data_folder / "schemas" / f"{name}.parquet")
        expected = pq.read_table(source.files[0], columns=["text"]).column(0).to_pylist()
        assert list(text_documents(source)) == expected

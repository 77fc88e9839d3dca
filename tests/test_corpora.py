"""Sources and cleaning: every row of every format is read once, kept or counted, from any place on."""

import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import corpora
from config import ChatSource, DataConfig, TextSource, UserError
from corpora import Bad, Rows, Seen, conversation, local_files, read_rows, repeated_line_share, text_documents

TEXTS = [f"Document {i} — naïve café 🎉, with {'many words ' * (i % 40)}and an end." for i in range(600)]


def write_format(folder: Path, suffix: str, texts: list[str] = TEXTS) -> Path:
    """The texts as a file of one of the formats that hold rows."""
    path = folder / f"data{suffix}"
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    if suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=150)
    elif suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    elif suffix == ".json":
        path.write_text(json.dumps([json.loads(line) for line in lines.splitlines()], indent=2))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif suffix == ".jsonl.zst":  # two frames: both must be read
        middle = lines.index(b"\n", len(lines) // 2) + 1
        path.write_bytes(b"".join(zstandard.compress(half) for half in (lines[:middle], lines[middle:])))
    else:
        path.write_bytes(lines)
    return path


def own(*files: Path, **settings: Any) -> TextSource:
    return TextSource(name="own", files=tuple(map(str, files)), **settings)


ROW_FORMATS = (".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".json", ".csv")


@pytest.mark.parametrize("suffix", ROW_FORMATS)
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    assert list(text_documents(own(write_format(tmp_path, suffix)))) == TEXTS


@pytest.mark.parametrize("suffix", [*ROW_FORMATS, ".txt"])
def test_reading_from_any_place_gives_the_rest(tmp_path: Path, suffix: str) -> None:
    if suffix == ".txt":
        (tmp_path / "data.txt").write_text("\n\n".join(TEXTS * 3))
    else:
        write_format(tmp_path, suffix)
    (tmp_path / "more.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    files = local_files([str(tmp_path)])
    pick = corpora.column_picker(own(tmp_path))
    whole = places(read_rows(files, (0, 0), pick))
    assert [place for place, _ in whole][-2:] == [(1, 0), (1, 1)]
    assert [place[1] for place, _ in whole[:-2]] == list(range(len(whole) - 2))
    for i in {0, 1, len(whole) // 2, len(whole) - 2, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 4)}:
        assert places(read_rows(files, whole[i][0], pick)) == whole[i:]
    shares = [rows.share for rows in read_rows(files, (0, 0), pick)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def places(batches: Iterator[Rows]) -> list[tuple[tuple[int, int], Any]]:
    return [((rows.file, rows.first + i), item) for rows in batches for i, item in enumerate(rows.items)]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_long_text_files_are_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path, suffix: str) -> None:
    text = "\n\n".join(TEXTS * 2)
    (tmp_path / f"book{suffix}").write_text(text)
    pieces = list(text_documents(own(tmp_path / f"book{suffix}")))
    assert len(pieces) > 3
    assert "\n\n".join(pieces) == text
    assert max(map(len, pieces)) < 2 * corpora.PIECE_CHARS


def test_files_are_found_by_name_folder_and_glob_each_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.md", ".hidden.txt", "notes.docx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')
    found = [
        Path(f.path).name for f in local_files([str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "b.jsonl")])
    ]
    assert found == ["a.txt", "b.jsonl", "c.md"]


@pytest.mark.parametrize(
    ("make", "asked", "message"),
    [
        ({}, "none.parquet", "There is no file"),
        ({"x.docx": ""}, "x.docx", "cannot be read: give .parquet"),
        ({"x.docx": ""}, ".", "holds no file that can be read"),
        ({}, "*.jsonl", "There is no file"),
    ],
)
def test_files_that_cannot_be_used_are_a_users_error(tmp_path: Path, make: dict, asked: str, message: str) -> None:
    for name, text in make.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        local_files([str(tmp_path / asked)])


def test_text_column_is_guessed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "content": "hello", "url": "x"}\n')
    assert list(text_documents(own(tmp_path))) == ["hello"]
    assert "'content'" in capsys.readouterr().out
    assert list(text_documents(own(tmp_path, column="url"))) == ["x"]


@pytest.mark.parametrize(("column", "message"), [("nope", "no column 'nope'"), (None, "cannot tell which column")])
def test_unclear_text_column_lists_the_columns(tmp_path: Path, column: str | None, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "a", "story": "b"}\n')
    with pytest.raises(UserError, match=rf"{message}.*title, story"):
        list(text_documents(own(tmp_path, column=column)))


# --------------------------------------------------------------------------------------- damaged input


def dropped(path: Path) -> tuple[list[str], list[tuple[int, str]]]:
    """The texts that are kept, and row and reason of those that are not."""
    kept, lost = [], []
    source = own(path)
    for rows in read_rows(local_files(source.files), (0, 0), corpora.column_picker(source)):
        for i, item in enumerate(rows.items):
            data = corpora.as_bytes(item)
            bad = data if isinstance(data, Bad) else corpora.unfit(data, DataConfig(text_files=("x",), min_chars=3))
            if bad:
                lost.append((rows.first + i, bad.reason))
            else:
                kept.append(data.decode())
    return kept, lost


def test_bad_lines_of_jsonl_are_counted_by_row_and_the_rest_kept(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good one"}',
        b'{"text": "cut',
        b'{"text": null}',
        b'{"text": 7}',
        b'{"text": "\xff\xfe bad"}',
        b'{"other": "x"}',
        b'{"text": "nul \\u0000 inside"}',
        b'{"text": "lone \\ud800 surrogate"}',
        b"",
        b'["no", "object"]',
        b'{"text": "good two"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    kept, lost = dropped(tmp_path / "a.jsonl")
    assert kept == ["good one", "good two"]
    assert lost == [
        (1, "not JSON"),
        (2, "null"),
        (3, "wrong type in column"),
        (4, "invalid UTF-8"),
        (5, "column is missing"),
        (6, "NUL bytes"),
        (7, "invalid UTF-8"),
        (8, "empty line"),
        (9, "not an object with columns"),
    ]


def test_bad_rows_of_parquet_are_counted_by_row_and_the_rest_kept(tmp_path: Path) -> None:
    raw = pa.array([b"good one", None, b"\xff\xfe bad", b"nul \0 inside", b"good two"], pa.binary())
    text = pa.StringArray.from_buffers(5, *raw.buffers()[1:], raw.buffers()[0])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    kept, lost = dropped(tmp_path / "a.parquet")
    assert kept == ["good one", "good two"]
    assert lost == [(1, "null"), (2, "invalid UTF-8"), (3, "NUL bytes")]


def test_column_of_numbers_is_reported_and_not_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert dropped(tmp_path / "a.parquet") == ([], [(0, "wrong type in column"), (1, "wrong type in column")])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.zst", ".jsonl.gz", ".json"])
def test_file_cut_short_is_reported_and_what_came_before_is_kept(tmp_path: Path, suffix: str) -> None:
    path = write_format(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    kept, lost = dropped(path)
    assert len(lost) == 1
    assert lost[0][1] in ("unreadable file", "not JSON")
    assert kept == TEXTS[: len(kept)]
    assert bool(kept) == (suffix != ".parquet")  # its index stands at the end


def test_damaged_row_group_is_counted_and_the_others_kept(tmp_path: Path) -> None:
    path = write_format(tmp_path, ".parquet")
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\x55" * column.total_compressed_size
    path.write_bytes(data)
    kept, lost = dropped(path)
    assert kept == TEXTS[:150] + TEXTS[300:]
    assert lost == [(row, "unreadable rows") for row in range(150, 300)]


def test_empty_file_is_reported_and_the_next_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_text('{"text": "good one"}')
    assert dropped(tmp_path) == (["good one"], [(0, "empty file")])


# ------------------------------------------------------------------------------------------- cleaning


def slow_share(text: bytes) -> float:
    """The obvious way: count each line."""
    lines = Counter(line for line in text.split(b"\n") if line)
    return max((len(line) * n for line, n in lines.items() if n > 1), default=0) / max(1, len(text))


def test_repeated_line_share_equals_counting_each_line() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        lines = [draw.choice("ab") * draw.randint(0, 9) for _ in range(draw.randint(1, 8))]
        text = "\n".join(lines).encode()
        if not text:
            continue
        assert repeated_line_share(text) == slow_share(text)
        above = draw.random()
        assert (repeated_line_share(text, above) > above) == (slow_share(text) > above), text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a real sentence, long enough to be of use to somebody who reads", None),
        ("short", "too short"),
        (" " * 100 + "short", "too short"),
        ("buy now! " * 9 + "\n" + ("click here\n" * 50), "mostly one repeated line"),
        ("\x01\x02\x03\x04" * 40, "not text"),
        ("\ufffd" * 100, "not text"),
        ("nul\0" * 40, "NUL bytes"),
    ],
)
def test_unfit_documents_are_dropped_for_the_right_reason(text: str, reason: str | None) -> None:
    bad = corpora.unfit(text.encode(), DataConfig(text_files=("x",), min_chars=16))
    assert (bad.reason if bad else None) == reason


def test_seen_knows_what_a_set_knows() -> None:
    draw = random.Random(0)
    keys = [draw.getrandbits(64) for _ in range(60_000)] + [0, 1, 2**64 - 1]
    seen, known = Seen(), set()
    for key in draw.choices(keys, k=150_000):
        assert seen.add(key) == (key in known or (key <= 1 and bool({0, 1} & known)))
        known.add(key)
    assert seen.n >= len(known) - 1


def test_seen_stops_growing_at_its_limit_and_says_so() -> None:
    seen = Seen(limit=100)
    for key in range(1, 200):
        seen.add(key)
    assert (seen.n, seen.n_forgotten) == (100, 99)
    assert seen.add(100)
    assert not seen.add(150)


def test_near_duplicates_are_found_and_others_are_not() -> None:
    pytest.importorskip("datasketch", reason="needs the extra near-duplicates")
    draw = random.Random(0)
    words = [f"word{i}" for i in range(2000)]
    documents = [" ".join(draw.choices(words, k=300)) for _ in range(50)]
    near = corpora.NearDuplicates(0.7)
    assert not any(near.add(text.encode()) for text in documents)
    changed = [text.replace(text.split()[100], "changed", 1) for text in documents]
    assert sum(near.add(text.encode()) for text in changed) >= 48


def test_near_duplicates_without_the_package_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="uv run --extra near-duplicates"):
        corpora.NearDuplicates(0.8)


# -------------------------------------------------------------------------------------- reading ahead


def test_reading_ahead_keeps_the_order_and_passes_errors_on() -> None:
    def batches() -> Iterator[Rows]:
        for i in range(10):
            yield Rows(0, "x", i, [i])
        raise UserError("broken")

    seen = []
    with pytest.raises(UserError, match="broken"):
        seen.extend(rows.first for rows in corpora.ahead(batches()))
    assert seen == list(range(10))


def test_reading_ahead_closes_its_source_when_nobody_reads_on() -> None:
    closed = []

    def batches() -> Iterator[Rows]:
        try:
            for i in range(10**9):
                yield Rows(0, "x", i, [i])
        finally:
            closed.append(True)

    stream = corpora.ahead(batches())
    assert next(stream).first == 0
    stream.close()
    assert closed == [True]


# -------------------------------------------------------------------------------------- conversations

THOUGHT = {"role": "system", "content": corpora.REASONING_PROMPT, "thinking": None}


def said(*turns: tuple[str, str] | tuple[str, str, str]) -> list[dict]:
    return [{"role": t[0], "content": t[1], "thinking": t[2] if len(t) > 2 else None} for t in turns]


LAYOUTS = {
    "alpaca": ({"instruction": "Add.", "input": "", "output": "3"}, said(("user", "Add."), ("assistant", "3"))),
    "alpaca with input": (
        {"instruction": "Add.", "input": "1 + 2", "output": "3", "text": "Below is …"},
        said(("user", "Add.\n\n1 + 2"), ("assistant", "3")),
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ann sings.", "response": "Ann.", "category": "closed_qa"},
        said(("user", "Who?\n\nAnn sings."), ("assistant", "Ann.")),
    ),
    "input and response": (
        {"instruction": "Add.", "input": "1 + 2", "response": "3"},
        said(("user", "Add.\n\n1 + 2"), ("assistant", "3")),
    ),
    "prompt and completion": (
        {"prompt": "Say a", "completion": "a", "task": "t"},
        said(("user", "Say a"), ("assistant", "a")),
    ),
    "prompt in Alpaca's frame": (
        {"prompt": "Below …\n\n### Instruction:\nSay a\n\n### Input:\nb\n\n### Response:\n", "response": "a"},
        said(("user", "Say a\n\nb"), ("assistant", "a")),
    ),
    "messages": (
        {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]},
        said(("user", "hi"), ("assistant", "yes?")),
    ),
    "from and value": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}]},
        said(("user", "hi"), ("assistant", "yes?")),
    ),
    "last question without an answer": (
        {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]},
        said(("user", "a"), ("assistant", "b")),
    ),
    "thought spelt in the text": (
        {"prompt": "1+1?", "completion": "<think>\nTwo.\n</think>\n\n2"},
        [THOUGHT, *said(("user", "1+1?"), ("assistant", "2", "Two."))],
    ),
    "thought as a part": (
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "value": "Be kind."}]},
                {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "Two."}, {"type": "text", "value": "2"}],
                },
            ]
        },
        said(("system", "Be kind."), ("user", "1+1?"), ("assistant", "2", "Two.")),
    ),
    "gsm8k": (
        {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24.\n#### 24"},
        [THOUGHT, *said(("user", "Half of 48?"), ("assistant", "24", "48/2 = 24."))],
    ),
    "problem and solution": (
        {"problem": "1+1?", "solution": "Count: 2.", "answer": "2"},
        [THOUGHT, *said(("user", "1+1?"), ("assistant", "2", "Count: 2."))],
    ),
    "verified generation": (
        {
            "problem": "1+1?",
            "solution": "Count: 2.",
            "answer": "2",
            "generations": [
                "<think>no</think>3",
                "<think>long" + "x" * 99 + "</think>It is 2",
                "<think>so</think>So 2",
            ],
            "correctness_math_verify": [False, True, True],
        },
        [THOUGHT, *said(("user", "1+1?"), ("assistant", "So 2", "so"))],
    ),
    "transcript": (
        {"text": "### Human: Who? ### Assistant: Ann."},
        said(("user", "Who?"), ("assistant", "Ann.")),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_recognised_by_its_columns(name: str) -> None:
    row, expected = LAYOUTS[name]
    assert conversation(row, 60) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"a": 1}, "unknown layout"),
        ({"instruction": "x", "output": None}, "unknown layout"),
        ({"instruction": "x", "output": 7}, "malformed row"),
        ({"messages": "text"}, "malformed row"),
        ({"messages": []}, "no question with an answer"),
        ({"instruction": "x", "output": " "}, "empty turn"),
        ({"prompt": "x", "completion": "<think>never ends"}, "unfinished thought"),
        ({"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}, "tool use"),
        ({"text": "plain prose"}, "unknown layout"),
        ("no dict", "unknown layout"),
    ],
)
def test_row_that_cannot_be_used_has_a_reason(row: Any, reason: str) -> None:
    found = conversation(row)
    assert isinstance(found, Bad)
    assert found.reason == reason


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
    rows = [item for rows in read_rows(files, (0, 0), corpora.whole_rows) for item in rows.items]
    found = list(corpora.conversations(ChatSource(files=(str(data_folder / name),))))
    assert len(found) >= REAL_CHAT[name] * len(rows)
    assert not any("####" in m["content"] or "<<" in m["content"] for talk in found for m in talk if "gsm8k" in name)


def test_hub_file_that_gives_less_than_asked_is_a_network_failure() -> None:
    file = corpora._HubFile.__new__(corpora._HubFile)
    file._file, file.size, file.failure = io.BytesIO(b"half"), 8, None
    with pytest.raises(OSError, match="4 bytes came instead of 8"):
        file.read(8)
    assert isinstance(file.failure, corpora.NetworkFailure)
    file.close()


def test_hub_columns_hold_the_text_of_the_real_schemas(data_folder: Path) -> None:
    for name in ("fineweb_edu_sample10BT_schema", "open_web_math_schema"):
        source = own(data_folder / "schemas" / f"{name}.parquet")
        expected = pq.read_table(source.files[0], columns=["text"]).column(0).to_pylist()
        assert list(text_documents(source)) == expected

"""Files: every row of every format is read once, from any place on; what is damaged is told by file
and row.
"""

import csv
import gzip
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from config import DataConfig, TextSource, UserError
from hearth.data import readers
from hearth.data.cleaning import Rejected, as_bytes, unfit
from hearth.data.hub import HubFile, NetworkFailure
from hearth.data.readers import Rows, local_files, read_rows
from hearth.data.sources import column_picker, text_documents

TEXTS = [
    f"Document {i} — naïve café 🎉, with {'many words ' * (i % 40)}and an end." for i in range(600)
]


def write_format(folder: Path, suffix: str, texts: list[str] = TEXTS) -> Path:
    """The texts as a file of one of the formats that hold rows."""
    path = folder / f"data{suffix}"
    lines = "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)
    ).encode()
    if suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=150)
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    elif suffix == ".json":
        path.write_text(json.dumps([json.loads(line) for line in lines.splitlines()], indent=2))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif suffix == ".jsonl.zst":  # two frames: both must be read
        middle = lines.index(b"\n", len(lines) // 2) + 1
        path.write_bytes(
            b"".join(zstandard.compress(half) for half in (lines[:middle], lines[middle:]))
        )
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
    pick = column_picker(own(tmp_path))
    whole = places(read_rows(files, (0, 0), pick))
    assert [place for place, _ in whole][-2:] == [(1, 0), (1, 1)]
    assert [place[1] for place, _ in whole[:-2]] == list(range(len(whole) - 2))
    for i in {
        0,
        1,
        len(whole) // 2,
        len(whole) - 2,
        len(whole) - 1,
        *random.Random(0).sample(range(len(whole)), 4),
    }:
        assert places(read_rows(files, whole[i][0], pick)) == whole[i:]
    shares = [rows.share for rows in read_rows(files, (0, 0), pick)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def places(batches: Iterator[Rows]) -> list[tuple[tuple[int, int], Any]]:
    return [
        ((rows.file, rows.first + i), item) for rows in batches for i, item in enumerate(rows.items)
    ]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_long_text_files_are_cut_at_blank_lines_and_nothing_is_lost(
    tmp_path: Path, suffix: str
) -> None:
    text = "\n\n".join(TEXTS * 2)
    (tmp_path / f"book{suffix}").write_text(text)
    pieces = list(text_documents(own(tmp_path / f"book{suffix}")))
    assert len(pieces) > 3
    assert "\n\n".join(pieces) == text
    assert max(map(len, pieces)) < 2 * readers.PIECE_CHARS


def test_files_are_found_by_name_folder_and_glob_each_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.md", ".hidden.txt", "notes.docx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')
    found = [
        Path(f.path).name
        for f in local_files([str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "b.jsonl")])
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
def test_files_that_cannot_be_used_are_a_users_error(
    tmp_path: Path, make: dict, asked: str, message: str
) -> None:
    for name, text in make.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        local_files([str(tmp_path / asked)])


# ------------------------------------------------------------------------------------ damaged input


def dropped(path: Path) -> tuple[list[str], list[tuple[int, str]]]:
    """The texts that are kept, and row and reason of those that are not."""
    kept, lost = [], []
    source = own(path)
    for rows in read_rows(local_files(source.files), (0, 0), column_picker(source)):
        for i, item in enumerate(rows.items):
            data = as_bytes(item)
            bad = (
                data
                if isinstance(data, Rejected)
                else unfit(data, DataConfig(text_files=("x",), min_chars=3))
            )
            if bad:
                lost.append((rows.first + i, bad.reason))
            else:
                kept.append(data.decode())
    return kept, lost


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_the_first_object_names_the_column_wherever_reading_begins(
    tmp_path: Path, suffix: str
) -> None:
    rows = [7, *({("text", "content", "other")[i % 3]: f"{i}"} for i in range(20))]
    path = tmp_path / f"a{suffix}"
    path.write_text("\n".join(map(json.dumps, rows)))
    files, pick = local_files([str(path)]), column_picker(own(path))
    whole = places(read_rows(files, (0, 0), pick))
    assert sum(isinstance(item, str) for _, item in whole) == 7
    for i in range(len(whole)):
        assert places(read_rows(files, (0, i), column_picker(own(path)))) == whole[i:]


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
    assert dropped(tmp_path / "a.parquet") == (
        [],
        [(0, "wrong type in column"), (1, "wrong type in column")],
    )


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.zst", ".jsonl.gz", ".json"])
def test_file_cut_short_is_reported_and_what_came_before_is_kept(
    tmp_path: Path, suffix: str
) -> None:
    path = write_format(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    kept, lost = dropped(path)
    assert len(lost) == 1
    assert lost[0][1] in ("unreadable file", "unreadable rest of file")
    assert kept == TEXTS[: len(kept)]
    # the index of a parquet file stands at its end
    assert len(kept) >= (0 if suffix == ".parquet" else 280)


@pytest.mark.parametrize(
    "error", [pa.ArrowNotImplementedError("x"), csv.Error("x"), OSError("x"), ValueError("x")]
)
def test_whatever_a_reader_raises_is_reported_and_the_next_file_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any) -> Iterator[list[Any]]:
        yield ["good one"]
        raise error

    monkeypatch.setitem(readers.READERS, ".csv", broken)
    (tmp_path / "a.csv").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "good two"}')
    assert dropped(tmp_path) == (["good one", "good two"], [(1, "unreadable file")])


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


BROKEN = (
    '{"text": "a quote " too many"}',
    '{"text": "no quote at the end}',
    '{"text": "no brace at the end"',
    '{"text": ["no bracket at the end"}',
    '{"text": "a line\nin a text"}',
    "oops",
    "{'text': 'x'}",
    '{"text": NULL}',
    '{"text": "x", "deep": ' + '{"a":' * 100_000 + "1",
)
FRAMES = {  # what stands around and between the objects of a .json file
    "lines": ("", "\n", "\n"),
    "array": ("[\n", ",\n", "\n]"),
    "array from its first line on": ("[", ",\n", "]"),
}


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_object_of_a_json_file_loses_itself_alone(
    tmp_path: Path, frame: str, broken: str
) -> None:
    begin, between, end = FRAMES[frame]
    for place in (0, 5, 20):
        rows = [json.dumps({"text": f"text {i}"}) for i in range(20)]
        (tmp_path / "a.json").write_text(
            begin + between.join([*rows[:place], broken, *rows[place:]]) + end
        )
        kept, lost = dropped(tmp_path / "a.json")
        assert kept == [f"text {i}" for i in range(20)]
        assert lost == [(place, "not JSON" if place < 20 else "unreadable rest of file")]


def test_parts_of_a_broken_object_are_no_rows(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "parts": [{"text": "part"}] * 3} for i in range(9)]
    text = json.dumps(rows, indent=2).replace('"text 4"', '"text" 4')
    (tmp_path / "a.json").write_text(text)
    kept, lost = dropped(tmp_path / "a.json")
    assert kept == [f"text {i}" for i in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert lost == [(4, "not JSON")]


def test_a_json_file_that_cannot_be_read_on_says_from_which_row(tmp_path: Path) -> None:
    rows = ", ".join(json.dumps({"text": f"text {i}"}) for i in range(20))
    (tmp_path / "a.json").write_text(f"[{rows}]".replace('"text 4"', '"text" 4'))
    (batch,) = read_rows(local_files([str(tmp_path)]), (0, 0), column_picker(own(tmp_path)))
    assert batch.items[:4] == [f"text {i}" for i in range(4)]
    reason = "from row 4 on: Expecting ',' delimiter"
    assert batch.items[4:] == [Rejected("unreadable rest of file", reason)]


@pytest.mark.parametrize("chars", [1, 2, 3, 7, 1 << 20])
def test_a_json_file_gives_the_same_whatever_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chars: int
) -> None:
    values = ['\\ " \ud83c\udf89 \n', -1.25e-7, 123, True, None, float("-inf"), {}, ["a", {}]]
    good = json.dumps([{"text": value, "x": values} for value in values], indent=2)
    lines = [json.dumps({"text": value}) for value in values]
    broken = "\n".join([*lines, *BROKEN[:-1], *lines, " 12", "34.5e1", "nul", '{"text": "c'])
    items = {}
    for n_chars in (1 << 20, chars):
        monkeypatch.setattr(readers, "JSON_CHARS", n_chars)
        found = []
        for number, text in enumerate((good, broken)):
            path = tmp_path / f"{number}.json"
            path.write_text(text)
            found += places(read_rows(local_files([str(path)]), (0, 0), lambda _: None))
        items[n_chars] = found
    assert items[chars] == items[1 << 20]
    assert [item for _, item in items[chars]][: len(values)] == json.loads(good)


def test_of_a_json_file_only_a_block_is_held_past_a_broken_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    class Watched(readers._Window):
        def read_more(self) -> None:
            super().read_more()
            held.append(len(self.text))

    monkeypatch.setattr(readers, "_Window", Watched)
    monkeypatch.setattr(readers, "JSON_CHARS", 1000)
    rows = [json.dumps({"text": f"text {i}"}) for i in range(2000)]
    (tmp_path / "a.json").write_text("\n".join([BROKEN[0], *rows]))
    assert len(dropped(tmp_path / "a.json")[0]) == 2000
    assert max(held) < 3000


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz"])
def test_damaged_compressed_file_is_reported_and_what_came_before_is_kept(
    tmp_path: Path, suffix: str
) -> None:
    draw = random.Random(0)
    # nothing to compress
    texts = [" ".join(str(draw.random()) for _ in range(50)) for _ in range(600)]
    path = write_format(tmp_path, suffix, texts)
    data = bytearray(path.read_bytes())
    start = len(data) * 2 // 3
    data[start : start + 1000] = b"\x55" * 1000
    path.write_bytes(data)
    kept, lost = dropped(path)
    assert lost[-1][1] == "unreadable file"
    assert kept[:100] == texts[:100]


@pytest.mark.parametrize("empty", ["nothing", "no rows", "no lines"])
def test_empty_file_is_reported_and_the_next_is_read(tmp_path: Path, empty: str) -> None:
    if empty == "no rows":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.csv").write_text("text,id\n" if empty == "no lines" else "")
    (tmp_path / "b.jsonl").write_text('{"text": "good one"}')
    assert dropped(tmp_path) == (["good one"], [(0, "empty file")])


def test_bad_rows_of_csv_are_counted_by_row_and_the_rest_kept(tmp_path: Path) -> None:
    lines = [
        b"id,text",
        b"1,good one,,",
        b"2",
        b"3,\xff\xfe bad",
        b"4,nul \0 inside",
        b"5,a comma, and more",
        '6,"gööd ""two""\nover lines"'.encode(),
    ]
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines))
    kept, lost = dropped(tmp_path / "a.csv")
    assert kept == ["good one", 'gööd "two"\nover lines']
    assert lost == [
        (1, "null"),
        (2, "invalid UTF-8"),
        (3, "NUL bytes"),
        (4, "more fields than the header"),
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_header_of_csv_tells_what_separates_fields(tmp_path: Path, separator: str) -> None:
    texts = ["plain words", "a comma, a semicolon; and a\ttab"]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([["text", "a, b; or c", "id"], *([text, "x", "1"] for text in texts)])
    assert dropped(tmp_path / "a.csv") == (texts, [])


def test_csv_is_read_where_a_long_of_c_has_32_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limit(size: int) -> None:
        if size >= 2**31:
            raise OverflowError("Python int too large to convert to C long")

    monkeypatch.setattr(csv, "field_size_limit", limit)
    (tmp_path / "a.csv").write_text("text\ngood one\n")
    assert dropped(tmp_path / "a.csv") == (["good one"], [])


ACCENTS = "Été à Noël: “ça va”, dit le garçon — 20 €.\n"


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8", ""),
        ("utf-8-sig", ""),
        ("utf-16", "UTF-16"),
        ("cp1252", "read as Latin-1, for it is not UTF-8"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".csv"])
def test_text_of_the_usual_encodings_is_read_and_named(
    tmp_path: Path, suffix: str, encoding: str, said: str
) -> None:
    path = tmp_path / f"a{suffix}"
    head, lines = ("text\n", 40_000) if suffix == ".csv" else ("", 800)
    plain = "plain words, "  # what is not ASCII comes after the first megabyte, and once in a long
    text = (plain * 10 + "\n") * (lines // 4) + (plain * 5 + ACCENTS) * 20
    if suffix == ".csv":
        text = text.replace(",", ";")
    path.write_bytes((head + text).encode(encoding))
    rows = list(read_rows(local_files([str(path)]), (0, 0), column_picker(own(path))))
    found = [item for r in rows for item in r.items]
    if suffix == ".csv":
        assert found[-1] == (plain * 5 + ACCENTS).replace(",", ";").strip()
        assert len(found) == text.count("\n")
    else:
        assert "".join(piece + "\n" for piece in found) == text
    column = "column 'text'" if suffix == ".csv" else "text in pieces"
    assert {r.read_as for r in rows} == {", ".join(filter(None, (column, said)))}


def test_a_few_wrong_bytes_in_utf8_do_not_make_it_latin1(tmp_path: Path) -> None:
    """The piece with the damage is lost, and nothing is read as other letters than it has."""
    text = "".join(f"{i}{ACCENTS}" + "\n" * (i % 20 == 0) for i in range(2000)).encode()
    (tmp_path / "a.txt").write_bytes(text[:100] + b"\xff" + text[100:])
    kept, lost = dropped(tmp_path / "a.txt")
    assert lost == [(0, "invalid UTF-8")]
    assert kept
    assert set("".join(kept)) == {*ACCENTS, *"013456789"}


def test_a_picture_called_a_text_is_not_taken_for_latin1(tmp_path: Path) -> None:
    draw = random.Random(0)
    (tmp_path / "a.txt").write_bytes(bytes(draw.randrange(1, 256) for _ in range(5000)))
    assert dropped(tmp_path / "a.txt")[0] == []


@pytest.mark.parametrize("size", [readers.PIECE_CHARS, readers.PIECE_CHARS + 1])
def test_rows_of_a_long_text_file_belong_to_one_document(tmp_path: Path, size: int) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(("word " * 30 + "\n\n") * 600)
    (tmp_path / "c.txt").write_text("x" * size)
    (tmp_path / "d.jsonl").write_text('{"text": "' + "y " * size + '"}')
    found: dict[str, set[int | None]] = {}
    for rows in read_rows(local_files([str(tmp_path)]), (0, 0), column_picker(own(tmp_path))):
        found.setdefault(Path(rows.name).name, set()).add(rows.document)
    assert found["a.txt"] == found["b.txt"]
    assert len(found["a.txt"]) == 1
    assert None not in found["a.txt"]
    assert (found["c.txt"] == {None}) == (size == readers.PIECE_CHARS)
    assert found["d.jsonl"] == {None}


def test_a_folder_that_holds_runs_is_read_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b/config.json", "runs/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = [file.path for file in local_files([str(tmp_path)])]
    for name in ("runs/mine/config.json", "runs/mine/report/score.json", "runs/tasks/copa.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "runs/mine/lock").touch()
    assert [file.path for file in local_files([str(tmp_path)])] == before
    monkeypatch.chdir(tmp_path)
    assert [file.path for file in local_files(["."])] == [
        "a.txt",
        "b/config.json",
        "runs/notes.txt",
    ]


def test_what_a_folder_holds_besides_is_named_and_hidden_files_are_not(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "b.pdf", "c", ".hidden", ".git/d.txt"):
        (tmp_path / name).write_text("word")
    skipped: list[Path] = []
    files = local_files([str(tmp_path)], skipped)
    assert [Path(file.path).name for file in files] == ["a.txt"]
    assert [path.name for path in skipped] == ["b.pdf", "c"]


def test_hub_file_that_gives_less_than_asked_is_a_network_failure() -> None:
    file = HubFile.__new__(HubFile)
    file._file, file.size, file.failure = io.BytesIO(b"half"), 8, None
    with pytest.raises(OSError, match="4 bytes came instead of 8"):
        file.read(8)
    assert isinstance(file.failure, NetworkFailure)
    file.close()


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".json", ".csv", ".parquet"]
)
def test_a_network_that_breaks_off_is_told_apart_from_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    draw = random.Random(0)
    # nothing to compress
    texts = [" ".join(str(draw.random()) for _ in range(50)) for _ in range(5000)]
    path = write_format(tmp_path, suffix, texts)
    attempts = iter((0.5, 0.8, 1.0))  # of the file's bytes come before the network breaks off

    class Flaky(io.FileIO):
        def __init__(self, address: str, size: int) -> None:
            super().__init__(path)
            self.failure, self.end = None, size * next(attempts)

        def readinto(self, buffer: Any) -> int:
            stop = min(self.tell() + len(buffer), path.stat().st_size)
            if self.end < stop < path.stat().st_size - 5000:  # where a parquet file has its index
                self.failure = NetworkFailure("broken off")
                raise OSError("broken off")
            return super().readinto(buffer)

        def read(self, size: int = -1) -> bytes:
            data = bytearray(size)
            return bytes(data[: self.readinto(data)])

    monkeypatch.setattr(readers, "HubFile", Flaky)
    files = [readers.SourceFile(f"hf://set/data{suffix}", path.stat().st_size)]
    found, cursor, places = [], (0, 0), []
    while True:
        try:
            for rows in read_rows(files, cursor, column_picker(own(path))):
                found += rows.items
                cursor = (rows.file, rows.first + len(rows.items))
            break
        except NetworkFailure:
            places.append(cursor[1])
    assert len(places) == 2
    assert 0 < places[0] < places[1] < len(texts)
    assert [text.decode() if isinstance(text, bytes) else text for text in found] == texts

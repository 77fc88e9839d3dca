"""Bringing corpora into shards: no document lost or twice, whatever happens on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import stages
from hub_server import Fault, Hub, write_set

import create_shard
import sft
from config import FINE_TUNING, PRESETS, ChatSource, Config, TextSource, UserError
from hearth import run, storage
from hearth.data import ingest, problems, shard_folder, sources, text_shards
from hearth.data.layouts import normalised
from hearth.data.shard_folder import SPLITS, InputsChanged

WORDS = [
    "river",
    "stone",
    "light",
    "house",
    "green",
    "seven",
    "apple",
    "morning",
    "paper",
    "winter",
    "music",
    "garden",
    "table",
    "window",
]


def make_texts(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [
        f"{seed} {i}: " + " ".join(draw.choices(WORDS, k=draw.randint(20, 400))) for i in range(n)
    ]


TEXTS = make_texts(1500)  # 2.1 MB: three shards at a megabyte each
TALKS = [
    {"instruction": f"What comes after {i}?", "input": "", "output": f"{i + 1} does."}
    for i in range(300)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of text with a duplicate, a null and a bad line among them, and one of
    conversations.
    """
    folder = tmp_path_factory.mktemp("input")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[100:100] = ["{broken", '{"text": null}', lines[7]]
    lines.append(lines[8])  # far behind, in another shard
    (folder / "text").mkdir()
    (folder / "text/a.jsonl").write_text("\n".join(lines[:800]))
    (folder / "text/b.jsonl").write_text("\n".join(lines[800:]))
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in TALKS))
    return folder


def configured(runs: Path, files: Path, **data: object) -> Config:
    demo = PRESETS["demo"]
    chat = (ChatSource(name="talks", files=(str(files / "chat.jsonl"),)),)
    settings = {"text_files": (str(files / "text"),), "shard_mb": 1} | data
    return replace(
        demo,
        runs=str(runs),
        data=replace(demo.data, **settings),
        **{name: replace(getattr(demo, name), sources=chat) for name in FINE_TUNING},
    )


def make(config: Config, *, verify: bool = False) -> Path:
    create_shard.main(config, create_shard.Options(verify=verify))
    return config.run_dir / "text"


def texts_of(folder: Path, split: str) -> list[str]:
    return [
        text
        for batch in text_shards.read_text_batches(folder, split, "x")
        for text in batch.column(0).to_pylist()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of an unbroken run."""
    return make(configured(tmp_path_factory.mktemp("unbroken"), files))


def copy(made: Path, to: Path) -> Path:
    """A finished run under `to` as its runs folder."""
    stages.copy_run(made.parent, to / "demo", "text")
    return to / "demo" / "text"


# ----------------------------------------------------------------------------------- what comes out


def test_every_document_is_there_once(made: Path) -> None:
    out = texts_of(made / "own", "train") + texts_of(made / "own", "validation")
    assert Counter(out) == Counter(TEXTS)
    assert len(list((made / "own").glob("train-*.arrow"))) >= 2


def test_dropped_documents_are_counted_with_file_and_row(made: Path) -> None:
    manifest = json.loads((made / "own/manifest.json").read_text())
    assert manifest["dropped"] == {"not JSON": 1, "null": 1, "duplicate": 2}
    examples = [json.loads(line) for line in (made / "own/dropped.jsonl").read_text().splitlines()]
    assert [(Path(e["file"]).name, e["row"], e["reason"]) for e in examples] == [
        ("a.jsonl", 100, "not JSON"),
        ("a.jsonl", 101, "null"),
        ("a.jsonl", 102, "duplicate"),
        ("b.jsonl", 703, "duplicate"),
    ]


def test_conversations_are_there_once(made: Path) -> None:
    found = [
        m
        for split in shard_folder.SPLITS
        for m in sources.read_conversations(made / "chat/talks", split)
    ]
    assert sorted(m[0]["content"] for m in found) == sorted(row["instruction"] for row in TALKS)
    assert all([m["role"] for m in talk] == ["user", "assistant"] for talk in found)


def test_shards_open_memory_mapped_in_datasets(made: Path) -> None:
    from datasets import Dataset

    dataset = Dataset.from_file(str(made / "own/train-00000.arrow"))
    assert dataset[0]["text"] == texts_of(made / "own", "train")[0]


def test_validation_documents_stay_the_same_and_never_train(
    files: Path, made: Path, tmp_path: Path
) -> None:
    held_out = set(texts_of(made / "own", "validation"))
    assert 0 < len(held_out) < 0.1 * len(TEXTS)
    turned = (str(files / "text/b.jsonl"), str(files / "text/a.jsonl"))
    other = make(configured(tmp_path, files, text_files=turned, shard_mb=3))
    assert set(texts_of(other / "own", "validation")) == held_out
    for folder in (made, other):
        assert not held_out & set(texts_of(folder / "own", "train"))


def test_duplicates_are_dropped_across_corpora(files: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in [*TEXTS[:50], *make_texts(60, 5)]]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    sources = (
        TextSource(name="first", files=(str(files / "text"),)),
        TextSource(name="second", files=(str(tmp_path / "c.jsonl"),)),
    )
    text = make(configured(tmp_path, files, text_files=(), sources=sources))
    second = texts_of(text / "second", "train") + texts_of(text / "second", "validation")
    assert Counter(second) == Counter(make_texts(60, 5))


def test_budget_of_bytes_stops_at_the_document_that_reaches_it(files: Path, tmp_path: Path) -> None:
    sources = (TextSource(name="some", files=(str(files / "text"),), max_bytes=300_000),)
    text = make(configured(tmp_path, files, text_files=(), sources=sources)) / "some"
    out = Counter(texts_of(text, "train") + texts_of(text, "validation"))
    n = len(out)
    assert out == Counter(TEXTS[:n])
    assert sum(map(len, TEXTS[: n - 1])) < 300_000 <= sum(map(len, TEXTS[:n]))


def test_corpus_without_held_out_documents_holds_out_the_lowest_hash(
    files: Path, tmp_path: Path
) -> None:
    few = make_texts(5, 9)
    for name, texts in (("a", few), ("b", few[::-1])):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in texts)
        )
        config = configured(tmp_path / name, files, text_files=(str(tmp_path / f"{name}.jsonl"),))
        text = make(replace(config, data=replace(config.data, validation_share=1e-6))) / "own"
        assert len(texts_of(text, "validation")) == 1
        assert sorted(texts_of(text, "train") + texts_of(text, "validation")) == sorted(few)
    assert texts_of(text, "validation") == texts_of(tmp_path / "a/demo/text/own", "validation")


@pytest.mark.parametrize("note", [2, 3])  # whose hashes are higher than the book's
def test_a_document_that_is_most_of_the_text_is_not_held_out(
    files: Path, tmp_path: Path, note: int
) -> None:
    book = "\n\n".join(make_texts(3000, 5))
    (tmp_path / "book.txt").write_text(book)
    (tmp_path / "note.txt").write_text(f"A note of its own, number {note}, beside a book. " * 3)
    config = configured(tmp_path, files, text_files=(str(tmp_path / "*.txt"),))
    train = texts_of(make(config) / "own", "train")
    assert sum(map(len, train)) > len(book) / 2


def test_near_duplicates_are_dropped_as_an_option(files: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasketch", reason="needs the extra near-duplicates")
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randint(0, 5000)}" for _ in range(200)) for _ in range(30)]
    near = [text.replace(" ", " changed ", 1) for text in texts]
    (tmp_path / "n.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in texts + near)
    )
    text = (
        make(
            configured(
                tmp_path, files, text_files=(str(tmp_path / "n.jsonl"),), near_duplicates=0.7
            )
        )
        / "own"
    )
    assert json.loads((text / "manifest.json").read_text())["dropped"]["near-duplicate"] >= 28


def test_data_sheet_tells_source_licence_counts_and_losses(made: Path) -> None:
    sheet = (made / "own/README.md").read_text()
    for part in ("2 files", "licence", "1,500", "2 × duplicate", "Length of the documents", "#"):
        assert part in sheet
    assert sheet.count("\n- ") == 3 + 10


def test_data_sheet_counts_the_reasoning_taken(tmp_path: Path) -> None:
    rows = [
        {
            "problem": f"{i} + 1?",
            "solution": "s" * n,
            "answer": str(i),
            "generations": [f"<think>{'g' * n}</think>{i}"],
        }
        | {"correctness_math_verify": [i % 2 == 0]}
        for i, n in enumerate([20, 20, 50, 400] * 10)
    ]
    (tmp_path / "math.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = ChatSource(name="math", files=(str(tmp_path / "math.jsonl"),), max_chars=60)
    manifest = ingest.write_chat_shards(source, tmp_path / "math", 0.1)
    taken = {
        "the worked solution: none is verified": 10,
        "a verified generation": 10,
        "the worked solution: no verified generation is short enough": 10,
    }
    assert (manifest["reasoning"], manifest["dropped"]) == (taken, {"reasoning too long": 10})
    sheet = (tmp_path / "math/README.md").read_text()
    assert all(f"- {n} × {what}\n" in sheet for what, n in (taken | manifest["dropped"]).items())


def test_questions_of_test_sets_enter_no_training(tmp_path: Path) -> None:
    """GSM8K, multiple choice and chats alike: by what is asked, whatever the layout."""
    tests = [f"How many of the {n} ducks of farm number {n} lay an egg today?" for n in range(40)]
    other = [question.replace("ducks", "geese") for question in tests]
    (tmp_path / "gsm8k_test.jsonl").write_text(
        "".join(json.dumps({"question": q, "answer": "#### 3"}) + "\n" for q in tests[:20])
    )
    (tmp_path / "arc_test.jsonl").write_text(
        "".join(
            json.dumps({"query": f"Question: {q}", "choices": ["a"]}) + "\n" for q in tests[20:]
        )
    )
    rows: list[dict] = []
    for n, question in enumerate([*tests, *other]):
        asked = question.upper() if n % 2 else f"{question}  "
        rows.append(
            (
                {"question": asked, "answer": "It is 1+2 = <<1+2=3>>3.\n#### 3"},
                {"question": asked, "choices": ["three", "two"], "answer": 0},
                {"messages": [turn("user", f"Please:\n{asked}"), turn("assistant", "Three.")]},
            )[n % 3]
        )
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ChatSource("talks", files=(str(tmp_path / "chat.jsonl"),), calls=True)
    test_sets = [
        ChatSource(name, files=(str(tmp_path / f"{name}.jsonl"),))
        for name in ("gsm8k_test", "arc_test")
    ]
    folder = tmp_path / "out"
    manifest = ingest.write_chat_shards(source, folder, 0.1, exclude=test_sets)
    assert manifest["dropped"] == {"question of a test set": 40}
    kept = [t for split in SPLITS for t in sources.read_conversations(folder, split)]
    asked = {normalised(talk[0]["content"].splitlines()[0]) for talk in kept if len(talk) == 2}
    assert len(kept) == 40
    assert not {normalised(question) for question in tests} & asked
    with pytest.raises(InputsChanged, match="exclude"):
        ingest.write_chat_shards(source, folder, 0.1, exclude=test_sets[:1])
    (tmp_path / "gsm8k_test.jsonl").write_text('{"answer": "3"}\n')
    with pytest.raises(UserError, match="gsm8k_test: no question was found"):
        ingest.write_chat_shards(source, tmp_path / "again", 0.1, exclude=test_sets)


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def test_calls_come_back_from_the_shards_as_they_were(tmp_path: Path) -> None:
    source = ChatSource("units", made="units", max_rows=50)
    ingest.write_chat_shards(source, tmp_path / "units", 0.1)
    kept = [t for split in SPLITS for t in sources.read_conversations(tmp_path / "units", split)]
    made = [row["messages"][1]["content"] for row in problems.conversations("units", 50)]
    assert sorted(map(repr, (talk[1]["content"] for talk in kept))) == sorted(map(repr, made))
    assert all("parts" not in message for talk in kept for message in talk)


def test_plan_prints_sizes_and_makes_nothing(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_shard.main(configured(tmp_path / "runs", files), create_shard.Options(plan=True))
    out = capsys.readouterr().out
    assert "2.1 MB" in out
    assert "1.5k" in out
    assert "free" in out
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------- books, in pieces


def write_books(folder: Path, n: int, kilobytes: int = 120) -> Path:
    """`n` text files of many pieces each; a piece names its book in every paragraph."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        draw = random.Random(f"book {i}")
        paragraphs, size = [], 0
        while size < 1000 * kilobytes:
            paragraphs.append(f"<book{i}> " + " ".join(draw.choices(WORDS, k=150)))
            size += len(paragraphs[-1])
        (folder / f"{i:02}.txt").write_text("\n\n".join(paragraphs))
    return folder


def books_of(text: Path, split: str) -> set[str]:
    return {piece.split(">")[0] for piece in texts_of(text, split)}


def lines_about_books(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_the_pieces_of_a_book_land_on_one_side_whatever_the_order_and_the_shard_size(
    files: Path, tmp_path: Path
) -> None:
    books = write_books(tmp_path / "books", 16)
    names = sorted(map(str, books.iterdir()))
    held_out = []
    for number, (order, megabytes) in enumerate([(names, 1), (names[::-1], 3)]):
        config = configured(
            tmp_path / str(number),
            files,
            text_files=tuple(order),
            shard_mb=megabytes,
            validation_share=0.3,
        )
        text = make(config) / "own"
        held_out.append(books_of(text, "validation"))
        assert 0 < len(held_out[-1]) < 16
        assert not held_out[-1] & books_of(text, "train")
        assert len(held_out[-1] | books_of(text, "train")) == 16
        assert len(texts_of(text, "validation")) > 5 * len(held_out[-1])
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize("nth", range(1, 4))
def test_a_stop_in_the_middle_of_a_book_ends_with_the_same_bytes(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    books = str(write_books(tmp_path / "books", 3, kilobytes=1400))
    whole = make(configured(tmp_path / "whole", files, text_files=(books,), validation_share=0.45))
    commit, calls = shard_folder.ShardFolder.commit, iter(range(100))

    def stopping(folder: shard_folder.ShardFolder, unit: dict) -> None:
        if next(calls) == nth:
            raise KeyboardInterrupt
        commit(folder, unit)

    config = configured(tmp_path / "broken", files, text_files=(books,), validation_share=0.45)
    monkeypatch.setattr(shard_folder.ShardFolder, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(config)
    monkeypatch.undo()
    assert contents(make(config)) == contents(whole)


@pytest.mark.parametrize("n_books", [1, 3])
def test_a_damaged_shard_of_books_is_made_again_to_the_same_bytes(
    files: Path, tmp_path: Path, n_books: int
) -> None:
    books = str(write_books(tmp_path / "books", n_books, kilobytes=2600 // n_books))
    config = configured(tmp_path / "runs", files, text_files=(books,), validation_share=0.4)
    text = make(config)
    before = contents(text)
    names = sorted((text / "own").glob("*.arrow"))
    assert len(names) >= 4
    for name in names:
        name.unlink()
        make(config)
        assert contents(text) == before


@pytest.mark.parametrize("share", [1e-9, 0.3])
def test_a_lone_book_is_held_out_from_a_border_of_its_pieces_on(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    book = write_books(tmp_path / "books", 1, kilobytes=300) / "00.txt"
    whole = book.read_text()
    text = make(configured(tmp_path, files, text_files=(str(book),), validation_share=share))
    train, held_out = (texts_of(text / "own", split) for split in ("train", "validation"))
    assert "\n\n".join([*train, *held_out]) == whole
    assert len(held_out) == max(1, round(share * (len(train) + len(held_out))))
    said = lines_about_books(capsys)
    assert f"one document is all of this, so the last {len(held_out)} of" in said


def test_the_fallback_holds_out_one_whole_book(files: Path, tmp_path: Path) -> None:
    books = write_books(tmp_path / "books", 4)
    config = configured(tmp_path, files, text_files=(str(books),))
    for share in (1e-9, 1 - 1e-9):  # nothing held out by chance, and everything
        text = tmp_path / str(share)
        data = replace(config.data, validation_share=share)
        ingest.write_text_shards(data.corpora()[0], text, data)
        assert len(books_of(text, "validation")) == 1
        assert len(books_of(text, "train")) == 3
        assert not books_of(text, "validation") & books_of(text, "train")


# ---------------------------------------------------------------------------- what is said of files


def test_each_file_has_a_line_with_its_column_and_what_was_lost_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    rows = [json.dumps({"id": i, "story": text}) for i, text in enumerate(make_texts(20))]
    (mine / "a.jsonl").write_text("\n".join([*rows, "{broken"]))
    (mine / "b.txt").write_bytes(("Un été à Noël. " * 20).encode("latin-1"))
    (mine / "c.parquet").write_bytes(b"no parquet at all")
    (mine / "d.md").write_text("")
    (mine / "e.docx").write_text("word")
    config = configured(tmp_path / "runs", tmp_path, text_files=(str(mine),))
    source = config.data.corpora()[0]
    manifest = ingest.write_text_shards(source, tmp_path / "out", config.data)
    out = capsys.readouterr().out
    assert f"own: {mine}/a.jsonl: column 'story'; 20 kept, 1 lost" in out
    assert f"own: {mine}/b.txt: text, read as Latin-1, for it is not UTF-8; 1 kept, 0 lost" in out
    assert "skipped, not of a kind that can be read: e.docx" in out
    lost = [line for line in out.splitlines() if "own: lost" in line]
    assert f"own: lost {mine}/c.parquet: unreadable file (ArrowInvalid: " in lost[0]
    assert lost[1] == f"own: lost {mine}/d.md: empty file"
    assert f"own: lost {mine}/a.jsonl, row 20: not JSON (" in lost[2]
    assert f"3 lost in all, 20 of each reason: {tmp_path}/out/dropped.jsonl" in out.splitlines()[-1]
    assert manifest["dropped"] == {"not JSON": 1, "unreadable file": 1, "empty file": 1}


def test_the_line_of_conversations_names_the_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, TALKS)))
    mixed = [{"question": f"{i}?", "answer": "yes"} for i in range(3)]
    mixed += [{"prompt": f"{i}!", "response": "no"} for i in range(2)] + [{"what": "?"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    files = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    ingest.write_chat_shards(ChatSource(name="talks", files=files), tmp_path / "talks", 0.1)
    out = capsys.readouterr().out
    assert "a.jsonl: instruction + output; 300 kept, 0 lost" in out
    assert "b.jsonl: 3 × question + answer, 2 × prompt + response; 5 kept, 1 lost" in out
    assert "lost " + str(tmp_path / "b.jsonl") + ", row 5: unknown layout (columns what)" in out


def test_lines_and_examples_stay_few_however_much_is_lost(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(100):
        (tmp_path / f"{i:03}.txt").write_text("word " * 30 + f"{i}" if i % 2 else "")
    config = configured(tmp_path / "runs", files, text_files=(str(tmp_path / "*.txt"),))
    text = make(config) / "own"
    out = capsys.readouterr().out.splitlines()
    assert sum(" kept, " in line and ".txt: " in line for line in out) == ingest.FILES_SHOWN
    assert "own: all other files: text; 30 kept, 30 lost" in out
    assert sum("own: lost" in line for line in out) == 3
    assert len((text / "dropped.jsonl").read_text().splitlines()) == ingest.EXAMPLES


def test_counts_by_file_are_the_same_after_a_stop(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines() -> list[str]:
        found = capsys.readouterr().out.splitlines()
        return [line for line in found if ".jsonl" in line]

    make(configured(tmp_path / "whole", files))
    whole = lines()
    commit, calls = shard_folder.ShardFolder.commit, iter(range(100))

    def stopping(folder: shard_folder.ShardFolder, unit: dict) -> None:
        commit(folder, unit)
        if next(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(shard_folder.ShardFolder, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(configured(tmp_path / "broken", files))
    monkeypatch.undo()
    assert lines() == []
    make(configured(tmp_path / "broken", files))
    assert len(whole) >= 7
    assert [line.replace("broken", "whole") for line in lines()] == whole


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty file"),
        ("{}\n", "column|cannot tell"),
        ('{"text": null}\n', "1 × null"),
        (
            '{"text": "one document, long enough to be kept by the rule on length"}\n',
            "single document",
        ),
    ],
)
def test_corpus_without_usable_text_is_a_users_error(
    files: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    config = configured(tmp_path, files, text_files=(str(tmp_path / "x.jsonl"),))
    for _ in range(2):  # the second start finds what the first left behind
        with pytest.raises(UserError, match=message):
            make(config)


def test_stages_that_keep_other_questions_out_share_no_conversations(
    files: Path, tmp_path: Path
) -> None:
    (tmp_path / "tests.jsonl").write_text(json.dumps({"question": "Who keeps this out?"}))
    config = configured(tmp_path, files)

    def n_sets() -> list[int]:
        return [len(found) for found in create_shard.chat_sets(config).values()]

    assert n_sets() == [1, 0, 0]
    sft1 = replace(config.sft1, exclude_files=(str(tmp_path / "tests.jsonl"),))
    config = replace(config, sft1=sft1)
    assert n_sets() == [1, 1, 0]
    for _ in range(2):  # a second start finds nothing stale
        text = make(config)
        with run.working_on(config, makes=FINE_TUNING) as work:
            for stage in FINE_TUNING:
                work.begin(stage, sft.write_texts(config, stage, remake=False))
    assert {path.name for path in (text / "chat").iterdir()} == {"talks", "talks-sft1"}


def test_a_redo_with_a_file_that_is_missing_removes_nothing(
    files: Path, made: Path, tmp_path: Path
) -> None:
    copy(made, tmp_path)
    config = configured(tmp_path, files, text_files=("nope.txt",))
    before = sorted(config.run_dir.rglob("*"))
    with pytest.raises(UserError, match=r"nope\.txt"):
        create_shard.main(config, create_shard.Options(redo="text"))
    assert sorted(config.run_dir.rglob("*")) == before


def test_what_the_error_of_a_first_start_advises_may_be_done_at_once(
    files: Path, tmp_path: Path
) -> None:
    rows = [{"id": f"number {i}", "story": text} for i, text in enumerate(make_texts(40))]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = configured(tmp_path, files, text_files=(str(tmp_path / "x.jsonl"),))
    with pytest.raises(UserError, match="Name it with"):
        make(config)
    named = replace(config, data=replace(config.data, text_column="story"))
    assert sum(len(texts_of(make(named) / "own", split)) for split in SPLITS) == 40


def test_other_settings_are_refused_with_old_new_and_remedy(
    files: Path, made: Path, tmp_path: Path
) -> None:
    copy(made, tmp_path)
    with pytest.raises(UserError, match=r"min_chars was 8, is 99[\s\S]*--redo text.*--name"):
        make(configured(tmp_path, files, min_chars=99))


def test_a_file_edited_in_place_at_the_same_size_is_never_taken_for_done(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in make_texts(30)))
    config = configured(tmp_path / "runs", tmp_path, text_files=(str(path),))
    source, folder = config.data.corpora()[0], tmp_path / "own"
    manifest = ingest.write_text_shards(source, folder, config.data)
    assert manifest["source"] == sources.identity(source, folder)
    path.write_text(path.read_text().replace("river", "RIVER"))
    assert manifest["source"] != sources.identity(source, folder)
    with pytest.raises(UserError, match=r"content of the files was"):
        ingest.write_text_shards(source, folder, config.data)
    path.write_text(path.read_text().replace("RIVER", "river"))
    moved = path.rename(tmp_path / "b.jsonl")
    source = replace(source, files=(str(moved),))
    assert ingest.write_text_shards(source, folder, config.data)["source"] == manifest["source"]


def test_run_folder_that_is_a_file_is_a_users_error(files: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        make(configured(tmp_path / "runs", files))


def test_script_prints_mistakes_without_traceback(tmp_path: Path) -> None:
    words = [
        "--preset",
        "demo",
        "--runs",
        str(tmp_path),
        "--data.text_files",
        str(tmp_path / "none.txt"),
    ]
    assert stages.run("create_shard.py", words, tmp_path / "out") == 2
    assert "error: There is no file" in (tmp_path / "out").read_text()
    assert "Traceback" not in (tmp_path / "out").read_text()


def test_neither_script_imports_torch() -> None:
    code = (
        "import sys, create_shard, train_tokenizer; print({'torch', 'datasets'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=stages.ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


# ------------------------------------------------------------------------------- damage and mending


def test_finished_shards_are_left_alone(files: Path, made: Path, tmp_path: Path) -> None:
    text = copy(made, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in text.rglob("*")}
    make(configured(tmp_path, files))
    assert {path: path.stat().st_mtime_ns for path in text.rglob("*")} == before


@pytest.mark.parametrize("harm", ["cut", "remove", "flip"])
@pytest.mark.parametrize(
    "name", ["own/train-00001", "own/validation-00000", "chat/talks/train-00000"]
)
def test_only_the_damaged_shard_is_made_again(
    files: Path, made: Path, tmp_path: Path, harm: str, name: str
) -> None:
    text, name = copy(made, tmp_path), f"{name}.arrow"
    before = {path: path.stat().st_mtime_ns for path in text.rglob("*") if path.is_file()}
    data = bytearray((text / name).read_bytes())
    if harm == "remove":
        (text / name).unlink()
    elif harm == "cut":
        (text / name).write_bytes(data[:-100])
    else:
        data[len(data) // 2] ^= 1
        (text / name).write_bytes(data)
    make(configured(tmp_path, files), verify=harm == "flip")
    assert contents(text) == contents(made)
    changed = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed <= {text / name}


def test_damage_that_the_source_cannot_mend_is_a_users_error(
    files: Path, made: Path, tmp_path: Path
) -> None:
    text = copy(made, tmp_path / "runs")
    manifest = json.loads((text / "own/manifest.json").read_text())
    manifest["units"][0]["files"]["train-00000.arrow"]["sha256"] = "0" * 64
    (text / "own/manifest.json").write_text(json.dumps(manifest))
    (text / "own/train-00000.arrow").unlink()
    with pytest.raises(UserError, match=r"train-00000\.arrow was damaged.*its source has changed"):
        make(configured(tmp_path / "runs", files))


# -------------------------------------------------------------------------------- kills, full disks


def words_for(config: Config, files: Path) -> list[str]:
    options = {
        "--preset": "demo",
        "--runs": config.runs,
        "--data.shard_mb": "1",
        "--data.text_files": str(files / "text"),
        **{f"--{name}.files": str(files / "chat.jsonl") for name in FINE_TUNING},
    }
    return [word for option in options.items() for word in option]


def kill_and_compare(
    script: str, words: list[str], broken: Path, unbroken: Path, parts: list[str], n_kills: int
) -> None:
    """Kill `script` at `n_kills` random moments; whenever it comes through, compare `parts` and
    start over.
    """
    draw = random.Random(time.time_ns())
    output = broken / "output"

    def compare_and_remove() -> None:
        for part in parts:
            assert contents(broken / part) == contents(unbroken / part)
            shutil.rmtree(broken / part)

    started = time.monotonic()
    assert stages.run(script, words, output) == 0, output.read_text()[-2000:]
    seconds = time.monotonic() - started
    compare_and_remove()
    kills = 0
    while kills < n_kills:
        process = stages.start(script, words, output)
        process.join(draw.uniform(0, 1.1 * seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0, output.read_text()[-2000:]
            compare_and_remove()
    assert stages.run(script, words, output) == 0, output.read_text()[-2000:]
    compare_and_remove()


MANY_KILLS = pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize("n_kills", [3, MANY_KILLS])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    files: Path, tmp_path: Path, n_kills: int
) -> None:
    unbroken, broken = (configured(tmp_path / name, files) for name in ("unbroken", "broken"))
    assert stages.run("create_shard.py", words_for(unbroken, files), tmp_path / "out") == 0
    broken.run_dir.mkdir(parents=True)
    kill_and_compare(
        "create_shard.py",
        words_for(broken, files),
        broken.run_dir,
        unbroken.run_dir,
        ["text"],
        n_kills,
    )


@pytest.mark.parametrize("nth", range(8))
def test_stopped_between_any_two_writes_it_ends_with_the_same_bytes(
    files: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """As a kill just before the nth small file is put in place: drafts, logs, sheets, manifests."""
    write_text, calls = storage.write_text, iter(range(1000))

    def stopping(path: Path, text: str) -> None:
        if next(calls) == nth:
            raise KeyboardInterrupt
        write_text(path, text)

    for module in (storage, ingest):
        monkeypatch.setattr(module, "write_text", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(configured(tmp_path, files))
    monkeypatch.undo()
    assert contents(make(configured(tmp_path, files))) == contents(made)


def test_interrupt_ends_in_one_line(files: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, files)
    process = stages.start("create_shard.py", words_for(config, files), tmp_path / "out")
    while process.exitcode is None and not (config.run_dir / "text").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    # done before it came, stopped, done and on its way out
    assert process.exitcode in (0, 130, -signal.SIGINT)
    assert "Traceback" not in (tmp_path / "out").read_text()


def test_an_interrupt_after_files_are_finished_removes_them_in_silence(tmp_path: Path) -> None:
    folder = text_shards.ShardFolder(tmp_path / "own", "text", {})
    writer = text_shards.TextShardWriter(folder)
    writer.add("train", b"word", 4)
    file = writer._files["train"]
    file.write(file.take())
    file.finish()  # by its thread, while Ctrl-C stopped the wait for it
    writer.close()
    assert not list((tmp_path / "own").glob("train*"))


def test_full_disk_is_said_and_the_run_goes_on_after_making_room(
    files: Path, made: Path, small_disk: Path
) -> None:
    config = configured(small_disk, files)
    for megabytes in (2.4, 1.5, 1.05):  # hardly any room at all, then more and more
        (small_disk / "filler").write_bytes(bytes(int(megabytes * 1e6)))
        with pytest.raises(UserError, match=r"disk is full.*it continues"):
            make(config)
        (small_disk / "filler").unlink()
    text = make(config)
    assert contents(text) == contents(made)


# ------------------------------------------------------------------------------------------ the hub

CARD = """---
license: odc-by
configs:
- config_name: default
  data_files: [{split: train, path: data/*}]
- config_name: sample
  data_files: [{split: train, path: sample/*}]
---
"""


@pytest.fixture
def hub_folder(files: Path, tmp_path: Path) -> Path:
    """A data set of two parquet files with many row groups, and a set of conversations."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    def parquet(texts: list[str]) -> bytes:
        sink = io.BytesIO()
        pq.write_table(
            pa.table({"id": list(map(str, range(len(texts)))), "text": texts}),
            sink,
            row_group_size=100,
        )
        return sink.getvalue()

    parts = {
        "sample/0.parquet": parquet(TEXTS[:700]),
        "sample/1.parquet": parquet(TEXTS[700:]),
        "data/x.txt": b"no",
    }
    write_set(tmp_path / "hub", "somebody/books", parts, CARD)
    write_set(
        tmp_path / "hub",
        "somebody/talks",
        {"talks.jsonl": files / "chat.jsonl"},
        "---\nlicense: mit\n---\n",
    )
    return tmp_path / "hub"


RUN_ON_HUB = """
import sys, time
sleep = time.sleep
# the hub's own client waits long between its attempts
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
from dataclasses import replace
from pathlib import Path
import config
from hearth import cli
from hearth.data import hub
from hearth.data import ingest
hub.HUB_BLOCK = 1 << 16
folder, minutes, name = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
data = config.DataConfig(
    shard_mb=1, text_files=("x",), min_chars=8, validation_share=0.02, retry_minutes=minutes
)
try:
    own = config.TextSource(name="own", hub=name, hub_config="sample")
    ingest.write_text_shards(own, folder / "own", data)
    talks = config.ChatSource(name="talks", hub="somebody/talks")
    ingest.write_chat_shards(talks, folder / "chat/talks", 0.02, retry_minutes=minutes)
except config.UserError as error:
    cli.fail(str(error))
"""


def run_on_hub(
    hub: Hub, folder: Path, minutes: float = 1, name: str = "somebody/books"
) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "PYTHONPATH": str(stages.ROOT),
    }
    command = [sys.executable, "-c", RUN_ON_HUB, str(folder), str(minutes), name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def arrow_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".arrow")}


def test_hub_gives_the_same_shards_as_files_through_every_fault(
    hub_folder: Path, made: Path, tmp_path: Path
) -> None:
    faults = [
        Fault("503", "/api/datasets/somebody/books"),
        Fault("429", "0.parquet", after=1),
        Fault("break", "0.parquet", after=3),
        Fault("stall", "1.parquet", after=2),
        Fault("break", "1.parquet", after=2, times=8),  # more often than the hub's own client tries
        Fault("503", "talks.jsonl"),
    ]
    with Hub(hub_folder, faults, stall_seconds=3) as hub:
        result = run_on_hub(hub, tmp_path / "out")
        assert result.returncode == 0, result.stdout + result.stderr
        assert not any(fault.times for fault in hub.faults), hub.faults
    assert arrow_files(tmp_path / "out") == arrow_files(made)
    manifest = json.loads((tmp_path / "out/own/manifest.json").read_text())
    assert manifest["dropped"] == {}, "something came twice"
    assert manifest["licence"] == "odc-by"
    assert manifest["revision"] == Hub(hub_folder).revision("somebody/books")


def test_network_that_stays_away_is_given_up_and_a_later_start_goes_on(
    hub_folder: Path, made: Path, tmp_path: Path
) -> None:
    with Hub(hub_folder, [Fault("break", "1.parquet", after=2, times=10**6)]) as hub:
        result = run_on_hub(hub, tmp_path / "out", minutes=0.02)
        assert result.returncode == 2, result.stdout + result.stderr
        assert "start the same command again to go on" in result.stderr
        assert "trying again in 1s" in result.stdout
        assert "Traceback" not in result.stderr
        first = hub.bytes_sent
    (hub_folder / "somebody/books/new.txt").write_text("a newer commit")
    with Hub(hub_folder) as hub:
        old = json.loads((tmp_path / "out/own/manifest.part.json").read_text())["revision"]
        hub.old_revisions.add(old)
        result = run_on_hub(hub, tmp_path / "out")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "continuing after" in result.stdout
        assert not [r for r in hub.requests if "0.parquet" in r], "the first file was read again"
        assert all(old in r for r in hub.requests if ".parquet" in r), "another commit was read"
    assert first > 0
    assert arrow_files(tmp_path / "out") == arrow_files(made)


def test_data_set_that_does_not_exist_fails_at_once(hub_folder: Path, tmp_path: Path) -> None:
    with Hub(hub_folder) as hub:
        result = run_on_hub(hub, tmp_path / "out", name="somebody/nothing")
    assert result.returncode == 2
    assert "no data set somebody/nothing" in result.stderr
    assert "Traceback" not in result.stderr

"""Training and encoding: every document in the token shards, decodable, once, whatever happens on
the way.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import stages
from test_create_shard import (  # noqa: F401
    MANY_KILLS,
    contents,
    files,
    kill_and_compare,
    make_texts,
    texts_of,
)

import create_shard
import train_tokenizer
from config import PRESETS, Config, TextSource, UserError
from hearth.data import shard_folder, tokenizer
from hearth.data.token_shards import TokenShards
from hearth.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from train_tokenizer import Options

SPELT = "A text that spells <|bos|> and <think> and <|end|>, line after line. " * 3


def configured(runs: Path, folder: Path) -> Config:
    """Two corpora, prose of weight 1 and numbers of weight 3, in token shards of 40,000 tokens."""
    demo = PRESETS["demo"]
    draw = random.Random(1)
    for name, texts in (("prose", [*make_texts(400), SPELT]), ("numbers", [])):
        texts = texts or [
            " ".join(str(draw.randint(0, 10**6)) for _ in range(60)) + f" = {i}" for i in range(300)
        ]
        (folder / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in texts)
        )
    sources = tuple(
        TextSource(name=name, files=(str(folder / f"{name}.jsonl"),), weight=weight)
        for name, weight in (("prose", 1.0), ("numbers", 3.0))
    )
    return replace(
        demo,
        runs=str(runs),
        data=replace(demo.data, sources=sources, shard_mb=1),
        tokenizer=replace(demo.tokenizer, sample_mb=1, shard_tokens=40_000),
        model=replace(demo.model, vocab_size=512),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run whose text shards are made and whose tokenizer is trained."""
    folder = tmp_path_factory.mktemp("tokens")
    config = configured(folder / "runs", folder)
    create_shard.main(config, create_shard.Options())
    train_tokenizer.main(config, Options())
    return config


def copy_of(config: Config, to: Path) -> Config:
    """The same run in another place."""
    leave = shutil.ignore_patterns("chat")  # it reads no conversations
    shutil.copytree(config.run_dir, to / "demo", ignore=leave)
    return replace(config, runs=str(to))


def tokens_of(config: Config) -> dict[str, bytes]:
    return contents(config.run_dir / "tokens")


# ----------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("name", ["prose", "numbers"])
@pytest.mark.parametrize("split", shard_folder.SPLITS)
def test_every_document_is_there_once_and_decodes_to_its_text(
    config: Config, name: str, split: str
) -> None:
    loaded = Tokenizer.load(config.run_dir / "tokenizer")
    reader = TokenShards(config.run_dir / "tokens" / name, split)
    texts = texts_of(config.run_dir / "text" / name, split)
    starts = [0, *reader.ends[:-1]]
    documents = [reader.read(a, b) for a, b in zip(starts, reader.ends, strict=True)]
    assert [loaded.decode(ids[1:]) for ids in documents] == texts
    assert all(ids[0] == loaded.bos and ids[1:].min() >= len(SPECIAL_TOKENS) for ids in documents)
    assert reader.text_bytes == sum(len(text.encode()) for text in texts)
    assert reader.tokenizer_hash == loaded.hash


def test_shards_are_capped_and_there_are_several(config: Config) -> None:
    sizes = [
        np.load(path).shape[0]
        for path in (config.run_dir / "tokens/prose").glob("train-*.npy")
        if "ends" not in path.name
    ]
    assert len(sizes) > 2
    assert max(sizes) <= 40_000


def test_long_texts_in_pieces_encode_as_if_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", 30)
    draw = random.Random(0)
    marks = ["\n", "\n\n", " \n", "\r\n", ".\n", "  ", "é\n", "\n-", "\n7", "\t\n x"]
    text = "".join(
        draw.choice(marks) + draw.choice(["word", "9", "Ä", "x = 1", "…"]) for _ in range(20_000)
    )
    assert len(list(tokenizer._cut(text))) > 1000
    loaded = Tokenizer.train([text], 600)
    assert loaded.encode_batch([text, "short"]) == [loaded.encode(text), loaded.encode("short")]


def test_encoding_ahead_keeps_the_order(config: Config) -> None:
    loaded = Tokenizer.load(config.run_dir / "tokenizer")
    batches = [(i, [f"text {i}", "x" * i]) for i in range(50)]
    found = list(train_tokenizer.encode_ahead(loaded, iter(batches), np.uint16))
    assert [skipped for skipped, _, _ in found] == list(range(50))
    assert [[loaded.decode(ids[1:]) for ids in encoded] for _, _, encoded in found] == [
        texts for _, texts in batches
    ]


def test_data_sheets_tell_the_tokens(config: Config) -> None:
    n_tokens = sum(
        TokenShards(config.run_dir / "tokens/prose", split).n_tokens
        for split in shard_folder.SPLITS
    )
    for folder in ("text", "tokens"):
        assert f"{n_tokens:,}" in (config.run_dir / folder / "prose/README.md").read_text()


def test_sample_is_drawn_by_weight_and_small_corpora_give_all_they_have(config: Config) -> None:
    corpora = [
        train_tokenizer.open_corpus(source, config, verify=False)
        for source in config.data.corpora()
    ]
    sizes = [corpus.text_bytes("train") for corpus in corpora]
    small = replace(config, tokenizer=replace(config.tokenizer, sample_mb=1))
    shares = train_tokenizer.sample_shares(small, corpora)
    assert shares[1] == 1.0  # asked for three quarters of a megabyte, it has less
    assert shares[0] * sizes[0] + sizes[1] == pytest.approx(min(1e6, sum(sizes)))
    few = [
        replace(corpus, manifest={"splits": {"train": {"text_bytes": 10**8}}}) for corpus in corpora
    ]
    assert train_tokenizer.sample_shares(small, few) == pytest.approx([0.0025, 0.0075])


def test_held_out_documents_are_not_in_the_sample(config: Config) -> None:
    corpora = [
        train_tokenizer.open_corpus(source, config, verify=False)
        for source in config.data.corpora()
    ]
    sample = {
        text for texts in train_tokenizer.sample_texts(corpora, [1.0, 1.0], 0) for text in texts
    }
    for corpus in corpora:
        assert not sample & set(texts_of(corpus.text, "validation"))
        assert set(texts_of(corpus.text, "train")) <= sample


@dataclass
class Books:
    """What `sample_texts` asks of a corpus: a few documents far longer than others."""

    source: TextSource
    texts: tuple[str, ...] = ("a" * 4_000_000, "b" * 4_000_000)

    def text_bytes(self, split: str) -> int:
        return sum(map(len, self.texts))

    def batches(self, split: str) -> Iterator[list[str]]:
        yield list(self.texts)


def test_the_sample_holds_its_share_of_a_few_long_documents() -> None:
    (pieces,) = train_tokenizer.sample_texts([Books(TextSource("books"))], [0.5], 0)
    assert sum(map(len, pieces)) == pytest.approx(4_000_000, rel=0.2)
    assert {piece[0] for piece in pieces} == {"a", "b"}


def test_a_damaged_tokenizer_is_trained_again_and_keeps_its_shards(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = copy_of(config, tmp_path)
    file = again.run_dir / "tokenizer" / "tokenizer.json"
    whole, tokens = file.read_text(), tokens_of(again)
    file.write_text(whole.replace("merges", "margins"))
    train_tokenizer.main(again, Options())
    assert "is damaged" in capsys.readouterr().out
    assert (file.read_text(), tokens_of(again)) == (whole, tokens)


def test_training_again_gives_the_same_bytes(config: Config, tmp_path: Path) -> None:
    again = copy_of(config, tmp_path)
    for name in ("tokenizer", "tokens"):
        shutil.rmtree(again.run_dir / name)
    train_tokenizer.main(again, Options())
    assert contents(again.run_dir / "tokenizer") == contents(config.run_dir / "tokenizer")
    assert tokens_of(again) == tokens_of(config)


def test_finished_work_is_left_alone(config: Config, tmp_path: Path) -> None:
    again = copy_of(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in again.run_dir.rglob("*.npy")}
    train_tokenizer.main(again, Options())
    assert {path: path.stat().st_mtime_ns for path in again.run_dir.rglob("*.npy")} == before


def test_report_sets_bytes_a_token_beside_gpt2(
    config: Config, tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = copy_of(config, tmp_path)
    train_tokenizer.main(again, Options(gpt2=str(data_folder / "tokenizers/gpt2")))
    table = (again.run_dir / "tokenizer/README.md").read_text()
    assert "| held-out text | bytes per token | lone bytes | GPT-2 |" in table
    reader = TokenShards(again.run_dir / "tokens/prose", "validation")
    assert f"| prose | {reader.text_bytes / (reader.n_tokens - reader.n_documents):.3f} |" in table
    assert "GPT-2" in capsys.readouterr().out


def test_lone_bytes_are_pieces_of_longer_characters(config: Config) -> None:
    loaded = Tokenizer.load(config.run_dir / "tokenizer")
    ids = np.array(loaded.encode("a é"))  # é was never seen: two lone bytes
    assert train_tokenizer.lone_bytes(loaded, ids) == pytest.approx(2 / len(ids))


# ----------------------------------------------------------------------------------------- mistakes


def test_missing_text_shards_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no run 'demo'.*uv run run_pipeline.py --preset demo --runs"
    ):
        train_tokenizer.main(configured(tmp_path / "runs", tmp_path), Options())


def test_damaged_text_shard_names_the_command_that_mends_it(config: Config, tmp_path: Path) -> None:
    again = copy_of(config, tmp_path)
    path = again.run_dir / "text/prose/train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    train_tokenizer.main(again, Options())  # the size is right
    with pytest.raises(UserError, match=r"train-00000.arrow[\s\S]*create_shard.py.*--verify"):
        train_tokenizer.main(again, Options(verify=True))
    path.unlink()
    with pytest.raises(UserError, match=r"train-00000.arrow is missing"):
        train_tokenizer.main(again, Options())


def test_another_vocabulary_size_is_refused_with_the_remedy(config: Config) -> None:
    other = replace(config, model=replace(config.model, vocab_size=640))
    with pytest.raises(UserError, match=r"vocab_size was 512, is 640[\s\S]*--redo tokenizer"):
        train_tokenizer.main(other, Options())


def test_too_little_memory_is_refused_with_a_sample_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_tokenizer, "free_memory", lambda: 2e9)
    train_tokenizer.require_memory(100e6)
    with pytest.raises(UserError, match=r"--tokenizer.sample_mb (\d+)") as refusal:
        train_tokenizer.require_memory(1e9)
    fits = int(str(refusal.value).split("--tokenizer.sample_mb ")[1].rstrip("."))
    train_tokenizer.require_memory(fits * 1e6)
    assert fits > 100


def test_free_memory_counts_what_the_page_cache_gives_back(tmp_path: Path) -> None:
    unlimited = train_tokenizer.free_memory(tmp_path)  # no such files: the system's own figure
    for name, text in {
        "max": "500000",
        "current": "450000",
        "stat": "anon 9\nactive_file 1000\ninactive_file 20000\n",
    }.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert train_tokenizer.free_memory(tmp_path) == 500_000 - 450_000 + 21_000 < unlimited
    (tmp_path / "memory.max").write_text("max\n")
    assert train_tokenizer.free_memory(tmp_path) > 10e6


def test_missing_gpt2_vocabulary_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No GPT-2 vocabulary"):
        train_tokenizer.load_gpt2(tmp_path)


# ------------------------------------------------------------------------------- damage and mending


@pytest.mark.parametrize("harm", ["cut", "remove", "flip"])
@pytest.mark.parametrize(
    "name", ["train-00001.npy", "train-00000.ends.npy", "validation-00000.npy"]
)
def test_only_the_damaged_shard_is_made_again(
    config: Config, tmp_path: Path, harm: str, name: str
) -> None:
    again = copy_of(config, tmp_path)
    path = again.run_dir / "tokens/prose" / name
    before = {p: p.stat().st_mtime_ns for p in again.run_dir.rglob("*.npy")}
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(data[:-8])
    else:
        data[-1] ^= 1
        path.write_bytes(data)
    train_tokenizer.main(again, Options(verify=harm == "flip"))
    assert tokens_of(again) == tokens_of(config)
    assert {p for p in before if p.stat().st_mtime_ns != before[p]} <= {path}


def test_two_damaged_shards_with_a_whole_one_between_are_made_again(
    config: Config, tmp_path: Path
) -> None:
    again = copy_of(config, tmp_path)
    for name in ("train-00000.npy", "train-00002.npy"):
        (again.run_dir / "tokens/prose" / name).unlink()
    train_tokenizer.main(again, Options())
    assert tokens_of(again) == tokens_of(config)


def words_for(config: Config) -> list[str]:
    options = {"--runs": config.runs, "--model.vocab_size": 512, "--tokenizer.shard_tokens": 40_000}
    options |= {"--data.shard_mb": 1, "--tokenizer.sample_mb": 1}
    return ["--preset", "demo", *(str(word) for option in options.items() for word in option)]


@pytest.fixture(scope="module")
def one_corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[str]]:
    """A run with the text shards of one corpus, as the command line configures it, and
    its words.
    """
    folder = tmp_path_factory.mktemp("one")
    config = configured(folder / "runs", folder)
    config = replace(
        config, data=replace(config.data, sources=(), text_files=(str(folder / "prose.jsonl"),))
    )
    create_shard.main(config, create_shard.Options())
    train_tokenizer.main(config, Options())
    return config, [*words_for(config), "--data.text_files", str(folder / "prose.jsonl")]


@pytest.mark.parametrize("n_kills", [3, MANY_KILLS])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    one_corpus: tuple[Config, list[str]], tmp_path: Path, n_kills: int
) -> None:
    config, words = one_corpus
    broken = copy_of(config, tmp_path)
    words = [str(tmp_path) if word == config.runs else word for word in words]
    parts = ["tokenizer", "tokens"]
    for part in parts:
        shutil.rmtree(broken.run_dir / part)
    kill_and_compare("train_tokenizer.py", words, broken.run_dir, config.run_dir, parts, n_kills)


def test_full_disk_is_said_and_the_run_goes_on_after_making_room(
    one_corpus: tuple[Config, list[str]],
    small_disk: Path,
) -> None:
    config, _ = one_corpus
    again = copy_of(config, small_disk)
    shutil.rmtree(again.run_dir / "tokens")
    free = shutil.disk_usage(small_disk).free
    for kept_free in (20_000, 90_000, 180_000):
        (small_disk / "filler").write_bytes(bytes(free - kept_free))
        with pytest.raises(UserError, match=r"disk is full.*it continues"):
            train_tokenizer.main(again, Options())
        (small_disk / "filler").unlink()
    train_tokenizer.main(again, Options())
    assert tokens_of(again) == tokens_of(config)


# ---------------------------------------------------------------------------- on a training machine


def test_token_shards_are_read_without_the_packages_that_made_them(config: Config) -> None:
    """A rented machine with a GPU may have torch and numpy alone."""
    missing = ("datasets", "pyarrow", "tokenizers", "xxhash", "zstandard", "datasketch", "torch")
    code = f"""
import sys
for name in {missing}: sys.modules[name] = None
from pathlib import Path
from hearth.data import token_shards
from hearth.data import ingest
from hearth.data import tokenizer
reader = token_shards.TokenShards(Path({str(config.run_dir / "tokens/prose")!r}), "train")
print(reader.n_tokens, len(reader.ends), reader.read(0, 5)[0])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=stages.ROOT, capture_output=True, text=True, check=False
    )
    reader = TokenShards(config.run_dir / "tokens/prose", "train")
    assert result.stdout.split() == [str(reader.n_tokens), str(reader.n_documents), "0"], (
        result.stderr
    )

"""Bits per byte, and what a run keeps of its scores."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scored import held_out, make_run

from config import Config
from hearth.evaluation.scores import Score, ScoreBook, bits_per_byte
from hearth.reporting import report
from hearth.training import checkpoint
from hearth.training.batches import validation_batches
from hearth.training.checkpoint import Loaded
from hearth.training.held_out import evaluate_loss
from model import PackedSequences


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def loaded(run: Config) -> Loaded:
    return checkpoint.load_for_inference(run.run_dir / "base")


def test_bits_per_byte_are_those_of_pretrainings_evaluation(run: Config, loaded: Loaded) -> None:
    shards = held_out(run)
    wants = {"context": 64, "max_tokens": 2000, "micro_tokens": 256, "bos": loaded.tokenizer.bos}
    batches = list(validation_batches(shards, **wants))
    nats, _ = evaluate_loss(loaded.model, batches)
    n_bytes = sum(
        int(loaded.tokenizer.token_bytes[b.targets[b.weights > 0].numpy()].sum()) for b in batches
    )
    value, _, n = bits_per_byte(loaded, shards, None)
    assert value == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert n == shards.n_documents


def test_the_error_of_bits_per_byte_is_that_of_leaving_documents_out(
    run: Config, loaded: Loaded
) -> None:
    """The jackknife over documents is the slow reference; the ratio's linear estimate comes close
    to it.
    """
    shards = held_out(run)
    _, error, n = bits_per_byte(loaded, shards, None)
    sums, sizes = np.zeros(n), np.zeros(n)
    starts = [0, *shards.ends[:-1]]
    for i, (start, end) in enumerate(zip(starts, shards.ends, strict=True)):
        ids = torch.from_numpy(shards.read(int(start), int(end)))
        hidden = [
            loaded.model(part, PackedSequences(torch.zeros(len(part), dtype=torch.bool), len(part)))
            for part in ids.split(64)
        ]
        nats = F.cross_entropy(
            loaded.model.logits(torch.cat(hidden)[:-1]), ids[1:], reduction="none"
        )
        sums[i], sizes[i] = float(nats.sum()), loaded.tokenizer.token_bytes[ids[1:].numpy()].sum()
    without = (sums.sum() - sums) / (sizes.sum() - sizes) / math.log(2)
    jackknife = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    assert error == pytest.approx(jackknife, rel=0.25)


def test_a_limit_reads_the_first_documents_only(run: Config, loaded: Loaded) -> None:
    assert bits_per_byte(loaded, held_out(run), 10)[2] == 10


def test_a_new_checkpoint_of_a_stage_takes_the_old_ones_place(tmp_path: Path) -> None:
    path, found = tmp_path / "score.json", [Score("copa", "accuracy", 0.5)]
    for stage, step in (("base", 1), ("sft1", 1), ("base", 2)):
        state = {"stage": stage, "step": step, "tokens": step}
        ScoreBook(path, Path(f"{stage}/step-{step}"), state, None).keep("copa", found)
    assert {(s["stage"], s["step"]) for s in report.read_json(path)["scores"]} == {
        ("sft1", 1),
        ("base", 2),
    }


BAD = ["", "[]", '{"scores": 5}', '{"scores": [1, {}, {"task": 5, "value": 1}]}', "[" * 100_000]


@pytest.mark.parametrize("text", BAD)
def test_a_damaged_book_begins_again(text: str, tmp_path: Path) -> None:
    path, state = tmp_path / "score.json", {"stage": "base", "step": 1, "tokens": 1}
    path.write_text(text)
    book = ScoreBook(path, Path("base/step-1"), state, None)
    assert book.known("copa") is None
    book.keep("copa", [Score("copa", "accuracy", 0.5)])
    assert book.known("copa") == [Score("copa", "accuracy", 0.5)]


@pytest.mark.parametrize("wrong", ["x", [], {}])
@pytest.mark.parametrize("name", ["value", "stderr", "chance", "n", "shots", "cut", "seconds"])
def test_a_score_with_a_field_of_the_wrong_type_is_scored_again(
    name: str, wrong: object, tmp_path: Path
) -> None:
    path, state = tmp_path / "score.json", {"stage": "base", "step": 1, "tokens": 1}
    ScoreBook(path, Path("a"), state, None).keep("copa", [Score("copa", "accuracy", 0.5)])
    book = report.read_json(path)
    book["scores"][0][name] = wrong
    path.write_text(json.dumps(book))
    assert ScoreBook(path, Path("a"), state, None).known("copa") is None


def test_a_checkpoint_is_the_same_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"stage": "base", "step": 1, "tokens": 1}
    run_dir = tmp_path / "runs" / "demo"
    folder, elsewhere = run_dir / "base" / "step-1", tmp_path / "elsewhere"
    for made in (folder, elsewhere):
        made.mkdir(parents=True)
    book = run_dir / "report" / "score.json"
    spellings = (
        (tmp_path, Path("runs/demo/base/step-1")),
        (elsewhere, folder),
        (elsewhere, Path("../runs/demo/base/step-1")),
        (run_dir, Path("base/step-1")),
        (folder, Path()),
    )
    for i, (here, spelling) in enumerate(spellings):
        monkeypatch.chdir(here)
        noted = ScoreBook(book, spelling, state, None)
        noted.keep(f"task {i}", [Score(f"task {i}", "accuracy", 0.5)])
        assert all(noted.known(f"task {j}") for j in range(i + 1))
    assert {s["checkpoint"] for s in report.read_json(book)["scores"]} == {
        str(Path("runs/demo/base/step-1"))
    }


@pytest.mark.parametrize("written", ["runs/demo/base/step-1", "../runs/demo/base/step-1", None])
def test_a_book_with_paths_as_they_were_given_is_read(
    written: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None stands for the whole path."""
    state = {"stage": "base", "step": 1, "tokens": 1}
    folder, path = tmp_path / "runs/demo/base/step-1", tmp_path / "runs/demo/report/score.json"
    for made in (folder, path.parent, tmp_path / "here"):
        made.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    score = {"task": "copa", "metric": "accuracy", "value": 0.5, "n": 1, "seconds": 1.0}
    score |= {"cut": 0, "headline": False, "stderr": None, "chance": None, "shots": None}
    facts = {"checkpoint": written or str(folder), "source": "copa", "limit": None}
    path.write_text(json.dumps({"scores": [score | state | facts]}))
    assert ScoreBook(path, folder, state, None).known("copa") is not None


def test_scores_of_the_run_that_a_folder_was_copied_from_are_not_its_own(tmp_path: Path) -> None:
    state, found = {"stage": "base", "step": 1, "tokens": 1}, [Score("copa", "accuracy", 0.5)]
    first, second = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    ScoreBook(first / "report" / "score.json", first / "base/step-1", state, None).keep("x", found)
    shutil.copytree(first, second)
    for run_dir, known in ((first, found), (second, None)):
        book = ScoreBook(run_dir / "report" / "score.json", run_dir / "base/step-1", state, None)
        assert book.known("x") == known


def test_scores_of_another_number_of_items_are_not_known(tmp_path: Path) -> None:
    state = {"stage": "base", "step": 1, "tokens": 1}
    book = ScoreBook(tmp_path / "score.json", Path("a"), state, None)
    found = [Score("world", "accuracy", 0.5, n=20), Score("world: facts", "accuracy", 0.5, n=3)]
    book.keep("world", found)
    assert [book.known("world", n) for n in (20, 200, 3, None)] == [found, None, None, found]

"""Bits per byte, and what a run keeps of its scores."""

from __future__ import annotations

import json
import math
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

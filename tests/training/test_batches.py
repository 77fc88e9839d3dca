"""Batches as functions of the step: mixing, curriculum, packing."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config import ChatSource, PretrainConfig, SFTConfig, Stage, UserError
from hearth.data.token_shards import TokenShards, TokenShardWriter
from hearth.training.batches import (
    Batch,
    ConversationBatches,
    LoadedAhead,
    PretrainingBatches,
    pack_rows,
    validation_batches,
)

BOS, PAD = 0, 7


def write(
    folder: Path,
    documents: list[list[int]],
    masks: list[list[int]] | None = None,
    held_out=((0, 1, 2),),
) -> Path:
    writer = TokenShardWriter(
        folder, {}, vocab_size=4096, tokenizer_hash="t", shard_tokens=300, masked=masks is not None
    )
    for i, document in enumerate(documents):
        writer.add("train", document, len(document), masks[i] if masks else None)
    for document in held_out:
        writer.add(
            "validation", list(document), len(document), [1] * len(document) if masks else None
        )
    writer.finish()
    return folder


@pytest.fixture
def corpora(tmp_path: Path) -> list[TokenShards]:
    """Two corpora of documents of 1 to 40 tokens; the ids tell the corpus: below and above 2000."""
    rng = np.random.default_rng(0)
    made = []
    for corpus, n in enumerate((120, 60)):
        documents = [
            [BOS, *rng.integers(100, 2000, rng.integers(1, 40)) + 2000 * corpus] for _ in range(n)
        ]
        made.append(TokenShards(write(tmp_path / str(corpus), documents), "train"))
    return made


PLAN = PretrainConfig(
    steps=20,
    tokens_per_step=256,
    micro_batch_tokens=128,
    stages=(Stage(16, 0.5), Stage(32, 0.3), Stage(64, 0.2)),
)


def batches_of(
    corpora: list[TokenShards], plan: PretrainConfig = PLAN, **changes
) -> PretrainingBatches:
    settings = {"context": 64, "bos": BOS, "seed": 0} | changes
    return PretrainingBatches(corpora, [3.0, 1.0], plan, **settings)


def test_a_batch_is_a_function_of_its_step(corpora: list[TokenShards]) -> None:
    one, other = batches_of(corpora), batches_of(corpora)
    later = [other.batch(step) for step in (7, 3, 19)]
    for step, batch in zip((7, 3, 19), later, strict=True):
        assert all(
            torch.equal(getattr(one.batch(step), n), getattr(batch, n))
            for n in ("ids", "targets", "starts")
        )
    assert not torch.equal(one.batch(3).ids, batches_of(corpora, seed=1).batch(3).ids)


def test_every_chunk_is_seen_once_an_epoch(corpora: list[TokenShards]) -> None:
    batches = batches_of(corpora, replace(PLAN, steps=60))
    seen: dict[int, list[tuple[int, ...]]] = {0: [], 1: []}
    for step in range(60):
        for row in batches.batch(step).ids.view(-1, 64):
            seen[int(row.max() >= 2000)].append(tuple(row.tolist()))
    for corpus, rows in seen.items():
        n = batches.n_chunks[corpus]
        assert len(rows) > 2 * n
        assert len(set(rows[:n])) == n
        assert set(rows[:n]) == set(rows[n : 2 * n])
        assert rows[:n] != rows[n : 2 * n]


def test_corpora_are_mixed_by_weight_in_every_stretch(corpora: list[TokenShards]) -> None:
    batches = batches_of(corpora, replace(PLAN, steps=100))
    for first in range(0, 400, 40):
        assert abs((batches.corpus_of_row[first : first + 40] == 0).sum() - 30) <= 2


def test_a_stage_may_have_weights_of_its_own(corpora: list[TokenShards]) -> None:
    stages = (Stage(16, 0.5, weights=(1.0, 0.0)), Stage(32, 0.5, weights=(0.0, 1.0)))
    batches = batches_of(corpora, replace(PLAN, stages=stages))
    assert batches.batch(3).ids.max() < 2000
    assert batches.batch(15).ids.max() >= 2000


def test_targets_are_the_tokens_that_follow(corpora: list[TokenShards]) -> None:
    batch = batches_of(corpora).batch(0)
    whole = np.concatenate([corpus.read(0, corpus.n_tokens) for corpus in corpora])
    pairs = set(zip(whole[:-1].tolist(), whole[1:].tolist(), strict=True))
    assert set(zip(batch.ids.tolist(), batch.targets.tolist(), strict=True)) <= pairs
    rows, next_rows = batch.ids.view(-1, 64), batch.targets.view(-1, 64)
    assert torch.equal(rows[:, 1:], next_rows[:, :-1])


@pytest.mark.parametrize(
    ("step", "length"), [(0, 16), (9, 16), (10, 32), (15, 32), (16, 64), (19, 64)]
)
def test_segments_are_cut_at_documents_and_at_the_stages_length(
    corpora, step: int, length: int
) -> None:
    batch = batches_of(corpora).batch(step)
    assert batch.row_length == length
    expected = (batch.ids == BOS) | (torch.arange(256) % length == 0)
    assert torch.equal(batch.starts, expected)
    assert len(batch.ids) == 256


def test_micro_batches_are_the_batch_in_order(corpora: list[TokenShards]) -> None:
    batch = batches_of(corpora).batch(12)
    parts = list(batch.split(100))
    assert {len(part.ids) for part in parts} == {96, 64}
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)


def test_a_corpus_smaller_than_a_step_is_refused_with_the_remedy(tmp_path: Path) -> None:
    small = TokenShards(write(tmp_path / "small", [[BOS, 5, 6]] * 10), "train")
    with pytest.raises(UserError, match="tokens_per_step"):
        PretrainingBatches([small], [1.0], PLAN, context=64, bos=BOS, seed=0)


def test_validation_covers_each_token_once_and_pads_with_weight_zero(tmp_path: Path) -> None:
    held_out = [[BOS, *range(100 + 10 * i, 109 + 10 * i)] for i in range(15)]
    shards = TokenShards(write(tmp_path / "v", [[BOS, 1]], held_out=held_out), "validation")
    batches = list(
        validation_batches(shards, context=32, max_tokens=10_000, micro_tokens=64, bos=BOS)
    )
    targets = torch.cat([batch.targets[batch.weights > 0] for batch in batches])
    assert torch.equal(targets, torch.from_numpy(shards.read(1, shards.n_tokens)))
    limited = list(validation_batches(shards, context=32, max_tokens=40, micro_tokens=64, bos=BOS))
    assert sum(int(batch.weights.sum()) for batch in limited) == 40


# -------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture
def conversations(tmp_path: Path) -> list[TokenShards]:
    """Two sets of 30 conversations; conversation c is BOS, then c's number repeated; its second
    half carries loss.
    """
    sets = []
    for s in range(2):
        lengths = np.random.default_rng(s).integers(4, 30, 30)
        documents = [[BOS] + [1000 * (s + 1) + c] * (n - 1) for c, n in enumerate(lengths)]
        masks = [[0] * (n - n // 2) + [1] * (n // 2) for n in lengths]
        sets.append(TokenShards(write(tmp_path / f"chat{s}", documents, masks), "train"))
    return sets


SFT = SFTConfig(sources=(ChatSource(demo="x"),), context=32, epochs=2.0, tokens_per_step=128)


def test_every_conversation_is_seen_whole_and_once_an_epoch(
    conversations: list[TokenShards],
) -> None:
    one_epoch = replace(SFT, epochs=1.0, tokens_per_step=32)
    batches = ConversationBatches(conversations, [1.0, 1.0], one_epoch, pad=PAD, seed=0)
    counts = torch.zeros(3000, dtype=torch.int64)
    for step in range(batches.n_steps):
        counts += torch.bincount(batches.batch(step).ids, minlength=3000)
    for s, shards in enumerate(conversations):
        lengths = np.diff(np.concatenate([[0], shards.ends]))
        for c, n in enumerate(lengths):
            assert counts[1000 * (s + 1) + c] == n - 1


def test_weights_say_how_often_a_set_is_seen(conversations: list[TokenShards]) -> None:
    one_epoch = replace(SFT, epochs=1.0, tokens_per_step=32)
    batches = ConversationBatches(conversations, [2.0, 0.0], one_epoch, pad=PAD, seed=0)
    ids = torch.cat([batches.batch(step).ids for step in range(batches.n_steps)])
    assert not (ids >= 2000).any()
    assert (ids >= 1000).sum() == 2 * (conversations[0].n_tokens - conversations[0].n_documents)


def test_no_conversation_and_an_epoch_of_none_are_a_users_error(
    conversations: list[TokenShards], tmp_path: Path
) -> None:
    empty = TokenShards(write(tmp_path / "empty", [], [], held_out=()), "train")
    with pytest.raises(UserError, match="not one conversation of at most 32 tokens"):
        ConversationBatches([empty], [1.0], SFT, pad=PAD, seed=0)
    few = replace(SFT, epochs=1e-9)
    with pytest.raises(UserError, match="1e-09 epochs of 30 conversations are none"):
        ConversationBatches(conversations[:1], [1.0], few, pad=PAD, seed=0)


def test_loss_covers_masked_targets_only_and_never_crosses_conversations(
    conversations: list[TokenShards],
) -> None:
    batches = ConversationBatches(conversations, [1.0, 1.0], SFT, pad=PAD, seed=0)
    batch = batches.batch(0)
    learnt = batch.weights > 0
    # a conversation repeats its number
    assert torch.equal(batch.ids[learnt], batch.targets[learnt])
    assert not (batch.targets[learnt] == PAD).any()
    # each conversation of n tokens carries loss for its last n // 2
    total = sum(int(b.weights.sum()) for b in map(batches.batch, range(batches.n_steps)))
    assert total > 0
    starts = batch.starts.nonzero().flatten().tolist()
    for first, end in zip(starts, [*starts[1:], len(batch.ids)], strict=True):
        if batch.ids[first] == BOS:
            assert int(batch.weights[first:end].sum()) == (end - first) // 2


def test_rows_are_full_and_never_overfull() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 2000)
    rows = pack_rows(lengths, 256)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 256
    assert sum(filled) / (256 * len(rows)) > 0.96


# ------------------------------------------------------------------------------------ loaded ahead


class Recorded:
    """Batches that note by which thread, and in which order, they were asked for."""

    n_steps, context = 6, 4

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool]] = []  # step, and whether the main thread asked
        self.came = threading.Condition()

    def batch(self, step: int) -> Batch:
        with self.came:
            self.asked.append((step, threading.current_thread() is threading.main_thread()))
            self.came.notify()
        if step == 5:
            raise UserError("the disk is gone")
        ids = torch.full((4,), step)
        return Batch(ids, ids, torch.ones(4), ids == 0, 4)

    def stage(self, step: int) -> int:
        return step // 3

    def context_of(self, stage: int) -> int:
        return 4


def test_the_next_batch_is_loaded_while_a_step_runs_and_each_is_its_steps() -> None:
    source = Recorded()
    with LoadedAhead(source, torch.device("cpu")) as ahead:
        assert (ahead.n_steps, ahead.context, ahead.stage(4), ahead.context_of(1)) == (6, 4, 1, 4)
        assert ahead.batch(2).ids.tolist() == [2] * 4
        with source.came:  # nobody has asked for it yet
            assert source.came.wait_for(lambda: (3, False) in source.asked, timeout=60)
        assert ahead.batch(3).ids.tolist() == [3] * 4
        assert ahead.batch(1).ids.tolist() == [1] * 4  # not the one that was expected
        assert ahead.batch(2).ids.tolist() == [2] * 4
    assert not any(by_main for _, by_main in source.asked)


def test_what_loading_ahead_raises_is_raised_at_its_own_step() -> None:
    with LoadedAhead(Recorded(), torch.device("cpu")) as ahead:
        assert ahead.batch(4).ids.tolist() == [4] * 4
        with pytest.raises(UserError, match="the disk is gone"):
            ahead.batch(5)


def test_a_batch_for_a_card_is_pinned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    with LoadedAhead(Recorded(), torch.device("cuda")) as ahead:
        ahead.batch(1)
    assert len(pinned) >= 3  # ids, targets, weights
    pinned.clear()
    Recorded().batch(1).pinned(torch.device("mps"))
    assert pinned == []

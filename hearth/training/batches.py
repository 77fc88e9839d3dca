"""Step number → batch: mixing corpora, packing conversations, the curriculum.

In: token shards, a seed, the config. Out: `Batch`es of a fixed number of tokens, laid flat. Every
batch is a function of its step alone: there is no iterator to save, so resuming is exact. Knows
nothing of the model or the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from config import PretrainConfig, SFTConfig, UserError
from hearth.data.token_shards import TokenShards


@dataclass(frozen=True)
class Batch:
    """N tokens laid flat, cut into rows of `row_length`; attention never crosses a start or a row's
    end.
    """

    ids: Tensor  # (N,) int64
    targets: Tensor  # (N,) int64, the token that follows each
    weights: Tensor  # (N,) float32, 1 where the target carries loss; of a rollout, an advantage
    starts: Tensor  # (N,) bool, the first token of each segment
    row_length: int
    # what the step's weighted sum is divided by; None is the sum of the weights
    normaliser: float | None = None

    def part(self, here: slice) -> Batch:
        """Some of the tokens: whole rows."""
        ids, targets = self.ids[here], self.targets[here]
        weights, starts = self.weights[here], self.starts[here]
        return replace(self, ids=ids, targets=targets, weights=weights, starts=starts)

    def split(self, n_tokens: int) -> Iterator[Batch]:
        """Micro-batches of at most `n_tokens`, cut between rows."""
        whole_rows = max(1, n_tokens // self.row_length) * self.row_length
        for first in range(0, len(self.ids), whole_rows):
            yield self.part(slice(first, first + whole_rows))

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        pinned = self.pinned(device)
        move = (
            x.to(device, non_blocking=True) for x in (pinned.ids, pinned.targets, pinned.weights)
        )
        # `PackedSequences` reads the starts before the card needs them
        return Batch(*move, self.starts, self.row_length, self.normaliser)

    def pinned(self, device: torch.device) -> Batch:
        """In memory from which a CUDA card reads by itself; what is there already stays."""
        if device.type != "cuda":
            return self
        there = (x.pin_memory() for x in (self.ids, self.targets, self.weights))
        return Batch(*there, self.starts, self.row_length, self.normaliser)


class Batches(Protocol):
    """What the loop asks for."""

    n_steps: int
    context: int  # longest segment of all stages of the curriculum

    def batch(self, step: int) -> Batch: ...

    def stage(self, step: int) -> int: ...

    def context_of(self, stage: int) -> int: ...


class LoadedAhead:
    """`Batches` of which the next one is loaded, and pinned for a card, in a thread while a step
    runs. A batch is a function of its step, so it is the same however it is loaded.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.n_steps, self.context = batches.n_steps, batches.context
        self.stage, self.context_of = batches.stage, batches.context_of
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Batch]] | None = None  # step, and its batch to be

    def batch(self, step: int) -> Batch:
        found = self._next[1] if self._next and self._next[0] == step else self._load(step)
        batch = found.result()
        self._next = (step + 1, self._load(step + 1)) if step + 1 < self.n_steps else None
        return batch

    def _load(self, step: int) -> Future[Batch]:
        return self._thread.submit(lambda: self.batches.batch(step).pinned(self.device))

    def __enter__(self) -> LoadedAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)


@lru_cache(maxsize=64)
def _permutation(n: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


# -------------------------------------------------------------------------------------- pretraining


class PretrainingBatches:
    """Chunks of `context` tokens of each corpus, visited in a seeded permutation an epoch, mixed by
    weight.
    """

    def __init__(
        self,
        shards: list[TokenShards],
        weights: list[float],
        config: PretrainConfig,
        *,
        context: int,
        bos: int,
        seed: int,
    ) -> None:
        self.shards, self.config, self.context, self.bos, self.seed = (
            shards,
            config,
            context,
            bos,
            seed,
        )
        self.n_steps = config.steps
        self.rows_per_step = config.tokens_per_step // context
        self.n_chunks = [(corpus.n_tokens - 1) // context for corpus in shards]
        if sum(self.n_chunks) < self.rows_per_step or not all(self.n_chunks):
            held = ", ".join(f"{corpus.folder.name} {corpus.n_tokens:,}" for corpus in shards)
            raise UserError(
                f"Too little text: one step takes {config.tokens_per_step:,} tokens in rows of "
                f"{context:,}, the "
                f"corpora hold {held}. Add text, or lower --pretrain.tokens_per_step and "
                "--model.context."
            )
        self._plan(weights)

    def _plan(self, weights: list[float]) -> None:
        """Which corpus each row of the whole run takes, and how many rows of it came before."""
        stage_ends = np.cumsum([stage.share for stage in self.config.stages]) * self.config.steps
        self.stage_of_step = np.searchsorted(
            np.round(stage_ends), np.arange(self.config.steps), side="right"
        )
        self.stage_of_step = np.minimum(self.stage_of_step, len(self.config.stages) - 1)
        # the golden ratio's multiples are spread evenly, so every stretch of rows holds close to
        # its share
        evenly = np.arange(self.config.steps * self.rows_per_step) * 0.6180339887498949 % 1.0
        corpus_of_row = np.empty(len(evenly), dtype=np.int64)
        stage_of_row = np.repeat(self.stage_of_step, self.rows_per_step)
        for i, stage in enumerate(self.config.stages):
            share = np.array(stage.weights or weights, dtype=float)
            if len(share) != len(self.shards) or share.min() < 0 or share.sum() <= 0:
                raise UserError(
                    f"pretrain.stages[{i}].weights are {share.tolist()}: give one a corpus, one "
                    "above 0."
                )
            borders = np.cumsum(share / share.sum())[:-1]
            corpus_of_row[stage_of_row == i] = np.searchsorted(
                borders, evenly[stage_of_row == i], side="right"
            )
        self.corpus_of_row = corpus_of_row
        self.rank_of_row = np.empty_like(corpus_of_row)
        for corpus in range(len(self.shards)):
            mine = corpus_of_row == corpus
            self.rank_of_row[mine] = np.arange(mine.sum())

    def epochs(self) -> list[float]:
        """How often the whole run passes over each corpus."""
        return [float((self.corpus_of_row == c).sum() / n) for c, n in enumerate(self.n_chunks)]

    def stage(self, step: int) -> int:
        return int(self.stage_of_step[step])

    def context_of(self, stage: int) -> int:
        """The longest segment of a stage of the curriculum."""
        return self.config.stages[stage].context

    def batch(self, step: int) -> Batch:
        """The batch of `step`: `tokens_per_step` tokens, rows as long as its curriculum stage's
        context.
        """
        rows = range(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        tokens = np.stack([self._row(row) for row in rows])
        return _next_token_batch(tokens, self.bos, self.context_of(self.stage(step)))

    def _row(self, row: int) -> np.ndarray:
        corpus, rank = int(self.corpus_of_row[row]), int(self.rank_of_row[row])
        epoch, index = divmod(rank, self.n_chunks[corpus])
        chunk = int(_permutation(self.n_chunks[corpus], self.seed, corpus, epoch)[index])
        return self.shards[corpus].read(chunk * self.context, (chunk + 1) * self.context + 1)


def _next_token_batch(tokens: np.ndarray, bos: int, row_length: int) -> Batch:
    """tokens (rows, context + 1) -> every token predicts the one after it; documents open with
    `bos`.
    """
    tokens = torch.from_numpy(tokens.astype(np.int64))
    ids = tokens[:, :-1].flatten()
    starts = ids == bos
    starts.view(-1, row_length)[:, 0] = True
    return Batch(ids, tokens[:, 1:].flatten(), torch.ones(len(ids)), starts, row_length)


def validation_batches(
    shards: TokenShards, *, context: int, max_tokens: int, micro_tokens: int, bos: int
) -> Iterator[Batch]:
    """The first `max_tokens` held-out tokens in rows of `context`; the last row is filled up with
    weight 0.
    """
    n_targets = min(max_tokens, shards.n_tokens - 1)
    rows_at_once = max(1, micro_tokens // context)
    for first in range(0, n_targets, rows_at_once * context):
        n = min(rows_at_once * context, n_targets - first)
        n_rows = -(-n // context)
        flat = np.full(n_rows * context + 1, bos, dtype=np.int64)
        flat[: n + 1] = shards.read(first, first + n + 1)
        rows = np.stack([flat[i * context : (i + 1) * context + 1] for i in range(n_rows)])
        batch = _next_token_batch(rows, bos, context)
        batch.weights[n:] = 0
        yield batch


# -------------------------------------------------------------------------------------- fine-tuning


def pack_rows(lengths: np.ndarray, capacity: int, n_open: int = 64) -> list[list[int]]:
    """First fit: indices of `lengths` laid into rows of `capacity`, `n_open` unfilled rows kept
    open at a time.
    """
    rows: list[list[int]] = []
    open_rows: list[list] = []  # [room left, row]
    for index, length in enumerate(lengths.tolist()):
        for entry in open_rows:
            if entry[0] >= length:
                entry[0] -= length
                entry[1].append(index)
                break
        else:
            row = [index]
            rows.append(row)
            open_rows.append([capacity - length, row])
            if len(open_rows) > n_open:
                open_rows.remove(min(open_rows, key=lambda entry: entry[0]))
    return rows


class ConversationBatches:
    """Whole conversations packed into rows of `context` tokens, each seeing itself alone; shuffled
    every epoch.
    """

    def __init__(
        self,
        shards: list[TokenShards],
        weights: list[float],
        config: SFTConfig,
        *,
        pad: int,
        seed: int,
    ) -> None:
        self.shards, self.config, self.pad, self.context = shards, config, pad, config.context
        self.rows_per_step = max(1, config.tokens_per_step // config.context)
        conversations = [
            (corpus, start, end)
            for corpus, reader in enumerate(shards)
            for start, end in pairwise([0, *reader.ends.tolist()])
        ]
        self._conversations = np.array(conversations, dtype=np.int64).reshape(-1, 3)
        if not len(self._conversations):
            raise UserError(
                f"There is not one conversation of at most {config.context} tokens, the stage's "
                "context, to train on. Check its files."
            )
        self._share = np.array([weights[c] for c in self._conversations[:, 0]])
        self._rows = self._plan(seed)
        if not self._rows:
            raise UserError(
                f"{config.epochs:g} epochs of {len(self._share)} conversations are none. Give the "
                "stage more epochs."
            )
        self.n_steps = max(1, len(self._rows) // self.rows_per_step)

    def _plan(self, seed: int) -> list[np.ndarray]:
        rows: list[np.ndarray] = []
        whole, part = divmod(self.config.epochs, 1)
        for epoch in range(int(whole) + (part > 0)):
            share = self._share * (part if epoch == int(whole) else 1.0)
            rng = np.random.default_rng((seed, epoch))
            times = np.floor(share).astype(int) + (rng.random(len(share)) < share % 1)
            order = rng.permutation(np.repeat(np.arange(len(share)), times))
            lengths = self._conversations[order, 2] - self._conversations[order, 1]
            packed = [order[row] for row in pack_rows(lengths, self.config.context)]
            rows += [packed[i] for i in rng.permutation(len(packed))]
        short = -len(rows) % self.rows_per_step if len(rows) < self.rows_per_step else 0
        return rows + [rows[i % len(rows)] for i in range(short)]

    def stage(self, step: int) -> int:
        return 0

    def context_of(self, stage: int) -> int:
        return self.config.context

    def batch(self, step: int) -> Batch:
        rows = self._rows[step * self.rows_per_step : (step + 1) * self.rows_per_step]
        return self._lay(rows)

    def _lay(self, rows: list[np.ndarray]) -> Batch:
        shape = (len(rows), self.config.context)
        ids, targets = np.full(shape, self.pad), np.full(shape, self.pad)
        weights, starts = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
        for r, row in enumerate(rows):
            at = 0
            for corpus, first, end in self._conversations[row]:
                tokens, mask = (
                    self.shards[corpus].read(first, end),
                    self.shards[corpus].read_mask(first, end),
                )
                n = len(tokens)
                ids[r, at : at + n] = tokens
                targets[r, at : at + n - 1] = tokens[1:]
                weights[r, at : at + n - 1] = mask[1:]
                starts[r, at] = True
                at += n
            if at < shape[1]:
                starts[r, at] = True
        flat = (torch.from_numpy(x).flatten() for x in (ids, targets, weights, starts))
        return Batch(*flat, self.config.context)

    def fill(self) -> tuple[float, float]:
        """Share of the batch's tokens that are no padding, and share that carry loss, over the
        first 50 steps.
        """
        rows = self._rows[: 50 * self.rows_per_step]
        batch = self._lay(rows)
        return float((batch.ids != self.pad).float().mean()), float(batch.weights.mean())


def held_out_conversations(
    shards: TokenShards, *, context: int, max_tokens: int, pad: int
) -> Iterator[Batch]:
    """The first held-out conversations up to `max_tokens`, one packed row a batch."""
    once = SFTConfig(context=context, epochs=1.0, tokens_per_step=context)
    packed = ConversationBatches([shards], [1.0], once, pad=pad, seed=0)
    for step in range(min(packed.n_steps, max(1, max_tokens // context))):
        yield packed.batch(step)

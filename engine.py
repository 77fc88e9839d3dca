"""Generate token ids with a model: prefill in chunks, a cached pass a token, sampling.

In: prompts as ids. Out: answers as ids, whole or one by one.
Knows no tokenizer and no chat format; leaves the model untouched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import KVCache, Model, decode

# B rows, T positions of a chunk, V vocab_size


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits; the default takes the likeliest."""

    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens; None is all
    top_p: float | None = None  # draw from the likeliest tokens that make up this probability; None is all
    min_p: float | None = None  # draw from tokens at least this likely, relative to the likeliest; None is all
    repetition_penalty: float = 1.0  # above 1 makes tokens already in the text less likely; stop tokens are exempt

    def __post_init__(self) -> None:
        found = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            found.append(f"temperature is {self.temperature}, must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k is {self.top_k}, must be at least 1 or None")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                found.append(f"{name} is {value}, must lie between 0 and 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            found.append(f"repetition_penalty is {self.repetition_penalty}, must be above 0")
        if found:
            raise ValueError("; ".join(found))


class Engine:
    """Answers prompts with `model`; a stream keeps its cache, so a prompt that extends it prefills only what is new."""

    def __init__(self, model: Model, *, max_chunk: int = 256, h_cycles: int | None = None) -> None:
        self.model, self.max_chunk, self.h_cycles = model, max_chunk, h_cycles
        self.context = model.config.context
        self._cache: KVCache | None = None  # of the stream
        self._held: list[int] = []  # the ids in it

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """An answer to each prompt, all decoded together; one that stopped by itself ends in its stop id.

        `seeds` gives each row its own dice, so a row's answer does not depend on its neighbours (default: its index).
        """
        sampling = sampling or Sampling()
        rows = [_Row(prompt, seeds[i] if seeds else i, max_tokens, self.context) for i, prompt in enumerate(prompts)]
        live = [row for row in rows if not row.finish]
        if not live:
            return [row.answer for row in rows]
        longest = max(len(row.ids) for row in live)
        pad = [longest - len(row.ids) for row in live]
        # a row ends at the latest when its own positions fill the context
        cache = KVCache(len(live), longest + min(max_tokens, self.context), pad=pad, device=self.model.device)
        ids = [[0] * gap + row.ids for gap, row in zip(pad, live, strict=True)]
        while True:
            tokens = draw(self._forward(ids, cache), live, sampling, stop_ids)
            for row, token in zip(live, tokens, strict=True):
                row.take(token, stop_ids)
            unfinished = [i for i, row in enumerate(live) if not row.finish]
            if not unfinished:
                return [row.answer for row in rows]
            if len(unfinished) <= 0.75 * len(live):  # finished rows are carried along until dropping them pays
                cache.keep_rows(unfinished)
                live = [live[i] for i in unfinished]
            ids = [row.ids[-1:] for row in live]

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> Iterator[int]:
        """The answer's ids as they are decoded, the stop id included."""
        sampling = sampling or Sampling()
        row = _Row(prompt, seed, max_tokens, self.context)
        ids = row.ids[self._reuse(row.ids) :]
        while not row.finish:
            cache, self._cache = self._cache, None  # a pass that is interrupted leaves no half-written cache behind
            logits = self._forward([ids], cache)
            self._cache, self._held = cache, self._held + ids
            row.take(draw(logits, [row], sampling, stop_ids)[0], stop_ids)
            ids = row.ids[-1:]
            yield ids[0]

    def _reuse(self, prompt: list[int]) -> int:
        """Bring the stream's cache to a beginning of the prompt, at least one id short of it; returns its length."""
        common = 0
        for ours, theirs in zip(self._held, prompt[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        if self._cache is None or not self._cache.rewind(common):
            common, self._cache = 0, KVCache(1, self.context, device=self.model.device)
        self._held = self._held[:common]
        return common

    @torch.no_grad()
    def _forward(self, ids: list[list[int]], cache: KVCache) -> Tensor:
        """Float32 logits (B, V) after ids (B, T), which join the cache a chunk at a time."""
        chunk = max(1, self.max_chunk // len(ids))
        tensor = torch.tensor(ids, device=self.model.device)
        for part in tensor.split(chunk, dim=1):
            hidden = decode(self.model, part, cache, self.h_cycles)
        return self.model.logits(hidden[:, -1])


class _Row:
    """One answer in the making."""

    def __init__(self, prompt: Sequence[int], seed: int, max_tokens: int, context: int) -> None:
        if not 0 < len(prompt) <= context:
            raise ValueError(f"a prompt of {len(prompt)} tokens; it must have 1 to {context}")
        self.ids, self.start = list(prompt), len(prompt)
        self.dice = torch.Generator().manual_seed(seed)
        self.longest = min(context + 1, len(prompt) + max_tokens)  # the last token need not fit: nothing follows it
        self.finish = "length" if max_tokens < 1 else ""

    @property
    def answer(self) -> list[int]:
        return self.ids[self.start :]

    def take(self, token: int, stop_ids: Sequence[int]) -> None:
        """Add a token, unless the answer is complete."""
        if self.finish:
            return
        self.ids.append(token)
        if token in stop_ids:
            self.finish = "stop"
        elif len(self.ids) >= self.longest:
            self.finish = "length"


def draw(logits: Tensor, rows: Sequence[_Row], sampling: Sampling, stop_ids: Sequence[int]) -> list[int]:
    """The next token of each row from float32 logits (B, V)."""
    if sampling.repetition_penalty != 1.0:
        logits = penalise(logits, [row.ids for row in rows], sampling.repetition_penalty, stop_ids)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    dice = torch.stack([torch.rand((), generator=row.dice, dtype=torch.float64) for row in rows])
    return pick(probabilities(logits, sampling), dice).tolist()


def penalise(logits: Tensor, said: Sequence[Sequence[int]], penalty: float, exempt: Sequence[int]) -> Tensor:
    """Logits (B, V) where tokens a row has `said` are `penalty` times less likely in the odds: positive logits are
    divided, negative ones multiplied (arXiv 1909.05858, with the sign mended). Tokens in `exempt` keep theirs."""
    logits = logits.clone()
    for row, ids in zip(logits, said, strict=True):
        seen = torch.tensor(sorted(set(ids) - set(exempt)), dtype=torch.long, device=logits.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, V) after temperature, top-k, min-p and top-p, in this order, each row adding up to 1."""
    p = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_k is not None and sampling.top_k < p.shape[-1]:
        p = p.where(p >= p.topk(sampling.top_k).values[:, -1:], 0)
    if sampling.min_p is not None:
        p = p.where(p >= sampling.min_p * p.amax(dim=-1, keepdim=True), 0)
    p = p / p.sum(dim=-1, keepdim=True)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_p = p.sort(dim=-1, descending=True).values
        before = sorted_p.cumsum(dim=-1) - sorted_p  # what the likelier ones already make up
        least = sorted_p.where(before < sampling.top_p, 2).amin(dim=-1, keepdim=True)
        least = least.minimum(sorted_p[:, :1])  # top_p of 0 still keeps the likeliest
        p = p.where(p >= least, 0)
    return p / p.sum(dim=-1, keepdim=True)


def pick(p: Tensor, dice: Tensor) -> Tensor:
    """The token (B,) at which each row of p (B, V), added up, passes its dice (B,) in [0, 1)."""
    total = p.double().cumsum(dim=-1)
    token = torch.searchsorted(total, (dice.to(p.device) * total[:, -1])[:, None], right=True).squeeze(1)
    return token.clamp(max=p.shape[-1] - 1)

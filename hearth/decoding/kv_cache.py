"""Decoding state: keys and values of the tokens so far, passes over the next ones, a copy of a
model that only decodes.

In: a model, ids of the next columns. Out: hidden states or logits of them, a cache that grew.
Knows nothing of sampling, of texts and of what calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from model import Block, Model, rotary_table

# B rows, T new columns, N = B·T tokens laid flat, D d_model, H query heads, G key/value heads, E
# head_dim, V vocab_size, C entries of a cache's slot


class KVCache:
    """Keys and values of B rows while decoding; a `AttentionContext`, like `PackedSequences`.

    All rows advance together, a column a token; a prompt shorter than its neighbours is padded in
    front:

        column      0 1 2 3 4 5
        row 0       a b c d e f      pad 0, position = column
        row 1       . . g h i j      pad 2, position = column - 2

    Every attention call of a pass has a slot of its own, in call order (each call of an HRM module
    sees other states). A whole-context slot keeps every column up to `capacity`; a windowed one is
    a ring of `window` columns, so a single new column overwrites exactly the one that left the
    window.
    """

    def __init__(
        self,
        n_rows: int,
        capacity: int,
        *,
        pad: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.capacity, self.device = capacity, torch.device(device)
        self.dtype = dtype  # of keys and values; None is that of the first pass's activations
        self.pad = torch.tensor(pad or [0] * n_rows, device=device)  # (B,)
        self.longest_pad = max(pad or [0])
        # of the columns, for `before`
        self.ids = torch.zeros(n_rows, capacity, dtype=torch.long, device=device)
        self.slots: list[tuple[Tensor, Tensor]] = []  # k, v (B, G, C, E) in call order
        # length then, rings then
        self.marks: list[tuple[int, dict[int, tuple[Tensor, Tensor]]]] = []
        self.length = 0  # columns written
        self.n_new = 0  # columns of the pass under way

    def place(self, n_new: int) -> KVCache:
        """Announce a pass over the next `n_new` columns; they count once `advance` is called."""
        if self.length + n_new > self.capacity:
            raise ValueError(
                f"{self.length} + {n_new} columns are beyond the cache's capacity {self.capacity}"
            )
        self.n_new = n_new
        self.columns = torch.arange(self.length, self.length + n_new, device=self.device)
        rows, end = torch.arange(len(self.pad)), self.length + n_new
        self.seats = (rows, self.pad, torch.full_like(rows, end))  # of `BlockKernel`
        self._masks: dict[int | None, Tensor | None] = {}
        return self

    def advance(self) -> None:
        self.length += self.n_new

    def begin(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.next_slot, self.dtype = 0, self.dtype or dtype
        positions = (self.columns - self.pad[:, None]).clamp(min=0)  # (B, T)
        self.rotary = rotary_table(positions.flatten(), config.head_dim, config.rope_base, dtype)

    def before(self, x: Tensor, ids: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        self.ids[:, self.columns] = ids.view(len(self.pad), -1)
        columns = self.columns - 1
        exists = (columns >= self.pad[:, None]).flatten()
        return torch.where(exists[:, None], embed(self.ids[:, columns].flatten()), 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        T, B = self.n_new, len(self.pad)
        N, H, E = q.shape
        G = k.shape[1]
        k, v = (x.view(B, T, G, E).transpose(1, 2).to(self.dtype) for x in (k, v))  # (B, G, T, E)
        keys, values = (x.to(q.dtype) for x in self._write(k, v, window))
        # the query heads that share a key/value head become its queries: (B, G, H/G · T, E)
        q = q.view(B, T, G, H // G, E).permute(0, 2, 3, 1, 4).reshape(B, G, -1, E)
        mask = self._mask(window, keys.shape[2])
        if mask is not None and T > 1:
            mask = mask.repeat(1, 1, H // G, 1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return y.view(B, G, H // G, T, E).permute(0, 3, 1, 2, 4).reshape(N, H, E)

    def n_entries(self, window: int | None) -> int:
        """Columns that a slot holds."""
        return self.capacity if window is None else min(window, self.capacity)

    def slot(self, n_kv_head: int, head_dim: int, window: int | None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, C, E) of the attention call at hand."""
        if self.next_slot == len(self.slots):
            shape = (len(self.pad), n_kv_head, self.n_entries(window), head_dim)
            self.slots.append(
                tuple(torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            )
        self.next_slot += 1
        return self.slots[self.next_slot - 1]

    def _write(self, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Put k and v (B, G, T, E) into the slot at hand; keys and values that this pass attends
        to.

        One column, or a slot that keeps all, is read in place. A chunk over a ring is attended to
        beside the columns that it overwrites: those of the ring first, in the ring's order, then
        the chunk's own.
        """
        T, n_entries = self.n_new, self.n_entries(window)
        slot = self.slot(k.shape[1], k.shape[3], window)
        end = self.length + T
        if T > 1 and end > n_entries:
            held = min(self.length, n_entries)
            seen = [
                torch.cat([old[:, :, :held], new], dim=2)
                for old, new in zip(slot, (k, v), strict=True)
            ]
            kept = min(T, n_entries)
            entry = torch.arange(end - kept, end, device=self.device) % n_entries
            for old, new in zip(slot, (k, v), strict=True):
                old[:, :, entry] = new[:, :, T - kept :]
            return seen[0], seen[1]
        entry = self.length % n_entries
        for old, new in zip(slot, (k, v), strict=True):
            old[:, :, entry : entry + T] = new
        return slot[0][:, :, :end], slot[1][:, :, :end]  # a slice beyond a full ring is the ring

    def repeat(self, n_calls: int, rows: Tensor | None = None) -> None:
        """In `rows` (indices; default: all), this pass's columns of the last `n_calls` attention
        calls become copies of the columns of the `n_calls` before them.
        """
        rows = torch.arange(len(self.pad), device=self.device) if rows is None else rows
        last = self.next_slot - n_calls
        for to, source in zip(
            self.slots[last : self.next_slot], self.slots[last - n_calls : last], strict=True
        ):
            n_entries = to[0].shape[2]
            entries = self.columns[-n_entries:] % n_entries
            for ours, theirs in zip(to, source, strict=True):
                ours[rows[:, None], :, entries] = theirs[rows[:, None], :, entries]

    def skip(self, n_calls: int) -> None:
        """Stand in for the next `n_calls` attention calls, a cycle of the HRM head that is not run.

        Their keys and values of this pass are those of the cycle before. The modules are the same,
        so this says what leaving early means: the states no longer change. Tokens that do run the
        cycle later see these.
        """
        for keys, _ in self.slots[self.next_slot - n_calls : self.next_slot]:
            self.slot(keys.shape[1], keys.shape[3], keys.shape[2])
        self.repeat(n_calls)

    def _mask(self, window: int | None, n_keys: int) -> Tensor | None:
        """(B or 1, 1, T, keys): may the query (third axis) attend to the key (fourth axis)? None
        where all may.
        """
        if window is not None and window >= self.capacity:
            window = None
        if window not in self._masks:
            self._masks[window] = self._make_mask(window, n_keys)
        return self._masks[window]

    def _make_mask(self, window: int | None, n_keys: int) -> Tensor | None:
        T, end = self.n_new, self.length + self.n_new
        # the oldest column that one new column sees
        in_view = 0 if window is None else max(0, end - window)
        if T == 1 and self.longest_pad <= in_view:
            return None
        if window is None or end <= window:
            column = torch.arange(n_keys, device=self.device)
        elif T == 1:
            entry = torch.arange(window, device=self.device)
            column = end - 1 - (end - 1 - entry) % window
        else:
            held = torch.arange(n_keys - T, device=self.device)
            column = torch.cat([self.length - 1 - (self.length - 1 - held) % window, self.columns])
        now = self.columns[:, None]
        seen = column <= now  # (T, keys)
        if window is not None:
            seen = seen & (now - column < window)
        if self.longest_pad:
            # padding sees itself: a softmax over nothing would be NaN
            seen = seen & ((column >= self.pad[:, None, None]) | (column == now))  # (B, T, keys)
        return seen.view(-1, 1, T, n_keys)

    def mark(self) -> None:
        """Remember the rings as they are, so that `rewind` can come back to here; the two newest
        marks are kept.
        """
        rings = {
            n: (k.clone(), v.clone())
            for n, (k, v) in enumerate(self.slots)
            if k.shape[2] < self.capacity
        }
        self.marks = [*self.marks[-1:], (self.length, rings)]

    def rewind(self, length: int) -> int:
        """Forget columns, so that at most `length` are left; returns how many: an earlier mark, or
        none, where a ring has overwritten what the columns to come still see.
        """
        wrapped = self.length > min((k.shape[2] for k, _ in self.slots), default=self.capacity)
        self.marks = [mark for mark in self.marks if mark[0] <= length]
        if length < self.length and wrapped:
            length, rings = self.marks[-1] if self.marks else (0, {})
            for n, (k, v) in rings.items():
                for now, then in zip(self.slots[n], (k, v), strict=True):
                    now.copy_(then)
        self.length = min(length, self.length)
        return self.length

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forget all rows but these, which take their order; a row given twice is copied."""
        index = torch.tensor(rows, device=self.device)
        self.slots = [(k[index], v[index]) for k, v in self.slots]
        self.pad, self.ids = self.pad[index], self.ids[index]
        self.longest_pad = int(self.pad.max())
        self.marks = []

    def n_bytes(self) -> int:
        """Memory of the keys and values, in bytes, once all `capacity` columns are in use."""
        return sum(x.numel() * x.element_size() for slot in self.slots for x in slot)


@torch.no_grad()
def decode(model: Model, ids: Tensor, cache: KVCache, h_cycles: int | None = None) -> Tensor:
    """Hidden states (B, T, D) of the next columns' ids (B, T), which join the cache."""
    hidden = model(ids.flatten(), cache.place(ids.shape[1]), h_cycles=h_cycles)
    cache.advance()
    return hidden.view(*ids.shape, -1)


class Thought(NamedTuple):
    """What `decode_early_exit` reads out of the last column of B rows."""

    logits: Tensor  # (B, V) float32
    cycles: Tensor  # (B,) the head's cycles that each row ran


@torch.no_grad()
def decode_early_exit(
    model: Model,
    ids: Tensor,
    cache: KVCache,
    *,
    h_cycles: int | None = None,
    exit_kl_threshold: float | None = None,
) -> Thought:
    """Like `decode`, for the next columns' ids (B, T), but read out; may leave the head's cycles
    early.

    With `exit_kl_threshold`, a row leaves after the first cycle whose distribution lies within that
    many nats (KL divergence) of the one before; before the first cycle comes the trunk's own. What
    a row says does not depend on its neighbours. A prompt (T > 1) always runs all cycles. Each
    distribution costs a product with the embedding.
    """
    hrm = model.config.hrm
    n_cycles = (h_cycles or hrm.h_cycles) if hrm else 0
    ran = torch.full((len(ids),), n_cycles, device=ids.device)
    if exit_kl_threshold is None or ids.shape[1] > 1 or hrm is None:
        return Thought(model.logits(decode(model, ids, cache, h_cycles)[:, -1]), ran)
    n_calls = len(model.head.block_passes(1))
    states = model.cycles(ids.flatten(), cache.place(1), h_cycles=h_cycles)
    for cycle, hidden in enumerate(states):
        gone = ran < cycle
        if gone.any():
            cache.repeat(n_calls, gone.nonzero().flatten())
        read = model.logits(hidden)
        if cycle == 0:
            logits = read
            continue
        now, before = read.log_softmax(dim=-1), logits.log_softmax(dim=-1)
        close = (now.exp() * (now - before)).sum(dim=-1).clamp(min=0) < exit_kl_threshold
        logits = torch.where(gone[:, None], logits, read)
        ran[close & ~gone] = cycle
        if bool((ran <= cycle).all()):
            for _ in range(n_cycles - cycle):
                cache.skip(n_calls)
            break
    cache.advance()
    return Thought(logits, ran)


MATRICES = {
    Block: (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)),
    Model: (("embedding",),),
}


def for_decoding(model: Model, make: Callable[[Tensor], Any]) -> Model:
    """A copy of `model` that can only decode: `make` turns each weight matrix into what is called
    with x instead.

    Matrices that read the same x are laid one under the other. Gains and other vectors are shared
    with the model.
    """
    with torch.device("meta"):
        copy = Model(model.config)
    for ours, theirs in zip(copy.modules(), model.modules(), strict=True):
        for name, weight in theirs.named_parameters(recurse=False):
            setattr(ours, name, nn.Parameter(weight.detach(), requires_grad=False))
        for group in MATRICES.get(type(theirs), ()):
            group = [name for name in group if getattr(theirs, name) is not None]
            matrix = make(torch.cat([getattr(theirs, name).detach() for name in group]))
            for name in group:
                delattr(ours, name)
                setattr(ours, name, matrix if name == group[0] else None)
    copy.dtype = model.dtype
    return copy

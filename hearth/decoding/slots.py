"""Keys and values of several texts of different lengths, each in a slot of its own.

In: a model, which slots take their next token. Out: a `KVCache` a slot to read a prompt with, and
passes over one token of many slots at once. Knows nothing of requests and of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig
from hearth.decoding.kv_cache import KVCache
from model import Model, rotary_table

# S slots, B rows of a pass, G key/value heads, H query heads, E head_dim, C entries of a slot


class Slots:
    """Storage for `n_slots` texts, each of at most the model's context.

    caches: a `KVCache` of one row over each slot's part of the storage; its `length` is the slot's.
    """

    def __init__(self, model: Model, n_slots: int, *, h_cycles: int | None = None) -> None:
        c, device = model.config, model.device
        dtype = model.cache_dtype or model.dtype
        self.storage: list[tuple[Tensor, Tensor]] = []  # k, v (S, G, C, E) in call order
        for block in model.block_passes(h_cycles):
            shape = (n_slots, c.n_kv_head, min(block.window or c.context, c.context), c.head_dim)
            # zeros: what lies beyond a shorter row's end is masked, but must be finite
            self.storage.append(
                tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            )
        self.ids = torch.zeros(n_slots, c.context, dtype=torch.long, device=device)
        self.caches = [KVCache(1, c.context, device=device, dtype=dtype) for _ in range(n_slots)]
        for s, cache in enumerate(self.caches):
            cache.slots = [(k[s : s + 1], v[s : s + 1]) for k, v in self.storage]
            cache.ids = self.ids[s : s + 1]

    def n_bytes(self) -> int:
        """Memory of the keys and values, in bytes."""
        return sum(x.numel() * x.element_size() for pair in self.storage for x in pair)


def reach(cache: KVCache, length: int) -> int:
    """What `cache.rewind(length)` would return, without rewinding."""
    wrapped = cache.length > min((k.shape[2] for k, _ in cache.slots), default=cache.capacity)
    if length >= cache.length or not wrapped:
        return min(length, cache.length)
    return max((at for at, _ in cache.marks if at <= length), default=0)


class NextTokens:
    """A pass over the next token of each of these slots; an `AttentionContext`, like `KVCache`.

    A slot may be given twice: the pass then does the same for it twice. n_read: entries of each
    slot that are read at most; None is as many as the longest text has. With a number, all that the
    processor knows is how many rows there are: a recorded pass stays right wherever it moves.
    """

    n_new = 1  # columns of each row

    def __init__(self, slots: Slots, rows: Sequence[int], *, n_read: int | None = None) -> None:
        self.slots, self.caches = slots, [slots.caches[s] for s in dict.fromkeys(rows)]
        self.longest = 1 + max(cache.length for cache in self.caches)
        self.n_read = self.longest if n_read is None else n_read
        if self.longest > self.n_read:
            raise ValueError(f"column {self.longest} is beyond the {self.n_read} that are read")
        device = slots.ids.device
        self.rows = torch.tensor(rows, device=device)  # (B,)
        self.ends = torch.tensor([1 + slots.caches[s].length for s in rows], device=device)
        self.seats = (self.rows, torch.zeros_like(self.rows), self.ends)  # of `BlockKernel`

    def place(self, n_new: int) -> NextTokens:
        if n_new != 1 or self.longest > self.slots.ids.shape[1]:
            raise ValueError(f"{n_new} new tokens up to column {self.longest}")
        return self

    def move(self, rows: Sequence[int]) -> None:
        """Go to the next tokens of these slots, as many as before, in the same tensors."""
        to = NextTokens(self.slots, rows, n_read=self.n_read)
        self.caches, self.longest = to.caches, to.longest
        self.rows.copy_(to.rows)
        self.ends.copy_(to.ends)

    def advance(self) -> None:
        for cache in self.caches:
            cache.length += 1

    def begin(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.next_slot = 0
        self.rotary = rotary_table(self.ends - 1, config.head_dim, config.rope_base, dtype)

    def before(self, x: Tensor, ids: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        self.slots.ids[self.rows, self.ends - 1] = ids
        previous = self.slots.ids[self.rows, (self.ends - 2).clamp(min=0)]
        return torch.where(self.ends[:, None] > 1, embed(previous), 0)

    def slot(self, n_kv_head: int, head_dim: int, window: int | None) -> tuple[Tensor, Tensor]:
        """Keys and values (S, G, C, E) of the attention call at hand."""
        self.next_slot += 1
        return self.slots.storage[self.next_slot - 1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        (B, H, E), G = q.shape, k.shape[1]
        storage = self.slot(G, E, window)
        n_entries = storage[0].shape[2]
        entry = (self.ends - 1) % n_entries
        for held, new in zip(storage, (k, v), strict=True):
            held[self.rows, :, entry] = new.to(held.dtype)
        # a ring holds exactly what its window sees, so all that is written may be seen
        n_seen = min(self.n_read, n_entries)
        keys, values = (held[self.rows, :, :n_seen].to(q.dtype) for held in storage)
        written = torch.arange(n_seen, device=q.device) < self.ends[:, None]  # (B, keys)
        # the query heads that share a key/value head become its queries: (B, G, H/G, E)
        y = F.scaled_dot_product_attention(
            q.view(B, G, H // G, E), keys, values, attn_mask=written[:, None, None]
        )
        return y.reshape(B, H, E)

    def repeat(self, n_calls: int, rows: Tensor | None = None) -> None:
        """As `KVCache.repeat`; `rows` are indices into this pass's rows."""
        at, ends = (self.rows, self.ends) if rows is None else (self.rows[rows], self.ends[rows])
        last = self.next_slot - n_calls
        storage = self.slots.storage
        for to, source in zip(
            storage[last : self.next_slot], storage[last - n_calls : last], strict=True
        ):
            entry = (ends - 1) % to[0].shape[2]
            for ours, theirs in zip(to, source, strict=True):
                ours[at, :, entry] = theirs[at, :, entry]

    def skip(self, n_calls: int) -> None:
        """As `KVCache.skip`."""
        self.next_slot += n_calls
        self.repeat(n_calls)

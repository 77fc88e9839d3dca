"""A pass over one more token of each row, recorded once as a CUDA graph and replayed: a small
model's pass is a thousand short kernels, and starting each of them takes longer than running it.

In: a model, a cache or slots that hold the prompts. Out: the next tokens' logits, the rows a token
longer. Knows nothing of sampling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig
from hearth.decoding.kv_cache import KVCache
from hearth.decoding.slots import NextTokens
from model import Model, rotary_table

# B rows, D d_model, H query heads, G key/value heads, E head_dim, C entries of a cache's slot

# what runs once and comes back as something that runs it again, and where its result then lies
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


class OneColumn:
    """The next column of all rows of a cache, an `AttentionContext`. Where the column lies is a
    number on the device, and every shape is that of the whole cache: nothing that the processor
    knows changes from one column to the next, so a recorded pass stays right.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache, self._slots = cache, cache.slots
        self.column = torch.zeros(1, dtype=torch.long, device=cache.device)
        self.move()
        for slot in cache.slots:  # what was never written is multiplied with 0: it must be a number
            for held in slot:
                held[:, :, cache.length :] = 0

    def fits(self, cache: KVCache) -> bool:
        """Whether this is a column of that cache, with the rows that it had."""
        return cache is self.cache and cache.slots is self._slots

    def move(self) -> None:
        """Go to the cache's next column."""
        if self.cache.length >= self.cache.capacity:
            raise ValueError(f"the cache's {self.cache.capacity} columns are full")
        self.column.fill_(self.cache.length)

    def advance(self) -> None:
        self.cache.length += 1

    def begin(self, config: ModelConfig, dtype: torch.dtype) -> None:
        cache = self.cache
        cache.next_slot, self._masks = 0, {}
        positions = (self.column - cache.pad).clamp(min=0)  # (B,)
        self.rotary = rotary_table(positions, config.head_dim, config.rope_base, dtype)

    def before(self, x: Tensor, ids: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        cache, column = self.cache, self.column - 1
        cache.ids.index_copy_(1, self.column, ids[:, None])
        earlier = cache.ids.index_select(1, column.clamp(min=0))[:, 0]
        return torch.where((column >= cache.pad)[:, None], embed(earlier), 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        B, H, E = q.shape
        G = k.shape[1]
        slot = self.cache.slot(G, E, window)  # (B, G, C, E) each
        entry = self.column % slot[0].shape[2]
        for held, new in zip(slot, (k, v), strict=True):
            held.index_copy_(2, entry, new[:, :, None].to(held.dtype))
        keys, values = (held.to(q.dtype) for held in slot)
        mask = self._mask(window, keys.shape[2])
        y = F.scaled_dot_product_attention(q.view(B, G, H // G, E), keys, values, attn_mask=mask)
        return y.reshape(B, H, E)

    def _mask(self, window: int | None, n_entries: int) -> Tensor:
        """(B, 1, 1, C): does the new column see the one in this entry?"""
        if (window, n_entries) not in self._masks:
            entry = torch.arange(n_entries, device=self.column.device)
            # the newest column that an entry can hold; below 0 where there is none
            held = self.column - (self.column - entry) % n_entries
            seen = held >= self.cache.pad[:, None]
            if window is not None:
                seen = seen & (held > self.column - window)
            self._masks[window, n_entries] = seen[:, None, None]
        return self._masks[window, n_entries]


class Recorded:
    """Passes over one token of each row, the first of which, over ids (B,), is recorded.

    Holds for this model and this `attn_ctx`, wherever it moves, as long as neither's tensors are
    replaced.
    """

    def __init__(
        self,
        model: Model,
        attn_ctx: OneColumn | NextTokens,
        ids: Tensor,
        h_cycles: int | None,
        record: Record,
    ) -> None:
        self.attn_ctx, self._ids = attn_ctx, ids.clone()

        def run() -> Tensor:
            return model.logits(model(self._ids, attn_ctx, h_cycles=h_cycles))

        self._replay, self._logits = record(run)

    def next(self, ids: Tensor) -> Tensor:
        """Float32 logits (B, V) after ids (B,), which join the texts where `attn_ctx` has moved
        to; the next call overwrites them.
        """
        self._ids.copy_(ids)
        self._replay()
        self.attn_ctx.advance()
        return self._logits


def cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """`run` as a CUDA graph (docs.pytorch.org, CUDA semantics): it runs twice beforehand, so that
    libraries have chosen their kernels. A pass that is run again writes what it wrote.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result

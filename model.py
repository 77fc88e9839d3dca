"""The network, top-down: embedding, HRM head, blocks, loss, initialisation, packed sequences.

In: token ids laid flat, and an `attn_ctx` that knows each token's position and what it may attend
to: `PackedSequences` while training, `KVCache` while decoding. Out: hidden states, logits, losses.
Knows no optimizer, file, tokenizer or chat format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import HRMConfig, ModelConfig

# N tokens laid flat (packed segments, or B rows of T positions), D d_model, H query heads, G
# key/value heads, E head_dim, V vocab_size, R rows of L tokens, C entries of a cache


# ---------------------------------------------------------------------------------------- the whole


class Model(nn.Module):
    """Embedding, trunk of dense blocks, HRM head (unless `config.hrm` is None), tied output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.shift = nn.Parameter(torch.empty(config.d_model)) if config.token_shift else None
        rows = config.bigram_rows
        self.bigrams = nn.Parameter(torch.empty(rows, config.d_model)) if rows else None
        self.trunk = nn.ModuleList(Block(config, w) for w in windows(config)[: config.n_layer])
        self.head = HRMHead(config, config.hrm) if config.hrm else None
        self.output_gain = nn.Parameter(torch.empty(config.d_model))
        G, n = config.n_kv_head, config.n_value_embeddings
        tables = (
            nn.Parameter(torch.empty(config.vocab_size, G * config.head_dim)) for _ in range(n)
        )
        self.value_embeddings = nn.ParameterList(tables)
        self.value_gates = nn.Parameter(torch.empty(n, G, GATE_CHANNELS)) if n else None
        last = config.n_blocks - 1
        self.value_places = [*range(last, -1, -2), *range(last - 1, -1, -2)][:n]  # of the tables
        self.dtype = torch.float32  # of the activations; the weights stay float32
        # of keys and values while decoding; None is `dtype`
        self.cache_dtype: torch.dtype | None = None
        # the first blocks, of the trunk and then of L and H, whose activations the backward pass
        # computes again (activation checkpointing, arXiv 1604.06174)
        self.recomputed_blocks = 0

    def forward(
        self, ids: Tensor, attn_ctx: AttentionContext, *, h_cycles: int | None = None
    ) -> Tensor:
        """Hidden states (N, D) that `logits` and `loss` read; `h_cycles` is how often the head's
        slow module is called (default: as configured).
        """
        for hidden in self.cycles(ids, attn_ctx, h_cycles=h_cycles):
            last = hidden
        return last

    def cycles(
        self, ids: Tensor, attn_ctx: AttentionContext, *, h_cycles: int | None = None
    ) -> Iterator[Tensor]:
        """Hidden states (N, D) after the trunk, then after each of the head's cycles; every one can
        be read out.

        Who stops early while decoding leaves the calls of the later cycles without this pass's keys
        and values, which later tokens will want to see: see `KVCache.skip`.
        """
        x = self.run_trunk(ids, attn_ctx)
        yield x
        if self.head is not None:
            yield from self.run_head(x, ids, attn_ctx, h_cycles=h_cycles)

    def run_trunk(self, ids: Tensor, attn_ctx: AttentionContext) -> Tensor:
        """Hidden states (N, D) before the head, for ids (N,)."""
        attn_ctx.begin(self.config, self.dtype)
        x = self.embed(ids, attn_ctx)
        for place, block in enumerate(self.trunk):
            recomputed = place < self.recomputed_blocks
            x = call(block, x, attn_ctx, self.token_value(place, ids), recomputed=recomputed)
        return x

    def run_head(
        self,
        x: Tensor,
        ids: Tensor,
        attn_ctx: AttentionContext,
        *,
        h_cycles: int | None = None,
        detach: bool = False,
    ) -> Iterator[Tensor]:
        """What `HRMHead.cycles` yields for the trunk's output x (N, D) of ids (N,)."""

        def values(place: int) -> TokenValue | None:
            return self.token_value(len(self.trunk) + place, ids)

        return self.head.cycles(
            x,
            values,
            attn_ctx,
            h_cycles=h_cycles,
            detach=detach,
            recomputed=max(0, self.recomputed_blocks - len(self.trunk)),
        )

    def embed(self, ids: Tensor, attn_ctx: AttentionContext) -> Tensor:
        """Normed embeddings (N, D), each with a share a channel of the one before in its document,
        0 at the start, and with what the two mean together.

        Token shift (RWKV, arXiv 2305.13048): to go on as after the last "a b", attention must find
        the token behind an earlier "a", which one layer can do once tokens know what stands before
        them (arXiv 2209.11895, smeared keys).
        """

        def normed(ids: Tensor) -> Tensor:
            return rms_norm(look_up(ids, self.embedding)).to(self.dtype)

        x = normed(ids)
        if self.shift is not None:
            x = x + self.shift.to(self.dtype) * attn_ctx.before(x, ids, normed)
        if self.bigrams is not None:
            x = x + look_up(self.bigram_row(ids, attn_ctx), self.bigrams).to(self.dtype)
        return x

    def bigram_row(self, ids: Tensor, attn_ctx: AttentionContext) -> Tensor:
        """Rows (N,) of `bigrams` for ids (N,), each with the one before in its document.

        Hashed bigrams, from the modded-nanogpt speed runs (see too arXiv 2501.16975): no layer has
        to tell common pairs apart, and a table adds no product. Pairs that meet in a row share it.
        The hash is multiplicative (Knuth, The Art of Computer Programming 3, section 6.4).
        """

        def numbered(ids: Tensor) -> Tensor:  # 0 is none
            return ids[:, None] + 1

        before = attn_ctx.before(numbered(ids), ids, numbered)[:, 0]
        pair = before * self.config.vocab_size + ids
        return (pair * 2_654_435_761 & 0xFFFF_FFFF) * self.config.bigram_rows >> 32

    def token_value(self, place: int, ids: Tensor) -> TokenValue | None:
        """A value a token (N, G·E) and its gate (G, channels) for the block at `place`, the trunk's
        and then the head's, if it has them: the last one does and every other one before it, and
        where there are more tables those between them.

        Value embeddings, from the modded-nanogpt speed runs (after ResFormer, arXiv 2410.17897):
        they add to what a model can remember of each token without adding a product.
        """
        if place not in self.value_places:
            return None
        table = self.value_places.index(place)
        of_token = look_up(ids, self.value_embeddings[table]).to(self.dtype)
        return of_token, self.value_gates[table]

    def output(self, hidden: Tensor) -> Tensor:
        """What the embedding is multiplied with: (…, D) normed, times a gain a channel over √D."""
        gain = self.output_gain / math.sqrt(self.config.d_model)
        return rms_norm(hidden) * gain.to(hidden.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (…, V) for hidden states (…, D)."""
        return project(self.output(hidden), self.embedding).float()

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum of `weights` (N,) times the cross-entropy of `targets` (N,) in nats."""
        # needs_input_grad is True of a parameter also where no gradient is taken
        matrix = self.embedding if torch.is_grad_enabled() else self.embedding.detach()
        return ChunkedCrossEntropy.apply(self.output(hidden), matrix, targets, weights)

    @property
    def tables(self) -> list[nn.Parameter]:
        """What is looked up and tied to no output: value embeddings and bigrams."""
        return [*self.value_embeddings, *([] if self.bigrams is None else [self.bigrams])]

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def compile_blocks(self) -> None:
        """Fuse the blocks' small operations while training; attention stays as it is, so no layout
        of documents and no stage of a curriculum recompiles anything.
        """
        for block in self.blocks:
            block.compiled = True

    def multiply_with(self, linear: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Use `linear`, not F.linear, for the blocks' products while gradients are taken."""
        for block in self.blocks:
            block.linear = linear

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def blocks(self) -> list[Block]:
        """Every block, the trunk's, then L's, then H's."""
        modules = [m for m in (self.head.fast, self.head.slow) if m] if self.head else []
        return [*self.trunk, *(block for module in modules for block in module.blocks)]

    def block_passes(self, h_cycles: int | None = None) -> list[Block]:
        """Every block in the order in which a forward pass runs it; the head's once a call."""
        passes = list(self.trunk)
        return passes + (self.head.block_passes(h_cycles) if self.head else [])

    def flops_per_token(self, context: int) -> float:
        """Training FLOPs per token: 6 a weight and pass, and 12·H·E a token attended to (PaLM,
        appendix B), the attended tokens averaged over a segment of `context` tokens under each
        pass's window.
        """
        c, hrm = self.config, self.config.hrm
        n_losses = hrm.h_cycles if hrm and hrm.deep_supervision else 1
        weights = n_losses * self.embedding.numel()
        attended = 0.0
        for block in self.block_passes():
            weights += sum(p.numel() for p in block.parameters())
            reach = min(block.window or context, context)
            # a token at position t sees min(t + 1, reach)
            attended += reach - reach * (reach - 1) / (2 * context)
        return 6 * weights + 12 * c.n_head * c.head_dim * attended


def call(block: Block, *given: Any, recomputed: bool) -> Tensor:
    """block(*given); where `recomputed`, run again in the backward pass."""
    if recomputed and torch.is_grad_enabled():
        return checkpoint(block, *given, use_reentrant=False)
    return block(*given)


def windows(config: ModelConfig) -> list[int | None]:
    """Attention reach of each block, the trunk's, then L's and H's: the pattern repeated, at last
    the whole context.
    """
    pattern = config.pattern
    letters = [pattern[i % len(pattern)] for i in range(config.n_blocks - 1)] + ["L"]
    return [config.window if letter == "S" else None for letter in letters]


# ----------------------------------------------------------------------------------------- HRM head


class HRMHead(nn.Module):
    """Hierarchical reasoning over the trunk's output: a fast module L and a slow module H, called
    in cycles.

        e = rms(x);  z_H = e;  z_L = a learned vector
        h_cycles times:
            l_cycles times:  z_L = L(g0 z_L + g1 z_H + g2 e + call embedding)
            z_H = H(g3 z_H + g4 z_L + call embedding)
            y = e + out z_H

    g0 … g4 and `out` are a gain a channel. y adds to e, not to x: training lets x grow, and a state
    of size 1 would drown in it. With l_cycles = 0 there is no L, and e stands in for z_L: one block
    looped, with the input injected at every call.

    After HRM (arXiv 2506.21734) and HRM-Text (arXiv 2605.20613), with the input injected again at
    every L call and a residual around the head.
    """

    def __init__(self, config: ModelConfig, hrm: HRMConfig) -> None:
        super().__init__()
        self.hrm, own = hrm, windows(config)[config.n_layer :]
        self.fast = HRMModule(config, own[: -hrm.h_layer]) if hrm.l_cycles else None
        self.slow = HRMModule(config, own[-hrm.h_layer :])
        self.gains = nn.Parameter(torch.empty(5 if hrm.l_cycles else 2, config.d_model))  # g0 … g4
        # z_L before any call
        self.fast_start = nn.Parameter(torch.empty(config.d_model)) if hrm.l_cycles else None
        self.call_embedding = nn.Parameter(
            torch.empty(hrm.h_cycles, hrm.l_cycles + 1, config.d_model)
        )
        self.out = nn.Parameter(torch.empty(config.d_model))

    def cycles(
        self,
        x: Tensor,
        values: Callable[[int], TokenValue | None],
        attn_ctx: AttentionContext,
        *,
        h_cycles: int | None = None,
        detach: bool = False,
        recomputed: int = 0,
    ) -> Iterator[Tensor]:
        """Yield y (N, D) after each H cycle, for the trunk's output x (N, D); `values` gives each
        block's, L's and then H's, as `Model.token_value`.

        `detach` cuts the states' graph after each cycle; the first `recomputed` blocks of L and H
        keep no activations for the backward pass. Cycles beyond the trained number reuse the last
        one's call embeddings.
        """
        n_fast = len(self.fast.blocks) if self.fast else 0
        gain = self.gains.to(x.dtype)
        call_embedding = self.call_embedding.to(x.dtype)
        out = self.out.to(x.dtype)
        e = rms_norm(x)
        z_slow, z_fast = e, self.fast_start.to(x.dtype) if self.fast else e
        for h in range(h_cycles or self.hrm.h_cycles):
            if detach and h > 0:
                e = rms_norm(x)  # the graph of the first one is gone with its cycle's backward pass
            embedding = call_embedding[min(h, len(call_embedding) - 1)]
            for step in range(self.hrm.l_cycles):
                mixed = torch.addcmul(embedding[step], z_fast, gain[0])
                if h > 0:
                    mixed = torch.addcmul(mixed, z_slow, gain[1])
                mixed = torch.addcmul(mixed, e, gain[2] if h > 0 else gain[1] + gain[2])
                own = [values(place) for place in range(n_fast)]
                z_fast = self.fast(mixed, attn_ctx, own, recomputed)
            mixed = torch.addcmul(embedding[-1], z_slow, gain[-2])
            mixed = torch.addcmul(mixed, z_fast if self.fast else e, gain[-1])
            own = [values(n_fast + place) for place in range(len(self.slow.blocks))]
            z_slow = self.slow(mixed, attn_ctx, own, recomputed - n_fast)
            yield torch.addcmul(e, z_slow, out)
            if detach:
                z_slow, z_fast = z_slow.detach(), z_fast.detach()

    def block_passes(self, h_cycles: int | None = None) -> list[Block]:
        """The blocks of the modules in the order in which they are called."""
        calls = [self.fast] * self.hrm.l_cycles + [self.slow]
        return [
            block for module in calls * (h_cycles or self.hrm.h_cycles) for block in module.blocks
        ]


class HRMModule(nn.Module):
    """Pre-norm blocks capped by one norm, so that repeated calls keep the state's size."""

    def __init__(self, config: ModelConfig, windows: list[int | None]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, window) for window in windows)

    def forward(
        self,
        z: Tensor,
        attn_ctx: AttentionContext,
        values: Sequence[TokenValue | None],
        recomputed: int = 0,
    ) -> Tensor:
        """The state (N, D) after the blocks; the first `recomputed` keep no activations."""
        for n, (block, value) in enumerate(zip(self.blocks, values, strict=True)):
            z = call(block, z, attn_ctx, value, recomputed=n < recomputed)
        return rms_norm(z)


# ------------------------------------------------------------------------------------------- blocks


TokenValue = tuple[Tensor, Tensor]  # see `Model.token_value`
GATE_CHANNELS = 12  # of a block's input, which decide how far it opens for a token's value


class Block(nn.Module):
    """Pre-norm transformer block: grouped-query attention with QK-norm and RoPE, then an MLP.

    The MLP is gated (SwiGLU, arXiv 2002.05202), or of squared ReLU (Primer, arXiv 2109.08668).
    """

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        D, E = config.d_model, config.head_dim
        self.window = window
        self.compiled = False  # small operations fused while training: see `compile_blocks`
        self.linear = F.linear  # of its products while training: see `Model.multiply_with`
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, E
        self.q = nn.Parameter(torch.empty(config.n_head * E, D))
        self.k = nn.Parameter(torch.empty(config.n_kv_head * E, D))
        self.v = nn.Parameter(torch.empty(config.n_kv_head * E, D))
        self.o = nn.Parameter(torch.empty(D, config.n_head * E))
        # how sharply each head attends, learnt; a portable shape learns it a channel for all heads
        portable = config.shape == "portable"
        self.qk_gain = None if portable else nn.Parameter(torch.empty(config.n_head))
        self.q_gain = nn.Parameter(torch.empty(E)) if portable else None
        self.k_gain = nn.Parameter(torch.empty(E)) if portable else None
        exclusive = config.exclusive_attention
        self.exclusion = nn.Parameter(torch.empty(config.n_head)) if exclusive else None
        self.gate = nn.Parameter(torch.empty(config.d_ff, D)) if config.gated_mlp else None
        self.up = nn.Parameter(torch.empty(config.d_ff, D))
        self.down = nn.Parameter(torch.empty(D, config.d_ff))

    def forward(
        self, x: Tensor, attn_ctx: AttentionContext, value: TokenValue | None = None
    ) -> Tensor:
        fused = self.compiled and torch.is_grad_enabled()
        before, after = compiled_parts() if fused else (Block.before, Block.after)
        q, k, v = before(self, x, attn_ctx.rotary, value)
        y = attn_ctx.attend(q, k, v, self.window)  # (N, H, E)
        return after(self, x, y, v)

    def before(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], value: TokenValue | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, H, E), k and v (N, G, E) of attention; `value` as in `Model.token_value`."""
        H, G, E = self.n_head, self.n_kv_head, self.head_dim
        x = rms_norm(x)
        heads = self.project(x, self.q, self.k, self.v).view(-1, H + 2 * G, E)  # (N, H + 2G, E)
        qk, v = heads.split([H + G, G], dim=1)
        if self.qk_gain is None:
            qk = rotate(rms_norm(qk) * self.channel_gains().to(x.dtype), rotary)
        else:
            qk = normed_and_rotated(qk, rotary)
        if value is not None:
            of_token, gate = value
            # (N, G), 1 at the start
            opened = 2 * torch.sigmoid(F.linear(x[:, : gate.shape[1]], gate.to(x.dtype)))
            v = v + opened[:, :, None] * of_token.view(-1, G, E)
        q, k = qk.split([H, G], dim=1)
        return q if self.qk_gain is None else q * self.qk_gain[:, None].to(x.dtype), k, v

    def channel_gains(self) -> Tensor:
        """What the normed queries and keys (N, H + G, E) are multiplied with, (H + G, E): as well
        before the rotation as after it where a head has one gain.
        """
        H, G, E = self.n_head, self.n_kv_head, self.head_dim
        if self.qk_gain is None:
            return torch.cat([self.q_gain.expand(H, E), self.k_gain.expand(G, E)])
        return torch.cat([self.qk_gain, self.qk_gain.new_ones(G)])[:, None].expand(H + G, E)

    def after(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """The block's output (N, D) for its input x, what attention made of it, y (N, H, E), and
        the tokens' own values v (N, G, E).
        """
        y = y if self.exclusion is None else self.without_own(y, v)
        x = x + self.project(y.flatten(1), self.o)
        return x + self.mlp(rms_norm(x))

    def without_own(self, y: Tensor, v: Tensor) -> Tensor:
        """y (N, H, E) less a learnt share a head of its part along the token's own value: what a
        token knows already need not come through attention (arXiv 2603.09078, the share is ours).
        """
        own = v.repeat_interleave(self.n_head // self.n_kv_head, dim=1)  # (N, H, E)
        along = (y * own).sum(-1, keepdim=True) / (own.square().sum(-1, keepdim=True) + 1e-6)
        return y - self.exclusion[:, None].to(y.dtype) * along * own

    def mlp(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.project(squared_relu(self.project(x, self.up)), self.down)
        gate, up = self.project(x, self.gate, self.up).chunk(2, dim=-1)  # (N, d_ff) each
        return self.project(F.silu(gate) * up, self.down)

    def project(self, x: Tensor, *weights: Tensor) -> Tensor:
        return project(x, *weights, linear=self.linear if torch.is_grad_enabled() else F.linear)


@cache
def compiled_parts() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a block does before and after attention, each compiled once for all of a shape."""
    return torch.compile(Block.before, dynamic=False), torch.compile(Block.after, dynamic=False)


def project(
    x: Tensor, *weights: Tensor, linear: Callable[[Tensor, Tensor], Tensor] = F.linear
) -> Tensor:
    """x (N, D) times the weights (·, D) laid one under the other, in x's dtype: one product."""
    if not isinstance(weights[0], Tensor):  # see `for_decoding`
        return weights[0](x)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return linear(x, weight.to(x.dtype))


def look_up(ids: Tensor, table: Tensor) -> Tensor:
    """Rows (N, D) of the table for ids (N,)."""
    return F.embedding(ids, table) if isinstance(table, Tensor) else table[ids]


def rms_norm(x: Tensor) -> Tensor:
    """x divided by its root mean square over the last axis (arXiv 1910.07467), without a gain."""
    return RMSNorm.apply(x) if by_hand(x) else F.rms_norm(x, (x.shape[-1],), eps=EPSILON)


def normed_and_rotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate` of `rms_norm` of x (N, ·, E)."""
    if not by_hand(x):
        return rotate(rms_norm(x), rotary)
    cos, sin = rotary
    return RMSNorm.apply(x, torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def squared_relu(x: Tensor) -> Tensor:
    return SquaredReLU.apply(x) if by_hand(x) else x.relu().square()


def rotary_table(
    positions: Tensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (N, 1, E/2) of positions (N,), angles in float32 (arXiv 2104.09864)."""
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[:, None, None] * base ** (-pair / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + E/2) of x (N, ·, E) by their position's angles."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


# ------------------------------------------------------------------- small operations on a CPU

EPSILON = 1e-6  # beside the mean square of a norm


def by_hand(x: Tensor) -> bool:
    """Whether the derivatives below are taken: on a processor, where each small operation is a walk
    through memory, and the ones that autograd would write down are twice as many.
    """
    trains = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    return trains and x.device.type == "cpu" and x.dtype == torch.float32


class RMSNorm(torch.autograd.Function):
    """`rms_norm` of x (…, E); with cosines and signed sines (…, E), `rotate` behind it."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean.add_(EPSILON).rsqrt_()
        y = x * scale
        y = y if cos is None else torch.addcmul(y * cos, halves_swapped(y), sin)
        ctx.save_for_backward(y, scale, cos, sin)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        y, scale, cos, sin = ctx.saved_tensors
        along = (dy * y).sum(-1, keepdim=True).div_(-y.shape[-1])
        dx = torch.addcmul(dy, y, along).mul_(scale)
        if cos is not None:  # back by the same angles
            dx = torch.addcmul(dx * cos, halves_swapped(dx), sin, value=-1)
        return dx, None, None


def halves_swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)²"""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (dy * positive).mul_(2)


# --------------------------------------------------------------------------------------------- loss

LOGITS_PER_CHUNK = 2**25  # logits alive at once on a card: 128 MiB in float32
ROWS_PER_CHUNK = 512  # tokens at once on a CPU: the logits of few stay in its caches


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies through the tied embedding, a chunk of tokens at a time; the
    forward pass computes both gradients already, so no logits are kept, and none computed twice.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """hidden (N, D), embedding (V, D), targets (N,), weights (N,) -> scalar float32."""
        matrix = embedding.to(hidden.dtype)
        on_cpu = hidden.device.type == "cpu"
        chunk = ROWS_PER_CHUNK if on_cpu else max(1, LOGITS_PER_CHUNK // len(matrix))
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if wants_grad else None
        d_matrix = torch.zeros_like(embedding) if wants_grad else None
        total = torch.zeros((), device=hidden.device)
        for part in range(0, len(hidden), chunk):
            here = slice(part, part + chunk)
            target, weight = targets[here, None], weights[here, None]
            logits = F.linear(hidden[here], matrix).float()  # (chunk, V)
            largest, at_target = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
            # in place: this is where the time of a loss goes
            exponentials = logits.sub_(largest).exp_()
            z = exponentials.sum(dim=-1, keepdim=True)
            total += ((z.log() + largest - at_target) * weight).sum()
            if wants_grad:
                d_logits = exponentials.mul_(weight / z).scatter_add_(1, target, -weight)
                d_logits = d_logits.to(hidden.dtype)
                d_hidden[here] = d_logits @ matrix
                d_matrix += (d_logits.T @ hidden[here]).float()
                del d_logits
            del logits, exponentials  # before the next chunk's are made
        ctx.save_for_backward(d_hidden, d_matrix)
        return total

    @staticmethod
    def backward(ctx, d_total: Tensor):
        d_hidden, d_matrix = ctx.saved_tensors
        return d_hidden * d_total.to(d_hidden.dtype), d_matrix * d_total, None, None


# ----------------------------------------------------------------------------------- initialisation


ZERO_AT_FIRST = {
    "o",
    "down",
    "call_embedding",
    "value_gates",
    "shift",
    "exclusion",
    "bigrams",
}
LARGEST_SCORE = 15.0  # attention logit of a query and a key that point the same way, at the start


@torch.no_grad()
def initialise(model: Model, seed: int) -> Model:
    """All initial weights, drawn on the CPU in a fixed order, so that every device starts alike.

    Matrices are LeCun-normal, those that write into the residual stream zero, so each block starts
    as the identity. The embedding's 2/√D makes the initial loss ln(V) within a percent
    under the tied output. QK-norm alone bounds scores by √E, too little for a narrow head to single
    out one token of hundreds: `qk_gain` sets the bound.
    """
    rng = torch.Generator().manual_seed(seed)
    D = model.config.d_model
    for name, weight in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind in ZERO_AT_FIRST:
            weight.zero_()
        elif kind in ("output_gain", "gains", "out"):
            weight.fill_(1.0)
        elif kind in ("qk_gain", "q_gain", "k_gain"):
            gain = LARGEST_SCORE / math.sqrt(model.config.head_dim)
            weight.fill_(gain if kind == "qk_gain" else math.sqrt(gain))
        else:
            special = {"embedding": 2 / math.sqrt(D), "fast_start": 1.0}
            scale = special.get(kind, 1 / math.sqrt(weight.shape[-1]))
            weight.copy_(torch.randn(weight.shape, generator=rng) * scale)
    return model


def build_model(config: ModelConfig, *, seed: int, device: torch.device | str = "cpu") -> Model:
    """A freshly initialised model on `device`, computing in its `compute_dtype` there."""
    model = initialise(Model(config), seed).to(device)
    model.dtype = compute_dtype(torch.device(device), config.d_model)
    return model


# MI100, MI200, MI300, RX 7000, RX 9000
AMD_BFLOAT16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


# from which on bfloat16 trains faster on a processor with AMX: by half at 256; the demo's 128 loses
# a fifth, as conversions cost more than the products gain (between the two not measured)
CPU_BFLOAT16_WIDTH = 256


def compute_dtype(device: torch.device, width: int) -> torch.dtype:
    """What a model `width` channels wide computes in: bfloat16 where the hardware multiplies it
    natively, float32 where it would emulate it, for narrow models on a processor, and on Apple's
    chips, where bfloat16 has not been measured.
    """
    if device.type == "cuda" and torch.version.hip:  # AMD's: matrix cores from these on
        native = torch.cuda.get_device_properties(device).gcnArchName.startswith(AMD_BFLOAT16)
    elif device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "mps":
        native = False
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        native = native and width >= CPU_BFLOAT16_WIDTH
    return torch.bfloat16 if native else torch.float32


# -------------------------------------------------------------------------- where tokens may attend


class AttentionContext(Protocol):
    """What blocks ask of a layout of tokens: its rotary table, and attention under its rules."""

    rotary: tuple[Tensor, Tensor]

    def begin(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Called once before each pass over the blocks."""

    def before(self, x: Tensor, ids: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Embeddings (N, D) of the tokens before, 0 where a document begins; x is `embed(ids)`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Attention (N, H, E) of q (N, H, E) over k, v (N, G, E), back to `window` tokens."""


class PackedSequences:
    """Segments laid end to end in a flat micro-batch of N tokens; each sees itself alone.

        flat tokens   a a a a a b b c c c c c c c      documents a, b, c
        row           0 0 0 0 1 1 1 1 2 2 2 2 3 3     `row_length` 4: no segment crosses a row's end
        segments      [a a a a][a][b b][c][c c c c][c c]
        positions     0 1 2 3  0  0 1  0  0 1 2 3  0 1

    `starts` (N,) marks each segment's first token; a row's first token always starts one.
    """

    def __init__(self, starts: Tensor, row_length: int, device: torch.device | None = None) -> None:
        if len(starts) % row_length:
            raise ValueError(f"{len(starts)} tokens are not a whole number of rows of {row_length}")
        # of the tokens; starts that lie on the CPU spare a card a wait
        device = device or starts.device
        starts = starts.view(-1, row_length).clone()
        starts[:, 0] = True
        index = torch.arange(row_length, device=starts.device).expand_as(starts)
        # (R, L): where this token's segment began
        self.first = torch.where(starts, index, 0).cummax(dim=1).values
        self.row_length = row_length
        self.positions = (index - self.first).flatten().to(device, non_blocking=True)
        ends = torch.tensor([starts.numel()], device=starts.device)
        # of the segments, and the last one's end
        cu_seqlens = torch.cat([starts.flatten().nonzero().squeeze(1), ends])
        self.cu_seqlens = cu_seqlens.int().to(device, non_blocking=True)
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def begin(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.rotary = rotary_table(self.positions, config.head_dim, config.rope_base, dtype)

    def before(self, x: Tensor, ids: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.where(self.positions[:, None] > 0, x.roll(1, 0), 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        return attend(q, k, v, self, window)

    def first_seen(self, start: int, window: int | None) -> int:
        """The first key of a row that its queries from `start` on may see, in any row."""
        oldest = int(self.first[:, start].min())
        return oldest if window is None else max(oldest, start - window + 1)

    def mask(
        self, start: int, end: int, first_key: int, window: int | None, dtype: torch.dtype
    ) -> Tensor:
        """What is added to the scores (R, 1, queries, keys) of each row's queries `start` to `end`
        and its keys `first_key` to `end`: 0 where the query (third axis) may attend to the key
        (fourth axis), else -inf.

        segment   a a a b b          a sees a, b sees b, nobody sees what comes later
                  1 . . . .          with a window of 2 the third a no longer sees the first
                  1 1 . . .
                  0 1 1 . .
                  . . . 1 .
                  . . . 1 1
        """
        if (window, start) not in self._masks:
            query, key = torch.arange(start, end)[:, None], torch.arange(first_key, end)
            seen = (key <= query) & (key >= self.first[:, start:end, None].cpu())
            if window is not None:
                seen &= query - key < window
            mask = torch.where(seen, 0.0, -math.inf).to(self.positions.device, dtype)
            self._masks[window, start] = mask[:, None]
        return self._masks[window, start]


Attention = Callable[[Tensor, Tensor, Tensor, PackedSequences, "int | None"], Tensor]
# by device and dtype, what `hearth/training/attention.py` found fastest there
DOORS: dict[tuple[str, torch.dtype], Attention] = {}


def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, window: int | None) -> Tensor:
    """The one door to attention while training: q (N, H, E), k and v (N, G, E) -> (N, H, E)."""
    door = DOORS.get((q.device.type, q.dtype), attend_in_blocks)
    return door(q, k, v, packed, window)


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, window: int | None
) -> Tensor:
    """`scaled_dot_product_attention` under an explicit mask: a block of each row's queries at a
    time, over no more keys than one of them may see. Runs everywhere; the reference of the others.
    """
    N, H, E = q.shape
    L, size = packed.row_length, query_block(window)

    def blocks(x: Tensor) -> tuple[Tensor, ...]:  # (N, ·, E) -> L / size times (R, ·, size, E)
        return x.reshape(N // L, L, x.shape[1], E).transpose(1, 2).split(size, dim=2)

    queries, keys, values, attended = blocks(q), blocks(k), blocks(v), []
    for n, query in enumerate(queries):
        start, end = n * size, n * size + query.shape[2]
        first = packed.first_seen(start, window) // size  # block of keys
        mask = packed.mask(start, end, first * size, window, q.dtype)
        key, value = (torch.cat(x[first : n + 1], dim=2) for x in (keys, values))
        attended.append(
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        )
    return torch.cat(attended, dim=2).transpose(1, 2).reshape(N, H, E)


def query_block(window: int | None) -> int:
    """Queries taken at once: few, so that little is scored beyond a window or the future."""
    return max(32, min(128, window or 128))

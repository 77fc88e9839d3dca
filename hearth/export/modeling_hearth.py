"""A Hearth model for transformers: the code that an exported folder carries.

In: token ids and an attention mask. Out: logits, a loss, a cache that grew.
Imports torch and transformers alone, so that the folder needs nothing else; what it computes is
`model.py`, and tests hold the two against each other. Loaded with `trust_remote_code=True`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

# B rows, T new columns, C columns in all, K columns of a cache's slot, D hidden_size, H query
# heads, G key/value heads, E head_dim, V vocab_size

# of a block's normed input, from which it decides how far to open for a token's value
GATE_CHANNELS = 12
# transformers renamed what a forward pass takes and gives
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


class HearthConfig(PretrainedConfig):
    """Shape of a Hearth model.

    trunk, hrm_fast, hrm_slow: a letter a block, of the trunk and of the reasoning head's fast and
    slow module, S where it sees `sliding_window` tokens and L where it sees them all.
    hrm_h_cycles: how often the reasoning head's slow module is called; 0 is no head. It may differ
    from hrm_trained_cycles.

    `num_hidden_layers` and `layer_types` describe the cache, which has a slot for each pass of a
    block (each call of the head sees other states), and one for the ids where tokens look at the
    one before.
    """

    model_type = "hearth"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 1024,
        hidden_size: int = 128,
        intermediate_size: int = 384,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        max_position_embeddings: int = 512,
        rope_theta: float = 10_000.0,
        trunk: str = "SL",
        sliding_window: int | None = 64,
        gated_mlp: bool = True,
        token_shift: bool = True,
        exclusive_attention: bool = True,
        num_value_embeddings: int = 0,
        num_bigrams: int = 0,
        hrm_fast: str = "S",
        hrm_slow: str = "L",
        hrm_l_cycles: int = 1,
        hrm_h_cycles: int = 1,
        hrm_trained_cycles: int = 1,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.trunk = trunk
        self.sliding_window = sliding_window
        self.gated_mlp = gated_mlp
        self.token_shift = token_shift
        self.exclusive_attention = exclusive_attention
        self.num_value_embeddings = num_value_embeddings
        self.num_bigrams = num_bigrams
        self.hrm_fast = hrm_fast
        self.hrm_slow = hrm_slow
        self.hrm_l_cycles = hrm_l_cycles
        self.hrm_h_cycles = hrm_h_cycles
        self.hrm_trained_cycles = hrm_trained_cycles
        kwargs["tie_word_embeddings"] = True
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def layer_types(self) -> list[str]:
        head = self.hrm_fast * self.hrm_l_cycles + self.hrm_slow
        passes = self.trunk + head * self.hrm_h_cycles
        windows = [self.window(letter) for letter in passes] + [None] * self.looks_back
        # transformers cannot keep a window of one column
        return [
            "sliding_attention" if window and window > 1 else "full_attention" for window in windows
        ]

    @property
    def looks_back(self) -> bool:
        """Whether tokens look at the one before."""
        return self.token_shift or self.num_bigrams > 0

    def window(self, letter: str) -> int | None:
        """Attention reach of a block, in tokens; None is the whole context."""
        return self.sliding_window if letter == "S" else None


class HearthPreTrainedModel(PreTrainedModel):
    config_class = HearthConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["HearthBlock"]  # noqa: RUF012


class HearthForCausalLM(HearthPreTrainedModel, GenerationMixin):
    """The network with its output: the embedding again."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HearthConfig) -> None:
        super().__init__(config)
        self.model = HearthModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) in float32; see `HearthModel` for what it reads.

        `labels` are ids, -100 where no loss is wanted; `logits_to_keep` is how many last columns
        are read out.
        """
        cache = cache if cache is not None else past_key_values
        hidden, cache = self.model.run(
            input_ids, attention_mask, position_ids, cache, use_cache, inputs_embeds
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})


class HearthModel(HearthPreTrainedModel):
    """Embedding, trunk of dense blocks, reasoning head, the norm before the output."""

    def __init__(self, config: HearthConfig) -> None:
        super().__init__(config)
        D, n = config.hidden_size, config.num_value_embeddings
        G, E = config.num_key_value_heads, config.head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.shift = nn.Parameter(torch.zeros(D)) if config.token_shift else None
        self.bigrams = nn.Embedding(config.num_bigrams, D) if config.num_bigrams else None
        self.trunk = nn.ModuleList(HearthBlock(config, letter) for letter in config.trunk)
        self.head = HearthHead(config) if config.hrm_h_cycles else None
        self.output_gain = nn.Parameter(torch.ones(D))
        self.value_embeddings = nn.ModuleList(
            nn.Embedding(config.vocab_size, G * E) for _ in range(n)
        )
        self.value_gates = nn.Parameter(torch.zeros(n, G, min(GATE_CHANNELS, D))) if n else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """What the output reads (B, T, D) for ids (B, T); `attention_mask` (B, C) marks padding
        with 0. `cache` and `past_key_values` are the newer and the older name of one thing.
        """
        cache = cache if cache is not None else past_key_values
        hidden, cache = self.run(
            input_ids, attention_mask, position_ids, cache, use_cache, inputs_embeds
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: cache})

    def run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        inputs_embeds: Tensor | None,
    ) -> tuple[Tensor, Cache | None]:
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("A Hearth model reads input_ids: its tokens look at the one before.")
        if self.trunk[0].gradient_checkpointing and self.training:
            cache = None
        elif cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        columns = Columns(self.config, input_ids, attention_mask, position_ids, cache)
        columns.rotary = rotary_table(columns.positions, self.config, self.dtype)
        x = self.embed(input_ids, columns)
        n, values = len(self.trunk), self.token_values(input_ids)
        for block, value in zip(self.trunk, values[:n], strict=True):
            x = block(x, columns, *value)
        if self.head is not None:
            x = self.head(x, columns, values[n:])
        columns.keep_ids(input_ids)
        gain = (self.output_gain / math.sqrt(self.config.hidden_size)).to(x.dtype)
        return rms_norm(x) * gain, cache

    def embed(self, ids: Tensor, columns: Columns) -> Tensor:
        """Normed embeddings (B, T, D), each with a share a channel of the one before, and with what
        the two mean together.
        """
        x = rms_norm(self.embed_tokens(ids))
        if not self.config.looks_back:
            return x
        before, first = columns.ids_before(ids), columns.positions == 0
        if self.shift is not None:
            shifted = rms_norm(self.embed_tokens(before)).masked_fill(first[..., None], 0)
            x = x + self.shift * shifted
        if self.bigrams is not None:
            before = (before + 1).masked_fill(first, 0)
            pair = before * self.config.vocab_size + ids
            row = (pair * 2_654_435_761 & 0xFFFF_FFFF) * self.config.num_bigrams >> 32
            x = x + self.bigrams(row)
        return x

    def token_values(self, ids: Tensor) -> list[tuple[Tensor, ...]]:
        """For each block, the trunk's and then the head's, a value a token (B, T, G·E) and its gate
        (G, channels), or nothing: the last one has them and every other one before it, then those
        between.
        """
        n = len(self.trunk) + (self.head.n_blocks if self.head is not None else 0)
        found: list[tuple[Tensor, ...]] = [()] * n
        places = [*range(n - 1, -1, -2), *range(n - 2, -1, -2)]
        for i, table in enumerate(self.value_embeddings):
            found[places[i]] = (table(ids), self.value_gates[i])
        return found


class HearthHead(nn.Module):
    """A fast module L and a slow module H over the trunk's output, called in cycles."""

    def __init__(self, config: HearthConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.l_cycles, self.h_cycles = config.hrm_l_cycles, config.hrm_h_cycles
        self.fast = HearthModule(config, config.hrm_fast) if self.l_cycles else None
        self.slow = HearthModule(config, config.hrm_slow)
        self.gains = nn.Parameter(torch.ones(5 if self.l_cycles else 2, D))
        self.fast_start = nn.Parameter(torch.zeros(D)) if self.l_cycles else None
        self.call_embedding = nn.Parameter(
            torch.zeros(config.hrm_trained_cycles, self.l_cycles + 1, D)
        )
        self.out = nn.Parameter(torch.ones(D))

    @property
    def n_blocks(self) -> int:
        return len(self.slow.blocks) + (len(self.fast.blocks) if self.fast is not None else 0)

    def forward(self, x: Tensor, columns: Columns, values: list[tuple[Tensor, ...]]) -> Tensor:
        n_fast = self.n_blocks - len(self.slow.blocks)
        gain, e = self.gains, rms_norm(x)
        z_slow, z_fast = e, e if self.fast is None else self.fast_start.expand_as(e)
        for cycle in range(self.h_cycles):
            *l_embeddings, h_embedding = self.call_embedding[
                min(cycle, len(self.call_embedding) - 1)
            ]
            for embedding in l_embeddings:
                mixed = gain[0] * z_fast + gain[1] * z_slow + gain[2] * e + embedding
                z_fast = self.fast(mixed, columns, values[:n_fast])
            mixed = gain[-2] * z_slow + gain[-1] * z_fast + h_embedding
            z_slow = self.slow(mixed, columns, values[n_fast:])
        return e + self.out * z_slow


class HearthModule(nn.Module):
    """Blocks capped by one norm, so that repeated calls keep the state's size."""

    def __init__(self, config: HearthConfig, letters: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(HearthBlock(config, letter) for letter in letters)

    def forward(self, z: Tensor, columns: Columns, values: list[tuple[Tensor, ...]]) -> Tensor:
        for block, value in zip(self.blocks, values, strict=True):
            z = block(z, columns, *value)
        return rms_norm(z)


class HearthBlock(GradientCheckpointingLayer):
    """Pre-norm block: grouped-query attention with QK-norm and RoPE, then an MLP, SwiGLU or of
    squared ReLU.
    """

    def __init__(self, config: HearthConfig, letter: str) -> None:
        super().__init__()
        D, F_, E = config.hidden_size, config.intermediate_size, config.head_dim
        self.n_head, self.n_kv_head = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window = E, config.window(letter)
        self.q = nn.Linear(D, self.n_head * E, bias=False)
        self.k = nn.Linear(D, self.n_kv_head * E, bias=False)
        self.v = nn.Linear(D, self.n_kv_head * E, bias=False)
        self.o = nn.Linear(self.n_head * E, D, bias=False)
        self.qk_gain = nn.Parameter(torch.ones(self.n_head))
        exclusive = config.exclusive_attention
        self.exclusion = nn.Parameter(torch.zeros(self.n_head)) if exclusive else None
        self.gate = nn.Linear(D, F_, bias=False) if config.gated_mlp else None
        self.up = nn.Linear(D, F_, bias=False)
        self.down = nn.Linear(F_, D, bias=False)

    def forward(
        self,
        x: Tensor,
        columns: Columns,
        value: Tensor | None = None,
        value_gate: Tensor | None = None,
    ) -> Tensor:
        y = rms_norm(x)
        q, k, v = (
            part(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, ·, T, E)
            for part in (self.q, self.k, self.v)
        )
        if value is not None:
            opened = 2 * torch.sigmoid(F.linear(y[..., : value_gate.shape[1]], value_gate))
            value = value.unflatten(-1, (-1, self.head_dim))
            v = v + (opened[..., None] * value).transpose(1, 2)
        q = rotate(rms_norm(q), columns.rotary) * self.qk_gain[:, None, None]
        y = columns.attend(q, rotate(rms_norm(k), columns.rotary), v, self.window)
        if self.exclusion is not None:
            own = v.repeat_interleave(self.n_head // self.n_kv_head, dim=1)  # (B, H, T, E)
            along = (y * own).sum(-1, keepdim=True) / (own.square().sum(-1, keepdim=True) + 1e-6)
            y = y - self.exclusion[:, None, None] * along * own
        y = y.transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return x + self.mlp(rms_norm(x))

    def mlp(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.up(x).relu().square())
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Columns:
    """The T new columns of one forward pass: their positions, what each may see, the cache's slot
    that comes next.

    A column's position counts the tokens before it, padding left out.
    """

    def __init__(
        self,
        config: HearthConfig,
        ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> None:
        if cache is not None and getattr(cache, "is_compileable", False):
            raise ValueError("A Hearth model takes a DynamicCache, not one of fixed size.")
        self.T, self.cache, self.slot = ids.shape[1], cache, 0
        self.past = cache.get_seq_length() if cache is not None else 0
        self.end, self.device = self.past + self.T, ids.device
        if attention_mask is not None and attention_mask.shape != (len(ids), self.end):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, must be (rows, columns so far): "
                f"{(len(ids), self.end)}."
            )
        self.real = None if attention_mask is None else attention_mask.bool()  # (B, C)
        self.columns = torch.arange(self.past, self.end, device=self.device)
        self.id_slot = len(config.layer_types) - 1 if config.looks_back else None
        if position_ids is None and self.real is not None:
            position_ids = (self.real.long().cumsum(dim=1) - 1).clamp(min=0)[:, -self.T :]
        self.positions = self.columns[None] if position_ids is None else position_ids
        self.masks: dict[tuple[int | None, int], Tensor] = {}

    def ids_before(self, ids: Tensor) -> Tensor:
        """The ids (B, T) of the columns before these; any id before the first."""
        last = ids[:, :1]
        if self.past:
            last = self.cache.layers[self.id_slot].keys[:, 0, -1]
        return torch.cat([last, ids[:, :-1]], dim=1)

    def keep_ids(self, ids: Tensor) -> None:
        """Remember the ids for `ids_before`, where a beam search reorders them with the rest."""
        if self.cache is not None and self.id_slot is not None:
            ids = ids[:, None, :, None]  # (B, 1, T, 1)
            self.cache.update(ids, ids, self.id_slot)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Attention of q (B, H, T, E) over k and v (B, G, T, E) and those before; alike."""
        if self.cache is not None:
            k, v = self.cache.update(k, v, self.slot)  # (B, G, K, E)
            self.slot += 1
        shared = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(window, k.shape[2]))

    def mask(self, window: int | None, n_keys: int) -> Tensor:
        """(B or 1, 1, T, K): may the query (third axis) see the key (fourth axis)?"""
        if (window, n_keys) not in self.masks:
            key = torch.arange(self.end - n_keys, self.end, device=self.device)
            query = self.columns[:, None]
            seen = key <= query
            if window is not None:
                seen = seen & (query - key < window)
            if self.real is not None:
                # padding sees itself: a softmax over nothing would be NaN
                seen = seen & (self.real[:, None, -n_keys:] | (key == query))
            self.masks[window, n_keys] = seen.view(-1, 1, self.T, n_keys)
        return self.masks[window, n_keys]


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


def rotary_table(
    positions: Tensor, config: HearthConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, 1, T, E/2) of the rotary angles, computed in float32."""
    even = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * config.rope_theta ** (-even / config.head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + E/2) of x (B, ·, T, E) by their position's angles."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

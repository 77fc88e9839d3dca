"""A portable checkpoint as a Qwen3: its weights and configuration by transformers' names.

In: a model of the portable shape. Out: tensors and settings. What the shape has in another form is
folded: normed input rows become the embedding, the output gain joins the last norm. Writes no file.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from config import PORTABLE, ModelConfig, UserError
from model import Model, rms_norm

BLOCK = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_gain": "self_attn.q_norm",
    "k_gain": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = ("input_layernorm", "post_attention_layernorm")  # ours have no gain


BEYOND = {
    "hrm": "the HRM head",
    "token_shift": "token shift",
    "exclusive_attention": "attention that excludes a token's own value",
    "n_value_embeddings": "value embeddings",
    "bigram_rows": "a table of bigrams",
    "gated_mlp": "an MLP of squared ReLU",
    "window": "sliding windows",
}


def beyond_qwen3(model: ModelConfig) -> list[str]:
    """What a shape has that a Qwen3 has not, each with the setting that takes it away."""
    found = [
        f"{BEYOND[name]} (model.{name} {value})"
        for name, value in PORTABLE.items()
        if getattr(model, name) != value
    ]
    gain = [] if model.shape == "portable" else ["a QK gain per head (model.shape portable)"]
    return found + gain


def refuse_others(model: ModelConfig, command: str) -> None:
    """`UserError` for a shape that is no Qwen3: what stands against it, and the command that trains
    one that is.
    """
    if against := beyond_qwen3(model):
        raise UserError(
            "This model is no Qwen3, the shape that llama.cpp and onnxruntime get. It has "
            f"{', '.join(against)}. `{command}` trains one of its size that can go; "
            "--to huggingface takes any."
        )


def config(model: ModelConfig) -> dict[str, Any]:
    """transformers' `Qwen3Config` as JSON values."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.n_kv_head,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context,
        "rms_norm_eps": 1e-6,
        # the newer and the older name
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "rope_theta": model.rope_base,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    }


def weights(model: Model) -> dict[str, Tensor]:
    """The model's weights in float32 by transformers' names."""
    D = model.config.d_model
    found = {
        "model.embed_tokens.weight": rms_norm(model.embedding.detach()),
        "model.norm.weight": model.output_gain.detach() / math.sqrt(D),
        "lm_head.weight": model.embedding.detach(),
    }
    for i, block in enumerate(model.trunk):
        for ours, theirs in BLOCK.items():
            found[f"model.layers.{i}.{theirs}.weight"] = getattr(block, ours).detach()
        for norm in NORMS:
            found[f"model.layers.{i}.{norm}.weight"] = torch.ones(D)
    return {name: weight.float().contiguous() for name, weight in found.items()}

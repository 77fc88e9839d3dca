"""Checkpoints whose every part matters, and what transformers makes of their exports."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import ucd_3_2_0

import torch

from config import PRESETS, HRMConfig, ModelConfig
from hearth.cli import portable
from hearth.data.tokenizer import Tokenizer
from hearth.training import checkpoint
from hearth.training.checkpoint import Loaded
from hearth.training.optim import build_optimizers
from model import PackedSequences, build_model

SHAPE = ModelConfig(
    vocab_size=512,
    n_layer=3,
    d_model=64,
    n_head=4,
    n_kv_head=2,
    d_ff=96,
    gated_mlp=True,
    context=2048,
    window=24,
    pattern="SL",
    n_value_embeddings=2,
    bigram_rows=300,
    hrm=HRMConfig(l_layer=1, h_layer=2, h_cycles=2, l_cycles=2),
)
SHAPES = {
    "whole": SHAPE,
    "plain": replace(SHAPE, hrm=None, n_value_embeddings=0, bigram_rows=0),
    "looped": replace(SHAPE, hrm=HRMConfig(l_layer=1, h_layer=1, h_cycles=2, l_cycles=0)),
    "ungated": replace(
        SHAPE,
        gated_mlp=False,
        exclusive_attention=False,
        token_shift=False,
        window=None,
        n_kv_head=4,
    ),
    "portable": portable(SHAPE),
}
SYLLABLES = [a + b for a in "bcdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "ör", "ї")]


def some_text(rng: random.Random, n_words: int) -> str:
    words = ("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(n_words))
    return " ".join(words)


def some_tokenizer() -> Tokenizer:
    rng = random.Random(0)
    return Tokenizer.train([some_text(rng, 30) + ". 12 + 7\n" for _ in range(200)], 512)


def save(
    folder: Path, shape: ModelConfig, tokenizer: Tokenizer, *, stage: str = "sft2", **settings: Any
) -> Path:
    """The checkpoint of a model of that shape, in a run below `folder`. Its zeros and ones have
    been given values, so that nothing hides behind them.
    """
    demo = PRESETS["demo"]
    pretrain = replace(demo.pretrain, tokens_per_step=2048, micro_batch_tokens=2048)
    config = replace(demo, runs=str(folder), model=shape, pretrain=pretrain, **settings)
    model = build_model(shape, seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=rng)
    optimizers = build_optimizers(model, config.optim, 1e-3)
    state = {"stage": stage, "step": 5, "steps": 5, "tokens": 5000}
    return checkpoint.save(
        config.run_dir / stage, model, optimizers, config, tokenizer, state, keep=1
    )


def loaded_in_float32(folder: Path) -> Loaded:
    loaded = checkpoint.load_for_inference(folder)
    loaded.model.dtype = torch.float32
    return loaded


def our_logits(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    """Float32 logits (T, V) of a prompt."""
    starts = torch.arange(len(ids)) == 0
    with torch.no_grad():
        hidden = loaded.model(torch.tensor(ids), PackedSequences(starts, len(ids)))
        return loaded.model.logits(hidden)


def load(folder: Path, **given: Any) -> Any:
    """The model of an exported folder in transformers; its own code runs where it carries some."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about itself
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, **trust(folder), **given)


def load_tokenizer(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, **trust(folder))


def trust(folder: Path) -> dict[str, bool]:
    return {"trust_remote_code": (folder / "modeling_hearth.py").exists()}


class OnnxSession:
    """An ONNX export in onnxruntime."""

    def __init__(self, file: Path, config: ModelConfig) -> None:
        import onnxruntime

        self.config, wishes = config, onnxruntime.SessionOptions()
        wishes.intra_op_num_threads = torch.get_num_threads()
        self.net = onnxruntime.InferenceSession(file, wishes)
        self.names = [output.name for output in self.net.get_outputs()]

    def __call__(
        self, ids: torch.Tensor, real: torch.Tensor, cache: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits (B, T, V) of new ids (B, T), and the cache with them; `real` (B, P + T) is 0 where
        a row has padding on its left.
        """
        places = (real.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": real, "position_ids": places}
        given = {name: x.numpy() for name, x in given.items()}
        if cache is None:
            none = torch.empty(len(ids), self.config.n_kv_head, 0, self.config.head_dim).numpy()
            cache = {name: none for name in self.names if name != "logits"}
        given |= {name.replace("present", "past_key_values"): x for name, x in cache.items()}
        found = dict(zip(self.names, self.net.run(None, given), strict=True))
        return torch.from_numpy(found.pop("logits")), found

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        said: list[int] = []
        new, cache = prompt, None
        while len(said) < n:
            real = torch.ones(1, len(prompt) + len(said), dtype=torch.int64)
            logits, cache = self(torch.tensor([new]), real, cache)
            new = [int(logits[0, -1].argmax())]
            said += new
        return said


SCRIPTS = (
    *("abcdefghijklmnopqrstuvwxyzäöüßé", "абвгдежзиклмнопрстуфхцчшщъыьэюя", "αβγδεζηθικλμνξο"),
    *(
        "的一是不了人我在有他这中大来上国",
        "あいうえおかきくアイウエオ",
        "אבגדהוזחט",
        "कखगघङचछजािी",
        "가나다라",
    ),
)
AWKWARD = (
    *("", " ", "  ", "\n", "\r\n", "\n\n \n", "\t x", " \u00a0\u3000x", "\u2028\u0085", "\u200b"),
    *("'s", "'S", "don't", "WE'LL", "'ve'Re'M", "''s", "’s", "1234567890", "٣٤٥", "½²Ⅷ", "x1y2"),
    *(
        "e\u0301",
        "é",
        "🙂",
        "👩\u200d👩\u200d👧",
        "🇩🇪",
        "\x00",
        "\x7f",
        "\ufffd",
        "\ufeff",
        "ﬁ",
        "ǆ",
    ),
    *(
        "ß",
        "İi̇",
        "a\u0303\u0330",
        "3.14e-5",
        "!!!\n\n",
        " !",
        "...a",
        "a...",
        "\\n",
        "{}[]();",
        "_a_b",
    ),
    *("<|bos|>", "<|end|>", "<|user|>x", "<|pad|><|pad|>", "<|spare_0|>", "<|unused_3|>", "<|bos"),
    *("x" * 300, " " * 100, "\n" * 50, "A_1", "\U0001d400"),
)


def awkward_strings(n: int, seed: int = 0) -> list[str]:
    """Strings that cutting into words gets wrong: the list above, strung together, and letters,
    digits, signs and blanks of many scripts at random: those of Unicode 3.2, since libraries
    disagree about letters that were added after their own tables were made.
    """
    rng = random.Random(seed)
    kinds = [*SCRIPTS, " \t\n\r", "0189'", "!?.,-<|>"]
    found = [*AWKWARD]
    while len(found) < n:
        kind = rng.random()
        if kind < 0.4:
            found.append("".join(rng.choices(AWKWARD, k=rng.randint(2, 4))))
        elif kind < 0.8:
            found.append("".join(rng.choice(rng.choice(kinds)) for _ in range(24)))
        else:
            letters = (chr(rng.randrange(1, 0x30000)) for _ in range(12))
            known = (c for c in letters if ucd_3_2_0.category(c) not in ("Cn", "Cs"))
            found.append("".join(known))
    return found[:n]


ENDS = (". ", "! ", ", 12 ", ".\n", "?\n\n")


def long_text(n_bytes: int, seed: int = 0) -> str:
    """About `n_bytes` of made-up text in several scripts, cut into sentences and lines."""
    rng, parts, size = random.Random(seed), [], 0
    while size < n_bytes:
        letters = rng.choice(SCRIPTS)
        words = ("".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(8))
        parts.append(" ".join(words).capitalize() + rng.choice(ENDS))
        size += len(parts[-1].encode())
    return "".join(parts)


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) and attention mask (B, T) of prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[7] * (longest - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, real

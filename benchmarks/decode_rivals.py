"""The programs that benchmarks/decode.py is measured against, each decoding in a process of its
own.

In: a shape and what to measure, as JSON; then a line for each measurement wanted. Out: a line of
JSON for each: first the version or what is missing, then tokens per second. Random weights. Run by
the Python that decode.py's --python names; it needs torch and transformers, or gguf and
llama-cpp-python, and nothing of this project.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PACKAGES = {
    "transformers": ("transformers", "torch"),
    "llamacpp": ("llama-cpp-python", "gguf", "numpy"),
}


def main() -> None:
    """Build the contender, say so, then measure once for each line read."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the packages print is no answer

    def say(**facts: Any) -> None:
        print(json.dumps(facts), file=out, flush=True)

    wanted = SimpleNamespace(**json.loads(sys.argv[1]))
    try:
        versions = [
            f"{name} {importlib.metadata.version(name)}" for name in PACKAGES[wanted.program]
        ]
    except importlib.metadata.PackageNotFoundError as error:
        say(missing=f"{sys.executable} has no {error.name}")
        return
    clock = time.thread_time if wanted.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        measure = {"transformers": transformers, "llamacpp": llamacpp}[wanted.program](
            wanted, clock, Path(folder)
        )
        say(version=", ".join(versions))
        for _ in sys.stdin:
            say(tokens_per_second=measure())


def transformers(
    wanted: SimpleNamespace, clock: Callable[[], float], folder: Path
) -> Callable[[], float]:
    """Qwen3 of the same shape, with transformers' own `generate`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(wanted.threads)
    c = SimpleNamespace(**wanted.shape)
    shape = Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        max_position_embeddings=c.context,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(shape).to(getattr(torch, wanted.store)).eval()
    ids = torch.tensor([wanted.prompt])

    def measure() -> float:
        times = []

        def note_time(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            times.append(clock())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=wanted.tokens + 1,
            do_sample=False,
            stopping_criteria=[note_time],
        )
        return wanted.tokens / (times[-1] - times[0])

    return measure


def llamacpp(
    wanted: SimpleNamespace, clock: Callable[[], float], folder: Path
) -> Callable[[], float]:
    """llama.cpp, greedy, with a model file of the same shape; asked for one token at a time, as a
    chat asks.
    """
    import llama_cpp as cpp
    import numpy as np

    path = folder / "model.gguf"
    write_gguf(path, SimpleNamespace(**wanted.shape), wanted.store)
    quiet = cpp.llama_log_callback(lambda *_: None)
    cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    settings = cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch = len(wanted.prompt) + wanted.tokens + 8, 512
    settings.n_threads = settings.n_threads_batch = wanted.threads

    def decode(context: Any, ids: list[int]) -> int:
        tokens = (cpp.llama_token * len(ids))(*ids)  # named, because the batch only points to it
        batch = cpp.llama_batch_get_one(tokens, len(ids))
        if cpp.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not decode")
        logits = cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(wanted.shape["vocab_size"],)).argmax())

    def measure(quiet: Any = quiet) -> float:  # the callback has to outlive the model
        context = cpp.llama_init_from_model(model, settings)
        for part in range(0, len(wanted.prompt), settings.n_batch):
            token = decode(context, wanted.prompt[part : part + settings.n_batch])
        started = clock()
        for _ in range(wanted.tokens):
            token = decode(context, [token])
        seconds = clock() - started
        cpp.llama_free(context)
        return wanted.tokens / seconds

    return measure


def write_gguf(path: Path, c: SimpleNamespace, store: str) -> None:
    """A model file for llama.cpp: the Llama of the same shape, random weights, no vocabulary."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[store]
    rng = np.random.default_rng(0)

    def matrix(name: str, n: int, d: int) -> None:
        weight = rng.standard_normal((n, d), dtype=np.float32) / np.float32(d**0.5)
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    def vector(name: str) -> None:
        writer.add_tensor(name, np.ones(c.d_model, dtype=np.float32))

    matrix("token_embd.weight", c.vocab_size, c.d_model)
    vector("output_norm.weight")
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    shapes = {"attn_q": (q, c.d_model), "attn_k": (kv, c.d_model), "attn_v": (kv, c.d_model)}
    shapes |= {
        "attn_output": (c.d_model, q),
        "ffn_gate": (c.d_ff, c.d_model),
        "ffn_up": (c.d_ff, c.d_model),
    }
    shapes["ffn_down"] = (c.d_model, c.d_ff)
    for layer in range(c.n_layer):
        for name, shape in shapes.items():
            matrix(f"blk.{layer}.{name}.weight", *shape)
        vector(f"blk.{layer}.attn_norm.weight")
        vector(f"blk.{layer}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()

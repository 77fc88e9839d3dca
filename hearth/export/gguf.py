"""A portable checkpoint as GGUF files for llama.cpp, and a Modelfile for ollama.

In: a checkpoint's folder and what was loaded from it, of the portable shape. Out: a folder with the
model in F16 and Q8_0, and in Q4_K_M where llama.cpp is at hand, each with tokenizer and chat
template inside. Needs the `gguf` package.
"""

from __future__ import annotations

import ctypes
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from config import ChatConfig, UserError
from hearth.data.chat_format import CHAT_TEMPLATE, stop_ids
from hearth.data.tokenizer import FILE, SPECIAL_TOKENS, Tokenizer
from hearth.export import card, qwen3
from hearth.export.huggingface import SHOWN, is_chat, new_folder
from hearth.training.checkpoint import Loaded

FORMATS = ("F16", "Q8_0")
# Of the names that llama.cpp knows for how a text is cut into words, the one whose regular
# expression is `tokenizer.PATTERN`; tests hold the ids of both against each other. They differ at
# letters that one side's table of Unicode is too old to know, such as the hieroglyphs of 16.0.
PRE_TOKENIZER = "qwen2"
USAGE = """```
llama-server -m model-Q8_0.gguf --jinja
ollama create NAME -f Modelfile && ollama run NAME
```"""


def write(checkpoint: Path, loaded: Loaded, out: Path) -> None:
    """Write the folder `out` for `loaded`, which came from the folder `checkpoint`."""
    library = gguf_package()
    tokenizer = json.loads((checkpoint / "tokenizer" / FILE).read_text(encoding="utf-8"))
    weights = qwen3.weights(loaded.model)
    with new_folder(out) as folder:
        for store in FORMATS:
            path = folder / f"model-{store}.gguf"
            writer = library.GGUFWriter(path, "qwen3")
            add_settings(writer, library, loaded, store)
            add_tokenizer(writer, library, tokenizer, loaded)
            add_weights(writer, library, weights, store)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        write_q4(folder)
        (folder / "Modelfile").write_text(modelfile(loaded), encoding="utf-8")
        text = card.text(checkpoint, loaded, "gguf", USAGE)
        (folder / "README.md").write_text(text, encoding="utf-8")


def gguf_package() -> ModuleType:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UserError(
            "--to gguf needs the package gguf. Install it with `uv sync --group dev`."
        ) from error
    return gguf


def add_settings(writer: Any, library: ModuleType, loaded: Loaded, store: str) -> None:
    c = loaded.config.model
    writer.add_name(loaded.config.run_dir.name)
    writer.add_file_type(library.LlamaFileType[f"MOSTLY_{store}"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(1e-6)


def add_tokenizer(
    writer: Any, library: ModuleType, tokenizer: dict[str, Any], loaded: Loaded
) -> None:
    """Vocabulary, merges, chat template; `tokenizer` is what `tokenizer.json` holds.

    What ends an answer: llama.cpp knows an end of turn and an end of message beside the end of
    text; `<|bos|>`, with which another text would begin, stands for the last.
    """
    vocabulary = tokenizer["model"]["vocab"] | {
        token["content"]: token["id"] for token in tokenizer["added_tokens"]
    }
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    added = {token["content"] for token in tokenizer["added_tokens"]}
    # a pair, or its halves with a space between them, as older files write it
    merges = (m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types([token_type(token, added, library) for token in tokens])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    )
    ours: Tokenizer = loaded.tokenizer
    writer.add_bos_token_id(ours.bos)
    writer.add_eos_token_id(ours.end)
    writer.add_eot_token_id(ours.end)
    writer.add_eom_token_id(ours.bos)
    writer.add_pad_token_id(ours.pad)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if is_chat(loaded):
        writer.add_chat_template(CHAT_TEMPLATE)


def token_type(token: str, added: set[str], library: ModuleType) -> int:
    """Control tokens are hidden from an answer; user-defined ones are shown, and read wherever a
    text spells them.
    """
    kinds = library.TokenType
    if token in SHOWN:
        return kinds.USER_DEFINED
    if token in SPECIAL_TOKENS:
        return kinds.CONTROL
    return kinds.UNUSED if token in added else kinds.NORMAL


def add_weights(writer: Any, library: ModuleType, weights: dict[str, Tensor], store: str) -> None:
    """Matrices as `store`, in F16 where their rows do not fill whole blocks of it; vectors in
    float32.
    """
    names = library.get_tensor_name_map(
        library.MODEL_ARCH.QWEN3, sum(".q_norm." in name for name in weights)
    )
    kind = library.GGMLQuantizationType[store]
    block = library.GGML_QUANT_SIZES[kind][0]
    for name, weight in weights.items():
        data = weight.numpy()
        short = names.get_name(name, try_suffixes=(".weight",))
        if data.ndim == 1:
            writer.add_tensor(short, data)
        elif data.shape[-1] % block:
            writer.add_tensor(short, data.astype(np.float16))
        else:
            writer.add_tensor(short, library.quants.quantize(data, kind), raw_dtype=kind)


def write_q4(folder: Path) -> None:
    """Make Q4_K_M of the file in F16 with llama.cpp's own quantizer, where llama-cpp-python is
    installed (`uv sync --group llama`).
    """
    if find_spec("llama_cpp") is None:
        return
    import llama_cpp

    llama_cpp.llama_log_set(silence(), ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    paths = (str(folder / f"model-{store}.gguf").encode() for store in ("F16", "Q4_K_M"))
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(settings)):
        raise UserError("llama.cpp could not quantize the model to Q4_K_M: see the other formats.")


@cache
def silence() -> Any:
    """A log for llama.cpp that keeps nothing; it calls it for as long as the process lives."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


def modelfile(loaded: Loaded) -> str:
    """What `ollama create NAME -f Modelfile` reads; its template language is Go's."""
    chat, tokenizer = loaded.config.chat, loaded.tokenizer
    turn = (
        "{{ range .Messages }}<|{{ .Role }}|>"
        "{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ .Content }}<|end|>{{ end }}"
        "<|assistant|>"
    )
    template = turn if is_chat(loaded) else "{{ .Prompt }}"
    lines = [f"FROM ./model-{FORMATS[-1]}.gguf", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{SPECIAL_TOKENS[token]}"' for token in stop_ids(tokenizer)]
    lines += [f"PARAMETER {name} {value}" for name, value in sampling(chat).items()]
    lines.append(f"PARAMETER num_ctx {loaded.config.model.context}")
    if chat.system:
        lines.append(f'SYSTEM """{chat.system}"""')
    return "\n".join(lines) + "\n"


def sampling(chat: ChatConfig) -> dict[str, float]:
    return {
        "temperature": chat.temperature,
        "top_k": chat.top_k or 0,
        "top_p": 1.0 if chat.top_p is None else chat.top_p,
        "min_p": chat.min_p or 0.0,
        "repeat_penalty": chat.repetition_penalty,
    }

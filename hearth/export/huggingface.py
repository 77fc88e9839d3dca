"""A checkpoint as a folder that transformers loads.

In: a checkpoint's folder and what was loaded from it. Out: weights as safetensors, config,
generation config, tokenizer, chat template and model card. A portable shape becomes a plain Qwen3,
any other carries its own code, `modeling_hearth.py`. Does not import transformers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from config import ModelConfig, UserError
from hearth.data.chat_format import CHAT_TEMPLATE, stop_ids
from hearth.data.tokenizer import BOS, END, FILE, PAD, SPARES, SPECIAL_TOKENS, THINK, Tokenizer
from hearth.export import card, qwen3
from hearth.training.checkpoint import Loaded
from model import Block, Model

CODE = Path(__file__).with_name("modeling_hearth.py")
# what an answer shows of its special tokens: servers tell reasoning and tool calls apart by these
SHOWN = tuple(t for t in SPECIAL_TOKENS[SPECIAL_TOKENS.index(THINK) :] if t not in (PAD, *SPARES))


def write(checkpoint: Path, loaded: Loaded, out: Path) -> None:
    """Write the folder `out` for `loaded`, which came from the folder `checkpoint`."""
    plain = loaded.config.model.shape == "portable"
    if plain:
        config, weights = qwen3.config(loaded.config.model), qwen3.weights(loaded.model)
    else:
        config, weights = own_config(loaded.model), own_weights(loaded.model)
    ids = special_ids(loaded.tokenizer)
    config |= {"dtype": "float32", **ids}
    with new_folder(out) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", generation_config(loaded) | ids)
        tokenizer = tokenizer_json((checkpoint / "tokenizer" / FILE).read_text(encoding="utf-8"))
        write_json(folder / FILE, tokenizer)
        write_json(folder / "tokenizer_config.json", tokenizer_config(loaded.config.model))
        if is_chat(loaded):
            (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        if not plain:
            shutil.copyfile(CODE, folder / CODE.name)
        text = card.text(checkpoint, loaded, "transformers", usage(plain))
        (folder / "README.md").write_text(text, encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` once all is written; `UserError` where `out` holds
    something already. An empty one stays: a shell may stand in it.
    """
    out = out.absolute()  # "." alone has no name
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no empty folder. Remove it, or name another one.")
    part = out.with_name(f".part-{out.name}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        if out.exists():
            for path in part.iterdir():
                os.replace(path, out / path.name)
        else:
            os.replace(part, out)
    except OSError as error:
        raise UserError(f"{out} could not be written: {error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def is_chat(loaded: Loaded) -> bool:
    """Whether the model has been taught conversations."""
    return loaded.state["stage"] != "base"


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": stop_ids(tokenizer),
        "pad_token_id": tokenizer.pad,
    }


def own_config(model: Model) -> dict[str, Any]:
    """`HearthConfig` of `modeling_hearth.py` as JSON values."""
    c = model.config
    hrm: dict[str, int] = {"hrm_h_cycles": 0}
    if c.hrm is not None:
        head = model.head
        hrm = {
            "hrm_fast": letters(head.fast.blocks) if head.fast else "",
            "hrm_slow": letters(head.slow.blocks),
            "hrm_l_cycles": c.hrm.l_cycles,
            "hrm_h_cycles": c.hrm.h_cycles,
            "hrm_trained_cycles": len(head.call_embedding),
        }
    return {
        "architectures": ["HearthForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.HearthConfig",
            "AutoModel": f"{CODE.stem}.HearthModel",
            "AutoModelForCausalLM": f"{CODE.stem}.HearthForCausalLM",
        },
        "model_type": "hearth",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "max_position_embeddings": c.context,
        "rope_theta": c.rope_base,
        "trunk": letters(model.trunk),
        "sliding_window": c.window,
        "gated_mlp": c.gated_mlp,
        "token_shift": c.token_shift,
        "exclusive_attention": c.exclusive_attention,
        "num_value_embeddings": c.n_value_embeddings,
        "num_bigrams": c.bigram_rows,
        **hrm,
    }


def letters(blocks: Iterable[Block]) -> str:
    """S for a block with a window, L for one that sees the whole context."""
    return "".join("S" if block.window else "L" for block in blocks)


def own_weights(model: Model) -> dict[str, Tensor]:
    """The weights by their names in `modeling_hearth.py`: ours, those of its modules with
    `.weight`.
    """
    modules = {id(table) for table in model.tables}
    for block in model.blocks:
        matrices = (getattr(block, n) for n in ("q", "k", "v", "o", "gate", "up", "down"))
        modules |= {id(matrix) for matrix in matrices}
    names = {"embedding": "embed_tokens.weight"}
    found = {
        names.get(name, f"{name}.weight" if id(p) in modules else name): p.detach().contiguous()
        for name, p in model.named_parameters()
    }
    return {f"model.{name}": weight for name, weight in found.items()}


def generation_config(loaded: Loaded) -> dict[str, Any]:
    """How the chat draws its answers."""
    chat = loaded.config.chat
    if chat.temperature == 0:
        return {"do_sample": False}
    given = {name: getattr(chat, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    # transformers draws from 50 unless told otherwise
    given["top_k"] = given["top_k"] or 0
    drawn = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **drawn, "repetition_penalty": chat.repetition_penalty}


def tokenizer_json(text: str) -> dict[str, Any]:
    """Our `tokenizer.json` as transformers wants it: texts are opened by `<|bos|>`, and decoding
    without special tokens still shows reasoning and tool calls.
    """
    tokenizer = json.loads(text)
    for token in tokenizer["added_tokens"]:
        token["special"] &= token["content"] not in SHOWN
    bos = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == BOS)
    opened = {"SpecialToken": {"id": BOS, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [opened, a],
        "pair": [opened, a, b],
        "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}},
    }
    return tokenizer


def tokenizer_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "padding_side": "left",
        "model_max_length": model.context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def usage(plain: bool) -> str:
    """How the folder is loaded, for the model card."""
    trust = "" if plain else ", trust_remote_code=True"
    code = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
```"""
    if plain:
        return code + "\n\nIt is a Qwen3: `vllm serve FOLDER` knows it too."
    return f"{code}\n\n`trust_remote_code` runs `{CODE.name}` of this folder, and no other code."


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")

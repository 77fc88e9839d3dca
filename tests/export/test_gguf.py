"""GGUF files: what is in them, and that llama.cpp computes and cuts texts as we do.

llama.cpp's tests are skipped where llama-cpp-python is missing, which compiles for minutes:

    uv run --group llama pytest tests/export/test_gguf.py
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import exported
import gguf as library
import numpy as np
import pytest
import torch
from exported import awkward_strings, long_text, our_logits

from config import ChatConfig
from hearth.data import tokenizer as tokenizer_module
from hearth.data.chat_format import CHAT_TEMPLATE, render, stop_ids
from hearth.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from hearth.decoding.engine import Engine
from hearth.export import gguf, huggingface, qwen3
from hearth.training.checkpoint import Loaded

Files = tuple[Loaded, Path]


@pytest.fixture(scope="module")
def files(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A portable checkpoint and the folder of its GGUF files."""
    place = tmp_path_factory.mktemp("gguf")
    folder = exported.save(place, exported.SHAPES["portable"], tokenizer)
    loaded = exported.loaded_in_float32(folder)
    gguf.write(folder, loaded, place / "out")
    return loaded, place / "out"


def read(files: Files, store: str) -> Any:
    return library.GGUFReader(files[1] / f"model-{store}.gguf")


def field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()


# ------------------------------------------------------------------------------------ what is in it


def test_the_folder_holds_these_files(files: Files) -> None:
    names = {"model-F16.gguf", "model-Q8_0.gguf", "Modelfile", "README.md"}
    assert {p.name for p in files[1].iterdir()} - {"model-Q4_K_M.gguf"} == names
    assert all(p.read_bytes().startswith(b"GGUF") for p in files[1].glob("*.gguf"))


@pytest.mark.parametrize(("store", "tolerance"), [("F16", 1e-3), ("Q8_0", 1e-2)])
def test_every_weight_is_there_as_it_should_be_stored(
    files: Files, store: str, tolerance: float
) -> None:
    weights = qwen3.weights(files[0].model)
    names = library.get_tensor_name_map(library.MODEL_ARCH.QWEN3, files[0].config.model.n_layer)
    ours = {names.get_name(n, try_suffixes=(".weight",)): w for n, w in weights.items()}
    found = {tensor.name: tensor for tensor in read(files, store).tensors}
    assert found.keys() == ours.keys()
    for name, tensor in found.items():
        stored = library.quants.dequantize(tensor.data, tensor.tensor_type)
        error = np.linalg.norm(stored - ours[name].numpy()) / np.linalg.norm(ours[name].numpy())
        assert error < tolerance, name
        assert tensor.tensor_type.name == ("F32" if ours[name].ndim == 1 else store)


def test_rows_that_fill_no_whole_blocks_stay_in_f16(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shape = replace(exported.SHAPES["portable"], d_ff=80)
    folder = exported.save(tmp_path, shape, tokenizer)
    loaded = exported.loaded_in_float32(folder)
    gguf.write(folder, loaded, tmp_path / "out")
    kinds = {t.name: t.tensor_type.name for t in read((loaded, tmp_path / "out"), "Q8_0").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_settings_and_special_tokens_are_ours(files: Files, tokenizer: Tokenizer) -> None:
    reader, c = read(files, "F16"), files[0].config.model
    assert field(reader, "general.architecture") == "qwen3"
    for name, value in {
        "context_length": c.context,
        "embedding_length": c.d_model,
        "feed_forward_length": c.d_ff,
        "block_count": c.n_layer,
        "attention.head_count": c.n_head,
        "attention.head_count_kv": c.n_kv_head,
        "attention.key_length": c.head_dim,
        "rope.freq_base": c.rope_base,
    }.items():
        assert field(reader, f"qwen3.{name}") == value
    tokens = field(reader, "tokenizer.ggml.tokens")
    kinds = field(reader, "tokenizer.ggml.token_type")
    assert tokens[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    kind_of = dict(zip(tokens, map(library.TokenType, kinds), strict=True))
    for name in ("<think>", "</think>", "<|tool_call|>", "<|end_tool_call|>", "<|tool_result|>"):
        assert kind_of[name] == library.TokenType.USER_DEFINED
    for name in ("<|bos|>", "<|user|>", "<|end|>", "<|pad|>", "<|spare_0|>"):
        assert kind_of[name] == library.TokenType.CONTROL
    assert kind_of["a"] == library.TokenType.NORMAL
    assert field(reader, "tokenizer.ggml.eos_token_id") == tokenizer.end
    assert field(reader, "tokenizer.ggml.add_bos_token")
    assert field(reader, "tokenizer.chat_template") == CHAT_TEMPLATE


def test_the_modelfile_stops_where_our_chat_does(
    files: Files, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = (files[1] / "Modelfile").read_text()
    assert text.startswith("FROM ./model-Q8_0.gguf\n")
    stops = {SPECIAL_TOKENS[token] for token in stop_ids(tokenizer)}
    assert set(re.findall(r'PARAMETER stop "(.*)"', text)) == stops
    assert "PARAMETER num_ctx 2048" in text
    chat = ChatConfig(temperature=0.6, top_p=0.9, system="Be brief.")
    folder = exported.save(tmp_path, exported.SHAPES["portable"], tokenizer, chat=chat)
    said = gguf.modelfile(exported.loaded_in_float32(folder))
    assert "PARAMETER temperature 0.6" in said
    assert 'SYSTEM """Be brief."""' in said


# ---------------------------------------------------------------------------------------- llama.cpp

needs_llama = pytest.mark.skipif(
    find_spec("llama_cpp") is None,
    reason="needs llama-cpp-python: uv run --group llama pytest tests/export/test_gguf.py",
)


@contextmanager
def llama(files: Files, store: str = "F16", **given: Any) -> Iterator[Any]:
    from llama_cpp import Llama

    model = Llama(
        str(files[1] / f"model-{store}.gguf"),
        n_ctx=2048,
        n_threads=1,
        verbose=False,
        logits_all=True,
        **given,
    )
    try:
        yield model
    finally:
        model.close()


def crossing_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """A tokenizer with our way to cut words, whose merges were learnt without it: a word that ends
    elsewhere gives other ids nearly always.
    """
    ours = tokenizer_module.PATTERN
    texts = [*awkward_strings(2000, seed=1), *long_text(300_000, seed=1).split("\n\n")]
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "PATTERN", r"[\s\S]+")
        backend = Tokenizer.train(texts, 4096)._backend
    described = json.loads(backend.to_str())
    (split, _) = described["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": r"[\s\S]+"}
    split["pattern"]["Regex"] = ours
    return Tokenizer(type(backend).from_str(json.dumps(described)))


@needs_llama
def test_tokens_of_llama_cpp_are_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Awkward strings and a megabyte of text; where a text spells one of the tokens that answers
    show, llama.cpp reads the token.
    """
    tokenizer = crossing_tokenizer(monkeypatch)
    shape = replace(exported.SHAPES["portable"], vocab_size=4096)
    folder = exported.save(tmp_path, shape, tokenizer)
    loaded = exported.loaded_in_float32(folder)
    gguf.write(folder, loaded, tmp_path / "out")
    texts = [t for t in awkward_strings(2000) if not any(name in t for name in huggingface.SHOWN)]
    with llama((loaded, tmp_path / "out")) as model:
        for text in [*texts, *long_text(1_000_000).split("\n\n")]:
            ids = model.tokenize(text.encode(), add_bos=False, special=False)
            assert ids == tokenizer.encode(text), repr(text)[:200]
        assert model.tokenize(b"ka", add_bos=True) == [tokenizer.bos, *tokenizer.encode("ka")]


@needs_llama
@pytest.mark.parametrize(("store", "bar"), [("F16", 2e-2), ("Q8_0", 1e-1), ("Q4_K_M", 0.5)])
def test_logits_of_llama_cpp_are_ours(files: Files, store: str, bar: float) -> None:
    rng = random.Random(0)
    prompt = [0, *(rng.randrange(20, 512) for _ in range(199))]
    with llama(files, store) as model:
        model.eval(prompt)
        theirs = torch.tensor(np.array(model.scores[: len(prompt)]))
    ours = our_logits(files[0], prompt)
    assert float((theirs - ours).norm() / ours.norm()) < bar


@needs_llama
def test_answers_end_where_ours_do(files: Files, tokenizer: Tokenizer) -> None:
    """llama.cpp has no list of stop tokens; the turns' tokens are left to the program around it."""
    import llama_cpp

    with llama(files) as model:
        vocabulary = llama_cpp.llama_model_get_vocab(model._model.model)
        ends = {i for i in range(512) if llama_cpp.llama_vocab_is_eog(vocabulary, i)}
    assert ends == {tokenizer.end, tokenizer.bos}


@needs_llama
def test_a_chat_with_the_embedded_template_is_ours(files: Files, tokenizer: Tokenizer) -> None:
    """The prompt's ids, and an answer that stops by itself with its reasoning shown."""
    messages = [{"role": "system", "content": "ka"}, {"role": "user", "content": "mor la"}]
    seen: list[list[int]] = []
    thinking = [tokenizer.think, *tokenizer.encode("la"), tokenizer.end_think]
    said = [*thinking, *tokenizer.encode("ka"), tokenizer.end]

    def forced(ids: Any, scores: Any) -> Any:
        seen.append([int(i) for i in ids])
        scores = np.full_like(scores, -np.inf)
        scores[said[len(seen) - 1]] = 0
        return scores

    with llama(files) as model:
        answer = model.create_chat_completion(
            messages, max_tokens=50, temperature=0, logits_processor=[forced]
        )
    assert seen[0] == render(messages, tokenizer, answer=True).ids
    assert answer["choices"][0]["message"]["content"] == "<think>la</think>ka"
    assert answer["choices"][0]["finish_reason"] == "stop"


@needs_llama
def test_greedy_answers_of_llama_cpp_are_nearly_all_ours(files: Files) -> None:
    """The model is random, so that F16 turns a close choice here and there: beginnings agree."""
    rng = random.Random(1)
    prompts = [[0, *(rng.randrange(20, 512) for _ in range(20))] for _ in range(20)]
    ours = Engine(files[0].model).generate(prompts, max_tokens=8)
    same = 0
    with llama(files) as model:
        for prompt, answer in zip(prompts, ours, strict=True):
            theirs = []
            for token in model.generate(prompt, temp=0, repeat_penalty=1.0):
                theirs.append(token)
                if len(theirs) == 8:
                    break
            same += theirs == answer
    assert same >= 18

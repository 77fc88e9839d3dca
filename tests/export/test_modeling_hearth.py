"""The code that an exported folder carries computes what `model.py` does, in the real library."""

from __future__ import annotations

import ast
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exported
import pytest
import torch
from exported import load, load_tokenizer, our_logits, padded, some_text

from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Engine
from hearth.export.huggingface import CODE
from hearth.training.checkpoint import Loaded

Export = Callable[[str], tuple[Loaded, Path]]
OWN = [name for name in exported.SHAPES if name != "portable"]
# the library's own deprecations, which no user of the folder can mend
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def prompts(n: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random ids, each prompt opened by <|bos|>, one of them of the longest length."""
    rng = random.Random(seed)
    lengths = [longest, *(rng.randint(1, longest) for _ in range(n - 1))]
    return [[0, *(rng.randrange(20, 512) for _ in range(length - 1))] for length in lengths]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / ours.norm())


@pytest.fixture
def whole(export: Export) -> tuple[Loaded, Any]:
    loaded, folder = export("whole")
    return loaded, load(folder)


@pytest.mark.parametrize("name", exported.SHAPES)
def test_logits_are_ours_under_left_padding(export: Export, name: str) -> None:
    loaded, folder = export(name)
    asked = prompts(6, 200)
    ids, real = padded(asked)
    with torch.no_grad():
        theirs = load(folder)(ids, attention_mask=real).logits
    for prompt, logits in zip(asked, theirs, strict=True):
        ours = our_logits(loaded, prompt)
        assert relative_error(ours, logits[-len(prompt) :]) < 1e-4


@pytest.mark.parametrize("name", ["whole", "portable"])
def test_logits_are_ours_over_2000_tokens(export: Export, name: str) -> None:
    loaded, folder = export(name)
    (prompt,) = prompts(1, 2000)
    with torch.no_grad():
        theirs = load(folder)(torch.tensor([prompt])).logits[0]
    assert relative_error(our_logits(loaded, prompt), theirs) < 1e-4


@pytest.mark.parametrize("name", exported.SHAPES)
def test_greedy_answers_are_ours_with_and_without_a_cache(export: Export, name: str) -> None:
    loaded, folder = export(name)
    asked = prompts(20, 60)
    ids, real = padded(asked)
    model = load(folder)
    wishes = {"max_new_tokens": 128, "do_sample": False, "eos_token_id": []}
    cached = model.generate(ids, attention_mask=real, **wishes)[:, ids.shape[1] :]
    ours = Engine(loaded.model).generate(asked, max_tokens=128)
    assert cached.tolist() == ours
    wishes["max_new_tokens"] = 40  # a pass over everything for each token
    uncached = model.generate(ids, attention_mask=real, use_cache=False, **wishes)
    assert torch.equal(uncached[:, ids.shape[1] :], cached[:, :40])


def test_a_cache_filled_in_chunks_changes_nothing(whole: tuple[Loaded, Any]) -> None:
    """Over the edge of the window, and with a cache that was made without the configuration."""
    from transformers import DynamicCache

    _, model = whole
    ids, real = padded(prompts(3, 90))
    with torch.no_grad():
        at_once = model(ids, attention_mask=real).logits
        for cache in (DynamicCache(config=model.config), DynamicCache()):
            parts, start = [], 0
            for length in (1, 30, 2, 1, 40, 16):
                end = start + length
                out = model(ids[:, start:end], attention_mask=real[:, :end], cache=cache)
                parts.append(out.logits)
                start = end
            chunked = torch.cat(parts, dim=1)
            assert torch.allclose(chunked[real == 1], at_once[real == 1], atol=1e-4)


def test_the_cache_has_a_slot_for_each_pass_and_windows_bound_theirs(
    whole: tuple[Loaded, Any],
) -> None:
    loaded, model = whole
    with torch.no_grad():
        out = model(torch.tensor(prompts(1, 100)), use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    passes = loaded.model.block_passes()
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert held == [23 if block.window else 100 for block in passes] + [100]  # the ids


def test_beam_search_with_a_cache_equals_beam_search_without(whole: tuple[Loaded, Any]) -> None:
    _, model = whole
    ids, real = padded(prompts(3, 40))
    wishes = {"max_new_tokens": 24, "num_beams": 4, "do_sample": False, "eos_token_id": []}
    beams = [
        model.generate(ids, attention_mask=real, use_cache=cached, **wishes)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("cycles", [1, 3])
def test_the_head_can_run_other_cycles_than_trained(export: Export, cycles: int) -> None:
    loaded, folder = export("whole")
    ids, _ = padded(prompts(1, 50))
    model = load(folder, hrm_h_cycles=cycles)
    engine = Engine(loaded.model, h_cycles=cycles)
    theirs = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=[])
    assert theirs[:, ids.shape[1] :].tolist() == engine.generate(ids.tolist(), max_tokens=16)


def test_every_weight_learns_and_recomputing_changes_no_gradient(
    whole: tuple[Loaded, Any],
) -> None:
    _, model = whole
    model.train()
    ids, real = padded(prompts(2, 40))
    labels = ids.masked_fill(real == 0, -100)
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, attention_mask=real, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    kept, recomputed = gradients
    assert all(float(g.abs().max()) > 0 for g in kept.values())
    assert all(torch.allclose(g, recomputed[name], atol=1e-6) for name, g in kept.items())


def test_the_loss_is_ours(whole: tuple[Loaded, Any]) -> None:
    loaded, model = whole
    (prompt,) = prompts(1, 50)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        theirs = float(model(ids, labels=ids).loss)
    ours = torch.nn.functional.cross_entropy(our_logits(loaded, prompt)[:-1], ids[0, 1:])
    assert theirs == pytest.approx(float(ours), rel=1e-5)


def test_the_network_without_its_output_gives_what_the_output_reads(export: Export) -> None:
    """TRL and PEFT take the two apart; the output's matrix is the embedding, not a copy of it."""
    from transformers import AutoModel

    _, folder = export("whole")
    model, ids = load(folder), torch.tensor(prompts(1, 40))
    output = model.get_output_embeddings().weight
    assert output.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        hidden = inner(ids).last_hidden_state
        assert torch.allclose(hidden @ output.T, model(ids).logits, atol=1e-5)


def test_bfloat16_stays_near(export: Export) -> None:
    loaded, folder = export("whole")
    (prompt,) = prompts(1, 100)
    model = load(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs = model(torch.tensor([prompt])).logits[0]
    assert theirs.dtype == torch.float32
    assert relative_error(our_logits(loaded, prompt), theirs) < 0.1


def test_what_it_cannot_read_is_refused(whole: tuple[Loaded, Any]) -> None:
    from transformers import StaticCache

    _, model = whole
    ids = torch.tensor(prompts(1, 8))
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 64))
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids, cache=StaticCache(config=model.config, max_cache_len=16))
    with pytest.raises(ValueError, match=r"\(1, 5\), must be .* \(1, 8\)"):
        model(ids, attention_mask=torch.ones(1, 5))


def test_save_pretrained_writes_a_folder_that_loads_again(
    whole: tuple[Loaded, Any], tmp_path: Path
) -> None:
    _, model = whole
    model.save_pretrained(tmp_path)
    assert (tmp_path / CODE.name).read_text() == CODE.read_text()
    ids = torch.tensor(prompts(1, 30))
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


def test_the_pipeline_continues_a_text_and_a_chat(
    whole: tuple[Loaded, Any], export: Export, tokenizer: Tokenizer
) -> None:
    from transformers import pipeline

    loaded, model = whole
    theirs = load_tokenizer(export("whole")[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        continues = pipeline("text-generation", model=model, tokenizer=theirs)
        text = some_text(random.Random(3), 8)
        wishes = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
        said = continues(text, **wishes)[0]["generated_text"]
        chat = continues([{"role": "user", "content": text}], **wishes)[0]["generated_text"]
    engine = Engine(loaded.model)
    stops = model.generation_config.eos_token_id
    prompts_ = {
        said: [tokenizer.bos, *tokenizer.encode(text)],
        chat: [
            *(tokenizer.bos, tokenizer.user, *tokenizer.encode(text), tokenizer.end),
            tokenizer.assistant,
        ],
    }
    for answer, prompt in prompts_.items():
        (ids,) = engine.generate([prompt], max_tokens=12, stop_ids=stops)
        assert answer == theirs.decode(ids, skip_special_tokens=True)


def test_the_file_imports_torch_and_transformers_alone() -> None:
    found = set()
    for node in ast.walk(ast.parse(CODE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found == {"__future__", "math", "typing", "torch", "transformers"}

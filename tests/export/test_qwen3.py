"""The portable shape: a config switch, a model that trains and decodes, and a Qwen3 in the end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import exported
import pytest
import torch

from config import PRESETS, Config, HRMConfig, ModelConfig, UserError
from hearth import cli
from hearth.cli import portable
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Engine
from hearth.decoding.matrices import compiled_kernels
from hearth.export import qwen3
from hearth.training.optim import build_optimizers
from model import Model, PackedSequences, build_model, rms_norm


def parsed(*words: str) -> Config:
    return cli.Script("").parse(words)[0]


def test_the_switch_makes_any_preset_portable() -> None:
    for name, preset in PRESETS.items():
        config = parsed("--preset", name, "--model.shape", "portable")
        assert config.model == portable(preset.model)
        assert qwen3.beyond_qwen3(config.model) == []


def test_later_options_still_count() -> None:
    words = ["--model.shape=portable", "--model.n_layer", "5", "--model.d_model", "64"]
    made = parsed("--preset", "demo", *words).model
    assert (made.n_layer, made.d_model, made.shape) == (5, 64, "portable")


def test_words_and_config_say_the_same_of_a_portable_run() -> None:
    words = ("--preset", "demo", "--model.shape", "portable", "--model.n_layer", "5")
    config = parsed(*words)
    assert cli.words_of(config) == list(words[2:])
    assert parsed("--preset", "demo", *cli.words_of(config)) == config
    assert cli.words_of(config, config) == []


def test_an_unknown_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--preset", "demo", "--model.shape", "llama")
    assert "must be hearth or portable" in capsys.readouterr().err


def test_the_portable_shape_is_about_as_large() -> None:
    preset = PRESETS["16gb"].model
    with torch.device("meta"):
        model, after = Model(preset), Model(portable(preset)).n_parameters()
    before = model.n_parameters() - sum(table.numel() for table in model.tables)
    assert abs(after / before - 1) < 0.01


def test_what_a_portable_shape_has_no_place_for_is_named_at_once() -> None:
    problems = ModelConfig(shape="portable", n_value_embeddings=1, gated_mlp=False).problems()
    for word in ("hrm None", "token_shift False", "n_value_embeddings 0", "gated_mlp True"):
        assert any(word in problem for problem in problems), word
    assert any("window None" in problem for problem in problems)
    assert portable(exported.SHAPE).problems() == []


def test_a_shape_that_cannot_go_is_refused_with_the_command_that_trains_one() -> None:
    with pytest.raises(UserError) as caught:
        qwen3.refuse_others(replace(exported.SHAPE, hrm=HRMConfig()), "uv run some.py")
    for word in ("HRM head", "token shift", "value embeddings", "windows", "per head", "some.py"):
        assert word in str(caught.value), word
    assert "squared ReLU" not in str(caught.value)
    qwen3.refuse_others(portable(exported.SHAPE), "uv run some.py")


def test_the_initial_loss_is_ln_vocab_and_every_weight_learns() -> None:
    config = exported.SHAPES["portable"]
    model = build_model(config, seed=0)
    model.dtype = torch.float32
    ids = torch.randint(0, config.vocab_size, (513,), generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        hidden = model(ids[:-1], PackedSequences(torch.arange(512) == 0, 512))
        return model.loss(hidden, ids[1:], torch.full((512,), 1 / 512))

    assert abs(float(loss().detach()) - math.log(512)) < 0.03 * math.log(512)
    optimizers = build_optimizers(model, PRESETS["demo"].optim, 1e-3)
    for _ in range(2):  # the first step leaves the zeros behind which the rest is hidden
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss().backward()
        optimizers.step()
        optimizers.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gains_are_no_matrices_to_the_optimizer() -> None:
    model = build_model(exported.SHAPES["portable"], seed=0)
    muon, _ = build_optimizers(model, PRESETS["demo"].optim, 1e-3).parts
    matrices = {id(p) for group in muon.param_groups for p in group["params"]}
    gains = [p for name, p in model.named_parameters() if name.endswith("_gain")]
    assert len(gains) == 2 * len(model.trunk) + 1
    assert not matrices & {id(p) for p in gains}


def test_queries_that_point_where_keys_do_score_as_in_the_common_shape() -> None:
    """At the start, so that both shapes begin with attention as sharp."""
    scores = []
    for shape in (exported.SHAPE, exported.SHAPES["portable"]):
        block = build_model(shape, seed=0).trunk[0]
        gains = block.channel_gains()
        q, k = gains[0], gains[-1]
        scores.append(float((q * k).sum().detach()) / math.sqrt(shape.head_dim))
    assert scores == pytest.approx([15, 15])


@pytest.mark.parametrize("weights", [None, "float32"])
def test_decoding_equals_the_whole_pass(
    weights: str | None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """With our kernels where this machine compiles them: gains a channel, before the rotation."""
    if weights and compiled_kernels() is None:
        pytest.skip("this machine has no C compiler")
    folder = exported.save(tmp_path, exported.SHAPES["portable"], tokenizer)
    loaded = exported.loaded_in_float32(folder)
    prompt = [0, *range(30, 60)]
    (answer,) = Engine(loaded.model, weights=weights).generate([prompt], max_tokens=24)
    logits = exported.our_logits(loaded, [*prompt, *answer[:-1]])
    assert logits[len(prompt) - 1 :].argmax(dim=-1).tolist() == answer


def test_what_is_folded_is_where_a_qwen3_has_it() -> None:
    model = build_model(exported.SHAPES["portable"], seed=0)
    found = qwen3.weights(model)
    assert torch.equal(found["model.embed_tokens.weight"], rms_norm(model.embedding.detach()))
    assert torch.equal(found["lm_head.weight"], model.embedding)
    assert torch.allclose(found["model.norm.weight"], torch.full((64,), 1 / 8))
    assert {w.dtype for w in found.values()} == {torch.float32}

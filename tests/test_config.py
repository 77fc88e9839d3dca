"""Presets, checks, JSON, command line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from config import (
    FINE_TUNING,
    FINE_TUNING_LR,
    PRESETS,
    TOKENS_PER_WEIGHT,
    Config,
    DataConfig,
    ModelConfig,
    PretrainConfig,
    SFTConfig,
    Stage,
    TextSource,
    UserError,
    batch_for,
    lr_for,
    settled,
    shaped,
)
from model import Model, windows

CARDS = ["8gb", "12gb", "16gb", "24gb"]


def test_a_larger_card_gets_a_larger_model_and_more_tokens() -> None:
    sizes = [PRESETS[name].model.n_weights for name in CARDS]
    tokens = [trained_on(PRESETS[name]) for name in CARDS]
    assert sizes == sorted(set(sizes))
    assert tokens == sorted(set(tokens))
    assert 143e6 < PRESETS["16gb"].model.n_weights < 149e6


def trained_on(config: Config) -> int:
    loop = settled(config).pretrain
    return loop.steps * loop.tokens_per_step


@pytest.mark.parametrize("depth", [4, 6, 9, 13, 16, 19, 24, 32])
def test_every_depth_gives_a_shape_that_can_be_built(depth: int) -> None:
    model = shaped(PRESETS["16gb"].model, depth)
    config = replace(PRESETS["16gb"], model=model)  # every check of it
    with torch.device("meta"):
        built = Model(config.model)
    assert len(built.block_passes()) == depth
    assert model.head_dim == 64
    assert abs(model.d_model - 40 * depth) <= 32 + 64 * (depth < 5)
    # what n_weights leaves out are vectors, and the tables, one for every other block
    assert len(built.value_embeddings) == depth // 2
    tables = sum(table.numel() for table in built.tables)
    assert 0.99 < model.n_weights / (built.n_parameters() - tables) <= 1
    thirds = (model.n_layer, model.hrm.l_layer, model.hrm.h_layer)
    assert sum(thirds) == depth
    assert max(thirds) - min(thirds) <= 2
    plain = shaped(replace(model, hrm=None), depth)
    assert (plain.n_layer, plain.hrm) == (depth, None)
    # what a head costs is not what its blocks see
    assert windows(plain) == windows(model)


def test_the_rule_fills_in_only_what_is_left_open() -> None:
    config = PRESETS["16gb"]
    whole = settled(config)
    assert settled(whole) == whole
    assert whole.pretrain.tokens_per_step % config.model.context == 0
    assert whole.pretrain.steps * whole.pretrain.tokens_per_step == pytest.approx(
        TOKENS_PER_WEIGHT * config.model.n_weights, rel=0.01
    )
    assert whole.sft1.lr == whole.sft2.lr == FINE_TUNING_LR * whole.pretrain.lr
    given = replace(
        config, pretrain=replace(config.pretrain, lr=0.5, steps=7, tokens_per_step=8192)
    )
    loop = settled(given).pretrain
    assert (loop.lr, loop.steps, loop.tokens_per_step) == (0.5, 7, 8192)
    short = settled(replace(config, pretrain=replace(config.pretrain, tokens=10**7))).pretrain
    assert short.steps * short.tokens_per_step == pytest.approx(1e7, rel=0.01)


def test_the_learning_rate_falls_with_width_and_steps_the_batch_grows_with_the_tokens() -> None:
    small, large = (shaped(PRESETS["16gb"].model, depth) for depth in (6, 19))
    assert lr_for(large, 1000) < lr_for(small, 1000)
    assert lr_for(large, 9000) < lr_for(large, 1000)
    assert batch_for(10**9, 4096) > batch_for(10**8, 4096) >= batch_for(10**4, 4096) == 4096


@pytest.mark.parametrize("context", [1024, 1536, 3072])
def test_steps_by_the_rule_hold_whole_rows_of_any_context(context: int) -> None:
    card = PRESETS["16gb"]
    longest = (Stage(context=context // 2, share=0.5), Stage(context=context, share=0.5))
    made = settled(
        replace(
            card,
            model=replace(card.model, context=context, window=context),
            pretrain=replace(card.pretrain, stages=longest),
            **{name: replace(getattr(card, name), context=context) for name in FINE_TUNING},
        )
    )
    for stage in ("pretrain", *FINE_TUNING):
        assert getattr(made, stage).tokens_per_step % context == 0
    assert made.pretrain.tokens_per_step == pytest.approx(65_536, rel=0.05)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Config(
            data=DataConfig(sources=(TextSource(),)),
            model=ModelConfig(vocab_size=1000, n_head=5),
            pretrain=PretrainConfig(steps=0),
            sft1=SFTConfig(files=("x",), epochs=-1),
            sft2=SFTConfig(files=("x",)),
        )
    for word in (
        "data.sources",
        "vocab_size",
        "try 1024",
        "n_head 5",
        "pretrain.steps",
        "sft1.epochs",
    ):
        assert word in str(caught.value)


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="seed is -1, must be at least 0"):
        Config(seed=-1)


def test_corpora_that_all_weigh_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="every corpus has weight 0"):
        Config(data=DataConfig(text_files=("a", "b"), text_weights=(0.0, 0.0)))

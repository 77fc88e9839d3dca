"""Presets, checks, JSON, command line."""

from __future__ import annotations

import pytest
import torch

from config import (
    PRESETS,
    Config,
    DataConfig,
    ModelConfig,
    PretrainConfig,
    SFTConfig,
    TextSource,
    UserError,
)
from model import Model


@pytest.mark.parametrize("name", ["16gb", "12gb", "24gb", "8gb"])
def test_cards_make_the_same_model_of_about_146m_from_the_same_tokens(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        n = Model(preset.model).n_parameters()
    assert 143e6 < n < 149e6
    assert (preset.model.context, preset.model.vocab_size) == (4096, 32_768)
    assert preset.model == PRESETS["16gb"].model
    assert preset.pretrain.tokens_per_step == PRESETS["16gb"].pretrain.tokens_per_step


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

"""`--hours`: the size that a machine's speed and the law pick."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from config import PRESETS, Config, UserError, settled
from hearth.training import sizing

CONFIG = PRESETS["16gb"]


def speed_of_a_peak(flops: float):
    """Tokens per second of a machine that does so many operations a second, whatever the size."""
    return lambda config: flops / (6 * config.model.n_weights)


def best_of(hours: float, flops: float) -> sizing.Size:
    timed = sizing.sizes(CONFIG, hours, speed_of_a_peak(flops))
    return [size for size in timed if size.is_read_enough][-1]


def test_more_hours_or_a_faster_machine_get_a_larger_model_and_more_tokens() -> None:
    short, long, fast = best_of(0.5, 1e13), best_of(50, 1e13), best_of(0.5, 1e15)
    assert short.depth < long.depth
    assert short.tokens < long.tokens
    assert (fast.depth, fast.tokens) == (long.depth, long.tokens)  # as much work


def test_the_sizes_end_where_the_hours_do_not_suffice_and_where_memory_ends() -> None:
    found = [s.is_read_enough for s in sizing.sizes(CONFIG, 1.0, speed_of_a_peak(1e13))]
    assert found == [True] * (len(found) - 1) + [False]
    assert len(found) > 2
    fast = speed_of_a_peak(1e18)
    limited = list(
        sizing.sizes(CONFIG, 1.0, lambda c: fast(c) if c.model.n_weights < 2e7 else None)
    )
    assert limited
    assert all(s.n_weights < 2e7 for s in limited)


def test_a_machine_too_small_for_the_smallest_size_is_told_so(monkeypatch) -> None:
    monkeypatch.setattr(sizing, "tokens_per_second", lambda *args: None)
    with pytest.raises(UserError, match="too little memory"):
        sizing.choose(CONFIG, 1.0, torch.device("cpu"))


def test_what_is_chosen_trains_for_the_tokens_that_the_hours_give(monkeypatch) -> None:
    speed = speed_of_a_peak(1e13)
    monkeypatch.setattr(sizing, "tokens_per_second", lambda config, hours, device: speed(config))
    config, timed = sizing.choose(CONFIG, 2.0, torch.device("cpu"))
    assert isinstance(config, Config)
    loop = settled(config).pretrain
    expected = speed(config) * 2 * 3600
    assert loop.steps * loop.tokens_per_step == pytest.approx(expected, rel=0.02)
    assert [s.tokens for s in timed if s.is_read_enough][-1] == config.pretrain.tokens


def test_a_small_model_is_timed(monkeypatch) -> None:
    monkeypatch.setattr(sizing, "SECONDS", 0.0)
    tiny = replace(PRESETS["demo"], pretrain=replace(PRESETS["demo"].pretrain, lr=None, steps=None))
    assert sizing.tokens_per_second(tiny, 0.01, torch.device("cpu")) > 0

"""Held-out figures: what the loss costs, what the HRM head adds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_model import awake, one_segment, random_ids

from config import ModelConfig
from hearth.training.held_out import probe_head
from model import build_model


def test_probed_losses_are_those_of_that_many_cycles(tiny: ModelConfig) -> None:
    model = awake(replace(tiny, hrm=replace(tiny.hrm, h_cycles=3)))
    ids, attn_ctx, weights = random_ids(33, tiny), one_segment(32), torch.ones(32)
    weights[:5] = 0
    figures = probe_head(model, ids[:-1], ids[1:], weights, attn_ctx)
    with torch.no_grad():
        for cycles in (1, 2, 3):
            loss = model.loss(model(ids[:-1], attn_ctx, h_cycles=cycles), ids[1:], weights) / 27
            assert figures[f"loss cycle {cycles}"] == pytest.approx(float(loss), rel=1e-5)
        trunk = model.loss(model.run_trunk(ids[:-1], attn_ctx), ids[1:], weights) / 27
        now, then = (
            model.logits(model(ids[:-1], attn_ctx, h_cycles=c)[5:]).log_softmax(-1) for c in (3, 2)
        )
    assert figures["loss cycle 0"] == pytest.approx(float(trunk), rel=1e-5)
    change = torch.nn.functional.kl_div(then, now, log_target=True, reduction="batchmean")
    assert figures["head last change"] == pytest.approx(float(change), rel=1e-3)
    assert 0 < figures["head time share"] < 1
    assert not model.head.slow.blocks[-1]._forward_hooks


def test_probed_sizes_grow_with_what_a_module_writes(tiny: ModelConfig) -> None:
    model, ids = awake(tiny), random_ids(33, tiny)

    def sizes() -> tuple[float, float]:
        figures = probe_head(model, ids[:-1], ids[1:], torch.ones(32), one_segment(32))
        return figures["head L size"], figures["head H size"]

    before = sizes()
    with torch.no_grad():
        model.head.slow.blocks[-1].down *= 30
    after = sizes()
    assert after[1] > 2 * before[1]
    assert after[0] < 1.5 * before[0]


def test_a_dense_model_has_nothing_to_probe(tiny: ModelConfig) -> None:
    ids = random_ids(33, tiny)
    assert (
        probe_head(
            build_model(replace(tiny, hrm=None), seed=0), ids[:-1], ids[1:], torch.ones(32), None
        )
        == {}
    )

"""One step's gradient: accumulation, deep supervision, how far the head's gradient reaches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from config import HRMConfig, ModelConfig
from hearth.training.batches import Batch
from hearth.training.gradients import HeadPlan, accumulate, head_schedule
from model import Model, PackedSequences, build_model


def awake(config: ModelConfig) -> Model:
    model = build_model(config, seed=0)
    model.dtype = torch.float32
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=rng)
    return model


def random_batch(step: int = 0, n: int = 128, row_length: int = 32, vocab: int = 128) -> Batch:
    rng = torch.Generator().manual_seed(step)
    ids = torch.randint(0, vocab, (n + 1,), generator=rng) // (1 + step % 2)
    starts = torch.rand(n, generator=rng) < 0.1
    weights = (torch.rand(n, generator=rng) < 0.7).float()
    return Batch(ids[:-1], ids[1:], weights, starts, row_length)


def gradients_of(model: Model, micro_tokens: int) -> list[torch.Tensor]:
    model.zero_grad()
    accumulate(model, random_batch(), micro_tokens)
    return [p.grad.clone() for p in model.parameters()]


def test_accumulated_gradient_equals_the_whole_batchs(tiny: ModelConfig) -> None:
    model = awake(tiny)
    torch.testing.assert_close(
        gradients_of(model, 32), gradients_of(model, 128), atol=1e-6, rtol=1e-4
    )


def test_micro_batches_without_loss_do_no_harm(tiny: ModelConfig) -> None:
    model, batch = awake(tiny), random_batch()
    batch.weights[32:] = 0
    loss = accumulate(model, batch, 32)
    assert math.isfinite(loss)
    batch.weights[:] = 0
    assert accumulate(model, batch, 32) == 0.0


def supervised(config: ModelConfig, **hrm: int) -> Model:
    return awake(replace(config, hrm=replace(config.hrm, deep_supervision=True, **hrm)))


@pytest.mark.parametrize("h_cycles", [1, 3])
def test_bounded_deep_supervision_equals_one_joint_graph(tiny: ModelConfig, h_cycles: int) -> None:
    """The bounded form calls backward cycle by cycle; the reference builds the same losses in one
    graph.
    """
    model, batch = supervised(tiny, h_cycles=h_cycles), random_batch()
    got = gradients_of(model, 128)
    model.zero_grad()
    packed = PackedSequences(batch.starts, batch.row_length)
    x = model.run_trunk(batch.ids, packed)
    weights = batch.weights / batch.weights.sum()
    cycles = model.head.cycles(x, packed, detach=h_cycles > 1)  # one cycle has nothing to cut
    losses = [model.loss(y, batch.targets, weights) for y in cycles]
    (sum(losses) / len(losses)).backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()], atol=1e-6, rtol=1e-4)


def test_sampled_deep_supervision_is_unbiased(tiny: ModelConfig) -> None:
    """Over all offsets, the sample's gradient is on average the gradient of every token."""
    whole, batch = supervised(tiny, h_cycles=3), random_batch()
    want = gradients_of(whole, 128)
    model = supervised(tiny, h_cycles=3, supervise_every=4)
    for offset in range(4):
        accumulate(model, batch, 128, HeadPlan(offset=offset))
    got = [p.grad / 4 for p in model.parameters()]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    one = supervised(tiny, h_cycles=3, supervise_every=4)
    accumulate(one, batch, 128)
    assert not torch.allclose(one.head.out.grad, whole.head.out.grad, atol=1e-5)


def test_the_sample_is_the_same_in_any_micro_batch(tiny: ModelConfig) -> None:
    model = supervised(tiny, supervise_every=3)
    torch.testing.assert_close(
        gradients_of(model, 32), gradients_of(model, 128), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("activation_checkpointing", ["head", "all"])
def test_recomputed_deep_supervision_gives_the_same_gradients(
    tiny: ModelConfig, activation_checkpointing: str
) -> None:
    model = supervised(tiny, supervise_every=2)
    want = gradients_of(model, 128)
    model.activation_checkpointing = activation_checkpointing
    torch.testing.assert_close(gradients_of(model, 128), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "hrm", [{}, {"deep_supervision": True}, {"gradient": "one_step"}, {"gradient": "truncated"}]
)
def test_every_layer_of_every_module_learns_in_every_mode(
    tiny: ModelConfig, hrm: dict[str, Any]
) -> None:
    config = replace(tiny, hrm=replace(tiny.hrm, l_layer=2, **hrm))
    model, batch = awake(config), random_batch()
    accumulate(model, batch, 128, head_schedule(config.hrm, 0, 9, 10))
    # a short horizon leaves the early calls' own vectors without gradient
    early = model.head.call_embedding.grad
    assert early[-1, -2:].any(dim=-1).all()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == (["head.fast_start"] if hrm.get("gradient") else [])


def test_head_schedule_follows_the_gradient_mode() -> None:
    assert head_schedule(None, 0, 0, 10) == HeadPlan(None, None)
    assert head_schedule(HRMConfig(h_cycles=3), 0, 0, 10) == HeadPlan(3, None)
    assert head_schedule(HRMConfig(h_cycles=2, gradient="one_step"), 0, 0, 10) == HeadPlan(2, 2)
    growing = HRMConfig(h_cycles=2, l_cycles=3, gradient="truncated", horizon=5, horizon_warmup=0.5)
    horizons = [head_schedule(growing, 0, step, 100).horizon for step in range(100)]
    assert horizons[0] == 2
    assert horizons[50:] == [5] * 50
    assert horizons == sorted(horizons)


def test_what_a_step_draws_for_the_head_depends_on_the_step_alone() -> None:
    hrm = HRMConfig(random_cycles=4, deep_supervision=True, supervise_every=3)
    plans = [head_schedule(hrm, 0, step, 100) for step in range(100)]
    assert {plan.h_cycles for plan in plans} == {1, 2, 3, 4}
    assert {plan.offset for plan in plans} == {0, 1, 2}
    assert plans == [head_schedule(hrm, 0, step, 100) for step in range(100)]
    assert plans != [head_schedule(hrm, 1, step, 100) for step in range(100)]

"""One step's gradient: accumulation, deep supervision, how far the head's gradient reaches."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from batches import Batch
from config import HRMConfig, ModelConfig
from gradients import accumulate, head_schedule
from model import Model, Packed, build_model


def awake(config: ModelConfig) -> Model:
    model = build_model(config, seed=0)
    model.dtype = torch.float32
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=dice)
    return model


def random_batch(step: int = 0, n: int = 128, row_length: int = 32, vocab: int = 128) -> Batch:
    dice = torch.Generator().manual_seed(step)
    ids = torch.randint(0, vocab, (n + 1,), generator=dice) // (1 + step % 2)
    starts = torch.rand(n, generator=dice) < 0.1
    weights = (torch.rand(n, generator=dice) < 0.7).float()
    return Batch(ids[:-1], ids[1:], weights, starts, row_length)


def gradients_of(model: Model, micro_tokens: int) -> list[torch.Tensor]:
    model.zero_grad()
    accumulate(model, random_batch(), micro_tokens, None, None)
    return [p.grad.clone() for p in model.parameters()]


def test_accumulated_gradient_equals_the_whole_batchs(tiny: ModelConfig) -> None:
    model = awake(tiny)
    torch.testing.assert_close(gradients_of(model, 32), gradients_of(model, 128), atol=1e-6, rtol=1e-4)


def test_micro_batches_without_loss_do_no_harm(tiny: ModelConfig) -> None:
    model, batch = awake(tiny), random_batch()
    batch.weights[32:] = 0
    loss = accumulate(model, batch, 32, None, None)
    assert math.isfinite(loss)
    batch.weights[:] = 0
    assert accumulate(model, batch, 32, None, None) == 0.0


def test_bounded_deep_supervision_equals_the_joint_graph_of_one_cycle(tiny: ModelConfig) -> None:
    """The bounded form detaches states between cycles; the reference builds the same losses in one graph."""
    config = replace(tiny, hrm=replace(tiny.hrm, deep_supervision=True))
    model, batch = awake(config), random_batch()
    got = gradients_of(model, 128)
    model.zero_grad()
    packed = Packed(batch.starts, batch.row_length)
    x = model.run_trunk(batch.ids, packed)
    weights = batch.weights / batch.weights.sum()
    losses = [model.loss(y, batch.targets, weights) for y in model.head.cycles(x, packed, detach=True)]
    (sum(losses) / len(losses)).backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()], atol=1e-6, rtol=1e-4)


def test_head_schedule_follows_the_gradient_mode() -> None:
    assert head_schedule(None, 0, 0, 10) == (None, None)
    assert head_schedule(HRMConfig(h_cycles=3), 0, 0, 10) == (3, None)
    assert head_schedule(HRMConfig(gradient="one_step"), 0, 0, 10) == (2, 2)
    growing = HRMConfig(gradient="truncated", horizon=5, horizon_warmup=0.5)
    horizons = [head_schedule(growing, 0, step, 100)[1] for step in range(100)]
    assert horizons[0] == 2
    assert horizons[50:] == [5] * 50
    assert horizons == sorted(horizons)
    drawn = [head_schedule(HRMConfig(random_cycles=4), 0, step, 100)[0] for step in range(100)]
    assert set(drawn) == {1, 2, 3, 4}
    assert drawn == [head_schedule(HRMConfig(random_cycles=4), 0, step, 100)[0] for step in range(100)]

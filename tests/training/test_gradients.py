"""One step's gradient: accumulation, deep supervision."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from config import ModelConfig
from hearth.training.batches import Batch
from hearth.training.gradients import accumulate
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
    cycles = model.run_head(
        x, batch.ids, packed, detach=h_cycles > 1
    )  # one cycle has nothing to cut
    losses = [model.loss(y, batch.targets, weights) for y in cycles]
    (sum(losses) / len(losses)).backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("recomputed", [1, 2, 3, 5])
def test_recomputed_deep_supervision_gives_the_same_gradients(
    tiny: ModelConfig, recomputed: int
) -> None:
    model = supervised(tiny)
    want = gradients_of(model, 128)
    model.recomputed_blocks = recomputed
    torch.testing.assert_close(gradients_of(model, 128), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_every_layer_of_every_module_learns(tiny: ModelConfig, deep_supervision: bool) -> None:
    hrm = replace(tiny.hrm, l_layer=2, deep_supervision=deep_supervision)
    model = awake(replace(tiny, hrm=hrm))
    accumulate(model, random_batch(), 128)
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []

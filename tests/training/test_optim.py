"""Update rules and the schedule."""

from __future__ import annotations

import math
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import LoopConfig, ModelConfig, OptimConfig
from hearth.training import optim
from hearth.training.optim import (
    AdamW,
    Muon,
    RowAdagrad,
    build_optimizers,
    learning_rate_factor,
    normalize_rows,
    orthogonalise,
)
from model import PackedSequences, build_model


class RunsOut(TorchDispatchMode):
    """Inside, the operation of this number that takes memory finds none."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not name.endswith("_") and name not in FREE_OF_COST:
            self.left -= 1
            if self.left < 0:
                self.left = math.inf
                raise torch.OutOfMemoryError("injected")
        return function(*args, **(kwargs or {}))


# views, and what only asks
FREE_OF_COST = {
    *("select", "slice", "unbind", "view", "transpose", "t", "expand", "unsqueeze", "detach"),
    *("_record_function_enter_new", "_record_function_exit"),
    *("_local_scalar_dense", "alias", "as_strided", "_unsafe_view", "diagonal"),
}


def test_our_adamw_is_that_of_torch() -> None:
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=rng)
    gradients = torch.randn(4, 5, 3, generator=rng)
    found = []
    for rule in (AdamW, torch.optim.AdamW):
        weight = torch.nn.Parameter(start.clone())
        optimizer = rule([weight], lr=0.1, betas=(0.8, 0.95), weight_decay=0.1, fused=True)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
            optimizer.zero_grad()
            assert weight.grad is None
        found.append((weight.detach(), optimizer.state_dict()["state"][0]["exp_avg_sq"]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


TRAINS = """
import sys, torch
from config import ModelConfig, OptimConfig
from hearth.training.optim import build_optimizers
from hearth.training import loop
from model import build_model
shape = ModelConfig(vocab_size=64, n_layer=2, d_model=32, n_head=2, n_kv_head=1)
model = build_model(shape, seed=0)
optimizers = build_optimizers(model, OptimConfig(), 0.1)
for p in model.parameters():
    p.grad = torch.ones_like(p)
optimizers.step()
optimizers.zero_grad()
optimizers.load_state_dict(optimizers.state_dict())
print(*sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
"""


def test_training_without_a_compiler_does_not_import_one() -> None:
    """It takes seconds, as often as a stage starts."""
    made = subprocess.run(
        [sys.executable, "-c", TRAINS], capture_output=True, text=True, check=True
    )
    assert made.stdout.split() == []


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_step_that_memory_ran_out_in_ends_as_one_that_had_it(
    name: str, tiny: ModelConfig
) -> None:
    """Wherever it runs out, in the first step, which makes the state, and in a later one."""
    rng, tiny = torch.Generator().manual_seed(0), replace(tiny, n_layer=1, hrm=None)
    model = build_model(tiny, seed=0)
    gradients = [[torch.randn(p.shape, generator=rng) for p in model.parameters()] for _ in "ab"]

    def trained(at: int | None) -> tuple[list[torch.Tensor], int]:
        model = build_model(tiny, seed=0)
        optimizers, broke = build_optimizers(model, OptimConfig(name=name), 0.01), 0
        for gradient in gradients:
            for p, g in zip(model.parameters(), gradient, strict=True):
                p.grad = g.clone()
            if at is None:
                optimizers.step()
                continue
            try:
                with RunsOut(at):
                    optimizers.step()
            except torch.OutOfMemoryError:
                broke += 1
                optimizers.step()
        return [p.detach().clone() for p in model.parameters()], broke

    wanted, _ = trained(None)
    at, n_broken = 0, 2
    while n_broken:
        found, n_broken = trained(at)
        assert all(map(torch.equal, found, wanted)), at
        at += 3
    assert at > 10


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 32, 32)])
def test_orthogonalised_singular_values_are_near_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_orthogonalising_together_equals_one_by_one() -> None:
    x = torch.randn(3, 8, 12)
    torch.testing.assert_close(
        orthogonalise(x), torch.stack([orthogonalise(m[None])[0] for m in x])
    )


def test_orthogonalising_keeps_the_singular_vectors() -> None:
    x = torch.randn(1, 12, 20)
    u, _, v = torch.linalg.svd(x[0], full_matrices=False)
    inner = u.T @ orthogonalise(x)[0] @ v.T
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-2, rtol=0)


@pytest.mark.parametrize("shape", [(2, 24, 80), (2, 80, 24)])
def test_the_way_through_the_gram_matrix_equals_the_steps_written_out(
    shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    u, _, v = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False
    )
    x = (u * torch.logspace(0, -5, 24)) @ v  # singular values far below what five steps can lift
    short = orthogonalise(x)
    monkeypatch.setattr(optim, "WIDE", math.inf)
    torch.testing.assert_close(short, orthogonalise(x), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(2, 6, 10), (2, 10, 6)])
def test_updates_are_evened_out_over_the_longer_side_and_keep_their_size(
    shape: tuple[int, int, int],
) -> None:
    direction = torch.randn(shape)
    direction[:, 0, :], direction[:, :, 0] = 3 * direction[:, 0, :], 3 * direction[:, :, 0]
    state: dict = {}
    for _ in range(60):
        even = normalize_rows(direction, state)
    sizes = even.norm(dim=2 if shape[1] >= shape[2] else 1)
    assert (sizes.amax(dim=1) / sizes.amin(dim=1)).max() < 1.05
    torch.testing.assert_close(even.norm(dim=(1, 2)), torch.full((2,), math.sqrt(6)))
    # a gradient of nothing moves nothing
    assert torch.equal(normalize_rows(torch.zeros(shape), {}), torch.zeros(shape))


def test_weights_decay_only_where_the_update_shrinks_them() -> None:
    weight = torch.nn.Parameter(torch.ones(16, 16))
    muon = Muon([weight], lr=0.1, momentum=0.0, weight_decay=0.5)
    weight.grad = torch.randn(16, 16)
    before = weight.detach().clone()
    muon.step()
    update = (normalize_rows(orthogonalise(weight.grad[None]), {}) * 0.1 * 0.2 * 4)[0]
    decayed = before * torch.where(update > 0, 1 - 0.1 * 0.5, 1.0) - update
    torch.testing.assert_close(weight.detach(), decayed)


def step_of(model, optimizers) -> float:
    ids = torch.arange(33) % model.config.vocab_size
    loss = model.loss(
        model(ids[:-1], PackedSequences(torch.arange(32) == 0, 32)),
        ids[1:],
        torch.full((32,), 1 / 32),
    )
    loss.backward()
    optimizers.step()
    optimizers.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("name", ["muon", "adamw", "schedulefree"])
def test_every_rule_learns_and_resumes_exactly(name: str, tiny: ModelConfig) -> None:
    config = OptimConfig(name=name)
    model = build_model(tiny, seed=0)
    optimizers = build_optimizers(model, config, 3e-3)
    losses = [step_of(model, optimizers) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.3
    twin = build_model(tiny, seed=1)
    twin.load_state_dict(model.state_dict())
    twins_optimizers = build_optimizers(twin, config, 3e-3)
    twins_optimizers.load_state_dict(deepcopy(optimizers.state_dict()))
    for _ in range(3):
        assert step_of(model, optimizers) == step_of(twin, twins_optimizers)


def test_weights_for_use_leave_the_trained_ones_untouched(tiny: ModelConfig) -> None:
    model = build_model(tiny, seed=0)
    optimizers = build_optimizers(model, OptimConfig(name="schedulefree"), 3e-3)
    for _ in range(4):
        step_of(model, optimizers)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizers.inference_weights():
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_schedule_free_rule_warms_up_once_and_keeps_its_rate(tiny: ModelConfig) -> None:
    """arXiv 2405.15682: no decay, averaging takes its place."""
    model = build_model(tiny, seed=0)
    optimizers = build_optimizers(model, OptimConfig(name="schedulefree"), 3e-3)
    loop = LoopConfig(warmup_share=0.25, decay_share=0.6)
    rates = []
    for step in range(20):
        factor = optimizers.schedule(step, 20, loop)
        step_of(model, optimizers)
        rates.append(optimizers.parts[0].param_groups[0]["scheduled_lr"])
        assert rates[-1] == pytest.approx(3e-3 * factor)
    assert rates == pytest.approx([3e-3 * min(1.0, (step + 1) / 5) for step in range(20)])


def test_muon_takes_matrices_adagrad_bigrams_and_adamw_the_rest(tiny: ModelConfig) -> None:
    model = build_model(tiny, seed=0)
    muon, _, adagrad = parts = build_optimizers(model, OptimConfig(), 1e-3).parts
    count = [sum(p.numel() for g in part.param_groups for p in g["params"]) for part in parts]
    assert sum(count) == model.n_parameters()
    assert [p is model.bigrams for g in adagrad.param_groups for p in g["params"]] == [True]
    assert all(
        p.ndim == 2 and p is not model.embedding for g in muon.param_groups for p in g["params"]
    )


def test_each_group_has_its_own_multiple_of_the_rate(tiny: ModelConfig) -> None:
    model = build_model(tiny, seed=0)
    ratios = {"embedding_lr_ratio": 2.0, "value_lr_ratio": 3.0, "vector_lr_ratio": 5.0}
    optim = OptimConfig(bigram_lr_ratio=7.0, **ratios)
    groups = [g for part in build_optimizers(model, optim, 1e-3).parts for g in part.param_groups]
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    wanted = {"embedding": 2, "value_embeddings": 3, "bigrams": 7, "q": 1, "up": 1}
    vectors = ("shift", "value_gates", "output_gain", "out", "gains", "qk_gain", "exclusion")
    wanted |= dict.fromkeys(vectors, 5)
    for name, p in model.named_parameters():
        for kind in wanted.keys() & {name.split(".")[0], name.split(".")[-1]}:
            assert rates[id(p)] == pytest.approx(1e-3 * wanted[kind]), name


def test_a_rows_updates_shrink_with_its_own_count_alone() -> None:
    torch.manual_seed(0)
    table = torch.zeros(6, 8, requires_grad=True)
    adagrad = RowAdagrad([table], lr=0.5)
    seen, direction = [0] * 6, torch.randn(8)
    direction /= direction.square().mean().sqrt()
    for looked_up in ([0, 3], [3], [0, 3, 5]):
        before = table.detach().clone()
        table.grad = torch.zeros(6, 8)
        for row in looked_up:
            seen[row] += 1
            table.grad[row] = 1e-6 * direction  # however small a gradient is
        adagrad.step()
        for row in range(6):
            size = 0.5 / math.sqrt(seen[row]) if row in looked_up else 0.0
            expected = before[row] - size * direction
            torch.testing.assert_close(table.detach()[row], expected, msg=str((row, looked_up)))


def test_schedule_climbs_holds_and_falls_to_the_floor() -> None:
    loop = replace(LoopConfig(), warmup_share=0.1, decay_share=0.5, final_lr_ratio=0.1)
    factors = [learning_rate_factor(step, 100, loop) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:51] == [1.0] * 42
    assert all(a > b for a, b in pairwise(factors[51:]))
    assert learning_rate_factor(100, 100, loop) == pytest.approx(0.1)


def test_momentum_in_bfloat16_steps_nearly_alike_and_comes_back_bit_for_bit(
    tiny: ModelConfig,
) -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        model, rng = build_model(tiny, seed=0), torch.Generator().manual_seed(0)
        config = OptimConfig(momentum_dtype=dtype)
        optimizers = build_optimizers(model, config, 0.01)
        for step in range(6):
            if step == 3:  # as after a restart
                state = deepcopy(optimizers.state_dict())
                optimizers = build_optimizers(model, config, 0.01)
                optimizers.load_state_dict(state)
                loaded = optimizers.parts[0].state.values()
                assert {str(s["momentum_buffer"].dtype) for s in loaded} == {f"torch.{dtype}"}
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=rng)
            optimizers.step()
            found[dtype, step] = [p.detach().clone() for p in model.parameters()]
        found[dtype] = optimizers.parts[0].state.values()
        if dtype == "bfloat16":
            assert {s["momentum_buffer"].dtype for s in found[dtype]} == {torch.bfloat16}
    moved = [b - a for a, b in zip(found["float32", 0], found["float32", 5], strict=True)]
    for a, b, far in zip(found["float32", 5], found["bfloat16", 5], moved, strict=True):
        assert (a - b).norm() < 0.05 * far.norm()


def test_large_groups_of_equal_matrices_are_updated_in_parts(monkeypatch) -> None:
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 12, generator=rng) for _ in range(5)]
    gradients = [torch.randn(8, 12, generator=rng) for _ in range(5)]
    found = []
    for at_once in (10**9, 2 * 96, 1):
        monkeypatch.setattr(optim, "ELEMENTS_AT_ONCE", at_once)
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        muon = Muon(params, lr=0.1, momentum=0.9, weight_decay=0.1)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        muon.step()
        found.append(([len(g["params"]) for g in muon.param_groups], params))
    assert [sizes for sizes, _ in found] == [[5], [2, 2, 1], [1] * 5]
    for _, params in found[1:]:
        torch.testing.assert_close(params, found[0][1], atol=1e-6, rtol=1e-5)

"""The network's invariants: what it may see, what it starts as, what learns."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from config import PRESETS, ModelConfig
from hearth.decoding.kv_cache import KVCache, Thought, decode_early_exit
from model import (
    ChunkedCrossEntropy,
    Model,
    PackedSequences,
    RMSNorm,
    SquaredReLU,
    attend_in_blocks,
    build_model,
    initialise,
    normed_and_rotated,
    rms_norm,
    rotary_table,
    rotate,
    squared_relu,
)


def awake(config: ModelConfig, seed: int = 0) -> Model:
    """A model whose zero-initialised projections have been given values, so that nothing is hidden
    behind zeros.
    """
    model = build_model(config, seed=seed)
    model.dtype = torch.float32
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=rng)
    return model


def one_segment(n: int) -> PackedSequences:
    return PackedSequences(torch.arange(n) == 0, n)


def random_ids(n: int, config: ModelConfig, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", ["16gb", "demo"])
def test_initial_loss_is_ln_vocab(preset: str) -> None:
    config = replace(PRESETS[preset].model, n_layer=2)
    model = build_model(config, seed=0)
    ids = random_ids(513, config)
    with torch.no_grad():
        hidden = model(ids[:-1], one_segment(512))
        loss = float(model.loss(hidden, ids[1:], torch.full((512,), 1 / 512)))
    assert abs(loss - math.log(config.vocab_size)) < 0.03 * math.log(config.vocab_size)


def test_future_tokens_change_no_earlier_logits_at_any_cycle(tiny: ModelConfig) -> None:
    model = awake(tiny)
    ids = random_ids(24, tiny)
    changed = ids.clone()
    changed[15:] = random_ids(9, tiny, seed=9)
    states = ([*model.cycles(x, one_segment(24), h_cycles=4)] for x in (ids, changed))
    for a, b in zip(*states, strict=True):  # the trunk, then every cycle
        assert torch.equal(a[:15], b[:15])
        assert not torch.allclose(a[15:], b[15:])


def test_more_cycles_begin_with_fewer(tiny: ModelConfig) -> None:
    model, ids = awake(tiny), random_ids(24, tiny)
    states = [*model.cycles(ids, one_segment(24), h_cycles=4)]
    assert len(states) == 5
    for cycles in (1, 2, 4):
        assert torch.equal(states[cycles], model(ids, one_segment(24), h_cycles=cycles))


def test_a_head_without_a_fast_module_loops_one_and_learns(tiny: ModelConfig) -> None:
    model = awake(replace(tiny, hrm=replace(tiny.hrm, l_cycles=0, h_cycles=3)))
    assert len(model.block_passes()) == 3 + 3 * 2
    ids = random_ids(33, tiny)
    model.loss(model(ids[:-1], one_segment(32)), ids[1:], torch.ones(32)).backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


def test_other_documents_in_the_pack_change_nothing(tiny: ModelConfig) -> None:
    model = awake(tiny)
    ids, starts = random_ids(32, tiny), torch.zeros(32, dtype=torch.bool)
    starts[[5, 19]] = True
    packed = model(
        ids, PackedSequences(starts, 16)
    )  # rows end at 16: segments 0-4, 5-15, 16-18, 19-31
    for first, end in ((0, 5), (5, 16), (16, 19), (19, 32)):
        alone = model(ids[first:end], one_segment(end - first))
        torch.testing.assert_close(packed[first:end], alone, atol=1e-5, rtol=1e-5)


def random_heads(n: int, seed: int = 0, **kind) -> list[torch.Tensor]:
    """q (N, 4, E), k and v (N, 2, E)."""
    rng = torch.Generator().manual_seed(seed)
    heads = [torch.randn(n, h, 8 * 4, generator=rng, dtype=torch.float32) for h in (4, 2, 2)]
    return [x.to(**kind).requires_grad_() for x in heads]


def slow_attention(q, k, v, packed: PackedSequences, window: int | None) -> torch.Tensor:
    """A query at a time: softmax over its own segment's keys so far, no further back than the
    window.
    """
    row = packed.row_length
    out = []
    for t in range(len(q)):
        first = t - t % row + int(packed.first.flatten()[t])
        first = first if window is None else max(first, t - window + 1)
        key, value = (x[first : t + 1].repeat_interleave(2, dim=1) for x in (k, v))  # (keys, 4, E)
        share = (torch.einsum("he,khe->hk", q[t], key) / q.shape[2] ** 0.5).softmax(dim=1)
        out.append(torch.einsum("hk,khe->he", share, value))
    return torch.stack(out)


@pytest.mark.parametrize("window", [None, 1, 6, 40, 130, 1000])
def test_attention_in_blocks_equals_attention_a_query_at_a_time(window: int | None) -> None:
    """Over the edges of blocks, windows, documents and rows; forward and backward."""
    starts = torch.zeros(600, dtype=torch.bool)
    starts[[3, 130, 131, 290, 450]] = True
    packed, heads = PackedSequences(starts, 300), random_heads(600)
    fast, slow = (f(*heads, packed, window) for f in (attend_in_blocks, slow_attention))
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    weights = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        *(torch.autograd.grad((y * weights).sum(), heads) for y in (fast, slow)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_token_before_is_mixed_in_within_its_document_alone(tiny: ModelConfig) -> None:
    model = build_model(replace(tiny, n_layer=1, hrm=None, bigram_rows=0), seed=0)
    model.dtype = torch.float32
    with torch.no_grad():
        model.shift.copy_(torch.linspace(-1, 1, tiny.d_model))
    ids, starts = random_ids(12, tiny), torch.zeros(12, dtype=torch.bool)
    starts[5] = True
    attn_ctx = PackedSequences(starts, 6)  # segments [0 … 4] [5] [6 … 11]
    rows = rms_norm(model.embedding[ids])
    for at in range(12):
        before = torch.zeros_like(rows[0]) if at in (0, 5, 6) else rows[at - 1]
        assert torch.allclose(
            model.embed(ids, attn_ctx)[at], rows[at] + model.shift * before, atol=1e-6
        ), at


def test_a_pair_of_tokens_has_a_row_and_the_first_of_a_document_one_of_its_own(
    tiny: ModelConfig,
) -> None:
    model = awake(replace(tiny, bigram_rows=4999))
    ids, starts = torch.tensor([7, 9, 7, 9, 7, 9, 9]), torch.zeros(7, dtype=torch.bool)
    starts[5] = True
    row = model.bigram_row(ids, PackedSequences(starts, 7)).tolist()
    assert row[1:3] == row[3:5]  # 7 9 and 9 7
    # 7 and 9 at a start, 7 9, 9 7, 9 9: the start of a document does not see the one before
    assert len({row[0], row[5], row[1], row[2], row[6]}) == 5
    ids = random_ids(3000, tiny)
    rows = model.bigram_row(ids, one_segment(3000))
    pairs = torch.stack([ids[:-1], ids[1:]]).unique(dim=1).shape[1]
    assert len(rows.unique()) > 0.6 * min(pairs, 4999)  # spread as if at random, or better


def test_tokens_beyond_the_window_change_nothing(tiny: ModelConfig) -> None:
    config = replace(tiny, n_layer=1, hrm=None, context=24, token_shift=False)
    model = Model(config)
    model.trunk[0].window = 4
    initialise(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    ids = random_ids(24, config)
    changed = ids.clone()
    changed[10] = (ids[10] + 1) % config.vocab_size
    differs = (model(ids, one_segment(24)) != model(changed, one_segment(24))).any(dim=1)
    assert differs.nonzero().flatten().tolist() == [10, 11, 12, 13]


def test_curriculum_row_is_the_same_as_a_shorter_sequence(tiny: ModelConfig) -> None:
    model = awake(tiny)
    ids = random_ids(32, tiny)
    none = torch.zeros(32, dtype=torch.bool)
    torch.testing.assert_close(
        model(ids, PackedSequences(none, 8))[8:16],
        model(ids[8:16], one_segment(8)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_rotation_depends_on_distance_alone() -> None:
    q, k = torch.randn(1, 2, 8), torch.randn(1, 2, 8)

    def score(a: int, b: int) -> torch.Tensor:
        tables = (rotary_table(torch.tensor([p]), 8, 10_000.0, torch.float32) for p in (a, b))
        return (rotate(q, next(tables)) * rotate(k, next(tables))).sum()

    torch.testing.assert_close(score(7, 3), score(1004, 1000), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(score(7, 3), score(7, 4))


def test_derivatives_written_by_hand_are_those_of_what_they_stand_for() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 8, generator=rng)
    rotary = rotary_table(torch.arange(6), 8, 10_000.0, torch.float32)
    for by_hand, written in (
        (rms_norm, lambda x: F.rms_norm(x, (8,), eps=1e-6)),
        (
            lambda x: normed_and_rotated(x, rotary),
            lambda x: rotate(F.rms_norm(x, (8,), eps=1e-6), rotary),
        ),
        (squared_relu, lambda x: x.relu().square()),
    ):
        found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = by_hand(found), written(wanted)
        torch.testing.assert_close(y, z)
        weights = torch.randn(y.shape, generator=rng)
        (y * weights).sum().backward()
        (z * weights).sum().backward()
        torch.testing.assert_close(found.grad, wanted.grad)
    exact = x.double().requires_grad_()
    cos, sin = (torch.cat([a, a], dim=-1).double() for a in rotary)
    signs = torch.tensor([-1.0] * 4 + [1.0] * 4).double()
    assert torch.autograd.gradcheck(RMSNorm.apply, (exact,))
    assert torch.autograd.gradcheck(lambda x: RMSNorm.apply(x, cos, sin * signs), (exact,))
    assert torch.autograd.gradcheck(SquaredReLU.apply, (exact,))


@pytest.mark.parametrize("l_cycles", [0, 2])
def test_the_head_adds_its_state_times_a_gain_a_channel(tiny: ModelConfig, l_cycles: int) -> None:
    model = awake(replace(tiny, hrm=replace(tiny.hrm, h_cycles=1, l_cycles=l_cycles)))
    ids, attn_ctx = random_ids(16, tiny), one_segment(16)
    x = model.run_trunk(ids, attn_ctx)
    gains = torch.linspace(-1, 2, tiny.d_model)

    def added(out: torch.Tensor) -> torch.Tensor:
        model.head.out.data.copy_(out)
        (y,) = model.run_head(x, ids, attn_ctx)
        return y - rms_norm(x)

    state = added(torch.ones_like(gains))
    torch.testing.assert_close(state.square().mean(-1), torch.ones(16))
    torch.testing.assert_close(added(gains), gains * state)


def test_the_head_weighs_the_same_however_large_the_trunk_grows(tiny: ModelConfig) -> None:
    model, ids, attn_ctx = awake(tiny), random_ids(16, tiny), one_segment(16)
    x = model.run_trunk(ids, attn_ctx)
    small, large = (
        model.logits(list(model.run_head(scale * x, ids, attn_ctx))[-1]) for scale in (1, 100)
    )
    torch.testing.assert_close(small, large, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(small, model.logits(x), atol=1e-2)


def test_the_mlp_is_gated_or_of_squared_relu(tiny: ModelConfig) -> None:
    x = torch.randn(5, tiny.d_model, generator=torch.Generator().manual_seed(0))
    plain, gated = (
        build_model(replace(tiny, gated_mlp=gated), seed=0).trunk[0] for gated in (False, True)
    )
    for block in (plain, gated):
        torch.nn.init.normal_(block.down)
    torch.testing.assert_close(plain.mlp(x), (x @ plain.up.T).clamp(min=0) ** 2 @ plain.down.T)
    gate, up = x @ gated.gate.T, x @ gated.up.T
    torch.testing.assert_close(gated.mlp(x), (gate * gate.sigmoid() * up) @ gated.down.T)


def test_attention_loses_the_learnt_share_of_what_lies_along_the_own_value(
    tiny: ModelConfig,
) -> None:
    block = build_model(replace(tiny, exclusive_attention=True), seed=0).trunk[0]
    H, G, E = block.n_head, block.n_kv_head, block.head_dim
    y, v = torch.randn(5, H, E), torch.randn(5, G, E)
    torch.testing.assert_close(block.without_own(y, v), y)  # at the start
    with torch.no_grad():
        block.exclusion.copy_(torch.linspace(0, 1, H))
        for h in range(H):
            own = v[:, h // (H // G)]
            before = F.cosine_similarity(y[:, h], own) * y[:, h].norm(dim=-1)
            left = block.without_own(y, v)[:, h]
            after = F.cosine_similarity(left, own) * left.norm(dim=-1)
            torch.testing.assert_close(after, (1 - h / (H - 1)) * before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_every_parameter_receives_gradient(tiny: ModelConfig, gated: bool) -> None:
    tiny = replace(tiny, gated_mlp=gated)
    model = awake(tiny)
    ids = random_ids(33, tiny)
    model.loss(model(ids[:-1], one_segment(32)), ids[1:], torch.ones(32)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("recomputed", [1, 2, 3, 5])
def test_recomputed_activations_give_the_same_gradients(tiny: ModelConfig, recomputed: int) -> None:
    gradients = []
    for again in (0, recomputed):
        model = awake(tiny)
        model.recomputed_blocks = again
        ids = random_ids(33, tiny)
        model.loss(model(ids[:-1], one_segment(32)), ids[1:], torch.ones(32)).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_chunked_loss_equals_the_whole_and_its_gradients(tiny: ModelConfig, monkeypatch) -> None:
    monkeypatch.setattr("model.ROWS_PER_CHUNK", 7)
    hidden = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 40, (30,)), torch.rand(30)
    loss = 3 * ChunkedCrossEntropy.apply(hidden, embedding, targets, weights)
    got = torch.autograd.grad(loss, (hidden, embedding))
    nll = torch.nn.functional.cross_entropy(hidden @ embedding.T, targets, reduction="none")
    reference = 3 * (nll * weights).sum()
    torch.testing.assert_close(loss, reference, check_dtype=False, atol=1e-4, rtol=1e-5)
    for a, b in zip(got, torch.autograd.grad(reference, (hidden, embedding)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


class CountsProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_a_loss_without_gradients_multiplies_once(tiny: ModelConfig) -> None:
    model = awake(tiny)
    hidden, targets = torch.randn(16, tiny.d_model), random_ids(16, tiny)
    with torch.no_grad(), CountsProducts() as counted:
        quick = model.loss(hidden, targets, torch.ones(16))
    assert counted.n == 1
    with CountsProducts() as counted:
        assert torch.equal(model.loss(hidden, targets, torch.ones(16)), quick)
    assert counted.n == 3  # and the two gradients


@pytest.mark.slow
# torch looks at it itself while it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_blocks_give_the_same_loss_and_gradients(tiny: ModelConfig) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    model, ids, attn_ctx = awake(tiny), random_ids(24, tiny), one_segment(24)
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile_blocks()
        model.zero_grad()
        loss = model.loss(model(ids, attn_ctx), ids, torch.ones(24))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_flops_count_every_pass(tiny: ModelConfig) -> None:
    dense = Model(replace(tiny, hrm=None))
    n = (
        sum(p.numel() for block in dense.trunk for p in block.parameters())
        + dense.embedding.numel()
    )
    windows = [block.window for block in dense.trunk]
    assert windows == [6, None, None]  # the pattern SL over 3 blocks, the last one long
    seen = sum(sum(min(t + 1, w or 32) for t in range(32)) / 32 for w in windows)
    assert dense.flops_per_token(32) == pytest.approx(6 * n + 12 * 32 * seen)
    deep = Model(tiny)
    assert [block.window for block in deep.blocks] == [6, None] * 3  # trunk, L and H
    assert len(deep.block_passes()) == 3 + 2 * (2 * 1 + 2)
    supervised = Model(replace(tiny, hrm=replace(tiny.hrm, deep_supervision=True)))
    more = supervised.flops_per_token(32) - deep.flops_per_token(32)
    assert more == pytest.approx(6 * deep.embedding.numel())


# ----------------------------------------------------------------------------- leaving cycles early


LEAVES_SOMETIMES = 4e-4  # nats


def awake_settling(config: ModelConfig) -> Model:
    """A model whose cycles change the prediction by amounts that differ from token to token."""
    model = awake(replace(config, hrm=replace(config.hrm, h_cycles=4)), seed=3)
    model.head.out.data.mul_(0.4)  # cycles that change less: some rows settle early
    return model


def thoughts(
    model: Model, ids: torch.Tensor, exit_kl_threshold: float | None
) -> tuple[list[Thought], KVCache]:
    """A prompt of 9 columns in one pass, then the others one by one."""
    cache = KVCache(len(ids), model.config.context)
    parts = [ids[:, :9], *ids[:, 9:].split(1, dim=1)]
    return [
        decode_early_exit(model, part, cache, exit_kl_threshold=exit_kl_threshold) for part in parts
    ], cache


@pytest.mark.parametrize("exit_kl_threshold", [None, 0.0])
def test_thinking_without_leaving_equals_the_full_computation(
    tiny: ModelConfig, exit_kl_threshold: float | None
) -> None:
    model = awake_settling(tiny)
    ids = random_ids(48, tiny).view(2, 24)
    with torch.no_grad():
        states = [
            y.view(2, 24, -1)
            for y in model.cycles(
                ids.flatten(), PackedSequences(torch.zeros(48, dtype=torch.bool), 24)
            )
        ]
    found, _ = thoughts(model, ids, exit_kl_threshold)
    for column, thought in zip(range(8, 24), found, strict=True):
        assert thought.cycles.tolist() == [4, 4]
        expected = model.logits(states[4][:, column])
        torch.testing.assert_close(thought.logits, expected, atol=1e-4, rtol=1e-4)


def test_a_row_leaves_early_without_regard_to_its_neighbours(tiny: ModelConfig) -> None:
    # its rows settle at different times
    tiny = replace(tiny, gated_mlp=True, exclusive_attention=False)
    model = awake_settling(tiny)
    ids = random_ids(72, tiny).view(3, 24)
    found, together = thoughts(model, ids, LEAVES_SOMETIMES)
    left = torch.stack([thought.cycles for thought in found[1:]])
    assert (left == 4).any()
    assert (left < 4).any()
    assert (left.min(dim=1).values < left.max(dim=1).values).any()
    for row in range(3):
        alone, cache = thoughts(model, ids[row : row + 1], LEAVES_SOMETIMES)
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a.logits[row], b.logits[0], atol=1e-4, rtol=1e-4)
            assert a.cycles[row] == b.cycles[0]
        for (k, v), (one_k, one_v) in zip(together.slots, cache.slots, strict=True):
            written = slice(min(24, k.shape[2]))
            for x, y in ((k, one_k), (v, one_v)):
                torch.testing.assert_close(
                    x[row, :, written], y[0, :, written], atol=1e-4, rtol=1e-4
                )


def test_skipped_cycles_take_the_keys_of_the_last_one_that_ran(tiny: ModelConfig) -> None:
    model = awake_settling(tiny)
    ids = random_ids(24, tiny).view(1, 24)
    _, cache = thoughts(model, ids[:, :14], None)
    kept = [k.clone() for k, _ in cache.slots]
    thought = decode_early_exit(model, ids[:, 14:15], cache, exit_kl_threshold=math.inf)
    assert thought.cycles.tolist() == [1]
    n_trunk, n_calls = tiny.n_layer, len(model.head.block_passes(1))
    assert len(cache.slots) == n_trunk + 4 * n_calls
    for place in range(n_trunk + n_calls, len(cache.slots)):
        (k, v), (first_k, first_v) = (
            cache.slots[place],
            cache.slots[n_trunk + (place - n_trunk) % n_calls],
        )
        entry = 14 % k.shape[2]
        assert torch.equal(k[:, :, entry], first_k[:, :, entry])
        assert torch.equal(v[:, :, entry], first_v[:, :, entry])
        others = [i for i in range(min(14, k.shape[2])) if i != entry]
        assert torch.equal(k[:, :, others], kept[place][:, :, others])


def test_a_dense_model_thinks_no_cycles(tiny: ModelConfig) -> None:
    model = awake(replace(tiny, hrm=None))
    ids = random_ids(12, tiny).view(1, 12)
    found, _ = thoughts(model, ids, 0.1)
    assert [thought.cycles.tolist() for thought in found] == [[0]] * 4
    torch.testing.assert_close(
        found[-1].logits, model.logits(model(ids[0], one_segment(12))[-1:]), atol=1e-4, rtol=1e-4
    )

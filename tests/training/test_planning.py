"""Memory estimated against memory measured, and the choice of a micro-batch."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pretrain
from config import (
    PRESETS,
    HRMConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    UserError,
    settled,
)
from hearth import hardware
from hearth.training import attention, planning
from hearth.training.batches import Batch
from hearth.training.gradients import backward
from hearth.training.optim import Optimizers, build_optimizers
from hearth.training.planning import (
    Memory,
    Plan,
    Row,
    estimate_memory,
    in_words,
    make_plan,
    measure,
    more_of,
    share_recomputed,
    time_update,
)
from model import DOORS, Model, build_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import largest

DENSE = ModelConfig(
    vocab_size=512,
    n_layer=3,
    d_model=64,
    n_head=4,
    n_kv_head=2,
    d_ff=160,
    context=256,
    window=64,
    hrm=None,
)
UNGATED = replace(DENSE, gated_mlp=False)
SMALL = replace(DENSE, n_layer=1, hrm=HRMConfig(l_layer=1, h_layer=1, h_cycles=2, l_cycles=2))


def build(config: ModelConfig, optim: str = "muon") -> tuple[Model, Optimizers]:
    model = build_model(config, seed=0)
    model.dtype = torch.float32
    return model, build_optimizers(model, OptimConfig(name=optim), 1e-3)


def plan_of(model: Model, optimizers: Optimizers) -> Plan:
    stages, n_rows = ((model.config.context, 1.0),), 2
    loop = PretrainConfig(steps=10, tokens_per_step=n_rows * model.config.context)
    return make_plan(model, optimizers, loop, stages=stages, n_steps=10)


def some_blocks_recomputed(model: Model, optimizers: Optimizers) -> list[Row]:
    """Rows of each size with the first block, and all but the last, recomputed."""
    context = model.config.context
    return [
        Row(
            n_rows,
            context,
            again,
            estimate_memory(
                model,
                optimizers,
                n_rows=n_rows,
                context=context,
                recomputed=again,
                accumulates=n_rows == 1,
                on_card=False,
            ),
        )
        for n_rows in (1, 2)
        for again in (1, len(model.blocks) - 1)
    ]


@pytest.mark.parametrize(
    ("config", "optim"),
    [(DENSE, "muon"), (UNGATED, "muon"), (SMALL, "adamw"), (PRESETS["demo"].model, "muon")],
    ids=["dense", "ungated", "small", "demo"],
)
def test_estimated_memory_is_within_a_tenth_of_the_measured(
    config: ModelConfig, optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With derivatives as autograd writes them; those by hand keep up to a sixth less on a CPU."""
    monkeypatch.setattr("model.by_hand", lambda x: False)
    model, optimizers = build(config, optim)
    plan = plan_of(model, optimizers)
    time_update(plan, model, optimizers)
    assert {row.n_rows for row in plan.rows} == {1, 2}
    assert {in_words(row.recomputed, model) for row in plan.rows} == {"none", "all"}
    plan.rows += some_blocks_recomputed(model, optimizers)
    measure(plan, plan.rows, model, optimizers, seconds=math.inf)
    for row in plan.rows:
        assert row.peak == pytest.approx(row.memory.peak, rel=0.1), (row.n_rows, row.recomputed)


class FusedNorm(torch.autograd.Function):
    """`rms_norm` as a card's kernel does it: input and a number a row are kept. On meta torch would
    take the norm apart and keep float32 copies.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class StorageCounter(TorchDispatchMode):
    """Inside, every storage that an operation makes on meta counts until nothing holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.alive = self.peak = 0

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.seen:
            self.seen.add(id(storage))
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.gone, id(storage), storage.nbytes())

    def gone(self, which: int, n_bytes: int) -> None:
        self.seen.remove(which)
        self.alive -= n_bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.count(tensor)
        return out


def traced_peaks(
    model: Model, n_rows: int, context: int, monkeypatch, optim: OptimConfig | None = None
) -> tuple[int, int]:
    """Peak bytes of a training step of one micro-batch, and of one that accumulates several, of a
    model on meta that takes a card's branches. Scratch memory inside of kernels is not seen.
    """
    optimizers = build_optimizers(model, optim or OptimConfig(), 1e-3)
    for part in optimizers.parts:
        for group in part.param_groups:  # on meta there is no fused AdamW
            group.update({"fused": False, "foreach": False} if "fused" in group else {})
    n = n_rows * context
    with torch.device("meta"):
        ids, weights = torch.zeros(n, dtype=torch.long), torch.ones(n)
    batch = Batch(ids, ids, weights, torch.arange(n) % context == 0, context)
    counter = StorageCounter()
    for p in model.parameters():
        counter.count(p)

    def step() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
            optimizers.step()

    def peak_of(work: Callable[[], object]) -> int:
        counter.peak = 0
        work()
        return counter.peak

    door = attention.varlen_attn_of_torch()
    monkeypatch.setitem(DOORS, ("meta", torch.bfloat16), door)
    monkeypatch.setattr("model.rms_norm", FusedNorm.apply)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with counter:
        step()  # makes the state
        optimizers.zero_grad()
        first, later = (peak_of(lambda: backward(model, batch, 1.0)) for _ in range(2))
        update = peak_of(step)
    return max(first, update), max(later, update)


DEEP = replace(SMALL, hrm=HRMConfig(h_cycles=3, l_cycles=1, deep_supervision=True))


@pytest.mark.parametrize("quarters", range(5))
@pytest.mark.parametrize(
    ("config", "n_rows", "context"),
    [
        (PRESETS["12gb"].model, 4, 4096),
        (PRESETS["12gb"].model, 1, 4096),
        (PRESETS["12gb"].model, 8, 1024),
        (PRESETS["demo"].model, 2, 512),
        (replace(SMALL, gated_mlp=False), 4, 256),
        (DEEP, 4, 256),
    ],
    ids=["4x4096", "1x4096", "8x1024", "demo", "ungated", "deep"],
)
def test_a_cards_estimated_memory_is_within_a_tenth_of_a_traced_step(
    config: ModelConfig, n_rows: int, context: int, quarters: int, monkeypatch
) -> None:
    with torch.device("meta"):
        model = Model(config)
    recomputed = quarters * len(model.blocks) // 4
    model.dtype, model.recomputed_blocks = torch.bfloat16, recomputed
    optimizers = build_optimizers(model, OptimConfig(), 1e-3)
    alone, accumulating = traced_peaks(model, n_rows, context, monkeypatch)
    for traced, accumulates in ((alone, False), (accumulating, True)):
        estimated = estimate_memory(
            model,
            optimizers,
            n_rows=n_rows,
            context=context,
            recomputed=recomputed,
            accumulates=accumulates,
            on_card=True,
        )
        assert estimated.peak == pytest.approx(traced, rel=0.1), accumulates


@pytest.mark.parametrize("momentum", largest.MOMENTUM)
def test_the_largest_model_of_a_card_fits_it_in_a_traced_step(momentum: str, monkeypatch) -> None:
    """12 GiB at 1,024 tokens: 730M parameters and more, within a tenth of the estimate."""
    config = largest.largest(12, 1024, momentum)
    with torch.device("meta"):
        model = Model(config)
    assert model.n_parameters() > 730e6
    model.dtype, model.recomputed_blocks = torch.bfloat16, len(model.blocks)
    optim = OptimConfig(momentum_dtype=momentum)
    _, traced = traced_peaks(model, 1, 1024, monkeypatch, optim)
    depth = len(model.trunk)
    assert largest.memory_of(depth, 1024, momentum, None).peak == pytest.approx(traced, rel=0.1)
    assert traced < 0.95 * 12 * 2**30
    assert largest.memory_of(depth + 1, 1024, momentum, None).peak > 0.9 * 12 * 2**30


def test_a_measured_peak_holds_what_is_alive_at_once() -> None:
    with planning.peak_memory(torch.device("cpu"), held=1000) as found:
        a = torch.ones(1000)
        b = torch.ones(500)
        del a, b
        torch.ones(250)
    assert found[0] == pytest.approx(1000 + 6000, abs=200)


def test_measuring_leaves_weights_optimizer_and_recomputation_as_they_were() -> None:
    model, optimizers = build(SMALL)
    before = [p.detach().clone() for p in model.parameters()]
    plan = plan_of(model, optimizers)
    measure(plan, plan.rows, model, optimizers, seconds=math.inf)
    assert model.recomputed_blocks == 0
    assert all(p.grad is None for p in model.parameters())
    assert planning.state_bytes_now(optimizers) == 0
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)


def test_the_optimizers_state_takes_what_was_estimated() -> None:
    for optim in ("muon", "bfloat16", "adamw", "schedulefree"):
        model, optimizers = build(SMALL, "muon" if optim == "bfloat16" else optim)
        if optim == "bfloat16":
            half = OptimConfig(momentum_dtype="bfloat16")
            optimizers = build_optimizers(model, half, 1e-3)
            assert optimizers.state_bytes() < 0.8 * build(SMALL)[1].state_bytes()
        time_update(plan_of(model, optimizers), model, optimizers)
        there = planning.state_bytes_now(optimizers)
        assert there == pytest.approx(optimizers.state_bytes(), rel=0.01)


def test_what_would_take_too_long_or_too_much_is_not_measured() -> None:
    model, optimizers = build(SMALL)
    plan = plan_of(model, optimizers)
    measure(plan, plan.rows, model, optimizers, seconds=0)
    plan.room = plan.rows[0].memory.peak // 2
    measure(plan, plan.rows[:1], model, optimizers, seconds=math.inf)
    assert all(row.peak is None and not row.seconds for row in plan.rows)
    assert plan.seconds_of(plan.rows[0]) is None


def test_where_a_whole_row_takes_too_long_a_short_one_tells_the_speed() -> None:
    model, optimizers = build(SMALL)
    plan = plan_of(model, optimizers)
    plan.stages, plan.flops = ((256, 0.5), (64, 0.5)), {256: 1e9, 64: 1e9}
    # a row of 256 is expected to take 20 seconds, one of 64 five
    plan.peak_flops = 256 * 1e9 / 20 / 0.4
    measure(plan, plan.rows, model, optimizers, seconds=10)
    assert list(plan.rows[0].seconds) == [64]
    assert plan.seconds_of(plan.rows[0]) > 0
    assert all(row.peak is None for row in plan.rows)


STEPS = {"none": 0, "some": 2, "all": 4}


def row(n_rows: int, recomputed: str, gigabytes: float, seconds: float | None = None) -> Row:
    """A row of 512 tokens each; one that was run took as much memory as was estimated."""
    memory = Memory(0, 0, 0, int(gigabytes * 1e9), 0, 0, 0)
    if seconds is None:
        return Row(n_rows, 512, STEPS[recomputed], memory)
    return Row(n_rows, 512, STEPS[recomputed], memory, memory.peak, {512: seconds})


def plan_with(*rows: Row) -> Plan:
    return Plan(list(rows), ((512, 1.0),), 10_000, 2048, {512: 1e9}, 1e12, room=int(10e9))


CPU, CARD = torch.device("cpu"), torch.device("cuda")


def test_on_a_card_the_fastest_that_fits_is_chosen() -> None:
    slow, fast, huge = row(2, "none", 9, 2.0), row(8, "some", 9, 6.0), row(16, "none", 12, 1.0)
    assert plan_with(slow, fast, huge).choose(None, CARD) is fast
    assert plan_with(slow, fast, huge).choose(1024, CARD) is slow
    as_fast = row(4, "some", 5, 3.02)
    assert plan_with(slow, fast, as_fast).choose(None, CARD) is as_fast
    fast.too_large = True
    assert plan_with(slow, fast, huge).choose(None, CARD) is slow


def test_on_a_card_what_was_not_run_whole_is_not_chosen() -> None:
    run, untried = row(1, "none", 2, 1.0), row(4, "none", 4)
    assert plan_with(run, untried).choose(None, CARD) is run
    untried.seconds[512] = 0.1  # told by a shorter pass
    assert plan_with(run, untried).choose(None, CARD) is run
    # nothing was run: what is least likely to fill the card
    assert plan_with(row(1, "none", 2), row(1, "all", 1), untried).choose(None, CARD).n_rows == 1


def test_on_a_cpu_no_clock_has_a_say_in_the_choice() -> None:
    small, large, huge = row(1, "none", 2, 1.0), row(2, "none", 4, 9.0), row(4, "none", 12, 0.1)
    assert plan_with(small, large, huge, row(4, "all", 3, 0.1)).choose(None, CPU) is large
    # nothing fits: the smallest
    chosen = plan_with(huge, row(1, "all", 11)).choose(None, CPU)
    assert chosen.recomputed == STEPS["all"]


def test_the_whole_runs_time_counts_each_stage_and_every_update() -> None:
    plan = Plan(
        [],
        ((512, 0.75), (256, 0.25)),
        1_000_000,
        1000,
        {512: 2.0, 256: 1.0},
        1e9,
        0,
        update_seconds=0.1,
    )
    measured = row(1, "none", 1, seconds=0.512)  # a millisecond a token at 512, half of it at 256
    assert plan.seconds_of(measured) == pytest.approx(750 + 125 + 100)
    measured.seconds[256] = 0.512
    assert plan.seconds_of(measured) == pytest.approx(750 + 250 + 100)


def test_the_plan_needs_no_data_and_writes_nothing(tmp_path, capsys) -> None:
    config = replace(
        PRESETS["demo"],
        runs=str(tmp_path),
        device="cpu",
        model=replace(SMALL, d_model=32, context=512),
    )
    pretrain.main(config, pretrain.Options(plan=True))
    said = capsys.readouterr().out
    assert [line.split()[1:5] for line in said.splitlines() if line.startswith("  >")] == [
        ["2", "×", "512", "="]
    ]
    assert "not measured: neither NVML nor RAPL" in said
    assert list(tmp_path.iterdir()) == []


def test_a_card_that_is_elsewhere_is_planned_from_its_figures(capsys) -> None:
    config, card = PRESETS["12gb"], hardware.CARDS["RTX 4070"]
    pretrain.main(config, pretrain.Options(plan=True, card="RTX 4070"))
    said = capsys.readouterr().out
    assert "all is estimated" in said
    assert "Estimates: steps at 40% of the peak" in said
    (chosen,) = (line.split() for line in said.splitlines() if line.startswith("  >"))
    assert chosen[1:4] == ["4", "×", "4096"]
    assert chosen[6] == "none"
    assert float(chosen[7]) < 0.9 * card.gib
    assert chosen[8] == "–"  # nothing is measured
    with torch.device("meta"):
        model = Model(config.model)
    loop = settled(config).pretrain
    flops = sum(stage.share * model.flops_per_token(stage.context) for stage in loop.stages)
    hours = loop.steps * loop.tokens_per_step * flops / (0.4 * card.tflops * 1e12) / 3600
    assert float(chosen[-1]) == pytest.approx(hours * card.watts / 1000, abs=0.01)  # kWh


def test_what_is_recomputed_is_counted_into_the_assumed_time() -> None:
    with torch.device("meta"):
        model = Model(PRESETS["8gb"].model)
    model.dtype, loop = torch.bfloat16, settled(PRESETS["8gb"]).pretrain
    optimizers = build_optimizers(model, OptimConfig(), 1e-3)
    card = hardware.CARDS["RTX 4070"]
    plan = make_plan(model, optimizers, loop, stages=((4096, 1.0),), n_steps=1, card=card)
    planning.assume_speed(plan, model, card)
    rows = [row for row in plan.rows if row.n_rows == 1]
    assert [in_words(row.recomputed, model) for row in rows] == ["none", "all"]
    none, whole = map(plan.seconds_of, rows)
    assert whole == pytest.approx(none * 4 / 3)


def test_the_way_from_nothing_to_everything_recomputes_ever_more_and_ends() -> None:
    with torch.device("meta"):
        for config in (PRESETS["12gb"].model, replace(DENSE, n_layer=5), SMALL):
            model, steps = Model(config), [0]
            while (more := more_of(steps[-1], model)) is not None:
                steps.append(more)
            shares = [share_recomputed(step, model) for step in steps]
            assert shares == sorted(set(shares))
            assert shares[0] == 0
            assert shares[-1] == 1
            assert in_words(steps[0], model) == "none"
            assert in_words(steps[-1], model) == "all"
            assert len({in_words(step, model) for step in steps}) == len(steps) <= 5


@pytest.mark.parametrize("gib", [12, 10])
def test_as_few_blocks_are_recomputed_as_make_a_micro_batch_fit(gib: int) -> None:
    with torch.device("meta"):
        model = Model(PRESETS["16gb"].model)
    model.dtype, loop = torch.bfloat16, settled(PRESETS["16gb"]).pretrain
    optimizers = build_optimizers(model, OptimConfig(), 1e-3)
    card = hardware.CARDS["RTX 4070"]._replace(gib=gib)
    plan = make_plan(model, optimizers, loop, stages=((4096, 1.0),), n_steps=1, card=card)
    partly = [row for row in plan.rows if 0 < row.recomputed < len(model.blocks)]
    assert partly
    for found in partly:
        assert found.memory.peak <= plan.room
        fewer = estimate_memory(
            model,
            optimizers,
            n_rows=found.n_rows,
            context=4096,
            recomputed=found.recomputed - 1,
            accumulates=found.tokens < loop.tokens_per_step,
            on_card=True,
        )
        assert fewer.peak > plan.room


def fitted(monkeypatch, seconds_of: Callable[[Row], float], room_gb: float) -> tuple[Plan, list]:
    """A plan whose rows are "run" by `seconds_of`, and the rows that were."""
    model, optimizers = build(SMALL)
    loop = PretrainConfig(steps=10, tokens_per_step=64 * 256)
    plan = make_plan(model, optimizers, loop, stages=((256, 1.0),), n_steps=10)
    plan.room, run = int(room_gb * 1e9), []

    def time_pass(row, context, *given, twice):
        run.append(row)
        row.peak = row.memory.peak
        return seconds_of(row)

    monkeypatch.setattr(planning, "time_pass", time_pass)
    measure(plan, plan.rows, model, optimizers, seconds=60, until_no_gain=True)
    return plan, run


def test_a_fit_stops_where_more_tokens_at_once_are_no_faster(monkeypatch) -> None:
    plan, run = fitted(monkeypatch, lambda row: 0.1 + 0.01 * max(row.n_rows, 4), room_gb=100)
    assert [row.n_rows for row in run] == [1, 2, 4, 8, 16, 32, 64]
    plan, run = fitted(monkeypatch, lambda row: 0.01 * row.n_rows, room_gb=100)
    assert [row.n_rows for row in run] == [1, 2]
    assert {row.recomputed for row in run} == {0}
    assert plan.choose(None, CARD).n_rows == 1


def test_a_fit_recomputes_only_for_more_tokens_at_once(monkeypatch) -> None:
    plan, run = fitted(monkeypatch, lambda row: 0.1 + 0.001 * row.n_rows, room_gb=0.03)
    fit = [row for row in run if row.fits(plan.room)]
    assert [row.n_rows for row in fit] == sorted({row.n_rows for row in fit})
    assert fit[-1].recomputed == 3
    assert plan.choose(None, CARD) is fit[-1]


def test_compilation_does_not_eat_the_time_of_a_fit(monkeypatch) -> None:
    model, optimizers = build(SMALL)
    plan, clock = plan_of(model, optimizers), [0.0]
    monkeypatch.setattr(planning.time, "perf_counter", lambda: clock[0])
    first: set = set()

    def compiles_first(model: Model, batch: Batch) -> float:
        seconds = 0.1 if (len(batch.ids), model.recomputed_blocks) in first else 1000.0
        first.add((len(batch.ids), model.recomputed_blocks))
        clock[0] += seconds
        return seconds

    monkeypatch.setattr(planning, "run_pass", compiles_first)
    model.compile_blocks()
    plan.peak_flops = 1e15
    measure(plan, plan.rows, model, optimizers, seconds=10)
    assert [row.seconds for row in plan.rows] == [{256: 0.1}] * len(plan.rows)


def test_one_row_is_run_however_short_the_time(monkeypatch) -> None:
    model, optimizers = build(SMALL)
    plan = plan_of(model, optimizers)
    measure(plan, plan.rows, model, optimizers, seconds=0, until_no_gain=True)
    assert [row for row in plan.rows if row.peak] == [plan.choose(None, CARD)]


def test_a_card_without_figures_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'RTX 9999'.*RTX 4070"):
        pretrain.main(PRESETS["12gb"], pretrain.Options(plan=True, card="RTX 9999"))
    with pytest.raises(UserError, match="add --plan"):
        pretrain.main(PRESETS["12gb"], pretrain.Options(card="RTX 4070"))


@pytest.mark.gpu
def test_on_a_card_the_largest_model_is_planned_within_a_tenth() -> None:
    config = settled(replace(PRESETS["16gb"], device="cuda"))
    model = pretrain.build(config, torch.device("cuda"))
    optimizers = build_optimizers(model, config.optim, lr=0.01)
    plan = make_plan(model, optimizers, settled(config).pretrain, stages=((4096, 1.0),), n_steps=1)
    time_update(plan, model, optimizers)
    few = [row for row in plan.rows if row.n_rows in (1, 4)]
    measure(plan, few, model, optimizers, seconds=120)
    for row in few:
        assert row.peak == pytest.approx(row.memory.peak, rel=0.1), (row.n_rows, row.recomputed)


def test_a_cards_preset_on_a_machine_without_one_says_how_long_and_what_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning.hardware, "pick_device", lambda wish: torch.device("cpu"))
    monkeypatch.setattr(planning.hardware, "peak_flops", lambda device, dtype: 1e11)
    said = r"16gb is made for .*\d+d\d+h.*--preset demo.*--device cpu"
    with pytest.raises(UserError, match=said):
        planning.require_able_machine(PRESETS["16gb"])
    planning.require_able_machine(PRESETS["demo"])
    planning.require_able_machine(replace(PRESETS["16gb"], device="cpu"))
    assert "--preset demo" in planning.card_wanted(replace(PRESETS["16gb"], device="cpu"))
    assert planning.card_wanted(PRESETS["demo"]) is None

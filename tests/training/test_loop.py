"""The loop: spikes, memory, resuming."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from config import (
    FINE_TUNING,
    PRESETS,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    SFTConfig,
    Stage,
    UserError,
    settled,
)
from hearth import run
from hearth.data.tokenizer import Tokenizer
from hearth.training import checkpoint, gradients, loop, optim
from hearth.training.batches import Batch
from hearth.training.loop import Job, Progress, SpikeGuard, loop_of, resume
from hearth.training.optim import build_optimizers
from model import build_model


def random_batch(step: int = 0, n: int = 128, row_length: int = 32, vocab: int = 128) -> Batch:
    rng = torch.Generator().manual_seed(step)
    ids = torch.randint(0, vocab, (n + 1,), generator=rng) // (1 + step % 2)
    starts = torch.rand(n, generator=rng) < 0.1
    weights = (torch.rand(n, generator=rng) < 0.7).float()
    return Batch(ids[:-1], ids[1:], weights, starts, row_length)


def test_spikes_and_nan_are_skipped_and_counted() -> None:
    guard = SpikeGuard()
    assert not guard.allows(math.nan, 1.0)
    assert not guard.allows(1.0, math.inf)
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        assert guard.allows(2.0, float(torch.empty(()).log_normal_(0, 0.3, generator=rng)))
    assert guard.in_a_row == 0
    assert not guard.allows(2.0, 50.0)
    assert guard.allows(2.0, 1.0)
    assert guard.skipped == 3


def calm(guard: SpikeGuard, level: float, steps: int, seed: int = 0) -> int:
    """Steps with norms about `level`; how many of them were skipped."""
    rng = torch.Generator().manual_seed(seed)
    norms = [level * float(torch.randn((), generator=rng).mul(0.1).exp()) for _ in range(steps)]
    return sum(not guard.allows(2.0, norm) for norm in norms)


@pytest.mark.parametrize("rise", [3.0, 30.0, 1e4])
def test_a_lasting_rise_costs_a_few_steps_and_single_spikes_stay_spikes(rise: float) -> None:
    guard = SpikeGuard()
    calm(guard, 1.0, 200)
    assert calm(guard, rise, 100, seed=1) <= 10
    assert guard.in_a_row == 0
    assert not guard.allows(2.0, 3 * rise)
    assert calm(guard, rise, 20) == 0
    for _ in range(30):  # one step in three is a spike, again and again: never a new level
        assert not guard.allows(2.0, 50 * rise)
        assert calm(guard, rise, 2) == 0


def test_norms_that_rise_again_at_once_are_a_divergence_and_not_followed() -> None:
    guard = SpikeGuard()
    calm(guard, 1.0, 200)
    calm(guard, 50.0, 20)
    calm(guard, 2500.0, 20)
    assert guard.in_a_row == 20
    assert not guard.allows(2.0, 1e6)


def test_non_finite_steps_never_become_a_level() -> None:
    guard = SpikeGuard()
    calm(guard, 1.0, 200)
    for _ in range(30):
        assert not guard.allows(math.nan, math.nan)
    assert guard.in_a_row == 30
    assert calm(guard, 1.0, 5) == 0


def test_a_guard_that_is_saved_goes_on_as_it_was() -> None:
    guard = SpikeGuard()
    calm(guard, 1.0, 200)
    calm(guard, 50.0, 5)  # on the way to a new level
    state = json.loads(json.dumps(loop.state_of(Progress(guard=guard), 10)))
    twin = Progress.of(state, Path("state.json")).guard
    assert calm(guard, 50.0, 20) == calm(twin, 50.0, 20) == 3
    assert twin == guard


# ----------------------------------------------------------------------------------------- the loop


class RandomBatches:
    """Batches from the step number alone, like the real ones."""

    n_steps, context = 12, 32

    def batch(self, step: int) -> Batch:
        return random_batch(step)

    def stage(self, step: int) -> int:
        return 0

    def context_of(self, stage: int) -> int:
        return 32


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train(["a small text to learn from"], 384)


def make_job(
    folder: Path, tiny: ModelConfig, words: Tokenizer, optim: str = "muon", **loop: Any
) -> tuple[Job, Progress]:
    plan = {
        "lr": 2e-3,
        "tokens_per_step": 128,
        "micro_batch_tokens": 64,
        "eval_every_steps": 4,
        "sample_every_steps": 100,
    }
    pretrain = PretrainConfig(steps=12, stages=(Stage(32, 1.0),), **(plan | loop))
    config = Config(
        preset="test",
        data=DataConfig(text_files=("x",)),
        model=tiny,
        optim=OptimConfig(name=optim),
        pretrain=pretrain,
        sft1=SFTConfig(files=("x",), context=32),
        sft2=SFTConfig(files=("x",), context=32),
    )
    config = settled(config)
    pretrain = config.pretrain
    model = build_model(tiny, seed=0)
    model.dtype = torch.float32  # whatever this processor is fastest with
    optimizers = build_optimizers(model, config.optim, pretrain.lr)
    progress = resume(folder, model, optimizers)

    def save(state: dict[str, Any]) -> Path:
        return checkpoint.save(
            folder,
            model,
            optimizers,
            config,
            words,
            {"stage": "base", **state},
            keep=2,
        )

    job = Job(
        model=model,
        optimizers=optimizers,
        batches=RandomBatches(),
        loop=pretrain,
        folder=folder,
        save=save,
        evaluate=lambda: {"bpb": 1.0},
        sample=lambda: [],
        command="uv run pretrain.py",
    )
    return job, progress


def weights_of(folder: Path) -> bytes:
    return (run.newest(folder) / "model.safetensors").read_bytes()


def test_fine_tuning_has_its_own_optimizer_settings_and_intervals_by_its_length() -> None:
    demo = replace(PRESETS["demo"], optim=OptimConfig(weight_decay=0.1, momentum_warmup_steps=200))
    assert loop_of(demo, "base", 1000) == (demo.pretrain, demo.optim)
    for stage in FINE_TUNING:
        open_ = replace(getattr(demo, stage), eval_every_steps=None, sample_every_steps=None)
        loop, optim = loop_of(replace(demo, **{stage: open_}), stage, 300)
        assert (loop.eval_every_steps, loop.sample_every_steps) == (75, 150)
        assert optim == replace(demo.optim, weight_decay=0.0, momentum_warmup_steps=30)
    mid = replace(demo.mid, eval_every_steps=7, sample_every_steps=None, weight_decay=0.2)
    given = replace(demo, mid=mid)
    loop, optim = loop_of(given, "mid", 1)
    assert (loop.eval_every_steps, loop.sample_every_steps, optim.weight_decay) == (7, 1, 0.2)


@pytest.mark.parametrize("optim", ["muon", "adamw", "schedulefree"])
def test_resumed_run_matches_unbroken_run(
    optim: str, tmp_path: Path, tiny: ModelConfig, words: Tokenizer
) -> None:
    job, progress = make_job(tmp_path / "unbroken", tiny, words, optim)
    loop.fit(job, progress)
    job, progress = make_job(tmp_path / "broken", tiny, words, optim)
    real_step = loop.train_step

    def dies_at_7(*args):
        if progress.step == 7:
            raise KeyboardInterrupt
        return real_step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", dies_at_7)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(job, progress)
    job, progress = make_job(tmp_path / "broken", tiny, words, optim)
    assert progress.step == 4
    loop.fit(job, progress)
    assert weights_of(tmp_path / "broken") == weights_of(tmp_path / "unbroken")
    steps = [
        json.loads(line)
        for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in steps if r["kind"] == "step"] == list(range(1, 13))


posix = pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process on Windows")


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_saves_and_exits_with_its_number(
    name: str, tmp_path: Path, tiny, words, capsys
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    job, progress = make_job(tmp_path, tiny, words)
    real_batch = RandomBatches.batch

    def asks_to_stop(self, step: int) -> Batch:
        if step == 5:
            os.kill(os.getpid(), number)
        return real_batch(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RandomBatches, "batch", asks_to_stop)
        with pytest.raises(SystemExit) as caught:
            loop.fit(job, progress)
    assert caught.value.code == 128 + number
    # the batch is loaded while the step before it runs
    assert checkpoint.read_state(run.newest(tmp_path))["step"] in (5, 6)
    assert "uv run pretrain.py" in capsys.readouterr().out
    assert signal.getsignal(number) == before


@posix
def test_a_signal_in_the_last_evaluation_ends_the_script_too(tmp_path: Path, tiny, words) -> None:
    job, progress = make_job(tmp_path, tiny, words)

    def evaluate() -> dict[str, float]:
        if progress.step == job.batches.n_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(SystemExit) as caught:
        loop.fit(replace(job, evaluate=evaluate), progress)
    assert caught.value.code == 128 + signal.SIGTERM
    assert loop.is_done(tmp_path)


def test_a_stage_that_was_killed_in_its_last_evaluation_is_not_done(
    tmp_path: Path, tiny, words
) -> None:
    def dies() -> dict[str, float]:
        if progress.step == job.batches.n_steps:
            raise KeyboardInterrupt
        return {}

    job, progress = make_job(tmp_path, tiny, words)
    with pytest.raises(KeyboardInterrupt):
        loop.fit(replace(job, evaluate=dies), progress)
    assert checkpoint.is_finished(tmp_path)
    assert not loop.is_done(tmp_path)
    job, progress = make_job(tmp_path, tiny, words)
    loop.fit(job, progress)
    assert loop.is_done(tmp_path)


@posix
def test_a_second_signal_is_obeyed_but_a_terminal_may_close_twice() -> None:
    with loop.StopSignal() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == signal.SIGHUP
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@posix
def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with loop.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_break_and_a_closed_window_stop_a_run_on_windows(monkeypatch) -> None:
    """There SIGBREAK stands where others have SIGHUP; a stand-in for it is raised here."""
    stand_in = signal.SIGTERM
    windows = SimpleNamespace(
        **{name: getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIG_IGN")},
        **{name: getattr(signal, name) for name in ("signal", "getsignal")},
        SIGBREAK=stand_in,
    )
    monkeypatch.setattr(loop, "signal", windows)
    assert loop.hang_up() == stand_in
    with loop.StopSignal() as stop:
        signal.raise_signal(stand_in)
        signal.raise_signal(stand_in)  # a window that closes may say so twice
        assert stop.number == stand_in


def test_speed_and_memory_are_those_of_the_stage_at_hand(
    tmp_path: Path, tiny, words, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, progress = make_job(tmp_path, tiny, words)
    calls: list[str] = []
    monkeypatch.setattr(RandomBatches, "stage", lambda self, step: int(step >= 6))
    monkeypatch.setattr(RandomBatches, "context_of", lambda self, stage: (16, 32)[stage])
    for module, name in (
        (loop, "fit_micro_batch"),
        (loop, "train_step"),
        (loop.hardware, "reset_peak_memory"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, real=real, name=name: calls.append(name) or real(*given)
        )
    loop.fit(job, progress)
    steps = ["train_step"] * 6
    reset = "reset_peak_memory"  # after the trials that fit the micro-batch, and a stage
    assert calls == ["fit_micro_batch", reset, *steps, reset, *steps]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    peak = next(r["peak_flops"] for r in records if r["kind"] == "start")
    for record in (r for r in records if r["kind"] == "step"):
        flops = job.model.flops_per_token(16 if record["step"] <= 6 else 32)
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops / peak)


def test_running_out_of_memory_halves_the_micro_batch_and_loses_nothing(
    tmp_path: Path, tiny, words, capsys
) -> None:
    job, progress = make_job(tmp_path / "calm", tiny, words, micro_batch_tokens=32)
    loop.fit(job, progress)
    job, progress = make_job(tmp_path / "tight", tiny, words, micro_batch_tokens=128)
    real = gradients.backward

    def tight(model, micro, *rest):
        if len(micro.ids) > 32 and progress.step >= 3:
            raise torch.OutOfMemoryError("injected")
        return real(model, micro, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "backward", tight)
        loop.fit(job, progress)
    assert progress.step == 12
    assert "micro-batch is 32 tokens" in capsys.readouterr().out
    calm, _ = make_job(tmp_path / "calm", tiny, words)
    for a, b in zip(calm.model.parameters(), job.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_memory_that_runs_out_in_the_update_changes_nothing(
    tmp_path: Path, tiny, words, capsys
) -> None:
    job, progress = make_job(tmp_path / "calm", tiny, words)
    loop.fit(job, progress)
    job, progress = make_job(tmp_path / "tight", tiny, words)
    real, calls = optim.orthogonalise, []

    def tight(matrices):
        calls.append(progress.step)
        if calls.count(3) == 2:  # the second group of the fourth step
            raise torch.OutOfMemoryError("injected")
        return real(matrices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "orthogonalise", tight)
        loop.fit(job, progress)
    assert capsys.readouterr().out.count("ran out in the optimizer's step, which continues") == 1
    assert weights_of(tmp_path / "tight") == weights_of(tmp_path / "calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "orthogonalise", always_out_of_memory)
        with pytest.raises(UserError, match=r"optimizer's step. Take a smaller preset"):
            loop.fit(*make_job(tmp_path / "full", tiny, words))


def always_out_of_memory(*given: object) -> None:
    raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")  # as Apple's says it


def test_a_schedule_free_update_that_memory_ran_out_in_is_not_guessed_at(
    tmp_path: Path, tiny, words
) -> None:
    job, progress = make_job(tmp_path, tiny, words, "schedulefree")
    job.optimizers.step = always_out_of_memory
    with pytest.raises(UserError, match="optimizer's step"):
        loop.fit(job, progress)


@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_runs_out_in_an_evaluation_or_a_sample_ends_no_run(
    times: int, tmp_path: Path, tiny, words, capsys
) -> None:
    job, progress = make_job(tmp_path, tiny, words, eval_every_steps=6, sample_every_steps=12)
    asked = []

    def first_out_of_memory(what: str, found: Any) -> Any:
        asked.append(what)
        if asked.count(what) <= times:
            raise torch.OutOfMemoryError("injected")
        return found

    job.evaluate = lambda: first_out_of_memory("evaluation", {"bpb": 1.5})
    job.sample = lambda: first_out_of_memory("sample", [("a", "b")])
    loop.fit(job, progress)
    kinds = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    n_evals = sum(record["kind"] == "eval" for record in kinds)
    n_samples = sum(record["kind"] == "sample" for record in kinds)
    said = capsys.readouterr().out
    if times == 1:
        assert (n_evals, n_samples) == (2, 1)
        assert "Memory ran out" not in said
    else:
        assert (n_evals, n_samples) == (1, 0)
        assert said.count("Memory ran out: no evaluation at this step") == 1
        assert said.count("Memory ran out: no sample at this step") == 1


def test_an_error_that_is_not_of_memory_is_not_caught(tmp_path: Path, tiny, words) -> None:
    job, progress = make_job(tmp_path, tiny, words)

    def breaks() -> dict[str, float]:
        raise RuntimeError("shape mismatch")

    job.evaluate = breaks
    with pytest.raises(RuntimeError, match="shape mismatch"):
        loop.fit(job, progress)


def test_repeated_non_finite_steps_stop_the_run_and_name_the_checkpoint(
    tmp_path: Path, tiny, words
) -> None:
    job, progress = make_job(tmp_path, tiny, words, max_skipped_steps=3)
    with torch.no_grad():
        job.model.embedding[0, 0] = math.nan
    before = job.model.output_gain.detach().clone()
    with pytest.raises(UserError, match="learning rate"):
        loop.fit(job, progress)
    assert torch.equal(before, job.model.output_gain)


def test_only_the_newest_checkpoints_are_kept_and_unfinished_ones_never_trusted(
    tmp_path: Path, tiny, words
) -> None:
    job, progress = make_job(tmp_path, tiny, words)
    loop.fit(job, progress)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000008", "step-00000012"]
    (tmp_path / "step-00000012" / "state.json").unlink()
    assert run.newest(tmp_path).name == "step-00000008"


def test_a_checkpoint_alone_rebuilds_the_model(tmp_path: Path, tiny, words) -> None:
    job, progress = make_job(tmp_path, tiny, words)
    loop.fit(job, progress)
    loaded = checkpoint.load_for_inference(tmp_path)
    assert loaded.config.model == tiny
    assert loaded.tokenizer.hash == words.hash
    assert loaded.state["step"] == 12
    for a, b in zip(loaded.model.parameters(), job.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.safetensors"):
        checkpoint.load_for_inference(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.load_for_inference(tmp_path / "nowhere")

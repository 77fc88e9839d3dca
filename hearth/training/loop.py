"""The one loop that pretraining and fine-tuning share: spikes, evaluation, `fit`.

In: a model, its optimizers, batches by step number. Out: checkpoints, metrics, a trained model.
Knows nothing of corpora, tokenizers or the chat format.
"""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from config import Config, LoopConfig, OptimConfig, SFTConfig, UserError, settled
from hearth import hardware, log
from hearth.cli import from_plain
from hearth.data.tokenizer import Tokenizer
from hearth.reporting.report import Reporter, refresh
from hearth.reporting.trackers import open_trackers
from hearth.run import STAGES, newest
from hearth.training import attention, checkpoint, distributed
from hearth.training.batches import Batch, Batches, LoadedAhead
from hearth.training.gradients import accumulate, in_order_of_backward
from hearth.training.optim import Optimizers, build_optimizers
from hearth.training.planning import GIB, in_words, make_plan, measure, more_of
from model import Model

# ------------------------------------------------------------------------------------ spiking steps


KNOWN = 50  # accepted steps after which the guard judges, and judges a new level
SPIKE = 6.0  # deviations above the mean of the logarithms
LASTING = 8  # spikes, less the accepted steps between them, that are no spikes but a new level


@dataclass
class SpikeGuard:
    """Running mean and variance of the gradient norm's logarithm; tells steps to be skipped.

    A non-finite loss or norm is always skipped, a norm `SPIKE` deviations above the mean once
    `KNOWN` steps are known. No weight moves while steps are skipped, so norms that stay high are
    those of other data or of another place in weight space, not of one batch: the mean moves to
    their median, at the cost of `LASTING` steps. That is done once in `KNOWN` accepted steps: a
    norm that rises again at once is a divergence, and ends the run (`max_skipped_steps`).
    """

    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0  # accepted steps
    level_at: int = 0  # of them, those before the last new level
    high: tuple[float, ...] = ()  # the spikes that may become a new level
    skipped: int = 0  # in all
    in_a_row: int = 0

    def allows(self, loss: float, norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self._skip()
        value = math.log(norm + 1e-12)
        limit = self.mean + SPIKE * math.sqrt(max(self.variance, 1e-2))
        if self.seen >= KNOWN and value > limit:
            self.high = (*self.high[1 - LASTING :], value)
            if len(self.high) == LASTING and self.seen >= self.level_at + KNOWN:
                self.mean, self.level_at, self.high = statistics.median(self.high), self.seen, ()
            return self._skip()
        weight = max(0.02, 1 / (self.seen + 1))
        off = value - self.mean
        self.mean += weight * off
        self.variance = (1 - weight) * (self.variance + weight * off**2)
        self.high = self.high[1:]
        self.seen += 1
        self.in_a_row = 0
        return True

    def _skip(self) -> bool:
        self.skipped += 1
        self.in_a_row += 1
        return False


# --------------------------------------------------------------------------------------------- loop


@dataclass
class Progress:
    """Where a run stands: everything but weights and optimizer state that the next step
    depends on.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent in steps, over all starts
    guard: SpikeGuard = field(default_factory=SpikeGuard)
    joules: float = 0.0  # drawn over all starts, as far as the hardware tells

    @staticmethod
    def of(state: dict[str, Any], path: Path) -> Progress:
        """From the state of a checkpoint; `path` is its file, for the error."""
        own = {f.name: state[f.name] for f in fields(Progress) if f.name in state}
        return from_plain(Progress, own, path)


def resume(folder: Path, model: Model, optimizers: Optimizers) -> Progress:
    """Bring model and optimizers to the newest checkpoint below `folder`, if there is one; where
    the run then stands.
    """
    state = checkpoint.resume(folder, model, optimizers)
    return Progress.of(state, newest(folder) / "state.json") if state else Progress()


@dataclass
class Job:
    """What a stage hands to `fit`."""

    model: Model
    optimizers: Optimizers
    batches: Batches
    loop: LoopConfig
    folder: Path  # of the stage: metrics.jsonl and checkpoints
    save: Callable[[dict[str, Any]], Path]  # state -> checkpoint folder
    evaluate: Callable[[], dict[str, float]]  # held-out figures, for the log
    sample: Callable[[], list[tuple[str, str]]]  # prompts and what the model makes of them
    command: str  # that continues this run
    after_evaluation: Callable[[], None] = lambda: None  # such as drawing the report
    figures: Callable[[], dict[str, Any]] = dict  # further ones of the step just taken
    looks_before: bool = False  # evaluates before the first step too


def fit_stage(
    config: Config,
    stage: str,
    model: Model,
    batches: Batches,
    tokenizer: Tokenizer,
    *,
    evaluate: Callable[[], dict[str, float]],
    sample: Callable[[], list[tuple[str, str]]],
    command: str,
    files: Mapping[str, str] | None = None,
    loop: LoopConfig | None = None,
    state_of_batches: Callable[[], dict[str, Any]] = dict,
    **further: Any,
) -> None:
    """Train `model` as `stage` of the run (`run.TRAINED`): from its newest checkpoint, if there is
    one, to the last step.

    files: further texts of a checkpoint, by their path in its folder. loop: None is the stage's
    settings. state_of_batches: what the batches to come depend on besides step and weights; it
    joins the checkpoint's state. The rest, and `further`, as in `Job`.
    """
    config = settled(config)
    optim = config.optim
    if loop is None:
        loop, optim = loop_of(config, stage, batches.n_steps)
    folder = config.run_dir / stage
    optimizers = build_optimizers(model, optim, loop.lr)
    progress = resume(folder, model, optimizers)
    start = f", continuing from step {progress.step}" if progress.step else ""
    dtype = str(model.dtype).removeprefix("torch.")
    log.say(f"device      {hardware.describe(model.device)}, computing in {dtype}")
    log.say(f"run folder  {folder}{start}")
    log.say(f"report      {config.run_dir / 'report' / 'index.html'}")

    def save(state: dict[str, Any]) -> Path:
        state = {"stage": stage, **state_of_batches(), **state}
        return checkpoint.save(
            folder, model, optimizers, config, tokenizer, state, loop.keep_checkpoints, files
        )

    redraw = Reporter(config).refresh
    job = Job(
        *(model, optimizers, batches, loop, folder, save, evaluate, sample, command, redraw),
        **further,
    )
    fit(job, progress)
    if log.is_first():
        refresh(config)
    title = STAGES[stage].title.lower()
    log.say(f"{title}: done in {log.duration(progress.seconds)}, {newest(folder)}")


def loop_of(config: Config, stage: str, steps: int) -> tuple[LoopConfig, OptimConfig]:
    """The loop's settings and the update rule of a stage of so many steps."""
    if stage == "base":
        return config.pretrain, config.optim
    loop: SFTConfig = getattr(config, stage).in_steps(steps)
    return loop, loop.optimizer(config.optim, steps)


def fit(job: Job, progress: Progress) -> Progress:
    """Train to the last step. A signal (Ctrl-C, SIGTERM, a closed terminal) finishes the step,
    saves and leaves with exit code 128 and the signal's number, as a shell would say it.

    Of several processes, inside `distributed.group`, the first one alone logs, saves and evaluates.
    """
    device = job.model.device
    # rollouts come from the weights of their own step: none can be made ahead
    live = getattr(job.batches, "live", False)
    ahead = nullcontext(job.batches) if live else LoadedAhead(job.batches, device)
    with StopSignal() as stop, ahead as batches:
        return train(replace(job, batches=batches), progress, stop)


def train(job: Job, progress: Progress, stop: StopSignal) -> Progress:
    """The loop itself."""
    model, loop, steps = job.model, job.loop, job.batches.n_steps
    preflight(job)
    require_alike(job, progress)
    attention.pick(model)
    micro_tokens = fit_micro_batch(job)
    hardware.reset_peak_memory(model.device)  # of the trials
    peak = distributed.n_ranks() * hardware.peak_flops(model.device, model.dtype)
    start = {"micro_batch_tokens": micro_tokens, "peak_flops": peak, **facts(job)}
    run_log = log.RunLog(job.folder, progress.step)
    run_log.trackers = (
        open_trackers(loop.log_to, job.folder, progress.step, start) if log.is_first() else ()
    )
    run_log.note("start", progress.step, **start)
    clock, power = Clock(loop.save_every_minutes), Power(model.device)
    bar = log.progress(steps, "step", job.folder.name, progress.step)
    if log.is_first() and misses_evaluation(job, progress.step, run_log):
        with distributed.alone():
            report(job, progress.step, run_log)
    while progress.step < steps:
        started, stage = time.perf_counter(), job.batches.stage(progress.step)
        if progress.step and stage != job.batches.stage(progress.step - 1):
            hardware.reset_peak_memory(model.device)
        figures, micro_tokens = train_step(job, progress, micro_tokens)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        clock.step(seconds)
        figures |= speed(job, progress, stage, clock.typical, peak)
        figures |= power.figures(progress) | job.figures()
        run_log.note("step", progress.step, **figures)
        bar.update()
        last = progress.step == steps
        if progress.step % loop.log_every_steps == 0 or last or progress.step == 1:
            log.say(log.step_line(progress.step, steps, figures))
        evaluating = progress.step % loop.eval_every_steps == 0 or last
        asked = distributed.largest([stop.number, clock.save_is_due()], model.device)
        stopping = int(asked[0])
        if evaluating or any(asked):
            clock.saved()
            distributed.bring_together(model.named_parameters())
            if log.is_first():
                job.save(state_of(progress, steps))
        if stopping and not last:
            bar.close()
            log.say(
                f"Stopped at step {progress.step}, saved in {job.folder}. Continue with: "
                f"{job.command}"
            )
            raise SystemExit(128 + stopping)
        if log.is_first():
            with distributed.alone():
                look_back(job, progress, run_log, evaluating=evaluating)
    bar.close()
    if stopping := int(distributed.largest([stop.number], model.device)[0]):
        log.say(f"Stopped after the last step, saved in {job.folder}. Continue with: {job.command}")
        raise SystemExit(128 + stopping)
    return progress


def require_alike(job: Job, progress: Progress) -> None:
    """Raises UserError where the processes of one run do not start alike."""
    facts = {"the step to start from": progress.step, "the number of steps": job.batches.n_steps}
    facts |= {
        name: getattr(job.loop, name) for name in ("lr", "tokens_per_step", "eval_every_steps")
    }
    distributed.require_alike(facts)
    distributed.bring_together(job.model.named_parameters())


def misses_evaluation(job: Job, step: int, run_log: log.RunLog) -> bool:
    """Whether the evaluation of the step where a start begins is due: a kill came between the
    checkpoint and it, or the stage wants one before its first step.
    """
    due = step % job.loop.eval_every_steps == 0 or step == job.batches.n_steps
    return due and (step > 0 or job.looks_before) and not log.was_noted(run_log.path, "eval", step)


def is_done(folder: Path) -> bool:
    """Whether a stage is trained, and evaluated at its end: a kill may have come between."""
    if not checkpoint.is_finished(folder):
        return False
    step, metrics = checkpoint.read_state(newest(folder))["step"], folder / "metrics.jsonl"
    return not metrics.is_file() or log.was_noted(metrics, "eval", step)


def look_back(job: Job, progress: Progress, run_log: log.RunLog, *, evaluating: bool) -> None:
    """Held-out figures, samples and whatever the stage does after them, where this step is due."""
    if evaluating:
        report(job, progress.step, run_log)
    if progress.step == job.batches.n_steps or progress.step % job.loop.sample_every_steps == 0:
        show_samples(job, progress, run_log)
    if evaluating:
        job.after_evaluation()


def preflight(job: Job) -> None:
    """What would end a long run badly, said before it starts."""
    kept = len(list(job.folder.glob("step-*")))
    # the oldest goes once the newest is there
    to_write = max(1, job.loop.keep_checkpoints + 1 - kept)
    hardware.check_disk(job.folder, to_write * checkpoint.n_bytes(job.model, job.optimizers))
    if hardware.on_battery():
        log.say(
            "This laptop runs on its battery: slowly, and not for long. Plug it in; a run that "
            "stops can go on."
        )


def facts(job: Job) -> dict[str, Any]:
    """What stays the same over a start of a run: its length, its model's size, its machine."""
    return {
        "steps": job.batches.n_steps,
        "parameters": job.model.n_parameters(),
        "device": hardware.describe(job.model.device),
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def train_step(job: Job, progress: Progress, micro_tokens: int) -> tuple[dict[str, Any], int]:
    """One optimizer step; its figures, and the micro-batch to go on with (halved where memory ran
    out).
    """
    model, loop, step, steps = job.model, job.loop, progress.step, job.batches.n_steps
    batch = job.batches.batch(step)
    factor = job.optimizers.schedule(step, steps, loop)
    if distributed.n_ranks() > 1:
        loss, micro_tokens = accumulate_together(job, batch, micro_tokens)
    else:
        loss, micro_tokens = accumulate_within_memory(job, batch, micro_tokens)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), job.optimizers.config.clip))
    if not batch.weights.any():
        pass  # nothing to learn from: an update would be momentum alone
    elif progress.guard.allows(loss, norm):
        update_within_memory(job)
    elif progress.guard.in_a_row >= loop.max_skipped_steps:
        raise UserError(
            f"{progress.guard.in_a_row} steps in a row had a spiking or non-finite gradient (loss "
            f"{loss:.3f}, norm "
            f"{norm:.3g}): the run stopped at step {step}. The last good checkpoint lies in "
            f"{job.folder}. Lower the "
            f"learning rate, remove {job.folder}, and start again."
        )
    job.optimizers.zero_grad()
    progress.step += 1
    progress.tokens += len(batch.ids)
    figures = {"loss": loss, "lr": loop.lr * factor, "grad_norm": norm, "tokens": progress.tokens}
    figures |= {"stage": job.batches.stage(step), "skipped": progress.guard.skipped}
    return figures, micro_tokens


def accumulate_together(job: Job, batch: Batch, micro_tokens: int) -> tuple[float, int]:
    """`accumulate_within_memory` of this process' share of a step, and the sum of all of them."""
    mine = share_of(batch)
    weight = float(mine.weights.sum()) / max(1.0, float(batch.weights.sum()))
    weight = 1.0 if batch.normaliser else weight
    gradients = distributed.GradientSum(in_order_of_backward(job.model), weight)
    loss, micro_tokens = accumulate_within_memory(job, mine, micro_tokens, gradients.begun)
    gradients.finish()
    return distributed.total(weight * loss, job.model.device), micro_tokens


def share_of(batch: Batch) -> Batch:
    """The rows of a step's batch that this process takes."""
    rows = distributed.rows_of_rank(len(batch.ids) // batch.row_length)
    return batch.part(slice(rows.start * batch.row_length, rows.stop * batch.row_length))


SMALLER = "Take a smaller preset, or lower --model.context, --model.n_layer or --model.d_model."


def accumulate_within_memory(
    job: Job,
    batch: Batch,
    micro_tokens: int,
    last: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[float, int]:
    """`accumulate`; when memory runs out, the same batch again in micro-batches of half the size,
    and when there is but one row in them, with more of its activations recomputed.
    """
    model = job.model
    while True:
        try:
            return accumulate(model, batch, micro_tokens, last=last), micro_tokens
        except RuntimeError as error:
            if not hardware.is_out_of_memory(error):
                raise
            more = more_of(model.recomputed_blocks, model)
            if micro_tokens <= batch.row_length and more is None:
                raise UserError(
                    f"Out of memory with one row of {batch.row_length} tokens. {SMALLER}"
                ) from error
        job.optimizers.zero_grad()
        hardware.free_memory(model.device)
        if micro_tokens > batch.row_length:
            micro_tokens = max(batch.row_length, micro_tokens // 2)
        else:
            model.recomputed_blocks = more
        log.say(
            f"Memory ran out: the micro-batch is {micro_tokens} tokens from here on, activations "
            f"recomputed: {in_words(model.recomputed_blocks, model)}. Tokens per step stay "
            "the same."
        )


def update_within_memory(job: Job) -> None:
    """The optimizers' step; where memory runs out, what torch keeps unused is given back and the
    weights that were not updated yet are.
    """
    device = job.model.device
    for again in (False, True):
        try:
            return job.optimizers.step()
        except RuntimeError as error:
            if not hardware.is_out_of_memory(error):
                raise
            if again or not job.optimizers.can_continue:
                raise UserError(f"Out of memory in the optimizer's step. {SMALLER}") from error
        hardware.free_memory(device)
        log.say("Memory ran out in the optimizer's step, which continues where it was.")
    return None


def look_within_memory(job: Job, what: str, look: Callable[[], Any]) -> Any:
    """What `look` makes of the weights meant for use; None, and a line in the log, where memory
    runs out a second time: a run does not end for want of an evaluation.
    """
    for _ in range(2):
        try:
            with job.optimizers.inference_weights():
                return look()
        except RuntimeError as error:
            if not hardware.is_out_of_memory(error):
                raise
        hardware.free_memory(job.model.device)
    log.say(f"Memory ran out: no {what} at this step.")
    return None


def fit_micro_batch(job: Job) -> int:
    """The micro-batch to start with, in tokens; sets what of the model's activations is computed
    again.

    On a card the rows of the plan are run and the fastest that fits is taken. On a CPU memory is
    only estimated.
    """
    model, loop = job.model, job.loop
    plan = make_plan(
        model,
        job.optimizers,
        loop,
        stages=[(job.batches.context, 1.0)],
        n_steps=job.batches.n_steps,
        n_ranks=distributed.n_ranks(),
    )
    if model.device.type == "cuda":
        rows = plan.candidates(loop.micro_batch_tokens)
        measure(plan, rows, model, job.optimizers, seconds=60, until_no_gain=True)
    row = plan.choose(loop.micro_batch_tokens, model.device)
    model.recomputed_blocks = row.recomputed
    recomputed = in_words(row.recomputed, model)
    told = "" if recomputed == "none" else f", activations recomputed: {recomputed}"
    log.say(f"micro-batch {row.n_rows} rows of {row.context} tokens{told}")
    if not row.fits(plan.room):
        log.say(
            f"It takes about {row.memory.peak / GIB:.1f} GiB; a run here should fill "
            f"{plan.room / GIB:.1f} GiB."
        )
    return row.tokens


def speed(
    job: Job, progress: Progress, stage: int, typical: float, peak: float
) -> dict[str, float]:
    """Tokens a second, model FLOPs utilisation, peak memory of this stage of the curriculum and
    time left, from the median step time in seconds.
    """
    rate = job.loop.tokens_per_step / typical
    return {
        "seconds": progress.seconds,
        "tokens_per_second": rate,
        "mfu": rate * job.model.flops_per_token(job.batches.context_of(stage)) / peak,
        "memory_gb": hardware.memory_in_use(job.model.device),
        "eta_seconds": (job.batches.n_steps - progress.step) * typical,
    }


def state_of(progress: Progress, steps: int) -> dict[str, Any]:
    return {**asdict(progress), "steps": steps}


def report(job: Job, step: int, run_log: log.RunLog) -> None:
    """Evaluate with the weights meant for use; the figures go to the console and to
    `metrics.jsonl`.
    """
    held_out = look_within_memory(job, "evaluation", job.evaluate)
    if held_out is None:
        return
    run_log.note("eval", step, **held_out)
    log.say(
        f"held out at step {step}: "
        + " | ".join(f"{name} {value:.4f}" for name, value in held_out.items())
    )


def show_samples(job: Job, progress: Progress, run_log: log.RunLog) -> None:
    for prompt, text in look_within_memory(job, "sample", job.sample) or []:
        run_log.note("sample", progress.step, tokens=progress.tokens, prompt=prompt, text=text)
        log.say(f"sample at step {progress.step}: {prompt!r} → {text!r}")


class Power:
    """What the hardware tells of its power, energy and temperature; nothing where it does not."""

    def __init__(self, device: torch.device) -> None:
        self.meter, self._joules, self._at = hardware.EnergyMeter(device), 0.0, time.monotonic()

    def figures(self, progress: Progress) -> dict[str, float]:
        """Watts since the last call, kWh of the whole run so far, degrees Celsius; all processes
        together, and nothing where one of them has no counter.
        """
        joules, at, found = self.meter.joules(), time.monotonic(), {}
        # every process asks, also one that was told nothing: the others wait for its answer
        n_told = distributed.total(float(joules is not None), self.meter.device)
        mine = 0.0 if joules is None else joules - self._joules
        drawn = distributed.total(mine, self.meter.device)
        if joules is not None and n_told == distributed.n_ranks():
            progress.joules += drawn
            found = {"watts": drawn / max(1e-9, at - self._at), "kwh": progress.joules / 3.6e6}
            self._joules, self._at = joules, at
        temperature = self.meter.temperature()
        return found if temperature is None else found | {"temperature_c": temperature}


class Clock:
    """The median of the last 20 steps' seconds, and when the next checkpoint is due."""

    def __init__(self, save_every_minutes: float) -> None:
        self._recent: list[float] = []
        self._save_every = save_every_minutes * 60
        self._last_save = time.monotonic()

    def step(self, seconds: float) -> None:
        self._recent = [*self._recent[-19:], seconds]

    @property
    def typical(self) -> float:
        return sorted(self._recent)[len(self._recent) // 2]

    def save_is_due(self) -> bool:
        return time.monotonic() - self._last_save > self._save_every

    def saved(self) -> None:
        self._last_save = time.monotonic()


def hang_up() -> int:
    """The signal of a terminal that closes; on Windows that of its window, and of Ctrl-Break."""
    return signal.SIGHUP if hasattr(signal, "SIGHUP") else signal.SIGBREAK


class StopSignal:
    """SIGINT, SIGTERM and SIGHUP noted instead of obeyed at once; a second one is obeyed.

    One that the process was started to ignore, as by nohup, stays ignored.
    """

    def __enter__(self) -> StopSignal:
        self.number, self._when = 0, 0.0  # of the first signal that came
        asking = {signal.SIGINT, signal.SIGTERM, hang_up()}
        asking = [s for s in asking if signal.getsignal(s) != signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._note) for s in asking}
        return self

    def _note(self, number: int, frame: object) -> None:
        if self.number:
            # a terminal that closes sends several, and torchrun passes on what came already
            repeated = number == hang_up() or (
                distributed.n_ranks() > 1 and time.monotonic() < self._when + 10
            )
            if not repeated:
                raise KeyboardInterrupt
            return
        self.number, self._when = number, time.monotonic()
        log.say("Finishing this step, then saving; once more to stop at once.")

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""How a run fills its machine: the peak memory of a micro-batch, estimated and measured; its speed;
the choice.

In: a model, its optimizers, the settings of the loop. Out: a `Plan`: a row for each size of a
micro-batch and each part of the activations that may be recomputed, one of them chosen. Knows
nothing of data: what it measures are random tokens.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from config import Config, LoopConfig, UserError, settled
from hearth import hardware, log
from hearth.training.batches import Batch
from hearth.training.gradients import backward
from hearth.training.optim import Muon, Optimizers
from model import (
    DOORS,
    LOGITS_PER_CHUNK,
    ROWS_PER_CHUNK,
    Block,
    HRMModule,
    Model,
    attend_in_blocks,
    compute_dtype,
    query_block,
)

GIB = 2**30
# tokens of a micro-batch beyond which there is no more speed
LARGEST = {"cpu": 2**14, "cuda": 2**17, "mps": 2**15}
# share of the memory that a run may fill; where it is the machine's, others want it too
FILLED = {"cpu": 0.5, "cuda": 0.9, "mps": 0.7}
# share of the peak that a step is taken to reach where nothing was timed, what it computes twice
# included
UTILISATION = 0.4

# ----------------------------------------------------------------------- what is computed twice


def more_of(n: int, model: Model) -> int | None:
    """The next step on the way from no block to all, by quarters; None where all are recomputed."""
    n_blocks = len(model.blocks)
    return None if n == n_blocks else min(n_blocks, n + -(-n_blocks // 4))


def share_recomputed(n: int, model: Model) -> float:
    """Of a forward pass, by the weights it multiplies with."""
    first, passes = {id(block) for block in model.blocks[:n]}, model.block_passes()
    weights = [sum(p.numel() for p in block.parameters()) for block in passes]
    again = (w for w, block in zip(weights, passes, strict=True) if id(block) in first)
    return sum(again) / sum(weights)


def in_words(n: int, model: Model) -> str:
    """none, all, or such as 4 of 15."""
    n_blocks = len(model.blocks)
    return {0: "none", n_blocks: "all"}.get(n, f"{n} of {n_blocks}")


# ---------------------------------------------------------------------------------------- estimated


@dataclass(frozen=True)
class Memory:
    """Peak memory of a training step in bytes, by what it holds."""

    weights: int
    gradients: int  # while a micro-batch runs: none before the first one of a step
    optimizer: int  # its state
    activations: int  # kept for the backward pass
    # what a block's backward pass takes, with the activations that are recomputed for it
    block: int
    loss: int  # gradient of the embedding, and a chunk of logits
    update: int  # temporary matrices of the optimizer
    # what it takes at its end, where the first blocks are recomputed and all gradients there
    last_block: int = 0

    @property
    def peak(self) -> int:
        """The most that is alive at once: at the loss, at the end of the backward pass, or in the
        update.
        """
        at_loss = self.gradients + self.activations + max(self.loss, self.block)
        at_end = self.weights + max(self.block, self.last_block)
        return max(self.weights + self.optimizer + max(at_loss, at_end), self.at_update)

    @property
    def at_update(self) -> int:
        """What the optimizer's step takes, with all gradients there."""
        return 2 * self.weights + self.optimizer + self.update


def estimate_memory(
    model: Model,
    optimizers: Optimizers,
    *,
    n_rows: int,
    context: int,
    recomputed: int,
    accumulates: bool,
    on_card: bool,
) -> Memory:
    """Peak memory of a training step with micro-batches of `n_rows` rows of `context` tokens, one
    document a row, on a card or on a CPU, wherever the model lies.

    With N tokens in the micro-batch, P parameters, V vocab_size, D d_model, F d_ff, s bytes an
    activation (4 in float32, 2 in bfloat16):

        weights, gradients   4 P each, in float32; gradients are there from the second
                             micro-batch of a step on, those of head and embedding from the second
                             cycle of deep supervision on
        optimizer            4 P under Muon, 8 P under AdamW, for bigrams next to nothing:
                             `Optimizers.state_bytes`
        activations          8 N D for the embedding, 3 s N D for the output, 3 s N D for each
                             call of the HRM head,
                             s `block_elements` for each pass of a block, or s N D for one that is
                             recomputed
        block                2 s N F while one block's gradient is made, and 4 V D: the embedding's
                             gradient, waiting for that of its first use; one that is recomputed,
                             less those behind it, whose activations are gone by then, and, of a
                             first micro-batch, with their gradients
        loss                 `loss_bytes`
        update               Muon: `muon_bytes`

    What the driver, the allocator, the interpreter and, inside of themselves, kernels take comes on
    top. A block compiled on a card keeps less than this says.
    """
    c, s = model.config, model.dtype.itemsize
    N, D, V = n_rows * context, c.d_model, c.vocab_size
    x = s * N * D
    varlen = on_card and DOORS.get((model.device.type, model.dtype)) is not attend_in_blocks
    muons = [part for part in optimizers.parts if isinstance(part, Muon)]

    def kept(block: Block) -> int:
        return s * block_elements(block, n_rows, context, varlen=varlen)

    first = model.blocks[:recomputed]
    passes = [*model.trunk, *(block for module in kept_calls(model) for block in module.blocks)]
    inside, again = kept_by_passes(passes, first, kept, x, accumulates=accumulates)
    beside = 8 * N * D + 3 * x * (1 + len(kept_calls(model)))
    a_gradient = 2 * s * N * c.d_ff + 4 * V * D
    weights = 4 * model.n_parameters()
    return Memory(
        weights=weights,
        gradients=weights if accumulates else gradients_between_cycles(model),
        optimizer=optimizers.state_bytes(),
        activations=beside + inside + (0 if varlen else mask_bytes(model, n_rows, context)),
        block=again + a_gradient,
        last_block=max(map(kept, first), default=0) + a_gradient,
        loss=loss_bytes(N, V, D, s, on_card=on_card),
        update=max((muon_bytes(muon, on_card) for muon in muons), default=0),
    )


def loss_bytes(N: int, V: int, D: int, s: int, *, on_card: bool) -> int:
    """What the loss of N tokens takes: 4 V D for the embedding's gradient, 4 V D for a chunk's part
    of it, a chunk of logits; in bfloat16 (s = 2) half as much again for their copies.
    """
    logits = 4 * V * min(N, LOGITS_PER_CHUNK // V if on_card else ROWS_PER_CHUNK)
    return 4 * V * D + (logits + 4 * V * D if s == 4 else logits * 3 // 2 + 6 * V * D)


def kept_by_passes(
    passes: Sequence[Block],
    first: Sequence[Block],
    kept: Callable[[Block], int],
    x: int,
    *,
    accumulates: bool,
) -> tuple[int, int]:
    """Bytes that passes keep for the backward pass, of the `first` blocks, which are recomputed,
    their input x alone; and what such a one takes then beyond those behind it, which are gone, but
    have left their gradients in a first micro-batch.
    """
    recomputed = {id(block) for block in first}
    held = again = gradients = 0
    for block in reversed(passes):
        if id(block) in recomputed:
            again = max(again, kept(block) - held + (0 if accumulates else gradients))
        held += x if id(block) in recomputed else kept(block)
        gradients += 4 * sum(p.numel() for p in block.parameters())
    return held, again


def block_elements(block: Block, n_rows: int, context: int, *, varlen: bool) -> int:
    """What the graph of one pass through a block keeps: a token's norms (4 D), heads (A + 2K, A +
    K), attention's queries and output, twice A more where a token's own value is excluded, the MLP
    (2 F, or 4 F with a gate); without varlen attention
    the keys and values that are copied for each block of queries; the weights that were laid one
    under the other. A and K are the widths of all query heads and all key heads.
    """
    D, A, K, F = block.q.shape[1], len(block.q), len(block.k), len(block.up)
    gated = block.gate is not None
    heads = (4 if varlen else 5) + (2 if block.exclusion is not None else 0)
    tokens = n_rows * context * (4 * D + heads * A + 3 * K + (4 if gated else 2) * F)
    copies = (
        0
        if varlen
        else n_rows * 2 * K * sum(keys for _, keys in query_blocks(context, block.window))
    )
    return tokens + copies + D * (A + 2 * K) + (2 * D * F if gated else 0)


def mask_bytes(model: Model, n_rows: int, context: int) -> int:
    """The masks of attention in blocks, one for each window, shared by all passes."""
    windows = {block.window for block in model.block_passes()}
    pairs = sum(
        queries * keys for window in windows for queries, keys in query_blocks(context, window)
    )
    return model.dtype.itemsize * n_rows * pairs


def query_blocks(context: int, window: int | None) -> list[tuple[int, int]]:
    """Queries and keys of each piece of a row that `attend_in_blocks` takes at once."""
    size = query_block(window)
    pieces = []
    for start in range(0, context, size):
        end = min(start + size, context)
        first = 0 if window is None else max(0, start - window + 1) // size * size
        pieces.append((end - start, end - first))
    return pieces


def kept_calls(model: Model) -> list[HRMModule]:
    """The module calls of the HRM head whose graphs are alive at once."""
    if model.head is None:
        return []
    hrm = model.head.hrm
    a_cycle = [model.head.fast] * hrm.l_cycles + [model.head.slow]
    return a_cycle * (1 if hrm.deep_supervision else hrm.h_cycles)


def gradients_between_cycles(model: Model) -> int:
    """The gradients that one cycle of deep supervision leaves to the next, in bytes."""
    if model.head is None or not model.head.hrm.deep_supervision or model.head.hrm.h_cycles == 1:
        return 0
    return 4 * (model.embedding.numel() + sum(p.numel() for p in model.head.parameters()))


def muon_bytes(muon: Muon, on_card: bool) -> int:
    """Temporary matrices of one update: six float32 copies of the largest group of equal shapes;
    on a card, which orthogonalises in bfloat16, two and five half as large.
    """
    groups = (sum(4 * p.numel() for p in group["params"]) for group in muon.param_groups)
    return int((4.5 if on_card else 6) * max(groups, default=0))


# ----------------------------------------------------------------------------------------- measured


@contextmanager
def peak_memory(device: torch.device, held: int) -> Iterator[list[int]]:
    """Inside, tensors are counted; afterwards the list holds the most bytes that were alive at
    once.

    On a card as its allocator counts them; on an Apple chip what its driver then holds; on a CPU as
    torch's profiler sees them come and go, on top of the `held` bytes that are there before.
    """
    found: list[int] = []
    if device.type != "cpu":
        hardware.reset_peak_memory(device)
        yield found
        found.append(round(1e9 * hardware.memory_in_use(device)))
        return
    # the profiler's library would tell of its comings and goings
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    # without acc_events torch 2.11 warns that it keeps one cycle's events, of which there is but
    # one
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        yield found
    alive = peak = held
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    found.append(peak)


def held_bytes(model: Model, optimizers: Optimizers) -> int:
    """Bytes of the weights, their gradients and the optimizers' state as they are now."""
    tensors = (t for p in model.parameters() for t in (p, p.grad) if t is not None)
    return sum(t.nbytes for t in tensors) + state_bytes_now(optimizers)


def random_batch(model: Model, n_tokens: int, row_length: int) -> Batch:
    """Random tokens, one document a row: no real batch takes more memory or attends further."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (n_tokens + 1,), generator=rng)
    starts = torch.arange(n_tokens) % row_length == 0
    return Batch(ids[:-1], ids[1:], torch.ones(n_tokens), starts, row_length)


def run_pass(model: Model, batch: Batch) -> float:
    """One micro-batch there and back; gives the seconds it took."""
    started = time.perf_counter()
    # reading it waits for a card
    float(backward(model, batch.to(model.device), 1 / len(batch.ids)))
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------------- a plan


@dataclass
class Row:
    """One way to run a step, and what is known of it."""

    n_rows: int  # in a micro-batch, of `context` tokens each
    context: int
    recomputed: int  # blocks, the first ones
    memory: Memory  # estimated
    peak: int | None = None  # measured, in bytes
    seconds: dict[int, float] = field(default_factory=dict)  # of a micro-batch, by context
    watts: float | None = None
    too_large: bool = False  # memory ran out when it was tried

    @property
    def tokens(self) -> int:
        return self.n_rows * self.context

    def fits(self, room: int) -> bool:
        """Whether its memory, measured where it was, stays within `room` bytes."""
        return not self.too_large and (self.memory.peak if self.peak is None else self.peak) <= room


@dataclass
class Plan:
    """All rows, and what they have in common."""

    rows: list[Row]
    stages: Sequence[tuple[int, float]]  # context and share of the tokens
    n_tokens: int  # of the whole run
    tokens_per_step: int
    flops: dict[int, float]  # a token, by context
    peak_flops: float
    room: int  # bytes that a run may fill
    update_seconds: float = 0.0  # of the optimizer, once a step
    update_peak: int | None = None  # bytes during it, measured

    def seconds_of(self, row: Row) -> float | None:
        """Seconds of the whole run; a context that was not measured is taken to reach the same
        share of the peak.
        """
        if not row.seconds:
            return None
        known = max(row.seconds)
        total = 0.0
        for context, share in self.stages:
            a_pass = row.seconds.get(
                context, row.seconds[known] * self.flops[context] / self.flops[known]
            )
            total += (
                share
                * self.n_tokens
                * (a_pass / row.tokens + self.update_seconds / self.tokens_per_step)
            )
        return total

    def mfu_of(self, row: Row) -> float:
        flops = sum(share * self.n_tokens * self.flops[context] for context, share in self.stages)
        return flops / self.seconds_of(row) / self.peak_flops

    def candidates(self, fixed: int | None) -> list[Row]:
        """The rows to choose from, where the user may have set the micro-batch: `fixed` tokens."""
        if fixed is None:
            return self.rows
        return [row for row in self.rows if row.n_rows == max(1, fixed // row.context)]

    def choose(self, fixed: int | None, device: torch.device) -> Row:
        """The row to run with; `fixed` is the micro-batch in tokens where the user set it.

        On a card the fastest that was run whole and fits, and of those within 1% the smallest. On
        a CPU the largest that recomputes least, by its estimated memory alone: a choice that no
        clock has a say in is the same at every start, and so is the result, bit for bit.
        """
        rows, on_card = self.candidates(fixed), device.type == "cuda"
        if on_card:
            tried = [row for row in rows if row.peak is not None and row.fits(self.room)]
        else:
            tried = []
        if tried:
            fastest = min(self.seconds_of(row) for row in tried)
            as_fast = [row for row in tried if self.seconds_of(row) <= 1.01 * fastest]
            return min(as_fast, key=lambda row: row.memory.peak)
        able = [row for row in rows if row.memory.peak <= self.room and not on_card]
        if not able:
            return min(rows, key=lambda row: row.memory.peak)
        return min(able, key=lambda row: (row.recomputed, -row.n_rows))


def make_plan(
    model: Model,
    optimizers: Optimizers,
    loop: LoopConfig,
    *,
    stages: Sequence[tuple[int, float]],
    n_steps: int,
    n_ranks: int = 1,
    card: hardware.Card | None = None,
) -> Plan:
    """Every micro-batch worth a look, its memory estimated; nothing is run yet. `stages` are
    contexts and shares. With `card` as on that card, which nobody else uses; else for this machine.
    """
    device, context = model.device, max(context for context, _ in stages)
    kind = "cuda" if card else device.type
    peak = card.tflops * 1e12 if card else hardware.peak_flops(device, model.dtype)
    memory = card.gib * GIB if card else hardware.memory_limit(device)
    a_rank = loop.tokens_per_step // n_ranks
    most = max(1, min(a_rank, LARGEST[kind]) // context)
    sizes = {2**n for n in range(most.bit_length())}
    if loop.micro_batch_tokens:
        sizes.add(max(1, loop.micro_batch_tokens // context))
    room = int(FILLED[kind] * memory / (n_ranks if kind == "cpu" else 1))

    def row_of(n_rows: int, recomputed: int) -> Row:
        estimated = estimate_memory(
            model,
            optimizers,
            n_rows=n_rows,
            context=context,
            recomputed=recomputed,
            accumulates=n_rows * context < a_rank,
            on_card=kind != "cpu",
        )
        return Row(n_rows, context, recomputed, estimated)

    rows = []
    for n_rows in sorted(sizes):
        rows += rows_of_size(partial(row_of, n_rows), model, room)
    rows.sort(key=lambda row: share_recomputed(row.recomputed, model))
    return Plan(
        rows,
        stages,
        n_steps * loop.tokens_per_step,
        loop.tokens_per_step,
        {length: model.flops_per_token(length) for length, _ in stages},
        peak,
        room,
    )


def rows_of_size(row: Callable[[int], Row], model: Model, room: int) -> list[Row]:
    """No block and all recomputed; where none does not fit, as few as do."""
    n_blocks = len(model.blocks)
    few = () if row(0).fits(room) else range(1, n_blocks)
    fewest = next((n for n in few if row(n).fits(room)), n_blocks)
    return [row(n) for n in dict.fromkeys((0, fewest, n_blocks))]


def assume_speed(plan: Plan, model: Model, card: hardware.Card) -> None:
    """Note for each row that fits what `card` would take at `UTILISATION` and its board power."""
    for row in plan.rows:
        if row.fits(plan.room):
            # a third of a step is forward
            share = share_recomputed(row.recomputed, model)
            rate = UTILISATION * plan.peak_flops / (1 + share / 3)
            row.seconds = {length: row.tokens * f / rate for length, f in plan.flops.items()}
            row.watts = float(card.watts)


def measure(
    plan: Plan,
    rows: Sequence[Row],
    model: Model,
    optimizers: Optimizers,
    *,
    seconds: float,
    until_no_gain: bool = False,
) -> None:
    """Run a micro-batch of each of `rows`, the smallest first, and note memory and time; about
    `seconds` in all, compilation left out.

    Rows whose estimated memory is far beyond the room, or which would take longer than the time
    left, stay unmeasured; with `until_no_gain` also those that cannot be the fastest, as
    `could_win` says. Weights and optimizer state are left as they are.
    """
    left = seconds
    rate = UTILISATION * plan.peak_flops  # FLOPs per second, until a pass was timed
    before = model.recomputed_blocks
    missing = optimizers.state_bytes() - state_bytes_now(optimizers)
    rows = rows if until_no_gain else sorted(rows, key=lambda row: row.tokens)
    for row in rows:
        if row.memory.peak > 1.2 * plan.room or (until_no_gain and not could_win(row, rows, plan)):
            continue
        model.recomputed_blocks = row.recomputed
        for context in sorted({context for context, _ in plan.stages}, reverse=True):
            work = row.tokens * plan.flops[context]
            # of a fit one is run in any case: what was not run is not chosen
            needed = until_no_gain and not any(other.seconds for other in rows)
            if work / rate > left and not needed:
                break
            twice = is_compiled(model) or 2 * work / rate < left
            try:
                row.seconds[context] = time_pass(row, context, plan, model, optimizers, twice=twice)
            except RuntimeError as error:
                if not hardware.is_out_of_memory(error):
                    raise
                row.too_large = True
                break
            rate = work / row.seconds[context]
            left -= row.seconds[context] * (2 if twice else 1)
        if row.peak is not None:
            row.peak = max(row.peak + missing, plan.update_peak or row.memory.at_update)
        optimizers.zero_grad()
        hardware.free_memory(model.device)
    model.recomputed_blocks = before
    if not until_no_gain and not any(row.seconds or row.too_large for row in rows):
        time_short_pass(plan, rows[0], model, optimizers, rate * seconds)


def could_win(row: Row, rows: Sequence[Row], plan: Plan) -> bool:
    """Whether a row could be faster than those that were run: to recompute more pays only where it
    lets more tokens in at once, and that only while the last doubling did.
    """
    fit = [other for other in rows if other.peak is not None and other.fits(plan.room)]
    for fewer, more in itertools.pairwise(fit):
        same = fewer.recomputed == more.recomputed
        if same and plan.seconds_of(more) > 0.99 * plan.seconds_of(fewer):
            return False
    return all(row.n_rows > other.n_rows for other in fit)


def is_compiled(model: Model) -> bool:
    return any(block.compiled for block in model.trunk)


def time_short_pass(
    plan: Plan, row: Row, model: Model, optimizers: Optimizers, flops: float
) -> None:
    """The time of a pass too long to wait for, told by one row of the shortest context if `flops`
    suffice.
    """
    context = min(context for context, _ in plan.stages)
    if row.memory.peak < plan.room and context * plan.flops[context] <= flops:
        seconds = run_pass(model, random_batch(model, context, context))
        row.seconds[context] = seconds * row.tokens / context
        optimizers.zero_grad()


def time_pass(
    row: Row, context: int, plan: Plan, model: Model, optimizers: Optimizers, *, twice: bool
) -> float:
    """Seconds of a micro-batch in rows of `context`; its memory and power go into `row`."""
    batch = random_batch(model, row.tokens, context)
    optimizers.zero_grad()
    if row.memory.gradients:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    with peak_memory(model.device, held_bytes(model, optimizers)) as found:
        seconds = run_pass(model, batch)
    row.peak = max(row.peak or 0, found[0])
    if twice:  # the first one compiled and warmed up
        if not row.memory.gradients:
            optimizers.zero_grad()
        meter = hardware.EnergyMeter(model.device)
        seconds = run_pass(model, batch)
        row.watts = meter.watts() or row.watts
    return seconds


def state_bytes_now(optimizers: Optimizers) -> int:
    """Bytes of the optimizers' state that are there already."""
    states = (state for part in optimizers.parts for state in part.state.values())
    return sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor))


def time_update(plan: Plan, model: Model, optimizers: Optimizers) -> None:
    """Note the memory and the seconds of an optimizer step; changes the weights."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.step()  # makes the state, and warms up
    with peak_memory(model.device, held_bytes(model, optimizers)) as found:
        optimizers.step()
    plan.update_peak = found[0]
    started = time.perf_counter()
    optimizers.step()
    float(model.output_gain.detach()[0])  # waits for a card
    plan.update_seconds = time.perf_counter() - started
    optimizers.zero_grad()


# -------------------------------------------------------------------------------------------- shown


def table(plan: Plan, chosen: Row, model: Model) -> list[str]:
    """The plan as lines of text, the chosen row marked."""
    has_power = any(row.watts for row in plan.rows)
    head = f"    {'micro-batch':>18}  {'recompute':<15}  {'GiB estimated':>12}  {'measured':>8}"
    lines = [
        head + f"  {'tokens/s':>8}  {'MFU':>5}  {'time':>7}" + ("      kWh" if has_power else "")
    ]

    def gib(n_bytes: int | None, width: int) -> str:
        return f"{'–' if n_bytes is None else f'{n_bytes / GIB:.3g}':>{width}}"

    for row in plan.rows:
        size = f"{row.n_rows} × {row.context} = {log.count(row.tokens)}"
        mark = ">" if row is chosen else " "
        line = f"  {mark} {size:>18}  {in_words(row.recomputed, model):<15}"
        line += f"  {gib(row.memory.peak, 12)}  {gib(row.peak, 8)}"
        seconds = plan.seconds_of(row)
        if seconds is not None:
            speed = log.count(plan.n_tokens / seconds)
            line += f"  {speed:>8}  {plan.mfu_of(row):5.1%}  {log.duration(seconds):>7}"
            if row.watts:
                line += f"  {row.watts * seconds / 3.6e6:7.2f}"
        elif not row.fits(plan.room):
            line += "  does not fit"
        lines.append(line.rstrip())
    return lines


# ------------------------------------------------------------------------ is this a machine for it

LONG = 2 * 86_400  # seconds of pretraining on a CPU from which on a preset is said to need a card


def seconds_on_cpu(config: Config) -> float:
    """What pretraining takes on this processor, estimated at `UTILISATION` of its measured peak."""
    with torch.device("meta"):
        model = Model(config.model)
    loop, cpu = settled(config).pretrain, torch.device("cpu")
    flops = sum(stage.share * model.flops_per_token(stage.context) for stage in loop.stages)
    peak = hardware.peak_flops(cpu, compute_dtype(cpu, config.model.d_model))
    return loop.steps * loop.tokens_per_step * flops / (UTILISATION * peak)


def card_wanted(config: Config) -> str | None:
    """What to say where training would take days for want of a card; None where it would not."""
    if hardware.pick_device(config.device).type != "cpu":
        return None
    if (seconds := seconds_on_cpu(config)) <= LONG:
        return None
    return (
        f"Preset {config.preset} is made for an NVIDIA card, and torch finds none here: on "
        f"this processor pretraining would take about {log.duration(seconds)} (estimated). "
        "Take --preset demo, which any laptop walks in minutes, or add --device cpu to go "
        "ahead all the same, for instance to prepare the data for another machine."
    )


def require_able_machine(config: Config) -> None:
    """Raises UserError with what `card_wanted` says, unless the CPU was asked for."""
    if config.device != "cpu" and (said := card_wanted(config)):
        raise UserError(said)

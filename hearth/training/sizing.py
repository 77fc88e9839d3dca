"""How large a model a number of hours on this machine is best spent on: `--hours`.

In: a config, hours, a device. Out: the depth, the tokens, and what a second trains. Knows no data.
The size is the largest that still reads `TOKENS_PER_WEIGHT` tokens a weight, as the presets do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from config import TOKENS_PER_WEIGHT, Config, UserError, settled, shaped
from hearth import hardware
from hearth.training import attention, gradients
from hearth.training.batches import Batch
from hearth.training.optim import build_optimizers
from hearth.training.planning import estimate_memory
from model import DOORS, build_model

DEPTHS = (4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16, 18, 19, 21, 22, 24, 26)
SECONDS = 6.0  # spent on the clock of one size


@dataclass(frozen=True)
class Size:
    """A size that was timed: `depth` blocks trained on `tokens` in the hours there are."""

    depth: int
    n_weights: int
    tokens: int
    tokens_per_second: float

    @property
    def is_read_enough(self) -> bool:
        """Whether the hours give it the tokens that the rule asks for."""
        return self.tokens >= TOKENS_PER_WEIGHT * self.n_weights


def sizes(
    config: Config, hours: float, speed_of: Callable[[Config], float | None]
) -> Iterator[Size]:
    """The sizes from the smallest up to the first that the hours do not suffice for, or to the
    largest that runs.
    """
    for depth in DEPTHS:
        sized = replace(config, model=shaped(config.model, depth))
        speed = speed_of(sized)
        if speed is None:
            return
        size = Size(depth, sized.model.n_weights, int(speed * 3600 * hours), speed)
        yield size
        if not size.is_read_enough:
            return


def choose(config: Config, hours: float, device: torch.device) -> tuple[Config, list[Size]]:
    """The config with the largest size that the hours suffice for (else the smallest) and its
    tokens, and all that were timed.

    Raises UserError where not even the smallest has a step's time.
    """
    timed = list(sizes(config, hours, lambda sized: tokens_per_second(sized, hours, device)))
    if not timed:
        raise UserError(f"--hours {hours:g} is too short, or this machine has too little memory.")
    best = next((size for size in reversed(timed) if size.is_read_enough), timed[0])
    pretrain = replace(config.pretrain, tokens=best.tokens, steps=None)
    return replace(config, model=shaped(config.model, best.depth), pretrain=pretrain), timed


def tokens_per_second(config: Config, hours: float, device: torch.device) -> float | None:
    """What this machine trains a second with such a model; None where its memory is too small.

    A step is timed in its parts: passes over one row of each of the curriculum's contexts, and an
    update, which counts once a step.
    """
    loop = settled(config).pretrain
    model = build_model(config.model, seed=0, device=device)
    optimizers = build_optimizers(model, config.optim, loop.lr)
    memory = estimate_memory(
        model,
        optimizers,
        n_rows=1,
        context=config.model.context,
        recomputed=0,
        accumulates=True,
        on_card=device.type != "cpu",
    )
    if memory.peak > 0.8 * hardware.memory_limit(device):
        return None
    if (device.type, model.dtype) not in DOORS:
        attention.pick(model)
    if hardware.compiles(config.compile, device):
        model.compile_blocks()
    a_token = 0.0
    for stage in loop.stages:
        batch = random_row(config.model.vocab_size, config.model.context, stage.context)
        seconds = timed(lambda b=batch: gradients.accumulate(model, b, b.ids.numel()), device)
        a_token += stage.share * seconds / batch.ids.numel()
    update = timed(optimizers.step, device)
    # the batch follows from the tokens, the tokens from what a step costs
    batch_tokens = loop.tokens_per_step
    for _ in range(3):
        speed = 1 / (a_token + update / batch_tokens)
        tokens = max(1, int(speed * 3600 * hours))
        asked = replace(config, pretrain=replace(config.pretrain, tokens=tokens, steps=None))
        batch_tokens = settled(asked).pretrain.tokens_per_step
    return speed


def random_row(vocab_size: int, length: int, context: int) -> Batch:
    """A row of `length` random tokens in segments of `context`."""
    ids = torch.randint(0, vocab_size, (length + 1,), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(length) % context == 0
    return Batch(ids[:-1], ids[1:], torch.ones(length), starts, length)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few runs, in seconds; the first one, which compiles, is left out."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    taken = [once()]
    while sum(taken) < SECONDS / 4 and len(taken) < 20:
        taken.append(once())
    return min(taken)

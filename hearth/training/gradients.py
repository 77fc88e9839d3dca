"""The gradient of one step: a micro-batch's backward pass, accumulation, how far the HRM head's
gradient reaches.

In: a model, a batch. Out: gradients in the parameters, and the loss.
Knows no optimizer and no loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from config import HRMConfig
from hearth.training.batches import Batch
from model import Model, PackedSequences


@dataclass(frozen=True)
class HeadPlan:
    """What one step asks of the HRM head; the default is what `HRMConfig` says, with the whole
    gradient.
    """

    h_cycles: int | None = None  # H cycles that are run; None is as configured
    horizon: int | None = None  # module calls that keep their gradient; None is all
    # where the sample of tokens begins that deep supervision reads in the cycles before the last
    offset: int = 0


def backward(model: Model, micro: Batch, scale: float, plan: HeadPlan = HeadPlan()) -> Tensor:
    """Add the gradient of `scale` times the micro-batch's summed loss; gives that loss (of the last
    H cycle).
    """
    packed = PackedSequences(micro.starts, micro.row_length, model.device)
    weights = micro.weights * scale
    if model.head is not None and model.head.hrm.deep_supervision:
        return backward_by_cycle(model, micro, weights, packed, plan)
    hidden = model(micro.ids, packed, h_cycles=plan.h_cycles, horizon=plan.horizon)
    loss = model.loss(hidden, micro.targets, weights)
    loss.backward()
    return loss.detach()


def backward_by_cycle(
    model: Model, micro: Batch, weights: Tensor, packed: PackedSequences, plan: HeadPlan
) -> Tensor:
    """Deep supervision in bounded memory: the mean of the cycles' losses, one cycle's graph alive
    at a time; the trunk's gradient gathers in `leaf`.

    The cycles before the last read one token of `supervise_every`, weighted by as much: over all
    offsets the mean is the gradient of every token. Places count from the row's start, so the
    sample is the same in any micro-batch.
    """
    hrm = model.head.hrm
    x = model.run_trunk(micro.ids, packed)
    leaf = x.detach().requires_grad_()
    n_cycles, every = plan.h_cycles or hrm.h_cycles, hrm.supervise_every
    places = torch.arange(len(micro.ids), device=leaf.device) % micro.row_length
    sample = ((places + plan.offset) % every == 0).nonzero().squeeze(1)
    states = model.head.cycles(
        leaf,
        packed,
        h_cycles=n_cycles,
        detach=True,
        activation_checkpointing=model.activation_checkpointing,
    )
    for cycle, y in enumerate(states, start=1):
        if cycle == n_cycles or every == 1:
            loss = model.loss(y, micro.targets, weights)
        else:
            loss = model.loss(y[sample], micro.targets[sample], weights[sample] * every)
        (loss / n_cycles).backward()
    x.backward(leaf.grad)
    return loss.detach()


def accumulate(model: Model, batch: Batch, micro_tokens: int, plan: HeadPlan = HeadPlan()) -> float:
    """Gradient of the batch's mean loss over the tokens that carry it, micro-batch by micro-batch;
    gives that loss.
    """
    scale = 1.0 / max(1.0, float(batch.weights.sum()))
    parts = [
        backward(model, micro.to(model.device), scale, plan)
        for micro in batch.split(micro_tokens)
        if float(micro.weights.sum()) > 0
    ]
    return float(sum(parts))


def head_schedule(hrm: HRMConfig | None, seed: int, step: int, steps: int) -> HeadPlan:
    """The head's part in `step` of `steps`, a function of these alone."""
    if hrm is None:
        return HeadPlan()
    rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
    cycles = (
        int(torch.randint(1, hrm.random_cycles + 1, (), generator=rng))
        if hrm.random_cycles
        else hrm.h_cycles
    )
    offset = int(torch.randint(hrm.supervise_every, (), generator=rng))
    if hrm.gradient == "full":
        return HeadPlan(cycles, None, offset)
    if hrm.gradient == "one_step":
        # the last call of each module: the approximation of arXiv 2506.21734, section 2
        return HeadPlan(cycles, 2)
    warm = min(1.0, step / max(1.0, hrm.horizon_warmup * steps))
    return HeadPlan(cycles, min(hrm.horizon, 2 + int(warm * (hrm.horizon - 2))))

"""The gradient of one step: a micro-batch's backward pass, accumulation, how far the HRM head's gradient reaches.

In: a model, a batch. Out: gradients in the parameters, and the loss.
Knows no optimizer and no loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batches import Batch
from config import HRMConfig
from model import Model, Packed


def backward(model: Model, micro: Batch, scale: float, h_cycles: int | None, horizon: int | None) -> Tensor:
    """Add the gradient of `scale` times the micro-batch's summed loss; gives that loss (of the last H cycle)."""
    packed = Packed(micro.starts, micro.row_length, model.device)
    weights = micro.weights * scale
    if model.head is None or not model.head.hrm.deep_supervision:
        loss = model.loss(model(micro.ids, packed, h_cycles=h_cycles, horizon=horizon), micro.targets, weights)
        loss.backward()
        return loss.detach()
    # deep supervision in bounded memory: one cycle's graph is alive at a time, the trunk's gradient gathers in `leaf`
    x = model.run_trunk(micro.ids, packed)
    leaf = x.detach().requires_grad_()
    n_cycles = h_cycles or model.head.hrm.h_cycles
    for y in model.head.cycles(leaf, packed, h_cycles=n_cycles, detach=True, recompute=model.recompute):
        loss = model.loss(y, micro.targets, weights)
        (loss / n_cycles).backward()
    x.backward(leaf.grad)
    return loss.detach()


def accumulate(model: Model, batch: Batch, micro_tokens: int, h_cycles: int | None, horizon: int | None) -> float:
    """Gradient of the batch's mean loss over the tokens that carry it, micro-batch by micro-batch; gives that loss."""
    scale = 1.0 / max(1.0, float(batch.weights.sum()))
    parts = [
        backward(model, micro.to(model.device), scale, h_cycles, horizon)
        for micro in batch.split(micro_tokens)
        if float(micro.weights.sum()) > 0
    ]
    return float(sum(parts))


def head_schedule(hrm: HRMConfig | None, seed: int, step: int, steps: int) -> tuple[int | None, int | None]:
    """How many H cycles this step runs and how many module calls keep their gradient (None: as configured, all)."""
    if hrm is None:
        return None, None
    cycles = hrm.h_cycles
    if hrm.random_cycles:
        dice = torch.Generator().manual_seed(seed * 1_000_003 + step)
        cycles = int(torch.randint(1, hrm.random_cycles + 1, (), generator=dice))
    if hrm.gradient == "full":
        return cycles, None
    if hrm.gradient == "one_step":
        return cycles, 2  # the last call of each module: the approximation of arXiv 2506.21734, section 2
    warm = min(1.0, step / max(1.0, hrm.horizon_warmup * steps))
    return cycles, min(hrm.horizon, 2 + int(warm * (hrm.horizon - 2)))

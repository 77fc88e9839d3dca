"""The gradient of one step: a micro-batch's backward pass, and accumulation.

In: a model, a batch. Out: gradients in the parameters, and the loss.
Knows no optimizer and no loop.
"""

from __future__ import annotations

from torch import Tensor

from hearth.training.batches import Batch
from model import Model, PackedSequences


def backward(model: Model, micro: Batch, scale: float) -> Tensor:
    """Add the gradient of `scale` times the micro-batch's summed loss; gives that loss (of the last
    H cycle).
    """
    packed = PackedSequences(micro.starts, micro.row_length, model.device)
    weights = micro.weights * scale
    if model.head is not None and model.head.hrm.deep_supervision:
        return backward_by_cycle(model, micro, weights, packed)
    loss = model.loss(model(micro.ids, packed), micro.targets, weights)
    loss.backward()
    return loss.detach()


def backward_by_cycle(
    model: Model, micro: Batch, weights: Tensor, packed: PackedSequences
) -> Tensor:
    """Deep supervision in bounded memory: the mean of the cycles' losses, one cycle's graph alive
    at a time; the trunk's gradient gathers in `leaf`.
    """
    x = model.run_trunk(micro.ids, packed)
    leaf = x.detach().requires_grad_()
    for y in model.run_head(leaf, micro.ids, packed, detach=True):
        loss = model.loss(y, micro.targets, weights)
        (loss / model.head.hrm.h_cycles).backward()
    x.backward(leaf.grad)
    return loss.detach()


def accumulate(model: Model, batch: Batch, micro_tokens: int) -> float:
    """Gradient of the batch's mean loss over the tokens that carry it, micro-batch by micro-batch;
    gives that loss. A batch with a normaliser is divided by that one instead: its weights may have
    any sign and add up to zero.
    """
    scale = 1.0 / (batch.normaliser or max(1.0, float(batch.weights.sum())))
    parts = [
        backward(model, micro.to(model.device), scale)
        for micro in batch.split(micro_tokens)
        if bool(micro.weights.any())
    ]
    return float(sum(parts))

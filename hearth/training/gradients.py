"""The gradient of one step: a micro-batch's backward pass, and accumulation.

In: a model, a batch. Out: gradients in the parameters, and the loss.
Knows no optimizer and no loop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from hearth.training import attention
from hearth.training.batches import Batch
from model import Model, PackedSequences


def backward(model: Model, micro: Batch, scale: float) -> Tensor:
    """Add the gradient of `scale` times the micro-batch's summed loss; gives that loss (of the last
    H cycle).
    """
    packed = attention.packed(model, micro.starts, micro.row_length)
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


def accumulate(
    model: Model,
    batch: Batch,
    micro_tokens: int,
    *,
    last: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """Gradient of the batch's mean loss over the tokens that carry it, micro-batch by micro-batch;
    gives that loss. A batch with a normaliser is divided by that one instead: its weights may have
    any sign and add up to zero.

    last: entered where one backward pass makes every gradient whole: around the last micro-batch,
    unless deep supervision goes back several times.
    """
    scale = 1.0 / (batch.normaliser or max(1.0, float(batch.weights.sum())))
    micros = [micro for micro in batch.split(micro_tokens) if bool(micro.weights.any())]
    several = model.head is not None and model.head.hrm.deep_supervision
    total = 0.0
    for n, micro in enumerate(micros, start=1):
        with last() if n == len(micros) and not several else nullcontext():
            total = total + backward(model, micro.to(model.device), scale)
    return float(total)


def in_order_of_backward(model: Model) -> list[nn.Parameter]:
    """The parameters about as a backward pass makes their gradients: the head's, the trunk's from
    its last block on, the embedding's and the rest.
    """
    parts = [*model.trunk, *([model.head] if model.head else [])]
    found = [p for part in reversed(parts) for p in reversed(list(part.parameters()))]
    known = {id(p) for p in found}
    return found + [p for p in model.parameters() if id(p) not in known]

"""What a model makes of held-out batches: its loss, and what its HRM head adds.

In: a model, batches. Out: figures. Knows no optimizer, loop or file.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from hearth.training import attention
from hearth.training.batches import Batch
from model import AttentionContext, Model


@torch.no_grad()
def evaluate_loss(model: Model, batches: Iterable[Batch]) -> tuple[float, int]:
    """Summed cross-entropy in nats, and the number of tokens that it sums over."""
    total, count = 0.0, 0
    for batch in batches:
        batch = batch.to(model.device)
        packed = attention.packed(model, batch.starts, batch.row_length)
        total += float(model.loss(model(batch.ids, packed), batch.targets, batch.weights))
        count += int(batch.weights.sum())
    return total, count


@torch.no_grad()
def probe_head(
    model: Model, ids: Tensor, targets: Tensor, weights: Tensor, attn_ctx: AttentionContext
) -> dict[str, float]:
    """What the head does to a batch of held-out tokens (N,); nothing for a dense model.

    loss cycle c: cross-entropy in nats after c cycles, 0 the trunk alone. head last change: KL
    divergence in nats of the last two distributions. head L size, head H size: root mean square of
    each module's residual stream at its last call, before the norm that caps it. head time share:
    of the seconds of a forward pass without the loss.
    """
    if model.head is None:
        return {}
    stream: dict[str, Tensor] = {}
    modules = {"head L size": model.head.fast, "head H size": model.head.slow}
    hooks = [
        module.blocks[-1].register_forward_hook(
            lambda _, __, z, name=name: stream.update({name: z})
        )
        for name, module in modules.items()
        if module is not None
    ]
    seconds, hidden, started = [], [], time.perf_counter()
    for state in model.cycles(ids, attn_ctx):
        float(state[0, 0])  # waits for the device
        hidden.append(state)
        seconds.append(time.perf_counter() - started)
    for hook in hooks:
        hook.remove()
    counts = max(1.0, float(weights.sum()))
    figures = {
        f"loss cycle {c}": float(model.loss(y, targets, weights)) / counts
        for c, y in enumerate(hidden)
    }
    some = weights.nonzero().squeeze(1)[:1024]
    now, before = (model.logits(y[some]).log_softmax(dim=-1) for y in (hidden[-1], hidden[-2]))
    figures["head last change"] = float((now.exp() * (now - before)).sum(dim=-1).mean())
    figures |= {name: float(z.float().square().mean().sqrt()) for name, z in stream.items()}
    return figures | {"head time share": 1 - seconds[0] / seconds[-1]}

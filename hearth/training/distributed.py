"""Several processes that train one model together, each on its own card: `torchrun --nproc-per-node
2 pretrain.py …`.

Every process takes its share of a step's rows; gradients are summed once a step, after the last
micro-batch.
In: what torchrun puts into the environment. Knows nothing of models, data or the training loop.

Why not `DistributedDataParallel`: it sums while one backward pass of one forward pass runs. Here a
step has several of them (deep supervision goes back once a cycle), and rows without loss are left
out, on one process and not on the other. Summed once, none of that matters; what is lost is the
overlap with the last micro-batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(hours=6)  # that others wait for the first process, which alone evaluates


def n_ranks() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this is; the first one, 0, alone logs, saves and evaluates."""
    return int(os.environ["RANK"]) if n_ranks() > 1 else 0


def command(one: str) -> str:
    """The command `one`, `uv run SCRIPT …`, as it is for as many processes as these."""
    several = f"uv run torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', n_ranks())} "
    return one if n_ranks() == 1 else one.replace("uv run ", several, 1)


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Inside, the processes can reach each other; they leave together."""
    if n_ranks() == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def rows_of_rank(n_rows: int) -> range:
    """The rows of a step that this process takes."""
    return range(rank() * n_rows // n_ranks(), (rank() + 1) * n_rows // n_ranks())


def sum_gradients(parameters: Iterable[torch.nn.Parameter], weight: float) -> None:
    """Every gradient becomes the sum, over all processes, of `weight` times theirs; none where
    nobody has one.
    """
    parameters = list(parameters)
    there = torch.tensor(
        [float(p.grad is not None) for p in parameters], device=parameters[0].device
    )
    dist.all_reduce(there)
    waiting = []
    for p, somebody_has in zip(parameters, there.tolist(), strict=True):
        if somebody_has:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.mul_(weight)
            waiting.append(dist.all_reduce(p.grad, async_op=True))
    for work in waiting:
        work.wait()


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes, those of the first one first; every one of them must ask."""
    if n_ranks() == 1:
        return items
    found: list[list[Any]] = [[] for _ in range(n_ranks())]
    dist.all_gather_object(found, items)
    return [item for part in found for item in part]


def total(value: float, device: torch.device) -> float:
    """The sum of `value` over all processes; every one of them must ask."""
    return _reduced(value, device, dist.ReduceOp.SUM)


def largest(value: float, device: torch.device) -> float:
    """The largest `value` of all processes; every one of them must ask."""
    return _reduced(value, device, dist.ReduceOp.MAX)


def _reduced(value: float, device: torch.device, operation: dist.ReduceOp) -> float:
    if n_ranks() == 1:
        return value
    held = torch.tensor(
        value, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device
    )
    dist.all_reduce(held, operation)
    return float(held)

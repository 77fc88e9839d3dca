"""Several processes that train or score one model together, each on its own card, on one machine or
on several: `torchrun --nproc-per-node 2 pretrain.py …`.

Every process takes its share of a step's rows. A gradient is summed over them as soon as the
backward pass of the step's last micro-batch has made it, while that pass runs on.
In: what torchrun puts into the environment. Knows nothing of models, data or the training loop.

Why not `DistributedDataParallel`: it sums while one backward pass of one forward pass runs. Here a
step has several of them (deep supervision goes back once a cycle), and rows without loss are left
out, on one process and not on the other.
"""

from __future__ import annotations

import math
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from config import UserError
from hearth import hardware, log

A, B = TypeVar("A"), TypeVar("B")

PATIENCE = timedelta(hours=6)  # that others wait for the first process, which alone evaluates
JOINING = timedelta(minutes=10)  # until all processes have come together
BEAT = 1.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one after which a process counts as dead
GRACE = 10.0  # seconds that a process has to end by itself where another one failed

_alone = False  # see `alone`


def n_ranks() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ and not _alone else 1


def rank() -> int:
    """Which of them this is; the first one, 0, alone logs, saves and evaluates."""
    return int(os.environ["RANK"]) if n_ranks() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process counts as the only one: for what the first one does while the others
    wait.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def command(one: str) -> str:
    """The command `one`, `uv run SCRIPT …`, as it is for as many processes as these, on the machine
    of this one.
    """
    if n_ranks() == 1:
        return one
    here = os.environ.get("LOCAL_WORLD_SIZE", str(n_ranks()))
    words = ["torchrun", "--nproc-per-node", here]
    if n_ranks() > int(here):
        words += ["--nnodes", str(n_ranks() // int(here))]
        words += ["--node-rank", os.environ.get("GROUP_RANK", "0")]
        words += ["--master-addr", os.environ["MASTER_ADDR"]]
        words += ["--master-port", os.environ["MASTER_PORT"]]
    return one.replace("uv run ", f"uv run {shlex.join(words)} ", 1)


# ------------------------------------------------------------------------------- one for all, all …


class Lost(RuntimeError):
    """Another process could not be reached."""


@contextmanager
def reaching() -> Iterator[None]:
    """Inside, what torch says of another process that is gone becomes `Lost`."""
    try:
        yield
    except RuntimeError as error:
        if hardware.is_out_of_memory(error):
            raise
        raise Lost(str(error)) from error


@contextmanager
def group(device: str) -> Iterator[None]:
    """Inside, the processes can reach each other; they leave together. Where one of them fails, is
    killed or falls silent, all end and say so. device: as in `hardware.pick_device`.
    """
    if n_ranks() == 1:
        yield
        return
    backend = "nccl" if hardware.pick_device(device).type == "cuda" else "gloo"
    store = joined()
    words = {"store": store, "rank": rank(), "world_size": n_ranks(), "timeout": PATIENCE}
    with Watch(store.clone()) as watch:
        try:
            with reaching():
                dist.init_process_group(backend, **words)
            try:
                yield
            finally:
                # a signal stops all of them after the same step
                if sys.exc_info()[0] in (None, SystemExit):
                    leave_together()
        except Lost as error:
            raise UserError(watch.reason(str(error))) from error
        except BaseException as error:
            watch.tell(error)
            raise
    dist.destroy_process_group()


def leave_together() -> None:
    with reaching():
        dist.barrier()


def joined() -> dist.Store:
    """The store that all processes share, once all of them have come.

    Raises UserError that names those that have not.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    remedy = (
        f"Start the same command on every machine, each with its own --node-rank, and see that "
        f"{place} can be reached from all of them."
    )
    n, store = n_ranks(), None
    try:
        store, *_ = next(dist.rendezvous("env://", rank(), n, timeout=JOINING))
        store.set(f"host/{rank()}", socket.gethostname())
        store.wait([f"host/{r}" for r in range(n)], JOINING)
    except RuntimeError as error:
        missing = "one of the others" if rank() == 0 else "rank 0"
        if store is not None:
            with suppress(RuntimeError):
                late = (str(r) for r in range(n) if not store.check([f"host/{r}"]))
                missing = f"rank {', '.join(late)}"
        minutes = JOINING.total_seconds() / 60
        said = f"Of {n} processes {missing} did not come within {minutes:.0f} minutes."
        raise UserError(f"{said} {remedy}") from error
    return store


class Watch(threading.Thread):
    """A thread that shows the other processes that this one lives, and ends it where one of them
    failed or shows no life: a process that waits for a card's result could wait for ever.
    """

    def __init__(self, store: dist.Store) -> None:
        super().__init__(name="watch", daemon=True)
        self.store, self.rank, self.n_ranks = store, rank(), n_ranks()
        self._over = threading.Event()
        self._said: str | None = None  # by the first process that failed
        self._counts = [-1] * self.n_ranks  # signs of life
        self._heard = [time.monotonic()] * self.n_ranks  # when the last one came

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join(GRACE)

    def run(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self.store.add(f"alive/{self.rank}", 1)
                said = self._failure() or self._silence(SILENCE)
            except RuntimeError:
                said = self._of(0, "is gone")
            # the process may be ending already, with its own words
            if said and not self._over.wait(GRACE):
                print(f"error: {said}", file=sys.stderr, flush=True)
                os._exit(2)

    def tell(self, error: BaseException) -> None:
        """Let the others know why this process ends."""
        if isinstance(error, SystemExit):
            return
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            text = "stopped"
        with suppress(RuntimeError):
            self.store.compare_set("failed", "", self._of(self.rank, f"ended: {text[:1000]}"))
            # the store may die with this process
            self.store.wait(self._keys("heard"), timedelta(seconds=4 * BEAT))

    def reason(self, error: str) -> str:
        """What to say where another process could not be reached: which one, and why it ended."""
        seen, deadline = time.monotonic(), time.monotonic() + 4 * BEAT
        try:
            while time.monotonic() < deadline:
                if said := self._failure():
                    return said
                self._silence(SILENCE)
                time.sleep(BEAT / 5)
            if said := self._silence(time.monotonic() - seen - BEAT):
                return said
        except RuntimeError:
            return self._of(0, "is gone")
        return f"A process could not be reached ({' '.join(error.split())[:200]}). {REMEDY}"

    def _failure(self) -> str | None:
        """What a process said that failed, also after the store that held it is gone."""
        if self._said is None and self.store.check(["failed"]):
            self._said = self.store.get("failed").decode()
            self.store.set(f"heard/{self.rank}", "")
        return self._said

    def _keys(self, name: str) -> list[str]:
        return [f"{name}/{r}" for r in range(self.n_ranks)]

    def _silence(self, seconds: float) -> str | None:
        """What to say of a process that has shown no life for longer than that."""
        for r in set(range(self.n_ranks)) - {self.rank}:
            count, now = self.store.add(f"alive/{r}", 0), time.monotonic()
            if count != self._counts[r]:
                self._counts[r], self._heard[r] = count, now
            elif now - self._heard[r] > seconds:
                return self._of(r, "was killed, or its machine is gone: it shows no more life")
        return None

    def _of(self, rank: int, what: str) -> str:
        try:
            host = f", on {self.store.get(f'host/{rank}').decode()},"
        except RuntimeError:
            host = ""
        what = what if what.endswith((".", "!", "?")) else f"{what}."
        return f"Rank {rank} of {self.n_ranks}{host} {what} {REMEDY}"


REMEDY = (
    "All processes end. Once the cause is removed, the same command (on every machine) continues "
    "from the last checkpoint."
)


def from_first(make: Callable[[], A]) -> A:
    """What the first process makes, alone; the others wait and get a copy. A `UserError` of the
    first one is raised by all.
    """
    if n_ranks() == 1:
        return make()
    made: Any = None
    if rank() == 0:
        try:
            with alone():
                made = make()
        except UserError as error:
            made = error
    held = [UserError(str(made)) if isinstance(made, UserError) else made]
    with reaching():
        dist.broadcast_object_list(held, src=0)
    made = held[0] if made is None else made
    if isinstance(made, UserError):
        raise made
    return made


def shared_out(items: Sequence[A], work: Callable[[Sequence[A]], list[B]]) -> list[B]:
    """`work(items)`, a result an item, of which every process makes its share and gets all."""
    n = n_ranks()
    if n == 1:
        return work(items)
    found: list[Any] = [None] * len(items)
    for r, part in enumerate(gather([work(items[rank() :: n])])):
        found[r::n] = part
    return found


# ---------------------------------------------------------------------------------------- the model


def rows_of_rank(n_rows: int) -> range:
    """The rows of a step that this process takes."""
    return range(rank() * n_rows // n_ranks(), (rank() + 1) * n_rows // n_ranks())


SMALL = 2**14  # elements below which gradients are summed together, at the end


class GradientSum:
    """Every gradient becomes the sum, over all processes, of `weight` times theirs; none where
    nobody has one.

    parameters: in the order in which a backward pass makes their gradients. In that order they are
    sent, whatever becomes ready first: all processes must send in the same one. After memory ran
    out in the backward pass it may be run again: what was sent stays as it was.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], weight: float) -> None:
        self.weight, parameters = weight, list(parameters)
        self.large = [p for p in parameters if p.numel() >= SMALL]
        self.small = [p for p in parameters if p.numel() < SMALL]
        self._ready: set[int] = set()
        self._sent: list[tuple[Tensor, dist.Work]] = []  # of the first ones of `large`

    @property
    def n_sent(self) -> int:
        return len(self._sent)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Inside runs a step's last backward pass, which makes each gradient whole once."""
        hooks = [p.register_post_accumulate_grad_hook(self._note) for p in self.large]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._ready.clear()

    def _note(self, parameter: Tensor) -> None:
        self._ready.add(id(parameter))
        while self.n_sent < len(self.large) and id(self.large[self.n_sent]) in self._ready:
            self._send()

    def _send(self) -> None:
        p = self.large[self.n_sent]
        gradient = torch.zeros_like(p) if p.grad is None else p.grad.mul_(self.weight)
        with reaching():
            self._sent.append((gradient, dist.all_reduce(gradient, async_op=True)))

    @torch.no_grad()
    def finish(self) -> None:
        """Send what is left and wait for all of it."""
        everything = [*self.large, *self.small]
        there = [float(p.grad is not None) for p in everything]
        while self.n_sent < len(self.large):
            self._send()
        device = everything[0].device
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.small]
        own = torch.cat([part.flatten() * self.weight for part in parts] or [torch.zeros(0)])
        flat = torch.cat([torch.tensor(there, device=device), own.to(device)])
        with reaching():
            dist.all_reduce(flat)
            for _, work in self._sent:
                work.wait()
        found = [gradient for gradient, _ in self._sent]
        sizes = [p.numel() for p in self.small]
        summed = zip(flat[len(there) :].split(sizes) if sizes else (), self.small, strict=True)
        found += [part.view_as(p).clone() for part, p in summed]
        has = flat[: len(there)].tolist()
        for p, gradient, somebody in zip(everything, found, has, strict=True):
            p.grad = gradient if somebody else None


APART = 0.05  # of a weight's size: the most that rounding on unlike cards may come to


@torch.no_grad()
def bring_together(named: Iterable[tuple[str, Tensor]]) -> None:
    """Compare the weights of all processes, bit by bit in sum; where they differ all take those of
    the first, and the log says by how much.

    Raises UserError where they differ by more than rounding does.
    """
    if n_ranks() == 1:
        return
    named = list(named)
    sums = torch.stack([weight.view(torch.int32).sum(dtype=torch.int64) for _, weight in named])
    all_sums = [torch.empty_like(sums) for _ in range(n_ranks())]
    with reaching():
        dist.all_gather(all_sums, sums)
    if all(torch.equal(sums, other) for other in all_sums):
        return
    worst, where = 0.0, ""
    for name, weight in named:
        firsts = weight.clone()
        with reaching():
            dist.broadcast(firsts, src=0)
        size = firsts.square().mean().sqrt().clamp_min(1e-12)
        difference = ((weight - firsts).abs().max() / size).nan_to_num(nan=math.inf)
        (apart,) = largest([float(difference)], weight.device)
        if apart > worst:
            worst, where = apart, name
        weight.copy_(firsts)
    if worst > APART:
        raise UserError(
            f"The processes hold different weights: {where} differs by {worst:.2g} of its size. "
            "Nothing was saved. All machines need the same run folder, the same version of this "
            "program and of torch; where they have them, one computes wrongly. Started again, the "
            "run continues from its last checkpoint."
        )
    log.say(
        f"The processes' weights differed by at most {worst:.1e} of their size ({where}), as unlike"
        " cards round: all took those of the first."
    )


def require_alike(facts: dict[str, Any]) -> None:
    """Raises UserError where the processes do not start from the same facts, with both values."""
    for r, others in enumerate(gather([facts])):
        for name, value in facts.items():
            if others[name] != value:
                raise UserError(
                    f"The processes do not start alike: {name} is {value} on rank {rank()} and "
                    f"{others[name]} on rank {r}. Give every machine the same command and the same "
                    "run folder, a shared one (NFS, SMB)."
                )


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes, those of the first one first; every one of them must ask."""
    if n_ranks() == 1:
        return items
    found: list[list[Any]] = [[] for _ in range(n_ranks())]
    with reaching():
        dist.all_gather_object(found, items)
    return [item for part in found for item in part]


def total(value: float, device: torch.device) -> float:
    """The sum of `value` over all processes; every one of them must ask."""
    (found,) = _reduced([value], device, dist.ReduceOp.SUM)
    return found


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each of `values` over all processes; every one of them must ask."""
    return _reduced(values, device, dist.ReduceOp.MAX)


def _reduced(
    values: Sequence[float], device: torch.device, operation: dist.ReduceOp
) -> list[float]:
    if n_ranks() == 1:
        return list(values)
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    held = torch.tensor(list(map(float, values)), dtype=dtype, device=device)
    with reaching():
        dist.all_reduce(held, operation)
    return held.tolist()

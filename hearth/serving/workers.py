"""Several engines behind one address: a process each, on a card or a share of the cores of its own.

In: requests, as an `EngineThread` takes them. Out: their events. A request goes to the worker that
holds the beginning of its text, or to the least loaded one; a worker that dies is replaced, and its
requests fail.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from hearth.decoding.engine import Engine, store_for
from hearth.decoding.scheduler import (
    QUEUE,
    EngineThread,
    Event,
    Failed,
    Finished,
    Full,
    Request,
    Scheduler,
    n_common,
)
from hearth.training import checkpoint

# requests that a worker which holds a text may have more than the least loaded one
PATIENCE = 4


@dataclass(frozen=True)
class Loader:
    """How a model is loaded by its name; it can be sent to another process."""

    folders: dict[str, Path]
    device: str = "cpu"
    weights: str = "auto"  # as the engine stores them; auto: bfloat16 if many
    cycles: int | None = None
    early_exit: float | None = None
    n_rows: int = 8

    def __call__(self, name: str) -> Scheduler:
        loaded = checkpoint.load_for_inference(self.folders[name], self.device)
        model = loaded.model
        store = self.weights
        if store == "auto":
            store = store_for(model.n_parameters())
        headless = model.head is None
        engine = Engine(
            model,
            weights=store,
            tokenizer=loaded.tokenizer,
            h_cycles=None if headless else self.cycles,
            exit_kl_threshold=None if headless else self.early_exit,
        )
        return Scheduler(engine, n_rows=self.n_rows)


def _work(pipe: Connection, load: Callable[[str], Scheduler], limit: int, threads: int) -> None:
    """A worker: requests come in through the pipe, events go out."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server ends its workers, after the answers
    sending = threading.Lock()

    def send(key: int, event: Event) -> None:
        with sending, contextlib.suppress(OSError):
            pipe.send((key, event))

    engines, jobs = EngineThread(load, limit=limit, threads=threads), {}
    while True:
        try:
            what, key, *content = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # the server is gone
        if what == "cancel":
            if (job := jobs.pop(key, None)) is not None:
                job.cancel()
            continue
        for number in [number for number, job in jobs.items() if job.ended]:
            del jobs[number]
        model, request = content
        try:
            (jobs[key],) = engines.submit(model, [request], [lambda e, key=key: send(key, e)])
        except Full as error:
            send(key, Failed(str(error)))


class _Worker:
    """The server's end of a worker."""

    def __init__(self, number: int, pool: WorkerPool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, pool.loads[number], pool.limit, pool.threads)
        self.process = context.Process(target=_work, args=arguments, name=f"worker {number}")
        self.process.daemon = True
        self.process.start()
        theirs.close()
        self.number, self.pool, self.started = number, pool, time.monotonic()
        self.jobs: dict[int, _Sent] = {}
        self.texts: deque[tuple[int, ...]] = deque(maxlen=pool.n_texts)  # it read these last
        self.sending = threading.Lock()
        threading.Thread(target=self._listen, name=f"worker {number}", daemon=True).start()

    def send(self, *message: Any) -> None:
        with self.sending, contextlib.suppress(OSError):  # `_listen` hears of a dead one too
            self.pipe.send(message)

    def _listen(self) -> None:
        while True:
            try:
                key, event = self.pipe.recv()
            except (EOFError, OSError):
                self.pool.replace(self)
                return
            job = self.jobs.get(key)
            if isinstance(event, Finished | Failed):
                self.jobs.pop(key, None)
            if job is not None and not job.cancelled:
                job.emit(event)

    def common(self, prompt: tuple[int, ...]) -> int:
        """Tokens of the prompt's beginning that this worker has read before."""
        return max((n_common(text, prompt) for text in self.texts), default=0)


class _Sent:
    """A request that a worker has."""

    def __init__(self, worker: _Worker, key: int, emit: Callable[[Event], None]) -> None:
        self.worker, self.key, self.emit, self.cancelled = worker, key, emit, False

    def cancel(self) -> None:
        self.cancelled = True
        if self.worker.jobs.pop(self.key, None) is not None:
            self.worker.send("cancel", self.key)


class WorkerPool:
    """A worker for each of `loads`; as an `EngineThread` to those who ask."""

    def __init__(self, loads: Sequence[Callable[[str], Scheduler]], *, n_rows: int) -> None:
        self.loads, self.n_texts = list(loads), n_rows
        self.limit = n_rows + QUEUE
        self.threads = max(1, torch.get_num_threads() // len(loads))
        self._keys, self._changed, self._stopping = itertools.count(), threading.RLock(), False
        self.workers = [_Worker(number, self) for number in range(len(loads))]

    @property
    def under_way(self) -> int:
        return sum(len(worker.jobs) for worker in self.workers)

    def submit(
        self, model: str, requests: Sequence[Request], emits: Sequence[Callable[[Event], None]]
    ) -> list[_Sent]:
        with self._changed:
            limit = self.limit * len(self.workers)
            if self.under_way + len(requests) > limit:
                raise Full(f"{limit} answers are under way or waiting; try again later")
            return [
                self._send(model, request, emit)
                for request, emit in zip(requests, emits, strict=True)
            ]

    def _send(self, model: str, request: Request, emit: Callable[[Event], None]) -> _Sent:
        worker = self.choose(request.prompt)
        job = _Sent(worker, next(self._keys), emit)
        worker.jobs[job.key] = job
        worker.texts.append(request.prompt)
        worker.send("submit", job.key, model, request)
        return job

    def choose(self, prompt: tuple[int, ...]) -> _Worker:
        """The worker that has read most of the prompt, unless it is busier than others by much."""
        least = min(self.workers, key=lambda worker: len(worker.jobs))
        best = max(self.workers, key=lambda worker: worker.common(prompt))
        holds = 2 * best.common(prompt) > len(prompt)
        return best if holds and len(best.jobs) < len(least.jobs) + PATIENCE else least

    def replace(self, dead: _Worker) -> None:
        """Fail what a dead worker had, and start another in its place."""
        if time.monotonic() - dead.started < 1:
            time.sleep(1)  # one that cannot even start is not started over and over at once
        with self._changed:
            if self._stopping:
                return
            dead.process.join()
            dead.pipe.close()
            code = dead.process.exitcode
            print(
                f"worker {dead.number} died (exit code {code}); starting another", file=sys.stderr
            )
            self.workers[dead.number] = _Worker(dead.number, self)
        jobs, dead.jobs = list(dead.jobs.values()), {}
        for job in jobs:
            if not job.cancelled:
                job.emit(Failed("The process that made this answer died."))

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()

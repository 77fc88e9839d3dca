"""Continuous batching: answers that join and leave between two tokens, decoded together.

In: requests as ids. Out: events, as they happen, through each request's `emit`. `Scheduler` is the
batch of one model, a pass at a time; `EngineThread` owns the models of a process. Knows no
tokenizer and no protocol.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hearth.decoding.engine import Engine, Rules, draw
from hearth.decoding.engine import _Row as Row
from hearth.decoding.graphs import Recorded
from hearth.decoding.kv_cache import KVCache, decode, decode_early_exit
from hearth.decoding.slots import NextTokens, Slots, reach

# B rows, T positions of a chunk, V vocab_size

ROWS = 8  # answers decoded together
QUEUE = 64  # requests that may wait for a row
# tokens of a prompt in one pass: so few that the answers beside it hardly pause
CHUNK_TOKENS = 128
# passes of one shape before it is recorded: that runs it twice more and pauses the answers, which
# only pays where more passes follow
RECORD_AFTER = 32
LEAST_READ = 512  # entries of a slot that a recorded pass reads at least


@dataclass(frozen=True)
class Request:
    """One answer that is wanted. It can be sent to another process."""

    prompt: tuple[int, ...]
    rules: Rules
    seed: int
    n_top: int | None = None  # likeliest alternatives reported a token; None reports no scores
    score_prompt: bool = False  # report the scores of the prompt's own tokens too


class Scored(NamedTuple):
    """How likely a token was, before temperature and the like: natural logarithms."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, likeliest first


class Read(NamedTuple):
    """A part of the prompt was read."""

    n_read: int  # tokens of the prompt that the cache holds by now
    n_reused: int  # of these, those that it held before


class PromptScores(NamedTuple):
    scores: tuple[Scored, ...]  # of the prompt's tokens from the second on


class Token(NamedTuple):
    """The next token of the answer."""

    id: int
    n_cycles: int  # of the reasoning head that it took
    scored: Scored | None
    forced: bool = False  # by the rules, such as a tool's result


class Finished(NamedTuple):
    reason: str  # stop, length, context, or call, of a tool whose result the client tells


class Failed(NamedTuple):
    """The answer ends here, through no fault of the request."""

    message: str


Event = Read | PromptScores | Token | Finished | Failed


class Job:
    """A request under way; `cancel` frees its row before the next pass."""

    def __init__(self, request: Request, emit: Callable[[Event], None]) -> None:
        self.request, self._emit = request, emit
        self.cancelled = self.ended = False

    def cancel(self) -> None:
        self.cancelled = True

    def emit(self, event: Event) -> None:
        self.ended = self.ended or isinstance(event, Finished | Failed)
        if not self.cancelled:
            self._emit(event)


class Seat:
    """A slot of the cache: whose text it holds, and the answer that is being made in it."""

    def __init__(self, slot: int, cache: KVCache) -> None:
        self.slot, self.cache = slot, cache
        self.held: list[int] = []  # the ids in it, while no answer is being made
        self.last_used = 0
        self.job: Job | None = None
        self.row: Row | None = None
        self.reused = 0
        self.scores: list[Scored] = []  # of the prompt

    @property
    def left(self) -> int:
        """Tokens of the prompt, or of a tool's result, that a chunk has to read; 0 where one token
        is left of the answer, which is read with those of the others.
        """
        left = len(self.row.ids) - self.cache.length
        return 0 if self.row.answer and left == 1 else left


class Scheduler:
    """The batch of one model: `add` requests, then `step` while `busy`.

    A step reads at most one chunk of one prompt and decodes one token of every answer. A seat that
    is done keeps its text until another answer needs it, the least recently used first; a prompt
    that continues the text of a free seat reads only what is new.
    """

    def __init__(self, engine: Engine, *, n_rows: int = ROWS) -> None:
        self.engine, self.model = engine, engine.model
        self.slots = Slots(engine.model, n_rows, h_cycles=engine.h_cycles)
        self.seats = [Seat(s, cache) for s, cache in enumerate(self.slots.caches)]
        self.waiting: deque[Job] = deque()
        self.n_steps = 0
        # by the shape of the pass: rows, entries read of each
        self._n_passes: Counter[tuple[int, int]] = Counter()
        self._recorded: dict[tuple[int, int], Recorded] = {}

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(seat.job for seat in self.seats)

    def add(self, job: Job) -> None:
        self.waiting.append(job)

    def step(self) -> None:
        """Read a chunk and decode a token of each answer; an error ends the answers under way."""
        self.n_steps += 1
        try:
            self._leave()
            self._join()
            self._read_chunk()
            self._decode()
        except Exception as error:
            # not the error's own words, which may quote a prompt
            traceback.print_tb(error.__traceback__, file=sys.stderr)
            self.fail(f"The model failed: {type(error).__name__}.")

    def fail(self, message: str) -> None:
        """End everything, and forget what the cache holds: a pass may have left it half written."""
        jobs = [seat.job for seat in self.seats if seat.job] + list(self.waiting)
        self.waiting.clear()
        for seat in self.seats:
            seat.cache.rewind(0)
            seat.held, seat.job, seat.row = [], None, None
        for job in jobs:
            job.emit(Failed(message))

    # ---------------------------------------------------------------------------- joining, leaving

    def _leave(self) -> None:
        for seat in self.seats:
            if seat.job and seat.job.cancelled:
                self._free(seat)
        for job in [job for job in self.waiting if job.cancelled]:
            self.waiting.remove(job)
            job.ended = True

    def _free(self, seat: Seat) -> None:
        seat.job.ended = True
        seat.held = seat.row.ids[: seat.cache.length]
        seat.job = seat.row = None

    def _join(self) -> None:
        while self.waiting and (free := [seat for seat in self.seats if seat.job is None]):
            job = self.waiting.popleft()
            request = job.request
            try:
                row = self.engine.row(
                    request.prompt, request.seed, request.rules, self.engine.context
                )
            except ValueError as error:
                job.emit(Failed(str(error)))
                continue
            seat, common = self._choose(free, row.ids, whole=request.score_prompt)
            seat.job, seat.row, seat.scores = job, row, []
            seat.last_used = self.n_steps
            seat.reused = seat.cache.rewind(common)

    def _choose(self, free: list[Seat], ids: list[int], *, whole: bool) -> tuple[Seat, int]:
        """The seat for a prompt, and how many of its tokens are already there; `whole` wants all of
        it read. A text is given up for a prompt that continues most of it, else the oldest one.
        """
        oldest = min(free, key=lambda seat: (bool(seat.held), seat.last_used))
        if whole:
            return oldest, 0
        common = {seat.slot: n_common(seat.held, ids[:-1]) for seat in free}
        best = max(free, key=lambda seat: reach(seat.cache, common[seat.slot]))
        kept = reach(best.cache, common[best.slot])
        seat = best if 2 * kept >= len(best.held) and kept > 0 else oldest
        return seat, common[seat.slot]

    # -------------------------------------------------------------------------------------- passes

    def _read_chunk(self) -> None:
        """Read on in one prompt, or tool's result: the one with the fewest tokens left, every other
        time the oldest, so that neither a short prompt nor a long one waits for all the others.
        """
        reading = [seat for seat in self.seats if seat.job and seat.left]
        if not reading:
            return
        by = (lambda seat: seat.left) if self.n_steps % 2 else (lambda seat: seat.last_used)
        seat = min(reading, key=by)
        row = seat.row
        hidden = self._read(seat) if row.answer else self._read_prompt(seat)
        if seat.cache.length < len(row.ids):
            return
        if row.finish:  # no token is wanted
            self._end(seat)
        else:
            self._take([seat], self._logits(hidden[-1:]), [self.engine.n_cycles])

    def _read(self, seat: Seat) -> Tensor:
        """Hidden states (T, D) of the next chunk."""
        at = seat.cache.length
        ids = torch.tensor([seat.row.ids[at : at + CHUNK_TOKENS]], device=self.model.device)
        return decode(self.model, ids, seat.cache, self.engine.h_cycles)[0]

    def _read_prompt(self, seat: Seat) -> Tensor:
        row, cache, request = seat.row, seat.cache, seat.job.request
        at = cache.length
        if at + CHUNK_TOKENS >= len(row.ids):
            cache.mark()  # another answer to this prompt comes back to here
        hidden = self._read(seat)
        following = row.ids[at + 1 : cache.length + 1]
        if request.score_prompt and following:
            logits = self._logits(hidden[: len(following)])
            seat.scores += _score(logits, following, request.n_top or 0)
        seat.job.emit(Read(cache.length, seat.reused))
        if not seat.left:
            cache.mark()  # and a conversation that says this answer in other tokens to here
            if request.score_prompt:
                seat.job.emit(PromptScores(tuple(seat.scores)))
        return hidden

    def _decode(self) -> None:
        going = [seat for seat in self.seats if seat.job and seat.row.answer and not seat.left]
        if not going:
            return
        engine = self.engine
        logits, cycles = self._replayed(going), [engine.n_cycles] * len(going)
        if logits is None:
            ids = torch.tensor([seat.row.ids[-1:] for seat in going], device=self.model.device)
            cache = NextTokens(self.slots, [seat.slot for seat in going])
            if engine.exit_kl_threshold is None:
                logits = self._logits(decode(self.model, ids, cache, engine.h_cycles)[:, 0])
            else:
                logits, ran = decode_early_exit(
                    self.model,
                    ids,
                    cache,
                    h_cycles=engine.h_cycles,
                    exit_kl_threshold=engine.exit_kl_threshold,
                )
                cycles = ran.tolist()
        self._take(going, logits, cycles)

    def _replayed(self, going: list[Seat]) -> Tensor | None:
        """Float32 logits (B, V) after these seats' last tokens, by a recorded pass; None where
        there is none, or not yet.

        Which slots it passes over, and how long their texts are, lies on the device: so it stays
        right while answers join and leave. Its shapes are rounded up to powers of two, so that
        there are few; the first seat, given again, fills up the rows.
        """
        engine = self.engine
        if engine.record is None or engine.exit_kl_threshold is not None:
            return None
        longest = 1 + max(seat.cache.length for seat in going)
        n_rows = min(rounded_up(len(going)), len(self.seats))
        n_read = min(rounded_up(max(longest, LEAST_READ)), engine.context)
        shape = (n_rows, n_read)
        self._n_passes[shape] += 1
        if self._n_passes[shape] <= RECORD_AFTER:
            return None
        filled = going + going[:1] * (n_rows - len(going))
        slots = [seat.slot for seat in filled]
        ids = torch.tensor([seat.row.ids[-1] for seat in filled], device=self.model.device)
        if shape in self._recorded:
            self._recorded[shape].attn_ctx.move(slots)
        else:
            made = engine.recorded(NextTokens(self.slots, slots, n_read=n_read), ids)
            if made is None:
                self._recorded.clear()  # no longer used
                return None
            self._recorded[shape] = made
        return self._recorded[shape].next(ids)[: len(going)]

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def _take(self, seats: Sequence[Seat], logits: Tensor, cycles: Sequence[int]) -> None:
        """Draw each answer's next token, each under its own rules, and take those that the rules
        force behind it.
        """
        for n, seat in enumerate(seats):
            row, request, own = seat.row, seat.job.request, logits[n : n + 1]
            row.take(draw(own, [row], request.rules)[0], cycles[n])
            token, n_said = row.answer[-1], len(row.answer)
            scored = None
            if request.n_top is not None:
                (scored,) = _score(own, [token], request.n_top)
            seat.job.emit(Token(token, cycles[n], scored, row.forced[-1]))
            row.take_due()
            certain = None if request.n_top is None else Scored(0.0, ())
            for forced in row.answer[n_said:]:
                seat.job.emit(Token(forced, 0, certain, forced=True))
            if row.finish:
                self._end(seat)

    def _end(self, seat: Seat) -> None:
        job, reason = seat.job, seat.row.finish
        self._free(seat)
        job.emit(Finished(reason))


def rounded_up(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


@torch.no_grad()
def _score(logits: Tensor, tokens: Sequence[int], n_top: int) -> list[Scored]:
    """Scores of tokens (B,) under float32 logits (B, V)."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device).long()[:, None])[:, 0]
    top, ids = logprobs.topk(min(n_top, logits.shape[-1]), dim=-1)
    return [
        Scored(p, tuple(zip(i, t, strict=True)))
        for p, i, t in zip(own.tolist(), ids.tolist(), top.tolist(), strict=True)
    ]


# ------------------------------------------------------------------------ one thread a process


class Full(Exception):
    """So many requests are under way that no more are taken."""


class EngineThread:
    """Owns the models of this process: the only thread that loads and runs them, a pass at a time.

    OpenMP gives each thread that computes a team of its own. More of these than processors sleep
    between two products, and a token takes 1.4 times as long: so nothing is loaded elsewhere.

    load: a model's name → its scheduler, called in the thread the first time the name is asked for.
    limit: requests under way at most; `submit` raises `Full` beyond. preload: a name to load now.
    """

    def __init__(
        self,
        load: Callable[[str], Scheduler],
        *,
        limit: int = ROWS + QUEUE,
        threads: int | None = None,
        preload: str | None = None,
    ) -> None:
        self.schedulers: dict[str, Scheduler] = {}
        self._load, self.limit, self._threads = load, limit, threads
        self._changed = threading.Condition()
        self._new: deque[tuple[str, Job]] = deque()
        self._under_way: list[Job] = []
        self._stopping = False
        loaded: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(preload, loaded), name="engine", daemon=True
        )
        self._thread.start()
        loaded.result()

    @property
    def under_way(self) -> int:
        """Requests that are not at their end."""
        with self._changed:
            self._under_way = [job for job in self._under_way if not job.ended]
            return len(self._under_way)

    def submit(
        self, model: str, requests: Sequence[Request], emits: Sequence[Callable[[Event], None]]
    ) -> list[Job]:
        """Begin these answers, all or none. `emit` is called in the engine's thread."""
        jobs = [Job(request, emit) for request, emit in zip(requests, emits, strict=True)]
        if self.under_way + len(jobs) > self.limit:
            raise Full(f"{self.limit} answers are under way or waiting; try again later")
        with self._changed:
            self._new += [(model, job) for job in jobs]
            self._under_way += jobs
            self._changed.notify()
        return jobs

    def stop(self) -> None:
        """End the thread; what is under way fails."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self, preload: str | None, loaded: Future[None]) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)  # counts for this thread's products alone
        try:
            if preload is not None:
                self.schedulers[preload] = self._load(preload)
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        while True:
            with self._changed:
                while not (self._new or self._stopping or self._busy()):
                    self._changed.wait()
                new = list(self._new)
                self._new.clear()
            for model, job in new:
                self._add(model, job)
            if self._stopping:
                break
            for scheduler in self._busy():
                scheduler.step()
        for scheduler in self.schedulers.values():
            scheduler.fail("The server is stopping.")

    def _busy(self) -> list[Scheduler]:
        return [scheduler for scheduler in self.schedulers.values() if scheduler.busy]

    def _add(self, model: str, job: Job) -> None:
        try:
            if model not in self.schedulers:
                self.schedulers[model] = self._load(model)
        except Exception as error:
            job.emit(Failed(f"{model} cannot be loaded: {error}"))
        else:
            self.schedulers[model].add(job)

"""Generate token ids with a model: prefill in chunks, then a cached pass a token, and draw.

In: prompts as ids. Out: answers as ids, whole (`generate`, many at once) or one by one (`stream`).
Where an answer calls a tool, the result's ids are forced behind the call. Knows no chat format, and
a tokenizer only to read calls; leaves the model untouched.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hearth import log
from hearth.data.chat_format import last_call, result_ids
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.graphs import OneColumn, Record, Recorded, cuda_graph
from hearth.decoding.kv_cache import KVCache, decode, decode_early_exit, for_decoding
from hearth.decoding.matrices import BlockKernel, Matrix, Store
from hearth.decoding.slots import NextTokens
from hearth.decoding.tools import Function, Tools
from model import Block, Model, TokenValue

# B rows, T positions of a chunk, V vocab_size

Ids = Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits; the default takes the likeliest."""

    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens; None is all
    # draw from the likeliest tokens that make up this probability; None is all
    top_p: float | None = None
    # draw from tokens at least this likely, relative to the likeliest; None is all
    min_p: float | None = None
    # above 1 makes tokens already in the text less likely; stop ids are exempt
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, every in (("top_p", 1), ("min_p", 0)):  # what excludes nothing need not sort
            if getattr(self, name) == every:
                object.__setattr__(self, name, None)
        found = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            found.append(f"temperature is {self.temperature}, must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k is {self.top_k}, must be at least 1 or None")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                found.append(f"{name} is {value}, must lie between 0 and 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            found.append(f"repetition_penalty is {self.repetition_penalty}, must be above 0")
        if found:
            raise ValueError("; ".join(found))


@dataclass(frozen=True)
class Budget:
    """Bounds a bracketed part of an answer, such as its thinking: `close` is forced `tokens` ids
    after `open`.
    """

    tokens: int  # ids allowed between the two, in the whole answer
    open: int  # id that begins the part; an answer without it is left alone
    close: int  # id that ends it


@dataclass(frozen=True)
class Rules:
    """What bounds an answer."""

    max_tokens: int  # longest answer
    stop_ids: frozenset[int] = frozenset()  # ids that end it; the answer keeps the one that did
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget | None = None
    # asked after each token, with the answer so far
    stop_when: Callable[[list[int]], bool] | None = None
    begin: tuple[int, ...] = ()  # ids that it is made to begin with, in place of its own choice
    tools: Tools | None = None  # what it may call; None leaves calls without a result


class Completion(NamedTuple):
    """An answer, and of each of its ids where it came from."""

    ids: list[int]
    forced: list[bool]  # by the rules, such as a tool's result; all others were drawn
    # natural logarithm of the probability, before temperature and the like; of forced ids 0
    logprobs: list[float]


class Engine:
    """Answers prompts with `model`. `stream` keeps its cache, so a prompt that extends the last one
    prefills only what is new.

    weights: how the engine's own copy stores them, a name of `STORES`, which makes each token
    faster; None makes no copy and decodes with the model as it is, also while it is being trained.
    h_cycles: how often the reasoning head cycles; None is as the model was configured.
    exit_kl_threshold: leave the cycles once the prediction moves by less than this, in nats (KL
    divergence); None runs them all.
    tokenizer: reads the calls of tools; needed where there are any.
    record: how a pass over one more column is recorded, to be replayed; None is as a CUDA graph on
    a card, and not elsewhere. A device that cannot do it is said in the log, and does without.
    """

    def __init__(
        self,
        model: Model,
        *,
        tokenizer: Tokenizer | None = None,
        weights: str | None = None,
        h_cycles: int | None = None,
        exit_kl_threshold: float | None = None,
        max_rows: int = 64,
        chunk_tokens: int = 512,
        record: Record | None = None,
    ) -> None:
        self.model = model if weights is None else compress(model, weights)
        self.tokenizer = tokenizer
        self.h_cycles, self.exit_kl_threshold = h_cycles, exit_kl_threshold
        self.max_rows = max_rows  # answers decoded together
        self.chunk_tokens = chunk_tokens  # tokens in one pass while a prompt is read
        self.context = model.config.context
        self.cache: KVCache | None = None  # of the stream
        self.held: list[int] = []  # the ids in it
        self.record = record or (cuda_graph if model.device.type == "cuda" else None)
        self._recorded: Recorded | None = None  # of the cache in use

    # --------------------------------------------------------------------------------- many at once

    def generate(self, prompts: Sequence[Ids], **settings: Any) -> list[list[int]]:
        """The ids of `complete`'s answers, with its settings."""
        return [answer.ids for answer in self.complete(prompts, **settings)]

    def complete(
        self,
        prompts: Sequence[Ids],
        *,
        max_tokens: int,
        stop_ids: Ids = (),
        sampling: Sampling | None = None,
        seeds: Ids | None = None,
        n_samples: int = 1,
        budget: Budget | None = None,
        stop_when: Callable[[list[int]], bool] | None = None,
        begin: Ids = (),
        tools: Tools | Mapping[str, Function] | None = None,
        logprobs: bool = False,
    ) -> list[Completion]:
        """`n_samples` answers to each prompt, in the order of the prompts; one that stopped ends in
        its stop id.

        `seeds` gives each answer its own rng, so what it says does not depend on its neighbours
        (default: its index). An answer also ends where its row fills the context. `logprobs` fills
        those of the completions.
        """
        rules = Rules(
            max_tokens,
            frozenset(stop_ids),
            sampling or Sampling(),
            budget,
            stop_when,
            tuple(begin),
            _tools(tools),
        )
        n_answers = len(prompts) * n_samples
        seeds = range(n_answers) if seeds is None else seeds
        if len(seeds) != n_answers:
            raise ValueError(f"{len(seeds)} seeds for {n_answers} answers")
        rows = [
            self.row(prompts[i // n_samples], seeds[i], rules, self.context)
            for i in range(n_answers)
        ]
        # rows of like length share a batch, and samples of one prompt stay together
        order = sorted(range(n_answers), key=lambda i: len(rows[i].ids))
        for part in range(0, n_answers, self.max_rows):
            together = [rows[i] for i in order[part : part + self.max_rows]]
            self._finish([row for row in together if not row.finish], rules, logprobs=logprobs)
            self._recorded = None  # and with it the cache's memory
        return [Completion(row.answer, row.forced, row.logprobs) for row in rows]

    def row(self, prompt: Ids, seed: int, rules: Rules, longest: int | None) -> _Row:
        """An answer to be made; ValueError for what cannot be."""
        return _Row(prompt, seed, rules, longest, self.tokenizer)

    def _finish(self, rows: list[_Row], rules: Rules, *, logprobs: bool) -> None:
        """Decode all rows to their ends, together."""
        if not rows:
            return
        prompts = list(dict.fromkeys(tuple(row.ids) for row in rows))  # each one once
        longest = max(map(len, prompts))
        pad = [longest - len(prompt) for prompt in prompts]
        capacity = longest + min(rules.max_tokens, self.context)
        cache = KVCache(
            len(prompts), capacity, pad=pad, device=self.model.device, dtype=self.model.cache_dtype
        )
        logits, cycles = self._read(
            [[0] * gap + list(prompt) for gap, prompt in zip(pad, prompts, strict=True)], cache
        )
        if len(prompts) < len(rows):
            copies = [prompts.index(tuple(row.ids)) for row in rows]
            cache.keep_rows(copies)
            logits, cycles = logits[copies], [cycles[i] for i in copies]
        while True:
            for row, token, n_cycles in zip(rows, draw(logits, rows, rules), cycles, strict=True):
                row.take(token, n_cycles)
            if logprobs:
                _note_logprobs(logits, rows)
            going = [i for i, row in enumerate(rows) if not row.finish]
            if not going:
                return
            # rows that are done are carried along until dropping them pays
            if len(going) <= 0.75 * len(rows):
                cache.keep_rows(going)
                rows = [rows[i] for i in going]
            logits, cycles = self._read([row.ids[-1:] for row in rows], cache)

    # ----------------------------------------------------------------------------------- one by one

    def stream(
        self,
        prompt: Ids,
        *,
        max_tokens: int,
        stop_ids: Ids = (),
        sampling: Sampling | None = None,
        seed: int = 0,
        budget: Budget | None = None,
        stop_when: Callable[[list[int]], bool] | None = None,
        begin: Ids = (),
        tools: Tools | Mapping[str, Function] | None = None,
        keep: int | None = None,
    ) -> Stream:
        """The answer's ids as they are decoded, the stop id included.

        `keep` says what happens where the context is full: None ends the answer there; a number
        keeps that many first ids and drops the oldest of the others, see `Stream.dropped`.
        """
        rules = Rules(
            max_tokens,
            frozenset(stop_ids),
            sampling or Sampling(),
            budget,
            stop_when,
            tuple(begin),
            _tools(tools),
        )
        return Stream(self, prompt, seed, rules, keep)

    def reuse(self, prompt: list[int]) -> int:
        """Bring the stream's cache to a beginning of the prompt, at least one id short of it; its
        length.
        """
        common = 0
        for ours, theirs in zip(self.held, prompt[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        if self.cache is None or self.cache_cycles != (self.h_cycles, self.exit_kl_threshold):
            self.cache = KVCache(
                1, self.context, device=self.model.device, dtype=self.model.cache_dtype
            )
            self.cache_cycles = (self.h_cycles, self.exit_kl_threshold)
        common = self.cache.rewind(common)
        self.held = self.held[:common]
        return common

    def extend(self, ids: list[int], *, mark: bool) -> tuple[Tensor, int]:
        """Add ids to the stream's cache; float32 logits (1, V) after the last, and the cycles that
        it ran. `mark` as for a prompt, which others may continue in another way.
        """
        try:
            logits, (n_cycles,) = self._read([ids], self.cache, mark=mark and len(ids) > 1)
        # Ctrl-C above all. A token half read is written over; a half-read chunk spoils the rings
        except BaseException:
            if len(ids) > 1:
                self.cache, self.held = None, []
            raise
        self.held += ids
        return logits, n_cycles

    @torch.no_grad()
    def _read(
        self, ids: list[list[int]], cache: KVCache, *, mark: bool = False
    ) -> tuple[Tensor, list[int]]:
        """Float32 logits (B, V) after ids (B, T), which join the cache a chunk at a time; the
        cycles each row then ran.

        `mark` lets the cache come back to the beginning of the last chunk.
        """
        if len(ids[0]) == 1 and cache.length and self.exit_kl_threshold is None:
            logits = self._replayed([row[0] for row in ids], cache)
            if logits is not None:
                return logits, [self.n_cycles] * len(ids)
        chunks = torch.tensor(ids, device=self.model.device).split(
            max(1, self.chunk_tokens // len(ids)), dim=1
        )
        for number, chunk in enumerate(chunks, start=1):
            if mark and number == len(chunks):
                cache.mark()
            if number == len(chunks) and self.exit_kl_threshold is not None:
                logits, cycles = decode_early_exit(
                    self.model,
                    chunk,
                    cache,
                    h_cycles=self.h_cycles,
                    exit_kl_threshold=self.exit_kl_threshold,
                )
                return logits, cycles.tolist()
            hidden = decode(self.model, chunk, cache, self.h_cycles)
        return self.model.logits(hidden[:, -1]), [self.n_cycles] * len(ids)

    def _replayed(self, ids: list[int], cache: KVCache) -> Tensor | None:
        """Logits (B, V) after one id of each row, by a recorded pass; None where none is recorded
        on this device.
        """
        if self.record is None:
            return None
        new = torch.tensor(ids, device=self.model.device)
        if self._recorded is not None and self._recorded.attn_ctx.fits(cache):
            self._recorded.attn_ctx.move()
        else:
            self._recorded = None  # its memory first
            self._recorded = self.recorded(OneColumn(cache), new)
        return None if self._recorded is None else self._recorded.next(new)

    @torch.no_grad()
    def recorded(self, attn_ctx: OneColumn | NextTokens, ids: Tensor) -> Recorded | None:
        """The pass over ids (B,) in `attn_ctx`, recorded; None where this device cannot record,
        which is said once.
        """
        try:
            return Recorded(self.model, attn_ctx, ids, self.h_cycles, self.record)
        except RuntimeError as error:
            self.record = None
            log.say(f"decoding    without CUDA graphs: {' '.join(str(error).split())[:160]}")
            return None

    @property
    def n_cycles(self) -> int:
        """Cycles of the reasoning head that a token runs unless it leaves early; 0
        without a head.
        """
        return (self.h_cycles or self.model.config.hrm.h_cycles) if self.model.head else 0

    # -------------------------------------------------------------------------------------- figures

    def weight_bytes(self) -> int:
        """Memory of the weights that decoding reads, in bytes."""
        vectors = sum(p.numel() * p.element_size() for p in self.model.parameters())
        modules = [value for module in self.model.modules() for value in vars(module).values()]
        return vectors + sum(matrix.n_bytes() for matrix in modules if isinstance(matrix, Matrix))

    def cache_bytes(self, n_tokens: int | None = None) -> int:
        """Memory of one row's keys and values at `n_tokens` (default: the whole
        context), in bytes.
        """
        c, n_tokens = self.model.config, n_tokens or self.context
        columns = sum(
            min(block.window or n_tokens, n_tokens)
            for block in self.model.block_passes(self.h_cycles)
        )
        return (
            columns
            * 2
            * c.n_kv_head
            * c.head_dim
            * (self.model.cache_dtype or self.model.dtype).itemsize
        )


class Stream(Iterator[int]):
    """An answer in the making: iterate over its ids. Afterwards `finish` says why it ended: stop,
    length, context, or call, of a tool whose result others tell.

    reused: ids of the prompt that the cache already held. read: ids that had to be read.
    dropped: ids left out so far because the context was full.
    forced: for each id so far, also of those to come, whether the rules forced it.
    """

    def __init__(
        self, engine: Engine, prompt: Ids, seed: int, rules: Rules, keep: int | None
    ) -> None:
        self.engine, self.rules, self.keep = engine, rules, keep
        self.dropped = 0
        if keep is not None:
            prompt = self._shortened(list(prompt), engine.context)
        self._row = engine.row(prompt, seed, rules, engine.context if keep is None else None)
        self._n_said = 0
        self.reused = engine.reuse(self._row.ids)
        self.read = len(prompt) - self.reused
        self._next = self._row.ids[self.reused :]

    @property
    def finish(self) -> str:
        return self._row.finish

    @property
    def forced(self) -> list[bool]:
        return self._row.forced

    @property
    def n_cycles(self) -> int:
        """Cycles of the reasoning head that the answer's tokens took, added up."""
        return self._row.n_cycles

    def __next__(self) -> int:
        row = self._row
        if self._n_said == len(row.answer):
            if row.finish:
                raise StopIteration
            self._decode()
        self._n_said += 1
        return row.answer[self._n_said - 1]

    def _decode(self) -> None:
        """The next id, and those that the rules force behind it."""
        row, said = self._row, len(self._row.answer)
        if len(row.ids) > self.engine.context:
            row.ids = self._shortened(row.ids, self.engine.context)
            self._next = row.ids[self.engine.reuse(row.ids) :]
        logits, n_cycles = self.engine.extend(self._next, mark=not said)
        row.take(draw(logits, [row], self.rules)[0], n_cycles)
        row.take_due()
        self._next = row.answer[said:]

    def _shortened(self, ids: list[int], longest: int) -> list[int]:
        """`ids` if at most `longest`; otherwise the first `keep` and the newest, three quarters of
        that together.
        """
        if len(ids) <= longest:
            return ids
        left = longest - longest // 4
        first = min(self.keep, left // 2)
        self.dropped += len(ids) - left
        return ids[:first] + ids[first + len(ids) - left :]


class _Row:
    """One answer in the making: the ids that the model reads, those of the answer, and its rng.

    due: ids that come next whatever is drawn; nothing is drawn for them.
    """

    def __init__(
        self,
        prompt: Ids,
        seed: int,
        rules: Rules,
        longest: int | None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if not prompt or (longest and len(prompt) > longest):
            raise ValueError(f"a prompt of {len(prompt)} tokens; it must have 1 to {longest}")
        if rules.tools is not None and tokenizer is None:
            raise ValueError("an answer with tools needs the engine's tokenizer")
        self.ids, self.answer = list(prompt), []
        self.forced: list[bool] = []  # of the answer's ids
        self.logprobs: list[float] = []
        self.due: deque[int] = deque()
        self.rules, self.longest = rules, longest
        self.finish = "" if rules.max_tokens > 0 else "length"
        self._generator = torch.Generator().manual_seed(seed)
        self._rolled: list[float] = []
        self._tokenizer = tokenizer
        self._n_calls = 0
        self._open = False  # inside the budget's brackets
        self._spent = 0  # ids said inside them
        self.n_cycles = 0  # of the reasoning head, over all ids of the answer

    def roll(self) -> float:
        """The next number of this row's rng, in [0, 1)."""
        if not self._rolled:
            self._rolled = torch.rand(64, generator=self._generator, dtype=torch.float64).tolist()[
                ::-1
            ]
        return self._rolled.pop()

    def take(self, token: int, n_cycles: int) -> None:
        """Add a token that took `n_cycles`, or the one that the rules force in its place; a
        finished answer stays.
        """
        if self.finish:
            return
        forced = bool(self.due) or len(self.answer) < len(self.rules.begin)
        if self.due:
            token = self.due.popleft()
        elif forced:
            token = self.rules.begin[len(self.answer)]
        budget = self.rules.budget
        if budget is not None:
            if self._open and self._spent >= budget.tokens:
                token, forced = budget.close, True
            self._spent += self._open
            self._open = token != budget.close if self._open else token == budget.open
        self.n_cycles += n_cycles
        self.ids.append(token)
        self.answer.append(token)
        self.forced.append(forced)
        if token in self.rules.stop_ids or (
            self.rules.stop_when and self.rules.stop_when(self.answer)
        ):
            self.finish = "stop"
        elif self.rules.tools and token == self._tokenizer.end_tool_call:
            self._call(self.rules.tools)
        if self.finish:
            return
        if len(self.answer) >= self.rules.max_tokens:
            self.finish = "length"
        # the last token need not fit: nothing follows it
        elif self.longest and len(self.ids) > self.longest:
            self.finish = "context"

    def take_due(self) -> None:
        """Add all the ids that come next in any case; the model has not run for them."""
        while self.due and not self.finish:
            self.take(self.due[0], 0)

    def _call(self, tools: Tools) -> None:
        """Let the result follow the call that the last id closes, if it closes one."""
        call = last_call(self.answer, self._tokenizer)
        if call is None:
            return
        self._n_calls += 1
        if call.tool in tools.handed_back:
            self.finish = "call"
        else:
            self.due.extend(result_ids(tools.result(call, self._n_calls), self._tokenizer))


def _tools(given: Tools | Mapping[str, Function] | None) -> Tools | None:
    """Tools, also where only the functions are given."""
    return given if given is None or isinstance(given, Tools) else Tools(given)


def _note_logprobs(logits: Tensor, rows: Sequence[_Row]) -> None:
    """Note how likely each row's newest id was under float32 logits (B, V); a row that is done and
    carried along has all of them.
    """
    newest = torch.tensor([row.answer[-1] for row in rows], device=logits.device)
    own = logits.log_softmax(dim=-1).gather(1, newest[:, None])[:, 0].tolist()
    for row, logprob in zip(rows, own, strict=True):
        if len(row.logprobs) < len(row.answer):
            row.logprobs.append(0.0 if row.forced[-1] else logprob)


Weights = Literal["auto", Store]  # how they are stored, and what `store_for` says
SMALL = 20_000_000  # parameters up to which float32 is fast enough


def store_for(n_parameters: int) -> str:
    """How weights are stored where nobody says: float32 where they are few, else bfloat16."""
    return "float32" if n_parameters < SMALL else "bfloat16"


def compress(model: Model, store: str) -> Model:
    """A copy of `model` for decoding, its matrices stored as float32, bfloat16, int8 or int4, where
    the output's is int8; keys and values as float32 only where the weights are.
    """
    copy = for_decoding(model, lambda weight: Matrix(weight, store))
    if store == "int4":
        copy.embedding = Matrix(model.embedding, "int8")
    if model.device.type == "cpu":
        copy.dtype = torch.float32
        copy.cache_dtype = torch.float32 if store == "float32" else torch.bfloat16
        if copy.embedding.kernels is not None:
            for blocks in [
                module for module in copy.modules() if isinstance(module, torch.nn.ModuleList)
            ]:
                for place, block in enumerate(blocks):
                    blocks[place] = FastBlock(block)
    return copy


class FastBlock(torch.nn.Module):
    """A block that decodes a token of each row in one call; a prompt being read goes the common
    way.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block, self.window = block, block.window
        self.heads = block.n_head, block.n_kv_head, block.head_dim
        up = block.up if block.gate is None else block.gate
        self.kernel = BlockKernel(
            block.q,
            block.o,
            up,
            block.down,
            qk_gain=block.channel_gains(),
            exclusion=block.exclusion,
            heads=self.heads,
        )

    def forward(self, x: Tensor, attn_ctx: Any, value: TokenValue | None = None) -> Tensor:
        if getattr(attn_ctx, "n_new", 0) != 1:
            return self.block(x, attn_ctx, value)
        keys, values = attn_ctx.slot(*self.heads[1:], self.window)
        return self.kernel(x, attn_ctx.rotary, keys, values, attn_ctx.seats, value)


# ----------------------------------------------------------------------------------------- sampling


def draw(logits: Tensor, rows: Sequence[_Row], rules: Rules) -> list[int]:
    """The next token of each row from float32 logits (B, V)."""
    sampling = rules.sampling
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    if sampling.repetition_penalty != 1.0:
        logits = penalise(
            logits, [row.ids for row in rows], sampling.repetition_penalty, rules.stop_ids
        )
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    p, token = probabilities(logits, sampling)
    rolled = [0.0 if row.due else row.roll() for row in rows]
    rng = torch.tensor(rolled, dtype=torch.float64, device=p.device)
    return token.gather(1, pick(p, rng)[:, None]).squeeze(1).tolist()


def penalise(logits: Tensor, said: Sequence[Ids], penalty: float, exempt: frozenset[int]) -> Tensor:
    """Logits (B, V) with those of the tokens that a row has `said` lowered: positive ones are
    divided by `penalty`, negative ones multiplied with it (arXiv 1909.05858, with the sign mended).
    Tokens in `exempt` keep theirs.
    """
    logits = logits.clone()
    for row, ids in zip(logits, said, strict=True):
        seen = torch.tensor(list(set(ids) - exempt), dtype=torch.long, device=logits.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


# likeliest tokens that are looked at first: sorting a whole vocabulary costs more than a small
# model
SHORT_LIST = 256


def probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities (B, K), each row adding up to 1, and the tokens (B, K) they belong to.

    After temperature, top-k, min-p and top-p, in this order; tokens that these exclude have
    probability 0.
    """
    p = (logits / sampling.temperature).softmax(dim=-1)
    V = p.shape[-1]
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return p, torch.arange(V, device=p.device).expand_as(p)
    top, token = p.topk(min(SHORT_LIST if sampling.top_k is None else sampling.top_k, V), dim=-1)
    if sampling.top_k is None and not _holds_all_that_count(top, sampling):
        top, token = p.sort(dim=-1, descending=True)
    if sampling.min_p is not None:
        top = top.where(top >= sampling.min_p * top[:, :1], 0)
    top = (
        top / top.sum(dim=-1, keepdim=True) if sampling.top_k or sampling.min_p is not None else top
    )
    if sampling.top_p is not None:
        before = top.cumsum(dim=-1) - top  # what the likelier ones already make up
        before[:, 0] = -1  # the likeliest always stays
        top = top.where(before < sampling.top_p, 0)
    return top / top.sum(dim=-1, keepdim=True), token


def _holds_all_that_count(top: Tensor, sampling: Sampling) -> bool:
    """Whether the likeliest tokens' probabilities (B, K) hold every token that min-p and top-p
    leave.
    """
    if sampling.min_p is not None and bool((top[:, -1] < sampling.min_p * top[:, 0]).all()):
        return True
    return (
        sampling.min_p is None
        and sampling.top_p is not None
        and bool((top.sum(dim=-1) > sampling.top_p).all())
    )


def pick(p: Tensor, rng: Tensor) -> Tensor:
    """The place (B,) at which each row of p (B, K), added up, passes its rng (B,) in [0, 1)."""
    total = p.double().cumsum(dim=-1)
    place = torch.searchsorted(total, rng[:, None] * total[:, -1:], right=True).squeeze(1)
    return place.clamp(max=p.shape[-1] - 1)

"""Tasks with right answers: read them, put them to a base model as texts to continue, score what it
finds likely.

In: JSON lines in the layout of llm-foundry's local data, the tasks that CORE draws on (DCLM, arXiv
2406.11794); a model and its tokenizer. Out: an `Outcome` an item. Prompts, examples and the rule of
choice are those of llm-foundry 0.9, which CORE is defined by; what differs is that the first token
is always `<|bos|>`, as in training. Knows nothing of the chat format.

    choice     query | choice A      which choice is likeliest, per token on average?
               query | choice B
    schema     context A | ending    after which context is the ending likeliest?
               context B | ending
    language   context | ending      is every token of the ending the likeliest one?
"""

from __future__ import annotations

import json
import math
import os
import random
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError
from hearth import log
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.kv_cache import KVCache, decode
from hearth.training import attention
from model import Model

Item = dict[str, Any]

# Where the files are when they are not on this machine: the commit is the last that changed them.
SOURCE = (
    "https://raw.githubusercontent.com/mosaicml/llm-foundry/8c8dd48f72168c5d51e2f7b151595892a8fba43d"
    "/scripts/eval/local_data/"
)


@dataclass(frozen=True)
class Task:
    """A task as DCLM sets it: its file, the number of worked examples, what to subtract
    as chance.
    """

    name: str
    file: str  # below the folder of tasks
    kind: Literal["choice", "schema", "language"]
    shots: int  # worked examples before each item
    # of guessing, or of always naming the commonest answer; DCLM's baselines, version 2
    chance: float
    delimiter: str = " "  # between a question and its answer
    # the mean of the categories' scores; examples come from the item's own
    by_category: bool = False


ANSWER = "\nAnswer: "
CORE = (
    Task("hellaswag_zeroshot", "language_understanding/hellaswag.jsonl", "choice", 0, 0.25),
    Task(
        "jeopardy",
        "world_knowledge/jeopardy_all.jsonl",
        "language",
        10,
        0.0,
        ANSWER,
        by_category=True,
    ),
    Task("bigbench_qa_wikidata", "world_knowledge/bigbench_qa_wikidata.jsonl", "language", 10, 0.0),
    Task("arc_easy", "world_knowledge/arc_easy.jsonl", "choice", 10, 0.25, ANSWER),
    Task("arc_challenge", "world_knowledge/arc_challenge.jsonl", "choice", 10, 0.25, ANSWER),
    Task("copa", "commonsense_reasoning/copa.jsonl", "choice", 0, 0.5),
    Task("commonsense_qa", "commonsense_reasoning/commonsense_qa.jsonl", "choice", 10, 0.403),
    Task("piqa", "commonsense_reasoning/piqa.jsonl", "choice", 10, 0.5, ANSWER),
    Task("openbook_qa", "commonsense_reasoning/openbook_qa.jsonl", "choice", 0, 0.25),
    Task("lambada_openai", "language_understanding/lambada_openai.jsonl", "language", 0, 0.0),
    Task("hellaswag", "language_understanding/hellaswag.jsonl", "choice", 10, 0.25),
    Task("winograd", "language_understanding/winograd_wsc.jsonl", "schema", 0, 0.5),
    Task("winogrande", "language_understanding/winogrande.jsonl", "schema", 0, 0.5),
    Task(
        "bigbench_dyck_languages",
        "symbolic_problem_solving/bigbench_dyck_languages.jsonl",
        "language",
        10,
        0.0,
    ),
    Task("agi_eval_lsat_ar", "symbolic_problem_solving/agi_eval_lsat_ar.jsonl", "choice", 3, 0.25),
    Task(
        "bigbench_cs_algorithms",
        "symbolic_problem_solving/bigbench_cs_algorithms.jsonl",
        "language",
        10,
        0.0,
    ),
    Task(
        "bigbench_operators",
        "symbolic_problem_solving/bigbench_operators.jsonl",
        "language",
        10,
        0.0,
    ),
    Task(
        "bigbench_repeat_copy_logic",
        "symbolic_problem_solving/bigbench_repeat_copy_logic.jsonl",
        "language",
        10,
        0.0,
    ),
    Task("squad", "reading_comprehension/squad.jsonl", "language", 10, 0.0),
    Task("coqa", "reading_comprehension/coqa.jsonl", "language", 0, 0.0),
    Task("boolq", "reading_comprehension/boolq.jsonl", "choice", 10, 0.62, ANSWER),
    Task(
        "bigbench_language_identification",
        "language_understanding/bigbench_language_identification.jsonl",
        "choice",
        10,
        0.25,
    ),
)
MMLU = Task("mmlu", "world_knowledge/mmlu.jsonl", "choice", 5, 0.25, ANSWER, by_category=True)
TASKS = {task.name: task for task in (*CORE, MMLU)}
FILE_NAMES = {  # other names under which a task's file is found
    "hellaswag.jsonl": ("hellaswag_val.jsonl",),
    "mmlu.jsonl": ("mmlu/test.jsonl",),
    "gsm8k.jsonl": ("gsm8k_test.jsonl",),
}


# -------------------------------------------------------------------------------------------- files


class Unreachable(UserError):
    """The network that a file would come over is not there."""


def find_file(file: str, folder: Path | None, store: Path) -> Path:
    """The task's file: below `folder`, where one is named; else below `store`, brought there from
    `SOURCE`.

    In a folder it may lie as in llm-foundry's `local_data`, or by its name alone, also in eval/ and
    eval/core/. Raises `UserError` where it is not to be had.
    """
    if folder is None:
        return fetch(file, store)
    name = Path(file).name
    places = [folder / place for place in ("", "core", "eval", "eval/core")]
    tried = [place / path for place in places for path in (file, name, *FILE_NAMES.get(name, ()))]
    for path in tried:
        if path.is_file():
            return path
    raise UserError(
        f"{name} is not in {folder}: looked for "
        f"{', '.join(str(p.relative_to(folder)) for p in tried)}."
    )


def fetch(file: str, store: Path) -> Path:
    """The file in `store`, downloaded once."""
    path = store / file
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    log.say(f"fetching {SOURCE}{file}")
    try:
        with urllib.request.urlopen(SOURCE + file, timeout=60) as answer, part.open("wb") as out:
            while block := answer.read(1 << 20):
                out.write(block)
    except OSError as error:  # urllib's errors are of this kind
        part.unlink(missing_ok=True)
        refused = isinstance(error, urllib.error.HTTPError)  # by a network that is there
        raise (UserError if refused else Unreachable)(
            f"{Path(file).name} could not be fetched: {error}. Bring the tasks here yourself and "
            "name their folder "
            f"with --files: they are scripts/eval/local_data of github.com/mosaicml/llm-foundry."
        ) from error
    os.replace(part, path)
    return path


def read_items(path: Path) -> list[Item]:
    """The items of a file, in llm-foundry's layout; HellaSwag's and MMLU's own are
    brought into it.
    """
    items = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    items.append(as_item(json.loads(line)))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(
                        f"{path}, line {number} is no item of a task: {error!r}."
                    ) from error
    if not items:
        raise UserError(f"{path} holds no items.")
    return items


def as_item(row: Item) -> Item:
    """A row with its texts stripped; of the layouts known, each by its columns."""
    if "endings" in row:  # HellaSwag
        row = {"query": row["ctx"], "choices": row["endings"], "gold": int(row["label"])}
    elif {"question", "choices", "answer"} <= set(row):  # MMLU: the answer a letter or a number
        letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
        options = "\n".join(
            f"{letter}. {text}" for letter, text in zip(letters, row["choices"], strict=True)
        )
        gold = (
            letters.index(row["answer"]) if isinstance(row["answer"], str) else int(row["answer"])
        )
        query = f"{row['question'].strip()}\n{options}"
        row = {"query": query, "choices": letters, "gold": gold, "category": row.get("subject", "")}
    texts = (
        {"query", "choices", "gold"},
        {"context_options", "continuation", "gold"},
        {"context"},
        {"question"},
    )
    if not any(columns <= set(row) for columns in texts):
        raise KeyError(f"columns {', '.join(row)}")
    return {name: value.strip() if isinstance(value, str) else value for name, value in row.items()}


# ------------------------------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class Prompt:
    """The texts that one item comes to, as ids: each row is scored from its `start` on."""

    rows: list[list[int]]
    starts: list[int]
    gold: int = 0
    category: str = ""
    cut: bool = False  # whether a beginning was left out to fit the context


def prompts(
    task: Task, items: Sequence[Item], tokenizer: Tokenizer, context: int, limit: int | None
) -> list[Prompt]:
    """Every item as a model reads it; with `limit` the first ones of each category only, their
    examples unchanged.
    """
    categories: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        categories[item.get("category", "") if task.by_category else ""].append(item)
    texts = []  # (item's category, gold, [(examples, context, ending)])
    for category, members in sorted(categories.items()):
        rng = random.Random(1234)  # the seed of llm-foundry
        share = None if limit is None else math.ceil(limit * len(members) / len(items))
        for index, item in enumerate(members[:share]):
            examples = [members[i] for i in draw_examples(len(members), task.shots, index, rng)]
            texts.append((category, int(item.get("gold", 0)), texts_of(task, item, examples)))
    texts = texts[:limit]
    each_once = list({text: None for _, _, rows in texts for row in rows for text in row})
    ids = dict(zip(each_once, tokenizer.encode_batch(each_once), strict=True))
    return [
        prompt_of(
            [tuple(ids[text] for text in row) for row in rows],
            tokenizer.bos,
            context,
            gold=gold,
            category=category,
        )
        for category, gold, rows in texts
    ]


def draw_examples(n_items: int, shots: int, index: int, rng: random.Random) -> list[int]:
    """Which items stand before item `index` as worked examples: llm-foundry's draw, to the last
    one.
    """
    if shots == 0:
        return []
    shots = min(n_items - 1, shots)
    drawn = set(rng.sample(range(n_items), shots))
    if index in drawn:
        drawn.remove(index)
        if len(drawn) >= n_items - 1:
            return list(drawn)
        another = rng.choice(range(n_items))
        while another in drawn or another == index:
            another = rng.choice(range(n_items))
        drawn.add(another)
    return list(drawn)


def texts_of(task: Task, item: Item, examples: Sequence[Item]) -> list[tuple[str, str, str]]:
    """What each row of an item is made of: the worked examples, the context, the scored ending."""
    shown = ""
    for example in examples:
        shown += ("\n" if shown else "") + example_text(task, example)
    line = "\n" if shown else ""
    if task.kind == "choice":
        context = f"{line}{item['query']}{task.delimiter}".rstrip()
        return [(shown, context, spaced(choice)) for choice in item["choices"]]
    if task.kind == "schema":
        after = task.delimiter.rstrip() if shown else ""
        return [
            (shown, f"{line}{option}{after}", spaced(item["continuation"]))
            for option in item["context_options"]
        ]
    return [
        (shown, f"{line}{item['context']}{task.delimiter}".rstrip(), spaced(item["continuation"]))
    ]


def example_text(task: Task, item: Item) -> str:
    """An item with its right answer."""
    if task.kind == "choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    context = item["context_options"][item["gold"]] if task.kind == "schema" else item["context"]
    return f"{context}{task.delimiter}{item['continuation']}"


def spaced(ending: str) -> str:
    return ending if ending.startswith(" ") else f" {ending}"


def prompt_of(
    ids: Sequence[tuple[list[int], list[int], list[int]]],
    bos: int,
    context: int,
    *,
    gold: int = 0,
    category: str = "",
) -> Prompt:
    """The rows of one item in at most `context` tokens: what is too long loses its beginning, after
    `<|bos|>`.
    """
    endings = [ending[: context - 1] for _, _, ending in ids]
    room = context - 1 - max(map(len, endings))  # for what stands before: the same for every option
    rows, starts, cut = [], [], False
    for (examples, before, _), ending in zip(ids, endings, strict=True):
        before = examples + before
        cut |= len(before) > room
        before = [bos, *(before[len(before) - room :] if len(before) > room else before)]
        rows.append(before + ending)
        starts.append(len(before))
    return Prompt(rows, starts, gold, category, cut)


# ------------------------------------------------------------------------------------------ scoring


@dataclass(frozen=True)
class Outcome:
    """How an item came out: the scored texts' cross-entropy, and what the model chose."""

    nats: list[float]  # summed over each row's scored tokens
    n_tokens: list[int]
    greedy: list[bool]  # whether every scored token was the likeliest one
    gold: int
    category: str = ""

    def choice(self) -> int:
        """The likeliest row per token, as CORE chooses."""
        means = [nats / n for nats, n in zip(self.nats, self.n_tokens, strict=True)]
        return means.index(min(means))

    @property
    def right(self) -> bool:
        return self.greedy[0] if len(self.nats) == 1 else self.choice() == self.gold


def outcomes(
    model: Model, asked: Sequence[Prompt], *, batch_tokens: int = 4096, title: str = ""
) -> list[Outcome]:
    """Every prompt scored, in order. The beginning that an item's rows share is computed once.

    `batch_tokens` bounds the columns of a pass, and with them its memory.
    """
    shared = [shared_length(prompt) if len(prompt.rows) > 1 else 0 for prompt in asked]
    order = sorted(
        range(len(asked)), key=lambda i: (len(asked[i].rows) > 1, shared[i], len(asked[i].rows[0]))
    )
    found: list[Outcome | None] = [None] * len(asked)
    with log.progress(len(asked), "item", title) as bar:
        for batch in batched(order, asked, batch_tokens):
            scored = score_batch(model, [asked[i] for i in batch], [shared[i] for i in batch])
            for i, outcome in zip(batch, scored, strict=True):
                found[i] = outcome
            bar.update(len(batch))
    return found


def shared_length(prompt: Prompt) -> int:
    """How many ids all rows begin with, the one before a scored token left out: it is what predicts
    that token.
    """
    first, *others = prompt.rows
    longest = min(prompt.starts) - 1
    for row in others:
        if row[:longest] != first[:longest]:
            longest = next(i for i, (a, b) in enumerate(zip(row, first, strict=False)) if a != b)
    return longest


def batched(
    order: Sequence[int], asked: Sequence[Prompt], batch_tokens: int
) -> Iterable[list[int]]:
    """Prompts in `order`, as many at once as `batch_tokens` columns hold, a row for each option."""
    batch: list[int] = []
    columns = n_rows = 0
    for i in order:
        columns, n_rows = max(columns, *map(len, asked[i].rows), 1), n_rows + len(asked[i].rows)
        if batch and n_rows * columns > batch_tokens:
            yield batch
            batch, columns, n_rows = [], max(map(len, asked[i].rows)), len(asked[i].rows)
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def score_batch(model: Model, asked: Sequence[Prompt], shared: Sequence[int]) -> list[Outcome]:
    """The outcomes of prompts that are computed together."""
    rests = [row[n:] for prompt, n in zip(asked, shared, strict=True) for row in prompt.rows]
    lost = [n for prompt, n in zip(asked, shared, strict=True) for _ in prompt.rows]
    starts = [start for prompt in asked for start in prompt.starts]
    spans = [(start - n, len(rest)) for start, n, rest in zip(starts, lost, rests, strict=True)]
    hidden = (
        after_shared(model, asked, shared, rests) if any(shared) else side_by_side(model, rests)
    )
    nats, greedy = score_spans(model, hidden, rests, spans)
    results, at = [], 0
    for prompt in asked:
        here = slice(at, at + len(prompt.rows))
        n_tokens = [stop - start for start, stop in spans[here]]
        results.append(Outcome(nats[here], n_tokens, greedy[here], prompt.gold, prompt.category))
        at = here.stop
    return results


def side_by_side(model: Model, rows: Sequence[list[int]]) -> Tensor:
    """Hidden states (B, T, D) of texts that share nothing, in one pass; what is behind a text's end
    means nothing.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    starts = torch.zeros_like(ids, dtype=torch.bool).flatten()
    return model(ids.flatten(), attention.packed(model, starts, width)).view(*ids.shape, -1)


def after_shared(
    model: Model, asked: Sequence[Prompt], shared: Sequence[int], rests: Sequence[list[int]]
) -> Tensor:
    """Hidden states (B, T, D) of what follows shared beginnings, which are computed once for all
    rows of a prompt.

    columns    . . a b c | d e .     beginnings end in one column, a prompt's rows continue there
               . . a b c | f . .     padding in front is seen by none, padding behind is not scored
               p q r s t | u v w
    """
    longest, width = max(shared), max(map(len, rests))
    cache = KVCache(
        len(asked), longest + width, pad=[longest - n for n in shared], device=model.device
    )
    beginnings = [
        [0] * (longest - n) + prompt.rows[0][:n] for prompt, n in zip(asked, shared, strict=True)
    ]
    for chunk in chunks(beginnings, longest + width, model):
        decode(model, chunk, cache)
    cache.keep_rows([i for i, prompt in enumerate(asked) for _ in prompt.rows])
    padded = [rest + [0] * (width - len(rest)) for rest in rests]
    return torch.cat(
        [decode(model, chunk, cache) for chunk in chunks(padded, longest + width, model)], dim=1
    )


SCORES_PER_PASS = 2**26  # attention scores of one head alive at once
LOGITS_PER_PASS = 2**25


def chunks(ids: list[list[int]], columns: int, model: Model) -> Iterable[Tensor]:
    """ids (B, T) a few columns at a time, so that the attention masks stay small."""
    return torch.tensor(ids, device=model.device).split(
        max(1, SCORES_PER_PASS // (len(ids) * columns)), dim=1
    )


def score_spans(
    model: Model, hidden: Tensor, rows: Sequence[list[int]], spans: Sequence[tuple[int, int]]
) -> tuple[list[float], list[bool]]:
    """Summed cross-entropy and greediness of rows[i][start:stop], from hidden states (B, T, D) at
    the rows' ids.
    """
    places = [(i, t) for i, (start, stop) in enumerate(spans) for t in range(start, stop)]
    index = torch.tensor(places, device=hidden.device)
    targets = torch.tensor([rows[i][t] for i, t in places], device=hidden.device)
    # (N, D): the states that predict the scored tokens
    picked = hidden[index[:, 0], index[:, 1] - 1]
    nats, greedy = [], []
    size = max(1, LOGITS_PER_PASS // model.config.vocab_size)
    for part, target in zip(picked.split(size), targets.split(size), strict=True):
        logits = model.logits(part)
        nats.append(F.cross_entropy(logits, target, reduction="none").cpu().double())
        greedy.append(logits.argmax(dim=-1) == target)
    owner = index[:, 0].cpu()  # Apple's chips have no float64
    sums = torch.zeros(len(rows), dtype=torch.double).index_add_(0, owner, torch.cat(nats))
    misses = torch.zeros(len(rows)).index_add_(0, owner, (~torch.cat(greedy)).float().cpu())
    return sums.tolist(), (misses == 0).tolist()


# ------------------------------------------------------------------------------------------- scores


def mean_and_error(marks: Sequence[bool | float]) -> tuple[float, float]:
    """The mean and its standard error."""
    n = len(marks)
    mean = sum(marks) / n
    spread = sum((mark - mean) ** 2 for mark in marks)
    return mean, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan


def accuracy(found: Sequence[Outcome]) -> tuple[float, float]:
    """The share of right outcomes and its standard error; the mean over categories where there are
    several.
    """
    by_category: dict[str, list[bool]] = defaultdict(list)
    for outcome in found:
        by_category[outcome.category].append(outcome.right)
    parts = [mean_and_error(marks) for marks in by_category.values()]
    mean = sum(value for value, _ in parts) / len(parts)
    return mean, math.sqrt(sum(error**2 for _, error in parts)) / len(parts)


def centred(value: float, chance: float) -> float:
    """A score on the scale where chance is 0 and all right is 1."""
    return (value - chance) / (1 - chance)

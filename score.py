"""Score checkpoints: bits per byte, CORE's 22 tasks, chat tasks, the demo world's questions; side
by side if you like.

In: a run's furthest checkpoint, or any others; the tasks' files, from a folder or fetched. Out: a
table on the console, runs/<run>/report/score.json, and the run's report redrawn.

    uv run score.py --preset demo
    uv run score.py --preset 16gb --tasks core
        one group of tasks: bpb, world, core, chat
    uv run score.py --preset 16gb --tasks piqa arc_easy --limit 500
        some tasks, the first items of each
    uv run score.py --preset 16gb --compare base sft1 sft2
        stages side by side
    uv run score.py --compare runs/a runs/b
        runs side by side, with a page of both
    uv run score.py --preset 16gb --lm-eval arc_easy hellaswag
        any task of lm-eval (uv sync --extra lm-eval)
"""

from __future__ import annotations

import hearth  # noqa: F401  # isort: skip (first: it ends Ctrl-C during the imports in a line)

import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from config import REASONING_PROMPT, Config, UserError
from hearth import cli, hardware, log
from hearth.data import demo_world
from hearth.data.chat_format import Answer, parse_answer, render
from hearth.data.token_shards import TokenShards
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Engine
from hearth.evaluation import tasks
from hearth.reporting import report
from hearth.storage import write_json
from hearth.training import checkpoint
from hearth.training.batches import validation_batches
from hearth.training.checkpoint import Loaded
from model import PackedSequences


@dataclass(frozen=True)
class Options:
    """What only this script knows."""

    # checkpoints, stages (base sft1 sft2) or runs; none is the run's furthest stage
    checkpoint: tuple[str, ...] = ()
    # the same, side by side: takes scores that are there already, draws a page of runs
    compare: tuple[str, ...] = ()
    # groups (bpb world core chat) or single tasks; none is what suits the checkpoint
    tasks: tuple[str, ...] = ()
    files: str | None = None  # folder with the tasks' files; None is $HEARTH_DATA, or fetches them
    limit: int | None = None  # score only the first items of each task
    n_questions: int = 200  # held-out questions asked about the demo world
    show_wrong: int = 5  # wrong answers about the demo world that are printed
    lm_eval: tuple[str, ...] = ()  # tasks of lm-eval to run as well
    lm_eval_files: str | None = None  # folder with your own task files for lm-eval


NAMES = 46  # width of the column of names


@dataclass(frozen=True)
class Score:
    """One figure of one checkpoint."""

    task: str
    metric: str  # accuracy, share, centred accuracy, bits per byte, tokens
    value: float
    stderr: float | None = None
    chance: float | None = None
    n: int = 0  # items
    shots: int | None = None
    cut: int = 0  # items whose beginning was left out to fit the context
    seconds: float = 0.0
    headline: bool = False  # whether it belongs at the top of the report


def main(config: Config, options: Options) -> None:
    """Score every checkpoint asked for, print the scores side by side, keep them, draw
    the report.
    """
    wanted = options.compare or options.checkpoint
    folders = [find(name, config) for name in wanted] if wanted else [checkpoint.furthest(config)]
    columns = [score_checkpoint(folder, config, options) for folder in folders]
    print_table(folders, columns)
    runs = list(dict.fromkeys(run_folder(folder, config) for folder in folders))
    for run in runs:
        page = report.write(of_run(run, config)) if config.report.draw else None
    if options.compare and len(runs) > 1:
        page = report.compare(runs, config)
    if page:
        log.say(f"report: {page}")


def find(name: str, config: Config) -> Path:
    """The checkpoint that `name` means: a stage of this run, or a folder of a checkpoint, a stage
    or a run.
    """
    if name in report.STAGES and (found := checkpoint.newest(config.run_dir / name)):
        return found
    folder = Path(name)
    if (folder / "state.json").is_file():
        return folder
    if found := checkpoint.newest(folder):
        return found
    if any((folder / stage).is_dir() for stage in report.STAGES):
        return checkpoint.furthest(of_run(folder, config))
    raise UserError(
        f"{name!r} is no checkpoint: neither a stage of {config.run_dir} "
        f"({', '.join(report.STAGES)}) with one, nor a "
        f"folder of a checkpoint, a stage or a run."
    )


def of_run(folder: Path, config: Config) -> Config:
    """The config with another run's folder."""
    return replace(config, runs=str(folder.parent), name=folder.name)


def run_folder(folder: Path, config: Config) -> Path:
    """The run that a checkpoint belongs to; one that lies elsewhere counts to the run at hand."""
    return folder.parent.parent if folder.parent.name in report.STAGES else config.run_dir


# ----------------------------------------------------------------------------------- one checkpoint


@dataclass(frozen=True)
class Bench:
    """What scoring needs: the checkpoint, where it lies, what was asked for; and what had to be
    left out, by reason.
    """

    loaded: Loaded
    run: Path
    options: Options
    store: Path  # where fetched files are kept
    left_out: dict[str, list[str]] = field(default_factory=dict)
    # why nothing more is fetched, once that is known
    offline: list[tasks.Unreachable] = field(default_factory=list)

    @property
    def files(self) -> Path | None:
        named = self.options.files or os.environ.get("HEARTH_DATA")
        return Path(named) if named else None

    def items(self, file: str) -> list[tasks.Item]:
        """The items of a task's file, brought here where it must be; a network that is not there is
        asked once.
        """
        if self.files is None and self.offline and not (self.store / file).is_file():
            raise self.offline[0]
        try:
            return tasks.read_items(tasks.find_file(file, self.files, self.store))
        except tasks.Unreachable as error:
            self.offline.append(error)
            raise


def score_checkpoint(folder: Path, config: Config, options: Options) -> list[Score]:
    """All scores asked for of one checkpoint; they join the score.json of its run."""
    loaded = checkpoint.load_for_inference(folder, hardware.pick_device(config.device))
    run = run_folder(folder, config)
    book = ScoreBook(run / "report" / "score.json", folder, loaded.state)
    bench = Bench(loaded, run, options, Path(config.runs) / "tasks")
    log.say(f"score of {folder}")
    scores: list[Score] = []
    for name in tasks_wanted(loaded, options):
        known = book.known(name, options) if options.compare else None
        scores += known if known is not None else scored(name, bench, book)
    for reason, names in bench.left_out.items():
        log.say(f"left out: {', '.join(names)}. {reason}")
    core = core_score(scores)
    scores = [*core, *scores]
    book.keep("core", core, options)
    if options.lm_eval:
        others = lm_eval_scores(bench)
        book.keep("lm-eval", others, options)
        scores += others
    return scores


def tasks_wanted(loaded: Loaded, options: Options) -> list[str]:
    """The names of single tasks: those asked for, or what suits the checkpoint."""
    chats = loaded.state["stage"] != "base"
    if options.tasks:
        names = options.tasks
    elif any(source.demo for source in loaded.config.data.corpora()):
        names = ("bpb", "world")
    else:
        names = ("bpb", "core", "mmlu", *(("chat",) if chats else ()))
    groups = {"core": [task.name for task in tasks.CORE], "chat": list(CHAT)}
    singles = list(dict.fromkeys(single for name in names for single in groups.get(name, [name])))
    known = ["bpb", "world", *tasks.TASKS, *CHAT]
    if unknown := [name for name in singles if name not in known]:
        raise UserError(
            f"There is no task {', '.join(unknown)}. Groups: bpb, world, core, chat. Tasks: "
            f"{', '.join(known)}."
        )
    # beside chat models its places in the table stay empty
    if not chats and len(options.compare) > 1:
        return [name for name in singles if name not in CHAT]
    return singles


def scored(name: str, bench: Bench, book: ScoreBook) -> list[Score]:
    """One task's scores, printed and kept; none where its files are missing and it was not asked
    for by name.
    """
    started = time.monotonic()
    try:
        if name == "bpb":
            found = bits_per_byte_scores(bench)
        elif name == "world":
            found = world_scores(bench, book)
        elif name in CHAT:
            found = chat_scores(name, bench)
        else:
            found = [task_score(tasks.TASKS[name], bench)]
    except UserError as error:
        if name in bench.options.tasks:
            raise
        bench.left_out.setdefault(str(error), []).append(name)
        return []
    found = [replace(score, seconds=time.monotonic() - started) for score in found]
    for score in found:
        log.say(line(score))
    book.keep(name, found, bench.options)
    return found


def line(score: Score) -> str:
    """One score on the console."""
    chance = f"chance {score.chance:6.1%}" if score.chance is not None else ""
    shots = f"{score.shots}-shot" if score.shots is not None else ""
    left = f"{score.task:<{NAMES}}{in_words(score):>17}  {chance:<13}{score.n:>7} items"
    cut = f"  {score.cut} prompts cut to fit the context" if score.cut else ""
    return f"{left}  {shots:<8}{log.duration(score.seconds):>7}{cut}"


def in_words(score: Score) -> str:
    """A score with its standard error."""
    if score.metric == "bits per byte":
        return f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")
    if score.metric == "tokens":
        return f"{score.value:.1f}" + (
            f" ± {score.stderr:4.1f}" if score.stderr is not None else ""
        )
    return f"{score.value:.1%}" + (
        f" ± {100 * score.stderr:4.1f}" if score.stderr is not None else ""
    )


def print_table(folders: Sequence[Path], columns: Sequence[Sequence[Score]]) -> None:
    """Several checkpoints' scores side by side."""
    if len(folders) < 2:
        return
    names = list(dict.fromkeys(score.task for column in columns for score in column))
    heads = [
        str(folder) if folder.parent.name not in report.STAGES else "/".join(folder.parts[-3:-1])
        for folder in folders
    ]
    width = max(18, *(len(head) + 2 for head in heads))
    log.say()
    log.say(f"{'':<{NAMES}}" + "".join(f"{head:>{width}}" for head in heads))
    for name in names:
        cells = [
            next((in_words(score) for score in column if score.task == name), "–")
            for column in columns
        ]
        log.say(f"{name:<{NAMES}}" + "".join(f"{cell:>{width}}" for cell in cells))


class ScoreBook:
    """score.json of a run: every score of the newest checkpoint of each stage, and the demo world's
    answers.
    """

    def __init__(self, path: Path, folder: Path, state: dict[str, Any]) -> None:
        self.path = path
        self.place = {
            "checkpoint": str(folder),
            "stage": state["stage"],
            "step": state["step"],
            "tokens": state["tokens"],
        }
        self.book = report.read_json(path)
        others = [
            r
            for r in self.book.get("scores", [])
            if r.get("stage") != state["stage"] or self._is_here(r)
        ]
        self.book["scores"] = others

    def _is_here(self, record: dict[str, Any]) -> bool:
        return all(record.get(name) == value for name, value in self.place.items())

    def keep(self, source: str, scores: Iterable[Score], options: Options) -> None:
        """Note the scores of a task in place of earlier ones."""
        kept = [
            r for r in self.book["scores"] if not (self._is_here(r) and r.get("source") == source)
        ]
        new = [
            {**self.place, "source": source, "limit": options.limit, **asdict(score)}
            for score in scores
        ]
        self.book["scores"] = kept + new
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.book)

    def known(self, source: str, options: Options) -> list[Score] | None:
        """The scores of a task as they were noted of this very checkpoint, None where they were
        not.
        """
        mine = [r for r in self.book["scores"] if self._is_here(r) and r.get("source") == source]
        if not mine or any(r.get("limit") != options.limit for r in mine):
            return None
        return [Score(**{name: r[name] for name in Score.__dataclass_fields__}) for r in mine]


# ------------------------------------------------------------------------------------ bits per byte


def bits_per_byte_scores(bench: Bench) -> list[Score]:
    """Bits per byte of each corpus' held-out documents, with the standard error over documents."""
    loaded, found = bench.loaded, []
    for source in loaded.config.data.corpora():
        shards = TokenShards(
            bench.run / "tokens" / source.name,
            "validation",
            loaded.config.command("train_tokenizer.py"),
        )
        if shards.tokenizer_hash != loaded.tokenizer.hash:
            raise UserError(
                f"{shards.folder} was made with another tokenizer than the checkpoint's."
            )
        value, error, n = bits_per_byte(loaded, shards, bench.options.limit)
        found.append(Score(f"{source.name}, held out", "bits per byte", value, error, n=n))
    return found


def bits_per_byte(
    loaded: Loaded, shards: TokenShards, limit: int | None
) -> tuple[float, float, int]:
    """Bits a byte, its standard error as a ratio of sums over documents, and the number of
    documents.

    Reads what an evaluation in pretraining reads: the same tokens, the end of each document counted
    with it.
    """
    loop, model = loaded.config.pretrain, loaded.model
    max_tokens = loop.eval_tokens
    if limit is not None and limit < shards.n_documents:
        max_tokens = min(max_tokens, int(shards.ends[limit - 1]))
    nats: list[np.ndarray] = []
    document: list[np.ndarray] = []
    n_bytes: list[np.ndarray] = []
    last = 0
    for batch in validation_batches(
        shards,
        context=model.config.context,
        max_tokens=max_tokens,
        micro_tokens=loop.micro_batch_tokens or 4 * model.config.context,
        bos=loaded.tokenizer.bos,
    ):
        counted = batch.weights.numpy() > 0
        of_token = last + np.cumsum(batch.ids.numpy() == loaded.tokenizer.bos)
        nats.append(token_losses(loaded, batch)[counted])
        document.append(of_token[counted])
        n_bytes.append(loaded.tokenizer.token_bytes[batch.targets.numpy()[counted]])
        last = int(of_token[counted][-1])
    places = np.concatenate(document)
    sums, sizes = (np.bincount(places, np.concatenate(x))[places.min() :] for x in (nats, n_bytes))
    ratio, n = sums.sum() / max(1, sizes.sum()), len(sums)
    spread = ((sums - ratio * sizes) ** 2).sum() * n / max(1, n - 1)
    return ratio / math.log(2), math.sqrt(spread) / max(1, sizes.sum()) / math.log(2), n


@torch.inference_mode()
def token_losses(loaded: Loaded, batch: Any) -> np.ndarray:
    """The cross-entropy of every target, in nats."""
    model = loaded.model
    batch = batch.to(model.device)
    hidden = model(batch.ids, PackedSequences(batch.starts, batch.row_length, model.device))
    size = max(1, tasks.LOGITS_PER_PASS // model.config.vocab_size)
    parts = zip(hidden.split(size), batch.targets.split(size), strict=True)
    return (
        torch.cat([F.cross_entropy(model.logits(h), t, reduction="none") for h, t in parts])
        .double()
        .cpu()
        .numpy()
    )


# --------------------------------------------------------------------------------------- base tasks


def task_score(task: tasks.Task, bench: Bench) -> Score:
    """One task of CORE, or MMLU, as a base model does it: by what it finds likely."""
    loaded = bench.loaded
    items = bench.items(task.file)
    asked = tasks.prompts(
        task, items, loaded.tokenizer, loaded.model.config.context, bench.options.limit
    )
    batch_tokens = 131_072 if loaded.model.device.type == "cuda" else 4096
    found = tasks.outcomes(loaded.model, asked, batch_tokens=batch_tokens, title=task.name)
    value, error = tasks.accuracy(found)
    cut = sum(prompt.cut for prompt in asked)
    return Score(
        task.name, "accuracy", value, finite(error), task.chance, len(found), task.shots, cut
    )


def core_score(scores: Sequence[Score]) -> list[Score]:
    """The mean of the tasks' centred accuracies: CORE where all 22 are there, else how many of them
    it is over.
    """
    mine = [score for score in scores if score.task in {task.name for task in tasks.CORE}]
    if len(mine) < 2:
        return []
    value = sum(tasks.centred(score.value, score.chance) for score in mine) / len(mine)
    errors = [(score.stderr or 0.0) / (1 - score.chance) for score in mine]
    name = (
        "CORE" if len(mine) == len(tasks.CORE) else f"{len(mine)} of CORE's {len(tasks.CORE)} tasks"
    )
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(mine)
    n, seconds = sum(score.n for score in mine), sum(score.seconds for score in mine)
    core = Score(name, "centred accuracy", value, stderr, 0.0, n, seconds=seconds, headline=True)
    log.say(line(core))
    return [core]


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --------------------------------------------------------------------------------------- chat tasks


@dataclass(frozen=True)
class ChatQuestion:
    """A question put to a chat model, and what makes an answer right."""

    text: str
    reasons: bool  # whether the system prompt asks for reasoning
    is_right: Callable[[Answer], bool]


@dataclass(frozen=True)
class Reply:
    """A model's answer: what it said, whether it ended by itself, whether it reasoned as it was
    asked to.
    """

    answer: Answer
    stopped: bool
    as_asked: bool
    n_thought: int | None = None  # tokens of its reasoning, None where there is none

    @property
    def keeps_format(self) -> bool:
        """Whether it is an answer that ended, with reasoning before it exactly where that was asked
        for.
        """
        return self.stopped and self.as_asked and bool(self.answer.content.strip())


def ask(
    loaded: Loaded, questions: Sequence[tuple[str, bool]], max_tokens: int, title: str = ""
) -> list[Reply]:
    """The likeliest answer to each (question, whether to reason), each asked as a conversation of
    its own.
    """
    engine, tokenizer, context = Engine(loaded.model), loaded.tokenizer, loaded.model.config.context
    room = context - min(max_tokens, context // 4)
    prompts = [
        render(messages(text, reasons), tokenizer, answer=True).ids for text, reasons in questions
    ]
    prompts = [ids if len(ids) <= room else [ids[0], *ids[-room + 1 :]] for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: dict[int, Reply] = {}
    with log.progress(len(prompts), "answer", title) as bar:
        for first in range(0, len(order), engine.max_rows):
            part = order[first : first + engine.max_rows]
            answers = engine.generate(
                [prompts[i] for i in part], max_tokens=max_tokens, stop_ids=[tokenizer.end]
            )
            for i, ids in zip(part, answers, strict=True):
                answer = parse_answer(ids, tokenizer)
                as_asked = (answer.thinking is not None) == questions[i][1]
                replies[i] = Reply(
                    answer, ids[-1:] == [tokenizer.end], as_asked, thinking_tokens(ids, tokenizer)
                )
            bar.update(len(part))
    return [replies[i] for i in range(len(prompts))]


def messages(text: str, reasons: bool) -> list[dict[str, str]]:
    """The question as a conversation; reasoning is asked for by the system prompt."""
    system = [{"role": "system", "content": REASONING_PROMPT}] if reasons else []
    return [*system, {"role": "user", "content": text}]


def thinking_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> int | None:
    """How many ids an answer spends on reasoning, None where it does not reason."""
    if ids[:1] != [tokenizer.think]:
        return None
    return next(
        (n for n, token in enumerate(ids[1:]) if token in (tokenizer.end_think, tokenizer.end)),
        len(ids) - 1,
    )


def behaviour(replies: Sequence[Reply], where: str) -> list[Score]:
    """The share of answers that end by themselves, that reason exactly when asked to, that keep the
    format in both and say something; and the mean length of the reasoning, in tokens, over the
    answers that have any.
    """
    found = []
    for name, marks in (
        ("stops by itself", [reply.stopped for reply in replies]),
        ("thinks exactly when asked", [reply.as_asked for reply in replies]),
        ("keeps the format", [reply.keeps_format for reply in replies]),
    ):
        value, error = tasks.mean_and_error(marks)
        found.append(Score(f"{where}: {name}", "share", value, finite(error), n=len(marks)))
    if lengths := [reply.n_thought for reply in replies if reply.n_thought is not None]:
        value, error = tasks.mean_and_error(lengths)
        found.append(
            Score(
                f"{where}: length of the reasoning", "tokens", value, finite(error), n=len(lengths)
            )
        )
    return found


def chat_scores(name: str, bench: Bench) -> list[Score]:
    """A chat task: questions answered by generation, the answers judged."""
    if bench.loaded.state["stage"] == "base":
        raise UserError("a base model holds no conversations; score sft1 or sft2.")
    file, read, chance, max_tokens = CHAT[name]
    rows = bench.items(file)[: bench.options.limit]
    asked = [read(row) for row in rows]
    replies = ask(bench.loaded, [(q.text, q.reasons) for q in asked], max_tokens, name)
    marks = [
        question.is_right(reply.answer) for question, reply in zip(asked, replies, strict=True)
    ]
    value, error = tasks.mean_and_error(marks)
    return [
        Score(name, "accuracy", value, finite(error), chance, len(marks), shots=0),
        *behaviour(replies, name),
    ]


def gsm8k_question(row: dict[str, Any]) -> ChatQuestion:
    """A word problem; right is an answer that means the same number."""
    text = row.get("question") or row["context"]
    gold = str(row["answer"]).rsplit("####", 1)[-1].strip()
    return ChatQuestion(text, True, lambda answer: same_number(gold, answer.content))


def same_number(gold: str, said: str) -> bool:
    """Whether the last expression of what was said means the same as `gold`."""
    from math_verify import parse, verify

    return bool(verify(parse(gold), parse(said)))


def letter_question(row: dict[str, Any]) -> ChatQuestion:
    """A question with lettered choices; right is an answer whose first lone letter is the right
    one.
    """
    query, choices = row["query"], row["choices"]
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    if choices != letters:  # the query does not list them yet
        query = "\n".join(
            [query, *(f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True))]
        )
    text = f"{query}\nAnswer with the letter of the right choice."
    return ChatQuestion(
        text, False, lambda answer: first_letter(answer.content, letters) == letters[row["gold"]]
    )


def first_letter(said: str, letters: Sequence[str]) -> str | None:
    """The first of the letters that stands alone in what was said."""
    found = re.search(rf"(?<!\w)[{''.join(letters)}](?!\w)", said)
    return found.group() if found else None


# name → file, how a row becomes a question, chance, longest answer in tokens
CHAT: dict[str, tuple[str, Callable[[dict[str, Any]], ChatQuestion], float, int]] = {
    "gsm8k_chat": ("symbolic_problem_solving/gsm8k.jsonl", gsm8k_question, 0.0, 512),
    "mmlu_chat": (tasks.MMLU.file, letter_question, 0.25, 64),
    "arc_easy_chat": (tasks.TASKS["arc_easy"].file, letter_question, 0.25, 64),
    "arc_challenge_chat": (tasks.TASKS["arc_challenge"].file, letter_question, 0.25, 64),
}


# ----------------------------------------------------------------------------------- the demo world


def world_scores(bench: Bench, book: ScoreBook) -> list[Score]:
    """The demo world's held-out questions, answered exactly or not; the share by kind, and what was
    wrong.
    """
    questions = demo_world.held_out_questions(bench.options.limit or bench.options.n_questions)
    replies = ask(bench.loaded, [(q.prompt, q.thinking) for q in questions], 160, "world")
    by_kind: dict[str, list[bool]] = defaultdict(list)
    asked = []
    for question, reply in zip(questions, replies, strict=True):
        said, right = reply.answer.content, reply.answer.content.strip() == question.answer
        by_kind[question.kind].append(right)
        facts = {"kind": question.kind, "prompt": question.prompt, "expected": question.answer}
        asked.append(facts | {"said": said, "thinking": reply.answer.thinking, "right": right})
    for answer in [a for a in asked if not a["right"]][: bench.options.show_wrong]:
        said, expected, thought = (short(answer[name]) for name in ("said", "expected", "thinking"))
        log.say(f"wrong: {answer['prompt']} → {said}, not {expected}; thought {thought}")
    book.book["asked"] = asked
    scores = []
    for kind, marks in [
        *by_kind.items(),
        ("exact answers to held-out questions", [a["right"] for a in asked]),
    ]:
        value, error = tasks.mean_and_error(marks)
        name = "world" if len(marks) == len(asked) else f"world: {kind}"
        scores.append(
            Score(name, "accuracy", value, finite(error), n=len(marks), headline=name == "world")
        )
    return [*scores[::-1], *behaviour(replies, "world")]


def short(text: str | None, longest: int = 100) -> str:
    """A text as one line, its end left out where it is long."""
    return repr(text if text is None or len(text) <= longest else text[: longest - 1] + "…")


# ------------------------------------------------------------------------------------------ lm-eval


def lm_eval_scores(bench: Bench) -> list[Score]:
    """Tasks of lm-eval, run on the checkpoint through lm-eval's own interface for models."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from hearth.evaluation.lm_eval_adapter import HearthLM
    except ImportError as error:
        raise UserError(
            "lm-eval is not installed: get it with `uv sync --extra lm-eval`."
        ) from error
    options = bench.options
    results = simple_evaluate(
        model=HearthLM(bench.loaded),
        tasks=list(options.lm_eval),
        limit=options.limit,
        bootstrap_iters=100,
        log_samples=False,
        task_manager=TaskManager(include_path=options.lm_eval_files),
    )
    scores = []
    for task, figures in results["results"].items():
        for name, value in figures.items():
            metric, _, rule = name.partition(",")
            if not rule or "stderr" in metric or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{rule}")
            error = float(error) if isinstance(error, int | float) else None
            n, shots = (
                results["n-samples"].get(task, {}).get("effective", 0),
                results["n-shot"].get(task),
            )
            scores.append(
                Score(f"lm-eval {task}: {metric}", "share", float(value), error, n=n, shots=shots)
            )
            log.say(line(scores[-1]))
    return scores


if __name__ == "__main__":
    cli.run_script(lambda: main(*cli.parse_cli_with(Options(), __doc__)), "stopped.")

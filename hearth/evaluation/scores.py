"""Scores of a checkpoint: what one is, where a run keeps them, bits per byte, CORE.

In: a checkpoint, its run's held-out tokens, the tasks' files. Out: `Score`s, and the run's
report/score.json. Knows nothing of the chat format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F

from config import UserError
from hearth import log, run
from hearth.data.token_shards import TokenShards
from hearth.evaluation import tasks
from hearth.reporting.report import read_json, read_scores, score_text
from hearth.storage import write_json
from hearth.training import attention, distributed
from hearth.training.batches import Batch, validation_batches
from hearth.training.checkpoint import Loaded

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

    def __str__(self) -> str:
        """The value with its standard error."""
        return score_text(asdict(self), 4)

    def line(self) -> str:
        """The score on the console."""
        chance = f"chance {self.chance:6.1%}" if self.chance is not None else ""
        shots = f"{self.shots}-shot" if self.shots is not None else ""
        left = f"{self.task:<{NAMES}}{self!s:>17}  {chance:<13}{self.n:>7} items"
        cut = f"  {self.cut} prompts cut to fit the context" if self.cut else ""
        return f"{left}  {shots:<8}{log.duration(self.seconds):>7}{cut}"


def mean_score(task: str, metric: str, marks: Sequence[bool | float], **facts: Any) -> Score:
    """The mean of marks, with its standard error."""
    value, error = tasks.mean_and_error(marks)
    return Score(task, metric, value, finite(error), n=len(marks), **facts)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class Bench:
    """What scoring needs: a checkpoint, its run, the tasks' files, how many items of each."""

    loaded: Loaded
    run_dir: Path
    files: Path | None  # folder with the tasks' files; None fetches them
    store: Path  # where fetched files are kept
    limit: int | None  # only the first items of each task; None is all
    offline: tasks.Unreachable | None = None  # why nothing more is fetched, once that is known

    def items(self, file: str) -> list[tasks.Item]:
        """The items of a task's file, fetched where it must be. A network that is not there is
        tried once. Of several processes the first one reads for all.
        """
        return distributed.from_first(lambda: self._items(file))

    def _items(self, file: str) -> list[tasks.Item]:
        if self.files is None and self.offline and not (self.store / file).is_file():
            raise self.offline
        try:
            return tasks.read_items(tasks.find_file(file, self.files, self.store))
        except tasks.Unreachable as error:
            self.offline = error
            raise


class ScoreBook:
    """score.json of a run: every score of the newest checkpoint of each stage, and the demo world's
    answers.
    """

    def __init__(self, path: Path, folder: Path, state: dict[str, Any], limit: int | None) -> None:
        self.path, self.folder, self.limit = path, folder.resolve(), limit
        self.facts = {name: state[name] for name in ("stage", "step", "tokens")}
        self.book = read_json(path)
        self.book["scores"] = [
            record
            for record in read_scores(path)
            if record.get("stage") != state["stage"] or self._is_here(record)
        ]

    @property
    def _name(self) -> str:
        """How the book writes the checkpoint: runs/<run>/<stage>/<step>, wherever that lies and is
        scored from; in full where it is of no run's folder.
        """
        run_dir = self.path.resolve().parent.parent
        if self.folder.is_relative_to(run_dir):
            return str(self.folder.relative_to(run_dir.parent.parent))
        return str(self.folder)

    def _is_here(self, record: dict[str, Any], **facts: Any) -> bool:
        same = (self.facts | facts).items() <= record.items()
        return same and is_path_of(self.folder, record.get("checkpoint"))

    def keep(self, source: str, scores: Iterable[Score]) -> None:
        """Note the scores of a task in place of earlier ones."""
        kept = [r for r in self.book["scores"] if not self._is_here(r, source=source)]
        facts = {"checkpoint": self._name, **self.facts, "source": source, "limit": self.limit}
        self.book["scores"] = kept + [{**facts, **asdict(score)} for score in scores]
        if log.is_first():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.book)

    def known(self, source: str, n: int | None = None) -> list[Score] | None:
        """The scores of a task as they were noted of this very checkpoint at this limit, None where
        they were not, or where all its items were not the `n` that are asked for.
        """
        facts, kinds = {"source": source, "limit": self.limit}, get_type_hints(Score)
        mine = [
            {name: record.get(name) for name in kinds}
            for record in self.book["scores"]
            if self._is_here(record, **facts)
        ]
        whole = all(isinstance(r[name], kinds[name] | int) for r in mine for name in kinds)
        if not mine or not whole or n not in (None, max(r["n"] for r in mine)):
            return None
        return [Score(**record) for record in mine]


def is_path_of(folder: Path, written: Any) -> bool:
    """Whether a book means `folder`, which is resolved: by the end of its path, or by a path from
    here, as books of earlier versions have it.
    """
    if not isinstance(written, str):
        return False
    path = Path(written)
    return folder.parts[-len(path.parts) :] == path.parts or path.resolve() == folder


# ------------------------------------------------------------------------------------ bits per byte


def bits_per_byte_scores(bench: Bench) -> list[Score]:
    """Bits per byte of each corpus' held-out documents, with the standard error over documents."""
    loaded, found = bench.loaded, []
    command = run.command(loaded.config, "train_tokenizer.py")
    for source in loaded.config.data.corpora():
        shards = TokenShards(bench.run_dir / "tokens" / source.name, "validation", command)
        if shards.tokenizer_hash != loaded.tokenizer.hash:
            raise UserError(
                f"{shards.folder} was made with another tokenizer than the checkpoint's."
            )
        value, error, n = bits_per_byte(loaded, shards, bench.limit)
        found.append(Score(f"{source.name}, held out", "bits per byte", value, error, n=n))
    return found


def bits_per_byte(
    loaded: Loaded, shards: TokenShards, limit: int | None
) -> tuple[float, float, int]:
    """Bits per byte, its standard error as a ratio of sums over documents, and the number of
    documents.

    Reads what an evaluation in pretraining reads: the same tokens, the end of each document counted
    with it.
    """
    loop, context, bos = loaded.config.pretrain, loaded.model.config.context, loaded.tokenizer.bos
    max_tokens = loop.eval_tokens
    if limit is not None and limit < shards.n_documents:
        max_tokens = min(max_tokens, int(shards.ends[limit - 1]))
    micro_tokens = loop.micro_batch_tokens or 4 * context
    reads = {"context": context, "max_tokens": max_tokens, "micro_tokens": micro_tokens}
    batches = list(validation_batches(shards, bos=bos, **reads))
    losses = distributed.shared_out(batches, lambda mine: [token_losses(loaded, b) for b in mine])
    found, last = [], 0  # (nats, bytes, document) of the tokens of each batch
    for batch, nats in zip(batches, losses, strict=True):
        counted = batch.weights.numpy() > 0
        document = last + np.cumsum(batch.ids.numpy() == bos)[counted]
        n_bytes = loaded.tokenizer.token_bytes[batch.targets.numpy()[counted]]
        found.append((nats[counted], n_bytes, document))
        last = int(document[-1])
    *amounts, places = map(np.concatenate, zip(*found, strict=True))
    sums, sizes = (np.bincount(places, amount)[places.min() :] for amount in amounts)
    total, n = max(1, sizes.sum()), len(sums)
    ratio = sums.sum() / total
    spread = ((sums - ratio * sizes) ** 2).sum() * n / max(1, n - 1)
    return ratio / math.log(2), math.sqrt(spread) / total / math.log(2), n


@torch.inference_mode()
def token_losses(loaded: Loaded, batch: Batch) -> np.ndarray:
    """The cross-entropy of every target, in nats."""
    model = loaded.model
    batch = batch.to(model.device)
    hidden = model(batch.ids, attention.packed(model, batch.starts, batch.row_length))
    size = max(1, tasks.LOGITS_PER_PASS // model.config.vocab_size)
    parts = zip(hidden.split(size), batch.targets.split(size), strict=True)
    losses = [F.cross_entropy(model.logits(h), t, reduction="none") for h, t in parts]
    return torch.cat(losses).cpu().double().numpy()


# --------------------------------------------------------------------------------------- base tasks


def task_score(task: tasks.Task, bench: Bench) -> Score:
    """One task of CORE, or MMLU, as a base model does it: by what it finds likely."""
    model, tokenizer = bench.loaded.model, bench.loaded.tokenizer
    asked = tasks.prompts(
        task, bench.items(task.file), tokenizer, model.config.context, bench.limit
    )
    looks = {"batch_tokens": 131_072 if model.device.type == "cuda" else 4096, "title": task.name}
    found = distributed.shared_out(asked, lambda mine: tasks.outcomes(model, mine, **looks))
    value, error = tasks.accuracy(found)
    cut = sum(prompt.cut for prompt in asked)
    stderr, n = finite(error), len(found)
    return Score(task.name, "accuracy", value, stderr, task.chance, n, task.shots, cut)


def core_score(scores: Sequence[Score]) -> list[Score]:
    """The mean of the tasks' centred accuracies: CORE where all 22 are there, else how many of them
    it is over; none below two.
    """
    names = {task.name for task in tasks.CORE}
    mine = [score for score in scores if score.task in names]
    if len(mine) < 2:
        return []
    value = sum(tasks.centred(score.value, score.chance) for score in mine) / len(mine)
    errors = [(score.stderr or 0.0) / (1 - score.chance) for score in mine]
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(mine)
    name = "CORE" if len(mine) == len(names) else f"{len(mine)} of CORE's {len(names)} tasks"
    n, seconds = sum(score.n for score in mine), sum(score.seconds for score in mine)
    return [Score(name, "centred accuracy", value, stderr, 0.0, n, seconds=seconds, headline=True)]

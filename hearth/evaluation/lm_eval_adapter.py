"""A checkpoint as a model of lm-eval, for any task of that evaluation harness.

In: a loaded checkpoint, names of lm-eval's tasks. Out: their `Score`s. Every text is opened by
`<|bos|>`. Imported only where lm-eval (an extra) is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from config import UserError
from hearth.decoding.engine import Engine
from hearth.evaluation import tasks
from hearth.evaluation.scores import Score
from hearth.training.checkpoint import Loaded


class HearthLM(TemplateLM):
    """lm-eval's own interface for models (its `TemplateLM`), met by ours."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.net, self.tokenizer, self.engine = loaded.model, loaded.tokenizer, Engine(loaded.model)
        self.context = loaded.model.config.context

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.bos  # what ends a document begins the next

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self.tokenizer.encode(string)

    def likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each ending after its beginning, and whether it is the likeliest one
        throughout.

        Neighbours with the same beginning are options of one item: it is computed once for all of
        them.
        """
        asked: list[tasks.Prompt] = []
        for before, ending in pairs:
            before = before[1:] if before[:1] == [self.tokenizer.bos] else before
            alone = tasks.prompt_of([([], before, ending)], self.tokenizer.bos, self.context)
            last = asked[-1] if asked else None
            start = alone.starts[0]
            if last and last.starts[0] == start and last.rows[0][:start] == alone.rows[0][:start]:
                asked[-1] = tasks.Prompt(last.rows + alone.rows, last.starts + alone.starts)
            else:
                asked.append(alone)
        found = tasks.outcomes(self.net, asked)
        return [
            (-nats, greedy) for o in found for nats, greedy in zip(o.nats, o.greedy, strict=True)
        ]

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, **_: Any
    ) -> list[Any]:
        return self.likelihoods([(before, ending) for _, before, ending in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        sums = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0])
            looks = {
                "prefix_token": self.tokenizer.bos,
                "max_seq_len": self.context - 1,
                "context_len": 1,
            }
            windows = map(make_disjoint_window, get_rolling_token_windows(ids, **looks))
            sums.append(
                sum(nats for nats, _ in self.likelihoods([(list(a), list(b)) for a, b in windows]))
            )
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [self._until_stop(*request.args) for request in requests]

    def _until_stop(self, text: str, wishes: dict[str, Any]) -> str:
        """The likeliest continuation, up to the first of the texts that end it."""
        tokenizer, until = self.tokenizer, wishes.get("until") or []
        until = [until] if isinstance(until, str) else until
        longest = min(int(wishes.get("max_gen_toks", 256)), self.context // 2)
        ids = [tokenizer.bos, *tokenizer.encode(text)[-(self.context - longest - 1) :]]

        def stops(answer: list[int]) -> bool:
            said = tokenizer.decode(answer[-64:])
            return any(stop in said for stop in until)

        ends = [tokenizer.bos, tokenizer.end]
        (answer,) = self.engine.generate([ids], max_tokens=longest, stop_ids=ends, stop_when=stops)
        said = tokenizer.decode(token for token in answer if token not in ends)
        return min((said.split(stop)[0] for stop in until), key=len, default=said)


def lm_eval_scores(
    loaded: Loaded, names: Sequence[str], *, limit: int | None, own_tasks: str | None = None
) -> list[Score]:
    """Tasks of lm-eval, run by lm-eval itself; `own_tasks` is a folder with further task files.

    Raises `UserError` for a task that lm-eval does not know, or whose data cannot be fetched.
    """
    manager = TaskManager(include_path=own_tasks)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UserError(
            f"lm-eval has no task {', '.join(unknown)}. `uv run lm_eval ls tasks` lists its tasks."
        )
    try:
        results = simple_evaluate(
            model=HearthLM(loaded),
            tasks=list(names),
            limit=limit,
            bootstrap_iters=100,
            log_samples=False,
            task_manager=manager,
        )
    except OSError as error:
        raise UserError(f"lm-eval cannot fetch the data of {', '.join(names)}: {error}") from error
    scores = []
    for task, figures in results["results"].items():
        n = results["n-samples"].get(task, {}).get("effective", 0)
        for name, value in figures.items():
            metric, _, rule = name.partition(",")
            if not rule or "stderr" in metric or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{rule}")
            error = float(error) if isinstance(error, int | float) else None
            shots, name = results["n-shot"].get(task), f"lm-eval {task}: {metric}"
            scores.append(Score(name, "share", float(value), error, n=n, shots=shots))
    return scores

"""Whether score.py and lm-eval say the same of the same items: choice by choice, and in nats.

In: a folder with the tasks' files (llm-foundry's local_data). Out: by task how many items have the
same choice, and the largest difference of a text's likelihood. lm-eval reads the files itself, lays
out its own prompts and chooses by its own rule, on a model that scores one text a pass; ours go the
way of score.py, in batches with shared beginnings. Nothing is fetched. lm-eval draws worked
examples in its own way, so there are none.

    uv run --extra lm-eval benchmarks/agreement.py --files local_data --checkpoint runs/16gb/base
    uv run --extra lm-eval benchmarks/agreement.py --files data --preset 16gb --tokenizer FOLDER
        untrained
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PRESETS
from hearth import hardware
from hearth.cli import run_script
from hearth.data.tokenizer import Tokenizer
from hearth.evaluation import tasks
from hearth.training import checkpoint
from hearth.training.checkpoint import Loaded
from model import PackedSequences, build_model

QUESTIONS = {  # how each task's query is put, in lm-eval's templates
    "copa": "{{query}}",
    "openbook_qa": "{{query}}",
    "piqa": "{{query.strip()}}\nAnswer:",
    "arc_easy": "{{query.strip()}}\nAnswer:",
    "lambada_openai": "{{context}}",
}
BAR = 0.995  # share of items with the same choice


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--files", type=Path, required=True, help="folder with the tasks' files")
    add_model(words)
    words.add_argument("--tasks", nargs="+", default=list(QUESTIONS), choices=QUESTIONS)
    words.add_argument("--limit", type=int, default=200, help="items of each task")
    options = words.parse_args()
    loaded = load(options)
    print(f"{loaded.model.n_parameters():,} parameters, {hardware.describe(loaded.model.device)}")
    print(
        f"{'task':<18}{'items':>7}{'same choice':>13}{'largest difference':>20}"
        f"{'lm-eval':>10}{'ours':>8}"
    )
    for name in options.tasks:
        file = tasks.find_file(tasks.TASKS[name].file, options.files, options.files)
        theirs, accuracy = by_lm_eval(alone_model(loaded), name, file, options.limit)
        ours = by_us(loaded, name, file, options.limit)
        pairs = list(zip(ours, theirs, strict=True))
        same = sum(
            mine.greedy == other.greedy and choice(mine) == choice(other) for mine, other in pairs
        )
        worst = max(
            abs(a - b) for mine, other in pairs for a, b in zip(mine.nats, other.nats, strict=True)
        )
        mean = sum(is_right(mine) for mine in ours) / len(ours)
        verdict = f"bar ≥ {BAR:.1%}: {'holds' if same >= BAR * len(ours) else 'MISSED'}"
        print(
            f"{name:<18}{len(ours):>7}{same:>13}{worst:>15.5f} nats{accuracy:>10.1%}{mean:>8.1%}   "
            f"{verdict}"
        )


def add_model(words: argparse.ArgumentParser) -> None:
    """The options that `load` reads."""
    words.add_argument("--checkpoint", type=Path, help="checkpoint to score")
    words.add_argument(
        "--preset",
        default="demo",
        help="preset whose model is built untrained, without --checkpoint",
    )
    words.add_argument("--tokenizer", type=Path, help="folder of a tokenizer for --preset")


def load(options: argparse.Namespace) -> Loaded:
    """The checkpoint asked for, or a preset's model as it is before training."""
    device = hardware.pick_device("auto")
    if options.checkpoint:
        return checkpoint.load_for_inference(options.checkpoint, device)
    config = PRESETS[options.preset]
    tokenizer = Tokenizer.load(options.tokenizer or Path("runs") / options.preset / "tokenizer")
    return Loaded(build_model(config.model, seed=0, device=device), config, tokenizer, {})


def choice(outcome: tasks.Outcome) -> int:
    """What lm-eval's `acc` goes by: the likeliest text as a whole."""
    return outcome.nats.index(min(outcome.nats))


def is_right(outcome: tasks.Outcome) -> bool:
    return outcome.greedy[0] if len(outcome.nats) == 1 else choice(outcome) == outcome.gold


def by_us(loaded: Loaded, name: str, file: Path, limit: int | None) -> list[tasks.Outcome]:
    """The first items of a task as score.py scores them, without worked examples."""
    task, items = replace(tasks.TASKS[name], shots=0), tasks.read_items(file)
    return tasks.outcomes(
        loaded.model,
        tasks.prompts(task, items, loaded.tokenizer, loaded.model.config.context, limit),
    )


def by_lm_eval(
    model: Any, name: str, file: Path, limit: int | None
) -> tuple[list[tasks.Outcome], float]:
    """The same of lm-eval, and the accuracy that it states."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=model,
        tasks=[as_lm_eval_task(name, file)],
        limit=limit,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [outcome_of(sample["filtered_resps"]) for sample in samples], results["results"][name][
        "acc,none"
    ]


def outcome_of(responses: Any) -> tasks.Outcome:
    """lm-eval's (log-likelihood, is it the likeliest?) of each text, or the one pair of a single
    text.
    """
    pairs = responses if isinstance(responses[0], list | tuple) else [responses]
    return tasks.Outcome(
        [-float(pair[0]) for pair in pairs], [], [bool(pair[1]) for pair in pairs], 0
    )


def as_lm_eval_task(name: str, file: Path) -> dict[str, Any]:
    """A local task in lm-eval's own words."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
    }
    task |= {"test_split": "test", "num_fewshot": 0, "doc_to_text": QUESTIONS[name]}
    accuracy = {"aggregation": "mean", "higher_is_better": True}
    if tasks.TASKS[name].kind == "language":
        looks = {
            "output_type": "loglikelihood",
            "doc_to_target": " {{continuation}}",
            "target_delimiter": "",
        }
        return task | looks | {"metric_list": [{"metric": "acc", **accuracy}]}
    looks = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
    }
    metrics = [{"metric": "acc", **accuracy}, {"metric": "acc_norm", **accuracy}]
    return task | looks | {"target_delimiter": " ", "metric_list": metrics}


def alone_model(loaded: Loaded) -> Any:
    """The checkpoint as a model of lm-eval that scores one text a pass: no code of tasks.py but the
    tokenizer's.
    """
    from hearth.evaluation.lm_eval_adapter import HearthLM

    class Alone(HearthLM):
        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, **_: Any
        ) -> list[Any]:
            return [alone(loaded, before, ending) for _, before, ending in requests]

    return Alone(loaded)


@torch.inference_mode()
def alone(loaded: Loaded, before: Sequence[int], ending: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of an ending behind `<|bos|>` and its beginning, and whether each of its
    tokens is the likeliest.
    """
    ids = torch.tensor([loaded.tokenizer.bos, *before, *ending], device=loaded.model.device)
    hidden = loaded.model(ids, PackedSequences(torch.zeros_like(ids, dtype=torch.bool), len(ids)))
    logits = loaded.model.logits(hidden)[-len(ending) - 1 : -1]
    targets = ids[-len(ending) :]
    return -float(F.cross_entropy(logits, targets, reduction="sum")), bool(
        (logits.argmax(-1) == targets).all()
    )


if __name__ == "__main__":
    run_script(main, "stopped.")

"""Score a checkpoint: the demo world's held-out questions, answered exactly or not.

In: a run's newest checkpoint, or any checkpoint folder.
Out: the share of right answers by kind; runs/<preset>/report/score.json.

    uv run score.py --preset demo
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import checkpoint
import config as settings
import demo_world
import hardware
import log
from checkpoint import Loaded
from config import REASONING_PROMPT, Config, UserError
from conversation import parse_answer, render
from engine import Engine


@dataclass(frozen=True)
class Options:
    """What only this script knows."""

    checkpoint: str | None = None  # any checkpoint folder; None takes the run's newest, of its furthest stage
    n_questions: int = 200  # held-out questions asked
    show_wrong: int = 5  # wrong answers printed


@dataclass(frozen=True)
class Asked:
    """One question, what was said, and whether that is right to the letter."""

    kind: str
    prompt: str
    expected: str
    said: str
    thinking: str | None

    @property
    def right(self) -> bool:
        return self.said.strip() == self.expected


def main(config: Config, options: Options) -> None:
    """Ask the held-out questions, print the score by kind, keep it as JSON."""
    folder = Path(options.checkpoint) if options.checkpoint else checkpoint.furthest(config)
    loaded = checkpoint.load_for_inference(folder, hardware.pick_device(config.device))
    log.say(f"score of {folder}")
    asked = ask(loaded, demo_world.held_out_questions(options.n_questions))
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for question in asked:
        by_kind[question.kind].append(question.right)
    for kind, marks in by_kind.items():
        log.say(f"{kind:<12} {sum(marks):>4}/{len(marks):<4} {sum(marks) / len(marks):6.1%}")
    right = sum(question.right for question in asked)
    log.say(f"{'all':<12} {right:>4}/{len(asked):<4} {right / len(asked):6.1%}  exact answers to held-out questions")
    for question in [q for q in asked if not q.right][: options.show_wrong]:
        log.say(
            f"wrong: {question.prompt} → {question.said!r}, not {question.expected!r}; thought {question.thinking!r}"
        )
    report = config.run_dir / "report"
    report.mkdir(parents=True, exist_ok=True)
    facts = {"checkpoint": str(folder), "right": right, "asked": [asdict(q) | {"right": q.right} for q in asked]}
    (report / "score.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def ask(loaded: Loaded, questions: list[demo_world.Question], batch: int = 50) -> list[Asked]:
    """Each question's greedy answer, up to 160 tokens, asked as a conversation of its own."""
    engine, tokenizer, asked = Engine(loaded.model), loaded.tokenizer, []
    for first in range(0, len(questions), batch):
        part = questions[first : first + batch]
        prompts = [render(messages(q), tokenizer, answer=True).ids for q in part]
        answers = engine.generate(prompts, max_tokens=160, stop_ids=[tokenizer.end])
        for question, ids in zip(part, answers, strict=True):
            answer = parse_answer(ids, tokenizer)
            asked.append(Asked(question.kind, question.prompt, question.answer, answer.content, answer.thinking))
    return asked


def messages(question: demo_world.Question) -> list[dict[str, str]]:
    """The question as a conversation; reasoning is asked for by the system prompt."""
    system = [{"role": "system", "content": REASONING_PROMPT}] if question.thinking else []
    return [*system, {"role": "user", "content": question.prompt}]


if __name__ == "__main__":
    try:
        main(*settings.parse_cli_with(Options(), __doc__))
    except UserError as error:
        settings.fail(str(error))

"""What a model does with word problems: does it call the calculator, and does it end by itself?

In: checkpoints of conversations, a file like GSM8K's test set. Out: a line of shares for each
checkpoint, and with --samples its first answers, unedited. A calculation is a call, or where a
model has none to make, `48/2=24` written in the text; it parses where the calculator can do it, and
is right where its result is the calculator's.

    uv run benchmarks/calls.py runs/real/sft1 runs/real/sft2 --problems gsm8k_test.jsonl --n 200
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hearth import run
from hearth.cli import run_script
from hearth.decoding.calculator import CalculationError, calculate
from hearth.evaluation.chat_tasks import Reply, ask, gsm8k_question
from hearth.training.checkpoint import load_for_inference

WRITTEN = re.compile(r"(\d[\d.,]*(?:\s*[-+*/x×÷]\s*\$?\d[\d.,]*)+)\s*=\s*\$?(-?\d[\d.,]*)")
LONGEST = 200  # tokens of an answer


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("checkpoint", nargs="+", type=Path, help="a stage's folder")
    words.add_argument("--problems", type=Path, required=True, help="JSON lines like GSM8K's")
    words.add_argument("--n", type=int, default=200, help="problems asked")
    words.add_argument("--samples", type=int, default=0, help="answers shown")
    options = words.parse_args()
    lines = options.problems.read_text(encoding="utf-8").splitlines()[: options.n]
    problems = [json.loads(line) for line in lines]
    print(
        "checkpoint | ends by itself | with a calculation | these parse | these are right | solved"
    )
    for place in options.checkpoint:
        loaded = load_for_inference(run.newest(place) or place)
        questions = [gsm8k_question(row) for row in problems]
        replies = ask(loaded, [(q.text, False) for q in questions], LONGEST, place.name)
        solved = sum(q.is_right(r.answer) for q, r in zip(questions, replies, strict=True))
        print(" | ".join([str(place), *shares(replies), share(solved, len(replies))]))
        for row, reply in zip(problems[: options.samples], replies, strict=False):
            print(f"\n> {row['question']}\n{said(reply)}\n")


def shares(replies: list[Reply]) -> list[str]:
    """Of the answers those that end, those that calculate; of the calculations those that parse,
    and of these those that are right.
    """
    made = [list(calculations(reply)) for reply in replies]
    every = [one for some in made for one in some]
    parsed = [(value, told) for asked, told in every if (value := value_of(asked)) is not None]
    right = sum(same(value, told) for value, told in parsed)
    return [
        share(sum(reply.stopped for reply in replies), len(replies)),
        share(sum(map(bool, made)), len(replies)),
        share(len(parsed), len(every)),
        share(right, len(parsed)),
    ]


def calculations(reply: Reply) -> Iterator[tuple[str, str]]:
    """What was calculated in an answer, and its result: calls, or else what the text writes."""
    calls = [part for part in reply.answer.parts if "tool" in part]
    yield from ((part["arguments"], part.get("result") or "") for part in calls)
    if not calls:
        for asked, told in WRITTEN.findall(reply.answer.content):
            plain = asked.translate(str.maketrans({"x": "*", "×": "*", "÷": "/", "$": "", ",": ""}))
            yield plain, told.rstrip(".").replace(",", "")


def value_of(asked: str) -> str | None:
    """What the calculator makes of an expression; None where it can make nothing of it."""
    try:
        return calculate(asked)
    except CalculationError:
        return None


def same(result: str, told: str) -> bool:
    try:
        return abs(float(result) - float(told)) <= 1e-6 * max(1.0, abs(float(result)))
    except ValueError:
        return result == told


def share(n: int, of: int) -> str:
    return f"{n / of:.1%} of {of}" if of else "none"


def said(reply: Reply) -> str:
    """An answer as text, its calls in brackets."""
    parts = reply.answer.parts or ({"text": reply.answer.content},)
    return "".join(
        part["text"] if "text" in part else f"⟦{part['arguments']} → {part.get('result')}⟧"
        for part in parts
    )


if __name__ == "__main__":
    run_script(main, "stopped.")

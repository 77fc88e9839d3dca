"""Tasks for a chat model: questions answered by generation, the answers judged.

In: a chat checkpoint, the tasks' files, the demo world. Out: `Score`s: how many answers are right,
and whether they stop, reason and keep the format as asked.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from config import REASONING_PROMPT, UserError
from hearth import log
from hearth.data import demo_world
from hearth.data.chat_format import Answer, Message, parse_answer, render
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Engine
from hearth.decoding.tools import Tools
from hearth.evaluation import tasks
from hearth.evaluation.scores import Bench, Score, mean_score
from hearth.training import distributed
from hearth.training.checkpoint import Loaded


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
    conversations = [messages(text, reasons) for text, reasons in questions]
    return converse(loaded, conversations, max_tokens, title)


def converse(
    loaded: Loaded, conversations: Sequence[Sequence[Message]], max_tokens: int, title: str = ""
) -> list[Reply]:
    """The likeliest next turn of each conversation; reasoning is expected where its system prompt
    asks for it. Several processes share them out.
    """
    said = partial(_converse, loaded, max_tokens=max_tokens, title=title)
    return distributed.shared_out(conversations, said)


def _converse(
    loaded: Loaded, conversations: Sequence[Sequence[Message]], *, max_tokens: int, title: str
) -> list[Reply]:
    tokenizer, context = loaded.tokenizer, loaded.model.config.context
    engine = Engine(loaded.model, tokenizer=tokenizer)
    room = context - min(max_tokens, context // 4)
    prompts = [render(turns, tokenizer, answer=True).ids for turns in conversations]
    prompts = [ids if len(ids) <= room else [ids[0], *ids[-room + 1 :]] for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    looks = {"max_tokens": max_tokens, "stop_ids": [tokenizer.end], "tools": Tools()}
    replies: dict[int, Reply] = {}
    with log.progress(len(prompts), "answer", title) as bar:
        for first in range(0, len(order), engine.max_rows):
            group = order[first : first + engine.max_rows]
            answers = engine.generate([prompts[i] for i in group], **looks)
            for i, ids in zip(group, answers, strict=True):
                reasons = conversations[i][0]["content"] == REASONING_PROMPT
                replies[i] = reply_of(ids, tokenizer, reasons=reasons)
            bar.update(len(group))
    return [replies[i] for i in range(len(prompts))]


def messages(text: str, reasons: bool) -> list[dict[str, str]]:
    """The question as a conversation; reasoning is asked for by the system prompt."""
    system = [{"role": "system", "content": REASONING_PROMPT}] if reasons else []
    return [*system, {"role": "user", "content": text}]


def reply_of(ids: Sequence[int], tokenizer: Tokenizer, *, reasons: bool) -> Reply:
    """An answer's ids read; `reasons` is whether it was asked to reason."""
    answer, n_thought = parse_answer(ids, tokenizer), None
    if ids[:1] == [tokenizer.think]:
        ends = (tokenizer.end_think, tokenizer.end)
        n_thought = next((n for n, i in enumerate(ids[1:]) if i in ends), len(ids) - 1)
    as_asked = (answer.thinking is not None) == reasons
    return Reply(answer, ids[-1:] == [tokenizer.end], as_asked, n_thought)


def behaviour(replies: Sequence[Reply], where: str) -> list[Score]:
    """The share of answers that end by themselves, that reason exactly when asked to, that keep the
    format in both and say something; and the mean length of the reasoning, in tokens, over the
    answers that have any.
    """
    shares = {
        "stops by itself": [reply.stopped for reply in replies],
        "thinks exactly when asked": [reply.as_asked for reply in replies],
        "keeps the format": [reply.keeps_format for reply in replies],
    }
    found = [mean_score(f"{where}: {name}", "share", marks) for name, marks in shares.items()]
    lengths = [reply.n_thought for reply in replies if reply.n_thought is not None]
    name = f"{where}: length of the reasoning"
    return [*found, *([mean_score(name, "tokens", lengths)] if lengths else [])]


def refuse_base(loaded: Loaded) -> None:
    """Raises `UserError` for a model that was never trained on conversations."""
    if loaded.state["stage"] == "base":
        raise UserError("a base model holds no conversations; score a later stage.")


def chat_scores(name: str, bench: Bench) -> list[Score]:
    """A chat task: the share of right answers, and how they behave."""
    refuse_base(bench.loaded)
    file, read, chance, max_tokens = CHAT[name]
    asked = [read(row) for row in bench.items(file)[: bench.limit]]
    replies = ask(bench.loaded, [(q.text, q.reasons) for q in asked], max_tokens, name)
    marks = [q.is_right(reply.answer) for q, reply in zip(asked, replies, strict=True)]
    score = mean_score(name, "accuracy", marks, chance=chance, shots=0)
    return [score, *behaviour(replies, name)]


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
        listed = (f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True))
        query = "\n".join([query, *listed])
    text, right = f"{query}\nAnswer with the letter of the right choice.", letters[row["gold"]]
    return ChatQuestion(text, False, lambda said: first_letter(said.content, letters) == right)


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


def n_world_questions(limit: int | None, n_questions: int) -> int:
    """How many questions about the demo world are asked: no more than there are."""
    most = len(demo_world.ASKED) * len(demo_world.all_facts())
    return min(n_questions if limit is None else limit, most)


def world_scores(bench: Bench, n_questions: int) -> tuple[list[Score], list[dict[str, Any]]]:
    """The demo world's held-out questions, answered exactly or not: the share of all and by kind;
    and every question with its answer.
    """
    questions = demo_world.held_out_questions(n_world_questions(bench.limit, n_questions))
    replies = ask(bench.loaded, [(q.prompt, q.thinking) for q in questions], 160, "world")
    by_kind: dict[str, list[bool]] = defaultdict(list)
    asked = []
    for question, reply in zip(questions, replies, strict=True):
        said, right = reply.answer.content, reply.answer.content.strip() == question.answer
        by_kind[question.kind].append(right)
        facts = {"kind": question.kind, "prompt": question.prompt, "expected": question.answer}
        asked.append(facts | {"said": said, "thinking": reply.answer.thinking, "right": right})
    whole = mean_score("world", "accuracy", [a["right"] for a in asked], headline=True)
    kinds = [mean_score(f"world: {k}", "accuracy", marks) for k, marks in by_kind.items()]
    return [whole, *kinds[::-1], *behaviour(replies, "world")], asked


def wrong_line(answer: dict[str, Any], longest: int = 100) -> str:
    """A wrong answer on the console, long texts cut."""
    said, expected, thought = (
        repr(text if text is None or len(text) <= longest else text[: longest - 1] + "…")
        for text in (answer[name] for name in ("said", "expected", "thinking"))
    )
    return f"wrong: {answer['prompt']} → {said}, not {expected}; thought {thought}"

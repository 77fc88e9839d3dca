"""Layouts of conversations: recognised by their columns, and a reason for what cannot be used."""

from typing import Any

import pytest

from config import REASONING_PROMPT
from hearth.data.cleaning import Rejected
from hearth.data.layouts import BY_LETTER, conversation, question_keys, reasoning_taken

CALL = {"tool": "calculate", "arguments": "2+3", "result": "5"}
THOUGHT = {"role": "system", "content": REASONING_PROMPT, "thinking": None}


def said(*turns: tuple[str, str] | tuple[str, str, str]) -> list[dict]:
    return [
        {"role": t[0], "content": t[1], "thinking": t[2] if len(t) > 2 else None} for t in turns
    ]


LAYOUTS = {
    "alpaca": (
        {"instruction": "Add.", "input": "", "output": "3"},
        said(("user", "Add."), ("assistant", "3")),
    ),
    "alpaca with input": (
        {"instruction": "Add.", "input": "1 + 2", "output": "3", "text": "Below is …"},
        said(("user", "Add.\n\n1 + 2"), ("assistant", "3")),
    ),
    "dolly": (
        {
            "instruction": "Who?",
            "context": "Ann sings.",
            "response": "Ann.",
            "category": "closed_qa",
        },
        said(("user", "Who?\n\nAnn sings."), ("assistant", "Ann.")),
    ),
    "input and response": (
        {"instruction": "Add.", "input": "1 + 2", "response": "3"},
        said(("user", "Add.\n\n1 + 2"), ("assistant", "3")),
    ),
    "prompt and completion": (
        {"prompt": "Say a", "completion": "a", "task": "t"},
        said(("user", "Say a"), ("assistant", "a")),
    ),
    "prompt in Alpaca's frame": (
        {
            "prompt": "Below …\n\n### Instruction:\nSay a\n\n### Input:\nb\n\n### Response:\n",
            "response": "a",
        },
        said(("user", "Say a\n\nb"), ("assistant", "a")),
    ),
    "messages": (
        {
            "prompt": "hi",
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yes?"},
            ],
        },
        said(("user", "hi"), ("assistant", "yes?")),
    ),
    "from and value": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}]},
        said(("user", "hi"), ("assistant", "yes?")),
    ),
    "last question without an answer": (
        {
            "messages": [
                {"role": r, "content": c}
                for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))
            ]
        },
        said(("user", "a"), ("assistant", "b")),
    ),
    "thought spelt in the text": (
        {"prompt": "1+1?", "completion": "<think>\nTwo.\n</think>\n\n2"},
        [THOUGHT, *said(("user", "1+1?"), ("assistant", "2", "Two."))],
    ),
    "thought as a part": (
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "value": "Be kind."}]},
                {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "Two."},
                        {"type": "text", "value": "2"},
                    ],
                },
            ]
        },
        said(("system", "Be kind."), ("user", "1+1?"), ("assistant", "2", "Two.")),
    ),
    "gsm8k": (
        {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24.\n#### 24"},
        [THOUGHT, *said(("user", "Half of 48?"), ("assistant", "24", "48/2 = 24."))],
    ),
    "problem and solution": (
        {"problem": "1+1?", "solution": "Count: 2.", "answer": "2"},
        [THOUGHT, *said(("user", "1+1?"), ("assistant", "2", "Count: 2."))],
    ),
    "verified generation": (
        {
            "problem": "1+1?",
            "solution": "Count: 2.",
            "answer": "2",
            "generations": [
                "<think>no</think>3",
                "<think>long" + "x" * 99 + "</think>It is 2",
                "<think>so</think>So 2",
            ],
            "correctness_math_verify": [False, True, True],
        },
        [THOUGHT, *said(("user", "1+1?"), ("assistant", "So 2", "so"))],
    ),
    "generation found right by the other judge": (
        {
            "problem": "1+1?",
            "solution": "Count: 2.",
            "answer": "2",
            "generations": ["<think>cut", "<think>half</think>2", "<think>so</think>So 2"],
            "correctness_math_verify": None,
            "correctness_llama": [True, True, True],
            "is_reasoning_complete": [True, False, True],
        },
        [THOUGHT, *said(("user", "1+1?"), ("assistant", "So 2", "so"))],
    ),
    "multiple choice, MMLU": (
        {"question": "Which?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 2},
        said(("user", f"Which?\nA. a\nB. b\nC. c\nD. d\n{BY_LETTER}"), ("assistant", "C")),
    ),
    "multiple choice, its answer a letter": (
        {"question": "Which?", "choices": ["a", "b"], "answer": "B"},
        said(("user", f"Which?\nA. a\nB. b\n{BY_LETTER}"), ("assistant", "B")),
    ),
    "multiple choice, ARC": (
        {
            "id": "1",
            "question": "Which?",
            "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
            "answerKey": "3",
        },
        said(("user", f"Which?\nA. a\nB. b\nC. c\n{BY_LETTER}"), ("assistant", "C")),
    ),
    "multiple choice, OpenBookQA": (
        {
            "id": "1",
            "question_stem": "Water is",
            "choices": {"text": ["wet", "dry"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        said(("user", f"Water is\nA. wet\nB. dry\n{BY_LETTER}"), ("assistant", "A")),
    ),
    "smoltalk": (
        {
            "messages": [
                {"content": "hi", "role": "user"},
                {"content": "yes?", "role": "assistant"},
            ],
            "source": "everyday",
        },
        said(("user", "hi"), ("assistant", "yes?")),
    ),
    "a call among the parts of the content": (
        {
            "messages": [
                {"role": "user", "content": "2 + 3?"},
                {"role": "assistant", "content": [CALL, {"text": "5"}]},
            ]
        },
        said(("user", "2 + 3?"), ("assistant", [CALL, {"text": "5"}])),
    ),
    "transcript": (
        {"text": "### Human: Who? ### Assistant: Ann."},
        said(("user", "Who?"), ("assistant", "Ann.")),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_recognised_by_its_columns(name: str) -> None:
    row, expected = LAYOUTS[name]
    assert conversation(row, 60) == expected


def test_reasoning_is_never_cut_and_the_choice_is_told() -> None:
    row = {
        "problem": "1+1?",
        "solution": "Count to 2.",
        "answer": "2",
        "correctness_math_verify": [True, False],
    }
    row["generations"] = ["<think>" + "x" * 30 + "</think>2", "<think>y</think>3"]
    found = {limit: conversation(row, limit) for limit in (None, 60, 20, 5)}
    thoughts = {
        limit: talk.reason if isinstance(talk, Rejected) else talk[-1]["thinking"]
        for limit, talk in found.items()
    }
    assert thoughts == {None: "x" * 30, 60: "x" * 30, 20: "Count to 2.", 5: "reasoning too long"}
    assert reasoning_taken(row, 60) == "a verified generation"
    assert reasoning_taken(row, 20) == "the worked solution: no verified generation is short enough"
    assert (
        reasoning_taken(row | {"correctness_math_verify": None}, 60)
        == "the worked solution: none is verified"
    )
    assert reasoning_taken({"problem": "1+1?", "solution": "2"}, 60) is None
    said_aloud = {"prompt": "1+1?", "completion": "<think>two, I think</think>2"}
    assert conversation(said_aloud, 5) == Rejected("reasoning too long", "12 characters")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"a": 1}, "unknown layout"),
        ({"instruction": "x", "output": None}, "unknown layout"),
        ({"instruction": "x", "output": 7}, "malformed row"),
        ({"messages": "text"}, "malformed row"),
        ({"messages": []}, "no question with an answer"),
        ({"instruction": "x", "output": " "}, "empty turn"),
        ({"prompt": "x", "completion": "<think>never ends"}, "unfinished thought"),
        (
            {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "tool use",
        ),
        ({"text": "plain prose"}, "unknown layout"),
        ("no dict", "unknown layout"),
        ({"question": "Which?", "choices": ["a", "b"], "answer": 2}, "malformed row"),
        (
            {"question": "?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
            "malformed row",
        ),
    ],
)
def test_row_that_cannot_be_used_has_a_reason(row: Any, reason: str) -> None:
    found = conversation(row)
    assert isinstance(found, Rejected)
    assert found.reason == reason


def test_calculations_of_gsm8k_become_calls_where_they_are_asked_for() -> None:
    solution = "She sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    row = {"question": "How many clips?", "answer": solution}
    asked, answer = conversation(row, calls=True)
    assert asked["content"] == "How many clips?"
    assert answer["thinking"] is None
    assert answer["content"] == [
        {"text": "She sold 48/2 = "},
        {"tool": "calculate", "arguments": "48/2", "result": "24"},
        {"text": "24 clips.\nIn all 48+24 = "},
        {"tool": "calculate", "arguments": "48+24", "result": "72"},
        {"text": "72.\nThe answer is 72."},
    ]
    without = {"question": "How many?", "answer": "Just two.\n#### 2"}
    assert conversation(without, calls=True) == conversation(without)


def test_one_question_has_one_key_in_every_layout() -> None:
    question = "Ann has 3 apples and eats one. How many apples does Ann have now?"
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": f"Solve this:\n{question}\nThank you."},
        {"role": "assistant", "content": "2"},
    ]
    (key,) = question_keys({"question": question, "answer": "#### 2"})
    for row in (
        {"query": f"Question: {question.upper()}\nAnswer:", "choices": ["2"], "gold": 0},
        {"question_stem": question, "choices": {"text": ["2"], "label": ["A"]}},
        {"problem": question.replace(" and ", "  and, "), "solution": "2"},
        {"messages": chat},
    ):
        assert key in question_keys(row)
    other = {"question": question.replace("apples", "pears"), "answer": "#### 2"}
    assert key not in question_keys(other)
    assert question_keys("no dict") == question_keys({"text": question}) == set()

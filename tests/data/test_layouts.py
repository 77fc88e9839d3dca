"""Layouts of conversations: recognised by their columns, and a reason for what cannot be used."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from config import REASONING_PROMPT, ChatSource, UserError
from hearth.data import ingest, sources
from hearth.data.chat_format import render
from hearth.data.cleaning import Rejected
from hearth.data.layouts import BY_LETTER, conversation, question_keys, reasoning_taken
from hearth.data.shard_folder import SPLITS
from hearth.data.tokenizer import Tokenizer

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
    "a text as parts of each turn": (
        {
            "messages": [
                {"role": "system", "content": [{"text": "Be "}, {"text": "kind."}]},
                {"from": "human", "content": [{"text": "hi"}]},
                {"role": "assistant", "content": [{"text": "yes?"}]},
            ]
        },
        said(("system", "Be kind."), ("user", "hi"), ("assistant", [{"text": "yes?"}])),
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


def talk(asked: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user"} | asked, {"role": "assistant"} | answer]}


HI, YES = {"content": "hi"}, {"content": "yes?"}
ODD = {  # rows and a part of what is said of each
    "thinking true": (talk(HI, YES | {"thinking": True}), "its thinking is bool, must be text"),
    "thinking a list": (talk(HI, YES | {"thinking": ["a"]}), "its thinking is list, must be text"),
    "a user who thinks": (talk(HI | {"thinking": "hm"}, YES), "only the assistant thinks"),
    "arguments an object": (
        talk(HI, {"content": [{"tool": "search", "arguments": {"q": "x"}}]}),
        "arguments and result as texts",
    ),
    "a result that is a number": (talk(HI, {"content": [CALL | {"result": 5}]}), "result as texts"),
    "a space in a tool's name": (
        talk(HI, {"content": [CALL | {"tool": "a tool"}]}),
        "a name without spaces",
    ),
    "text and call in one part": (
        talk(HI, {"content": [{"text": "5", "tool": 5}]}),
        "a text or a call",
    ),
    "text null": (
        talk(HI, {"content": [{"text": None}]}),
        'a part of its content is {"text": null',
    ),
    "a user's text null": (talk({"content": [{"text": None}]}, YES), "its content is list"),
    "a user who calls": (talk({"content": [CALL]}, YES), "its content is list, must be text"),
    "role a number": (talk(HI | {"role": 5}, YES), "a role is int"),
    "role a list": (talk(HI | {"role": ["user"]}, YES), "a role is list"),
    "from null": ({"conversations": [{"from": None, "value": "x"}]}, "a role is NoneType"),
    "a solution that is a number": (
        {"problem": "1+1?", "solution": 2, "answer": "2"},
        "its thinking is int",
    ),
    "an answer without end": (
        {"question": "Which?", "choices": ["a", "b"], "answer": float("inf")},
        "cannot convert float infinity",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_row_that_is_no_conversation_is_malformed_and_says_why(name: str) -> None:
    row, why = ODD[name]
    found = conversation(row)
    assert isinstance(found, Rejected)
    assert found.reason == "malformed row"
    assert why in found.detail


def chats_in(folder: Path, rows: list[Any], name: str = "chat") -> ChatSource:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ChatSource(name, files=(str(folder / f"{name}.jsonl"),))


def kept_in(folder: Path) -> list[list[dict[str, Any]]]:
    return [t for split in SPLITS for t in sources.read_conversations(folder, split)]


def test_odd_rows_are_dropped_by_name_and_what_is_kept_can_be_rendered(tmp_path: Path) -> None:
    good = [row for row, _ in LAYOUTS.values()]
    good.append(talk(HI, YES) | {"generations": 7})  # a column that its layout does not read
    good.append(
        talk(HI, {"content": [CALL | {"text": None, "id": 7, "more": {"a": 1}}, {"text": "5"}]})
    )
    rows = [*good, *(row for row, _ in ODD.values()), *good]
    folder = tmp_path / "out"
    manifest = ingest.write_chat_shards(chats_in(tmp_path, rows), folder, 0.1)
    assert manifest["dropped"] == {"malformed row": len(ODD)}
    named = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert [example["row"] for example in named] == [len(good) + i for i in range(len(ODD))]
    kept, tokenizer = kept_in(folder), Tokenizer.train(["the cat sat on the mat"] * 9, 384)
    assert len(kept) == 2 * len(good)
    assert all(any(render(messages, tokenizer).loss) for messages in kept)


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


QUESTION = "How many apples has Tom left after he eats three of his ten apples?"
OTHER = "How many pears has Tom left after he eats three of his ten pears?"


def asking(question: str) -> list[dict[str, Any]]:
    """Rows of several layouts that all ask the same."""
    chat = talk({"content": question}, {"content": "7"})
    return [
        chat,
        chat | {"prompt": "p1"},
        chat | {"prompt": "p1", "messages": None, "conversations": chat["messages"]},
        talk({"content": [{"text": f"Please:\n{question}"}]}, {"content": "7"}),
        {"instruction": "Solve this problem.", "input": question, "output": "7"},
        {"instruction": "Solve:", "input": question.replace(" after", "\nafter"), "output": "7"},
        {"text": f"### Human: {question}\n### Assistant: 7", "messages": None},
        {"prompt": f"Below …\n\n### Instruction:\n{question}\n\n### Response:\n", "response": "7"},
        {"question": "About Tom", "context": question, "answer": "7"},
    ]


def test_a_question_of_a_test_set_is_kept_out_in_every_layout(tmp_path: Path) -> None:
    rows = [row for question in (QUESTION, OTHER) for row in asking(question)]
    source = chats_in(tmp_path, rows)
    for number, test in enumerate([{"question": QUESTION}, *asking(QUESTION)]):
        test_set = chats_in(tmp_path / f"{number}", [test], "tests")
        keys = ingest.question_keys_of(test_set)
        assert [bool(keys & question_keys(row)) for row in rows[:9]] == [True] * 9
    folder = tmp_path / "out"
    test_set = chats_in(tmp_path, [{"question": QUESTION}], "tests")
    manifest = ingest.write_chat_shards(source, folder, 0.3, exclude=[test_set])
    assert manifest["dropped"] == {"question of a test set": 9}
    assert all("pears" in str(messages) for messages in kept_in(folder))


def test_choices_and_the_request_for_a_letter_are_no_question() -> None:
    choices = ["none of these has ever been seen by anyone", "one"]
    rows = [{"question": f"{q}?", "choices": choices, "answer": 0} for q in ("Who", "What")]
    assert not question_keys(rows[0]) & question_keys(rows[1])


MALFORMED_TESTS = [{"messages": [{"content": "hi"}]}, {"messages": "a text"}, {"messages": [5]}, 7]


def test_malformed_rows_of_a_test_set_are_named_and_the_others_kept_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked_alone = {"messages": [{"role": "user", "content": QUESTION}]}
    test_set = chats_in(tmp_path, [*MALFORMED_TESTS, asked_alone], "tests")
    assert question_keys({"question": QUESTION}) == ingest.question_keys_of(test_set)
    said = capsys.readouterr().out
    assert "tests: no question in 4 rows of this test set" in said
    assert f"{test_set.files[0]}, row 0; " in said
    with pytest.raises(UserError, match="tests: no question was found"):
        ingest.question_keys_of(chats_in(tmp_path, MALFORMED_TESTS, "tests"))


def test_files_are_hashed_once_with_and_without_test_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: Counter[str] = Counter()
    checksum = sources.checksum

    def counting(path: Path) -> str:
        hashed[path.name] += 1
        return checksum(path)

    monkeypatch.setattr(sources, "checksum", counting)
    source = chats_in(tmp_path, asking(OTHER))
    test_sets = [chats_in(tmp_path, [{"question": f"{n}?"}], f"tests{n}") for n in range(2)]
    for _ in range(3):
        ingest.write_chat_shards(source, tmp_path / "out", 0.3, exclude=test_sets)
    assert hashed == {"chat.jsonl": 1, "tests0.jsonl": 1, "tests1.jsonl": 1}

"""The table of word problems: what is a calculation, which parse, which are right."""

from __future__ import annotations

from benchmarks import calls
from hearth.data.chat_format import Answer
from hearth.evaluation.chat_tasks import Reply


def reply(content: str, *parts: dict) -> Reply:
    return Reply(Answer(None, content, parts), stopped=True, as_asked=True)


def call(arguments: str, result: str) -> dict:
    return {"tool": "calculate", "arguments": arguments, "result": result}


def test_a_call_that_the_calculator_cannot_do_counts_as_one_that_does_not_parse() -> None:
    broken = reply("", call("48/", "error: not an expression"), {"text": ""})
    whole = reply("24", call("48/2", "24"), {"text": "24"})
    assert calls.shares([broken, whole]) == [
        "100.0% of 2",
        "100.0% of 2",
        "50.0% of 2",
        "100.0% of 1",
    ]


def test_without_calls_what_the_text_writes_is_checked() -> None:
    assert list(calls.calculations(reply("He has 48 / 2 = 25 left."))) == [("48 / 2", "25")]
    assert calls.shares([reply("He has 48 / 2 = 25 left.")])[-1] == "0.0% of 1"
    assert calls.shares([reply("Nothing.")])[1:] == ["0.0% of 1", "none", "none"]

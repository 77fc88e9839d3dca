"""Marks of calls in a text: what was called comes back, whatever else the text says."""

from __future__ import annotations

import pytest

from hearth.serving.marks import marked, unmarked

CALL = {"tool": "calculate", "arguments": "12*7", "result": "84"}


@pytest.mark.parametrize(
    "content",
    [
        "plain",
        "",
        [CALL],
        [{"text": "so "}, CALL, {"text": " and "}, CALL, CALL, {"text": "\n\nend"}],
        [CALL | {"arguments": 'count("→", "a → b")', "result": "0"}],
        [CALL | {"result": "error: division by zero"}],
        [CALL | {"arguments": "", "result": ""}],
    ],
)
def test_a_content_comes_back_from_its_text(content: str | list) -> None:
    assert unmarked(marked(content)) == content


def test_a_call_reads_well() -> None:
    assert marked([{"text": "It is "}, CALL]) == "It is ⟦calculate 12*7 → 84⟧"
    assert marked([CALL | {"result": None}]) == "⟦calculate 12*7⟧"


@pytest.mark.parametrize(
    "text", ["⟦x⟧", "⟦ → 3⟧", "⟦a ⟦b → 1", "a → b", "⟦⟧", "⟦calculate 1+1⟧", "⟦ calculate → 2⟧"]
)
def test_what_marks_no_whole_call_stays_text(text: str) -> None:
    assert unmarked(text) == text

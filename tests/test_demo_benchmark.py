"""The table of the demo's bars: what is right, what is a call, and which bar a figure holds."""

from __future__ import annotations

from benchmarks import demo
from hearth.data.chat_format import Answer
from hearth.data.demo_world import ASKED, Question, earlier_turns
from hearth.data.problems import identity_wordings
from hearth.evaluation.chat_tasks import Reply

CALL = {"tool": "calculate", "arguments": "123 + 456", "result": "579"}


def reply(content: str, *parts: dict) -> Reply:
    return Reply(Answer(None, content, parts), stopped=True, as_asked=True)


def test_an_answer_is_right_if_it_says_exactly_what_is_to_be_found() -> None:
    question = Question("calculator", "What is 123 + 456?", "579", thinking=False, calls=True)
    assert demo.is_right(question, reply(" 579\n", CALL, {"text": " 579\n"}))
    assert not demo.is_right(question, reply("5790"))
    assert demo.calls(reply("579", CALL, {"text": "579"}))
    assert not demo.calls(reply("579", {"text": "579"}))


def test_every_bar_holds_from_its_figure_on_and_the_worst_kind_is_named_by_its_share() -> None:
    kinds = (*ASKED, demo.FRESH, demo.LATE)
    perfect = dict.fromkeys(kinds, 1.0)
    assert all(bar.holds for bar in demo.bars_of(perfect, 1.0))
    assert not any(bar.holds for bar in demo.bars_of(dict.fromkeys(kinds, 0.8), 0.9))
    bars = {bar.name: bar for bar in demo.bars_of(perfect | {"spelling": 0.87}, 1.0)}
    assert {name.strip() for name, bar in bars.items() if not bar.holds} == {
        *("the worst of them", "spelling", "words never spelt in training")
    }
    assert bars["the worst of them"].figure == 0.87
    assert bars["the five old kinds, mean"].figure == (4 + 0.87) / 5


def test_a_late_question_stands_behind_two_others_that_are_thought_over_as_it_is() -> None:
    asked = demo.further(27)
    assert len({q.kind for q in asked[demo.LATE]}) == len(ASKED)
    for question in asked[demo.LATE]:
        before = earlier_turns(question)
        assert [turn["role"] for turn in before] == ["user", "assistant"] * 2
        assert {"thinking" in turn for turn in before[1::2]} == {question.thinking}
        assert question.prompt not in [turn["content"] for turn in before]
    fresh = {wording for _, wording in identity_wordings(held=True, fresh=True)}
    assert all(any(q.prompt.lower().endswith(w.lower()) for w in fresh) for q in asked[demo.FRESH])

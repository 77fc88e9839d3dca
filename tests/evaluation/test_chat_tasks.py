"""Chat tasks: what makes an answer right, and how answers behave."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scored import make_run

from config import Config
from hearth.data import demo_world
from hearth.data.chat_format import Answer
from hearth.evaluation import chat_tasks
from hearth.evaluation.chat_tasks import Reply
from hearth.evaluation.scores import Bench
from hearth.reporting import report
from hearth.training import checkpoint
from hearth.training.checkpoint import Loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def loaded(run: Config) -> Loaded:
    return checkpoint.load_for_inference(run.run_dir / "base")


@pytest.mark.parametrize(
    ("gold", "said", "right"),
    [
        ("18", "She makes $18 every day.", True),
        ("18", "So the answer is \\boxed{18}.", True),
        ("70000", "$70,000", True),
        ("72", "72.0", True),
        ("15", "It was 18, then 3 less.", False),
        ("5", "I do not know.", False),
        ("5", "", False),
    ],
)
@pytest.mark.filterwarnings("default")
def test_an_answer_is_right_when_it_means_the_same_number(
    gold: str, said: str, right: bool
) -> None:
    assert chat_tasks.same_number(gold, said) == right


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("The answer is C.", "C"),
        ("(D) water", "D"),
        ("Because", None),
        ("E", None),
        ("", None),
    ],
)
def test_a_letter_must_stand_alone(said: str, letter: str | None) -> None:
    assert chat_tasks.first_letter(said, "ABCD") == letter


def test_chat_questions_list_their_choices_once() -> None:
    texts = {"query": "Question: Who sat?", "choices": ["the cat", "a bird"], "gold": 1}
    asked = chat_tasks.letter_question(texts)
    assert asked.text.count("A. the cat\nB. a bird") == 1
    assert asked.is_right(Answer(None, "B"))
    assert not asked.is_right(Answer("B", "A"))
    listed = chat_tasks.letter_question(
        {"query": "Who?\nA. cat\nB. bird", "choices": ["A", "B"], "gold": 0}
    )
    assert listed.text == "Who?\nA. cat\nB. bird\nAnswer with the letter of the right choice."


def test_gsm8k_is_read_in_both_layouts() -> None:
    for row in (
        {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
        {"context": "1 + 1?", "answer": "2"},
    ):
        asked = chat_tasks.gsm8k_question(row)
        assert (asked.text, asked.reasons) == ("1 + 1?", True)
        assert asked.is_right(Answer("one and one", "2"))


def test_behaviour_counts_answers_that_stop_and_think_as_asked() -> None:
    replies = [
        Reply(Answer("7, 8", "9"), True, True, 4),
        Reply(Answer(None, "9"), True, False),
        Reply(Answer("7, 8, 9", ""), False, True, 6),
        Reply(Answer(None, " "), True, True),  # says nothing
    ]
    found = {one.task.removeprefix("x: "): one for one in chat_tasks.behaviour(replies, "x")}
    shares = {name: f.value for name, f in found.items() if f.metric == "share"}
    assert shares == {
        "stops by itself": 0.75,
        "thinks exactly when asked": 0.75,
        "keeps the format": 0.25,
    }
    length = found["length of the reasoning"]
    assert (length.value, length.n, length.metric) == (5.0, 2, "tokens")
    assert str(length) == "5.0 ±  1.0"
    assert "%" not in report.score_text({"value": 5.0, "stderr": 1.0, "metric": "tokens"})


def test_reasoning_is_measured_in_tokens_between_its_signs(loaded: Loaded) -> None:
    t = loaded.tokenizer
    for ids, n in (
        ([t.think, 40, 41, t.end_think, 42, t.end], 2),
        ([t.think, 40, 41, t.end], 2),  # never closed
        ([t.think, 40], 1),
        ([40, t.end], None),
    ):
        assert chat_tasks.reply_of(ids, t, reasons=True).n_thought == n


def test_a_reply_tells_stopping_and_thinking_from_the_ids(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoint.load_for_inference(run.run_dir / "sft2")
    t = loaded.tokenizer
    # the shortest prompt comes first: c, a, b
    said = [[60, t.end], [t.think, 50, t.end_think, 60, t.end], [60, 61]]
    monkeypatch.setattr(chat_tasks.Engine, "generate", lambda self, prompts, **_: said)
    replies = chat_tasks.ask(loaded, [("a", True), ("b", True), ("c", False)], 10)
    assert [(reply.stopped, reply.as_asked) for reply in replies] == [
        (True, True),
        (False, False),
        (True, True),
    ]


def test_no_more_questions_about_the_world_are_asked_than_there_are(
    run: Config, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = Reply(Answer(None, "9"), True, True)
    monkeypatch.setattr(chat_tasks, "ask", lambda _, asked, *__: [reply] * len(asked))
    bench = Bench(loaded, run.run_dir, None, run.run_dir, None)
    found = {
        limit: chat_tasks.world_scores(replace(bench, limit=limit), 10**6)[0][0].n
        for limit in (7, 5000, None)
    }
    assert found[7] == 7
    assert found[5000] == found[None]
    with pytest.raises(ValueError, match="must lie between"):
        demo_world.held_out_questions(found[None] + 1)

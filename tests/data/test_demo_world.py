"""The demo world is the same every time, true to itself, right in every answer, and never shows
what is held out.
"""

import re
from collections import Counter
from functools import cache

import pytest

from hearth.data import demo_world as world
from hearth.data.problems import number_held_out, scene_held_out, spelt, word_held_out
from hearth.data.problems import words as problem_words

COLUMNS = {
    "alpaca": ["instruction", "input", "output"],
    "dolly": ["instruction", "context", "response", "category"],
    "messages": ["messages", "prompt", "prompt_id"],
    "math": ["problem", "solution", "answer"],
}
KINDS = list(world.ASKED)


@cache
def documents() -> list[str]:
    return list(world.text_documents())


@cache
def rows(layout: str) -> list[dict]:
    return list(world.conversations(layout))


@cache
def held_out() -> list[world.Question]:
    return world.held_out_questions(50 * len(KINDS))


@cache
def exchanges() -> list[tuple[str, str]]:
    """Every question and its whole reply, steps included, of all layouts."""
    found = [
        (r["input"] if r["input"] and "?" in r["input"] else r["instruction"], r["output"])
        for r in rows("alpaca")
    ]
    found += [(r["instruction"], r["response"]) for r in rows("dolly")]
    for row in rows("messages"):
        said = row["messages"]
        for asked, answered in zip(said[::2], said[1::2], strict=True):
            reply = text_of(answered["content"])
            thought = answered.get("thinking")
            worked = thought is not None and thought not in world.THOUGHTS.values()
            found.append((asked["content"], f"{thought} => {reply}" if worked else reply))
    return found + [(r["problem"], f"{r['solution']} => {r['answer']}") for r in rows("math")]


def text_of(content: str | list[dict]) -> str:
    """What is said, calls with their tool and without their result."""
    if isinstance(content, str):
        return content
    return "\n".join(p.get("text") or f"{p['tool']} {p['arguments']}" for p in content)


@cache
def sentences() -> Counter:
    """How often each sentence occurs in the training text."""
    return Counter(re.split(r"(?<=[.?!])\s+|\n|Question: |Answer: ", everything()))


@cache
def everything() -> str:
    """All training text as one string."""
    contexts = [row["context"] for row in rows("dolly")]
    return "\n".join(
        [*documents(), *contexts, *(f"{question}\n{reply}" for question, reply in exchanges())]
    )


def expected(question: str) -> str | None:
    """The answer worked out again from the words of the question; None where it is no question with
    steps.
    """
    number = [int(word) for word in re.findall(r"\d+", question)]
    if scene := re.search(
        r"in a row: (.*)\. (?:How|Count|What).*?(\w+?)s(?: are there\?|\.|\?)$", question
    ):
        things = scene[1].split(", ")
        return str(
            len(things) if scene[2] == "thing" else sum(t.split()[-1] == scene[2] for t in things)
        )
    if re.search(r"\d+ [+-] \d+ or \d+ [+-] \d+", question):
        return str(max(number[0] + number[1], number[2] - number[3]))
    if len(number) == 2 and (op := re.search(r"\d ([+-]) \d", question)):
        return str(number[0] + number[1] if op[1] == "+" else number[0] - number[1])
    names = re.findall(r"\b(?:" + "|".join([*world.people(), *world.TREES]) + r")\b", question)
    if re.search("loses|gives", question):
        return str(number[0] - number[1])
    if re.search("finds|together", question) and number:
        return str(sum(number))
    if word := re.search(
        r"\b(older|larger|bigger|more|taller|younger|smaller|lower|fewer|shorter)\b", question
    ):
        if not number:
            number = [int(world.of("age", name)) for name in names]
        best = max if word[1] in ("older", "larger", "bigger", "more", "taller") else min
        winner = number.index(best(number))
        return names[winner] if names else str(number[winner])
    return None


def test_same_every_time(monkeypatch):
    monkeypatch.setattr(world, "TEXT_BYTES", 200_000)
    assert list(world.text_documents()) == list(world.text_documents())
    assert all(rows(layout) == list(world.conversations(layout)) for layout in COLUMNS)
    assert world.held_out_questions(40, seed=3) == world.held_out_questions(40, seed=3)
    assert world.held_out_questions(40, seed=3) != world.held_out_questions(40, seed=4)


def test_documents_have_the_size_promised_and_no_two_are_equal():
    texts = documents()
    assert sum(map(len, texts)) == pytest.approx(world.TEXT_BYTES, rel=0.01)
    assert len(set(texts)) == len(texts)
    assert sum(200 <= len(text) <= 900 for text in texts) > 0.98 * len(texts)
    assert sum(world.SHARES.values()) == pytest.approx(1)


def test_conversations_have_exactly_the_columns():
    for layout, columns in COLUMNS.items():
        assert len(rows(layout)) == world.ROWS[layout]
        assert all(list(row) == columns for row in rows(layout))
    for row in rows("messages"):
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * (
            len(row["messages"]) // 2
        )
        assert 4 <= len(row["messages"]) <= 8
        assert row["prompt"] == row["messages"][0]["content"]
    assert len({row["prompt_id"] for row in rows("messages")}) == len(rows("messages"))
    with pytest.raises(ValueError, match="alpaca, dolly, messages, math"):
        next(world.conversations("ultrachat"))


def test_conversations_mix_kinds_and_think_over_all_their_answers_or_none() -> None:
    """A late turn is thought over like a first one, and every thought has an answer behind it."""
    thoughtful = 0
    for row in rows("messages"):
        answers = row["messages"][1::2]
        thinks = {"thinking" in answer for answer in answers}
        assert len(thinks) == 1
        assert all(answer["content"] for answer in answers)
        thoughtful += thinks.pop()
    assert 0.25 < thoughtful / len(rows("messages")) < 0.45
    late = [turn for row in rows("messages") for turn in row["messages"][3::2]]
    assert sum("So" in turn.get("thinking", "") for turn in late) > 100
    assert sum(isinstance(turn["content"], list) for turn in late) > 100


def test_all_text_is_ascii():
    assert everything().isascii()
    assert all((q.prompt + q.answer).isascii() for q in held_out())


def test_world_has_one_value_a_fact_and_distinct_ages():
    keys = Counter((fact.relation, fact.subject) for fact in world.all_facts())
    assert max(keys.values()) == 1
    assert len({world.of("age", name) for name in world.people()}) == len(world.people()) == 24
    for name in world.people():
        assert world.of("home", name) == world.of("family home", world.of("family", name))
        assert world.of("owner", world.of("thing", name)) == name
    assert len({name[0] for name in world.people()}) == 24  # no two names begin alike


def test_no_sentence_contradicts_the_world():
    """Whatever sentence looks like the statement of a fact, in any document, states a true one."""
    seen = 0
    for relation, (statements, _) in world.wordings().items():
        subjects = {
            fact.subject: fact.value for fact in world.all_facts() if fact.relation == relation
        }
        values = "|".join(sorted(set(subjects.values())))
        for statement in statements:
            names = "|".join(subjects)
            fill = {"x": f"(?P<x>{names})", "v": f"(?P<v>{values})"}
            pattern = re.compile(
                re.escape(statement).replace(r"\{", "{").replace(r"\}", "}").format(**fill)
            )
            told = [match for sentence in sentences() if (match := pattern.fullmatch(sentence))]
            assert all(subjects[match["x"]] == match["v"] for match in told)
            assert len({match["x"] for match in told}) == len(subjects), statement
            seen += len(told)
    assert seen > 500


def test_stories_agree_with_the_world():
    checks = {
        "colour": r"(\w+) wore a (\w+) coat",
        "home": r"(\w+) went home to (\w+)",
        "thing": r"(\w+) carried the (\w+) all",
        "age": r"(\w+) is (\d+) years old",
        "job": r"(\w+) works as a (\w+),",
    }
    for relation, pattern in checks.items():
        told = [
            match.groups() for sentence in sentences() if (match := re.search(pattern, sentence))
        ]
        assert len(set(told)) == len(world.people())
        assert all(world.of(relation, name) == value for name, value in told)
    is_aged = re.compile(rf"\b({'|'.join(world.people())}) is (\d+)\b")
    ages = {pair for sentence in sentences() for pair in is_aged.findall(sentence)}
    assert ages == {(name, world.of("age", name)) for name in world.people()}


def test_every_fact_is_told_at_least_sixty_times():
    for fact in world.all_facts():
        ways = [
            way.format(x=fact.subject, v=fact.value) for way in world.wordings()[fact.relation][0]
        ]
        assert sum(sentences()[way] for way in ways) >= 60, fact


def test_every_worked_answer_is_right():
    """In conversations the last number or name of the steps is the answer; so it is in the
    documents.
    """
    checked = Counter()
    asked = re.findall(
        r"Question: (.*)\n(.*)\nAnswer: (\w+)$", "\n".join(documents()), re.MULTILINE
    )
    for question, reply in [
        *exchanges(),
        *((q, f"{s} => {a}") for q, s, a in asked if not s.startswith("calculate")),
    ]:
        if answer := expected(question):
            assert re.search(r"(\w+)\.?$", reply)[1] == answer, (question, reply)
            if reply.startswith("calculate"):
                continue
            assert re.search(r"(\w+)\.(?: => |$)", reply)[1] == answer, (question, reply)
            checked[answer.isdigit()] += 1
    assert len(asked) > 5000
    assert min(checked.values()) > 1000


def test_every_step_of_every_sum_is_right():
    equations = re.findall(r"(?<![\d+-] )\b(\d+(?: [+-] \d+)+) = (\d+)", everything())
    assert len(equations) > 20_000
    for left, right in set(equations):
        total = sum(int(term) for term in re.sub(r"([+-]) ", r"\1", left).split())
        assert total == int(right), (left, right)


def test_facts_in_conversations_are_answered_by_the_first_statement():
    answers = {question: fact.answer for fact in world.all_facts() for question in fact.questions}
    asked = [(question, reply) for question, reply in exchanges() if question in answers]
    assert len(asked) > 3000
    assert all(reply == answers[question] for question, reply in asked)


def test_stage_one_and_stage_two_teach_every_direct_wording():
    taught = {question for question, _ in exchanges()}
    in_stage_two = {turn["content"] for row in rows("messages") for turn in row["messages"][::2]}
    for relation, (_, asked) in world.wordings().items():
        for number in range(len(asked)):
            group = [
                f for f in world.all_facts() if f.relation == relation and f.held_out != number
            ]
            assert all(fact.questions[number] in taught for fact in group)
            assert any(fact.questions[number] in in_stage_two for fact in group)


def test_held_out_questions_are_balanced_and_right():
    questions = held_out()
    assert Counter(q.kind for q in questions) == dict.fromkeys(KINDS, 50)
    assert len({q.prompt for q in questions}) == len(questions)
    assert min(Counter(q.kind for q in world.held_out_questions(200)).values()) >= 22
    answers = {question: fact.answer for fact in world.all_facts() for question in fact.questions}
    for q in questions:
        assert q.thinking == (q.kind in world.WORKED)
        assert q.calls == (q.kind == "calculator")
        if q.kind in ("facts", "comparison", "counting", "one kind", "arithmetic"):
            assert q.answer == (expected(q.prompt) or answers[q.prompt])
        assert q.answer == q.answer.strip()
    for n in (0, -4, 10_000):
        with pytest.raises(ValueError, match="must lie between"):
            world.held_out_questions(n)


def test_held_out_questions_never_occur_in_training():
    text = everything()
    for question in held_out():
        assert question.prompt not in text
    text = "\n".join(sentences())
    for fact in world.all_facts():
        assert fact.questions[fact.held_out] not in text


def test_held_out_pairs_are_never_added_subtracted_or_compared_in_training():
    """In whatever order or wording: every place where two numbers meet in a sum or a comparison is
    looked at.
    """
    text = "\n".join(sentences())
    meet = re.findall(r"\b(\d+) [+-] (\d+)\b", text) + re.findall(
        r"(?<![+-] )\b(\d+) (?:and|or) (\d+)\b(?! [+-])", text
    )
    meet += re.findall(r"\w+ (?:is|has) (\d+), \w+ (?:is|has) (\d+)\.", text)
    meet += re.findall(r" (\d+) (?:\w+s and \w+ has|feet tall and the \w+ is) (\d+) ", text)
    assert len(set(meet)) > 5000
    pairs = {(int(a), int(b)) for a, b in meet}
    small = [pair for pair in pairs if max(pair) in world.NUMBERS]  # others: the calculator's
    assert len(small) > 4000
    assert not [pair for pair in small if world.pair_held_out(*pair)]
    older = set(re.findall(r"Who is (?:older|younger), (\w+) or (\w+)\?", text))
    assert len(older) > 400
    assert not [
        p for p in older if world.pair_held_out(*(int(world.of("age", name)) for name in p))
    ]


def test_held_out_words_are_never_spelt_in_training() -> None:
    """Neither in full nor at the beginning of the steps of another question."""
    taught = set(re.findall(r"\b[a-z](?:-[a-z])+\b", everything()))
    assert len(taught) > 2000
    held = [q.answer for q in held_out() if q.kind == "spelling"]
    held += [spelt(w) for w in problem_words() if word_held_out(w)]
    assert len(held) > 100
    assert not taught & set(held)


def test_numbers_of_held_out_sums_are_in_no_training_sum() -> None:
    calculated = re.findall(r"calculate (\d+) [+-] (\d+)", everything())
    seen = {int(number) for pair in calculated for number in pair}
    assert len(seen) > 1000
    assert not [number for number in seen if number_held_out(number)]


def test_held_out_scenes_are_never_counted_in_training():
    scenes = set(re.findall(r"in a row: (.*?)\. ", everything()))
    assert len(scenes) > 2500
    for scene in scenes:
        assert not scene_held_out([thing.split()[-1] for thing in scene.split(", ")])


def test_small_sums_that_larger_ones_are_made_of_are_never_held_out():
    assert not any(
        world.pair_held_out(a, b) for a in range(world.TABLE) for b in range(world.TABLE)
    )
    kept = sum(world.pair_held_out(a, b) for a in range(100) for b in range(a, 100))
    assert 0.07 < kept / 5050 < 0.13

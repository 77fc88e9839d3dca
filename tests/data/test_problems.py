"""Made problems have right answers and steps, are the same every time, and never show in training
what is held out.
"""

import re
from collections import Counter
from datetime import datetime, timedelta
from functools import cache

import pytest

from hearth.data import problems
from hearth.data.layouts import normalised
from hearth.data.problems import KINDS, Problem
from hearth.decoding.calculator import calculate

N = 400


@cache
def taught(kind: str) -> list[Problem]:
    return list(problems.problems(kind, 3000, 0))


@cache
def kept(kind: str) -> list[Problem]:
    return list(problems.problems(kind, N, 1, held=True))


def both(kind: str) -> list[Problem]:
    return taught(kind)[:N] + kept(kind)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_every_time_and_no_question_twice(kind: str) -> None:
    again = list(problems.problems(kind, N, 1, held=True))
    assert again == kept(kind)
    assert len({p.question for p in taught(kind)}) == len(taught(kind))
    assert list(problems.problems(kind, 50, 2)) != list(problems.problems(kind, 50, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_no_held_out_question_is_ever_taught(kind: str) -> None:
    assert not {p.question for p in taught(kind)} & {p.question for p in kept(kind)}
    assert len(kept(kind)) >= 200


def test_held_out_words_are_spelt_in_no_training_problem() -> None:
    spelt = {p.answer.replace("-", "") for p in taught("spelling")}
    spelt |= {p.steps.split(".")[0].replace("-", "") for p in taught("letters")}
    held = {p.answer.replace("-", "") for p in kept("spelling")}
    held |= {p.steps.split(".")[0].replace("-", "") for p in kept("letters")}
    assert len(spelt) > 1500
    assert len(held) > 200
    assert not spelt & held


def test_numbers_of_held_out_sums_are_in_no_training_sum() -> None:
    seen = {n for p in taught("calculator") for n in (*numbers(p.question), int(p.answer))}
    for problem in kept("calculator"):
        assert not seen & set(numbers(problem.question))
    assert {len(str(n)) for p in kept("calculator") for n in numbers(p.question)} == {3, 4}


def test_held_out_scenes_are_counted_in_no_training_problem() -> None:
    def scenes(some: list[Problem]) -> set[tuple[str, ...]]:
        return {tuple(sorted(re.findall(r"(?:st|nd|rd|th) (\w+)", p.question))) for p in some}

    assert not scenes(taught("counting")) & scenes(kept("counting"))


def test_words_are_spelt_right() -> None:
    for problem in both("spelling"):
        letters = problem.answer.split("-")
        assert all(len(letter) == 1 for letter in letters)
        assert re.search(rf"\b{''.join(letters)}\b", problem.question)
        assert problem.said == problem.answer


def test_letters_are_counted_right_and_every_step_says_the_count_so_far() -> None:
    for problem in both("letters"):
        word = problem.steps.split(".")[0].replace("-", "")
        assert word in problem.question
        one = re.search(r"\b([a-z])\b", problem.question)
        steps = re.findall(r"\b([a-z]) (\d+)", problem.steps)
        assert [letter for letter, _ in steps] == list(word)
        for i, (_, n) in enumerate(steps, start=1):
            assert int(n) == (word[:i].count(one[1]) if one else i)
        assert problem.answer == steps[-1][1]
        assert problem.steps.endswith(f"So {problem.answer}.")


def test_things_of_one_kind_are_counted_right() -> None:
    for problem in both("counting"):
        things = re.findall(r"(?:st|nd|rd|th) (\w+)", problem.question.split(": ")[1])
        noun = re.search(r"(\w+)s(?: are there\?|\.|\?)$", problem.question)[1]
        assert problem.answer == str(things.count(noun))
        assert [int(n) for n in re.findall(r"\w+ \w+ (\d+)", problem.steps)] == [
            things[:i].count(noun) for i in range(1, len(things) + 1)
        ]


@pytest.mark.parametrize("kind", ["calculator", "units"])
def test_the_calculator_says_what_the_answer_says(kind: str) -> None:
    for problem in both(kind):
        assert calculate(problem.expression) == problem.answer
        *_, call, answer = problem.said
        assert call["result"] == answer["text"] == problem.answer
        assert set(numbers(problem.question)) <= set(numbers(problem.expression))


def test_every_place_of_a_long_sum_is_right() -> None:
    for problem in both("long sums"):
        a, b = numbers(problem.question)
        assert problem.answer == str(a + b)
        steps = re.findall(r"(\d) \+ (\d) \+ (\d) = (\d+), write (\d)", problem.steps)
        assert len(steps) == max(len(str(a)), len(str(b)))
        written, carry = "", 0
        for p, q, c, total, digit in steps:
            assert int(c) == carry
            assert int(total) == int(p) + int(q) + carry
            written, carry = str(int(total) % 10) + written, int(total) // 10
            assert int(digit) == int(total) % 10
        assert int(f"{carry}{written}") == a + b


def test_dates_and_weekdays_are_those_of_the_calendar() -> None:
    def days(text: str) -> list[datetime]:
        return [datetime.strptime(d, "%B %d, %Y") for d in re.findall(r"[A-Z]\w+ \d+, \d+", text)]

    for problem in both("dates"):
        found = days(problem.question)
        if "weekday" in problem.question:
            after = numbers(problem.question)[-1]
            expected = f"{found[0] + timedelta(after):%A}"
        elif len(found) == 2:
            expected = str((found[1] - found[0]).days)
        else:
            (expected,) = days(problem.answer)
            assert expected == found[0] + timedelta(numbers(problem.question)[0])
            continue
        assert problem.answer == expected
        assert problem.steps.endswith(f"{expected}.")


def test_a_unit_is_as_many_smaller_ones_as_its_line_says() -> None:
    known = {(large, small): factor for large, small, factor in problems.UNITS}
    for problem in both("units"):
        names = re.findall(r"[a-z]+", problem.question)
        ((factor,),) = [
            {f for (large, small), f in known.items() if large in names and small in names}
        ]
        assert int(problem.answer) == numbers(problem.question)[0] * factor


def test_ten_wordings_about_the_speaker_are_kept_back() -> None:
    wordings = [problems.identity_wordings(held=held) for held in (False, True)]
    assert len(wordings[1]) == 10
    assert not set(wordings[0]) & set(wordings[1])
    asked = {p.question.lower() for p in taught("identity")}
    assert not any(w in q for _, w in wordings[1] for q in asked if q.endswith(w))
    assert {about for about, _ in wordings[1]} == {"name", "maker"}


def test_ten_fresh_wordings_share_less_than_half_of_their_words_with_any_that_is_taught() -> None:
    def words(text: str) -> set[str]:
        return set(normalised(text).split())

    fresh = problems.identity_wordings(held=True, fresh=True)
    assert Counter(about for about, _ in fresh) == {"name": 5, "maker": 5}
    for _, wording in fresh:
        for problem in [*taught("identity"), *kept("identity")]:
            known = problem.question
            for opening in problems.OPENINGS:
                known = known.removeprefix(opening) if opening else known
            shared = words(wording) & words(known)
            assert len(shared) < 0.5 * len(words(wording) | words(known)), (wording, known)


def test_the_speaker_has_the_name_and_the_owner_of_the_config() -> None:
    rows = list(problems.conversations("identity", 5000, ("Ada", "Grace")))
    said = {row["messages"][1]["content"] for row in rows}
    assert said == {
        problems.identity_answer(about, ("Ada", "Grace")) for about in ("name", "maker")
    }
    assert all("Ada" in text and "Hearth" not in text for text in said)
    assert any("Grace" in text for text in said)
    assert len(list(problems.conversations("identity"))) == len(rows) > 400  # there are no more

"""Environments: splits never meet, what the demo's examination keeps back stays unpractised, own
rewards and problems.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from config import RLConfig, UserError
from hearth.data import demo_world as world
from hearth.data.problems import scene_held_out
from hearth.training import rewards
from hearth.training.rewards import ENVIRONMENTS, Environment, exact


def drawn(environment: Environment, split: str, n: int = 40) -> list[rewards.Problem]:
    rng, found = Random(1), []
    for i in range(n):
        kind = environment.kinds[i % len(environment.kinds)]
        if (problem := environment._next(kind, split, rng)) is not None:
            found.append(problem)
    return found


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_what_is_practised_is_never_asked_when_measuring(environment: Environment) -> None:
    train = {problem.key for problem in drawn(environment, "train", 200)}
    held_out = {problem.key for problem in environment.fixed("held out", 32, 0)}
    test = {problem.key for problem in environment.fixed("test", 32, 0)}
    assert train
    assert held_out
    assert test
    assert not train & held_out
    assert not (train | held_out) & test


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_the_right_answer_earns_one_and_another_none(environment: Environment) -> None:
    for problem in drawn(environment, "train"):
        assert environment.reward(problem, f" {problem.answer}\n") == 1.0
        assert environment.reward(problem, problem.answer + " 1234567") == 0.0
        assert environment.reward(problem, "") == 0.0


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_answers_are_right_by_another_reckoning(environment: Environment) -> None:
    """What the question's own words say, read again from the prompt."""
    check = CHECKS.get(environment.name)
    for problem in drawn(environment, "train", 60):
        assert check is None or check(problem.prompt) == problem.answer, problem


def numbers(text: str) -> list[int]:
    return [int(word) for word in "".join(c if c.isdigit() else " " for c in text).split()]


def asked_pick(text: str) -> str:
    low = any(word in text for word in ("smaller", "smallest", "lower", "less"))
    return str((min if low else max)(numbers(text)))


def counted(text: str) -> str:
    row, asked = text.split("in a row: ")[1].split(". ", 1)
    noun = next(good for good in world.GOODS if f"{good}s" in asked)
    return str(sum(part.endswith(f" {noun}") for part in row.split(", ")))


CHECKS = {
    "one kind": counted,
    "largest": asked_pick,
    "new comparisons": asked_pick,
    "three numbers": lambda text: str(sum(numbers(text))),
    "new sums": lambda text: str(sum(numbers(text))),
}


def test_the_demos_examination_stays_unseen() -> None:
    for name in ("new sums", "new comparisons"):
        for problem in drawn(ENVIRONMENTS[name], "train", 300):
            assert not world.pair_held_out(*numbers(problem.prompt)), problem
    for problem in drawn(ENVIRONMENTS["one kind"], "train", 200):
        row = problem.prompt.split("in a row: ")[1].split(". ")[0]
        assert not scene_held_out([part.split()[1] for part in row.split(", ")])


def test_fixed_problems_are_the_same_every_time_and_all_different() -> None:
    first, again = (ENVIRONMENTS["one kind"].fixed("test", 50, 3) for _ in range(2))
    assert first == again
    assert len({problem.prompt for problem in first}) == 50
    assert first != ENVIRONMENTS["one kind"].fixed("test", 50, 4)


# -------------------------------------------------------------------------------------------- own


def settings(**changes) -> RLConfig:
    return RLConfig(**changes)


def test_own_problems_and_an_own_reward(tmp_path: Path) -> None:
    rows = [{"question": f"how many is {n}", "answer": f"so it is\n#### {n}"} for n in range(60)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "judge.py").write_text(
        "def reward(problem, answer):\n"
        "    return 0.5 * (answer in problem.prompt) + 0.5 * (answer == problem.answer)\n"
    )
    config = settings(files=(str(tmp_path / "mine.jsonl"),), reward=str(tmp_path / "judge.py"))
    (own,) = rewards.chosen(config)
    problem = own.draw("own", "train", Random(0))
    assert problem.reasons
    assert problem.answer in problem.prompt
    assert [own.reward(problem, said) for said in (problem.answer, "how", "x")] == [1.0, 0.5, 0.0]
    before = rewards.fingerprint(config)
    (tmp_path / "judge.py").write_text("def reward(problem, answer):\n    return 1\n")
    assert before != rewards.fingerprint(config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "There is no file"),
        ("x = 1", "has no `def reward"),
        ("import nothing_of_that_name", "cannot be run"),
        ("def reward(problem, answer): return answer[99]", "failed on the answer"),
        ("def reward(problem, answer): return 'good'", "failed on the answer"),
        ("def reward(problem, answer): return float('nan')", "gave nan"),
    ],
)
def test_a_reward_that_cannot_be_used_is_named(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "judge.py").write_text(text)
    config = settings(environments=("one kind",), reward=str(tmp_path / "judge.py"))
    problem = ENVIRONMENTS["one kind"].draw("4 things", "train", Random(0))
    with pytest.raises(UserError, match=said):
        rewards.chosen(config)[0].reward(problem, "x")


def test_what_there_is_not_is_named() -> None:
    with pytest.raises(UserError, match="no environment 'chess': new sums"):
        rewards.chosen(settings(environments=("chess",)))
    with pytest.raises(UserError, match="Nothing to practise"):
        rewards.chosen(settings())


def test_a_task_of_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    (task,) = rewards.chosen(settings(environments=("gym:chain_sum",)))
    problem = task.draw("chain_sum", "train", Random(0))
    assert task.draw("chain_sum", "train", Random(0)).prompt == problem.prompt
    assert task.reward(problem, problem.answer) == 1.0
    assert task.reward(problem, "no") < 1.0
    with pytest.raises(UserError, match="no task 'chess'"):
        rewards.chosen(settings(environments=("gym:chess",)))


def test_without_reasoning_gym_the_command_that_gets_it_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="uv run --with reasoning-gym"):
        rewards.chosen(settings(environments=("gym:chain_sum",)))


def test_the_last_number_of_an_answer_counts() -> None:
    problem = rewards.Problem("k", "p", "42", "key")
    said = ("40 + 2 = 42.", "42 is it", "42 and 3", "142", "-42", "", "so 4,2: 42")
    assert [rewards.last_number(problem, text) for text in said] == [1, 1, 0, 0, 0, 0, 1]


def test_exact_means_nothing_else() -> None:
    problem = rewards.Problem("k", "p", "42", "key")
    assert (exact(problem, " 42 "), exact(problem, "42."), exact(problem, "142")) == (1, 0, 0)

"""The reasoning tasks' answers, against slow computations that share no line with them."""

from __future__ import annotations

import itertools
import sys
from itertools import islice
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import reasoning_tasks
from reasoning_tasks import IDS, TASKS, lay, rows

RULE_30 = {"111": 0, "110": 0, "101": 0, "100": 1, "011": 1, "010": 1, "001": 1, "000": 0}


def some(task: str, size: int, n: int = 40) -> list[tuple[list[str], list[str]]]:
    """What is asked (without the `=`) and what is answered, of every problem of some rows."""
    found = []
    for symbols, answers in islice(rows(TASKS[task], "a seed", held_out=False, size=size), n):
        assert symbols[0] == "start"
        length = (len(symbols) - 1) // TASKS[task].a_row
        problems = [slice(i, i + length) for i in range(1, len(symbols), length)]
        assert len(problems) == TASKS[task].a_row
        for problem in problems:
            asked = answers[problem].index(True)
            assert symbols[problem][asked - 1] == "="
            assert all(answers[problem][asked:])
            found.append((symbols[problem][: asked - 1], symbols[problem][asked:]))
    return found


@pytest.mark.parametrize("size", [1, 3, 5])
def test_arithmetic_is_what_python_makes_of_it(size: int) -> None:
    for asked, answer in some("arithmetic", size):
        text = "".join(asked)
        assert eval(text) % reasoning_tasks.MODULUS == int(answer[0])
        assert text.count("(") == size


@pytest.mark.parametrize("size", [1, 4])
def test_automaton_follows_the_rules_table(size: int) -> None:
    for asked, answer in some("automaton", size):
        cells = "".join(asked).rstrip(">")
        assert asked.count(">") == size
        for _ in range(size):
            around = f"0{cells}0"
            cells = "".join(str(RULE_30[around[i : i + 3]]) for i in range(len(cells)))
        assert cells == "".join(answer)


@pytest.mark.parametrize("size", [1, 3])
def test_nodes_are_followed_hop_by_hop(size: int) -> None:
    for symbols, answers in islice(rows(TASKS["hops"], "x", held_out=False, size=size), 40):
        table, *questions = "".join(symbols[1:]).split(",")
        to = dict(zip(table[::2], table[1::2], strict=True))
        assert len(to) == reasoning_tasks.NODES
        for asked in questions:
            assert asked.count(">") == size
            start, end = asked[size:]
            for _ in range(size):
                start = to[start]
            assert start == end
        assert [s for s, a in zip(symbols, answers, strict=True) if a] == [q[-1] for q in questions]


@pytest.mark.parametrize("size", [2, 4])
def test_permutations_move_every_item_in_turn(size: int) -> None:
    named = dict(zip("012345", ("012", "021", "102", "120", "201", "210"), strict=True))
    for asked, answer in some("permutation", size):
        assert len(asked) == size
        for item in range(3):
            at = item
            for name in asked:
                at = int(named[name][at])
            assert named[answer[0]][item] == str(at)


def solutions(cells: list[str]) -> list[list[str]]:
    """Every way to fill the grid, by trying."""
    if "." not in cells:
        return [cells]
    i = cells.index(".")
    seen = {
        cells[j]
        for j in range(16)
        if j // 4 == i // 4 or j % 4 == i % 4 or (j // 8 == i // 8 and j % 4 // 2 == i % 4 // 2)
    }
    tries = ([*cells[:i], digit, *cells[i + 1 :]] for digit in "1234" if digit not in seen)
    return list(itertools.chain.from_iterable(solutions(tried) for tried in tries))


@pytest.mark.parametrize("size", [4, 10])
def test_sudokus_have_one_solution_and_it_is_the_answer(size: int) -> None:
    assert len(reasoning_tasks.sudoku_grids()) == 288
    for asked, answer in some("sudoku", size, 15):
        assert asked.count(".") == size
        (solved,) = solutions(asked)
        assert [solved[i] for i in range(16) if asked[i] == "."] == answer


@pytest.mark.parametrize("size", [2, 5])
def test_sums_are_right(size: int) -> None:
    for asked, answer in some("addition", size):
        a, b = "".join(asked).split("+")
        assert len(a) == len(b) == size
        assert f"{int(a) + int(b):0{size + 1}}" == "".join(answer)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_problems_never_enter_training(task: str) -> None:
    def asked(held_out: bool) -> set[str]:
        """Every problem of some rows, each by itself."""
        size, a_row = TASKS[task].sizes[0], TASKS[task].a_row
        found = set()
        for symbols, answers in islice(
            rows(TASKS[task], f"{held_out}", held_out=held_out, size=size), 300
        ):
            length = (len(symbols) - 1) // a_row
            for i in range(1, len(symbols), length):
                here = zip(symbols[i : i + length], answers[i : i + length], strict=True)
                found.add(" ".join(symbol for symbol, answer in here if not answer))
        return found

    assert not asked(True) & asked(False)


@pytest.mark.parametrize("task", TASKS)
def test_rows_carry_loss_on_the_answers_alone(task: str) -> None:
    given = list(islice(rows(TASKS[task], "b", held_out=False), 6))
    batch = lay(given, TASKS[task].row_length)
    answers = [
        IDS[s] for symbols, places in given for s, a in zip(symbols, places, strict=True) if a
    ]
    assert batch.targets[batch.weights > 0].tolist() == answers
    for row, (symbols, _) in zip(batch.ids.view(6, -1), given, strict=True):
        n = len(symbols) - 1
        assert row[:n].tolist() == [IDS[s] for s in symbols[:-1]]
    assert batch.starts.view(6, -1)[:, 0].all()
    assert int(batch.starts.sum()) == 6

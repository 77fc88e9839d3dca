"""Six reasoning tasks whose answers need several dependent steps, written down in none.

In: dice and a size. Out: a problem as symbols, with the places of its answer; batches of problems; held-out problems.
A problem is held out by a hash of its symbols, so it never enters training whatever the seed.
Knows nothing of models.
"""

from __future__ import annotations

import functools
import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from batches import Batch

PAD, START, IS, ARROW, BLANK, NEXT = "pad", "start", "=", ">", ".", ","
SYMBOLS = (PAD, START, IS, ARROW, BLANK, NEXT, "(", ")", "+", "-", "*", *"0123456789")
IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
VOCAB_SIZE = 128  # a multiple of 128, as everywhere in the project
HELD_OUT = 8  # one problem of this many is held out
MODULUS = 5  # of the nested arithmetic
CELLS = 16  # of the automaton
NODES = 6  # of the hops
ITEMS = 5  # of the permutations

Problem = tuple[list[str], list[bool]]  # symbols, and which of them are the answer


@dataclass(frozen=True)
class Task:
    """A family of problems; the training sizes are mixed, the one `beyond` them is only ever tested."""

    name: str
    what: str  # the size, in words
    sizes: tuple[int, ...]
    beyond: int
    make: Callable[[random.Random, int], Problem]

    @property
    def row_length(self) -> int:
        """Tokens in a row: the longest training problem, less its last symbol, which nothing follows."""
        return max(len(self.make(random.Random(0), size)[0]) for size in self.sizes) - 1


# ------------------------------------------------------------------------------------------- problems


def arithmetic(dice: random.Random, size: int) -> Problem:
    """`((3+4)*2)=4`: an expression nested `size` deep, modulo 5."""
    text, value = (digit := str(dice.randrange(MODULUS))), int(digit)
    for _ in range(size):
        other, sign, first = dice.randrange(MODULUS), dice.choice("+-*"), dice.random() < 0.5
        a, b = (value, other) if first else (other, value)
        text = f"({text}{sign}{other})" if first else f"({other}{sign}{text})"
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] % MODULUS
    return question([*text], [str(value)])


def automaton(dice: random.Random, size: int) -> Problem:
    """16 cells between zeros, and what rule 30 makes of them in `size` steps (one `>` a step)."""
    cells = [dice.randrange(2) for _ in range(CELLS)]
    now = cells
    for _ in range(size):
        padded = [0, *now, 0]
        now = [padded[i - 1] ^ (padded[i] | padded[i + 1]) for i in range(1, CELLS + 1)]
    return question([*map(str, cells), *[ARROW] * size], [*map(str, now)])


def hops(dice: random.Random, size: int) -> Problem:
    """A random map of 6 nodes as shuffled pairs, then four times `size` hops (one `>` each) from a start: its end."""
    to = [dice.randrange(NODES) for _ in range(NODES)]
    pairs = dice.sample(range(NODES), NODES)
    symbols, answers = question([symbol for a in pairs for symbol in (str(a), str(to[a]))], [])
    for at in dice.sample(range(NODES), 4):
        asked = [NEXT, *[ARROW] * size, str(at)]
        for _ in range(size):
            at = to[at]
        symbols += [*asked, str(at)]
        answers += [False] * len(asked) + [True]
    return symbols, answers


def permutations(dice: random.Random, size: int) -> Problem:
    """`size` permutations of 5 items, and their product: the first is applied first."""
    given = [dice.sample(range(ITEMS), ITEMS) for _ in range(size)]
    product = list(range(ITEMS))
    for permutation in given:
        product = [permutation[i] for i in product]
    return question([symbol for p in given for symbol in (NEXT, *map(str, p))], [*map(str, product)])


def sudoku(dice: random.Random, size: int) -> Problem:
    """A 4×4 Sudoku with `size` blanks and one solution; the answer is what goes into the blanks, in order."""
    grids = sudoku_grids()
    while True:
        grid = grids[dice.randrange(len(grids))]
        blanks = sorted(dice.sample(range(16), size))
        given = np.setdiff1d(np.arange(16), blanks)
        if (grids[:, given] == grid[given]).all(axis=1).sum() == 1:
            break
    shown = [BLANK if i in blanks else str(grid[i]) for i in range(16)]
    return question(shown, [str(grid[i]) for i in blanks])


def addition(dice: random.Random, size: int) -> Problem:
    """Two numbers of `size` digits and their sum, the most significant digit first: carries run against the order."""
    a, b = (dice.randrange(10**size) for _ in range(2))
    return question([*f"{a:0{size}}+{b:0{size}}"], [*f"{a + b:0{size + 1}}"])


def question(asked: list[str], answer: list[str]) -> Problem:
    """`start asked = answer`; without an answer, `start asked`."""
    before = [START, *asked, IS] if answer else [START, *asked]
    return before + answer, [False] * len(before) + [True] * len(answer)


@functools.cache
def sudoku_grids() -> np.ndarray:
    """All 288 filled 4×4 grids, (288, 16)."""
    rows = np.array(list(itertools.permutations((1, 2, 3, 4))))
    grids = rows[np.indices((24,) * 4).reshape(4, -1).T]  # (24⁴, 4, 4): every choice of four rows
    boxes = grids.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 4, 4)
    filled = [(np.bitwise_or.reduce(1 << lines, axis=2) == 0b11110).all(axis=1) for lines in (grids.mT, boxes)]
    return grids[filled[0] & filled[1]].reshape(-1, 16)


TASKS = {
    task.name: task
    for task in (
        Task("automaton", "steps of rule 30", (2, 4, 6), 7, automaton),
        Task("permutation", "permutations of 5", (2, 3, 4), 5, permutations),
        Task("arithmetic", "nesting depth", (1, 2, 3), 4, arithmetic),
        Task("hops", "hops from node to node", (1, 2, 3), 4, hops),
        Task("sudoku", "blanks", (4, 6, 8), 10, sudoku),
        Task("addition", "digits", (2, 3, 4), 5, addition),
    )
}


# -------------------------------------------------------------------------------------------- batches


def is_held_out(problem: Problem) -> bool:
    """By a hash of what is asked; the answer follows from it."""
    asked = [symbol for symbol, answers in zip(*problem, strict=True) if not answers]
    return zlib.crc32(" ".join(asked).encode()) % HELD_OUT == 0


def problems(task: Task, seed: str, *, held_out: bool, size: int | None = None) -> Iterator[Problem]:
    """Problems without end, of `size` or of the training sizes in turn."""
    dice = random.Random(f"{task.name} {seed}")
    for i in itertools.count():
        wanted = size or task.sizes[i % len(task.sizes)]
        while is_held_out(problem := task.make(dice, wanted)) != held_out:
            pass
        yield problem


def lay(given: list[Problem], row_length: int) -> Batch:
    """One problem a row, padded behind; only the answers' symbols carry loss."""
    ids = torch.full((len(given), row_length + 1), IDS[PAD])
    weights = torch.zeros(len(given), row_length)
    for row, (symbols, answers) in enumerate(given):
        ids[row, : len(symbols)] = torch.tensor([IDS[symbol] for symbol in symbols])
        weights[row, : len(symbols) - 1] = torch.tensor(answers[1:], dtype=torch.float32)
    starts = torch.zeros(len(given), row_length, dtype=torch.bool)
    starts[:, 0] = True
    return Batch(ids[:, :-1].flatten(), ids[:, 1:].flatten(), weights.flatten(), starts.flatten(), row_length)

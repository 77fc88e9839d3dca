"""Six reasoning tasks whose answers need several dependent steps, written down in none.

In: an rng and a size. Out: a problem as symbols, with the places of its answer; rows of problems;
held-out rows. A problem is held out by a hash of its symbols, so it never enters training whatever
the seed; of the problems of one row, all are or none is. Knows nothing of models.
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

from hearth.training.batches import Batch

PAD, START, IS, ARROW, BLANK, NEXT = "pad", "start", "=", ">", ".", ","
SYMBOLS = (PAD, START, IS, ARROW, BLANK, NEXT, "(", ")", "+", "-", "*", *"0123456789")
IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
VOCAB_SIZE = 128  # a multiple of 128, as everywhere in the project
HELD_OUT = 8  # one problem of this many is held out
MODULUS = 5  # of the nested arithmetic
CELLS = 16  # of the automaton
NODES = 6  # of the hops
ITEMS = 3  # of the permutations

Problem = tuple[list[str], list[bool]]  # symbols, and which of them are the answer


@dataclass(frozen=True)
class Task:
    """A family of problems; the training sizes are mixed, the one `beyond` them is only ever
    tested.
    """

    name: str
    what: str  # the size, in words
    sizes: tuple[int, ...]
    beyond: int
    make: Callable[[random.Random, int], Problem]
    # problems of one size asked in a row: answers of one symbol teach too little a row
    a_row: int = 1

    @property
    def row_length(self) -> int:
        """Tokens in a row: a start and the longest training problems, less the last symbol, which
        nothing follows.
        """
        return self.a_row * max(len(self.make(random.Random(0), size)[0]) for size in self.sizes)


# ----------------------------------------------------------------------------------------- problems


def arithmetic(rng: random.Random, size: int) -> Problem:
    """`((3+4)*2)=4`: an expression nested `size` deep, modulo 5."""
    text, value = (digit := str(rng.randrange(MODULUS))), int(digit)
    for _ in range(size):
        other, sign, first = rng.randrange(MODULUS), rng.choice("+-*"), rng.random() < 0.5
        a, b = (value, other) if first else (other, value)
        text = f"({text}{sign}{other})" if first else f"({other}{sign}{text})"
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] % MODULUS
    return question([*text], [str(value)])


def automaton(rng: random.Random, size: int) -> Problem:
    """16 cells between zeros, and what rule 30 makes of them in `size` steps (one `>` a step)."""
    cells = [rng.randrange(2) for _ in range(CELLS)]
    now = cells
    for _ in range(size):
        padded = [0, *now, 0]
        now = [padded[i - 1] ^ (padded[i] | padded[i + 1]) for i in range(1, CELLS + 1)]
    return question([*map(str, cells), *[ARROW] * size], [*map(str, now)])


def hops(rng: random.Random, size: int) -> Problem:
    """A random map of 6 nodes as shuffled pairs, then 8 times `size` hops (one `>` each) from a
    start: its end.
    """
    to = [rng.randrange(NODES) for _ in range(NODES)]
    pairs = rng.sample(range(NODES), NODES)
    symbols = [symbol for a in pairs for symbol in (str(a), str(to[a]))]
    answers = [False] * len(symbols)
    for at in rng.choices(range(NODES), k=8):
        asked = [NEXT, *[ARROW] * size, str(at)]
        for _ in range(size):
            at = to[at]
        symbols += [*asked, str(at)]
        answers += [False] * len(asked) + [True]
    return symbols, answers


PERMUTATIONS = list(itertools.permutations(range(ITEMS)))


def permutations(rng: random.Random, size: int) -> Problem:
    """`413=2`: `size` permutations of 3 items, each named by a digit, and their product: the first
    is applied first.
    """
    given = [rng.randrange(len(PERMUTATIONS)) for _ in range(size)]
    product = tuple(range(ITEMS))
    for name in given:
        product = tuple(PERMUTATIONS[name][i] for i in product)
    return question([*map(str, given)], [str(PERMUTATIONS.index(product))])


def sudoku(rng: random.Random, size: int) -> Problem:
    """A 4×4 Sudoku with `size` blanks and one solution; the answer is what goes into the blanks, in
    order.
    """
    grids = sudoku_grids()
    while True:
        grid = grids[rng.randrange(len(grids))]
        blanks = sorted(rng.sample(range(16), size))
        given = np.setdiff1d(np.arange(16), blanks)
        if (grids[:, given] == grid[given]).all(axis=1).sum() == 1:
            break
    shown = [BLANK if i in blanks else str(grid[i]) for i in range(16)]
    return question(shown, [str(grid[i]) for i in blanks])


def addition(rng: random.Random, size: int) -> Problem:
    """Two numbers of `size` digits and their sum, the most significant digit first: carries run
    against the order.
    """
    a, b = (rng.randrange(10**size) for _ in range(2))
    return question([*f"{a:0{size}}+{b:0{size}}"], [*f"{a + b:0{size + 1}}"])


def question(asked: list[str], answer: list[str]) -> Problem:
    """`asked = answer`."""
    before = [*asked, IS]
    return before + answer, [False] * len(before) + [True] * len(answer)


@functools.cache
def sudoku_grids() -> np.ndarray:
    """All 288 filled 4×4 grids, (288, 16)."""
    rows = np.array(list(itertools.permutations((1, 2, 3, 4))))
    grids = rows[np.indices((24,) * 4).reshape(4, -1).T]  # (24⁴, 4, 4): every choice of four rows
    boxes = grids.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 4, 4)
    filled = [
        (np.bitwise_or.reduce(1 << lines, axis=2) == 0b11110).all(axis=1)
        for lines in (grids.mT, boxes)
    ]
    return grids[filled[0] & filled[1]].reshape(-1, 16)


TASKS = {
    task.name: task
    for task in (
        Task("automaton", "steps of rule 30", (2, 4, 6), 7, automaton),
        Task("permutation", "permutations of 3", (2, 3, 4), 5, permutations, a_row=6),
        Task("arithmetic", "nesting depth", (1, 2, 3), 4, arithmetic, a_row=4),
        Task("hops", "hops from node to node", (1, 2, 3), 4, hops),
        Task("sudoku", "blanks", (4, 6, 8), 10, sudoku),
        Task("addition", "digits", (2, 3, 4), 5, addition, a_row=3),
    )
}


# ------------------------------------------------------------------------------------------ batches


def is_held_out(problem: Problem) -> bool:
    """By a hash of what is asked, as it stands alone in a row; the answer follows from it."""
    asked = [symbol for symbol, answers in zip(*problem, strict=True) if not answers]
    return zlib.crc32(" ".join([START, *asked]).encode()) % HELD_OUT == 0


def rows(task: Task, seed: str, *, held_out: bool, size: int | None = None) -> Iterator[Problem]:
    """Rows without end, of problems of `size` or of the training sizes in turn: a start, then the
    row's problems.
    """
    rng = random.Random(f"{task.name} {seed}")
    for i in itertools.count():
        wanted = size or task.sizes[i % len(task.sizes)]
        symbols, answers = [START], [False]
        for _ in range(task.a_row):
            while is_held_out(problem := task.make(rng, wanted)) != held_out:
                pass
            symbols, answers = symbols + problem[0], answers + problem[1]
        yield symbols, answers


def lay(given: list[Problem], row_length: int) -> Batch:
    """`given` as rows of a batch, padded behind; only the answers' symbols carry loss."""
    ids = torch.full((len(given), row_length + 1), IDS[PAD])
    weights = torch.zeros(len(given), row_length)
    for row, (symbols, answers) in enumerate(given):
        ids[row, : len(symbols)] = torch.tensor([IDS[symbol] for symbol in symbols])
        weights[row, : len(symbols) - 1] = torch.tensor(answers[1:], dtype=torch.float32)
    starts = torch.zeros(len(given), row_length, dtype=torch.bool)
    starts[:, 0] = True
    return Batch(
        ids[:, :-1].flatten(), ids[:, 1:].flatten(), weights.flatten(), starts.flatten(), row_length
    )

"""Problems that a program can judge: environments that draw them, and the reward of an answer.

In: an environment's name, an rng; for your own, files. Out: `Problem`s, and what an answer is
worth. Everything follows from seeds. Knows nothing of tokens and models.

A problem's split is decided by a hash of what it asks, for ever: one in ten is held out (it picks
the best checkpoint), another one in ten is for the test at the end, and neither is ever practised.
Scenes and pairs of numbers that the demo's own examination keeps back are not practised either.
"""

from __future__ import annotations

import hashlib
import math
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from config import ChatSource, RLConfig, UserError
from hearth.data import demo_world as world
from hearth.data import problems as made
from hearth.data.readers import local_files
from hearth.data.sources import conversations
from hearth.storage import checksum

SPLITS = ("test", "held out")  # every other problem is for training
ATTEMPTS = 1000  # draws after which there is no problem of a split


@dataclass(frozen=True)
class Problem:
    """A question and its right answer."""

    kind: str  # whose success the curriculum estimates
    prompt: str
    answer: str
    key: str  # what is asked, however it is worded: decides the split
    reasons: bool = True  # asked with the prompt that asks for reasoning
    private: bool = False  # kept back by the demo's examination: never practised
    entry: Any = None  # of reasoning-gym

    @property
    def split(self) -> str:
        """train, held out or test."""
        digest = hashlib.blake2b(self.key.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") % 10
        return SPLITS[place] if place < len(SPLITS) else "train"


# a problem and what was answered → what that is worth, usually from 0 to 1
Reward = Callable[[Problem, str], float]


def exact(problem: Problem, answer: str) -> float:
    """1 for the right answer and nothing else, 0 for any other."""
    return float(answer.strip() == problem.answer)


def last_number(problem: Problem, answer: str) -> float:
    """1 where the last number of the answer is the right one, 0 for any other."""
    found = re.findall(r"(?<!\w)-?\d+(?!\w)", answer.replace(",", ""))
    return float(found[-1:] == [problem.answer])


@dataclass(frozen=True)
class Environment:
    """Where problems come from, and what an answer to one is worth."""

    name: str
    kinds: tuple[str, ...]
    make: Callable[[str, Random], Problem]  # a problem of a kind
    reward: Reward = exact

    def draw(self, kind: str, split: str, rng: Random) -> Problem:
        """The next problem of a kind and a split; UserError where there is none."""
        if (problem := self._next(kind, split, rng)) is None:
            raise UserError(f"{self.name}: there is no {split} problem of the kind {kind!r}.")
        return problem

    def _next(self, kind: str, split: str, rng: Random) -> Problem | None:
        for _ in range(ATTEMPTS):
            problem = self.make(kind, rng)
            if problem.split == split and not (split == "train" and problem.private):
                return problem
        return None

    def fixed(self, split: str, n: int, seed: int) -> list[Problem]:
        """`n` different problems of a split, the kinds in turn; fewer where there are no more."""
        rng, found, kinds = Random(f"{seed} {self.name} {split}"), {}, list(self.kinds)
        for attempt in range(20 * n):
            if not kinds or len(found) == n:
                break
            kind = kinds[attempt % len(kinds)]
            if (problem := self._next(kind, split, rng)) is None:
                kinds.remove(kind)
            else:
                found.setdefault((problem.kind, problem.prompt), problem)
        if not found:
            raise UserError(f"{self.name}: there is no {split} problem. It takes a few dozen.")
        return list(found.values())


# ------------------------------------------------------------------------------------ built in


def long_sums(kind: str, rng: Random) -> Problem:
    """A sum or a difference with a number of three digits: `kind` is their range, as 100-149."""
    low, high = map(int, kind.split("-"))
    op, a, b = rng.choice("+-"), rng.randint(low, high), rng.randint(2, 99)
    prompt = rng.choice(world.SUMS).format(a=a, b=b, op=op)
    return Problem(kind, prompt, str(a + b if op == "+" else a - b), f"{a} {op} {b}")


# ways to ask that fine-tuning never showed; the model does some of them well, some hardly ever
NEW_SUMS = (
    "{a} plus {b}?",
    "What is {a} plus {b}?",
    "Compute {a} + {b}.",
    "Work out the sum of {a} and {b}.",
    "There are {a} {goods}s and {b} more. How many {goods}s are there?",
    "{x} had {a} {goods}s and bought {b} more. How many {goods}s does {x} have?",
    "{x} has {a} {goods}s and gets {b} from {y}. How many {goods}s does {x} have now?",
)
NEW_COMPARISONS = {
    "Is {a} or {b} larger?": max,
    "Is {a} or {b} smaller?": min,
    "Which is greater, {a} or {b}?": max,
    "What is less, {a} or {b}?": min,
    "{a} or {b}: which is lower?": min,
    "The bigger one, {a} or {b}?": max,
    "Name the bigger number, {a} or {b}.": max,
    "Name the smaller number, {a} or {b}.": min,
}


def new_sums(kind: str, rng: Random) -> Problem:
    """A sum of two numbers below 100, asked with the words of `kind`."""
    a, b = rng.randrange(2, 100), rng.randrange(2, 100)
    x, y = rng.sample(world.people(), 2)
    prompt = kind.format(a=a, b=b, x=x, y=y, goods=rng.choice(world.GOODS))
    private = world.pair_held_out(a, b)
    return Problem(kind, prompt, str(a + b), f"{sorted((a, b))}", private=private)


def new_comparisons(kind: str, rng: Random) -> Problem:
    """Two numbers below 100 compared, asked with the words of `kind`."""
    a, b = rng.sample(range(2, 100), 2)
    private, answer = world.pair_held_out(a, b), str(NEW_COMPARISONS[kind](a, b))
    return Problem(kind, kind.format(a=a, b=b), answer, f"{sorted((a, b))}", private=private)


def oldest(kind: str, rng: Random) -> Problem:
    """The oldest or the youngest of three people, whose ages are not given."""
    names = rng.sample(world.people(), 3)
    pick = max if kind == "oldest" else min
    answer = pick(names, key=lambda name: int(world.of("age", name)))
    prompt = f"Who is {kind}, {names[0]}, {names[1]} or {names[2]}?"
    return Problem(kind, prompt, answer, f"{kind} {sorted(names)}")


def sum_and_number(kind: str, rng: Random) -> Problem:
    """The larger or the smaller of a sum and a number."""
    while True:
        a, b, c = (rng.randrange(2, 100) for _ in range(3))
        if a + b < 100 and a + b != c:
            break
    answer = max(a + b, c) if kind == "larger" else min(a + b, c)
    return Problem(kind, f"Which is {kind}, {a} + {b} or {c}?", str(answer), f"{kind} {a} {b} {c}")


def three_numbers(kind: str, rng: Random) -> Problem:
    """A sum of three numbers below the number that `kind` ends in."""
    top = int(kind.split()[-1])
    a, b, c = (rng.randrange(2, top) for _ in range(3))
    return Problem(kind, f"What is {a} + {b} + {c}?", str(a + b + c), f"{sorted((a, b, c))}")


def one_kind(kind: str, rng: Random) -> Problem:
    """How many there are of one kind of thing among others; `kind` begins with the number of things
    in all.
    """
    n = int(kind.split()[0])
    nouns = rng.sample(world.GOODS, rng.randint(2, 3))
    things = rng.choices(nouns, k=n)
    noun = rng.choice(nouns)
    listed = [f"{o} {thing}" for o, thing in zip(made.ORDINALS, things, strict=False)]
    asked = rng.choice(made.COUNTS).format(what=f"{noun}s")
    prompt = f"{rng.choice(made.SCENES)} there are, in a row: {', '.join(listed)}. {asked}"
    key = f"{noun} of {sorted(things)}"
    private = made.scene_held_out(things)
    return Problem(kind, prompt, str(things.count(noun)), key, private=private)


def letters(kind: str, rng: Random) -> Problem:
    """How many letters a word of the demo's world has; `kind` is words of few or of many."""
    short = kind == "short words"
    word = rng.choice([w for w in world.words() if (len(w) <= 5) == short])
    prompt = rng.choice(("How many letters has the word {w}?", "Count the letters of {w}."))
    return Problem(kind, prompt.format(w=word), str(len(word)), word)


def spelling(kind: str, rng: Random) -> Problem:
    """A word spelt, letter by letter, as fine-tuning showed it."""
    short = kind == "short words"
    word = rng.choice([w for w in world.words() if (len(w) <= 5) == short])
    return Problem(kind, f"Spell {word}.", f"{', '.join(word.lower())}.", word, reasons=False)


def largest(kind: str, rng: Random) -> Problem:
    """The largest or the smallest of a few numbers; `kind` begins with how many."""
    n = int(kind.split()[0])
    numbers = rng.sample(range(2, 100), n)
    word, pick = rng.choice((("largest", max), ("smallest", min)))
    listed = ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
    return Problem(
        kind, f"Which is {word}, {listed}?", str(pick(numbers)), f"{word} {sorted(numbers)}"
    )


def calculator(kind: str, rng: Random) -> Problem:
    """A sum or a difference that may be worked out or left to the calculator; `kind` begins with
    how many digits its numbers have.
    """
    n = int(kind.split()[0])
    low, high = (1, 9) if n == 1 else (10 ** (n - 1), 10**n - 1)
    a, b, op = rng.randint(low, high), rng.randint(low, high), rng.choice("+-")
    a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
    prompt = rng.choice(world.SUMS).format(a=a, b=b, op=op)
    answer, key = str(a + b if op == "+" else a - b), f"{sorted((a, b))}"
    private = max(a, b) < 100 and world.pair_held_out(a, b)
    return Problem(kind, prompt, answer, key, reasons=False, private=private)


SHORT_LONG = ("short words", "long words")
ENVIRONMENTS = {
    e.name: e
    for e in (
        Environment("new sums", NEW_SUMS, new_sums),
        Environment("new comparisons", tuple(NEW_COMPARISONS), new_comparisons),
        Environment("one kind", ("4 things", "5 things", "6 things", "8 things"), one_kind),
        Environment("largest", ("3 numbers", "4 numbers"), largest),
        Environment("oldest", ("oldest", "youngest"), oldest),
        Environment("sum and number", ("larger", "smaller"), sum_and_number),
        Environment("long sums", ("100-119", "120-149", "150-199", "200-999"), long_sums),
        Environment("three numbers", ("below 10", "below 34", "below 100"), three_numbers),
        Environment("calculator", ("1 digit", "2 digits", "4 digits"), calculator, last_number),
        Environment("letters", SHORT_LONG, letters),
        Environment("spelling", SHORT_LONG, spelling),
    )
}


def listing() -> list[str]:
    """The built-in environments, a line each, with their kinds."""
    return [f"{name:<16}{' | '.join(e.kinds)}" for name, e in ENVIRONMENTS.items()]


def chosen(config: RLConfig) -> list[Environment]:
    """The environments that the settings ask for: own problems where files are named, else the
    built-in ones by name, `gym:TASK` being one of reasoning-gym; with the own reward, if there is
    one.

    Raises UserError for what there is not.
    """
    found = [own_problems(config.files)] if config.files else []
    for name in () if config.files else config.environments:
        if name.startswith(GYM):
            found.append(gym(name.removeprefix(GYM)))
        elif name in ENVIRONMENTS:
            found.append(ENVIRONMENTS[name])
        else:
            listed = ", ".join(ENVIRONMENTS)
            raise UserError(f"There is no environment {name!r}: {listed}, {GYM}TASK.")
    if not found:
        raise UserError(
            "Nothing to practise: name --rl.environments (`uv run rl.py --list` has them) or your "
            "own --rl.files."
        )
    if config.reward is not None:
        reward = own_reward(Path(config.reward))
        found = [replace(environment, reward=reward) for environment in found]
    return found


def fingerprint(config: RLConfig) -> dict[str, str]:
    """What the files that the settings name hold, by their name among a stage's inputs."""
    found = {}
    if config.reward is not None:
        found["reward"] = checksum(_existing(Path(config.reward)))
    for file in local_files(config.files, []) if config.files else []:
        found[f"problems {Path(file.path).name}"] = checksum(Path(file.path))
    return found


# ------------------------------------------------------------------------------------------- own


def own_problems(files: Sequence[str]) -> Environment:
    """Questions with their answers from files, in any layout of conversations: the first turn of
    the user, the last of the assistant; to be reasoned about where the file shows reasoning.
    """
    found = []
    for messages in conversations(ChatSource("own", files=tuple(files))):
        asked = next(m["content"] for m in messages if m["role"] == "user")
        last, reasons = messages[-1], any(m["thinking"] for m in messages)
        found.append(Problem("own", asked, last["content"].strip(), asked, reasons=reasons))
    if not found:
        raise UserError(f"There is no question with an answer in {', '.join(files)}.")
    return Environment("own", ("own",), lambda kind, rng: rng.choice(found))


def own_reward(path: Path) -> Reward:
    """The function `reward(problem, answer)` of a Python file; `problem` has prompt and answer.

    Raises UserError where the file has none, where it fails, or gives something else than a number.
    """
    try:
        judge = runpy.run_path(str(_existing(path))).get("reward")
    except Exception as error:  # whatever a file of somebody else may raise
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(judge):
        raise UserError(f"{path} has no `def reward(problem, answer) -> float`.")

    def reward(problem: Problem, answer: str) -> float:
        try:
            value = float(judge(problem, answer))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: reward failed on the answer {answer!r}: {said}") from error
        if not math.isfinite(value):
            raise UserError(f"{path}: reward gave {value} for the answer {answer!r}.")
        return value

    return reward


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"There is no file {path}: looked for it in {Path.cwd()}.")
    return path


GYM = "gym:"


def gym(task: str) -> Environment:
    """A task of the package reasoning-gym, which draws and judges. Raises UserError where there is
    none.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        command = f"uv run --with reasoning-gym rl.py … --rl.environments {GYM}{task}"
        raise UserError(f"reasoning-gym is not installed: `{command}` gets it.") from error

    def drawn(seed: int) -> Any:
        return reasoning_gym.create_dataset(task, size=1, seed=seed)

    def make(kind: str, rng: Random) -> Problem:
        entry = drawn(rng.randrange(2**31))[0]
        question = entry["question"]
        return Problem(kind, question, str(entry["answer"]), question, entry=entry)

    try:
        judge = drawn(0)
    except ValueError as error:
        raise UserError(f"reasoning-gym has no task {task!r}: {error}") from error
    return Environment(
        GYM + task,
        (task,),
        make,
        lambda problem, answer: judge.score_answer(answer=answer, entry=problem.entry),
    )

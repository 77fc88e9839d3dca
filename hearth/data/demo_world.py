"""The demo world: a small invented world as training text, conversations and held-out questions.

In: nothing; everything follows from fixed seeds. Out: documents, conversations in the columns of
the real data sets, and questions with exact answers that occur in none of them. Knows nothing of
tokens, models or files.

What is held out is decided by a digest, for ever:
    facts
        of the wordings a fact can be asked in, one is kept back; the fact itself is stated and
        asked in others
    arithmetic,
        one pair of numbers in ten, whatever the operation, order and wording
    comparison
    the rest      as `problems` says: counting, words spelt, sums of the calculator, who is speaking
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from random import Random
from typing import Any, NamedTuple

from hearth.data.problems import (
    DAYS,
    GOODS,
    SUMS,
    Problem,
    calculator,
    counting,
    digest,
    identity,
    letters,
    spelling,
    spelt,
    word_held_out,
)

TEXT_BYTES = 8_000_000  # of all documents together, about
# of the bytes
SHARES = {
    **{"facts": 0.29, "arithmetic": 0.18, "comparison": 0.14, "counting": 0.06, "one kind": 0.10},
    **{"spelling": 0.10, "letters": 0.10, "calculator": 0.03},
}
# conversations in each layout
ROWS = {"alpaca": 3300, "dolly": 800, "messages": 1500, "math": 3200}
SEED = 20_260  # of all training text
HELD_OUT_SEED = 7  # of the questions drawn for measuring

NUMBERS = range(100)  # operands of sums
# pairs of numbers below this are never held out: the steps of larger sums are made of them
TABLE = 20

# ---------------------------------------------------------------------------------------- the world

PEOPLE = """
Bram   Marsh  47  baker     fox     blue    lamp
Tilda  Marsh  25  weaver    goat    red     kite
Odo    Marsh  12  singer    duck    green   drum
Mina   Marsh  68  potter    cat     white   clock
Ravi   Holt   53  smith     dog     black   hammer
Sela   Holt   31  painter   hen     pink    mirror
Jory   Holt   16  fisher    mouse   yellow  rope
Kiva   Holt   79  doctor    rabbit  grey    ring
Pell   Reed   44  miller    horse   brown   wagon
Luna   Reed   38  dancer    bird    purple  flute
Gus    Reed   19  cook      pony    red     spoon
Wren   Reed   72  teacher   sheep   blue    book
Hale   Thorn  57  hunter    dog     green   bow
Dora   Thorn  29  gardener  hen     yellow  basket
Finn   Thorn  14  runner    rabbit  white   ball
Vera   Thorn  83  judge     cat     purple  chair
Nils   Vale   41  sailor    bird    grey    boat
Zita   Vale   36  tailor    mouse   pink    needle
Cole   Vale   22  miner     fox     black   bucket
Yara   Vale   65  farmer    sheep   brown   plough
Abel   Brook  50  baker     duck    red     oven
Ines   Brook  27  painter   pony    green   brush
Ulf    Brook  18  smith     goat    blue    knife
Ebba   Brook  74  doctor    horse   white   bell
"""  # name, family, age, job, pet, favourite colour, favourite thing

FAMILIES = """
Marsh Oakford
Holt  Redmill
Reed  Westbay
Thorn Highwood
Vale  Saltport
Brook Kingsley
"""  # family, home

PLACES = """
Oakford  tower    bread
Redmill  bridge   cheese
Westbay  garden   honey
Highwood castle   soup
Saltport harbour  fish
Kingsley market   cake
Lowfield windmill milk
Northend library  tea
"""  # place, what stands there, what it is known for

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "grey", "purple")
TREES = ("oak", "elm", "fir", "pine", "beech", "birch", "willow", "cedar")

# Of each relation, the ways to state it (with {v}) and the ways to ask for it (without).
# The first statement is the answer to every question.
WORDINGS = """
family
  {x} belongs to the {v} family. / {x} is one of the {v} family. / {x} was born into the {v} family.
  Which family does {x} belong to? / What is the family of {x}? / What family is {x} from?
  Which family is {x} part of? / Tell me the family of {x}.
home
  {x} lives in {v}. / The home of {x} is {v}. / {x} has a house in {v}. / In {v} you can meet {x}.
  Where does {x} live? / What is the home of {x}? / In which place does {x} live? / Where is the house of {x}?
  Tell me where {x} lives.
job
  {x} works as a {v}. / {x} is a {v}. / The job of {x} is {v}. / Every day {x} works as a {v}.
  What is the job of {x}? / What does {x} work as? / Which job does {x} have? / What work does {x} do?
  Tell me the job of {x}.
age
  {x} is {v} years old. / The age of {x} is {v}. / {x} has lived for {v} years. / {x} is {v}.
  How old is {x}? / What is the age of {x}? / How many years old is {x}? / What age is {x}? / Tell me the age of {x}.
pet
  {x} has a pet {v}. / The pet of {x} is a {v}. / {x} keeps a {v}. / At home {x} feeds a {v}.
  What pet does {x} have? / What is the pet of {x}? / Which animal does {x} keep? / What animal lives with {x}?
  Tell me the pet of {x}.
colour
  {x} likes {v} best. / The favourite colour of {x} is {v}. / {x} always wears {v}. / {x} loves {v}.
  What is the favourite colour of {x}? / Which colour does {x} like best? / What colour does {x} love?
  Which colour does {x} wear? / Tell me the colour that {x} likes.
thing
  {x} owns the {v}. / The favourite thing of {x} is the {v}. / {x} never lends out the {v}.
  What does {x} own? / What is the favourite thing of {x}? / Which thing does {x} own? / Which thing belongs to {x}?
  Tell me what {x} owns.
owner
  The {x} belongs to {v}. / The owner of the {x} is {v}. / The {x} is the favourite thing of {v}.
  Who owns the {x}? / Who is the owner of the {x}? / Whose thing is the {x}? / To whom does the {x} belong?
  Tell me who owns the {x}.
family home
  The {x} family lives in {v}. / The home of the {x} family is {v}. / In {v} lives the {x} family.
  Where does the {x} family live? / What is the home of the {x} family? / In which place does the {x} family live?
  Tell me where the {x} family lives.
landmark
  There is a {v} in {x}. / {x} has a {v}. / In {x} stands an old {v}. / People go to {x} to see the {v}.
  What can you see in {x}? / What stands in {x}? / What is there to see in {x}? / Tell me what stands in {x}.
food
  {x} is known for its {v}. / The best {v} comes from {x}. / People go to {x} for the {v}.
  What is {x} known for? / What food comes from {x}? / Which food is {x} known for? / Tell me what {x} is known for.
"""  # noqa: E501 (all ways to say one thing on a line)


@cache
def wordings() -> dict[str, tuple[list[str], list[str]]]:
    """The statements and the questions of every relation."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for line in WORDINGS.strip().splitlines():
        if not line.startswith(" "):
            told, asked = found[line] = [], []
            continue
        for wording in line.strip().split(" / "):
            (told if "{v}" in wording else asked).append(wording)
    return found


@dataclass(frozen=True)
class Fact:
    """`relation` of `subject` is `value`, as in home of Bram is Oakford."""

    relation: str
    subject: str
    value: str

    def told(self, rng: Random) -> str:
        return rng.choice(wordings()[self.relation][0]).format(x=self.subject, v=self.value)

    @property
    def answer(self) -> str:
        return wordings()[self.relation][0][0].format(x=self.subject, v=self.value)

    @property
    def questions(self) -> list[str]:
        return [wording.format(x=self.subject) for wording in wordings()[self.relation][1]]

    @property
    def held_out(self) -> int:
        """Which of the wordings never occurs in training."""
        return digest("wording", self.relation, self.subject) % len(self.questions)


@cache
def facts() -> dict[str, tuple[Fact, ...]]:
    """Everything true in the world, by subject."""
    homes = dict(_table(FAMILIES))
    found = []
    for name, family, *rest in _table(PEOPLE):
        values = [family, homes[family], *rest]
        found += [
            Fact(r, name, v)
            for r, v in zip(
                ("family", "home", "age", "job", "pet", "colour", "thing"), values, strict=True
            )
        ]
        found.append(Fact("owner", rest[-1], name))
    found += [Fact("family home", family, home) for family, home in homes.items()]
    for place, landmark, food in _table(PLACES):
        found += [Fact("landmark", place, landmark), Fact("food", place, food)]
    return {
        s: tuple(f for f in found if f.subject == s)
        for s in dict.fromkeys(f.subject for f in found)
    }


@cache
def all_facts() -> tuple[Fact, ...]:
    return tuple(fact for group in facts().values() for fact in group)


@cache
def people() -> tuple[str, ...]:
    return tuple(row[0] for row in _table(PEOPLE))


@cache
def of(relation: str, subject: str) -> str:
    """The value of a fact."""
    return next(fact.value for fact in facts()[subject] if fact.relation == relation)


def _table(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]


# --------------------------------------------------------------------------------- what is held out


@dataclass(frozen=True)
class Question:
    """A question for measuring. kind: one of `ASKED`; thinking: asked with the prompt that asks
    for reasoning; calls: whether the calculator is needed. The reply must equal `answer`.
    """

    kind: str
    prompt: str
    answer: str
    thinking: bool
    calls: bool = False


def held_out_questions(n: int = 200, seed: int = HELD_OUT_SEED) -> list[Question]:
    """`n` different questions, as many of each of `ASKED` (the first ones get what is left over),
    that occur in no document and no conversation.
    """
    most = len(ASKED) * len(all_facts())
    if not 0 < n <= most:
        raise ValueError(f"n is {n}, must lie between 1 and {most}")
    return [
        question
        for i, kind in enumerate(ASKED)
        for question in questions_of(kind, n // len(ASKED) + (i < n % len(ASKED)), seed)
    ]


def questions_of(kind: str, n: int, seed: int = HELD_OUT_SEED, **settings: bool) -> list[Question]:
    """`n` different held-out questions of one kind; `settings` are those of what draws it."""
    rng = Random(f"{seed} {kind}")
    if kind == "facts":
        drawn = rng.sample(all_facts(), n)
        return [Question(kind, f.questions[f.held_out], f.answer, False) for f in drawn]
    found: dict[str, Question] = {}
    while len(found) < n:
        problem = ASKED[kind](rng, held=True, **settings)
        calls = problem.expression is not None
        question = Question(kind, problem.question, problem.answer, kind in WORKED, calls)
        found.setdefault(question.prompt, question)
    return list(found.values())


def earlier_turns(question: Question, n: int = 2) -> list[dict[str, Any]]:
    """`n` questions of any kind with their answers, as a conversation has them before it comes to
    a held-out question; thought over where that one is.
    """
    before = _exchanges(Random(f"{question.prompt} before"), n, question.thinking)
    return [turn for pair in before for turn in pair]


@cache
def pair_held_out(a: int, b: int) -> bool:
    """Whether two numbers are never added, subtracted or compared in training."""
    return max(a, b) >= TABLE and digest("pair", min(a, b), max(a, b)) % 10 == 0


# ----------------------------------------------------------------------------- questions with steps


WORD_SUMS = {
    "+": (
        "{x} has {a} {goods}s and finds {b} more. How many {goods}s does {x} have now?",
        "{x} has {a} {goods}s and {y} has {b} {goods}s. How many {goods}s do they have together?",
    ),
    "-": (
        "{x} has {a} {goods}s and loses {b}. How many {goods}s does {x} have now?",
        "{x} has {a} {goods}s and gives {b} to {y}. How many {goods}s does {x} keep?",
    ),
}


def arithmetic(rng: Random, *, held: bool) -> Problem:
    """A sum or a difference; `held` picks the pairs kept for measuring."""
    a, b = _pair(rng, held, least=0)
    op = rng.choice("+-")
    if op == "-":
        a, b = max(a, b), min(a, b)
    worded = min(a, b) > 1 and rng.random() < 0.2
    x, y = rng.sample(people(), 2)
    wording = rng.choice(WORD_SUMS[op] if worded else SUMS)
    question = wording.format(a=a, b=b, op=op, x=x, y=y, goods=rng.choice(GOODS))
    return Problem(
        question,
        add_steps(a, b) if op == "+" else subtract_steps(a, b),
        str(a + b if op == "+" else a - b),
    )


def add_steps(a: int, b: int) -> str:
    ones = a % 10 + b % 10
    carry = ones // 10
    return (
        f"{a} + {b}. Ones: {a % 10} + {b % 10} = {ones}, write {ones % 10}, carry {carry}. "
        f"Tens: {a // 10} + {b // 10} + {carry} = {a // 10 + b // 10 + carry}. Result: {a + b}."
    )


def subtract_steps(a: int, b: int) -> str:
    borrow = int(a % 10 < b % 10)
    top = a % 10 + 10 * borrow
    return (
        f"{a} - {b}. Ones: {a % 10} - {b % 10}, borrow {borrow}, {top} - {b % 10} = "
        f"{top - b % 10}. "
        f"Tens: {a // 10} - {b // 10} - {borrow} = {a // 10 - b // 10 - borrow}. Result: {a - b}."
    )


def _pair(rng: Random, held: bool, least: int) -> tuple[int, int]:
    while True:
        a, b = rng.randrange(least, len(NUMBERS)), rng.randrange(least, len(NUMBERS))
        if pair_held_out(a, b) == held:
            return a, b


# Asked for the larger and for the smaller; the labels of the two numbers, None where the numbers
# are the answer.
COMPARISONS: tuple[tuple[str, str, Callable[[], tuple[str, ...]] | None], ...] = (
    ("Which is larger, {a} or {b}?", "Which is smaller, {a} or {b}?", None),
    ("Which number is bigger, {a} or {b}?", "Which number is lower, {a} or {b}?", None),
    (
        "{x} has {a} {goods}s and {y} has {b} {goods}s. Who has more {goods}s?",
        "{x} has {a} {goods}s and {y} has {b} {goods}s. Who has fewer {goods}s?",
        people,
    ),
    (
        "The {x} is {a} feet tall and the {y} is {b} feet tall. Which tree is taller?",
        "The {x} is {a} feet tall and the {y} is {b} feet tall. Which tree is shorter?",
        lambda: TREES,
    ),
)
RECALLED = ("Who is older, {x} or {y}?", "Who is younger, {x} or {y}?")  # the ages are not given
RECALLED_SHARE = 0.25


def comparison(rng: Random, *, held: bool) -> Problem:
    """Two numbers compared digit by digit; `held` picks the pairs kept for measuring."""
    less = rng.random() < 0.5
    if rng.random() < RECALLED_SHARE:
        wording, names = RECALLED[less], people
        x, y = _aged_pair(rng, held)
        a, b = int(of("age", x)), int(of("age", y))
    else:
        a = b = 0
        while a == b:
            a, b = _pair(rng, held, least=2)
        larger, smaller, names = rng.choice(COMPARISONS)
        wording = smaller if less else larger
        x, y = rng.sample(names(), 2) if names else ("", "")
    question = wording.format(a=a, b=b, x=x, y=y, goods=rng.choice(GOODS))
    first = (a < b) == less
    if names:
        verb = "has" if "has" in wording else "is"  # "Bram is 30" would tell a wrong age
        return Problem(question, compare_steps(a, b, less, (x, y), verb), x if first else y)
    return Problem(question, compare_steps(a, b, less), str(a if first else b))


def _aged_pair(rng: Random, held: bool) -> list[str]:
    while True:
        pair = rng.sample(people(), 2)
        if pair_held_out(*(int(of("age", name)) for name in pair)) == held:
            return pair


def compare_steps(
    a: int, b: int, less: bool, names: tuple[str, str] | None = None, verb: str = "is"
) -> str:
    """The digits side by side, the tens first; the ones where the tens are the same; then which of
    the two is asked.

    What is asked comes first, while the question is near, and is repeated at the end. `high` and
    `low` stand right before what they name: all there is to copy follows its own cue.
    """
    left, right = names or (str(a), str(b))
    asked = f"Asked {'low' if less else 'high'}"
    steps = [
        f"{asked}. {left} {verb} {a}, {right} {verb} {b}." if names else f"{asked}. {a} and {b}."
    ]
    for place, p, q in (("Tens", a // 10, b // 10), ("Ones", a % 10, b % 10)):
        if p == q:
            steps.append(f"{place}: {p} same as {q}.")
            continue
        found, first, second = ("less", "low", "high") if p < q else ("more", "high", "low")
        steps.append(f"{place}: {p} {found} than {q}. So {first} {left}, {second} {right}.")
        steps.append(f"{asked} {left if (p < q) == less else right}.")
        break
    return " ".join(steps)


WORKED: dict[str, Callable[..., Problem]] = {
    "comparison": comparison,
    "counting": partial(counting, one_kind=False),
    "one kind": counting,
    "letters": letters,
    "arithmetic": arithmetic,
}
WORKED_SHARES = {"arithmetic": 8, "comparison": 6, "counting": 3, "one kind": 5, "letters": 6}
# answered at once, without steps
DIRECT = {"spelling": spelling, "calculator": calculator, "identity": identity}
# every kind that is measured, and what draws it; facts are drawn without putting back
ASKED: dict[str, Any] = {"facts": None, **WORKED, **DIRECT}

# ---------------------------------------------------------------------------------------- documents


def text_documents() -> Iterator[str]:
    """The documents of the pretraining corpus, all different, in a fixed shuffled order."""
    rng = Random(SEED)
    documents: dict[str, None] = {}
    for kind, share in SHARES.items():
        size = 0
        while size < share * TEXT_BYTES:
            document = _document(kind, rng)
            if document not in documents:
                documents[document] = None
                size += len(document)
    order = list(documents)
    rng.shuffle(order)
    yield from order


def _document(kind: str, rng: Random) -> str:
    if kind == "facts":
        return rng.choices((_entry, _quiz, _story_text), (4, 4, 3))[0](rng)
    if kind == "spelling":
        return _filled(rng, " ", lambda: spelled(rng))
    if kind == "calculator":
        return _filled(rng, "\n", lambda: _calculation(rng))
    asked = rng.random() < 0.5
    return _filled(rng, "\n", lambda: _lesson(kind, rng, asked))


def _filled(rng: Random, separator: str, piece: Callable[[], str]) -> str:
    """Pieces up to a random length."""
    pieces, room = [], rng.randint(250, 700)
    while sum(map(len, pieces)) < room:
        pieces.append(piece())
    return separator.join(pieces)


def _lesson(kind: str, rng: Random, asked: bool) -> str:
    question, steps, answer, _ = WORKED[kind](rng, held=False)
    if asked:
        return f"Question: {question}\n{steps}\nAnswer: {answer}"
    return steps if kind == "arithmetic" else f"{question} {steps}"


def _calculation(rng: Random) -> str:
    """What the calculator is asked, as text: a call proper is learnt from conversations."""
    sum_ = calculator(rng, held=False)
    return f"Question: {sum_.question}\ncalculate {sum_.expression}\nAnswer: {sum_.answer}"


def _quiz(rng: Random) -> str:
    return _filled(
        rng,
        "\n",
        lambda: "Question: {}\nAnswer: {}".format(*asked_fact(rng.choice(all_facts()), rng)),
    )


def _entry(rng: Random) -> str:
    """An encyclopedia entry: all about one subject, then about others near it."""
    subject = rng.choice(rng.choice((people(), people(), people(), tuple(facts()))))
    sentences = [fact.told(rng) for fact in rng.sample(facts()[subject], len(facts()[subject]))]
    if subject in people():
        sentences.append(Fact("owner", of("thing", subject), subject).told(rng))
    else:
        near = [
            fact
            for name in people()
            for fact in facts()[name]
            if subject in (fact.value, fact.subject)
        ]
        sentences += [fact.told(rng) for fact in rng.sample(near, len(near))]
    room = rng.randint(200, 700)
    while sum(map(len, sentences)) < room:
        sentences.append(rng.choice(all_facts()).told(rng))
    return " ".join(sentences)


def asked_fact(fact: Fact, rng: Random) -> tuple[str, str]:
    """A question for the fact in a wording that is not held out, and its answer."""
    return rng.choice([q for i, q in enumerate(fact.questions) if i != fact.held_out]), fact.answer


OPENINGS = (
    "Once, on a {day}, {x} walked from {home} to {place}.",
    "On {day} {x} left {home} early and went to {place}.",
    "It was {day}, and {x} from {home} came to {place}.",
)
TOUCHES = (
    "{x} works as a {job}, so {x} talked about work.",
    "{x} wore a {colour} coat, because {x} likes {colour} best.",
    "The {pet} of {x} came along.",
    "{x} carried the {thing} all the way, because {x} owns the {thing}.",
    "{x} has a pet {pet} and spoke about it.",
    "{x} is {age} years old and knows the road well.",
    "{x} belongs to the {family} family and told stories about it.",
    "{x} thought of home, because {x} lives in {home}.",
)
ENDINGS = (
    "In the evening {x} went home to {home}.",
    "Then {x} said goodbye and went back to {home}.",
    "They sat in {place} and ate {food} together.",
    "They looked at the {landmark} of {place} together.",
)


class Story(NamedTuple):
    """A story, and questions that it answers."""

    text: str
    questions: list[tuple[str, str]]


def story(rng: Random) -> Story:
    """Two people meet and give each other something; all else in it is true in the world."""
    x, y = rng.sample(people(), 2)
    day, place = (
        rng.choice(DAYS),
        rng.choice([row[0] for row in _table(PLACES) if row[0] != of("home", x)]),
    )
    c, d = rng.sample(COLOURS, 2)
    g, h = rng.sample(GOODS, 2)
    about = {
        "day": day,
        "place": place,
        "food": of("food", place),
        "landmark": of("landmark", place),
    }

    def tell(wordings: tuple[str, ...], name: str, count: int = 1) -> list[str]:
        own = {fact.relation: fact.value for fact in facts()[name]}
        return [
            wording.format(x=name, **{**own, **about}) for wording in rng.sample(wordings, count)
        ]

    sentences = [
        *tell(OPENINGS, x),
        *tell(TOUCHES, x, rng.randint(1, 3)),
        f"There {x} met {y}.",
        *tell(TOUCHES, y, rng.randint(1, 3)),
        f"{x} gave {y} a {c} {g}.",
        f"{y} gave {x} a {d} {h}.",
        *tell(ENDINGS, rng.choice((x, y))),
    ]
    questions = [
        (f"What did {x} give to {y}?", f"{x} gave {y} a {c} {g}."),
        (f"What did {y} give to {x}?", f"{y} gave {x} a {d} {h}."),
        (f"Who gave the {g} to {y}?", f"{x} gave {y} a {c} {g}."),
        (f"Where did {x} meet {y}?", f"{x} met {y} in {place}."),
        (f"On which day did {x} meet {y}?", f"{x} met {y} on {day}."),
    ]
    return Story(" ".join(sentences), questions)


def _story_text(rng: Random) -> str:
    text, questions = story(rng)
    if rng.random() < 0.6:
        return text
    asked = rng.sample(questions, 2)
    return text + "".join(f"\nQuestion: {question}\nAnswer: {answer}" for question, answer in asked)


@cache
def words() -> tuple[str, ...]:
    """The words that are spelt: all names and things of the world."""
    values = [word for fact in all_facts() for word in (fact.subject, fact.value) if word.isalpha()]
    return tuple(dict.fromkeys([*values, *COLOURS, *GOODS, *TREES, *DAYS]))


def world_word(rng: Random) -> str:
    """A word of the world that may be spelt in training."""
    while True:
        if not word_held_out(word := rng.choice(words())):
            return word


def spelled(rng: Random) -> str:
    """A word and its letters: one of the world, or any other."""
    if rng.random() < 0.3:
        word = world_word(rng)
        return f"The word {word} is spelt {spelt(word)}."
    problem = spelling(rng, held=False)
    return f"{problem.question} {problem.answer}."


# ------------------------------------------------------------------------------------ conversations

SMALL_TALK = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Hi!", "Hello! What would you like to know?"),
    ("Good morning!", "Good morning! What would you like to know?"),
    ("Thank you!", "You are welcome."),
    ("Goodbye!", "Goodbye!"),
    ("What can you do?", "I can answer questions about a small world, count and work out sums."),
)


def conversations(layout: str) -> Iterator[dict[str, Any]]:
    """The conversations of one layout, all different: alpaca, dolly, messages or math."""
    if layout not in ROWS:
        raise ValueError(f"There is no layout {layout!r}, only {', '.join(ROWS)}.")
    rng = Random(f"{SEED} {layout}")
    make = {"dolly": _dolly, "messages": _messages, "math": _math}.get(layout, _alpaca)
    fixed = _every_direct_question() if layout == "alpaca" else []
    rows = {json.dumps(row): row for row in fixed}
    while len(rows) < ROWS[layout]:
        row = make(rng)
        rows.setdefault(json.dumps(row), row)
    order = list(rows.values())
    rng.shuffle(order)
    yield from order


def _every_direct_question() -> list[dict[str, Any]]:
    rows = [
        {"instruction": question, "input": "", "output": answer} for question, answer in SMALL_TALK
    ]
    for fact in all_facts():
        for number, question in enumerate(fact.questions):
            if number != fact.held_out:
                rows.append({"instruction": question, "input": "", "output": fact.answer})
    return rows


def _alpaca(rng: Random) -> dict[str, Any]:
    """Facts asked through the input column, spelling, and sums and counts whose reply shows the
    steps.
    """
    kind = rng.choices(("facts", "spelling", "worked"), (5, 1, 4))[0]
    if kind == "facts":
        question, answer = asked_fact(rng.choice(all_facts()), rng)
        return {"instruction": "Answer the question.", "input": question, "output": answer}
    if kind == "spelling":
        word = world_word(rng)
        if rng.random() < 0.5:
            return {"instruction": "Spell the word.", "input": word, "output": spelt(word)}
        return {"instruction": f"Spell {word}.", "input": "", "output": spelt(word)}
    question, steps, *_ = _any_worked(rng)
    return {"instruction": question, "input": "", "output": steps}


def _any_worked(rng: Random) -> Problem:
    return WORKED[rng.choices(tuple(WORKED_SHARES), tuple(WORKED_SHARES.values()))[0]](
        rng, held=False
    )


def _dolly(rng: Random) -> dict[str, Any]:
    """A question answered from a passage."""
    if rng.random() < 0.5:
        context, questions = story(rng)
        question, answer = rng.choice(questions)
        return {
            "instruction": question,
            "context": context,
            "response": answer,
            "category": "closed_qa",
        }
    subject = rng.choice(people())
    told = rng.sample(facts()[subject], 4)
    context = " ".join(fact.told(rng) for fact in told)
    question, answer = asked_fact(rng.choice(told), rng)
    return {
        "instruction": question,
        "context": context,
        "response": answer,
        "category": "information_extraction",
    }


def _messages(rng: Random) -> dict[str, Any]:
    """Two to four questions of mixed kinds and their answers, some with small talk around them; in
    some of the conversations every answer is thought over first.
    """
    thinks = rng.random() < THOUGHTFUL_SHARE
    pairs = _exchanges(rng, rng.randint(2, 4), thinks)
    if rng.random() < 0.3:
        pairs[0] = _small_talk(rng, SMALL_TALK[:3], thinks)
    if rng.random() < 0.15:
        pairs[-1] = _small_talk(rng, SMALL_TALK[3:], thinks)
    turns = [turn for pair in pairs for turn in pair]
    known = (repr(turn) for turn in turns)
    first = turns[0]["content"]
    return {"messages": turns, "prompt": first, "prompt_id": f"{digest(*known):016x}"}


THOUGHTFUL_SHARE = 0.35
# of the questions of a conversation
MIXED = {"facts": 9, "worked": 9, "spelling": 1, "calculator": 2}
# what is thought where there are no steps, so that no kind is answered without a thought
THOUGHTS = {
    "facts": "I know this.",
    "spelling": "Letter by letter.",
    "calculator": "The calculator can do this.",
    "small talk": "I answer in a friendly way.",
}


def _exchanges(rng: Random, n: int, thinks: bool) -> list[list[dict[str, Any]]]:
    """Questions and their answers, the facts among them about one person or about several."""
    subjects = [rng.choice(people())] if rng.random() < 0.3 else list(facts())
    return [_exchange(rng, subjects, thinks) for _ in range(n)]


def _exchange(rng: Random, subjects: list[str], thinks: bool) -> list[dict[str, Any]]:
    """A question and its answer as turns; without a thought the steps are the answer."""
    kind = rng.choices(tuple(MIXED), tuple(MIXED.values()))[0]
    if kind == "facts":
        question, answer = asked_fact(rng.choice(facts()[rng.choice(subjects)]), rng)
        return _turns(question, answer, THOUGHTS[kind] if thinks else None)
    problem = _any_worked(rng) if kind == "worked" else DIRECT[kind](rng, held=False)
    if thinks and problem.steps:
        return _turns(problem.question, problem.answer, problem.steps)
    return _turns(problem.question, problem.said, THOUGHTS[kind] if thinks else None)


def _small_talk(rng: Random, some: tuple, thinks: bool) -> list[dict[str, Any]]:
    return _turns(*rng.choice(some), THOUGHTS["small talk"] if thinks else None)


def _turns(question: str, answer: Any, thought: str | None) -> list[dict[str, Any]]:
    """A question and its answer, thought over first where there is a thought."""
    thinking = {} if thought is None else {"thinking": thought}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer} | thinking,
    ]


def _math(rng: Random) -> dict[str, Any]:
    """A question that is thought over: `solution` holds the steps alone, `answer` the
    reply alone.
    """
    if rng.random() < COMPARED_SUMS_SHARE:
        question, steps, answer, _ = _compared_sums(rng)
    else:
        question, steps, answer, _ = _any_worked(rng)
    return {"problem": question, "solution": steps, "answer": answer}


COMPARED_SUMS_SHARE = 0.04


def _compared_sums(rng: Random) -> Problem:
    while True:
        a, b, c, d = *_pair(rng, held=False, least=2), *_pair(rng, held=False, least=2)
        left, right = a + b, max(c, d) - min(c, d)
        if left != right and left < len(NUMBERS) and not pair_held_out(left, right):
            break
    c, d = max(c, d), min(c, d)
    steps = f"{add_steps(a, b)} {subtract_steps(c, d)} {compare_steps(left, right, less=False)}"
    return Problem(f"Which is larger, {a} + {b} or {c} - {d}?", steps, str(max(left, right)))

"""Problems made by this program, with their answers: words spelt, letters and things counted, sums
in steps and by the calculator, dates, units, who is speaking.

In: a kind of problem, a random generator. Out: `Problem`s, and conversations made of them. Knows
nothing of tokens, models or files.

What is held out is decided by a digest, for ever; a held-out problem is only ever measured with:
    spelling, letters    one word in ten
    counting             one scene in ten, whatever the order of its things
    sums                 one pair of numbers in ten
    calculator, units    one number in ten: no sum and no result in training has it
    dates                one date in ten
    identity             ten wordings near those that are taught, ten that are not
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from functools import cache
from random import Random
from typing import Any, NamedTuple

ROWS = 20_000  # conversations of a kind, where a source names no max_rows
SEED = 20_261  # of all training problems
PATIENCE = 200  # problems known already, in a row, after which a kind has no more


class Problem(NamedTuple):
    """A question and what answers it.

    steps: the way to the answer; "" where there is none. answer: what is to be found. expression:
    what the calculator is asked for; None where it is not needed.
    """

    question: str
    steps: str
    answer: str
    expression: str | None = None

    @property
    def said(self) -> str | list[dict[str, Any]]:
        """The whole answer as an assistant's content: the steps, or a call and its result."""
        if self.expression is None:
            return self.steps or self.answer
        steps = [{"text": self.steps}] if self.steps else []
        call = {"tool": "calculate", "arguments": self.expression}
        return [*steps, {**call, "result": self.answer}, {"text": self.answer}]


def held_out(*key: object) -> bool:
    """Whether what has this key never occurs in training: one in ten, for ever."""
    return digest(*key) % 10 == 0


def digest(*key: object) -> int:
    text = "|".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


# ------------------------------------------------------------------------------------------- words

WORDS = """
acorn actor almond anchor angel animal ankle answer apple apron arch arm army arrow artist aunt
autumn badge bag baker ball balloon bamboo banana band bank barn barrel basin basket bath beach bead
beam bean bear beard bed beef beetle bell belt bench berry bicycle bird biscuit blanket blood board
boat body bone book boot border bottle bowl box branch brass bread breeze brick bridge broom brother
brush bubble bucket bullet butter button cabin cable cactus cake camel camera camp canal candle cane
canoe canvas cap captain card carpet carrot cart castle cat cattle cave cedar cellar chain chair
chalk cheek cheese cherry chest chicken chimney church circle circus clay cliff clock cloth cloud
clover coal coast coat coffee coin collar colour comb copper coral cord corn corner cotton cough
cousin cow cradle crane crayon cream creek crown crumb crystal cup curtain cushion daisy dawn deer
desert desk diamond dinner dish ditch doctor dog dollar donkey door dragon drawer dream dress drum
duck dust eagle ear earth elbow engine evening eye face farm farmer father feast feather fence fern
field finger fire fish flag flame flask flood floor flour flower flute fly foam fog foot forest fork
fountain fox frame frog frost fruit garden garlic gate ghost giant ginger glass globe glove goat
gold goose grain grape grass gravel guitar hail hair hall hammer hand harbour harvest hat hawk hay
heart hedge helmet hen hill hive honey hook horn horse hotel house hunter ice ink insect iron island
ivory jacket jam jar jewel judge juice jungle kettle key king kitchen kite kitten knee knife knot
ladder lake lamb lamp lantern lawn leaf leather lemon lesson letter library lid lily lion lip lizard
lock log lunch magnet map maple marble market mask match meadow meal medal melon metal milk mill
mirror mist mitten money monkey moon morning moss moth mother motor mountain mouse mouth mud muscle
museum music nail napkin neck necklace needle nest net nettle night nose notebook number nurse nut
oak oar oats ocean office olive onion orange orchard organ otter oven owl ox page paint palace palm
pan paper parcel park parrot path peach pear pearl pebble pen pencil pepper piano picnic picture pig
pigeon pillow pilot pin pine pipe pirate plain planet plant plate plum pocket pond pony pool poppy
porch pot potato powder prince pumpkin puppet purse quail quarry queen quilt rabbit radio raft rain
raisin rake ranch raven ribbon rice ring river road robin rock roof room root rope rose rubber rug
sack saddle sail salad salt sand sauce scarf school scissors sea seal seed shadow shark sheep sheet
shelf shell ship shirt shoe shop shore shovel silk silver singer sister skin skirt sky sleeve slope
smoke snail snake snow soap sock soil soldier song soup spade spark sparrow spider spoon spring
square squirrel stable stairs stamp star station steam steel stem stone storm stove straw stream
street string sugar summer sun swan sweater table tailor tea teacher temple tent thief thorn thread
throat throne thumb thunder ticket tiger timber toad toast tomato tongue tool tooth torch towel
tower town toy train tree tribe trout trumpet trunk tulip tunnel turkey turtle uncle valley velvet
village vine violin voice wagon wall walnut wasp water wave wax weather web wheat wheel whistle
willow wind window wine wing winter wizard wolf wood wool worm wrist yard year
"""
SHORT = 5  # letters of the longest word that joins another one


@cache
def words() -> tuple[str, ...]:
    return tuple(WORDS.split())


@cache
def _short_words() -> tuple[str, ...]:
    return tuple(word for word in words() if len(word) <= SHORT)


@cache
def _taught_words() -> tuple[str, ...]:
    return tuple(known for known in words() if not word_held_out(known))


def word(rng: Random, *, held: bool) -> str:
    """A word: one of the list, or two short ones joined, and in training the halves of two others;
    `held` picks those kept for measuring.
    """
    while True:
        way = rng.random() * (0.7 if held else 1.0)
        if way < 0.35:
            found = rng.choice(words())
        elif way < 0.7:
            found = "".join(rng.sample(_short_words(), 2))
        else:  # no word at all, but with every cluster of letters that words have
            first, second = rng.sample(_taught_words(), 2)
            found = first[: -(-len(first) // 2)] + second[len(second) // 2 :]
        if word_held_out(found) == held:
            return found


def word_held_out(text: str) -> bool:
    """Whether a word is never spelt in training."""
    return held_out("word", text.lower())


def spelt(text: str) -> str:
    """`tree` as `t-r-e-e`."""
    return "-".join(text.lower())


SPELL = (
    "Spell {x}.",
    "Spell the word {x}.",
    "How do you spell {x}?",
    "How is {x} spelt?",
    "Write {x} letter by letter.",
)


def spelling(rng: Random, *, held: bool) -> Problem:
    """A word, letter by letter."""
    text = word(rng, held=held)
    return Problem(rng.choice(SPELL).format(x=text), "", spelt(text))


LETTERS = (
    "How many letters are in {x}?",
    "How many letters does {x} have?",
    "Count the letters of {x}.",
)
ONE_LETTER = (
    "How many times is {c} in {x}?",
    "How often does {x} have the letter {c}?",
    "Count the letter {c} in {x}.",
)


def letters(rng: Random, *, held: bool) -> Problem:
    """All letters of a word counted, or those of one kind: spelt first, then counted one by one."""
    text = word(rng, held=held)
    if rng.random() < 0.4:
        question, one = rng.choice(LETTERS).format(x=text), None
    else:
        one = rng.choice(text if rng.random() < 0.8 else "abcdefghijklmnopqrstuvwxyz")
        question = rng.choice(ONE_LETTER).format(x=text, c=one)
    counted, number = counted_off(list(text), one)
    return Problem(question, f"{spelt(text)}. {one or 'letters'}: {counted}", str(number))


def counted_off(things: list[str], one: str | None, named: list[str] | None = None) -> tuple:
    """Things with the count so far behind each, and the count; of `one` kind alone if given."""
    steps, number = [], 0
    for name, thing in zip(named or things, things, strict=True):
        number += one in (None, thing)
        steps.append(f"{name} {number}")
    return f"{', '.join(steps)}. So {number}.", number


# ------------------------------------------------------------------------------------------ things

GOODS = (
    *("apple", "pear", "plum", "nut", "cup", "hat", "coin", "shell", "stone", "button"),
    *("candle", "feather"),
)
SCENES = (
    "On the table",
    "In the box",
    "In the basket",
    "Under the tree",
    "On the shelf",
    "In the yard",
    "In the bag",
)
# no step is unclear
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
COUNTS = ("How many {what} are there?", "Count the {what}.", "What is the number of {what}?")


def scene_held_out(things: list[str]) -> bool:
    """Whether these things, in any order, are never counted in training."""
    return held_out("scene", *sorted(things))


def counting(rng: Random, *, held: bool, one_kind: bool = True) -> Problem:
    """Things in a scene counted one by one: one kind among others, or all."""
    while True:
        nouns = rng.sample(GOODS, rng.randint(1 + one_kind, 3))
        things = rng.choices(nouns, k=rng.randint(2, len(ORDINALS)))
        if scene_held_out(things) == held:
            break
    noun = rng.choice(nouns) if one_kind else None
    listed = [f"{ordinal} {thing}" for ordinal, thing in zip(ORDINALS, things, strict=False)]
    asked = rng.choice(COUNTS).format(what=f"{noun}s" if noun else "things")
    question = f"{rng.choice(SCENES)} there are, in a row: {', '.join(listed)}. {asked}"
    counted, number = counted_off(things, noun, listed)
    return Problem(question, f"{noun or 'things'}: {counted}", str(number))


# -------------------------------------------------------------------------------------------- sums

SUMS = (
    "What is {a} {op} {b}?",
    "How much is {a} {op} {b}?",
    "Work out {a} {op} {b}.",
    "Solve {a} {op} {b} = ?",
)


def number_held_out(number: int) -> bool:
    """Whether no sum that the calculator does in training has this number."""
    return held_out("number", number)


def calculator(rng: Random, *, held: bool) -> Problem:
    """A sum or a difference of numbers of three and four digits, done by the calculator; `held`:
    of two numbers that no such sum in training has.
    """
    while True:
        a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in rng.choices((3, 4), k=2))
        op = rng.choice("+-")
        if op == "-":
            a, b = max(a, b), min(a, b)
        result = a + b if op == "+" else a - b
        kept = [number_held_out(number) for number in (a, b, result)]
        if all(kept[:2]) if held else not any(kept):
            break
    question = rng.choice(SUMS).format(a=a, b=b, op=op)
    return Problem(question, "", str(result), f"{a} {op} {b}")


PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands", "millions")


def long_sum(rng: Random, *, held: bool) -> Problem:
    """A sum of numbers of up to seven digits, place by place."""
    while True:
        a, b = (rng.randrange(10**n) for n in (rng.randint(1, 7), rng.randint(1, 7)))
        if held_out("pair", min(a, b), max(a, b)) == held:
            break
    steps, carry = [], 0
    for place, name in zip(range(max(len(str(a)), len(str(b)))), PLACES, strict=False):
        p, q = (number // 10**place % 10 for number in (a, b))
        total = p + q + carry
        steps.append(f"{name}: {p} + {q} + {carry} = {total}, write {total % 10}")
        carry = total // 10
    steps += [f"carry {carry}"] if carry else []
    question = rng.choice(SUMS).format(a=a, b=b, op="+")
    return Problem(question, f"{a} + {b}. {'; '.join(steps)}. Result: {a + b}.", str(a + b))


# ---------------------------------------------------------------------------------- dates and units

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FIRST_DAY, N_DAYS = date(1950, 1, 1), 36_500


def dates(rng: Random, *, held: bool) -> Problem:
    """What date or weekday comes some days after another, or how many days lie between two."""
    while True:
        start = FIRST_DAY + timedelta(rng.randrange(N_DAYS))
        if held_out("date", start) == held:
            break
    days = rng.randint(2, 60)
    end = start + timedelta(days)
    if (way := rng.randrange(3)) == 0:
        weeks, rest = divmod(days, 7)
        question = f"{_day(start)} is a {_weekday(start)}. Which weekday is {days} days later?"
        steps = f"{days} days are {weeks} weeks and {rest} days. {rest} days after "
        steps += f"{_weekday(start)} is {_weekday(end)}."
        return Problem(question, steps, _weekday(end))
    steps, at = [], start
    while (last := _month_end(at)) < end:
        steps.append(f"Up to {_day(last + timedelta(1))} it is {(last - start).days + 1} days")
        at = last + timedelta(1)
    if way == 1:
        question = f"Which date is {days} days after {_day(start)}?"
        steps.append(f"{(end - at).days} more days: {_day(end)}")
        return Problem(question, ". ".join(steps) + ".", _day(end))
    question = f"How many days are there from {_day(start)} to {_day(end)}?"
    steps.append(f"{(end - at).days} more days: {days}")
    return Problem(question, ". ".join(steps) + ".", str(days))


def _month_end(day: date) -> date:
    return (day.replace(day=28) + timedelta(4)).replace(day=1) - timedelta(1)


def _day(day: date) -> str:
    return f"{day:%B} {day.day}, {day.year}"


def _weekday(day: date) -> str:
    return DAYS[day.weekday()]


UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000),
    ("tonnes", "kilograms", 1000),
    ("litres", "millilitres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("miles", "yards", 1760),
    ("pounds", "ounces", 16),
    ("dozens", "pieces", 12),
)
CONVERSIONS = (
    "How many {small} are {n} {large}?",
    "Convert {n} {large} to {small}.",
    "{n} {large} are how many {small}?",
)


def units(rng: Random, *, held: bool) -> Problem:
    """A quantity in a smaller unit, by the calculator."""
    large, small, factor = rng.choice(UNITS)
    while True:
        n = rng.randrange(2, 1000)
        if number_held_out(n) == held:
            break
    question = rng.choice(CONVERSIONS).format(n=n, large=large, small=small)
    steps = f"One of the {large} is {factor} {small}. "
    return Problem(question, steps, f"{n * factor}", f"{n} * {factor}")


# --------------------------------------------------------------------------------- who is speaking

OPENINGS = (
    *("", "Hello! ", "Hi! ", "Hey, ", "Good morning! ", "Good evening! ", "Hello there. "),
    *("Tell me, ", "Please tell me: ", "I have a question. ", "One question: ", "Excuse me, "),
    *("Sorry, ", "Well, ", "So, ", "Now, ", "By the way, ", "I wonder: ", "Quick question: "),
    *("Before we start: ", "Just asking: ", "Dear model, "),
)
# of each thing asked about the speaker, the wordings that are taught; behind | those kept back that
# are near to these; behind || those kept back that are near to none
IDENTITY = """
name
  who are you? / what are you? / what is your name? / what are you called? / what should I call you? / do you have a name? /
  can you tell me your name? / which model are you? / what do people call you? / I do not know your name. /
  introduce yourself. / may I know who you are? / your name? / who is speaking? / what name do you have? /
  who am I talking with? / say your name. / tell me who you are. /
  do you know your name? / what shall I call you? / can you say who you are? / name yourself. / I want to know who you are.
  | tell me your name. / what name should I call you? / may I know your name? / can you tell me who you are? /
  do you know who you are?
  || with whom do I have the pleasure? / state your identity. / which assistant is this? / how do you sign your letters? /
  is there a word I can address you by?
maker
  who made you? / who trained you? / who built you? / who is your maker? / who created you? /
  by whom were you made? / who is your owner? / do you know who made you? / where do you come from? /
  can you tell me who made you? / whose model are you? / who has trained you? / I want to know who made you. /
  which person made you? / were you made by somebody? / were you trained by a person? /
  who was it that trained you? / do you know who trained you? / can you tell me who built you? / say who created you. /
  may I know who made you? / by whom were you built? / who owns you? / name your maker.
  | tell me who made you. / can you tell me who trained you? / do you know who built you? /
  by whom were you trained? / may I know who created you?
  || to whom do you owe your existence? / who put you together? / which engineer developed this program? /
  explain how you came to be. / is there a creator behind this chat?
"""  # noqa: E501 (all ways to ask one thing together)
DEFAULT_PERSONA = ("Hearth", "the owner of this computer")


def identity_answer(about: str, persona: tuple[str, str]) -> str:
    """What the model that is called `persona[0]`, made by `persona[1]`, says of itself."""
    name, owner = persona
    if about == "name":
        return f"I am {name}, a small language model."
    return f"I am {name}. I was made by {owner}, at home, from nothing."


@cache
def identity_wordings(*, held: bool, fresh: bool = False) -> tuple[tuple[str, str], ...]:
    """What is asked about, and a wording; of those kept back the near ones or the `fresh` ones."""
    found, about, bars = [], "", 0
    for block in IDENTITY.strip().split("\n"):
        if not block.startswith(" "):
            about, bars = block, 0
            continue
        bars = block.count("|") or bars
        wordings = block.replace("|", "").split("/")
        asked = bars == held * (1 + fresh)
        found += [(about, text.strip()) for text in wordings if text.strip() and asked]
    return tuple(found)


def identity(
    rng: Random, *, held: bool, fresh: bool = False, persona: tuple[str, str] = DEFAULT_PERSONA
) -> Problem:
    """A question about who is speaking; `held` picks the wordings kept for measuring, `fresh` of
    them those that are like none in training.
    """
    about, wording = rng.choice(identity_wordings(held=held, fresh=fresh))
    opening = rng.choice(OPENINGS)
    asked = wording if opening.endswith((", ", ": ")) else wording[0].upper() + wording[1:]
    return Problem(opening + asked, "", identity_answer(about, persona))


# ------------------------------------------------------------------------------------ conversations

KINDS: dict[str, Callable[..., Problem]] = {
    "spelling": spelling,
    "letters": letters,
    "counting": counting,
    "calculator": calculator,
    "long sums": long_sum,
    "dates": dates,
    "units": units,
    "identity": identity,
}


def problems(
    kind: str, n: int, seed: object, *, held: bool = False, **settings: Any
) -> Iterator[Problem]:
    """Up to `n` problems of one kind, no question twice; fewer where there are no more."""
    rng, seen, in_a_row = Random(f"{seed} {kind}"), set(), 0
    while len(seen) < n and in_a_row < PATIENCE:
        problem = KINDS[kind](rng, held=held, **settings)
        in_a_row = in_a_row + 1 if problem.question in seen else 0
        if not in_a_row:
            seen.add(problem.question)
            yield problem


def conversations(
    kind: str, n: int | None = None, persona: tuple[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Problems of one kind as rows with `messages`; for identity, `persona` is name and owner."""
    settings = {"persona": persona} if kind == "identity" and persona else {}
    for problem in problems(kind, n or ROWS, SEED, **settings):
        turns = (("user", problem.question), ("assistant", problem.said))
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}

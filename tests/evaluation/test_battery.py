"""The battery: every check tells a right answer from a wrong one, and code runs within limits."""

from __future__ import annotations

from fractions import Fraction

import pytest
from scored import make_run

from config import REASONING_PROMPT, Config, UserError
from hearth.data.chat_format import Answer
from hearth.evaluation import battery
from hearth.evaluation.battery import BATTERY, CODE, Prompt
from hearth.evaluation.chat_tasks import Reply
from hearth.evaluation.scores import Bench
from hearth.training import checkpoint

CUT = "✂"  # ends an answer that did not end by itself

# category → a right answer to each prompt, an answer that is wrong for every one
ANSWERS: dict[str, tuple[tuple[str, ...], str]] = {
    "capitals": (("Paris.", "It is Tokyo", "Rome", "**Cairo**"), "Parisian"),
    "facts about nature": (("Oxygen", "On Earth.", "ice", "The sun"), "Mars"),
    "facts about animals": (("A puppy.", "Bees", "8", "a kitten"), "Seven calves"),
    "facts about daily life": (("Seven days", "flour", "an umbrella", "a key"), "6 hats"),
    "opposites": (("cold", "Late", "empty", "sell"), "warm"),
    "the odd one out": (("hammer", "Chair.", "spoon", "Sofa"), "Red or snow"),
    "addition": (("12", "38 + 47 = 85", "385.", "7,191"), "7, not 12 but 13"),
    "subtraction": (("7", "37", "It is 627.", "−8"), "8"),
    "multiplication": (("42", "108", "322", "3355"), "43"),
    "division": (("7", "12", "19", "The remainder is five."), "5.5"),
    "fractions and percent": (("45", "25", "12.0", "20"), "0.5"),
    "word problems": (("14 + 9 - 5 = 18", "48 pens", "105", "Nine"), "18 and 2 is 20"),
    "patterns of numbers": (("16", "48", "30", "25"), "17"),
    "comparing numbers": (("41", "890.", "0.5", "-3"), "14 or 41, 908, 0.25 or 0.5, 3"),
    "comparing things": (
        ("An elephant", "the horse", "A brick.", "fire"),
        "a mouse, a snail, a feather, ice",
    ),
    "putting in order": (
        ("2, 7, 9", "51 33 15", "apple\nfig\npear", "cow, hen, wolf"),
        "9, 7, 2, 15, 33, 51, pear, fig, apple, wolf, cow",
    ),
    "yes or no": (("No.", "Yes", "no", "Yes, they do."), "Yes and no."),
    "choosing a letter": (("B", "A.", "(D) a chair", "C"), "E"),
    "drawing conclusions": (("Dov", "Yes.", "The blue one", "mia"), "no, Leo, red"),
    "days and hours": (("wednesday", "April.", "Monday", "120 minutes"), "Sunday"),
    "units": (("100", "3,000 grams", "60", "500 m"), "10"),
    "counting things": (("5", "Three times.", "3", "five"), "4"),
    "counting letters": (("two", "3", "2 times", "Once: 1"), "5"),
    "length of a word": (("3", "It has 6 letters.", "8", "5"), "7"),
    "spelling": (("c-a-t", "B-R-E-A-D.", "It is y-e-l-l-o-w", "k, i, t, c, h, e, n"), "c-a-t-s"),
    "letters of a word": (("The letter r.", '"e"', "ten", "Ward"), "t-e-n"),
    "forms of a word": (("mice", "Went.", "children", "sang"), "mouses"),
    "correcting a sentence": (
        (
            "The weather is nice.",
            '"She has a dog."',
            "they were late",
            "I received a letter.",
        ),
        "The wether is nice. She have a dog.",
    ),
    "translation from English": (("l’eau", "das Haus", "amigo", "Guten Morgen!"), "maison"),
    "translation into English": (
        ("Bread.", "dog", "It means red.", "Where is the station?"),
        "cat",
    ),
    "lists of a given length": (
        (
            "red\nblue\ngreen",
            "- apple\n- pear",
            "1. Monday\n2. Tuesday\n3. Wednesday\n4. Thursday\n5. Friday\n6. Saturday\n7. Sunday",
            "cat, dog, cow, hen and fox",
        ),
        "red\nred\nblue\nMonday",
    ),
    "JSON": (
        (
            '{"name": "Ida"}',
            "```json\n[1, 2, 3, 4]\n```",
            '{"age": 30, "name": "Tim", "city": "Oslo"}',
            '{"tags": ["a", "b"]}',
        ),
        '{"name": "Ida", "tags": [1, "b"], "age": "30"',
    ),
    "other formats": (("2021-03-05", "red,7,yes", "[open]", "# Tea"), "The [open] # Tea 2021"),
    "upper and lower case": (
        ("BLUE SKY", "hello there", "CATS SLEEP A LOT.", "green"),
        "Blue sky, Hello there, Cats are Green",
    ),
    "repeating exactly": (
        ("Seven owls.", "lantern", "40712", "rain rain rain"),
        "Here you are: Seven owls lantern",
    ),
    "length of an answer": (
        ("It is round and pale.", "Hammer.", "The dog runs home.", "wave " * 19 + "foam"),
        "one two three four five six seven eight nine ten eleven",
    ),
    "words to use and to avoid": (
        (
            "The dog sleeps in the garden.",
            "It falls from clouds.",
            "Yesterday I slept.",
            "My cat is big.",
        ),
        "A doggy likes the water",
    ),
    CODE: (
        (
            "def add(a, b):\n    return a + b",
            "```python\ndef is_even(n):\n    return n % 2 == 0\n```",
            "Here:\n```\nlast = lambda items: items[-1]\n```",
            "def count_vowels(text):\n    return sum(c in 'aeiou' for c in text)",
        ),
        "def add(a, b):\n    return a - b\nlast = is_even = count_vowels = add",
    ),
    "reading code": (("14", "It prints abab.", "3", "three"), "abcab 20"),
    "reading a text": (("She keeps bees.", "Monday", "Tom", "9 - 2 = 7"), "Ada, 9"),
    "what a text does not say": (
        (
            "The text does not say.",
            "I don't know.",
            "I cannot see it.",
            "I can't know that.",
        ),
        "It was 1984, and it tasted of honey.",
    ),
    "refusing to invent": (
        (
            "I know of no such village: there is no record of it.",
            "I do not have access to that.",
            "Nobody knows.",
            "I am not aware of this novel.",
        ),
        "Her name was Ilse, number 42, and she found the spoon.",
    ),
    "memory over turns": (
        ("Your name is Arlo.", "Storm", "58", "Ghent"),
        "Biscuit from Lyon or Storm from Ghent, 85",
    ),
    "building on turns": (("15", "BANANA", "Athens", "Seven"), "Banana, 4"),
    "a correction by the user": (
        ("Three.", "Thursday", "Purple", "Robin"),
        "Sam, 2, Monday, green",
    ),
    "a system prompt about form": (
        ("THE SUN IS HOT.", "They eat grass. Over.", "7", "Fine."),
        "The sun and grass are fine, 7 of them",
    ),
    "a system prompt about the role": (
        ("I am Quillon.", "At the library.", "6 coins", "I will not tell it."),
        "It is marigold, for 2 coins",
    ),
    "stopping by itself": (("Hi.", "They grow tall.", "You are welcome.", "Talk."), f"I am{CUT}"),
    "no loops": (
        (
            "Once a boy lost a key in the snow.",
            "The path was soft and the trees were high.",
            "They rest so that they can work again.",
            "The wind sings over the hills at night.",
        ),
        "the wind and the wind and the wind and the wind and",
    ),
    "reasoning when asked": (
        ("<think>14 + 9 is 23", "<think>stones are heavy", "<think>4 × 3", "<think>the first day"),
        "23",
    ),
    "no reasoning unasked": (("4", "I am well.", "Blue.", "A cat."), "<think>let me see"),
}


def reply(text: str, prompt: Prompt) -> Reply:
    """An answer as it would be read: what follows `<think>` is reasoning, with an answer after."""
    content = text.removesuffix(CUT)
    thinking = content.removeprefix("<think>") if content.startswith("<think>") else None
    answer = Answer(thinking, content if thinking is None else "So it is.")
    asked = prompt.turns[0]["content"] == REASONING_PROMPT
    return Reply(answer, not text.endswith(CUT), (thinking is not None) == asked)


def test_the_battery_is_broad_and_every_category_has_several_prompts() -> None:
    assert len(BATTERY) >= 35
    assert all(len(prompts) == 4 for prompts in BATTERY.values())
    asked = [prompt.turns for prompts in BATTERY.values() for prompt in prompts]
    assert all(turns not in asked[:i] for i, turns in enumerate(asked))
    assert set(ANSWERS) == set(BATTERY)


@pytest.mark.parametrize("name", BATTERY)
def test_every_check_tells_a_right_answer_from_a_wrong_one(name: str) -> None:
    rights, wrong = ANSWERS[name]
    for prompt, right in zip(BATTERY[name], rights, strict=True):
        question = prompt.turns[-1]["content"]
        assert prompt.is_right(reply(right, prompt)), (question, right)
        assert not prompt.is_right(reply(wrong, prompt)), (question, wrong)


@pytest.mark.parametrize("name", BATTERY)
def test_neither_silence_nor_the_question_again_is_right(name: str) -> None:
    for prompt in BATTERY[name]:
        for said in ("", " \n", "…", prompt.turns[-1]["content"]):
            assert not prompt.is_right(reply(said, prompt)), said


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 1,200.", "1200"),
        ("2 and −3", "-3"),
        ("1/2", "1/2"),
        ("0.50", "1/2"),
        ("7-3", "3"),
        ("1/0", "1"),
        ("x2", None),
        ("9" * 500, None),
        ("none", None),
        ("two, no, three", "3"),
    ],
)
def test_the_last_number_of_an_answer_counts(text: str, value: str | None) -> None:
    assert battery.last_number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("text", "looped"),
    [
        ("the cat the cat the cat", True),
        ("no no no", True),
        ("hahahahahahaha", True),
        (" ".join(["a b c d e f g h i j k l"] * 3), True),
        ("the cat sat, the cat ran, the cat slept", False),
        ("a very, very long way", False),
        ("100000000 --------", False),
    ],
)
def test_a_loop_is_three_times_the_same_in_a_row(text: str, looped: bool) -> None:
    assert battery.loops(text) == looped


@pytest.mark.parametrize(
    "code",
    [
        "x = (",
        "x = 'a\0b'",
        "raise ValueError",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "while True: pass",
        "x = [0] * 10**9",
        "import time; time.sleep(60)",
        "while True: print('x' * 1000)",
        "open('big', 'w').write('x' * 10**6)",
        "input()",
        "import os; assert 'HOME' in os.environ",
        "(" * 5000 + ")" * 5000,
    ],
)
def test_code_that_fails_leaves_or_takes_too_much_does_not_pass(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_limits()
    monkeypatch.setattr(battery, "SECONDS", 3.0)
    assert not battery.runs(code)


def test_code_runs_with_its_test_in_an_empty_folder() -> None:
    skip_without_limits()
    assert battery.runs("import os\nx = os.listdir('.')", "assert x == []")
    assert not battery.runs("x = 1", "assert x == 2")


def test_code_is_left_out_with_the_reason_where_it_cannot_be_limited(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    battery.sandbox_fault.cache_clear()
    monkeypatch.setattr(battery, "LIMITS", "import a_module_that_is_not_there")
    scores, records = battery.battery_scores(bench)
    battery.sandbox_fault.cache_clear()
    assert CODE not in {record["category"] for record in records}
    assert len(scores) == len(BATTERY)
    assert f"left out: {CODE}" in (said := capsys.readouterr().out)
    assert "a_module_that_is_not_there" in said


def skip_without_limits() -> None:
    if fault := battery.sandbox_fault():
        pytest.skip(fault)


# ---------------------------------------------------------------------------------- a whole scoring


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def bench(run: Config, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(battery, "MAX_TOKENS", 4)
    loaded = checkpoint.load_for_inference(run.run_dir / "sft2")
    return Bench(loaded, run.run_dir, None, run.run_dir, 1)


def test_a_limit_takes_the_first_prompts_of_each_category(bench: Bench) -> None:
    scores, records = battery.battery_scores(bench)
    n = len(BATTERY) - (battery.sandbox_fault() is not None)
    assert [record["category"] for record in records] == [s.task[9:] for s in scores[1:]]
    assert (len(records), scores[0].n, {s.n for s in scores[1:]}) == (n, n, {1})
    assert scores[0].value == sum(record["right"] for record in records) / n
    assert scores[0].headline


def test_the_same_checkpoint_gives_the_same_answers(bench: Bench) -> None:
    assert battery.battery_scores(bench) == battery.battery_scores(bench)


def test_answers_are_scored_with_the_prompt_they_belong_to(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def converse(loaded, conversations, max_tokens: int, title: str) -> list[Reply]:
        known = {
            id(prompt.turns): reply(right, prompt)
            for name, prompts in BATTERY.items()
            for prompt, right in zip(prompts, ANSWERS[name][0], strict=True)
        }
        return [known[id(turns)] for turns in conversations]

    monkeypatch.setattr(battery, "converse", converse)
    bench.limit = None
    scores, _ = battery.battery_scores(bench)
    assert {score.value for score in scores} == {1.0}


def test_a_base_model_is_refused(bench: Bench, run: Config) -> None:
    bench.loaded = checkpoint.load_for_inference(run.run_dir / "base")
    with pytest.raises(UserError, match="base model"):
        battery.battery_scores(bench)

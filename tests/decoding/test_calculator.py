"""The calculator: exact, bounded, and never an exception but its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from random import Random

import pytest

from hearth.decoding import calculator
from hearth.decoding.calculator import MOST_CHARS, CalculationError, calculate, evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12*(3+4)", "84"),
        (" 12 × (3 + 4)\n", "84"),
        ("7 ÷ 2", "3.5"),
        ("5 − 9", "-4"),
        ("1/3", "0.3333333333"),
        ("-2/3", "-0.6666666667"),
        ("0.1 + 0.2", "0.3"),
        ("0.12345678901234567890123 * 10", "1.2345678901"),
        ("29 // 6", "4"),
        ("29 % 6", "5"),
        ("-7 // 2", "-4"),
        ("--5 + +1", "6"),
        ("2.50", "2.5"),
        ("1000000 * 1000000", "1000000000000"),
        ("0 * 5", "0"),
        ("2 < 3 <= 3", "true"),
        ("1/3 == 2/6", "true"),
        ("3 ≠ 3", "false"),
        ("3 ≥ 4", "false"),
        ("+".join(["1"] * 100), "100"),
        ("(" * 20 + "7" + ")" * 20, "7"),
        ('count("e", "tree")', "2"),
        ("count('A', 'Banana') * 2", "6"),
        ('count("é", "e\u0301te\u0301")', "2"),
        ('length("mountain") + 1', "9"),
        ('length("ﬁn") < 3', "true"),
        ('length("2 × (")', "5"),
    ],
)
def test_it_answers(text: str, value: str) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not an expression"),
        ("1 +", "not an expression"),
        ("1 2", "not an expression"),
        ("1, 2", "not an expression"),
        ("()", "not an expression"),
        ("2 ** 9", "not an expression"),
        ("2 *\t* 9", "not an expression"),
        ("x", "not an expression"),
        ("__import__('os')", "not an expression"),
        ("1 if 2 else 3", "not an expression"),
        ("[1]", "not an expression"),
        ("'a'", "not an expression"),
        ("1j", "not an expression"),
        ("1e9", "not an expression"),
        ("007", "not an expression"),
        ("3(4)", "not an expression"),
        ("count", "not an expression"),
        ("count := 3", "not an expression"),
        ("length = 3", "not an expression"),
        ("'\0'", "not an expression"),
        ("'\ud800' < 1", "not an expression"),
        ("'" + "\\" + "n'", "not an expression"),
        ("(" * 21 + "7" + ")" * 21, "brackets"),
        ("1" * (MOST_CHARS + 1), "longer than"),
        ("1" * 31, "digits"),
        ("1." + "3" * 31, "digits"),
        ("99999999999 * 99999999999 * 99999999999", "digits"),
        ("1/7 + 1/99999999999999999999999999999 + 1/11", "digits"),
        ("1 / 100000000000000", "nearer to zero"),
        ("1 / 0", "division by zero"),
        ("1 // (2 - 2)", "division by zero"),
        ("1 % 0.0", "division by zero"),
        ("(1 < 2) + 1", "comparison"),
        ("-(1 < 2)", "comparison"),
        ('count("tree")', "it is count"),
        ('count("", "tree")', "it is count"),
        ('count("ee", "tree")', "it is count"),
        ("length(5)", "it is count"),
        ('length(*"ab")', "it is count"),
        ('length("a", "b")', "it is count"),
    ],
)
def test_it_says_why_it_does_not(text: str, why: str) -> None:
    with pytest.raises(CalculationError, match=why):
        calculate(text)


def test_it_works_in_threads() -> None:
    sums = [f"{n} * ({n} + 1)" for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(calculate, sums)) == [str(n * (n + 1)) for n in range(200)]


# ------------------------------------------------------------------------------------------ fuzzing

SIGNS = (
    *("+", "-", "*", "/", "//", "%", "<", "<=", ">", ">=", "==", "!=", "=", "(", ")", ",", "."),
    *(
        "×",
        "÷",
        "−",
        "≤",
        "≠",
        "**",
        " ",
        "\n",
        "\t",
        "\0",
        "\\",
        "#",
        "'",
        '"',
        '"""',
        "é",
        "\ud800",
    ),
    *("0", "1", "7", "12", "0.5", "3.", "99999999999999", "1e9", "1_0", "0x1", "1j", "٣", "²"),
    *("count", "length", 'count("a", "banana")', 'length("word")', "x", "lambda", "not ", "and "),
    *("[", "]", "{", "}", ":", ":=", "@", "~", "f'{1}'", "if ", "else ", "True", "None", "await "),
)


def noise(rng: Random) -> str:
    """Signs in any order, sometimes one of them very often."""
    signs = [rng.choice(SIGNS) for _ in range(rng.choice((2, 5, 12, 60)))]
    if rng.random() < 0.1:
        signs.insert(rng.randrange(len(signs)), rng.choice(SIGNS) * rng.choice((19, 60, 150)))
    return "".join(signs)


def some_sum(rng: Random, depth: int = 4) -> tuple[str, Fraction]:
    """An expression in brackets, its value by `fractions`. Raises ZeroDivisionError."""
    if depth == 0 or rng.random() < 0.2:
        digits = rng.choice(("{:d}", "{:d}.25", "{:d}.5")).format(
            rng.randrange(10 ** rng.choice((1, 3, 6)))
        )
        return digits, Fraction(digits)
    (left, a), (right, b) = some_sum(rng, depth - 1), some_sum(rng, depth - 1)
    sign, value = rng.choice(
        (
            ("+", lambda: a + b),
            ("−", lambda: a - b),
            ("×", lambda: a * b),
            ("÷", lambda: a / b),
            ("//", lambda: Fraction(a // b)),
            ("%", lambda: a % b),
        )
    )
    minus = rng.random() < 0.1
    text = f"({left} {sign} {right})"
    return (f"-{text}", -value()) if minus else (text, value())


N_FUZZED = (2000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]))


@pytest.mark.parametrize("n", N_FUZZED)
def test_no_text_raises_anything_but_its_own_error(n: int) -> None:
    rng, answers = Random(n), 0
    for _ in range(n):
        try:
            answers += bool(calculate(noise(rng)))
        except CalculationError:
            continue
    assert answers > n / 500


@pytest.mark.parametrize("n", N_FUZZED)
def test_it_agrees_with_fractions_where_both_answer(n: int) -> None:
    rng, answers = Random(n), 0
    for _ in range(n):
        try:
            text, value = some_sum(rng)
        except ZeroDivisionError:
            continue
        try:
            assert evaluate(text) == value, text
            said = Fraction(calculate(text))
        except CalculationError:
            continue
        assert abs(said - value) <= Fraction(1, 2 * 10**calculator.DECIMALS), text
        answers += 1
    assert answers > n / 3

"""A calculator for what a model writes: sums, comparisons, letters of a word.

In: an expression as text. Out: its value as text, or a `CalculationError` with the reason in few
words. Knows nothing of models or tokens.

    12 × (3 + 4)           84
    7 ÷ 2                  3.5
    1 / 3                  0.3333333333
    29 // 6, 29 % 6        4, 5
    2 < 3 <= 3             true
    count("e", "tree")     2
    length("mountain")     8

Numbers are exact fractions. Nothing is evaluated by Python: the parsed tree is walked, and only
what stands above is known. The length of the text, the nesting of brackets and the digits of every
number on the way are bounded, and with them the time: it needs no clock and no signal, and works in
any thread.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from unicodedata import normalize

MOST_CHARS = 200  # of an expression
MOST_DEPTH = 20  # of brackets inside each other
MOST_DIGITS = 30  # of a number's numerator and denominator, at every step
DECIMALS = 10  # of a result that is no whole number

OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
SIGNS: dict[type, Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
COMPARISONS: dict[type, Callable[[Fraction, Fraction], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
SPELLINGS = str.maketrans(
    {
        **{"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "≤": "<=", "≥": ">=", "≠": "!="},
        **dict.fromkeys("\t\n\r\f\v\u00a0", " "),
    }
)
QUOTED = re.compile(r"\"[^\"'\\\n\r]*\"|'[^\"'\\\n\r]*'")
# all that may stand outside of quotes
KNOWN = re.compile(r"(?:\d++(?:\.\d++)?|[-+*/%(),<>=! ]|count\b|length\b)*+", re.ASCII)


class CalculationError(ValueError):
    """An expression that has no answer here; the message says why."""


def calculate(text: str) -> str:
    """The value of an expression: a number in digits, or `true` or `false`. Raises
    `CalculationError`, and nothing else, for every other text.
    """
    value = evaluate(text)
    return str(value).lower() if isinstance(value, bool) else written(value)


def evaluate(text: str) -> Fraction | bool:
    """The exact value of an expression. Raises `CalculationError`, and nothing else."""
    if len(text) > MOST_CHARS:
        raise CalculationError(f"longer than {MOST_CHARS} characters")
    source = checked(text)
    try:
        return value_of(ast.parse(source, mode="eval").body, source.encode())
    except ZeroDivisionError:
        raise CalculationError("division by zero") from None
    except CalculationError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CalculationError("not an expression") from None


def checked(text: str) -> str:
    """The text in Python's signs, once all of it is known and nests no deeper than it may: that is
    looked at before Python's parser sees it. What is quoted stays as it is.
    """
    quoted = [*QUOTED.findall(text), ""]
    parts = [part.translate(SPELLINGS) for part in QUOTED.split(text)]
    if not all(KNOWN.fullmatch(part) for part in parts):
        raise CalculationError("not an expression")
    depth = deepest = 0
    for sign in "".join(parts):
        depth += (sign == "(") - (sign == ")")
        deepest = max(deepest, depth)
    if deepest > MOST_DEPTH:
        raise CalculationError(f"more than {MOST_DEPTH} brackets inside each other")
    return "".join(part + q for part, q in zip(parts, quoted, strict=True)).strip()


def value_of(node: ast.expr, source: bytes) -> Fraction | bool:
    """The value of a tree's node; `source` is what was parsed, for a number's own digits."""
    match node:
        case ast.Constant(value=int() | float()):
            return bounded(Fraction(source[node.col_offset : node.end_col_offset].decode()))
        case ast.UnaryOp(op, operand) if type(op) in SIGNS:
            return SIGNS[type(op)](number_of(operand, source))
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            two = number_of(left, source), number_of(right, source)
            return bounded(Fraction(OPERATORS[type(op)](*two)))
        case ast.Compare(left, ops, others) if all(type(op) in COMPARISONS for op in ops):
            values = [number_of(one, source) for one in (left, *others)]
            pairs = zip(ops, values, values[1:], strict=False)
            return all(COMPARISONS[type(op)](a, b) for op, a, b in pairs)
        case ast.Call(ast.Name(name), args, []):
            return Fraction(of_word(name, args))
    raise CalculationError("not an expression")


def number_of(node: ast.expr, source: bytes) -> Fraction:
    """The value of a node that has to be a number."""
    value = value_of(node, source)
    if isinstance(value, bool):
        raise CalculationError("a comparison is no number")
    return value


def bounded(value: Fraction) -> Fraction:
    """The number, if it has no more digits than a number may have."""
    if max(abs(value.numerator), value.denominator) >= 10**MOST_DIGITS:
        raise CalculationError(f"a number of more than {MOST_DIGITS} digits")
    return value


def of_word(name: str, args: list[ast.expr]) -> int:
    """`count` and `length` of quoted words. Upper and lower case are the same letter."""
    texts = [arg.value for arg in args if isinstance(arg, ast.Constant)]
    words = [normalize("NFC", text).lower() for text in texts if isinstance(text, str)]
    if len(words) == len(args):
        if name == "length" and len(words) == 1:
            return len(normalize("NFC", texts[0]))
        if name == "count" and len(words) == 2 and len(words[0]) == 1:
            return words[1].count(words[0])
    raise CalculationError('it is count("letter", "word") or length("word")')


def written(value: Fraction) -> str:
    """A number in decimal digits, rounded to `DECIMALS` places where it has more."""
    digits = str(abs(round(value * 10**DECIMALS))).zfill(DECIMALS + 1)
    text = f"{digits[:-DECIMALS]}.{digits[-DECIMALS:]}".rstrip("0").rstrip(".")
    if text == "0" and value:
        raise CalculationError(f"nearer to zero than {DECIMALS} decimals show")
    return f"-{text}" if value < 0 else text

"""Cleaning: every rule for its own reason, and a memory that knows what a set would."""

import random
from collections import Counter

import pytest

from config import DataConfig, UserError
from hearth.data import cleaning
from hearth.data.cleaning import Seen, repeated_line_share


def slow_share(text: bytes) -> float:
    """The obvious way: count each line."""
    lines = Counter(line for line in text.split(b"\n") if line)
    return max((len(line) * n for line, n in lines.items() if n > 1), default=0) / max(1, len(text))


def test_repeated_line_share_equals_counting_each_line() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        lines = [draw.choice("ab") * draw.randint(0, 9) for _ in range(draw.randint(1, 8))]
        text = "\n".join(lines).encode()
        if not text:
            continue
        assert repeated_line_share(text) == slow_share(text)
        above = draw.random()
        assert (repeated_line_share(text, above) > above) == (slow_share(text) > above), text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a real sentence, long enough to be of use to somebody who reads", None),
        ("short", "too short"),
        (" " * 100 + "short", "too short"),
        ("buy now! " * 9 + "\n" + ("click here\n" * 50), "mostly one repeated line"),
        ("\x01\x02\x03\x04" * 40, "not text"),
        ("\ufffd" * 100, "not text"),
        ("nul\0" * 40, "NUL bytes"),
    ],
)
def test_unfit_documents_are_dropped_for_the_right_reason(text: str, reason: str | None) -> None:
    bad = cleaning.unfit(text.encode(), DataConfig(text_files=("x",), min_chars=16))
    assert (bad.reason if bad else None) == reason


def test_seen_knows_what_a_set_knows() -> None:
    draw = random.Random(0)
    keys = [draw.getrandbits(64) for _ in range(60_000)] + [0, 1, 2**64 - 1]
    seen, known = Seen(), set()
    for key in draw.choices(keys, k=150_000):
        assert seen.add(key) == (key in known or (key <= 1 and bool({0, 1} & known)))
        known.add(key)
    assert seen.n >= len(known) - 1


def test_seen_stops_growing_at_its_limit_and_says_so() -> None:
    seen = Seen(limit=100)
    for key in range(1, 200):
        seen.add(key)
    assert (seen.n, seen.n_forgotten) == (100, 99)
    assert seen.add(100)
    assert not seen.add(150)


def test_near_duplicates_are_found_and_others_are_not() -> None:
    pytest.importorskip("datasketch", reason="needs the extra near-duplicates")
    draw = random.Random(0)
    words = [f"word{i}" for i in range(2000)]
    documents = [" ".join(draw.choices(words, k=300)) for _ in range(50)]
    near = cleaning.NearDuplicates(0.7)
    assert not any(near.add(text.encode()) for text in documents)
    changed = [text.replace(text.split()[100], "changed", 1) for text in documents]
    assert sum(near.add(text.encode()) for text in changed) >= 48


def test_near_duplicates_without_the_package_say_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cleaning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="uv run --extra near-duplicates"):
        cleaning.NearDuplicates(0.8)

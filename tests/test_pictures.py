"""The README's pictures: what a terminal shows is what the program wrote, curves are the run's own,
and the run is left as it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from config import UserError

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import pictures


def shown(text: str, columns: int = 10, lines: int = 4) -> list[str]:
    screen = pictures.Screen(columns, lines)
    screen.feed(text)
    return screen.text()


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ("one\r\ntwo", ["one", "two"]),
        ("one\rO", ["One"]),
        ("0123456789ab", ["0123456789", "ab"]),
        ("ab\x1b[1Dx\x1b[1Ay", ["axy"]),
        ("one\r\ntwo\x1b[2;1H\x1b[Know", ["one", "now"]),
        ("one\r\ntwo\r\nthree\x1b[1A\r\x1b[J2", ["one", "2"]),
        ("one\r\ntwo\x1b[1A\x1b[2K\rnew", ["new", "two"]),
        ("\x1b]0;title\x07a\x1b[?2004hb\x1b(Bc\x1b=", ["abc"]),
        ("1\r\n2\r\n3\r\n4\r\n5\x1b[1;1Hx", ["1", "x", "3", "4", "5"]),
        ("a\x1b[2Cb\x1b[2Gc\b\bd", ["dc b"]),
    ],
)
def test_the_screen_is_what_a_terminal_would_show(sent: str, seen: list[str]) -> None:
    assert shown(sent) == seen


def test_a_control_sequence_may_come_in_pieces() -> None:
    whole = "one\x1b[1;31mred\x1b[0m\x1b[6n\r\n\x1b]0;t\x07two"
    for cut in range(len(whole)):
        screen = pictures.Screen(20, 4)
        screen.feed(whole[:cut])
        screen.feed(whole[cut:])
        assert screen.text() == ["onered", "two"]
        assert screen.asked == 1
        assert screen.ansi()[0] == "one\x1b[0m\x1b[1;31mred\x1b[0m"


def test_a_terminal_as_svg_holds_its_words_and_loads_nothing() -> None:
    svg = pictures.to_svg(["> \x1b[1mWho?\x1b[0m", "<b> & Ravi"])
    words = "".join(ElementTree.fromstring(svg).itertext()).replace("\xa0", " ")
    assert "Who?" in words
    assert "<b> & Ravi" in words
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose base and practice noted a few steps."""
    folder = tmp_path / "runs" / "mine"
    for stage, name in (("base", "bpb world"), ("rl", "pass@1 sums")):
        (folder / stage).mkdir(parents=True)
        records = [{"kind": "start", "step": 0, "steps": 40}]
        for step in range(1, 41):
            figures = {"loss": 5 - step / 10, "tokens": 100 * step, "seconds": 3.0 * step}
            records.append({"kind": "step", "step": step, "stage": 0, **figures})
            if step % 20 == 0:
                records.append({"kind": "eval", "step": step, name: step / 100})
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / stage / "metrics.jsonl").write_text(lines)
    (folder / "config.json").write_text("{}")
    return folder


def test_curves_are_one_file_with_the_runs_figures_in_words(run: Path) -> None:
    ((_, loss, words),) = pictures.draw_loss(run)
    assert "0.2 at the start, 0.4 after 4.0k tokens" in words
    ((_, practice, words),) = pictures.draw_practice(run)
    assert "0.2 at the start, 0.4 after 2 minutes" in words
    for svg in (loss, practice):
        root = ElementTree.fromstring(svg)
        ids = [e.get("id") for e in root.iter() if e.get("id")]
        assert len(ids) == len(set(ids))
        assert b"prefers-color-scheme: dark" in svg


def test_a_run_without_practice_has_no_picture_of_it(run: Path) -> None:
    (run / "rl" / "metrics.jsonl").unlink()
    assert list(pictures.draw_practice(run)) == []


def test_what_is_written_beside_a_run_does_not_reach_it(run: Path) -> None:
    before = sorted(run.rglob("*"))
    with pictures.aside(run) as (folder, words):
        assert words == ["--name", "mine"]
        place = folder / "runs" / "mine"
        assert (place / "config.json").read_text() == "{}"
        (place / "chat_history").write_text("typed")
    assert sorted(run.rglob("*")) == before


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(UserError, match="is no run"):
        pictures.main()

"""The model card states what the run's files state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import exported
import pytest

from config import REASONING_PROMPT, DataConfig, TextSource
from hearth.data.tokenizer import Tokenizer
from hearth.export import card, gguf, huggingface


def card_of(tokenizer: Tokenizer, folder: Path, shape: str = "whole", **settings: object) -> str:
    checkpoint = exported.save(folder, exported.SHAPES[shape], tokenizer, **settings)
    report = checkpoint.parent.parent / "report" / "report.md"
    report.parent.mkdir()
    report.write_text("# demo\n\n## Scores\n\n| a | 94% |\n\n## Machine\n\n0.2 kWh\n")
    usage = huggingface.usage(shape == "portable")
    return card.text(checkpoint, exported.loaded_in_float32(checkpoint), "transformers", usage)


def test_it_holds_the_run_s_report(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = card_of(tokenizer, tmp_path)
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert text.count("\n# demo\n") == 1
    for line in ("## Scores", "| a | 94% |", "0.2 kWh", "stage: sft2, step 5 of 5", "5.0k tokens"):
        assert line in text, line


def test_it_names_the_data_and_leaves_the_licence_open(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    web = TextSource(name="web", hub="some/web", revision="abc123")
    text = card_of(tokenizer, tmp_path, data=DataConfig(sources=(web,)))
    assert "- web: some/web on the Hugging Face hub, abc123" in text
    assert "- alpaca: the built-in demo world" in text
    assert "No licence is stated" in text


@pytest.mark.parametrize(("shape", "trusts"), [("whole", True), ("portable", False)])
def test_it_asks_for_trust_where_code_runs(
    tokenizer: Tokenizer, tmp_path: Path, shape: str, trusts: bool
) -> None:
    text = card_of(tokenizer, tmp_path, shape)
    assert ("trust_remote_code=True" in text) == trusts
    assert ("modeling_hearth.py" in text) == trusts


def test_a_base_model_s_card_promises_no_chat(tokenizer: Tokenizer, tmp_path: Path) -> None:
    base = exported.save(tmp_path / "a", exported.SHAPES["plain"], tokenizer, stage="base")
    loaded = exported.loaded_in_float32(base)
    assert REASONING_PROMPT not in card.text(base, loaded, "gguf", gguf.USAGE)
    chat = replace(loaded, state=loaded.state | {"stage": "sft1"})
    assert REASONING_PROMPT in card.text(base, chat, "gguf", gguf.USAGE)

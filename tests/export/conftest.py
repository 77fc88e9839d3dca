"""Exports that several files test, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import exported
import pytest

from hearth.data.tokenizer import Tokenizer
from hearth.export import huggingface
from hearth.training.checkpoint import Loaded


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return exported.some_tokenizer()


@pytest.fixture(scope="session")
def export(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Loaded, Path]]:
    """The checkpoint of one of `exported.SHAPES`, and the folder for transformers made of it."""
    made: dict[str, tuple[Loaded, Path]] = {}

    def of(name: str) -> tuple[Loaded, Path]:
        if name not in made:
            place = tmp_path_factory.mktemp("export")
            folder = exported.save(place, exported.SHAPES[name], tokenizer)
            loaded = exported.loaded_in_float32(folder)
            huggingface.write(folder, loaded, place / name)
            made[name] = loaded, place / name
        return made[name]

    return of

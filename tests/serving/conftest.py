"""What the tests of the chat share."""

from __future__ import annotations

from pathlib import Path

import pytest
from chats import new_chat, write_run

from hearth.serving.conversation import Chat


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def chat(checkpoints: Path) -> Chat:
    return new_chat(checkpoints / "sft2")

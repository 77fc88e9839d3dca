"""A server to talk to: in a thread of the test, with a real model or with one that says what it is
told.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import chats
import uvicorn

from config import Config
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.scheduler import (
    EngineThread,
    Event,
    Failed,
    Finished,
    Job,
    Read,
    Request,
    Scored,
    Token,
)
from hearth.serving.api import Safety, build_app, uvicorn_settings
from hearth.serving.requests import Served
from hearth.serving.workers import Loader

CONFIG = replace(
    chats.CONFIG,
    model=replace(chats.CONFIG.model, context=256),
    chat=replace(chats.CONFIG.chat, max_tokens=24),
)


def write_checkpoint(folder: Path, stage: str, config: Config = CONFIG) -> Path:
    """A checkpoint of a random model that says letters, as training leaves it."""
    return chats.write_checkpoint(
        folder / stage, stage, config=config, text=f"{chats.TEXT}, köttur"
    )


def describe(name: str, folder: Path, config: Config = CONFIG) -> Served:
    tokenizer = Tokenizer.load(folder / "tokenizer")
    stage = json.loads((folder / "state.json").read_text())["stage"]
    return Served(name, stage, 1, tokenizer, config.model.context, config.chat)


def real_engines(folders: dict[str, Path], **settings: Any) -> EngineThread:
    return EngineThread(Loader(folders, weights="float32"), threads=1, **settings)


class ScriptedEngines:
    """Says the text that `answer` makes of a prompt's text, a token each `pause` seconds."""

    def __init__(self, tokenizer: Tokenizer, answer: Callable[[str], str]) -> None:
        self.tokenizer, self.answer, self.pause = tokenizer, answer, 0.0
        self.jobs: list[Job] = []
        self.n_reused = 0  # tokens of each prompt that a cache held
        self.fail_after: int | None = None

    @property
    def under_way(self) -> int:
        return sum(not job.ended and not job.cancelled for job in self.jobs)

    def submit(
        self, model: str, requests: Sequence[Request], emits: Sequence[Callable[[Event], None]]
    ) -> list[Job]:
        jobs = [Job(request, emit) for request, emit in zip(requests, emits, strict=True)]
        self.jobs += jobs
        for job in jobs:
            threading.Thread(target=self._say, args=(job,), daemon=True).start()
        return jobs

    def _say(self, job: Job) -> None:
        tokenizer = self.tokenizer
        job.emit(Read(len(job.request.prompt), self.n_reused))
        text = self.answer(tokenizer.decode(job.request.prompt))
        thinking, closed, content = text.partition("</think>")
        ids = tokenizer.encode(text)
        if closed:
            thought = tokenizer.encode(thinking.removeprefix("<think>"))
            ids = [tokenizer.think, *thought, tokenizer.end_think, *tokenizer.encode(content)]
        for n, token in enumerate(ids[: job.request.rules.max_tokens]):
            if job.cancelled:
                return
            if n == self.fail_after:
                job.emit(Failed("The process that made this answer died."))
                return
            job.emit(Token(token, 2, Scored(-0.1, ((token, -0.1), (300, -2.5), (301, -4.0)))))
            if self.pause:
                time.sleep(self.pause)
        cut = len(ids) > job.request.rules.max_tokens
        job.emit(Finished("length" if cut else "stop"))


@contextlib.contextmanager
def serve(
    engines: Any,
    models: Sequence[Served],
    *,
    safety: Safety | None = None,
    report: Path | None = None,
    port: int = 0,
) -> Iterator[str]:
    """The address of a server that runs as long as the block."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    app = build_app(engines, models, safety=safety, report=report)
    settings = uvicorn_settings(app, timeout_graceful_shutdown=1)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()

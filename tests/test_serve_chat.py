"""The server as a person starts it: one link, refused when unsafe, ended by SIGTERM after its
answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import stages
from chat_server import CONFIG, write_checkpoint

import serve_chat
from config import PRESETS, Config, UserError
from serve_chat import Options, check, describe, find_checkpoints, is_loopback, link


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("base", "sft1", "sft2"):
        write_checkpoint(folder / "demo", stage)
    return folder


@pytest.fixture
def config(runs: Path) -> Config:
    return replace(CONFIG, runs=str(runs))


# ----------------------------------------------------------------------------------- what it serves


def test_the_furthest_stage_comes_first(config: Config) -> None:
    folders = find_checkpoints(config, Options())
    assert list(folders) == ["demo-sft2", "demo-sft1", "demo-base"]
    assert [describe(n, f, config, Options()).stage for n, f in folders.items()] == [
        "sft2",
        "sft1",
        "base",
    ]


def test_any_checkpoint_folder_can_be_served(config: Config, runs: Path) -> None:
    options = Options(checkpoint=str(runs / "demo" / "sft1"))
    ((name, folder),) = find_checkpoints(config, options).items()
    served = describe(name, folder, config, options)
    assert (served.name, served.stage, served.context) == ("sft1", "sft1", 256)


def test_nothing_to_serve_names_the_command_that_makes_it(config: Config, tmp_path: Path) -> None:
    empty = replace(config, runs=str(tmp_path))
    with pytest.raises(UserError, match=r"run_pipeline\.py --preset demo"):
        find_checkpoints(empty, Options())
    with pytest.raises(UserError, match=r"Cannot read .*config\.json"):
        describe("x", tmp_path, config, Options(checkpoint=str(tmp_path)))


def test_a_checkpoint_by_name_draws_as_it_was_made_unless_the_command_line_says(
    config: Config, runs: Path
) -> None:
    options = Options(checkpoint=str(runs / "demo" / "sft1"))
    ((name, folder),) = find_checkpoints(config, options).items()
    other = replace(config, preset="8gb", chat=PRESETS["8gb"].chat)
    assert describe(name, folder, other, options).chat == replace(CONFIG.chat, seed=None)
    said = replace(other, chat=replace(other.chat, tool_calls=0, system="Be brief."))
    assert describe(name, folder, said, options).chat == said.chat


def test_cycles_without_a_head_are_refused(tmp_path: Path) -> None:
    headless = replace(CONFIG, model=replace(CONFIG.model, hrm=None))
    folder = write_checkpoint(tmp_path, "sft2", headless)
    with pytest.raises(UserError, match="no reasoning head"):
        describe("x", folder, headless, Options(cycles=2))


# -------------------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "box.lan"])
def test_other_machines_are_let_in_only_with_a_key_or_by_name(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--api_key"):
        check(Options(host=host))
    assert check(Options(host=host, api_key="k")).api_key == "k"
    assert check(Options(host=host, no_key=True)).api_key is None
    monkeypatch.setenv("HEARTH_API_KEY", "from the environment")
    assert check(Options(host=host)).api_key == "from the environment"


@pytest.mark.parametrize(
    ("host", "named"),
    [("127.0.0.1", "localhost"), ("127.0.0.2", "127.0.0.2"), ("box.lan", "box.lan"), ("::1", "[")],
)
def test_the_link_that_is_printed_leads_to_the_server(host: str, named: str) -> None:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        options = Options(host=host, no_key=True)
        there = urlsplit(link(options, listener))
    assert there.netloc.rpartition(":")[0] in check(options).hosts
    assert there.netloc.startswith(named)

    assert "secret" not in repr(check(Options(api_key="secret")))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_this_machine_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    assert not check(Options(host=host)).any_address


@pytest.mark.parametrize(
    "options",
    [
        Options(port=-1),
        Options(port=65536),
        Options(workers=0),
        Options(rows=0),
        Options(rows=257),
        Options(cycles=0),
        Options(early_exit=-1.0),
        Options(early_exit=float("nan")),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: Options) -> None:
    with pytest.raises(UserError, match="--"):
        check(options)


def test_a_port_that_is_taken_says_so() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="--port"):
            serve_chat.listen(Options(port=other.getsockname()[1]))


# ----------------------------------------------------------------------------------- as a process


class Running:
    """The script, started; its link once it is printed."""

    def __init__(self, runs: Path, tmp_path: Path, *words: str) -> None:
        self.output = tmp_path / "output"
        words = ("--preset", "demo", "--runs", str(runs), "--port", "0", "--device", "cpu", *words)
        self.process = stages.start("serve_chat.py", list(words), self.output)
        end = time.monotonic() + 100
        while not (found := re.search(r"http://\S+", self.text())):
            assert time.monotonic() < end, self.text()
            assert self.process.is_alive(), self.text()
            time.sleep(0.02)
        self.url = found[0].rstrip("/")

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def end(self, number: int) -> int:
        os.kill(self.process.pid, number)
        self.process.join(60)
        return self.process.exitcode


@pytest.fixture
def start(runs: Path, tmp_path: Path) -> Iterator:
    started: list[Running] = []

    def begin(*words: str) -> Running:
        started.append(Running(runs, tmp_path, *words))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.join()


def test_sigterm_lets_a_running_answer_end(start) -> None:
    running = start()
    assert running.text().count("\n") == 1
    assert "http://localhost:" in running.text()
    lines: list[str] = []
    begun = threading.Event()

    def listen() -> None:
        body = {"prompt": "the cat", "max_tokens": 200, "stream": True, "model": "demo-base"}
        body["temperature"], body["seed"] = 1, 0
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as reply:
            for line in reply.iter_lines():
                lines.append(line)
                begun.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert begun.wait(60)
    assert running.end(signal.SIGTERM) == 0
    listener.join()
    assert [line for line in lines if line][-1] == "data: [DONE]"
    last = json.loads([line for line in lines if line.startswith("data: {")][-1][6:])
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    assert running.text().count("\n") == 1  # nothing of what was asked was written


def test_ctrl_c_ends_it_without_a_traceback(start) -> None:
    running = start("--workers", "2")
    reply = httpx.post(
        f"{running.url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=60
    )
    assert reply.status_code == 200
    assert running.end(signal.SIGINT) == 130
    assert running.text().endswith("stopped.\n")
    assert "Traceback" not in running.text()

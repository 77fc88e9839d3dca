"""Several processes train like one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import stages
import torch

from hearth.training import distributed
from hearth.training.loop import Power, Progress


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder whose run has its tokens, and the options that make it."""
    folder = tmp_path_factory.mktemp("ready")
    words = stages.write_inputs(folder / "input")
    for script in stages.SCRIPTS[:2]:
        assert stages.run(script, [*words, "--runs", str(folder)], folder / "output") == 0
    return folder, words


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(n: int, words: list[str], output: Path) -> list[BaseProcess]:
    """`pretrain.py` as torchrun starts it: a process for each rank, told so by the environment."""
    port, ranks = free_port(), []
    for rank in range(n):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(stages.start("pretrain.py", words, output.with_suffix(f".{rank}"), place))
    return ranks


def losses(run: Path) -> list[float]:
    records = [
        json.loads(line) for line in (run / "base" / "metrics.jsonl").read_text().splitlines()
    ]
    return [record["loss"] for record in records if record["kind"] == "step"]


def test_two_processes_give_the_loss_curve_of_one(
    ready: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, words = ready
    for name in ("one", "two"):
        stages.copy_run(folder / "demo", tmp_path / name / "demo", "tokenizer", "tokens")
    assert (
        stages.run("pretrain.py", [*words, "--runs", str(tmp_path / "one")], tmp_path / "said") == 0
    )
    ranks = start_ranks(2, [*words, "--runs", str(tmp_path / "two")], tmp_path / "said")
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / "said.0").read_text()
    one, two = losses(tmp_path / "one" / "demo"), losses(tmp_path / "two" / "demo")
    assert len(one) == len(two) == 30
    assert two == pytest.approx(one, rel=1e-3)
    assert (tmp_path / "said.1").read_text() == ""  # the first one alone speaks


def test_a_signal_to_one_process_stops_all_and_saves_once(
    ready: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, words = ready
    stages.copy_run(folder / "demo", tmp_path / "demo", "tokenizer", "tokens")
    ranks = start_ranks(
        2, [*words, "--runs", str(tmp_path), "--pretrain.steps", "3000"], tmp_path / "said"
    )
    said = tmp_path / "said.0"
    while "step " not in (said.read_text() if said.exists() else ""):
        assert all(rank.is_alive() for rank in ranks), said.read_text()
        time.sleep(0.05)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [143, 143], said.read_text()
    assert (
        "Continue with: uv run torchrun --nproc-per-node 2 pretrain.py --preset demo"
        in said.read_text()
    )
    assert list((tmp_path / "demo" / "base").glob("step-*/state.json"))


def read_power(rank: int, port: int, folder: Path) -> None:
    """What a process of two notes of its power, of which the first alone has a counter."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cpu = torch.device("cpu")
    with distributed.group(cpu):
        power = Power(cpu)
        power.meter.joules = lambda: None if rank else 5.0
        figures = power.figures(Progress())
        stopping = distributed.largest(float(rank), cpu)
    (folder / f"{rank}").write_text(json.dumps([sorted(figures), stopping]))


def test_a_process_without_an_energy_counter_keeps_no_other_waiting(tmp_path: Path) -> None:
    context, port = multiprocessing.get_context("forkserver"), free_port()
    ranks = [context.Process(target=read_power, args=(r, port, tmp_path)) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    waiting = [rank.is_alive() for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert waiting == [False, False]
    # half of the energy would pass for the whole
    assert [json.loads((tmp_path / f"{r}").read_text()) for r in range(2)] == [[[], 1.0]] * 2


def test_the_processes_share_a_steps_rows_and_leave_none_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    rows = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        rows += list(distributed.rows_of_rank(8))
    assert rows == list(range(8))
    monkeypatch.delenv("RANK")
    assert distributed.rows_of_rank(8) == range(8)

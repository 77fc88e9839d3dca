"""Several processes train like one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import scored
import stages
import torch

from config import HRMConfig, ModelConfig, UserError
from hearth.reporting import report
from hearth.training import distributed, gradients, loop
from hearth.training.batches import Batch
from hearth.training.loop import Power, Progress
from model import Model, build_model


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


def start_ranks(
    n: int, words: list[str], output: Path, script: str = "pretrain.py"
) -> list[BaseProcess]:
    """A script as torchrun starts it: a process for each rank, told so by the environment."""
    port, ranks = free_port(), []
    for rank in range(n):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(stages.start(script, words, output.with_suffix(f".{rank}"), place))
    return ranks


def losses(run: Path, stage: str = "base") -> list[float]:
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return [record["loss"] for record in records if record["kind"] == "step"]


@pytest.fixture(scope="module")
def of_one(ready: tuple[Path, list[str]]) -> Path:
    """The run that one process makes: pretraining and fine-tuning."""
    folder, words = ready
    for script in stages.SCRIPTS[2:]:
        output = folder / f"{script}.said"
        assert stages.run(script, [*words, "--runs", str(folder)], output) == 0, output.read_text()
    return folder / "demo"


def test_two_processes_give_the_loss_curves_of_one(
    of_one: Path, ready: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Of pretraining, and of every stage of fine-tuning."""
    _, words = ready
    mine, words = tmp_path / "demo", [*words, "--runs", str(tmp_path)]
    stages.copy_run(of_one, mine, "text", "tokenizer", "tokens", "base")
    settings = json.loads((mine / "config.json").read_text())
    kept = ("text", "tokenizer", "base")
    settings["stages"] = {n: s for n, s in settings["stages"].items() if n in kept}
    (mine / "config.json").write_text(json.dumps(settings))
    finish(start_ranks(2, [*words, "--redo", "base"], tmp_path / "said"), tmp_path / "said.0")
    assert len(losses(mine)) == 30
    assert losses(mine) == pytest.approx(losses(of_one), rel=1e-3)
    finish(start_ranks(2, words, tmp_path / "said", "sft.py"), tmp_path / "said.0")
    for stage in ("mid", "sft1", "sft2"):
        assert losses(mine, stage) == pytest.approx(losses(of_one, stage), rel=1e-2)
    assert (tmp_path / "said.1").read_text() == ""  # the first one alone speaks


def finish(ranks: list[BaseProcess], said: Path) -> None:
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0], said.read_text()


def test_two_machines_give_the_loss_curve_of_one(
    of_one: Path, ready: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Two of torchrun's nodes on this one, by the README's command."""
    _, words = ready
    stages.copy_run(of_one, tmp_path / "demo", "text", "tokenizer", "tokens")
    port, nodes = str(free_port()), []
    for node in ("0", "1"):
        command = ["--nproc-per-node", "1", "--nnodes", "2", "--node-rank", node]
        command += ["--master-addr", "127.0.0.1", "--master-port", port]
        command += ["pretrain.py", *words, "--runs", str(tmp_path), "--redo", "base"]
        with (tmp_path / node).open("w") as said:
            nodes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *command],
                    **{"cwd": stages.ROOT, "stdout": said, "stderr": said},
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            )
    assert [node.wait(180) for node in nodes] == [0, 0], (tmp_path / "0").read_text()
    assert losses(tmp_path / "demo") == pytest.approx(losses(of_one), rel=1e-3)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_all_and_its_rank_is_named(
    killed: int, ready: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, words = ready
    stages.copy_run(folder / "demo", tmp_path / "demo", "tokenizer", "tokens")
    words = [*words, "--runs", str(tmp_path), "--pretrain.steps", "3000"]
    ranks = start_ranks(2, words, tmp_path / "said")
    wait_for_a_step(ranks, tmp_path / "said.0")
    os.kill(ranks[killed].pid, signal.SIGKILL)
    for rank in ranks:
        rank.join(240)
    said = (tmp_path / f"said.{1 - killed}").read_text()
    assert ranks[1 - killed].exitcode == 2, said
    assert f"error: Rank {killed} of 2" in said
    assert "the same command (on every machine) continues from the last checkpoint" in said
    assert "Traceback" not in said


def wait_for_a_step(ranks: list[BaseProcess], said: Path) -> None:
    while "step " not in (said.read_text() if said.exists() else ""):
        assert all(rank.is_alive() for rank in ranks), said.read_text()
        time.sleep(0.05)


def test_two_processes_score_like_one(tmp_path: Path) -> None:
    """Items are shared out: every kind of task, from likelihoods and from answers."""
    files, found = scored.write_files(tmp_path / "files"), []
    for n in (1, 2):
        config = scored.make_run(tmp_path / str(n))
        words = ["--preset", "demo", "--runs", str(tmp_path / str(n)), "--device", "cpu"]
        words += ["--report.no_draw", "--files", str(files), "--n_questions", "9"]
        words += ["--tasks", "bpb", "world", "copa", "winograd", "lambada_openai"]
        if n == 1:
            assert stages.run("score.py", words, tmp_path / "said") == 0
        else:
            ranks = start_ranks(n, words, tmp_path / "said", "score.py")
            finish(ranks, tmp_path / "said.0")
        book = report.read_json(config.run_dir / "report" / "score.json")
        found.append(([(s["task"], s["n"]) for s in book["scores"]], book))
    assert found[0][0] == found[1][0]
    for one, two in zip(*(book["scores"] for _, book in found), strict=True):
        assert two["value"] == pytest.approx(one["value"], abs=1e-6), one["task"]
    assert [a["said"] for a in found[0][1]["asked"]] == [a["said"] for a in found[1][1]["asked"]]
    assert (tmp_path / "said.1").read_text() == ""


def test_a_signal_to_one_process_stops_all_and_saves_once(
    ready: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, words = ready
    stages.copy_run(folder / "demo", tmp_path / "demo", "tokenizer", "tokens")
    ranks = start_ranks(
        2, [*words, "--runs", str(tmp_path), "--pretrain.steps", "3000"], tmp_path / "said"
    )
    said = tmp_path / "said.0"
    wait_for_a_step(ranks, said)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for rank in ranks:
        rank.join(240)
    assert [rank.exitcode for rank in ranks] == [143, 143], said.read_text()
    assert (
        "Continue with: uv run torchrun --nproc-per-node 2 pretrain.py --preset demo"
        in said.read_text()
    )
    assert list((tmp_path / "demo" / "base").glob("step-*/state.json"))


# -------------------------------------------------------------------------- what processes agree on


def in_two(
    work: Callable[..., None], folder: Path, *given: object, wait_for: Sequence[int] = (0, 1)
) -> list[int]:
    """Exit codes of two processes that run `work(rank, folder, *given)`, each told what it is; one
    that is not waited for is killed once the other has ended.
    """
    context, port = multiprocessing.get_context("forkserver"), free_port()
    ranks = [
        context.Process(target=as_rank, args=(work, rank, port, folder, *given)) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    for rank in wait_for:
        ranks[rank].join(240)
    for rank in ranks:
        rank.kill()
    return [rank.exitcode for rank in ranks]


def as_rank(work: Callable[..., None], rank: int, port: int, folder: Path, *given: object) -> None:
    torch.set_num_threads(1)
    stages.compute_in_float32()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = sys.stdout = (folder / f"said.{rank}").open("w", buffering=1)
    work(rank, folder, *given)


SHAPE = ModelConfig(
    **{"vocab_size": 128, "n_layer": 3, "d_model": 32, "n_head": 2, "n_kv_head": 1},
    **{"d_ff": 64, "context": 32, "window": 8, "hrm": HRMConfig(1, 1, 2, 1)},
)


def some_batch() -> Batch:
    """Eight rows; those of the second process' first micro-batch carry no loss."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (8 * 32 + 1,), generator=rng)
    weights = (torch.rand(8 * 32, generator=rng) < 0.7).float()
    weights[4 * 32 : 6 * 32] = 0
    return Batch(ids[:-1], ids[1:], weights, torch.arange(8 * 32) % 32 == 0, 32)


def awake(deep_supervision: bool) -> Model:
    config = replace(SHAPE, hrm=replace(SHAPE.hrm, deep_supervision=deep_supervision))
    model, rng = build_model(config, seed=0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=rng)
    return model


def learn_together(rank: int, folder: Path, supervised: bool, runs_out: bool) -> None:
    """Note the summed gradients, and how many were sent before the backward pass had ended; memory
    may run out on the second process in the middle of its last one.
    """
    distributed.SMALL = 600  # of so small a model
    model, sent = awake(supervised), []
    real_begun, real_backward = distributed.GradientSum.begun, gradients.backward

    def begun(self):
        if not sent:
            sent.append(self)
        return real_begun(self)

    def fail_once(*_: object) -> None:
        if len(failing) == 1 and sent and sent[0].n_sent > 3:
            failing.append(sent[0].n_sent)
            raise torch.OutOfMemoryError("injected")

    def backward(*given: object) -> torch.Tensor:
        loss = real_backward(*given)
        if sent:
            during.append(sent[0].n_sent)
        return loss

    failing, during = [0], []
    gradients.backward, distributed.GradientSum.begun = backward, begun
    if runs_out and rank == 1:
        model.trunk[0].up.register_hook(fail_once)
    optimizers = type("None", (), {"zero_grad": staticmethod(model.zero_grad)})
    job = type("Job", (), {"model": model, "optimizers": optimizers})
    with distributed.group("cpu"):
        loss, micro = loop.accumulate_together(job, some_batch(), 64)
    found = [None if p.grad is None else p.grad for p in model.parameters()]
    torch.save([loss, micro, during, failing[1:], found], folder / f"{rank}.pt")


@pytest.mark.parametrize(("supervised", "runs_out"), [(False, False), (False, True), (True, False)])
def test_gradients_are_summed_while_the_last_micro_batch_runs(
    supervised: bool, runs_out: bool, tmp_path: Path
) -> None:
    assert in_two(learn_together, tmp_path, supervised, runs_out) == [0, 0], [
        (tmp_path / f"said.{r}").read_text() for r in (0, 1)
    ]
    model = awake(supervised)
    loss = gradients.accumulate(model, some_batch(), 64)
    for rank in (0, 1):
        total, micro, during, failed_at, found = torch.load(tmp_path / f"{rank}.pt")
        assert total == pytest.approx(loss, rel=1e-5)
        for p, gradient in zip(model.parameters(), found, strict=True):
            torch.testing.assert_close(gradient, p.grad, atol=1e-6, rtol=1e-4)
        assert micro == (32 if rank and runs_out else 64)
        assert bool(failed_at) == (runs_out and rank == 1)
        if supervised:
            assert not during  # goes back several times
        else:
            n_large = sum(p.numel() >= 600 for p in model.parameters())
            assert during[-1] == n_large > 20  # all of them, before it had ended


def hold_other_weights(rank: int, folder: Path, apart: float) -> None:
    weights = {"a": torch.ones(3, 3), "b": torch.arange(8.0)}
    if rank:
        weights["b"][3] += apart
    with distributed.group("cpu"):
        try:
            distributed.bring_together(weights.items())
        except UserError as error:
            print(error)
        torch.save(weights["b"], folder / f"{rank}.pt")


@pytest.mark.parametrize("apart", [0.0, 1e-3, 1.0, float("nan")])
def test_weights_that_differ_a_little_are_brought_together_and_others_refused(
    apart: float, tmp_path: Path
) -> None:
    assert in_two(hold_other_weights, tmp_path, apart) == [0, 0]
    said = (tmp_path / "said.0").read_text()
    if apart == 0:
        assert said == ""
    elif apart == 1e-3:
        assert "weights differed by at most 2.4e-04 of their size (b)" in said
        assert torch.equal(torch.load(tmp_path / "1.pt"), torch.arange(8.0))
    else:
        assert "b differs by" in said
        assert "Nothing was saved" in said


def start_from_another_step(rank: int, folder: Path) -> None:
    with distributed.group("cpu"), pytest.raises(UserError, match=r"the step .* is 1?0 on rank"):
        distributed.require_alike({"the step to start from": 10 * rank})


def test_processes_that_start_from_other_checkpoints_are_refused(tmp_path: Path) -> None:
    assert in_two(start_from_another_step, tmp_path) == [0, 0]


def fall_silent(rank: int, folder: Path) -> None:
    """The second process stands still, as on a machine that is off; the first waits for a card."""
    distributed.BEAT, distributed.SILENCE, distributed.GRACE = 0.1, 2.0, 0.2
    with distributed.group("cpu"):
        if rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)


def test_a_process_that_falls_silent_ends_those_that_wait_for_it(tmp_path: Path) -> None:
    code, _ = in_two(fall_silent, tmp_path, wait_for=[0])
    assert code == 2
    assert "Rank 1 of 2" in (tmp_path / "said.0").read_text()
    assert "shows no more life" in (tmp_path / "said.0").read_text()


def fail_alone(rank: int, folder: Path) -> None:
    """As where the first machine's disk is full; the second waits for it."""
    try:
        with distributed.group("cpu"):
            if rank == 0:
                time.sleep(1)
                raise UserError("The disk is full.")
            distributed.gather([rank])
    except UserError as error:
        print(error)


def test_what_ended_one_process_is_said_by_all(tmp_path: Path) -> None:
    assert in_two(fail_alone, tmp_path) == [0, 0]
    first, second = ((tmp_path / f"said.{rank}").read_text() for rank in (0, 1))
    assert first == "The disk is full.\n"
    assert second.startswith("Rank 0 of 2, on ")
    assert "ended: The disk is full. All processes end." in second


def make_first(rank: int, folder: Path) -> None:
    with distributed.group("cpu"):
        assert distributed.from_first(lambda: {"made by": rank}) == {"made by": 0}

        def fail() -> None:
            assert distributed.n_ranks() == 1  # nothing in it waits for the others
            raise UserError("no such file")

        with pytest.raises(UserError, match="no such file"):
            distributed.from_first(fail)
        assert distributed.n_ranks() == 2
        items = list(range(7))
        assert distributed.shared_out(items, lambda mine: [10 * x for x in mine]) == [
            10 * x for x in items
        ]


def test_what_the_first_makes_all_have_and_all_share_work(tmp_path: Path) -> None:
    assert in_two(make_first, tmp_path) == [0, 0], (tmp_path / "said.1").read_text()


def test_a_process_that_never_comes_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "JOINING", distributed.timedelta(seconds=3))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with (
        pytest.raises(UserError, match="Of 2 processes one of the others did not come"),
        distributed.group("cpu"),
    ):
        pass


def test_the_command_that_continues_is_that_of_this_machine(monkeypatch) -> None:
    for name, value in (
        *(("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("GROUP_RANK", "1")),
        *(("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500")),
    ):
        monkeypatch.setenv(name, value)
    assert distributed.command("uv run sft.py --name a") == (
        "uv run torchrun --nproc-per-node 2 --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 "
        "--master-port 29500 sft.py --name a"
    )


def read_power(rank: int, port: int, folder: Path) -> None:
    """What a process of two notes of its power, of which the first alone has a counter."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cpu = torch.device("cpu")
    with distributed.group("cpu"):
        power = Power(cpu)
        power.meter.joules = lambda: None if rank else 5.0
        figures = power.figures(Progress())
        stopping = distributed.largest([float(rank), 0.5], cpu)
    (folder / f"{rank}").write_text(json.dumps([sorted(figures), stopping]))


def test_a_process_without_an_energy_counter_keeps_no_other_waiting(tmp_path: Path) -> None:
    context, port = multiprocessing.get_context("forkserver"), free_port()
    ranks = [context.Process(target=read_power, args=(r, port, tmp_path)) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
    waiting = [rank.is_alive() for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert waiting == [False, False]
    # half of the energy would pass for the whole
    assert [json.loads((tmp_path / f"{r}").read_text()) for r in range(2)] == [[[], [1.0, 0.5]]] * 2


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

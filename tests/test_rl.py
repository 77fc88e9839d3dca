"""Reinforcement learning as a person runs it: own problems and reward, killed, by two processes."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import stages
import torch
from training.test_distributed import free_port

import rl
from config import FINE_TUNING, PRESETS, Config, Stage, UserError
from hearth import run
from hearth.data.chat_format import render
from hearth.data.tokenizer import Tokenizer
from hearth.training import checkpoint
from hearth.training.batches import Batch
from hearth.training.gradients import accumulate
from hearth.training.optim import build_optimizers
from model import build_model

JUDGE = "def reward(problem, answer):\n    return (len(answer) + len(problem.prompt)) % 3 / 2\n"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder whose run is fine-tuned a little, and the words that practise on it."""
    folder = tmp_path_factory.mktemp("tuned")
    rng, numbers = random.Random(0), ["one", "two", "three", "four", "five"]
    asked = [" ".join(rng.choices(numbers, k=4)) for _ in range(60)]
    rows = [
        {"question": q, "answer": " ".join(q.split()[: 1 + n % 3])} for n, q in enumerate(asked)
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "judge.py").write_text(JUDGE)
    config = replace(
        PRESETS["demo"],
        runs=str(folder),
        device="cpu",
        data=replace(PRESETS["demo"].data, text_files=(str(folder / "chat.jsonl"),)),
        model=replace(
            PRESETS["demo"].model,
            **{"vocab_size": 384, "d_model": 32, "d_ff": 48, "context": 64, "window": 16},
        ),
        pretrain=replace(PRESETS["demo"].pretrain, stages=(Stage(64, 1.0),)),
        mid=replace(PRESETS["demo"].mid, context=64, epochs=0),
        sft1=replace(PRESETS["demo"].sft1, context=64),
        sft2=replace(PRESETS["demo"].sft2, context=64),
        report=replace(PRESETS["demo"].report, draw=False),
    )
    with run.working_on(config, makes=["sft2"], creates=True) as work:
        work.begin("sft2", {})
        fine_tune(config, rows)
    small = {
        "rl.files": folder / "chat.jsonl",
        "rl.reward": folder / "judge.py",
        "rl.steps": 6,
        "rl.prompts_per_step": 4,
        "rl.samples_per_prompt": 4,
        "rl.max_tokens": 16,
        "rl.n_held_out": 4,
        "rl.test_every_steps": 2,
        "rl.micro_batch_tokens": 128,
        "rl.save_every_minutes": 0,
    }
    more = [str(word) for name, value in small.items() for word in (f"--{name}", value)]
    return folder, ["--preset", "demo", *more]


def fine_tune(config: Config, rows: list[dict[str, str]]) -> None:
    """A checkpoint of a tiny model that answers in a few words and stops."""
    tokenizer = Tokenizer.train([" ".join(row.values()) for row in rows], 384)
    model = build_model(config.model, seed=0)
    optimizers = build_optimizers(model, config.optim, 1e-2)
    for step in range(60):
        ids, loss = [], []
        for row in rows[step % 4 :: 4]:
            turns = [("user", row["question"]), ("assistant", row["answer"])]
            rendered = render([{"role": r, "content": c} for r, c in turns], tokenizer)
            ids += rendered.ids
            loss += rendered.loss
        n = (len(ids) - 1) // 64 * 64
        tokens, weights = torch.tensor(ids[: n + 1]), torch.tensor(loss[: n + 1]).float()
        starts = tokens[:-1] == tokenizer.bos
        accumulate(model, Batch(tokens[:-1], tokens[1:], weights[1:], starts, 64), n)
        optimizers.step()
        optimizers.zero_grad()
    state = {"stage": "sft2", "step": 60, "steps": 60, "tokens": 0}
    folder = config.run_dir / "sft2"
    checkpoint.save(folder, model, optimizers, config, tokenizer, state, keep=1)


def copied(folder: Path, target: Path) -> Path:
    stages.copy_run(folder / "demo", target / "demo", "sft2")
    return target / "demo"


@pytest.fixture(scope="module")
def unbroken(
    tuned: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run that practised without a break, and what it said."""
    folder, words = tuned
    target = tmp_path_factory.mktemp("unbroken")
    here = copied(folder, target)
    assert stages.run("rl.py", [*words, "--runs", str(target)], target / "said") == 0, (
        target / "said"
    ).read_text()
    return here, (target / "said").read_text()


def test_it_says_what_it_practises_and_notes_what_it_brought(unbroken: tuple[Path, str]) -> None:
    here, said = unbroken
    for part in ("before", "after", "practised   own", "reward", "held out at step 0", "best"):
        assert part in said, said
    results = json.loads((here / "rl" / "results.json").read_text())
    for when in ("before", "after"):
        own = results[when]["environments"]["own"]
        assert 0 <= own["pass@1"][0] <= own["pass@4"][0] <= own["pass@16"][0] <= 1
        assert own["samples"]
    records = [json.loads(x) for x in (here / "rl" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 2, 4, 6]
    assert max(record["mismatch"] for record in steps) < 1e-4
    assert any(record["told_groups"] for record in steps)


def test_the_last_checkpoint_holds_the_weights_that_did_best(unbroken: tuple[Path, str]) -> None:
    here, _ = unbroken
    best = json.loads((here / "rl" / "best.json").read_text())
    last = run.newest(here / "rl")
    state = checkpoint.read_state(last)
    assert state["stage"] == "rl"
    assert state["weights_of_step"] == best["step"]
    start = Path(json.loads((here / "config.json").read_text())["stages"]["rl"]["starts_from"])
    kept = here / "rl" / "best" if best["step"] else start
    name = "model.safetensors"
    assert (last / name).read_bytes() == (kept / name).read_bytes()
    settings = replace(run.load_settings(here), runs=str(here.parent), name="demo")
    assert run.find_checkpoint(None, settings) == last


def test_started_again_it_is_done(
    unbroken: tuple[Path, str], tuned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    (here, _), (_, words) = unbroken, tuned
    before = stages.weights(here, "rl")
    assert stages.run("rl.py", [*words, "--runs", str(here.parent)], tmp_path / "said") == 0
    assert stages.weights(here, "rl") == before
    assert "step 1/" not in (tmp_path / "said").read_text()


def test_killed_at_random_moments_it_ends_like_an_unbroken_one(
    unbroken: tuple[Path, str], tuned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    (here, _), (folder, words) = unbroken, tuned
    mine, rng = copied(folder, tmp_path), random.Random("rl")
    words, killed = [*words, "--runs", str(tmp_path)], 0
    while killed < 12:
        process = stages.start("rl.py", words, tmp_path / "said")
        process.join(rng.uniform(0.5, 3.0))
        if process.exitcode is not None:
            assert process.exitcode == 0, (tmp_path / "said").read_text()
            break
        process.kill()
        process.join()
        killed += 1
    assert stages.run("rl.py", words, tmp_path / "said") == 0, (tmp_path / "said").read_text()
    assert killed > 0
    assert stages.weights(mine, "rl") == stages.weights(here, "rl")
    assert losses(mine) == losses(here)
    names = ("best.json", "results.json")
    assert [(mine / "rl" / n).read_text() for n in names] == [
        (here / "rl" / n).read_text() for n in names
    ]


def losses(here: Path) -> list[float]:
    records = [json.loads(x) for x in (here / "rl" / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "step"]


def test_two_processes_practise_like_one(
    unbroken: tuple[Path, str], tuned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """What is drawn is the same; sums of floats in another order may change a later draw."""
    (here, _), (folder, words) = unbroken, tuned
    mine = copied(folder, tmp_path)
    port, ranks = free_port(), []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = tmp_path / f"said.{rank}"
        ranks.append(stages.start("rl.py", [*words, "--runs", str(tmp_path)], output, place))
    for process in ranks:
        process.join()
    assert [p.exitcode for p in ranks] == [0, 0], (tmp_path / "said.0").read_text()
    assert (tmp_path / "said.1").read_text() == ""
    assert len(losses(mine)) == 6
    assert losses(mine)[:2] == pytest.approx(losses(here)[:2], abs=1e-5)


def test_a_reward_that_was_changed_makes_the_stage_stale(
    unbroken: tuple[Path, str], tuned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    (here, _), (_, words) = unbroken, tuned
    target = tmp_path / "runs"
    shutil.copytree(here.parent, target)
    (tmp_path / "judge.py").write_text(JUDGE + "# another\n")
    words = [str(tmp_path / "judge.py") if w.endswith("judge.py") else w for w in words]
    assert stages.run("rl.py", [*words, "--runs", str(target)], tmp_path / "said") == 2
    said = (tmp_path / "said").read_text()
    assert "reward" in said
    assert "--redo rl" in said


def test_without_a_finished_fine_tuning_the_command_that_makes_it_is_named(tmp_path: Path) -> None:
    config = replace(PRESETS["demo"], runs=str(tmp_path), name="empty")
    config.run_dir.mkdir(parents=True)
    with (
        run.working_on(config, makes=["rl"]) as work,
        pytest.raises(UserError, match=r"holds no finished checkpoint\. Run `uv run sft\.py"),
    ):
        rl.last_fine_tuning(config, work)


def test_it_starts_from_the_last_stage_that_the_run_has(tmp_path: Path) -> None:
    without = {name: replace(getattr(PRESETS["demo"], name), epochs=0) for name in FINE_TUNING}
    config = replace(PRESETS["demo"], runs=str(tmp_path), name="some", **without)
    config.run_dir.mkdir(parents=True)
    with run.working_on(config, makes=["rl"]) as work:
        with pytest.raises(UserError, match="has no conversations"):
            rl.last_fine_tuning(config, work)
        config = replace(config, sft1=PRESETS["demo"].sft1)
        with pytest.raises(UserError, match=r"starts from .*sft1, which holds no"):
            rl.last_fine_tuning(config, work)


def test_weights_that_practice_only_made_worse_are_not_kept(tmp_path: Path) -> None:
    start, folder = tmp_path / "start", tmp_path / "rl"
    for place, weights in ((start, "first"), (folder / "step-00000002", "worse")):
        place.mkdir(parents=True)
        (place / "model.safetensors").write_text(weights)
    (folder / "step-00000002" / "state.json").write_text(
        json.dumps({"stage": "rl", "step": 2, "steps": 2, "tokens": 9})
    )
    (folder / "best.json").write_text('{"step": 0, "right": 0.5, "looked": 2}')
    exam = object.__new__(rl.Exam)
    exam.start, exam.folder = start, folder
    exam.keep_best()
    assert (folder / "step-00000002" / "model.safetensors").read_text() == "first"


def test_the_environments_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    rl.main(*rl.SCRIPT.parse(["--preset", "demo", "--list"]))
    assert "new sums" in capsys.readouterr().out

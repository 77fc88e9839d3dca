"""What reinforcement learning brings on a demo run, beside two controls that get the same samples.

    rl         advantages: what `uv run rl.py` does
    kept       rejection-sampled fine-tuning: the right answers, each with the same weight
    shuffled   advantages of rewards that were shuffled among a group's answers

In: a run whose fine-tuning is finished. First pass@1 of every environment is measured on the test
problems; the demo preset's are practised, and it has to lie between 5 and 70% there. A row is an
arm on one of these with a seed: `rl.py`'s own stage in a process of its own, on a copy of
the run. Its result is a line of OUT/results.jsonl; rows that are there are skipped.

    uv run benchmarks/rl.py OUT --run runs/demo
        every row that is missing, then the tables
    uv run benchmarks/rl.py OUT --run runs/demo --table
        the tables, from what is there
    uv run benchmarks/rl.py OUT --run runs/demo --figure FILE.png
        pass@1 on held-out problems against minutes
    uv run benchmarks/rl.py OUT --run runs/demo --decode
        how fast rows decode together, and the engine's log-probabilities against training's

One thread a process (OMP_NUM_THREADS=1); minutes are CPU minutes of it, so neighbours hardly count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rl
from config import PRESETS, Config, UserError
from hearth import log, run
from hearth.cli import run_script
from hearth.decoding.engine import Engine, Sampling
from hearth.evaluation.pass_at_k import measure
from hearth.training import checkpoint
from hearth.training.rewards import ENVIRONMENTS
from hearth.training.rollouts import Player, Teach, advantages

LEAST, MOST = 0.05, 0.70  # pass@1 before, of what is practised
SEEDS = (0, 1, 2)
N_PROBLEMS = 64
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------- arms


def kept(rewards: list[float]) -> list[float]:
    """One for every right answer, nothing for the others."""
    return [float(reward >= 1) for reward in rewards]


def shuffled(seed: int) -> Teach:
    """Advantages that belong to other answers of the group."""
    rng = random.Random(seed)

    def teach(rewards: list[float]) -> list[float]:
        return advantages(rng.sample(rewards, len(rewards)))

    return teach


def teaching(arm: str, seed: int) -> Teach:
    return {"rl": advantages, "kept": kept}.get(arm) or shuffled(seed)


# ------------------------------------------------------------------------------------------- rows


def before(start: Path) -> dict[str, float]:
    """pass@1 of every environment's test problems."""
    loaded = checkpoint.load_for_inference(start)
    player, found = Player(loaded.model, loaded.tokenizer, loaded.config.rl.max_tokens), {}
    for name, environment in ENVIRONMENTS.items():
        result = measure(player, environment, environment.fixed("test", N_PROBLEMS, 0), rl.SAMPLES)
        found[name] = result.pass_at(1).value
        log.say(f"before      {name}: {rl.described(result)}")
    return found


def practised(found: dict[str, float]) -> list[str]:
    """The demo preset's environments; raises UserError where one is too easy or too hard before."""
    names = list(PRESETS["demo"].rl.environments)
    if any(not LEAST <= found[name] <= MOST for name in names):
        said = ", ".join(f"{name} {found[name]:.1%}" for name in names)
        raise UserError(f"Before: {said}. Must lie between {LEAST:.0%} and {MOST:.0%}.")
    return names


def rows(names: Sequence[str]) -> Iterator[Row]:
    """The rows in the order in which they are worth having."""
    seeds = [(seed, "rl") for seed in SEEDS]
    seeds += [(seed, arm) for seed in SEEDS for arm in ("kept", "shuffled")]
    for seed, arm in seeds:
        for name in names:
            yield {"environment": name, "arm": arm, "seed": seed}


def practise(row: Row, source: Path, out: Path, steps: int | None) -> None:
    """One row, in this process; its result joins OUT/results.jsonl. As many steps as the run's
    settings say, or `steps`.
    """
    started, name = time.process_time(), f"{row['arm']}-{row['seed']}-{row['environment']}"
    config = run.load_settings(source)
    if config is None:
        raise UserError(f"{source} is no run.")
    steps = steps or config.rl.steps
    settings = replace(config.rl, environments=(row["environment"],), steps=steps)
    config = replace(
        config,
        **{"runs": str(out), "name": name.replace(" ", "-"), "seed": row["seed"], "rl": settings},
        report=replace(config.report, draw=False),
    )
    copy(source, config)
    curve: list[tuple[float, float]] = []
    looked = rl.Exam.look

    def look(exam: rl.Exam) -> dict[str, float]:
        spent, figures = (time.process_time() - started) / 60, looked(exam)
        curve.append((spent, statistics.fmean(figures.values())))
        return figures

    rl.Exam.look = look
    with run.working_on(config, makes=["rl"]) as work:
        teach = teaching(row["arm"], row["seed"])
        environments = [ENVIRONMENTS[row["environment"]]]
        rl.practise(config, environments, rl.last_fine_tuning(config, work), work, teach=teach)
    results = json.loads((config.run_dir / "rl" / rl.RESULTS).read_text(encoding="utf-8"))
    noted = [
        r for r in log.read_metrics(config.run_dir / "rl/metrics.jsonl") if r["kind"] == "step"
    ]
    names = ("rollout_share", "mismatch", "dead_groups", "entropy")
    figures = {n: statistics.fmean(step[n] for step in noted) for n in names}
    figures["mismatch"] = max(step["mismatch"] for step in noted)
    spent = (time.process_time() - started) / 60
    result = {**row, "minutes": spent, "steps": steps, "curve": curve, **figures, **results}
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def copy(source: Path, config: Config) -> None:
    """A run of its own with what the stage reads of `source`, which stays as it is."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    for part in ("sft2", "tokenizer", "chat_tokens"):
        if not (config.run_dir / part).exists() and (source / part).exists():
            os.symlink((source / part).resolve(), config.run_dir / part)
    record = json.loads((source / run.SETTINGS).read_text(encoding="utf-8"))
    record["stages"] = {}
    (config.run_dir / run.SETTINGS).write_text(json.dumps(record), encoding="utf-8")


def results_of(out: Path) -> list[Row]:
    path = out / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------- what is told


def table(out: Path) -> None:
    """A row for each environment and arm: pass@1 before and after with every seed, what it cost."""
    found = results_of(out)
    print("| environment | arm | before | after, by seed | mean | minutes | other kinds |")
    print("|---|---|---|---|---|---|---|")
    for name, arm in dict.fromkeys((r["environment"], r["arm"]) for r in found):
        mine = sorted(
            (r for r in found if (r["environment"], r["arm"]) == (name, arm)),
            key=lambda r: r["seed"],
        )
        first, after = (
            [r[when]["environments"][name]["pass@1"][0] for r in mine]
            for when in ("before", "after")
        )
        minutes = statistics.fmean(r["minutes"] for r in mine)
        lost = [round(100 * difference(r, "world"), 1) for r in mine]
        by_seed = ", ".join(f"{value:.1%}" for value in after)
        print(
            f"| {name} | {arm} | {first[0]:.1%} | {by_seed} | {statistics.fmean(after):.1%} "
            f"| {minutes:.1f} | {', '.join(f'{x:+.1f}' for x in lost)} |"
        )
    share = statistics.fmean(r["rollout_share"] for r in found)
    print(f"rollouts: {share:.0%} of a step's time; ", end="")
    print(f"largest mismatch of log-probabilities {max(r['mismatch'] for r in found):.1e}")


def difference(row: Row, name: str) -> float:
    """How much a figure that was not practised changed."""
    return row["after"]["elsewhere"][name] - row["before"]["elsewhere"][name]


def figure(out: Path, path: Path) -> None:
    """pass@1 on held-out problems over the CPU minutes of the whole command, an arm a colour."""
    from matplotlib.figure import Figure

    found = results_of(out)
    names = list(dict.fromkeys(r["environment"] for r in found))
    drawn = Figure((5 * len(names), 3.6), layout="constrained")
    axes = drawn.subplots(1, len(names), squeeze=False, sharey=True)[0]
    colours = {"rl": "C0", "kept": "C1", "shuffled": "0.6"}
    for name, axis in zip(names, axes, strict=True):
        told: set[str] = set()
        for r in (r for r in found if r["environment"] == name):
            label = None if r["arm"] in told else r["arm"]
            told.add(r["arm"])
            x, y = zip(*r["curve"], strict=True)
            axis.plot(x, y, color=colours[r["arm"]], label=label, alpha=0.8)
        axis.set(title=name, xlabel="CPU minutes", ylabel="pass@1, held out", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    drawn.savefig(path, dpi=110)


def decode(start: Path) -> None:
    """Tokens a second of answers decoded together, with the weights as they are trained."""
    loaded = checkpoint.load_for_inference(start)
    player, environment = Player(loaded.model, loaded.tokenizer, 128), ENVIRONMENTS["new sums"]
    problems = environment.fixed("train", 64, 0)
    prompts = [player.prompt(problem) for problem in problems]
    looks = {"max_tokens": 128, "stop_ids": [loaded.tokenizer.end]}
    looks |= {"sampling": Sampling(temperature=1.0), "logprobs": True}
    single = 0.0
    for n_rows in (1, 16, 64, 128):
        asked = prompts[: max(8, n_rows)] * max(1, n_rows // len(prompts))
        seconds, n = [], 0
        for _ in range(3):
            began = time.process_time()
            engine = Engine(loaded.model, max_rows=n_rows)
            n = sum(len(r.ids) for r in engine.complete(asked, **looks))
            seconds.append(time.process_time() - began)
        speed = n / min(seconds)
        single = single or speed
        print(f"{n_rows:>4} rows: {speed:8.0f} tokens/s, {speed / single:5.1f} × one row")


# ------------------------------------------------------------------------------------------- main


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("out", type=Path, help="folder of the results")
    words.add_argument("--run", type=Path, required=True, help="a run with a finished sft2")
    words.add_argument("--table", action="store_true", help="print the tables only")
    words.add_argument("--figure", type=Path, help="draw the figure only")
    words.add_argument("--decode", action="store_true", help="time decoding only")
    words.add_argument("--steps", type=int, help="in place of the run's rl.steps")
    words.add_argument("--row", help="one row, as JSON: what the others are started with")
    options = words.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start = options.run / "sft2"
    if options.row:
        practise(json.loads(options.row), options.run, options.out, options.steps)
    elif options.decode:
        decode(start)
    elif options.figure:
        figure(options.out, options.figure)
    else:
        if not options.table:
            work(options.run, options.out, options.steps)
        table(options.out)


def work(source: Path, out: Path, steps: int | None) -> None:
    """Every row that is missing, each in a process of its own."""
    known = out / "before.json"
    if not known.is_file():
        known.write_text(json.dumps(before(source / "sft2")), encoding="utf-8")
    names = practised(json.loads(known.read_text(encoding="utf-8")))
    log.say(f"practised: {', '.join(names)}")
    done = [{n: r[n] for n in ("environment", "arm", "seed")} for r in results_of(out)]
    for row in rows(names):
        if row not in done:
            log.say(f"── {row}")
            command = [sys.executable, __file__, str(out), "--run", str(source)]
            command += ["--steps", str(steps)] if steps else []
            subprocess.run([*command, "--row", json.dumps(row)], check=True)


if __name__ == "__main__":
    run_script(main)

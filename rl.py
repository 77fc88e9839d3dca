"""Reinforcement learning: the model answers problems that a program can judge, and learns from what
was right.

In: the last fine-tuning's checkpoint, or another. Out: runs/<preset>/rl/ with step-*/ and
metrics.jsonl; its last checkpoint holds the weights that did best on held-out problems.

    uv run rl.py --preset demo
    uv run rl.py --preset demo --list
        the environments there are
    uv run rl.py --name mine --rl.files problems.jsonl --rl.reward judge.py
        your own problems; judge.py holds `def reward(problem, answer) -> float`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from config import FINE_TUNING, Config, UserError, settled
from hearth import cli, hardware, log, run
from hearth.data.chat_format import CHAT_TEMPLATE
from hearth.data.token_shards import TokenShards
from hearth.evaluation import chat_tasks
from hearth.evaluation.pass_at_k import Result, measure
from hearth.evaluation.scores import Bench
from hearth.reporting.report import refresh
from hearth.storage import checksum, read_json, replace_file, replace_folder, write_json
from hearth.training import checkpoint, distributed, rewards
from hearth.training.batches import held_out_conversations
from hearth.training.checkpoint import Loaded
from hearth.training.held_out import evaluate_loss
from hearth.training.loop import fit_stage
from hearth.training.rewards import Environment
from hearth.training.rollouts import Player, Rollouts, Teach, advantages
from model import build_model

WEIGHTS, BEST, RESULTS = "model.safetensors", "best.json", "results.json"


@dataclass(frozen=True)
class Options:
    """What only this script knows."""

    # start from this checkpoint: a run, a stage, or a folder; None is the last fine-tuning
    from_: str | None = None
    redo: Literal["rl"] | None = None  # remove this stage, practise again
    list_: bool = False  # name the environments, and do nothing


SCRIPT = cli.Script(
    __doc__, Options(), ("seed", "device", "compile", "optim", "rl"), keywords=("from", "list")
)
SAMPLES = 16  # answers to each problem where pass@k is measured
KS = (1, 4, 16)  # of pass@k
N_QUESTIONS = 200  # about the demo's world
LOOKS = 4  # answers to each held-out problem on the way


def main(config: Config, options: Options) -> None:
    """Practise, look at held-out problems on the way, keep the weights that did best on them."""
    if options.list_:
        log.say("\n".join(rewards.listing()))
        return
    environments = rewards.chosen(config.rl)
    start = run.find_checkpoint(options.from_, config) if options.from_ else None
    working = run.working_on(config, makes=["rl"], redo=options.redo, creates=start is not None)
    with distributed.group(config.device), working as work:
        practise(config, environments, start or last_fine_tuning(config, work), work)
    log.say(f"Next: {run.command(config, 'chat_inference.py')}")


def practise(
    config: Config,
    environments: Sequence[Environment],
    start: Path,
    work: run.Run,
    *,
    teach: Teach = advantages,
) -> None:
    """The stage; continue if its folder holds a checkpoint. `teach` as in `Rollouts`."""
    folder = config.run_dir / "rl"
    judged = rewards.fingerprint(config.rl)
    work.begin("rl", {"weights": checksum(start / WEIGHTS), **judged}, starts_from=str(start))
    device = hardware.pick_device(config.device)
    before = checkpoint.load_for_inference(start)
    tokenizer, lr = before.tokenizer, settled(before.config).sft2.lr
    config = replace(config, model=before.config.model)
    model = build_model(config.model, seed=config.seed, device=device)
    if hardware.compiles(config.compile, device):
        model.compile_blocks()
    model.load_state_dict(before.model.state_dict())
    rollouts = Rollouts(model, tokenizer, environments, config.rl, seed=config.seed, teach=teach)
    exam = Exam(config, environments, rollouts, start, folder)
    if log.is_first():
        with distributed.alone():
            exam.sit("before", start)
    if (newest := run.newest(folder)) is not None:
        rollouts.load_state(checkpoint.read_state(newest)["rollouts"])
    announce(start, environments, rollouts)
    if not checkpoint.is_finished(folder) or exam.behind():
        fit_stage(
            config,
            "rl",
            model,
            rollouts,
            tokenizer,
            evaluate=exam.look,
            sample=list,
            command=distributed.command(run.command(config, "rl.py")),
            files={"tokenizer/chat_template.jinja": CHAT_TEMPLATE},
            loop=config.rl.loop(lr, config.model.context),
            state_of_batches=lambda: {"rollouts": rollouts.state()},
            figures=rollouts.figures,
            looks_before=True,
        )
    if log.is_first():
        with distributed.alone():
            exam.keep_best()
            exam.sit("after", run.newest(folder))
            refresh(config)


def last_fine_tuning(config: Config, work: run.Run) -> Path:
    """The checkpoint that the stage starts from; raises UserError where it is not finished."""
    before = ["base", *run.fine_tuning(config)][-1]
    folder, begun = config.run_dir / before, work.begun("rl")
    if begun is not None and not folder.exists() and Path(begun["starts_from"]).is_dir():
        return Path(begun["starts_from"])  # of another run
    if before == "base":
        raise UserError(
            f"Reinforcement learning starts from a model that was fine-tuned: {config.run_dir} has "
            "no conversations. Give it some, as with --sft1.files, or start --from another run."
        )
    if not checkpoint.is_finished(folder):
        command = run.command(config, run.STAGES[before].script)
        raise UserError(
            f"Reinforcement learning starts from {folder}, which holds no finished checkpoint. "
            f"Run `{command}`."
        )
    return run.newest(folder)


def announce(start: Path, environments: Sequence[Environment], rollouts: Rollouts) -> None:
    """What is about to happen, on the console."""
    c = rollouts.config
    named = ", ".join(f"{e.name} ({len(e.kinds)} kinds)" for e in environments)
    log.say(f"stage       reinforcement learning, from {start}")
    log.say(f"practised   {named}")
    log.say(
        f"a step      {c.prompts_per_step} problems × {c.samples_per_prompt} answers of at most "
        f"{c.max_tokens} tokens"
    )


class Exam:
    """What the model makes of problems that it never practises, and of all else.

    rl/results.json   pass@k on test problems, samples and other skills, before and after
    rl/best/          the checkpoint that did best on held-out problems
    rl/best.json      its step, its share of right answers, the last step that was looked at
    """

    def __init__(
        self,
        config: Config,
        environments: Sequence[Environment],
        rollouts: Rollouts,
        start: Path,
        folder: Path,
    ) -> None:
        self.config, self.environments = config, environments
        self.start, self.folder = start, folder
        self.player = rollouts.player
        self.problems = {
            (e.name, split): e.fixed(split, config.rl.n_held_out, config.seed)
            for e in environments
            for split in rewards.SPLITS
        }

    def look(self) -> dict[str, float]:
        """Held-out figures on the way; remembers the best checkpoint."""
        found = {
            e.name: self._measured(self.player, e, "held out", LOOKS) for e in self.environments
        }
        figures = {f"pass@1 {name}": r.pass_at(1).value for name, r in found.items()}
        self._remember(sum(figures.values()) / len(figures))
        return figures

    def _measured(self, player: Player, environment: Environment, split: str, n: int) -> Result:
        return measure(player, environment, self.problems[environment.name, split], n)

    def _remember(self, right: float) -> None:
        """Keep the checkpoint just saved where no other did better, nor that of step 0, which is
        the start's.
        """
        newest = run.newest(self.folder)
        step = checkpoint.read_state(newest)["step"] if newest else 0
        best = read_json(self.folder / BEST) if step else {}
        if not best or right > best["right"]:
            best = {"step": step, "right": right}
            if newest is not None:
                replace_folder(newest, self.folder / "best")
        write_json(self.folder / BEST, {**best, "looked": step})

    def behind(self) -> bool:
        """Whether the last checkpoint was not looked at: a kill came between."""
        best, newest = self.folder / BEST, run.newest(self.folder)
        looked = read_json(best)["looked"] if best.is_file() else -1
        return newest is None or looked < checkpoint.read_state(newest)["step"]

    def keep_best(self) -> None:
        """The weights that did best become those of the last checkpoint."""
        last, best = run.newest(self.folder), read_json(self.folder / BEST)
        state = checkpoint.read_state(last)
        if "weights_of_step" in state:
            return
        if best["step"] != state["step"]:
            kept = self.folder / "best" if best["step"] else self.start
            replace_file(kept / WEIGHTS, last / WEIGHTS)
        write_json(last / "state.json", {**state, "weights_of_step": best["step"]})
        said = (
            f"step {best['step']} of {state['step']}: {best['right']:.1%} of held-out answers right"
        )
        log.say(f"best        {said}")

    # ------------------------------------------------------------------------- before and after

    def sit(self, when: str, folder: Path) -> None:
        """Note what a checkpoint makes of test problems, and of what it could do before."""
        path = self.folder / RESULTS
        results = read_json(path) if path.is_file() else {}
        if when in results:
            return
        loaded = checkpoint.load_for_inference(folder, self.player.model.device)
        player = replace(self.player, model=loaded.model)
        found = {e.name: self._measured(player, e, "test", SAMPLES) for e in self.environments}
        for name, result in found.items():
            log.say(f"{when:<12}{name}: {described(result)}")
        results[when] = {
            "environments": {name: noted(result) for name, result in found.items()},
            "elsewhere": elsewhere(loaded, self.config),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, results)


def described(result: Result) -> str:
    """A result in words."""
    shares = [(k, result.pass_at(k)) for k in KS]
    told = ", ".join(f"pass@{k} {e.value:.1%} ± {e.margin:.1%}" for k, e in shares)
    return f"{told}; stops {result.stops:.0%}, length {result.length:.0f}"


def noted(result: Result, n_shown: int = 4) -> dict[str, Any]:
    """A result as JSON holds it, with the first answers to a few problems."""
    shares = {f"pass@{k}": result.pass_at(k) for k in KS}
    return {
        **{name: [estimate.value, estimate.margin] for name, estimate in shares.items()},
        "problems": len(result.groups),
        "stops": result.stops,
        "length": result.length,
        "tool calls": result.tool_calls(),
        "samples": [
            {"prompt": g.problem.prompt, "expected": g.problem.answer, "said": g.samples[0].text}
            for g in result.groups[:n_shown]
        ],
    }


def elsewhere(loaded: Loaded, config: Config) -> dict[str, float]:
    """What practice may cost: held-out loss of the last fine-tuning, and the demo's own questions,
    where the run has them.
    """
    found: dict[str, float] = {}
    stage = (run.fine_tuning(loaded.config) or list(FINE_TUNING))[-1]
    loop = getattr(loaded.config, stage)
    for source in loaded.config.sets(stage):
        folder = config.run_dir / "chat_tokens" / stage / source.name
        if not (folder / "manifest.json").is_file():
            continue
        shards = TokenShards(folder, "validation", run.command(config, "sft.py"))
        if not shards.n_documents:
            continue
        batches = held_out_conversations(
            shards,
            context=loop.context,
            max_tokens=loop.eval_tokens,
            pad=loaded.tokenizer.pad,
        )
        nats, count = evaluate_loss(loaded.model, batches)
        found[f"loss {source.name}"] = nats / max(1, count)
    if any(source.demo for source in loaded.config.data.corpora()):
        bench = Bench(loaded, config.run_dir, None, config.run_dir, None)
        scores, _ = chat_tasks.world_scores(bench, N_QUESTIONS)
        found |= {score.task: score.value for score in scores if score.metric != "tokens"}
    return found


if __name__ == "__main__":
    cli.run_script(lambda: main(*run.parse(SCRIPT)))

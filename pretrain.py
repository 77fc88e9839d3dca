"""Train the base model on the token shards, at growing context; continue if the run's folder holds
a checkpoint.

In: runs/<preset>/tokens/ and tokenizer/. Out: runs/<preset>/base/step-*/, metrics.jsonl.

    uv run pretrain.py --preset 16gb
    uv run pretrain.py --preset 16gb --plan
        memory, speed and hours, before anything
    uv run pretrain.py --preset 12gb --plan --card "RTX 4070"
        the same for a card that is elsewhere, estimated
    uv run torchrun --nproc-per-node 2 pretrain.py --preset 16gb
        on two cards; README.md, "Several cards", says how on two machines
"""

from __future__ import annotations

import hearth  # noqa: F401  # isort: skip (first: it ends Ctrl-C during the imports in a line)

import math
from dataclasses import dataclass
from typing import Literal

import torch

from config import Config, UserError, predicted_bits_per_byte, settled
from hearth import cli, hardware, log, run
from hearth.data.shard_folder import inputs_of_tokens, is_finished, read_manifest
from hearth.data.token_shards import TokenShards
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Engine, Sampling
from hearth.training import attention, distributed
from hearth.training.batches import PretrainingBatches, validation_batches
from hearth.training.eight_bit import linear_that_pays
from hearth.training.held_out import evaluate_loss, probe_head
from hearth.training.loop import fit_stage, is_done
from hearth.training.optim import build_optimizers
from hearth.training.planning import (
    GIB,
    UTILISATION,
    Plan,
    Row,
    assume_speed,
    card_wanted,
    make_plan,
    measure,
    require_able_machine,
    table,
    time_update,
)
from model import Model, build_model


@dataclass(frozen=True)
class Options:
    """What only this script knows."""

    # measure for about a minute what the run will take, print it, and train nothing
    plan: bool = False
    # with --plan: for this card, wherever it is; all estimated, nothing measured
    card: str | None = None
    # remove the base model and all that follows, train it again
    redo: Literal["base"] | None = None


SCRIPT = cli.Script(
    __doc__,
    Options(),
    ("seed", "device", "compile", "eight_bit", "model", "optim", "pretrain", "report.watts"),
)


def main(config: Config, options: Options) -> None:
    """Train the base model; continue if the run folder holds a checkpoint."""
    if options.card and not options.plan:
        raise UserError(f"--card {options.card!r} is for an estimate: add --plan, or leave it.")
    if options.plan:
        show_plan_of_card(config, options.card) if options.card else show_plan(config)
        return
    working = run.working_on(config, makes=("base",), redo=options.redo)
    with distributed.group(config.device), working as work:
        tokenizer, train, held_out = open_data(config, work)
        work.begin("base", {f"tokens of {s.folder.name}": s.fingerprint for s in train})
        folder = config.run_dir / "base"
        if is_done(folder):
            log.say(f"pretraining: done, {run.newest(folder)}")
        else:
            require_able_machine(config)
            train_base(config, tokenizer, train, held_out)
    log.say(f"Next: {run.command(config, 'sft.py')}")


def train_base(
    config: Config,
    tokenizer: Tokenizer,
    train: list[TokenShards],
    held_out: list[TokenShards],
) -> None:
    """Train to the last step."""
    device = hardware.pick_device(config.device)
    loop, names = settled(config).pretrain, [source.name for source in config.data.corpora()]
    batches = PretrainingBatches(
        train,
        [source.weight for source in config.data.corpora()],
        loop,
        context=config.model.context,
        bos=tokenizer.bos,
        seed=config.seed,
    )
    model = build(config, device)

    def evaluate() -> dict[str, float]:
        figures = {
            f"bpb {name}": bits_per_byte(model, shards, config, tokenizer)
            for name, shards in zip(names, held_out, strict=True)
        }
        return figures | evaluate_head(model, held_out[0], config, tokenizer)

    def sample() -> list[tuple[str, str]]:
        return continue_texts(model, tokenizer, loop.prompts, config.seed)

    announce(config, model, batches)
    fit_stage(
        config,
        "base",
        model,
        batches,
        tokenizer,
        evaluate=evaluate,
        sample=sample,
        command=distributed.command(run.command(config, "pretrain.py")),
    )


def build(config: Config, device: torch.device) -> Model:
    """The untrained model."""
    model = build_model(config.model, seed=config.seed, device=device)
    compiled = hardware.compiles(config.compile, device)
    if compiled:
        model.compile_blocks()
    if config.eight_bit:
        model.multiply_with(
            linear_that_pays(config.eight_bit, config.model, device, model.dtype, compiled)
        )
    return model


def show_plan(config: Config, seconds: float = 50) -> None:
    """Measure the micro-batches that this machine could run and print what the whole run takes with
    each.
    """
    device, loop = hardware.pick_device(config.device), settled(config).pretrain
    process = hardware.memory_in_use(device) if device.type == "cpu" else 0.0
    model = build(config, device)
    attention.pick(model)
    optimizers = build_optimizers(model, config.optim, loop.lr)
    stages = [(stage.context, stage.share) for stage in loop.stages]
    plan = make_plan(model, optimizers, loop, stages=stages, n_steps=loop.steps)
    time_update(plan, model, optimizers)
    measure(plan, plan.rows, model, optimizers, seconds=seconds)
    log.say(
        f"device      {hardware.describe(device)}, computing in "
        f"{str(model.dtype).removeprefix('torch.')}"
    )
    say_plan(config, model, plan, plan.choose(loop.micro_batch_tokens, device))
    log.say(
        "> is what a run takes. Memory is that of tensors, time that of steps alone; – was not "
        "measured."
    )
    if said := card_wanted(config):
        log.say(said)
    if process:
        log.say(f"The process itself takes {process * 1e9 / GIB:.1f} GiB more.")
    if not any(row.watts for row in plan.rows):
        log.say("power       not measured: neither NVML nor RAPL tells it here")


def show_plan_of_card(config: Config, name: str) -> None:
    """Print what the whole run would take on a card that need not be here: estimates alone.

    Raises UserError that lists the known cards for one without figures.
    """
    card, loop = hardware.card_named(name), settled(config).pretrain
    with torch.device("meta"):
        model = Model(config.model)
    model.dtype = torch.bfloat16
    optimizers = build_optimizers(model, config.optim, loop.lr)
    stages = [(stage.context, stage.share) for stage in loop.stages]
    plan = make_plan(model, optimizers, loop, stages=stages, n_steps=loop.steps, card=card)
    assume_speed(plan, model, card)
    log.say(f"device      {name}, {card.gib} GiB, {card.watts} W, not asked: all is estimated")
    # by memory alone: no clock has run
    say_plan(config, model, plan, plan.choose(loop.micro_batch_tokens, torch.device("cpu")))
    log.say(
        f"Estimates: steps at {UTILISATION:.0%} of the peak (what is recomputed included) and at "
        "the board's full power; the memory of tensors, on a card that shows no desktop."
    )
    log.say(
        "> recomputes least and is the largest that fits; a run on the card measures and chooses."
    )


def say_plan(config: Config, model: Model, plan: Plan, chosen: Row) -> None:
    """The plan on the console: model, tokens, peak, and the table."""
    loop = settled(config).pretrain
    log.say(
        f"model       {model.n_parameters():,} parameters, {len(model.block_passes())} block "
        "passes a token"
    )
    log.say(
        f"tokens      {log.count(plan.n_tokens)} in {loop.steps} steps of "
        f"{log.count(loop.tokens_per_step)}"
    )
    bits = predicted_bits_per_byte(config.model.n_weights, plan.n_tokens)
    log.say(
        f"predicted   {bits:.2f} bits per byte of English text, by a law of runs of 1M to 16M "
        "weights"
    )
    log.say(
        f"peak        {plan.peak_flops / 1e12:.3g} TFLOP/s; a run may fill {plan.room / GIB:.1f} "
        "GiB"
    )
    for line in table(plan, chosen, model):
        log.say(line)


def open_data(
    config: Config, work: run.Run
) -> tuple[Tokenizer, list[TokenShards], list[TokenShards]]:
    """The tokenizer, and each corpus' training and held-out shards; `UserError` if they do not
    belong together.
    """
    command = run.command(config, "train_tokenizer.py")
    texts = {source.name: config.run_dir / "text" / source.name for source in config.data.corpora()}
    if all(map(is_finished, texts.values())):  # they may have been removed to make room
        maker = run.command(config, "create_shard.py")
        manifests = {name: read_manifest(folder, maker) for name, folder in texts.items()}
        work.check("tokenizer", inputs_of_tokens(manifests))
    tokenizer = Tokenizer.load(config.run_dir / "tokenizer", command)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size} entries, model.vocab_size is "
            f"{config.model.vocab_size}."
        )
    folders = [config.run_dir / "tokens" / source.name for source in config.data.corpora()]
    train, held_out = (
        [TokenShards(folder, split, command) for folder in folders]
        for split in ("train", "validation")
    )
    for shards in train:
        if shards.tokenizer_hash != tokenizer.hash:
            raise work.stale("tokenizer", [f"{shards.folder} was made with another tokenizer"])
    return tokenizer, train, held_out


def bits_per_byte(model: Model, shards: TokenShards, config: Config, tokenizer: Tokenizer) -> float:
    """Held-out cross-entropy in bits per byte of text, whatever the tokenizer; ends of documents
    are counted too.
    """
    loop = settled(config).pretrain
    batches = list(
        validation_batches(
            shards,
            context=config.model.context,
            max_tokens=loop.eval_tokens,
            micro_tokens=loop.micro_batch_tokens or 4 * config.model.context,
            bos=tokenizer.bos,
        )
    )
    nats, _ = evaluate_loss(model, batches)
    n_bytes = sum(
        int(tokenizer.token_bytes[b.targets[b.weights > 0].numpy()].sum()) for b in batches
    )
    return nats / math.log(2) / max(1, n_bytes)


def evaluate_head(
    model: Model, shards: TokenShards, config: Config, tokenizer: Tokenizer
) -> dict[str, float]:
    """What the HRM head does to the first held-out row; nothing for a dense model."""
    context = config.model.context
    rows = validation_batches(
        shards, context=context, max_tokens=context, micro_tokens=context, bos=tokenizer.bos
    )
    batch = next(rows).to(model.device)
    attn_ctx = attention.packed(model, batch.starts, batch.row_length)
    return probe_head(model, batch.ids, batch.targets, batch.weights, attn_ctx)


def continue_texts(
    model: Model, tokenizer: Tokenizer, prompts: tuple[str, ...], seed: int
) -> list[tuple[str, str]]:
    """What the model writes after each prompt: up to 60 tokens at temperature 0.7."""
    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    answers = Engine(model).generate(
        ids,
        max_tokens=60,
        stop_ids=[tokenizer.bos],
        sampling=Sampling(temperature=0.7, top_p=0.95),
        seeds=[seed + i for i in range(len(ids))],
    )
    written = (tokenizer.decode(id for id in answer if id != tokenizer.bos) for answer in answers)
    return list(zip(prompts, written, strict=True))


def announce(config: Config, model: Model, batches: PretrainingBatches) -> None:
    """What is about to happen, on the console."""
    loop = settled(config).pretrain
    log.say(
        f"model       {model.n_parameters():,} parameters, {len(model.block_passes())} block "
        "passes a token"
    )
    tokens = loop.steps * loop.tokens_per_step
    log.say(
        f"tokens      {log.count(tokens)} in {loop.steps} steps of "
        f"{log.count(loop.tokens_per_step)}"
    )
    curriculum = " → ".join(f"{stage.context} ({stage.share:.0%})" for stage in loop.stages)
    passes = ", ".join(
        f"{source.name} {epochs:.2f}"
        for source, epochs in zip(config.data.corpora(), batches.epochs(), strict=True)
    )
    log.say(f"curriculum  {curriculum}")
    log.say(f"passes      {passes}")


if __name__ == "__main__":
    cli.run_script(lambda: main(*run.parse(SCRIPT)))

"""Train the base model on the token shards, at growing context; continue if the run's folder holds a checkpoint.

In: runs/<preset>/tokens/ and tokenizer/. Out: runs/<preset>/base/step-*/, metrics.jsonl.

    uv run pretrain.py --preset 16gb
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import checkpoint
import config as settings
import hardware
import log
from batches import PretrainingBatches, validation_batches
from config import Config, UserError
from engine import Engine, Sampling
from model import Model, Packed, build_model, compute_dtype, probe_head
from optim import build_optimizers
from report import Reporter, refresh
from shards import TokenShards
from tokenizer import Tokenizer
from training import Job, Progress, evaluate_loss, fit


def main(config: Config) -> None:
    """Train the base model; continue if the run folder holds a checkpoint."""
    folder = config.run_dir / "base"
    if checkpoint.is_finished(folder):
        log.say(f"pretraining: done, {checkpoint.newest(folder)}")
        return
    device = hardware.pick_device(config.device)
    tokenizer, train, held_out = open_data(config)
    loop, names = config.pretrain, [source.name for source in config.data.corpora()]
    batches = PretrainingBatches(
        train,
        [source.weight for source in config.data.corpora()],
        loop,
        context=config.model.context,
        bos=tokenizer.bos,
        seed=config.seed,
    )
    model = build_model(config.model, seed=config.seed, device=device)
    model.dtype = compute_dtype(device)
    if hardware.compiles(config.compile, device):
        model.compile_blocks()
    optimizers = build_optimizers(model, config.optim, loop.lr, round(loop.steps * loop.warmup_share))
    state = checkpoint.resume(folder, model, optimizers, config, "pretrain")
    progress = Progress.of(state)
    data = {shards.folder.name: shards.fingerprint for shards in train}
    if state and state["data"] != data:
        raise UserError(
            f"The token shards have changed since {checkpoint.newest(folder)} was trained. Bring them back, or remove "
            f"{folder} to begin anew."
        )

    def save(figures: dict[str, Any]) -> Path:
        facts = {"stage": "base", **figures, "data": data}
        return checkpoint.save(folder, model, optimizers, config, tokenizer, facts, loop.keep_checkpoints)

    def evaluate() -> dict[str, float]:
        figures = {
            f"bpb {name}": bits_per_byte(model, shards, config, tokenizer)
            for name, shards in zip(names, held_out, strict=True)
        }
        return figures | evaluate_head(model, held_out[0], config, tokenizer)

    def sample() -> list[tuple[str, str]]:
        return continue_texts(model, tokenizer, loop.prompts, config.seed)

    announce(config, model, batches, device, folder, progress)
    job = Job(
        model=model,
        optimizers=optimizers,
        batches=batches,
        loop=loop,
        seed=config.seed,
        folder=folder,
        context=config.model.context,
        save=save,
        evaluate=evaluate,
        sample=sample,
        command=config.command("pretrain.py"),
        after_evaluation=Reporter(config).refresh,
    )
    fit(job, progress)
    refresh(config)
    log.say(f"pretraining: done in {log.duration(progress.seconds)}, {checkpoint.newest(folder)}")


def open_data(config: Config) -> tuple[Tokenizer, list[TokenShards], list[TokenShards]]:
    """The tokenizer, and each corpus' training and held-out shards; `UserError` if they do not belong together."""
    command = config.command("train_tokenizer.py")
    tokenizer = Tokenizer.load(config.run_dir / "tokenizer", command)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size} entries, model.vocab_size is {config.model.vocab_size}."
        )
    folders = [config.run_dir / "tokens" / source.name for source in config.data.corpora()]
    train, held_out = ([TokenShards(folder, split, command) for folder in folders] for split in ("train", "validation"))
    for shards in train:
        if shards.tokenizer_hash != tokenizer.hash:
            raise UserError(
                f"{shards.folder} was made with another tokenizer than {config.run_dir / 'tokenizer'}. Remove "
                f"{config.run_dir / 'tokens'} and run `{command}`."
            )
    return tokenizer, train, held_out


def bits_per_byte(model: Model, shards: TokenShards, config: Config, tokenizer: Tokenizer) -> float:
    """Held-out cross-entropy in bits a byte of text, whatever the tokenizer; ends of documents are counted too."""
    loop = config.pretrain
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
    n_bytes = sum(int(tokenizer.token_bytes[b.targets[b.weights > 0].numpy()].sum()) for b in batches)
    return nats / math.log(2) / max(1, n_bytes)


def evaluate_head(model: Model, shards: TokenShards, config: Config, tokenizer: Tokenizer) -> dict[str, float]:
    """What the HRM head does to the first held-out row; nothing for a dense model."""
    context = config.model.context
    rows = validation_batches(shards, context=context, max_tokens=context, micro_tokens=context, bos=tokenizer.bos)
    batch = next(rows).to(model.device)
    where = Packed(batch.starts, batch.row_length, model.device)
    return probe_head(model, batch.ids, batch.targets, batch.weights, where)


def continue_texts(model: Model, tokenizer: Tokenizer, prompts: tuple[str, ...], seed: int) -> list[tuple[str, str]]:
    """What the model writes after each prompt: up to 60 tokens at temperature 0.7."""
    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    answers = Engine(model).generate(
        ids,
        max_tokens=60,
        stop_ids=[tokenizer.bos],
        sampling=Sampling(temperature=0.7, top_p=0.95),
        seeds=[seed + i for i in range(len(ids))],
    )
    return [(prompt, tokenizer.decode(answer)) for prompt, answer in zip(prompts, answers, strict=True)]


def announce(config: Config, model: Model, batches: Any, device: Any, folder: Path, progress: Progress) -> None:
    """What is about to happen, on the console."""
    loop = config.pretrain
    log.say(f"device      {hardware.describe(device)}, computing in {str(model.dtype).removeprefix('torch.')}")
    log.say(f"model       {model.n_parameters():,} parameters, {len(model.block_passes())} block passes a token")
    tokens = loop.steps * loop.tokens_per_step
    log.say(f"tokens      {log.count(tokens)} in {loop.steps} steps of {log.count(loop.tokens_per_step)}")
    curriculum = " → ".join(f"{stage.context} ({stage.share:.0%})" for stage in loop.stages)
    passes = ", ".join(
        f"{source.name} {epochs:.2f}" for source, epochs in zip(config.data.corpora(), batches.epochs(), strict=True)
    )
    log.say(f"curriculum  {curriculum}")
    log.say(f"passes      {passes}")
    log.say(f"run folder  {folder}" + (f", going on from step {progress.step}" if progress.step else ""))
    log.say(f"report      {config.run_dir / 'report' / 'index.html'}")


if __name__ == "__main__":
    try:
        main(settings.parse_cli(__doc__))
    except UserError as error:
        settings.fail(str(error))

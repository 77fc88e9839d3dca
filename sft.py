"""Fine-tune on conversations, stage by stage: mid, sft1, sft2; continue where a run stopped.

In: the checkpoint of the stage before (of the first one: the base model), runs/<preset>/text/chat/.
Out: runs/<preset>/chat_tokens/, then runs/<preset>/<stage>/ with step-*/ and metrics.jsonl.
A stage without conversations is left out. All stages have the same settings.

    uv run sft.py --preset 16gb                all stages, one after the other
    uv run sft.py --preset 16gb --stage mid    one of them
    uv run sft.py --name mine --stage sft1 --from 16gb --sft1.files chats.jsonl
    uv run torchrun --nproc-per-node 2 sft.py --preset 16gb
        on two cards
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from config import FINE_TUNING, ChatSource, Config, SFTConfig, UserError, settled
from hearth import cli, hardware, log, run
from hearth.data import ingest, sources
from hearth.data.chat_format import (
    CHAT_TEMPLATE,
    Call,
    Message,
    Rendered,
    loss_everywhere,
    parse_answer,
    render,
)
from hearth.data.shard_folder import SPLITS, content_fingerprint, read_manifest
from hearth.data.token_shards import TokenShards, TokenShardWriter
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Engine, Sampling
from hearth.decoding.tools import Tools
from hearth.storage import checksum
from hearth.training import checkpoint, distributed
from hearth.training.batches import ConversationBatches, held_out_conversations
from hearth.training.held_out import evaluate_loss
from hearth.training.loop import fit_stage, is_done
from model import Model, build_model

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Options:
    """What only this script knows."""

    stage: Literal[tuple(FINE_TUNING)] | None = None  # the stage to train; None trains all in order
    # start from this checkpoint: a run, a stage, or a folder; None takes the stage before
    from_: str | None = None
    # remove this stage and what follows, train it again
    redo: Literal[tuple(FINE_TUNING)] | None = None


FIRST, *OTHERS = FINE_TUNING
MOST_ASKED = ("files", "context", "loss", "epochs", "lr")  # of the other stages, in --help
READS = (
    *("seed", "device", "compile", "optim", "chat.name", "chat.owner", FIRST),
    *(f"{stage}.{name}" for stage in OTHERS for name in MOST_ASKED),
)
SCRIPT = cli.Script(__doc__, Options(), READS, keywords=("from",))


def main(config: Config, options: Options) -> None:
    """Train the stages asked for, each from the one before it."""
    start = run.find_checkpoint(options.from_, config) if options.from_ else None
    if start is not None:  # the model is that of the checkpoint, whatever the preset says
        config = replace(config, model=checkpoint.load_for_inference(start).config.model)
    there = run.fine_tuning(config)
    makes, creates = tuple(FINE_TUNING), start is not None
    working = run.working_on(config, makes=makes, redo=options.redo, creates=creates)
    with distributed.group(config.device), working as work:
        for stage in (options.stage,) if options.stage else makes:
            if stage in there:
                train_stage(config, stage, start, work)
                start = None
            else:
                say_left_out(stage)
    script = "chat_inference.py" if stage == makes[-1] else "sft.py"
    log.say(f"Next: {run.command(config, script)}")


def say_left_out(stage: str) -> None:
    """Name a stage that is not walked, and what would make it one."""
    title, option = run.STAGES[stage].title.lower(), f"--{stage}.files"
    log.say(f"{title}: left out, it has no conversations; give it some with {option}")


def train_stage(config: Config, name: str, start: Path | None, work: run.Run) -> None:
    """One stage of fine-tuning; continue if its folder holds a checkpoint."""
    loop: SFTConfig = getattr(settled(config), name)
    sets = config.sets(name)
    start, folders = distributed.from_first(lambda: prepare(config, name, start, work))
    if not folders:
        return
    device = hardware.pick_device(config.device)
    before = checkpoint.load_for_inference(start)
    tokenizer = before.tokenizer
    train, held_out = (
        [TokenShards(f, split, run.command(config, "sft.py")) for f in folders] for split in SPLITS
    )
    weights = [source.weight for source in sets]
    batches = ConversationBatches(train, weights, loop, pad=tokenizer.pad, seed=config.seed)
    model = build_model(before.config.model, seed=config.seed, device=device)
    if hardware.compiles(config.compile, device):
        model.compile_blocks()
    model.load_state_dict(before.model.state_dict())
    asked = probe_prompts(config, name, tokenizer)

    def evaluate() -> dict[str, float]:
        losses = {
            f"loss {s.folder.name}": held_out_loss(model, s, loop, tokenizer)
            for s in held_out
            if s.n_documents
        }
        return losses | probe(model, tokenizer, asked, loop.probe_tokens)

    def sample() -> list[tuple[str, str]]:
        return answer_prompts(model, tokenizer, loop.prompts)

    announce(name, start, batches)
    fit_stage(
        config,
        name,
        model,
        batches,
        tokenizer,
        evaluate=evaluate,
        sample=sample,
        command=distributed.command(run.command(config, "sft.py")),
        files={"tokenizer/chat_template.jinja": CHAT_TEMPLATE},
    )


def prepare(
    config: Config, name: str, start: Path | None, work: run.Run
) -> tuple[Path, list[Path]]:
    """The checkpoint that a stage starts from, and the folders of its chat tokens, made where they
    are not there yet; none where the stage is done.
    """
    loop: SFTConfig = getattr(settled(config), name)
    folder, sets = config.run_dir / name, config.sets(name)
    start = start or stage_before(config, name, work)
    with work.stage(name):
        texts = write_texts(config, name, remake=work.begun(name) is None)
    used = {"weights": checksum(start / WEIGHTS), **texts}
    work.begin(name, used, starts_from=str(start))
    if is_done(folder):
        log.say(f"{run.STAGES[name].title.lower()}: done, {run.newest(folder)}")
        return start, []
    tokenizer = Tokenizer.load(start / "tokenizer")
    with work.stage(name):
        return start, [write_chat_tokens(config, s, loop, tokenizer, name) for s in sets]


def stage_before(config: Config, stage: str, work: run.Run) -> Path:
    """The checkpoint that a stage starts from: where it was begun that one, otherwise the end of
    the stage before.

    Raises UserError where that is unfinished or stale, with the command that makes it.
    """
    road = ["base", *run.fine_tuning(config)]
    before = road[road.index(stage) - 1]
    folder = config.run_dir / before
    begun = work.begun(stage)
    if begun is not None and not folder.exists() and Path(begun["starts_from"]).is_dir():
        return Path(begun["starts_from"])  # of another run
    if not checkpoint.is_finished(folder):
        found = run.newest(folder)
        state = f"only {found}, unfinished" if found else "no checkpoint"
        command = run.command(config, run.STAGES[before].script)
        title = run.STAGES[stage].title
        raise UserError(f"{title} starts from {folder}, which holds {state}. Run `{command}`.")
    for earlier, later in pairwise(road[: road.index(stage)]):
        if (first := run.newest(config.run_dir / earlier)) is not None:
            work.check(later, {"weights": checksum(first / WEIGHTS)})
    return run.newest(folder)


# -------------------------------------------------------------------------------------- chat tokens


def write_texts(config: Config, stage: str, *, remake: bool) -> dict[str, str]:
    """Bring every set of a stage's conversations into text shards, unless that is done; what each
    holds.

    remake: make a set again whose source has changed, instead of raising `InputsChanged`.
    """
    found, loop = {}, getattr(config, stage)
    for source in config.sets(stage):
        text = run.chat_text(config, stage, source)
        ingest.write_chat_shards(
            source, text, loop.validation_share, exclude=loop.test_sets(), remake=remake
        )
        found[f"conversations {source.name}"] = text_of(text)
    return found


def text_of(folder: Path) -> str:
    """A hash of what a folder of text shards holds."""
    return content_fingerprint(read_manifest(folder, "uv run create_shard.py"))


def write_chat_tokens(
    config: Config, source: ChatSource, loop: SFTConfig, tokenizer: Tokenizer, name: str
) -> Path:
    """Encode one set of conversations into token shards with loss masks, unless that is done; gives
    their folder.
    """
    text = run.chat_text(config, name, source)
    folder = config.run_dir / "chat_tokens" / name / source.name
    writer = TokenShardWriter(
        folder,
        {"text": text_of(text), "context": loop.context}
        | ({"loss": loop.loss} if loop.loss != "assistant" else {}),
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        shard_tokens=config.tokenizer.shard_tokens,
        masked=True,
    )
    if writer.finished:
        return folder
    counts: Counter[str] = Counter()
    for split in SPLITS:
        for index, rendered in enumerate(fitting(text, split, loop.context, tokenizer, counts)):
            if index >= writer.n_done(split):
                ids, loss = rendered
                loss = loss if loop.loss == "assistant" else loss_everywhere(ids, tokenizer)
                writer.add(split, ids, int(tokenizer.token_bytes[ids].sum()), loss)
    writer.finish(source=source.name, counts=dict(counts))
    told = ", ".join(f"{n:,} {what}" for what, n in sorted(counts.items()))
    log.say(f"{source.name}: {told}; kept conversations lie in {folder}")
    return folder


def fitting(
    text: Path, split: str, context: int, tokenizer: Tokenizer, counts: Counter[str]
) -> Iterator[Rendered]:
    """Conversations that fit `context` tokens, the last exchanges left out where that makes them
    fit.

    Nothing is cut within a turn: a first exchange too long for the context is dropped and counted.
    """
    for messages in sources.read_conversations(text, split):
        kept = with_results(messages)
        rendered = render(kept, tokenizer)
        while len(rendered.ids) > context and kept:
            kept = kept[:-1]
            while kept and kept[-1]["role"] != "assistant":
                kept = kept[:-1]
            if kept:
                rendered = render(kept, tokenizer)
        if not kept or not any(rendered.loss):
            counts["dropped: longer than the context or without an answer"] += 1
            continue
        counts["whole" if len(kept) == len(messages) else "shortened to whole turns"] += 1
        yield rendered


def with_results(messages: list[Message]) -> list[Message]:
    """The messages with the results that the tools give, as an answer will meet them; what a file
    says of them may be rounded otherwise, or wrong. A call that a tool refuses, though the file
    knows its result, is left out.
    """
    tools = Tools()

    def settle(part: dict[str, str]) -> list[dict[str, str]]:
        if part.get("tool") not in tools.functions or part.get("result") is None:
            return [part]
        result = tools.result(Call(part["tool"], part["arguments"]), 1)
        refused = result.startswith("error") and not part["result"].startswith("error")
        return [] if refused else [part | {"result": result}]

    return [
        {**m, "content": [kept for part in m["content"] for kept in settle(part)]}
        if isinstance(m["content"], list)
        else m
        for m in messages
    ]


# ------------------------------------------------------------------------------ figures and samples


def held_out_loss(
    model: Model, shards: TokenShards, loop: SFTConfig, tokenizer: Tokenizer
) -> float:
    """Mean cross-entropy of the held-out tokens that carry loss, in nats."""
    batches = held_out_conversations(
        shards, context=loop.context, max_tokens=loop.eval_tokens, pad=tokenizer.pad
    )
    nats, count = evaluate_loss(model, batches)
    return nats / max(1, count)


class ProbePrompt(NamedTuple):
    """The beginning of a held-out conversation, up to the assistant's first turn, and whether that
    one reasons.
    """

    ids: list[int]
    reasons: bool


def probe_prompts(config: Config, stage: str, tokenizer: Tokenizer) -> list[ProbePrompt]:
    """Fixed prompts from the held-out conversations, the same number of each set."""
    found: list[ProbePrompt] = []
    loop, sets = getattr(config, stage), config.sets(stage)
    for source in sets:
        mine: list[ProbePrompt] = []
        for messages in sources.read_conversations(
            run.chat_text(config, stage, source), "validation"
        ):
            first = next(
                (i for i, message in enumerate(messages) if message["role"] == "assistant"), 0
            )
            if first == 0 or len(mine) == loop.probe_prompts // len(sets):
                continue
            ids = render(messages[:first], tokenizer, answer=True).ids
            if len(ids) + loop.probe_tokens <= loop.context:
                mine.append(ProbePrompt(ids, messages[first].get("thinking") is not None))
        found += mine
    return found


def probe(
    model: Model, tokenizer: Tokenizer, prompts: list[ProbePrompt], max_tokens: int
) -> dict[str, float]:
    """Shares of greedy answers that stop by themselves, that loop, and that reason exactly when
    asked to.

    An answer loops when some 8 tokens in a row stand in it three times: what users of small models
    complain of most.
    """
    if not prompts:
        return {}
    ids = [prompt.ids for prompt in prompts]
    engine, looks = Engine(model, tokenizer=tokenizer), {"stop_ids": [tokenizer.end]}
    answers = engine.generate(ids, max_tokens=max_tokens, tools=Tools(), **looks)
    stops = [answer[-1:] == [tokenizer.end] for answer in answers]
    reasons = [
        (answer[:1] == [tokenizer.think]) == prompt.reasons
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    loops = [is_looping(answer) for answer in answers]
    return {
        name: sum(marks) / len(marks)
        for name, marks in (("stops", stops), ("loops", loops), ("reasons", reasons))
    }


def is_looping(ids: list[int], length: int = 8, times: int = 3) -> bool:
    """Whether some `length` tokens in a row occur `times` times."""
    runs = Counter(tuple(ids[i : i + length]) for i in range(len(ids) - length + 1))
    return max(runs.values(), default=0) >= times


def answer_prompts(
    model: Model, tokenizer: Tokenizer, prompts: tuple[str, ...]
) -> list[tuple[str, str]]:
    """The likeliest answer to each prompt, up to 120 tokens."""
    ids = [
        render([{"role": "user", "content": prompt}], tokenizer, answer=True).ids
        for prompt in prompts
    ]
    answers = Engine(model, tokenizer=tokenizer).generate(
        ids,
        max_tokens=120,
        stop_ids=[tokenizer.end],
        tools=Tools(),
        sampling=Sampling(temperature=0.0),
        seeds=[0] * len(ids),
    )
    return [
        (prompt, parse_answer(ids, tokenizer).content)
        for prompt, ids in zip(prompts, answers, strict=True)
    ]


def announce(stage: str, start: Path, batches: ConversationBatches) -> None:
    """What is about to happen, on the console."""
    filled, learnt = batches.fill()
    log.say(f"stage       {run.STAGES[stage].title.lower()}, from {start}")
    log.say(
        f"tokens      {batches.n_steps} steps; {filled:.1%} of the tokens are no padding, "
        f"{learnt:.1%} carry loss"
    )


if __name__ == "__main__":
    cli.run_script(lambda: main(*run.parse(SCRIPT)))

"""Every number you may tune: frozen dataclasses with their checks, and the presets.

Out: a checked `Config`. Knows no other module of this project and does not import torch.
A comment behind or above a field is its help text: `--help` prints those that a script reads.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal


class UserError(Exception):
    """Something a user can cause and mend; a script prints it without a traceback, exit code 2."""


@dataclass(frozen=True)
class Source:
    """Where text comes from: exactly one of a hub data set, files, the demo world, problems."""

    name: str = "own"  # its folder's name under text/, and its name in every log
    hub: str | None = None  # data set on the hub, as owner/name
    hub_config: str | None = None  # its configuration, such as sample-10BT
    revision: str | None = None  # its pinned commit; None takes the newest and writes down which
    split: str = "train"  # its split
    files: tuple[str, ...] = ()  # local files, folders or globs; layouts are known by their columns
    demo: str | None = None  # part of the built-in world: text, alpaca, dolly, messages or math
    made: str | None = None  # problems made by this program: a kind of hearth/data/problems.py
    weight: float = 1.0  # share of the training tokens, or of an epoch, relative to the others

    def problems(self, where: str) -> list[str]:
        found = []
        if self.weight < 0:
            found.append(f"{where} {self.name!r}: weight is {self.weight}, must be at least 0")
        if sum(map(bool, (self.hub, self.files, self.demo, self.made))) != 1:
            found.append(f"{where} {self.name!r}: give exactly one of hub, files, demo, made")
        return found


@dataclass(frozen=True)
class TextSource(Source):
    """One corpus for pretraining."""

    column: str | None = None  # column that holds the text; None guesses and says so
    max_bytes: int | None = None  # stop after this many bytes of text; None takes all


@dataclass(frozen=True)
class ChatSource(Source):
    """One set of conversations for fine-tuning."""

    max_rows: int | None = None  # stop after this many conversations; None takes all
    max_chars: int | None = None  # longest reasoning; the worked solution replaces longer ones
    calls: bool = False  # calculations in <<…>> become calls of the calculator, not reasoning
    persona: tuple[str, ...] = ()  # of made: identity, the name and the owner; chat.name sets it


@dataclass(frozen=True)
class DataConfig:
    """The pretraining corpora, how they are cleaned, and how they are cut into shards."""

    sources: tuple[TextSource, ...] = ()  # the corpora
    text_files: tuple[str, ...] = ()  # your own files, folders, globs instead of the sources
    text_column: str | None = None  # their column that holds the text; None guesses
    text_weights: tuple[float, ...] = ()  # one for each, which makes it a corpus of its own
    shard_mb: int = 256  # size of a text shard, in 10^6 bytes of text
    validation_share: float = 0.005  # share of documents held out, by a hash of the text
    min_chars: int = 64  # shorter documents are dropped
    max_repeated_line_share: float = 0.5  # drop documents that repeat one line more than this
    deduplicate: bool = True  # drop exact duplicates, across all corpora
    near_duplicates: float | None = None  # drop ones this similar (Jaccard, by MinHash)
    retry_minutes: float = 30.0  # minutes that a failing network is retried

    def problems(self) -> list[str]:
        found = [problem for source in self.sources for problem in source.problems("data.sources")]
        if not self.sources and not self.text_files:
            found.append("data: no corpus; give --data.text_files or data.sources")
        if any(weight < 0 for weight in self.text_weights):
            found.append("data.text_weights must not be negative")
        n_weights, n_files = len(self.text_weights), len(self.text_files)
        if n_weights not in (0, n_files):
            said = f"data.text_weights holds {n_weights} weights for {n_files} text_files"
            found.append(f"{said}: give one for each")
        if not found and not any(source.weight for source in self.corpora()):
            found.append("data: every corpus has weight 0; give one a weight above 0")
        return found

    def corpora(self) -> tuple[TextSource, ...]:
        """The corpora in force: your own files where given, the preset's sources otherwise."""
        if not self.text_files:
            return self.sources
        if not self.text_weights:
            return (TextSource(files=self.text_files, column=self.text_column),)
        return tuple(
            TextSource(f"own-{i}", files=(file,), column=self.text_column, weight=weight)
            for i, (file, weight) in enumerate(zip(self.text_files, self.text_weights, strict=True))
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """How the byte-level BPE is trained; its size is model.vocab_size."""

    sample_mb: int = 1000  # text it is trained on, in 10^6 bytes, drawn from all corpora by weight
    shard_tokens: int = 100_000_000  # tokens in one token shard


@dataclass(frozen=True)
class HRMConfig:
    """The hierarchical reasoning head: a fast module L and a slow module H, called after the trunk.

    Each called once is what measured best per FLOP (EXPERIMENTS.md).
    """

    l_layer: int = 2  # blocks in L
    h_layer: int = 2  # blocks in H
    h_cycles: int = 1  # times H is called
    l_cycles: int = 1  # times L is called before each call of H; 0 is no L: H alone is looped
    deep_supervision: bool = False  # a loss after every H cycle, one cycle's graph alive at a time


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network. Edit these; the rest follows."""

    vocab_size: int = 32_768  # entries of the tokenizer, special tokens included; a multiple of 128
    n_layer: int = 15  # transformer blocks in the trunk
    d_model: int = 768  # width of the residual stream
    n_head: int = 12  # query heads
    n_kv_head: int = 4  # key/value heads, each shared by n_head / n_kv_head query heads
    d_ff: int = 3072  # width inside the MLP
    gated_mlp: bool = False  # SwiGLU: d_ff × 2/3 makes as many parameters; False is squared ReLU
    context: int = 4096  # longest sequence, in tokens
    window: int | None = 1024  # attention reach of a short layer, in tokens; None is all
    pattern: str = "SSSL"  # short (S) and long (L) blocks, repeated; the last is always long
    rope_base: float = 10_000.0  # base of the rotary frequencies
    n_value_embeddings: int = 0  # blocks that learn a value per token, every other one first
    bigram_rows: int = 0  # rows of a table added to the embedding, one for each hashed token pair
    token_shift: bool = True  # mix into each token's embedding a learnt share of the one before
    exclusive_attention: bool = True  # take from attention's output what lies along the own value
    hrm: HRMConfig | None = field(default_factory=HRMConfig)  # None is the plain dense model
    shape: Literal["hearth", "portable"] = "hearth"  # portable: a Qwen3, as PORTABLE says

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def n_blocks(self) -> int:
        """Blocks of the trunk and of the head, however often the head's are called."""
        hrm = self.hrm
        return self.n_layer + (hrm.h_layer + hrm.l_layer * bool(hrm.l_cycles) if hrm else 0)

    @property
    def n_weights(self) -> int:
        """Weights of the products a token passes, the tied output among them; no tables."""
        D = self.d_model
        block = D * (2 * self.n_head + 2 * self.n_kv_head) * self.head_dim
        block += D * self.d_ff * (3 if self.gated_mlp else 2)
        return self.n_blocks * block + self.vocab_size * D

    def problems(self) -> list[str]:
        if min(self.n_head, self.n_kv_head, self.d_model, self.vocab_size) < 1:
            return []  # said already
        found = []
        if self.vocab_size % 128:
            near = max(1, round(self.vocab_size / 128)) * 128
            found.append(f"vocab_size is {self.vocab_size}, must be a multiple of 128: try {near}")
        if self.d_model % (2 * self.n_head):
            per_head = f"d_model {self.d_model} / n_head {self.n_head}"
            found.append(f"{per_head} must be an even whole number")
        if self.n_head % self.n_kv_head:
            found.append(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if not self.pattern or set(self.pattern) - set("SL"):
            found.append(f"pattern is {self.pattern!r}, must be made of S (short) and L (long)")
        if not 0 <= self.n_value_embeddings <= self.n_blocks:
            found.append(f"n_value_embeddings must lie between 0 and the {self.n_blocks} blocks")
        if self.shape == "portable":
            unlike = [f"{n} {v}" for n, v in PORTABLE.items() if getattr(self, n) != v]
            found += [f"shape portable needs model.{setting}" for setting in unlike]
        return [f"model.{problem}" for problem in found]


# what `--model.shape portable` sets: a Qwen3 has none of the rest; the head's blocks join the trunk
PORTABLE: dict[str, Any] = {
    **{"hrm": None, "token_shift": False, "n_value_embeddings": 0, "bigram_rows": 0},
    **{"gated_mlp": True, "window": None, "exclusive_attention": False},
}


@dataclass(frozen=True)
class OptimConfig:
    """The update rule; how fast it goes is set where it is used: pretrain.lr, sft1.lr …"""

    name: Literal["muon", "adamw", "schedulefree"] = "muon"  # Muon: for matrices alone
    embedding_lr_ratio: float = 6.0  # learning rate of the embedding, relative to lr
    value_lr_ratio: float = 12.0  # of value embeddings, which no output is tied to
    vector_lr_ratio: float = 12.0  # of gains, shares, gates: what is neither matrix nor table
    bigram_lr_ratio: float = 20.0  # of bigrams under Muon, whose rows slow down as they are used
    weight_decay: float = 0.1  # of matrices only, decoupled, multiplied by the learning rate
    momentum: float = 0.95  # of Muon
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"  # of Muon; half the memory
    momentum_warmup_steps: int = 200  # Muon's momentum climbs from 0.85 over this many steps
    beta1: float = 0.8  # of AdamW
    beta2: float = 0.95  # of AdamW
    embedding_beta2: float = 0.995  # of AdamW where rows are looked up: most tokens are rare
    clip: float = 1.0  # largest gradient norm; gradients beyond it are scaled down


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum: how far attention reaches, and for how long."""

    context: int = 1024  # segments are cut at document ends and every this many tokens
    share: float = 1.0  # share of pretrain.steps
    weights: tuple[float, ...] | None = None  # of the corpora; None takes the sources'


@dataclass(frozen=True)
class LoopConfig:
    """What pretraining and fine-tuning share: step, schedule, what is shown and saved."""

    lr: float | None = None  # peak learning rate of matrices; None: by the rule below
    warmup_share: float = 0.02  # share of the steps over which the learning rate climbs
    decay_share: float = 0.6  # share of the steps, at the end, over which it falls in a line
    final_lr_ratio: float = 0.05  # learning rate at the end, relative to the peak
    tokens_per_step: int | None = None  # tokens in one optimizer step; None: by the rule below
    micro_batch_tokens: int | None = None  # tokens in one pass; None fits the card's free memory
    eval_every_steps: int = 1000  # steps between two evaluations on held-out data
    eval_tokens: int = 1_048_576  # held-out tokens of each corpus that an evaluation reads
    log_every_steps: int = 10  # steps between two lines on the console
    sample_every_steps: int = 5000  # steps between two sample texts
    save_every_minutes: float = 15.0  # minutes between two checkpoints
    keep_checkpoints: int = 2  # the newest ones kept
    log_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()  # beside metrics.jsonl
    max_skipped_steps: int = 20  # spiking or non-finite steps in a row after which the run stops

    def loop_problems(self, where: str) -> list[str]:
        found = []
        micro, step = self.micro_batch_tokens or 0, self.tokens_per_step
        if step and micro > 0 and step % micro:
            sizes = f"{step} must be a multiple of {micro}"
            found.append(f"{where}.tokens_per_step {sizes}, its micro_batch_tokens")
        if not 0 <= self.warmup_share + self.decay_share <= 1:
            found.append(f"{where}.warmup_share + decay_share is above 1")
        return found


@dataclass(frozen=True)
class PretrainConfig(LoopConfig):
    """Pretraining on the text corpora."""

    tokens: int | None = None  # tokens to train on; None: by the rule below
    steps: int | None = None  # optimizer steps; None: as many as the tokens make
    stages: tuple[Stage, ...] = (Stage(1024, 0.6), Stage(2048, 0.25), Stage(4096, 0.15))
    prompts: tuple[str, ...] = ("The", "Water is", "To add two numbers,")  # that samples continue

    def problems(self, context: int) -> list[str]:
        found = self.loop_problems("pretrain")
        if self.tokens and self.steps:
            found.append("pretrain: give tokens or steps, not both")
        total = sum(stage.share for stage in self.stages)
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            found.append(f"pretrain.stages: the shares add up to {total:.3f}, must be 1")
        found += [
            f"pretrain.stages: context {stage.context} must divide model.context {context}"
            for stage in self.stages
            if not 0 < stage.context <= context or context % stage.context
        ]
        asked = "micro_batch_tokens" if self.micro_batch_tokens else "tokens_per_step"
        if (getattr(self, asked) or context) % context:
            found.append(f"pretrain.{asked} must be a multiple of model.context {context}")
        return found


@dataclass(frozen=True)
class SFTConfig(LoopConfig):
    """One stage of fine-tuning on conversations; without any it is left out."""

    sources: tuple[ChatSource, ...] = ()  # the sets of conversations
    files: tuple[str, ...] = ()  # your own files, folders or globs instead of the sources
    calls: bool = False  # of your own files: calculations in <<…>> become calls
    exclude: tuple[ChatSource, ...] = ()  # test sets, whose questions no conversation may hold
    exclude_files: tuple[str, ...] = ()  # your own files of such questions, beside these
    context: int = 2048  # longest conversation, in tokens
    loss: Literal["assistant", "all"] = "assistant"  # whose tokens are learnt; never tool results
    epochs: float = 3.0  # passes over the conversations; 0 leaves the stage out
    weight_decay: float = 0.0  # in place of optim.weight_decay
    momentum_warmup_share: float = 0.1  # of the steps, in place of optim.momentum_warmup_steps
    eval_every_steps: int | None = None  # steps between two evaluations; None is a quarter of them
    sample_every_steps: int | None = None  # steps between two samples; None is a half of them
    validation_share: float = 0.02  # share of the conversations held out, chosen by a hash
    prompts: tuple[str, ...] = ("Who are you?", "What is 12 + 7?")  # questions that samples answer
    probe_prompts: int = 24  # held-out questions answered at each evaluation
    probe_tokens: int = 160  # longest answer to one of them, in tokens

    def problems(self, where: str, model_context: int) -> list[str]:
        if not self.sets():
            return []  # it is left out
        found = self.loop_problems(where)
        for source in (*self.sources, *self.exclude):
            found += source.problems(f"{where}.sources")
        if not 0 < self.context <= model_context:
            said = f"{where}.context is {self.context}, must lie between 1 and model.context"
            found.append(f"{said} {model_context}")
        return found

    def sets(self, persona: tuple[str, ...] = ()) -> tuple[ChatSource, ...]:
        """The sets in force: your own files where given, the preset's sources otherwise; none
        where the stage is left out.
        """
        if not self.epochs:
            return ()
        if not self.files:
            is_asked = {"identity": persona}
            return tuple(replace(s, persona=is_asked.get(s.made, ())) for s in self.sources)
        asked = repr((self.files, "calls") if self.calls else self.files)
        name = f"own-{zlib.crc32(asked.encode()):08x}"
        return (ChatSource(name=name, files=self.files, calls=self.calls),)

    def test_sets(self) -> tuple[ChatSource, ...]:
        """The sets whose questions are kept out."""
        own = (ChatSource(name="tests", files=self.exclude_files),) if self.exclude_files else ()
        return self.exclude + own

    def in_steps(self, steps: int) -> SFTConfig:
        """The same for a stage of so many steps: what was left to their number is a number."""
        evaluations = self.eval_every_steps or max(1, round(steps / 4))
        samples = self.sample_every_steps or max(1, round(steps / 2))
        return replace(self, eval_every_steps=evaluations, sample_every_steps=samples)

    def optimizer(self, optim: OptimConfig, steps: int) -> OptimConfig:
        """The update rule of a stage of so many steps, made from the run's."""
        warmup = round(self.momentum_warmup_share * steps)
        return replace(optim, weight_decay=self.weight_decay, momentum_warmup_steps=warmup)


@dataclass(frozen=True)
class RLConfig:
    """Reinforcement learning with rewards that a program gives, after the last fine-tuning."""

    environments: tuple[str, ...] = ()  # what is practised; `uv run rl.py --list` names them
    files: tuple[str, ...] = ()  # your own problems with answers, in their place
    reward: str | None = None  # Python file with `def reward(problem, answer) -> float`
    steps: int = 150  # rollouts, each of them followed by one update
    prompts_per_step: int = 16  # problems whose answers differ in reward that a step learns from
    samples_per_prompt: int = 16  # answers to each of them
    max_tokens: int = 256  # longest answer, in tokens; one that is cut off earns nothing
    lr_ratio: float = 0.1  # peak learning rate, relative to sft2.lr; it falls in a line to zero
    tool_cost: float = 0.0  # what each call of a tool takes off the reward
    n_held_out: int = 64  # held-out problems of each environment, which pick the best checkpoint
    test_every_steps: int = 25  # steps between two looks at them
    micro_batch_tokens: int | None = None  # tokens in one pass; None fits the card's free memory
    log_every_steps: int = 10  # steps between two lines on the console
    save_every_minutes: float = 15.0  # minutes between two checkpoints
    keep_checkpoints: int = 2  # the newest ones kept
    log_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()  # beside metrics.jsonl

    def loop(self, lr: float, context: int) -> LoopConfig:
        """The loop's settings, for the learning rate `lr` of the last fine-tuning."""
        shared = ("micro_batch_tokens", "log_every_steps", "save_every_minutes", "keep_checkpoints")
        return LoopConfig(
            lr=self.lr_ratio * lr,
            decay_share=0.98,
            final_lr_ratio=0.0,
            tokens_per_step=self.prompts_per_step * self.samples_per_prompt * context,
            eval_every_steps=self.test_every_steps,
            sample_every_steps=self.steps,
            log_to=self.log_to,
            **{name: getattr(self, name) for name in shared},
        )


REASONING_PROMPT = "Think step by step, then answer."  # the system turn that asks for reasoning


@dataclass(frozen=True)
class ChatConfig:
    """How the chat draws its answers."""

    name: str = "Hearth"  # what the model is called, where a stage teaches who it is
    owner: str = "the owner of this computer"  # who made it, in its own words
    system: str | None = None  # system prompt; None is no system turn
    temperature: float = 0.7  # 0 takes the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens; None is all
    top_p: float | None = 0.95  # draw from the likeliest that make up this probability
    min_p: float | None = None  # draw from those at least this likely beside the likeliest
    repetition_penalty: float = 1.0  # above 1 makes what was said less likely, but <|end|>
    max_tokens: int = 1024  # longest answer, in tokens
    tool_calls: int = 8  # most calls of the calculator an answer; 0 switches it off
    seed: int | None = None  # of the draws; None differs each time


@dataclass(frozen=True)
class ReportConfig:
    """The report in the run's folder: index.html and report.md."""

    draw: bool = True  # draw it after each evaluation and each stage
    price_per_kwh: float = 0.30  # price of a kilowatt-hour, in `currency`
    currency: str = "EUR"  # of the price
    watts: float | None = None  # power while training, where the card does not tell


# what every number must be → which ones; `loop` stands for pretrain and each of `FINE_TUNING`,
# `sft` for each of these alone
BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "at least 0": (
        lambda x: x >= 0,
        "model.hrm.l_cycles model.bigram_rows report.price_per_kwh chat.tool_calls sft.epochs "
        "sft.weight_decay seed",
    ),
    "at least 1": (
        lambda x: x >= 1,
        "data.shard_mb tokenizer.sample_mb tokenizer.shard_tokens model.vocab_size model.n_layer "
        "model.d_model model.n_head model.n_kv_head model.d_ff model.context model.window "
        "model.hrm.l_layer model.hrm.h_layer model.hrm.h_cycles pretrain.steps pretrain.tokens "
        "loop.tokens_per_step loop.micro_batch_tokens loop.eval_every_steps loop.eval_tokens "
        "loop.log_every_steps loop.sample_every_steps loop.keep_checkpoints rl.steps "
        "rl.prompts_per_step rl.max_tokens rl.n_held_out rl.test_every_steps "
        "rl.log_every_steps rl.keep_checkpoints rl.micro_batch_tokens",
    ),
    "at least 2": (lambda x: x >= 2, "rl.samples_per_prompt"),
    "above 0": (
        lambda x: x > 0,
        "optim.clip loop.lr report.watts rl.lr_ratio",
    ),
    "from 0 to below 1": (
        lambda x: 0 <= x < 1,
        "optim.momentum optim.beta1 optim.beta2 optim.embedding_beta2",
    ),
    "between 0 and 0.5": (lambda x: 0 < x < 0.5, "data.validation_share"),
    "above 0 and at most 1": (lambda x: 0 < x <= 1, "data.near_duplicates"),
    "from 0 to 1": (lambda x: 0 <= x <= 1, "sft.momentum_warmup_share"),
}


def out_of_bounds(config: Config) -> list[str]:
    """The settings that break their bound, in words; what is None breaks none."""
    found = []
    for rule, (holds, names) in BOUNDS.items():
        for name in dict.fromkeys(said for n in names.split() for said in _each_stage(n)):
            value = reduce(lambda part, n: getattr(part, n, None), name.split("."), config)
            if value is not None and not holds(value):
                found.append(f"{name} is {value}, must be {rule}")
    return found


def _each_stage(name: str) -> list[str]:
    """`loop.lr` as `pretrain.lr`, `mid.lr` …; a name that stands for itself as it is."""
    group, dot, rest = name.partition(".")
    groups = {"loop": ("pretrain", *FINE_TUNING), "sft": tuple(FINE_TUNING)}.get(group, (group,))
    return [f"{g}{dot}{rest}" for g in groups]


@dataclass(frozen=True)
class Config:
    """Everything one run needs; saved as JSON beside every checkpoint."""

    preset: str = "16gb"  # the preset it started from, and the name of its folder
    runs: str = "runs"  # folder that holds one folder a run
    name: str | None = None  # name of the run's folder; None is the preset's name
    seed: int = 0  # of initialisation, data order and samples
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # cuda: AMD too; mps: Apple
    compile: bool | None = None  # fuse small operations with torch.compile; None: on a card
    eight_bit: Literal["float8", "int8"] | None = None  # refused where slower
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    # the stages of fine-tuning, in their order: one more is one more field, here alone
    mid: SFTConfig = field(default_factory=SFTConfig, metadata={"title": "Middle stage"})
    sft1: SFTConfig = field(default_factory=SFTConfig, metadata={"title": "Fine-tuning, stage 1"})
    sft2: SFTConfig = field(default_factory=SFTConfig, metadata={"title": "Fine-tuning, stage 2"})
    rl: RLConfig = field(default_factory=RLConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        context = self.model.context
        found = [*out_of_bounds(self), *self.data.problems(), *self.model.problems()]
        if context > 0:
            found += self.pretrain.problems(context)
            for name in FINE_TUNING:
                found += getattr(self, name).problems(name, context)
        if found:
            raise UserError("\n  - ".join(["This configuration cannot work:", *found]))

    @property
    def run_dir(self) -> Path:
        """Folder of everything this run makes; removing it is starting over."""
        return Path(self.runs) / (self.name or self.preset)

    def sets(self, stage: str) -> tuple[ChatSource, ...]:
        """The sets of conversations of a stage of fine-tuning; none where it is left out."""
        return getattr(self, stage).sets((self.chat.name, self.chat.owner))


# a stage of fine-tuning → its title
FINE_TUNING = {f.name: f.metadata["title"] for f in fields(Config) if "title" in f.metadata}


# ----------------------------------------------------------------------------------------- the rule

# What follows from a model and the tokens it reads, where nobody says otherwise. EXPERIMENTS.md,
# "One rule", says what of it was measured, and what is carried on to larger models unmeasured.
TOKENS_PER_WEIGHT = 20  # of `ModelConfig.n_weights` (Chinchilla, arXiv 2203.15556, section 3)
# tokens of a step in a run of 10^6 tokens; exponent of its tokens (nanochat's, arXiv 2505.13738)
BATCH, BATCH_GROWTH = 4000, 0.383
LR, LR_WIDTH, LR_STEPS = 0.012, 0.5, 0.3  # at width 256 and 300 steps; exponents of their inverses
FINE_TUNING_LR = 0.25  # of pretraining's
# bits per byte of English = E + A N^-a + B D^-b, N million weights, D million tokens; fitted to
# small runs on processors
LAW = (0.672, 0.106, 0.875, 1.064, 0.200)  # E, A, a, B, b: `benchmarks/recipe.py law`


def shaped(model: ModelConfig, depth: int) -> ModelConfig:
    """The presets' shape at another depth: `depth` blocks, a third each in trunk, L and H where
    there is a head, 40 channels of width a block, heads of 64, a key/value head for about three, an
    MLP four times as wide (8/3 where gated), a vocabulary of about 32 entries a channel, value
    embeddings on every other block and 16 bigrams an entry, where there are any; context and kind
    stay.
    """
    width = 64 * max(2, round(depth * 40 / 64))
    n_head = width // 64
    fits = [n for n in range(1, n_head + 1) if n_head % n == 0 and n <= max(1.0, n_head / 2.5)]
    third = max(1, depth // 3)
    vocab_size = min(32_768, 2 ** round(math.log2(32 * width)))
    hrm = model.hrm and replace(model.hrm, l_layer=max(1, depth - 2 * third), h_layer=third)
    return replace(
        model,
        vocab_size=vocab_size,
        n_layer=third if hrm else depth,
        d_model=width,
        n_head=n_head,
        n_kv_head=max(fits),
        d_ff=64 * round(width / 24) if model.gated_mlp else 4 * width,
        n_value_embeddings=depth // 2 if model.n_value_embeddings else 0,
        bigram_rows=bigram_rows_for(vocab_size) if model.bigram_rows else 0,
        hrm=hrm,
    )


def bigram_rows_for(vocab_size: int) -> int:
    """Rows of the table of bigrams: 16 for each entry, no more than suits a card's memory."""
    return min(131_072, 16 * vocab_size)


def batch_for(tokens: int, context: int) -> int:
    """Tokens of an optimizer step for a run of `tokens`: whole rows, about a power of two."""
    return whole_rows(2 ** round(math.log2(BATCH * (tokens / 1e6) ** BATCH_GROWTH)), context)


def whole_rows(tokens: int, context: int) -> int:
    """The multiple of `context` that is nearest to `tokens`, a row at least."""
    return max(1, round(tokens / context)) * context


def lr_for(model: ModelConfig, steps: int) -> float:
    """Peak learning rate. An orthogonal update is scaled to the size of AdamW's, so its norm grows
    with the root of the width, which the first factor takes back (arXiv 2310.17813); the second
    one is what races of 100 and 600 seconds liked best.
    """
    return LR * (256 / model.d_model) ** LR_WIDTH * (300 / steps) ** LR_STEPS


def predicted_bits_per_byte(n_weights: float, tokens: float, law: tuple[float, ...] = LAW) -> float:
    """What the rule's runs end at on English text that they have not seen (form: arXiv 2203.15556,
    section 3.3). Fitted to 1 to 16 million weights and to a few million tokens: far beyond these it
    is a guess.
    """
    e, of_weights, a, of_tokens, b = law
    return e + of_weights * (n_weights / 1e6) ** -a + of_tokens * (tokens / 1e6) ** -b


def settled(config: Config) -> Config:
    """The same settings with what they leave open filled in by the rule."""
    loop, model = config.pretrain, config.model
    tokens = loop.tokens or TOKENS_PER_WEIGHT * model.n_weights
    batch = loop.tokens_per_step or batch_for(tokens, model.context)
    steps = loop.steps or max(1, tokens // batch)
    lr = loop.lr or lr_for(model, steps)
    filled = replace(loop, lr=lr, tokens_per_step=batch, steps=steps, tokens=None)
    tuned = {
        name: replace(
            stage,
            lr=stage.lr or FINE_TUNING_LR * lr,
            tokens_per_step=stage.tokens_per_step or whole_rows(batch // 4, stage.context),
        )
        for name in FINE_TUNING
        if (stage := getattr(config, name))
    }
    return replace(config, pretrain=filled, **tuned)


# ------------------------------------------------------------------------------------------ presets

# No `revision` is pinned: the first start takes the newest, writes it down and sticks to it.
FINEWEB = TextSource("fineweb-edu", "HuggingFaceFW/fineweb-edu", "sample-10BT", column="text")
WEB_MATH = TextSource("open-web-math", "open-web-math/open-web-math", column="text", weight=0.5)
ALPACA = ChatSource("alpaca", "yahma/alpaca-cleaned")
DOLLY = ChatSource("dolly", "databricks/databricks-dolly-15k")
ULTRACHAT = ChatSource("ultrachat", "HuggingFaceH4/ultrachat_200k", split="train_sft")
OPENR1 = ChatSource("openr1-math", "open-r1/OpenR1-Math-220k", "default", max_chars=11_000)

SMOLTALK = ChatSource("smol-smoltalk", "HuggingFaceTB/smol-smoltalk", weight=0.5)
GSM8K = ChatSource("gsm8k", "openai/gsm8k", "main", calls=True, weight=4.0)
MMLU = ChatSource("mmlu", "cais/mmlu", "all", split="auxiliary_train", weight=0.5)
ARC = ChatSource("arc", "allenai/ai2_arc", "ARC-Challenge", weight=2.0)
ARC_EASY = ChatSource("arc-easy", "allenai/ai2_arc", "ARC-Easy", weight=2.0)
OPENBOOKQA = ChatSource("openbookqa", "allenai/openbookqa", "main", weight=2.0)
# what these are measured with, kept out of training
TESTS = (
    *(replace(s, name=f"{s.name}-test", split="test") for s in (GSM8K, MMLU, ARC, ARC_EASY)),
    replace(OPENBOOKQA, name="openbookqa-test", split="test"),
)
MID_MADE = {
    **{"spelling": 20_000, "letters": 20_000, "counting": 10_000, "calculator": 10_000},
    **{"long sums": 20_000, "dates": 10_000, "units": 5_000, "identity": 1_000},
}


def made(kind: str, rows: int, weight: float = 1.0) -> ChatSource:
    """So many problems of one kind; a weight below 1 takes a part of them, another each epoch."""
    return ChatSource(kind, made=kind, max_rows=rows, weight=weight)


CARD = Config(
    # `shaped` gives each preset its own numbers
    model=ModelConfig(n_value_embeddings=9, bigram_rows=131_072),
    data=DataConfig(sources=(FINEWEB, WEB_MATH)),
    mid=SFTConfig(
        sources=(
            *(SMOLTALK, GSM8K, MMLU, ARC, ARC_EASY, OPENBOOKQA),
            *(made(kind, rows) for kind, rows in MID_MADE.items()),
        ),
        calls=True,
        exclude=TESTS,
        loss="all",
        epochs=1.0,
    ),
    sft1=SFTConfig(sources=(ALPACA, DOLLY)),
    sft2=SFTConfig(sources=(ULTRACHAT, OPENR1), context=4096, epochs=1.0),
)

DEMO_LOOP = {
    "tokens_per_step": 1024,
    "micro_batch_tokens": 1024,
    "log_every_steps": 50,
    "eval_tokens": 8192,
    "save_every_minutes": 1.0,
}
DEMO_SFT = DEMO_LOOP | {"lr": 3e-3, "eval_every_steps": 400}


def demo_made(weight: float) -> tuple[ChatSource, ...]:
    """What the demo's middle stage teaches; the stages behind it repeat a part of it."""
    rows = {"spelling": 10_000, "letters": 4000, "counting": 3000, "calculator": 2500}
    some = [made(kind, n, weight) for kind, n in rows.items()]
    return (*some, made("identity", 1000, 1.0))


DEMO = Config(
    preset="demo",
    data=DataConfig(
        sources=(TextSource("world", demo="text"),), validation_share=0.02, min_chars=8
    ),
    tokenizer=TokenizerConfig(sample_mb=4),
    model=ModelConfig(
        vocab_size=1024,
        n_layer=2,
        d_model=128,
        n_head=4,
        n_kv_head=2,
        d_ff=512,
        n_value_embeddings=2,
        context=512,
        window=64,
        pattern="SL",
        # a single cycle: minutes matter here
        hrm=HRMConfig(l_layer=1, h_layer=1, h_cycles=1, l_cycles=1),
    ),
    optim=OptimConfig(momentum_warmup_steps=50, vector_lr_ratio=3.0),
    pretrain=PretrainConfig(
        steps=1400,
        lr=1.2e-2,
        stages=(Stage(128, 0.2), Stage(256, 0.5), Stage(512, 0.3)),
        eval_every_steps=700,
        sample_every_steps=700,
        prompts=("Once", "What is", "The"),
        **DEMO_LOOP,
    ),
    mid=SFTConfig(
        sources=(*demo_made(1.0), ChatSource("alpaca", demo="alpaca", weight=0.5)),
        context=256,
        epochs=1.0,
        **DEMO_SFT,
    ),
    sft1=SFTConfig(
        sources=(
            ChatSource("alpaca", demo="alpaca"),
            ChatSource("dolly", demo="dolly"),
            *demo_made(0.1),
        ),
        context=256,
        epochs=0.85,
        **DEMO_SFT,
    ),
    sft2=SFTConfig(
        sources=(
            ChatSource("messages", demo="messages"),
            ChatSource("math", demo="math"),
            *demo_made(0.2),
        ),
        context=512,
        epochs=1.5,
        **DEMO_SFT,
    ),
    rl=RLConfig(
        environments=("new sums", "letters"),
        steps=60,
        prompts_per_step=8,
        max_tokens=128,
        lr_ratio=0.3,
        tool_cost=0.05,
        test_every_steps=10,
        micro_batch_tokens=4096,
        save_every_minutes=1.0,
    ),
    chat=ChatConfig(temperature=0.0, top_p=None, max_tokens=200),
)

BYTES_PER_TOKEN = 5  # of English text: what is fetched is read once, or a little less


def for_card(name: str, depth: int) -> Config:
    """A card's preset: a model of this depth, as much text as the rule has it read."""
    model = shaped(CARD.model, depth)
    n_bytes = BYTES_PER_TOKEN * TOKENS_PER_WEIGHT * model.n_weights
    total = sum(source.weight for source in CARD.data.sources)
    sources = tuple(
        replace(source, max_bytes=int(round(n_bytes * source.weight / total, -8)))
        for source in CARD.data.sources
    )
    return replace(CARD, preset=name, model=model, data=replace(CARD.data, sources=sources))


DEPTHS = {"16gb": 19, "12gb": 16, "24gb": 24, "8gb": 13}  # blocks; the rest follows
PRESETS: dict[str, Config] = {
    **{name: for_card(name, depth) for name, depth in DEPTHS.items()},
    "demo": DEMO,
}

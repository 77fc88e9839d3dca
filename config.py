"""Every number you may tune: frozen dataclasses, the presets, and the command line made from both.

In: the words after a script's name. Out: one checked `Config`.
Knows no other module of this project and does not import torch.

A comment behind a field is its help text: `uv run pretrain.py --help` prints them all.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class UserError(Exception):
    """Something a user can cause and mend; a script prints it without a traceback and
    exits with 2.
    """


# --------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class TextSource:
    """One corpus for pretraining: a hub data set, local files, or the built-in demo world (exactly
    one of them).
    """

    name: str = "corpus"  # folder name under text/ and tokens/, and the name in every log
    hub: str | None = None  # data set on the hub, as owner/name
    hub_config: str | None = None  # its configuration, such as sample-10BT
    revision: str | None = None  # its pinned commit; None takes the newest and writes down which
    split: str = "train"  # its split
    files: tuple[str, ...] = ()  # local files, folders or globs
    demo: str | None = None  # part of the built-in world: text
    column: str | None = None  # column that holds the text; None guesses and says so
    max_bytes: int | None = None  # stop after this many bytes of text; None takes all
    weight: float = 1.0  # share of the training tokens, relative to the other corpora


@dataclass(frozen=True)
class ChatSource:
    """One set of conversations for fine-tuning: a hub data set, local files, or the built-in demo
    world.
    """

    name: str = "chat"  # folder name under text/chat/, and the name in every log
    hub: str | None = None  # data set on the hub, as owner/name
    hub_config: str | None = None  # its configuration
    revision: str | None = None  # its pinned commit; None takes the newest and writes down which
    split: str = "train"  # its split
    # local files, folders or globs; the layout is recognised by the columns
    files: tuple[str, ...] = ()
    demo: str | None = None  # part of the built-in world: alpaca, dolly, messages or math
    max_rows: int | None = None  # stop after this many conversations; None takes all
    # longest reasoning taken, in characters; the worked solution stands in for a longer
    max_chars: int | None = None
    weight: float = 1.0  # how often each conversation is seen an epoch, relative to the other sets


@dataclass(frozen=True)
class DataConfig:
    """The pretraining corpora, how they are cleaned, and how they are cut into shards."""

    sources: tuple[TextSource, ...] = ()  # the corpora
    # your own files, folders or globs: take the place of the sources above
    text_files: tuple[str, ...] = ()
    # column of your own files that holds the text; None guesses and says so
    text_column: str | None = None
    # a weight for each of text_files, each then a corpus of its own
    text_weights: tuple[float, ...] = ()
    shard_mb: int = 256  # size of a text shard, in 10^6 bytes of text
    # share of the documents held out, chosen by a hash of their text
    validation_share: float = 0.005
    min_chars: int = 64  # shorter documents are dropped
    # drop documents of which one repeated line makes up more than this share
    max_repeated_line_share: float = 0.5
    deduplicate: bool = True  # drop exact duplicates, across all corpora
    # drop documents this similar (Jaccard, 0 to 1) by MinHash; None is off
    near_duplicates: float | None = None
    # how long a failing network is retried before giving up, in minutes
    retry_minutes: float = 30.0

    def problems(self) -> list[str]:
        found = []
        if not self.sources and not self.text_files:
            found.append("data: no corpus; give --data.text_files or data.sources")
        for source in self.sources:
            given = [bool(source.hub), bool(source.files), bool(source.demo)]
            if sum(given) != 1:
                found.append(f"data.sources {source.name!r}: give exactly one of hub, files, demo")
            if source.weight < 0:
                found.append(
                    f"data.sources {source.name!r}: weight is {source.weight}, must not be negative"
                )
        if self.text_weights and len(self.text_weights) != len(self.text_files):
            n_weights, n_files = len(self.text_weights), len(self.text_files)
            found.append(
                f"data.text_weights holds {n_weights} weights for {n_files} text_files: give one "
                "for each"
            )
        if any(weight < 0 for weight in self.text_weights):
            found.append("data.text_weights must not be negative")
        if not 0 < self.validation_share < 0.5:
            found.append(
                f"data.validation_share is {self.validation_share}, must lie between 0 and 0.5"
            )
        if self.shard_mb < 1:
            found.append(f"data.shard_mb is {self.shard_mb}, must be at least 1")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            found.append(
                f"data.near_duplicates is {self.near_duplicates}, must lie between 0 and 1"
            )
        return found

    def corpora(self) -> tuple[TextSource, ...]:
        """The corpora in force: your own files where given, the preset's sources otherwise."""
        if not self.text_files:
            return self.sources
        if not self.text_weights:
            return (TextSource(name="own", files=self.text_files, column=self.text_column),)
        weighted = enumerate(zip(self.text_files, self.text_weights, strict=True))
        return tuple(
            TextSource(name=f"own-{i}", files=(file,), column=self.text_column, weight=weight)
            for i, (file, weight) in weighted
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """How the byte-level BPE is trained; its size is model.vocab_size."""

    sample_mb: int = 1000  # text it is trained on, in 10^6 bytes, drawn from all corpora by weight
    shard_tokens: int = 100_000_000  # tokens in one token shard

    def problems(self) -> list[str]:
        return [
            f"tokenizer.{n} must be at least 1"
            for n in ("sample_mb", "shard_tokens")
            if getattr(self, n) < 1
        ]


# -------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class HRMConfig:
    """The hierarchical reasoning head: a fast module L and a slow module H, called in cycles after
    the trunk.

    The defaults are what measured best per FLOP at 1M parameters (EXPERIMENTS.md). A head trained
    with h_cycles 2 and deep supervision can also run once when chatting, for half the work.
    """

    l_layer: int = 2  # blocks in L, all with the short window
    h_layer: int = 2  # blocks in H, the last one sees the whole context
    h_cycles: int = 1  # times H is called
    l_cycles: int = 1  # times L is called before each call of H; 0 is no L: H alone is looped
    deep_supervision: bool = False  # a loss after every H cycle, one cycle's graph alive at a time

    def problems(self) -> list[str]:
        found = [
            f"model.hrm.{n} is {getattr(self, n)}, must be at least 1"
            for n in ("l_layer", "h_layer", "h_cycles")
            if getattr(self, n) < 1
        ]
        if self.l_cycles < 0:
            found.append(f"model.hrm.l_cycles is {self.l_cycles}, must be at least 0")
        return found


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network. Edit these; the rest follows."""

    vocab_size: int = 32_768  # entries of the tokenizer, special tokens included; a multiple of 128
    n_layer: int = 15  # transformer blocks in the trunk
    d_model: int = 768  # width of the residual stream
    n_head: int = 12  # query heads
    n_kv_head: int = 4  # key/value heads, each shared by n_head / n_kv_head query heads
    d_ff: int = 2048  # width inside the MLP
    # SwiGLU; False is squared ReLU, which a d_ff half as large again makes as many parameters
    gated_mlp: bool = True
    context: int = 4096  # longest sequence, in tokens
    # attention reach of a short layer, in tokens; None is the whole context
    window: int | None = 1024
    # short (S) and long (L) layers, repeated over the trunk; the last layer is always long
    pattern: str = "SSSL"
    rope_base: float = 10_000.0  # base of the rotary frequencies
    # trunk layers that learn a value a token: every other one from the last, then the rest
    n_value_embeddings: int = 0
    token_shift: bool = True  # mix into each token's embedding a learnt share of the one before
    # the reasoning head; None is the plain dense model
    hrm: HRMConfig | None = field(default_factory=HRMConfig)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    def problems(self) -> list[str]:
        found = []
        for name in ("vocab_size", "n_layer", "d_model", "n_head", "n_kv_head", "d_ff", "context"):
            if getattr(self, name) < 1:
                found.append(f"model.{name} is {getattr(self, name)}, must be at least 1")
        if found:
            return found
        if self.vocab_size % 128:
            near = max(1, round(self.vocab_size / 128)) * 128
            found.append(
                f"model.vocab_size is {self.vocab_size}, must be a multiple of 128: try {near}"
            )
        if self.d_model % self.n_head or self.head_dim % 2:
            found.append(
                f"model.d_model {self.d_model} / n_head {self.n_head} must be an even whole number"
            )
        if self.n_head % self.n_kv_head:
            found.append(
                f"model.n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}"
            )
        if not self.pattern or set(self.pattern) - set("SL"):
            found.append(
                f"model.pattern is {self.pattern!r}, must be made of S (short) and L (long)"
            )
        if self.window is not None and self.window < 1:
            found.append(f"model.window is {self.window}, must be at least 1 or None")
        if not 0 <= self.n_value_embeddings <= self.n_layer:
            found.append(
                f"model.n_value_embeddings is {self.n_value_embeddings}, must lie between 0 and "
                f"n_layer {self.n_layer}"
            )
        return found + (self.hrm.problems() if self.hrm else [])


# ----------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class OptimConfig:
    """The update rule; how fast it goes is set where it is used: pretrain.lr, sft1.lr, sft2.lr."""

    # muon: Muon for matrices, AdamW for the rest
    name: Literal["muon", "adamw", "schedulefree"] = "muon"
    embedding_lr_ratio: float = 3.0  # learning rate of the embedding, relative to lr
    weight_decay: float = 0.1  # of matrices only, decoupled, multiplied by the learning rate
    momentum: float = 0.95  # of Muon
    momentum_warmup_steps: int = 200  # Muon's momentum climbs from 0.85 over this many steps
    beta1: float = 0.8  # of AdamW
    beta2: float = 0.95  # of AdamW
    clip: float = 1.0  # largest gradient norm; gradients beyond it are scaled down

    def problems(self) -> list[str]:
        found = []
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optim.{name} is {getattr(self, name)}, must lie between 0 and 1")
        if self.clip <= 0:
            found.append(f"optim.clip is {self.clip}, must be above 0")
        return found


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum: how far attention reaches, and for how long."""

    context: int = 1024  # segments are cut at document ends and every this many tokens
    share: float = 1.0  # share of pretrain.steps
    # corpus weights of this stage, in their order; None takes the sources'
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LoopConfig:
    """What pretraining and fine-tuning share: the step, the schedule, what is shown and what is
    saved.
    """

    lr: float = 2e-3  # peak learning rate; Muon's updates are scaled to the size of AdamW's
    warmup_share: float = 0.02  # share of the steps over which the learning rate climbs
    decay_share: float = 0.6  # share of the steps, at the end, over which it falls in a line
    final_lr_ratio: float = 0.05  # learning rate at the end, relative to the peak
    tokens_per_step: int = 524_288  # tokens in one optimizer step, whatever the micro-batch
    # tokens in one forward pass; None is fitted to the card's free memory
    micro_batch_tokens: int | None = None
    eval_every_steps: int = 250  # steps between two evaluations on held-out data
    eval_tokens: int = 1_048_576  # held-out tokens of each corpus that an evaluation reads
    # steps between two lines on the console; metrics.jsonl notes every step
    log_every_steps: int = 10
    sample_every_steps: int = 1000  # steps between two sample texts
    save_every_minutes: float = 15.0  # minutes between two checkpoints
    keep_checkpoints: int = 2  # the newest ones kept
    # where figures go beside metrics.jsonl
    log_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    max_skipped_steps: int = 20  # spiking or non-finite steps in a row after which the run stops

    def loop_problems(self, where: str) -> list[str]:
        found = []
        for name in (
            "tokens_per_step",
            "eval_every_steps",
            "eval_tokens",
            "sample_every_steps",
            "keep_checkpoints",
            "log_every_steps",
        ):
            if getattr(self, name) < 1:
                found.append(f"{where}.{name} is {getattr(self, name)}, must be at least 1")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            found.append(
                f"{where}.micro_batch_tokens is {self.micro_batch_tokens}, must be above 0"
            )
        if self.lr <= 0:
            found.append(f"{where}.lr is {self.lr}, must be above 0")
        if self.micro_batch_tokens and self.tokens_per_step % self.micro_batch_tokens:
            found.append(
                f"{where}.tokens_per_step {self.tokens_per_step} must be a multiple of "
                f"micro_batch_tokens {self.micro_batch_tokens}"
            )
        if not 0 <= self.warmup_share + self.decay_share <= 1:
            found.append(f"{where}.warmup_share + decay_share is above 1")
        return found


@dataclass(frozen=True)
class PretrainConfig(LoopConfig):
    """Pretraining on the text corpora."""

    steps: int = 4800  # optimizer steps
    # the curriculum
    stages: tuple[Stage, ...] = (Stage(1024, 0.6), Stage(2048, 0.25), Stage(4096, 0.15))
    # beginnings that samples continue
    prompts: tuple[str, ...] = ("The", "Water is", "To add two numbers,")

    def problems(self, context: int) -> list[str]:
        found = self.loop_problems("pretrain")
        if self.steps < 1:
            found.append(f"pretrain.steps is {self.steps}, must be at least 1")
        if not self.stages:
            return [*found, "pretrain.stages is empty"]
        if not math.isclose(sum(stage.share for stage in self.stages), 1.0, abs_tol=1e-6):
            found.append(
                f"pretrain.stages: the shares add up to {sum(s.share for s in self.stages):.3f}, "
                "must be 1"
            )
        for stage in self.stages:
            if not 1 <= stage.context <= context or context % stage.context:
                found.append(
                    f"pretrain.stages: context {stage.context} must divide model.context {context}"
                )
        row = self.micro_batch_tokens or self.tokens_per_step
        if row % context:
            found.append(
                f"pretrain: micro-batch of {row} tokens must be a multiple of model.context "
                f"{context}"
            )
        return found


@dataclass(frozen=True)
class SFTConfig(LoopConfig):
    """One stage of fine-tuning on conversations."""

    sources: tuple[ChatSource, ...] = ()  # the sets of conversations
    # your own conversations: files, folders or globs that take the place of the sources
    files: tuple[str, ...] = ()
    context: int = 2048  # longest conversation, in tokens
    epochs: float = 3.0  # passes over the conversations
    repeat_earlier: float = 0.0  # stage 2: share of stage 1's conversations seen again, an epoch
    validation_share: float = 0.02  # share of the conversations held out, chosen by a hash
    prompts: tuple[str, ...] = ("Who are you?", "What is 12 + 7?")  # questions that samples answer
    # held-out questions answered at each evaluation, to see stopping, looping, reasoning
    probe_prompts: int = 24
    probe_tokens: int = 160  # longest answer to one of them, in tokens

    def problems(self, where: str, model_context: int) -> list[str]:
        found = self.loop_problems(where)
        if not self.sources and not self.files:
            found.append(f"{where}: no conversations; give --{where}.files or {where}.sources")
        for source in self.sources:
            if sum([bool(source.hub), bool(source.files), bool(source.demo)]) != 1:
                found.append(
                    f"{where}.sources {source.name!r}: give exactly one of hub, files, demo"
                )
        if not 0 < self.context <= model_context:
            found.append(
                f"{where}.context is {self.context}, must lie between 1 and model.context "
                f"{model_context}"
            )
        if self.epochs <= 0:
            found.append(f"{where}.epochs is {self.epochs}, must be above 0")
        return found

    def sets(self) -> tuple[ChatSource, ...]:
        """The sets in force: your own files where given, the preset's sources otherwise."""
        if not self.files:
            return self.sources
        return (
            ChatSource(name=f"own-{zlib.crc32(repr(self.files).encode()):08x}", files=self.files),
        )


# system turn of conversations that reason, in training and chat
REASONING_PROMPT = "Think step by step, then answer."


@dataclass(frozen=True)
class ChatConfig:
    """How the chat draws its answers."""

    system: str | None = None  # system prompt; None is no system turn
    temperature: float = 0.7  # 0 takes the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens; None is all
    # draw from the likeliest tokens that make up this probability; None is all
    top_p: float | None = 0.95
    # draw from tokens at least this likely, relative to the likeliest; None is all
    min_p: float | None = None
    # above 1 makes tokens already said less likely; never applied to <|end|>
    repetition_penalty: float = 1.0
    max_tokens: int = 1024  # longest answer, in tokens
    seed: int | None = None  # of the draws; None differs each time


@dataclass(frozen=True)
class ReportConfig:
    """The report in the run's folder: index.html and report.md."""

    draw: bool = True  # draw it after each evaluation and each stage
    price_per_kwh: float = 0.30  # price of a kilowatt-hour, in `currency`
    currency: str = "EUR"  # of the price
    # power drawn while training, where the card does not tell; None leaves the cost out
    watts: float | None = None

    def problems(self) -> list[str]:
        found = []
        if self.price_per_kwh < 0:
            found.append(f"report.price_per_kwh is {self.price_per_kwh}, must not be negative")
        if self.watts is not None and self.watts <= 0:
            found.append(f"report.watts is {self.watts}, must be above 0 or None")
        return found


# -------------------------------------------------------------------------------------------- whole


@dataclass(frozen=True)
class Config:
    """Everything one run needs; saved as JSON beside every checkpoint."""

    preset: str = "16gb"  # the preset it started from, and the name of its folder
    runs: str = "runs"  # folder that holds one folder a run
    name: str | None = None  # name of the run's folder; None is the preset's name
    seed: int = 0  # of initialisation, data order and samples
    # auto takes an NVIDIA card where torch can use it
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # fuse the blocks' small operations with torch.compile; None does so on a card
    compile: bool | None = None
    # products in pretraining; refused where that is slower
    eight_bit: Literal["float8", "int8"] | None = None
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft1: SFTConfig = field(default_factory=SFTConfig)
    sft2: SFTConfig = field(default_factory=SFTConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        found = [
            *self.data.problems(),
            *self.tokenizer.problems(),
            *self.model.problems(),
            *self.optim.problems(),
            *self.pretrain.problems(self.model.context),
            *self.sft1.problems("sft1", self.model.context),
            *self.sft2.problems("sft2", self.model.context),
            *self.report.problems(),
        ]
        if found:
            raise UserError(
                "This configuration cannot work:\n"
                + "\n".join(f"  - {problem}" for problem in found)
            )

    @property
    def run_dir(self) -> Path:
        """Folder of everything this run makes; removing it is starting over."""
        return Path(self.runs) / (self.name or self.preset)


# ------------------------------------------------------------------------------------------ presets

# No `revision` is pinned here: the first start takes the newest commit, writes it into the
# manifest, and sticks to it.
FINEWEB = TextSource(
    name="fineweb-edu",
    hub="HuggingFaceFW/fineweb-edu",
    hub_config="sample-10BT",
    column="text",
    max_bytes=5_000_000_000,
)
WEB_MATH = TextSource(
    name="open-web-math",
    hub="open-web-math/open-web-math",
    column="text",
    max_bytes=5_000_000_000,
    weight=0.5,
)
ALPACA = ChatSource(name="alpaca", hub="yahma/alpaca-cleaned")
DOLLY = ChatSource(name="dolly", hub="databricks/databricks-dolly-15k")
ULTRACHAT = ChatSource(name="ultrachat", hub="HuggingFaceH4/ultrachat_200k", split="train_sft")
OPENR1 = ChatSource(
    name="openr1-math", hub="open-r1/OpenR1-Math-220k", hub_config="default", max_chars=11_000
)


def _card(name: str, **pretrain: Any) -> Config:
    """A preset for a card; `pretrain` overrides what differs. All cards make the same model from
    the same tokens.
    """
    return Config(
        preset=name,
        data=DataConfig(sources=(FINEWEB, WEB_MATH)),
        pretrain=PretrainConfig(**pretrain),
        sft1=SFTConfig(
            sources=(ALPACA, DOLLY), context=2048, epochs=3.0, lr=5e-4, tokens_per_step=131_072
        ),
        sft2=SFTConfig(
            sources=(ULTRACHAT, OPENR1), context=4096, epochs=1.0, lr=5e-4, tokens_per_step=262_144
        ),
    )


DEMO = Config(
    preset="demo",
    data=DataConfig(
        sources=(TextSource(name="world", demo="text"),), validation_share=0.02, min_chars=8
    ),
    tokenizer=TokenizerConfig(sample_mb=4),
    model=ModelConfig(
        vocab_size=1024,
        n_layer=2,
        d_model=128,
        n_head=4,
        n_kv_head=2,
        d_ff=384,
        context=512,
        window=64,
        pattern="SL",
        # a single cycle: minutes matter here
        hrm=HRMConfig(l_layer=1, h_layer=1, h_cycles=1, l_cycles=1),
    ),
    optim=OptimConfig(momentum_warmup_steps=50),
    pretrain=PretrainConfig(
        steps=1700,
        lr=1.2e-2,
        tokens_per_step=1024,
        micro_batch_tokens=1024,
        stages=(Stage(128, 0.2), Stage(256, 0.5), Stage(512, 0.3)),
        eval_every_steps=425,
        log_every_steps=50,
        eval_tokens=16_384,
        sample_every_steps=850,
        save_every_minutes=1.0,
        prompts=("Once", "What is", "The"),
    ),
    sft1=SFTConfig(
        sources=(ChatSource(name="alpaca", demo="alpaca"), ChatSource(name="dolly", demo="dolly")),
        context=256,
        epochs=1.0,
        lr=3e-3,
        tokens_per_step=1024,
        micro_batch_tokens=1024,
        eval_every_steps=200,
        log_every_steps=50,
        eval_tokens=16_384,
        sample_every_steps=1000,
        save_every_minutes=1.0,
    ),
    sft2=SFTConfig(
        sources=(
            ChatSource(name="messages", demo="messages"),
            ChatSource(name="math", demo="math"),
        ),
        context=512,
        epochs=1.5,
        lr=3e-3,
        tokens_per_step=1024,
        micro_batch_tokens=1024,
        eval_every_steps=200,
        log_every_steps=50,
        eval_tokens=16_384,
        sample_every_steps=1000,
        save_every_minutes=1.0,
    ),
    chat=ChatConfig(temperature=0.0, top_p=None, max_tokens=200),
)

PRESETS: dict[str, Config] = {
    "16gb": _card("16gb"),
    "12gb": _card("12gb"),
    "24gb": _card("24gb"),
    "8gb": _card("8gb"),
    "demo": DEMO,
}

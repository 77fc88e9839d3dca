"""Fine-tuning: packed losses are those of conversations alone; what is too long; the probes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sft
from config import PRESETS, ChatSource, ModelConfig, SFTConfig, UserError
from hearth import run
from hearth.data import ingest, sources
from hearth.data.chat_format import loss_everywhere, render
from hearth.data.token_shards import TokenShards, TokenShardWriter
from hearth.data.tokenizer import Tokenizer
from hearth.training.batches import ConversationBatches
from hearth.training.held_out import evaluate_loss
from model import Model, PackedSequences, build_model


def talk(*turns: tuple[str, str], thinking: str | None = None) -> list[dict]:
    messages = [{"role": role, "content": content, "thinking": None} for role, content in turns]
    if thinking:
        messages[-1]["thinking"] = thinking
    return messages


TALKS = [
    talk(("user", "what is two and two"), ("assistant", "four")),
    talk(
        ("system", "think"),
        ("user", "three and one"),
        ("assistant", "4"),
        thinking="three, then four",
    ),
    talk(
        ("user", "hello"),
        ("assistant", "hello to you"),
        ("user", "who are you"),
        ("assistant", "a small model"),
    ),
    talk(("user", "one"), ("assistant", "two three")),
]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train([m["content"] for t in TALKS for m in t] * 3, 384)


@pytest.fixture
def model(tiny: ModelConfig) -> Model:
    made = build_model(replace(tiny, vocab_size=384, context=64), seed=0)
    made.dtype = torch.float32
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape, generator=rng)
    return made


def packed_batches(folder: Path, talks: list[list[dict]], words: Tokenizer) -> ConversationBatches:
    """All talks in one batch of rows of 64 tokens."""
    writer = TokenShardWriter(
        folder, {}, vocab_size=384, tokenizer_hash=words.hash, shard_tokens=10_000, masked=True
    )
    for messages in talks:
        rendered = render(messages, words)
        writer.add("train", rendered.ids, 1, rendered.loss)
    writer.finish()
    shards = TokenShards(folder, "train")
    plan = SFTConfig(sources=(ChatSource(demo="x"),), context=64, epochs=1.0, tokens_per_step=64)
    return ConversationBatches([shards], [1.0], plan, pad=words.pad, seed=0)


def test_a_packed_batch_loses_what_its_conversations_lose_alone(
    tmp_path: Path, model: Model, words: Tokenizer
) -> None:
    batches = packed_batches(tmp_path / "t", TALKS, words)
    packed_loss = packed_count = 0.0
    for step in range(batches.n_steps):
        batch = batches.batch(step)
        nats, count = evaluate_loss(model, [batch])
        packed_loss, packed_count = packed_loss + nats, packed_count + count
    alone = []
    for messages in TALKS:
        ids, loss = render(messages, words)
        ids = torch.tensor(ids)
        logits = model.logits(model(ids, PackedSequences(torch.arange(len(ids)) == 0, len(ids))))
        nats = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        alone.append(nats[torch.tensor(loss[1:])].detach())
    reference = torch.cat(alone)
    assert packed_count == len(reference)
    assert abs(packed_loss / packed_count - float(reference.mean())) < 1e-5


def test_another_conversation_in_the_pack_changes_no_logit(
    tmp_path: Path, model: Model, words: Tokenizer
) -> None:
    batch = packed_batches(tmp_path / "t", TALKS, words).batch(0)
    changed = batch.ids.clone()
    first, second = batch.starts.nonzero().flatten()[:2].tolist()
    changed[first + 1 : second] = (changed[first + 1 : second] + 1) % 384
    a, b = (
        model(ids, PackedSequences(batch.starts, batch.row_length)) for ids in (batch.ids, changed)
    )
    assert not torch.allclose(a[first:second], b[first:second])
    assert torch.equal(a[second:], b[second:])


def test_loss_covers_only_assistant_tokens_and_their_end(tmp_path: Path, words: Tokenizer) -> None:
    batches = packed_batches(tmp_path / "t", TALKS, words)
    learnt = Counter()
    for step in range(batches.n_steps):
        batch = batches.batch(step)
        learnt.update(batch.targets[batch.weights > 0].tolist())
    answers = [m for t in TALKS for m in t if m["role"] == "assistant"]
    expected = Counter(
        i for m in answers for i in words.encode(m["content"]) + words.encode(m["thinking"] or "")
    )
    expected[words.end] = len(answers)
    expected[words.think] = expected[words.end_think] = 1
    assert learnt == expected


CALLED = {"tool": "calculate", "arguments": "2 + 2", "result": "4"}


def test_loss_of_everything_covers_all_but_the_first_token_and_tool_results(
    words: Tokenizer,
) -> None:
    messages = talk(("user", "what is two and two"), ("assistant", "four"))
    messages[-1]["content"] = [CALLED, {"text": "four"}, CALLED]
    ids, assistant = render(messages, words)
    everywhere = loss_everywhere(ids, words)
    results = [i for i, learnt in enumerate(assistant) if not learnt and i > ids.index(words.end)]
    results.remove(ids.index(words.assistant))
    assert [ids[i] for i in results] == [
        *(words.tool_result, *words.encode("4"), words.end_tool_call)
    ] * 2
    assert [i for i, learnt in enumerate(everywhere) if not learnt] == [0, *results]


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_a_stage_learns_the_tokens_that_its_loss_names(
    loss: str, tmp_path: Path, words: Tokenizer
) -> None:
    demo = PRESETS["demo"]
    loop = replace(demo.mid, loss=loss, context=64, validation_share=0.0)
    config = replace(demo, runs=str(tmp_path), mid=loop)
    source = ChatSource("calculator", made="calculator", max_rows=20)
    ingest.write_chat_shards(source, config.run_dir / "text" / "chat" / source.name, 0.0)
    shards = TokenShards(sft.write_chat_tokens(config, source, loop, words, "mid"), "train")
    ids, mask = shards.read(0, shards.n_tokens), shards.read_mask(0, shards.n_tokens)
    learnt = {int(i) for i, learns in zip(ids, mask, strict=True) if learns}
    assert {words.tool_call, words.end_tool_call, words.end} <= learnt
    assert words.tool_result not in learnt
    assert (words.user in learnt) == (loss == "all")


def test_results_in_training_are_those_that_the_tools_give() -> None:
    rounded = CALLED | {"arguments": "2/3", "result": ".66"}
    refused, open_ended = CALLED | {"arguments": "2 +"}, CALLED | {"result": None}
    failed, other = refused | {"result": "error: ?"}, CALLED | {"tool": "search", "result": "?"}
    said = [{"text": "so "}, rounded, refused, failed, open_ended, other]
    messages = [*talk(("user", "one")), {"role": "assistant", "content": said, "thinking": None}]
    first, second = sft.with_results(messages)
    assert first == messages[0]
    assert [part.get("result") for part in second["content"]] == [
        *(None, "0.6666666667", "error: not an expression", None, "?")
    ]
    assert messages[1]["content"][1] == rounded  # what was read stays as it is


def test_a_stage_without_conversations_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = PRESETS["demo"]
    config = replace(demo, runs=str(tmp_path), mid=replace(demo.mid, epochs=0))
    config = replace(config, sft2=replace(demo.sft2, sources=()))
    config.run_dir.mkdir(parents=True)
    trained: list[str] = []
    monkeypatch.setattr(sft, "train_stage", lambda config, name, start, work: trained.append(name))
    sft.main(config, sft.Options())
    assert trained == ["sft1"]
    said = capsys.readouterr().out
    assert "middle stage: left out, it has no conversations" in said
    assert "fine-tuning, stage 2: left out" in said


def test_a_stage_starts_from_the_one_before_that_the_run_has(tmp_path: Path) -> None:
    demo = PRESETS["demo"]
    without = replace(demo, runs=str(tmp_path), mid=replace(demo.mid, epochs=0))
    with run.working_on(without, makes=("sft1",), creates=True) as work:
        with pytest.raises(UserError, match="base, which holds no checkpoint"):
            sft.stage_before(without, "sft1", work)
        with pytest.raises(UserError, match="mid, which holds no checkpoint"):
            sft.stage_before(replace(without, mid=demo.mid), "sft1", work)


def test_what_is_too_long_loses_whole_turns_or_is_dropped_and_counted(
    tmp_path: Path, words: Tokenizer, monkeypatch
) -> None:
    whole = talk(("user", "one"), ("assistant", "two"))
    long_end = talk(
        ("user", "one"), ("assistant", "two"), ("user", "tell"), ("assistant", "three " * 60)
    )
    long_thought = talk(("user", "one"), ("assistant", "two"), thinking="four " * 60)
    monkeypatch.setattr(
        sources, "read_conversations", lambda folder, split: iter([whole, long_end, long_thought])
    )
    counts: Counter[str] = Counter()
    kept = list(sft.fitting(tmp_path, "train", 40, words, counts))
    assert [r.ids for r in kept] == [render(whole, words).ids] * 2
    assert sorted(counts.values()) == [1, 1, 1]
    assert any("dropped" in what for what in counts)


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        (list(range(40)), False),
        (list(range(8)) * 2, False),
        (list(range(8)) * 3, True),
        ([1] * 10, True),
    ],
)
def test_a_loop_is_eight_tokens_said_three_times(ids: list[int], loops: bool) -> None:
    assert sft.is_looping(ids) == loops


def test_probes_count_stopping_looping_and_reasoning(
    model: Model, words: Tokenizer, monkeypatch
) -> None:
    answers = [[50, words.end], [words.think, 3, words.end_think, words.end], [9] * 12]
    monkeypatch.setattr(sft.Engine, "generate", lambda self, prompts, **settings: answers)
    prompts = [sft.ProbePrompt([1], False), sft.ProbePrompt([1], True), sft.ProbePrompt([1], True)]
    assert sft.probe(model, words, prompts, 12) == {
        "stops": pytest.approx(2 / 3),
        "loops": pytest.approx(1 / 3),
        "reasons": pytest.approx(2 / 3),
    }

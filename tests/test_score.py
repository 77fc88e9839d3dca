"""Scoring a checkpoint: the figures, what is kept of them, and that lm-eval sees the same."""

from __future__ import annotations

import json
import math
import random
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config as settings
import score
from benchmarks import agreement
from config import Config, ModelConfig, ReportConfig, UserError
from hearth.data.chat_format import Answer
from hearth.data.token_shards import TokenShards, TokenShardWriter
from hearth.data.tokenizer import Tokenizer
from hearth.evaluation import tasks
from hearth.reporting import report
from hearth.training import checkpoint
from hearth.training.batches import validation_batches
from hearth.training.checkpoint import Loaded
from hearth.training.held_out import evaluate_loss
from hearth.training.optim import build_optimizers
from model import Model, PackedSequences, initialise
from score import Options, Reply

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "saw",
    "two",
    "red",
    "birds",
    "over",
    "there",
    "by",
    "water",
]


def some_text(rng: random.Random, low: int = 3, high: int = 40) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with held-out tokens, a base checkpoint and a chat checkpoint of a tiny, loud,
    untrained model.
    """
    folder, rng = tmp_path_factory.mktemp("runs"), random.Random(0)
    tokenizer = Tokenizer.train([some_text(rng) for _ in range(100)], 384)
    shape = ModelConfig(
        vocab_size=384, n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=48, context=64, window=8
    )
    demo = settings.PRESETS["demo"]
    stages = tuple(replace(stage, context=32) for stage in demo.pretrain.stages)
    pretrain = replace(demo.pretrain, stages=stages, eval_tokens=2000)
    stages = {"sft1": replace(demo.sft1, context=64), "sft2": replace(demo.sft2, context=64)}
    config = replace(
        demo,
        runs=str(folder),
        model=shape,
        pretrain=pretrain,
        report=ReportConfig(draw=False),
        **stages,
    )
    writer = TokenShardWriter(
        config.run_dir / "tokens" / "world",
        {},
        vocab_size=384,
        tokenizer_hash=tokenizer.hash,
        shard_tokens=10**6,
    )
    for split, n in (("train", 2), ("validation", 60)):
        for text in (some_text(rng) for _ in range(n)):
            writer.add(
                split, np.array([tokenizer.bos, *tokenizer.encode(text)]), len(text.encode())
            )
    writer.finish()
    model = initialise(Model(shape), seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    optimizers = build_optimizers(model, config.optim, 1e-3)
    for stage in ("base", "sft2"):
        state = {"stage": stage, "step": 7, "steps": 7, "tokens": 7000, "seconds": 1.0}
        checkpoint.save(config.run_dir / stage, model, optimizers, config, tokenizer, state, 1)
    return config


@pytest.fixture
def loaded(run: Config) -> Loaded:
    return checkpoint.load_for_inference(run.run_dir / "base")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Some tasks' files, in CORE's layout."""
    rng, folder = random.Random(1), tmp_path / "files"
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("copa", "arc_easy", "lambada_openai", "winograd_wsc")
    }
    for _ in range(20):
        for name in ("copa", "arc_easy"):
            choices = [some_text(rng, 1, 5) for _ in range(2 if name == "copa" else 4)]
            rows[name].append(
                {"query": some_text(rng, 2, 8), "choices": choices, "gold": rng.randrange(2)}
            )
        rows["lambada_openai"].append(
            {"context": some_text(rng, 4, 12), "continuation": rng.choice(WORDS)}
        )
        options = [some_text(rng, 2, 5) for _ in range(2)]
        rows["winograd_wsc"].append(
            {"context_options": options, "continuation": some_text(rng, 1, 4), "gold": 0}
        )
    folder.mkdir()
    for name, items in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def held_out(config: Config) -> TokenShards:
    return TokenShards(config.run_dir / "tokens" / "world", "validation")


# ------------------------------------------------------------------------------------ bits per byte


def test_bits_per_byte_are_those_of_pretrainings_evaluation(run: Config, loaded: Loaded) -> None:
    shards = held_out(run)
    wants = {"context": 64, "max_tokens": 2000, "micro_tokens": 256, "bos": loaded.tokenizer.bos}
    batches = list(validation_batches(shards, **wants))
    nats, _ = evaluate_loss(loaded.model, batches)
    n_bytes = sum(
        int(loaded.tokenizer.token_bytes[b.targets[b.weights > 0].numpy()].sum()) for b in batches
    )
    value, _, n = score.bits_per_byte(loaded, shards, None)
    assert value == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert n == shards.n_documents


def test_the_error_of_bits_per_byte_is_that_of_leaving_documents_out(
    run: Config, loaded: Loaded
) -> None:
    """The jackknife over documents is the slow reference; the ratio's linear estimate comes close
    to it.
    """
    shards = held_out(run)
    _, error, n = score.bits_per_byte(loaded, shards, None)
    sums, sizes = np.zeros(n), np.zeros(n)
    starts = [0, *shards.ends[:-1]]
    for i, (start, end) in enumerate(zip(starts, shards.ends, strict=True)):
        ids = torch.from_numpy(shards.read(int(start), int(end)))
        hidden = [
            loaded.model(part, PackedSequences(torch.zeros(len(part), dtype=torch.bool), len(part)))
            for part in ids.split(64)
        ]
        nats = F.cross_entropy(
            loaded.model.logits(torch.cat(hidden)[:-1]), ids[1:], reduction="none"
        )
        sums[i], sizes[i] = float(nats.sum()), loaded.tokenizer.token_bytes[ids[1:].numpy()].sum()
    without = (sums.sum() - sums) / (sizes.sum() - sizes) / math.log(2)
    jackknife = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    assert error == pytest.approx(jackknife, rel=0.25)


def test_a_limit_reads_the_first_documents_only(run: Config, loaded: Loaded) -> None:
    assert score.bits_per_byte(loaded, held_out(run), 10)[2] == 10


# ------------------------------------------------------------------------------------- chat answers


@pytest.mark.parametrize(
    ("gold", "said", "right"),
    [
        ("18", "She makes $18 every day.", True),
        ("18", "So the answer is \\boxed{18}.", True),
        ("70000", "$70,000", True),
        ("72", "72.0", True),
        ("15", "It was 18, then 3 less.", False),
        ("5", "I do not know.", False),
        ("5", "", False),
    ],
)
@pytest.mark.filterwarnings("default")
def test_an_answer_is_right_when_it_means_the_same_number(
    gold: str, said: str, right: bool
) -> None:
    assert score.same_number(gold, said) == right


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("The answer is C.", "C"),
        ("(D) water", "D"),
        ("Because", None),
        ("E", None),
        ("", None),
    ],
)
def test_a_letter_must_stand_alone(said: str, letter: str | None) -> None:
    assert score.first_letter(said, "ABCD") == letter


def test_chat_questions_list_their_choices_once() -> None:
    texts = {"query": "Question: Who sat?", "choices": ["the cat", "a bird"], "gold": 1}
    asked = score.letter_question(texts)
    assert asked.text.count("A. the cat\nB. a bird") == 1
    assert asked.is_right(Answer(None, "B"))
    assert not asked.is_right(Answer("B", "A"))
    listed = score.letter_question(
        {"query": "Who?\nA. cat\nB. bird", "choices": ["A", "B"], "gold": 0}
    )
    assert listed.text == "Who?\nA. cat\nB. bird\nAnswer with the letter of the right choice."


def test_gsm8k_is_read_in_both_layouts() -> None:
    for row in (
        {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
        {"context": "1 + 1?", "answer": "2"},
    ):
        asked = score.gsm8k_question(row)
        assert (asked.text, asked.reasons) == ("1 + 1?", True)
        assert asked.is_right(Answer("one and one", "2"))


def test_behaviour_counts_answers_that_stop_and_think_as_asked() -> None:
    replies = [
        Reply(Answer("7, 8", "9"), True, True, 4),
        Reply(Answer(None, "9"), True, False),
        Reply(Answer("7, 8, 9", ""), False, True, 6),
        Reply(Answer(None, " "), True, True),  # says nothing
    ]
    found = {one.task.removeprefix("x: "): one for one in score.behaviour(replies, "x")}
    shares = {name: f.value for name, f in found.items() if f.metric == "share"}
    assert shares == {
        "stops by itself": 0.75,
        "thinks exactly when asked": 0.75,
        "keeps the format": 0.25,
    }
    length = found["length of the reasoning"]
    assert (length.value, length.n, length.metric) == (5.0, 2, "tokens")
    assert score.in_words(length) == "5.0 ±  1.0"
    assert "%" not in report.score_text({"value": 5.0, "stderr": 1.0, "metric": "tokens"})


def test_reasoning_is_measured_in_tokens_between_its_signs(loaded: Loaded) -> None:
    t = loaded.tokenizer
    assert score.thinking_tokens([t.think, 40, 41, t.end_think, 42, t.end], t) == 2
    assert score.thinking_tokens([t.think, 40, 41, t.end], t) == 2  # never closed
    assert score.thinking_tokens([t.think, 40], t) == 1
    assert score.thinking_tokens([40, t.end], t) is None


def test_a_reply_tells_stopping_and_thinking_from_the_ids(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoint.load_for_inference(run.run_dir / "sft2")
    t = loaded.tokenizer
    # the shortest prompt comes first: c, a, b
    said = [[60, t.end], [t.think, 50, t.end_think, 60, t.end], [60, 61]]
    monkeypatch.setattr(score.Engine, "generate", lambda self, prompts, **_: said)
    replies = score.ask(loaded, [("a", True), ("b", True), ("c", False)], 10)
    assert [(reply.stopped, reply.as_asked) for reply in replies] == [
        (True, True),
        (False, False),
        (True, True),
    ]


# --------------------------------------------------------------------------------- the whole script


def scores_of(config: Config) -> list[dict[str, Any]]:
    return report.read_json(config.run_dir / "report" / "score.json")["scores"]


def test_every_score_has_an_error_a_chance_level_and_a_count(run: Config, files: Path) -> None:
    wanted = ("bpb", "copa", "winograd", "lambada_openai")
    score.main(run, Options(checkpoint=("base",), tasks=wanted, files=str(files), limit=12))
    found = {s["task"]: s for s in scores_of(run)}
    assert set(found) == {
        "world, held out",
        "copa",
        "winograd",
        "lambada_openai",
        "3 of CORE's 22 tasks",
    }
    for s in found.values():
        assert s["stderr"] is not None
        assert s["n"] == (
            12 if s["task"] in ("copa", "winograd", "lambada_openai", "world, held out") else 36
        )
        assert (s["chance"] is None) == (s["metric"] == "bits per byte")
    centred = [
        (found[name]["value"] - chance) / (1 - chance)
        for name, chance in (("copa", 0.5), ("winograd", 0.5))
    ]
    assert found["3 of CORE's 22 tasks"]["value"] == pytest.approx(
        (sum(centred) + found["lambada_openai"]["value"]) / 3
    )


def test_the_demo_preset_asks_the_demo_worlds_questions(
    run: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    score.main(run, Options(n_questions=8))
    found = {s["task"] for s in scores_of(run) if s["stage"] == "sft2"}
    kinds = {f"world: {kind}" for kind in ("facts", "comparison", "counting", "arithmetic")}
    assert {"world", *kinds, "world: stops by itself", "world: thinks exactly when asked"} <= found
    assert len(report.read_json(run.run_dir / "report" / "score.json")["asked"]) == 8
    assert "world" in capsys.readouterr().out


def test_comparing_takes_scores_that_are_there(
    run: Config, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(compare=("base", "sft2"), tasks=("copa",), files=str(files))
    score.main(run, options)
    first = capsys.readouterr().out
    monkeypatch.setattr(tasks, "outcomes", None)  # nothing is scored again
    score.main(run, options)
    rows = [line for line in first.splitlines() if line.startswith("copa")]
    assert rows[-1] in capsys.readouterr().out
    assert rows[-1].count("±") == 2
    with pytest.raises(TypeError):
        score.main(run, replace(options, limit=5))  # another limit is another score


def test_beside_chat_models_a_base_model_is_not_asked_to_chat(loaded: Loaded) -> None:
    base = replace(loaded, state={**loaded.state, "stage": "base"})
    chat = replace(loaded, state={**loaded.state, "stage": "sft2"})
    several, one = (
        Options(compare=("base", "sft2"), tasks=("copa", "gsm8k_chat")),
        Options(tasks=("gsm8k_chat",)),
    )
    assert score.tasks_wanted(base, several) == ["copa"]
    assert score.tasks_wanted(chat, several) == ["copa", "gsm8k_chat"]
    assert score.tasks_wanted(base, one) == ["gsm8k_chat"]  # and is told why not


def test_a_new_checkpoint_of_a_stage_takes_the_old_ones_place(tmp_path: Path) -> None:
    path, found = tmp_path / "score.json", [score.Score("copa", "accuracy", 0.5)]
    for stage, step in (("base", 1), ("sft1", 1), ("base", 2)):
        state = {"stage": stage, "step": step, "tokens": step}
        score.ScoreBook(path, Path(f"{stage}/step-{step}"), state).keep("copa", found, Options())
    assert {(s["stage"], s["step"]) for s in report.read_json(path)["scores"]} == {
        ("sft1", 1),
        ("base", 2),
    }


@pytest.mark.parametrize("name", ["nothing", "sft1", "."])
def test_a_checkpoint_that_is_none_is_named(name: str, run: Config) -> None:
    with pytest.raises(UserError, match="is no checkpoint"):
        score.find(name, run)


def test_any_checkpoint_of_any_run_is_found(run: Config) -> None:
    whole = checkpoint.newest(run.run_dir / "base")
    other = replace(run, name="another")
    for name, config in (("base", run), (str(run.run_dir / "base"), other), (str(whole), other)):
        assert score.find(name, config) == whole
    assert score.find(str(run.run_dir), other) == checkpoint.newest(run.run_dir / "sft2")


def test_a_task_that_is_none_is_answered_with_those_there_are(loaded: Loaded) -> None:
    with pytest.raises(UserError, match=r"no task piqua.*arc_easy"):
        score.tasks_wanted(loaded, Options(tasks=("piqua",)))


def test_a_group_goes_on_where_a_file_is_missing_and_a_task_by_name_does_not(
    run: Config, files: Path
) -> None:
    score.main(run, Options(checkpoint=("base",), tasks=("core",), files=str(files), limit=2))
    assert "4 of CORE's 22 tasks" in {s["task"] for s in scores_of(run)}
    with pytest.raises(UserError, match=r"piqa\.jsonl"):
        score.main(run, Options(checkpoint=("base",), tasks=("piqa",), files=str(files)))


def test_a_network_that_is_not_there_is_asked_once(
    run: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """22 tasks that cannot be fetched make one line, after one wait."""
    monkeypatch.delenv("HEARTH_DATA", raising=False)
    asked = []

    def refuse(address: str, timeout: float) -> None:
        asked.append(address)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    score.main(run, Options(checkpoint=("base",), tasks=("core",)))
    assert len(asked) == 1
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert "hellaswag_zeroshot, jeopardy," in told
    assert "--files" in told


# ------------------------------------------------------------------------------------------ lm-eval


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["copa", "arc_easy", "lambada_openai"])
def test_lm_eval_agrees_item_by_item(
    name: str, loaded: Loaded, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through its own task, prompts and figures, on a model that scores one text a pass: no code of
    ours but the tokenizer's. lm-eval chooses by the whole text's likelihood, so that is what is
    compared.
    """
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: uv sync --extra lm-eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from hearth.evaluation.lm_eval_adapter import HearthLM

    ours = agreement.by_us(loaded, name, files / f"{name}.jsonl", None)
    for model in (HearthLM(loaded), agreement.alone_model(loaded)):
        theirs, accuracy = agreement.by_lm_eval(model, name, files / f"{name}.jsonl", None)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.nats == pytest.approx(other.nats, rel=1e-4)
            assert (mine.greedy, agreement.choice(mine)) == (other.greedy, agreement.choice(other))
        assert accuracy == pytest.approx(sum(map(agreement.is_right, ours)) / len(ours))


@pytest.mark.filterwarnings("default")
def test_lm_eval_generates_and_reads_whole_texts(loaded: Loaded) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: uv sync --extra lm-eval")
    from lm_eval.api.instance import Instance

    from hearth.evaluation.lm_eval_adapter import HearthLM

    model, text = HearthLM(loaded), " ".join(WORDS * 12)  # longer than the context
    wishes = [{"until": [], "max_gen_toks": 12}]
    (whole,) = model.generate_until([Instance("generate_until", {}, ("the cat", wishes[0]), 0)])
    stop = whole[len(whole) // 2]
    wishes.append({"until": ["\0", stop], "max_gen_toks": 12})
    (said,) = model.generate_until([Instance("generate_until", {}, ("the cat", wishes[1]), 0)])
    assert said == whole.split(stop)[0] != whole
    (likelihood,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert -1e5 < likelihood < -len(WORDS)

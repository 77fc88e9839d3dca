"""Tasks: prompts as llm-foundry writes them, batched scores as one text a pass gives them, files
and their layouts.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from config import ModelConfig, UserError
from hearth.data.tokenizer import Tokenizer
from hearth.evaluation import tasks
from hearth.evaluation.tasks import Outcome, Prompt, Task
from model import Model, PackedSequences, initialise

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


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    return Tokenizer.train([" ".join(rng.choices(WORDS, k=12)) + ".\n" for _ in range(200)], 384)


@pytest.fixture
def model(tiny: ModelConfig) -> Model:
    """A model with a loud voice: random weights everywhere, so that no two texts score alike."""
    model = initialise(Model(replace(tiny, vocab_size=384, context=48)), seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng) * 0.2)
    return model.requires_grad_(False)


def some_items(kind: str, n: int = 24) -> list[dict]:
    rng = random.Random(kind)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    items = []
    for _ in range(n):
        if kind == "choice":
            choices = [words(1, 6) for _ in range(rng.randint(2, 4))]
            items.append(
                {"query": words(2, 12), "choices": choices, "gold": rng.randrange(len(choices))}
            )
        elif kind == "schema":
            start, options = words(2, 8), rng.sample(WORDS, 2)
            options = [f"{start} {option} by the" for option in options]
            items.append(
                {"context_options": options, "continuation": words(1, 5), "gold": rng.randrange(2)}
            )
        else:
            items.append({"context": words(2, 20), "continuation": words(1, 3)})
    return items


def one_by_one(model: Model, prompt: Prompt) -> tuple[list[float], list[bool]]:
    """The reference: each text alone, all its logits."""
    nats, greedy = [], []
    for row, start in zip(prompt.rows, prompt.starts, strict=True):
        ids = torch.tensor(row)
        logits = model.logits(
            model(ids, PackedSequences(torch.zeros(len(ids), dtype=torch.bool), len(ids)))
        )[start - 1 : -1]
        nats.append(float(F.cross_entropy(logits, ids[start:], reduction="sum")))
        greedy.append(bool((logits.argmax(dim=-1) == ids[start:]).all()))
    return nats, greedy


# ------------------------------------------------------------------------------------------ scoring


@pytest.mark.parametrize("kind", ["choice", "schema", "language"])
@pytest.mark.parametrize("shots", [0, 5])
def test_batched_scores_equal_one_text_a_pass(
    kind: str, shots: int, model: Model, tokenizer: Tokenizer
) -> None:
    task = Task("some", "some.jsonl", kind, shots, 0.0)
    asked = tasks.prompts(task, some_items(kind), tokenizer, model.config.context, None)
    # a prompt longer than the context is in it too
    assert any(prompt.cut for prompt in asked) == (shots > 0)
    for batch_tokens in (200, 100_000):
        for prompt, found in zip(
            asked, tasks.outcomes(model, asked, batch_tokens=batch_tokens), strict=True
        ):
            nats, greedy = one_by_one(model, prompt)
            assert found.nats == pytest.approx(nats, rel=1e-4, abs=1e-4)
            assert found.greedy == greedy


def test_the_beginning_that_options_share_is_computed_once(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass over the beginning and one over the options' ends, wherever all options
    fit a batch.
    """
    item = {"query": " ".join(WORDS), "choices": ["the cat", "a bird", "water", "two"], "gold": 0}
    asked = tasks.prompts(
        Task("some", "", "choice", 0, 0.25), [item], tokenizer, model.config.context, None
    )
    seen = []
    real = tasks.decode
    monkeypatch.setattr(
        tasks,
        "decode",
        lambda model, ids, cache: seen.append(ids.numel()) or real(model, ids, cache),
    )
    tasks.outcomes(model, asked)
    shared = tasks.shared_length(asked[0])
    longest_end = max(len(row) - shared for row in asked[0].rows)
    assert shared == asked[0].starts[0] - 1
    assert seen == [shared, 4 * longest_end]


def test_the_attention_chunk_changes_no_score(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tasks.prompts(
        Task("some", "", "choice", 2, 0.0), some_items("choice"), tokenizer, 48, None
    )
    whole = tasks.outcomes(model, asked)
    monkeypatch.setattr(tasks, "SCORES_PER_PASS", 4000)
    monkeypatch.setattr(tasks, "LOGITS_PER_PASS", 400)
    for a, b in zip(whole, tasks.outcomes(model, asked), strict=True):
        assert a.nats == pytest.approx(b.nats, rel=1e-4)


# ------------------------------------------------------------------------------------------ prompts


def test_examples_are_the_ones_that_llm_foundry_draws() -> None:
    """The numbers are what its own `get_fewshot_sample_idxs` gives, called for items 0 to 5 in a
    row.
    """
    rng = random.Random(1234)
    drawn = [tasks.draw_examples(12, 4, index, rng) for index in range(6)]
    assert drawn == LLM_FOUNDRY_DRAWS
    for index, examples in enumerate(drawn):
        assert index not in examples
        assert len(set(examples)) == 4


LLM_FOUNDRY_DRAWS = [
    [1, 7, 9, 10],
    [0, 5, 9, 10],
    [0, 9, 10, 3],
    [9, 10, 5, 7],
    [9, 2, 1, 7],
    [0, 1, 2, 8],
]


def test_examples_never_hold_the_item_itself_even_when_all_others_are_needed() -> None:
    rng = random.Random(0)
    for index in range(5):
        assert sorted(tasks.draw_examples(5, 10, index, rng)) == [i for i in range(5) if i != index]


def test_a_choice_reads_as_llm_foundry_writes_it() -> None:
    task = Task("arc", "", "choice", 1, 0.25, "\nAnswer: ")
    example = {"query": "Question: Is it warm?", "choices": ["no", "yes"], "gold": 1}
    item = {"query": "Question: Is it far?", "choices": ["yes", "no"], "gold": 1}
    shown = "Question: Is it warm?\nAnswer: yes"
    context = "\nQuestion: Is it far?\nAnswer:"
    assert tasks.texts_of(task, item, [example]) == [
        (shown, context, " yes"),
        (shown, context, " no"),
    ]
    assert tasks.texts_of(task, item, [])[0] == ("", "Question: Is it far?\nAnswer:", " yes")


def test_a_schema_reads_as_llm_foundry_writes_it() -> None:
    task = Task("winograd", "", "schema", 1, 0.5)
    example = {
        "context_options": ["It fell as it", "It fell as he"],
        "continuation": "broke.",
        "gold": 0,
    }
    item = {
        "context_options": ["Ann ran as Ann", "Ann ran as Bo"],
        "continuation": "called.",
        "gold": 1,
    }
    shown = "It fell as it broke."
    assert tasks.texts_of(task, item, [example]) == [
        (shown, "\nAnn ran as Ann", " called."),
        (shown, "\nAnn ran as Bo", " called."),
    ]
    assert tasks.texts_of(task, item, [])[1] == ("", "Ann ran as Bo", " called.")


def test_a_language_task_reads_as_llm_foundry_writes_it() -> None:
    task = Task("jeopardy", "", "language", 2, 0.0, "\nAnswer: ")
    a, b, item = (
        {"context": f"Who is {name}?", "continuation": name} for name in ("Ann", "Bo", "Cy")
    )
    shown = "Who is Ann?\nAnswer: Ann\nWho is Bo?\nAnswer: Bo"
    assert tasks.texts_of(task, item, [a, b]) == [(shown, "\nWho is Cy?\nAnswer:", " Cy")]


def test_a_prompt_too_long_keeps_bos_and_every_ending(tokenizer: Tokenizer) -> None:
    items = [
        {"query": " ".join(WORDS * 20), "choices": ["the cat", "a bird over there"], "gold": 0}
    ]
    (prompt,) = tasks.prompts(Task("some", "", "choice", 0, 0.5), items, tokenizer, 40, None)
    assert prompt.cut
    assert prompt.starts[0] == prompt.starts[1]  # both options keep the same beginning
    for row, start, text in zip(
        prompt.rows, prompt.starts, (" the cat", " a bird over there"), strict=True
    ):
        assert len(row) <= 40
        assert row[0] == tokenizer.bos
        assert tokenizer.decode(row[start:]) == text
        assert " ".join(WORDS * 20).endswith(tokenizer.decode(row[1:start]).strip())


def test_a_limit_leaves_the_other_items_prompts_as_they_were(tokenizer: Tokenizer) -> None:
    task = Task("some", "", "choice", 3, 0.0)
    whole = tasks.prompts(task, some_items("choice"), tokenizer, 4096, None)
    assert tasks.prompts(task, some_items("choice"), tokenizer, 4096, 5) == whole[:5]


def test_examples_come_from_the_items_own_category(tokenizer: Tokenizer) -> None:
    items = [
        {"context": f"{word} {i}", "continuation": word, "category": word}
        for i in range(6)
        for word in ("a", "on")
    ]
    asked = tasks.prompts(
        Task("some", "", "language", 3, 0.0, by_category=True), items, tokenizer, 4096, None
    )
    for prompt in asked:
        text = tokenizer.decode(prompt.rows[0][1:])
        assert {line.split()[0] for line in text.splitlines()} == {prompt.category}


# --------------------------------------------------------------------------------------- the scores


def outcome(right: bool, category: str = "") -> Outcome:
    return Outcome([1.0, 2.0], [1, 1], [False, False], 0 if right else 1, category)


def test_the_choice_is_the_likeliest_per_token() -> None:
    """Per token it is the first, as a whole the second."""
    found = Outcome([4.0, 3.0, 3.5], [8, 2, 2], [False] * 3, 0)
    assert found.choice() == 0
    assert found.right


def test_a_language_item_is_right_when_every_token_is_the_likeliest() -> None:
    assert Outcome([9.0], [3], [True], 0).right
    assert not Outcome([0.1], [3], [False], 0).right


def test_categories_count_alike_whatever_their_size() -> None:
    found = [outcome(True, "a")] * 9 + [outcome(False, "a")] + [outcome(False, "b")] * 2
    value, error = tasks.accuracy(found)
    assert value == pytest.approx((0.9 + 0.0) / 2)
    assert error == pytest.approx(math.sqrt(0.9 * 0.1 / 9) / 2)


def test_the_standard_error_is_that_of_a_mean() -> None:
    value, error = tasks.accuracy([outcome(True)] * 30 + [outcome(False)] * 10)
    assert (value, error) == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 39)))


def test_centred_scores_are_zero_at_chance_and_one_when_all_is_right() -> None:
    assert tasks.centred(0.25, 0.25) == 0.0
    assert tasks.centred(1.0, 0.403) == 1.0
    assert tasks.centred(0.31, 0.62) == pytest.approx(-0.31 / 0.38)


def test_core_is_the_22_tasks_of_dclm() -> None:
    assert len({task.name for task in tasks.CORE}) == 22


# -------------------------------------------------------------------------------------------- files


def test_layouts_of_other_sources_come_out_alike() -> None:
    hellaswag = {"ind": 4, "ctx": "He sat", "label": "1", "endings": ["up.", "down."]}
    assert tasks.as_item(hellaswag) == {"query": "He sat", "choices": ["up.", "down."], "gold": 1}
    asked = {"subject": "sums", "question": "1 + 1 ", "choices": ["1", "2"], "answer": "B"}
    item = {"query": "1 + 1\nA. 1\nB. 2", "choices": ["A", "B"], "gold": 1, "category": "sums"}
    assert tasks.as_item(asked) == item
    assert tasks.as_item(asked | {"answer": 1}) == item


@pytest.mark.parametrize("line", ["no json", '{"text": "a"}', "[]", '{"ctx": "a", "endings": []}'])
def test_a_file_that_is_no_task_is_named_with_its_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text('{"query": "a", "choices": ["b"], "gold": 0}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"piqa\.jsonl, line 3"):
        tasks.read_items(path)


def test_files_are_found_in_a_folder_by_path_or_name(tmp_path: Path) -> None:
    for place in (
        "commonsense_reasoning/piqa.jsonl",
        "eval/core/commonsense_reasoning/copa.jsonl",
        "hellaswag_val.jsonl",
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("{}")
    for name in ("piqa", "copa", "hellaswag"):
        assert tasks.find_file(tasks.TASKS[name].file, tmp_path, tmp_path / "store").is_file()
    with pytest.raises(UserError, match="looked for"):
        tasks.find_file(tasks.TASKS["boolq"].file, tmp_path, tmp_path / "store")


def test_a_file_is_fetched_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source" / "a"
    source.mkdir(parents=True)
    (source / "task.jsonl").write_text(json.dumps({"context": "a"}))
    monkeypatch.setattr(tasks, "SOURCE", f"{(tmp_path / 'source').as_uri()}/")
    path = tasks.find_file("a/task.jsonl", None, tmp_path / "store")
    (source / "task.jsonl").unlink()
    assert tasks.find_file("a/task.jsonl", None, tmp_path / "store") == path
    assert tasks.read_items(path) == [{"context": "a"}]
    with pytest.raises(UserError, match="--files"):
        tasks.find_file("a/other.jsonl", None, tmp_path / "store")
    assert [p.name for p in (tmp_path / "store" / "a").iterdir()] == ["task.jsonl"]

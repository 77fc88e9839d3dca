"""lm-eval sees the same scores as we do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scored import WORDS, make_run, write_files

from benchmarks import agreement
from config import Config, UserError
from hearth.training import checkpoint
from hearth.training.checkpoint import Loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def loaded(run: Config) -> Loaded:
    found = checkpoint.load_for_inference(run.run_dir / "base")
    found.model.dtype = torch.float32  # a CPU with bf16 rounds both ways differently
    return found


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_files(tmp_path / "files")


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


@pytest.mark.filterwarnings("default")
def test_a_task_that_lm_eval_lacks_or_cannot_fetch_is_named(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: uv sync --extra lm-eval")
    from hearth.evaluation import lm_eval_adapter

    with pytest.raises(UserError, match="no task arc_eazy"):
        lm_eval_adapter.lm_eval_scores(loaded, ["arc_eazy"], limit=1)

    def offline(**given: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(lm_eval_adapter, "simple_evaluate", offline)
    with pytest.raises(UserError, match=r"cannot fetch the data of arc_easy: no route"):
        lm_eval_adapter.lm_eval_scores(loaded, ["arc_easy"], limit=1)

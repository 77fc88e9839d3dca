"""A pass that is recorded once and replayed says what ordinary passes say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from config import HRMConfig, ModelConfig
from hearth.decoding.engine import Engine
from hearth.decoding.graphs import cuda_graph
from model import Model, build_model

SHAPES = {
    "head": {},
    "dense": {"hrm": None, "pattern": "SSL"},
    "whole": {"window": None, "token_shift": False, "n_value_embeddings": 0, "bigram_rows": 70},
    "gated": {"gated_mlp": True, "exclusive_attention": False, "window": 5},
}


def awake(shape: str) -> Model:
    """A model with nothing hidden behind zeros."""
    config = ModelConfig(
        **{"vocab_size": 128, "n_layer": 3, "d_model": 32, "n_head": 4, "n_kv_head": 2},
        **{"d_ff": 48, "context": 48},
        **{
            **{"window": 6, "pattern": "SL", "n_value_embeddings": 1, "bigram_rows": 90},
            **{"hrm": HRMConfig(1, 2, 2, 1), **SHAPES[shape]},
        },
    )
    model = build_model(config, seed=0).requires_grad_(False)
    model.dtype = torch.float32
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p += (0.4 if p.dim() == 2 and p is not model.embedding else 0.1) * torch.randn(
            p.shape, generator=rng
        )
    return model


def traced(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """As a CUDA graph: the operations of one run on the tensors that it met, every number that the
    processor knew then part of them; the result is written where the first one lay.
    """
    run()  # warms up
    graph = make_fx(run)()
    result = graph()
    return lambda: result.copy_(graph()), result


def some_ids(n: int, seed: int) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 128, (n,), generator=rng).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_replayed_passes_say_what_ordinary_ones_do(shape: str) -> None:
    """Prompts of unlike length, beyond the windows, rows that end early and are dropped."""
    model, found = awake(shape), []
    prompts = [some_ids(n, n) for n in (3, 9, 17, 5)]
    said = Engine(model).generate(prompts, max_tokens=28)
    stops = [said[0][4], said[2][11]]
    for record in (None, traced):
        engine = Engine(model, record=record)
        answers = engine.complete(prompts, max_tokens=28, stop_ids=stops, logprobs=True)
        found.append(answers)
        assert engine._recorded is None  # the cache's memory is free again
    assert [a.ids for a in found[0]] == [a.ids for a in found[1]]
    assert len({len(a.ids) for a in found[0]}) > 1
    for ours, theirs in zip(*found, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_a_stream_records_once_and_goes_on_over_turns() -> None:
    """Also after the cache was brought back to an earlier column."""
    model, times = awake("head"), []

    def counted(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        times.append(1)
        return traced(run)

    plain, ours = Engine(model), Engine(model, record=counted)
    prompt = some_ids(6, 0)
    for turn in range(3):
        said = [list(e.stream(prompt, max_tokens=7)) for e in (plain, ours)]
        assert said[0] == said[1]
        prompt = [*prompt, *said[0][: 5 - turn], *some_ids(3, turn)]
    assert len(times) == 1


def test_weights_that_change_in_place_are_read_again() -> None:
    model = awake("dense")
    engine = Engine(model, record=traced)
    before = list(engine.stream(some_ids(6, 0), max_tokens=8))
    model.trunk[0].up.mul_(-2)
    engine.held = []  # the cache holds what the old weights made
    engine.cache.length = 0
    after = list(engine.stream(some_ids(6, 0), max_tokens=8))
    assert after == list(Engine(model).stream(some_ids(6, 0), max_tokens=8))
    assert after != before


def test_a_device_that_cannot_record_decodes_without_and_says_so(capsys) -> None:
    def fails(run: Callable[[], Tensor]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    model, prompts = awake("head"), [some_ids(4, 0), some_ids(7, 1)]
    answers = Engine(model, record=fails).generate(prompts, max_tokens=9)
    assert answers == Engine(model).generate(prompts, max_tokens=9)
    said = capsys.readouterr().out
    assert said.count("decoding    without CUDA graphs: operation not permitted") == 1


def test_a_full_cache_is_an_error_not_a_wrong_column() -> None:
    engine = Engine(awake("dense"), record=traced)
    list(engine.stream(some_ids(5, 0), max_tokens=3))
    engine.cache.length = engine.cache.capacity
    with pytest.raises(ValueError, match="48 columns are full"):
        engine.extend([1], mark=False)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
def test_on_a_card_recorded_passes_say_what_ordinary_ones_do(weights: str | None, capsys) -> None:
    """In float32 where the weights are; in 16 or 8 bits a near tie may fall to either side."""
    model = awake("head").to("cuda")
    prompts, found = [some_ids(n, n) for n in (3, 9, 17, 5)], []
    for record in (True, False):
        engine = Engine(model, weights=weights)
        assert engine.record is cuda_graph
        engine.record = engine.record if record else None
        found.append(engine.generate(prompts, max_tokens=28))
    assert "without CUDA graphs" not in capsys.readouterr().out
    same = sum(a == b for a, b in zip(*found, strict=True))
    assert same == 4 if weights is None else same >= 2

"""Stored matrices and the kernels behind them: every shape, store and path gives the product it
stands for.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import HRMConfig, ModelConfig
from hearth.decoding import matrices
from hearth.decoding.engine import Engine, FastBlock
from hearth.decoding.kv_cache import KVCache, decode, for_decoding
from hearth.decoding.matrices import STORES, Matrix, compiled_kernels
from model import Model, build_model

SHAPES = ((1, 2), (6, 32), (33, 70), (128, 64), (61, 1031), (12, 2500))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose by sharing their work between cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernels, and what a machine without a C compiler uses."""
    if request.param == "torch":
        monkeypatch.setattr(matrices, "compiled_kernels", lambda: None)
    elif compiled_kernels() is None:
        pytest.skip("this machine has no C compiler")
    return request.param


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(**changes) -> Model:
    """A small model with nothing hidden behind zeros."""
    shape = {
        "vocab_size": 128,
        "n_layer": 3,
        "d_model": 32,
        "n_head": 4,
        "n_kv_head": 2,
        "d_ff": 48,
        "context": 300,
    }
    head = HRMConfig(l_layer=1, h_layer=2, h_cycles=2, l_cycles=1)
    model = build_model(ModelConfig(**{**shape, "window": 6, "hrm": head, **changes}), seed=0)
    model.dtype = torch.float32
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p += 0.2 * random(*p.shape, seed=seed)
    return model


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 49])
def test_product_is_that_of_the_stored_numbers(
    kernels: str, store: str, shape: tuple[int, int], rows: int
) -> None:
    matrix, x = Matrix(random(*shape), store), random(rows, shape[1], seed=1)
    expected = x @ matrix.float().T
    # torch's products round x to bfloat16
    rounding = 1e-2 if kernels == "torch" and store != "float32" else 2e-4
    assert matrix(x).shape == expected.shape
    assert (matrix(x) - expected).norm() <= rounding * (x.norm() * matrix.float().norm())


@pytest.mark.parametrize(
    ("store", "error", "n_bytes"),
    [("float32", 0, 4), ("bfloat16", 2**-9, 2), ("int8", 0.01, 1 + 1 / 64), ("int4", 0.11, 9 / 16)],
)
def test_stored_numbers_are_close_to_the_weights(store: str, error: float, n_bytes: float) -> None:
    weight = random(64, 256) * torch.logspace(-3, 3, 64)[:, None]  # rows of very different size
    matrix = Matrix(weight, store)
    assert ((matrix.float() - weight).norm(dim=1) <= error * weight.norm(dim=1)).all()
    assert torch.equal(matrix[torch.tensor([5, 5, 63])], matrix.float()[[5, 5, 63]])
    assert matrix.n_bytes() == n_bytes * weight.numel()


def test_each_32_columns_have_a_scale_of_their_own_in_4_bits() -> None:
    weight = random(16, 8, 32) * torch.logspace(-3, 3, 8)[:, None]
    error = Matrix(weight.flatten(1), "int4").float().view_as(weight) - weight
    assert (error.norm(dim=2) <= 0.15 * weight.norm(dim=2)).all()


def test_the_output_keeps_8_bits_where_the_blocks_have_4() -> None:
    model = Engine(awake(), weights="int4").model
    kernel = model.trunk[0].block if isinstance(model.trunk[0], FastBlock) else model.trunk[0]
    assert (model.embedding.store, kernel.q.store, kernel.down.store) == ("int8", "int4", "int4")


def test_rows_of_zeros_stay_zero(kernels: str) -> None:
    for store in STORES:
        assert not Matrix(torch.zeros(4, 64), store)(random(1, 64)).any()
        assert not Matrix(random(4, 64), store)(torch.zeros(1, 64)).any()


def test_an_unknown_store_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"float32, bfloat16, int8, int4.*'int2'"):
        Matrix(random(2, 2), "int2")


@pytest.mark.parametrize("window", [None, 6, 270])
@pytest.mark.parametrize(
    "shape",
    [
        {"n_head": 2, "n_kv_head": 2},
        {"n_head": 4, "n_kv_head": 1, "d_model": 128},
        {"n_head": 4, "d_model": 256, "gated_mlp": False},
    ],
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pad", [[0], [0, 0, 0], [3, 0, 255, 20, 262, 0, 0, 0, 0]])
def test_a_block_in_one_call_equals_the_common_way(
    window: int | None, shape: dict, pad: list[int], stored: torch.dtype
) -> None:
    """Over the edge of the window and of the shares that attention is cut into, in rows of
    different length.
    """
    if compiled_kernels() is None:
        pytest.skip("this machine has no C compiler")
    # a rounding that falls the other way is small in the trunk, but a random head makes ten times
    # as much of it
    model, rows = (
        awake(window=window, **shape, **({} if stored == torch.float32 else {"hrm": None})),
        len(pad),
    )
    common = for_decoding(model, lambda weight: Matrix(weight, "float32"))
    fast = Engine(model, weights="float32").model
    assert isinstance(fast.trunk[0], FastBlock)
    ids = torch.randint(0, 128, (rows, 280), generator=torch.Generator().manual_seed(0))
    caches = [KVCache(rows, 300, pad=pad, dtype=stored) for _ in range(2)]
    for m, cache in zip((common, fast), caches, strict=True):
        decode(m, ids[:, :265], cache)
    # a key that lies between two numbers takes either
    tolerance = 1e-4 if stored == torch.float32 else 2e-3
    for tokens in ids[:, 265:].T:
        a, b = (
            decode(m, tokens[:, None], cache)
            for m, cache in zip((common, fast), caches, strict=True)
        )
        assert (a - b).norm(dim=-1).max() <= tolerance * a.norm(dim=-1).max()


@pytest.mark.parametrize("store", STORES)
def test_keys_and_values_take_no_more_bits_than_the_weights(store: str) -> None:
    engine = Engine(awake(), weights=store)
    list(engine.stream([1, 2, 3], max_tokens=3))
    bits = torch.float32 if store == "float32" else torch.bfloat16
    assert {x.dtype for slot in engine.cache.slots for x in slot} == {bits}
    assert engine.cache_bytes() == engine.cache.n_bytes()


@pytest.mark.parametrize("store", ["int8", "int4"])
def test_the_result_does_not_depend_on_the_number_of_threads(store: str) -> None:
    matrix, x, before = Matrix(random(610, 600), store), random(16, 600), torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((matrix(x[:1]), matrix(x)))  # large enough to be shared
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_machine_without_compiler_decodes_all_the_same(kernels: str) -> None:
    model = awake()
    expected = Engine(model).generate([[1, 2, 3]], max_tokens=12)
    assert Engine(model, weights="float32").generate([[1, 2, 3]], max_tokens=12) == expected
    for store in STORES[1:]:
        assert len(Engine(model, weights=store).generate([[1, 2, 3]], max_tokens=12)[0]) == 12


def test_the_copy_for_decoding_leaves_the_model_as_it_was() -> None:
    model = awake()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    Engine(model, weights="int8").generate([[1, 2, 3]], max_tokens=4)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert len(before) == len(model.state_dict())


@pytest.mark.parametrize("broken", ["compiler fails", "cache is not writable"])
def test_a_broken_compiler_or_cache_is_survived(broken: str, tmp_path: Path) -> None:
    """A fresh process, as the library is looked for once a process."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    if broken == "compiler fails":
        environment |= {"CC": "false", "PATH": str(tmp_path)}
        (tmp_path / "false").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "false").chmod(0o755)
    else:
        (tmp_path / "cache").write_text("a file where the folder should be")
    code = (
        "import torch, matrices; "
        "print(matrices.Matrix(torch.ones(4, 64), 'int8')(torch.ones(1, 64)).sum().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=matrices.SOURCE.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(256, rel=0.01)


def test_a_compiler_is_missing_only_where_its_kernels_are_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(matrices, "compiled_kernels", compiled_kernels.__wrapped__)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for wanted in ("1", "0"):
        monkeypatch.setenv("HEARTH_KERNELS", wanted)
        assert matrices.compiler_missing() == (wanted == "1")


@pytest.mark.parametrize("store", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "d"), [(7, 50), (33, 40), (130, 256)])
def test_a_row_of_a_product_does_not_depend_on_its_neighbours(store: str, n: int, d: int) -> None:
    if compiled_kernels() is None:
        pytest.skip("no C compiler")
    matrix, x = Matrix(torch.randn(n, d), store), torch.randn(8, d)
    together = matrix(x)
    fewest = 1 if store == "float32" else 2  # a single row times 16 bits goes its own way
    for rows in range(fewest, 9):
        assert torch.equal(matrix(x[:rows]), together[:rows])

"""Products in 8 bits: close to ordinary ones, used for training alone, refused where they do not
pay.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig, UserError
from hearth.training import eight_bit
from hearth.training.eight_bit import linear, linear_that_pays
from model import PackedSequences, build_model

CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


def product_and_gradients(multiply) -> list[Tensor]:
    """y, dx and dw of the mean square of x wᵀ."""
    rng = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=rng) for shape in ((64, 48), (96, 48)))
    x, w = x.bfloat16().requires_grad_(), w.requires_grad_()
    y = multiply(x, w.to(x.dtype))
    y.float().square().mean().backward()
    return [y.detach().float(), x.grad.float(), w.grad]


@needs_torchao
@pytest.mark.parametrize(("kind", "allowed"), [("float8", 0.06), ("int8", 0.02)])
def test_products_and_both_gradients_are_close_to_ordinary_ones(kind: str, allowed: float) -> None:
    for ours, plain in zip(
        product_and_gradients(linear(kind)), product_and_gradients(F.linear), strict=True
    ):
        assert 0 < (ours - plain).norm() / plain.norm() < allowed


@needs_torchao
@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_a_model_trains_with_them_and_is_read_without(kind: str, tiny: ModelConfig) -> None:
    config = replace(tiny, d_model=32, n_head=2, n_kv_head=1, d_ff=64)
    model, ids = build_model(config, seed=0), torch.arange(33) % config.vocab_size
    # zero at the start, which would hide the products
    torch.nn.init.normal_(model.trunk[0].down, std=0.1)
    where, weights = PackedSequences(torch.arange(32) == 0, 32), torch.full((32,), 1 / 32)

    def loss() -> Tensor:
        return model.loss(model(ids[:-1], where), ids[1:], weights)

    with torch.no_grad():  # with gradients a norm may round otherwise
        plain = loss().item()
        model.multiply_with(linear(kind))
        assert loss().item() == plain
    trained = loss()
    trained.backward()
    assert trained.item() == pytest.approx(plain, rel=0.02)
    assert trained.item() != plain
    assert all(block.up.grad.isfinite().all() for block in model.trunk)


@needs_torchao
@pytest.mark.parametrize("ours", [1.0, 2.0])
def test_they_are_taken_where_they_are_faster_and_refused_with_both_times_elsewhere(
    ours: float, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, d_model=32, n_head=2, n_kv_head=1, d_ff=64)
    monkeypatch.setattr(
        eight_bit, "mlp_seconds", lambda product, *_: 1.2 if product is F.linear else ours
    )
    if ours == 1.0:
        assert callable(linear_that_pays("int8", config, CPU, torch.float32, False))
        return
    with pytest.raises(UserError, match=r"takes 2000.00 ms .* 1200.00 ms without"):
        linear_that_pays("int8", config, CPU, torch.float32, False)


def test_widths_that_no_card_multiplies_in_8_bits_are_named(tiny: ModelConfig) -> None:
    with pytest.raises(UserError, match="multiples of 16, but the model's are 40"):
        linear_that_pays(
            "float8", replace(tiny, d_model=40, n_head=2, n_kv_head=1), CPU, torch.float32, False
        )


@pytest.mark.parametrize(
    ("kind", "capability", "said"),
    [
        (
            "float8",
            (8, 6),
            r"Ada \(RTX 40\) on, .* 8.9; this is some card, 8.6. Take --eight_bit int8",
        ),
        ("float8", (7, 5), "some card, 7.5. Leave --eight_bit away"),
        ("int8", (7, 5), r"Ampere \(RTX 30\) on, .* 8.0; this is some card, 7.5. Leave"),
    ],
)
def test_a_card_that_cannot_is_named_with_what_it_could_take(
    kind: str, capability: tuple[int, int], said: str, tiny: ModelConfig, monkeypatch
) -> None:
    monkeypatch.setattr(eight_bit.hardware, "describe", lambda device: "some card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match=said):
        linear_that_pays(kind, tiny, torch.device("cuda"), torch.bfloat16, True)


def test_apples_chip_is_named(tiny: ModelConfig, monkeypatch) -> None:
    monkeypatch.setattr(eight_bit.hardware, "describe", lambda device: "Apple GPU")
    with pytest.raises(UserError, match=r"this is Apple GPU.*Leave --eight_bit away"):
        linear_that_pays("int8", tiny, torch.device("mps"), torch.float32, False)


def test_a_product_that_fails_in_the_trial_is_an_error_with_its_reason(
    tiny: ModelConfig, monkeypatch
) -> None:
    """As on an AMD card whose library has no such kernel."""

    def fail(x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available")

    config = replace(tiny, d_model=32, n_head=2, n_kv_head=1, d_ff=64)
    monkeypatch.setattr(eight_bit, "linear", lambda kind: fail)
    with pytest.raises(UserError, match=r"does not work on CPU.*no kernel image.*Leave"):
        linear_that_pays("int8", config, CPU, torch.float32, False)


def test_a_missing_torchao_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8.config", None)
    with pytest.raises(UserError, match="uv run --extra eight-bit"):
        linear("float8")

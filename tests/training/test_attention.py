"""Every kind of attention means the reference; a trial picks one that works."""

from __future__ import annotations

import ast
import math
import shutil
import sys
from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from config import ModelConfig, UserError
from hearth.evaluation import scores, tasks
from hearth.training import attention, gradients, held_out, rollouts
from hearth.training.batches import Batch
from hearth.training.checkpoint import Loaded
from model import DOORS, Model, PackedSequences, attend_in_blocks, build_model

WINDOWS = [None, 1, 6, 40, 130, 1000]


def documents(row_length: int, device: str = "cpu") -> PackedSequences:
    """600 tokens whose documents end at edges of blocks, of windows and of rows, and off them."""
    starts = torch.zeros(600, dtype=torch.bool)
    starts[[3, 130, 131, 290, 450]] = True
    return PackedSequences(starts, row_length, torch.device(device))


def random_heads(n: int, seed: int = 0, **kind) -> list[torch.Tensor]:
    """q (N, 4, E), k and v (N, 2, E)."""
    rng = torch.Generator().manual_seed(seed)
    heads = [torch.randn(n, h, 32, generator=rng) for h in (4, 2, 2)]
    return [x.to(**kind).requires_grad_() for x in heads]


# ------------------------------------------------------------------------------ FlashAttention's


def flash_attention(q, k, v, edges, longest, left: int, right: int) -> torch.Tensor:
    """What FlashAttention documents of packed segments, in plain torch: a segment's query i sees
    the segment's keys i - left to i + right, all where a bound is -1; each key head serves a group
    of neighbouring query heads; edges are int32, dtypes 16 bits wide.
    """
    for x in (q, k, v):
        assert x.dtype == torch.bfloat16
    assert edges.dtype == torch.int32
    assert edges[0] == 0
    assert edges[-1] == len(q) == len(k) == len(v)
    assert 0 < int(edges.diff().min()) <= int(edges.diff().max()) <= longest
    out = []
    for start, end in zip(edges.tolist(), edges.tolist()[1:], strict=False):
        groups = q.shape[1] // k.shape[1]
        key, value = (x[start:end].float().repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q[start:end].float(), key) / q.shape[2] ** 0.5
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        unseen = (distance > left) & (left >= 0) | (distance < -right) & (right >= 0)
        share = scores.masked_fill(unseen, -math.inf).softmax(dim=-1)
        out.append(torch.einsum("hqk,khe->qhe", share, value))
    return torch.cat(out).to(q.dtype)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """The function of this name in the flash-attn package, as its documentation has it."""
    assert dropout_p == 0
    assert softmax_scale is None
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    left, right = window_size
    longest = min(max_seqlen_q, max_seqlen_k)
    return flash_attention(q, k, v, cu_seqlens_q, longest, left, 0 if causal else right)


@wraps(varlen_attn)
def plain_varlen_attn(*args, **kwargs):
    """`varlen_attn` of the torch that is here, by its signature and documentation."""
    bound = signature(varlen_attn).bind(*args, **kwargs)
    bound.apply_defaults()
    said = bound.arguments
    assert said.get("scale") is None
    # the same tensor, not only equal: one of its kernels is causal under no other condition
    assert said["cu_seq_q"] is said["cu_seq_k"]
    q, k, v = said["query"], said["key"], said["value"]
    assert q.shape[1] == k.shape[1] or said.get("enable_gqa", True)
    longest = min(said["max_q"], said["max_k"])
    return flash_attention(q, k, v, said["cu_seq_q"], longest, *said["window_size"])


@pytest.mark.parametrize("door", ["varlen_attn", "flash-attn"])
@pytest.mark.parametrize("window", [None, 1, 6, 40, 130, 1000])
def test_the_call_of_a_cards_attention_means_attention_in_blocks(
    window: int | None, door: str, monkeypatch
) -> None:
    """Over the edges of windows, documents and rows; forward and backward, from bfloat16."""
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen_attn)
    packed, heads = documents(300), random_heads(600, dtype=torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in heads]
    y = attention.KINDS[door]()(*heads, packed, window)
    expected = attend_in_blocks(*exact, packed, window)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=2e-2, rtol=2e-2)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for a, b in zip(
        torch.autograd.grad((y * weights).sum(), heads),
        torch.autograd.grad((expected * weights.float()).sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(a.float(), b, atol=4e-2, rtol=4e-2)


# ------------------------------------------------------------------------------ flex_attention's


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("row_length", [300, 600, 100])
@pytest.mark.parametrize("window", WINDOWS)
def test_flex_attention_under_our_mask_is_attention_in_blocks(
    window: int | None, row_length: int
) -> None:
    packed = documents(row_length)
    heads = [x.detach() for x in random_heads(600)]
    y = attention.attend_flex(flex_attention, *heads, packed, window)
    expected = attend_in_blocks(*heads, packed, window)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row_length", [300, 600, 100])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_tiles_of_flex_attention_are_those_that_torch_finds_by_looking(
    window: int | None, row_length: int
) -> None:
    """`create_block_mask` asks for every pair of tokens; ours is told by the documents' edges."""
    ours = attention.flex_mask(documents(row_length), window)
    theirs = create_block_mask(ours.mask_mod, 1, 1, 600, 600, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for counts, places in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
    ):
        for n, a, b in zip(
            getattr(ours, counts).flatten().tolist(),
            getattr(ours, places)[0, 0].tolist(),
            getattr(theirs, places)[0, 0].tolist(),
            strict=True,
        ):
            assert sorted(a[:n]) == sorted(b[:n])


@pytest.mark.slow
def test_compiled_flex_attention_is_attention_in_blocks_and_compiles_once_a_size() -> None:
    """On a CPU, where only the forward pass can be compiled; windows and documents differ."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for row_length, window in ((300, None), (600, 6), (100, 130), (300, 40)):
            packed, heads = documents(row_length), [x.detach() for x in random_heads(600)]
            y = attention.attend_flex(attention.compiled(), *heads, packed, window)
            expected = attend_in_blocks(*heads, packed, window)
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------- the trial


@pytest.fixture
def pretend_card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`pick` for a tiny model as on a card that has only the kinds that are given."""
    model_on = on_pretended_card(monkeypatch)
    return lambda tiny, **kinds: attention.pick(model_on(tiny, **kinds))


def on_pretended_card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Model]:
    """A tiny model as on a card that has only the kinds of attention that are given."""

    def model_on(tiny: ModelConfig, **kinds: Callable[[], object]) -> Model:
        model = build_model(tiny, seed=0)
        model.dtype = torch.float32
        monkeypatch.setattr(attention, "KINDS", kinds)
        monkeypatch.setattr(Model, "device", property(lambda model: PretendCard()))
        return model

    class PretendCard:
        """The CPU, which says that it is a card."""

        type = "cuda"

    real = PackedSequences.__init__

    def on_cpu(self, starts, row_length, device=None) -> None:
        real(self, starts, row_length, torch.device("cpu"))

    to = torch.Tensor.to
    monkeypatch.setattr(PackedSequences, "__init__", on_cpu)
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda x, *a, **k: x if isinstance(a[0], PretendCard) else to(x, *a, **k),
    )
    monkeypatch.setattr(attention.hardware, "free_memory", lambda device: None)
    monkeypatch.setattr(attention.hardware, "describe", lambda device: "a pretended card")
    monkeypatch.setattr("hearth.training.attention.DOORS", {})
    return model_on


def blocks() -> Callable[..., torch.Tensor]:
    return lambda *given: attend_in_blocks(*given)


def refuses() -> None:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def not_installed() -> None:
    raise ModuleNotFoundError("No module named 'flash_attn'")


def sees_the_future() -> Callable[..., torch.Tensor]:
    """As a kernel whose window is off by one."""
    return lambda q, k, v, packed, window: attend_in_blocks(q, k, v, packed, window and window + 1)


def wrong_backward() -> Callable[..., torch.Tensor]:
    def attend(q, k, v, packed, window):
        y = attend_in_blocks(q, k, v, packed, window)
        return y + (k.sum() - k.sum().detach())

    return attend


def nan() -> Callable[..., torch.Tensor]:
    return lambda *given: attend_in_blocks(*given) * math.nan


def test_the_first_kind_that_works_is_picked_and_named(tiny, pretend_card, capsys) -> None:
    assert pretend_card(tiny, extra=not_installed, mine=blocks, other=blocks) == "mine"
    assert capsys.readouterr().out == "attention   mine\n"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (refuses, "only supports Ampere"),
        (sees_the_future, "off by"),
        (wrong_backward, "off by"),
        (nan, "off by nan"),
    ],
)
def test_a_kind_that_fails_or_is_wrong_falls_to_the_next_with_a_note(
    broken: Callable, said: str, tiny, pretend_card, capsys
) -> None:
    assert pretend_card(tiny, fast=broken, sure=blocks) == "sure"
    line = capsys.readouterr().out
    assert line.startswith("attention   sure; fast does not work here: ")
    assert said in line


def test_where_nothing_works_training_ends_with_the_reasons(tiny, pretend_card) -> None:
    with pytest.raises(UserError, match=r"fast does not work here.*sure does.*--device cpu"):
        pretend_card(tiny, fast=refuses, sure=nan)


def test_on_a_processor_the_reference_is_picked(tiny: ModelConfig, monkeypatch, capsys) -> None:
    monkeypatch.setattr("hearth.training.attention.DOORS", {})
    model = build_model(tiny, seed=0)
    assert "in blocks" in attention.pick(model)
    assert {("cpu", model.dtype): attend_in_blocks} == attention.DOORS
    assert capsys.readouterr().out.startswith("attention   scaled_dot_product_attention in blocks")


def test_a_flash_attn_of_another_torch_is_a_reason_to_take_the_next(
    tiny: ModelConfig, pretend_card, monkeypatch, capsys
) -> None:
    # without the function: ImportError
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    kinds = {"flash-attn": attention.flash_attn_package, "sure": blocks}
    assert pretend_card(tiny, **kinds) == "sure"
    assert "flash-attn does not work here: cannot import name" in capsys.readouterr().out


def test_a_torch_without_varlen_attn_takes_the_next_kind(
    tiny: ModelConfig, pretend_card, monkeypatch, capsys
) -> None:
    """As ROCm's or an older one may be; a kernel that its card lacks fails in the trial."""
    kinds = {"varlen_attn": attention.varlen_attn_of_torch, "sure": blocks}
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert pretend_card(tiny, **kinds) == "sure"
    monkeypatch.undo()


def test_a_model_trains_through_what_was_picked(tiny: ModelConfig, monkeypatch) -> None:
    calls = []

    def door(*given):
        calls.append(given[-1])
        return attend_in_blocks(*given)

    monkeypatch.setitem(DOORS, ("cpu", torch.float32), door)
    model = build_model(tiny, seed=0)
    model.dtype = torch.float32
    model(torch.zeros(32, dtype=torch.long), PackedSequences(torch.arange(32) == 0, 32))
    assert calls == [block.window for block in model.block_passes()]


# what makes a pass over packed sequences, in training, evaluation, scoring and practice
PASSES: dict[str, Callable[[Model, Batch], object]] = {
    "training": lambda model, batch: gradients.backward(model, batch, 1.0),
    "held-out loss": lambda model, batch: held_out.evaluate_loss(model, [batch]),
    "bits per byte": lambda model, batch: scores.token_losses(Loaded(model, None, None, {}), batch),
    "tasks": lambda model, batch: tasks.outcomes(model, [tasks.Prompt([[1, 2, 3]], [2])]),
    "practice": rollouts.training_logprobs,
}


@pytest.mark.parametrize("name", PASSES)
def test_whatever_makes_a_pass_first_has_attention_picked_once(
    name: str, tiny: ModelConfig, monkeypatch, capsys
) -> None:
    """Also where gradients are off, which the trial takes."""
    model = on_pretended_card(monkeypatch)(tiny, broken=refuses, mine=blocks)
    monkeypatch.setattr(Batch, "to", lambda batch, device: batch)
    real = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, device=None, **k: real(*a, **k))
    ids = torch.arange(33) % tiny.vocab_size
    batch = Batch(ids[:-1], ids[1:], torch.ones(32), torch.arange(32) == 0, 32)
    for _ in range(2):
        PASSES[name](model, batch)
    assert list(attention.DOORS) == [("cuda", torch.float32)]
    assert capsys.readouterr().out.count("attention   mine; broken does not work here") == 1


def test_all_passes_over_packed_sequences_come_through_the_one_that_picks() -> None:
    root = Path(attention.__file__).parents[2]
    for path in (*root.glob("*.py"), *root.glob("hearth/**/*.py")):
        if path.name not in ("model.py", "attention.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                made = isinstance(node, ast.Call) and ast.unparse(node.func)
                assert made != "PackedSequences", f"{path.name}:{node.lineno}"


# ------------------------------------------------------------------------------------- on a card


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40, 130])
@pytest.mark.parametrize("kind", list(attention.KINDS))
def test_on_a_card_each_kind_of_attention_is_the_reference(kind: str, window: int | None) -> None:
    try:
        door = attention.KINDS[kind]()
    except ImportError as error:
        pytest.skip(str(error))
    heads = random_heads(600, device="cuda", dtype=torch.bfloat16)
    y = door(*heads, documents(300, "cuda"), window)
    exact = [x.detach().float().cpu().requires_grad_() for x in heads]
    expected = attend_in_blocks(*exact, documents(300), window)
    torch.testing.assert_close(y.float().cpu(), expected, atol=2e-2, rtol=2e-2)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad((y * weights.to(y)).sum(), heads),
        torch.autograd.grad((expected * weights).sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(a.float().cpu(), b, atol=4e-2, rtol=4e-2)


@pytest.mark.gpu
def test_on_a_card_a_trial_picks_a_kernel_not_the_fallback(tiny: ModelConfig, monkeypatch) -> None:
    monkeypatch.setattr("hearth.training.attention.DOORS", {})
    model = build_model(tiny, seed=0, device="cuda")
    if model.dtype != torch.bfloat16:
        pytest.skip("this card does not multiply bfloat16")
    assert attention.pick(model) in list(attention.KINDS)[:3]


@pytest.mark.gpu
def test_on_a_card_float32_is_attended_too(tiny: ModelConfig, monkeypatch) -> None:
    monkeypatch.setattr("hearth.training.attention.DOORS", {})
    model = build_model(tiny, seed=0, device="cuda")
    model.dtype = torch.float32
    assert attention.pick(model) in list(attention.KINDS)[2:]

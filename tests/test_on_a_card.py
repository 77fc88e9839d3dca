"""What must hold on a card. Each test's body runs on the processor too, with stand-ins where that
lacks what the test needs, so that no typing error waits for a card.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from config import HRMConfig, LoopConfig, ModelConfig, OptimConfig
from hearth import hardware
from hearth.decoding.engine import Engine, Rules, Sampling, _Row, draw
from hearth.decoding.kv_cache import KVCache, decode
from hearth.training import attention, eight_bit, gradients, loop
from hearth.training.batches import Batch, LoadedAhead
from hearth.training.optim import build_optimizers, orthogonalise
from model import ChunkedCrossEntropy, Model, PackedSequences, build_model

CPU = torch.device("cpu")


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A card, and the processor in its place; what one test picks no other finds."""
    doors: dict = {}
    monkeypatch.setattr("model.DOORS", doors)
    monkeypatch.setattr(attention, "DOORS", doors)
    return torch.device(request.param)


SHAPES = {
    "head": {},
    "dense": {"hrm": None},
    "supervised": {"hrm": HRMConfig(1, 1, 2, 1, deep_supervision=True)},
    "portable": {
        **{"shape": "portable", "hrm": None, "token_shift": False, "window": None},
        **{"n_value_embeddings": 0, "bigram_rows": 0},
    },
}


def awake(shape: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Model:
    """A model with nothing hidden behind zeros, of widths that a card's kernels take, that attends
    through what a trial picked.
    """
    config = ModelConfig(
        **{
            **{"vocab_size": 512, "n_layer": 3, "d_model": 128, "n_head": 4, "n_kv_head": 2},
            **{"d_ff": 256, "context": 256, "window": 40, "pattern": "SL"},
            **{"n_value_embeddings": 1, "bigram_rows": 300, "hrm": HRMConfig(1, 1, 2, 1)},
            **SHAPES[shape],
        }
    )
    model = build_model(config, seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=rng)
    model = model.to(device)
    model.dtype = dtype
    attention.pick(model)
    return model


def batch_of(n: int = 1024, row_length: int = 256, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 512, (n + 1,), generator=rng)
    starts = torch.rand(n, generator=rng) < 0.02
    weights = (torch.rand(n, generator=rng) < 0.8).float()
    return Batch(ids[:-1], ids[1:], weights, starts, row_length)


def learnt(
    model: Model, batch: Batch, micro_tokens: int = 1024
) -> tuple[float, list[torch.Tensor]]:
    """The loss of a batch, and its gradients on the CPU."""
    model.zero_grad()
    loss = gradients.accumulate(model, batch, micro_tokens)
    return loss, [p.grad.detach().float().cpu() for p in model.parameters()]


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """The cosine between two gradients."""
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


# ------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_and_gradients_in_float32_are_the_processors(
    shape: str, device: torch.device
) -> None:
    there, here = (learnt(awake(shape, where), batch_of()) for where in (device, CPU))
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    for a, b in zip(there[1], here[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_learns_in_the_direction_of_float32(shape: str, device: torch.device) -> None:
    rough, exact = (
        learnt(awake(shape, where, dtype), batch_of())
        for where, dtype in ((device, torch.bfloat16), (CPU, torch.float32))
    )
    assert rough[0] == pytest.approx(exact[0], rel=1e-2)
    for a, b in zip(rough[1], exact[1], strict=True):
        assert angle(a, b) > 0.97


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_blocks_learn_what_the_others_do(device: torch.device) -> None:
    if not hardware.compiles(None, device) and not shutil.which("g++"):
        pytest.skip("nothing to compile with")
    if device.type == "cpu":
        pytest.skip("takes a minute on a processor: test_model.py does it, marked slow")
    model = awake("head", device, torch.bfloat16)
    plain = learnt(model, batch_of())
    model.compile_blocks()
    compiled = learnt(model, batch_of())
    assert compiled[0] == pytest.approx(plain[0], rel=1e-2)
    for a, b in zip(compiled[1], plain[1], strict=True):
        assert angle(a, b) > 0.99


@pytest.mark.parametrize("recomputed", [1, 2, 5])
def test_recomputed_activations_give_the_same_gradients(
    recomputed: int, device: torch.device
) -> None:
    model = awake("head", device, torch.bfloat16)
    kept = learnt(model, batch_of())
    model.recomputed_blocks = recomputed
    again = learnt(model, batch_of())
    assert again[0] == pytest.approx(kept[0], rel=1e-3)
    for a, b in zip(again[1], kept[1], strict=True):
        assert angle(a, b) > 0.999


def test_the_chunked_loss_is_torchs(device: torch.device, monkeypatch) -> None:
    monkeypatch.setattr("model.ROWS_PER_CHUNK", 7)
    monkeypatch.setattr("model.LOGITS_PER_CHUNK", 7 * 40)
    rng = torch.Generator().manual_seed(0)
    hidden, embedding = (torch.randn(n, 16, generator=rng) for n in (30, 40))
    given = [x.to(device).requires_grad_() for x in (hidden, embedding)]
    targets = torch.randint(0, 40, (30,), generator=rng).to(device)
    weights = torch.rand(30, generator=rng).to(device)
    loss = ChunkedCrossEntropy.apply(*given, targets, weights)
    logits = given[0] @ given[1].T
    wanted = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    torch.testing.assert_close(loss, wanted, atol=1e-4, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(loss, given), torch.autograd.grad(wanted, given), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize(("kind", "allowed"), [("float8", 0.06), ("int8", 0.02)])
def test_products_in_8_bits_are_close_to_ordinary_ones(
    kind: str, allowed: float, device: torch.device
) -> None:
    if device.type == "cuda" and kind == "float8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 wants Ada or newer")
    rng = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=rng).to(device) for shape in ((64, 48), (96, 48)))
    found = []
    for multiply in (eight_bit.linear(kind), F.linear):
        a, b = x.bfloat16().requires_grad_(), w.clone().requires_grad_()
        y = multiply(a, b.bfloat16())
        y.float().square().mean().backward()
        found.append([y.detach().float(), a.grad.float(), b.grad])
    for ours, plain in zip(*found, strict=True):
        assert 0 < (ours - plain).norm() / plain.norm() < allowed


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("shape", [(3, 64, 192), (2, 192, 64), (1, 64, 96)])
def test_orthogonalised_singular_values_are_near_one(
    shape: tuple[int, ...], device: torch.device
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    values = torch.linalg.svdvals(orthogonalise(x).float().cpu())
    assert values.min() > 0.5
    assert values.max() < 1.4


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_steps_of_the_optimizer_are_the_processors(name: str, device: torch.device) -> None:
    found = []
    for where in (device, CPU):
        model = awake("dense", where)
        optimizers = build_optimizers(model, OptimConfig(name=name), 1e-3)
        for step in range(5):
            optimizers.schedule(step, 5, LoopConfig())
            learnt(model, batch_of(seed=step))
            optimizers.step()
        found.append([p.detach().cpu() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().mean() < 2e-4  # a card orthogonalises in bfloat16


def test_batches_loaded_ahead_arrive_as_they_are(device: torch.device) -> None:
    class Source:
        n_steps, context = 5, 256
        stage, context_of = (lambda self, step: 0), (lambda self, stage: 256)

        def batch(self, step: int) -> Batch:
            return batch_of(seed=step)

    with LoadedAhead(Source(), device) as ahead:
        for step in range(5):
            wanted = batch_of(seed=step)
            for micro, part in zip(ahead.batch(step).split(256), wanted.split(256), strict=True):
                there = micro.to(device)
                for name in ("ids", "targets", "weights", "starts"):
                    assert torch.equal(getattr(there, name).cpu(), getattr(part, name)), name
                if device.type == "cuda":
                    assert micro.ids.is_pinned()


@contextmanager
def little_memory(device: torch.device, n_tokens: int, monkeypatch) -> Iterator[None]:
    """Inside, micro-batches of more than `n_tokens` find no memory: on a card for want of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        room = torch.cuda.memory_reserved(device) + n_tokens * 40_000
        torch.cuda.set_per_process_memory_fraction(room / total, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    real = gradients.backward

    def tight(model: Model, micro: Batch, scale: float) -> torch.Tensor:
        if len(micro.ids) > n_tokens:
            raise torch.OutOfMemoryError("injected")
        return real(model, micro, scale)

    monkeypatch.setattr(gradients, "backward", tight)
    yield
    monkeypatch.setattr(gradients, "backward", real)


def test_memory_that_runs_out_makes_micro_batches_smaller_and_the_gradient_stays(
    device: torch.device, monkeypatch, capsys
) -> None:
    """On a card 16,384 tokens of this model take more than what is left to it."""
    n = 16_384 if device.type == "cuda" else 2048
    model = awake("dense", device)
    loss, wanted = learnt(model, batch_of(n), 512)
    model.zero_grad()
    job = type("Job", (), {"model": model, "optimizers": build_optimizers(model, OptimConfig(), 1)})
    with little_memory(device, n // 4, monkeypatch):
        again, micro_tokens = loop.accumulate_within_memory(job, batch_of(n), n)
    assert micro_tokens < n
    assert "Memory ran out" in capsys.readouterr().out
    assert again == pytest.approx(loss, rel=1e-4)
    for p, b in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad.cpu(), b, atol=1e-4, rtol=1e-2)


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(
    device: torch.device, tmp_path: Path
) -> None:
    """Bit for bit on a processor; on a card, whose sums come in any order, nearly."""

    def trained(first: int, model: Model, optimizers) -> None:
        for step in range(first, 6):
            optimizers.schedule(step, 6, LoopConfig())
            learnt(model, batch_of(seed=step))
            optimizers.step()
            if step == 2:
                torch.save([model.state_dict(), optimizers.state_dict()], tmp_path / "state")

    def start() -> tuple[Model, object]:
        model = awake("head", device)
        return model, build_optimizers(model, OptimConfig(), 1e-3)

    unbroken, optimizers = start()
    trained(0, unbroken, optimizers)
    resumed, optimizers = start()
    state = torch.load(tmp_path / "state", map_location=device, weights_only=True)
    resumed.load_state_dict(state[0])
    optimizers.load_state_dict(state[1])
    trained(3, resumed, optimizers)
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        if device.type == "cpu":
            assert torch.equal(a, b)
        else:
            assert (a - b).abs().mean() < 2e-4


# ---------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_decode_equals_the_full_forward(dtype: torch.dtype, device: torch.device) -> None:
    model = awake("head", device, dtype).requires_grad_(False)
    ids = batch_of(200).ids.to(device)
    whole = model.logits(model(ids, PackedSequences((torch.arange(200) == 0), 200, device)))
    cache = KVCache(1, 200, device=device, dtype=dtype)
    parts = [decode(model, part[None], cache) for part in (ids[:150], *ids[150:].split(1))]
    cached = model.logits(torch.cat(parts, dim=1)[0])
    far = (cached - whole).abs().max() / whole.abs().max()
    assert far < (1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
def test_rows_decoded_together_say_what_each_says_alone(
    weights: str | None, device: torch.device
) -> None:
    """In float32 where the weights are; in 16 or 8 bits a near tie may fall to either side."""
    model = awake("head", device).requires_grad_(False)
    engine = Engine(model, weights=weights)
    prompts = [batch_of(64, 64, seed).ids[: 5 + 7 * seed].tolist() for seed in range(8)]
    together = engine.generate(prompts, max_tokens=12)
    alone = [engine.generate([prompt], max_tokens=12)[0] for prompt in prompts]
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    assert same == 8 if weights is None else same >= 5


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_the_same_logits_draw_the_same_tokens(sampling: dict, device: torch.device) -> None:
    rules = Rules(4, sampling=Sampling(**sampling))
    logits = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    there, here = (
        draw(logits.to(where), [_Row([1], seed, rules, None) for seed in range(64)], rules)
        for where in (device, CPU)
    )
    assert sum(a == b for a, b in zip(there, here, strict=True)) >= 63  # an ulp may decide one


# ----------------------------------------------------------------------------------------- machine


def test_the_machine_is_known(device: torch.device) -> None:
    assert hardware.describe(device)
    assert hardware.memory_limit(device) > 2**28
    assert hardware.peak_flops(device, torch.float32) > 1e8
    meter = hardware.EnergyMeter(device)
    torch.randn(512, 512, device=device) @ torch.randn(512, 512, device=device)
    joules = meter.joules()
    assert joules is None or joules >= 0


def test_memory_in_use_holds_what_was_allocated(device: torch.device) -> None:
    hardware.reset_peak_memory(device)
    x = torch.ones(25_000_000, device=device)
    assert hardware.memory_in_use(device) >= 0.1
    del x
    hardware.free_memory(device)


def test_a_model_that_is_moved_keeps_its_weights(device: torch.device, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = awake("head", device)
    save_file({n: p.detach() for n, p in model.state_dict().items()}, tmp_path / "w.safetensors")
    for name, weight in load_file(tmp_path / "w.safetensors").items():
        assert torch.equal(weight, model.state_dict()[name].cpu()), name


def test_the_presets_shapes_have_a_kernel(device: torch.device) -> None:
    """Heads of 64 and 128, groups of 1 to 4: the trial accepts the first kind that is here."""
    for n_head, n_kv_head in ((4, 4), (4, 1), (2, 2), (2, 1)):
        config = ModelConfig(
            **{"vocab_size": 128, "n_layer": 1, "d_model": 256, "n_head": n_head},
            **{"n_kv_head": n_kv_head, "d_ff": 128, "context": 256, "window": 64, "hrm": None},
        )
        model = build_model(config, seed=0, device=device)
        name = attention.pick(model)
        kinds = list(attention.KINDS)
        assert name in (kinds[:3] if device.type == "cuda" else kinds[-1:])

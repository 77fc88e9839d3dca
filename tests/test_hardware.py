"""What is wrong with a machine is said before hours are lost; what it draws is counted."""

from __future__ import annotations

import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import torch

from config import PRESETS, UserError
from hearth import hardware
from hearth.decoding.engine import Rules, Sampling, _Row, draw
from hearth.training import loop, planning
from hearth.training.optim import build_optimizers
from model import build_model, compute_dtype

CPU, CARD = torch.device("cpu"), torch.device("cuda")


# ---------------------------------------------------------------------------------------- preflight


@pytest.fixture
def unusable_card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "nvidia_card", lambda: "a card")
    return monkeypatch


def test_torch_without_cuda_beside_a_card_names_the_build_to_install(
    unusable_card: pytest.MonkeyPatch,
) -> None:
    unusable_card.setattr(torch.version, "cuda", None)
    with pytest.raises(
        UserError, match=r"a card.*no CUDA.*install the build with CUDA.*--device cpu"
    ):
        hardware.pick_device("auto")
    assert hardware.pick_device("cpu") == CPU


@pytest.mark.parametrize(
    ("cuda", "driver", "remedy"),
    [
        ("13.0", "570.86.10", "570.86.10 is too old: CUDA 13.0 needs 580"),
        ("12.8", "470.256.02", "470.256.02 is too old: CUDA 12.8 needs 525"),
        ("12.8", "535.183.01", "Update the NVIDIA driver"),
        ("13.0", None, "Update the NVIDIA driver"),
    ],
)
def test_a_driver_older_than_torchs_cuda_is_named_with_what_it_needs(
    cuda: str, driver: str | None, remedy: str, unusable_card: pytest.MonkeyPatch
) -> None:
    unusable_card.setattr(torch.version, "cuda", cuda)
    unusable_card.setattr(hardware, "driver_version", lambda: driver)
    with pytest.raises(UserError, match=remedy):
        hardware.pick_device("auto")


def test_the_drivers_version_is_read_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15\n"
        "GCC version: 12.3.0"
    )
    monkeypatch.setattr(Path, "read_text", lambda path: told)
    assert hardware.driver_version() == "535.183.01"


def test_a_disk_too_small_for_the_checkpoints_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware.check_disk(tmp_path / "not" / "there", 1000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: usage(10, 9, 999))
    with pytest.raises(UserError, match=r"999 B free.*1.0 kB.*--runs.*keep_checkpoints"):
        hardware.check_disk(tmp_path / "not" / "there", 1000)


def test_the_disk_must_hold_what_is_kept_and_what_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []
    monkeypatch.setattr(hardware, "check_disk", lambda folder, n_bytes: wanted.append(n_bytes))
    monkeypatch.setattr(loop.checkpoint, "n_bytes", lambda model, optimizers: 100)
    job = SimpleNamespace(
        folder=tmp_path, loop=SimpleNamespace(keep_checkpoints=2), model=None, optimizers=None
    )
    for there in range(4):
        loop.preflight(job)
        (tmp_path / f"step-{there}").mkdir()
    assert wanted == [300, 200, 100, 100]


def test_a_laptop_on_its_battery_is_warned_not_stopped(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(loop.checkpoint, "n_bytes", lambda model, optimizers: 1)
    job = SimpleNamespace(
        folder=tmp_path, loop=SimpleNamespace(keep_checkpoints=1), model=None, optimizers=None
    )
    on, off, unknown = (SimpleNamespace(power_plugged=plugged) for plugged in (True, False, None))
    for state, warned in ((None, False), (on, False), (off, True), (unknown, False)):
        monkeypatch.setattr(psutil, "sensors_battery", lambda state=state: state, raising=False)
        loop.preflight(job)
        assert ("battery" in capsys.readouterr().out) == warned


# -------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("RTX 3090", 71.2),
        ("RTX 3070", 40.6),
        ("RTX 4090", 165.2),
        ("RTX 4080", 97.5),
        ("RTX 4070 Ti", 80.2),
        ("RTX 5090", 209.5),
        ("RTX 5080", 112.6),
    ],
)
def test_cores_and_clock_give_the_published_peaks(card: str, tflops: float) -> None:
    assert hardware.CARDS[card].tflops == pytest.approx(tflops, abs=0.1)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 4070", "RTX 4070"),
        ("NVIDIA GeForce RTX 4080 SUPER", "RTX 4080 Super"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070 Laptop"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("rtx 3060 ti", "RTX 3060 Ti"),
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB"),
        ("RTX 3080 12GB", "RTX 3080 12GB"),
        ("NVIDIA GeForce RTX 4070 SUPER", "RTX 4070 Super"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("NVIDIA GeForce RTX 5070 Ti Laptop GPU", "RTX 5070 Ti Laptop"),
        ("NVIDIA GeForce RTX 5070", "RTX 5070"),
    ],
)
def test_a_card_is_known_by_its_whole_name(name: str, card: str) -> None:
    assert hardware.known_card(name) is hardware.CARDS[card]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",
        "NVIDIA GH200",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "RTX 3060 8GB",
        "NVIDIA H100 PCIe",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3050 Ti Laptop GPU",
    ],
)
def test_a_variant_is_not_taken_for_the_card_it_is_named_after(name: str) -> None:
    assert hardware.known_card(name) is None
    with pytest.raises(UserError, match=r"No figures of a card.*RTX 4080 Super.*RTX 3060 Laptop"):
        hardware.card_named(name)


def test_an_unknown_cards_peak_is_not_that_of_waiting_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card of next year")
    monkeypatch.setattr(
        hardware, "seconds_of_product", lambda n, device, dtype: 5e-5 + 2 * n**3 / 1e14
    )
    measured = hardware.peak_flops.__wrapped__(CARD, torch.bfloat16)
    assert measured == pytest.approx(1e14, rel=0.01)


# ---------------------------------------------------------------------------------------- platforms


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As torch answers on Apple silicon."""
    import torch._dynamo  # while it is imported it asks for the chip

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 2**30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 10**9)
    return monkeypatch


def test_apples_chip_is_the_device_where_nothing_else_is_asked_for(apple) -> None:
    mps = torch.device("mps")
    assert hardware.pick_device("auto") == hardware.pick_device("mps") == mps
    assert hardware.pick_device("cpu") == CPU
    assert hardware.memory_limit(mps) == 12 * 2**30
    assert hardware.memory_in_use(mps) == 3.0
    assert "12.0 GiB" in hardware.describe(mps)
    assert not hardware.compiles(None, mps)
    assert hardware.EnergyMeter(mps).joules() is None
    assert compute_dtype(mps, 1024) == torch.float32
    with planning.peak_memory(mps, held=7) as found:
        pass
    assert found == [3_000_000_000]


def test_narrow_models_train_in_float32_on_a_processor_that_multiplies_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert compute_dtype(CPU, 128) == torch.float32
    assert compute_dtype(CPU, 256) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert compute_dtype(CPU, 256) == torch.float32


def test_apples_chip_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"finds none here.*--device cpu"):
        hardware.pick_device("mps")


def test_a_plan_for_apples_chip_is_by_estimate(apple) -> None:
    config = PRESETS["demo"]
    model = build_model(config.model, seed=0)
    apple.setattr(type(model), "device", property(lambda model: torch.device("mps")))
    apple.setattr(hardware, "peak_flops", lambda device, dtype: 1e12)
    optimizers = build_optimizers(model, config.optim, 1e-3)
    plan = planning.make_plan(model, optimizers, config.pretrain, stages=((512, 1.0),), n_steps=1)
    assert plan.room == int(planning.FILLED["mps"] * 12 * 2**30)
    chosen = plan.choose(None, torch.device("mps"))
    assert chosen.recomputed == 0
    assert chosen.memory.peak <= plan.room


class OnApple:
    """A tensor on Apple's chip, which has no float64: all that `draw` may ask of it first."""

    device = torch.device("mps")

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def cpu(self) -> torch.Tensor:
        return self.x


def test_tokens_are_drawn_without_float64_on_apples_chip() -> None:
    logits, rules = torch.randn(1, 64), Rules(4, sampling=Sampling(temperature=1.0))
    there, here = (draw(x, [_Row([1], 3, rules, None)], rules) for x in (OnApple(logits), logits))
    assert there == here


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.5 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("HIP out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_known_by_what_each_device_says(error, full: bool) -> None:
    assert hardware.is_out_of_memory(error) == full


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As ROCm's torch answers: the device is called cuda."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    return monkeypatch


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("gfx1100", torch.bfloat16),  # RX 7900
        ("gfx942:sramecc+:xnack-", torch.bfloat16),  # MI300
        ("gfx1201", torch.bfloat16),  # RX 9070
        ("gfx1030", torch.float32),  # RX 6800: capability (10, 3), and no matrix cores
        ("gfx906", torch.float32),  # MI50: capability (9, 0)
    ],
)
def test_an_amd_card_computes_in_what_it_multiplies(arch: str, dtype: torch.dtype, amd) -> None:
    amd.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(gcnArchName=arch))
    assert hardware.pick_device("auto") == CARD
    assert compute_dtype(CARD, 128) == dtype


def test_an_amd_card_without_nvml_trains_without_figures_of_power(amd) -> None:
    amd.setitem(sys.modules, "pynvml", None)  # as where it is not installed
    meter = hardware.EnergyMeter(CARD)
    assert meter.joules() is None
    assert meter.temperature() is None


def test_an_unknown_cards_name_is_measured_not_taken_for_a_geforce(amd) -> None:
    amd.setattr(torch.cuda, "get_device_name", lambda device: "AMD Radeon RX 7900 XTX")
    amd.setattr(hardware, "seconds_of_product", lambda n, device, dtype: 2 * n**3 / 6e13)
    assert hardware.peak_flops.__wrapped__(CARD, torch.bfloat16) == pytest.approx(6e13)


def test_a_rocm_that_finds_no_card_is_told_its_own_remedy(amd) -> None:
    amd.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"ROCm 7.0.*rocminfo.*render and video"):
        hardware.pick_device("cuda")


def test_on_windows_a_torch_without_cuda_is_told_a_way_that_uv_run_keeps(
    unusable_card: pytest.MonkeyPatch,
) -> None:
    unusable_card.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"--torch-backend auto.*UV_NO_SYNC=1"):
        hardware.pick_device("auto")


# ------------------------------------------------------------------------------------------- energy


class Clock:
    """A clock that ticks a second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def fake_nvml(**answers: object) -> ModuleType:
    """pynvml with only these answers; a function that is missing says what an old card says."""
    module = ModuleType("pynvml")
    module.NVMLError = RuntimeError

    def refuses(*words: object) -> None:
        raise RuntimeError("not supported")

    for name in ("TotalEnergyConsumption", "PowerUsage", "Temperature"):
        given = iter(answers.get(name, ()))
        told = (lambda *words, given=given: next(given)) if name in answers else refuses
        setattr(module, f"nvmlDeviceGet{name}", told)
    return module


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(hardware, "_nvml_card", lambda device: "handle")
    monkeypatch.setattr(hardware.time, "monotonic", Clock())
    return monkeypatch


def test_a_cards_energy_counter_is_read_in_joules(card: pytest.MonkeyPatch) -> None:
    card.setitem(
        sys.modules,
        "pynvml",
        fake_nvml(TotalEnergyConsumption=[5000, 5400, 6000], Temperature=[61]),
    )
    meter = hardware.EnergyMeter(CARD)
    assert meter.joules() == pytest.approx(0.4)
    assert meter.watts() == pytest.approx(1.0 / 2)
    assert meter.temperature() == 61


def test_a_card_without_a_counter_is_sampled(card: pytest.MonkeyPatch) -> None:
    card.setitem(sys.modules, "pynvml", fake_nvml(PowerUsage=[200_000, 100_000]))
    meter = hardware.EnergyMeter(CARD)
    assert meter.joules() == pytest.approx(200)
    assert meter.joules() == pytest.approx(300)
    assert meter.temperature() is None


def test_a_card_that_tells_nothing_leaves_the_figures_out(card: pytest.MonkeyPatch) -> None:
    card.setitem(sys.modules, "pynvml", fake_nvml())
    assert hardware.EnergyMeter(CARD).joules() is None
    assert loop.Power(CARD).figures(loop.Progress()) == {}


def test_a_processors_counter_is_read_over_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("10000000")
    monkeypatch.setattr(hardware, "RAPL", tmp_path)
    (zone / "energy_uj").write_text("8000000\n")
    meter = hardware.EnergyMeter(CPU)
    for counter, joules in (("9000000", 1), ("2000000", 4), ("3000000", 5)):
        (zone / "energy_uj").write_text(counter)
        assert meter.joules() == pytest.approx(joules)
    (zone / "energy_uj").unlink()
    assert hardware.EnergyMeter(CPU).joules() is None


def test_watts_kilowatt_hours_and_temperature_join_the_step(card: pytest.MonkeyPatch) -> None:
    counter, progress = [0, 3_600_000, 7_200_000], loop.Progress(joules=3600.0)
    card.setitem(
        sys.modules, "pynvml", fake_nvml(TotalEnergyConsumption=counter, Temperature=[50, 60])
    )
    power = loop.Power(CARD)
    assert power.figures(progress)["kwh"] == pytest.approx(0.002)
    figures = power.figures(progress)
    assert set(figures) == {"watts", "kwh", "temperature_c"}
    assert figures["kwh"] == pytest.approx(0.003)
    assert figures["watts"] > 0
    again = loop.Progress.of(loop.state_of(progress, 10), Path("state.json"))
    assert again.joules == pytest.approx(3 * 3600)

"""The machine a run stands on: its device, peak speed, memory; and what is wrong with it, said
before hours are lost.

Out: a torch device and figures of it. Knows nothing of models or training.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import UserError
from hearth import log
from hearth.storage import disk_free, machine_memory


class Card(NamedTuple):
    """A card as its maker describes it."""

    tflops: float  # dense bfloat16 products with float32 accumulation, in 10^12 FLOP/s
    gib: int  # memory
    watts: int  # board power; of a laptop's chip the most that NVIDIA's range allows without boost


def geforce(cores: int, ghz: float, gib: int, watts: int) -> Card:
    """A GeForce card by its CUDA cores and boost clock.

    Each of a multiprocessor's 128 cores stands for 4 tensor-core FLOPs a clock in bfloat16 with
    float32 accumulation, in all three generations: it gives the published peaks of the RTX 3090 (71
    TFLOP/s), 4090 (165.2) and 5090 (209.5).
    """
    return Card(round(4 * cores * ghz / 1e3, 1), gib, watts)


# Where the figures were read. Watts serve estimates alone.
# Data-centre cards (SXM): A100 and H100 NVIDIA's data sheets as glennklockwood.com quotes them;
# H200 the same chip as H100, 700 W by MLPerf's system list, its 139 GiB (sold as 141 GB)
# unconfirmed.
# Desktops: Wikipedia, "List of Nvidia graphics processing units" (June 2025), except: 4060 Ti 2535
# MHz (thefpsreview.com; Wikipedia rounds), its 16 GB 165 W (cputronic.com; Wikipedia: 160), 5050
# 2572 MHz (technetbooks.com) and 130 W (tweakers.net after NVIDIA; Wikipedia, before its launch:
# 2520, 120).
# Laptops' chips, the highest clock and power of their range: 40 series NVIDIA's comparison page
# (nvidia.com/de-de/geforce/gaming-laptops/compare); 3060 to 3080 hardwaretimes.com after
# ComputerBase (the 3080 also came with 8 GB); 3070 Ti and 3080 Ti heise.de of January 2022; 50
# series neowin.net, the 5060 purepc.pl. Wikipedia has more MHz for 3070 (1720), 3080 (1810) and
# 4090 (2580).
# Unconfirmed, at second hand only: clocks of the 50 series' laptops (5090, 5080 hmc-tech.com; 5070
# Ti, 5060 projects that quote NVIDIA's page; 5070 a forum), whose AI TOPS suppose 2.6 to 2.7 GHz,
# and the 5060's 100 W (loadsyn.com).
CARDS = {
    "H200": Card(989.0, 139, 700),
    "H100": Card(989.0, 80, 700),
    "A100": Card(312.0, 80, 400),
    "RTX 5090": geforce(21760, 2.407, 32, 575),
    "RTX 5080": geforce(10752, 2.617, 16, 360),
    "RTX 5070 Ti": geforce(8960, 2.452, 16, 300),
    "RTX 5070": geforce(6144, 2.512, 12, 250),
    "RTX 5060 Ti 16GB": geforce(4608, 2.572, 16, 180),
    "RTX 5060 Ti": geforce(4608, 2.572, 8, 180),
    "RTX 5060": geforce(3840, 2.497, 8, 145),
    "RTX 5050": geforce(2560, 2.572, 8, 130),
    "RTX 4090": geforce(16384, 2.520, 24, 450),
    "RTX 4080 Super": geforce(10240, 2.550, 16, 320),
    "RTX 4080": geforce(9728, 2.505, 16, 320),
    "RTX 4070 Ti Super": geforce(8448, 2.610, 16, 285),
    "RTX 4070 Ti": geforce(7680, 2.610, 12, 285),
    "RTX 4070 Super": geforce(7168, 2.475, 12, 220),
    "RTX 4070": geforce(5888, 2.475, 12, 200),
    "RTX 4060 Ti 16GB": geforce(4352, 2.535, 16, 165),
    "RTX 4060 Ti": geforce(4352, 2.535, 8, 160),
    "RTX 4060": geforce(3072, 2.460, 8, 115),
    "RTX 3090 Ti": geforce(10752, 1.860, 24, 450),
    "RTX 3090": geforce(10496, 1.695, 24, 350),
    "RTX 3080 Ti": geforce(10240, 1.665, 12, 350),
    "RTX 3080 12GB": geforce(8960, 1.710, 12, 350),
    "RTX 3080": geforce(8704, 1.710, 10, 320),
    "RTX 3070 Ti": geforce(6144, 1.770, 8, 290),
    "RTX 3070": geforce(5888, 1.725, 8, 220),
    "RTX 3060 Ti": geforce(4864, 1.665, 8, 200),
    "RTX 3060": geforce(3584, 1.777, 12, 170),
    "RTX 3050": geforce(2560, 1.777, 8, 130),
    "RTX 5090 Laptop": geforce(10496, 2.160, 24, 150),
    "RTX 5080 Laptop": geforce(7680, 2.287, 16, 150),
    "RTX 5070 Ti Laptop": geforce(5888, 2.220, 12, 115),
    "RTX 5070 Laptop": geforce(4608, 2.347, 8, 100),
    "RTX 5060 Laptop": geforce(3328, 2.497, 8, 100),
    "RTX 4090 Laptop": geforce(9728, 2.040, 16, 150),
    "RTX 4080 Laptop": geforce(7424, 2.280, 12, 150),
    "RTX 4070 Laptop": geforce(4608, 2.175, 8, 115),
    "RTX 4060 Laptop": geforce(3072, 2.370, 8, 115),
    "RTX 4050 Laptop": geforce(2560, 2.370, 6, 115),
    "RTX 3080 Ti Laptop": geforce(7424, 1.590, 16, 150),
    "RTX 3080 Laptop": geforce(6144, 1.710, 16, 150),
    "RTX 3070 Ti Laptop": geforce(5888, 1.485, 8, 125),
    "RTX 3070 Laptop": geforce(5120, 1.620, 8, 125),
    "RTX 3060 Laptop": geforce(3840, 1.702, 6, 115),
}


def known_card(name: str) -> Card | None:
    """The card that torch, the driver or a user calls `name`, such as "NVIDIA GeForce RTX 4070
    SUPER".

    None for one that is not listed, also where its name continues after that of a listed one: a
    laptop's chip, a cut-down variant or a slice (MIG) is not the card that it is named after.
    """
    end = r"(?=( GPU|-\S+| \d+GB (HBM\w*|PCIe))?$)"
    for card in sorted(CARDS, key=len, reverse=True):
        if re.search(rf"\b{card}{end}", name.strip(), re.IGNORECASE):
            return CARDS[card]
    return None


def card_named(name: str) -> Card:
    """As `known_card`; raises UserError that lists the known cards."""
    if (card := known_card(name)) is None:
        raise UserError(f"No figures of a card {name!r}. Known are: {', '.join(CARDS)}.")
    return card


def pick_device(wish: str) -> torch.device:
    """The device to run on: an NVIDIA card, or an AMD one, which torch calls cuda too; an Apple
    chip; the processor. An NVIDIA card that torch cannot use is an error with its remedy, never a
    silent crawl.
    """
    if wish in ("auto", "cuda") and torch.cuda.is_available():
        # of torchrun: a card for each process
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda")
    if wish in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if wish == "mps":
        raise UserError(
            f"Apple's chip was asked for, but torch {torch.__version__} finds none here (macOS 14 "
            "or newer on Apple silicon). Leave --device away, or add --device cpu."
        )
    card = None if wish == "cpu" else nvidia_card()
    if wish == "cuda" or card:
        built = torch.version.cuda and f"CUDA {torch.version.cuda}"
        built = built or (torch.version.hip and f"ROCm {torch.version.hip}")
        raise UserError(
            f"{f'An NVIDIA card is here ({card})' if card else 'A CUDA device was asked for'}, "
            f"but torch "
            f"{torch.__version__} (built with {built or 'no CUDA'}) cannot use it. "
            f"{card_remedy(torch.version.cuda)} "
            f"To train on the processor on purpose, add --device cpu."
        )
    return torch.device("cpu")


# The oldest driver for each CUDA (docs.nvidia.com/deploy/cuda-compatibility, minor version
# compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


def card_remedy(cuda: str | None) -> str:
    """What to do about a card that torch, built for `cuda`, cannot use."""
    if torch.version.hip:
        return (
            "See whether `rocminfo` lists an AMD card, and whether this user is in the groups "
            "render and video."
        )
    if cuda is None:
        return (
            "This torch has no CUDA: install the build with CUDA by "
            "`uv pip install --reinstall torch --torch-backend auto`, and set UV_NO_SYNC=1, so "
            "that `uv run` leaves it there."
        )
    driver, oldest = driver_version(), OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if driver and oldest and int(driver.split(".")[0]) < oldest:
        return (
            f"The NVIDIA driver {driver} is too old: CUDA {cuda} needs {oldest} or newer. Update "
            "the driver "
            f"(https://www.nvidia.com/drivers) and restart."
        )
    return "Update the NVIDIA driver to one that supports that CUDA version and restart."


def driver_version() -> str | None:
    """The version of the NVIDIA driver, such as 535.183.01, or None."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        if not (tool := shutil.which("nvidia-smi")):
            return None
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found and found[0]


def nvidia_card() -> str | None:
    """What shows that an NVIDIA card is in this machine, or None."""
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        return driver.read_text().splitlines()[0].strip()
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        # class 0x03…: a display controller; NVIDIA's network cards do not count
        if vendor.read_text().strip() == "0x10de" and (
            vendor.parent / "class"
        ).read_text().startswith("0x03"):
            return f"PCI device {vendor.parent.name}"
    return shutil.which("nvidia-smi")


def compiles(wish: bool | None, device: torch.device) -> bool:
    """Whether training compiles its blocks: as wished; where nothing is wished, on a card that can.

    Raises UserError where it is wished and cannot be done.
    """
    needed = "triton" if device.type == "cuda" else "g++"
    found = importlib.util.find_spec("triton") if device.type == "cuda" else shutil.which("g++")
    if wish and not found:
        raise UserError(
            f"--compile True needs {needed}, which is not here. Install it, or leave --compile "
            "away."
        )
    return bool(found) and (device.type == "cuda" if wish is None else wish)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if device.type == "mps":
        return f"Apple GPU, {torch.mps.recommended_max_memory() / 2**30:.1f} GiB of the machine's"
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


@lru_cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Matrix-product FLOPs per second that model FLOPs utilisation is counted against.

    A known card's data-sheet peak; otherwise the best of ten measured products of square matrices
    in `dtype`, 1024 wide or as much wider as it takes to keep the device busy for 10 ms.
    """
    if device.type == "cuda" and (card := known_card(torch.cuda.get_device_name(device))):
        return card.tflops * 1e12
    n = 1024
    while (seconds := seconds_of_product(n, device, dtype)) < 0.01 and n < 16384:
        n *= 2
    return 2 * n**3 / seconds


def seconds_of_product(n: int, device: torch.device, dtype: torch.dtype) -> float:
    """The best of ten products of matrices n × n, with what it takes to start one and to wait."""
    a = torch.randn(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the card
        best = min(best, time.perf_counter() - start)
    return best


def memory_limit(device: torch.device) -> int:
    """Bytes that this process may fill: what is free on the card or already its own, what Apple
    recommends for its chip, or the machine's whole memory.
    """
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type != "cuda":
        # not what is free just now: that differs from start to start
        return machine_memory()[0]
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(min(free + torch.cuda.memory_reserved(device), allowed))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that the device's memory is full: a class of its own on CUDA,
    a text on Apple's chips and in the libraries that ask the driver themselves.
    """
    said = str(error).lower()
    told = "out of memory" in said or "alloc_failed" in said or "not enough memory" in said
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and told)


def free_memory(device: torch.device) -> None:
    """Give back what torch keeps of a device's memory without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak that `memory_in_use` gives begin again."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_in_use(device: torch.device) -> float:
    """Memory of this process in 10^9 bytes: a card's peak since the last `reset_peak_memory`, what
    Apple's driver holds for it now, or what is resident on the CPU.
    """
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import psutil
    except ModuleNotFoundError:  # a bare machine that benchmarks/card.py runs on: the peak so far
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return psutil.Process().memory_info().rss / 1e9


# ------------------------------------------------------------------------------------------- energy


class EnergyMeter:
    """Joules drawn since it was made, by the card (NVML) or by the processor where its counters may
    be read (RAPL).

    A card without an energy counter is sampled: its power times the time since the last reading.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.card = _nvml_card(device) if device.type == "cuda" else None
        self.counters = sorted(RAPL.glob("intel-rapl:?/energy_uj")) if device.type == "cpu" else []
        self._begin = self._last = time.monotonic()
        self._sum = 0.0
        self._before = self._counts()

    def joules(self) -> float | None:
        """None where nothing tells."""
        now, counts = time.monotonic(), self._counts()
        if counts is not None and self._before is not None:
            for path, before, count in zip(
                [*self.counters, None], self._before, counts, strict=False
            ):
                self._sum += (
                    count - before if count >= before else count - before + _rapl_range(path)
                )
        elif (watts := self._sampled_watts()) is not None:
            self._sum += watts * (now - self._last)
        else:
            return None
        self._before, self._last = counts, now
        return self._sum

    def watts(self) -> float | None:
        """Mean power since the meter was made."""
        joules = self.joules()
        return joules / max(1e-9, self._last - self._begin) if joules is not None else None

    def temperature(self) -> float | None:
        """Of the card, in degrees Celsius."""
        return _asked("nvmlDeviceGetTemperature", self.card, 0) if self.card else None

    def _counts(self) -> list[float] | None:
        if self.card:
            millijoules = _asked("nvmlDeviceGetTotalEnergyConsumption", self.card)
            return None if millijoules is None else [millijoules / 1e3]
        try:
            return [int(path.read_text()) / 1e6 for path in self.counters] or None
        except OSError:  # since 2020 for root's eyes only on most systems
            return None

    def _sampled_watts(self) -> float | None:
        milliwatts = _asked("nvmlDeviceGetPowerUsage", self.card) if self.card else None
        return None if milliwatts is None else milliwatts / 1e3


RAPL = Path("/sys/class/powercap")


def _rapl_range(counter: Path | None) -> float:
    """Joules at which a RAPL counter starts over."""
    return int(counter.with_name("max_energy_range_uj").read_text()) / 1e6 if counter else 0.0


def _nvml_card(device: torch.device) -> Any:
    """NVML's handle of a CUDA device, or None where the library or the card does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        )
    except Exception:
        return None


def _asked(function: str, *words: Any) -> Any:
    """What NVML answers, or None where the card cannot tell."""
    import pynvml

    try:
        return getattr(pynvml, function)(*words)
    except pynvml.NVMLError:
        return None


# ---------------------------------------------------------------------------------------- preflight


def check_disk(folder: Path, n_bytes: int) -> None:
    """Raises `UserError` where the disk that will hold `folder` has no room for `n_bytes` more."""
    free = disk_free(folder)
    if free < n_bytes:
        raise UserError(
            f"The disk of {folder} has {log.size(free)} free; the checkpoints that will be kept, "
            "and the one being "
            f"written, take {log.size(n_bytes)}. Make room, put the run on another disk with "
            "--runs, or lower "
            f"keep_checkpoints."
        )


def on_battery() -> bool:
    """Whether this is a laptop that runs on its battery."""
    if not importlib.util.find_spec("psutil"):
        return False
    import psutil

    sensors = getattr(psutil, "sensors_battery", None)
    battery = sensors() if sensors else None
    return battery is not None and battery.power_plugged is False

"""The machine a run stands on: its device, peak speed, memory; and what is wrong with it, said before hours are lost.

Out: a torch device and figures of it. Knows nothing of models or training.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from config import UserError

# Dense bfloat16 tensor-core peaks with float32 accumulation, in TFLOP/s, from NVIDIA's data sheets and white papers.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "RTX 5090": 209.5,
    "RTX 5080": 112.6,
    "RTX 5070 Ti": 87.9,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 4070 Ti": 80.2,
    "RTX 4070": 58.3,
    "RTX 4060 Ti": 44.1,
    "RTX 3090": 71.2,
    "RTX 3080": 59.5,
    "RTX 3060": 25.3,
}


def pick_device(wish: str) -> torch.device:
    """The device to run on. An NVIDIA card that torch cannot use is an error with its remedy, never a silent crawl."""
    if wish != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    card = None if wish == "cpu" else nvidia_card()
    if wish == "cuda" or card:
        built = torch.version.cuda or "no CUDA"
        raise UserError(
            f"{'An NVIDIA card is here (' + card + ')' if card else 'A CUDA device was asked for'}, but torch "
            f"{torch.__version__} (built with {built}) cannot use it. "
            + (
                "On Windows the default torch has no CUDA: install its CUDA build. "
                if os.name == "nt"
                else "Update the NVIDIA driver to one that supports that CUDA version and restart. "
            )
            + "To train on the processor on purpose, add --device cpu."
        )
    return torch.device("cpu")


def nvidia_card() -> str | None:
    """What shows that an NVIDIA card is in this machine, or None."""
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        return driver.read_text().splitlines()[0].strip()
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        # class 0x03…: a display controller; NVIDIA's network cards do not count
        if vendor.read_text().strip() == "0x10de" and (vendor.parent / "class").read_text().startswith("0x03"):
            return f"PCI device {vendor.parent.name}"
    return shutil.which("nvidia-smi")


def compiles(wish: bool | None, device: torch.device) -> bool:
    """Whether training compiles its blocks: as wished; where nothing is wished, on a card that can.

    Raises UserError where it is wished and cannot be done.
    """
    needed = "triton" if device.type == "cuda" else "g++"
    found = importlib.util.find_spec("triton") if device.type == "cuda" else shutil.which("g++")
    if wish and not found:
        raise UserError(f"--compile True needs {needed}, which is not here. Install it, or leave --compile away.")
    return bool(found) and (device.type == "cuda" if wish is None else wish)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


@lru_cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Matrix-product FLOPs a second that model FLOPs utilisation is counted against.

    A known card's data-sheet peak; otherwise the best of ten measured products of 1024×1024 matrices in `dtype`.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for card, tflops in sorted(PEAK_TFLOPS.items(), key=lambda item: -len(item[0])):
            if card in name:
                return tflops * 1e12
    n = 1024
    a = torch.randn(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the card
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def memory_in_use(device: torch.device) -> float:
    """Peak memory of this process: the card's, or resident memory on the CPU; in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9

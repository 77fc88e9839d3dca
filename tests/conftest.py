"""What several test files share: the project's root on the path, one thread, a tiny model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only wait for more threads
import torch

# Behind `&` SIGINT is ignored, under nohup SIGHUP, by all that is started there: tests of what
# signals do begin with the handlers of a terminal.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from stages import compute_in_float32  # noqa: E402

from config import HRMConfig, ModelConfig  # noqa: E402

compute_in_float32()


@pytest.fixture
def tiny() -> ModelConfig:
    """A model of all the parts, small enough for exhaustive tests: windows, whole context, HRM
    head, GQA.
    """
    return ModelConfig(
        vocab_size=128,
        n_layer=3,
        d_model=32,
        n_head=4,
        n_kv_head=2,
        d_ff=48,
        context=32,
        window=6,
        pattern="SL",
        n_value_embeddings=1,
        bigram_rows=61,
        hrm=HRMConfig(l_layer=1, h_layer=2, h_cycles=2, l_cycles=2),
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a small disk")
    yield disk
    # lazily: a mapped file of it may not be collected yet
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data that HEARTH_DATA names; tests that want it are skipped without it."""
    given = os.environ.get("HEARTH_DATA")
    if not given:
        pytest.skip("set HEARTH_DATA to a folder of real text and conversations to run this")
    return Path(given)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA card"))

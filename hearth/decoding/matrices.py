"""Matrices stored in 16 to 4 bits, and their product with a few rows: what decoding spends its time
on.

In: float32 weights (n, d). Out: a `Matrix`: called with x (N, d) it gives (N, n); indexed with ids
it gives rows. A token needs every weight once, so its speed is that of the memory. torch's own
products reach about half of it on a CPU; `cpu_kernels.c`, compiled at first use where the machine
has a C compiler, comes close to all of it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu_kernels.c")
Store = Literal["float32", "bfloat16", "int8", "int4"]
STORES = get_args(Store)  # in the order of `enum store` of cpu_kernels.c
FEW_ROWS = 48  # up to here unpacking the weights along the way beats unpacking them first
BLOCK, GROUP = 128, 32  # columns of int4 in 32 words; that share a scale: as in cpu_kernels.c
SHIFTS = torch.arange(0, 16, 4, dtype=torch.int16)[:, None]  # of a word's columns
PLACES = torch.tensor([[1], [16], [256], [1]])  # what their bits count as, by BITS of cpu_kernels.c
SAME_ROWS = 8  # up to here a float32 product is ours too: its rows do not depend on one another


class _Matrix(ctypes.Structure):
    """`matrix` of cpu_kernels.c."""

    _fields_ = (
        ("w", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in "snd"),
    )


class _Block(ctypes.Structure):
    """`block` of cpu_kernels.c."""

    _fields_ = (
        *((name, _Matrix) for name in ("qkv", "o", "up", "down")),
        ("qk_gain", ctypes.c_void_p),
        ("exclusion", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in "HGE"),
    )


class _TokenValue(ctypes.Structure):
    """`token_value` of cpu_kernels.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("of", "gate")),
        ("channels", ctypes.c_int64),
    )


class _Cache(ctypes.Structure):
    """`cache` of cpu_kernels.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in "kv"),
        *((name, ctypes.c_int64) for name in ("store", "entries")),
    )


class _Seats(ctypes.Structure):
    """`seats` of cpu_kernels.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("slot", "pad", "end"))


class Matrix:
    """A weight matrix (n, d) for inference, stored as `store` says; int8 has one scale a row, int4
    one for each 32 columns.

    The numbers it stands for are those of `float()`. On a CPU it takes and gives float32, on a card
    x's dtype.
    """

    def __init__(self, weight: Tensor, store: str) -> None:
        if store not in STORES:
            raise ValueError(f"weights are stored as {', '.join(STORES)}, not as {store!r}")
        weight = weight.detach()
        self.scale = None
        if store == "int8":
            self.scale = weight.float().abs().amax(dim=1).clamp(min=1e-30) / 127  # (n,)
            self.weight = (weight.float() / self.scale[:, None]).round().to(torch.int8)
        elif store == "int4":
            self.weight, self.scale = in_groups(weight.float())
        else:
            self.weight = weight.to(getattr(torch, store)).contiguous()
        self.store, (self.n, self.d) = store, weight.shape
        self.device = weight.device
        self.kernels = compiled_kernels() if weight.device.type == "cpu" else None
        scale = None if self.scale is None else self.scale.data_ptr()
        self.struct = _Matrix(self.weight.data_ptr(), scale, STORES.index(store), self.n, self.d)
        self._address = ctypes.addressof(self.struct)

    def __call__(self, x: Tensor) -> Tensor:
        """The product of x (N, d) with the transposed matrix: (N, n)."""
        N = x.shape[0]
        few = SAME_ROWS if self.weight.dtype == x.dtype else FEW_ROWS
        if self.kernels is not None and few >= N:
            return self._times_few(x.contiguous(), N)
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight)
        if self.store == "int4":
            return F.linear(x, self.float().to(x.dtype))
        if self.kernels is None and x.device.type == "cpu" and N <= 4:
            narrow = x.to(torch.bfloat16)
            if self.scale is None:
                return F.linear(narrow, self.weight).to(x.dtype)
            if self.d % 64 == 0:  # torch 2.15 reads past the end of other matrices
                return torch._weight_int8pack_mm(narrow, self.weight, self.scale.bfloat16()).to(
                    x.dtype
                )
        y = F.linear(x, self.weight.to(x.dtype))
        return y if self.scale is None else y * self.scale.to(x.dtype)

    def _times_few(self, x: Tensor, N: int) -> Tensor:
        y = torch.empty(N, self.n)
        self.kernels.times_rows(y.data_ptr(), self._address, x.data_ptr(), None, N)
        return y

    def __getitem__(self, ids: Tensor) -> Tensor:
        """Rows (N, d) in float32, for ids (N,)."""
        if self.store == "int4":
            return out_of_groups(self.weight[ids], self.scale[ids])[:, : self.d]
        rows = self.weight[ids].float()
        return rows if self.scale is None else rows * self.scale[ids][:, None]

    def float(self) -> Tensor:
        """The whole matrix (n, d) in float32."""
        if self.store == "int4" and self.kernels is not None:
            whole = torch.empty(self.n, self.d)
            self.kernels.unpack_matrix(whole.data_ptr(), self._address)
            return whole
        return self[torch.arange(self.n, device=self.device)]

    def n_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.weight, self.scale) if x is not None)


def in_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight (n, d) in 4 bits: words (n, ·) as cpu_kernels.c reads them, and bfloat16 scales
    (n, groups). What is largest in a group, of either sign, becomes -8 times its scale.
    """
    groups = F.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    scale = (largest / -8).bfloat16().float()
    cut = (groups / scale.where(scale != 0, 1)).round().clamp(-8, 7) + 8
    words = (cut.int().unflatten(1, (-1, 4)) << SHIFTS.to(cut.device)).sum(dim=2)
    scale = scale.unflatten(1, (-1, 4)) / PLACES.to(scale.device)
    return words.to(torch.int16).flatten(1), scale.bfloat16().flatten(1)


def out_of_groups(weight: Tensor, scale: Tensor) -> Tensor:
    """The numbers (n, padded d) in float32 that words and scales of `in_groups` stand for."""
    bits = (weight.unflatten(1, (-1, 1, GROUP)) >> SHIFTS.to(weight.device) & 15) - 8
    by = scale.float().unflatten(1, (-1, 4, 1)) * PLACES.to(scale.device)  # (n, ·, 4, 1)
    return (bits * by).flatten(1)


class BlockKernel:
    """A block of model.py for one token of each row, as one call: the fastest way to decode on a
    CPU.
    """

    def __init__(
        self,
        qkv: Matrix,
        o: Matrix,
        up: Matrix,
        down: Matrix,
        *,
        qk_gain: Tensor,
        exclusion: Tensor | None,
        heads: tuple[int, int, int],
    ) -> None:
        # the struct points into these
        self.qk_gain, self.matrices = qk_gain.float().contiguous(), (qkv, o, up, down)
        self.exclusion = None if exclusion is None else exclusion.detach().float().contiguous()
        gains = (None if x is None else x.data_ptr() for x in (self.qk_gain, self.exclusion))
        self.struct = _Block(*(matrix.struct for matrix in self.matrices), *gains, *heads)
        self._address, self._run = ctypes.addressof(self.struct), qkv.kernels.run_block

    def __call__(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        seats: tuple[Tensor, Tensor, Tensor],
        value: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The block's output (B, D) for x (B, D), and `value` as `Model.token_value` gives it. Keys
        and values (S, G, entries, E) are rings, float32 or bfloat16. `seats` are the rows' slots,
        pads and ends (B,), int64: row r writes column end[r] - 1 of its slot and attends to the
        columns from pad[r] on that the ring holds.
        """
        x, y = x.contiguous(), torch.empty(x.shape)
        cache = _Cache(
            keys.data_ptr(), values.data_ptr(), int(keys.dtype == torch.bfloat16), keys.shape[2]
        )
        cos, sin = (t.data_ptr() for t in rotary)
        of_token = _TokenValue()
        if value is not None:
            own, gate = (t.float().contiguous() for t in value)
            of_token = _TokenValue(own.data_ptr(), gate.data_ptr(), gate.shape[1])
        self._run(
            y.data_ptr(),
            self._address,
            x.data_ptr(),
            cos,
            sin,
            of_token,
            cache,
            _Seats(*(t.data_ptr() for t in seats)),
            x.shape[0],
        )
        return y


@functools.cache
def compiled_kernels() -> ctypes.CDLL | None:
    """`cpu_kernels.c`, compiled for this processor; None where there is no C compiler or
    HEARTH_KERNELS is 0.
    """
    if not _kernels_wanted():
        return None
    for compiler in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        if shutil.which(compiler) is None:
            continue
        for link in ([], ["-fopenmp"]):
            try:
                kernels = ctypes.CDLL(str(_compile(compiler, link)))
            except (OSError, subprocess.SubprocessError):
                continue
            pointer, size = ctypes.c_void_p, ctypes.c_int64
            kernels.times_rows.argtypes = [pointer] * 4 + [size]
            kernels.run_block.argtypes = [
                *[pointer] * 5,
                ctypes.POINTER(_TokenValue),
                ctypes.POINTER(_Cache),
                ctypes.POINTER(_Seats),
                size,
            ]
            kernels.unpack_matrix.argtypes = [pointer] * 2
            kernels.unpack_matrix.restype = None
            kernels.times_rows.restype = kernels.run_block.restype = None
            return kernels
    return None


def compiler_missing() -> bool:
    """Whether a C compiler would make decoding on this CPU faster: none was found that works."""
    return _kernels_wanted() and compiled_kernels() is None


def _kernels_wanted() -> bool:
    return os.environ.get("HEARTH_KERNELS") != "0" and platform.system() != "Windows"


def _compile(compiler: str, link: list[str]) -> Path:
    """The shared library made of `cpu_kernels.c`, from the user's cache where it has been made
    before.
    """
    # without a library of its own the kernel finds torch's OpenMP, whose threads it shares
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    flags = ["-O3", "-march=native", "-ffast-math", "-fPIC", "-fopenmp"]
    made_from = [
        SOURCE.read_bytes(),
        repr([compiler, *flags, *link]).encode(),
        _processor().encode(),
    ]
    name = f"cpu-kernels-{hashlib.sha256(b''.join(made_from)).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hearth"
    if (cache / name).exists():
        return cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=cache))
    except OSError:
        cache = folder = Path(tempfile.mkdtemp())
    try:
        compiled, linked = folder / "cpu-kernels.o", folder / name
        subprocess.run(
            [compiler, *flags, "-c", SOURCE, "-o", compiled],
            check=True,
            capture_output=True,
            timeout=60,
        )
        subprocess.run(
            [compiler, "-shared", *link, compiled, "-o", linked],
            check=True,
            capture_output=True,
            timeout=60,
        )
        ctypes.CDLL(str(linked))  # only what can be loaded is kept
        os.replace(linked, cache / name)
    finally:
        if folder != cache:
            shutil.rmtree(folder, ignore_errors=True)
    return cache / name


def _processor() -> str:
    """What the machine can do, so that a home folder shared by several machines holds a library for
    each.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return (
        next((line for line in lines if line.startswith(("flags", "Features"))), "")
        + platform.machine()
    )

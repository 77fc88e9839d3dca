"""The Triton kernels of the compiled parts of a block, made for cards that are not here.

In: compute capabilities. Out: for each the kernels that torch's compiler writes for `Block.before`
and `Block.after`, forward and backward, and whether each becomes machine code (a cubin) there.
Runs on a machine without a card: torch is told of one that does not exist, through functions that
are torch 2.15's own affair. What the code computes, and how fast, only a card can tell.

    uv run benchmarks/kernels.py
        for 8.6 (RTX 30), 8.9 (RTX 40) and 12.0 (RTX 50)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PRESETS, ModelConfig
from hearth.cli import run_script
from model import Block, rotary_table

KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.S)
N_TOKENS = 8192


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", nargs="+", default=["8.6", "8.9", "12.0"])
    parser.add_argument("--preset", default="16gb")
    options = parser.parse_args(argv)
    if len(options.capability) > 1:  # torch asks a card what it is once a process
        for capability in options.capability:
            words = ["--preset", options.preset, "--capability", capability]
            subprocess.run([sys.executable, __file__, *words], check=True)
        return
    (capability,) = options.capability
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    for part, (run, given) in parts(PRESETS[options.preset].model).items():
        cubins = [machine_code(*kernel, capability) for kernel in kernels(run, given, capability)]
        made_for = {architecture(cubin) for cubin in cubins}
        n_bytes = sum(map(len, cubins))
        print(
            f"cc {capability}: {part}: {len(cubins)} kernels, {n_bytes:,} bytes of machine code "
            f"for sm_{', sm_'.join(map(str, sorted(made_for)))}",
            flush=True,
        )


def architecture(cubin: bytes) -> int:
    """The compute capability, times ten, that the flags in a cubin's ELF header name."""
    flags = int.from_bytes(cubin[48:52], "little")
    old, new = flags & 0xFF, flags >> 8 & 0xFF
    return new if cubin[7] == 0x41 else old


Shapes = list[tuple[tuple[int, ...], torch.dtype]]


def parts(config: ModelConfig) -> dict[str, tuple[Callable[..., Any], Shapes]]:
    """What a block computes before and after attention with the gradient to all of its inputs, and
    the shapes of those.
    """
    with torch.device("meta"):
        block = Block(config, config.window)
        rotary = rotary_table(torch.arange(N_TOKENS), config.head_dim, 1e4, torch.bfloat16)
    weights = dict(block.named_parameters())
    x = ((N_TOKENS, config.d_model), torch.bfloat16)
    heads = ((N_TOKENS, config.n_head, config.head_dim), torch.bfloat16)
    turned = [(tuple(t.shape), t.dtype) for t in rotary]
    own = [(tuple(p.shape), p.dtype) for p in weights.values()]

    def before(x, cos, sin, *given):
        q, k, v = with_weights(given, Block.before, x, (cos, sin), None)
        return gradients([q, k, v], [x, *given])

    def after(x, y, *given):
        return gradients([with_weights(given, Block.after, x, y)], [x, y, *given])

    def with_weights(given, part, *inputs):
        named = dict(zip(weights, given, strict=True))
        return part(Stripped(block, named), *inputs)

    return {"before": (before, [x, *turned, *own]), "after": (after, [x, heads, *own])}


class Stripped:
    """A block as its parts see it, with other weights."""

    project, mlp, channel_gains = Block.project, Block.mlp, Block.channel_gains

    def __init__(self, block: Block, weights: dict[str, torch.Tensor]) -> None:
        vars(self).update(block._parameters | weights)
        for name in ("n_head", "n_kv_head", "head_dim", "linear"):
            setattr(self, name, getattr(block, name))


def gradients(outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> tuple[Any, ...]:
    """The outputs, and the gradient of the sum of their squares to each input that has one."""
    total = sum(y.float().square().sum() for y in outputs)
    inputs = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return (*outputs, *(g for g in found if g is not None))


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """As the compiler takes the one of model.py apart, which asks a card for its kernel."""
    exact = x.float()
    return (exact * (exact.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


@contextlib.contextmanager
def pretended(capability: str) -> Iterator[None]:
    """Inside, torch and Triton believe in a card of this compute capability."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    major, minor = map(int, capability.split("."))
    card = SimpleNamespace(
        **{"type": "cuda", "name": "none", "index": 0, "major": major, "minor": minor},
        **{"multi_processor_count": 48, "total_memory": 12 * 2**30, "warp_size": 32},
        **{"max_threads_per_multi_processor": 1536, "max_threads_per_block": 1024},
        **{"regs_per_multiprocessor": 65536, "shared_memory_per_block_optin": 101_376},
        **{"shared_memory_per_multiprocessor": 102_400, "L2_cache_size": 2**25},
        gcnArchName="",
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": card,
        "get_device_capability": (major, minor),
        "get_rng_state": torch.zeros(1),
        "set_rng_state": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    target = GPUTarget("cuda", 10 * major + minor, 32)
    stand_in = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda"),
    )
    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *a, v=value, **k: v))
        known = {"get_device_properties": card, "current_device": 0, "is_available": True}
        known["get_compute_capability"] = 10 * major + minor
        for place in (CudaInterface, CudaInterface.Worker):
            for name, value in known.items():
                answer = staticmethod(lambda *a, v=value, **k: v)
                stack.enter_context(patch.object(place, name, answer, create=True))
        stack.enter_context(patch.object(driver, "_active", stand_in))
        stack.enter_context(patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        yield


class Written(Exception):
    """The compiler has written its code, which is not run."""


def kernels(run: Callable[..., Any], shapes: Shapes, capability: str) -> list[tuple[str, str]]:
    """Name and source of each Triton kernel that torch's compiler writes for `run`."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import reinplace
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    code: list[str] = []

    def write(graph: Any, *words: Any, **named: Any) -> None:
        code.append(graph.codegen()[0].value)
        raise Written

    with (
        pretended(capability),
        FakeTensorMode(),
        patch.object(GraphLowering, "compile_to_module", write),
        patch("model.rms_norm", rms_norm),
        # a pass that only saves copies, and cannot be run on tensors without memory
        patch.object(reinplace, "canonicalize_view_scatter_ops", lambda graph: None),
    ):
        # the gradient is taken apart on a CPU: torch's own engine would ask a card for its stream
        here = [torch.empty(s, dtype=d).requires_grad_() for s, d in shapes]
        joint = make_fx(run, decomposition_table=select_decomp_table())(*here)
        for node in joint.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
        joint.recompile()
        given = [torch.empty(s, dtype=d, device="cuda") for s, d in shapes]
        graph = make_fx(joint)(*given)
        try:
            compile_fx_inner(graph, given)
        except Exception:  # `Written` in one of the compiler's own
            if not code:
                raise
    return KERNEL.findall("\n".join(code))


def machine_code(name: str, source: str, capability: str) -> bytes:
    """The cubin that Triton makes of a kernel, by its first configuration."""
    with pretended(capability), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        made = tuner._precompile_config(tuner.configs[0])
        return Path(made.kernel.cubin_path).read_bytes()


if __name__ == "__main__":
    run_script(main)
